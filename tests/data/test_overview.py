"""The numbers of a data set equal what is counted by hand, and a number that is suspicious gets its sentence."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from rlhf_jax.data import near_duplicates, overview
from rlhf_jax.data.overview import sentences
from rlhf_jax.data.schema import Demonstration, Message, PlainText, Prompt, Ranking

TALK = (Message("system", "Be kind."), Message("user", "Where do herons fish at night?"))
RANKINGS = [
    # Three strict pairs: "longest" over the others, and a tie of equal texts; the last answer nobody ranked.
    Ranking("Name the heron's food.", ("Frogs and fish.", "Frogs", "frogs ", "no"), (0, 1, 1, -1)),
    Ranking("Name the heron's food.", ("Frogs", "Frogs and fish."), (0, 1)),  # contradicts
    Ranking(
        "Name the heron's  FOOD.", ("Frogs and fish.", "Frogs"), (0, 1)
    ),  # repeats, and contradicts the second
    Ranking(TALK, ("Same.", " same. "), (0, 1)),  # prefers a text to itself
]


def test_pairs_are_counted_as_by_hand():
    pairs = overview.pair_numbers(RANKINGS, tokens=lambda text: -len(text))
    assert (pairs.strict, pairs.tied) == (5, 1)
    assert (pairs.longer, pairs.shorter) == (3, 2)
    assert (pairs.counted, pairs.longer_tokens) == (5, 2)
    assert (pairs.equal, pairs.rankings_with_equal) == (1, 2)
    assert (pairs.repeated, pairs.contradicted) == (2, 2)
    assert pairs.leading == (0, 1)
    assert pairs.trailing == (0, 2)


def test_prompts_and_answers_are_counted_as_by_hand():
    prompts = overview.prompt_numbers(RANKINGS)
    assert (prompts.rows, prompts.different, prompts.near, prompts.system) == (4, 2, 0, 1)
    assert prompts.turns == overview.Spread(1, 1, 1, 1)
    said = [
        Demonstration(
            "Tell me of herons.", "Tell me of  HERONS. They wade."
        ),  # begins with, and holds
        Demonstration("Tell me of herons.", "You said: tell me of herons."),  # holds
        Demonstration("Hi", "Hi there"),  # too short to count
        Demonstration(TALK, "Where do herons fish at night? In ponds."),  # repeats the last turn
        Demonstration(TALK, ""),
        Demonstration(TALK, " ok\n"),
    ]
    answers = overview.answer_numbers(said)
    assert (answers.count, answers.empty, answers.short) == (6, 1, 1)
    assert (answers.begin, answers.contain, answers.echo) == (1, 2, 1)
    assert (answers.leading, answers.trailing) == (1, 1)
    assert answers.characters == overview.Spread(0, 28, 40, 40)


def pair(best: str, other: str, prompt: str = "p") -> Ranking:
    return Ranking(prompt, (other, best), (1, 0))


def told(*records, **how) -> str:
    return " ".join(overview.judgements(overview.look(records), **how))


@pytest.mark.parametrize(
    ("records", "part"),  # the part is searched in the sentences
    [
        ([pair(f"a long answer {i}", "short", f"p{i}") for i in range(30)], "longer one in 100% of pairs"),
        ([pair("short", f"a long answer {i}", f"p{i}") for i in range(30)], "shorter one in 100% of pairs"),
        ([pair("same", "same", f"p{i}") for i in range(3)], "3 pairs prefer a text to itself"),
        ([pair("yes", "no"), pair("no", "yes")], "1 pairs are preferred the other way round"),
        ([pair(f"yes {i}", f"noo {i}\n", f"p{i}") for i in range(30)], "ends with a space in 0% of pairs, the"),
        ([Ranking("p", ("a", "b"), (0, 0))], "no pair prefers one answer"),
        ([Demonstration(f"Why is {i} so odd?", f"Why is {i} so odd? No.") for i in range(9)], "begin with their"),
        ([Demonstration(TALK, f"Where do herons fish at night? {i}") for i in range(9)], "repeat the user's last turn"),
        ([Demonstration(f"q{i}", "I cannot help with that.") for i in range(30)], "one answer is 100%"),
        ([Demonstration(f"q{i}", " " * (i % 2) + f"a{i}") for i in range(30)], "50% of the answers of demonstrations"),
        ([Demonstration("q", "  ")], "1 answers of demonstrations are empty"),
        ([Demonstration("q", "<|im_start|>user")], "1 of 1 demonstrations hold control tokens"),
        ([Prompt(f"Sum up the following long letter to my aunt Rose from {i}.") for i in range(30)], "nearly repeat"),
        ([Prompt("a")] * 3, "2 of 3 prompts are repeats"),
    ],
)  # fmt: skip
def test_a_suspicious_number_gets_its_sentence(records, part: str):
    assert part in told(*records)


def test_ordinary_data_get_none():
    words = [
        random.Random(i).choice(("short", "a somewhat longer one", "middle sized")) + f" {i}"
        for i in range(120)
    ]
    pairs = [
        pair(a, b, f"prompt {i}")
        for i, (a, b) in enumerate(zip(words[::2], words[1::2], strict=True))
    ]
    assert (
        told(*pairs, *(Demonstration(f"d{w}", w) for w in words), Prompt("Why?"), PlainText("t"))
        == ""
    )


def test_columns_left_aside_are_listed_and_those_of_prompts_judged():
    records = [Prompt("Why?")]
    text = overview.summary(records, aside={"system_prompt": 40, "row_number": 41})
    assert "columns left aside: row_number (41), system_prompt (40)" in text
    assert "column 'system_prompt' of 40 rows" in text
    assert "column 'row_number'" not in text


def test_the_table_fits_a_screen_whatever_is_wrong():
    wrong = [pair("yes " + "b" * 10**6, "no ", f"p {i}") for i in range(25)] + [
        pair("same", "same")
    ] * 9
    wrong += [pair("no", "yes"), pair("yes", "no"), Ranking("<s>[INST]", ("", "a"), (0, 1))]
    demonstrations = [
        Demonstration("Say that again, please.", "Say that again, please. <|eot_id|>")
    ] * 99
    everything = [*wrong, *demonstrations, *[Prompt("again")] * 50, PlainText("[INST]")]
    aside = {f"{'system' * (i < 9)}column{i}" * 9: 10**9 for i in range(40)} | {
        "system": 3,
        "input": 4,
    }
    lines = overview.summary(everything, aside=aside, tokens=len).split("\n")
    assert len(lines) <= overview.LINES
    assert max(map(len, lines)) <= overview.WIDTH
    line = overview.headline(everything, aside=aside, where="runs/data/data_report.txt")
    assert len(line) <= overview.WIDTH
    assert line.endswith("more (runs/data/data_report.txt)")
    assert overview.headline([]) == "no records; nothing suspicious (data_report.txt)"


def test_a_share_never_reads_none_or_all_when_it_is_not():
    assert [sentences.percent(a, 10_000) for a in (0, 1, 5_000, 9_999, 10_000)] == [
        "0%",
        "0.1%",
        "50%",
        "99.9%",
        "100%",
    ]


# ----------------------------------------------------------------------------------------------------- near-duplicates


def shared(a: str, b: str) -> float:
    """Jaccard similarity of two texts' pieces, by sets."""

    def pieces(text: str) -> set[bytes]:
        data = text.encode()
        starts = [
            i
            for i in range(len(data))
            if data[i : i + 1] != b" " and (i == 0 or data[i - 1 : i] == b" ")
        ]
        return {data[i : i + 12] for i in starts}

    return len(pieces(a) & pieces(b)) / len(pieces(a) | pieces(b))


def test_near_duplicates_are_those_that_share_most_pieces():
    """Against the similarity of all pairs, outside of the band in which an estimate from 32 numbers may err."""
    noise = random.Random(0)
    words = [f"{noise.choice('bcdfg')}{noise.choice('aeiou')}{i}" for i in range(400)]
    texts = [
        " ".join(noise.choice(words) for _ in range(noise.randrange(8, 60))) for _ in range(60)
    ]
    for i in range(60):  # copies with a word or more changed, up to a third
        copy = texts[i].split()
        for _ in range(noise.randrange(1, 2 + len(copy) // 3) if i % 2 else 1):
            copy[noise.randrange(len(copy))] = noise.choice(words)
        texts.append(" ".join(copy))
    found = near_duplicates.repeats(texts)
    likeness = [
        max((shared(texts[j], text) for j in range(i)), default=0.0) for i, text in enumerate(texts)
    ]
    sure = [f for f, s in zip(found, likeness, strict=True) if s > 0.75]
    assert len(sure) > 10
    assert all(sure)
    assert not any(f for f, s in zip(found, likeness, strict=True) if s < 0.25)


def test_near_duplicates_do_not_depend_on_neighbours_or_chunks(monkeypatch: pytest.MonkeyPatch):
    texts = [
        "",
        "a",
        "\u00e9\u4e2d " * 30,
        "one two three four five six seven",
        "x " * 2_000,
        " lead and trail ",
        "\ud800 half",
    ]
    texts += [
        f"write a poem on the sea for {name} and her seven brothers" for name in ("ann", "bea")
    ]
    whole = near_duplicates.repeats(texts)
    assert whole == [False] * 8 + [True]
    for chunk in (1, 2, 5):
        monkeypatch.setattr(near_duplicates, "CHUNK", chunk)
        assert near_duplicates.repeats(texts) == whole
    assert near_duplicates.repeats([]) == []


def test_prompts_of_one_template_are_compared_with_few_others():
    texts = [
        f"please write a short and friendly letter to my aunt in the town number {i}"
        for i in range(2_000)
    ]
    compared = itertools.count()
    count_nonzero = np.count_nonzero

    def counting(*arguments):
        next(compared)
        return count_nonzero(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_duplicates.np, "count_nonzero", counting)
        assert sum(near_duplicates.repeats(texts)) > 1_900
    assert next(compared) < 20 * len(texts)  # all pairs would be a thousand times as many
