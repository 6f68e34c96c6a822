"""sft_loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import sft_loss

pytestmark = pytest.mark.usefixtures("strict_dtypes")

LOGP = np.float32([[0, -1, -2, -0.5], [0, -3, -0.25, 0]])
MASK = np.array([[0, 0, 1, 1], [0, 1, 0, 0]], bool)


@pytest.mark.parametrize("poison", [0.0, np.nan, np.inf, 1e6])
def test_sft_loss_is_the_mean_over_target_tokens(poison):
    """PITFALLS 44 and 17: no prompt, no padding, in neither loss nor gradient."""
    logp = jnp.asarray(np.where(MASK, LOGP, np.float32(poison)))
    loss, metrics = sft_loss(logp, jnp.asarray(MASK))
    assert float(loss.value) == pytest.approx((2 + 0.5 + 3) / 3)
    assert float(loss.count) == 3
    assert float(metrics["nll"].value) == float(loss.value)
    grad = jax.grad(lambda x: sft_loss(x, jnp.asarray(MASK))[0].total)(logp)
    np.testing.assert_array_equal(grad, np.where(MASK, -1.0, 0.0))


def test_all_masked_batch_gives_zero_not_nan():
    """PITFALLS 44."""
    mask = jnp.zeros((2, 4), bool)
    value, grad = jax.value_and_grad(lambda x: sft_loss(x, mask)[0].value)(
        jnp.full((2, 4), jnp.nan)
    )
    assert float(value) == 0
    np.testing.assert_array_equal(grad, 0)


def test_micro_batches_add_up_to_the_batch():
    """PITFALLS 21: totals and counts add; a mean of means would be off on ragged rows."""
    logp, mask = jnp.asarray(LOGP), jnp.asarray(MASK)
    whole, _ = sft_loss(logp, mask)
    parts = sft_loss(logp[:1], mask[:1])[0] + sft_loss(logp[1:], mask[1:])[0]
    assert float(parts.value) == pytest.approx(float(whole.value), rel=1e-6)
    means = [float(sft_loss(logp[i : i + 1], mask[i : i + 1])[0].value) for i in range(2)]
    assert np.mean(means) != pytest.approx(float(whole.value), rel=1e-3)
