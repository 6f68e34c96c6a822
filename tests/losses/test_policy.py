"""ppo_policy_loss by hand at every corner of the clip."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from rlhf_jax import losses

pytestmark = pytest.mark.usefixtures("strict_dtypes")

ppo_policy_loss = jax.jit(losses.ppo_policy_loss)
policy_gradient = jax.jit(jax.grad(lambda *a: losses.ppo_policy_loss(*a)[0].total, (0, 1, 2)))


def at_ratio(ratio: float, advantage: float):
    """One token with this ratio."""
    logp = jnp.log(jnp.full((1, 1), ratio)) - 2.0
    return logp, jnp.full((1, 1), -2.0), jnp.full((1, 1), advantage), jnp.ones((1, 1), bool)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (0.5, 1.0, -0.5, -0.5, 0.0),  # worse than before at a good token: pushed back, no clip
        (1.0, 1.0, -1.0, -1.0, 0.0),
        (2.0, 1.0, -1.2, 0.0, 1.0),  # far enough: clipped, no gradient
        (0.5, -1.0, 0.8, 0.0, 1.0),
        (1.0, -1.0, 1.0, 1.0, 0.0),
        (2.0, -1.0, 2.0, 2.0, 0.0),  # a bad token made likelier: full gradient
        (50.0, -1.0, 50.0, 50.0, 0.0),  # and no second clip, however far
    ],
)
def test_clip_acts_by_the_sign_of_the_advantage(ratio, advantage, loss, gradient, clipped):
    """PITFALLS 24."""
    got, metrics = ppo_policy_loss(*at_ratio(ratio, advantage))
    assert float(got.value) == pytest.approx(loss, rel=1e-5)
    assert float(metrics["clip_fraction"].value) == clipped
    assert float(metrics["ratio_max"].value) == pytest.approx(ratio, rel=1e-5)
    assert float(policy_gradient(*at_ratio(ratio, advantage))[0][0, 0]) == pytest.approx(
        gradient, rel=1e-5
    )


def case(seed: int = 0, spread: float = 0.5):
    rng = np.random.default_rng(seed)
    old = rng.normal(-2, 1, (3, 6)).astype(np.float32)
    logp = old + rng.normal(0, spread, old.shape).astype(np.float32)
    mask = np.arange(6)[None] < rng.integers(1, 7, (3, 1))
    return logp, old, rng.normal(size=old.shape).astype(np.float32), mask


@given(st.integers(0, 10_000), st.floats(0.05, 0.5))
@settings(max_examples=40, deadline=None)
def test_policy_loss_and_metrics_equal_a_loop(seed, clip_ratio):
    """PITFALLS 42: metrics are sums over response tokens, by hand."""
    logp, old, advantages, mask = case(seed)
    total = clipped = 0.0
    for b, t in zip(*np.nonzero(mask), strict=True):
        ratio, a = np.exp(np.float64(logp[b, t]) - old[b, t]), advantages[b, t]
        gains = ratio * a, np.clip(ratio, 1 - clip_ratio, 1 + clip_ratio) * a
        total -= min(gains)
        clipped += gains[1] < gains[0]
    loss, metrics = ppo_policy_loss(
        *(jnp.asarray(x) for x in (logp, old, advantages, mask)), clip_ratio=clip_ratio
    )
    log_ratio = (logp - old)[mask]
    np.testing.assert_allclose(loss.total, total, rtol=1e-4, atol=1e-5)
    assert float(loss.count) == mask.sum() == float(metrics["clip_fraction"].count)
    assert float(metrics["clip_fraction"].total) == clipped
    np.testing.assert_allclose(metrics["approx_kl"].value, 0.5 * np.mean(log_ratio**2), rtol=1e-5)
    np.testing.assert_allclose(metrics["ratio"].value, np.mean(np.exp(log_ratio)), rtol=1e-5)
    np.testing.assert_allclose(metrics["ratio_max"].value, np.max(np.exp(log_ratio)), rtol=1e-5)
    np.testing.assert_allclose(metrics["log_ratio_max"].value, np.max(np.abs(log_ratio)), rtol=1e-5)


def test_before_the_first_update_everything_is_neutral():
    """PITFALLS 1, RECIPE D25: ratio 1, approximate KL 0, nothing clipped; the gradient is plain policy gradient."""
    logp, _, advantages, mask = (jnp.asarray(x) for x in case())
    loss, metrics = ppo_policy_loss(logp, logp, advantages, mask)
    assert float(metrics["approx_kl"].value) == float(metrics["clip_fraction"].value) == 0
    assert float(metrics["ratio_max"].value) == float(metrics["ratio"].value) == 1
    assert float(metrics["log_ratio_max"].value) == 0
    np.testing.assert_allclose(loss.total, -jnp.sum(jnp.where(mask, advantages, 0)), rtol=1e-5)
    np.testing.assert_allclose(
        policy_gradient(logp, logp, advantages, mask)[0], jnp.where(mask, -advantages, 0)
    )


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e6])
def test_poisoned_padding_reaches_neither_loss_nor_gradient(poison):
    """PITFALLS 17."""
    *arrays, mask = case(1)
    clean = [jnp.asarray(np.where(mask, x, 0)) for x in arrays]
    dirty = [jnp.asarray(np.where(mask, x, poison)) for x in arrays]
    mask = jnp.asarray(mask)
    jax.tree.map(
        np.testing.assert_array_equal, ppo_policy_loss(*dirty, mask), ppo_policy_loss(*clean, mask)
    )
    np.testing.assert_array_equal(
        policy_gradient(*dirty, mask)[0], policy_gradient(*clean, mask)[0]
    )


def test_gradient_reaches_the_new_log_probs_only():
    """PITFALLS 26: nothing flows into the critic through advantages."""
    to_logp, to_old, to_advantages = policy_gradient(*(jnp.asarray(x) for x in case()))
    assert float(jnp.max(jnp.abs(to_logp))) > 0.1
    np.testing.assert_array_equal(to_old, 0)
    np.testing.assert_array_equal(to_advantages, 0)


@pytest.mark.parametrize("log_ratio", [-500.0, 90.0, 500.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_runaway_ratio_stays_finite_and_is_reported(log_ratio, advantage):
    """PITFALLS 17: exp(90) is inf in float32 and 0 * inf would be the gradient."""
    arguments = (
        jnp.full((1, 1), log_ratio),
        jnp.zeros((1, 1)),
        jnp.full((1, 1), advantage),
        jnp.ones((1, 1), bool),
    )
    loss, metrics = ppo_policy_loss(*arguments)
    assert np.isfinite(loss.value)
    assert np.isfinite(policy_gradient(*arguments)[0]).all()
    assert float(metrics["log_ratio_max"].value) == abs(log_ratio)


def test_a_real_nan_is_not_hidden():
    logp, old, advantages, mask = (jnp.asarray(x) for x in case())
    loss, metrics = ppo_policy_loss(
        logp.at[0, 0].set(jnp.nan), old, advantages, mask.at[0, 0].set(True)
    )
    assert np.isnan(loss.value)
    assert np.isnan(metrics["log_ratio_max"].value)


def test_empty_mask_gives_zero():
    logp, old, advantages, mask = (jnp.asarray(x) for x in case())
    loss, metrics = ppo_policy_loss(logp, old, advantages, jnp.zeros_like(mask))
    assert (
        float(loss.value)
        == float(metrics["approx_kl"].value)
        == float(metrics["ratio_max"].value)
        == 0
    )


def test_gradient_matches_differences():
    logp, old, advantages, mask = (jnp.asarray(x) for x in case(2, spread=0.1))
    check_grads(
        lambda x: ppo_policy_loss(x, old, advantages, mask)[0].value,
        (logp,),
        1,
        atol=1e-2,
        rtol=1e-2,
    )
