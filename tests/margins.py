"""Whether a discrete result would survive rounding: only then may two programs, or two machines, be compared in it.

A sampled or greedy token, an accuracy or a clip fraction is a step function of numbers that differ in their last bits
from one program to another, and from one processor to the next. Where two of these numbers nearly tie, the result is
a toss. So a test that compares such results first shows that they stay what they are when every weight moves by far
more than rounding does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

NUDGE = 1e-5
"""Relative change of each weight: a hundred times the rounding of float32."""


def nudged(params: Any, seed: int, size: float = NUDGE) -> Any:
    """Parameters with each number moved by about `size` of itself; flags and whole numbers stay."""
    random = np.random.default_rng(seed)

    def move(leaf: Any) -> Any:
        if not jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
            return leaf
        factor = (1 + size * random.standard_normal(leaf.shape)).astype(np.float32)
        return (leaf * factor).astype(leaf.dtype)

    return jax.tree.map(move, params)


def assert_no_near_tie(
    result: Callable[[Any], Any], params: Any, *, size: float = NUDGE, times: int = 2
) -> None:
    """Fails unless `result` of `params` is that of nudged ones: choose other inputs (a seed, say) where it does."""
    wanted = jax.tree.map(np.asarray, result(params))
    for seed in range(times):
        found = jax.tree.map(np.asarray, result(nudged(params, seed, size)))
        same = jax.tree.map(np.array_equal, found, wanted)
        assert all(jax.tree.leaves(same)), (
            "two numbers nearly tie: rounding would decide; choose another seed"
        )
