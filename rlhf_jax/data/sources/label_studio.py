"""Label Studio: the JSON export of tasks with people's annotations.

A task is ``{id, data: {prompt, ..}, annotations: [{completed_by, was_cancelled, result: [..]}]}``.
The types of results are

- `pairwise` (``{selected: left}``) and `choices`, which prefer one of the task's answers,
- `ranker` (``{ranker: {rank: [ids]}}``), which orders the items of one of the task's lists, best
  first; several buckets have no order of their own, so ``--columns "buckets=good>bad"`` gives it,
- `rating`, which rates the single response of its task; tasks with the same prompt are compared,
- `textarea`, which is an answer to the prompt.

The export does not say which columns of the data are the left and the right text: they have one of
the names in `PAIRS`, the names of the tags, or those of ``--columns left=NAME,right=NAME``.
Cancelled annotations are left out, and so are predictions, which are not people's answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_jax.data.schema import RowError
from rlhf_jax.data.sources.annotated import ANSWERS, Annotated, Given, choice
from rlhf_jax.data.sources.messages import label_of
from rlhf_jax.data.sources.row import Row, as_label

PAIRS = (
    ("answer1", "answer2"),
    ("answer_1", "answer_2"),
    ("answer_a", "answer_b"),
    ("response1", "response2"),
    ("response_1", "response_2"),
    ("response_a", "response_b"),
    ("completion1", "completion2"),
    ("text1", "text2"),
    ("option1", "option2"),
    ("output1", "output2"),
    ("left", "right"),
)
ITEM_TEXTS = ("body", "text", "content", "answer", "response")
UNSORTED = "_"
"""The name that Label Studio gives to the list of items that were not moved to a bucket."""


def is_task(row: Row) -> bool:
    """Whether a row is a task of the JSON export."""
    return isinstance(row.values.get("data"), dict) and isinstance(
        row.values.get("annotations"), list
    )


def extract(row: Row, columns: Mapping[str, str]) -> Annotated:
    """The data and annotations of a task.

    Raises:
      RowError: a choice, an order or a pair is ambiguous.
    """
    data = row.inside("data", row.take("data"))
    given: list[Given] = []
    for annotation in row.take("annotations"):
        person = label_of(annotation.get("completed_by"))
        submitted = not annotation.get("was_cancelled")
        results = annotation.get("result") or []
        given += [_given(data, columns, result, person, submitted) for result in results]
        if not results and not submitted:
            # A cancelled annotation without results still shows that somebody looked at the task.
            given.append(Given("", "other", None, person, False))
    if given and all(not answer.submitted for answer in given):
        raise RowError("not submitted", "every annotation of the task is cancelled or chooses none")
    row.take("id")
    return Annotated(data, as_label(row.values.get("id")), tuple(_without_empty(given)))


def _without_empty(given: list[Given]) -> list[Given]:
    return [answer for answer in given if answer.question]


def _given(
    data: Row, columns: Mapping[str, str], result: Any, person: str | None, submitted: bool
) -> Given:
    kind, value = result.get("type"), result.get("value") or {}
    question = str(result.get("from_name") or kind)
    if kind == "pairwise":
        order = _pairwise(data, columns, result, value.get("selected")) if submitted else None
        # A pair in which no side was selected counts as not submitted.
        return Given(question, "order", order, person, submitted and order is not None)
    if kind == "ranker":
        return Given(
            question,
            "order",
            _ranked(data, columns, value.get("ranker")) if submitted else None,
            person,
            submitted,
        )
    if kind == "rating" and isinstance(value.get("rating"), int | float):
        return Given(question, "number", value["rating"], person, submitted)
    if kind == "choices":
        return _chosen(data, columns, question, value.get("choices"), person, submitted)
    if kind == "textarea":
        texts = value.get("text")
        texts = [texts] if isinstance(texts, str) else texts or []
        if len(texts) > 1 and columns.get("response") == question:
            raise RowError(
                "more than one turn", f"{question!r} has {len(texts)} texts: one answer to a prompt"
            )
        # A text area beside a choice is usually a remark, so its name must be that of an answer.
        name = columns.get("response", "") == question or question in ANSWERS
        return Given(
            question,
            "text" if name and len(texts) == 1 else "other",
            texts[0] if texts else None,
            person,
            submitted,
        )
    return Given(question, "other", value, person, submitted)


def _pairwise(
    data: Row, columns: Mapping[str, str], result: Any, selected: Any
) -> list[tuple[Any, int]] | None:
    if selected not in ("left", "right"):
        return None
    left, right = _sides(data, columns, result.get("to_name"))
    ranks = (1, 2) if selected == "left" else (2, 1)
    return [(data.take(left), ranks[0]), (data.take(right), ranks[1])]


def _sides(data: Row, columns: Mapping[str, str], to_name: Any) -> tuple[str, str]:
    """The columns of the left and the right text."""
    tags = (
        [name.strip() for name in to_name.split(",")]
        if isinstance(to_name, str)
        else list(to_name or [])
    )
    named = (columns.get("left", ""), columns.get("right", ""))
    found = [pair for pair in PAIRS if all(data.has(name) for name in pair)]
    # The user's names first, then those of the tags, then a pair of usual names if there is only
    # one.
    for pair in (named, tuple(tags), found[0] if len(found) == 1 else ()):
        if len(pair) == 2 and all(data.has(name) for name in pair):
            return pair[0], pair[1]
    raise RowError(
        "unknown answer",
        f"which of {', '.join(sorted(data.columns()))} are the left and the right text is not in "
        "the export: say it with --columns left=NAME,right=NAME",
    )


def _ranked(data: Row, columns: Mapping[str, str], value: Any) -> list[tuple[Any, int | None]]:
    """The items of the task with their ranks; items in no bucket are not ranked."""
    buckets = value if isinstance(value, dict) else {"rank": value}
    names = [name for name in buckets if name != UNSORTED]
    if len(names) > 1:
        order = [name.strip() for name in columns.get("buckets", "").split(">")]
        if sorted(order) != sorted(names):
            raise RowError(
                "unknown answer",
                f"the items lie in the buckets {', '.join(names)}, and which is better is not in "
                f'the export: say it with --columns "buckets={">".join(names)}", the best first',
            )
        names = order
    # Ids that are numbers in the task may come back as texts in the ranking.
    ids = [str(item) for name in names for item in buckets[name] or []]
    unsorted_ids = [str(item) for item in buckets.get(UNSORTED) or []]
    items = _items(data, columns, [*ids, *unsorted_ids])
    # The list of unsorted items is the ranking itself where there is no bucket.
    ids = ids if names else unsorted_ids
    return [(text, ids.index(name) + 1 if name in ids else None) for name, text in items.items()]


def _items(data: Row, columns: Mapping[str, str], ids: list[str]) -> dict[str, Any]:
    """The texts of the items of a task, by their ids."""
    found = [
        name
        for name in data.columns()
        if isinstance(data.values[name], list)
        and all(isinstance(item, dict) and "id" in item for item in data.values[name])
        and set(ids) <= {str(item["id"]) for item in data.values[name]}
    ]
    name = columns.get("items", found[0] if len(found) == 1 else "")
    if name not in found:
        raise RowError(
            "unknown answer",
            f"no list of the task holds the ranked ids {', '.join(ids)[:60]}: it has "
            f"{', '.join(sorted(data.columns()))}",
        )
    items = data.take(name)
    keys = [key for key in ITEM_TEXTS if all(item.get(key) is not None for item in items)]
    if len(keys) != 1:
        raise RowError(
            "unknown answer",
            f"the items of {name!r} must hold one of {', '.join(ITEM_TEXTS)}, as a text",
        )
    for item in items:
        for key in set(item) - {"id", keys[0]}:
            data.leave_aside(f"{name}[].{key}")
    found_ids = [str(item["id"]) for item in items]
    if len(set(found_ids)) < len(found_ids):
        raise RowError("unknown answer", f"an id of the items of {name!r} is given twice")
    return dict(zip(found_ids, (item[keys[0]] for item in items), strict=True))


def _chosen(
    data: Row,
    columns: Mapping[str, str],
    question: str,
    choices: Any,
    person: str | None,
    submitted: bool,
) -> Given:
    chosen = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
    order = choice(data, chosen, columns)
    return Given(
        question, "other" if order is None else "order", order or choices, person, submitted
    )
