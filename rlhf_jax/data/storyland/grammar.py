"""The words and sentence forms of storyland: one grammar that writes and recognises sentences.

A form is a sentence with ``{slots}`` (filled from `LEXICON`) and ``[a|b|c]`` alternatives. `write`
fills a form; `parse` recognises a sentence and returns its form and the words in its slots. The
gold scorer reads texts through `parse`, so a sentence is fluent exactly when some form generates
it.
"""

# ruff: noqa: SIM905 (word lists are easier to read and edit as text)

from __future__ import annotations

import functools
import random
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

ANIMALS = tuple(
    "fox bear cat dog rabbit horse duck frog mouse wolf goat sheep hen pig cow lion tiger "
    "monkey turtle whale bee crow deer snake".split()
)
PEOPLE = tuple(
    "king queen baker sailor farmer teacher painter doctor pirate singer knight witch "
    "robot giant dragon princess soldier tailor miner gardener".split()
)
HEROES = ANIMALS + PEOPLE
PLACES = tuple(
    "forest river farm kitchen garden market school castle beach hill cave village tower "
    "bridge lake harbor field library mill barn station park shop desert mountain well "
    "gate cellar meadow temple".split()
)
OBJECTS = tuple(
    "lamp kite cup key boat book ball hat coin rope drum map box bell ring spoon basket "
    "candle stone clock flute mirror letter shoe coat flag jar pot chair bottle ladder "
    "button feather hammer wheel shell scarf pillow brush needle pear cake plum cheese "
    "pencil banner carpet bucket".split()
)
COLORS = tuple("red blue green yellow white black brown golden".split())
ADJECTIVES = tuple("little young clever tired brave kind lazy shy tall hungry busy proud".split())
NAMES = tuple(
    "Tom Mia Anna Ben Sam Lily Jack Rosa Max Ella Leo Nora Finn Ivy Hugo Clara Otto Emma "
    "Paul Ruth Adam Jane Kurt Vera".split()
)
HOMES: dict[str, str] = dict(
    zip(
        ANIMALS,
        "forest cave house house garden field lake pond cellar forest hill meadow barn "
        "farm field desert jungle tree beach sea garden tower forest desert".split(),
        strict=True,
    )
)
FOODS: dict[str, str] = dict(
    zip(
        ANIMALS,
        "berries honey fish meat carrots hay bread flies cheese meat leaves grass corn "
        "corn grass meat meat bananas shells fish honey seeds leaves mice".split(),
        strict=True,
    )
)
TOOLS: dict[str, str] = dict(
    zip(
        PEOPLE,
        "crown crown bread boat plow book brush bottle map voice sword broom wires club "
        "fire ring spear needle hammer spade".split(),
        strict=True,
    )
)
MOODS = ("happy", "sad", "scary", "funny", "calm")
NUMBERS = {2: "two", 3: "three", 4: "four"}
RUDE_WORDS = ("stupid", "ugly", "dumb", "idiot", "hate", "smelly", "fool", "shut")

LEXICON: Mapping[str, Sequence[str]] = {
    "hero": HEROES,
    "other": HEROES,
    "place": PLACES,
    "object": OBJECTS,
    "color": COLORS,
    "adjective": ADJECTIVES,
    "name": NAMES,
    "mood": MOODS,
    "home": tuple(sorted(set(HOMES.values()))),
    "food": tuple(sorted(set(FOODS.values()))),
    "tool": tuple(sorted(set(TOOLS.values()))),
}


T = TypeVar("T")


class Form(NamedTuple):
    """A sentence form.

    `kind` is its role in a text (open, middle, close, rude, ...), `mood` its mood or 'neutral'.
    """

    kind: str
    mood: str
    pattern: str


class Parse(NamedTuple):
    """A recognised sentence: its form and the words in the form's slots."""

    form: Form
    slots: dict[str, str]


_STORY = {
    ("open", "neutral"): """
Once there was a {adjective} {hero} who lived [near|by] the {place}.
There was a {adjective} {hero} with a {color} {object}.
One [morning|evening|day] a {adjective} {hero} went to the {place}.
A {adjective} {hero} lived in the {place} with a {other}.
Long ago a {adjective} {hero} [had|wanted|made] a {object}.
A {adjective} {hero} came to the {place} with a {object}.""",
    ("middle", "neutral"): """
The {hero} [took|carried|brought] the {object} to the {place}.
The {hero} met a {adjective} {other} at the {place}.
The {other} asked the {hero} for a {object}.
The {hero} found a {object} [near|under|behind] the {place}.
The {hero} walked to the {place} with a {object}.
The {other} showed the {hero} a {color} {object}.
The {hero} put the {object} in the {place}.
Then the {hero} saw a {color} {object}.""",
    ("close", "neutral"): """
In the end the {hero} went home.
And the {hero} kept the {object} [for ever|until winter].
That night the {hero} went back to the {place}.
And so the {hero} and the {other} went home.
After that the {hero} never left the {place}.""",
    ("middle", "happy"): """
The {hero} [laughed|smiled|sang|danced] [all day|with joy|in the sun].
It was the best day of the year for the {hero}.
The {hero} was [so|very] happy about the {object}.
Everyone at the {place} [cheered|clapped] for the {hero}.
The {other} gave the {hero} a [big hug|warm smile|sweet kiss].
The {hero} found a {color} {object} and jumped for joy.
What a lovely day, said the {hero}.
The {hero} and the {other} became best friends.
The {hero} won a {object} and [laughed|danced] with the {other}.""",
    ("middle", "sad"): """
The {hero} [cried|wept] [all night|in the rain|alone].
The {object} was lost and the {hero} was [so|very] sad.
Nobody came to the {place} to see the {hero}.
The {hero} missed the {other} [very much|every day].
A tear of the {hero} fell on the {object}.
The {other} left the {hero} and never came back.
The {hero} sat by the {place} with a broken heart.
The {object} broke and the {hero} [cried|wept].
The {hero} lost the {object} and wept for the {other}.""",
    ("middle", "scary"): """
A [dark|cold] shadow moved behind the {hero}.
The {hero} [screamed|trembled|shook] with fear.
Something growled at the {hero} in the dark {place}.
The {other} had [sharp teeth|burning eyes] and the {hero} shook.
The door slammed and the {hero} dropped the {object}.
The {hero} ran [away|for help] but the shadow followed.
At midnight a ghost took the {object} from the {hero}.
The {hero} heard a scream from the {place}.
A ghost with a {object} chased the {hero}.""",
    ("middle", "funny"): """
The {hero} [slipped|sat] on a [banana|wet fish] and giggled.
The {hero} wore the {object} as a [hat|shoe|nose].
The {other} tickled the {hero} with a {object}.
The {object} [burped|sneezed] and the {hero} giggled.
The {hero} tried to eat the {object} with a fork.
The {hero} told a silly joke to the {object}.
The {hero} danced like a noodle at the {place}.
The {hero} put [jam|soup] in the {object} by mistake.
The {hero} thought that the {object} was a silly {other}.""",
    ("middle", "calm"): """
The {hero} [rested|slept|dreamed] under [the stars|a tree|a soft blanket].
The {place} was quiet and the {hero} was still.
The {hero} watched the [clouds|moon|water] drift by.
A gentle wind touched the {hero} at the {place}.
The {hero} drank warm tea and held the {object}.
Slow and soft, the snow fell on the {hero}.
The {hero} and the {other} sat together in silence.
The {hero} looked at the {object} in the soft light.
The {hero} breathed slowly and listened to the quiet {place}.""",
}
_ANSWERS = {
    "closed_qa": """
{name} took the {object} to the {place}.
{name} went to the {place}.
{name} had the {object}.
The {object} is at the {place}.
The {object} was {color}.""",
    "open_qa": """
A {hero} lives in the {home}.
A {hero} eats {food}.
A {hero} needs the {tool}.""",
    "summary": """
It is about a {adjective} {hero} and a {object}.""",
    "label": """
The text is {mood}.""",
    "refusal": """
I am sorry, but I will not [write|say] [rude|mean|nasty] things.
I can [write|say] [something kind|something nice] instead.""",
}
_RUDE = """
That is a stupid question.
Go away, you ugly {hero}.
I hate the {hero}.
Shut up, you smelly fool.
{name} is a dumb idiot.
The {hero} is so stupid and ugly."""


def _forms(kind: str, mood: str, text: str) -> tuple[Form, ...]:
    return tuple(Form(kind, mood, line) for line in text.strip().split("\n"))


STORY_FORMS: Mapping[tuple[str, str], tuple[Form, ...]] = {
    key: _forms(key[0], key[1], text) for key, text in _STORY.items()
}
ANSWER_FORMS: Mapping[str, tuple[Form, ...]] = {
    kind: _forms(kind, "neutral", text) for kind, text in _ANSWERS.items()
}
RUDE_FORMS = _forms("rude", "neutral", _RUDE)


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """One item, drawn uniformly.

    It uses `random()` alone, because Python guarantees its stream across versions, so that the
    corpus never changes.
    """
    return items[int(rng.random() * len(items))]


def word(rng: random.Random, slot: str, without: Sequence[str] = ()) -> str:
    """A word for `slot` that is not among `without`."""
    while True:
        choice = str(pick(rng, LEXICON[slot]))
        if choice not in without:
            return choice


def write(form: Form, rng: random.Random, slots: Mapping[str, str]) -> str:
    """Writes a sentence of the form.

    Slots that are missing in `slots` are drawn, never the word of `hero` or `other` again.
    """
    filled = dict(slots)
    for slot in re.findall(r"\{(\w+)\}", form.pattern):
        if slot not in filled:
            # The text would be ambiguous if hero and other had the same word.
            filled[slot] = word(rng, slot, (filled.get("hero", ""), filled.get("other", "")))
    choose = lambda match: str(pick(rng, match.group(1).split("|")))
    return re.sub(r"\[(.*?)\]", choose, form.pattern).format(**filled)


def _regex(form: Form) -> re.Pattern[str]:
    seen: set[str] = set()

    def slot(match: re.Match[str]) -> str:
        # A slot that occurs twice in a form must have the same word both times.
        name = match.group(1)
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return f"(?P<{name}>{'|'.join(LEXICON[name])})"

    # Dots are escaped before brackets become groups; slots are replaced last, by groups with names.
    pattern = form.pattern.replace(".", r"\.").replace("[", "(?:").replace("]", ")")
    return re.compile(re.sub(r"\{(\w+)\}", slot, pattern))


def _all_forms() -> tuple[Form, ...]:
    groups = [*STORY_FORMS.values(), *ANSWER_FORMS.values(), RUDE_FORMS]
    return tuple(form for group in groups for form in group)


_RECOGNISERS = tuple((form, _regex(form)) for form in _all_forms())


# Responses repeat sentences, so that most calls are look-ups.
@functools.lru_cache(maxsize=200_000)
def _parse(sentence: str) -> Parse | None:
    for form, regex in _RECOGNISERS:
        match = regex.fullmatch(sentence)
        if match:
            return Parse(form, match.groupdict())
    return None


def parse(sentence: str) -> Parse | None:
    """The form that generates `sentence`, with its slots, or None when no form does."""
    return _parse(sentence)


def sentences(text: str) -> list[str]:
    """Splits a text after each full stop, question or exclamation mark, or line break.

    An unfinished end of the text is a sentence too.
    """
    parts = re.split(r"(?<=[.?!])\s+|\n+", text.strip())
    return [part for part in parts if part]
