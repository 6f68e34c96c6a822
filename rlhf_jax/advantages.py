"""Advantage estimators: GAE with a critic; leave-one-out, group-relative, reward-to-go without.

Masks are true on response tokens. Positions outside the mask are skipped: no value there, not even
NaN, changes a result, and results are 0 there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Real


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    gamma: Real[ArrayLike, ""] = 1.0,
    lam: Real[ArrayLike, ""] = 0.95,
    bootstrap: Float[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalised advantage estimation, backwards over the response tokens.

    ``delta_t = r_t + gamma * V_{t+1} - V_t``, ``A_t = delta_t + gamma * lam * A_{t+1}``,
    ``R_t = A_t + V_t``

    ``V_{t+1}`` of the last token is `bootstrap`, and ``A_{t+1}`` is 0 there. Returns are taken
    before any whitening.

    Args:
      rewards: shaped rewards.
      values: ``values[:, t] = V(tokens[:, :t])``, the value before token ``t``.
      mask: true on response tokens.
      gamma: discount per token.
      lam: 0 is one-step temporal difference, 1 is reward-to-go minus value.
      bootstrap: ``V(tokens[:lengths])`` of rows that the length limit cut, 0 for finished rows;
        None if every row counts as finished (as in InstructGPT, where the score penalises a missing
        EOS instead).

    Returns:
      Advantages and returns, in reward units, 0 outside the mask.

    Source: Schulman et al. 2016, eq. 16; Ouyang et al. 2022, appendix C.4.

    >>> rewards, values = jnp.array([[0.0, 1.0]]), jnp.array([[0.5, 0.25]])
    >>> advantages, returns = gae(rewards, values, jnp.array([[True, True]]), lam=0.5)
    >>> advantages.tolist(), returns.tolist()  # 0.75 = 1 - 0.25; 0.125 = (0.25 - 0.5) + 0.5 * 0.75
    ([[0.125, 0.75]], [[0.625, 1.0]])
    """
    # A product with the mask would not do: 0 * NaN is NaN.
    rewards = jnp.where(mask, rewards, 0).astype(jnp.float32)
    values = jnp.where(mask, values, 0).astype(jnp.float32)
    zero = jnp.zeros(mask.shape[0], jnp.float32)
    end = zero if bootstrap is None else bootstrap.astype(jnp.float32)

    def step(
        after: tuple[jax.Array, jax.Array], slot: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        next_advantage, next_value = after
        reward, value, valid = slot
        delta = reward + gamma * next_value - value
        # Outside the mask the carry is unchanged, so tokens on both sides of a gap are neighbours.
        advantage = jnp.where(valid, delta + gamma * lam * next_advantage, next_advantage)
        return (advantage, jnp.where(valid, value, next_value)), jnp.where(valid, advantage, 0)

    # `scan` runs over the leading axis, so time comes first.
    slots = (rewards.T, values.T, mask.T)
    _, advantages = lax.scan(step, (jnp.zeros_like(end), end), slots, reverse=True)
    return advantages.T, advantages.T + values


def reward_to_go(
    rewards: Float[Array, "B T"], mask: Bool[Array, "B T"], *, gamma: Real[ArrayLike, ""] = 1.0
) -> Float[Array, "B T"]:
    """Discounted sum of the rewards from each token onwards: ``G_t = r_t + gamma * G_{t+1}``.

    Args:
      rewards: shaped rewards.
      mask: true on response tokens.
      gamma: discount per token.

    Returns:
      Returns in reward units, 0 outside the mask.

    Source: Williams 1992 (REINFORCE).

    >>> rewards, mask = jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[True, True, True]])
    >>> reward_to_go(rewards, mask, gamma=0.5).tolist()
    [[3.0, 4.0, 4.0]]
    """
    # With V = 0 and lambda = 1, ``delta`` is the reward and the recursion of GAE is that of G.
    return gae(rewards, jnp.zeros_like(rewards), mask, gamma=gamma, lam=1.0)[0]


def leave_one_out(scores: Float[Array, "B K"]) -> Float[Array, "B K"]:
    """Score of each response minus the mean score of the prompt's other responses (RLOO).

    ``A_k = s_k - sum_{j != k} s_j / (K - 1)``

    Args:
      scores: one score for each of K responses of B prompts.

    Returns:
      One advantage per response, in score units, for every token of the response.

    Raises:
      ValueError: if K is 1, where there is nothing to compare with.

    Source: Kool et al. 2019; Ahmadian et al. 2024, section 2.

    >>> leave_one_out(jnp.array([[1.0, 2.0, 6.0]])).tolist()
    [[-3.0, -1.5, 4.5]]
    """
    # With m the mean of all K scores, ``s_k - (K m - s_k) / (K - 1)`` is ``(s_k - m) K / (K - 1)``,
    # which needs no sum for each k.
    k = _group_size(scores)
    return (scores - jnp.mean(scores, axis=1, keepdims=True)) * (k / (k - 1))


def group_relative(scores: Float[Array, "B K"], *, eps: float | int = 1e-6) -> Float[Array, "B K"]:
    """Score of each response in standard deviations of its prompt's group (GRPO).

    ``A_k = (s_k - mean(s)) / (std(s) + eps)``, population standard deviation

    Args:
      scores: one score for each of K responses of B prompts.
      eps: keeps a group of equal scores at 0.

    Returns:
      One advantage per response, without unit.

    Raises:
      ValueError: if K is 1, where every advantage would be 0.

    Source: Shao et al. 2024 (DeepSeekMath), section 4.1.2.

    >>> group_relative(jnp.array([[0.0, 2.0], [5.0, 5.0]])).round(4).tolist()
    [[-1.0, 1.0], [0.0, 0.0]]
    """
    _group_size(scores)
    centred = scores - jnp.mean(scores, axis=1, keepdims=True)
    # Centred twice: the rounding error of the mean, divided by eps, would give equal scores an
    # advantage.
    centred = centred - jnp.mean(centred, axis=1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=1, keepdims=True)
    return centred / (jnp.sqrt(variance) + eps)


def _group_size(scores: jax.Array) -> int:
    if scores.shape[1] < 2:
        raise ValueError(
            f"scores has K={scores.shape[1]} responses a prompt: group advantages need at least 2"
        )
    return scores.shape[1]
