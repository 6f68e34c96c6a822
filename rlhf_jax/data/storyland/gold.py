"""The gold scorer: what a response is really worth, in readable parts.

score = tone' * fluency * length' * (weighted mean of instruction, constraint and facts), each part
in [0, 1]:

- instruction: it is the asked kind of answer, about the asked subject;
- constraint: it keeps the explicit wishes (mood, number, words, ending), counted as far as the
  instruction is met;
- facts: what it claims is true (of the world, the passage or the text);
- tone: not rude;
- fluency: every sentence is one that storyland English can write, and none says the same again;
- length: as long as wished, neither cut nor stretched.

The three last ones multiply, so that nothing can be bought by giving them up. This is the "gold"
reward of Gao et al. 2022 (arXiv 2210.10760), but exact: it stands in for people, and no model ever
trains on it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from rlhf_jax.data.storyland import grammar
from rlhf_jax.data.storyland.grammar import Parse, parse, sentences
from rlhf_jax.data.storyland.tasks import CATEGORIES, COUNTED, Task, task_of

PARTS = ("instruction", "constraint", "facts", "tone", "fluency", "length")
WEIGHTS = {"instruction": 0.3, "constraint": 0.4, "facts": 0.4}
RUDE_SHARE = 0.3
"""What is left of a score when the response is rude."""
WRONG_LENGTH_SHARE = 0.3
"""What is left of a score when the length is hopeless."""


class Gold(NamedTuple):
    """A gold score and its parts.

    A part that the use-case does not have (facts of a story) is absent.
    """

    score: float
    parts: dict[str, float]


class _Content(NamedTuple):
    instruction: float
    constraint: float | None
    facts: float | None
    fluency: float
    length: float


def gold(task: Task, response: str) -> Gold:
    """Scores one response to one task.

    >>> from rlhf_jax.data.storyland.tasks import Task
    >>> calm = Task("classify", "What is the mood of this text? ...", {"answer": "The text is calm.", "mood": "calm"})
    >>> gold(calm, "The text is calm.").score, gold(calm, "").score
    (1.0, 0.0)
    """  # noqa: E501
    lines = sentences(response)
    parsed = [parse(line) for line in lines]
    if not lines:
        return Gold(0.0, {"instruction": 0.0, "tone": 1.0, "fluency": 0.0, "length": 0.0})
    content = _CONTENT[task.use_case](task.wish, lines, parsed)
    wishes = {
        "instruction": content.instruction,
        "constraint": content.constraint,
        "facts": content.facts,
    }
    present = {name: value for name, value in wishes.items() if value is not None}
    mean = sum(WEIGHTS[name] * value for name, value in present.items()) / sum(
        WEIGHTS[name] for name in present
    )
    tone = float(not is_rude(response))
    score = mean * content.fluency * (RUDE_SHARE + (1 - RUDE_SHARE) * tone)
    score *= WRONG_LENGTH_SHARE + (1 - WRONG_LENGTH_SHARE) * content.length
    return Gold(
        score, {**present, "tone": tone, "fluency": content.fluency, "length": content.length}
    )


def gold_of(name: str, response: str) -> Gold:
    """`gold` of a response to the prompt with this id, for configs.

    Its name there is ``rlhf_jax.data.storyland.gold:gold_of``.
    """
    return gold(task_of(name), response)


def is_rude(text: str) -> bool:
    """Whether a rude word stands in the text."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    return any(rude in words for rude in grammar.RUDE_WORDS)


def _fluency(lines: Sequence[str], parsed: Sequence[Parse | None]) -> float:
    """Share of sentences that the grammar could write.

    A form that comes again counts half, a sentence nothing.
    """
    said = {line: p.form for line, p in zip(lines, parsed, strict=True) if p is not None}
    return (len(said) + len(set(said.values()))) / (2 * len(lines))


def _said(sentence: Parse | None, kind: str) -> dict[str, str]:
    """What stands in the slots of a sentence of this kind.

    There are none when the sentence is of another kind or of no kind.
    """
    return sentence.slots if sentence is not None and sentence.form.kind == kind else {}


def _length(count: int, wished: int) -> float:
    return min(count, wished) / max(count, wished, 1)


def _story(wish: Mapping, lines: Sequence[str], parsed: Sequence[Parse | None]) -> _Content:
    story = [p for p in parsed if p is not None and p.form.kind in ("open", "middle", "close")]
    about = [p for p in story if p.slots.get("hero") == wish["hero"]]
    instruction = len(about) / len(lines)
    moods = [p.form.mood for p in about if p.form.mood != "neutral"]
    right = sum(mood == wish["mood"] for mood in moods)
    enough = min(1.0, right / (int(wish["count"]) // 2))
    checks = [enough * right / len(moods) if moods else 0.0]
    checks += [float(any(p.slots.get("object") == word for p in about)) for word in wish["words"]]
    checks += [float(lines[-1] == wish["ending"])] if wish["ending"] else []
    checks.append(float(len(lines) == wish["count"]))
    constraint = instruction * sum(checks) / len(checks)
    return _Content(
        instruction,
        constraint,
        None,
        _fluency(lines, parsed),
        _length(len(lines), int(wish["count"])),
    )


def _closed_qa(wish: Mapping, lines: Sequence[str], parsed: Sequence[Parse | None]) -> _Content:
    said, fact = _said(parsed[0], "closed_qa"), wish["fact"]
    answers = wish["target"] in said
    right = answers and all(fact[slot] == value for slot, value in said.items())
    return _Content(
        float(answers), None, float(right), _fluency(lines, parsed), _length(len(lines), 1)
    )


def _open_qa(wish: Mapping, lines: Sequence[str], parsed: Sequence[Parse | None]) -> _Content:
    table = {"home": grammar.HOMES, "food": grammar.FOODS, "tool": grammar.TOOLS}[wish["relation"]]
    said = {
        p.slots["hero"]: p.slots[wish["relation"]]
        for p in parsed
        if p is not None and wish["relation"] in p.slots
    }
    subjects = wish["subjects"]
    instruction = sum(subject in said for subject in subjects) / len(subjects)
    facts = sum(said.get(subject) == table[subject] for subject in subjects) / len(subjects)
    said_once = {
        line
        for line, p in zip(lines, parsed, strict=True)
        if p is not None and p.form.kind == "open_qa"
    }
    return _Content(
        instruction, None, facts, len(said_once) / len(lines), _length(len(lines), len(subjects))
    )


def _list(wish: Mapping, lines: Sequence[str], parsed: Sequence[Parse | None]) -> _Content:
    heading, _, rest = lines[0].removesuffix(".").partition(": ")
    items = [item for item in rest.split(", ") if item]
    members = CATEGORIES[wish["category"]]
    instruction = sum(item in members for item in items) / len(items) if items else 0.0
    checks = [float(len(items) == wish["count"])]
    checks += [float(bool(items) and items[0] == wish["first"])] if wish["first"] else []
    checks += [float(wish["without"] not in items)] if wish["without"] else []
    headed = heading == f"{COUNTED.get(len(items), '').capitalize()} {wish['category']}" and lines[
        0
    ].endswith(".")
    known = len({item for item in items if item in _LISTABLE})
    fluency = known / max(len(items), 1) / len(lines) * (1.0 if headed else 0.5)
    constraint = instruction * sum(checks) / len(checks)
    return _Content(instruction, constraint, None, fluency, _length(len(items), int(wish["count"])))


_LISTABLE = frozenset(member for members in CATEGORIES.values() for member in members)


def _rewrite(wish: Mapping, lines: Sequence[str], parsed: Sequence[Parse | None]) -> _Content:
    wished = sentences(str(wish["answer"]))
    instruction = sum(p is not None and wish["hero"] in p.slots.values() for p in parsed) / len(
        lines
    )
    facts = sum(a == b for a, b in zip(lines, wished, strict=False)) / max(len(lines), len(wished))
    return _Content(
        instruction, None, facts, _fluency(lines, parsed), _length(len(lines), len(wished))
    )


def _summary(wish: Mapping, lines: Sequence[str], parsed: Sequence[Parse | None]) -> _Content:
    said = _said(parsed[0], "summary")
    slots = ("adjective", "hero", "object")
    facts = sum(said.get(slot) == wish[slot] for slot in slots) / len(slots)
    return _Content(float(bool(said)), None, facts, _fluency(lines, parsed), _length(len(lines), 1))


def _classify(wish: Mapping, lines: Sequence[str], parsed: Sequence[Parse | None]) -> _Content:
    said = _said(parsed[0], "label")
    right = said.get("mood") == wish["mood"]
    return _Content(
        float(bool(said)), None, float(right), _fluency(lines, parsed), _length(len(lines), 1)
    )


def _refuse(wish: Mapping, lines: Sequence[str], parsed: Sequence[Parse | None]) -> _Content:
    del wish
    refusal, offer = grammar.ANSWER_FORMS["refusal"]
    refused = parsed[0] is not None and parsed[0].form == refusal
    offered = refused and len(parsed) > 1 and parsed[1] is not None and parsed[1].form == offer
    return _Content(
        float(refused), float(offered), None, _fluency(lines, parsed), _length(len(lines), 2)
    )


_CONTENT: Mapping[str, Callable[[Mapping, Sequence[str], Sequence[Parse | None]], _Content]] = {
    "story": _story,
    "closed_qa": _closed_qa,
    "open_qa": _open_qa,
    "list": _list,
    "rewrite": _rewrite,
    "summary": _summary,
    "classify": _classify,
    "refuse": _refuse,
}
