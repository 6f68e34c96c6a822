"""Measuring models: greedy samples have a KL too, each validation row counts once, each prompt once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from msgspec import structs

from experiments import evaluate
from rlhf_jax import scoring
from rlhf_jax.data.schema import Ranking
from rlhf_jax.data.storyland import tokenizer as storyland_assets
from rlhf_jax.data.text import load_tokenizer
from rlhf_jax.evaluation import answers as answers_lib
from rlhf_jax.evaluation import held_out_rankings
from rlhf_jax.evaluation.alignment_tax import lm_loss
from rlhf_jax.models import DecoderConfig, language_model
from rlhf_jax.run import datasets
from rlhf_jax.run import networks as networks_lib
from rlhf_jax.sampling.generate import Sampling, generate
from rlhf_jax.sharding import make_mesh
from rlhf_jax.types import PromptBatch
from tests import tiny

MODEL = language_model(DecoderConfig(11, 24, 1, 8, 2))


def one_device() -> jax.sharding.Mesh:
    return make_mesh((1, 1, 1), devices=jax.devices()[:1])


def said(
    texts: list[list[str]], reward: np.ndarray, gold: np.ndarray | None = None
) -> answers_lib.Answers:
    lengths = np.array([[len(answer) for answer in row] for row in texts])
    return answers_lib.Answers(texts, gold, [], reward, lengths, samples=None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_kl_is_a_number_for_greedy_samples_too(temperature, monkeypatch):
    """Greedy: both models at temperature 1, whose log-ratio is computed here by hand."""
    policy, other = (MODEL.init(jax.random.key(seed)) for seed in (0, 1))
    prompts = PromptBatch(jnp.ones((3, 4), jnp.int32), jnp.array([2, 3, 4]), jnp.arange(3))
    drawn = generate(
        MODEL,
        policy,
        prompts,
        jax.random.key(2),
        Sampling(max_new_tokens=6, temperature=temperature),
    )
    samples = jax.tree.map(np.asarray, drawn)
    tokenizer = load_tokenizer(storyland_assets.assets())  # both have it; nothing is encoded here
    networks = [networks_lib.Network(MODEL, params, tokenizer) for params in (policy, other)]
    monkeypatch.setattr(networks_lib, "load_network", lambda *_: networks[1])
    config = ConfigDict(
        {"reference": "reference", "temperature": temperature, "batch_size": 2, "decoder": {}}
    )
    answers = answers_lib.Answers([], None, [], np.zeros(3), np.zeros(3), samples)
    found = evaluate.kl_to_reference(networks[0], answers, config, one_device())

    used = temperature or 1.0
    mask = scoring.response_mask(drawn.prompt_lengths, drawn.lengths, drawn.tokens.shape[1])
    logp = [
        scoring.sequence_log_probs(
            MODEL, params, drawn.tokens, drawn.lengths, mask, temperature=used
        ).sum(axis=1)
        for params in (policy, other)
    ]
    assert np.isfinite(found)
    assert found == pytest.approx(float(jnp.mean(logp[0] - logp[1])), abs=1e-4)
    assert evaluate.kl_temperature(config) == used


def test_each_validation_row_counts_once_whatever_the_batch():
    """Five rows in batches of four: three rows of a second epoch fill up, and have no say."""
    rows = jax.tree.map(np.asarray, tiny.lm_batch(5, seed=1))
    params = tiny.LANGUAGE.init(jax.random.key(0))
    losses = [
        lm_loss(
            tiny.LANGUAGE,
            params,
            datasets.held_out_batches(rows, one_device(), batch_size=size, seed=0),
        )
        for size in (1, 4, 5, 8)
    ]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)
    batches = datasets.held_out_batches(rows, one_device(), batch_size=4, seed=0)
    assert sum(int(batch.mask.sum()) for batch in batches) == int(rows.mask.sum())
    assert len(datasets.held_out_batches(rows, one_device(), batch_size=4, seed=0, most=1)) == 1


def test_the_same_answer_of_two_models_is_a_tie_although_it_was_scored_twice():
    """In bfloat16 two scores of one text differ by a hundredth, far more than the tolerance for rounding."""
    ours = said([["yes", "no"], ["red", "blue"]], np.array([[1.0, 2.0], [0.5, 0.25]]))
    other = said([["yes"], ["blue"]], np.array([[1.01], [0.26]]))
    results = answers_lib.compare({"sft": ours, "ppo": other})
    # "yes" ties with "yes" and loses to "no"; "blue" loses to "red" and ties with "blue".
    assert results["win_rate_vs_sft_by_reward_model"]["ppo"]["value"] == pytest.approx(0.25)
    assert results["reward_score"]["ppo"] == pytest.approx(
        0.635
    )  # the means are those of the scores as they came


def test_a_prompt_that_stands_in_the_file_twice_is_one_prompt():
    rng = np.random.default_rng(0)
    reward = {name: rng.normal(size=(20, 1)) for name in ("sft", "ppo")}
    texts = {name: [[f"{name} {i}"] for i in range(20)] for name in reward}
    asked = [f"p{i}" for i in range(20)]
    once = answers_lib.compare({name: said(texts[name], reward[name]) for name in reward}, asked)
    twice = {name: said(2 * texts[name], np.tile(reward[name], (2, 1))) for name in reward}
    again, apart = answers_lib.compare(twice, 2 * asked), answers_lib.compare(twice)
    key = "win_rate_vs_sft_by_reward_model"
    assert again[key]["ppo"] == pytest.approx(once[key]["ppo"])
    assert again[key]["ppo"]["n"] == 20
    assert apart[key]["ppo"]["n"] == 40


def test_two_labelers_of_a_prompt_are_one_prompt_of_the_reward_models_interval():
    prompts = [f"What is {i}?" for i in range(40)]
    rng = np.random.default_rng(1)
    scores = {(p, answer): float(rng.normal()) for p in prompts for answer in ("a", "b")}
    rankings = [Ranking(p, ("a", "b"), (0, 1), id=f"{i}/x") for i, p in enumerate(prompts)]
    second = [structs.replace(r, id=f"{i}/y") for i, r in enumerate(rankings)]
    alone, both = (
        held_out_rankings.evaluate(rankings, scores),
        held_out_rankings.evaluate(rankings + second, scores),
    )
    for key in ("accuracy", "length_only"):
        assert both[key]["n"] == 2 * alone[key]["n"]
        assert [both[key][end] for end in ("value", "low", "high")] == pytest.approx(
            [alone[key][end] for end in ("value", "low", "high")]
        )
