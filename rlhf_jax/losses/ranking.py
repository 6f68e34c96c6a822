"""Losses of the reward model over ranked responses: all pairs, or the choice of the best one."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.types import Mean, Metrics


def ranking_loss(
    rewards: Float[Array, "*batch K"],
    ranks: Int[Array, "*batch K"],
    *,
    divisor: Literal["pairs", "choose"] = "pairs",
) -> tuple[Mean, Metrics]:
    """Pairwise logistic loss over the K ranked responses of each prompt; equal weight per prompt.

    ``L = mean over prompts of  (1 / D) * sum_{(w, l): rank_w < rank_l} -log sigmoid(r_w - r_l)``

    Tied pairs are dropped. The mean runs over the prompts with a strict pair.

    Args:
      rewards: scalar outputs, one per response; those of absent responses are ignored.
      ranks: 0 for the best, equal for ties, -1 for an absent response.
      divisor: D. ``"pairs"`` counts the strict pairs of the prompt; ``"choose"`` is
        ``K (K - 1) / 2`` of its present responses, so that ties weaken a prompt. Equal when there
        are no ties.

    Returns:
      Total over prompts in nats, count of prompts with a strict pair; metrics per pair:
      ``accuracy`` (equal rewards count half), ``margin`` (``r_w - r_l``), ``log_loss`` (nats), and
      ``pairs`` per prompt.

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
    both_present = present[..., :, None] & present[..., None, :]
    better = both_present & (ranks[..., :, None] < ranks[..., None, :])
    difference = rewards[..., :, None] - rewards[..., None, :]
    # Index w is the better response and l the other. Pairs that do not count get 0, so that NaN in
    # the reward of an absent response reaches neither the loss nor its gradient.
    margin = jnp.where(better, difference, 0)
    # softplus(-x) is -log sigmoid(x) without the overflow of the logarithm at 0.
    log_loss = jnp.where(better, jax.nn.softplus(-margin), 0)

    pairs = jnp.sum(better, axis=(-2, -1), dtype=jnp.float32)
    k = jnp.sum(present, axis=-1, dtype=jnp.float32)
    terms = pairs if divisor == "pairs" else k * (k - 1) / 2
    prompts = jnp.sum(pairs > 0, dtype=jnp.float32)
    # A prompt without a strict pair has a loss of 0 and not of 0 / 0.
    loss_of_prompt = jnp.sum(log_loss, axis=(-2, -1)) / jnp.maximum(terms, 1)
    loss = jnp.sum(loss_of_prompt)
    right = jnp.where(better, (jnp.sign(margin) + 1) / 2, 0)
    total_pairs = jnp.sum(pairs)
    return Mean(loss, prompts), {
        "accuracy": Mean(jnp.sum(right), total_pairs),
        "margin": Mean(jnp.sum(margin), total_pairs),
        "log_loss": Mean(jnp.sum(log_loss), total_pairs),
        "pairs": Mean(total_pairs, prompts),
    }


def best_of_loss(
    rewards: Float[Array, "*batch K"],
    ranks: Int[Array, "*batch K"],
) -> tuple[Mean, Metrics]:
    """Softmax cross-entropy of the best of K responses, for labelers who only choose the best one.

    ``L = mean over prompts of -log(exp(r_best) / sum_k exp(r_k))``

    Where several share the best rank, the target is spread evenly over them. Only rank 0 against
    the rest counts; the order below it is not used. The mean runs over the prompts whose responses
    do not all share the best rank.

    Args:
      rewards: scalar outputs, one per response; those of absent responses are ignored.
      ranks: 0 for the best, -1 for an absent response.

    Returns:
      Total over prompts in nats, count of prompts with a choice; ``accuracy``: how often the
      largest reward is at a best response (1 / K by chance).

    Source: Ziegler et al. 2019, eq. 1 (best of 4).

    >>> loss, _ = best_of_loss(jnp.array([[0.0, 0.0, 0.0, 0.0]]), jnp.array([[1, 0, 1, 1]]))
    >>> round(float(loss.value), 4)  # log 4
    1.3863
    """
    present = ranks >= 0
    best = ranks == 0
    chosen = jnp.sum(best, axis=-1, dtype=jnp.float32)
    # A prompt whose responses all share the best rank has no choice to learn from.
    counted = (chosen > 0) & jnp.any(present & ~best, axis=-1)
    # Finite instead of -inf: a row without any response must not turn its gradient into NaN.
    rewards = jnp.where(present, rewards, -1e30)
    log_share = rewards - jax.nn.logsumexp(rewards, axis=-1, keepdims=True)
    of_the_best = jnp.sum(jnp.where(best, log_share, 0), axis=-1)
    target = of_the_best / jnp.maximum(chosen, 1)
    loss = -jnp.sum(jnp.where(counted, target, 0))
    prompts = jnp.sum(counted, dtype=jnp.float32)
    # A tie between a best response and another one counts as right.
    largest_best = jnp.max(jnp.where(best, rewards, -1e30), axis=-1)
    right = jnp.sum(counted & (largest_best == jnp.max(rewards, axis=-1)), dtype=jnp.float32)
    return Mean(loss, prompts), {"accuracy": Mean(right, prompts)}
