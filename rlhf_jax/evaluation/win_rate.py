"""Win rate of policy A against policy B on the same prompts, plain and at equal length.

Scores are arrays ``[N, S]``: N prompts, S samples of each (``[N]`` is one sample). A and B may have
different S: every sample of A is compared with every sample of B of the same prompt and the
outcomes are averaged, so a prompt counts once however often it was sampled, and every interval is
over prompts. If several rows have the same prompt, `groups` identifies them, and they count once.

Two scores that differ by rounding are equal (`rlhf_jax.evaluation.ties`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num

from rlhf_jax.evaluation import ties

Z95 = 1.959963984540054
"""The 97.5% quantile of the normal distribution, for 95% intervals."""

PRIOR_SD = 5.0
"""Width of a weak normal prior on the logistic coefficients; it keeps perfect separation finite."""


class WinRate(NamedTuple):
    """A win rate in 0..1 with its 95% interval; `n` is the number of prompts."""

    value: float
    low: float
    high: float
    n: int


def outcomes(
    a: Num[np.ndarray, " N *A"], b: Num[np.ndarray, " N *B"], *, tie: float = 0.0
) -> Float[np.ndarray, " N"]:
    """Mean outcome of A against B on each prompt: 1 for a win, 1/2 for a tie, 0 for a loss.

    Args:
      a: scores of A, one or several samples per prompt.
      b: scores of B on the same prompts.
      tie: largest difference that counts as a tie, in units of the score; scores that differ by
        rounding always tie.

    Returns:
      One number in 0..1 per prompt: the mean over all pairs of a sample of A and a sample of B.

    Raises:
      ValueError: no prompts, different prompt counts, a non-finite score or a negative tie
        threshold.

    >>> outcomes(np.array([1.0, 0.0, 0.5]), np.array([0.0, 1.0, 0.5])).tolist()
    [1.0, 0.0, 0.5]
    """
    a, b = _samples("a", a), _samples("b", b)
    return _pair_outcomes(a, b, tie).mean(axis=(1, 2))


def win_rate(
    a: Num[np.ndarray, " N *A"],
    b: Num[np.ndarray, " N *B"],
    *,
    tie: float = 0.0,
    groups: Int[np.ndarray, " G"] | None = None,
) -> WinRate:
    """Win rate of A against B with ties counted half and a 95% score interval over prompts.

    The interval is Wilson's with ``n`` replaced by the effective ``n / D``. ``D`` is the variance
    of the per-prompt outcomes over that of wins and losses of the same mean,
    ``D = s^2 / (p (1 - p))``, both with one extra win and one extra loss added. Without ties and
    with one sample per prompt ``D = 1``, which is exactly Wilson's interval. Ties and several
    samples per prompt lower the variance and shorten the interval. It never leaves 0..1, and its
    width does not become 0 at a win rate of 0 or 1.

    Args:
      a: scores of A, ``[N]`` or ``[N, S]``.
      b: scores of B on the same prompts.
      tie: as in `outcomes`.
      groups: the prompt of each row, if several rows have the same prompt; these are averaged
        first.

    Returns:
      The mean outcome, its 95% interval and the number of prompts.

    Raises:
      ValueError: as `outcomes`.

    Source: Ouyang et al. 2022, section 3.6 and figure 1 (win rate with 95% intervals); Wilson 1927.

    >>> win_rate(np.array([1.0, 1.0, 1.0, 0.0]), np.zeros(4)).value
    0.875
    """
    y = _of_prompts(outcomes(a, b, tie=tie), groups)
    low, high = wilson(float(y.mean()), len(y) / _design_effect(y))
    return WinRate(float(y.mean()), low, high, len(y))


def wilson(p: float, n: float) -> tuple[float, float]:
    """Wilson's 95% score interval of a share `p` in `n` independent trials, always within 0..1.

    Source: Wilson 1927.

    >>> [round(x, 3) for x in wilson(1.0, 30)]
    [0.886, 1.0]
    """
    scale = 1 + Z95**2 / n
    centre = (p + Z95**2 / (2 * n)) / scale
    # The terms with ``n^2`` keep the width above 0 at a share of 0 or 1.
    spread = np.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    half = Z95 * spread / scale
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def length_controlled_win_rate(
    a: Num[np.ndarray, " N *A"],
    b: Num[np.ndarray, " N *B"],
    a_lengths: Num[np.ndarray, " N *A"],
    b_lengths: Num[np.ndarray, " N *B"],
    *,
    tie: float = 0.0,
    groups: Int[np.ndarray, " G"] | None = None,
) -> WinRate:
    """Win rate that A would have against B at equal length.

    A logistic regression of the outcome on the log length ratio, evaluated where the ratio is 1:
    ``P(A wins) = sigmoid(c + w log(len_a / len_b))``, and the value is ``sigmoid(c)``; the
    intercept ``c`` is the effect of the policy. The interval is ``sigmoid(c +- 1.96 se)`` with the
    cluster-robust (sandwich) standard error over prompts, from a fit with one extra win and one
    extra loss at ratio 1, which keeps a realistic width for a policy that always wins.

    Args:
      a: scores of A, ``[N]`` or ``[N, S]``.
      b: scores of B on the same prompts.
      a_lengths: response lengths of A in tokens, at least 1, same shape as `a`.
      b_lengths: response lengths of B in tokens, at least 1, same shape as `b`.
      tie: as in `outcomes`.
      groups: as in `win_rate`.

    Returns:
      Win rate at equal length, its 95% interval and the number of prompts.

    Raises:
      ValueError: as `outcomes`, or a length below 1 or of another shape than its score.

    Source: Stiennon et al. 2020, appendix F (length-controlled preference).
    """
    a, b = _samples("a", a), _samples("b", b)
    y = _pair_outcomes(a, b, tie)
    a_log = _log_lengths("a_lengths", a_lengths, a)
    b_log = _log_lengths("b_lengths", b_lengths, b)
    x = a_log[:, :, None] - b_log[:, None, :]
    weight, clusters = _row_weights(len(y), groups)
    # The value is that of the data alone; only the width comes from the fit with extra outcomes.
    value = _sigmoid(_logistic_fit(x, y, weight, extra=0.0)[0])
    fit = _logistic_fit(x, y, weight, extra=1.0)
    half = Z95 * _intercept_error(x, y, weight, clusters, fit)
    low = _sigmoid(fit[0] - half)
    high = _sigmoid(fit[0] + half)
    # The two fits differ slightly, and the interval has to contain the value.
    return WinRate(value, min(low, value), max(high, value), int(clusters.max()) + 1)


def _of_prompts(y: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """One outcome per prompt: the mean over its rows."""
    if groups is None:
        return y
    _, index = np.unique(_checked_groups(groups, len(y)), return_inverse=True)
    return np.bincount(index, y) / np.bincount(index)


def _row_weights(rows: int, groups: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Weight of each row, such that each prompt has weight 1, and the index of its prompt."""
    if groups is None:
        return np.ones(rows), np.arange(rows)
    _, index = np.unique(_checked_groups(groups, rows), return_inverse=True)
    return 1 / np.bincount(index)[index], index


def _checked_groups(groups: np.ndarray, rows: int) -> np.ndarray:
    groups = np.asarray(groups)
    if groups.shape != (rows,):
        raise ValueError(
            f"groups has shape {groups.shape} for {rows} rows: give the prompt of each row"
        )
    return groups


def _samples(name: str, scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    scores = scores[:, None] if scores.ndim == 1 else scores
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(
            f"{name} has shape {scores.shape}: give [prompts] or [prompts, samples], at least one "
            "of each"
        )
    if not np.isfinite(scores).all():
        raise ValueError(
            f"{name} holds {(~np.isfinite(scores)).sum()} non-finite scores: drop those prompts "
            "from both"
        )
    return scores


def _pair_outcomes(a: np.ndarray, b: np.ndarray, tie: float) -> np.ndarray:
    if len(a) != len(b):
        raise ValueError(
            f"a has {len(a)} prompts and b has {len(b)}: score both policies on the same prompts"
        )
    if tie < 0:
        raise ValueError(
            f"tie={tie} must be at least 0: the largest score difference that is a tie"
        )
    one, other = a[:, :, None], b[:, None, :]
    difference = one - other
    equal = (np.abs(difference) <= tie) | ties.is_tie(one, other, scale=ties.scale_of(a, b))
    return np.where(equal, 0.5, (difference > 0).astype(np.float64))


def _log_lengths(name: str, lengths: np.ndarray, scores: np.ndarray) -> np.ndarray:
    lengths = _samples(name, lengths)
    if lengths.shape != scores.shape:
        raise ValueError(
            f"{name} has shape {lengths.shape}, its scores {scores.shape}: give one length per "
            "score"
        )
    if (lengths < 1).any():
        raise ValueError(
            f"{name} has a length of {lengths.min():g}: count the EOS, so that every length is at "
            "least 1"
        )
    return np.log(lengths)


def _design_effect(y: np.ndarray) -> float:
    # The extra win and loss: without them, D is 0 / 0 at a win rate of 0 or 1.
    y = np.concatenate([y, [0.0, 1.0]])
    return float(y.var() / (y.mean() * (1 - y.mean())))


def _sigmoid(x: float) -> float:
    # Overflows for no x, unlike ``1 / (1 + exp(-x))``.
    return float(np.exp(-np.logaddexp(0.0, -x)))


def _design(x: np.ndarray) -> np.ndarray:
    return np.stack([np.ones_like(x), x], axis=-1)


def _information(
    design: np.ndarray, p: np.ndarray, weight: np.ndarray, extra: float, c: float
) -> np.ndarray:
    """Negative Hessian of the penalised log-likelihood, with the extra win and loss."""
    rows = np.einsum("r,ri,rj->ij", weight * p * (1 - p), design, design)
    q = _sigmoid(c)
    # The extra outcomes are at ratio 1, where the log is 0, so they inform the intercept only.
    return rows + np.diag([2 * extra * q * (1 - q), 0.0]) + np.eye(2) / PRIOR_SD**2


def _logistic_fit(x: np.ndarray, y: np.ndarray, weight: np.ndarray, *, extra: float) -> np.ndarray:
    """Coefficients (intercept, slope) by Newton's method, with `extra` wins and losses."""
    design, target = _design(x).reshape(-1, 2), y.reshape(-1)
    # A prompt has weight 1 however many pairs of samples it has.
    weight = np.repeat(weight, y[0].size) * (len(y) / target.size)
    fit = np.zeros(2)
    for _ in range(100):
        p = np.exp(-np.logaddexp(0.0, -(design @ fit)))
        gradient = design.T @ (weight * (target - p)) - fit / PRIOR_SD**2
        # The residuals of a win, 1 - q, and of a loss, -q.
        gradient[0] += extra * (1 - 2 * _sigmoid(fit[0]))
        step = np.linalg.solve(_information(design, p, weight, extra, fit[0]), gradient)
        # The log-likelihood is concave, but Newton overshoots from far away; bounded steps always
        # converge.
        fit = fit + step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-10:
            break
    return fit


def _intercept_error(
    x: np.ndarray, y: np.ndarray, row_weight: np.ndarray, clusters: np.ndarray, fit: np.ndarray
) -> float:
    """Cluster-robust standard error of the intercept.

    Prompts are the clusters; the extra win and the extra loss are two more.

    Source: Liang and Zeger 1986 (the sandwich over clusters).
    """
    design = _design(x)
    p = np.exp(-np.logaddexp(0.0, -(design @ fit)))
    weight = np.repeat(row_weight, y[0].size) * (len(y) / y.size)
    bread = np.linalg.inv(_information(design.reshape(-1, 2), p.reshape(-1), weight, 1.0, fit[0]))
    residual = (y - p)[..., None]
    of_rows = row_weight[:, None] * (residual * design).mean(axis=(1, 2))
    gradients = np.zeros((int(clusters.max()) + 1, 2))
    # `add.at`, because an indexed += adds only one of several rows of the same prompt.
    np.add.at(gradients, clusters, of_rows)
    q = _sigmoid(fit[0])
    extra = np.array([[1 - q, 0.0], [-q, 0.0]])
    gradients = np.concatenate([gradients, extra])
    # The sandwich: the inverse information around the outer products of the clusters' gradients.
    covariance = bread @ gradients.T @ gradients @ bread
    return float(np.sqrt(covariance[0, 0]))
