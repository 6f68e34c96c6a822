"""The rules for a row of a record file, and the error of a row that breaks one."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

NESTING = 32
"""Greatest depth of nested lists and objects; a record needs three."""


class Rule(NamedTuple):
    """What happens to a row, and what its owner can do about it.

    Attributes:
      outcome: "bad" rows are an error, or dropped and counted up to `max_bad_fraction`; "dropped"
        rows are dropped and counted; "kept" rows are records, noted for a closer look.
      row: which rows the rule is about.
      fix: what to do.
    """

    outcome: Literal["bad", "dropped", "kept"]
    row: str
    fix: str


RULES: Mapping[str, Rule] = {
    # any line
    "not UTF-8": Rule(
        "bad", "bytes that are not UTF-8", "save the file as UTF-8; a byte order mark is fine"
    ),
    "malformed JSON": Rule("bad", "a line that is not JSON", "write one JSON object a line"),
    "not an object": Rule("bad", "JSON, but a list, a text or a number", "write `{...}`"),
    "nested too deep": Rule(
        "bad", f"over {NESTING} lists or objects in each other", "write one flat object a line"
    ),
    "number too long": Rule(
        "bad", "an integer of more than 4300 digits", "write it as a string, or remove it"
    ),
    "not a number": Rule("bad", "`NaN`, `Infinity` or `-Infinity`", "use a finite number or null"),
    "duplicate key": Rule("bad", "a field given twice in one object", "keep one"),
    "unknown field": Rule(
        "bad", "a field that the record or message does not have", "correct its name or remove it"
    ),
    "missing field": Rule(
        "bad", "a field that the record or message needs is absent or null", "fill it in"
    ),
    "wrong type": Rule(
        "bad", "a value of another JSON type than its field", "write the type that the error names"
    ),
    "lone surrogate": Rule("bad", "half of a surrogate pair in a text: no character", "remove it"),
    "empty text": Rule("bad", "a `text` that is empty or only spaces", "remove the row"),
    "empty label": Rule(
        "bad",
        "`id`, `source`, `labeler`, a policy or the like, empty",
        "fill it in or leave it out",
    ),
    "bad time": Rule(
        "bad", "a `time` that is not ISO 8601", "write it like `2022-01-27T09:30:00Z`"
    ),
    "duplicate id": Rule("bad", "an `id` that an earlier row has", "make ids unique"),
    # prompts and responses
    "empty prompt": Rule(
        "bad", "a `prompt` that is empty or only spaces, or no `messages`", "remove the row"
    ),
    "empty response": Rule(
        "bad", "a response that is empty or only spaces", "remove it, or `allow_empty_responses`"
    ),
    "prompt and messages": Rule("bad", "both `prompt` and `messages` are given", "keep one"),
    "unknown role": Rule("bad", "a role that is not system, user or assistant", "rename it"),
    "empty message": Rule(
        "bad", "a turn before the response, empty or only spaces", "fill it in or remove it"
    ),
    "misplaced system message": Rule(
        "bad", "a system message that is not the first message", "make one, the first"
    ),
    "turns do not alternate": Rule(
        "bad", "turns other than user, assistant, user, ..", "join or remove turns"
    ),
    "last turn not the user's": Rule(
        "bad", "a prompt whose last turn is not the user's", "remove what follows it"
    ),
    # rankings
    "fewer than two responses": Rule(
        "bad", "K < 2", "add a response to compare with, or remove the row"
    ),
    "missing rank": Rule("bad", "fewer ranks than responses", "give each response a rank, or null"),
    "unknown rank": Rule(
        "bad",
        "a rank that is not an integer from 1 (best) to K or null, or that has no response",
        "rank from 1 to K",
    ),
    "fewer than two ranks": Rule(
        "bad", "fewer than two ranks that are not null", "rank more, or remove the row"
    ),
    "uneven list": Rule(
        "bad", "`policies` or `temperatures` not of length K", "give one for each response"
    ),
    "bad temperature": Rule(
        "bad", "a temperature that is not a number from 0 to 1e6", "write the number used"
    ),
    "bad revision": Rule(
        "bad", "a `revision` that is not an integer from 0", "count revisions from 0"
    ),
    "ranked twice": Rule(
        "bad",
        "the same labeler, prompt and responses as an earlier row, without differing revisions",
        "remove one, or number them with `revision`",
    ),
    "superseded by revision": Rule(
        "dropped", "as above, of a lower `revision` than another row", "none needed"
    ),
    # options
    "too long": Rule(
        "dropped",
        'longer than `limit`, when one is given; bad with `too_long="error"`',
        "raise `limit`, or shorten",
    ),
    "response cut": Rule(
        "kept", 'longer than `limit` and cut to it by `too_long="truncate"`', "raise `limit`"
    ),
    "special token in text": Rule(
        "kept",
        "a text holds one of `special_tokens`; it will be encoded as ordinary text",
        "remove it if unwanted",
    ),
    "same response, different ranks": Rule(
        "kept",
        "equal responses, unequal ranks: the pair teaches nothing, the others do",
        "tie them, or remove one",
    ),
    "all responses tie": Rule(
        "kept", "a ranking that prefers nothing: it holds no pair", "none needed"
    ),
}
"""Every reason that a row of a record file is counted under; nothing else happens to a row."""


class RowError(ValueError):
    """The error of a row that breaks a rule; `reason` is the short name it is counted under."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 60


def shown(value: Any) -> str:
    """A value as quoted in an error: short and on one line."""
    return _SHOWN.repr(value)
