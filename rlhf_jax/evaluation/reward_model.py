"""How good a reward model is: accuracy, log-loss, calibration, length bias, beside the labelers' own agreement.

Inputs are ``scores [N, K]`` of K responses to N prompts and ``ranks [N, K]`` of a labeler: 0 is the best, equal ranks
are a tie, -1 is an absent response. A labeler's ties are dropped. Two scores that differ by rounding are equal.

The prompt is the unit of every interval, because the pairs of one prompt are not independent, and neither are two
labelers' rankings of it: where several rows are of one prompt, `groups` says which (numpy only).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num

from rlhf_jax.evaluation import ties
from rlhf_jax.evaluation.win_rate import wilson


class Accuracy(NamedTuple):
    """A share of pairs in 0..1 with its 95% bootstrap interval over prompts; `n` is the number of pairs."""

    value: float
    low: float
    high: float
    n: int


class Pairs(NamedTuple):
    """Strict preferences: on `prompt`, the labeler prefers response `better` to response `worse`."""

    prompt: Int[np.ndarray, " M"]
    better: Int[np.ndarray, " M"]
    worse: Int[np.ndarray, " M"]


class Calibration(NamedTuple):
    """Per bin of margin: mean margin, predicted and observed share of pairs on which the labeler agrees, and count."""

    margin: Float[np.ndarray, " Q"]
    predicted: Float[np.ndarray, " Q"]
    observed: Float[np.ndarray, " Q"]
    count: Int[np.ndarray, " Q"]


class AccuracyBins(NamedTuple):
    """Accuracy in bins ``[edges[q], edges[q+1])`` of some quantity; NaN where a bin holds no pair."""

    edges: Float[np.ndarray, " E"]
    accuracy: Float[np.ndarray, " Q"]
    count: Int[np.ndarray, " Q"]


def strict_pairs(ranks: Int[np.ndarray, "N K"]) -> Pairs:
    """Every pair that the labeler ordered strictly: ``C(K, 2)`` less the ties a prompt, absent responses left out.

    >>> strict_pairs(np.array([[0, 1, 1, -1]])).worse.tolist()
    [1, 2]
    """
    present = ranks >= 0
    preferred = present[:, :, None] & present[:, None, :] & (ranks[:, :, None] < ranks[:, None, :])
    return Pairs(*np.nonzero(preferred))


def pairwise_accuracy(
    scores: Num[np.ndarray, "N K"],
    ranks: Int[np.ndarray, "N K"],
    *,
    resamples: int = 2000,
    seed: int = 0,
    groups: Int[np.ndarray, " G"] | None = None,
) -> Accuracy:
    """Share of strict pairs on which the preferred response has the higher score; equal scores count half.

    Args:
      scores: reward of each response; what stands in absent places is never read.
      ranks: the labeler's ranking, 0 best, ties equal, -1 absent.
      resamples: bootstrap samples, each draws the prompts with replacement and keeps all their pairs together.
      seed: of the bootstrap; the same inputs always give the same interval.
      groups: which prompt each row is of, where several rows (two labelers' rankings, say) are of one; None says that
        each row has a prompt of its own.

    Returns:
      Accuracy over all pairs with its 95% percentile interval.

    Raises:
      ValueError: no strict pair, or a score of a present response is not finite.

    Source: Ouyang et al. 2022, section 4.1 and appendix E.2 (accuracy on training and held-out labelers); Cameron,
    Gelbach and Miller 2008, section 3 (clusters are drawn whole).
    """
    pairs, _, correct = _judged(scores, ranks)
    return _bootstrap(_prompts(groups, len(ranks))[pairs.prompt], correct, resamples, seed)


def pairwise_log_loss(scores: Num[np.ndarray, "N K"], ranks: Int[np.ndarray, "N K"]) -> float:
    """Mean of ``-log sigmoid(r_better - r_worse)`` over strict pairs, in nats (0.693 is chance).

    Source: Ouyang et al. 2022, eq. 1 (here every pair weighs the same).
    """
    return float(np.logaddexp(0.0, -_margins(scores, ranks)[1]).mean())


def calibration(scores: Num[np.ndarray, "N K"], ranks: Int[np.ndarray, "N K"], *, bins: int = 8) -> Calibration:
    """Does a margin of delta mean ``1 / (1 + e^-delta)``? Observed against predicted agreement in bins of the margin.

    Pairs are sorted by ``delta = |r_i - r_j|`` and cut into bins of equal count; `observed` is the share of a bin on
    which the labeler prefers the higher score (equal scores count half).

    Args:
      scores: reward of each response.
      ranks: the labeler's ranking, 0 best, ties equal, -1 absent.
      bins: how many; fewer are returned when there are fewer pairs.

    Raises:
      ValueError: `bins` below 1, no strict pair, or a non-finite score.

    Source: Bai et al. 2022, section 3.3 (calibration of preference models).
    """
    if bins < 1:
        raise ValueError(f"bins={bins} must be at least 1")
    _, margin, correct = _judged(scores, ranks)
    parts = np.array_split(np.argsort(np.abs(margin), kind="stable"), min(bins, len(margin)))
    size = [np.abs(margin[part]) for part in parts]
    return Calibration(
        margin=np.array([s.mean() for s in size]),
        predicted=np.array([np.mean(1 / (1 + np.exp(-s))) for s in size]),
        observed=np.array([correct[part].mean() for part in parts]),
        count=np.array([len(part) for part in parts]),
    )


def accuracy_by_margin(
    scores: Num[np.ndarray, "N K"], ranks: Int[np.ndarray, "N K"], *, edges: Float[np.ndarray, " E"]
) -> AccuracyBins:
    """Accuracy in bins of the margin ``|r_i - r_j|`` (units of the score); the last bin includes its upper edge."""
    _, margin, correct = _judged(scores, ranks)
    return _binned(np.abs(margin), correct, edges)


def accuracy_by_length_difference(
    scores: Num[np.ndarray, "N K"],
    ranks: Int[np.ndarray, "N K"],
    lengths: Num[np.ndarray, "N K"],
    *,
    edges: Float[np.ndarray, " E"],
) -> AccuracyBins:
    """Accuracy in bins of (length of the preferred response) - (length of the other), in tokens.

    A reward model that has only learnt length is right on the positive side and wrong on the negative one.
    """
    pairs, _, correct = _judged(scores, ranks)
    difference = lengths[pairs.prompt, pairs.better] - lengths[pairs.prompt, pairs.worse]
    return _binned(difference.astype(np.float64), correct, edges)


def length_only_accuracy(
    lengths: Num[np.ndarray, "N K"],
    ranks: Int[np.ndarray, "N K"],
    *,
    groups: Int[np.ndarray, " G"] | None = None,
) -> Accuracy:
    """Accuracy of the rule "the longer response is better": a reward model has to beat it to have learnt more."""
    return pairwise_accuracy(lengths, ranks, groups=groups)


def labeler_agreement(
    ranks_a: Int[np.ndarray, "N K"],
    ranks_b: Int[np.ndarray, "N K"],
    *,
    resamples: int = 2000,
    seed: int = 0,
    groups: Int[np.ndarray, " G"] | None = None,
) -> Accuracy:
    """Share of pairs ordered the same way by two rankings of the same responses, among pairs strict in both.

    Args:
      ranks_a: one labeler's ranking, 0 best, ties equal, -1 absent.
      ranks_b: another labeler's ranking of the same responses.
      resamples: bootstrap samples over prompts.
      seed: of the bootstrap.
      groups: as in `pairwise_accuracy`.

    Returns:
      Agreement with its 95% interval.

    Raises:
      ValueError: no pair is strict in both.

    Source: Ouyang et al. 2022, section 3.4 (72.6% among training labelers, 77.3% among held-out ones).
    """
    prompt, a, b = _relations(ranks_a, ranks_b)
    strict = (a != 0) & (b != 0)
    clusters = _prompts(groups, len(ranks_a))[prompt[strict]]
    return _bootstrap(clusters, (a == b)[strict].astype(np.float64), resamples, seed)


def tie_aware_agreement(
    ranks_a: Int[np.ndarray, "N K"],
    ranks_b: Int[np.ndarray, "N K"],
    *,
    resamples: int = 2000,
    seed: int = 0,
    groups: Int[np.ndarray, " G"] | None = None,
) -> Accuracy:
    """Agreement over all pairs: 1 for the same order or a tie in both, 1/2 for a tie in one, 0 for opposite orders.

    Args and Raises as `labeler_agreement`; `n` counts tied pairs too.
    """
    prompt, a, b = _relations(ranks_a, ranks_b)
    return _bootstrap(_prompts(groups, len(ranks_a))[prompt], 1.0 - np.abs(a - b) / 2.0, resamples, seed)


def demonstration_bias(scores: Num[np.ndarray, "*shape"]) -> float:
    """The number to add to every reward so that labeler demonstrations score 0 on average: ``-mean(scores)``.

    Source: Ouyang et al. 2022, section 3.5.

    >>> demonstration_bias(np.array([1.0, 3.0]))
    -2.0
    """
    if scores.size == 0 or not np.isfinite(scores).all():
        raise ValueError(f"{scores.size} demonstration scores: at least one is needed and all must be finite")
    return -float(np.mean(scores, dtype=np.float64))


def _margins(scores: np.ndarray, ranks: np.ndarray) -> tuple[Pairs, np.ndarray]:
    pairs = strict_pairs(ranks)
    if len(pairs.prompt) == 0:
        raise ValueError(f"ranks of {len(ranks)} prompts hold no strict pair: everything is tied, absent or empty")
    if not np.isfinite(scores[ranks >= 0]).all():
        raise ValueError("scores of present responses are not all finite: the reward model diverged or was not run")
    scores = scores.astype(np.float64)
    return pairs, scores[pairs.prompt, pairs.better] - scores[pairs.prompt, pairs.worse]


def _judged(scores: np.ndarray, ranks: np.ndarray) -> tuple[Pairs, np.ndarray, np.ndarray]:
    """The strict pairs, their margins, and 1 where the preferred response scores higher, 1/2 where both are equal."""
    pairs, margin = _margins(scores, ranks)
    better, worse = (scores[pairs.prompt, which].astype(np.float64) for which in (pairs.better, pairs.worse))
    equal = ties.is_tie(better, worse, scale=ties.scale_of(scores[ranks >= 0]))
    return pairs, margin, np.where(equal, 0.5, (margin > 0).astype(np.float64))


def _prompts(groups: np.ndarray | None, rows: int) -> np.ndarray:
    if groups is None:
        return np.arange(rows)
    groups = np.asarray(groups)
    if groups.shape != (rows,):
        raise ValueError(f"groups has shape {groups.shape} for {rows} rankings: give the prompt of each")
    return groups


def _relations(ranks_a: np.ndarray, ranks_b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompt of every pair i < j present in both rankings, and the sign of its order in each (0 is a tie)."""
    present = (ranks_a >= 0) & (ranks_b >= 0)
    i, j = np.triu_indices(ranks_a.shape[1], 1)
    prompt, pair = np.nonzero(present[:, i] & present[:, j])
    a, b = (np.sign(r[:, i] - r[:, j])[prompt, pair] for r in (ranks_a, ranks_b))
    return prompt, a, b


def _binned(quantity: np.ndarray, correct: np.ndarray, edges: np.ndarray) -> AccuracyBins:
    if len(edges) < 2 or (np.diff(edges) <= 0).any():
        raise ValueError(f"edges={edges.tolist()} must be at least two rising numbers")
    inside = (quantity >= edges[0]) & (quantity <= edges[-1])
    index = np.minimum(np.searchsorted(edges, quantity[inside], side="right") - 1, len(edges) - 2)
    count = np.bincount(index, minlength=len(edges) - 1)
    total = np.bincount(index, correct[inside], minlength=len(edges) - 1)
    return AccuracyBins(edges, np.where(count > 0, total / np.maximum(count, 1), np.nan), count)


def _bootstrap(prompt: np.ndarray, outcome: np.ndarray, resamples: int, seed: int) -> Accuracy:
    """Mean outcome over pairs; the interval draws prompts with replacement, each with all its pairs.

    Where all pairs have one outcome every draw has it too: the interval is then Wilson's for so many prompts.
    """
    if len(prompt) == 0:
        raise ValueError("no pair to compare: the rankings share no strict pair")
    _, index = np.unique(prompt, return_inverse=True)
    count, total = np.bincount(index), np.bincount(index, outcome)
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        draw = rng.integers(len(count), size=len(count))
        means.append(total[draw].sum() / count[draw].sum())
    low, high = np.quantile(means, [0.025, 0.975])
    if low == high:
        low, high = wilson(float(outcome.mean()), len(count))
    return Accuracy(float(outcome.mean()), float(low), float(high), len(prompt))
