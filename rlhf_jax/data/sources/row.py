"""A row of another tool's table while it is read.

It records which columns were read, what was noted, and what is left aside.
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
"""Columns with a system prompt. Case and punctuation are ignored: `System Prompt` is one too."""
_PLAIN_SYSTEMS = {name.replace("_", "") for name in SYSTEMS}


@dataclasses.dataclass(frozen=True)
class Draft:
    """A record in the form that `schema.parse_row` takes.

    Attributes:
      kind: the class of the record.
      fields: its JSON form.
      has_system: whether its prompt is a list of turns because of a system column.
    """

    kind: type
    fields: dict[str, Any]
    has_system: bool = False


class Row:
    """The columns of one row: `take` reads one, and the unread ones are reported as left aside.

    Attributes:
      place: file:line.
      values: the columns as in the file.
      cells: whether all values of the file are texts (CSV, TSV).
      parts: the rows of the file that were grouped into this one; the row itself otherwise.
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
        """A row for the object inside a column.

        Its notes and unread columns are reported for this row.
        """
        self._taken.add(name)
        self._inside[name] = Row(self.place, values, cells=self.cells)
        return self._inside[name]

    def notes(self) -> list[str]:
        """The reasons for which the row deserves a look."""
        inner = [note for row in self._inside.values() for note in row.notes()]
        return list(dict.fromkeys([*self._notes, *inner]))

    def note(self, reason: str) -> None:
        """Count the row under a reason once."""
        self._notes[reason] = None

    def leave_aside(self, name: str) -> None:
        """Report something inside a column that no record has a field for."""
        self._aside[name] = None

    def has(self, name: str) -> bool:
        """Whether the column has a value."""
        return not is_blank(self.values.get(name))

    def columns(self) -> list[str]:
        """The names of the columns with a value."""
        return [name for name in self.values if self.has(name)]

    def take(self, name: str) -> Any:
        """The value of a column, converted by `clean`; None where it is missing."""
        self._taken.add(name)
        value = self.values.get(name)
        if self.cells and isinstance(value, str) and value.strip().lower() in _MISSING:
            # pandas and others write missing values so, but it may also be a word that was meant.
            self.note("missing value as text")
        return self.clean(value)

    def took(self, name: str) -> bool:
        """Whether the column has been read."""
        return name in self._taken

    def raw(self, name: str) -> Any:
        """The unchanged value of a column."""
        self._taken.add(name)
        return self.values.get(name)

    def aside(self) -> list[str]:
        """The names of the columns with a value that were not read."""
        # The first column of a table that pandas wrote with its index has no name.
        found = [name or "(no name)" for name in self.columns() if name not in self._taken] + list(
            self._aside
        )
        for name, row in self._inside.items():
            found += [
                f"{name}.{inner}" if "." not in name and name else inner for inner in row.aside()
            ]
        return found

    def clean(self, value: Any) -> Any:
        """A value as JSON would represent it.

        Texts lose a byte order mark and get LF as line ends, and NaN becomes None.
        """
        if isinstance(value, str):
            return self._clean_text(value)
        if isinstance(value, dict):
            return {key: self.clean(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.clean(inner) for inner in value]
        if isinstance(value, datetime.date | datetime.time):
            return value.isoformat()
        # Parquet has exact decimals and JSON has only numbers.
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
        """The value of a required column.

        Raises:
          RowError: it is missing; the message names the columns that the row has.
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
        """A required text, which may be empty."""
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
        # The cell may be left out here, so a missing value that is written as a word is none.
        return "" if self.cells and value.strip().lower() in _MISSING else value

    def systems(self) -> list[str]:
        """The names of the system columns with a value."""
        return [
            name for name in self.columns() if re.sub(r"[\W_]+", "", name).lower() in _PLAIN_SYSTEMS
        ]

    def system_text(self) -> str:
        """The text of the system column, or ""; several columns must agree."""
        found = {name: self.optional_text(name) for name in self.systems()}
        texts = {text.strip() for text in found.values() if text}
        if len(texts) > 1:
            raise RowError("systems differ", f"the columns {', '.join(found)} differ: keep one")
        return next((text for text in found.values() if text), "")

    def system_key(self) -> str:
        """A key that is equal for rows with the same system prompt."""
        return repr([self.values[name] for name in self.systems()])

    def refuse_more_than_text(self) -> None:
        """Raise where a column has content that a role and a text cannot represent."""
        for reason, names in _NOT_RECORDS.items():
            for name in names:
                # An empty list of tools means the same as no column.
                if self.has(name) and not is_empty_json(self.values[name]):
                    raise RowError(
                        reason,
                        f"the column {name!r} cannot be kept: leave such rows out, or the whole "
                        f"column aside with --columns {name}=",
                    )

    def labels(self, kind: type) -> dict[str, Any]:
        """The optional fields of a record that the row has as columns of the same name."""
        labels: dict[str, Any] = {}
        for name in schema.field_names(kind):
            if name in (*schema.LABELS, "time") and self.has(name):
                # A column of that name with something else in it is not a label, and left aside.
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
    """Whether a cell has no value: null, NaN, an empty text or list."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def is_empty_json(value: Any) -> bool:
    """Whether a value is empty, also if written as JSON in a text: ``"[]"``, ``"null"``."""
    return is_blank(value) or (
        isinstance(value, str) and value.strip() in ("", "[]", "{}", "null", "None", "nan")
    )


def as_label(value: Any) -> str | None:
    """An id or a name as text, integers of any length unchanged and 7.0 as "7"; None for others.

    >>> as_label(123456789012345678901234567890), as_label(7.0), as_label(True)
    ('123456789012345678901234567890', '7', None)
    """
    if isinstance(value, bool):
        return None
    # pandas turns a column of integers into floats where one is missing; up to 2^53 they are exact.
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
    """A score; None where there is none. With `texts`, a number may be written as text.

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
    # NaN means no score, as tables without null write it; an infinite score is a mistake.
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
    """Ranks from 1 for the largest score; equal scores tie, and None remains None.

    >>> ranks_of([3, 4.5, None, 3.0])
    [2, 1, None, 2]
    """
    numbers = list(scores)
    # The place among the distinct scores, so that equal scores share a rank without a gap after it.
    order = sorted({number for number in numbers if number is not None}, reverse=True)
    return [None if number is None else order.index(number) + 1 for number in numbers]


# ----------------------------------------------------------------------------------------- the seam


def tidy_prompt(row: Row, prompt: str) -> str:
    """A text prompt without trailing spaces and leading empty lines; noted where there were any."""
    tidy = prompt.rstrip().lstrip("\n")
    if tidy != prompt:
        row.note("spaces at the seam removed")
    return tidy


def tidy_answer(row: Row, answer: str) -> str:
    """An answer without the spaces around it; noted where there were any."""
    if answer != answer.strip():
        row.note("spaces at the seam removed")
    return answer.strip()


def note_beginnings(row: Row, answers: list[str]) -> None:
    """Note where one response is the beginning of another."""
    distinct = sorted({answer for answer in answers if answer})
    # In sorted order, the texts that begin with a text follow it directly.
    if any(after.startswith(before) for before, after in itertools.pairwise(distinct)):
        row.note("one response begins the other")


def listed(row: Row, name: str, value: Any, *, opening: str = "[{") -> Any:
    """The list that a CSV cell has as JSON; every other value unchanged.

    Raises:
      RowError: the cell is a list as Python prints it, which cannot be distinguished from a text.
    """
    if not row.cells or not isinstance(value, str) or not value.lstrip().startswith(opening):
        return value
    try:
        decoded = json.loads(value)
    # Tried as JSON first: a text may begin with a bracket too, and is then left unchanged.
    except ValueError:
        pass
    else:
        # Where a text is allowed too, a list of objects that are not turns is a text: an answer
        # that is itself JSON.
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
    """Whether a column has a list, which in a CSV cell must look like turns in JSON."""
    value = row.values.get(name)
    if not row.cells or not isinstance(value, str):
        return isinstance(value, list)
    # A cell is not decoded only to recognise a form; the parser decodes it later.
    return re.match(r"\s*\[\s*\{\s*[\"'](?:role|from|content|value)[\"']", value) is not None


def asked(prompt: Any) -> dict[str, Any]:
    """The prompt under the field name of its type in `schema`."""
    return {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}


def checked(value: Any, name: str) -> str:
    """`schema.check_text`, with empty texts counted as empty responses."""
    return schema.check_text(value, name, reason="empty response")
