"""The clipped value loss of PPO."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Real

from rlhf_jax.types import Mean, Metrics


def ppo_value_loss(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    clip_value: Real[ArrayLike, ""] | None = 0.2,
) -> tuple[Mean, Metrics]:
    """Squared error to the returns: the larger error of the plain and the clipped value.

    ``L = mean_t max((V_t - R_t)^2, (clip(V_t, V_old_t - c, V_old_t + c) - R_t)^2) / 2``

    Gradients reach `values` only.

    Args:
      values: ``V(tokens[:, :t])`` under the network in training.
      old_values: the same under the network of the rollout.
      returns: from `gae`, before advantages are whitened.
      mask: true on response tokens.
      clip_value: c, in units of the score; None for the plain squared error.

    Returns:
      Total and count of response tokens; metrics ``value_clip_fraction``, ``value_error``
      (``mean (V - R)^2``), and ``value``, ``return`` and ``return_square``, from which the
      explained variance ``1 - value_error / (return_square - return^2)`` follows once all batches
      are added up.

    Source: Stiennon et al. 2020, released code; Ouyang et al. 2022, appendix C.4.

    >>> values, returns = jnp.array([[1.0]]), jnp.array([[2.0]])
    >>> loss, _ = ppo_value_loss(values, jnp.zeros((1, 1)), returns, jnp.array([[True]]))
    >>> round(float(loss.value), 4)  # clipped value 0.2: 0.5 * 1.8^2, larger than 0.5 * 1^2
    1.62
    """
    old_values, returns = lax.stop_gradient((old_values, returns))
    values = jnp.where(mask, values, 0)
    old_values = jnp.where(mask, old_values, 0)
    returns = jnp.where(mask, returns, 0)
    # An infinite bound clips nothing, which leaves the plain squared error.
    bound = jnp.inf if clip_value is None else clip_value
    # Where the clipped error is the larger one it is constant, and the value gets no gradient.
    error = jnp.square(values - returns)
    clipped = jnp.square(jnp.clip(values, old_values - bound, old_values + bound) - returns)

    count = jnp.sum(mask, dtype=jnp.float32)
    return Mean(0.5 * jnp.sum(jnp.maximum(error, clipped)), count), {
        "value_clip_fraction": Mean(jnp.sum(clipped > error, dtype=jnp.float32), count),
        "value_error": Mean(jnp.sum(error), count),
        "value": Mean(jnp.sum(values), count),
        "return": Mean(jnp.sum(returns), count),
        "return_square": Mean(jnp.sum(jnp.square(returns)), count),
    }
