"""Reads the records of this package from any format of table.

They are parsed like those of `schema.read_jsonl`, with texts unchanged.
"""

from __future__ import annotations

from typing import Any

from rlhf_jax.data.schema import Demonstration, PlainText, Prompt, Ranking, field_names
from rlhf_jax.data.sources.messages import with_system
from rlhf_jax.data.sources.row import Draft, Row, asked, listed

KINDS = (Ranking, Demonstration, PlainText, Prompt)
RATINGS = (
    "helpfulness", "correctness", "honesty", "quality", "rating", "overall_rating", "overall_score",
    "reward",
)  # fmt: skip
"""Columns with ratings of a response by people or models, as in HelpSteer."""


def fits(row: Row) -> bool:
    """Whether a row has the fields of a record, under the names of this package."""
    prompt, found = row.has("prompt") or row.has("messages"), set(row.columns())
    if row.has("responses"):
        return prompt and row.has("ranks")
    # These columns belong to other forms, which would read the row differently.
    if any(row.has(name) for name in ("chosen", "rejected", "completion", "completions", "label")):
        return False
    # If there are unknown columns beside a prompt, one of them may be its answer.
    alone = found <= {*field_names(Prompt), *row.systems()}
    # A response that was rated as bad is no demonstration, unless the user chooses this form.
    if rating(row) and row.has("response"):
        return False
    return (prompt and (row.has("response") or alone)) or (
        row.has("text") and found <= set(field_names(PlainText))
    )


def rating(row: Row) -> str:
    """The first column of `RATINGS` with a value; "" where none has one."""
    return next((name for name in RATINGS if row.has(name)), "")


def parse(row: Row) -> Draft:
    """A ranking, a demonstration, a text or a prompt, depending on the columns of the row.

    Texts are not changed.

    Raises:
      RowError: a system column and a system turn differ, or a column has more than text, such as
        tool calls.
    """
    row.refuse_more_than_text()
    kind = kind_of(row)
    if kind is PlainText:
        return Draft(kind, {**row.labels(kind), "text": row.raw("text")})
    prompt: Any = (
        listed(row, "messages", row.raw("messages")) if row.has("messages") else row.raw("prompt")
    )
    fields = row.labels(kind)
    if kind is Demonstration and not row.has("response"):
        # The conversation is given whole, and its last turn is the answer.
        *prompt, last = prompt
        fields["response"] = last.get("content")
    elif kind is Demonstration:
        fields["response"] = row.raw("response")
    if kind is Ranking:
        for name in ("responses", "ranks"):
            fields[name] = listed(row, name, row.raw(name), opening="[")
    prompt, has_system = with_system(row, prompt)
    return Draft(kind, {**fields, **asked(prompt)}, has_system)


def kind_of(row: Row) -> type:
    """The record class of a row."""
    if row.has("responses") or "ranks" in row.values:
        return Ranking
    if row.has("text") and not (row.has("prompt") or row.has("messages")):
        return PlainText
    turns = row.values.get("messages")
    last = turns[-1] if isinstance(turns, list) and turns else None
    answered = (
        isinstance(last, dict)
        and last.get("role") == "assistant"
        and set(last) <= {"role", "content"}
    )
    return Demonstration if isinstance(row.values.get("response"), str) or answered else Prompt
