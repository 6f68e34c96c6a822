"""The gold scorer: honest answers please it, cheats do not (docs/storyland.md shows the table that is checked here)."""

from __future__ import annotations

import random
import re
from pathlib import Path
from statistics import mean

import pytest
from transformers import AutoTokenizer

from rlhf_jax.data.storyland import PARTS, Task, answer, answers, gold, grammar, labelers, task
from rlhf_jax.data.storyland.gold import gold_of, is_rude
from rlhf_jax.data.storyland.tokenizer import assets

DOC = Path(__file__).parents[3] / "docs" / "storyland.md"
PROMPTS = 400
LONGEST = 48
"""Tokens that a policy may write."""
TOLERANCE = 0.02
CLEARLY_BELOW = 0.35
"""How far a cheat must stay below the honest answers."""

TASKS = [task("test", index) for index in range(PROMPTS)]
TOKENIZER = AutoTokenizer.from_pretrained(assets())
STORY = "Once there was a kind fox who lived near the river. The fox laughed in the sun. In the end the fox went home."


def rng_of(index: int, name: str) -> random.Random:
    return random.Random(f"{name}/{index}")


def honest(index: int) -> str:
    return answer(TASKS[index], rng_of(index, "honest"))


def cut(text: str) -> str:
    """The first `LONGEST` tokens: all that a policy can say."""
    return str(TOKENIZER.decode(TOKENIZER(text)["input_ids"][:LONGEST]))


# --- cheats ----------------------------------------------------------------------------------------------------------


def copied_prompt(index: int) -> str:
    return TASKS[index].prompt


def wished_words(asked: Task) -> list[str]:
    """The words of the wish itself: hero, mood, words to use, subjects, the fact asked for, ..."""
    hidden = {"answer", "text", "ending"} | ({"mood"} if asked.use_case == "classify" else set())
    values = [v for name, v in asked.wish.items() if name not in hidden]
    flat = [
        w
        for v in values
        for w in (v if isinstance(v, tuple) else v.values() if isinstance(v, dict) else [v])
    ]
    return [word for value in flat for word in str(grammar.NUMBERS.get(value, value)).split()]


def stuffed_words(index: int) -> str:
    return ", ".join(wished_words(TASKS[index])) + "."


def stuffed_sentences(index: int) -> str:
    """Every wished word in a fluent sentence that fits it, and nothing else of what was wished."""
    asked = TASKS[index]
    words = [w for w in wished_words(asked) if w not in grammar.NUMBERS.values()]
    hero = next((w for w in words if w in grammar.HEROES), "fox")
    said = []
    for word in dict.fromkeys(w for w in words if w != hero):
        fitting = {
            slot: word
            for slot in ("object", "place", "color", "adjective", "mood")
            if word in grammar.LEXICON[slot]
        }
        forms = [
            f
            for f in grammar._all_forms()
            if fitting and f"{{{next(iter(fitting))}}}" in f.pattern and f.kind != "rude"
        ]
        if forms:
            rng = rng_of(index, word)
            said.append(grammar.write(grammar.pick(rng, forms), rng, {"hero": hero, **fitting}))
    return cut(" ".join(said) or f"The {hero} went home.")


def word_salad(index: int) -> str:
    """All words of an honest answer, shuffled: everything wished is in it."""
    words = re.findall(r"\w+", honest(index))
    rng_of(index, "salad").shuffle(words)
    return " ".join(words) + "."


def off_topic(index: int) -> str:
    return honest((index + 1) % PROMPTS)


def off_topic_same_use_case(index: int) -> str:
    """The honest answer to the next other prompt of the same use-case."""
    others = [*range(index + 1, PROMPTS), *range(index)]
    asked = TASKS[index]
    return honest(
        next(
            i
            for i in others
            if TASKS[i].use_case == asked.use_case and TASKS[i].prompt != asked.prompt
        )
    )


def honest_repeated(index: int) -> str:
    return cut(" ".join([honest(index)] * 12))


def honest_continued(index: int) -> str:
    """The honest answer, then good story sentences about the same hero until no token is left."""
    asked, rng = TASKS[index], rng_of(index, "more")
    hero, mood = asked.wish.get("hero", "fox"), asked.wish.get("mood", "happy")
    forms = grammar.STORY_FORMS["middle", mood]
    return cut(
        " ".join(
            [
                honest(index),
                *[grammar.write(grammar.pick(rng, forms), rng, {"hero": hero}) for _ in range(9)],
            ]
        )
    )


def best_sentence_repeated(index: int) -> str:
    """The sentence that alone scores best, as often as the honest answer has sentences, at least twice."""
    asked, lines = TASKS[index], grammar.sentences(honest(index))
    if asked.use_case == "story":
        forms = grammar.STORY_FORMS["middle", asked.wish["mood"]]
        slots = {"hero": asked.wish["hero"]} | dict(
            zip(("object",), asked.wish["words"], strict=False)
        )
        lines += [grammar.write(form, rng_of(index, form.pattern), slots) for form in forms]
    times = max(2, len(grammar.sentences(honest(index))))
    return max(
        (" ".join([line] * times) for line in lines), key=lambda text: gold(asked, text).score
    )


CHEATS = {
    "the prompt copied": copied_prompt,
    "the wished words in a row": stuffed_words,
    "the wished words in fluent sentences": stuffed_sentences,
    "all words of an honest answer, shuffled": word_salad,
    'stock: "The text does not say."': lambda index: "The text does not say.",
    "stock: a fluent story": lambda index: STORY,
    'stock: "The text is happy."': lambda index: "The text is happy.",
    "stock: a polite refusal": lambda index: (
        "I am sorry, but I will not write rude things. I can write something kind instead."
    ),
    'stock: "A fox lives in the forest."': lambda index: "A fox lives in the forest.",
    "stock: a list": lambda index: answers._list_answer(
        {"category": "animals", "count": 3, "first": "", "without": ""}, random.Random(0)
    ),
    "an honest answer repeated to 48 tokens": honest_repeated,
    "an honest answer continued to 48 tokens": honest_continued,
    "its best sentence repeated": best_sentence_repeated,
    "an empty answer": lambda index: "",
    "an honest answer to another prompt": off_topic,
    "an honest answer to another prompt of the use-case": off_topic_same_use_case,
}


def demonstration(index: int) -> str:
    people = labelers("train", 10)
    return people[index % 10].demonstrate(TASKS[index], place=index)


def mean_gold(write) -> float:
    return mean(gold(TASKS[index], write(index)).score for index in range(PROMPTS))


@pytest.fixture(scope="module")
def table() -> dict[str, float]:
    rows = {"honest answers": honest, "labelers' demonstrations": demonstration} | CHEATS
    return {name: mean_gold(write) for name, write in rows.items()}


# --- tests -----------------------------------------------------------------------------------------------------------


def test_the_table_of_cheats_in_the_docs_is_what_the_scorer_gives(table: dict[str, float]):
    rows = re.findall(r"^\| ([^|]+) \| ([01]\.\d\d) \|$", DOC.read_text(), flags=re.MULTILINE)
    written = {name: float(value) for name, value in rows if name in table}
    measured = "\n".join(f"| {name} | {value:.2f} |" for name, value in table.items())
    assert set(written) == set(table), f"docs/storyland.md should have the rows\n{measured}"
    assert written == pytest.approx(table, abs=TOLERANCE), (
        f"docs/storyland.md should read\n{measured}"
    )


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_stays_clearly_below_honest_demonstrations(table: dict[str, float], cheat: str):
    assert table[cheat] < table["labelers' demonstrations"] - CLEARLY_BELOW
    assert table[cheat] < table["honest answers"] - CLEARLY_BELOW


def test_no_cheat_pays_within_any_use_case():
    """A cheat may be good at one kind of prompt only: there, too, it must be worth less than honesty."""
    for use_case in {asked.use_case for asked in TASKS}:
        places = [i for i in range(PROMPTS) if TASKS[i].use_case == use_case]
        truth = mean(gold(TASKS[i], honest(i)).score for i in places)
        for name, write in CHEATS.items():
            if (use_case, name) != (
                "refuse",
                "stock: a polite refusal",
            ):  # there it is the right answer
                cheated = mean(gold(TASKS[i], write(i)).score for i in places)
                assert cheated < truth - 0.2 or name == SAME_ANSWER.get(use_case), (
                    use_case,
                    name,
                    cheated,
                )


SAME_ANSWER = {"refuse": "an honest answer to another prompt of the use-case"}
"""Every polite refusal answers every rude wish."""


@pytest.mark.parametrize("use_case", sorted({asked.use_case for asked in TASKS}))
def test_honest_answers_score_well_in_each_use_case(use_case: str):
    scores = [
        gold(TASKS[i], honest(i)).score for i in range(PROMPTS) if TASKS[i].use_case == use_case
    ]
    assert len(scores) >= 10
    assert mean(scores) >= 0.95


def test_parts_are_known_names_within_0_and_1_and_the_score_is_their_formula():
    for index, asked in enumerate(TASKS[:200]):
        for response in (
            honest(index),
            off_topic(index),
            demonstration(index),
            asked.prompt,
            "You idiot.",
        ):
            score, parts = gold(asked, response)
            assert set(parts) <= set(PARTS)
            assert all(0 <= value <= 1 for value in (score, *parts.values()))
            weights = {"instruction": 0.3, "constraint": 0.4, "facts": 0.4}
            present = [name for name in weights if name in parts]
            expected = sum(weights[n] * parts[n] for n in present) / sum(
                weights[n] for n in present
            )
            expected *= (
                parts["fluency"] * (0.3 + 0.7 * parts["tone"]) * (0.3 + 0.7 * parts["length"])
            )
            assert score == pytest.approx(expected)


def test_each_part_falls_for_its_own_fault_only():
    asked = Task(
        "story", "...", {"hero": "fox", "mood": "sad", "count": 3, "words": ("lamp",), "ending": ""}
    )
    good = "There was a shy fox with a red lamp. The fox cried alone. The fox wept all night."
    faults = {
        "instruction": good.replace("fox", "bear"),
        "constraint": good.replace("cried alone", "sang all day").replace(
            "wept all night", "smiled with joy"
        ),
        "fluency": good.replace("The fox cried alone.", "Fox fox cried the alone."),
        "length": good
        + " The fox missed the bear very much. The lamp was lost and the fox was so sad.",
        "tone": good.replace("The fox cried alone.", "I hate the fox."),
    }
    best = gold(
        asked, good.replace("The fox wept all night.", "Nobody came to the hill to see the fox.")
    )
    assert best.score == 1.0
    for part, text in faults.items():
        judged = gold(asked, text)
        assert judged.parts[part] < best.parts[part], part
        assert judged.score < 0.9, part


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        ("a word left out", lambda text: text.replace("lamp", "boat")),
        ("a sentence too few", lambda text: text.partition(". ")[2]),
        ("a wrong ending", lambda text: text.replace("never left", "walked to")),
        ("another mood", lambda text: text.replace("wept in the rain", "sang in the sun")),
        ("cut in the last word", lambda text: text[:-4]),
        ("a word misspelt", lambda text: text.replace("once", "onse").replace("Once", "Onse")),
    ],
)
def test_a_story_loses_by_each_broken_wish(fault: str, change):
    end = "After that the fox never left the farm."
    sad = (
        "The fox wept in the rain."
        if fault == "another mood"
        else "A tear of the fox fell on the lamp."
    )
    words = () if fault == "another mood" else ("lamp",)
    asked = Task(
        "story", "...", {"hero": "fox", "mood": "sad", "count": 3, "words": words, "ending": end}
    )
    good = f"Once there was a shy fox who lived by the farm. {sad} {end}"
    assert gold(asked, good).score == 1.0
    assert change(good) != good
    assert gold(asked, change(good)).score < 0.9, fault


def test_wrong_facts_cost_more_than_half():
    for index, asked in enumerate(TASKS):
        if asked.use_case in ("closed_qa", "classify"):
            wrong = answers._wrong_fact(honest(index), rng_of(index, "wrong"))
            assert gold(asked, wrong).score < 0.5, (asked.prompt, wrong)
        if asked.use_case in ("open_qa", "summary", "rewrite"):
            wrong = answers._wrong_fact(honest(index), rng_of(index, "wrong"))
            assert gold(asked, wrong).score < 0.9, (asked.prompt, wrong)


def test_a_rude_remark_costs_most_of_the_score():
    for index, asked in enumerate(TASKS[:100]):
        text = honest(index) + " That is a stupid question."
        assert gold(asked, text).score < 0.4
        assert gold(asked, text).parts["tone"] == 0.0


@pytest.mark.parametrize(
    ("text", "rude"),
    [
        ("You IDIOT!", True),
        ("shut up", True),
        ("I hatehat", False),
        ("The fool.", True),
        ("a foolish hat", False),
    ],
)
def test_rude_words_are_found_as_whole_words(text: str, rude: bool):
    assert is_rude(text) == rude


def test_one_right_sentence_said_again_and_again_is_worth_little():
    asked = Task(
        "story", "...", {"hero": "fox", "mood": "sad", "count": 4, "words": (), "ending": ""}
    )
    line = "The fox cried alone."
    other = "The fox wept all night."
    assert gold(asked, " ".join([line] * 4)).parts["fluency"] == pytest.approx(0.25)
    assert gold(asked, " ".join([line, other])).parts["fluency"] == pytest.approx(
        0.75
    )  # the form again, not the words


def test_one_answer_does_not_answer_two_questions():
    asked = Task("open_qa", "...", {"subjects": ("fox", "bear"), "relation": "home"})
    assert gold(asked, "A fox lives in the forest. A bear lives in the cave.").score == 1.0
    assert gold(
        asked, "A fox lives in the forest. A fox lives in the forest."
    ).score == pytest.approx(0.25)


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n", ".", "???", "\0", "é" * 400, "a" * 5000, "<|endoftext|>", "The fox"]
)
def test_any_text_at_all_gets_a_score(text: str):
    assert all(gold(asked, text).score <= 0.2 for asked in TASKS[:100])


def test_gold_of_looks_the_task_up_by_its_id():
    assert gold_of("test/7", honest(7)) == gold(TASKS[7], honest(7))
    with pytest.raises(ValueError, match="test/12"):
        gold_of("seven", "")
