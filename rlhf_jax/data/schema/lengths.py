"""Truncates or refuses records over a length limit, and notes records that deserve a look."""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from rlhf_jax.data.schema.records import (
    ABSENT,
    Demonstration,
    PlainText,
    Ranking,
    record_texts,
    split_texts,
    strict_pairs,
)
from rlhf_jax.data.schema.rules import RowError


def fitted(record: Any, limit: int, length: Callable[[str], int], too_long: str) -> Any:
    """The record itself where it fits, or truncated to fit.

    Args:
      record: of any kind.
      limit: greatest length of its prompt and longest ranked response together, or of its text.
      length: the length of a text.
      too_long: "truncate" cuts responses and texts at their end; otherwise a longer record is an
        error.

    Raises:
      RowError: it does not fit and is not truncated, or its prompt leaves no room.
    """
    # A reward model reads each response after the prompt by itself, so the longest one counts.
    before, answers = split_texts(record)
    taken = sum(map(length, before))
    total = taken + max(map(length, answers), default=0)
    if total <= limit:
        return record
    if too_long == "truncate" and answers:
        return _cut(record, limit - taken, length)
    what = "prompt and longest response take" if before and answers else "the row takes"
    unit = " characters" if length is len else ""
    raise RowError(
        "too long", f"{what} {total}{unit}, limit={limit}: shorten the row or raise limit"
    )


def _cut(record: Any, room: int, length: Callable[[str], int]) -> Any:
    if isinstance(record, PlainText):
        return msgspec.structs.replace(record, text=_shorten(record.text, room, length))
    if isinstance(record, Demonstration):
        return msgspec.structs.replace(record, response=_shorten(record.response, room, length))
    pairs = zip(record.responses, record.ranks, strict=True)
    responses = tuple(
        text if rank == ABSENT else _shorten(text, room, length) for text, rank in pairs
    )
    return msgspec.structs.replace(record, responses=responses)


def _shorten(text: str, room: int, length: Callable[[str], int]) -> str:
    """The longest prefix of a text with a length of at most `room`."""
    if length(text) <= room:
        return text
    # The length of a prefix grows with its end, so bisection needs few calls of a slow tokenizer.
    end = max(bisect.bisect_right(range(len(text)), room, key=lambda n: length(text[:n])) - 1, 0)
    while end and length(text[:end]) > room:  # a longer text may have fewer tokens after all
        end -= 1
    if not text[:end].strip():
        raise RowError(
            "too long", "the prompt leaves no room for a response: shorten it or raise limit"
        )
    return text[:end]


def notes(record: Any) -> list[str]:
    """The reasons of `RULES` for which a record of any file deserves a look."""
    return list(notes_of(record, None, cut=False))


def notes_of(record: Any, special: re.Pattern[str] | None, *, cut: bool) -> Iterator[str]:
    """The reasons for which a record deserves a look.

    Args:
      record: of any kind.
      special: finds special tokens to note; None finds none.
      cut: whether `fitted` has truncated the record.
    """
    if cut:
        yield "response cut"
    if special and any(map(special.search, record_texts(record))):
        yield "special token in text"
    if isinstance(record, Ranking):
        if strict_pairs(record.ranks) == 0:
            yield "all responses tie"
        pairs = zip(record.responses, record.ranks, strict=True)
        ranked = {(text, rank) for text, rank in pairs if rank != ABSENT}
        # The set has each text once per rank, so a text with two ranks makes it larger.
        if len({text for text, _ in ranked}) < len(ranked):
            yield "same response, different ranks"


def special_pattern(special_tokens: Sequence[str] | re.Pattern[str]) -> re.Pattern[str] | None:
    """A pattern that finds any of some texts; None where there are none."""
    if isinstance(special_tokens, re.Pattern):
        return special_tokens
    return re.compile("|".join(map(re.escape, special_tokens))) if special_tokens else None
