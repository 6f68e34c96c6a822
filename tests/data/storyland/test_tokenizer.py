"""The committed tokenizer: transformers loads it, nothing is lost, storyland words are whole."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_jax.data import text as text_lib
from rlhf_jax.data.storyland import documents, grammar, task
from rlhf_jax.data.storyland.tokenizer import EOS, PAD, VOCAB_SIZE, assets, train_tokenizer

TOKENIZER = AutoTokenizer.from_pretrained(assets())


def encode(text: str) -> list[int]:
    """A user's text as the pipeline encodes it, without the response's end."""
    return text_lib.encode_response(TOKENIZER, text, eos_id=TOKENIZER.eos_token_id)[:-1]


def ids(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def test_transformers_loads_it_with_its_special_tokens():
    assert len(TOKENIZER) == VOCAB_SIZE
    assert (TOKENIZER.eos_token, TOKENIZER.pad_token) == (EOS, PAD)
    assert TOKENIZER.eos_token_id != TOKENIZER.pad_token_id
    assert ids("A fox.") == [
        TOKENIZER.convert_tokens_to_ids(t) for t in ("A", "Ġfox", ".")
    ]  # nothing is added


def test_corpus_text_comes_back_whole():
    for text in documents(0, 500, seed=2):
        assert TOKENIZER.decode(ids(text)) == text


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_unicode_text_comes_back_whole(text: str):
    assert TOKENIZER.decode(encode(text)) == text


@pytest.mark.parametrize(
    "text", ["naïve 北京 🦊", "a  b\t\n\n c ", "'s don't .,", "\0\x7f", "e\u0301 \u00e9", "\u202e!"]
)
def test_odd_text_comes_back_whole(text: str):
    assert TOKENIZER.decode(encode(text)) == text


def test_nearly_every_storyland_word_is_one_token():
    counts = Counter(
        re.findall(r"(?: |^)[A-Za-z]+", "\n".join(documents(0, 2000)), flags=re.MULTILINE)
    )
    whole = sum(count for word, count in counts.items() if len(ids(word)) == 1)
    assert len(counts) > 500
    assert whole > 0.97 * counts.total()
    named = {
        word
        for slot in ("hero", "object", "place", "name", "color", "mood")
        for word in grammar.LEXICON[slot]
    }
    assert all(len(ids(f" {word}")) == 1 for word in named)


def test_prompts_and_answers_are_short():
    lengths = [len(ids(task("test", index).prompt)) for index in range(300)]
    words = [len(task("test", index).prompt.split()) for index in range(300)]
    assert sum(lengths) < 1.4 * sum(words)


@pytest.mark.parametrize("name", [EOS, PAD])
def test_names_of_special_tokens_in_text_stay_text(name: str):
    special = {TOKENIZER.eos_token_id, TOKENIZER.pad_token_id}
    for text in (name, f"A fox{name}bear", f"{name}{name}"):
        encoded = encode(text)
        assert not special & set(encoded)
        assert TOKENIZER.decode(encoded) == text


def test_padding_and_end_are_different_and_the_first_two_ids():
    raw = json.loads((assets() / "tokenizer.json").read_text())
    assert [(t["id"], t["content"], t["special"]) for t in raw["added_tokens"]] == [
        (0, EOS, True),
        (1, PAD, True),
    ]


def test_training_it_again_gives_the_committed_one(monkeypatch: pytest.MonkeyPatch):
    """On a tenth of the documents the words are the same, so a changed recipe shows; the whole takes half a minute."""
    monkeypatch.setattr("rlhf_jax.data.storyland.tokenizer.TRAINING_DOCUMENTS", 4000)
    again = train_tokenizer()
    assert isinstance(again, PreTrainedTokenizerFast)
    assert len(set(again.get_vocab()) & set(TOKENIZER.get_vocab())) > 0.9 * VOCAB_SIZE
