r"""A look at data before training: its statistics, and some rows as the model sees them.

Run:

    python experiments/prepare_data.py --look=FILE.jsonl
    python experiments/prepare_data.py --look=FILE.jsonl --model=runs/sft/epoch-3 \
        --preview=rows.html
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rlhf_jax.data import overview, preview, preview_page, schema, sources
from rlhf_jax.data.text import encode_prompt, load_tokenizer
from rlhf_jax.run import files, networks
from rlhf_jax.run.checks import require, require_range

TERMINAL = "terminal"
"""The value of `config.preview` that prints the rows; any other value is the name of a page."""


def look(config: ConfigDict) -> None:
    """Prints statistics and some rows of `config.data`, a file of records.

    Nothing is written except the preview page, if one is asked for.

    Raises:
      ValueError: the file is missing, or has bad rows or no records.
    """
    require(bool(config.data), "data", config.data, "name a file of records: --look=FILE")
    require_range("rows", config.rows, low=1)
    records, report = read(config.data, max_bad_fraction=config.max_bad_fraction)
    tokenizer = load_tokenizer(networks.model_folder(config.model)) if config.model else None
    print(report.summary() + "\n\n" + _table(records, tokenizer, {}) + "\n", flush=True)
    _show(
        records,
        config.preview or TERMINAL,
        config.data,
        tokenizer,
        config.rows,
        config.assistant_turns,
    )


def lines(
    record_files: Mapping[str, Iterable[Any]],
    config: ConfigDict,
    reports: Sequence[schema.DataReport] = (),
) -> list[str]:
    """The lines of the table for a data report; prints rows if `config.preview` is set.

    Args:
      record_files: the records that are written, by file.
      config: the config of `prepare_data`; its `model`, if set, counts tokens and encodes the
        preview.
      reports: the reports of the readers; the columns that they ignored are listed.
    """
    records = [record for each in record_files.values() for record in each]
    name = config.get("model", "")
    tokenizer = load_tokenizer(networks.model_folder(name)) if name else None
    aside: collections.Counter[str] = collections.Counter()
    for report in reports:
        aside.update(report.aside)
    if config.get("preview", ""):
        _show(records, config.preview, ", ".join(record_files), tokenizer)
    return [*_table(records, tokenizer, aside).split("\n"), ""]


def read(path: str | Path, *, max_bad_fraction: float = 0.0) -> tuple[list[Any], schema.DataReport]:
    """Reads a file of records, inferring their kind from the first row; returns them with a report.

    Raises:
      ValueError: see `schema.read_jsonl`; for a first row that matches no kind of record, the
        message names the ways to convert the file.
    """
    # The first row decides; the reader reports rows of any other kind as bad.
    first = next(iter(schema.first_rows(path)), {})
    names = set(first)
    last = first.get("messages")
    # A conversation that ends with the assistant is a demonstration without a `response`.
    answered = (
        isinstance(last, list)
        and last
        and isinstance(last[-1], dict)
        and last[-1].get("role") == "assistant"
    )
    # In this order, since a ranking and a demonstration have a prompt too.
    if "responses" in names or "ranks" in names:
        kind: type = schema.Ranking
    elif "text" in names:
        kind = schema.PlainText
    elif "response" in names or answered:
        kind = schema.Demonstration
    elif names & {"prompt", "messages"}:
        kind = schema.Prompt
    else:
        raise ValueError(
            sources.advice(path)
            or f"{path}: the first row has the fields {', '.join(sorted(names)) or '(none)'} and "
            "is no record of ours: convert the file first with --source=FORM --data=FILE "
            "--out=FOLDER (docs/data_sources.md lists the forms)"
        )
    return schema.read_jsonl(
        path, kind, max_bad_fraction=max_bad_fraction, allow_empty_responses=True
    )


def _table(records: Sequence[Any], tokenizer: Any, aside: Mapping[str, int]) -> str:
    tokens = None if tokenizer is None else lambda text: len(encode_prompt(tokenizer, text))
    return overview.summary(records, aside=aside, tokens=tokens, tokenizer=tokenizer)


def _show(
    records: Sequence[Any],
    where: str,
    title: str,
    tokenizer: Any,
    count: int = preview.ROWS,
    turns: str = "all",
) -> None:
    """Prints the rows, or writes them as a page at `where`."""
    shown = preview.rows(records, tokenizer, count=count, assistant_turns=turns)
    if where == TERMINAL:
        # A stream that is not UTF-8 may raise on the marks of the preview.
        ascii_only = "utf" not in (getattr(sys.stdout, "encoding", None) or "").lower()
        colour = preview.colours(sys.stdout)
        print(
            preview.as_text(
                shown, tokens=tokenizer is not None, colour=colour, ascii_only=ascii_only
            ),
            flush=True,
        )
        return
    require(
        where.endswith((".html", ".htm")),
        "preview",
        where,
        "name a page that ends in .html, or nothing",
    )
    table = _table(records, tokenizer, {})
    with files.written(where) as file:
        file.write(
            preview_page.page(shown, title=title, tokens=tokenizer is not None, report=table)
        )
    print(f"{len(shown)} rows as the model sees them: {where}", flush=True)
