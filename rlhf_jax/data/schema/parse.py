"""Converts rows of JSON to records, and records to rows of JSON.

In Python ranks start at 0 and -1 means not ranked, as in `rlhf_jax.types.RankingBatch`; in a file
they start at 1 and null means not ranked. The conversion is in this file and `checks` alone. Only
the order of ranks counts: 1, 3 means the same as 1, 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import msgspec

from rlhf_jax.data.schema.checks import (
    check_names,
    check_text,
    labels_of,
    list_of,
    message_of,
    one_for_each,
    policy_of,
    prompt_of,
    ranks_of,
    revision_of,
    temperature_of,
)
from rlhf_jax.data.schema.records import (
    ABSENT,
    Demonstration,
    PlainText,
    Prompt,
    Ranking,
    Record,
    field_names,
)
from rlhf_jax.data.schema.rules import RowError


def _parse_demonstration(row: dict[str, Any], allow_empty: bool) -> Demonstration:
    check_names(row, field_names(Demonstration))
    response, turns = row.get("response"), row.get("messages")
    # A conversation may be given whole: its last turn is then the response.
    if response is None and isinstance(turns, list) and turns:
        last = len(turns) - 1
        answer = message_of(turns[last], last, reason="empty response", allow_empty=allow_empty)
        if answer.role != "assistant":
            fix = "add it, or end 'messages' with the assistant's turn"
            raise RowError(
                "missing field", f"field 'response' must be a string, got nothing: {fix}"
            )
        # What is left has the form of a prompt in messages, which `prompt_of` reads.
        response, row = answer.content, {**row, "messages": turns[:last]}
    return Demonstration(
        prompt=prompt_of(row),
        response=check_text(response, "response", allow_empty=allow_empty, reason="empty response"),
        **labels_of(row, Demonstration),
    )


def _parse_prompt(row: dict[str, Any], allow_empty: bool) -> Prompt:
    del allow_empty  # a prompt has no response
    check_names(row, field_names(Prompt))
    return Prompt(prompt=prompt_of(row), **labels_of(row, Prompt))


def _parse_plain_text(row: dict[str, Any], allow_empty: bool) -> PlainText:
    del allow_empty
    check_names(row, field_names(PlainText))
    return PlainText(
        text=check_text(row.get("text"), "text", reason="empty text"), **labels_of(row, PlainText)
    )


def _parse_ranking(row: dict[str, Any], allow_empty: bool) -> Ranking:
    check_names(row, field_names(Ranking))
    prompt = prompt_of(row)
    responses = tuple(
        check_text(text, f"responses[{k}]", allow_empty=allow_empty, reason="empty response")
        for k, text in enumerate(list_of(row, "responses"))
    )
    if len(responses) < 2:
        raise RowError(
            "fewer than two responses",
            "field 'responses' needs at least 2 texts to compare: add one",
        )
    ranks = ranks_of(row, len(responses))
    return Ranking(
        prompt=prompt,
        responses=responses,
        ranks=ranks,
        **labels_of(row, Ranking),
        policies=one_for_each(row, "policies", len(responses), policy_of),
        temperatures=one_for_each(row, "temperatures", len(responses), temperature_of),
        revision=revision_of(row.get("revision")),
    )


_PARSERS: dict[type, Callable[[dict[str, Any], bool], Any]] = {
    Demonstration: _parse_demonstration,
    Ranking: _parse_ranking,
    Prompt: _parse_prompt,
    PlainText: _parse_plain_text,
}


def parse_row(
    row: dict[str, Any], kind: type[Record], *, allow_empty_responses: bool = False
) -> Record:
    """Parses and checks one row of JSON.

    Args:
      row: the JSON object.
      kind: of the record.
      allow_empty_responses: accept "" as a response.

    Raises:
      RowError: the row breaks a rule.
    """
    return _PARSERS[kind](row, allow_empty_responses)


def json_of(record: Any) -> dict[str, Any]:
    """The JSON object of a record or a dataclass; fields that are None are left out."""
    if isinstance(record, msgspec.Struct):
        fields = msgspec.structs.asdict(record)
    else:
        fields = dataclasses.asdict(record)
    row = {name: value for name, value in fields.items() if value is not None}
    turns = row.get("prompt")
    if isinstance(turns, tuple):
        # Rebuilt rather than popped, so that `messages` keeps the place of `prompt` in the line.
        row = {"messages" if name == "prompt" else name: value for name, value in row.items()}
        row["messages"] = [msgspec.structs.asdict(turn) for turn in turns]
    if isinstance(record, Ranking):
        row["ranks"] = [None if rank == ABSENT else rank + 1 for rank in record.ranks]
    return row
