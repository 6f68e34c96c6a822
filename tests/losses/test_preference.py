"""dpo_loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rlhf_jax.losses import dpo_loss, ranking_loss

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def case():
    return np.random.default_rng(0).normal(-20, 4, (4, 6)).astype(np.float32)


def test_dpo_loss_equals_the_formula():
    chosen, rejected, ref_chosen, ref_rejected = case()
    margin = 0.3 * ((chosen - ref_chosen) - (rejected - ref_rejected))
    loss, metrics = dpo_loss(*(jnp.asarray(x) for x in case()), beta=0.3)
    np.testing.assert_allclose(loss.value, np.mean(np.log1p(np.exp(-margin))), rtol=1e-5)
    assert float(loss.count) == 6
    np.testing.assert_allclose(metrics["margin"].value, margin.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["accuracy"].value, (margin > 0).mean())
    np.testing.assert_allclose(
        metrics["chosen_reward"].value, 0.3 * (chosen - ref_chosen).mean(), rtol=1e-4
    )
    np.testing.assert_allclose(
        metrics["rejected_reward"].value, 0.3 * (rejected - ref_rejected).mean(), rtol=1e-4
    )


def test_dpo_is_the_ranking_loss_of_its_implied_rewards():
    chosen, rejected, ref_chosen, ref_rejected = (jnp.asarray(x) for x in case())
    rewards = 0.1 * jnp.stack([chosen - ref_chosen, rejected - ref_rejected], axis=1)
    pairs, _ = ranking_loss(rewards, jnp.tile(jnp.array([[0, 1]]), (6, 1)))
    np.testing.assert_allclose(
        dpo_loss(chosen, rejected, ref_chosen, ref_rejected)[0].value, pairs.value, rtol=1e-5
    )


def test_policy_at_the_reference_gives_log_two_and_half_accuracy():
    chosen, rejected, *_ = (jnp.asarray(x) for x in case())
    loss, metrics = dpo_loss(chosen, rejected, chosen, rejected)
    assert float(loss.value) == pytest.approx(np.log(2), rel=1e-6)
    assert float(metrics["accuracy"].value) == 0.5


def test_extreme_margins_do_not_overflow():
    """PITFALLS 46."""
    zero, far = jnp.zeros(1), jnp.full(1, 1e4)
    value, grad = jax.value_and_grad(lambda c: dpo_loss(c, far, zero, zero, beta=1.0)[0].value)(
        zero
    )
    assert float(value) == pytest.approx(1e4)
    assert float(grad[0]) == pytest.approx(-1)


def test_gradient_raises_the_chosen_lowers_the_rejected_and_spares_the_reference():
    """PITFALLS 28 and 30."""
    grads = jax.grad(lambda *a: dpo_loss(*a)[0].value, (0, 1, 2, 3))(
        *(jnp.asarray(x) for x in case())
    )
    assert np.all(grads[0] < 0)
    assert np.all(grads[1] > 0)
    np.testing.assert_array_equal(grads[2], 0)
    np.testing.assert_array_equal(grads[3], 0)


def test_gradient_matches_differences():
    chosen, rejected, *reference = (jnp.asarray(x) for x in case())
    loss = jax.jit(lambda c, r: dpo_loss(c, r, *reference)[0].value)
    check_grads(loss, (chosen, rejected), 1, atol=1e-2, rtol=1e-2)
