"""Alpaca and Dolly: columns for an instruction, its input, and the answer.

Alpaca is ``{instruction, input, output}``; LLaMA-Factory adds `system`, `history` (pairs of texts,
the earlier turns) and a preference, `chosen` and `rejected` instead of `output`. Dolly is
``{instruction, context, response, category}``. The prompt is the instruction, a blank line, and the
input.
"""

from __future__ import annotations

from typing import Any

from rlhf_jax.data.schema import RowError, check_text
from rlhf_jax.data.sources.messages import demonstration_of, pair_of
from rlhf_jax.data.sources.row import Draft, Row, as_label, listed, tidy_prompt


def parse_alpaca(row: Row) -> Draft:
    """A demonstration, or a ranking of two where there are `chosen` and `rejected`.

    Raises:
      RowError: a column is missing or not a text.
    """
    row.refuse_more_than_text()
    prompt = _with_history(row, _joined(row, "input"))
    if row.has("chosen") or row.has("rejected"):
        return pair_of(row, prompt, row.text("chosen"), row.text("rejected"))
    # A list is usually a preference, with both answers in one column.
    if isinstance(row.values.get("output"), list):
        raise RowError(
            "wrong type",
            "field 'output' is a list: name the two answers 'chosen' and 'rejected', or give one "
            "text",
        )
    return demonstration_of(row, prompt, row.text("output"))


def parse_dolly(row: Row) -> Draft:
    """A demonstration whose use case is the category.

    Raises:
      RowError: a column is missing or not a text.
    """
    row.refuse_more_than_text()
    category = as_label(row.take("category")) if row.has("category") else None
    labels = {"use_case": category} if category else {}
    return demonstration_of(row, _joined(row, "context"), row.text("response"), **labels)


def _joined(row: Row, second: str) -> str:
    instruction, about = row.text("instruction"), row.optional_text(second)
    check_text(instruction, "instruction", reason="empty prompt")
    return f"{tidy_prompt(row, instruction)}\n\n{about.strip()}" if about else instruction


def _with_history(row: Row, prompt: str) -> Any:
    """The prompt after the turns of `history`, a list of [instruction, answer]."""
    if not row.has("history"):
        row.take("history")  # an empty column has been read, too
        return prompt
    pairs = listed(row, "history", row.take("history"), opening="[")
    good = isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 for pair in pairs
    )
    if not good:
        raise RowError("wrong type", "field 'history' must be a list of [instruction, answer]")
    turns = []
    for asked, answered in pairs:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*turns, {"role": "user", "content": tidy_prompt(row, prompt)}]
