"""What happens where a prompt and an answer meet, and to files of other systems: each rule of `FORM_RULES`."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data import schema, sources
from rlhf_jax.data.schema import Demonstration, Message, Prompt, Ranking
from rlhf_jax.data.sources import FORM_RULES, rules

ROOT = Path(__file__).parents[3]


def put(folder: Path, *rows: dict[str, Any], name: str = "rows.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def pair(
    chosen: Any, rejected: Any, prompt: Any = "How deep is the well?", **more: Any
) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def said(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def reasons(error: pytest.ExceptionInfo[ValueError], path: Path) -> str:
    assert str(path) in str(error.value)  # every refusal names the file
    return str(error.value)


# ------------------------------------------------------------------------------------------- no prompt is guessed


def test_the_words_that_two_answers_share_are_no_prompt(tmp_path: Path):
    row = {"chosen": "The well is nine metres deep.", "rejected": "The well is two metres deep."}
    path = put(tmp_path, row)
    with pytest.raises(
        ValueError, match="no column 'prompt' and no transcript: the row has chosen, rejected"
    ) as error:
        sources.read_pairs(path)
    assert "--columns prompt=NAME" in reasons(error, path)
    path = put(tmp_path, {"query": "How deep?", **row})
    with pytest.raises(ValueError, match="--columns prompt=query"):
        sources.read_pairs(path)
    with pytest.raises(ValueError, match="--source=trl --columns prompt=query"):
        sources.read_form(path)
    ((ranking,), _) = sources.read_pairs(path, columns={"prompt": "query"})
    assert ranking == Ranking(
        "How deep?", ("The well is nine metres deep.", "The well is two metres deep."), (0, 1)
    )
    with pytest.raises(
        ValueError,
        match="has no column 'qury' for --columns prompt=qury: it has chosen, query, rejected",
    ):
        sources.read_pairs(path, columns={"prompt": "qury"})


def test_a_column_that_a_flag_replaces_is_named(tmp_path: Path):
    path = put(tmp_path, pair("a", "b", question="Why?", topic="wells"))
    ((ranking,), report) = sources.read_pairs(path, columns={"prompt": "question"})
    assert ranking.prompt == "Why?"
    assert report.aside == {"prompt (by --columns)": 1, "topic": 1}


def test_a_prompt_beside_unknown_columns_is_not_taken_alone(tmp_path: Path):
    path = put(tmp_path, {"prompt": "Why?", "best": "Because.", "worst": "Hm."})
    with pytest.raises(ValueError, match="nobody can tell which of them answers the prompt"):
        sources.read_form(path)
    reading = sources.read_form(path, "jsonl")
    assert (reading.records, reading.report.aside) == (
        {"prompts": [Prompt("Why?")]},
        {"best": 1, "worst": 1},
    )
    with pytest.raises(
        ValueError, match="gives the column 'best' several names, completion, response"
    ):
        sources.read_form(path, columns={"completion": "best", "response": "best"})
    path = put(tmp_path, {"question": "Why?", "answer": "Because."})
    with pytest.raises(
        ValueError, match="--source=trl --columns prompt=question,completion=answer"
    ):
        sources.read_form(path)


# ----------------------------------------------------------------------------------------- whole texts, and echoes


TALK = "Human: Deep?\n\nAssistant:"
WHOLE = [
    (TALK, [f"{TALK} Yes.", f"{TALK} No."], ("Yes.", "No.")),
    ("How deep is the well?\r\n", ["How deep is the well?\nNine.", "How deep is the well?\r\nTwo."], ("Nine.", "Two.")),
    ("Q: How deep is it? A:", ["Q: How deep is it? A:Nine.", "Q: How deep is it? A:Two."], ("Nine.", "Two.")),
    ("How deep is the well?", ["It is deep.", "How deep is the well? Two."], None),
    ("How deep", ["How deeply you ask.", "How deepest."], None),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "texts", "wanted"), WHOLE)
def test_whole_texts_beside_their_prompt_are_cut_and_counted(
    tmp_path: Path, prompt: str, texts: list, wanted: Any
):
    ((ranking,), report) = sources.read_pairs(put(tmp_path, pair(*texts, prompt=prompt)))
    assert ranking.responses == (wanted or tuple(texts))
    assert ranking.prompt == prompt.strip()
    assert report.noted.get("prompt cut from whole text", 0) == (wanted is not None)


def test_a_short_prompt_before_both_answers_is_decided_by_the_table(tmp_path: Path):
    greeting = pair("Hello there!", "Hello you!", prompt="Hello")
    path = put(tmp_path, greeting)
    with pytest.raises(
        ValueError, match="both answers begin with the prompt 'Hello', and no other row tells"
    ):
        sources.read_pairs(path)
    records, report = sources.read_pairs(put(tmp_path, greeting, pair("Nine.", "Two.")))
    assert (records[0].responses, report.noted["answer begins with the prompt"]) == (
        ("Hello there!", "Hello you!"),
        1,
    )
    whole = pair("How deep is the well? Nine.", "How deep is the well? Two.")
    records, report = sources.read_pairs(put(tmp_path, greeting, whole))
    assert [r.responses for r in records] == [("there!", "you!"), ("Nine.", "Two.")]
    assert report.noted["prompt cut from whole text"] == 2


def test_a_transcript_that_begins_one_of_two_texts_is_refused(tmp_path: Path):
    start = "Human: Deep?\n\nAssistant:"
    path = put(tmp_path, pair(f"{start} Yes.", "No.", prompt=start))
    with pytest.raises(ValueError, match="begins one of the two texts only") as error:
        sources.read_pairs(path)
    assert f"{path}:1: " in reasons(error, path)


def test_a_completion_that_says_the_question_again_is_kept_unless_all_do(tmp_path: Path):
    echo = {"prompt": "How deep is it?", "completion": "How deep is it? Very."}
    records, report = sources.read_completions(
        put(tmp_path, echo, {"prompt": "Why?", "completion": "Because."})
    )
    assert records[0].response == "How deep is it? Very."
    assert report.noted["answer begins with the prompt"] == 1
    records, _ = sources.read_completions(
        put(tmp_path, echo, {"prompt": "Why is it so?", "completion": "Why is it so? Hm."})
    )
    assert [r.response for r in records] == ["Very.", "Hm."]


def test_one_response_that_begins_the_other_and_spaces_are_counted(tmp_path: Path):
    rows = [
        pair("Yes", "Yes and no"),
        pair(" a\r\n", "b", prompt="p: "),
        pair("\ufeffc", "d", prompt="e"),
    ]
    records, report = sources.read_pairs(put(tmp_path, *rows))
    assert [(r.prompt, r.responses) for r in records[1:]] == [("p:", ("a", "b")), ("e", ("c", "d"))]
    assert report.noted == {
        "one response begins the other": 1,
        "line ends made LF": 1,
        "spaces at the seam removed": 1,
        "byte order mark removed": 1,
    }


def test_equal_responses_and_ties_are_noted_as_for_json_lines(tmp_path: Path):
    rows = [
        {
            "prompt": "Name a well.",
            "responses": ["Jacob's.", "Jacob's.", "A hole."],
            "scores": [1, 3, 2],
        },
        {"prompt": "Name a king.", "responses": ["Arthur.", "Lear."], "scores": [2, 2]},
    ]
    _, report = sources.read_rated(put(tmp_path, *rows))
    assert report.noted == {"same response, different ranks": 1, "all responses tie": 1}
    rows = [
        pair("a", "b", score_chosen=1, score_rejected=4),
        pair("c", "d", score_chosen=1, score_rejected=1),
    ]
    _, report = sources.read_pairs(put(tmp_path, *rows))
    assert report.noted == {"scores say otherwise": 1, "scores are equal": 1}
    assert report.aside == {"score_chosen": 2, "score_rejected": 2}


# ---------------------------------------------------------------------------------------------------------- system


def test_a_system_column_is_the_first_turn_everywhere(tmp_path: Path):
    system = Message("system", "Answer like a miller.")
    wanted = (system, Message("user", "How deep is the well?"))
    column = {"system": "Answer like a miller."}
    assert sources.read_pairs(put(tmp_path, pair("a", "b", **column)))[0][0].prompt == wanted
    row = {
        "prompt": "How deep is the well?",
        "completion": "Deep.",
        "system_prompt": "Answer like a miller.",
    }
    assert sources.read_completions(put(tmp_path, row))[0] == [Demonstration(wanted, "Deep.")]
    assert sources.read_prompts(
        put(tmp_path, {"prompt": [user("How deep is the well?")], **column})
    )[0] == [Prompt(wanted)]
    row = {"prompt": "How deep is the well?", "responses": ["a", "b"], "scores": [1, 2], **column}
    assert sources.read_rated(put(tmp_path, row))[0][0].prompt == wanted
    talk = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: How deep?\n\nAssistant: {}"
    records, _ = sources.read_pairs(
        put(tmp_path, {"chosen": talk.format("a"), "rejected": talk.format("b"), **column})
    )
    turns = (
        system,
        Message("user", "Hi"),
        Message("assistant", "Yes?"),
        Message("user", "How deep?"),
    )
    assert records[0].prompt == turns


def test_systems_that_agree_or_are_empty_or_differ(tmp_path: Path):
    turns = [{"role": "system", "content": "Be brief."}, user("Why?")]
    same = sources.read_pairs(put(tmp_path, pair("a", "b", prompt=turns, system="Be brief. ")))[0]
    assert len(same[0].prompt) == 2
    for empty in (None, "", "  "):
        assert (
            sources.read_pairs(put(tmp_path, pair("a", "b", system=empty)))[0][0].prompt
            == "How deep is the well?"
        )
    path = put(tmp_path, pair("a", "b"), pair("a", "b", prompt=turns, system="Be long."))
    with pytest.raises(ValueError, match="the system column and the system turn differ") as error:
        sources.read_pairs(path)
    assert f"{path}:2: " in reasons(error, path)
    records, report = sources.read_pairs(
        put(tmp_path, pair("a", "b"), pair("c", "d", system="Be brief."))
    )
    assert [type(r.prompt) for r in records] == [tuple, tuple]  # one form in a table, not two
    assert report.noted["prompt made a turn"] == report.noted["system made a turn"] == 1


# --------------------------------------------------------------------------- what a role and a text cannot hold


CALL = [{"type": "function", "function": {"name": "measure", "arguments": "{}"}}]
MORE: list[tuple[str, list[dict[str, Any]]]] = [
    ("tool_calls", [user("Deep?"), said("Let me measure.", tool_calls=CALL)]),
    ("function_call", [user("Deep?"), said("Let me.", function_call={"name": "m"}), user("And?"), said("Yes.")]),
    ("'tool'", [user("Deep?"), {"role": "tool", "content": "9"}, said("Nine.")]),
    ("reasoning_content", [user("Deep?"), said("Nine.", reasoning_content="I think")]),
    ("thinking", [user("Deep?"), said("Nine.", thinking="I think"), user("Sure?"), said("Yes.")]),
    ("image_url", [user([{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": "x"}}]), said("9")]),
    ("'audio'", [user("Deep?"), said("Nine.", audio={"id": "a"})]),
    ("'name'", [user("Deep?", name="Ann"), said("Nine.")]),
    ("weight=0", [user("Deep?"), said("Nine.", weight=0)]),
    ("train=False", [user("Deep?"), said("Nine.", train=False), user("Sure?"), said("Yes.")]),
    ("'mood'", [user("Deep?", mood="sad"), said("Nine.")]),
]  # fmt: skip


@pytest.mark.parametrize(("named", "turns"), MORE)
def test_more_than_a_role_and_a_text_is_refused_by_name(
    tmp_path: Path, named: str, turns: list[dict[str, Any]]
):
    path = put(tmp_path, {"messages": [user("Hi"), said("Hello.")]}, {"messages": turns})
    with pytest.raises(ValueError, match="1 of 2 rows") as error:
        sources.read_completions(path)
    assert named in reasons(error, path)
    assert f"{path}:2: " in str(error.value)
    whole = [user("Deep?"), said("Other.")]
    for row in ({"chosen": turns, "rejected": whole}, {"chosen": whole, "rejected": turns}):
        with pytest.raises(ValueError, match="are bad") as error:
            sources.read_pairs(put(tmp_path, row))
        assert named in str(error.value)
    sharegpt = []
    for turn in turns:
        more = {key: value for key, value in turn.items() if key not in ("role", "content")}
        sharegpt.append({"from": turn["role"], "value": turn["content"], **more})
    with pytest.raises(ValueError, match="are bad") as error:
        sources.read_form(put(tmp_path, {"conversations": sharegpt}))
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("column", "value"), [("tools", CALL), ("images", ["a.png"]), ("reasoning", "I think.")]
)
def test_such_columns_are_refused_or_left_aside_by_flag(tmp_path: Path, column: str, value: Any):
    path = put(tmp_path, {**pair("a", "b"), column: value})
    with pytest.raises(
        ValueError, match=rf"the column '{column}' cannot be kept.*--columns {column}="
    ):
        sources.read_pairs(path)
    _, report = sources.read_pairs(path, columns={column: ""})
    assert report.aside == {f"{column} (by --columns)": 1}
    for empty in (None, [], "", "[]"):
        assert sources.read_pairs(put(tmp_path, {**pair("a", "b"), column: empty}))[1].kept == 1


def test_what_says_nothing_is_no_reason_to_refuse(tmp_path: Path):
    """A column of messages has every field in every message; unused ones are null. A weight of 1 is the rule."""
    turns = [
        user("Deep?", tool_calls=None, id="7"),
        said([{"type": "text", "text": "Nine."}], tool_calls=[], weight=1),
    ]
    records, report = sources.read_completions(put(tmp_path, {"messages": turns}))
    assert records == [Demonstration((Message("user", "Deep?"),), "Nine.")]
    assert report.aside == {"messages[].id": 1}
    turns = [user([{"type": "text", "text": "Deep"}, {"type": "text", "text": "?"}]), said("Nine.")]
    records, report = sources.read_completions(put(tmp_path, {"messages": turns}))
    assert (records[0].prompt, report.noted) == (
        (Message("user", "Deep?"),),
        {"text parts joined": 1},
    )


# ------------------------------------------------------------------------------------------------- files and cells


def test_ids_are_texts_whatever_a_file_calls_them(tmp_path: Path):
    names = [10**29 + 7, 7.0, "a-1"]
    records, _ = sources.read_prompts(
        put(tmp_path, *({"prompt": f"p{k}", "id": name} for k, name in enumerate(names)))
    )
    assert [r.id for r in records] == [str(10**29 + 7), "7", "a-1"]
    with pytest.raises(ValueError, match="'7' is also in an earlier row"):
        sources.read_prompts(put(tmp_path, {"prompt": "a", "id": 7}, {"prompt": "b", "id": "7"}))
    ((prompt,), report) = sources.read_prompts(
        put(tmp_path, {"prompt": "a", "id": {"x": 1}, "time": "soon"})
    )
    assert (prompt, report.aside) == (Prompt("a"), {"id": 1, "time": 1})


def test_rated_rows_with_nothing_to_compare_are_dropped(tmp_path: Path):
    rows = [{"instruction": "Why?", "completions": [{"response": r, "overall_score": 1} for r in words]}
            for words in (["a", "b"], [], ["a"])]  # fmt: skip
    reading = sources.read_form(put(tmp_path, *rows))
    assert (reading.report.kept, reading.report.dropped) == (1, {"only one response": 2})
    rows[0]["completions"][0] |= {"helpful": 5, "overall_score": 0}
    rows[0]["completions"][1] |= {"helpful": 1, "overall_score": 9}
    path = put(tmp_path, rows[0])
    assert sources.read_form(path).records["rankings"][0].ranks == (1, 0)
    reading = sources.read_form(path, columns={"score": "helpful"})
    assert reading.records["rankings"][0].ranks == (0, 1)
    assert reading.report.aside == {"completions[].overall_score": 1}
    assert sources.read_rated(path, columns={"score": "helpful"})[0][0].ranks == (0, 1)


def test_cells_of_csv_files(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b'\xef\xbb\xbf"prompt",completion,system\r\n"a, ""b""\r\nc", d,nan\r\n\r\n"e",f,\r\n'
    )
    reading = sources.read_form(path)
    assert reading.records["demonstrations"] == [
        Demonstration('a, "b"\nc', "d"),
        Demonstration("e", "f"),
    ]
    assert reading.report.noted["missing value as text"] == 1
    path.write_text("prompt,completion\na,None\n")  # may be an answer
    reading = sources.read_form(path)
    assert reading.records["demonstrations"] == [Demonstration("a", "None")]
    assert reading.report.noted == {"missing value as text": 1}
    path.write_text("prompt,completion\na,b\nc,d,e\n")
    with pytest.raises(
        ValueError, match=r"rows\.csv:3: 3 cells where the first line names 2 columns"
    ):
        sources.read_form(path)
    path.write_text("prompt;completion\na;b\n")
    with pytest.raises(ValueError, match=r"rows\.csv:1: the columns are separated by ';'"):
        sources.read_form(path)
    path.write_text("prompt,prompt\na,b\n")
    with pytest.raises(ValueError, match="names the column 'prompt' twice"):
        sources.read_form(path)
    path.write_text('prompt,completion\n"a"x,b\n')
    with pytest.raises(ValueError, match=r"rows\.csv:2: .*quote cells"):
        sources.read_form(path)
    path.write_bytes("prompt,completion\nä,b\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"rows\.csv: byte 0 is not UTF-8"):
        sources.read_form(path)
    path.write_text('prompt,responses,scores\np,"[""a"", ""b""]","[1, 2.5]"\n')
    assert sources.read_form(path).records["rankings"] == [Ranking("p", ("a", "b"), (1, 0))]


def test_json_lists_and_objects(tmp_path: Path):
    path = tmp_path / "rows.json"
    path.write_text(
        '[{"prompt": "a", "completion": "b"},\n {"prompt": "c", "completion": "d", "n": NaN}]'
    )
    with pytest.raises(ValueError, match=r"rows\.json:2: nan is not JSON"):
        sources.read_form(path)
    path.write_text('[{"prompt": "a", "completion": "b"},\n {"prompt": "c"')
    with pytest.raises(
        ValueError, match=r"rows\.json: the JSON list is damaged at line 2, column \d+"
    ):
        sources.read_form(path)
    path.write_text('{\n "prompt": {"0": "a"},\n "completion": {"0": "b"}\n}')
    with pytest.raises(
        ValueError, match=r"one JSON object \(with prompt, completion\).*orient='records'"
    ):
        sources.read_form(path)
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n')
    assert len(sources.read_form(path).records["demonstrations"]) == 2
    path.write_text("[]")
    with pytest.raises(ValueError, match="holds no rows"):
        sources.read_form(path)


def test_rows_of_two_forms_are_refused(tmp_path: Path):
    rows = [{"instruction": f"Count {k}.", "input": "", "output": "9"} for k in range(6)]
    path = put(
        tmp_path,
        *rows,
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    )
    with pytest.raises(ValueError, match=r":7: the row looks like ShareGPT, others like Alpaca"):
        sources.read_form(path)
    with pytest.raises(
        ValueError, match=r":2: the row gives rankings, those before it demonstrations"
    ):
        sources.read_form(
            put(tmp_path, rows[0], {"instruction": "Count.", "chosen": "9", "rejected": "8"})
        )
    with pytest.raises(ValueError, match=r"TRL's unpaired preference"):
        sources.read_completions(put(tmp_path, {"prompt": "p", "completion": "c", "label": False}))


# -------------------------------------------------------------------------------- files given to a stage as they are


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"instruction": "Count.", "input": "", "output": "9"}, "alpaca"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "sharegpt",
        ),
        (pair("a", "b"), "trl"),
        ({"prompt": "p", "response": "r", "system": "s"}, "jsonl"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}, "rated"),
    ],
)
@pytest.mark.parametrize("kind", [Demonstration, Ranking, Prompt])
def test_a_file_of_another_tool_is_answered_with_the_command_that_converts_it(
    tmp_path: Path, row: dict[str, Any], form: str, kind: type
):
    path = put(tmp_path, row)
    for content in (path.read_bytes(), json.dumps([row]).encode()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="convert it with") as error:
            schema.read_jsonl(path, kind)
        assert f"prepare_data.py --source={form} --data={path} --out=DIR" in reasons(error, path)
        assert "remove it" not in str(error.value)
    path.write_text('[\n {"prompt": "a", "response": "b", "id": "x", "text": null}\n]')
    with pytest.raises(
        ValueError,
        match=r"one JSON list and not an object a line: convert it with .*--source=jsonl",
    ):
        schema.read_jsonl(path, kind)
    (tmp_path / "t.csv").write_text("prompt,response\na,b\n")
    with pytest.raises(ValueError, match=r"prepare_data\.py --data=.*t\.csv --out=DIR"):
        schema.read_jsonl(tmp_path / "t.csv", kind)


# ---------------------------------------------------------------------------------------------- rules and properties


def test_every_reason_of_the_forms_is_in_a_table():
    found: set[str] = set()
    for path in sorted((ROOT / "rlhf_jax/data/sources").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Call) and (called == "RowError" or called.endswith(".note")):
                found |= {
                    str(n.value)
                    for n in ast.walk(node.args[0])
                    if isinstance(n, ast.Constant) and n.value
                }
    readers_of_one_set = {
        "bad ranks",
        "bad prompt",
    }  # of HH-RLHF's and OpenAssistant's own files, docs/data_sources.md
    assert found - readers_of_one_set - set(schema.RULES) <= set(FORM_RULES)
    spare = {
        "tool call",
        "reasoning content",
        "not text",
        "only one response",
    }  # named by variables
    assert set(FORM_RULES) <= found | spare
    assert set(rules.EXPECTED_DROPS) - {"empty response"} == {
        reason for reason, rule in FORM_RULES.items() if rule.outcome == "dropped"
    }


def test_the_tables_in_the_docs_are_those_in_the_code():
    page = (ROOT / "docs" / "data_sources.md").read_text()
    rows = [
        f"| {reason} | {rule.row} | {rule.outcome} | {rule.fix} |"
        for reason, rule in FORM_RULES.items()
    ]
    assert "\n".join(["| reason | row | outcome | fix |", "|---|---|---|---|", *rows]) in page
    forms = [
        f"| `{name}` | {form.title} | {form.columns} | {form.gives} |"
        for name, form in sources.FORMS.items()
    ]
    assert (
        "\n".join(["| `--source=` | what | recognised by | gives |", "|---|---|---|---|", *forms])
        in page
    )


words = st.text(st.characters(codec="utf-8", exclude_characters="\r\ufeff"), min_size=1).filter(
    lambda s: s.strip() and s.strip() == s
)


@settings(deadline=None, max_examples=60)
@given(
    prompt=words,
    answer=words,
    system=st.none() | words,
    name=st.sampled_from(["alpaca", "trl", "sharegpt", "csv"]),
)
def test_no_text_is_lost_between_a_form_and_its_record(
    tmp_path_factory: pytest.TempPathFactory,
    prompt: str,
    answer: str,
    system: str | None,
    name: str,
):
    folder = tmp_path_factory.mktemp("forms")
    first = {"system": system} if system else {}
    if name == "alpaca":
        path = put(folder, {"instruction": prompt, "input": "", "output": answer, **first})
    elif name == "sharegpt":
        turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
        path = put(folder, {"conversations": turns, **first})
    else:
        # The other row says that answers do not begin with their prompt here.
        rows = [
            {"prompt": prompt, "completion": answer, **first},
            {"prompt": "a b c", "completion": "d"},
        ]
        path = put(folder, *rows)
        if name == "csv":
            cells = [
                [row.get(key, "") for key in ("prompt", "completion", "system")] for row in rows
            ]
            quoted = [
                ",".join('"' + str(cell).replace('"', '""') + '"' for cell in row) for row in cells
            ]
            path = folder / "rows.csv"
            path.write_bytes("\r\n".join(["prompt,completion,system", *quoted]).encode())
    reading = sources.read_form(path)
    found = reading.records["demonstrations"][0]
    wanted_prompt = found.prompt if isinstance(found.prompt, str) else found.prompt[-1].content
    if "missing value as text" in reading.report.noted:
        system = None
    if isinstance(found.prompt, str) or name == "sharegpt" or len(found.prompt) == 1 + bool(system):
        assert wanted_prompt == (prompt if name == "sharegpt" else prompt.rstrip().lstrip("\n"))
    if "prompt cut from whole text" not in reading.report.noted:
        assert found.response == answer
    if system:
        assert found.prompt[0] == Message("system", system)
    schema.write_jsonl(folder / "out.jsonl", [found])
    assert schema.read_jsonl(folder / "out.jsonl", Demonstration)[0] == [found]
