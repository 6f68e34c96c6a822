"""Ids without a text are never sampled, and a tokenizer never hands a model an id that it has no embedding for."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers

from rlhf_jax import log_probs, sharding
from rlhf_jax.models import (
    DecoderConfig,
    language_model,
    load_hf,
    lora_model,
    save_hf,
    scalar_model,
)
from rlhf_jax.models.vocabulary import unused_ids, with_texts_only
from rlhf_jax.run import networks, responses
from rlhf_jax.sampling.generate import Sampling, sample_token
from rlhf_jax.sampling.refill import Rows, generate_many
from rlhf_jax.types import PromptBatch

CONFIG = DecoderConfig(24, 32, 1, 16, 2)
WORDS = ["<unk>", "</s>", *(f"w{i}" for i in range(2, 18))]


def tokenizer_of(
    vocabulary: dict[str, int],
    special: tuple[str, ...] = (),
    ordinary: tuple[str, ...] = (),
    **settings,
):
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in special])
    inner.add_tokens([tokenizers.AddedToken(token, special=False) for token in ordinary])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, **{"unk_token": "<unk>", "eos_token": "</s>"} | settings
    )


def padded(config: DecoderConfig = CONFIG, seed: int = 0):
    """A model whose likeliest ids are those of its padded rows."""
    model = language_model(config)
    params = model.init(jax.random.key(seed))
    table = "embed/embedding" if config.tied else "unembed/kernel"
    part, leaf = table.split("/")
    noise = 0.3 * jax.random.normal(jax.random.key(seed + 1), params[part][leaf].shape)
    rows = noise.at[18:].multiply(9) if config.tied else noise.at[:, 18:].multiply(9)
    return model, params | {part: {leaf: rows}}


def prompts(rows: int) -> PromptBatch:
    return PromptBatch(jnp.full((rows, 3), 4), jnp.full((rows,), 3), jnp.arange(rows))


def test_ids_without_a_text_are_the_padding_and_the_holes():
    assert unused_ids(tokenizer_of({word: i for i, word in enumerate(WORDS)}), 18) == ()
    assert unused_ids(tokenizer_of({word: i for i, word in enumerate(WORDS)}), 24) == ((18, 24),)
    holes = {"<unk>": 1, "</s>": 2, "a": 5, "b": 9}
    assert unused_ids(tokenizer_of(holes), 10) == ((0, 1), (3, 5), (6, 9))
    assert unused_ids(object(), 10) == ()


@pytest.mark.parametrize(
    ("tied", "how"),
    [(True, {}), (False, {"temperature": 3.0, "top_p": 0.9}), (True, {"temperature": 0.0})],
    ids=str,
)
def test_a_loaded_model_never_samples_an_id_without_a_text(tied: bool, how: dict, tmp_path: Path):
    model, params = padded(dataclasses.replace(CONFIG, tied=tied))
    tokenizer = tokenizer_of({word: i for i, word in enumerate(WORDS)})
    save_hf(tmp_path, model, params, tokenizer)
    loaded, again, _ = load_hf(tmp_path)
    assert loaded.config == dataclasses.replace(model.config, unused_ids=((18, 24),))
    hidden = jax.random.normal(jax.random.key(3), (64, 16))
    assert (
        jnp.mean(jnp.argmax(model.head(params, hidden), axis=-1) >= 18) > 0.5
    )  # they are what it would draw
    samples = generate_many(
        loaded,
        again,
        prompts(8),
        jax.random.key(0),
        Sampling(max_new_tokens=8, **how),
        rows=Rows(count=4),
    )
    assert samples.tokens.max() < 18
    save_hf(tmp_path / "again", loaded, again, tokenizer)
    assert load_hf(tmp_path / "again")[0] is loaded
    np.testing.assert_array_equal(
        load_hf(tmp_path / "again")[1]["embed"]["embedding"], params["embed"]["embedding"]
    )


@pytest.mark.parametrize(
    "how", [{"top_k": 20}, {"top_p": 0.99}, {"temperature": 9.0}, {"temperature": 0.0}], ids=str
)
def test_no_setting_of_the_sampler_brings_such_an_id_back(how: dict):
    """Of 24 logits 18 count, so that the 20 likeliest are these 18."""
    model, params = padded(dataclasses.replace(CONFIG, unused_ids=((18, 24),)))
    logits = model.head(params, jax.random.normal(jax.random.key(3), (512, 16)))
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | how
    tokens, logp = sample_token(logits, jax.random.uniform(jax.random.key(4), (512, 2)), **settings)
    assert tokens.max() < 18
    assert jnp.isfinite(logp).all()


def test_sampler_update_and_entropy_speak_of_the_same_distribution():
    """The log-probs of the sampler are those of the update, by hand too; entropy and gradients are finite."""
    model, params = padded(dataclasses.replace(CONFIG, unused_ids=((18, 24),)))
    hidden = jax.random.normal(jax.random.key(3), (4, 6, 16))
    logits = model.head(params, hidden)
    uniform = jax.random.uniform(jax.random.key(4), (24, 2))
    drawn, sampled = sample_token(
        logits.reshape(24, -1), uniform, temperature=0.7, top_k=0, top_p=1.0
    )
    tokens = jnp.concatenate([jnp.zeros((4, 1), jnp.int32), drawn.reshape(4, 6)[:, :-1]], axis=1)

    def read(params):
        return log_probs.token_log_probs_and_entropy(
            hidden, partial(model.head, params), tokens, temperature=0.7
        )

    def loss(params):
        logp, entropy = read(params)
        return jnp.sum(logp) + jnp.sum(entropy)

    (logp, entropy), slopes = jax.jit(lambda p: (read(p), jax.grad(loss)(p)))(params)
    np.testing.assert_allclose(logp[:, 1:], sampled.reshape(4, 6)[:, :-1], atol=1e-5)
    plain = jax.nn.log_softmax((hidden @ params["embed"]["embedding"].T)[..., :18] / 0.7)
    by_hand = jnp.take_along_axis(plain[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(logp[:, 1:], by_hand, atol=1e-5)
    np.testing.assert_allclose(
        entropy[:, 1:], -jnp.sum(jnp.exp(plain) * plain, axis=-1)[:, :-1], atol=1e-5
    )
    assert all(jnp.isfinite(slope).all() for slope in jax.tree.leaves(slopes))
    np.testing.assert_array_equal(slopes["embed"]["embedding"][18:], 0)


def test_a_model_put_together_by_hand_is_sampled_without_its_padding():
    """`sample_responses` knows the tokenizer, whatever the config of the model says."""
    model, params = padded()
    tokenizer = tokenizer_of({word: i for i, word in enumerate(WORDS)})
    mesh = sharding.make_mesh((1, 1, 1), devices=jax.devices()[:1])
    network = networks.Network(model, params, tokenizer)
    _, samples = responses.sample_responses(
        network,
        responses.EncodedPrompts([[3, 4]] * 8, 4),
        mesh,
        Sampling(max_new_tokens=8),
        seed=0,
        batch_size=8,
    )
    assert samples.tokens.max() < 18
    whole = tokenizer_of({f"w{i}" if i else "<unk>": i for i in range(24)}, eos_token="w1")
    assert with_texts_only(model, whole) is model
    masked = with_texts_only(model, tokenizer)
    assert masked is with_texts_only(model, tokenizer)
    assert masked is language_model(dataclasses.replace(CONFIG, unused_ids=((18, 24),)))
    other = lora_model(model, {}, alpha=1)
    hidden = jnp.ones((2, 16))
    np.testing.assert_array_equal(
        with_texts_only(other, tokenizer).head(params, hidden), masked.head(params, hidden)
    )
    assert with_texts_only(other, tokenizer) is with_texts_only(other, tokenizer)


def test_a_reward_model_has_no_ids_to_leave_out(tmp_path: Path):
    model = scalar_model(CONFIG)
    save_hf(
        tmp_path,
        model,
        model.init(jax.random.key(0)),
        tokenizer_of({word: i for i, word in enumerate(WORDS)}),
    )
    assert load_hf(tmp_path)[0] is model


# ----------------------------------------------------------------------------------- more tokens than embeddings


def saved(folder: Path, tokenizer) -> Path:
    model = language_model(dataclasses.replace(CONFIG, vocab_size=18))
    save_hf(folder, model, model.init(jax.random.key(0)), tokenizer)
    return folder


def base() -> dict[str, int]:
    return {word: i for i, word in enumerate(WORDS)}


def test_a_special_token_beyond_the_table_that_no_text_gives_is_fine(tmp_path: Path):
    """As Gemma 3 has one for images. It stays in the tokenizer that is written again."""
    tokenizer = tokenizer_of(base(), special=("<picture>",), pad_token="<picture>")
    model, params, loaded = load_hf(saved(tmp_path / "one", tokenizer))
    assert loaded.convert_tokens_to_ids("<picture>") == 18
    assert (
        max(loaded.encode("w4 <picture> w5", add_special_tokens=False, split_special_tokens=True))
        < 18
    )
    assert json.loads((tmp_path / "one" / "config.json").read_text())["pad_token_id"] < 18
    save_hf(tmp_path / "two", model, params, loaded)
    assert load_hf(tmp_path / "two")[2].convert_tokens_to_ids("<picture>") == 18


def test_a_token_beyond_the_table_that_something_writes_is_refused(tmp_path: Path):
    template = "{% for m in messages %}<turn>{{ m.content }}{% endfor %}"
    for name, tokenizer, message in (
        (
            "ordinary",
            tokenizer_of(base(), ordinary=("w99",)),
            r"19 tokens, more than .*vocab_size=18.*'w99' has the id 18",
        ),
        ("base", tokenizer_of(base() | {"w99": 40}), r"'w99' has the id 40"),
        (
            "eos",
            tokenizer_of(base(), special=("<end>",), eos_token="<end>"),
            r"'<end>' the id 18.*its eos_token writes it",
        ),
        (
            "template",
            tokenizer_of(base(), special=("<turn>",), chat_template=template),
            "its chat template writes it",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            load_hf(saved(tmp_path / name, tokenizer))
    tokenizer = tokenizer_of(base(), special=("<start>",))
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", 18)]
    )
    with pytest.raises(ValueError, match="its post-processor writes it"):
        load_hf(saved(tmp_path / "processor", tokenizer))


def test_a_special_token_that_merges_can_make_is_refused(tmp_path: Path):
    pieces = {"a": 0, "b": 1, "<unk>": 2, "ab": 18}
    for merges, fine in (([("a", "b")], False), ([], True)):
        inner = tokenizers.Tokenizer(
            tokenizers.models.BPE(vocab=pieces, merges=merges, unk_token="<unk>")
        )
        inner.add_special_tokens([tokenizers.AddedToken("ab", special=True)])
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=inner, unk_token="<unk>", eos_token="<unk>"
        )
        folder = saved(tmp_path / str(fine), tokenizer)
        if fine:
            assert load_hf(folder)[0].config.unused_ids == ((3, 18),)
            continue
        with pytest.raises(ValueError, match="'ab' has the id 18"):
            load_hf(folder)
