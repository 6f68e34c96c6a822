"""The clipped policy loss of PPO."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Real

from rlhf_jax.types import Max, Mean, Metrics

LOG_RATIO_LIMIT = 20.0
"""Bound of the log-ratio, far outside any clip range; the exponential of a larger one could
overflow."""


def ppo_policy_loss(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    clip_ratio: Real[ArrayLike, ""] = 0.2,
) -> tuple[Mean, Metrics]:
    """Clipped surrogate objective, as a loss, over response tokens.

    ``L = mean_t max(-A_t * rho_t, -A_t * clip(rho_t, 1 - clip_ratio, 1 + clip_ratio))``

    ``rho_t = exp(logp_t - old_logp_t)``

    The maximum is pessimistic for either sign of the advantage; there is no second clip for
    negative ones. Gradients reach `logp` only.

    Args:
      logp: log-probs of the sampled tokens under the policy in training, in nats.
      old_logp: the same under the policy that sampled them, at the same temperature.
      advantages: whitened over the rollout, or raw.
      mask: true on response tokens.
      clip_ratio: half-width of the trusted interval around ratio 1.

    Returns:
      Total and count of response tokens; metrics ``approx_kl`` (old to new policy,
      ``mean (logp - old_logp)^2 / 2``, nats per token), ``clip_fraction`` (tokens whose gradient
      the clip removed), ``ratio``, ``ratio_max``, and ``log_ratio_max`` (largest absolute
      log-ratio: 0 before the first update).

    Source: Schulman et al. 2017, eq. 7; Ouyang et al. 2022, eq. 2 (first line) and appendix C.4.

    >>> ratio = jnp.log(jnp.array([[2.0, 2.0]]))
    >>> advantages, mask = jnp.array([[1.0, -1.0]]), jnp.array([[True, True]])
    >>> loss, metrics = ppo_policy_loss(ratio, jnp.zeros((1, 2)), advantages, mask)
    >>> round(float(loss.value), 4), float(metrics["clip_fraction"].value)  # (-1.2 + 2) / 2
    (0.4, 0.5)
    """
    old_logp, advantages = lax.stop_gradient((old_logp, advantages))
    # 0 outside the mask, where the ratio is then 1 and, with an advantage of 0, adds nothing.
    log_ratio = jnp.where(mask, logp, 0) - jnp.where(mask, old_logp, 0)
    ratio = jnp.exp(jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    advantages = jnp.where(mask, advantages, 0)
    # Where the clipped term is the larger one, it is constant and the token has no gradient.
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1 - clip_ratio, 1 + clip_ratio)

    # `clip_fraction` counts strictly larger terms, because within the clip range both are equal.
    count = jnp.sum(mask, dtype=jnp.float32)
    return Mean(jnp.sum(jnp.maximum(plain, clipped)), count), {
        "approx_kl": Mean(0.5 * jnp.sum(jnp.square(log_ratio)), count),
        "clip_fraction": Mean(jnp.sum(clipped > plain, dtype=jnp.float32), count),
        "ratio": Mean(jnp.sum(jnp.where(mask, ratio, 0)), count),
        "ratio_max": Max(jnp.max(jnp.where(mask, ratio, 0))),
        "log_ratio_max": Max(jnp.max(jnp.abs(log_ratio))),
    }
