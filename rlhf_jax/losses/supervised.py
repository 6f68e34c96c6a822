"""Maximum likelihood: SFT, pretraining, and the pretraining term of PPO-ptx."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.types import Mean, Metrics


def sft_loss(logp: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> tuple[Mean, Metrics]:
    """Negative log-likelihood of the target tokens.

    ``L = -sum_t mask_t * logp_t / sum_t mask_t``

    Args:
      logp: log-prob of each token given what precedes it, in nats.
      mask: true on targets: the demonstration with its EOS, not the prompt.

    Returns:
      Total in nats over the count of target tokens; metrics ``nll`` (nats per token).

    Source: Ouyang et al. 2022, section 3.5 (SFT) and the second line of eq. 2 (pretraining mix).

    >>> loss, _ = sft_loss(jnp.array([[9.0, -1.0, -3.0]]), jnp.array([[False, True, True]]))
    >>> float(loss.value)
    2.0
    """
    total = -jnp.sum(jnp.where(mask, logp, 0))
    count = jnp.sum(mask, dtype=jnp.float32)
    loss = Mean(total, count)
    return loss, {"nll": loss}
