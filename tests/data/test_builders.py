from __future__ import annotations

import gzip
import importlib.util
import json
import pickle
import subprocess
import sys
import typing
from pathlib import Path

import grain
import pytest
import tensorflow_datasets as tfds
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow_datasets.core import registered

from rlhf_jax.data import builders, schema, sources, tfds_records
from rlhf_jax.data.schema import Demonstration, Message, PlainText, Prompt, Ranking

TURNS = (Message("system", "Be brief."), Message("user", "caf\u00e9?"))
DEMONSTRATIONS = [
    Demonstration(
        "Write.",
        "Roses.\n\nRed \u2028 ones.",
        id="1",
        source="api",
        use_case="generation",
        labeler="a",
    ),
    Demonstration(TURNS, "Yes."),
    Demonstration("Stop at once.", ""),
]
RANKINGS = [
    Ranking(
        "p",
        ("a", "b", "c"),
        (0, 1, 1),
        "x",
        labeler="l",
        labeler_group="g",
        temperatures=(0.7, 1.0, 0.1),
    ),
    Ranking(TURNS, ("a", "b"), (1, 0), policies=("175B", "sft")),
    Ranking(
        "q",
        tuple(map(str, range(9))),
        (8, 7, 6, 5, 4, 3, 2, 0, -1),
        user="u",
        time="2022-01-27",
        revision=0,
    ),
]
PROMPTS = [Prompt("p", id="1", use_case="chat"), Prompt(TURNS, source="labeler")]


def lines(path: Path, *rows: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(b"\n".join(json.dumps(row).encode() for row in rows)))


def hh(path: Path, count: int = 40) -> Path:
    form = "\n\nHuman: question {}\n\nAssistant: {}"
    rows = [
        {"chosen": form.format(k, "good"), "rejected": form.format(k, "bad")} for k in range(count)
    ]
    lines(path / "helpful-base" / "train.jsonl.gz", *rows)
    return path


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("name", "kind", "base", "records"),
    [
        ("instruct_gpt_sft", Demonstration, "demonstrations", DEMONSTRATIONS),
        ("instruct_gpt_rm", Ranking, "rankings", RANKINGS),
        ("instruct_gpt_ppo", Prompt, "prompts", PROMPTS),
    ],
)
def test_json_lines_come_back_equal_and_in_order(
    tmp_path: Path, name: str, kind: type, base: str, records: list
):
    schema.write_jsonl(tmp_path / f"{base}.jsonl", records)
    schema.write_jsonl(tmp_path / f"{base}_val.jsonl.gz", records[:1])
    schema.write_jsonl(tmp_path / f"{base}-held-out.jsonl", records[1:])
    options = {"allow_empty_responses": True}
    counts, report = builders.build(name, tmp_path / "tfds", data_dir=tmp_path, **options)
    assert counts == {"train": len(records), "validation": 1, "held_out": len(records) - 1}
    assert (report.rows, report.kept) == (2 * len(records), 2 * len(records))
    wanted, _ = schema.read_jsonl(tmp_path / f"{base}.jsonl", kind, **options)
    assert list(builders.read(name, tmp_path / "tfds", "train")) == wanted == records
    assert list(builders.read(name, tmp_path / "tfds", "held_out")) == records[1:]


def test_splits_by_name_and_by_mapping(tmp_path: Path):
    for name in ("train", "dev", "test", "other"):
        schema.write_jsonl(tmp_path / f"{name}.jsonl", [Prompt(name)])
    counts, _ = builders.build("instruct_gpt_ppo", tmp_path / "a", data_dir=tmp_path)
    assert counts == {"train": 1, "validation": 1, "test": 1}
    schema.write_jsonl(tmp_path / "prompts_ppo.jsonl", [Prompt("own")])
    builders.build("instruct_gpt_ppo", tmp_path / "b", data_dir=tmp_path)
    assert list(builders.read("instruct_gpt_ppo", tmp_path / "b")) == [Prompt("own")]
    files = {"train": ["other.jsonl", "dev.jsonl"], "test": "test.jsonl"}
    counts, _ = builders.build("instruct_gpt_ppo", tmp_path / "c", data_dir=tmp_path, files=files)
    assert counts == {"train": 2, "test": 1}
    assert [p.prompt for p in builders.read("instruct_gpt_ppo", tmp_path / "c")] == ["other", "dev"]
    schema.write_jsonl(tmp_path / "prompts.jsonl", [Prompt("own")])
    with pytest.raises(ValueError, match="are all one split: keep one, or pass files="):
        builders.build("instruct_gpt_ppo", tmp_path / "d", data_dir=tmp_path)


def test_hh_rlhf_equals_the_reader(tmp_path: Path):
    hh(tmp_path)
    counts, report = builders.build(
        "hh_rlhf", tmp_path / "tfds", data_dir=tmp_path, test_fraction=0.3
    )
    assert counts == {
        "train": report.noted["records in the train split"],
        "test": 40 - counts["train"],
    }
    for split in ("train", "test"):
        wanted, _ = sources.read_hh(tmp_path, split=split, test_fraction=0.3)
        assert list(builders.read("hh_rlhf", tmp_path / "tfds", split)) == wanted
    counts, _ = builders.build("hh_rlhf", tmp_path / "whole", data_dir=tmp_path, test_fraction=0.0)
    assert counts == {"train": 40}


def test_oasst_and_text_equal_the_readers(tmp_path: Path):
    turns = [{"role": "prompter", "text": "Hi"}]
    rows = [{"prompt": turns, "responses": ["a", "b", "c"], "ranks": [0, 0, 2]}]
    lines(tmp_path / "oasst" / "rankings.jsonl.gz", *rows)
    builders.build("oasst_rankings", tmp_path / "tfds", data_dir=tmp_path, test_fraction=0.0)
    wanted, _ = sources.read_oasst(tmp_path, split="train", test_fraction=0.0)
    assert list(builders.read("oasst_rankings", tmp_path / "tfds")) == wanted
    (tmp_path / "english_text").mkdir()
    (tmp_path / "english_text" / "a.txt").write_text("one<|endoftext|>two")
    builders.build("plain_text", tmp_path / "tfds", data_dir=tmp_path, separator="<|endoftext|>")
    assert [d.text for d in builders.read("plain_text", tmp_path / "tfds")] == ["one", "two"]
    files = {"train": "english_text/a.txt", "validation": [tmp_path / "english_text"]}
    counts, _ = builders.build("plain_text", tmp_path / "b", data_dir=tmp_path, files=files)
    assert counts == {"train": 1, "validation": 1}
    assert list(builders.read("plain_text", tmp_path / "b")) == sources.read_english(tmp_path)[0]
    assert builders.read("plain_text", tmp_path / "b")[0] == PlainText(
        "one<|endoftext|>two", source="a.txt"
    )


# ------------------------------------------------------------------------------------------------------ the records


def some(hint: object) -> st.SearchStrategy:
    """Values of a field's type, as the schema's rules allow them."""
    text = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8)
    turns = st.lists(
        st.builds(Message, st.sampled_from(schema.ROLES), text), min_size=1, max_size=3
    ).map(tuple)
    found = {
        str: text,
        int: st.integers(0, 9),
        tuple[str, ...]: st.lists(text, min_size=1, max_size=9).map(tuple),
        tuple[int, ...]: st.lists(st.integers(-1, 8), min_size=1, max_size=9).map(tuple),
        tuple[float, ...]: st.lists(st.floats(0, 1e6), min_size=1, max_size=9).map(tuple),
        tuple[Message, ...]: turns,
        type(None): st.none(),
    }
    return found[hint] if hint in found else st.one_of(*map(found.get, typing.get_args(hint)))


@pytest.mark.parametrize("kind", [Demonstration, Ranking, Prompt, PlainText])
def test_any_record_survives_a_row(kind: type):
    """Every field of every record, so a field that is added to the schema is tested as well."""
    columns = tfds_records.features(kind)
    hints = typing.get_type_hints(kind)

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.fixed_dictionaries({name: some(hints[name]) for name in kind.__struct_fields__}))
    def check(values: dict):
        wanted = kind(**values)
        data = columns.serialize_example(tfds_records.row_of(wanted))
        assert tfds_records.record(columns.deserialize_example_np(data), kind) == wanted

    check()


def test_a_row_of_an_older_build_lacks_fields():
    row = {"prompt": b"p", "response": b"r", "id": b""}
    assert tfds_records.record(row, Demonstration) == Demonstration("p", "r")


def test_records_are_a_sequence(tmp_path: Path):
    schema.write_jsonl(tmp_path / "prompts.jsonl", [Prompt(f"prompt {k}") for k in range(600)])
    builders.build("instruct_gpt_ppo", tmp_path / "tfds", data_dir=tmp_path)
    found = builders.read("instruct_gpt_ppo", tmp_path / "tfds")
    assert len(found) == 600
    assert (found[0].prompt, found[-1].prompt, found[599].prompt) == (
        "prompt 0",
        "prompt 599",
        "prompt 599",
    )
    assert [p.prompt for p in found[3:8:2]] == ["prompt 3", "prompt 5", "prompt 7"]
    assert [p.prompt for p in found] == [f"prompt {k}" for k in range(600)]
    with pytest.raises(IndexError):
        found[600]
    assert len(builders.read("instruct_gpt_ppo", tmp_path / "tfds", "train[:25%]")) == 150
    shuffled = grain.MapDataset.source(found).shuffle(seed=0).map(lambda p: p.prompt)
    assert sorted(shuffled) == sorted(p.prompt for p in found)
    assert pickle.loads(pickle.dumps(found))[7] == found[7]  # as grain's worker processes need it


# ---------------------------------------------------------------------------------------------------- the data set


def test_no_tensorflow_and_no_need_of_this_package(tmp_path: Path):
    hh(tmp_path)
    build = (
        "import sys; from rlhf_jax.data import sources; assert 'tensorflow_datasets' not in sys.modules\n"
        "from rlhf_jax.data import builders\n"
        "builders.build('hh_rlhf', sys.argv[2], data_dir=sys.argv[1])\n"
        "print(builders.read('hh_rlhf', sys.argv[2])[0])\n"
        "assert not {'tensorflow', 'torch'} & set(sys.modules), sys.modules"
    )
    done = python(build, str(tmp_path), str(tmp_path / "tfds"))
    assert done.returncode == 0, done.stderr
    assert "Ranking(" in done.stdout
    read = (
        "import sys; import tensorflow_datasets as tfds\n"
        "rows = tfds.data_source('hh_rlhf', data_dir=sys.argv[1], split='train', download=False)\n"
        "print(rows[0]['responses'], [int(r) for r in rows[0]['ranks']])\n"
        "assert not {'tensorflow', 'torch', 'rlhf_jax'} & set(sys.modules)"
    )
    done = python(read, str(tmp_path / "tfds"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[b'good', b'bad'] [0, 1]\n"


def test_equal_sources_give_equal_bytes(tmp_path: Path):
    hh(tmp_path / "here")
    hh(tmp_path / "elsewhere")
    for name in ("here", "elsewhere"):
        builders.build("hh_rlhf", tmp_path / f"of_{name}", data_dir=tmp_path / name)
    files = [
        p.relative_to(tmp_path / "of_here")
        for p in (tmp_path / "of_here").rglob("*")
        if p.is_file()
    ]
    assert len(files) >= 5
    for file in files:
        assert (tmp_path / "of_here" / file).read_bytes() == (
            tmp_path / "of_elsewhere" / file
        ).read_bytes(), file


def test_facts_are_in_the_info(tmp_path: Path):
    hh(tmp_path)
    builders.build("hh_rlhf", tmp_path / "tfds", data_dir=tmp_path)
    info = tfds.builder_from_directory(tmp_path / "tfds" / "hh_rlhf" / "1.0.0").info
    assert info.redistribution_info.license == "MIT, Copyright (c) 2022 Anthropic"
    assert "2204.05862" in str(info.citation)
    assert info.splits["train"].num_examples + info.splits["test"].num_examples == 40
    assert info.metadata is not None
    assert dict(info.metadata)["report"]["rows"] == 40
    for name, builder in builders.BUILDERS.items():
        assert builder.name == name
        assert set(builder.about) == {"description", "homepage", "license", "citation"}


def test_building_twice_and_building_something_else(tmp_path: Path):
    hh(tmp_path / "a")
    first = builders.build("hh_rlhf", tmp_path / "tfds", data_dir=tmp_path / "a")
    assert builders.build("hh_rlhf", tmp_path / "tfds", data_dir=tmp_path / "a") == first
    hh(tmp_path / "b", count=39)
    with pytest.raises(
        ValueError, match="was built from other records: remove that folder, or pass another"
    ):
        builders.build("hh_rlhf", tmp_path / "tfds", data_dir=tmp_path / "b")
    with pytest.raises(ValueError, match="was built from other records"):
        builders.build("hh_rlhf", tmp_path / "tfds", data_dir=tmp_path / "a", test_fraction=0.5)


def test_an_interrupted_build_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hh(tmp_path)
    row = tfds_records.row_of

    def fails(record: Ranking) -> dict:
        if record.prompt.endswith("question 20\n\nAssistant:"):
            raise KeyboardInterrupt
        return row(record)

    monkeypatch.setattr(builders, "row_of", fails)
    with pytest.raises(KeyboardInterrupt):
        builders.build("hh_rlhf", tmp_path / "tfds", data_dir=tmp_path)
    with pytest.raises(
        ValueError, match=r"no hh_rlhf in .*: build it first, with build\('hh_rlhf', "
    ):
        builders.read("hh_rlhf", tmp_path / "tfds")
    monkeypatch.setattr(builders, "row_of", row)
    counts, _ = builders.build("hh_rlhf", tmp_path / "tfds", data_dir=tmp_path)
    assert sum(counts.values()) == 40


def test_damage_is_noticed(tmp_path: Path):
    hh(tmp_path)
    builders.build("hh_rlhf", tmp_path / "tfds", data_dir=tmp_path)
    file = next((tmp_path / "tfds").rglob("*train.array_record*"))
    whole = file.read_bytes()
    for damaged in (
        whole[: len(whole) // 2],
        b"",
        bytes([*whole[:100], whole[100] ^ 1, *whole[101:]]),
    ):
        file.write_bytes(damaged)
        for use in (
            lambda: list(builders.read("hh_rlhf", tmp_path / "tfds")),
            lambda: builders.build("hh_rlhf", tmp_path / "tfds", data_dir=tmp_path),
        ):
            with pytest.raises(
                ValueError, match=r"cannot be read .*remove the folder .* and build it again"
            ):
                use()
    (file.parent / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match=r"is damaged .*: remove it and build again"):
        builders.read("hh_rlhf", tmp_path / "tfds")


def test_a_second_import_is_no_error():
    """Unlike a builder that TFDS lists by name: jaxtyping's hook, notebooks and importlib.reload import again."""
    for name in ("first", "second"):
        spec = importlib.util.spec_from_file_location(f"builders_{name}", builders.__file__)
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert not set(builders.BUILDERS) & set(registered.list_imported_builders())


# --------------------------------------------------------------------------------------------------------- mistakes


def test_mistakes_are_one_clear_line(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"'hh' is no builder: choose one of instruct_gpt_sft, .*hh_rlhf"
    ):
        builders.build("hh", tmp_path)
    with pytest.raises(
        ValueError, match=r"instruct_gpt_sft is no public data set .*--data_dir=FOLDER"
    ):
        builders.build("instruct_gpt_sft", tmp_path)
    with pytest.raises(ValueError, match=r"is no folder: check the path"):
        builders.build("instruct_gpt_sft", tmp_path, data_dir=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no demonstrations\*\.jsonl and no train\.jsonl in"):
        builders.build("instruct_gpt_sft", tmp_path, data_dir=tmp_path)
    with pytest.raises(ValueError, match="files is empty"):
        builders.build("plain_text", tmp_path, files={})
    with pytest.raises(ValueError, match="test_fraction=2"):
        builders.build("hh_rlhf", tmp_path, test_fraction=2.0)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "p"}\n{"prompt": 7}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl:2: field 'prompt' must be a string"):
        builders.build("instruct_gpt_ppo", tmp_path / "tfds", data_dir=tmp_path)
    counts, report = builders.build(
        "instruct_gpt_ppo", tmp_path / "tfds", data_dir=tmp_path, max_bad_fraction=0.5
    )
    assert (counts, report.rows) == ({"train": 1}, 2)
    with pytest.raises(ValueError, match=r"split='test' of .*: choose one of train"):
        builders.read("instruct_gpt_ppo", tmp_path / "tfds", "test")
    with pytest.raises(ValueError, match=r"split='train\[x\]' of .* cannot be opened"):
        builders.read("instruct_gpt_ppo", tmp_path / "tfds", "train[x]")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("hh_rlhf", r"helpful-base/train\.jsonl\.gz"),
        ("oasst_rankings", r"2023.*trees"),
        ("plain_text", "wikitext-2"),
    ],
)
def test_without_network_the_file_and_the_way_out_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str
):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match=rf"cannot download {file}.*check the network, or .*--data_dir=FOLDER"
    ):
        builders.build(name, tmp_path / "tfds")
    assert not (tmp_path / "tfds").exists()


def test_a_missing_package_names_the_extra():
    code = "import sys; sys.modules['tensorflow_datasets'] = None; import rlhf_jax.data.builders"
    done = python(code)
    assert (
        'ValueError: TFDS builders need tensorflow_datasets: pip install "rlhf_jax[data]"'
        in done.stderr
    )


# ------------------------------------------------------------------------------------------------------- real files


def test_real_hh_rlhf_and_openassistant(data_dir: Path, tmp_path: Path):
    for name, reader, options in (
        ("hh_rlhf", sources.read_hh, {"subsets": ("helpful-base",)}),
        ("oasst_rankings", sources.read_oasst, {}),
    ):
        counts, report = builders.build(name, tmp_path, data_dir=data_dir, **options)
        assert sum(counts.values()) == report.kept > 200
        for split in ("train", "test"):
            wanted, _ = reader(data_dir, split=split, **options)
            assert list(builders.read(name, tmp_path, split)) == wanted
