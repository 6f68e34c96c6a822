"""Tables of other people as records: one way for every form, from the rows of a file to records and their report."""

from __future__ import annotations

import dataclasses
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
    Record,
    RowError,
)
from rlhf_jax.data.sources import own, rated, recognise, tables, trl
from rlhf_jax.data.sources.recognise import FORMS, Options, Parser
from rlhf_jax.data.sources.row import Draft, Row
from rlhf_jax.data.sources.rules import EXPECTED_DROPS

SETS: Mapping[type, str] = {
    Demonstration: "demonstrations", Ranking: "rankings", Prompt: "prompts", PlainText: "corpus",
}  # fmt: skip
"""What the records of a kind are called in a folder of data."""

LOOKED_AT = 100
"""Rows that are looked at for the form: in the first ones a column may be empty."""

_MARKERS = templated.pattern()

Plan = Callable[[Sequence[Row]], tuple[Sequence[Row], Parser]]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a file holds.

    Attributes:
      form: the name of its form.
      said: what was read as what, in words.
      records: the records by the name of their kind: demonstrations, rankings, prompts, corpus.
      report: the counts.
    """

    form: str
    said: str
    records: dict[str, list[Any]]
    report: DataReport


def read_form(
    path: str | os.PathLike[str],
    form: str = "",
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    source: str | None = None,
    max_bad_fraction: float = 0.0,
    language: str = "en",
) -> Reading:
    """A file or folder in one of `FORMS`, as records.

    Args:
      path: JSON lines, a JSON list, CSV, TSV, parquet or arrow (packed or not), or a folder of shards.
      form: a name of `FORMS`; "" recognises it by the columns.
      columns: wanted name -> name in the table, such as ``{"prompt": "question"}``; ``{"tools": ""}`` leaves a column
        aside. In the exports of annotation tools the names are those of fields and questions.
      split: which split of a folder, where there are several.
      source: the records' `source` where a row has none.
      max_bad_fraction: share of the rows that may be bad (those of `EXPECTED_DROPS` aside). 0 tolerates none.
      language: of OpenAssistant's messages.

    Returns:
      The records in file order, the counts, and what was read as what.

    Raises:
      ValueError: there is nothing to read, no form fits, a row is of another form than those before it, or more rows
        are bad than allowed; the message names file:line, what was found, and the flag or edit that mends it.
    """
    options = Options(dict(columns or {}), language)
    read = _Table(path, split, max_bad_fraction)
    if form:
        recognise.check_form(form)
    inside = FORMS.get(form or read.form())
    if inside is None or inside.renames:
        read.map_columns(options.columns)
    form = form or read.form()
    if not form:
        raise ValueError(f"{read.first().place}: {recognise.refuse_unknown(read.first())}")
    read.refuse_mixed(form)
    if form == "jsonl" and not columns and read.is_records():
        # Its own reader knows revisions, and every other rule of this package's files.
        kind = own.kind_of(read.example(form))
        own_records, report = schema.read_jsonl(path, kind, max_bad_fraction=max_bad_fraction, special_tokens=_MARKERS)
        return Reading(form, recognise.said(form, read.example(form)), {SETS[kind]: own_records}, report)
    said = recognise.said(form, read.example(form))
    mapped = {wanted: have for wanted, have in options.columns.items() if have}
    said += f" (with {', '.join(f'{have} as {wanted}' for wanted, have in mapped.items())})" if mapped else ""
    found = read.records(lambda rows: FORMS[form].plan(rows, options), source, one_kind=form != "oasst")
    if FORMS[form].renames:
        read.refuse_unread(options.columns)
    records: dict[str, list[Any]] = {}
    for record in found:
        records.setdefault(SETS[type(record)], []).append(record)
    return Reading(form, said, records, read.report("record"))


def read_pairs(
    path: str | os.PathLike[str],
    *,
    split: str | None = None,
    source: str | None = None,
    max_bad_fraction: float = 0.0,
    columns: Mapping[str, str] | None = None,
) -> tuple[list[Ranking], DataReport]:
    """Rows ``{prompt, chosen, rejected}`` (TRL's preference form) as rankings of K = 2.

    Each of the three is a text or a list of ``{role, content}``. Without `prompt` the two hold the whole conversation:
    lists share all turns but the last; texts are transcripts, cut at the last "Assistant:" turn. Any other table
    without a prompt is refused. A column `system` becomes the first turn. Answers that are whole texts beside their
    prompt are cut. Pairs whose responses are identical or empty, or that share no prompt, are dropped and counted.

    Args:
      path: a ``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.parquet`` or ``.arrow`` file, a folder of
        `Dataset.save_to_disk` or `DatasetDict.save_to_disk`, or a folder of shards such as a snapshot from the hub.
      split: which split, where there are several; None = the only one.
      source: the records' `source` where a row has none.
      max_bad_fraction: share of the rows that may be bad (the dropped ones above aside). 0 tolerates none.
      columns: wanted name -> name in the table, such as ``{"prompt": "question"}``.

    Returns:
      The rankings in file order, and the counts. Other columns that `Ranking` has, such as `id`, come along; the report
      names those that are left aside.

    Raises:
      ValueError: there is nothing to read, a file is damaged or a shard is missing, a bad row (named file:row, rows
        counted from 1), or pyarrow is missing for a parquet or arrow file.
    """
    return _read(path, Ranking, lambda rows: (rows, trl.pairs(rows)), split, source, max_bad_fraction, columns)


def read_completions(
    path: str | os.PathLike[str],
    *,
    split: str | None = None,
    source: str | None = None,
    max_bad_fraction: float = 0.0,
    columns: Mapping[str, str] | None = None,
) -> tuple[list[Demonstration], DataReport]:
    """Rows ``{prompt, completion}`` or ``{messages}`` (TRL) as demonstrations. Arguments as in `read_pairs`.

    Of `messages` the last turn is the response, and must be the assistant's.
    """
    return _read(
        path, Demonstration, lambda rows: (rows, trl.completions(rows)), split, source, max_bad_fraction, columns
    )


def read_prompts(
    path: str | os.PathLike[str],
    *,
    split: str | None = None,
    source: str | None = None,
    max_bad_fraction: float = 0.0,
    columns: Mapping[str, str] | None = None,
) -> tuple[list[Prompt], DataReport]:
    """Rows ``{prompt}``, a text or a list of messages (TRL's prompt-only form). Arguments as in `read_pairs`."""
    return _read(path, Prompt, lambda rows: (rows, trl.prompt_only), split, source, max_bad_fraction, columns)


def read_rated(
    path: str | os.PathLike[str],
    *,
    split: str | None = None,
    source: str | None = None,
    max_bad_fraction: float = 0.0,
    columns: Mapping[str, str] | None = None,
) -> tuple[list[Ranking], DataReport]:
    """Responses with a number each, larger = better, as rankings: equal numbers tie. Arguments as in `read_pairs`.

    The row is ``{prompt, responses: [text], scores: [number]}``, or as in UltraFeedback ``{instruction, completions:
    [{response, overall_score, model}]}`` (also `score`), or one response ``{prompt, response, score}``, and rows with
    one prompt are ranked together. A response whose number is missing is not ranked.

    Source: Cui et al. 2023, arXiv 2310.01377 (UltraFeedback).
    """
    return _read(path, Ranking, lambda rows: rated.table(rows, columns or {}), split, source, max_bad_fraction, columns)


def _read(
    path: str | os.PathLike[str],
    kind: type[Record],
    plan: Plan,
    split: str | None,
    source: str | None,
    max_bad_fraction: float,
    columns: Mapping[str, str] | None,
) -> tuple[list[Record], DataReport]:
    table = _Table(path, split, max_bad_fraction)
    table.map_columns(columns or {})
    records = table.records(plan, source, one_kind=True)
    table.refuse_unread(columns or {})
    return records, table.report(kind.__name__)


# ------------------------------------------------------------------------------------------------ rows and counts


class _Table:
    """The rows of a table on their way to records, and what became of each."""

    def __init__(self, path: str | os.PathLike[str], split: str | None, max_bad_fraction: float):
        if not 0 <= max_bad_fraction < 1:
            raise ValueError(f"max_bad_fraction={max_bad_fraction} must be at least 0 and below 1")
        self.path, self.max_bad_fraction = path, max_bad_fraction
        self.rows: list[Row] = []
        self.count = self.kept = 0
        self.dropped: dict[str, list[tuple[str, str]]] = {}
        self.noted: dict[str, list[str]] = {}
        self.aside: dict[str, int] = {}
        self.ranked: dict[Any, str] = {}
        self.last: tuple[Row | None, set[Any]] = (None, set())
        for place, values, cells in tables.rows(Path(path), split):
            self.count += 1
            if isinstance(values, RowError):
                self._drop(place, values)
            else:
                # A byte order mark before the first name comes from tables that were joined.
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
        """The form of the first row that is of one; "" where none of the first is.

        Raises:
          ValueError: there are no rows.
        """
        self.first()
        return next(filter(None, map(recognise.of_row, self.rows[:LOOKED_AT])), "")

    def example(self, form: str) -> Row:
        """The first row of a form, or of the file."""
        return next((row for row in self.rows if FORMS[form].fits(row)), self.first())

    def map_columns(self, columns: Mapping[str, str]) -> None:
        """Give columns the names that are wanted.

        Raises:
          ValueError: no row has such a column, or one is to have two names.
        """
        present = {name for row in self.rows for name in row.values}
        # A number inside UltraFeedback's completions is no column: its reader looks for it there.
        inside = {key for row in self.rows[:1] for key in _inner_names(row)}
        columns = {wanted: have for wanted, have in columns.items() if have in present or have not in inside}
        twice = next((have for have in columns.values() if have and list(columns.values()).count(have) > 1), None)
        if twice is not None:
            names = ", ".join(wanted for wanted, have in columns.items() if have == twice)
            raise ValueError(f"--columns gives the column {twice!r} several names, {names}: give it one")
        for wanted, have in columns.items():
            if have and have not in present and self.rows:
                raise ValueError(
                    f"{self.path} has no column {have!r} for --columns {wanted}={have}: it has "
                    f"{', '.join(sorted(present))}"
                )
        for row in self.rows:
            old = row.values
            kept = {name: value for name, value in old.items() if name not in columns and name not in columns.values()}
            given = {wanted: old.get(have) for wanted, have in columns.items() if have}
            replaced = {
                f"{name} (by --columns)": old[name]
                for name in columns
                if name in old and name != columns[name] and name not in columns.values()
            }
            row.values = {**given, **kept, **replaced}

    def refuse_unread(self, columns: Mapping[str, str]) -> None:
        """Raise where a column was given a name that nothing reads: a slip of the pen would go unseen.

        Raises:
          ValueError: naming the flag.
        """
        for wanted, have in columns.items():
            holding = sum(row.has(wanted) for row in self.rows)
            if have and holding and self.kept and not any(row.took(wanted) for row in self.rows):
                raise ValueError(
                    f"{self.path}: --columns {wanted}={have} names a column that this form does not read: give it one "
                    f"of the names {', '.join(recognise.MAPPED)} or of a record's field, or leave the flag out"
                )

    def is_records(self) -> bool:
        """Whether the file is JSON lines that have no columns but those of this package's records."""
        known = {field for kind in own.KINDS for field in schema.field_names(kind)}
        lines = str(self.path).removesuffix(".gz").endswith((".jsonl", ".ndjson"))
        return lines and Path(self.path).is_file() and all(set(row.values) <= known for row in self.rows)

    def refuse_mixed(self, form: str) -> None:
        """Raise where a row is of another form than the first.

        Raises:
          ValueError: naming the row.
        """
        fitting = any(FORMS[form].fits(row) for row in self.rows)
        if not fitting and not FORMS[form].renames:
            raise ValueError(
                f"{self.first().place}: no row is of {FORMS[form].title} ({FORMS[form].columns}): the columns are "
                f"{', '.join(sorted(self.first().values))}; leave --source out to have the form recognised"
            )
        for row in self.rows:
            if FORMS[form].fits(row):
                continue
            other = recognise.of_row(row)
            if other and other != form and fitting:
                raise ValueError(
                    f"{row.place}: the row looks like {FORMS[other].title}, others like {FORMS[form].title}: "
                    "write one form a file"
                )

    def records(self, plan: Plan, source: str | None, *, one_kind: bool) -> list[Any]:
        """The records of all rows.

        Raises:
          ValueError: rows give records of several kinds where one is wanted.
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
        self, row: Row, draft: Draft, source: str | None, some_system: bool, ids: dict[tuple[type, str], str]
    ) -> Any:
        fields = ({"source": source} if source else {}) | draft.fields
        if some_system and not draft.has_system and isinstance(fields.get("prompt"), str):
            # Half of a table as bare text and half as a chat would teach two forms at once.
            row.note("prompt made a turn")
            fields = {**fields, "messages": [{"role": "user", "content": fields["prompt"]}], "prompt": None}
        record = schema.parse_row(fields, draft.kind)
        if any(map(_MARKERS.search, schema.record_texts(record))):
            row.note("chat template in text")
        if record.id is not None:
            before = ids.setdefault((draft.kind, record.id), row.place)
            if before != row.place:
                raise RowError("duplicate id", f"field 'id' = {record.id[:60]!r} is also in an earlier row")
        if isinstance(record, Ranking) and record.labeler is not None:
            key = (record.labeler, record.prompt, tuple(sorted(record.responses)))
            before = self.ranked.setdefault(key, row.place)
            if before != row.place or key in self._of_row(row):
                raise RowError(
                    "ranked twice",
                    f"labeler {record.labeler[:40]!r} ranks the prompt and responses of {before} again: keep one",
                )
            self._of_row(row).add(key)
        return record

    def _of_row(self, row: Row) -> set[Any]:
        """The rankings by labelers that a row gave so far."""
        if self.last[0] is not row:
            self.last = (row, set())
        return self.last[1]

    def _keep(self, row: Row, records: Sequence[Any]) -> None:
        self.kept += len(row.parts)
        notes = dict.fromkeys(note for record in records for note in schema.notes(record))
        for part in row.parts:
            for name in dict.fromkeys(part.aside()):
                self.aside[name] = self.aside.get(name, 0) + 1
        for reason in dict.fromkeys([*notes, *row.notes(), *(n for part in row.parts for n in part.notes())]):
            self.noted.setdefault(reason, []).append(row.place)

    def _drop(self, place: str, error: RowError) -> None:
        self.dropped.setdefault(error.reason, []).append((place, str(error)))

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
        places = {reason: [place for place, _ in found] for reason, found in self.dropped.items()} | self.noted
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
        bad = {reason: found for reason, found in self.dropped.items() if reason not in EXPECTED_DROPS}
        total = sum(map(len, bad.values()))
        if total > self.max_bad_fraction * self.count:
            raise ValueError(
                f"{total} of {self.count} rows of {self.path} are bad (max_bad_fraction={self.max_bad_fraction}):\n  "
                + "\n  ".join(": ".join(found[0]) for found in bad.values())
            )


def _inner_names(row: Row) -> set[str]:
    """The names inside the lists of objects that a row holds."""
    lists = [value for value in row.values.values() if isinstance(value, list)]
    return {key for value in lists for item in value if isinstance(item, dict) for key in item}


def _refuse_kinds(parsed: Sequence[tuple[Row, list[Draft]]]) -> None:
    drafted = [(row, draft) for row, drafts in parsed for draft in drafts]
    for row, draft in drafted:
        first = drafted[0][1].kind
        if draft.kind is not first:
            raise ValueError(
                f"{row.place}: the row gives {SETS[draft.kind]}, those before it {SETS[first]}: write one kind a file"
            )
