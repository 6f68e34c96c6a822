"""The reward model's loss over all pairs of a ranked group."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.types import Mean, Metrics


def ranking_loss(
    rewards: Float[Array, "*batch K"], ranks: Int[Array, "*batch K"], *, divisor: Literal["pairs", "choose"] = "pairs"
) -> tuple[Mean, Metrics]:
    """Pairwise logistic loss over the K ranked responses of each prompt, every prompt with the same weight.

    ``L = mean over prompts of  (1 / D) * sum_{(w, l): rank_w < rank_l} -log sigmoid(r_w - r_l)``

    Tied pairs are dropped. The mean runs over the prompts with a strict pair.

    Args:
      rewards: scalar outputs, one a response; absent responses may hold anything.
      ranks: 0 for the best, equal for ties, -1 for an absent response.
      divisor: D. ``"pairs"`` counts the strict pairs of the prompt; ``"choose"`` is ``K (K - 1) / 2`` of its present
        responses, so that ties weaken a prompt. Equal when there are no ties.

    Returns:
      Total over prompts in nats, count of prompts with a strict pair; metrics a pair: ``accuracy`` (equal rewards count
      half), ``margin`` (``r_w - r_l``), ``log_loss`` (nats), and ``pairs`` a prompt.

    Raises:
      ValueError: if `divisor` is unknown.

    Source: Ouyang et al. 2022, eq. 1.

    >>> loss, metrics = ranking_loss(jnp.array([[2.0, 0.0]]), jnp.array([[0, 1]]))
    >>> round(float(loss.value), 4), float(metrics["accuracy"].value)  # log(1 + exp(-2))
    (0.1269, 1.0)
    """
    if divisor not in ("pairs", "choose"):
        raise ValueError(f"divisor={divisor!r} is unknown: choose 'pairs' or 'choose'")
    present = ranks >= 0
    better = present[..., :, None] & present[..., None, :] & (ranks[..., :, None] < ranks[..., None, :])
    safe = jnp.where(present, rewards, 0)
    margin = jnp.where(better, safe[..., :, None] - safe[..., None, :], 0)
    # softplus(-x) is -log sigmoid(x) without the overflow of the logarithm at 0.
    log_loss = jnp.where(better, jax.nn.softplus(-margin), 0)

    pairs = jnp.sum(better, axis=(-2, -1), dtype=jnp.float32)
    k = jnp.sum(present, axis=-1, dtype=jnp.float32)
    terms = pairs if divisor == "pairs" else k * (k - 1) / 2
    prompts = jnp.sum(pairs > 0, dtype=jnp.float32)
    loss = jnp.sum(jnp.sum(log_loss, axis=(-2, -1)) / jnp.maximum(terms, 1))
    right = jnp.where(better, (jnp.sign(margin) + 1) / 2, 0)
    total_pairs = jnp.sum(pairs)
    return Mean(loss, prompts), {
        "accuracy": Mean(jnp.sum(right), total_pairs),
        "margin": Mean(jnp.sum(margin), total_pairs),
        "log_loss": Mean(jnp.sum(log_loss), total_pairs),
        "pairs": Mean(total_pairs, prompts),
    }
