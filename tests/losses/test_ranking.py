"""ranking_loss against a loop over pairs."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from rlhf_jax import losses

pytestmark = pytest.mark.usefixtures("strict_dtypes")

ranking_loss = jax.jit(losses.ranking_loss, static_argnames="divisor")
ranking_gradient = jax.jit(jax.grad(lambda r, ranks: losses.ranking_loss(r, ranks)[0].value))


def ranking_by_loops(rewards, ranks, divisor):
    """Eq. 1 in float64, one pair at a time."""
    prompts, right, margins, log_losses = [], [], [], []
    for r, rank in zip(np.float64(rewards), ranks, strict=True):
        present = [k for k in range(len(rank)) if rank[k] >= 0]
        pairs = [(w, v) for w, v in itertools.permutations(present, 2) if rank[w] < rank[v]]
        terms = [np.log1p(np.exp(-(r[w] - r[v]))) for w, v in pairs]
        if pairs:
            prompts.append(
                sum(terms)
                / (len(pairs) if divisor == "pairs" else len(present) * (len(present) - 1) / 2)
            )
        right += [float(r[w] > r[v]) + 0.5 * float(r[w] == r[v]) for w, v in pairs]
        margins += [r[w] - r[v] for w, v in pairs]
        log_losses += terms
    return prompts, {"accuracy": right, "margin": margins, "log_loss": log_losses}


@given(st.integers(0, 10_000), st.sampled_from(["pairs", "choose"]))
@settings(max_examples=60, deadline=None)
def test_ranking_loss_equals_a_loop_over_pairs(seed, divisor):
    """Ragged K, ties among labels and among rewards, prompts without any strict pair."""
    rng = np.random.default_rng(seed)
    rewards = rng.integers(-3, 4, (3, 5)).astype(np.float32) / 2
    ranks = rng.integers(-1, 4, (3, 5)).astype(np.int32)
    prompts, pairwise = ranking_by_loops(rewards, ranks, divisor)
    loss, metrics = ranking_loss(jnp.asarray(rewards), jnp.asarray(ranks), divisor=divisor)
    np.testing.assert_allclose(loss.total, sum(prompts), rtol=1e-5, atol=1e-6)
    assert float(loss.count) == len(prompts)
    for name, values in pairwise.items():
        np.testing.assert_allclose(metrics[name].total, sum(values), rtol=1e-5, atol=1e-5)
        assert float(metrics[name].count) == len(values)
    assert (float(metrics["pairs"].total), float(metrics["pairs"].count)) == (
        len(pairwise["margin"]),
        len(prompts),
    )


def test_one_pair_by_hand():
    loss, _ = ranking_loss(jnp.array([[-0.3, 0.7]]), jnp.array([[1, 0]]))
    assert float(loss.value) == pytest.approx(np.log(1 + np.exp(-1)), rel=1e-6)


def test_divisors_differ_only_by_ties():
    rewards = jnp.array([[1.0, 0.0, 0.0]])
    tied, strict = jnp.array([[0, 1, 1]]), jnp.array([[0, 1, 2]])
    pairs, choose = (
        float(ranking_loss(rewards, tied, divisor=d)[0].value) for d in ("pairs", "choose")
    )
    assert choose == pytest.approx(pairs * 2 / 3, rel=1e-6)
    pairs, choose = (
        float(ranking_loss(rewards, strict, divisor=d)[0].value) for d in ("pairs", "choose")
    )
    assert choose == pytest.approx(pairs, rel=1e-6)


@pytest.mark.parametrize("gap", [200.0, 1e4, 1e30])
def test_extreme_rewards_do_not_overflow(gap):
    """PITFALLS 46: log(sigmoid(x)) is -inf from x = -104 on; softplus is linear there."""
    rewards, ranks = jnp.array([[0.0, gap]]), jnp.array([[0, 1]])
    loss, _ = ranking_loss(rewards, ranks)
    assert float(loss.value) == pytest.approx(gap)
    np.testing.assert_allclose(ranking_gradient(rewards, ranks), [[-1.0, 1.0]])
    loss, _ = ranking_loss(rewards, 1 - ranks)
    assert float(loss.value) == 0
    np.testing.assert_array_equal(ranking_gradient(rewards, 1 - ranks), 0)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e6])
def test_absent_responses_reach_neither_loss_nor_gradient(poison):
    """PITFALLS 17: an absent response of K is padding too."""
    ranks = jnp.array([[0, 2, -1, 1], [-1, -1, -1, -1]])
    clean = jnp.where(ranks >= 0, jnp.array([[1.0, 0.5, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]]), 0.0)
    dirty = jnp.where(ranks >= 0, clean, poison)
    jax.tree.map(
        np.testing.assert_array_equal, ranking_loss(clean, ranks), ranking_loss(dirty, ranks)
    )
    np.testing.assert_array_equal(ranking_gradient(dirty, ranks), ranking_gradient(clean, ranks))
    three = jnp.array([[1.0, 0.5, -1.0]])
    np.testing.assert_allclose(
        ranking_loss(dirty, ranks)[0].value,
        ranking_loss(three, jnp.array([[0, 2, 1]]))[0].value,
        rtol=1e-6,
    )


def test_a_batch_without_strict_pairs_is_zero_not_nan():
    """PITFALLS 20."""
    rewards, ranks = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[0, 0], [1, -1]])
    for divisor in ("pairs", "choose"):
        loss, metrics = ranking_loss(rewards, ranks, divisor=divisor)
        assert (float(loss.total), float(loss.count), float(loss.value)) == (0.0, 0.0, 0.0)
        assert float(metrics["accuracy"].value) == 0
    np.testing.assert_array_equal(ranking_gradient(rewards, ranks), 0)


def test_equal_rewards_count_half_in_accuracy():
    _, metrics = ranking_loss(jnp.zeros((1, 3)), jnp.array([[0, 1, 2]]))
    assert float(metrics["accuracy"].value) == 0.5


def test_duplicate_completions_get_equal_gradients():
    """PITFALLS 45: all pairs of a prompt in one loss, so two copies of a response pull alike."""
    grad = ranking_gradient(jnp.array([[0.4, 0.4, -1.0, 2.0]]), jnp.array([[1, 1, 0, 2]]))
    assert float(grad[0, 0]) == float(grad[0, 1]) != 0


def test_every_prompt_weighs_the_same_whatever_its_k():
    """PITFALLS 45: 36 pairs of one prompt do not outvote one pair of another."""
    rewards = jnp.zeros((2, 9))
    ranks = jnp.array([list(range(9)), [0, 1] + [-1] * 7])
    grad = jnp.abs(ranking_gradient(rewards, ranks))
    loss, _ = ranking_loss(rewards, ranks)
    assert float(loss.value) == pytest.approx(np.log(2), rel=1e-6)
    assert float(grad[1, 0]) == pytest.approx(0.25)  # 0.5 from the pair, halved by the two prompts
    assert float(jnp.max(grad[0])) <= 0.25


@given(st.permutations(range(5)), st.floats(-20, 20))
@settings(max_examples=25, deadline=None)
def test_loss_ignores_the_order_of_responses_and_a_shift_of_rewards(order, shift):
    rewards, ranks = np.float32([[0.1, 2.0, -0.7, 0.4, 0.4]]), np.int32([[1, 0, 2, 2, -1]])
    plain, _ = ranking_loss(jnp.asarray(rewards), jnp.asarray(ranks))
    moved, _ = ranking_loss(
        jnp.asarray(rewards[:, list(order)] + np.float32(shift)), jnp.asarray(ranks[:, list(order)])
    )
    np.testing.assert_allclose(moved.value, plain.value, atol=1e-5)


def test_leading_axes_are_all_prompts():
    rng = np.random.default_rng(0)
    rewards, ranks = (
        rng.normal(size=(2, 3, 4)).astype(np.float32),
        rng.integers(-1, 3, (2, 3, 4)).astype(np.int32),
    )
    nested = ranking_loss(jnp.asarray(rewards), jnp.asarray(ranks))
    flat = ranking_loss(jnp.asarray(rewards.reshape(6, 4)), jnp.asarray(ranks.reshape(6, 4)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), nested, flat)


def test_gradient_matches_differences():
    ranks = jnp.array([[0, 2, 1, 1]])
    check_grads(
        lambda r: ranking_loss(r, ranks)[0].value,
        (jnp.array([[0.3, -0.4, 1.1, 0.2]]),),
        1,
        atol=1e-2,
        rtol=1e-2,
    )


def test_unknown_divisor_is_refused():
    inner = getattr(losses.ranking_loss, "__wrapped__", losses.ranking_loss)
    with pytest.raises(ValueError, match="divisor='mean' is unknown"):
        inner(jnp.zeros((1, 2)), jnp.zeros((1, 2), jnp.int32), divisor="mean")


def test_best_of_loss_equals_a_loop_over_prompts():
    """Ragged K, ties at the top, prompts without a choice, poisoned absent responses."""
    rewards = np.array(
        [[1.0, -2.0, 0.5, np.nan], [0.0, 3.0, 3.0, 1.0], [2.0, 2.0, 0.0, 0.0]], np.float32
    )
    ranks = jnp.array([[1, 0, 2, -1], [2, 0, 0, 1], [0, 0, -1, -1]])  # the last row holds no choice
    rewards = jnp.asarray(rewards)
    first = np.log(np.exp(1.0) + np.exp(-2.0) + np.exp(0.5)) + 2.0
    second = np.log(np.exp(0.0) + 2 * np.exp(3.0) + np.exp(1.0)) - 3.0
    (loss, metrics), gradient = jax.value_and_grad(
        lambda r: _total(losses.best_of_loss(r, ranks)), has_aux=True
    )(rewards)
    np.testing.assert_allclose(loss, first + second, rtol=1e-6)
    assert (float(metrics[0].count), float(metrics[1]["accuracy"].total)) == (2.0, 1.0)
    assert np.all(np.isfinite(gradient))
    assert not np.any(gradient[2])


def _total(result):
    return result[0].total, result


def test_best_of_loss_of_two_is_the_pairwise_loss():
    """With K = 2 the softmax of the better one is the sigmoid of the difference."""
    rewards, ranks = jnp.array([[0.3, -1.2], [0.1, 2.0]]), jnp.array([[0, 1], [0, 1]])
    best, pairs = losses.best_of_loss(rewards, ranks)[0], losses.ranking_loss(rewards, ranks)[0]
    np.testing.assert_allclose(best.value, pairs.value, rtol=1e-6)
