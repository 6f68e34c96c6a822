from __future__ import annotations

import gzip
import itertools
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data import schema
from rlhf_jax.data.schema import ABSENT, DataReport, Demonstration, PlainText, Prompt, Ranking


def write(path: Path, *lines: object) -> Path:
    rows = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(rows) + b"\n")
    return path


GOOD = {"prompt": "p", "responses": ["a", "b", "c", "d"], "ranks": [2, 1, 2, None]}


def test_ranks_from_1_become_ranks_from_0_and_null_becomes_absent(tmp_path: Path):
    ((ranking,), report) = schema.read_jsonl(write(tmp_path / "r.jsonl", GOOD), Ranking)
    assert ranking.ranks == (1, 0, 1, -1)
    assert ranking.responses == ("a", "b", "c", "d")
    assert (report.rows, report.kept, report.dropped) == (1, 1, {})


BAD = {
    "malformed JSON": (b'{"prompt": "p", ', "malformed JSON"),
    "nested too deep": (b'{"prompt": ' + b"[" * 100_000, "nested too deep"),
    "a number of 5000 digits": (b'{"prompt": ' + b"9" * 5000 + b"}", "malformed JSON"),
    "not an object": (b'["p"]', "JSON object"),
    "not UTF-8": (b'{"prompt": "\xff\xfe"}', "UTF-8"),
    "NaN": (b'{"prompt": NaN}', "NaN"),
    "infinity": (b'{"prompt": -Infinity}', "Infinity"),
    "duplicate keys": (b'{"prompt": "p", "prompt": "q", "responses": ["a", "b"], "ranks": [1, 2]}', "'prompt'"),
    "lone surrogate": (b'{"prompt": "\\ud800", "responses": ["a", "b"], "ranks": [1, 2]}', "'prompt' has a lone"),
    "empty prompt": ({**GOOD, "prompt": " \n"}, "'prompt' is empty"),
    "no prompt": ({"responses": ["a", "b"], "ranks": [1, 2]}, "'prompt' must be a string, got nothing"),
    "prompt not text": ({**GOOD, "prompt": 3}, "'prompt' must be a string, got int"),
    "empty response": ({**GOOD, "responses": ["a", "", "c", "d"]}, r"'responses\[1\]' is empty"),
    "K = 1": ({"prompt": "p", "responses": ["a"], "ranks": [1]}, "at least 2 texts"),
    "no ranks": ({"prompt": "p", "responses": ["a", "b"]}, "'ranks' must be a list, got nothing"),
    "a rank missing": ({**GOOD, "ranks": [1, 2, 3]}, "'ranks' has 3 entries for 4 responses"),
    "a rank too many": ({**GOOD, "ranks": [1, 2, 3, 4, 5]}, "'ranks' has 5 entries"),
    "rank 0": ({**GOOD, "ranks": [0, 1, 2, 3]}, r"'ranks\[0\]' = 0"),
    "rank is a float": ({**GOOD, "ranks": [1, 2.0, 3, 4]}, r"'ranks\[1\]' = 2.0"),
    "rank is a boolean": ({**GOOD, "ranks": [True, 2, 3, 4]}, r"'ranks\[0\]' = True"),
    "a score for a rank": ({**GOOD, "ranks": [7, 2, 3, 4]}, r"1 \(best\) to 4"),
    "one ranked response": ({**GOOD, "ranks": [1, None, None, None]}, "at least 2 integers"),
    "misspelt field": ({**GOOD, "labeller": "x"}, "did you mean 'labeler'"),
    "unknown field": ({**GOOD, "zzz": "x"}, "unknown field 'zzz': remove it"),
    "policies do not match": ({**GOOD, "policies": ["sft"]}, "'policies' has 1 entries"),
    "negative temperature": ({**GOOD, "temperatures": [-1, 1, 1, 1]}, "'temperatures' holds -1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_an_error_that_names_file_line_field_and_fix(tmp_path: Path, name: str):
    row, message = BAD[name]
    path = write(tmp_path / "r.jsonl", GOOD, row)
    with pytest.raises(ValueError, match=message) as caught:
        schema.read_jsonl(path, Ranking)
    assert f"{path}:2: " in str(caught.value)
    records, report = schema.read_jsonl(path, Ranking, max_bad_fraction=0.5)
    assert len(records) == 1
    assert (report.rows, report.kept, sum(report.dropped.values())) == (2, 1, 1)
    assert len(report.examples) == 1


def test_max_bad_fraction_is_a_limit(tmp_path: Path):
    path = write(tmp_path / "r.jsonl", *[GOOD] * 8, b"{", b"{")
    assert len(schema.read_jsonl(path, Ranking, max_bad_fraction=0.2)[0]) == 8
    with pytest.raises(ValueError, match="2 of 10 rows"):
        schema.read_jsonl(path, Ranking, max_bad_fraction=0.19)
    with pytest.raises(ValueError, match="max_bad_fraction=1"):
        schema.read_jsonl(path, Ranking, max_bad_fraction=1)


def test_duplicate_ids_are_an_error(tmp_path: Path):
    path = write(tmp_path / "p.jsonl", {"prompt": "a", "id": "1"}, {"prompt": "b"}, {"prompt": "c", "id": "1"})
    with pytest.raises(ValueError, match=r"p\.jsonl:3: field 'id' = '1' is also in line 1"):
        schema.read_jsonl(path, Prompt)


def test_lines_end_at_newline_only(tmp_path: Path):
    text = "one\u2028two\u0085three\x0bfour"
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": text}, ensure_ascii=False).encode() + b"\r\n\n")
    records, report = schema.read_jsonl(path, PlainText)
    assert (records, report.rows) == ([PlainText(text)], 1)


def test_an_empty_response_needs_its_flag(tmp_path: Path):
    path = write(tmp_path / "d.jsonl", {"prompt": "p", "response": ""})
    with pytest.raises(ValueError, match="'response' is empty"):
        schema.read_jsonl(path, Demonstration)
    assert schema.read_jsonl(path, Demonstration, allow_empty_responses=True)[0] == [Demonstration("p", "")]


def test_all_tied_is_kept_and_noted(tmp_path: Path):
    path = write(tmp_path / "r.jsonl", {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1]})
    records, report = schema.read_jsonl(path, Ranking)
    assert schema.strict_pairs(records[0].ranks) == 0
    assert report.noted == {"all responses tie": 1}
    assert "noted: all responses tie 1" in report.summary()


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b"\x1f\x8b\x08truncated"])
def test_missing_empty_and_damaged_files_are_named(tmp_path: Path, content: bytes | None):
    path = tmp_path / "r.jsonl.gz"
    if content is not None:
        path.write_bytes(content if content[:1] == b"\x1f" else gzip.compress(content))
    with pytest.raises(ValueError, match=r"r\.jsonl\.gz"):
        schema.read_jsonl(path, Ranking)


def test_a_truncated_gzip_file_is_an_error(tmp_path: Path):
    path = tmp_path / "p.jsonl.gz"
    schema.write_jsonl(path, [Prompt(str(i)) for i in range(100)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"p\.jsonl\.gz cannot be read"):
        schema.read_jsonl(path, Prompt)


text = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda s: s.strip())


@st.composite
def rankings(draw: st.DrawFn) -> dict:
    k = draw(st.integers(2, 9))
    ranks = draw(st.lists(st.integers(-1, k - 1), min_size=k, max_size=k).filter(lambda r: sum(x >= 0 for x in r) > 1))
    return dict(  # not a Ranking: the type checks of the tests draw random numbers, which a strategy must not
        prompt=draw(text),
        responses=tuple(draw(st.lists(text, min_size=k, max_size=k))),
        ranks=tuple(ranks),
        labeler=draw(st.none() | text),
        temperatures=draw(st.none() | st.just((0.7,) * k)),
    )


@settings(deadline=None)  # a busy machine is no failure
@given(rows=st.lists(rankings(), min_size=1, max_size=3), name=st.sampled_from(["r.jsonl", "r.jsonl.gz"]))
def test_written_rankings_read_back_equal(tmp_path_factory: pytest.TempPathFactory, rows: list[dict], name: str):
    path = tmp_path_factory.mktemp("schema") / name
    records = [Ranking(**row) for row in rows]
    schema.write_jsonl(path, records)
    assert schema.read_jsonl(path, Ranking)[0] == records


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.integers(0, 4), min_size=2, max_size=9))
def test_a_ranking_with_ties_holds_choose_2_minus_tied_pairs(ranks: list[int]):
    k = len(ranks)
    tied = sum(ranks.count(r) * (ranks.count(r) - 1) // 2 for r in set(ranks))
    pairs = {(i, j) for i, j in itertools.permutations(range(k), 2) if ranks[i] < ranks[j]}
    assert schema.strict_pairs(ranks) == k * (k - 1) // 2 - tied == len(pairs)
    assert schema.strict_pairs([*ranks, ABSENT, ABSENT]) == len(pairs)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "p.jsonl"
    schema.write_jsonl(path, [Prompt("old")])

    def full(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        schema.write_jsonl(path, [Prompt("new")])
    assert schema.read_jsonl(path, Prompt)[0] == [Prompt("old")]
    assert os.listdir(tmp_path) == ["p.jsonl"]


def test_reports_add_up():
    a = DataReport("a", 3, 2, {"x": 1}, {}, {"x": "first"})
    b = DataReport("b", 5, 2, {"x": 1, "y": 2}, {"n": 1}, {"x": "second", "y": "third"})
    total = DataReport("a, b", 8, 4, {"x": 2, "y": 2}, {"n": 1}, {"x": "first", "y": "third"})
    assert a + b == total
    assert total.summary().startswith("a, b: 8 rows, 4 kept, 4 dropped")
