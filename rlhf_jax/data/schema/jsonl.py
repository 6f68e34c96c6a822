"""Reads and writes files of JSON lines as records."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from rlhf_jax.data import parsed
from rlhf_jax.data.schema.lengths import fitted, notes_of, special_pattern
from rlhf_jax.data.schema.parse import json_of, parse_row
from rlhf_jax.data.schema.records import Record
from rlhf_jax.data.schema.repeats import KeptRecords
from rlhf_jax.data.schema.report import DataReport, Tally
from rlhf_jax.data.schema.rules import RowError
from rlhf_jax.data.schema.strict_json import json_object, lines_of
from rlhf_jax.run.files import local_path, written

OTHER_TABLES = (".parquet", ".arrow", ".csv", ".tsv", ".feather")
"""File name suffixes of tables that are not JSON lines."""


def read_jsonl(
    path: str | os.PathLike[str],
    kind: type[Record],
    *,
    max_bad_fraction: float = 0.0,
    allow_empty_responses: bool = False,
    limit: int | None = None,
    length: Callable[[str], int] = len,
    too_long: Literal["drop", "error", "truncate"] = "drop",
    special_tokens: Sequence[str] | re.Pattern[str] = (),
) -> tuple[list[Record], DataReport]:
    """Read records of one kind from a JSON-lines file (gzip when the name ends in .gz).

    `RULES` lists what happens to a row that breaks a rule.

    Args:
      path: the file.
      kind: `Demonstration`, `Ranking`, `Prompt` or `PlainText`.
      max_bad_fraction: share of the rows that may be bad; these are dropped and counted. 0
        tolerates none.
      allow_empty_responses: accept "" as a response, as a sampled response may end at once. A
        prompt must never be empty.
      limit: greatest length of a row: its prompt and its longest ranked response together, or its
        text. None = no limit.
      length: the length of a text for `limit`: in characters, or in tokens with
        ``lambda text: len(tokenizer.encode(text))``.
      too_long: what happens to a longer row. "drop" drops and counts it without an error. "error"
        makes it a bad row. "truncate" cuts responses and texts at their end, never prompts, and
        notes the row; where the prompt leaves no room, the row is dropped. A truncated answer
        teaches a model to stop in mid-sentence, and no labeler saw it.
      special_tokens: rows with one of these in a text are noted, for example
        ``tokenizer.all_special_tokens``; or a pattern that finds them, such as
        `rlhf_jax.data.templated.pattern`.

    Returns:
      The records in file order, and the counts.

    Raises:
      ValueError: the file is missing, damaged or empty, or more rows are bad than allowed; the
        message gives file:line, the field and the fix for the first row of each reason. For a file
        in another tool's format it is the command that converts it.
    """
    _check_options(max_bad_fraction, limit, too_long, special_tokens)
    _refuse_other_table(path)
    tally, kept = Tally(path), KeptRecords()

    def keep(line: int, row: dict[str, Any]) -> None:
        kept.add(line, parse_row(row, kind, allow_empty_responses=allow_empty_responses), tally)

    _each_row(tally, keep)
    # Lengths are checked after all rows are read, as a later revision may replace a ranking.
    special = special_pattern(special_tokens)
    records = []
    for line, record in kept.records.items():
        try:
            fitting = record if limit is None else fitted(record, limit, length, too_long)
        except RowError as error:
            tally.drop(line, error)
            continue
        records.append(fitting)
        for reason in notes_of(fitting, special, cut=fitting is not record):
            tally.note(line, reason)
    report = tally.report(len(records))
    # Neither is a mistake in the file, so they do not count as bad rows.
    tolerated = (
        {"superseded by revision"}
        if too_long == "error"
        else {"superseded by revision", "too long"}
    )
    try:
        _refuse_bad(report, max_bad_fraction, tolerated)
    except ValueError:
        # If the whole file is in another format, that is more useful than an error for each row.
        _refuse_foreign(path, kind)
        raise
    if not records:
        _refuse_foreign(path, kind)
        raise ValueError(
            f"{path} holds no {kind.__name__} to use: write one JSON object a line; "
            f"{report.summary()}"
        )
    return records, report


def read_rows(
    path: str | os.PathLike[str], parse: Callable[[dict[str, Any]], Any]
) -> tuple[list[Any], DataReport]:
    r"""Apply `parse` to each JSON object of a file.

    A `RowError` drops the row and counts it under its reason. Blank lines are skipped. Lines end at
    "\n" only, because U+2028 and U+0085 are ordinary characters inside JSON strings.
    """
    tally, records = Tally(path), []
    _each_row(tally, lambda _, row: records.append(parse(row)))
    return records, tally.report(len(records))


def write_jsonl(path: str | os.PathLike[str], records: Iterable[Any]) -> None:
    """Write records, one JSON object per line.

    The file is written atomically and is on disk when this returns. Ranks are written from 1, null
    where not ranked; a prompt of several turns is written as `messages`; fields that are None are
    left out. Gzip when the name ends in .gz.
    """
    path = local_path("the file to write", path)
    lines = [json.dumps(json_of(r), ensure_ascii=False, allow_nan=False) + "\n" for r in records]
    data = "".join(lines).encode("utf-8")
    with written(path, binary=True) as file:
        # mtime=0, so that equal records give equal bytes.
        file.write(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    parsed.forget(path)


def _refuse_other_table(path: str | os.PathLike[str]) -> None:
    # Only an existing file: a missing one gets the error of the reader, which is about its path.
    if str(path).removesuffix(".gz").lower().endswith(OTHER_TABLES) and Path(path).is_file():
        raise ValueError(
            f"{path} is no file of JSON lines: convert it with "
            f"python experiments/prepare_data.py --data={path} --out=DIR"
        )


def _refuse_foreign(path: str | os.PathLike[str], kind: type) -> None:
    """Raises an error with the command that converts the file, if another tool wrote it."""
    # Imported here, because the readers of other formats import this module.
    from rlhf_jax.data.sources import recognise

    advice = recognise.advice(path, kind)
    if advice:
        raise ValueError(advice) from None


def _each_row(tally: Tally, take: Callable[[int, dict[str, Any]], None]) -> None:
    for line, data in lines_of(tally.path):
        # Counted before it is parsed, so that bad rows count too.
        tally.rows += 1
        try:
            take(line, json_object(data))
        except RowError as error:
            tally.drop(line, error)


def _check_options(
    max_bad_fraction: float, limit: int | None, too_long: str, special_tokens: Any
) -> None:
    if not 0 <= max_bad_fraction < 1:
        raise ValueError(f"max_bad_fraction={max_bad_fraction} must be at least 0 and below 1")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1, or None for no limit")
    if too_long not in ("drop", "error", "truncate"):
        raise ValueError(f'too_long={too_long!r} must be "drop", "error" or "truncate"')
    if limit is None and too_long != "drop":
        raise ValueError(f"too_long={too_long!r} needs a limit: give limit=")
    if isinstance(special_tokens, str) or not (
        isinstance(special_tokens, re.Pattern) or all(special_tokens)
    ):
        raise ValueError(
            f'special_tokens={special_tokens!r} must be a list of texts, like ["<|endoftext|>"]'
        )


def _refuse_bad(report: DataReport, max_bad_fraction: float, tolerated: set[str]) -> None:
    bad = {reason: n for reason, n in report.dropped.items() if reason not in tolerated}
    total = sum(bad.values())
    if total and total / report.rows > max_bad_fraction:
        more = {
            reason: f" (and {n - 1} more: {reason})" if n > 1 else "" for reason, n in bad.items()
        }
        raise ValueError(
            f"{total} of {report.rows} rows of {report.source} are bad "
            f"(max_bad_fraction={max_bad_fraction}):\n  "
            + "\n  ".join(report.examples[reason] + more[reason] for reason in bad)
        )
