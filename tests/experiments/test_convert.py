"""`prepare_data.py --data=FILE`: from another tool's file to the stages' files, and a step of two stages on them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments import prepare_data, reward_model, sft
from rlhf_jax.data import schema, sources
from rlhf_jax.data.schema import Demonstration, Prompt, Ranking
from rlhf_jax.data.storyland.tokenizer import assets
from rlhf_jax.data.text import load_tokenizer
from rlhf_jax.models import gpt2, language_model, save_hf
from rlhf_jax.run import cli, data_flags
from rlhf_jax.run.config import leaf_keys, load_config, record_reads

ROOT = Path(__file__).parents[2]
CONVERT = f"{ROOT}/configs/data/convert.py"
ANIMALS = ("wren", "fox", "owl", "hare", "newt", "carp", "mole", "toad")


def alpaca(count: int) -> list[dict[str, str]]:
    return [
        {
            "instruction": f"Name animal {i}.\r\nPlease.",
            "input": "",
            "output": f"A {ANIMALS[i % 8]} \u2028\U0001f98a.",
        }
        for i in range(count)
    ]


def pairs(count: int) -> list[dict[str, str]]:
    return [
        {
            "system": "Be kind.",
            "question": f"Name animal {i}.",
            "chosen": f"A {ANIMALS[i % 8]}.",
            "rejected": "No.",
        }
        for i in range(count)
    ]


def put(folder: Path, rows: list[dict], name: str) -> Path:
    text = (
        json.dumps(rows)
        if name.endswith(".json")
        else "".join(json.dumps(row) + "\r\n" for row in rows)
    )
    (folder / name).write_bytes(text.encode())
    return folder / name


def convert(path: Path, out: Path, **keys: str) -> dict[str, int]:
    out.mkdir(parents=True, exist_ok=True)
    return prepare_data.run(load_config(CONVERT, {"data": str(path), **keys}), str(out))


def main(*flags: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(prepare_data.run, config="x", workdir="y", argv=data_flags.expand(flags))
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A network of a few thousand numbers with storyland's tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = load_tokenizer(assets())
    network = language_model(gpt2(len(tokenizer), 512, 1, 16, 2))
    save_hf(folder, network, network.init(jax.random.key(0)), tokenizer)
    return str(folder)


def test_a_form_is_recognised_and_said_and_its_files_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    counts = convert(put(tmp_path, alpaca(60), "alpaca.json"), tmp_path / "out")
    said = "read as Alpaca: instruction + input -> prompt, output -> response"
    assert capsys.readouterr().out.startswith(f"{tmp_path}/alpaca.json: {said}\n")
    report = (tmp_path / "out" / "data_report.txt").read_text()
    assert said in report
    assert "noted: line ends made LF 60" in report
    held = counts.get("demonstrations_validation", 0) + counts.get("prompts_test", 0)
    assert 0 < held < 20
    assert counts["demonstrations"] + held == 60
    records, _ = schema.read_jsonl(tmp_path / "out" / "demonstrations.jsonl", Demonstration)
    assert all(
        r.prompt.startswith("Name animal") and "\n" in r.prompt and "\r" not in r.prompt
        for r in records
    )
    assert all("\u2028\U0001f98a" in r.response for r in records)
    for name in ("prompts_ppo", "prompts_ranking", "prompts_test"):
        assert schema.read_jsonl(tmp_path / "out" / f"{name}.jsonl", Prompt)[0]


def test_a_few_rows_are_enough_and_nothing_is_held_out(tmp_path: Path):
    for count in (1, 2, 3):
        counts = convert(put(tmp_path, alpaca(count), "alpaca.jsonl"), tmp_path / f"out{count}")
        assert counts["demonstrations"] == count
        assert not {"demonstrations_validation", "prompts_test"} & set(counts)
        report = (tmp_path / f"out{count}" / "data_report.txt").read_text()
        assert (
            f"nothing is held out: {count} conversations are fewer than least_conversations=20"
            in report
        )


def test_every_key_of_the_config_is_read(tmp_path: Path, model: str):
    path = put(tmp_path, alpaca(30), "alpaca.json")
    config, reads = record_reads(load_config(CONVERT, {"data": str(path), "model": model}))
    prepare_data.run(config, str(tmp_path))
    unread = leaf_keys(config) - reads
    assert unread <= {"ranked_response_length", "ranking_length"}  # of rankings
    config, more = record_reads(
        load_config(CONVERT, {"data": str(put(tmp_path, pairs(30), "p.jsonl")), "model": model, "form": "trl",
                              "columns": "prompt=question"})
    )  # fmt: skip
    prepare_data.run(config, str(tmp_path))
    assert leaf_keys(config) - reads - more == set()


def test_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(ROOT)
    path = put(tmp_path, pairs(4), "orca.jsonl")
    flags = [f"--data={path}", "--columns", "prompt=question", f"--out={tmp_path / 'out'}"]
    assert main(*flags) == 0
    assert (
        "read as TRL: system -> system turn, prompt -> prompt, chosen over rejected (with question as prompt)"
        in (capsys.readouterr().out)
    )
    ((ranking, *_), _) = schema.read_jsonl(tmp_path / "out" / "rankings.jsonl", Ranking)
    assert [turn.role for turn in ranking.prompt] == ["system", "user"]
    assert main(f"--data={path}", f"--out={tmp_path / 'none'}") == 2
    assert "name its column with --source=trl --columns prompt=question" in capsys.readouterr().err
    assert main("--source=alpac", f"--data={path}", f"--out={tmp_path / 'none'}") == 2
    assert "'alpac' must be one of label_studio, argilla" in capsys.readouterr().err
    assert main("--source=alpaca", f"--out={tmp_path / 'none'}") == 2
    assert "name the file to convert: --data=FILE" in capsys.readouterr().err
    assert main(f"--data={path}", "--columns=question", f"--out={tmp_path / 'none'}") == 2
    assert "write wanted=name,.." in capsys.readouterr().err
    assert main("--data=nowhere.json", f"--out={tmp_path / 'none'}") == 2
    assert "nowhere.json does not exist: check the path" in capsys.readouterr().err
    assert data_flags.expand(["--source=oasst", "--data=t.jsonl.gz"])[:2] == [
        "--config=configs/data/convert.py", "--config.form=oasst",
    ]  # fmt: skip
    assert (
        data_flags.expand(["--source=oasst", "--data_dir=d"])[0] == "--config=configs/data/oasst.py"
    )


def test_the_program_itself(tmp_path: Path):
    """As a user types it, in a process of its own."""
    path = put(tmp_path, alpaca(3), "alpaca.json")
    command = [
        sys.executable,
        "experiments/prepare_data.py",
        f"--data={path}",
        f"--out={tmp_path / 'out'}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out" / "demonstrations.jsonl").read_text().count("\n") == 3


def test_a_demonstration_form_and_a_ranking_form_take_a_step(tmp_path: Path, model: str):
    """From the file as its tool writes it to a model that was trained on it."""
    convert(put(tmp_path, alpaca(4), "alpaca.json"), tmp_path / "sft_data")
    few = {"model": model, "row_length": "256", "batch_size": "8", "epochs": "1"}
    demonstrations = str(tmp_path / "sft_data" / "demonstrations.jsonl")
    sft_config = f"{ROOT}/configs/sft/storyland.py:smoke"
    data = {
        "demonstrations": demonstrations,
        "validation": demonstrations,
        "pretraining_fraction": "0.0",
    }
    (tmp_path / "sft").mkdir()
    assert sft.run(load_config(sft_config, {**few, **data}), str(tmp_path / "sft"))
    convert(put(tmp_path, pairs(4), "orca.jsonl"), tmp_path / "rm_data", columns="prompt=question")
    rankings = str(tmp_path / "rm_data" / "rankings.jsonl")
    data = {
        "rankings": rankings,
        "demonstrations": demonstrations,
        "evaluation.validation_train": rankings,
    }
    (tmp_path / "rm").mkdir()
    assert reward_model.run(
        load_config(f"{ROOT}/configs/reward_model/storyland.py:smoke", {**few, **data}),
        str(tmp_path / "rm"),
    )


def test_real_files(tmp_path: Path, data_dir: Path):
    """Dolly, Alpaca, HH-RLHF and OpenAssistant as they are published."""
    dolly = sources.read_form(data_dir / "dolly_subset" / "dolly_151_clean.jsonl")
    assert (dolly.form, len(dolly.records["demonstrations"])) == ("dolly", 151)
    folder = data_dir / "raschka_instructions"
    demonstrations = sources.read_form(folder / "instruction_data.jsonl.gz")
    assert (demonstrations.form, demonstrations.report.kept) == ("alpaca", 1100)
    rankings = sources.read_form(folder / "preference_data.jsonl.gz")
    assert (rankings.form, rankings.report.dropped) == ("alpaca", {"identical responses": 6})
    assert rankings.report.kept == rankings.report.aside["output"] == 1094
    pairs = sources.read_form(
        data_dir / "hh_rlhf" / "helpful-base.test.jsonl.gz", source="hh_rlhf/helpful-base"
    )
    wanted, counts = sources.read_hh(
        data_dir, split="train", test_fraction=0.0, subsets=("helpful-base",)
    )
    assert (pairs.form, pairs.records["rankings"], pairs.report.dropped) == (
        "hh",
        wanted,
        counts.dropped,
    )
    trees = sources.read_form(next((data_dir / "oasst_en100").glob("*tree*.jsonl.gz")))
    replies, _ = sources.read_oasst(data_dir, split="train", test_fraction=0.0)
    assert {(r.prompt, r.responses) for r in trees.records["rankings"]} == {
        (r.prompt, r.responses) for r in replies
    }
    assert len(trees.records["demonstrations"]) == 247
    with pytest.raises(
        ValueError, match="--source=trl --columns prompt=question,completion=answer"
    ):
        sources.read_form(data_dir / "gsm8k" / "test.jsonl.gz")
