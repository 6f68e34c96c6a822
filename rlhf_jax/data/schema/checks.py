"""The checks of a row's fields, one function per field or rule; each raises a `RowError`."""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Callable, Sequence
from typing import Any

from rlhf_jax.data.schema.records import ABSENT, ROLES, Conversation, Message, field_names
from rlhf_jax.data.schema.rules import RowError, shown

LABELS = ("id", "source", "use_case", "labeler", "labeler_group", "user", "organization")
"""The optional texts of records that are plain names; `time`, the other one, must be ISO 8601."""


MORE_THAN_TEXT = (
    "tool_calls", "function_call", "tool_call_id", "reasoning_content", "reasoning", "thinking",
    "images", "image", "audio", "videos", "refusal", "weight", "train",
)  # fmt: skip
"""Fields of other libraries' messages with content that a role and a text cannot represent."""


def check_text(
    value: Any, field: str, *, allow_empty: bool = False, reason: str | None = None
) -> str:
    """Returns `value` if it is a valid text, and raises a `RowError` that names `field` otherwise.

    Args:
      value: the value in the row.
      field: its name, as in "responses[2]".
      allow_empty: accept "".
      reason: the reason that an empty text is counted under; None = "empty " and the field.
    """
    if value is None:
        raise RowError(
            "missing field",
            f"field {field!r} must be a string, got nothing: write the text in quotes",
        )
    if not isinstance(value, str):
        raise wrong_type(value, field, "a string", "write the text in quotes")
    if not allow_empty and not value.strip():
        raise RowError(
            reason or f"empty {field}", f"field {field!r} is empty: fill it in or remove the row"
        )
    # JSON can escape half of a surrogate pair, which no tokenizer can encode.
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            "lone surrogate",
            f"field {field!r} has a lone surrogate at character {error.start}: remove it",
        ) from None
    return value


def wrong_type(value: Any, field: str, wanted: str, fix: str) -> RowError:
    """The error for a value of the wrong JSON type."""
    return RowError(
        "wrong type", f"field {field!r} must be {wanted}, got {type(value).__name__}: {fix}"
    )


def check_names(row: dict[str, Any], names: Sequence[str], where: str = "") -> None:
    """Refuses fields other than `names`; `where` names the object in the error."""
    for name in row:
        if name not in names:
            # Shortened, because the comparison is slow for long names.
            near = difflib.get_close_matches(name[:40], names, n=1)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else f"remove it; the fields are {', '.join(names)}"
            )
            raise RowError("unknown field", f"unknown field {shown(name)}{where}: {hint}")


def labels_of(row: dict[str, Any], kind: type) -> dict[str, Any]:
    """The optional texts that a row has."""
    given = [name for name in LABELS if row.get(name) is not None and name in field_names(kind)]
    labels = {name: check_text(row[name], name, reason="empty label") for name in given}
    if row.get("time") is not None:
        labels["time"] = time_of(row["time"])
    return labels


def time_of(value: Any) -> str:
    """Checks a `time`, which must be ISO 8601."""
    text = check_text(value, "time", reason="empty label")
    try:
        datetime.datetime.fromisoformat(text)
    except ValueError:
        fix = "write it as ISO 8601, like 2022-01-27T09:30:00Z"
        raise RowError("bad time", f"field 'time' = {shown(text)} is no time: {fix}") from None
    return text


def list_of(row: dict[str, Any], field: str) -> list[Any]:
    """A required field that must be a list."""
    value = row.get(field)
    if value is None:
        raise RowError("missing field", f"field {field!r} must be a list, got nothing: write [...]")
    if not isinstance(value, list):
        raise wrong_type(value, field, "a list", "write [...]")
    return value


def prompt_of(row: dict[str, Any]) -> Conversation:
    """The prompt of a row, given as `prompt` or as `messages`."""
    if row.get("messages") is None:
        if isinstance(row.get("prompt"), list):
            raise wrong_type(
                row["prompt"], "prompt", "a string", "name the field 'messages' when it holds turns"
            )
        if row.get("prompt") is None:
            fix = "write the text in quotes, or its turns as 'messages'"
            raise RowError("missing field", f"field 'prompt' must be a string, got nothing: {fix}")
        return check_text(row["prompt"], "prompt", reason="empty prompt")
    if row.get("prompt") is not None:
        raise RowError(
            "prompt and messages", "fields 'prompt' and 'messages' are both given: keep one"
        )
    turns = tuple(
        message_of(turn, k, reason="empty message")
        for k, turn in enumerate(list_of(row, "messages"))
    )
    if not turns:
        raise RowError(
            "empty prompt", "field 'messages' holds no prompt: write at least the user's turn"
        )
    check_turns(turns)
    return turns


def message_of(turn: Any, index: int, *, reason: str, allow_empty: bool = False) -> Message:
    """Checks one turn.

    Args:
      turn: the value in the row.
      index: its index in `messages`.
      reason: the reason that an empty text is counted under.
      allow_empty: accept "".
    """
    field = f"messages[{index}]"
    if not isinstance(turn, dict):
        raise wrong_type(turn, field, "an object", 'write {"role": "user", "content": "..."}')
    # Dropping such a field would change what the turn means, so it is refused with its own fix.
    more = next((name for name in turn if name in MORE_THAN_TEXT and turn[name] is not None), None)
    if more is not None:
        fix = (
            "a model of this package neither reads nor writes it, so leave such conversations out "
            "(python experiments/prepare_data.py --data=FILE tells which they are)"
        )
        raise RowError("unknown field", f"unknown field {more!r} in {field}: {fix}")
    check_names(turn, ("role", "content"), f" in {field}")
    role = check_text(turn.get("role"), f"{field}.role", reason="unknown role")
    if role not in ROLES:
        raise RowError(
            "unknown role",
            f"field '{field}.role' = {shown(role)} must be one of {', '.join(ROLES)}",
        )
    return Message(
        role,
        check_text(turn.get("content"), f"{field}.content", reason=reason, allow_empty=allow_empty),
    )


def check_turns(turns: Sequence[Message]) -> None:
    """Checks that the turns of a prompt are [system,] user, assistant, .., user."""
    first = turns[0].role == "system"
    # `first` is a bool and counts as 1: the turns are numbered after the system message.
    for k, turn in enumerate(turns[first:], start=first):
        wanted = "assistant" if (k - first) % 2 else "user"
        if turn.role == "system":
            raise RowError(
                "misplaced system message",
                f"field 'messages[{k}].role' is system: keep one system message, the first",
            )
        if turn.role != wanted:
            raise RowError(
                "turns do not alternate",
                f"field 'messages[{k}].role' is {turn.role} where the {wanted}'s turn is due: "
                "join or remove turns",
            )
    if turns[-1].role != "user":
        raise RowError(
            "last turn not the user's",
            f"field 'messages[{len(turns) - 1}].role' is {turns[-1].role}, but a prompt ends with "
            "the user's turn: remove this one (or, in a demonstration, 'response')",
        )


def ranks_of(row: dict[str, Any], k: int) -> tuple[int, ...]:
    """The K ranks from 0, `ABSENT` for null; at least two responses must be ranked."""
    values = list_of(row, "ranks")
    if len(values) != k:
        reason = "missing rank" if len(values) < k else "unknown rank"
        fix = "give one each (or null)"
        raise RowError(reason, f"field 'ranks' has {len(values)} entries for {k} responses: {fix}")
    for i, value in enumerate(values):
        # A rank above K is usually a score (larger is better) in the wrong column. `type`, because
        # isinstance takes a bool for an int.
        if value is not None and (type(value) is not int or not 1 <= value <= k):
            raise RowError(
                "unknown rank",
                f"field 'ranks[{i}]' = {shown(value)} must be 1 (best) to {k}, or null",
            )
    if sum(value is not None for value in values) < 2:
        raise RowError(
            "fewer than two ranks",
            "field 'ranks' needs at least 2 integers that are not null: rank more",
        )
    return tuple(ABSENT if value is None else value - 1 for value in values)


def one_for_each(
    row: dict[str, Any], field: str, k: int, check: Callable[[Any, str], Any]
) -> tuple[Any, ...] | None:
    """An optional list with one checked entry per response."""
    if row.get(field) is None:
        return None
    values = list_of(row, field)
    if len(values) != k:
        raise RowError(
            "uneven list",
            f"field {field!r} has {len(values)} entries for {k} responses: give one each",
        )
    return tuple(check(value, f"{field}[{i}]") for i, value in enumerate(values))


def policy_of(value: Any, field: str) -> str:
    """The name of the model that wrote a response."""
    return check_text(value, field, reason="empty label")


def temperature_of(value: Any, field: str) -> float:
    """The temperature that a response was sampled at."""
    del field  # all checks of `one_for_each` have the same arguments
    if type(value) not in (int, float) or not 0 <= value <= 1e6:
        raise RowError(
            "bad temperature",
            f"field 'temperatures' holds {shown(value)}: use numbers from 0 to 1e6",
        )
    return float(value)


def revision_of(value: Any) -> int | None:
    """The revision number of a ranking, from 0."""
    if value is not None and (type(value) is not int or value < 0):
        raise RowError(
            "bad revision",
            f"field 'revision' = {shown(value)} must be an integer from 0, such as 3",
        )
    return value
