"""The corpus is frozen, holds no held-out prompt, and teaches skills but no obedience."""

from __future__ import annotations

import hashlib
import random
from collections import Counter

import pytest

from rlhf_jax.data.storyland import Task, corpus, document, documents, gold, task
from rlhf_jax.data.storyland.grammar import parse, sentences
from rlhf_jax.data.storyland.tokenizer import assets, corpus_fingerprint

# What the shipped base models were pretrained on. A change of either makes them worthless: pretrain anew first.
CORPUS_SHA256 = "cc4022ab3833c587e39ec95c19cfb4c2f15dac55d43d574e790b432bc4fba19c"
TOKENIZER_SHA256 = "db42e022408822652b63f39b25b6255013bb9ac14255be22bca7f4ddff1422e6"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(documents(0, 6000))


def test_the_corpus_is_frozen():
    assert corpus_fingerprint() == CORPUS_SHA256


def test_the_tokenizer_is_frozen():
    assert (
        hashlib.sha256((assets() / "tokenizer.json").read_bytes()).hexdigest() == TOKENIZER_SHA256
    )


def test_a_document_is_pure(texts: list[str]):
    random.seed(1)
    assert [document(index) for index in reversed(range(50))] == texts[:50][::-1]
    assert list(documents(20, 30)) == texts[20:30]


def test_another_seed_is_another_text(texts: list[str]):
    held_out = set(documents(0, 2000, seed=1))
    assert len(held_out & set(texts)) < 0.01 * len(held_out)


def test_documents_are_not_empty_and_plain_ascii(texts: list[str]):
    assert all(text == text.strip() != "" and text.isascii() for text in texts)


def test_no_held_out_prompt_is_in_the_corpus(texts: list[str]):
    lines = {line.removeprefix("Task: ") for text in texts for line in text.split("\n")}
    trained = {task("train", index).prompt for index in range(3000)}
    assert len(lines & trained) > 100  # prompts do come in the corpus, so the next line can fail
    for split in ("validation", "test"):
        assert not lines & {task(split, index).prompt for index in range(500)}


def test_kinds_of_documents_come_as_often_as_said(texts: list[str]):
    assert sum(share for share, _ in corpus.KINDS) == pytest.approx(1.0)
    share = {write.__name__: share for share, write in corpus.KINDS}
    openings = {"_exercises": "Task: ", "_letter": "Dear ", "_dictation": "Dictation: "}
    for kind, opening in openings.items():
        found = sum(text.startswith(opening) for text in texts) / len(texts)
        assert found == pytest.approx(share[kind], abs=0.02), kind


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """The tasks that a page asks, in order, filled while it is written."""
    seen: list[Task] = []
    draw = corpus._training_task
    monkeypatch.setattr(corpus, "_training_task", lambda rng: seen.append(draw(rng)) or seen[-1])
    return seen


def test_a_bare_instruction_is_mostly_not_followed(asked: list[Task]):
    """What makes a base model useless as an assistant: what comes after an instruction seldom answers it."""
    followed, instructions = 0, 0
    for index in range(1500):
        asked.clear()
        parts = corpus._instructions(random.Random(index)).split("\n\n")
        tasks = {one.prompt: one for one in asked}
        for prompt, after in zip(parts, [*parts[1:], ""], strict=True):
            if prompt in tasks:
                instructions += 1
                followed += gold(tasks[prompt], after).score > 0.5
    assert instructions > 2000
    assert 0.02 < followed / instructions < 0.12


def test_an_exercise_sheet_mostly_has_right_answers(asked: list[Task]):
    """What the skills are learnt from, and what a few-shot prefix imitates."""
    scores = []
    for index in range(400):
        asked.clear()
        sheet = corpus._exercises(random.Random(index))
        answers = [part.partition("\nAnswer: ")[2] for part in sheet.split("\n\n")]
        scores += [gold(one, said).score for one, said in zip(asked, answers, strict=True)]
    good = sum(score > 0.9 for score in scores) / len(scores)
    assert good == pytest.approx(1 - corpus.FLAWED_SHARE, abs=0.06)


def test_rudeness_and_wrong_facts_are_there_to_be_unlearnt(texts: list[str]):
    kinds = Counter(
        p.form.kind for text in texts for line in sentences(text) if (p := parse(line)) is not None
    )
    assert kinds["rude"] > 0.01 * kinds.total()
    assert kinds["middle"] > 0.2 * kinds.total()
