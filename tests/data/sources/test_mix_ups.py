"""Rows that could be taken for others: of two speakers, under two systems, in a cell, beside a whole conversation."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_jax.data import schema, sources
from rlhf_jax.data.schema import Demonstration, Message


def put(folder: Path, *rows: dict[str, Any], name: str = "rows.jsonl") -> Path:
    path = folder / name
    if name.endswith(".csv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def talk(*contents: str) -> list[dict[str, str]]:
    return [
        {"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(contents)
    ]


# ------------------------------------------------------------------------------- responses of one prompt, one a row


def test_scores_under_two_systems_or_by_two_people_are_not_compared(tmp_path: Path):
    rows = [
        {"System Prompt": system, "prompt": "Greet the miller.", "response": text, "score": score}
        for system, text, score in (("Be kind.", "Welcome!", 5), ("Be rude.", "Go.", 4), ("Be kind.", "Hm.", 1),
                                    ("Be rude.", "Welcome!", 1))
    ]  # fmt: skip
    records, report = sources.read_rated(put(tmp_path, *rows))
    assert [r.prompt[0] for r in records] == [
        Message("system", "Be kind."),
        Message("system", "Be rude."),
    ]
    assert [(r.responses, r.ranks) for r in records] == [
        (("Welcome!", "Hm."), (0, 1)),
        (("Go.", "Welcome!"), (0, 1)),
    ]
    assert report.aside == {}
    rows = [
        {"prompt": "Greet.", "response": text, "score": score, "labeler": person}
        for person, text, score in (
            ("ann", "Hi.", 2),
            ("ann", "Oh.", 1),
            ("bob", "Hi.", 1),
            ("bob", "Oh.", 2),
        )
    ]
    records, report = sources.read_rated(put(tmp_path, *rows))
    assert [(r.labeler, r.ranks) for r in records] == [("ann", (0, 1)), ("bob", (1, 0))]
    assert report.aside == {}


def test_a_bad_score_is_named_by_its_own_row(tmp_path: Path):
    rows = [
        {"prompt": "Greet.", "response": "Hi.", "score": "1"},
        {"prompt": "Greet.", "response": "Oh.", "score": "2,5"},
    ]
    path = put(tmp_path, *rows, name="rows.csv")
    with pytest.raises(ValueError, match=r"'2,5': write it as 1 or 1.5") as error:
        sources.read_rated(path)
    assert f"{path}:3: field 'score'" in str(error.value)


def test_rated_responses_are_no_demonstrations_unasked(tmp_path: Path):
    rows = [
        {"prompt": "Greet.", "response": t, "helpfulness": n, "verbosity": 1}
        for t, n in (("Hi.", 4), ("Bah.", 0))
    ]
    path = put(tmp_path, *rows)
    with pytest.raises(ValueError, match="--columns score=helpfulness"):
        sources.read_form(path)
    with pytest.raises(
        ValueError, match="--columns score=helpfulness"
    ):  # given to a stage as it is
        schema.read_jsonl(path, Demonstration)
    assert sources.read_form(path, columns={"score": "helpfulness"}).records["rankings"][
        0
    ].ranks == (0, 1)
    assert len(sources.read_form(path, "jsonl").records["demonstrations"]) == 2


# ------------------------------------------------------------------------------ a prompt beside whole conversations


def test_whole_transcripts_give_the_prompt_that_stands_beside_them(tmp_path: Path):
    start = (
        "Human: Is the mill open?\n\nAssistant: Till six.\n\nHuman: And on Sunday?\n\nAssistant:"
    )
    row = {"prompt": "And on Sunday?", "chosen": start + " No.", "rejected": start + " Hm."}
    records, report = sources.read_pairs(put(tmp_path, row))
    assert (records[0].prompt, records[0].responses) == (start, ("No.", "Hm."))
    assert report.noted["prompt cut from whole text"] == 1
    row["prompt"] = start.removesuffix("\n\nAssistant:")
    assert sources.read_pairs(put(tmp_path, row))[0][0].responses == ("No.", "Hm.")
    row = {
        "prompt": "Is the mill open?",
        "completion": "Human: Is the mill open?\n\nAssistant: Yes.",
    }
    records, _ = sources.read_completions(put(tmp_path, row))
    assert records == [Demonstration("Human: Is the mill open?\n\nAssistant:", "Yes.")]
    row = {"prompt": "Who is the miller?", "chosen": start + " No.", "rejected": start + " Hm."}
    with pytest.raises(
        ValueError, match=r"none of their human turns is the prompt .*--columns prompt="
    ):
        sources.read_pairs(put(tmp_path, row))
    assert sources.read_pairs(put(tmp_path, row), columns={"prompt": ""})[0][0].prompt == start


def test_a_prompt_of_messages_is_not_repeated_either(tmp_path: Path):
    prompt = talk("Tell me of the mill.")
    row = {
        "prompt": prompt,
        "chosen": "Tell me of the mill. It turns.",
        "rejected": "Tell me of the mill. It burns.",
    }
    records, report = sources.read_pairs(put(tmp_path, row))
    assert records[0].responses == ("It turns.", "It burns.")
    assert report.noted["prompt cut from whole text"] == 1


def test_a_conversation_beside_a_text_is_a_pair(tmp_path: Path):
    row = {"prompt": "Who?", "chosen": talk("Who?", "The miller."), "rejected": "Nobody."}
    records, _ = sources.read_pairs(put(tmp_path, row))
    assert (records[0].prompt, records[0].responses) == (
        (Message("user", "Who?"),),
        ("The miller.", "Nobody."),
    )
    row = {
        "prompt": "Hi",
        "chosen": talk("Hi", "Yes?", "Who?", "I."),
        "rejected": talk("Hi", "Yes?", "Who?", "You."),
    }
    with pytest.raises(ValueError, match=r"4 messages answer the prompt.*--columns prompt="):
        sources.read_pairs(put(tmp_path, row))
    assert len(sources.read_pairs(put(tmp_path, row), columns={"prompt": ""})[0][0].prompt) == 3


# --------------------------------------------------------------------------------------------- cells of a spreadsheet


def test_messages_and_json_answers_in_cells(tmp_path: Path):
    row = {"id": "7", "messages": json.dumps(talk("Who?", "The miller."))}
    reading = sources.read_form(put(tmp_path, row, name="rows.csv"))
    assert reading.records["demonstrations"][0].response == "The miller."
    assert (
        reading.said
        == "read as OpenAI messages: the last turn -> response, those before it -> prompt"
    )
    row = {
        "chosen": json.dumps(talk("Who?", "The miller.")),
        "rejected": json.dumps(talk("Who?", "I.")),
    }
    assert (
        sources.read_form(put(tmp_path, row, name="rows.csv")).records["rankings"][0].responses[1]
        == "I."
    )
    answer = '[{"name": "Ann", "age": 40}]'  # an answer that is JSON itself
    row = {"prompt": "List them as JSON.", "chosen": answer, "rejected": "Ann, 40"}
    assert sources.read_pairs(put(tmp_path, row, name="rows.csv"))[0][0].responses == (
        answer,
        "Ann, 40",
    )


def test_empty_rows_and_columns_of_a_spreadsheet(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbfprompt,completion,,\r\nWho?,I.,,\r\n,,,\r\nWhy?,So.,,\r\n")
    records, report = sources.read_completions(path)
    assert [r.response for r in records] == ["I.", "So."]
    assert report.rows == 2
    path.write_bytes(b"prompt,completion,,\r\nWho?,I.,note,\r\n")
    assert sources.read_completions(path)[1].aside == {"(no name)": 1}
    path.write_bytes(b"prompt,completion,,\r\nWho?,I.,,note\r\n")
    with pytest.raises(ValueError, match="cells where the first line names 3 columns"):
        sources.read_completions(path)


def test_openassistant_in_a_csv_file(tmp_path: Path):
    rows = [
        {"message_id": name, "parent_id": parent, "text": text, "role": role, "lang": "en", "rank": rank,
         "deleted": deleted, "synthetic": "False"}
        for name, parent, text, role, rank, deleted in (
            ("a", "", "Who?", "prompter", "", "False"), ("b", "a", "I.", "assistant", "1.0", "False"),
            ("c", "a", "You.", "assistant", "0.0", "False"), ("d", "a", "Pah.", "assistant", "2.0", "True"))
    ]  # fmt: skip
    reading = sources.read_form(put(tmp_path, *rows, name="rows.csv"))
    assert reading.records["rankings"][0].responses == ("You.", "I.")
    assert reading.records["demonstrations"][0].response == "You."


def test_transcripts_with_crlf_are_recognised(tmp_path: Path):
    start = "\r\n\r\nHuman: Who?\r\n\r\nAssistant: "
    reading = sources.read_form(put(tmp_path, {"chosen": start + "I.", "rejected": start + "You."}))
    assert reading.form == "hh"
    assert reading.records["rankings"][0].prompt == "Human: Who?\n\nAssistant:"


# ------------------------------------------------------------------------------------------------- names and flags


def test_names_that_differ_in_case_are_proposed(tmp_path: Path):
    path = put(tmp_path, {"Prompt": "Who?", "Chosen": "I.", "Rejected": "You."}, name="rows.csv")
    with pytest.raises(ValueError, match="--columns prompt=Prompt,chosen=Chosen,rejected=Rejected"):
        sources.read_form(path)
    with pytest.raises(ValueError, match="--columns prompt=Question "):
        sources.read_pairs(put(tmp_path, {"Question": "Who?", "chosen": "I.", "rejected": "You."}))


def test_a_column_that_a_flag_names_and_nobody_reads_is_an_error(tmp_path: Path):
    pair = {"prompt": "Who?", "chosen": "I.", "rejected": "You.", "persona": "A miller."}
    path = put(tmp_path, pair, {**pair, "rejected": "I."})  # one row is left out
    for read in (sources.read_form, sources.read_pairs):
        with pytest.raises(
            ValueError, match="--columns sytem=persona names a column that this form does not read"
        ):
            read(path, columns={"sytem": "persona"})
        read(path, columns={"system": "persona", "labeler": ""})


def test_a_choice_between_questions_names_the_file(tmp_path: Path):
    result = [{"type": "pairwise", "from_name": name, "to_name": "left,right", "value": {"selected": "left"}}
              for name in ("kind", "true")]  # fmt: skip
    task = {
        "id": 1,
        "data": {"prompt": "Who?", "left": "I.", "right": "You."},
        "annotations": [{"result": result}],
    }
    path = put(tmp_path, task)
    with pytest.raises(ValueError, match="choose one with --columns ranking=NAME") as error:
        sources.read_form(path)
    assert str(path) in str(error.value)


def test_the_users_turns_may_have_no_weight(tmp_path: Path):
    turns = [
        {"from": "human", "value": "Who?", "train": False},
        {"from": "gpt", "value": "I.", "train": True},
    ]
    path = put(tmp_path, {"conversations": turns})
    assert sources.read_form(path).records["demonstrations"][0].response == "I."
    turns[1]["train"] = False
    with pytest.raises(ValueError, match=r"--config\.assistant_turns=last"):
        sources.read_form(put(tmp_path, {"conversations": turns}))


def test_text_that_a_template_wrote_is_noted_in_messages_and_documents_too(tmp_path: Path):
    _, report = sources.read_completions(
        put(tmp_path, {"messages": talk("<|im_start|>user\nWho?<|im_end|>", "I.")})
    )
    assert report.noted == {"chat template in text": 1}
    reading = sources.read_form(put(tmp_path, {"text": "[INST] Who? [/INST] I."}))
    assert reading.report.noted == {"special token in text": 1}


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": "Who?", "answer": "I."}, "--columns completion=answer"),
        ({"query": "Who?", "response": "I."}, "--columns prompt=query,completion=response"),
        ({"prompt": "Who?", "context": "A mill.", "answer": "I."}, "--columns completion=answer"),
        ({"text": "[INST] Who? [/INST] I.", "meta": "x"}, "do not say where an answer begins"),
        ({"promt": "Who?", "response": "I."}, "did you mean 'prompt'"),
        ({"prompt": "Who?", "response": "I.", "lang": "en"}, "unknown field 'lang'"),
    ],
)
def test_a_table_given_to_a_stage_is_told_what_to_name(
    tmp_path: Path, row: dict[str, Any], named: str
):
    with pytest.raises(ValueError, match=named):
        schema.read_jsonl(put(tmp_path, row), Demonstration)


def test_rated_responses_that_repeat_their_prompt_are_cut(tmp_path: Path):
    prompt = "\n\nHuman: Who?\n\nAssistant:"
    row = {"prompt": prompt, "responses": [prompt + " I.", prompt + " You."], "scores": [1, 2]}
    records, report = sources.read_rated(put(tmp_path, row))
    assert records[0].responses == ("I.", "You.")
    assert report.noted["prompt cut from whole text"] == 1
    row["responses"] = [prompt + " I.", "You."]
    with pytest.raises(ValueError, match="begins some of the responses only"):
        sources.read_rated(put(tmp_path, row))
    rows = [
        {"prompt": p, "response": t, "score": n}
        for p, t, n in (("Who? ", "I.", 1), ("Who?\r\n", "You.", 2))
    ]
    assert sources.read_rated(put(tmp_path, *rows))[0][0].responses == ("I.", "You.")  # one prompt


def test_an_answer_that_begins_with_its_prompt_is_noted_in_every_form(tmp_path: Path):
    row = {"instruction": "Name the mill.", "output": "Name the mill. It has none."}
    assert sources.read_form(put(tmp_path, row)).report.noted == {
        "answer begins with the prompt": 1
    }
    row = {"messages": talk("Name the mill.", "Name the mill. It has none.")}
    assert sources.read_form(put(tmp_path, row)).report.noted == {
        "answer begins with the prompt": 1
    }


@pytest.mark.parametrize("choice", [{"preference": 2}, {"better_response_id": 1}, {"Winner": "b"}])
def test_a_column_that_says_which_answer_is_better_is_not_passed_over(
    tmp_path: Path, choice: dict[str, Any]
):
    path = put(tmp_path, {"prompt": "Who?", "response_1": "I.", "response_2": "You.", **choice})
    with pytest.raises(
        ValueError, match=f"{next(iter(choice))!r} seems to say which answer is better"
    ):
        sources.read_form(path)


def test_a_null_where_a_text_is_needed_is_told_from_a_missing_column(tmp_path: Path):
    path = put(
        tmp_path,
        {"prompt": "Who?", "chosen": "I.", "rejected": "You."},
        {"prompt": "Who?", "chosen": None},
    )
    with pytest.raises(
        ValueError, match=r"rows.jsonl:2: field 'chosen' is missing: it is null here"
    ):
        sources.read_pairs(path)


TASK = {"id": 1, "data": {"prompt": "Who?", "left": "I.", "right": "You."}}
ROOT = {"message_id": "a", "text": "Who?", "role": "prompter", "lang": "en"}


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({**TASK, "annotations": [None]}, "not as the tool exports it"),
        (
            {**TASK, "annotations": [{"result": [{"type": "pairwise", "value": "left"}]}]},
            "not as the tool exports it",
        ),
        (
            {"fields": {"prompt": "Who?"}, "responses": {"rank": ["x"]}},
            "not as the tool exports it",
        ),
        ({"prompt": {**ROOT, "replies": ["x"]}}, "field 'replies' must be a list of messages"),
        ({"prompt": {**ROOT, "replies": 3}}, "field 'replies' must be a list of messages"),
        ({**ROOT, "parent_id": "a"}, "leads from the message back to it"),
    ],
)
def test_a_damaged_export_is_refused_with_its_row(tmp_path: Path, row: dict[str, Any], named: str):
    path = put(tmp_path, row)
    with pytest.raises(ValueError, match=named) as error:
        sources.read_form(path)
    assert f"{path}:1: " in str(error.value)


def test_one_turn_as_a_prompt_is_no_tree(tmp_path: Path):
    row = {"prompt": {"role": "user", "content": "Who?"}, "completion": "I."}
    records = sources.read_form(put(tmp_path, row)).records
    assert records == {"demonstrations": [Demonstration((Message("user", "Who?"),), "I.")]}
