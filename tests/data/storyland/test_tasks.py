"""Instructions: pure, many, and in one split each."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from rlhf_jax.data.storyland import (
    SPLITS,
    Task,
    answer,
    flawed_answer,
    gold,
    split_of,
    task,
    task_id,
    task_of,
    tasks,
)
from rlhf_jax.data.storyland.grammar import HEROES, MOODS, NUMBERS, OBJECTS

ROOT = Path(__file__).parents[3]
MANY = {"train": 12_000, "validation": 4_000, "test": 4_000}
COUNTS = {"train": 15_000, "validation": 1_000, "test": 1_000}
USE_CASES = {"story", "closed_qa", "open_qa", "list", "rewrite", "summary", "classify", "refuse"}


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[Task]]:
    return {
        split: [task(split, index) for index in range(count)] for split, count in COUNTS.items()
    }


PRINT_PROMPTS = """
import sys
from rlhf_jax.data.storyland import task
for index in range(int(sys.argv[2])):
    print(task(sys.argv[1], index).prompt)
"""


def prompts_of(split: str, count: int) -> set[str]:
    """Drawn in a process of its own, without the checks of types that make so many draws slow."""
    command = [sys.executable, "-c", PRINT_PROMPTS, split, str(count)]
    return set(
        subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout.splitlines()
    )


def test_splits_are_disjoint(drawn: dict[str, list[Task]]):
    prompts = {split: prompts_of(split, MANY[split]) for split in SPLITS}
    assert all(len(prompts[split]) > 0.6 * MANY[split] for split in SPLITS)
    assert all({one.prompt for one in drawn[split][:1000]} <= prompts[split] for split in SPLITS)
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["validation"] & prompts["test"]


def test_a_prompt_names_its_own_split(drawn: dict[str, list[Task]]):
    for split in SPLITS:
        assert all(split_of(one.prompt) == split for one in drawn[split][:2000])


def test_several_hundred_thousand_instructions_and_nine_in_ten_are_for_training(
    drawn: dict[str, list[Task]],
):
    """Stories with one wished word alone are so many; every such story that is drawn is one of them."""
    with_word = (" Use the word {}.", " Put a {} in it.")
    possible = {
        pattern.format(hero=hero, mood=mood, count=NUMBERS[count]) + wish.format(thing)
        for pattern in tasks._STORY_PROMPTS
        for hero in HEROES
        for mood in MOODS
        for count in NUMBERS
        for wish in with_word
        for thing in OBJECTS
    }
    assert len(possible) > 300_000
    stories = [
        one.prompt
        for one in drawn["train"]
        if one.use_case == "story" and len(one.wish["words"]) == 1
    ]
    assert len(stories) > 3_000
    assert set(stories) <= possible
    assert len(set(stories)) > 0.97 * len(stories)  # far from being used up
    sample = random.Random(0).sample(sorted(possible), 20_000)
    shares = Counter(split_of(prompt) for prompt in sample)
    assert shares["train"] / len(sample) == pytest.approx(0.9, abs=0.01)
    assert shares["test"] / len(sample) == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize("split", SPLITS)
def test_task_is_pure(split: str):
    forward = [task(split, index) for index in range(50)]
    random.seed(1)
    backward = [task(split, index) for index in reversed(range(50))]
    assert forward == backward[::-1]
    assert len({one.prompt for one in forward}) > 40
    assert [one.prompt for one in forward] != [
        task(split, index, seed=1).prompt for index in range(50)
    ]


def test_all_use_cases_come_in_each_split_in_the_mix_of_the_paper(drawn: dict[str, list[Task]]):
    for split in SPLITS:
        shares = Counter(one.use_case for one in drawn[split])
        assert set(shares) == USE_CASES
        assert shares["story"] / COUNTS[split] == pytest.approx(
            0.46, abs=0.04
        )  # generation 45.6% in table 1
        assert min(shares.values()) > 0.02 * COUNTS[split]


def test_prompts_are_one_line_of_plain_ascii(drawn: dict[str, list[Task]]):
    for split in SPLITS:
        for one in drawn[split][:3000]:
            assert one.prompt.isascii()
            assert one.prompt == " ".join(one.prompt.split())


def test_answers_are_pure_and_honest_ones_beat_flawed_ones():
    pairs = []
    for index in range(300):
        asked = task("validation", index)
        good, bad = answer(asked, random.Random(index)), flawed_answer(asked, random.Random(index))
        assert good == answer(asked, random.Random(index))
        assert bad == flawed_answer(asked, random.Random(index))
        pairs.append((gold(asked, good).score, gold(asked, bad).score))
    assert sum(good > bad for good, bad in pairs) > 0.9 * len(pairs)
    assert sum(bad for _, bad in pairs) / len(pairs) < 0.6


def test_a_story_answer_keeps_every_wish(drawn: dict[str, list[Task]]):
    stories = [one for one in drawn["test"] if one.use_case == "story"][:500]
    for index, asked in enumerate(stories):
        text = answer(asked, random.Random(index))
        assert text.count(".") == asked.wish["count"]
        assert all(f" {word}" in text for word in asked.wish["words"])
        assert text.endswith(asked.wish["ending"])
        assert asked.wish["hero"] in text


def test_a_rewrite_leaves_no_trace_of_the_old_hero(drawn: dict[str, list[Task]]):
    for asked in [one for one in drawn["train"] if one.use_case == "rewrite"][:300]:
        assert asked.wish["hero"] in asked.wish["answer"].replace(".", "").split()
        assert asked.wish["hero"] not in asked.wish["text"].replace(".", "").split()


def test_ids_name_tasks():
    assert task_of(task_id("validation", 12)) == task("validation", 12)


@pytest.mark.parametrize("name", ["test", "test/", "test/x", "test/-1", "test/1/2", "12", ""])
def test_a_bad_id_is_refused(name: str):
    with pytest.raises(ValueError, match="must read like test/12"):
        task_of(name)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="choose one of train, validation, test"):
        task("dev", 0)
    with pytest.raises(ValueError, match="split='dev'"):
        task_of("dev/1")
