"""Over-optimisation of a proxy reward: best-of-n, and two laws of the gold score against KL.

Everything is a function of KL to the initial policy in nats; ``d = sqrt(KL)``. Gold scores are
gains over the initial policy (its mean gold score subtracted), because both laws pass through 0 at
``d = 0``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num

from rlhf_jax.evaluation import ties


class GaoFit(NamedTuple):
    """Coefficients of ``d (a - b d)`` (best-of-n) or ``d (a - b ln d)`` (RL)."""

    a: float
    b: float


class Peak(NamedTuple):
    """Maximum of a law: `kl` in nats and the gold gain there (infinite if the law never falls)."""

    kl: float
    gold: float


def kl_bon(n: int) -> float:
    """KL of best-of-n sampling to the policy that it samples from: ``ln n - (n - 1) / n`` nats.

    Raises:
      ValueError: `n` is below 1.

    Source: Gao et al. 2022, section 2; Stiennon et al. 2020, appendix G.3.

    >>> round(kl_bon(64), 1)
    3.2
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1: the number of samples to choose from")
    return math.log(n) - (n - 1) / n


def best_of_n(proxy: Num[np.ndarray, "P S"], gold: Num[np.ndarray, "P S"], *, n: int) -> float:
    """Unbiased estimate of the gold score of the best of n samples, chosen by the proxy.

    ``E = sum_i C(i-1, n-1) / C(S, n) gold_(i)`` over i = n..S, with the samples of a prompt sorted
    by proxy: the weight is the probability that sample i is the best of a random subset of n.
    Samples whose proxy scores differ by rounding at most share their weight, which is a tie that is
    broken at random.

    Args:
      proxy: proxy (reward model) score of each of S samples of P prompts.
      gold: gold score of the same samples; pass `proxy` again for the proxy's own curve.
      n: how many samples the policy draws, 1..S.

    Returns:
      The mean over prompts, in units of `gold`.

    Raises:
      ValueError: shapes differ, or `n` is not within 1..S.

    Source: Gao et al. 2022, section 2 (names the unbiased estimator).

    >>> best_of_n(np.array([[1.0, 2.0, 3.0]]), np.array([[10.0, 20.0, 0.0]]), n=3)
    0.0
    """
    if proxy.shape != gold.shape:
        raise ValueError(
            f"proxy has shape {proxy.shape} and gold {gold.shape}: score the same samples twice"
        )
    samples = proxy.shape[1]
    if not 1 <= n <= samples:
        raise ValueError(
            f"n={n} must be within 1..{samples}, the samples of a prompt: draw more or ask for less"
        )
    total = math.comb(samples, n)
    # 0 for i < n: such a sample is the best of no subset of n. Divided as integers, because they
    # can exceed a float.
    weights = np.array([math.comb(i - 1, n - 1) / total for i in range(1, samples + 1)])
    expected = [_share_ties(p, weights) @ g for p, g in zip(proxy, gold, strict=True)]
    return float(np.mean(expected))


def _share_ties(proxy: np.ndarray, sorted_weights: np.ndarray) -> np.ndarray:
    """Weights of the samples, from those in rising order of proxy; ties share their mean."""
    # In sorted order, neighbours that tie belong to the same group.
    order = np.argsort(proxy, kind="stable")
    rising = proxy[order].astype(np.float64)
    steps = ~ties.is_tie(rising[1:], rising[:-1], scale=ties.scale_of(proxy))
    group = np.empty(len(proxy), int)
    group[order] = np.concatenate([[0], np.cumsum(steps)])
    weights = np.empty_like(sorted_weights)
    weights[order] = sorted_weights
    return (np.bincount(group, weights) / np.bincount(group))[group]


def best_of_n_law(kl: Num[np.ndarray, "*shape"], fit: GaoFit) -> Float[np.ndarray, "*shape"]:
    """Gold gain of best-of-n at a KL in nats: ``d (a - b d)``, ``d = sqrt(kl)``.

    Source: Gao et al. 2022, section 1.
    """
    d = np.sqrt(kl)
    return d * (fit.a - fit.b * d)


def rl_law(kl: Num[np.ndarray, "*shape"], fit: GaoFit) -> Float[np.ndarray, "*shape"]:
    """Gold gain of RL at a KL > 0 in nats: ``d (a - b ln d)``, ``d = sqrt(kl)``.

    Source: Gao et al. 2022, section 1.
    """
    d = np.sqrt(kl)
    return d * (fit.a - fit.b * np.log(d))


def fit_best_of_n_law(
    kl: Num[np.ndarray, " M"], gold: Num[np.ndarray, " M"], *, min_kl: float = 0.1
) -> GaoFit:
    """Least-squares ``a, b`` of ``d (a - b d)`` over the points with ``kl >= min_kl`` nats.

    Args:
      kl: KL of each point in nats.
      gold: gold gain over the initial policy at each point.
      min_kl: points nearer to 0 are left out, because they carry no information about the fall.

    Raises:
      ValueError: fewer than two different points are left.

    Source: Gao et al. 2022, section 1.
    """
    d, gold = _far_points(kl, gold, min_kl)
    return _fit(np.stack([d, -d * d], axis=1), gold)


def fit_rl_law(
    kl: Num[np.ndarray, " M"], gold: Num[np.ndarray, " M"], *, min_kl: float = 0.1
) -> GaoFit:
    """Least-squares ``a, b`` of ``d (a - b ln d)`` over the points with ``kl >= min_kl`` nats.

    The law has an infinite slope at 0, so points near 0 would dominate the fit.

    Args:
      kl: KL of each point in nats.
      gold: gold gain over the initial policy at each point.
      min_kl: points nearer to 0 are left out.

    Raises:
      ValueError: fewer than two different points are left.

    Source: Gao et al. 2022, section 1 and footnote 1.
    """
    d, gold = _far_points(kl, gold, min_kl)
    return _fit(np.stack([d, -d * np.log(d)], axis=1), gold)


def best_of_n_peak(fit: GaoFit) -> Peak:
    """Peak of ``d (a - b d)``: ``d = a / 2b``, gold ``a^2 / 4b``.

    >>> best_of_n_peak(GaoFit(a=2.0, b=0.5))
    Peak(kl=4.0, gold=2.0)
    """
    if fit.b <= 0:
        return Peak(math.inf, math.inf)
    return Peak(max(0.0, fit.a / (2 * fit.b)) ** 2, max(0.0, fit.a) ** 2 / (4 * fit.b))


def rl_peak(fit: GaoFit) -> Peak:
    """Peak of ``d (a - b ln d)``: ``d = exp(a / b - 1)``, gold ``b d``."""
    if fit.b <= 0:
        return Peak(math.inf, math.inf)
    # Beyond 300 the KL, which is the square, would overflow.
    d = math.exp(min(fit.a / fit.b - 1, 300.0))
    return Peak(d * d, fit.b * d)


def _far_points(kl: np.ndarray, gold: np.ndarray, min_kl: float) -> tuple[np.ndarray, np.ndarray]:
    if min_kl <= 0:
        raise ValueError(f"min_kl={min_kl} must be above 0 nats: the laws are not fitted at 0")
    keep = (kl >= min_kl) & np.isfinite(gold)
    if len(np.unique(kl[keep])) < 2:
        raise ValueError(
            f"only {keep.sum()} of {len(kl)} points have kl >= {min_kl} nats: two different ones "
            "are needed"
        )
    return np.sqrt(kl[keep]), gold[keep]


def _fit(features: np.ndarray, gold: np.ndarray) -> GaoFit:
    # Both laws are linear in their coefficients.
    a, b = np.linalg.lstsq(features, gold, rcond=None)[0]
    return GaoFit(float(a), float(b))
