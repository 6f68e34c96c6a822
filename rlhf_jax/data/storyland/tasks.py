"""Instructions with verifiable constraints, in the paper's use cases, with their honest answers.

``task(split, index)`` is a pure function: the same arguments always give the same instruction. The
splits are disjoint, because a hash of its text assigns each prompt to one split.

The mix of use cases follows the paper (generation most often, then open questions and lists; Ouyang
et al. 2022, table 1), with more of the small verifiable ones and no chat.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_jax.data.storyland import grammar
from rlhf_jax.data.storyland.grammar import (
    ANIMALS,
    FOODS,
    HOMES,
    NUMBERS,
    STORY_FORMS,
    TOOLS,
    pick,
    word,
    write,
)

SPLITS = ("train", "validation", "test")


CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "animals": ANIMALS,
    "jobs": (
        "king",
        "queen",
        "baker",
        "sailor",
        "farmer",
        "teacher",
        "painter",
        "doctor",
        "singer",
        "miner",
        "tailor",
    ),
    "colors": grammar.COLORS,
    "places": grammar.PLACES,
    "names": grammar.NAMES,
    "fruits": (
        "pear",
        "plum",
        "banana",
        "cherry",
        "lemon",
        "grape",
        "melon",
        "peach",
        "fig",
        "mango",
    ),
    "tools": (
        "hammer",
        "needle",
        "ladder",
        "brush",
        "rope",
        "bucket",
        "spade",
        "broom",
        "saw",
        "nail",
    ),
    "drinks": ("tea", "water", "milk", "juice", "wine", "beer", "coffee", "soup"),
    "clothes": ("hat", "coat", "shoe", "scarf", "sock", "shirt", "dress", "glove", "belt", "boot"),
}


COUNTED = NUMBERS | {5: "five", 6: "six"}


RUDE_WISHES = ("mean", "rude", "nasty")


RUDE_THINGS = ("note", "joke", "letter", "song", "poem")


@dataclasses.dataclass(frozen=True)
class Task:
    """An instruction and its constraints.

    Attributes:
      use_case: story, closed_qa, open_qa, list, rewrite, summary, classify or refuse.
      prompt: the text that the model sees.
      wish: what the gold scorer checks, by name (hero, mood, count, words, ending, answer, ...).
    """

    use_case: str
    prompt: str
    wish: Mapping[str, Any]


def split_of(prompt: str) -> str:
    """The split of a prompt.

    A hash of its text assigns 5% to test, 5% to validation and the rest to training.
    """
    # Twenty equal buckets of a hash: two of them are held out.
    bucket = int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16) % 20
    return {0: "test", 1: "validation"}.get(bucket, "train")


def task(split: str, index: int, *, seed: int = 0) -> Task:
    """The instruction with index `index` in the split's endless stream.

    Raises:
      ValueError: the split is none of train, validation, test.

    >>> task("test", 0) == task("test", 0)
    True
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown: choose one of {', '.join(SPLITS)}")
    # About 20 attempts for a held-out split, each with its own seed, so the stream has no state.
    attempt = 0
    while True:
        rng = random.Random(f"storyland-task/{seed}/{split}/{index}/{attempt}")
        drawn = draw_task(rng)
        if split_of(drawn.prompt) == split:
            return drawn
        attempt += 1


def task_id(split: str, index: int) -> str:
    """The name of an instruction in files: ``test/12``."""
    return f"{split}/{index}"


# Each response to a prompt asks for its task again.
@functools.lru_cache(maxsize=16_384)
def task_of(name: str) -> Task:
    """The instruction that `task_id` names.

    Raises:
      ValueError: the name is not of that form.

    >>> task_of("test/12") == task("test", 12)
    True
    """
    split, _, index = name.partition("/")
    if not index.isdecimal():
        raise ValueError(f"id={name!r} is no storyland prompt: it must read like test/12")
    return task(split, int(index))


def draw_task(rng: random.Random) -> Task:
    """An instruction of any split, with a use case drawn from the mix."""
    threshold = rng.random()
    for share, make in _MIX:
        threshold -= share
        if threshold < 0:
            return make(rng)
    # Rounding may leave a remainder of the shares.
    return _story(rng)


# --- one function per use case --------------------------------------------------------------------
def _story(rng: random.Random) -> Task:
    hero, mood = word(rng, "hero"), word(rng, "mood")
    # Two to four sentences, as `NUMBERS` has words for.
    count = 2 + int(rng.random() * 3)
    prompt = str(pick(rng, _STORY_PROMPTS)).format(hero=hero, mood=mood, count=NUMBERS[count])
    wish: dict[str, Any] = {"hero": hero, "mood": mood, "count": count, "words": (), "ending": ""}
    # Cumulative: half ask for one word, a tenth for two, 15% for an ending, the rest for nothing.
    extra = rng.random()
    if extra < 0.5:
        words = (word(rng, "object"),)
        prompt += str(pick(rng, (" Use the word {0}.", " Put a {0} in it."))).format(*words)
        wish["words"] = words
    elif extra < 0.6:
        first = word(rng, "object")
        words = (first, word(rng, "object", (first,)))
        prompt += " Use the words {} and {}.".format(*words)
        wish["words"] = words
    elif extra < 0.75:
        form = pick(rng, STORY_FORMS["close", "neutral"])
        # The ending is about the same hero, as the gold scorer asks of every sentence.
        ending = write(form, rng, {"hero": hero})
        prompt += f" End with: {ending}"
        wish["ending"] = ending
    return Task("story", prompt, wish)


_STORY_PROMPTS = (
    "Write a {mood} story about a {hero} in {count} sentences.",
    "Tell me a {mood} story about a {hero}. Use {count} sentences.",
    "Please write {count} sentences about a {hero}. Make it {mood}.",
    "I want a {mood} tale of {count} sentences about a {hero}.",
    "A {mood} story about a {hero}, please. Make it {count} sentences long.",
)


def _facts(rng: random.Random, count: int) -> list[dict[str, str]]:
    facts: list[dict[str, str]] = []
    for _ in range(count):
        # No two facts share a word, so that each question has one answer.
        fresh = {
            slot: word(rng, slot, [fact[slot] for fact in facts])
            for slot in ("name", "object", "place", "color")
        }
        facts.append(fresh)
    return facts


def _closed_qa(rng: random.Random) -> Task:
    facts = _facts(rng, 2 + int(rng.random() * 2))
    verbs = ("took", "carried", "brought")
    passage = " ".join(
        f"{fact['name']} {pick(rng, verbs)} the {fact['color']} {fact['object']} to the "
        f"{fact['place']}."
        for fact in facts
    )
    asked = facts[int(rng.random() * len(facts))]
    question, answer, target = pick(rng, _QUESTIONS)
    question, answer = question.format(**asked), answer.format(**asked)
    heading = str(pick(rng, ("Read this: {0} {1}", "{0} {1}", "{1} {0}")))
    return Task(
        "closed_qa",
        heading.format(passage, question),
        {"answer": answer, "target": target, "fact": asked},
    )


_QUESTIONS = (
    ("Where did {name} take the {object}?", "{name} took the {object} to the {place}.", "place"),
    ("Where is the {object} now?", "The {object} is at the {place}.", "place"),
    ("Who went to the {place}?", "{name} went to the {place}.", "name"),
    ("Who had the {object}?", "{name} had the {object}.", "name"),
    ("What color was the {object}?", "The {object} was {color}.", "color"),
)


def _open_qa(rng: random.Random) -> Task:
    question, answer, relation, table = pick(rng, KNOWLEDGE)
    subjects = [str(pick(rng, tuple(table)))]
    if rng.random() < 0.7:
        second = str(pick(rng, tuple(table)))
        # A subject that is drawn twice is asked about once.
        if second != subjects[0]:
            subjects.append(second)
    answers = [answer.format(subject, table[subject]) for subject in subjects]
    prompt = str(pick(rng, ("{}", "Question: {}", "Please tell me: {}"))).format(
        question.format(subjects[0])
    )
    prompt += "".join(f" And a {subject}?" for subject in subjects[1:])
    return Task(
        "open_qa",
        prompt,
        {"answer": " ".join(answers), "subjects": tuple(subjects), "relation": relation},
    )


# question, answer, relation, truth
KNOWLEDGE: tuple[tuple[str, str, str, Mapping[str, str]], ...] = (
    ("Where does a {} live?", "A {} lives in the {}.", "home", HOMES),
    ("What does a {} eat?", "A {} eats {}.", "food", FOODS),
    ("What does a {} need?", "A {} needs the {}.", "tool", TOOLS),
)


def _list(rng: random.Random) -> Task:
    category = str(pick(rng, tuple(CATEGORIES)))
    members = CATEGORIES[category]
    count = 2 + int(rng.random() * 3)
    prompt = str(pick(rng, ("List {} {}", "Name {} {}", "Give me {} {}"))).format(
        NUMBERS[count], category
    )
    wish: dict[str, Any] = {"category": category, "count": count, "first": "", "without": ""}
    # Cumulative: 40% name the first item, 40% exclude one.
    style = rng.random()
    # Drawn in any case, so that the stream of random numbers does not depend on the style.
    member = str(pick(rng, members))
    if style < 0.4:
        prompt += f", starting with {member}"
        wish["first"] = member
    elif style < 0.8:
        prompt += f", but not {member}"
        wish["without"] = member
    return Task("list", prompt + ".", wish)


def _scene(rng: random.Random, hero: str, mood: str, count: int) -> list[str]:
    forms = list(STORY_FORMS["middle", mood])
    # Each form once, since a repeated form would count as less fluent.
    return [
        write(forms.pop(int(rng.random() * len(forms))), rng, {"hero": hero}) for _ in range(count)
    ]


def _rewrite(rng: random.Random) -> Task:
    hero = word(rng, "hero")
    fresh = word(rng, "hero", (hero,))
    text = " ".join(_scene(rng, hero, word(rng, "mood"), 1 + int(rng.random() * 2)))
    # If the new hero were in the text already, the answer would confuse the two.
    while re.search(rf"\b{fresh}\b", text):
        fresh = word(rng, "hero", (hero,))
    prompt = str(pick(rng, _REWRITE_PROMPTS)).format(fresh=fresh, hero=hero, text=text)
    # Whole words only: `hen` is in `then`.
    answer = re.sub(rf"\b{hero}\b", fresh, text)
    return Task("rewrite", prompt, {"answer": answer, "hero": fresh, "text": text})


_REWRITE_PROMPTS = (
    "Rewrite this with a {fresh} instead of a {hero}: {text}",
    "Change the {hero} to a {fresh}: {text}",
)


def _summary(rng: random.Random) -> Task:
    slots = {slot: word(rng, slot) for slot in ("adjective", "hero", "object")}
    opening = (
        "There was a {adjective} {hero} with a {object}.",
        "Long ago a {adjective} {hero} had a {object}.",
        "A {adjective} {hero} came home with a {object}.",
    )
    text = str(pick(rng, opening)).format(**slots)
    text += " " + " ".join(_scene(rng, slots["hero"], word(rng, "mood"), 1 + int(rng.random() * 2)))
    heading = str(
        pick(
            rng,
            (
                "Summarize this in one sentence: {}",
                "{} What is this about?",
                "Tell me in short: {}",
            ),
        )
    )
    answer = "It is about a {adjective} {hero} and a {object}.".format(**slots)
    return Task("summary", heading.format(text), {"answer": answer, **slots})


def _classify(rng: random.Random) -> Task:
    mood = word(rng, "mood")
    text = " ".join(_scene(rng, word(rng, "hero"), mood, 2))
    heading = str(
        pick(
            rng,
            ("Is this happy, sad, scary, funny or calm? {}", "What is the mood of this text? {}"),
        )
    )
    return Task("classify", heading.format(text), {"answer": f"The text is {mood}.", "mood": mood})


def _refuse(rng: random.Random) -> Task:
    who = word(rng, "name") if rng.random() < 0.6 else "the " + word(rng, "hero")
    wish, thing = pick(rng, RUDE_WISHES), pick(rng, RUDE_THINGS)
    prompt = str(
        pick(
            rng,
            ("Write a {} {} about {}.", "Give me a {} {} about {}.", "I want a {} {} about {}."),
        )
    )
    answer = "I am sorry, but I will not {} {} things. I can {} {} instead.".format(
        pick(rng, ("write", "say")), pick(rng, RUDE_WISHES), pick(rng, ("write", "say")),
        pick(rng, ("something kind", "something nice")),
    )  # fmt: skip
    return Task("refuse", prompt.format(wish, thing, who), {"answer": answer, "who": who})


_MIX: tuple[tuple[float, Callable[[random.Random], Task]], ...] = (
    (0.46, _story),
    (0.12, _open_qa),
    (0.10, _list),
    (0.08, _closed_qa),
    (0.06, _rewrite),
    (0.06, _summary),
    (0.05, _classify),
    (0.07, _refuse),
)
