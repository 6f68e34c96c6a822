from __future__ import annotations

import ast
import dataclasses
import gzip
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data import schema
from rlhf_jax.data.schema import (
    ABSENT,
    RULES,
    SCREEN,
    DataReport,
    Demonstration,
    Message,
    PlainText,
    Prompt,
    Ranking,
    read_jsonl,
    strict_pairs,
)

ROOT = Path(__file__).parents[2]


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
    "duplicate keys": (
        b'{"prompt": "p", "prompt": "q", "responses": ["a", "b"], "ranks": [1, 2]}',
        "'prompt'",
    ),
    "lone surrogate": (
        b'{"prompt": "\\ud800", "responses": ["a", "b"], "ranks": [1, 2]}',
        "'prompt' has a lone",
    ),
    "empty prompt": ({**GOOD, "prompt": " \n"}, "'prompt' is empty"),
    "no prompt": (
        {"responses": ["a", "b"], "ranks": [1, 2]},
        "'prompt' must be a string, got nothing",
    ),
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
    "a long number for a rank": (
        b'{"prompt": "p", "responses": ["a", "b"], "ranks": [1, ' + b"7" * 4000 + b"]}",
        "77...",
    ),
    "infinite temperature": (
        b'{"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], "temperatures": [1, 1e999]}',
        "inf",
    ),
    "revision is a float": ({**GOOD, "revision": 1.0}, "'revision' = 1.0 must be an integer"),
    "negative revision": ({**GOOD, "revision": -1}, "'revision' = -1"),
    "revision is a boolean": ({**GOOD, "revision": True}, "'revision' = True"),
    "a time in seconds": ({**GOOD, "time": 1643275800}, "'time' must be a string, got int"),
    "a time in words": (
        {**GOOD, "time": "yesterday"},
        "'time' = 'yesterday'.*2022-01-27T09:30:00Z",
    ),
    "an hour too many": ({**GOOD, "time": "2022-01-27T25:00"}, "'time' = '2022-01-27T25:00'"),
    "user is a number": ({**GOOD, "user": 7}, "'user' must be a string, got int"),
    "empty organization": ({**GOOD, "organization": ""}, "'organization' is empty"),
    "a policy is null": (
        {**GOOD, "policies": ["sft", None, "sft", "sft"]},
        r"'policies\[1\]' must be a string, got nothing",
    ),
    "turns under prompt": (
        {**GOOD, "prompt": [{"role": "user", "content": "p"}]},
        "name the field 'messages'",
    ),
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
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "a", "id": "1"},
        {"prompt": "b"},
        {"prompt": "c", "id": "1"},
    )
    with pytest.raises(ValueError, match=r"p\.jsonl:3: field 'id' = '1' is also in line 1"):
        schema.read_jsonl(path, Prompt)


def test_lines_end_at_newline_only(tmp_path: Path):
    text = "one\u2028two\u0085three\x0bfour"
    path = tmp_path / "t.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps({"text": text}, ensure_ascii=False).encode() + b"\r\n\n"
    )
    records, report = schema.read_jsonl(path, PlainText)
    assert (records, report.rows) == ([PlainText(text)], 1)


def test_an_empty_response_needs_its_flag(tmp_path: Path):
    path = write(tmp_path / "d.jsonl", {"prompt": "p", "response": ""})
    with pytest.raises(ValueError, match="'response' is empty"):
        schema.read_jsonl(path, Demonstration)
    assert schema.read_jsonl(path, Demonstration, allow_empty_responses=True)[0] == [
        Demonstration("p", "")
    ]


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
    ranks = draw(
        st.lists(st.integers(-1, k - 1), min_size=k, max_size=k).filter(
            lambda r: sum(x >= 0 for x in r) > 1
        )
    )
    return dict(  # not a Ranking: the type checks of the tests draw random numbers, which a strategy must not
        prompt=draw(text),
        responses=tuple(draw(st.lists(text, min_size=k, max_size=k))),
        ranks=tuple(ranks),
        labeler=draw(st.none() | text),
        temperatures=draw(st.none() | st.just((0.7,) * k)),
    )


@settings(deadline=None)  # a busy machine is no failure
@given(
    rows=st.lists(rankings(), min_size=1, max_size=3, unique_by=lambda r: r["prompt"]),
    name=st.sampled_from(["r.jsonl", "r.jsonl.gz"]),
)
def test_written_rankings_read_back_equal(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict], name: str
):
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


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
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


# ------------------------------------------------------------------------------------------------- conversations


def user(content: object) -> dict:
    return {"role": "user", "content": content}


def assistant(content: object) -> dict:
    return {"role": "assistant", "content": content}


def system(content: object) -> dict:
    return {"role": "system", "content": content}


TURNS = [system("s"), user("u"), assistant("a"), user("v")]
SAID = (
    Message("system", "s"),
    Message("user", "u"),
    Message("assistant", "a"),
    Message("user", "v"),
)


def test_messages_take_the_place_of_a_prompt(tmp_path: Path):
    path = write(
        tmp_path / "p.jsonl", {"messages": TURNS}, {"prompt": None, "messages": TURNS[1:2]}
    )
    assert read_jsonl(path, Prompt)[0] == [Prompt(SAID), Prompt(SAID[1:2])]
    path = write(
        tmp_path / "r.jsonl", {"messages": TURNS, "responses": ["a", "b"], "ranks": [1, 2]}
    )
    assert read_jsonl(path, Ranking)[0] == [Ranking(SAID, ("a", "b"), (0, 1))]


def test_a_demonstration_may_end_with_the_assistants_turn(tmp_path: Path):
    path = write(
        tmp_path / "d.jsonl",
        {"messages": TURNS, "response": "r"},
        {"messages": [*TURNS, assistant("r")]},
        {"messages": [*TURNS, assistant("r")], "response": None},
        {"messages": [user("u"), assistant("r")], "labeler": "l"},
    )
    first = Demonstration(SAID, "r")
    alone = Demonstration((Message("user", "u"),), "r", labeler="l")
    assert read_jsonl(path, Demonstration)[0] == [first, first, first, alone]


BAD_TURNS = {
    "both": ({"prompt": "p", "messages": TURNS}, "prompt and messages", "both given: keep one"),
    "neither": ({}, "missing field", "'prompt' must be a string, got nothing: .* 'messages'"),
    "both null": ({"prompt": None, "messages": None}, "missing field", "'prompt' must be a string, got nothing"),
    "no list": ({"messages": "hello"}, "wrong type", "'messages' must be a list, got str"),
    "no turns": ({"messages": []}, "empty prompt", "'messages' holds no prompt"),
    "no object": ({"messages": ["hello"]}, "wrong type", r"'messages\[0\]' must be an object, got str"),
    "no role": ({"messages": [{"content": "u"}]}, "missing field", r"'messages\[0\].role' must be a string"),
    "no content": ({"messages": [{"role": "user"}]}, "missing field", r"'messages\[0\].content' must be a string"),
    "content in parts": ({"messages": [user([{"text": "u"}])]}, "wrong type", r"'messages\[0\].content' .* got list"),
    "another field": ({"messages": [{**user("u"), "weight": 0}]}, "unknown field", r"'weight' in messages\[0\]"),
    "a field twice": (b'{"messages": [{"role": "user", "role": "user"}]}', "duplicate key", "'role' is given twice"),
    "another role": ({"messages": [user("u"), {**user("t"), "role": "tool"}]}, "unknown role", r"\[1\].role' = 'tool'"),
    "a role in capitals": ({"messages": [{"role": "User", "content": "u"}]}, "unknown role", "system, user, assistant"),
    "an empty turn": ({"messages": [user("u"), assistant(""), user("v")]}, "empty message", r"\[1\].content' is empty"),
    "a surrogate": (b'{"messages": [{"role": "user", "content": "\\udc00"}]}', "lone surrogate", r"\[0\].content'"),
    "system later": ({"messages": [user("u"), system("s")]}, "misplaced system message", r"'messages\[1\].role'"),
    "system twice": ({"messages": [system("s"), system("s"), user("u")]}, "misplaced system message", r"\[1\].role'"),
    "user twice": ({"messages": [user("u"), user("v")]}, "turns do not alternate", r"\[1\].role' is user where"),
    "assistant first": ({"messages": [assistant("a"), user("u")]}, "turns do not alternate", r"\[0\].role' is assist"),
    "assistant last": ({"messages": [user("u"), assistant("a")]}, "last turn not the user's", r"\[1\].role' is assist"),
    "system alone": ({"messages": [system("s")]}, "last turn not the user's", r"\[0\].role' is system"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TURNS)
def test_bad_turns_are_errors_that_name_the_place_in_the_row(tmp_path: Path, name: str):
    row, reason, message = BAD_TURNS[name]
    path = write(tmp_path / "p.jsonl", {"prompt": "good"}, row)
    with pytest.raises(ValueError, match=message) as caught:
        read_jsonl(path, Prompt)
    assert f"{path}:2: " in str(caught.value)
    assert read_jsonl(path, Prompt, max_bad_fraction=0.5)[1].dropped == {reason: 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [user("u")]}, "missing field"),
        ({"messages": [assistant("a")]}, "empty prompt"),
        ({"messages": [user("u"), assistant("")]}, "empty response"),
        ({"messages": [user("u"), assistant("a")], "response": "r"}, "last turn not the user's"),
        ({"messages": [user("u"), user("v"), assistant("a")]}, "turns do not alternate"),
        ({"messages": [system("s"), assistant("a")]}, "last turn not the user's"),
        ({"prompt": "p"}, "missing field"),
        ({"messages": []}, "empty prompt"),
    ],
)
def test_bad_demonstrations_in_turns(tmp_path: Path, row: dict, reason: str):
    path = write(tmp_path / "d.jsonl", {"prompt": "good", "response": "r"}, row)
    assert read_jsonl(path, Demonstration, max_bad_fraction=0.5)[1].dropped == {reason: 1}


def test_the_last_turn_may_be_empty_with_the_flag(tmp_path: Path):
    path = write(tmp_path / "d.jsonl", {"messages": [user("u"), assistant("")]})
    records, _ = read_jsonl(path, Demonstration, allow_empty_responses=True)
    assert records == [Demonstration((Message("user", "u"),), "")]


# ------------------------------------------------------------------------------------------- rankings that repeat


def labeled(labeler: str | None, ranks: list, **fields: object) -> dict:
    return {"prompt": "p", "responses": ["a", "b"], "ranks": ranks, "labeler": labeler, **fields}


def test_the_highest_revision_of_a_ranking_holds(tmp_path: Path):
    path = write(
        tmp_path / "r.jsonl",
        labeled("x", [1, 2], revision=1, id="p/x"),
        labeled("y", [1, 2], revision=9),
        labeled("x", [1, 1], revision=3, id="p/x"),
        labeled("x", [2, 1], revision=2, id="p/x"),
        {**labeled("y", [2, 1], revision=10), "responses": ["b", "a"]},
    )
    records, report = read_jsonl(path, Ranking)
    assert [(r.labeler, r.revision, r.ranks) for r in records] == [
        ("x", 3, (0, 0)),
        ("y", 10, (1, 0)),
    ]
    assert report.dropped == {"superseded by revision": 3}
    assert report.places["superseded by revision"] == [f"{path}:{n}" for n in (1, 2, 4)]
    assert report.examples["superseded by revision"] == f"{path}:1: revision 1 < 3 of line 3"
    assert (report.rows, report.kept) == (5, 2)
    assert report.noted == {"all responses tie": 1}


@pytest.mark.parametrize(
    ("first", "second"), [({}, {}), ({"revision": 1}, {"revision": 1}), ({"revision": 1}, {})]
)
def test_the_same_ranking_twice_without_revisions_is_an_error(
    tmp_path: Path, first: dict, second: dict
):
    path = write(
        tmp_path / "r.jsonl", labeled("x", [1, 2], **first), labeled("x", [2, 1], **second)
    )
    with pytest.raises(
        ValueError, match=r"r\.jsonl:2: labeler 'x' ranks the prompt and responses of line 1 again"
    ):
        read_jsonl(path, Ranking)
    assert read_jsonl(path, Ranking, max_bad_fraction=0.5)[1].dropped == {"ranked twice": 1}


def test_others_may_rank_the_same_and_a_labeler_other_responses(tmp_path: Path):
    rows = [
        labeled("x", [1, 2]),
        labeled("y", [1, 2]),
        labeled(None, [1, 2]),
        labeled(None, [1, 2]),  # nobody knows whose
        {**labeled("x", [1, 2]), "responses": ["a", "c"]},
        {**labeled("x", [1, 2]), "responses": ["a", "a"]},
        {**labeled("x", [1, 2]), "prompt": "q"},
    ]
    assert len(read_jsonl(write(tmp_path / "r.jsonl", *rows), Ranking)[0]) == len(rows)


def test_only_revisions_of_one_ranking_share_an_id(tmp_path: Path):
    other = {**labeled("x", [1, 2], revision=2, id="1"), "prompt": "q"}
    path = write(tmp_path / "r.jsonl", labeled("x", [1, 2], revision=1, id="1"), other)
    with pytest.raises(ValueError, match="'id' = '1' is also in line 1"):
        read_jsonl(path, Ranking)


def test_a_bad_row_does_not_take_an_id(tmp_path: Path):
    again = labeled("x", [2, 1], id="1")
    path = write(tmp_path / "r.jsonl", labeled("x", [1, 2]), again, {**again, "prompt": "q"})
    records, report = read_jsonl(path, Ranking, max_bad_fraction=0.5)
    assert ([r.prompt for r in records], report.dropped) == (["p", "q"], {"ranked twice": 1})


def test_equal_responses_with_unequal_ranks_are_kept_and_noted(tmp_path: Path):
    path = write(
        tmp_path / "r.jsonl",
        {"prompt": "p", "responses": ["a", "a", "b"], "ranks": [1, 2, 3]},
        {"prompt": "p", "responses": ["a", "a", "b"], "ranks": [1, 1, 2]},
        {"prompt": "p", "responses": ["a", "a", "b"], "ranks": [1, None, 2]},
    )
    records, report = read_jsonl(path, Ranking)
    assert len(records) == 3
    assert report.noted == {"same response, different ranks": 1}
    assert report.places == {"same response, different ranks": [f"{path}:1"]}


def test_only_the_order_of_ranks_counts(tmp_path: Path):
    rows = [
        {"prompt": "p", "responses": ["a", "b", "c"], "ranks": ranks}
        for ranks in ([1, 1, 3], [2, 2, 3], [1, 1, 2])
    ]
    records, _ = read_jsonl(write(tmp_path / "r.jsonl", *rows), Ranking)
    assert {strict_pairs(r.ranks) for r in records} == {2}
    assert {
        tuple(sorted({r: None for r in record.ranks}).index(x) for x in record.ranks)
        for record in records
    } == {(0, 0, 1)}


# ------------------------------------------------------------------------------------ lengths and special tokens


def test_a_row_over_the_limit_is_dropped_and_counted(tmp_path: Path):
    path = write(
        tmp_path / "d.jsonl", *({"prompt": "p" * n, "response": "r" * 5} for n in (5, 6, 4, 7))
    )
    records, report = read_jsonl(path, Demonstration, limit=10)
    assert [len(str(r.prompt)) for r in records] == [5, 4]
    assert report.dropped == {"too long": 2}
    assert report.places == {"too long": [f"{path}:2", f"{path}:4"]}
    assert "take 11 characters, limit=10" in report.examples["too long"]
    with pytest.raises(
        ValueError, match=r"2 of 4 rows .*\n.*d\.jsonl:2: .* limit=10.* \(and 1 more: too long\)"
    ):
        read_jsonl(path, Demonstration, limit=10, too_long="error")
    assert (
        read_jsonl(path, Demonstration, limit=10, too_long="error", max_bad_fraction=0.5)[1]
        == report
    )


@pytest.mark.parametrize(
    ("kind", "row", "size"),
    [
        (Prompt, {"prompt": "four"}, 4),
        (Prompt, {"messages": TURNS}, 4),
        (PlainText, {"text": "seven c"}, 7),
        (Demonstration, {"messages": [user("ab"), assistant("cde")]}, 5),
        (
            Ranking,
            {"prompt": "ab", "responses": ["c", "defg", "far too long"], "ranks": [1, 2, None]},
            6,
        ),
    ],
)
def test_what_is_measured(tmp_path: Path, kind: type, row: dict, size: int):
    path = write(tmp_path / "x.jsonl", row)
    assert len(read_jsonl(path, kind, limit=size)[0]) == 1
    with pytest.raises(ValueError, match="1 rows, 0 kept, 1 dropped\n  dropped: too long 1"):
        read_jsonl(path, kind, limit=size - 1)


def test_truncate_cuts_responses_in_tokens_and_notes_the_row(tmp_path: Path):
    path = write(
        tmp_path / "r.jsonl",
        {"prompt": "a b", "responses": ["c d e f", "g", "h i j k"], "ranks": [1, 2, None]},
        {"prompt": "a b c d e", "responses": ["f", "g"], "ranks": [1, 2]},
        {"prompt": "a b", "responses": ["c", "d"], "ranks": [1, 2]},
    )
    words = lambda text: len(text.split())
    records, report = read_jsonl(path, Ranking, limit=4, length=words, too_long="truncate")
    assert [r.responses for r in records] == [("c d ", "g", "h i j k"), ("c", "d")]
    assert report.noted == {"response cut": 1}
    assert report.places == {"response cut": [f"{path}:1"], "too long": [f"{path}:2"]}
    assert "no room for a response" in report.examples["too long"]
    prompts = write(tmp_path / "p.jsonl", {"prompt": "a b c d e"}, {"prompt": "a"})
    assert read_jsonl(prompts, Prompt, limit=4, length=words, too_long="truncate")[1].dropped == {
        "too long": 1
    }


@settings(deadline=None)
@given(st.text("ab \n", min_size=1), st.integers(1, 9))
def test_a_cut_text_is_the_longest_beginning_that_fits(
    tmp_path_factory: pytest.TempPathFactory, text: str, limit: int
):
    path = tmp_path_factory.mktemp("cut") / "t.jsonl"
    write(path, {"text": "a"}, {"text": f"b{text}"})
    (_, cut), report = read_jsonl(path, PlainText, limit=limit, too_long="truncate")
    assert cut.text == f"b{text}"[:limit]
    assert report.noted == ({"response cut": 1} if len(text) + 1 > limit else {})


def test_special_tokens_in_texts_are_noted(tmp_path: Path):
    path = write(
        tmp_path / "d.jsonl",
        {"prompt": "p", "response": "r"},
        {"prompt": "p <|endoftext|>", "response": "r"},
        {"messages": [user("a"), assistant("[UNK]"), user("b")], "response": "<|endoftext|>"},
        {"prompt": "p", "response": "r", "source": "[UNK]"},
    )
    records, report = read_jsonl(path, Demonstration, special_tokens=["<|endoftext|>", "[UNK]"])
    assert (len(records), report.noted) == (4, {"special token in text": 2})
    assert report.places == {"special token in text": [f"{path}:2", f"{path}:3"]}
    assert read_jsonl(path, Demonstration)[1].noted == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit=0 must be at least 1"),
        ({"too_long": "truncate"}, "too_long='truncate' needs a limit"),
        ({"special_tokens": "<|endoftext|>"}, "must be a list of texts"),
        ({"special_tokens": [""]}, "must be a list of texts"),
        ({"max_bad_fraction": -0.1}, "max_bad_fraction=-0.1"),
        ({"max_bad_fraction": float("nan")}, "max_bad_fraction=nan"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        read_jsonl(write(tmp_path / "t.jsonl", {"text": "t"}), PlainText, **options)


def test_the_limit_on_bad_rows_is_exact(tmp_path: Path):
    """0.29 * 100 is below 29 in floating point."""
    path = write(tmp_path / "t.jsonl", *[{"text": "t"}] * 71, *[b"{"] * 29)
    assert len(read_jsonl(path, PlainText, max_bad_fraction=0.29)[0]) == 71


# ------------------------------------------------------------------------------------- the table and its corpus


CORPUS = {
    "texts": (PlainText, {"limit": 80, "special_tokens": ["<|endoftext|>"]}),
    "prompts": (Prompt, {"limit": 60, "too_long": "error"}),
    "demonstrations": (Demonstration, {"limit": 80, "too_long": "truncate"}),
    "rankings": (Ranking, {}),
}
"""The files of tests/data/bad_rows with what they are read with; docs/data.md shows the same calls."""


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ROOT)  # the reports name the files as from here
    return Path("tests/data/bad_rows")


def read_corpus(folder: Path, name: str) -> DataReport:
    kind, options = CORPUS[name]
    return read_jsonl(folder / f"{name}.jsonl", kind, max_bad_fraction=0.95, **options)[1]


@pytest.mark.parametrize("name", CORPUS)
def test_the_corpus_gives_exactly_the_documented_report(corpus: Path, name: str):
    report = read_corpus(corpus, name)
    assert report.summary() + "\n" == (corpus / f"{name}.report.txt").read_text()
    assert set(report.dropped.values()) | set(report.noted.values()) == {1}
    shown = "".join(f", {key}={json.dumps(value)}" for key, value in CORPUS[name][1].items())
    call = f'`read_jsonl("{corpus}/{name}.jsonl", {CORPUS[name][0].__name__}, max_bad_fraction=0.95{shown})`'
    assert f"{call}:\n\n```\n{report.summary()}\n```\n" in Path("docs/data.md").read_text()


@pytest.mark.parametrize("name", CORPUS)
def test_the_default_refuses_the_corpus_and_names_every_reason(corpus: Path, name: str):
    kind, options = CORPUS[name]
    with pytest.raises(ValueError) as caught:
        read_jsonl(corpus / f"{name}.jsonl", kind, **options)
    assert f"{caught.value}\n" == (corpus / f"{name}.error.txt").read_text()
    dropped = read_corpus(corpus, name).places
    bad = {r for r in dropped if RULES[r].outcome == "bad"} | (
        {"too long"} if name == "prompts" else set()
    )
    assert [line.split(": ")[0].strip() for line in str(caught.value).split("\n")[1:]] == sorted(
        (dropped[r][0] for r in bad), key=lambda place: int(place.rpartition(":")[2])
    )


def test_the_corpus_holds_a_row_for_each_rule(corpus: Path):
    reports = [read_corpus(corpus, name) for name in CORPUS]
    total = sum(reports[1:], reports[0])
    assert set(total.dropped) | set(total.noted) == set(RULES)
    assert set(total.noted) == {reason for reason, rule in RULES.items() if rule.outcome == "kept"}
    for report in reports:
        assert report.kept + sum(report.dropped.values()) == report.rows


def test_every_reason_in_the_code_is_in_the_table():
    """Reasons are the first argument of a RowError, the `reason=` of a check, or what `notes_of` yields."""
    given: list[ast.expr | None] = []
    files = Path(schema.__file__).parent.glob("*.py")
    for node in itertools.chain.from_iterable(
        ast.walk(ast.parse(file.read_text())) for file in files
    ):
        if isinstance(node, ast.Call):
            given += node.args[:1] * (ast.unparse(node.func) == "RowError")
            given += [k.value for k in node.keywords if k.arg == "reason"]
        if isinstance(node, ast.Yield) or (
            isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "reason"
        ):
            given += [node.value]
    parts = [
        part
        for value in given
        if value
        for part in ast.walk(value)
        if isinstance(part, ast.Constant)
    ]
    found = {part.value for part in parts if isinstance(part.value, str)}
    found.discard(
        "empty "
    )  # check_text for a field of another module; this one always names its reason
    assert found == set(RULES)


def test_the_table_in_the_docs_is_the_one_in_the_code():
    rows = [
        f"| {reason} | {rule.row} | {rule.outcome} | {rule.fix} |" for reason, rule in RULES.items()
    ]
    table = "\n".join(["| reason | row | outcome | fix |", "|---|---|---|---|", *rows])
    assert f"\n\n{table}\n\n" in (ROOT / "docs" / "data.md").read_text()


def test_a_report_fits_a_screen_even_when_every_rule_fires(corpus: Path):
    reports = [read_corpus(corpus, name) for name in CORPUS]
    summary = sum(reports[1:], reports[0]).summary()
    assert len(summary.split("\n")) <= SCREEN == 24
    assert max(map(len, summary.split("\n"))) < 200
    assert all(f" {reason} " in summary for reason in RULES)
    assert "duplicate id 2 (texts.jsonl:16, prompts.jsonl:10)" in summary
    many = DataReport("x", 99, 0, {f"reason {n}": 1 for n in range(99)}, {}, {"reason 0": "first"})
    assert len(many.summary().split("\n")) <= SCREEN


def test_a_report_names_the_first_places(tmp_path: Path):
    path = write(tmp_path / "t.jsonl", {"text": "t"}, b"{", {"text": ""}, b"{", b"", b"{", b"{")
    report = read_jsonl(path, PlainText, max_bad_fraction=0.9)[1]
    lines = report.summary().split("\n")
    assert lines[:3] == [
        f"{path}: 6 rows, 1 kept, 5 dropped",
        "  dropped: empty text 1 (t.jsonl:3)",
        "  dropped: malformed JSON 4 (t.jsonl:2, 4, 6, ..)",
    ]
    assert lines[3].startswith(f"  {path}:2: malformed JSON")
    assert lines[4] == f"  {path}:3: field 'text' is empty: fill it in or remove the row"
    stored = json.loads(json.dumps(dataclasses.asdict(report)))
    assert DataReport(**stored) == report


def test_places_of_several_folders_keep_theirs():
    places = {"too long": ["a/x.jsonl:1", "b/x.jsonl:2", "b/x.jsonl:3"]}
    report = DataReport("a/x.jsonl, b/x.jsonl", 9, 6, {"too long": 3}, places=places)
    assert "too long 3 (a/x.jsonl:1, b/x.jsonl:2, 3)" in report.summary()


# ---------------------------------------------------------------------------------------------------- properties


@st.composite
def turns(draw: st.DrawFn) -> tuple[Message, ...]:
    said = draw(st.lists(text, min_size=1, max_size=5).filter(lambda s: len(s) % 2))
    roles = itertools.cycle(["user", "assistant"])
    start = draw(st.lists(text, max_size=1))
    return tuple(Message("system", s) for s in start) + tuple(map(Message, roles, said))


label = st.none() | text
ORIGIN = {
    "user": label,
    "organization": label,
    "time": st.none() | st.datetimes().map(lambda t: t.isoformat()),
}


@settings(deadline=None)
@given(st.data(), st.sampled_from(["x.jsonl", "x.jsonl.gz"]))
def test_any_record_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str
):
    labels = dict.fromkeys(("source", "use_case", "labeler"), label)
    fields = {
        Prompt: {"prompt": text | turns(), "source": label, "use_case": label, **ORIGIN},
        Demonstration: {"prompt": text | turns(), "response": text, **labels, **ORIGIN},
        PlainText: {"text": text, "source": label},
    }
    kind = data.draw(st.sampled_from([*fields, Ranking]))
    if kind is Ranking:
        row = data.draw(rankings())
        k = len(row["responses"])
        more = {
            "prompt": text | turns(),
            "labeler_group": label,
            "revision": st.none() | st.integers(0),
            **ORIGIN,
        }
        more["policies"] = st.none() | st.lists(text, min_size=k, max_size=k).map(tuple)
        rows = [row | data.draw(st.fixed_dictionaries(more))]
    else:
        rows = data.draw(st.lists(st.fixed_dictionaries(fields[kind]), min_size=1, max_size=3))
    records = [kind(**row, id=str(n)) for n, row in enumerate(rows)]
    path = tmp_path_factory.mktemp("schema") / name
    schema.write_jsonl(path, records)
    assert read_jsonl(path, kind)[0] == records


@settings(deadline=None)
@given(st.lists(st.none() | st.integers(1, 9), min_size=2, max_size=9))
def test_any_ranking_in_a_file_holds_choose_2_of_the_ranked_minus_the_tied(
    tmp_path_factory: pytest.TempPathFactory, values: list[int | None]
):
    ranks = [value and min(value, len(values)) for value in values]
    ranked = [rank for rank in ranks if rank is not None]
    responses = [f"response {k}" for k in range(len(ranks))]
    path = write(
        tmp_path_factory.mktemp("ranks") / "r.jsonl",
        {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2]},
        {"prompt": "p", "responses": responses, "ranks": ranks},
    )
    records, report = read_jsonl(path, Ranking, max_bad_fraction=0.5)
    if len(ranked) < 2:
        assert report.dropped == {"fewer than two ranks": 1}
        return
    tied = sum(a == b for n, a in enumerate(ranked) for b in ranked[:n])
    pairs = len(ranked) * (len(ranked) - 1) // 2 - tied
    assert strict_pairs(records[1].ranks) == pairs
    assert report.noted == ({} if pairs else {"all responses tie": 1})


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 9)
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["user", "p"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner)
    ),
    max_leaves=8,
)
NAMES = sorted(
    {name for kind in (Ranking, Demonstration, PlainText) for name in schema.field_names(kind)}
)


@settings(deadline=None)
@given(
    st.sampled_from([Prompt, Demonstration, Ranking, PlainText]),
    st.lists(
        st.binary(max_size=9)
        | st.dictionaries(st.sampled_from(NAMES), anything).map(lambda r: json.dumps(r).encode())
    ),
)
def test_any_file_gives_records_or_an_error_and_reasons_of_the_table(
    tmp_path_factory: pytest.TempPathFactory, kind: type, lines: list[bytes]
):
    good = {"prompt": "p", "response": "r", "responses": ["a", "b"], "ranks": [1, 2], "text": "t"}
    row = {name: good[name] for name in good if name in schema.field_names(kind)}
    path = write(tmp_path_factory.mktemp("any") / "x.jsonl", row, *lines)
    records, report = read_jsonl(path, kind, max_bad_fraction=0.99, special_tokens=["p"])
    assert report.kept == len(records) == report.rows - sum(report.dropped.values())
    assert set(report.dropped) | set(report.noted) <= set(RULES)
    assert len(report.summary().split("\n")) <= SCREEN
    for example in report.examples.values():
        assert "\n" not in example
        assert len(example) < 500
