"""Argilla: exports of records that people ranked, rated or answered.

Version 2 writes a list of
``{id, fields, metadata, suggestions, responses: {question: [{value, user_id}]}}`` (`to_json`,
`to_list`), or flat columns ``question.responses``, ``question.responses.users`` and
``question.responses.status`` (`to_datasets`, `to_list(flatten=True)`). Version 1 has
``responses: [{user_id, status, values: {question: {value}}}]``, or flat columns
``question: [{user_id, value, status}]`` (`push_to_huggingface`).

A ranking is a list of names of fields, best first, or of ``{value, rank}``: the exports of version
2 have no ranks, and so no ties. A choice is the name of the best field. A number rates the single
response of its record, and records with the same prompt are compared. Drafts and discarded answers
are left out, and so are suggestions, which are not people's answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_jax.data.schema import RowError
from rlhf_jax.data.sources.annotated import Annotated, Given, choice, field_of
from rlhf_jax.data.sources.row import Row, as_label

FLAT = ".responses"
_OF_RECORDS = ("id", "external_id", "_server_id", "status", "fields", "responses")


def is_record(row: Row) -> bool:
    """Whether a row is a record of Argilla, nested or flat."""
    nested = isinstance(row.values.get("fields"), dict) and isinstance(
        row.values.get("responses"), dict | list
    )
    flat = any(name.endswith(FLAT) and f"{name}.users" in row.values for name in row.values)
    return nested or flat or bool(_old_questions(row))


def _old_questions(row: Row) -> list[str]:
    """The flat columns of version 1: lists of each person's answers."""
    wanted = {"user_id", "value", "status"}
    found = []
    for name, value in row.values.items():
        if (
            isinstance(value, list)
            and value
            and all(isinstance(v, dict) and wanted <= set(v) for v in value)
        ):
            found.append(name)
    return found


def extract(row: Row, columns: Mapping[str, str]) -> Annotated:
    """The fields and answers of a record.

    Raises:
      RowError: it is not a record of Argilla.
    """
    fields = _fields(row)
    # Both are read, so that neither is reported as left aside.
    found = [row.take(name) for name in ("id", "external_id")]
    name = next((label for label in map(as_label, found) if label), None)
    given = tuple(
        _given(fields, columns, question, value, as_label(person), status)
        for question, value, person, status in _answers(row)
    )
    return Annotated(fields, name, given)


def _fields(row: Row) -> Row:
    """The record's fields, as a row of their own."""
    if isinstance(row.values.get("fields"), dict):
        return row.inside("fields", row.take("fields"))
    questions = [
        name for name in row.values if FLAT in name or ".suggestion" in name
    ] + _old_questions(row)
    # A flat record has its fields beside its questions, without a mark of their own.
    names = [name for name in row.values if name not in questions and name not in _OF_RECORDS]
    asides = [
        name
        for name in names
        if name.endswith(("-suggestion", "-suggestion-metadata")) or name == "metadata"
    ]
    fields = {name: row.take(name) for name in names if name not in asides}
    return row.inside("", fields)


def _answers(row: Row) -> Iterator[tuple[str, Any, Any, Any]]:
    """Question, value, person and status of each answer, in all four forms."""
    responses = row.take("responses")
    if isinstance(responses, dict):
        for question, answers in responses.items():
            for answer in answers or []:
                yield question, answer.get("value"), answer.get("user_id"), answer.get("status")
    elif isinstance(responses, list):
        for answer in responses:
            values = answer.get("values") if isinstance(answer, dict) else None
            if not isinstance(values, dict):
                raise RowError(
                    "wrong type",
                    "field 'responses' must hold {user_id, status, values} for each person",
                )
            for question, said in values.items():
                yield (
                    question,
                    (said or {}).get("value"),
                    answer.get("user_id"),
                    answer.get("status"),
                )
    for name in _old_questions(row):
        for answer in row.take(name):
            yield name, answer["value"], answer["user_id"], answer["status"]
    for name in [name for name in row.values if name.endswith(FLAT)]:
        values, people, states = (row.take(name + end) or [] for end in ("", ".users", ".status"))
        for k, value in enumerate(values):
            person, status = (given[k] if k < len(given) else None for given in (people, states))
            yield name.removesuffix(FLAT), value, person, status


def _given(
    fields: Row,
    columns: Mapping[str, str],
    question: str,
    value: Any,
    person: str | None,
    status: Any,
) -> Given:
    submitted = status in (None, "submitted") and value is not None
    # A bool would otherwise count as a number below.
    if isinstance(value, bool) or value is None:
        return Given(question, "other", value, person, submitted)
    if isinstance(value, int | float):
        return Given(question, "number", value, person, submitted)
    if isinstance(value, str):
        # A text may be a choice that names a field, unless the user declared it the answer.
        order = None if columns.get("response") == question else choice(fields, value, columns)
        return Given(
            question, "text" if order is None else "order", order or value, person, submitted
        )
    order = _order(fields, columns, value)
    return Given(question, "other" if order is None else "order", order or value, person, submitted)


def _order(
    fields: Row, columns: Mapping[str, str], value: Any
) -> list[tuple[Any, int | None]] | None:
    """The responses with their ranks, or None where an entry does not name a field.

    Such a list is not a ranking, but a list of labels, for example.
    """
    # `datasets` stores a list of {value, rank} as one object of two lists.
    if (
        isinstance(value, dict)
        and isinstance(value.get("value"), list)
        and isinstance(value.get("rank"), list)
    ):
        value = [
            {"value": name, "rank": rank}
            for name, rank in zip(value["value"], value["rank"], strict=False)
        ]
    if not isinstance(value, list) or len(value) < 2:
        return None
    entries = [entry if isinstance(entry, dict) else {"value": entry} for entry in value]
    if any(not set(entry) <= {"value", "rank"} for entry in entries):
        return None
    names = [field_of(fields, entry.get("value"), columns) for entry in entries]
    if None in names or len(set(names)) < len(names):
        return None
    ranks = [entry.get("rank") for entry in entries]
    if not isinstance(value[0], dict) or all(rank is None for rank in ranks):
        # The client of version 2 writes the names alone, and reads such a list as a ranking, best
        # first.
        fields.note("order without ranks")
        ranks = list(range(1, len(ranks) + 1))
    # Ranks may have gaps after ties; only their order counts.
    order = sorted({rank for rank in ranks if rank is not None})
    dense = [None if rank is None else order.index(rank) + 1 for rank in ranks]
    return [(fields.take(str(name)), rank) for name, rank in zip(names, dense, strict=True)]
