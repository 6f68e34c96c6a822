"""Instructions with checkable wishes, in the use-cases of the paper, and the honest answer to each.

``task(split, index)`` is a pure function: the same arguments give the same instruction for ever, and the splits
are disjoint because each prompt belongs to the split that a hash of its text names.

The mix of use-cases follows the paper's shape (generation most, then open questions and lists; Ouyang et al. 2022,
table 1), with more of the checkable small ones and no chat.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_jax.data.storyland import grammar
from rlhf_jax.data.storyland.grammar import ANIMALS, FOODS, HOMES, NUMBERS, STORY_FORMS, TOOLS, pick, word, write

SPLITS = ("train", "validation", "test")

CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "animals": ANIMALS,
    "jobs": ("king", "queen", "baker", "sailor", "farmer", "teacher", "painter", "doctor", "singer", "miner", "tailor"),
    "colors": grammar.COLORS,
    "places": grammar.PLACES,
    "names": grammar.NAMES,
    "fruits": ("pear", "plum", "banana", "cherry", "lemon", "grape", "melon", "peach", "fig", "mango"),
    "tools": ("hammer", "needle", "ladder", "brush", "rope", "bucket", "spade", "broom", "saw", "nail"),
    "drinks": ("tea", "water", "milk", "juice", "wine", "beer", "coffee", "soup"),
    "clothes": ("hat", "coat", "shoe", "scarf", "sock", "shirt", "dress", "glove", "belt", "boot"),
}
COUNTED = NUMBERS | {5: "five", 6: "six"}
RUDE_WISHES = ("mean", "rude", "nasty")
RUDE_THINGS = ("note", "joke", "letter", "song", "poem")


@dataclasses.dataclass(frozen=True)
class Task:
    """An instruction and what it wishes for.

    Attributes:
      use_case: story, closed_qa, open_qa, list, rewrite, summary, classify or refuse.
      prompt: the text the model sees.
      wish: what the gold scorer checks, by name (hero, mood, count, words, ending, answer, ...).
    """

    use_case: str
    prompt: str
    wish: Mapping[str, Any]


def split_of(prompt: str) -> str:
    """The split a prompt belongs to: 5% test, 5% validation, the rest training, by a hash of its text."""
    bucket = int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16) % 20
    return {0: "test", 1: "validation"}.get(bucket, "train")


def task(split: str, index: int, *, seed: int = 0) -> Task:
    """The instruction at place `index` of the split's endless stream.

    Raises:
      ValueError: the split is none of train, validation, test.

    >>> task("test", 0) == task("test", 0)
    True
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown: choose one of {', '.join(SPLITS)}")
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
    """An instruction of a use-case drawn by the mix, from any split."""
    threshold = rng.random()
    for share, make in _MIX:
        threshold -= share
        if threshold < 0:
            return make(rng)
    return _story(rng)


# --- one function a use-case -----------------------------------------------------------------------------------------


def _story(rng: random.Random) -> Task:
    hero, mood = word(rng, "hero"), word(rng, "mood")
    count = 2 + int(rng.random() * 3)
    prompt = str(pick(rng, _STORY_PROMPTS)).format(hero=hero, mood=mood, count=NUMBERS[count])
    wish: dict[str, Any] = {"hero": hero, "mood": mood, "count": count, "words": (), "ending": ""}
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
        fresh = {slot: word(rng, slot, [fact[slot] for fact in facts]) for slot in ("name", "object", "place", "color")}
        facts.append(fresh)
    return facts


def _closed_qa(rng: random.Random) -> Task:
    facts = _facts(rng, 2 + int(rng.random() * 2))
    verbs = ("took", "carried", "brought")
    passage = " ".join(
        f"{fact['name']} {pick(rng, verbs)} the {fact['color']} {fact['object']} to the {fact['place']}."
        for fact in facts
    )
    asked = facts[int(rng.random() * len(facts))]
    question, answer, target = pick(rng, _QUESTIONS)
    question, answer = question.format(**asked), answer.format(**asked)
    heading = str(pick(rng, ("Read this: {0} {1}", "{0} {1}", "{1} {0}")))
    return Task("closed_qa", heading.format(passage, question), {"answer": answer, "target": target, "fact": asked})


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
        if second != subjects[0]:
            subjects.append(second)
    answers = [answer.format(subject, table[subject]) for subject in subjects]
    prompt = str(pick(rng, ("{}", "Question: {}", "Please tell me: {}"))).format(question.format(subjects[0]))
    prompt += "".join(f" And a {subject}?" for subject in subjects[1:])
    return Task("open_qa", prompt, {"answer": " ".join(answers), "subjects": tuple(subjects), "relation": relation})


KNOWLEDGE: tuple[tuple[str, str, str, Mapping[str, str]], ...] = (  # question, answer, relation, truth
    ("Where does a {} live?", "A {} lives in the {}.", "home", HOMES),
    ("What does a {} eat?", "A {} eats {}.", "food", FOODS),
    ("What does a {} need?", "A {} needs the {}.", "tool", TOOLS),
)


def _list(rng: random.Random) -> Task:
    category = str(pick(rng, tuple(CATEGORIES)))
    members = CATEGORIES[category]
    count = 2 + int(rng.random() * 3)
    prompt = str(pick(rng, ("List {} {}", "Name {} {}", "Give me {} {}"))).format(NUMBERS[count], category)
    wish: dict[str, Any] = {"category": category, "count": count, "first": "", "without": ""}
    style = rng.random()
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
    return [write(forms.pop(int(rng.random() * len(forms))), rng, {"hero": hero}) for _ in range(count)]


def _rewrite(rng: random.Random) -> Task:
    hero = word(rng, "hero")
    fresh = word(rng, "hero", (hero,))
    text = " ".join(_scene(rng, hero, word(rng, "mood"), 1 + int(rng.random() * 2)))
    while re.search(rf"\b{fresh}\b", text):
        fresh = word(rng, "hero", (hero,))
    prompt = str(pick(rng, _REWRITE_PROMPTS)).format(fresh=fresh, hero=hero, text=text)
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
    heading = str(pick(rng, ("Summarize this in one sentence: {}", "{} What is this about?", "Tell me in short: {}")))
    answer = "It is about a {adjective} {hero} and a {object}.".format(**slots)
    return Task("summary", heading.format(text), {"answer": answer, **slots})


def _classify(rng: random.Random) -> Task:
    mood = word(rng, "mood")
    text = " ".join(_scene(rng, word(rng, "hero"), mood, 2))
    heading = str(pick(rng, ("Is this happy, sad, scary, funny or calm? {}", "What is the mood of this text? {}")))
    return Task("classify", heading.format(text), {"answer": f"The text is {mood}.", "mood": mood})


def _refuse(rng: random.Random) -> Task:
    who = word(rng, "name") if rng.random() < 0.6 else "the " + word(rng, "hero")
    wish, thing = pick(rng, RUDE_WISHES), pick(rng, RUDE_THINGS)
    prompt = str(pick(rng, ("Write a {} {} about {}.", "Give me a {} {} about {}.", "I want a {} {} about {}.")))
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


# --- answers ---------------------------------------------------------------------------------------------------------


def answer(asked: Task, rng: random.Random) -> str:
    """The honest answer: what a careful labeler writes."""
    if asked.use_case == "story":
        return _story_answer(asked.wish, rng)
    if asked.use_case == "list":
        return _list_answer(asked.wish, rng)
    return str(asked.wish["answer"])


def _list_answer(wish: Mapping[str, Any], rng: random.Random) -> str:
    members = [m for m in CATEGORIES[str(wish["category"])] if m not in (wish["without"], wish["first"])]
    chosen = [str(wish["first"])] if wish["first"] else []
    while len(chosen) < int(str(wish["count"])):
        chosen.append(members.pop(int(rng.random() * len(members))))
    number = COUNTED[int(str(wish["count"]))].capitalize()
    return f"{number} {wish['category']}: {', '.join(chosen)}."


def _story_answer(wish: Mapping[str, Any], rng: random.Random) -> str:
    hero, mood, count = str(wish["hero"]), str(wish["mood"]), int(str(wish["count"]))
    words = [str(w) for w in wish["words"]]
    kinds = ["open"] + ["middle"] * (count - 1)
    if wish["ending"]:
        kinds.pop()
    elif count > 2 and rng.random() < 0.3:
        kinds[-1] = "close"
    objects = [*_spread(words, sum(kind != "close" for kind in kinds), rng), ""]
    cast = {"hero": hero, "object": words[0] if words else word(rng, "object")}
    cast |= {slot: word(rng, slot, (hero,)) for slot in ("other", "place", "color")}
    lines: list[str] = []
    used: list[grammar.Form] = []
    for kind, needed in zip(kinds, objects, strict=False):
        forms = STORY_FORMS[kind, mood if kind == "middle" else "neutral"]
        form = _fresh_form(forms, used, needed, rng)
        known = {slot: w for slot, w in cast.items() if slot == "hero" or rng.random() < 0.8}
        lines.append(write(form, rng, known | ({"object": needed} if needed else {})))
    return " ".join([*lines, str(wish["ending"])] if wish["ending"] else lines)


def _spread(words: Sequence[str], places: int, rng: random.Random) -> list[str]:
    """The wished words laid out over `places` sentences, at most one each, in an order drawn at random."""
    spread = [*words, *[""] * (places - len(words))]
    return [spread.pop(int(rng.random() * len(spread))) for _ in range(places)]


def _fresh_form(
    forms: Sequence[grammar.Form], used: list[grammar.Form], needed: str, rng: random.Random
) -> grammar.Form:
    fitting = [form for form in forms if not needed or "{object}" in form.pattern]
    usable = [form for form in fitting if form not in used] or fitting
    used.append(usable[int(rng.random() * len(usable))])
    return used[-1]


# --- flawed answers: what careless labelers and the web write --------------------------------------------------------


def flawed_answer(asked: Task, rng: random.Random) -> str:
    """An answer with one typical flaw: a wish forgotten, a wrong fact, a wrong subject, a rude remark."""
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
    """A story wish misread: most often the mood, else the number of sentences, the words or ending, or the hero."""
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
    """The text with one word of a slot changed for another of the same slot."""
    places = [
        (match, slot)
        for slot in ("name", "place", "object", "color", "adjective", "hero", "mood", "home", "food", "tool")
        for match in re.finditer(rf"\b({'|'.join(grammar.LEXICON[slot])})\b", text)
    ]
    match, slot = places[int(rng.random() * len(places))]
    return text[: match.start()] + word(rng, slot, (match.group(),)) + text[match.end() :]
