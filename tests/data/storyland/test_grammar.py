"""The grammar reads everything it writes, and nothing else."""

from __future__ import annotations

import random
import re

import pytest

from rlhf_jax.data.storyland import grammar
from rlhf_jax.data.storyland.grammar import LEXICON, Form, parse, pick, sentences, word, write

FORMS = grammar._all_forms()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.pattern)
def test_every_form_parses_what_it_writes(form: Form):
    slots = re.findall(r"\{(\w+)\}", form.pattern)
    for index in range(20):
        rng = random.Random(f"{form.pattern}/{index}")
        wished = {slot: word(rng, slot) for slot in slots}
        parsed = parse(write(form, rng, wished))
        assert parsed is not None
        assert parsed.form == form
        assert parsed.slots == wished


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.pattern)
def test_a_form_with_a_word_missing_or_doubled_is_no_sentence(form: Form):
    rng = random.Random(form.pattern)
    words = write(form, rng, {}).split(" ")
    for place in range(len(words)):
        for broken in (
            [*words[:place], *words[place + 1 :]],
            [*words[: place + 1], *words[place:]],
        ):
            text = " ".join(broken)
            again = parse(text)
            assert again is None or again.form.pattern != form.pattern, text


def test_forms_are_all_different_and_many():
    assert len({form.pattern for form in FORMS}) == len(FORMS) > 75


def test_every_alternative_of_a_form_is_written_and_read():
    for form in FORMS:
        wanted = 1
        for choices in re.findall(r"\[(.*?)\]", form.pattern):
            wanted *= len(choices.split("|"))
        slots = {slot: LEXICON[slot][0] for slot in re.findall(r"\{(\w+)\}", form.pattern)}
        written = {write(form, random.Random(seed), slots) for seed in range(150)}
        assert len(written) == wanted, form
        assert all(parse(text) is not None for text in written)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the fox cried alone.",
        "The fox cried alone",
        "The fox cried alone. ",
        "The fox cried alone.\n",
        "The Fox cried alone.",
        "The unicorn cried alone.",
        "The fox cried all night alone.",
        "The fox  cried alone.",
        "The f\u043ex cried alone.",  # a Cyrillic letter
        "<|endoftext|>The fox cried alone.",
    ],
)
def test_what_no_form_writes_is_no_sentence(text: str):
    assert parse("The fox cried alone.") is not None
    assert parse(text) is None


def test_a_slot_that_comes_twice_must_hold_the_same_word_and_other_is_never_the_hero():
    both = [form for form in FORMS if "{hero}" in form.pattern and "{other}" in form.pattern]
    assert both
    for form in both:
        for seed in range(200):
            parsed = parse(write(form, random.Random(seed), {}))
            assert parsed is not None
            assert parsed.slots["hero"] != parsed.slots["other"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("A b. C d.", ["A b.", "C d."]),
        ("A b.\nC d", ["A b.", "C d"]),
        (" A?  B. ", ["A?", "B."]),
        ("A.B", ["A.B"]),
        ("", []),
        ("\n \n", []),
    ],
)
def test_sentences(text: str, parts: list[str]):
    assert sentences(text) == parts


def test_words_of_the_world_do_not_hide_in_each_other():
    """A story is rude by its words only, so no word of the world may be a rude one."""
    words = {w.lower() for slot in LEXICON for w in LEXICON[slot]}
    assert not words & set(grammar.RUDE_WORDS)
    assert all(re.fullmatch("[A-Za-z]+", w) for w in words)


def test_pick_keeps_its_stream():
    """Python promises the stream of `random()` alone, so the corpus must never rest on `choice` or `shuffle`."""
    rng = random.Random("storyland")
    assert [pick(rng, "abcdefghij") for _ in range(8)] == PICKED


PICKED = list("jabciaba")
