"""ppo_value_loss by hand on both sides of the clip."""

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

ppo_value_loss = jax.jit(losses.ppo_value_loss)
value_gradient = jax.jit(jax.grad(lambda *a: losses.ppo_value_loss(*a)[0].total, (0, 1, 2)))


def one(value: float, old: float, target: float):
    return *(jnp.full((1, 1), x) for x in (value, old, target)), jnp.ones((1, 1), bool)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "gradient", "clipped"),
    [
        (1.1, 1.0, 3.0, 0.5 * 1.9**2, -1.9, 0.0),  # inside the clip: plain half squared error
        (
            2.0,
            1.0,
            3.0,
            0.5 * 1.8**2,
            0.0,
            1.0,
        ),  # moved towards the return by more than 0.2: held at 1.2
        (0.0, 1.0, 3.0, 0.5 * 3.0**2, -3.0, 0.0),  # moved away: the larger, unclipped error
        (4.5, 1.0, 3.0, 0.5 * 1.8**2, 0.0, 1.0),  # overshot: |4.5 - 3| < |1.2 - 3|
    ],
)
def test_clip_takes_the_larger_error_and_the_half_once(value, old, target, loss, gradient, clipped):
    """PITFALLS 25: max, not min; factor 0.5 once."""
    got, metrics = ppo_value_loss(*one(value, old, target))
    assert float(got.value) == pytest.approx(loss, rel=1e-5)
    assert float(metrics["value_clip_fraction"].value) == clipped
    assert float(value_gradient(*one(value, old, target))[0][0, 0]) == pytest.approx(
        gradient, rel=1e-5
    )


def case(seed: int = 0):
    rng = np.random.default_rng(seed)
    old, returns, noise = rng.normal(size=(3, 3, 6)).astype(np.float32)
    return (
        old + np.float32(0.3) * noise,
        old,
        returns,
        np.arange(6)[None] < rng.integers(1, 7, (3, 1)),
    )


@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.2, 1.0, None]))
@settings(max_examples=40, deadline=None)
def test_value_loss_equals_a_loop(seed, clip_value):
    values, old, returns, mask = case(seed)
    total = clipped = 0.0
    bound = np.inf if clip_value is None else clip_value
    for v, o, r in zip(*(np.float64(x[mask]) for x in (values, old, returns)), strict=True):
        error, held = (v - r) ** 2, (np.clip(v, o - bound, o + bound) - r) ** 2
        total += 0.5 * max(error, held)
        clipped += held > error
    loss, metrics = ppo_value_loss(
        *(jnp.asarray(x) for x in (values, old, returns, mask)), clip_value=clip_value
    )
    np.testing.assert_allclose(loss.total, total, rtol=1e-4)
    assert float(loss.count) == mask.sum()
    assert float(metrics["value_clip_fraction"].total) == pytest.approx(clipped)
    np.testing.assert_allclose(
        metrics["value_error"].value, np.mean((values - returns)[mask] ** 2), rtol=1e-5
    )


def test_explained_variance_follows_from_added_up_batches():
    """PITFALLS 21: a ratio of sums over all batches, not a mean of ratios."""
    values, old, returns, mask = case(3)
    inputs = [jnp.asarray(x) for x in (values, old, returns, mask)]
    parts = [ppo_value_loss(*(x[i : i + 1] for x in inputs))[1] for i in range(3)]
    added = {name: parts[0][name] + parts[1][name] + parts[2][name] for name in parts[0]}
    spread = added["return_square"].value - jnp.square(added["return"].value)
    error = (values - returns)[mask] ** 2
    np.testing.assert_allclose(
        1 - added["value_error"].value / spread, 1 - error.mean() / returns[mask].var(), rtol=1e-4
    )
    np.testing.assert_allclose(added["value"].value, values[mask].mean(), rtol=1e-5)


def test_unclipped_is_half_the_squared_error_wherever_the_old_value_was():
    values, old, returns, mask = (jnp.asarray(x) for x in case(4))
    loss, _ = ppo_value_loss(values, old + 1e3, returns, mask, clip_value=None)
    np.testing.assert_allclose(
        loss.total, 0.5 * np.sum(np.square(values - returns)[mask]), rtol=1e-6
    )


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e6])
def test_poisoned_padding_reaches_neither_loss_nor_gradient(poison):
    """PITFALLS 17."""
    *arrays, mask = case(1)
    clean = [jnp.asarray(np.where(mask, x, 0)) for x in arrays]
    dirty = [jnp.asarray(np.where(mask, x, poison)) for x in arrays]
    mask = jnp.asarray(mask)
    jax.tree.map(
        np.testing.assert_array_equal, ppo_value_loss(*dirty, mask), ppo_value_loss(*clean, mask)
    )
    np.testing.assert_array_equal(value_gradient(*dirty, mask)[0], value_gradient(*clean, mask)[0])


def test_gradient_reaches_the_new_values_only():
    to_values, to_old, to_returns = value_gradient(*(jnp.asarray(x) for x in case()))
    assert float(jnp.max(jnp.abs(to_values))) > 0.1
    np.testing.assert_array_equal(to_old, 0)
    np.testing.assert_array_equal(to_returns, 0)


def test_empty_mask_gives_zero():
    values, old, returns, mask = (jnp.asarray(x) for x in case())
    loss, _ = ppo_value_loss(values, old, returns, jnp.zeros_like(mask))
    assert float(loss.value) == 0


def test_gradient_matches_differences():
    # Rows 0.05 inside or well outside the clip: no difference quotient straddles its corner.
    values = jnp.array([[1.1, 2.0, 0.0]])
    old, returns, mask = jnp.ones((1, 3)), jnp.full((1, 3), 3.0), jnp.ones((1, 3), bool)
    check_grads(
        lambda v: ppo_value_loss(v, old, returns, mask)[0].value, (values,), 1, atol=1e-2, rtol=1e-2
    )
