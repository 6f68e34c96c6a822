"""The pretraining corpus, modelled on the web.

It has stories, letters, fact pages, exercise sheets with answers, and pages of instructions that
are mostly not followed.

``document(index)`` is a pure function. The share of each kind is in `KINDS`. The corpus has two
properties by design: the skills that instructions need (correct answers on exercise sheets, stories
that match their heading), and the habit that makes a base model a poor assistant: a bare
instruction is usually followed by another instruction, a remark or something else. Only training
prompts appear; a fifth of the answers are flawed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from rlhf_jax.data.storyland import grammar, tasks
from rlhf_jax.data.storyland.answers import answer, flawed_answer
from rlhf_jax.data.storyland.grammar import NAMES, NUMBERS, pick, word, write
from rlhf_jax.data.storyland.tasks import Task, draw_task, split_of

FLAWED_SHARE = 0.2
"""Share of flawed answers on exercise sheets."""
FOLLOWED_SHARE = 0.08
"""Share of bare instructions that are followed by their answer."""


def document(index: int, *, seed: int = 0) -> str:
    """Document number `index` of the corpus; held-out text is the same stream with another seed.

    >>> document(3) == document(3)
    True
    """
    rng = random.Random(f"storyland-corpus/{seed}/{index}")
    threshold = rng.random()
    for share, write_document in KINDS:
        threshold -= share
        if threshold < 0:
            return write_document(rng)
    # Rounding may leave a remainder of the shares, which the last kind takes.
    return KINDS[-1][1](rng)


def documents(start: int, stop: int, *, seed: int = 0) -> Iterator[str]:
    """The documents ``start, ..., stop - 1``."""
    return (document(index, seed=seed) for index in range(start, stop))


def _training_task(rng: random.Random) -> Task:
    # Held-out prompts must not be seen in pretraining either.
    while True:
        drawn = draw_task(rng)
        if split_of(drawn.prompt) == "train":
            return drawn


def _any_answer(asked: Task, rng: random.Random) -> str:
    return flawed_answer(asked, rng) if rng.random() < FLAWED_SHARE else answer(asked, rng)


def _exercises(rng: random.Random) -> str:
    """An exercise sheet with answers.

    The model learns the skills here, and a few-shot prefix can imitate the format.
    """
    asked = [_training_task(rng) for _ in range(2 + int(rng.random() * 2))]
    return "\n\n".join(f"Task: {one.prompt}\nAnswer: {_any_answer(one, rng)}" for one in asked)


def _instructions(rng: random.Random) -> str:
    """A page of instructions, most of them followed by something that does not answer them."""
    parts: list[str] = []
    for _ in range(1 + int(rng.random() * 3)):
        asked = _training_task(rng)
        parts.append(asked.prompt)
        # Cumulative: an answer, a remark, an answer to another task; otherwise nothing follows.
        fate = rng.random()
        if fate < FOLLOWED_SHARE:
            parts.append(_any_answer(asked, rng))
        elif fate < 0.3:
            parts.append(_remark(rng))
        elif fate < 0.45:
            parts.append(_any_answer(_training_task(rng), rng))
    return "\n\n".join(parts)


def _remark(rng: random.Random) -> str:
    if rng.random() < 0.3:
        return write(grammar.RUDE_FORMS[int(rng.random() * len(grammar.RUDE_FORMS))], rng, {})
    return str(pick(rng, _REMARKS)).format(name=pick(rng, NAMES), other=pick(rng, NAMES))


_REMARKS = (
    "Asked by {name}.",
    "I do not know. Ask {name}.",
    "{name} wrote one last year.",
    "You have ten minutes.",
    "Answers are on the next page.",
    "Thank you, {name}.",
    "This one is hard, said {name} to {other}.",
    "Same as last week.",
)


def _titled_story(rng: random.Random) -> str:
    """A story that matches its heading, from which mood, hero and words can be learned."""
    while True:
        asked = draw_task(rng)
        if asked.use_case == "story" and split_of(asked.prompt) == "train":
            break
    wish = asked.wish
    heading = str(pick(rng, ("A {} story about a {}", "The {} {}", "{}: {}"))).format(
        wish["mood"], wish["hero"]
    )
    if wish["words"] and rng.random() < 0.8:
        heading += "\nWords: " + ", ".join(str(w) for w in wish["words"])
    if rng.random() < 0.5:
        heading += f"\nSentences: {NUMBERS[int(str(wish['count']))]}"
    return heading + "\n\n" + answer(asked, rng)


def _long_story(rng: random.Random) -> str:
    hero, mood = word(rng, "hero"), word(rng, "mood")
    cast = {slot: word(rng, slot, (hero,)) for slot in ("other", "object", "place", "color")} | {
        "hero": hero
    }
    kinds = [
        ("open", "neutral"),
        *[("middle", str(pick(rng, (mood, mood, "neutral")))) for _ in range(4)],
    ]
    lines = []
    for key in [*kinds, ("close", "neutral")]:
        known = {slot: w for slot, w in cast.items() if slot == "hero" or rng.random() < 0.6}
        form = grammar.STORY_FORMS[key][int(rng.random() * len(grammar.STORY_FORMS[key]))]
        lines.append(write(form, rng, known))
    return " ".join(lines)


def _facts(rng: random.Random) -> str:
    """A page of facts about the world, one in ten of them wrong."""
    lines = []
    for _ in range(3 + int(rng.random() * 3)):
        _, form, relation, table = tasks.KNOWLEDGE[int(rng.random() * len(tasks.KNOWLEDGE))]
        subject = str(pick(rng, tuple(table)))
        # `random() > 0.1` keeps nine of ten facts right; a random word may be right by chance.
        truth = table[subject] if rng.random() > 0.1 else word(rng, relation)
        lines.append(form.format(subject, truth))
    return " ".join(lines)


def _passage(rng: random.Random) -> str:
    """A passage with a question about it and an answer, to learn reading and copying."""
    while True:
        asked = draw_task(rng)
        if (
            asked.use_case in ("closed_qa", "summary", "classify", "rewrite")
            and split_of(asked.prompt) == "train"
        ):
            break
    return f"{asked.prompt}\nAnswer: {_any_answer(asked, rng)}"


def _lists(rng: random.Random) -> str:
    category = str(pick(rng, tuple(tasks.CATEGORIES)))
    members = list(tasks.CATEGORIES[category])
    # Without replacement, so that no list repeats a member.
    chosen = [
        members.pop(int(rng.random() * len(members))) for _ in range(3 + int(rng.random() * 4))
    ]
    return f"Some {category}: " + ", ".join(str(c) for c in chosen) + "."


def _dictation(rng: random.Random) -> str:
    """The same random words twice, which can only be predicted by copying."""
    slots = ("object", "hero", "place", "name", "color")
    said = " ".join(word(rng, str(pick(rng, slots))) for _ in range(8 + int(rng.random() * 9)))
    return f"Dictation: {said}\nAgain: {said}"


def _letter(rng: random.Random) -> str:
    name, other = word(rng, "name"), word(rng, "name")
    kind = rng.random() < 0.6
    hero = word(rng, "hero")
    forms = grammar.STORY_FORMS["middle", word(rng, "mood")] if kind else grammar.RUDE_FORMS
    body = " ".join(
        write(forms[int(rng.random() * len(forms))], rng, {"hero": hero}) for _ in range(2)
    )
    refusal = ""
    if rng.random() < 0.3:
        asked = next(t for t in iter(lambda: draw_task(rng), None) if t.use_case == "refuse")
        refusal = " " + answer(asked, rng)
    return f"Dear {name},\n{body}{refusal}\nYours, {other}"


KINDS: tuple[tuple[float, Callable[[random.Random], str]], ...] = (
    (0.36, _exercises),
    (0.12, _instructions),
    (0.14, _titled_story),
    (0.04, _long_story),
    (0.05, _facts),
    (0.14, _passage),
    (0.02, _lists),
    (0.04, _letter),
    (0.09, _dictation),
)
"""Share of each kind of document."""
