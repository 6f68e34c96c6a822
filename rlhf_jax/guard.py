"""The guard inside a training step: a step is judged by the numbers of the last sound steps."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.types import GuardState


def is_sound(
    *scalars: Float[Array, ""], norm: Float[Array, ""], limit: float | int | None = None
) -> Bool[Array, ""]:
    """Whether a step may be taken: everything finite, and the gradient norm not above `limit`.

    Args:
      *scalars: losses of the step.
      norm: global gradient norm, before clipping.
      limit: norms above it count as a spike; None to look for non-finite numbers only.

    Returns:
      A scalar for `optim.keep_unless`.

    >>> loss, norms = jnp.float32(1.0), jnp.array([3.0, 30.0, jnp.nan])
    >>> [bool(is_sound(loss, norm=norm, limit=9.0)) for norm in norms]
    [True, False, False]
    """
    sound = jnp.isfinite(norm)
    for scalar in scalars:
        sound &= jnp.isfinite(scalar)
    return sound if limit is None else sound & (norm <= limit)


def guard_state(size: int = 128) -> GuardState:
    """An empty window for `is_spike`.

    Args:
      size: number of sound steps in the window.

    Returns:
      Zeros, and a count of 0.
    """
    if size < 2:
        raise ValueError(f"size={size} must be at least 2: a spread needs two steps")
    # Columns: loss, gradient norm, largest reward.
    return GuardState(jnp.zeros((size, 3), jnp.float32), jnp.zeros((), jnp.int32))


LEAST_SPREAD = 0.05
"""Smallest spread, as a share of the mean: tiny changes of a steady number are not spikes."""


def is_spike(guard: GuardState, watched: Float[Array, "3"], *, std: float | int) -> Bool[Array, ""]:
    """Whether a number of this step is far above those of the last sound steps.

    ``x > mean + std * max(standard deviation, 0.05 |mean|)`` over the window, for any of the three
    numbers. False until half of the window is filled, and for a number that has always been 0.

    Args:
      guard: the last sound steps.
      watched: loss, gradient norm before clipping, and largest absolute reward of this step (0
        where there is none).
      std: how many standard deviations above the mean are too many.

    Returns:
      A scalar.

    Source: the rule of OLMo-core, levanter and MaxText (rolling mean and deviation of 128 steps,
    not before 64).

    >>> guard = guard_state(4)
    >>> for loss in (1.0, 3.0, 2.0):
    ...     guard = remember(guard, jnp.array([loss, 1.0, 0.0]))
    >>> [  # the threshold is 2 + 6 * 0.816 = 6.9
    ...     bool(is_spike(guard, jnp.array([loss, 1.0, 0.0]), std=6.0)) for loss in (6.8, 7.0)
    ... ]
    [False, True]
    """
    size = guard.window.shape[0]
    seen = jnp.minimum(guard.count, size)
    # Rows that are not written yet hold zeros, which would distort mean and spread.
    filled = jnp.arange(size)[:, None] < seen

    def mean(x: Float[Array, "W 3"]) -> Float[Array, "1 3"]:
        return jnp.sum(jnp.where(filled, x, 0), axis=0, keepdims=True) / jnp.maximum(seen, 1)

    middle = mean(guard.window)
    # Squares of deviations, not E[x^2] - mean^2, whose difference cancels in float32.
    spread = jnp.sqrt(mean(jnp.square(guard.window - middle)))
    spread = jnp.maximum(spread, LEAST_SPREAD * jnp.abs(middle))
    # The spread is 0 only for a number that has always been 0, as the reward is where there is
    # none. Its first other value is no spike.
    above = (watched[None] > middle + std * spread) & (spread > 0)
    return jnp.any(above) & (2 * guard.count >= size)


def remember(guard: GuardState, watched: Float[Array, "3"]) -> GuardState:
    """Adds a sound step to the window, in the place of the oldest one once the window is full.

    Args:
      guard: the window so far.
      watched: as in `is_spike`.

    Returns:
      The window with the numbers of this step.
    """
    place = guard.count % guard.window.shape[0]
    return GuardState(guard.window.at[place].set(watched), guard.count + 1)
