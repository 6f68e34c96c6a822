"""Recognises the forms of other tools' data; `FORMS` lists them and the records that they give.

A form is recognised by the columns with a value. The user is informed of the choice, and where no
form fits, or a table has no prompt, the error names the columns and the flag that maps them.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rlhf_jax.data import schema
from rlhf_jax.data.schema import PlainText, RowError
from rlhf_jax.data.sources import (
    alpaca,
    annotated,
    argilla,
    label_studio,
    messages,
    oasst,
    own,
    rated,
    sharegpt,
    tables,
    trl,
)
from rlhf_jax.data.sources.row import Draft, Row, holds_turns

Parser = Callable[[Row], Draft | list[Draft]]


class Options(NamedTuple):
    """A user's options for reading a table.

    Attributes:
      columns: wanted name -> name in the table.
      language: of OpenAssistant's messages.
    """

    columns: Mapping[str, str] = {}
    language: str = "en"


class FileForm(NamedTuple):
    """A form of data.

    Attributes:
      title: its name in messages.
      columns: the columns that identify it, in words.
      gives: the records that a row becomes, in words.
      fits: whether a row is of this form.
      plan: returns the rows of a table, possibly grouped, and the parser of one row.
      renames: whether the user's `columns` rename columns; otherwise they name fields and questions
        inside a record.
    """

    title: str
    columns: str
    gives: str
    fits: Callable[[Row], bool]
    plan: Callable[[Sequence[Row], Options], tuple[Sequence[Row], Parser]]
    renames: bool = True


def _each(parse: Parser) -> Callable[[Sequence[Row], Options], tuple[Sequence[Row], Parser]]:
    return lambda rows, options: (rows, parse)


def _texts(row: Row, *names: str) -> bool:
    return all(isinstance(row.values.get(name), str) and row.has(name) for name in names)


def _is_transcripts(row: Row) -> bool:
    if row.has("prompt") or not _texts(row, "chosen", "rejected"):
        return False
    return all(trl.is_transcript(row.values[name]) for name in ("chosen", "rejected"))


def _is_rated(row: Row) -> bool:
    if not any(row.has(name) for name in rated.PROMPTS):
        return False
    completions = row.values.get("completions")
    scored = (
        isinstance(completions, list)
        and all(isinstance(answer, dict) for answer in completions)
        and completions
    )
    several = any(row.has(name) for name in rated.LISTS) and any(
        row.has(name) for name in rated.NUMBERS
    )
    return (
        bool(scored) or several or (row.has("prompt") and row.has("response") and row.has("score"))
    )


def _is_pairs(row: Row) -> bool:
    # A pair with an `instruction` is Alpaca's, whose prompt has a second part in `input`.
    if not (row.has("chosen") and row.has("rejected")) or row.has("instruction"):
        return False
    return row.has("prompt") or any(holds_turns(row, name) for name in ("chosen", "rejected"))


def _plan_trl(rows: Sequence[Row], options: Options) -> tuple[Sequence[Row], Parser]:
    pair, complete = trl.pairs(rows), trl.completions(rows)

    def parse(row: Row) -> Draft:
        # Each row by itself, as one table may hold pairs, completions and prompts.
        if row.has("chosen") or row.has("rejected"):
            return pair(row)
        if (
            "completion" in row.values
            or not row.has("prompt")
            or (len(row.columns()) > 1 and row.has("label"))
        ):
            return complete(row)
        return trl.prompt_only(row)

    return rows, parse


FORMS: Mapping[str, FileForm] = {
    "label_studio": FileForm(
        "a Label Studio export", "`data`, `annotations`",
        "rankings by each annotator, or demonstrations",
        label_studio.is_task,
        lambda rows, o: annotated.table(rows, o.columns, label_studio.extract),
        renames=False,
    ),
    "argilla": FileForm(
        "an Argilla export", "`fields`, `responses`; or flat, `QUESTION.responses`",
        "rankings by each annotator, or demonstrations",
        argilla.is_record,
        lambda rows, o: annotated.table(rows, o.columns, argilla.extract),
        renames=False,
    ),
    "oasst": FileForm(
        "OpenAssistant", "trees of messages, or `message_id`, `parent_id`, `role`, `text`",
        "ranked replies -> rankings, best human replies -> demonstrations",
        oasst.is_tree, lambda rows, o: oasst.table(rows, o.language),
    ),
    "openai": FileForm(
        "OpenAI messages", "`messages`; or `input`, `preferred_output`, `non_preferred_output`",
        "the last turn -> response, those before it -> prompt; preferred over non-preferred",
        lambda row: (
            holds_turns(row, "messages")
            and not (row.has("chosen") or row.has("response"))
            and not row.has("responses")
        ) or row.has("preferred_output"),
        _each(
            lambda row: messages.preference(row)
            if "preferred_output" in row.values
            else messages.conversation(row)
        ),
    ),
    "sharegpt": FileForm(
        "ShareGPT", "`conversations` or `conversation`: turns of `from` and `value`",
        "the last turn -> response, those before it -> prompt",
        lambda row: any(row.has(name) for name in sharegpt.COLUMNS), _each(sharegpt.parse),
    ),
    "hh": FileForm(
        "HH transcripts", "`chosen`, `rejected`: texts with \"Human:\" and \"Assistant:\"",
        "what stands before the last \"Assistant:\" -> prompt, chosen over rejected",
        _is_transcripts, lambda rows, o: (rows, trl.pairs(rows)),
    ),
    "alpaca": FileForm(
        "Alpaca", "`instruction`, `output` (or `chosen`, `rejected`)",
        "instruction + input -> prompt, output -> response",
        lambda row: row.has("instruction")
        and (row.has("output") or row.has("chosen"))
        and not row.has("prompt"),
        _each(alpaca.parse_alpaca),
    ),
    "dolly": FileForm(
        "Dolly", "`instruction`, `response`",
        "instruction + context -> prompt, response -> response, category -> use_case",
        lambda row: row.has("instruction") and row.has("response") and not row.has("prompt"),
        _each(alpaca.parse_dolly),
    ),
    "rated": FileForm(
        "responses with scores",
        "`prompt` or `instruction`; `completions` with scores, `responses` + `scores`, "
        "`generations` + `ratings`, or `response` + `score`",
        "responses ranked by their scores, larger is better",
        _is_rated, lambda rows, o: rated.table(rows, o.columns),
    ),
    "trl": FileForm(
        "TRL", "`prompt` and `chosen`, `rejected`; `prompt`, `completion`; `prompt`",
        "prompt -> prompt, chosen over rejected, completion -> response",
        lambda row: _is_pairs(row)
        or (row.has("prompt") and "completion" in row.values and not row.has("completions")),
        _plan_trl,
    ),
    "jsonl": FileForm(
        "records of this package",
        "`prompt` or `messages`; `response`; `responses`, `ranks`; `text`",
        "each field under its own name",
        own.fits, _each(own.parse),
    ),
}  # fmt: skip
"""The forms by name, in the order in which they are tried."""

ANSWERS = (
    "answer",
    "response",
    "output",
    "completion",
    "solution",
    "target",
    "assistant",
    "best_answer",
)
"""Columns that an error proposes as answers; none is used without the user's choice."""
PREFERENCES = (
    "preference", "preferred", "overall_preference", "human_preference", "better",
    "better_response", "better_response_id", "safer_response_id", "winner", "choice", "labels",
)  # fmt: skip
"""Columns that name the better of several numbered answers; mapping the answers alone would lose
that information."""
MAPPED = (
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "response",
    "responses",
    "scores",
    "score",
    "system",
    "messages",
)


def check_form(name: str) -> FileForm:
    """The form of a name.

    Raises:
      ValueError: there is none.
    """
    if name not in FORMS:
        raise ValueError(f"source={name!r} must be one of {', '.join(FORMS)}")
    return FORMS[name]


def of_row(row: Row) -> str:
    """The name of a row's form; "" where no form fits."""
    return next((name for name, form in FORMS.items() if form.fits(row)), "")


def said(name: str, row: Row) -> str:
    """How the columns of a row are interpreted, as a sentence for the user.

    >>> said("alpaca", Row("a.json:1", {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Count."}))
    'read as Alpaca: system -> system turn, instruction + input -> prompt, output -> response'
    """  # noqa: E501
    form, parts = FORMS[name], []
    if row.systems():
        parts.append("system -> system turn")
    gives = form.gives
    if name == "alpaca":
        about = "instruction + input" if "input" in row.values else "instruction"
        parts += ["history -> turns before it"] if row.has("history") else []
        answers = "chosen over rejected" if row.has("chosen") else "output -> response"
        gives = f"{about} -> prompt, {answers}"
    elif name == "trl":
        answers = "chosen over rejected" if row.has("chosen") else "completion -> response"
        shared = "prompt" if row.has("prompt") else "turns that both share"
        gives = f"{shared} -> prompt" + (
            f", {answers}" if row.has("chosen") or row.has("completion") else ""
        )
    elif name == "openai":
        of_turns, of_pairs = gives.split("; ")
        two = row.has("rejected_response")
        gives = (
            of_pairs if row.has("preferred_output") else of_turns + ", over rejected_response" * two
        )
    elif name == "sharegpt" and row.has("chosen"):
        gives = "the turns -> prompt, chosen over rejected"
    elif name == "dolly":
        about = "instruction + context" if "context" in row.values else "instruction"
        gives = f"{about} -> prompt, response -> response" + ", category -> use_case" * row.has(
            "category"
        )
    return f"read as {form.title}: {', '.join([*parts, gives])}"


def refuse_unknown(row: Row) -> str:
    """The error message for a table of which no form fits, with the flag or edit that helps."""
    columns = ", ".join(sorted(row.columns())) or "nothing"
    if {"annotation_id", "annotator"} & set(row.values):
        return (
            f"the columns are {columns}: this looks like Label Studio's JSON-MIN or CSV, so export "
            "it as JSON"
        )
    if row.has("chosen") and row.has("rejected"):
        proposed = trl.proposed(row)
        return (
            f"the columns are {columns}, and no prompt is guessed: name its column with "
            f"--source=trl --columns prompt={proposed}"
        )
    # Names are compared exactly elsewhere; here only to propose the right spelling.
    renamed = {name.strip().lower(): name for name in row.columns()}
    wanted = [name for name in MAPPED if name in renamed and not row.has(name)]
    if wanted:  # Excel's users write Prompt, Chosen, Rejected
        mapped = ",".join(f"{name}={renamed[name]}" for name in wanted)
        return (
            f"the columns are {columns}, which are compared by their exact names: --columns "
            f"{mapped}"
        )
    if row.has("prompt") and row.has("response") and own.rating(row):
        return (
            f"the columns are {columns}: {own.rating(row)!r} rates the response, so rank the "
            f"responses of each prompt with --source=rated --columns score={own.rating(row)}, or "
            "take all of them as demonstrations with --source=jsonl"
        )
    choice = next((name for name in PREFERENCES if name in renamed), "")
    if choice:
        return (
            f"the columns are {columns}, and {renamed[choice]!r} seems to say which answer is "
            "better, which no form here reads from two numbered answers: write the better one to "
            "a column chosen, the other to rejected, and their prompt to prompt"
        )
    if row.has("label") and (row.has("completion") or row.has("response")):
        return (
            f"the columns are {columns}: a label of one answer is no ranking; use pairs or scores"
        )
    if row.has("prompt"):
        answers = [name for name in ANSWERS if row.has(name)]
        return (
            f"the columns are {columns}: nobody can tell which of them answers the prompt, so name "
            "it with --source=trl --columns "
            f"completion={answers[0] if len(answers) == 1 else 'NAME'} (or "
            "chosen=NAME,rejected=NAME), or take the prompts alone with --source=jsonl"
        )
    asks = [name for name in trl.QUESTIONS if row.has(name)]
    answers = [name for name in ANSWERS if row.has(name)]
    if len(asks) == 1 and len(answers) == 1:
        return (
            f"the columns are {columns}, and none is taken for the prompt unasked: if {asks[0]!r} "
            f"is the prompt and {answers[0]!r} answers it, --source=trl --columns "
            f"prompt={asks[0]},completion={answers[0]}"
        )
    return (
        f"the columns are {columns}, which is no known form ({', '.join(FORMS)}): choose one with "
        "--source=FORM and name its columns with --columns WANTED=NAME,.. (wanted: "
        f"{', '.join(MAPPED)})"
    )


def _misspelt(names: set[str], known: set[str]) -> bool:
    """Whether a name is a misspelt field of a record, such as `promt`."""
    return any(
        difflib.get_close_matches(name, ["prompt", "response", "messages"], cutoff=0.8)
        for name in names - known
    )


def advice(path: str | os.PathLike[str], kind: type | None = None) -> str:
    """The command that converts a file of another tool, for the error about its rows.

    It is "" where the file seems to be one of this package, or cannot be read as a table.

    Args:
      path: the file.
      kind: the wanted class of records.
    """
    # One row is enough to name a form, and the file may be large.
    try:
        first = next(iter(tables.rows(Path(path))), None)
        is_list = schema.json_list(path) is not None
    except ValueError:
        return ""
    if first is None or isinstance(first.values, RowError):
        return ""
    row = Row(first.place, first.values, cells=first.cells)
    name, names = of_row(row), set(row.values)
    known = {field for kind in own.KINDS for field in schema.field_names(kind)}
    has_core = bool(names & {"prompt", "messages", "text", "responses", "response"})
    if names <= known and is_list:
        return (
            f"{path} is one JSON list and not an object a line: convert it with python "
            f"experiments/prepare_data.py --source=jsonl --data={path} --out=DIR, and pass a file "
            "of DIR"
        )
    if (
        kind not in (None, PlainText)
        and row.has("text")
        and not names & {"prompt", "messages", "responses", "response"}
    ):
        return (
            f"{path} holds finished texts (the field 'text'), which do not say where an answer "
            "begins: write prompt and response, or messages, as the texts were made of; a text "
            "alone is read as a corpus"
        )
    # Columns that tables of other tools have, and that no record of this package has.
    telling = {*trl.QUESTIONS, *ANSWERS, "chosen", "rejected", "label", *own.RATINGS} - known
    if not name and names & telling and not _misspelt(names, known):
        pass  # a table of another tool, whose columns have to be named
    elif names <= known or (name in ("jsonl", "") and has_core and not row.systems()):
        return ""  # records of this package, whatever is wrong with them
    if not name:
        return (
            f"{path}: {refuse_unknown(row)} (python experiments/prepare_data.py .. --data={path} "
            "--out=DIR)"
        )
    shown = ", ".join(list(row.values)[:6])
    return (
        f"{path} looks like {FORMS[name].title} ({shown}): convert it with python "
        f"experiments/prepare_data.py --source={name} --data={path} --out=DIR, and pass a file of "
        "DIR"
    )
