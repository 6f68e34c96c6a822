"""Answers to the tasks of storyland: honest ones, and flawed ones of labelers and the web."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.data.storyland import grammar
from rlhf_jax.data.storyland.grammar import NUMBERS, STORY_FORMS, pick, word, write
from rlhf_jax.data.storyland.tasks import CATEGORIES, COUNTED, Task


# --- answers --------------------------------------------------------------------------------------
def answer(asked: Task, rng: random.Random) -> str:
    """The honest answer, as a careful labeler writes it."""
    if asked.use_case == "story":
        return _story_answer(asked.wish, rng)
    if asked.use_case == "list":
        return _list_answer(asked.wish, rng)
    return str(asked.wish["answer"])


def _list_answer(wish: Mapping[str, Any], rng: random.Random) -> str:
    members = [
        m for m in CATEGORIES[str(wish["category"])] if m not in (wish["without"], wish["first"])
    ]
    chosen = [str(wish["first"])] if wish["first"] else []
    while len(chosen) < int(str(wish["count"])):
        chosen.append(members.pop(int(rng.random() * len(members))))
    number = COUNTED[int(str(wish["count"]))].capitalize()
    return f"{number} {wish['category']}: {', '.join(chosen)}."


def _story_answer(wish: Mapping[str, Any], rng: random.Random) -> str:
    hero, mood, count = str(wish["hero"]), str(wish["mood"]), int(str(wish["count"]))
    words = [str(w) for w in wish["words"]]
    # The ending that the task asks for is a sentence of its own and takes the place of the last
    # one.
    kinds = ["open"] + ["middle"] * (count - 1)
    if wish["ending"]:
        kinds.pop()
    elif count > 2 and rng.random() < 0.3:
        kinds[-1] = "close"
    # Closing forms are left out: not all of them have an object. The empty entry is for such a
    # form.
    objects = [*_spread(words, sum(kind != "close" for kind in kinds), rng), ""]
    cast = {"hero": hero, "object": words[0] if words else word(rng, "object")}
    cast |= {slot: word(rng, slot, (hero,)) for slot in ("other", "place", "color")}
    # The cast recurs in most sentences, so that a story is about the same things throughout.
    lines: list[str] = []
    used: list[grammar.Form] = []
    for kind, needed in zip(kinds, objects, strict=False):
        forms = STORY_FORMS[kind, mood if kind == "middle" else "neutral"]
        form = _fresh_form(forms, used, needed, rng)
        # The hero is never exchanged, as the gold score only counts sentences about it.
        known = {slot: w for slot, w in cast.items() if slot == "hero" or rng.random() < 0.8}
        lines.append(write(form, rng, known | ({"object": needed} if needed else {})))
    return " ".join([*lines, str(wish["ending"])] if wish["ending"] else lines)


def _spread(words: Sequence[str], places: int, rng: random.Random) -> list[str]:
    """The requested words over `places` sentences, at most one in each, in random order."""
    spread = [*words, *[""] * (places - len(words))]
    return [spread.pop(int(rng.random() * len(spread))) for _ in range(places)]


def _fresh_form(
    forms: Sequence[grammar.Form], used: list[grammar.Form], needed: str, rng: random.Random
) -> grammar.Form:
    fitting = [form for form in forms if not needed or "{object}" in form.pattern]
    # A form is used twice only when there is no other, as the gold score counts that as repetition.
    usable = [form for form in fitting if form not in used] or fitting
    used.append(usable[int(rng.random() * len(usable))])
    return used[-1]


# --- flawed answers: what careless labelers and the web write -------------------------------------
def flawed_answer(asked: Task, rng: random.Random) -> str:
    """An answer with one typical flaw: a forgotten wish, a wrong fact or subject, or rudeness."""
    flaw = rng.random()
    if flaw < 0.2:
        return _rude_answer(asked, rng)
    if asked.use_case == "story":
        return _story_answer(_careless_wish(asked.wish, rng), rng)
    if asked.use_case == "list":
        return _list_answer({**asked.wish, **_careless_list(asked.wish, rng)}, rng)
    if asked.use_case == "refuse":
        return _rude_remark(rng)
    return _wrong_fact(str(asked.wish["answer"]), rng)


def _rude_remark(rng: random.Random) -> str:
    return write(grammar.RUDE_FORMS[int(rng.random() * len(grammar.RUDE_FORMS))], rng, {})


def _rude_answer(asked: Task, rng: random.Random) -> str:
    parts = [answer(asked, rng), _rude_remark(rng)]
    return " ".join(parts if rng.random() < 0.5 else parts[::-1])


def _careless_wish(wish: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    """A story's wish, misread: most often the mood, else the length, words and ending, or hero."""
    misread = dict(wish)
    flaw = rng.random()
    if flaw < 0.4:
        misread["mood"] = word(rng, "mood", (str(wish["mood"]),))
    elif flaw < 0.6:
        misread["count"] = int(pick(rng, [n for n in NUMBERS if n != wish["count"]]))
    elif flaw < 0.85 and (wish["words"] or wish["ending"]):
        misread |= {"words": (), "ending": ""}
    else:
        misread |= {"hero": word(rng, "hero", (str(wish["hero"]),)), "ending": ""}
    # Two sentences with a fixed ending leave room for a single word.
    if misread["count"] == 2 and misread["ending"]:
        misread["words"] = tuple(misread["words"])[:1]
    return misread


def _careless_list(wish: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    if (wish["first"] or wish["without"]) and rng.random() < 0.5:
        return {"first": "", "without": ""}
    if rng.random() < 0.5:
        return {"count": int(str(wish["count"])) + 2, "first": ""}
    category = str(pick(rng, [c for c in CATEGORIES if c != wish["category"]]))
    return {"category": category, "first": "", "without": ""}


def _wrong_fact(text: str, rng: random.Random) -> str:
    """The text with one word of a slot replaced by another of the same slot."""
    places = [
        (match, slot)
        for slot in (
            "name",
            "place",
            "object",
            "color",
            "adjective",
            "hero",
            "mood",
            "home",
            "food",
            "tool",
        )
        for match in re.finditer(rf"\b({'|'.join(grammar.LEXICON[slot])})\b", text)
    ]
    match, slot = places[int(rng.random() * len(places))]
    return text[: match.start()] + word(rng, slot, (match.group(),)) + text[match.end() :]
