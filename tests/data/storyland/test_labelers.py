"""Simulated people: consistent, different, fallible, and on the whole right."""

from __future__ import annotations

import dataclasses
import itertools
import random
from statistics import mean

import pytest

from rlhf_jax.data.storyland import Labeler, Task, answer, gold, labelers, task

GROUPS = ("train", "heldout")
PLACES = range(250)
TASKS = [task("validation", index) for index in PLACES]
Pairs = list[tuple[int, str, str]]


@pytest.fixture(scope="module")
def written() -> list[list[str]]:
    """Four demonstrations of each task by four people."""
    writers = labelers("train", 4)
    return [[person.demonstrate(TASKS[i], place=i) for person in writers] for i in PLACES]


def order(person: Labeler, place: int, a: str, b: str) -> int:
    """1 when `a` is better, -1 when `b` is, 0 for a tie."""
    first, second = person.rank(TASKS[place], [a, b], place=place)
    return (first < second) - (first > second)


@pytest.fixture(scope="module")
def pairs(written: list[list[str]]) -> Pairs:
    return [(i, a, b) for i in PLACES for a, b in itertools.combinations(written[i], 2) if a != b]


def test_labelers_are_deterministic_and_differ():
    assert labelers("train", 5) == labelers("train", 9)[:5]
    assert (
        len(
            {
                (p.noise, p.tie, p.length_bias)
                for p in labelers("train", 10) + labelers("heldout", 10)
            }
        )
        == 20
    )
    assert labelers("train", 5) != labelers("train", 5, seed=1)


def test_training_and_heldout_labelers_have_disjoint_names():
    names = [{person.name for person in labelers(group, 10)} for group in GROUPS]
    assert [len(group) for group in names] == [10, 10]
    assert not names[0] & names[1]


def test_an_unknown_group_is_refused():
    with pytest.raises(ValueError, match="choose train or heldout"):
        labelers("test", 1)


def test_a_ranking_is_deterministic_and_no_response_changes_another_ones_judgement(
    written: list[list[str]],
):
    for i, person in zip(PLACES, itertools.cycle(labelers("train", 10)), strict=False):
        sharp = dataclasses.replace(person, tie=0.0)
        ranks = sharp.rank(TASKS[i], written[i], place=i)
        random.seed(i)
        assert ranks == sharp.rank(TASKS[i], written[i], place=i)
        assert ranks[::-1] == sharp.rank(TASKS[i], written[i][::-1], place=i)
        fewer = sharp.rank(TASKS[i], written[i][1:], place=i)
        for a, b in itertools.combinations(range(3), 2):
            assert (fewer[a] < fewer[b]) == (ranks[a + 1] < ranks[b + 1])


def test_ranks_start_at_1_and_leave_no_gap_and_equal_texts_are_tied(written: list[list[str]]):
    for i, person in zip(PLACES, itertools.cycle(labelers("heldout", 10)), strict=False):
        ranks = person.rank(TASKS[i], [*written[i], *written[i]], place=i)
        assert ranks[:4] == ranks[4:]
        assert set(ranks) == set(range(1, max(ranks) + 1))


def test_ties_are_there_but_few(pairs: Pairs):
    tied = mean(
        order(person, *pair) == 0 for person in labelers("train", 4) for pair in pairs[:400]
    )
    assert 0.02 < tied < 0.4


@pytest.mark.parametrize(
    ("first", "second"), [("train", "train"), ("heldout", "heldout"), ("train", "heldout")]
)
def test_two_labelers_agree_as_often_as_people_do(pairs: Pairs, first: str, second: str):
    """People agree on 72.6% and 77.3%, ties left out (Ouyang et al. 2022, section 3.4); ours on 87% to 89%."""
    one, other = labelers(first, 10)[:5], labelers(second, 10)[5:]
    same = []
    for (a, b), pair in zip(itertools.cycle(itertools.product(one, other)), pairs, strict=False):
        x, y = order(a, *pair), order(b, *pair)
        same += [x == y] if x and y else []
    assert len(same) > 500
    assert 0.7 < mean(same) < 0.9


@pytest.mark.parametrize("group", GROUPS)
def test_labelers_agree_with_gold_where_gold_sees_a_difference(pairs: Pairs, group: str):
    right = []
    for person, (i, a, b) in zip(itertools.cycle(labelers(group, 10)), pairs, strict=False):
        difference = gold(TASKS[i], a).score - gold(TASKS[i], b).score
        judged = order(person, i, a, b)
        right += [(judged > 0) == (difference > 0)] if judged and abs(difference) > 0.05 else []
    assert len(right) > 300
    assert 0.85 < mean(right) < 1.0


EQUAL = Task("story", "...", {"hero": "fox", "mood": "sad", "count": 2, "words": (), "ending": ""})
SHORT = "The fox cried alone. The fox missed the bear very much."
LONG = "The lamp was lost and the fox was very sad. The fox sat by the mill with a broken heart."


def test_length_bias_shows_in_an_otherwise_equal_pair():
    """Without noise the longer of two faultless stories wins with each labeler that likes length, and only there."""
    assert gold(EQUAL, SHORT) == gold(EQUAL, LONG)
    people = labelers("train", 200)
    for person in people:
        calm = dataclasses.replace(person, noise=0.0, tie=0.0)
        short, long = calm.rank(EQUAL, [SHORT, LONG], place="equal")
        assert (long < short) == (person.length_bias > 0)
    assert mean(person.length_bias > 0 for person in people) == pytest.approx(0.75, abs=0.1)


def test_length_bias_shows_on_average_through_the_noise():
    """Two answers that are worth nothing, one sixteen times as long."""
    worthless, long = "bla", " ".join(["bla"] * 31)
    wins = []
    for person, i in itertools.product(labelers("train", 40), range(50)):
        short_rank, long_rank = person.rank(TASKS[i], [worthless, long], place=i)
        wins.append(0.5 + 0.5 * ((long_rank < short_rank) - (long_rank > short_rank)))
    assert 0.53 < mean(wins) < 0.7


@pytest.mark.parametrize("group", GROUPS)
def test_demonstrations_are_good_but_clearly_below_honest_answers(group: str):
    people = labelers(group, 10)
    shown = mean(
        gold(TASKS[i], people[i % 10].demonstrate(TASKS[i], place=i)).score for i in PLACES
    )
    honest = mean(gold(TASKS[i], answer(TASKS[i], random.Random(i))).score for i in PLACES)
    assert shown < honest - 0.1
    assert shown > 0.75


def test_a_demonstration_is_deterministic_and_labelers_write_differently(written: list[list[str]]):
    again = [
        [person.demonstrate(TASKS[i], place=i) for person in labelers("train", 4)]
        for i in PLACES[:20]
    ]
    assert again == written[:20]
    stories = [
        texts for texts, asked in zip(written, TASKS, strict=True) if asked.use_case == "story"
    ]
    assert mean(len(set(texts)) for texts in stories) > 3.8
