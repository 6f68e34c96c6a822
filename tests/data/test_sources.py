from __future__ import annotations

import collections
import gzip
import json
import sys
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from rlhf_jax.data import schema, sources
from rlhf_jax.data.schema import Demonstration, Message, Prompt, Ranking, strict_pairs


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(b"\n".join(json.dumps(row).encode() for row in rows)))
    return path


def pair(prompt: str, chosen: str, rejected: str, other: str | None = None) -> dict[str, str]:
    form = "\n\nHuman: {}\n\nAssistant: {}"
    return {
        "chosen": form.format(prompt, chosen),
        "rejected": form.format(other or prompt, rejected),
    }


EVERYTHING = {"split": "train", "test_fraction": 0.0}


def test_hh_pairs_are_cut_at_the_last_assistant_turn(tmp_path: Path):
    turns = "one\n\nAssistant: two\n\nHuman: three"
    write(
        tmp_path / "helpful-base.test.jsonl.gz",
        pair(turns, " good ", "bad"),
        pair("p", "same", " same"),
        pair("p", "a", "b", other="q"),
        pair("p", "a", " "),
        {"chosen": "\n\nHuman: p", "rejected": "\n\nHuman: p"},
    )
    records, report = sources.read_hh(tmp_path, split="train", test_fraction=0.0)
    prompt = "Human: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"
    assert records == [Ranking(prompt, ("good", "bad"), (0, 1), source="hh_rlhf/helpful-base")]
    assert report.dropped == {
        "identical responses": 1,
        "prompts differ": 1,
        "empty response": 1,
        "no Assistant turn": 1,
    }
    assert (report.rows, report.kept) == (5, 1)


def test_hh_layouts_and_subsets(tmp_path: Path):
    write(tmp_path / "hh_rlhf" / "helpful-base" / "train.jsonl.gz", pair("a", "x", "y"))
    write(tmp_path / "hh_rlhf" / "harmless-base.test.jsonl.gz", pair("b", "x", "y"))
    write(tmp_path / "hh_rlhf" / "red-team-attempts" / "train.jsonl.gz", {"other": "form"})
    records, _ = sources.read_hh(tmp_path, split="train", test_fraction=0.0)
    assert {r.source for r in records} == {"hh_rlhf/helpful-base", "hh_rlhf/harmless-base"}
    records, _ = sources.read_hh(
        tmp_path, split="train", test_fraction=0.0, subsets=("harmless-base",)
    )
    assert [r.prompt for r in records] == ["Human: b\n\nAssistant:"]


def test_a_damaged_row_is_an_error_even_among_expected_drops(tmp_path: Path):
    write(
        tmp_path / "helpful-base.jsonl.gz",
        pair("p", "same", "same"),
        pair("p", "a", "b"),
        {"chosen": "x"},
    )
    with pytest.raises(
        ValueError, match=r"helpful-base\.jsonl\.gz:3: field 'rejected' must be a string"
    ):
        sources.read_hh(tmp_path, split="train", test_fraction=0.0)


def test_no_conversation_is_in_both_splits(tmp_path: Path):
    """Prompts of train and test are disjoint by first human turn, and the split does not depend on the file."""
    rows = [
        pair(f"Question {i % 50}?\n\nAssistant: a\n\nHuman: more {i}", "x", "y") for i in range(200)
    ]
    write(tmp_path / "helpful-base" / "train.jsonl.gz", *rows)
    splits = {s: sources.read_hh(tmp_path, split=s, test_fraction=0.3) for s in ("train", "test")}
    first = {s: {r.prompt.split("\n\n")[0] for r in records} for s, (records, _) in splits.items()}
    assert first["train"].isdisjoint(first["test"])
    assert len(first["train"]) + len(first["test"]) == 50
    assert 5 <= len(first["test"]) <= 25
    assert splits["test"][1].noted == {"records in the test split": len(splits["test"][0])}
    for i in range(20):
        follow_up = sources.in_test_split(
            f"Human: hello {i}\n\nAssistant: x\n\nHuman: y\n\nAssistant:", fraction=0.5
        )
        assert (
            sources.in_test_split(f"Human:  Hello  {i} \n\nAssistant:", fraction=0.5) == follow_up
        )


def message(text: str, role: str, *replies: dict, **fields: object) -> dict:
    return {
        "message_id": text,
        "text": text,
        "role": role,
        "lang": "en",
        "replies": list(replies),
        **fields,
    }


TREE = {
    "prompt": message(
        "Hello",
        "prompter",
        message("second", "assistant", rank=1),
        message(
            "first",
            "assistant",
            message("And?", "prompter", message("alone", "assistant", rank=None)),
            rank=0,
        ),
        message("gone", "assistant", rank=2, deleted=True),
        message("hola", "assistant", rank=3, lang="es"),
        message("machine", "assistant", rank=4, synthetic=True),
    )
}


def test_oasst_trees_become_rankings_and_demonstrations(tmp_path: Path):
    write(tmp_path / "trees.jsonl.gz", TREE)
    rankings, _ = sources.read_oasst(tmp_path, split="train", test_fraction=0.0)
    assert rankings == [
        Ranking(
            "Human: Hello\n\nAssistant:",
            ("first", "second", "machine"),
            (0, 1, 4),
            "Hello",
            "oasst",
        )
    ]
    demonstrations, _ = sources.read_oasst_demonstrations(
        tmp_path, split="train", test_fraction=0.0
    )
    follow_up = "Human: Hello\n\nAssistant: first\n\nHuman: And?\n\nAssistant:"
    assert demonstrations == [
        Demonstration("Human: Hello\n\nAssistant:", "first", "Hello", "oasst"),
        Demonstration(follow_up, "alone", "And?", "oasst"),
    ]


def test_oasst_derived_file(tmp_path: Path):
    turns = [{"role": "prompter", "text": "Hi"}]
    write(
        tmp_path / "oasst" / "rankings.jsonl.gz",
        {"prompt": turns, "responses": ["a", "b"], "ranks": [0, 0]},
    )
    rankings, _ = sources.read_oasst(tmp_path, split="train", test_fraction=0.0)
    assert rankings == [Ranking("Human: Hi\n\nAssistant:", ("a", "b"), (0, 0), source="oasst")]
    write(
        tmp_path / "oasst" / "rankings.jsonl.gz",
        {"prompt": turns, "responses": ["a", "b"], "ranks": [0]},
    )
    with pytest.raises(ValueError, match="same length"):
        sources.read_oasst(tmp_path, split="train", test_fraction=0.0)


def test_best_responses_take_the_best_rank():
    rankings = [Ranking("p", ("a", "b", "c", "d"), (2, -1, 1, 1), id="7")]
    assert sources.best_responses(rankings) == [Demonstration("p", "c", id="7")]


def test_text_files_become_documents(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\n\ntwo<|endoftext|> \n<|endoftext|>three")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("caf\u00e9".encode()))
    write(tmp_path / "c.jsonl.gz", {"text": "four", "extra": 1})
    (tmp_path / "README.md").write_text("not data")
    documents, report = sources.read_text(tmp_path, separator="<|endoftext|>")
    assert sorted(d.text for d in documents) == ["caf\u00e9", "four", "one\n\ntwo", "three"]
    assert (report.rows, report.kept, report.dropped) == (5, 4, {"empty document": 1})
    assert len(sources.read_text(tmp_path / "a.txt")[0]) == 1
    (tmp_path / "d.txt").write_bytes(b"\xff\xfeab")
    with pytest.raises(ValueError, match=r"d\.txt: byte 0 is not UTF-8"):
        sources.read_text(tmp_path / "d.txt")
    write(tmp_path / "e.jsonl.gz", {"text": "good"}, {"text": ""})
    with pytest.raises(ValueError, match=r"e\.jsonl\.gz:2: field 'text' is empty"):
        sources.read_text(tmp_path / "e.jsonl.gz")


@pytest.mark.parametrize(
    "read", [sources.read_hh, sources.read_oasst, sources.read_oasst_demonstrations]
)
def test_missing_data_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read):
    with pytest.raises(ValueError, match="is no folder: check the path"):
        read(tmp_path / "nowhere", split="train")
    with pytest.raises(ValueError, match="pass the folder that holds"):
        read(tmp_path, split="train")

    def offline(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("no connection\nand a long story")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(
        ValueError, match=r"cannot download .* check the network, or .* pass data_dir"
    ) as caught:
        read(split="train")
    assert "\n" not in str(caught.value)


def test_the_real_client_without_network_gives_the_same_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"cannot download helpful-base/train\.jsonl\.gz of Anthropic/hh-rlhf"
    ):
        sources.read_hh(split="train")


def test_bad_split_and_empty_split(tmp_path: Path):
    write(tmp_path / "helpful-base.jsonl.gz", pair("p", "a", "b"))
    with pytest.raises(ValueError, match=r"the test split .* is empty"):
        sources.read_hh(tmp_path, split="test", test_fraction=0.0)
    with pytest.raises(ValueError, match="test_fraction=2"):
        sources.read_hh(tmp_path, split="test", test_fraction=2)


# ------------------------------------------------------------------------------------------------- tables (TRL, HF)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def said(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def save_parquet(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def save_arrow(
    path: Path, rows: list[dict], *, batches: int = 1, file_format: bool = False
) -> Path:
    """As `datasets` writes it: the stream format, several record batches."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    new = pa.ipc.new_file if file_format else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=-(-len(rows) // batches))
    return path


def save_to_disk(folder: Path, shards: list[list[dict]], **state: object) -> Path:
    """The layout of `Dataset.save_to_disk`."""
    names = [f"data-{k:05}-of-{len(shards):05}.arrow" for k in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        save_arrow(folder / name, rows)
    about = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "a8e8c2c43b24df5a",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
        **state,
    }
    (folder / "state.json").write_text(json.dumps(about, indent=2))
    info = {"citation": "", "description": "", "features": {}, "homepage": "", "license": ""}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))
    return folder


def pairs_of(start: int, count: int) -> list[dict]:
    return [
        {"prompt": f"p{k}", "chosen": "good", "rejected": "bad"}
        for k in range(start, start + count)
    ]


TURNS = (Message("user", "Hi"), Message("assistant", "Hello."), Message("user", "Who?"))
BEFORE = [user("Hi"), said("Hello."), user("Who?")]
PAIRS = {
    "texts": (
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        "The sky is",
        ("blue.", "green."),
    ),
    "texts with the prompt in them": (
        {"prompt": "The sky is", "chosen": "The sky is blue.", "rejected": "The sky is black."},
        "The sky is",
        ("blue.", "black."),
    ),
    "one text goes on where the other ends": (
        {"prompt": "The sky is", "chosen": "blue today.", "rejected": "blue"},
        "The sky is",
        ("blue today.", "blue"),
    ),
    "dialogues": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Good day",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Go away",
        },
        "Human: Hi\n\nAssistant:",
        ("Good day", "Go away"),
    ),
    "messages": (
        {"prompt": BEFORE, "chosen": [said("Me.")], "rejected": [said("You.")]},
        TURNS,
        ("Me.", "You."),
    ),
    "messages with the prompt in them": (
        {"chosen": [*BEFORE, said("Me.")], "rejected": [*BEFORE, said("You.")]},
        TURNS,
        ("Me.", "You."),
    ),
    "messages with the prompt twice": (
        {"prompt": BEFORE, "chosen": [*BEFORE, said("Me.")], "rejected": [*BEFORE, said("You.")]},
        TURNS,
        ("Me.", "You."),
    ),
    "a text and messages that repeat it": (
        {
            "prompt": "Who?",
            "chosen": [user("Who?"), said("Me.")],
            "rejected": [user("Who?"), said("You.")],
        },
        (Message("user", "Who?"),),
        ("Me.", "You."),
    ),
}


@pytest.mark.parametrize("form", PAIRS)
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".parquet", ".arrow"])
def test_pairs_in_every_form_and_file(tmp_path: Path, form: str, suffix: str):
    row, prompt, responses = PAIRS[form]
    save = {
        ".jsonl.gz": lambda path, rows: write(path, *rows),
        ".parquet": save_parquet,
        ".arrow": save_arrow,
    }[suffix]
    path = save(tmp_path / f"pairs{suffix}", [{**row, "id": "7", "labeler": "x", "score": 3.5}])
    records, report = sources.read_pairs(path, source="trl")
    assert records == [Ranking(prompt, responses, (0, 1), id="7", source="trl", labeler="x")]
    assert (report.rows, report.kept) == (1, 1)
    schema.write_jsonl(tmp_path / "again.jsonl", records)
    assert schema.read_jsonl(tmp_path / "again.jsonl", Ranking)[0] == records


def test_demonstrations_and_prompts(tmp_path: Path):
    completions = [
        {"prompt": "The sky is", "completion": " blue."},
        {"prompt": "It is", "completion": [said("late.")]},
    ]
    records, _ = sources.read_completions(write(tmp_path / "a.jsonl.gz", *completions))
    assert records == [Demonstration("The sky is", "blue."), Demonstration("It is", "late.")]
    rows = [{"prompt": BEFORE, "completion": [said("Me.")]}]
    assert sources.read_completions(save_parquet(tmp_path / "b.parquet", rows))[0] == [
        Demonstration(TURNS, "Me.")
    ]
    system = {"role": "system", "content": "Be brief."}
    rows = [{"messages": [system, *BEFORE, said("Me.")], "prompt": None}]
    records, _ = sources.read_completions(save_arrow(tmp_path / "c.arrow", rows), source="chat")
    assert records == [
        Demonstration((Message("system", "Be brief."), *TURNS), "Me.", source="chat")
    ]
    path = write(
        tmp_path / "d.jsonl.gz", {"prompt": "p", "id": "1", "extra": 2}, {"prompt": BEFORE}
    )
    assert sources.read_prompts(path)[0] == [Prompt("p", id="1"), Prompt(TURNS)]


def test_rated_responses_become_ranks_with_ties(tmp_path: Path):
    row = {
        "prompt": "p",
        "responses": ["a", " b ", "c", "d", "e"],
        "scores": [3, 4.5, 3.0, None, -1],
    }
    records, _ = sources.read_rated(write(tmp_path / "a.jsonl.gz", row))
    assert records == [Ranking("p", ("a", "b", "c", "d", "e"), (1, 0, 1, -1, 2))]
    given = [("m1", "a", 7.0), ("m2", "b", float("nan")), ("m3", "c", 8.5)]
    row = {
        "instruction": "q",
        "completions": [{"model": m, "response": r, "overall_score": s} for m, r, s in given],
    }
    records, _ = sources.read_rated(
        save_parquet(tmp_path / "b.parquet", [{"source": "ultra", **row}])
    )
    assert records == [
        Ranking("q", ("a", "b", "c"), (1, -1, 0), source="ultra", policies=("m1", "m2", "m3"))
    ]
    bad = {"prompt": "p", "responses": ["a", "b"], "scores": [1, "2"]}
    with pytest.raises(
        ValueError, match=r"c\.jsonl\.gz:1: field 'scores\[1\]' must be a number or null, got str"
    ):
        sources.read_rated(write(tmp_path / "c.jsonl.gz", bad))
    with pytest.raises(ValueError, match="a number for each response"):
        sources.read_rated(
            write(tmp_path / "d.jsonl.gz", {"prompt": "p", "responses": ["a", "b"], "scores": [1]})
        )


def test_a_public_set_has_expected_drops(tmp_path: Path):
    rows = [
        *pairs_of(0, 1),
        {"prompt": "p", "chosen": "same", "rejected": "same "},
        {"prompt": "p", "chosen": "a", "rejected": ""},
        {
            "prompt": None,
            "chosen": [user("q"), said("no")],
            "rejected": [user("r"), said("shared beginning")],
        },
        {"prompt": None, "chosen": "q: a\n\nAssistant: x", "rejected": "q: b\n\nAssistant: y"},
    ]
    path = write(
        tmp_path / "a.jsonl.gz", *rows
    )  # texts in one row and messages in another: no arrow column
    records, report = sources.read_pairs(path)
    assert [r.prompt for r in records] == ["p0"]
    assert report.dropped == {"identical responses": 1, "empty response": 1, "prompts differ": 2}
    assert report.places["prompts differ"] == [f"{path}:4", f"{path}:5"]
    assert report.rows == report.kept + sum(report.dropped.values()) == 5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, "field 'rejected' is missing: the row has chosen, prompt"),
        (
            {"prompt": 3, "chosen": "a", "rejected": "b"},
            "field 'prompt' must be a text or a list of messages, got int",
        ),
        (
            {"prompt": "p", "chosen": [user("x"), said("y")], "rejected": [said("z")]},
            "2 messages answer the prompt",
        ),
        (
            {"chosen": "a", "rejected": [user("x"), said("y")]},
            "a text alone does not say what it answers",
        ),
        ({"prompt": [said("x")], "chosen": "a", "rejected": "b"}, "the user's turn is due"),
        (
            {"prompt": [{"role": "tool", "content": "x"}], "chosen": "a", "rejected": "b"},
            "must be one of system, user",
        ),
        ({"prompt": ["x"], "chosen": "a", "rejected": "b"}, "must be an object, got str"),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "id": "first"},
            "'first' is also in an earlier row",
        ),
    ],
)
def test_bad_rows_are_named_by_file_and_row(tmp_path: Path, row: dict, message: str):
    good = [{**p, "id": name} for p, name in zip(pairs_of(0, 3), ("first", "2", "3"), strict=True)]
    path = write(tmp_path / "pairs.jsonl.gz", *good, row)
    with pytest.raises(ValueError, match=r"1 of 4 rows of .* are bad") as caught:
        sources.read_pairs(path)
    assert f"{path}:4: " in str(caught.value)
    assert message in str(caught.value)
    records, report = sources.read_pairs(path, max_bad_fraction=0.25)
    assert (len(records), report.rows, sum(report.dropped.values())) == (3, 4, 1)


def test_folders_of_save_to_disk(tmp_path: Path):
    one = save_to_disk(tmp_path / "one", [pairs_of(0, 2), pairs_of(2, 1)])
    save_arrow(one / "cache-0123456789abcdef.arrow", pairs_of(90, 1))
    records, report = sources.read_pairs(one)
    assert [r.prompt for r in records] == ["p0", "p1", "p2"]
    assert report.rows == 3
    both = tmp_path / "both"
    save_to_disk(both / "train", [pairs_of(0, 2)])
    save_to_disk(both / "test", [pairs_of(5, 1)])
    (both / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert [r.prompt for r in sources.read_pairs(both, split="test")[0]] == ["p5"]
    with pytest.raises(ValueError, match=r"split=None of .*both: choose one of test, train"):
        sources.read_pairs(both)
    with pytest.raises(ValueError, match="leave split='train' out"):
        sources.read_pairs(one, split="train")


def test_damaged_folders_of_save_to_disk(tmp_path: Path):
    folder = save_to_disk(tmp_path / "a", [pairs_of(0, 2), pairs_of(2, 1)])
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match=r"lacks \['data-00001-of-00002\.arrow'\]"):
        sources.read_pairs(folder)
    moved = save_to_disk(
        tmp_path / "b", [pairs_of(0, 2)], _indices_data_files=[{"filename": "indices.arrow"}]
    )
    with pytest.raises(
        ValueError, match="saved with an index file: save it again after flatten_indices"
    ):
        sources.read_pairs(moved)
    save_arrow(tmp_path / "secret.arrow", pairs_of(7, 1))
    outside = save_to_disk(
        tmp_path / "c", [pairs_of(0, 2)], _data_files=[{"filename": "../secret.arrow"}]
    )
    with pytest.raises(ValueError, match="lacks"):
        sources.read_pairs(outside)
    (outside / "state.json").write_text("[]")
    with pytest.raises(ValueError, match="is not as save_to_disk writes it"):
        sources.read_pairs(outside)


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        [
            "data/train-00000-of-00002-0123456789abcdef.parquet",
            "data/train-00001-of-00002-fedcba9876543210.parquet",
        ],
        ["default/train/0000.parquet", "default/train/0001.parquet"],
    ],
)
def test_folders_from_the_hub(tmp_path: Path, names: list[str]):
    for k, name in enumerate(names):
        save_parquet(tmp_path / name, pairs_of(2 * k, 2))
    save_parquet(tmp_path / ".cache" / "train-00000-of-00001.parquet", pairs_of(90, 1))
    (tmp_path / "README.md").write_text("a card")
    assert [r.prompt for r in sources.read_pairs(tmp_path)[0]] == ["p0", "p1", "p2", "p3"]
    test = names[0].replace("train", "test_prefs").replace("-of-00002", "-of-00001")
    save_parquet(tmp_path / test, pairs_of(7, 1))
    assert [r.prompt for r in sources.read_pairs(tmp_path, split="test_prefs")[0]] == ["p7"]
    with pytest.raises(ValueError, match=r"split='dev' of .*: choose one of test_prefs, train"):
        sources.read_pairs(tmp_path, split="dev")


def test_incomplete_or_ambiguous_folders(tmp_path: Path):
    for name in ("a/train-00000-of-00002.parquet", "b/train-00001-of-00002.parquet"):
        save_parquet(tmp_path / name, pairs_of(0, 1))
    with pytest.raises(ValueError, match=r"holds several data sets: pass one of .*/a, .*/b"):
        sources.read_pairs(tmp_path)
    with pytest.raises(ValueError, match="are not the shards of one table: copy the missing ones"):
        sources.read_pairs(tmp_path / "a")
    write(tmp_path / "c" / "train.jsonl.gz", *pairs_of(0, 1))
    save_parquet(tmp_path / "c" / "train.parquet", pairs_of(0, 1))
    with pytest.raises(ValueError, match="are not the shards of one table"):
        sources.read_pairs(tmp_path / "c")
    (tmp_path / "d").mkdir()
    with pytest.raises(ValueError, match=r"holds no \*\.parquet or \*\.arrow or"):
        sources.read_pairs(tmp_path / "d")
    with pytest.raises(ValueError, match="does not exist: check the path"):
        sources.read_pairs(tmp_path / "nowhere.parquet")
    (tmp_path / "e.xlsx").write_text("prompt,chosen,rejected")
    with pytest.raises(ValueError, match=r"is none of \*\.parquet"):
        sources.read_pairs(tmp_path / "e.xlsx")
    with pytest.raises(ValueError, match="is one file: leave split='train' out"):
        sources.read_pairs(tmp_path / "c" / "train.parquet", split="train")
    with pytest.raises(ValueError, match="max_bad_fraction=1"):
        sources.read_pairs(tmp_path / "c" / "train.parquet", max_bad_fraction=1.0)


def test_both_arrow_formats_and_cut_files(tmp_path: Path):
    rows = pairs_of(0, 6)
    for file_format in (False, True):
        path = save_arrow(
            tmp_path / f"{file_format}.arrow", rows, batches=3, file_format=file_format
        )
        assert [r.prompt for r in sources.read_pairs(path)[0]] == [f"p{k}" for k in range(6)]
    stream = (tmp_path / "False.arrow").read_bytes()
    parquet = save_parquet(tmp_path / "p.parquet", rows).read_bytes()
    assert (
        pa.ipc.open_stream(stream[:-8]).read_all().num_rows == 6
    )  # pyarrow does not miss the end mark
    for name, data in (
        ("cut.arrow", stream[: len(stream) // 2]),
        ("cut.arrow", stream[:-8]),
        ("cut.arrow", b""),
        ("cut.parquet", parquet[:-20]),
        ("cut.parquet", b""),
    ):
        cut = tmp_path / name
        cut.write_bytes(data)
        with pytest.raises(
            ValueError, match=r"cut\.\w+ cannot be read \(.*\): copy or download it again"
        ):
            sources.read_pairs(cut)


def test_pyarrow_is_named_when_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save_parquet(tmp_path / "a.parquet", pairs_of(0, 1))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ValueError, match=r'a\.parquet needs pyarrow: pip install "rlhf_jax\[data\]"'
    ):
        sources.read_pairs(path)
    assert len(sources.read_pairs(write(tmp_path / "a.jsonl.gz", *pairs_of(0, 2)))[0]) == 2


def test_a_conversation_has_one_place_in_both_forms():
    text = "Human: Hi\n\nAssistant: Hello.\n\nHuman: Who?\n\nAssistant:"
    assert sources.conversation_place(TURNS) == sources.conversation_place(text)
    assert sources.conversation_place(
        (Message("system", "x"), *TURNS)
    ) == sources.conversation_place(text)
    assert sources.conversation_place((Message("user", "Ho"),)) != sources.conversation_place(text)


# --------------------------------------------------------------------------------------------------- real files


def test_real_hh_rlhf(data_dir: Path):
    """7,415 pairs, 17 without a shared prompt; the identical ones are counted here from the raw lines."""
    records, report = sources.read_hh(data_dir, **EVERYTHING)
    files = (data_dir / "hh_rlhf").glob("*.gz")
    lines = [line for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]
    identical = sum(row["chosen"] == row["rejected"] for row in map(json.loads, lines))
    assert report.rows == len(lines) == 7415
    assert report.dropped["identical responses"] == identical == 34
    assert report.dropped["prompts differ"] == 17
    assert len(records) == report.kept == report.rows - sum(report.dropped.values())
    assert all(r.prompt.startswith("Human:") and r.prompt.endswith("Assistant:") for r in records)
    train, _ = sources.read_hh(data_dir, split="train")
    test, _ = sources.read_hh(data_dir, split="test")
    assert len(train) + len(test) == len(records)
    assert 0.07 < len(test) / len(records) < 0.13


def test_real_openassistant(data_dir: Path, tmp_path: Path):
    """212 groups of 2 to 9 replies, 754 pairs; the trees give the same rankings as the derived file."""
    records, _ = sources.read_oasst(data_dir, **EVERYTHING)
    sizes = collections.Counter(len(r.responses) for r in records)
    assert sizes == {2: 57, 3: 117, 4: 27, 5: 3, 6: 6, 8: 1, 9: 1}
    assert sum(strict_pairs(r.ranks) for r in records) == 754
    trees = next((data_dir / "oasst_en100").glob("*tree*.jsonl.gz"))
    (tmp_path / trees.name).write_bytes(trees.read_bytes())
    from_trees, _ = sources.read_oasst(tmp_path, **EVERYTHING)
    assert {(r.prompt, r.responses) for r in from_trees} == {
        (r.prompt, r.responses) for r in records
    }
    assert all(sorted(r.ranks) == list(r.ranks) for r in from_trees)
    demonstrations, _ = sources.read_oasst_demonstrations(data_dir, **EVERYTHING)
    assert len(demonstrations) == 249


def test_real_text(data_dir: Path):
    documents, _ = sources.read_text(data_dir / "english_text")
    assert len(documents) == 8
    stories, _ = sources.read_text(data_dir / "tinystories_slice")
    assert len(stories) == 1017


def test_real_hh_rlhf_is_also_a_table_in_trls_form(data_dir: Path, tmp_path: Path):
    """Implicit prompts: the pairs that `read_hh` keeps, from parquet."""
    lines = gzip.decompress(
        (data_dir / "hh_rlhf" / "helpful-base.test.jsonl.gz").read_bytes()
    ).splitlines()
    path = save_parquet(
        tmp_path / "test-00000-of-00001.parquet", [json.loads(line) for line in lines]
    )
    records, report = sources.read_pairs(path, source="hh_rlhf/helpful-base")
    wanted, counts = sources.read_hh(data_dir, **EVERYTHING, subsets=("helpful-base",))
    assert records == wanted
    assert report.dropped == counts.dropped
