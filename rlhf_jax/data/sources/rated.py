"""Several responses to a prompt with a score each, as in UltraFeedback, distilabel or HelpSteer.

A larger score is better, equal scores tie, and a response without a score is not ranked. The row is
one of

- ``{prompt, responses: [text], scores: [number]}``, also as distilabel's
  ``{instruction, generations, ratings}``;
- UltraFeedback's ``{instruction, completions: [{response, overall_score, model, ..}]}``;
- ``{prompt, response, score}``, one response per row: rows with the same prompt are ranked
  together. ``--columns score=helpfulness`` chooses one of several scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_jax.data.schema import Ranking, RowError, check_text
from rlhf_jax.data.sources.messages import last_text, turns, with_system
from rlhf_jax.data.sources.row import (
    Draft,
    Row,
    as_label,
    as_number,
    asked,
    listed,
    note_beginnings,
    ranks_of,
    tidy_answer,
    tidy_prompt,
)
from rlhf_jax.data.sources.trl import repeats

LISTS = ("responses", "completions", "generations")
NUMBERS = ("scores", "ratings", "rating")
PROMPTS = ("prompt", "instruction")
SCORES = ("overall_score", "score", "fine-grained_score")
"""Names of a completion's score, in order of preference; UltraFeedback has the first and the
last."""


def table(
    rows: Sequence[Row], columns: Mapping[str, str] | None = None
) -> tuple[Sequence[Row], Callable[[Row], Draft]]:
    """The rows, grouped by prompt where each has one response, and their parser.

    Args:
      rows: the rows of the table, with renamed columns.
      columns: the renaming; its ``score`` may name a number inside the completions.
    """
    score = (columns or {}).get("score", "")
    # A list of responses makes a row complete by itself, even if it has a `response` too.
    singles = [
        row for row in rows if row.has("response") and not any(row.has(name) for name in LISTS)
    ]
    if not singles:
        return rows, lambda row: parse(row, score)
    together: dict[Any, list[Row]] = {}
    for row in rows:
        prompt = next((row.values.get(name) for name in PROMPTS if row.has(name)), None)
        # Scores are not compared between system prompts or labelers.
        prompt = _plain_prompt(prompt)
        key = (repr(prompt), row.system_key(), repr(row.values.get("labeler")))
        together.setdefault(key, []).append(row)
    groups = [Row(group[0].place, {}, parts=group) for group in together.values()]
    return groups, _parse_group


def _plain_prompt(prompt: Any) -> Any:
    """A prompt in the form that groups rows, without differences in line ends and outer spaces."""
    return prompt.replace("\r\n", "\n").strip() if isinstance(prompt, str) else prompt


def parse(row: Row, score: str = "") -> Draft:
    """A ranking of K responses by their scores.

    `score` is the name of the score in a completion; "" takes the first of `SCORES`.

    Raises:
      RowError: there is no list of responses, or not a number or null for each.
    """
    row.refuse_more_than_text()
    prompt = _prompt(row)
    name = next((name for name in LISTS if row.has(name)), None)
    if name is None and any(isinstance(row.values.get(name), list) for name in LISTS):
        raise RowError(
            "only one response", "the list of responses is empty: there is nothing to compare"
        )
    if name is None:
        raise RowError(
            "missing field",
            "the row needs a list 'responses' (with 'scores') or 'completions': it has "
            f"{', '.join(sorted(row.columns()))}",
        )  # fmt: skip
    answers = listed(row, name, row.take(name), opening="[")
    if not isinstance(answers, list):
        raise RowError("wrong type", f"field {name!r} must be a list, got {type(answers).__name__}")
    if answers and all(isinstance(answer, dict) for answer in answers):
        answers, scores, policies = _completions(row, name, answers, score)
    else:
        scores, policies = (
            _numbers(row),
            row.take("generation_models") if row.has("generation_models") else None,
        )
    if not isinstance(scores, list) or len(scores) != len(answers):
        raise RowError(
            "missing rank", "field 'scores' must be a list with a number for each response"
        )
    if len(answers) < 2:
        raise RowError("only one response", "there is one response: nothing to compare with")
    return _ranking(row, prompt, answers, ranks_of(scores), policies)


def _prompt(row: Row) -> Any:
    name = next((name for name in PROMPTS if row.has(name)), PROMPTS[0])
    return turns(row, name, row.needed(name))


def _numbers(row: Row) -> list[Any] | None:
    name = next((name for name in NUMBERS if row.has(name)), NUMBERS[0])
    scores = listed(row, name, row.take(name), opening="[")
    if not isinstance(scores, list):
        return None
    # distilabel stores a model's ratings as texts.
    return [
        as_number(score, f"{name}[{k}]", texts=name != "scores") for k, score in enumerate(scores)
    ]


def _completions(
    row: Row, name: str, answers: list[dict[str, Any]], score: str
) -> tuple[list[Any], list[Any], list[Any]]:
    """The texts, scores and models of UltraFeedback's completions."""
    names = [score] if score else SCORES
    # A score that is empty in all answers of the row does not count as present.
    key = next(
        (key for key in names if any(answer.get(key) is not None for answer in answers)), None
    )
    if key is None:
        found = ", ".join(sorted({key for answer in answers for key in answer}))
        raise RowError(
            "missing rank",
            f"field '{name}[0]' must hold one of {', '.join(SCORES)}: it has {found}; name the "
            "number with --columns score=NAME",
        )
    for answer in answers:
        for other in sorted(set(answer) - {"response", "model", key}):
            if answer[other] not in (None, "", [], {}):
                row.leave_aside(f"{name}[].{other}")
    scores = [as_number(answer.get(key), f"scores[{k}]") for k, answer in enumerate(answers)]
    return (
        [answer.get("response") for answer in answers],
        scores,
        [answer.get("model") for answer in answers],
    )


def _ranking(
    row: Row, prompt: Any, answers: list[Any], ranks: list[int | None], policies: Any
) -> Draft:
    responses = []
    for k, answer in enumerate(answers):
        said = turns(row, f"responses[{k}]", answer) if isinstance(answer, list) else answer
        text = said[-1].get("content") if isinstance(said, list) and len(said) == 1 else said
        responses.append(check_text(text, f"responses[{k}]", reason="empty response"))
    responses = [tidy_answer(row, answer) for answer in _without_prompt(row, prompt, responses)]
    if not all(responses):
        raise RowError("empty response", "a response is its prompt alone, or empty")
    prompt = tidy_prompt(row, prompt) if isinstance(prompt, str) else prompt
    prompt, has_system = with_system(row, prompt)
    note_beginnings(row, responses)
    names = (
        policies if policies and all(isinstance(name, str) and name for name in policies) else None
    )
    fields = {**row.labels(Ranking), **asked(prompt), "responses": responses, "ranks": ranks}
    return Draft(Ranking, fields | ({"policies": names} if names else {}), has_system)


def _without_prompt(row: Row, prompt: Any, responses: list[str]) -> list[str]:
    """The responses, without the prompt where all of them are whole texts that begin with it."""
    text = last_text(prompt)
    kind = repeats(text, responses)
    if kind == "one":
        raise RowError(
            "prompt in one text",
            "the prompt begins some of the responses only: write the answers alone in all of them",
        )
    if kind in ("surely", "likely"):
        row.note("prompt cut from whole text")
        return [response.lstrip()[len(text.strip()) :] for response in responses]
    if kind == "maybe":
        row.note("answer begins with the prompt")
    return responses


# ---------------------------------------------------------------------------- one response in a row


def _single(row: Row) -> tuple[str, float | int | None]:
    """The response of a row and its score."""
    row.refuse_more_than_text()
    if not row.has("score"):
        numbers = [name for name in row.columns() if isinstance(row.values[name], int | float)]
        raise RowError(
            "missing field",
            "field 'score' is missing: say which number is meant with --columns score=NAME; the "
            f"row has the numbers {', '.join(numbers) or '(none)'}",
        )  # fmt: skip
    for name in (*PROMPTS, "labeler", *row.systems()):  # the rows of a group have them in common
        row.take(name)
    return row.text("response"), as_number(row.take("score"), "score", texts=row.cells)


def _parse_group(group: Row) -> Draft:
    """The ranking of the responses of several rows."""
    rows = group.parts
    first = rows[0]
    first.refuse_more_than_text()
    prompt = _prompt(first)
    answers, scores, ids = [], [], []
    for row in rows:
        try:
            answer, score = _single(row)
        except RowError as error:
            # The first row gives the group its place, which the report names anyway.
            if row is first:
                raise
            raise RowError(
                error.reason, f"of the rows with this prompt, {row.place}: {error}"
            ) from None
        answers.append(answer)
        # Read in each row, so that no id is reported as left aside.
        scores.append(score)
        ids.append(as_label(row.take("id")))
    if len(rows) < 2:
        raise RowError(
            "only one response", "no other row has this prompt: there is nothing to compare with"
        )
    draft = _ranking(first, prompt, answers, ranks_of(scores), None)
    named = {"id": ids[0]} if ids[0] is not None else {}
    return Draft(draft.kind, draft.fields | named, draft.has_system)
