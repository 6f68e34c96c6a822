from __future__ import annotations

import collections
import gzip
import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from rlhf_jax.data import sources
from rlhf_jax.data.schema import Demonstration, Ranking, strict_pairs


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(b"\n".join(json.dumps(row).encode() for row in rows)))
    return path


def pair(prompt: str, chosen: str, rejected: str, other: str | None = None) -> dict[str, str]:
    form = "\n\nHuman: {}\n\nAssistant: {}"
    return {"chosen": form.format(prompt, chosen), "rejected": form.format(other or prompt, rejected)}


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
    records, _ = sources.read_hh(tmp_path, split="train", test_fraction=0.0, subsets=("harmless-base",))
    assert [r.prompt for r in records] == ["Human: b\n\nAssistant:"]


def test_a_damaged_row_is_an_error_even_among_expected_drops(tmp_path: Path):
    write(tmp_path / "helpful-base.jsonl.gz", pair("p", "same", "same"), pair("p", "a", "b"), {"chosen": "x"})
    with pytest.raises(ValueError, match=r"helpful-base\.jsonl\.gz:3: field 'rejected' must be a string"):
        sources.read_hh(tmp_path, split="train", test_fraction=0.0)


def test_no_conversation_is_in_both_splits(tmp_path: Path):
    """Prompts of train and test are disjoint by first human turn, and the split does not depend on the file."""
    rows = [pair(f"Question {i % 50}?\n\nAssistant: a\n\nHuman: more {i}", "x", "y") for i in range(200)]
    write(tmp_path / "helpful-base" / "train.jsonl.gz", *rows)
    splits = {s: sources.read_hh(tmp_path, split=s, test_fraction=0.3) for s in ("train", "test")}
    first = {s: {r.prompt.split("\n\n")[0] for r in records} for s, (records, _) in splits.items()}
    assert first["train"].isdisjoint(first["test"])
    assert len(first["train"]) + len(first["test"]) == 50
    assert 5 <= len(first["test"]) <= 25
    assert splits["test"][1].noted == {"records in the test split": len(splits["test"][0])}
    for i in range(20):
        follow_up = sources.in_test_split(f"Human: hello {i}\n\nAssistant: x\n\nHuman: y\n\nAssistant:", fraction=0.5)
        assert sources.in_test_split(f"Human:  Hello  {i} \n\nAssistant:", fraction=0.5) == follow_up


def message(text: str, role: str, *replies: dict, **fields: object) -> dict:
    return {"message_id": text, "text": text, "role": role, "lang": "en", "replies": list(replies), **fields}


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
        Ranking("Human: Hello\n\nAssistant:", ("first", "second", "machine"), (0, 1, 4), "Hello", "oasst")
    ]
    demonstrations, _ = sources.read_oasst_demonstrations(tmp_path, split="train", test_fraction=0.0)
    follow_up = "Human: Hello\n\nAssistant: first\n\nHuman: And?\n\nAssistant:"
    assert demonstrations == [
        Demonstration("Human: Hello\n\nAssistant:", "first", "Hello", "oasst"),
        Demonstration(follow_up, "alone", "And?", "oasst"),
    ]


def test_oasst_derived_file(tmp_path: Path):
    turns = [{"role": "prompter", "text": "Hi"}]
    write(tmp_path / "oasst" / "rankings.jsonl.gz", {"prompt": turns, "responses": ["a", "b"], "ranks": [0, 0]})
    rankings, _ = sources.read_oasst(tmp_path, split="train", test_fraction=0.0)
    assert rankings == [Ranking("Human: Hi\n\nAssistant:", ("a", "b"), (0, 0), source="oasst")]
    write(tmp_path / "oasst" / "rankings.jsonl.gz", {"prompt": turns, "responses": ["a", "b"], "ranks": [0]})
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


@pytest.mark.parametrize("read", [sources.read_hh, sources.read_oasst, sources.read_oasst_demonstrations])
def test_missing_data_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read):
    with pytest.raises(ValueError, match="is no folder: check the path"):
        read(tmp_path / "nowhere", split="train")
    with pytest.raises(ValueError, match="pass the folder that holds"):
        read(tmp_path, split="train")

    def offline(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("no connection\nand a long story")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ValueError, match=r"cannot download .* check the network, or .* pass data_dir") as caught:
        read(split="train")
    assert "\n" not in str(caught.value)


def test_the_real_client_without_network_gives_the_same_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot download helpful-base/train\.jsonl\.gz of Anthropic/hh-rlhf"):
        sources.read_hh(split="train")


def test_bad_split_and_empty_split(tmp_path: Path):
    write(tmp_path / "helpful-base.jsonl.gz", pair("p", "a", "b"))
    with pytest.raises(ValueError, match=r"the test split .* is empty"):
        sources.read_hh(tmp_path, split="test", test_fraction=0.0)
    with pytest.raises(ValueError, match="test_fraction=2"):
        sources.read_hh(tmp_path, split="test", test_fraction=2)


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
    assert {(r.prompt, r.responses) for r in from_trees} == {(r.prompt, r.responses) for r in records}
    assert all(sorted(r.ranks) == list(r.ranks) for r in from_trees)
    demonstrations, _ = sources.read_oasst_demonstrations(data_dir, **EVERYTHING)
    assert len(demonstrations) == 249


def test_real_text(data_dir: Path):
    documents, _ = sources.read_text(data_dir / "english_text")
    assert len(documents) == 8
    stories, _ = sources.read_text(data_dir / "tinystories_slice")
    assert len(stories) == 1017
