"""Converts the rows of one table to records, and counts the outcome of each row."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.data import schema, templated
from rlhf_jax.data.schema import (
    PLACES,
    DataReport,
    Demonstration,
    PlainText,
    Prompt,
    Ranking,
    RowError,
)
from rlhf_jax.data.sources import own, recognise, tables
from rlhf_jax.data.sources.recognise import FORMS, Parser
from rlhf_jax.data.sources.row import Draft, Row
from rlhf_jax.data.sources.rules import EXPECTED_DROPS

SETS: Mapping[type, str] = {
    Demonstration: "demonstrations", Ranking: "rankings", Prompt: "prompts", PlainText: "corpus",
}  # fmt: skip
"""The name of a kind's records in a folder of data."""


LOOKED_AT = 100
"""Rows that are examined to recognise the form, as a column may be empty in the first ones."""


MARKERS = templated.pattern()


Plan = Callable[[Sequence[Row]], tuple[Sequence[Row], Parser]]


class CountedTable:
    """The rows of a table while they are converted to records, and the outcome of each."""

    def __init__(self, path: str | os.PathLike[str], split: str | None, max_bad_fraction: float):
        if not 0 <= max_bad_fraction < 1:
            raise ValueError(f"max_bad_fraction={max_bad_fraction} must be at least 0 and below 1")
        self.path, self.max_bad_fraction = path, max_bad_fraction
        self.rows: list[Row] = []
        self.count = self.kept = 0
        self.dropped: dict[str, list[tuple[str, str]]] = {}
        self.noted: dict[str, list[str]] = {}
        self.aside: dict[str, int] = {}
        # Rankings by (labeler, prompt, responses), to find those that a labeler gave twice.
        self.ranked: dict[Any, str] = {}
        self.last: tuple[Row | None, set[Any]] = (None, set())
        for place, values, cells in tables.rows(Path(path), split):
            self.count += 1
            if isinstance(values, RowError):
                self._drop(place, values)
            else:
                # In tables that were concatenated, a first name may begin with a byte order mark.
                named = {str(name).lstrip("\ufeff"): value for name, value in values.items()}
                self.rows.append(Row(place, named, cells=cells))

    def first(self) -> Row:
        """The first row that could be read.

        Raises:
          ValueError: there is none.
        """
        if not self.rows:
            self._refuse_damaged()
            raise ValueError(f"{self.path} holds no rows: {self._counts().summary()}")
        return self.rows[0]

    def form(self) -> str:
        """The form of the first row with a known one; "" where none of the first rows has one.

        Raises:
          ValueError: there are no rows.
        """
        self.first()
        return next(filter(None, map(recognise.of_row, self.rows[:LOOKED_AT])), "")

    def example(self, form: str) -> Row:
        """The first row of a form, or else of the file."""
        return next((row for row in self.rows if FORMS[form].fits(row)), self.first())

    def map_columns(self, columns: Mapping[str, str]) -> None:
        """Rename columns to the wanted names.

        Raises:
          ValueError: no row has such a column, or one column would get two names.
        """
        present = {name for row in self.rows for name in row.values}
        # A score inside UltraFeedback's completions is not a column; `rated` finds it there.
        inside = {key for row in self.rows[:1] for key in _inner_names(row)}
        columns = {
            wanted: have
            for wanted, have in columns.items()
            if have in present or have not in inside
        }
        twice = next(
            (have for have in columns.values() if have and list(columns.values()).count(have) > 1),
            None,
        )
        if twice is not None:
            names = ", ".join(wanted for wanted, have in columns.items() if have == twice)
            raise ValueError(
                f"--columns gives the column {twice!r} several names, {names}: give it one"
            )
        for wanted, have in columns.items():
            if have and have not in present and self.rows:
                raise ValueError(
                    f"{self.path} has no column {have!r} for --columns {wanted}={have}: it has "
                    f"{', '.join(sorted(present))}"
                )
        for row in self.rows:
            old = row.values
            kept = {
                name: value
                for name, value in old.items()
                if name not in columns and name not in columns.values()
            }
            given = {wanted: old.get(have) for wanted, have in columns.items() if have}
            replaced = {
                f"{name} (by --columns)": old[name]
                for name in columns
                if name in old and name != columns[name] and name not in columns.values()
            }
            row.values = {**given, **kept, **replaced}

    def refuse_unread(self, columns: Mapping[str, str]) -> None:
        """Raise where a column was renamed to a name that the form does not read.

        Otherwise a typing error would go unnoticed.

        Raises:
          ValueError: a name was not read; the message names the flag.
        """
        for wanted, have in columns.items():
            holding = sum(row.has(wanted) for row in self.rows)
            # Nothing to say where no row has a value in the column, or no row was kept.
            if have and holding and self.kept and not any(row.took(wanted) for row in self.rows):
                raise ValueError(
                    f"{self.path}: --columns {wanted}={have} names a column that this form does "
                    f"not read: give it one of the names {', '.join(recognise.MAPPED)} or of a "
                    "record's field, or leave the flag out"
                )

    def is_records(self) -> bool:
        """Whether the file is JSON lines without columns that this package's records lack."""
        known = {field for kind in own.KINDS for field in schema.field_names(kind)}
        lines = str(self.path).removesuffix(".gz").endswith((".jsonl", ".ndjson"))
        return (
            lines
            and Path(self.path).is_file()
            and all(set(row.values) <= known for row in self.rows)
        )

    def refuse_mixed(self, form: str) -> None:
        """Raise where a row is of another form than the first.

        Raises:
          ValueError: there is such a row; the message names it.
        """
        # Where columns can be renamed, the parser names the missing one and the flag for it.
        fitting = any(FORMS[form].fits(row) for row in self.rows)
        if not fitting and not FORMS[form].renames:
            raise ValueError(
                f"{self.first().place}: no row is of {FORMS[form].title} ({FORMS[form].columns}): "
                f"the columns are {', '.join(sorted(self.first().values))}; leave --source out to "
                "have the form recognised"
            )
        for row in self.rows:
            if FORMS[form].fits(row):
                continue
            other = recognise.of_row(row)
            if other and other != form and fitting:
                raise ValueError(
                    f"{row.place}: the row looks like {FORMS[other].title}, others like "
                    f"{FORMS[form].title}: write one form a file"
                )

    def records(self, plan: Plan, source: str | None, *, one_kind: bool) -> list[Any]:
        """The records of all rows.

        Raises:
          ValueError: the rows give records of several kinds, and `one_kind` is set.
        """
        rows, parse = plan(self.rows)
        parsed: list[tuple[Row, list[Draft]]] = []
        for row in rows:
            try:
                drafts = parse(row)
                parsed.append((row, drafts if isinstance(drafts, list) else [drafts]))
            except RowError as error:
                self._drop_all(row, error)
        if one_kind:
            _refuse_kinds(parsed)
        # Known only after all rows are parsed: one system prompt decides the form of all prompts.
        some_system = any(draft.has_system for _, drafts in parsed for draft in drafts)
        records, ids = [], {}
        for row, drafts in parsed:
            try:
                found = [self._record(row, draft, source, some_system, ids) for draft in drafts]
            except RowError as error:
                self._drop_all(row, error)
                continue
            records += found
            self._keep(row, found)
        return records

    def _record(
        self,
        row: Row,
        draft: Draft,
        source: str | None,
        some_system: bool,
        ids: dict[tuple[type, str], str],
    ) -> Any:
        fields = ({"source": source} if source else {}) | draft.fields
        if some_system and not draft.has_system and isinstance(fields.get("prompt"), str):
            # If only some rows were conversations, a model would learn two formats at once.
            row.note("prompt made a turn")
            fields = {
                **fields,
                "messages": [{"role": "user", "content": fields["prompt"]}],
                "prompt": None,
            }
        record = schema.parse_row(fields, draft.kind)
        if any(map(MARKERS.search, schema.record_texts(record))):
            row.note("chat template in text")
        if record.id is not None:
            # A row may give several records, so an id is only a repeat when it comes from another
            # row.
            before = ids.setdefault((draft.kind, record.id), row.place)
            if before != row.place:
                raise RowError(
                    "duplicate id", f"field 'id' = {record.id[:60]!r} is also in an earlier row"
                )
        if isinstance(record, Ranking) and record.labeler is not None:
            # Sorted, as the same responses may be shown in another order.
            key = (record.labeler, record.prompt, tuple(sorted(record.responses)))
            before = self.ranked.setdefault(key, row.place)
            if before != row.place or key in self._of_row(row):
                raise RowError(
                    "ranked twice",
                    f"labeler {record.labeler[:40]!r} ranks the prompt and responses of {before} "
                    "again: keep one",
                )
            self._of_row(row).add(key)
        return record

    def _of_row(self, row: Row) -> set[Any]:
        """The keys of the rankings by labelers that a row has given so far."""
        if self.last[0] is not row:
            self.last = (row, set())
        return self.last[1]

    def _keep(self, row: Row, records: Sequence[Any]) -> None:
        # A group counts as the rows it was made of, so that the counts add up to the file's.
        self.kept += len(row.parts)
        notes = dict.fromkeys(note for record in records for note in schema.notes(record))
        for part in row.parts:
            for name in dict.fromkeys(part.aside()):
                self.aside[name] = self.aside.get(name, 0) + 1
        for reason in dict.fromkeys(
            [*notes, *row.notes(), *(n for part in row.parts for n in part.notes())]
        ):
            self.noted.setdefault(reason, []).append(row.place)

    def _drop(self, place: str, error: RowError) -> None:
        self.dropped.setdefault(error.reason, []).append((place, str(error)))

    # All rows of a group share its fate, each under its own place.
    def _drop_all(self, row: Row, error: RowError) -> None:
        for part in row.parts:
            self._drop(part.place, error)

    def report(self, kind: str) -> DataReport:
        """The counts.

        Raises:
          ValueError: more rows are bad than allowed, or none is left.
        """
        self._refuse_damaged()
        report = self._counts()
        if not self.kept:
            raise ValueError(f"{self.path} holds no {kind} to use: {report.summary()}")
        return report

    def _counts(self) -> DataReport:
        places = {
            reason: [place for place, _ in found] for reason, found in self.dropped.items()
        } | self.noted
        return DataReport(
            str(self.path),
            self.count,
            self.kept,
            dropped={reason: len(found) for reason, found in self.dropped.items()},
            noted={reason: len(found) for reason, found in self.noted.items()},
            examples={reason: ": ".join(found[0]) for reason, found in self.dropped.items()},
            places={reason: found[:PLACES] for reason, found in places.items()},
            aside=self.aside,
        )

    def _refuse_damaged(self) -> None:
        bad = {
            reason: found for reason, found in self.dropped.items() if reason not in EXPECTED_DROPS
        }
        total = sum(map(len, bad.values()))
        if total > self.max_bad_fraction * self.count:
            raise ValueError(
                f"{total} of {self.count} rows of {self.path} are bad "
                f"(max_bad_fraction={self.max_bad_fraction}):\n  "
                + "\n  ".join(": ".join(found[0]) for found in bad.values())
            )


def _inner_names(row: Row) -> set[str]:
    """The names of the fields inside a row's lists of objects."""
    lists = [value for value in row.values.values() if isinstance(value, list)]
    return {key for value in lists for item in value if isinstance(item, dict) for key in item}


def _refuse_kinds(parsed: Sequence[tuple[Row, list[Draft]]]) -> None:
    drafted = [(row, draft) for row, drafts in parsed for draft in drafts]
    for row, draft in drafted:
        first = drafted[0][1].kind
        if draft.kind is not first:
            raise ValueError(
                f"{row.place}: the row gives {SETS[draft.kind]}, those before it {SETS[first]}: "
                "write one kind a file"
            )
