"""Reads other tools' tables as records: one function per form of TRL, and one for any form."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from rlhf_jax.data import schema
from rlhf_jax.data.schema import DataReport, Demonstration, Prompt, Ranking, Record
from rlhf_jax.data.sources import own, rated, recognise, trl
from rlhf_jax.data.sources.counted_table import MARKERS, SETS, CountedTable, Plan
from rlhf_jax.data.sources.recognise import FORMS, Options


@dataclasses.dataclass(frozen=True)
class Reading:
    """The content of a file.

    Attributes:
      form: the name of its form.
      said: a sentence on how the columns were interpreted.
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
      path: JSON lines, a JSON list, CSV, TSV, parquet or arrow (compressed or not), or a folder of
        shards.
      form: a name of `FORMS`; "" recognises it by the columns.
      columns: wanted name -> name in the table, such as ``{"prompt": "question"}``;
        ``{"tools": ""}`` leaves a column aside. For exports of annotation tools the names are those
        of fields and questions.
      split: which split of a folder, where there are several.
      source: the records' `source` where a row has none.
      max_bad_fraction: share of the rows that may be bad (those of `EXPECTED_DROPS` aside). 0
        tolerates none.
      language: of OpenAssistant's messages.

    Returns:
      The records in file order, the counts, and how the columns were interpreted.

    Raises:
      ValueError: there is nothing to read, no form fits, a row is of another form than those before
        it, or more rows are bad than allowed; the message gives file:line, the problem, and the
        flag or edit that fixes it.
    """
    options = Options(dict(columns or {}), language)
    read = CountedTable(path, split, max_bad_fraction)
    if form:
        recognise.check_form(form)
    # For most forms columns are renamed before the form is recognised, as the names decide. The
    # mapping for an annotation tool's export names fields and questions inside its records instead.
    inside = FORMS.get(form or read.form())
    if inside is None or inside.renames:
        read.map_columns(options.columns)
    form = form or read.form()
    if not form:
        raise ValueError(f"{read.first().place}: {recognise.refuse_unknown(read.first())}")
    read.refuse_mixed(form)
    if form == "jsonl" and not columns and read.is_records():
        # This reader also knows revisions and all other rules of this package's files.
        kind = own.kind_of(read.example(form))
        own_records, report = schema.read_jsonl(
            path, kind, max_bad_fraction=max_bad_fraction, special_tokens=MARKERS
        )
        return Reading(
            form, recognise.said(form, read.example(form)), {SETS[kind]: own_records}, report
        )
    said = recognise.said(form, read.example(form))
    mapped = {wanted: have for wanted, have in options.columns.items() if have}
    said += (
        f" (with {', '.join(f'{have} as {wanted}' for wanted, have in mapped.items())})"
        if mapped
        else ""
    )
    # Only OpenAssistant's trees give records of two kinds.
    found = read.records(
        lambda rows: FORMS[form].plan(rows, options), source, one_kind=form != "oasst"
    )
    # Otherwise `--columns` names questions inside the records, which are no columns.
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

    Each of the three is a text or a list of ``{role, content}``. Without `prompt` the other two are
    whole conversations: lists share all turns but the last; texts are transcripts, split at the
    last "Assistant:" turn. Any other table without a prompt is refused. A column `system` becomes
    the first turn. A prompt that the answers repeat is removed from them. Pairs with identical or
    empty responses, or without a shared prompt, are dropped and counted.

    Args:
      path: a ``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.parquet`` or ``.arrow`` file, a folder
        of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`, or a folder of shards such as a
        snapshot from the hub.
      split: which split, where there are several; None = the only one.
      source: the records' `source` where a row has none.
      max_bad_fraction: share of the rows that may be bad (the dropped ones above aside). 0
        tolerates none.
      columns: wanted name -> name in the table, such as ``{"prompt": "question"}``.

    Returns:
      The rankings in file order, and the counts. Further columns that are fields of `Ranking`, such
      as `id`, are kept; the report names those that are left aside.

    Raises:
      ValueError: there is nothing to read, a file is damaged or a shard is missing, a bad row
        (named file:row, rows counted from 1), or pyarrow is missing for a parquet or arrow file.
    """
    return _read(
        path,
        Ranking,
        lambda rows: (rows, trl.pairs(rows)),
        split,
        source,
        max_bad_fraction,
        columns,
    )


def read_completions(
    path: str | os.PathLike[str],
    *,
    split: str | None = None,
    source: str | None = None,
    max_bad_fraction: float = 0.0,
    columns: Mapping[str, str] | None = None,
) -> tuple[list[Demonstration], DataReport]:
    """Rows ``{prompt, completion}`` or ``{messages}`` (TRL) as demonstrations.

    The last turn of `messages` is the response and must be the assistant's. The arguments are those
    of `read_pairs`.
    """
    return _read(
        path,
        Demonstration,
        lambda rows: (rows, trl.completions(rows)),
        split,
        source,
        max_bad_fraction,
        columns,
    )


def read_prompts(
    path: str | os.PathLike[str],
    *,
    split: str | None = None,
    source: str | None = None,
    max_bad_fraction: float = 0.0,
    columns: Mapping[str, str] | None = None,
) -> tuple[list[Prompt], DataReport]:
    """Rows ``{prompt}``, a text or a list of messages (TRL's prompt-only form).

    The arguments are those of `read_pairs`.
    """
    return _read(
        path, Prompt, lambda rows: (rows, trl.prompt_only), split, source, max_bad_fraction, columns
    )


def read_rated(
    path: str | os.PathLike[str],
    *,
    split: str | None = None,
    source: str | None = None,
    max_bad_fraction: float = 0.0,
    columns: Mapping[str, str] | None = None,
) -> tuple[list[Ranking], DataReport]:
    """Responses with a score each, larger = better, as rankings: equal scores tie.

    The row is ``{prompt, responses: [text], scores: [number]}``, or as in UltraFeedback
    ``{instruction, completions: [{response, overall_score, model}]}`` (also `score`), or one
    response ``{prompt, response, score}``; such rows with the same prompt are ranked together. A
    response without a score is not ranked. The arguments are those of `read_pairs`.

    Source: Cui et al. 2023, arXiv 2310.01377 (UltraFeedback).
    """
    return _read(
        path,
        Ranking,
        lambda rows: rated.table(rows, columns or {}),
        split,
        source,
        max_bad_fraction,
        columns,
    )


def _read(
    path: str | os.PathLike[str],
    kind: type[Record],
    plan: Plan,
    split: str | None,
    source: str | None,
    max_bad_fraction: float,
    columns: Mapping[str, str] | None,
) -> tuple[list[Record], DataReport]:
    table = CountedTable(path, split, max_bad_fraction)
    table.map_columns(columns or {})
    records = table.records(plan, source, one_kind=True)
    table.refuse_unread(columns or {})
    return records, table.report(kind.__name__)
