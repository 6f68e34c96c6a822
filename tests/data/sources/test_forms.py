"""Files as other tools write them: recognised, read, and put before the stages."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from msgspec import structs

from experiments import sft
from rlhf_jax.data import schema, sources, text
from rlhf_jax.data.schema import Demonstration, Message, Ranking
from rlhf_jax.data.storyland.tokenizer import assets
from rlhf_jax.run import rankings as ranked
from rlhf_jax.run.config import load_config

ROOT = Path(__file__).parents[3]


def json_array(rows: list[dict]) -> bytes:
    return json.dumps(rows, indent=2).encode()


def json_lines(rows: list[dict]) -> bytes:
    """As a program on Windows writes it."""
    return (
        b"\xef\xbb\xbf"
        + "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows).encode()
    )


def comma_separated(rows: list[dict], separator: str = ",") -> bytes:
    """As Excel and pandas write it: quoted where needed, CR LF between rows."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(
        out, fieldnames=list(rows[0]), delimiter=separator, lineterminator="\r\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return b"\xef\xbb\xbf" + out.getvalue().encode()


def parquet(rows: list[dict]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


WRITERS: dict[str, Callable[[list[dict]], bytes]] = {
    "json": json_array,
    "jsonl": json_lines,
    "jsonl.gz": lambda rows: gzip.compress(json_lines(rows)),
    "csv": comma_separated,
    "tsv": lambda rows: comma_separated(rows, "\t"),
    "parquet": parquet,
}


def put(folder: Path, rows: list[dict], kind: str = "jsonl") -> Path:
    path = folder / f"rows.{kind}"
    path.write_bytes(WRITERS[kind](rows))
    return path


def turn(who: str, words: str, **more: Any) -> dict[str, Any]:
    return {"from": who, "value": words, **more}


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ODD = 'Two "lines",\r\nwith \u2028 and \U0001f469\u200d\U0001f467;\ttabs'
TIDY = 'Two "lines",\nwith \u2028 and \U0001f469\u200d\U0001f467;\ttabs'
USER = Message("user", "Where is the fox?")
SYSTEM = Message("system", "Speak like a sailor.")


# --------------------------------------------------------------------------------------------------- flat tables


FLAT: dict[str, tuple[dict[str, Any], Any]] = {
    "alpaca": (
        {"instruction": "Count the sheep.", "input": ODD, "output": " Nine."},
        Demonstration(f"Count the sheep.\n\n{TIDY}", "Nine."),
    ),
    "dolly": (
        {"instruction": ODD, "context": "", "response": "Nine.", "category": "open_qa"},
        Demonstration(TIDY, "Nine.", use_case="open_qa"),
    ),
    "trl": (
        {"prompt": "Where is the fox?", "chosen": ODD, "rejected": "In the car."},
        Ranking("Where is the fox?", (TIDY, "In the car."), (0, 1)),
    ),
    "trl completions": (
        {"prompt": "The fox is", "completion": " in the den."},
        Demonstration("The fox is", "in the den."),
    ),
    "hh": (
        {
            "chosen": "\n\nHuman: Where is the fox?\n\nAssistant: In the den.",
            "rejected": "\n\nHuman: Where is the fox?\n\nAssistant: Who cares.",
        },
        Ranking("Human: Where is the fox?\n\nAssistant:", ("In the den.", "Who cares."), (0, 1)),
    ),
    "alpaca pairs": (
        {
            "instruction": "Count.",
            "input": "",
            "output": "Ten.",
            "chosen": "Nine.",
            "rejected": "Two.",
        },
        Ranking("Count.", ("Nine.", "Two."), (0, 1)),
    ),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("name", FLAT)
def test_flat_tables_in_every_file(tmp_path: Path, name: str, kind: str):
    row, wanted = FLAT[name]
    reading = sources.read_form(put(tmp_path, [row], kind))
    assert reading.form == name.split()[0]
    assert reading.records == {sources.SETS[type(wanted)]: [wanted]}
    assert (reading.report.rows, reading.report.kept) == (1, 1)
    if any("\r" in value for value in row.values()):
        assert reading.report.noted["line ends made LF"] == 1


def test_what_was_read_as_what_is_said(tmp_path: Path):
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3", "system": "Count."}]
    said = (
        "read as Alpaca: system -> system turn, instruction + input -> prompt, output -> response"
    )
    assert sources.read_form(put(tmp_path, rows)).said == said
    rows = [{"frage": "Who?", "antwort": "Me.", "score": 3}]
    reading = sources.read_form(
        put(tmp_path, rows), columns={"prompt": "frage", "completion": "antwort"}
    )
    assert (
        reading.said
        == "read as TRL: prompt -> prompt, completion -> response (with frage as prompt, antwort as completion)"
    )
    assert reading.report.aside == {"score": 1}
    assert "columns left aside: score 1" in reading.report.summary()


# ----------------------------------------------------------------------------------------------- nested records


CHAT = [message("system", "Speak like a sailor."), message("user", "Where is the fox?")]
NESTED: dict[str, tuple[str, dict[str, Any], Any]] = {
    "openai chat": (
        "openai",
        {"messages": [*CHAT, message("assistant", "Ahoy, in the den.", weight=1)]},
        Demonstration((SYSTEM, USER), "Ahoy, in the den."),
    ),
    "openai parts": (
        "openai",
        {"messages": [message("user", [{"type": "text", "text": "Where is the fox?"}]), message("assistant", "Here.")]},
        Demonstration((USER,), "Here."),
    ),
    "openai preference": (
        "openai",
        {
            "input": {"messages": CHAT, "tools": [], "parallel_tool_calls": True},
            "preferred_output": [message("assistant", "Ahoy.")],
            "non_preferred_output": [message("assistant", "Hello.")],
        },
        Ranking((SYSTEM, USER), ("Ahoy.", "Hello."), (0, 1)),
    ),
    "sharegpt": (
        "sharegpt",
        {
            "id": 123456789012345678901234567890,
            "conversations": [
                turn("system", "Speak like a sailor."),
                turn("human", "Where is the fox?"),
                turn("gpt", "In the den.", weight=None),
                turn("human", "And the owl?"),
                turn("gpt", "In the oak."),
            ],
        },
        Demonstration(
            (SYSTEM, USER, Message("assistant", "In the den."), Message("user", "And the owl?")),
            "In the oak.",
            id="123456789012345678901234567890",
        ),
    ),
    "sharegpt preference": (
        "sharegpt",
        {
            "conversations": [turn("human", "Where is the fox?")],
            "system": "Speak like a sailor.",
            "chosen": turn("gpt", "Ahoy."),
            "rejected": turn("gpt", "Hello."),
        },
        Ranking((SYSTEM, USER), ("Ahoy.", "Hello."), (0, 1)),
    ),
    "alpaca history": (
        "alpaca",
        {"instruction": "And the owl?", "output": "In the oak.", "history": [["Where is the fox?", "Here."]]},
        Demonstration((USER, Message("assistant", "Here."), Message("user", "And the owl?")), "In the oak."),
    ),
    "trl messages": (
        "trl",
        {"prompt": CHAT, "chosen": [message("assistant", "Ahoy.")], "rejected": [message("assistant", "Hello.")]},
        Ranking((SYSTEM, USER), ("Ahoy.", "Hello."), (0, 1)),
    ),
    "trl implicit": (
        "trl",
        {"chosen": [*CHAT, message("assistant", "Ahoy.")], "rejected": [*CHAT, message("assistant", "Hello.")]},
        Ranking((SYSTEM, USER), ("Ahoy.", "Hello."), (0, 1)),
    ),
    "ultrafeedback": (
        "rated",
        {
            "source": "flan",
            "instruction": "Where is the fox?",
            "models": ["a", "b"],
            "completions": [
                {"model": "a", "response": "No.", "overall_score": 2.0, "fine-grained_score": 5, "principle": "x"},
                {"model": "b", "response": "Here.", "overall_score": 8.5, "fine-grained_score": 1, "principle": "y"},
            ],
        },
        Ranking("Where is the fox?", ("No.", "Here."), (1, 0), source="flan", policies=("a", "b")),
    ),
    "distilabel": (
        "rated",
        {"instruction": "Where?", "generations": ["No.", "Here."], "ratings": ["2", "4"],
         "generation_models": ["a", "b"]},
        Ranking("Where?", ("No.", "Here."), (1, 0), policies=("a", "b")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["json", "jsonl.gz"])
@pytest.mark.parametrize("name", NESTED)
def test_nested_records(tmp_path: Path, name: str, kind: str):
    form, row, wanted = NESTED[name]
    reading = sources.read_form(put(tmp_path, [row], kind))
    assert (reading.form, reading.records) == (form, {sources.SETS[type(wanted)]: [wanted]})


def test_messages_in_parquet_and_as_json_in_a_cell(tmp_path: Path):
    form, row, wanted = NESTED["openai chat"]
    assert sources.read_form(put(tmp_path, [row], "parquet")).records == {
        "demonstrations": [wanted]
    }
    cell = {"messages": json.dumps(row["messages"]), "n": 1}
    assert sources.read_form(put(tmp_path, [cell], "csv"), form).records == {
        "demonstrations": [wanted]
    }
    printed = {"messages": str(row["messages"])}
    with pytest.raises(ValueError, match=r"rows\.csv:2: .*as Python prints them"):
        sources.read_form(put(tmp_path, [printed], "csv"), form)


# --------------------------------------------------------------------------------- exports of annotation tools


def test_argilla_2_rankings_ratings_and_choices(tmp_path: Path):
    """As `dataset.records.to_json` writes it: responses by question, no status, a ranking as a list of names."""
    record = {
        "id": "r1",
        "fields": {
            "prompt": "Where?",
            "response_1": "No.",
            "response_2": "Here.",
            "system": "Be brief.",
        },
        "metadata": {"model": "m"},
        "suggestions": {
            "ranking": {"value": ["response_1", "response_2"], "score": None, "agent": "gpt"}
        },
        "responses": {
            "ranking": [
                {"value": ["response_2", "response_1"], "user_id": "ann"},
                {"value": ["response_1", "response_2"], "user_id": "bob"},
            ],
            "why": [{"value": "clear", "user_id": "ann"}],
        },
        "vectors": {},
        "_server_id": "s",
    }
    bare = {**record, "id": "r2", "responses": {}, "suggestions": {}}
    reading = sources.read_form(put(tmp_path, [record, bare], "json"))
    prompt = (Message("system", "Be brief."), Message("user", "Where?"))
    assert reading.records["rankings"] == [
        Ranking(prompt, ("Here.", "No."), (0, 1), id="r1/ann", labeler="ann"),
        Ranking(prompt, ("No.", "Here."), (0, 1), id="r1/bob", labeler="bob"),
    ]
    assert reading.report.dropped == {"nothing annotated": 1}
    assert reading.report.noted["order without ranks"] == 1
    assert {"metadata", "suggestions", "_server_id"} <= set(reading.report.aside)
    assert any("why" in name for name in reading.report.aside)
    record["responses"] = {
        "best": [{"value": "response_2", "user_id": "ann"}, {"value": "tie", "user_id": "bob"}]
    }
    rankings = sources.read_form(put(tmp_path, [record], "json")).records["rankings"]
    assert [(r.responses, r.ranks) for r in rankings] == [
        (("No.", "Here."), (1, 0)),
        (("No.", "Here."), (0, 0)),
    ]


def test_argilla_ratings_compare_records_of_one_prompt(tmp_path: Path):
    def rated(name: str, answer: str, *scores: int | None) -> dict:
        responses = [
            {"value": s, "user_id": who}
            for who, s in zip("ab", scores, strict=True)
            if s is not None
        ]
        return {
            "id": name,
            "fields": {"prompt": "Where?", "response": answer},
            "responses": {"quality": responses},
        }

    rows = [rated("1", "No.", 2, 5), rated("2", "Here.", 4, None), rated("3", "There.", 4, 1)]
    reading = sources.read_form(put(tmp_path, rows, "json"))
    assert reading.records["rankings"] == [
        Ranking("Where?", ("No.", "Here.", "There."), (1, 0, 0), id="1/a", labeler="a"),
        Ranking("Where?", ("No.", "There."), (0, 1), id="1/b", labeler="b"),
    ]
    assert (reading.report.rows, reading.report.kept) == (3, 3)


def test_argilla_1_and_the_flat_exports(tmp_path: Path):
    values = [
        {"value": "answer-1", "rank": 2},
        {"value": "answer-2", "rank": 1},
        {"value": "answer-3", "rank": 2},
    ]
    fields = {"prompt": "Where?", "answer_1": "No.", "answer_2": "Here.", "answer_3": "Nowhere."}
    wanted = Ranking("Where?", ("No.", "Here.", "Nowhere."), (1, 0, 1), labeler="ann")
    said = [
        {"user_id": "ann", "status": "submitted", "values": {"order": {"value": values}}},
        {"user_id": "bob", "status": "discarded", "values": {"order": {"value": values}}},
    ]
    old = {
        "fields": fields,
        "responses": said,
        "suggestions": [],
        "metadata": {},
        "external_id": None,
    }
    reading = sources.read_form(put(tmp_path, [old]))
    assert reading.records["rankings"] == [wanted]
    assert reading.report.noted["some not submitted"] == 1
    flat = {
        **fields,
        "order": [{"user_id": "ann", "value": values, "status": "submitted"}],
        "order-suggestion": None,
    }
    assert sources.read_form(put(tmp_path, [flat], "parquet")).records["rankings"] == [wanted]
    columns = {
        "rank": [2, 1, 2],
        "value": ["answer-1", "answer-2", "answer-3"],
    }  # `datasets` keeps lists of structs so
    flat = {**fields, "order": [{"user_id": "ann", "value": columns, "status": "submitted"}]}
    assert sources.read_form(put(tmp_path, [flat], "parquet")).records["rankings"] == [wanted]
    flat = {
        **fields, "id": "7", "order.responses": [["answer_2", "answer_1", "answer_3"]],
        "order.responses.users": ["ann"], "order.responses.status": ["submitted"],
    }  # fmt: skip
    (found,) = sources.read_form(put(tmp_path, [flat], "parquet")).records["rankings"]
    assert (found.responses, found.ranks, found.labeler, found.id) == (
        ("Here.", "No.", "Nowhere."),
        (0, 1, 2),
        "ann",
        "7",
    )
    said[0]["status"] = "draft"
    with pytest.raises(ValueError, match="not submitted 1"):
        sources.read_form(put(tmp_path, [old]))


def test_argilla_texts_are_answers_only_where_somebody_says_so(tmp_path: Path):
    row = {
        "id": "1",
        "fields": {"prompt": "Where?"},
        "responses": {"label": [{"value": "good", "user_id": "a"}]},
    }
    with pytest.raises(
        ValueError, match=r"the questions are label \(text\).*--columns response=QUESTION"
    ):
        sources.read_form(put(tmp_path, [row], "json"))
    reading = sources.read_form(put(tmp_path, [row], "json"), columns={"response": "label"})
    assert reading.records["demonstrations"] == [
        Demonstration("Where?", "good", id="1", labeler="a")
    ]


def task(
    name: int, data: dict, *annotations: tuple[Any, list[dict]], cancelled: bool = False
) -> dict:
    """A task as Label Studio's JSON export has it."""
    given = [
        {
            "id": 100 + k,
            "completed_by": who,
            "was_cancelled": cancelled,
            "ground_truth": False,
            "result": result,
        }
        for k, (who, result) in enumerate(annotations)
    ]
    return {
        "id": name,
        "data": data,
        "annotations": given,
        "predictions": [],
        "meta": {},
        "project": 3,
    }


def result(kind: str, value: dict, name: str = "pref", to: str = "text1,text2") -> dict:
    return {
        "value": value,
        "id": "x1",
        "from_name": name,
        "to_name": to,
        "type": kind,
        "origin": "manual",
    }


PAIR = {"prompt": "Where?", "answer1": "No.", "answer2": "Here."}


def test_label_studio_pairs(tmp_path: Path):
    right, left = (
        result("pairwise", {"selected": "right"}),
        result("pairwise", {"selected": "left"}),
    )
    rows = [
        task(1, PAIR, (4, [right]), ({"id": 5, "email": "b@c.org"}, [left])),
        task(2, PAIR, (4, [left]), cancelled=True),
    ]
    reading = sources.read_form(put(tmp_path, rows, "json"))
    assert reading.form == "label_studio"
    assert reading.records["rankings"] == [
        Ranking("Where?", ("No.", "Here."), (1, 0), id="1/4", labeler="4"),
        Ranking("Where?", ("No.", "Here."), (0, 1), id="1/b@c.org", labeler="b@c.org"),
    ]
    assert reading.report.dropped == {"not submitted": 1}
    other = {"prompt": "Where?", "one": "No.", "two": "Here."}
    with pytest.raises(ValueError, match=r"one, prompt, two .*--columns left=NAME,right=NAME"):
        sources.read_form(put(tmp_path, [task(1, other, (4, [right]))], "json"))
    columns = {"left": "one", "right": "two"}
    reading = sources.read_form(
        put(tmp_path, [task(1, other, (4, [right]))], "json"), columns=columns
    )
    assert reading.records["rankings"][0].ranks == (1, 0)
    with pytest.raises(ValueError, match=r"no field is the prompt: .*--columns prompt=FIELD"):
        sources.read_form(put(tmp_path, [task(1, {**PAIR, "prompt": ""}, (4, [right]))], "json"))


def test_label_studio_rankers_ratings_choices_and_texts(tmp_path: Path):
    items = [{"id": "m1", "title": "A", "body": "No."}, {"id": "m2", "title": "B", "body": "Here."}]
    data = {"prompt": "Where?", "items": items}
    rank = result("ranker", {"ranker": {"rank": ["m2", "m1"]}}, to="items")
    (found,) = sources.read_form(put(tmp_path, [task(1, data, (4, [rank]))], "json")).records[
        "rankings"
    ]
    assert dict(zip(found.responses, found.ranks, strict=True)) == {"Here.": 0, "No.": 1}
    buckets = result("ranker", {"ranker": {"good": ["m2"], "bad": ["m1"], "_": []}}, to="items")
    path = put(tmp_path, [task(1, data, (4, [buckets]))], "json")
    with pytest.raises(ValueError, match="buckets good, bad, and which is better"):
        sources.read_form(path)
    (found,) = sources.read_form(path, columns={"buckets": "good>bad"}).records["rankings"]
    assert dict(zip(found.responses, found.ranks, strict=True)) == {"Here.": 0, "No.": 1}
    chosen = result("choices", {"choices": ["answer2"]})
    (found,) = sources.read_form(put(tmp_path, [task(1, PAIR, (4, [chosen]))], "json")).records[
        "rankings"
    ]
    assert (found.responses, found.ranks) == (("No.", "Here."), (1, 0))
    rows = [
        task(
            k,
            {"prompt": "Where?", "response": words},
            (4, [result("rating", {"rating": stars}, "stars", "response")]),
        )
        for k, (words, stars) in enumerate([("No.", 1), ("Here.", 5)], start=1)
    ]
    (found,) = sources.read_form(put(tmp_path, rows, "json")).records["rankings"]
    assert (found.responses, found.ranks) == (("No.", "Here."), (1, 0))
    words = result("textarea", {"text": ["Here."]}, "response", "prompt")
    (shown,) = sources.read_form(
        put(tmp_path, [task(1, {"prompt": "Where?"}, (4, [words]))], "json")
    ).records["demonstrations"]
    assert shown == Demonstration("Where?", "Here.", id="1", labeler="4")


def test_a_file_that_is_no_export_is_told_so(tmp_path: Path):
    for form in ("argilla", "label_studio"):
        with pytest.raises(
            ValueError,
            match=r"rows\.jsonl:1: no row is of .* the columns are answer1, answer2, prompt",
        ):
            sources.read_form(put(tmp_path, [PAIR]), form)


def test_label_studio_ids_that_are_numbers_match_ids_that_are_texts(tmp_path: Path):
    items = [{"id": 1, "body": "first"}, {"id": 2, "body": "second"}]
    rank = result("ranker", {"ranker": {"rank": ["2", "1"]}}, to="items")
    path = put(tmp_path, [task(1, {"prompt": "Q?", "items": items}, (4, [rank]))], "json")
    (found,) = sources.read_form(path).records["rankings"]
    assert dict(zip(found.responses, found.ranks, strict=True)) == {"second": 0, "first": 1}
    twice = [*items, {"id": "1", "body": "third"}]
    path = put(tmp_path, [task(1, {"prompt": "Q?", "items": twice}, (4, [rank]))], "json")
    with pytest.raises(ValueError, match="an id of the items of 'items' is given twice"):
        sources.read_form(path)


def test_label_studio_min_is_named(tmp_path: Path):
    row = {**PAIR, "id": 1, "pref": "left", "annotator": 1, "annotation_id": 3, "lead_time": 2.5}
    with pytest.raises(ValueError, match="export it as JSON"):
        sources.read_form(put(tmp_path, [row], "json"))


# ------------------------------------------------------------------------------------------------- OpenAssistant


def test_openassistant_as_trees_and_as_a_flat_table(tmp_path: Path):
    def said(
        name: str, parent: str | None, role: str, words: str, rank: float | None = None
    ) -> dict:
        return {"message_id": name, "parent_id": parent, "role": role, "text": words, "lang": "en", "rank": rank,
                "deleted": False, "synthetic": False, "message_tree_id": "a"}  # fmt: skip

    flat = [
        said("a", None, "prompter", "Where?"),
        said("b", "a", "assistant", "No.", 1.0),
        said("c", "a", "assistant", "Here.", 0.0),
    ]
    reading = sources.read_form(put(tmp_path, flat, "parquet"))
    prompt = "Human: Where?\n\nAssistant:"
    assert reading.form == "oasst"
    assert reading.records["rankings"] == [Ranking(prompt, ("Here.", "No."), (0, 1), "a", "oasst")]
    assert reading.records["demonstrations"] == [Demonstration(prompt, "Here.", "a", "oasst")]
    root, *replies = [
        {**row, "rank": row["rank"] and int(row["rank"]), "replies": []} for row in flat
    ]
    replies[1]["rank"] = 0
    tree = {
        "message_tree_id": "a",
        "tree_state": "ready_for_export",
        "prompt": {**root, "replies": replies},
    }
    assert sources.read_form(put(tmp_path, [tree], "jsonl.gz")).records == reading.records
    with pytest.raises(ValueError, match=r"(?s)language 1.*choose it with --config\.language"):
        sources.read_form(put(tmp_path, [tree], "jsonl.gz"), language="de")
    with pytest.raises(ValueError, match="'parent_id' = 'z' names no message"):
        sources.read_form(put(tmp_path, [*flat, said("d", "z", "assistant", "Lost.")], "jsonl"))


# ----------------------------------------------------------------------------------------------- one response a row


def test_responses_of_one_prompt_in_several_rows(tmp_path: Path):
    rows = [
        {"prompt": "Where?", "response": "No.", "helpfulness": 1, "verbosity": 4},
        {"prompt": "Who?", "response": "Me.", "helpfulness": 3, "verbosity": 1},
        {"prompt": "Where?", "response": "Here.", "helpfulness": 4, "verbosity": 0},
    ]
    path = put(tmp_path, rows, "parquet")
    with pytest.raises(
        ValueError, match=r"--columns score=NAME; the row has the numbers helpfulness, verbosity"
    ):
        sources.read_form(path, "rated")
    reading = sources.read_form(path, "rated", columns={"score": "helpfulness"})
    assert reading.records["rankings"] == [Ranking("Where?", ("No.", "Here."), (1, 0))]
    assert reading.report.dropped == {"only one response": 1}
    assert reading.report.aside == {"verbosity": 2}


# --------------------------------------------------------------------------------------------------- the stages


@pytest.mark.parametrize("name", [*FLAT, *NESTED])
def test_every_form_is_encoded_as_the_stages_do(tmp_path: Path, name: str):
    """Round trip too: what is written is read back equal."""
    row = FLAT[name][0] if name in FLAT else NESTED[name][1]
    reading = sources.read_form(put(tmp_path, [row]))
    ((kind, records),) = reading.records.items()
    schema.write_jsonl(tmp_path / "stage.jsonl", records)
    assert sources.read_form(tmp_path / "stage.jsonl").records[kind] == [
        record if record.id else structs.replace(record) for record in records
    ]
    tokenizer = text.load_tokenizer(assets())
    if kind == "demonstrations":
        config = load_config(f"{ROOT}/configs/sft/storyland.py:smoke", {"row_length": "256"})
        _, rows = sft.read_demonstrations(tokenizer, str(tmp_path / "stage.jsonl"), config)
        assert rows.mask.sum() > 1
    else:
        (ranking,) = ranked.read_rankings(str(tmp_path / "stage.jsonl"))
        prompt, responses, ranks = ranked.encode_ranking(tokenizer, ranking)
        assert prompt
        assert all(responses)
        assert len(ranks) == len(responses) == 2
