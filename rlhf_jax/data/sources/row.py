"""A row of somebody else's table while it is read.

It knows what was taken from it, what was noted, and what is left aside.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from rlhf_jax.data import schema
from rlhf_jax.data.schema import Ranking, RowError

_MISSING = {"nan", "none", "null", "nat", "<na>", "n/a"}
_NOT_RECORDS = {
    "tool call": ("tools", "functions", "tool_calls", "function_call"),
    "reasoning content": ("reasoning_content", "reasoning", "thinking"),
    "not text": ("images", "image", "videos", "video", "audios", "audio"),
}
SYSTEMS = (
    "system", "system_prompt", "system_message", "system_instruction", "system_instructions",
    "sys_prompt",
)  # fmt: skip
"""Columns that hold a system prompt. Case and the signs between words do not matter:
`System Prompt` is one too."""
_PLAIN_SYSTEMS = {name.replace("_", "") for name in SYSTEMS}


@dataclasses.dataclass(frozen=True)
class Draft:
    """A record as `schema.parse_row` takes it.

    Attributes:
      kind: the class of the record.
      fields: its JSON form.
      has_system: whether a system column made its prompt a list of turns.
    """

    kind: type
    fields: dict[str, Any]
    has_system: bool = False


class Row:
    """The columns of one row. `take` reads one, and what nobody takes is left aside and named.

    Attributes:
      place: file:line.
      values: the columns as the file has them.
      cells: whether the file can hold nothing but texts (CSV, TSV).
      parts: the rows of the file that this one puts together; itself where it is one.
    """

    def __init__(
        self,
        place: str,
        values: dict[str, Any],
        *,
        cells: bool = False,
        parts: Sequence[Row] | None = None,
    ):
        self.place, self.values, self.cells = place, values, cells
        self.parts: Sequence[Row] = [self] if parts is None else parts
        self._notes: dict[str, None] = {}
        self._taken: set[str] = set()
        self._aside: dict[str, None] = {}
        self._inside: dict[str, Row] = {}

    def inside(self, name: str, values: dict[str, Any]) -> Row:
        """A row for what lies inside a column.

        What that row notes and leaves aside is reported of this one.
        """
        self._taken.add(name)
        self._inside[name] = Row(self.place, values, cells=self.cells)
        return self._inside[name]

    def notes(self) -> list[str]:
        """What deserves a look."""
        inner = [note for row in self._inside.values() for note in row.notes()]
        return list(dict.fromkeys([*self._notes, *inner]))

    def note(self, reason: str) -> None:
        """Count the row under a reason once."""
        self._notes[reason] = None

    def leave_aside(self, name: str) -> None:
        """Name something inside a column that no record can hold."""
        self._aside[name] = None

    def has(self, name: str) -> bool:
        """Whether the column holds something."""
        return not is_blank(self.values.get(name))

    def columns(self) -> list[str]:
        """The names of the columns that hold something."""
        return [name for name in self.values if self.has(name)]

    def take(self, name: str) -> Any:
        """What a column holds, cleaned of line ends, marks and numbers that are no JSON.

        It is None where it is missing.
        """
        self._taken.add(name)
        value = self.values.get(name)
        if self.cells and isinstance(value, str) and value.strip().lower() in _MISSING:
            # What pandas and others write for nothing, or a word that somebody wrote.
            self.note("missing value as text")
        return self.clean(value)

    def took(self, name: str) -> bool:
        """Whether the column has been read."""
        return name in self._taken

    def raw(self, name: str) -> Any:
        """What a column holds, as it is."""
        self._taken.add(name)
        return self.values.get(name)

    def aside(self) -> list[str]:
        """What holds something and was not taken."""
        found = [name or "(no name)" for name in self.columns() if name not in self._taken] + list(
            self._aside
        )
        for name, row in self._inside.items():
            found += [
                f"{name}.{inner}" if "." not in name and name else inner for inner in row.aside()
            ]
        return found

    def clean(self, value: Any) -> Any:
        """A value as JSON would hold it.

        A text has no byte order mark before it, and its lines end in LF.
        """
        if isinstance(value, str):
            return self._clean_text(value)
        if isinstance(value, dict):
            return {key: self.clean(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.clean(inner) for inner in value]
        if isinstance(value, datetime.date | datetime.time):
            return value.isoformat()
        if isinstance(value, decimal.Decimal):
            return int(value) if value == value.to_integral_value() else float(value)
        return None if isinstance(value, float) and math.isnan(value) else value

    def _clean_text(self, text: str) -> str:
        if text.startswith("\ufeff"):
            self.note("byte order mark removed")
            text = text.lstrip("\ufeff")
        if "\r" in text:
            self.note("line ends made LF")
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        return text

    # ----------------------------------------------------------------------------------- by meaning

    def needed(self, name: str) -> Any:
        """What a column holds.

        Raises:
          RowError: it is missing; the message names the columns that are there.
        """
        value = self.take(name)
        if value is None and name in self.values:
            raise RowError(
                "missing field",
                f"field {name!r} is missing: it is null here, so fill it in or remove the row",
            )
        if value is None:
            found = ", ".join(sorted(self.columns())) or "nothing"
            fix = f"name the column that holds it with --columns {name}=NAME"
            raise RowError(
                "missing field", f"field {name!r} is missing: the row has {found}; {fix}"
            )
        return value

    def text(self, name: str) -> str:
        """A text that must be there, and may be empty."""
        value = self.needed(name)
        if not isinstance(value, str):
            raise RowError(
                "wrong type", f"field {name!r} must be a text, got {type(value).__name__}"
            )
        return value

    def optional_text(self, name: str) -> str:
        """A text, or "" where there is none."""
        value = self.take(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            return ""
        if not isinstance(value, str):
            raise RowError(
                "wrong type", f"field {name!r} must be a text, got {type(value).__name__}"
            )
        return "" if self.cells and value.strip().lower() in _MISSING else value

    def systems(self) -> list[str]:
        """The names of the system columns that hold something."""
        return [
            name for name in self.columns() if re.sub(r"[\W_]+", "", name).lower() in _PLAIN_SYSTEMS
        ]

    def system_text(self) -> str:
        """The text of a system column, or ""."""
        found = {name: self.optional_text(name) for name in self.systems()}
        texts = {text.strip() for text in found.values() if text}
        if len(texts) > 1:
            raise RowError("systems differ", f"the columns {', '.join(found)} differ: keep one")
        return next((text for text in found.values() if text), "")

    def system_key(self) -> str:
        """Equal for rows that stand under one system prompt."""
        return repr([self.values[name] for name in self.systems()])

    def refuse_more_than_text(self) -> None:
        """Raise where a column says something that a role and a text cannot hold."""
        for reason, names in _NOT_RECORDS.items():
            for name in names:
                if self.has(name) and not is_empty_json(self.values[name]):
                    raise RowError(
                        reason,
                        f"the column {name!r} cannot be kept: leave such rows out, or the whole "
                        f"column aside with --columns {name}=",
                    )

    def labels(self, kind: type) -> dict[str, Any]:
        """The optional fields of a record that columns of the same name hold."""
        labels: dict[str, Any] = {}
        for name in schema.field_names(kind):
            if name in (*schema.LABELS, "time") and self.has(name):
                label = as_label(self.clean(self.values[name]))
                if label is not None and (name != "time" or is_time(label)):
                    labels[name] = label
                    self._taken.add(name)
        if kind is Ranking:
            for name in ("policies", "temperatures", "revision"):
                if self.has(name):
                    labels[name] = self.take(name)
        return labels


def is_blank(value: Any) -> bool:
    """Whether a cell holds nothing: null, NaN, an empty text or list."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def is_empty_json(value: Any) -> bool:
    """Whether a value is nothing, also written as JSON in a text: ``"[]"``, ``"null"``."""
    return is_blank(value) or (
        isinstance(value, str) and value.strip() in ("", "[]", "{}", "null", "None", "nan")
    )


def as_label(value: Any) -> str | None:
    """An id or a name as text: integers of any length as they are, 7.0 as "7".

    It is None for what is not a label.

    >>> as_label(123456789012345678901234567890), as_label(7.0), as_label(True)
    ('123456789012345678901234567890', '7', None)
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    if isinstance(value, int):
        return str(value)
    return value if isinstance(value, str) and value.strip() else None


def is_time(text: str) -> bool:
    """Whether a text is a time in ISO 8601."""
    try:
        datetime.datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def as_number(value: Any, name: str, *, texts: bool = False) -> float | int | None:
    """A score; None where there is none. With `texts` a text that is a number counts as one.

    Raises:
      RowError: it is something else.
    """
    if value is None or (
        texts and isinstance(value, str) and value.strip().lower() in {"", *_MISSING}
    ):
        return None
    if texts and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise _no_number(name, value) from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _no_number(name, value)
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else _refuse_infinite(name)
    return value


def _no_number(name: str, value: Any) -> RowError:
    shown = f"{type(value).__name__} {str(value)[:30]!r}"
    return RowError(
        "wrong type",
        f"field {name!r} must be a number or null, got {shown}: write it as 1 or 1.5, without "
        "quotes",
    )


def _refuse_infinite(name: str) -> None:
    raise RowError("not a number", f"field {name!r} is infinite: use a finite number or null")


def ranks_of(scores: Iterable[float | int | None]) -> list[int | None]:
    """Ranks from 1 for the largest number, equal for equal ones, None where there is none.

    >>> ranks_of([3, 4.5, None, 3.0])
    [2, 1, None, 2]
    """
    numbers = list(scores)
    order = sorted({number for number in numbers if number is not None}, reverse=True)
    return [None if number is None else order.index(number) + 1 for number in numbers]


# ----------------------------------------------------------------------------------------- the seam


def tidy_prompt(row: Row, prompt: str) -> str:
    """A text prompt without the spaces after it and empty lines before it.

    It is noted where there were some.
    """
    tidy = prompt.rstrip().lstrip("\n")
    if tidy != prompt:
        row.note("spaces at the seam removed")
    return tidy


def tidy_answer(row: Row, answer: str) -> str:
    """An answer without the spaces around it; noted where there were some."""
    if answer != answer.strip():
        row.note("spaces at the seam removed")
    return answer.strip()


def note_beginnings(row: Row, answers: list[str]) -> None:
    """Note where one response is the beginning of another."""
    distinct = sorted({answer for answer in answers if answer})
    # Sorted texts that share a beginning stand together.
    if any(after.startswith(before) for before, after in itertools.pairwise(distinct)):
        row.note("one response begins the other")


def listed(row: Row, name: str, value: Any, *, opening: str = "[{") -> Any:
    """A list that a CSV cell holds as JSON; every other value as it is.

    Raises:
      RowError: the cell is a list as Python prints it, which cannot be told from a text.
    """
    if not row.cells or not isinstance(value, str) or not value.lstrip().startswith(opening):
        return value
    try:
        decoded = json.loads(value)
    except ValueError:
        pass
    else:
        # Where a text may stand too, a list of objects that are no turns is one: an answer that is
        # itself JSON.
        return decoded if opening != "[{" or is_turns(decoded) else value
    if re.match(r"\s*\[\{'(?:role|content|from|value)'", value):
        raise RowError(
            "wrong type",
            f"field {name!r} holds messages as Python prints them: save the table as JSON lines "
            "or parquet, or the column with json.dumps",
        )
    return value


def is_turns(value: Any) -> bool:
    """Whether a value is a list of objects that each name a speaker."""
    return isinstance(value, list) and all(
        isinstance(item, dict) and {"role", "from"} & set(item) for item in value
    )


def holds_turns(row: Row, name: str) -> bool:
    """Whether a column holds a list, in a cell of CSV written as JSON."""
    value = row.values.get(name)
    if not row.cells or not isinstance(value, str):
        return isinstance(value, list)
    return re.match(r"\s*\[\s*\{\s*[\"'](?:role|from|content|value)[\"']", value) is not None


def asked(prompt: Any) -> dict[str, Any]:
    """The prompt under the name that `schema` has for its type."""
    return {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}


def checked(value: Any, name: str) -> str:
    """`schema.check_text`, with empty texts counted as empty responses."""
    return schema.check_text(value, name, reason="empty response")
