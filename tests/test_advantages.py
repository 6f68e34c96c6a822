"""advantages.py against numpy loops, hand numbers and poisoned padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax import advantages

pytestmark = pytest.mark.usefixtures("strict_dtypes")

gae = jax.jit(advantages.gae)
reward_to_go = jax.jit(advantages.reward_to_go)


def gae_by_loops(rewards, values, starts, ends, gamma, lam, bootstrap):
    """The definition in float64: A_t as the sum over k of (gamma lam)^k delta_{t+k}, row by row."""
    out = np.zeros(rewards.shape)
    for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
        after = np.append(np.float64(values[b, start:end]), bootstrap[b])
        delta = rewards[b, start:end] + gamma * after[1:] - after[:-1]
        for t in range(end - start):
            out[b, start + t] = sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:]))
    return out


def ragged(seed: int, rows: int = 4, slots: int = 9):
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, 4, rows)
    ends = starts + rng.integers(0, slots - 4, rows)  # an empty response among them
    place = np.arange(slots)[None]
    mask = (place >= starts[:, None]) & (place < ends[:, None])
    rewards, values = rng.normal(size=(2, rows, slots)).astype(np.float32)
    return rewards, values, mask, starts, ends


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1), st.booleans())
@settings(max_examples=40, deadline=None)
def test_gae_equals_a_loop_on_ragged_rows(seed, gamma, lam, truncated):
    """PITFALLS 15: bootstrap 0 at an end, V(s_T) where the length limit cut."""
    rewards, values, mask, starts, ends = ragged(seed)
    bootstrap = np.float32([0.5, -1.0, 2.0, 0.0]) if truncated else np.zeros(4, np.float32)
    expected = gae_by_loops(rewards, values, starts, ends, gamma, lam, bootstrap)
    inputs = [jnp.asarray(x) for x in (rewards, values, mask)]
    options = {
        "gamma": jnp.float32(gamma),
        "lam": jnp.float32(lam),
        "bootstrap": jnp.asarray(bootstrap),
    }
    got, returns = gae(*inputs, **options)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(returns, np.where(mask, expected + values, 0), atol=1e-5)
    if not truncated:
        ended, _ = gae(*inputs, **(options | {"bootstrap": None}))
        # Another program: without a bootstrap a product with 0 is missing, and the compiler joins others.
        np.testing.assert_allclose(ended, got, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e6])
def test_gae_does_not_see_anything_outside_the_mask(poison):
    """PITFALLS 14: the value after the last token is 0, whatever stands in the padding."""
    rewards, values, mask, *_ = ragged(3)
    clean = gae(*(jnp.asarray(x) for x in (rewards, values, mask)))
    dirty = gae(
        *(jnp.asarray(np.where(mask, x, poison)) for x in (rewards, values)), jnp.asarray(mask)
    )
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(np.asarray(b)[~mask], 0)


def test_gae_by_hand_on_a_padded_row():
    # gamma 0.5, lam 0.5, values 1, 2 and bootstrap 8:
    # delta_1 = 3 + 0.5 * 8 - 2 = 5; delta_0 = 1 + 0.5 * 2 - 1 = 1; A_1 = 5; A_0 = 1 + 0.25 * 5 = 2.25
    rewards, values = jnp.array([[7.0, 1.0, 3.0, 9.0]]), jnp.array([[7.0, 1.0, 2.0, 9.0]])
    mask = jnp.array([[False, True, True, False]])
    got, returns = advantages.gae(
        rewards, values, mask, gamma=0.5, lam=0.5, bootstrap=jnp.array([8.0])
    )
    assert got.tolist() == [[0.0, 2.25, 5.0, 0.0]]
    assert returns.tolist() == [[0.0, 3.25, 7.0, 0.0]]


def test_gae_of_a_single_token_is_reward_minus_value():
    """PITFALLS 20."""
    got, returns = advantages.gae(jnp.array([[2.0]]), jnp.array([[0.5]]), jnp.array([[True]]))
    assert (got.tolist(), returns.tolist()) == ([[1.5]], [[2.0]])


@given(st.integers(0, 10_000), st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_gae_at_lambda_one_plus_values_is_reward_to_go(seed, gamma):
    rewards, values, mask, starts, ends = ragged(seed)
    inputs = [jnp.asarray(x) for x in (rewards, values, mask)]
    _, returns = gae(*inputs, gamma=jnp.float32(gamma), lam=jnp.float32(1))
    expected = np.zeros(rewards.shape)
    for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for t in range(start, end):
            expected[b, t] = sum(gamma**k * r for k, r in enumerate(rewards[b, t:end]))
    np.testing.assert_allclose(returns, expected, atol=1e-5)
    np.testing.assert_allclose(
        reward_to_go(inputs[0], inputs[2], gamma=jnp.float32(gamma)), expected, atol=1e-5
    )


def test_gae_at_lambda_zero_is_the_one_step_error():
    rewards, values, mask, *_ = ragged(5)
    got, _ = gae(*(jnp.asarray(x) for x in (rewards, values, mask)), lam=jnp.float32(0))
    after = np.append(np.where(mask, values, 0)[:, 1:], np.zeros((4, 1)), axis=1)
    np.testing.assert_allclose(got, np.where(mask, rewards + after - values, 0), atol=1e-6)


def test_leave_one_out_compares_with_the_mean_of_the_others():
    scores = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    expected = [[row[k] - np.delete(row, k).mean() for k in range(5)] for row in scores]
    got = advantages.leave_one_out(jnp.asarray(scores))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    np.testing.assert_allclose(jnp.sum(got, axis=1), 0, atol=1e-5)


def test_group_relative_is_in_standard_deviations_of_the_group():
    scores = np.random.default_rng(0).normal(5, 3, size=(3, 5)).astype(np.float32)
    expected = (scores - scores.mean(1, keepdims=True)) / scores.std(1, keepdims=True)
    np.testing.assert_allclose(advantages.group_relative(jnp.asarray(scores)), expected, atol=1e-4)


@pytest.mark.parametrize("value", [0.1, -7.7, 123.456])
def test_equal_scores_of_a_group_give_no_advantage(value):
    """PITFALLS 20: a rounding error of the mean, divided by eps, must not look like an advantage."""
    scores = jnp.full((2, 7), value)
    np.testing.assert_array_equal(advantages.group_relative(scores), 0)
    np.testing.assert_allclose(advantages.leave_one_out(scores), 0, atol=2e-5)


@pytest.mark.parametrize("estimator", [advantages.leave_one_out, advantages.group_relative])
def test_a_group_of_one_is_refused(estimator):
    with pytest.raises(ValueError, match="K=1 responses a prompt"):
        estimator(jnp.ones((4, 1)))


@given(st.permutations(range(4)), st.floats(-5, 5))
@settings(max_examples=25, deadline=None)
def test_group_advantages_follow_a_permutation_and_ignore_a_shift(order, shift):
    scores = np.float32([[0.3, -1.2, 2.0, 0.9]])
    for estimator in (advantages.leave_one_out, advantages.group_relative):
        plain = np.asarray(estimator(jnp.asarray(scores)))
        moved = estimator(jnp.asarray(scores[:, list(order)] + np.float32(shift)))
        np.testing.assert_allclose(moved, plain[:, list(order)], atol=1e-5)
