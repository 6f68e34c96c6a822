"""Direct preference optimisation: the policy implies its own reward model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Real

from rlhf_jax.types import Mean, Metrics


def dpo_loss(
    chosen_logp: Float[Array, " B"],
    rejected_logp: Float[Array, " B"],
    ref_chosen_logp: Float[Array, " B"],
    ref_rejected_logp: Float[Array, " B"],
    *,
    beta: Real[ArrayLike, ""] = 0.1,
) -> tuple[Mean, Metrics]:
    """Logistic loss on the difference of the implied rewards.

    ``L = mean -log sigmoid(r_w - r_l)``, ``r = beta * (logp - ref_logp)``

    Args:
      chosen_logp: log-prob of the preferred response, summed over its tokens, in nats.
      rejected_logp: the same of the other response.
      ref_chosen_logp: the preferred response under the frozen reference.
      ref_rejected_logp: the other response under the frozen reference.
      beta: strength of the KL constraint that the reward implies.

    Returns:
      Total and count of pairs; metrics ``accuracy`` (equal rewards count half), ``margin``,
      ``chosen_reward``, ``rejected_reward``.

    Source: Rafailov et al. 2023, eq. 7.

    >>> zero, one = jnp.zeros(1), jnp.ones(1)
    >>> round(float(dpo_loss(one, zero, zero, zero, beta=1.0)[0].value), 4)  # log(1 + exp(-1))
    0.3133
    """
    # The partition function of the implied reward depends on the prompt only and cancels in the
    # difference.
    chosen_reward = beta * (chosen_logp - jax.lax.stop_gradient(ref_chosen_logp))
    rejected_reward = beta * (rejected_logp - jax.lax.stop_gradient(ref_rejected_logp))
    margin = chosen_reward - rejected_reward
    count = jnp.float32(margin.size)
    # softplus(-x) is -log sigmoid(x) without the overflow of the logarithm at 0.
    return Mean(jnp.sum(jax.nn.softplus(-margin)), count), {
        # The sign of equal rewards is 0, which counts half.
        "accuracy": Mean(jnp.sum((jnp.sign(margin) + 1) / 2), count),
        "margin": Mean(jnp.sum(margin), count),
        "chosen_reward": Mean(jnp.sum(chosen_reward), count),
        "rejected_reward": Mean(jnp.sum(rejected_reward), count),
    }
