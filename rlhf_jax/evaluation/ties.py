"""When two scores count as equal: a score that a network computes twice differs by rounding.

This module uses numpy only.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Num

ROUNDING = 16 * float(np.finfo(np.float32).eps)
"""Relative difference up to which two float32 scores count as equal: 1.9e-6.

In another batch, or at another position in it, a reward model sums the same numbers in another
order. 16 units in the last place cover the sums of a deep network and are far below any meaningful
difference of rewards.
"""


def tolerance(
    a: Num[np.ndarray, "..."], b: Num[np.ndarray, "..."], *, scale: float
) -> Float[np.ndarray, "..."]:
    """Largest difference of `a` and `b` that counts as rounding.

    It is `ROUNDING` times the largest of ``|a|``, ``|b|`` and `scale`.

    A score near 0 is a difference of large terms and has their rounding error, so the usual size of
    scores counts as well.

    Args:
      a: scores.
      b: the scores they are compared with, of a shape that broadcasts with `a`.
      scale: usual size of a score, as `scale_of` gives it.
    """
    return ROUNDING * np.maximum(np.maximum(np.abs(a), np.abs(b)), scale)


def scale_of(*scores: Num[np.ndarray, "..."]) -> float:
    """The usual size of these scores: the median of their absolute values.

    >>> scale_of(np.array([-2.0, 0.0]), np.array([1e9, 1.0, 3.0]))
    2.0
    """
    arrays = [np.asarray(array, np.float64).reshape(-1) for array in scores]
    sizes = np.abs(np.concatenate(arrays))
    return float(np.median(sizes)) if sizes.size else 0.0


def is_tie(
    a: Num[np.ndarray, "..."], b: Num[np.ndarray, "..."], *, scale: float
) -> Bool[np.ndarray, "..."]:
    """Whether two scores differ at most by rounding.

    >>> is_tie(np.array([0.1, 1.0]), np.array([0.1000001, 1.001]), scale=1.0).tolist()
    [True, False]
    """
    return np.abs(a - b) <= tolerance(a, b, scale=scale)
