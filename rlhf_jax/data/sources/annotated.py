"""Turns the exports of annotation tools into rankings and demonstrations.

`argilla` and `label_studio` extract the fields of a record and each person's answers. Here one
question is chosen for the whole file, and its answers become records. Where two questions are
possible, the user has to choose.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from rlhf_jax.data.schema import Demonstration, Ranking, RowError, check_text
from rlhf_jax.data.sources.hub import first_line
from rlhf_jax.data.sources.messages import turns, with_system
from rlhf_jax.data.sources.row import (
    Draft,
    Row,
    asked,
    note_beginnings,
    ranks_of,
    tidy_answer,
    tidy_prompt,
)

Kind = Literal["order", "number", "text", "other"]
PROMPTS = ("prompt", "instruction", "question", "query", "input")
ANSWERS = ("response", "answer", "completion", "generation", "output")
TIES = ("tie", "equal", "same", "both", "draw")
# In this order a question is chosen: one that orders responses, then a rating, then a text.
_FLAGS: Mapping[Kind, str] = {"order": "ranking", "number": "score", "text": "response"}


@dataclasses.dataclass(frozen=True)
class Given:
    """One person's answer to one question.

    Attributes:
      question: its name.
      kind: whether it orders responses, rates the single response, is itself a response, or none of
        these.
      value: for an order, each response with its rank from 1 or None; else the number or the text.
      person: the annotator.
      submitted: whether it counts, that is, was not cancelled, discarded or left a draft.
    """

    question: str
    kind: Kind
    value: Any
    person: str | None = None
    submitted: bool = True


@dataclasses.dataclass(frozen=True)
class Annotated:
    """A record of an annotation tool: its fields, its id, and people's answers."""

    fields: Row
    id: str | None
    given: tuple[Given, ...]


def table(
    rows: Sequence[Row],
    columns: Mapping[str, str],
    extract: Callable[[Row, Mapping[str, str]], Annotated],
) -> tuple[Sequence[Row], Callable[[Row], list[Draft]]]:
    """The rows and their parser.

    Args:
      rows: the records of the file; where the question is a rating, those with the same prompt are
        grouped.
      columns: the user's mapping: ``prompt`` (a field), ``ranking``, ``score`` or ``response`` (a
        question), and the field that a choice refers to.
      extract: the fields and answers of a row.

    Raises:
      ValueError: no question is suitable, or more than one is.
    """
    # By identity, because a grouped row is made of the very rows that were extracted here.
    found: dict[int, Annotated | RowError] = {}
    for row in rows:
        try:
            found[id(row)] = extract(row, columns)
        except RowError as error:
            found[id(row)] = error
        except (AttributeError, KeyError, TypeError) as error:
            # `extract` trusts the export's structure, so a damaged entry fails inside it.
            said = (
                f"the record is not as the tool exports it ({first_line(error)}): export the file "
                "again"
            )
            found[id(row)] = RowError("wrong type", said)
    try:
        question, kind = _choose(
            [record for record in found.values() if isinstance(record, Annotated)], columns
        )
    except ValueError as error:
        raise ValueError(f"{rows[0].place}: {error}") from None

    def record(row: Row) -> Annotated:
        one = found[id(row)]
        if isinstance(one, RowError):
            raise one
        return one

    def parse(row: Row) -> list[Draft]:
        return _drafts([record(part) for part in row.parts], row, question, kind, columns)

    if kind != "number":
        return rows, parse
    # A rating is of one response, so records with the same prompt and system make one ranking.
    together: dict[Any, list[Row]] = {}
    for row in rows:
        # A row that could not be read stays alone, so that its error drops no other row.
        one, prompt = found[id(row)], id(row)
        if isinstance(one, Annotated):
            prompt = (
                repr(one.fields.values.get(_prompt_field(one.fields, columns))),
                one.fields.system_key(),
            )
        together.setdefault(prompt, []).append(row)
    return [Row(group[0].place, {}, parts=group) for group in together.values()], parse


def _choose(records: Sequence[Annotated], columns: Mapping[str, str]) -> tuple[str, Kind]:
    kinds: dict[str, set[Kind]] = {}
    for record in records:
        for answer in record.given:
            kinds.setdefault(answer.question, set()).add(answer.kind)
    listed = (
        ", ".join(f"{name} ({'/'.join(sorted(found))})" for name, found in sorted(kinds.items()))
        or "none"
    )
    # The user's choice comes first, in all kinds, before a question is guessed.
    for kind, flag in _FLAGS.items():
        name = columns.get(flag, "")
        if name in kinds and kind in kinds[name]:
            return name, kind
    for kind, flag in _FLAGS.items():
        names = [name for name, found in kinds.items() if kind in found]
        # A text may be a comment, so only a question with the name of an answer counts unasked.
        if kind == "text":
            names = [name for name in names if name in ANSWERS]
        if len(names) == 1:
            return names[0], kind
        if names:
            raise ValueError(
                f"several questions could be meant, {', '.join(sorted(names))}: choose one with "
                f"--columns {flag}=NAME"
            )
    if not kinds:
        return "", "order"  # without annotations, each row is dropped with that reason
    raise ValueError(
        f"no question orders, rates or answers: the questions are {listed}; a choice must name a "
        "field (--columns CHOICE=FIELD), and a text is taken as the answer with --columns "
        "response=QUESTION"
    )


def _drafts(
    records: Sequence[Annotated], row: Row, question: str, kind: Kind, columns: Mapping[str, str]
) -> list[Draft]:
    given = [
        (record, answer)
        for record in records
        for answer in record.given
        if answer.question == question
    ]
    counted = [(record, answer) for record, answer in given if answer.submitted]
    for one in records:
        for answer in one.given:
            if answer.question != question:
                one.fields.leave_aside(f"question {answer.question}")
    if not given:
        raise RowError("nothing annotated", "nobody has answered a question about it")
    if not counted:
        raise RowError("not submitted", "every answer is cancelled, discarded or a draft")
    if len(counted) < len(given):
        row.note("some not submitted")
    other = next((answer for _, answer in counted if answer.kind != kind), None)
    if other is not None:
        raise RowError(
            "unknown answer",
            f"question {question!r} has {str(other.value)[:40]!r}, which is none of the fields "
            f"{', '.join(sorted(records[0].fields.columns()))}: say what it means with --columns "
            "CHOICE=FIELD",
        )
    if kind == "number":
        return _rated(records, row, question, columns)
    people = len({answer.person for _, answer in counted})
    drafts = []
    for record, answer in counted:
        # Ids are unique, so the person is added where several people answered the same record.
        name = record.id and (f"{record.id}/{answer.person}" if people > 1 else record.id)
        prompt = _prompt(record.fields, columns)
        if kind == "order":
            texts, ranks = zip(*answer.value, strict=True)
            drafts.append(
                ranking(record.fields, prompt, texts, list(ranks), labeler=answer.person, id=name)
            )
        else:
            drafts.append(
                _demonstration(record.fields, prompt, answer.value, labeler=answer.person, id=name)
            )
    return drafts


def _rated(
    records: Sequence[Annotated], row: Row, question: str, columns: Mapping[str, str]
) -> list[Draft]:
    """One ranking per person, of the responses that the person rated, one from each record."""
    people: dict[str | None, list[tuple[Annotated, Any]]] = {}
    for record in records:
        for answer in record.given:
            if answer.question == question and answer.submitted:
                people.setdefault(answer.person, []).append((record, answer.value))
    drafts = []
    for person, rated in people.items():
        if len(rated) < 2:
            # One response of a person cannot be compared with anything.
            continue
        first = rated[0][0]
        texts = [record.fields.take(_answer_field(record.fields, columns)) for record, _ in rated]
        name = first.id and (f"{first.id}/{person}" if len(people) > 1 else first.id)
        prompt = _prompt(first.fields, columns)
        # The prompt is taken from the first record; that of the others counts as read too.
        for record, _ in rated:
            record.fields.take(_prompt_field(record.fields, columns))
        ranks = ranks_of([value for _, value in rated])
        drafts.append(ranking(first.fields, prompt, texts, ranks, labeler=person, id=name))
    if not drafts:
        raise RowError(
            "only one response",
            "nobody rated two responses to this prompt: there is nothing to compare",
        )
    return drafts


# --------------------------------------------------------------------------------- fields and names


def _prompt_field(fields: Row, columns: Mapping[str, str]) -> str:
    if columns.get("prompt"):
        return columns["prompt"]
    found = [name for name in PROMPTS if fields.has(name)]
    return found[0] if len(found) == 1 else ""


def _prompt(fields: Row, columns: Mapping[str, str]) -> Any:
    name = _prompt_field(fields, columns)
    if not fields.has(name):
        raise RowError(
            "no prompt",
            f"no field is the prompt: there are {', '.join(sorted(fields.columns()))}; name it "
            "with --columns prompt=FIELD",
        )
    return turns(fields, name, fields.take(name))


def _answer_field(fields: Row, columns: Mapping[str, str]) -> str:
    name = columns.get("response", "")
    found = [name] if fields.has(name) else [name for name in ANSWERS if fields.has(name)]
    if len(found) != 1:
        raise RowError(
            "unknown answer",
            "no field is the response that is rated: there are "
            f"{', '.join(sorted(fields.columns()))}; name it with --columns response=FIELD",
        )
    return found[0]


def field_of(fields: Row, name: Any, columns: Mapping[str, str]) -> str | None:
    """The field that a choice or a rank refers to.

    It is the one that the user mapped, or else the one of that name. Case and punctuation are
    ignored: ``response-1`` and ``Response 1`` refer to ``response_1``.
    """
    if not isinstance(name, str):
        return None
    if fields.has(columns.get(name, "")):
        return columns[name]
    same = [field for field in fields.columns() if _plain(field) == _plain(name)]
    return same[0] if len(same) == 1 else None


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


def choice(fields: Row, name: Any, columns: Mapping[str, str]) -> list[tuple[Any, int]] | None:
    """The order that a choice expresses.

    The named field is better than the other fields of the same numbered series. A tie ranks all of
    them alike. None where the choice names no field, or the field has no alternatives.
    """
    # response_1, response_2 or answer_a, answer_b: fields that differ in the last number or letter.
    stems: dict[str, list[str]] = {}
    for field in fields.columns():
        match = re.fullmatch(r"(.*?)[\W_]*(?:\d+|[a-dA-D])", field)
        # The prompt may end in a number or letter too, and is no alternative.
        if match and field != _prompt_field(fields, columns):
            stems.setdefault(match[1], []).append(field)
    named = [
        field for field in columns.values() if fields.has(field) and field != columns.get("prompt")
    ]
    groups = [group for group in stems.values() if len(group) > 1]
    if isinstance(name, str) and _plain(name) in TIES and (len(named) > 1 or len(groups) == 1):
        chosen, candidates = None, named if len(named) > 1 else groups[0]
    else:
        chosen = field_of(fields, name, columns)
        candidates = (
            named
            if chosen in named and len(named) > 1
            else next((g for g in groups if chosen in g), [])
        )
    if len(candidates) < 2:
        return None
    return [(fields.take(field), 1 if chosen in (None, field) else 2) for field in candidates]


# ------------------------------------------------------------------------------------------ records


def ranking(
    fields: Row,
    prompt: Any,
    texts: Sequence[Any],
    ranks: list[int | None],
    *,
    labeler: str | None,
    id: str | None,
) -> Draft:
    """One person's ranking.

    Raises:
      RowError: a response is no text, or the systems differ.
    """
    responses = [
        tidy_answer(fields, _text(fields, text, f"responses[{k}]")) for k, text in enumerate(texts)
    ]
    prompt = tidy_prompt(fields, prompt) if isinstance(prompt, str) else prompt
    prompt, has_system = with_system(fields, prompt)
    note_beginnings(fields, responses)
    labels = {name: value for name, value in (("labeler", labeler), ("id", id)) if value}
    return Draft(
        Ranking, {**labels, **asked(prompt), "responses": responses, "ranks": ranks}, has_system
    )


def _demonstration(
    fields: Row, prompt: Any, answer: Any, *, labeler: str | None, id: str | None
) -> Draft:
    prompt = tidy_prompt(fields, prompt) if isinstance(prompt, str) else prompt
    prompt, has_system = with_system(fields, prompt)
    labels = {name: value for name, value in (("labeler", labeler), ("id", id)) if value}
    response = tidy_answer(fields, _text(fields, answer, "response"))
    return Draft(Demonstration, {**labels, **asked(prompt), "response": response}, has_system)


def _text(fields: Row, value: Any, name: str) -> str:
    """A response as a text; of a list of one turn, that turn's text."""
    if isinstance(value, list):
        said = turns(fields, name, value)
        value = said[0].get("content") if len(said) == 1 and isinstance(said[0], dict) else value
    return check_text(value, name, reason="empty response")
