"""Quality of a reward model: accuracy, log-loss, calibration, length bias, labelers' agreement.

Inputs are ``scores [N, K]`` of K responses to N prompts and ``ranks [N, K]`` of a labeler: 0 is the
best, equal ranks are a tie, -1 is an absent response. A labeler's ties are dropped. Two scores that
differ by rounding are equal.

Every interval is over prompts, because the pairs of a prompt are not independent, and neither are
two labelers' rankings of it. If several rows have the same prompt, `groups` identifies them. This
module uses numpy only.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num

from rlhf_jax.evaluation import ties
from rlhf_jax.evaluation.win_rate import wilson


class Accuracy(NamedTuple):
    """Share of pairs in 0..1 with its 95% bootstrap interval over prompts; `n` counts the pairs."""

    value: float
    low: float
    high: float
    n: int


class Pairs(NamedTuple):
    """Strict preferences: on `prompt`, the labeler prefers `better` to `worse`."""

    prompt: Int[np.ndarray, " M"]
    better: Int[np.ndarray, " M"]
    worse: Int[np.ndarray, " M"]


class Calibration(NamedTuple):
    """Agreement in bins of the margin.

    Attributes:
      margin: mean margin of each bin.
      predicted: share of pairs on which the labeler should agree.
      observed: share on which the labeler agrees.
      count: number of pairs.
    """

    margin: Float[np.ndarray, " Q"]
    predicted: Float[np.ndarray, " Q"]
    observed: Float[np.ndarray, " Q"]
    count: Int[np.ndarray, " Q"]


class AccuracyBins(NamedTuple):
    """Accuracy in bins ``[edges[q], edges[q+1])`` of a quantity; NaN where a bin has no pair."""

    edges: Float[np.ndarray, " E"]
    accuracy: Float[np.ndarray, " Q"]
    count: Int[np.ndarray, " Q"]


def strict_pairs(ranks: Int[np.ndarray, "N K"]) -> Pairs:
    """Every pair that the labeler ordered strictly, absent responses left out.

    >>> strict_pairs(np.array([[0, 1, 1, -1]])).worse.tolist()
    [1, 2]
    """
    present = ranks >= 0
    both_present = present[:, :, None] & present[:, None, :]
    preferred = both_present & (ranks[:, :, None] < ranks[:, None, :])
    return Pairs(*np.nonzero(preferred))


def pairwise_accuracy(
    scores: Num[np.ndarray, "N K"],
    ranks: Int[np.ndarray, "N K"],
    *,
    resamples: int = 2000,
    seed: int = 0,
    groups: Int[np.ndarray, " G"] | None = None,
) -> Accuracy:
    """Share of strict pairs whose preferred response scores higher; equal scores count half.

    Args:
      scores: reward of each response; entries of absent responses are never read.
      ranks: the labeler's ranking, 0 best, ties equal, -1 absent.
      resamples: number of bootstrap samples; each draws prompts with replacement, with all their
        pairs.
      seed: of the bootstrap; the same inputs always give the same interval.
      groups: the prompt of each row, where several rows (such as two labelers' rankings) belong to
        one prompt; None means that each row is a prompt of its own.

    Returns:
      Accuracy over all pairs with its 95% percentile interval.

    Raises:
      ValueError: no strict pair, or a score of a present response is not finite.

    Source: Ouyang et al. 2022, section 4.1 and appendix E.2 (accuracy on training and held-out
    labelers); Cameron, Gelbach and Miller 2008, section 3 (bootstrap of clusters).
    """
    pairs, _, correct = _judged(scores, ranks)
    clusters = _prompts(groups, len(ranks))[pairs.prompt]
    return _bootstrap(clusters, correct, resamples, seed)


def pairwise_log_loss(scores: Num[np.ndarray, "N K"], ranks: Int[np.ndarray, "N K"]) -> float:
    """Mean of ``-log sigmoid(r_better - r_worse)`` over strict pairs, in nats (0.693 is chance).

    Source: Ouyang et al. 2022, eq. 1 (here every pair weighs the same).
    """
    return float(np.logaddexp(0.0, -_margins(scores, ranks)[1]).mean())


def calibration(
    scores: Num[np.ndarray, "N K"], ranks: Int[np.ndarray, "N K"], *, bins: int = 8
) -> Calibration:
    """Observed agreement against the predicted ``1 / (1 + e^-delta)``, in bins of the margin delta.

    Pairs are sorted by ``delta = |r_i - r_j|`` and divided into bins of equal count; `observed` is
    the share of a bin on which the labeler prefers the response with the higher score (equal scores
    count half).

    Args:
      scores: reward of each response.
      ranks: the labeler's ranking, 0 best, ties equal, -1 absent.
      bins: number of bins; fewer are returned when there are fewer pairs.

    Raises:
      ValueError: `bins` below 1, no strict pair, or a non-finite score.

    Source: Bai et al. 2022, section 3.3 (calibration of preference models).
    """
    if bins < 1:
        raise ValueError(f"bins={bins} must be at least 1")
    _, margin, correct = _judged(scores, ranks)
    # Stable, so that equal margins are divided in the same way on every machine.
    order = np.argsort(np.abs(margin), kind="stable")
    parts = np.array_split(order, min(bins, len(margin)))
    sizes = [np.abs(margin[part]) for part in parts]
    return Calibration(
        margin=np.array([size.mean() for size in sizes]),
        predicted=np.array([np.mean(1 / (1 + np.exp(-size))) for size in sizes]),
        observed=np.array([correct[part].mean() for part in parts]),
        count=np.array([len(part) for part in parts]),
    )


def accuracy_by_margin(
    scores: Num[np.ndarray, "N K"], ranks: Int[np.ndarray, "N K"], *, edges: Float[np.ndarray, " E"]
) -> AccuracyBins:
    """Accuracy in bins of the margin ``|r_i - r_j|``; the last bin includes its upper edge."""
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

    A reward model that has only learnt length is right on the positive side and wrong on the
    negative one.
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
    """Accuracy of the rule "the longer response is better", which a reward model should beat."""
    return pairwise_accuracy(lengths, ranks, groups=groups)


def labeler_agreement(
    ranks_a: Int[np.ndarray, "N K"],
    ranks_b: Int[np.ndarray, "N K"],
    *,
    resamples: int = 2000,
    seed: int = 0,
    groups: Int[np.ndarray, " G"] | None = None,
) -> Accuracy:
    """Share of the pairs that are strict in two rankings which both order the same way.

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

    Source: Ouyang et al. 2022, section 3.4 (72.6% among training labelers, 77.3% among held-out
    ones).
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
    """Agreement over all pairs: 1 for equal orders, 1/2 for one tie, 0 for opposite orders.

    A tie in both rankings is an equal order. Args and Raises as `labeler_agreement`; `n` counts
    tied pairs too.
    """
    prompt, a, b = _relations(ranks_a, ranks_b)
    clusters = _prompts(groups, len(ranks_a))[prompt]
    return _bootstrap(clusters, 1.0 - np.abs(a - b) / 2.0, resamples, seed)


def demonstration_bias(scores: Num[np.ndarray, "*shape"]) -> float:
    """The bias that gives labelers' demonstrations a mean score of 0: ``-mean(scores)``.

    Source: Ouyang et al. 2022, section 3.5.

    >>> demonstration_bias(np.array([1.0, 3.0]))
    -2.0
    """
    if scores.size == 0 or not np.isfinite(scores).all():
        raise ValueError(
            f"{scores.size} demonstration scores: at least one is needed and all must be finite"
        )
    return -float(np.mean(scores, dtype=np.float64))


def _margins(scores: np.ndarray, ranks: np.ndarray) -> tuple[Pairs, np.ndarray]:
    pairs = strict_pairs(ranks)
    if len(pairs.prompt) == 0:
        raise ValueError(
            f"ranks of {len(ranks)} prompts hold no strict pair: everything is tied, absent or "
            "empty"
        )
    if not np.isfinite(scores[ranks >= 0]).all():
        raise ValueError(
            "scores of present responses are not all finite: the reward model diverged or was not "
            "run"
        )
    scores = scores.astype(np.float64)
    return pairs, scores[pairs.prompt, pairs.better] - scores[pairs.prompt, pairs.worse]


def _judged(scores: np.ndarray, ranks: np.ndarray) -> tuple[Pairs, np.ndarray, np.ndarray]:
    """The strict pairs, their margins and outcomes: 1 right, 1/2 for equal scores, 0 wrong."""
    pairs, margin = _margins(scores, ranks)
    # Equality is judged by the two scores, because their difference does not say how they round.
    better = scores[pairs.prompt, pairs.better].astype(np.float64)
    worse = scores[pairs.prompt, pairs.worse].astype(np.float64)
    equal = ties.is_tie(better, worse, scale=ties.scale_of(scores[ranks >= 0]))
    return pairs, margin, np.where(equal, 0.5, (margin > 0).astype(np.float64))


def _prompts(groups: np.ndarray | None, rows: int) -> np.ndarray:
    if groups is None:
        return np.arange(rows)
    groups = np.asarray(groups)
    if groups.shape != (rows,):
        raise ValueError(
            f"groups has shape {groups.shape} for {rows} rankings: give the prompt of each"
        )
    return groups


def _relations(
    ranks_a: np.ndarray, ranks_b: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompt of every pair i < j that both rankings contain, and the sign of its order in each."""
    present = (ranks_a >= 0) & (ranks_b >= 0)
    # Each unordered pair once; agreement has no direction.
    i, j = np.triu_indices(ranks_a.shape[1], 1)
    prompt, pair = np.nonzero(present[:, i] & present[:, j])
    a = np.sign(ranks_a[:, i] - ranks_a[:, j])[prompt, pair]
    b = np.sign(ranks_b[:, i] - ranks_b[:, j])[prompt, pair]
    return prompt, a, b


def _binned(quantity: np.ndarray, correct: np.ndarray, edges: np.ndarray) -> AccuracyBins:
    if len(edges) < 2 or (np.diff(edges) <= 0).any():
        raise ValueError(f"edges={edges.tolist()} must be at least two rising numbers")
    inside = (quantity >= edges[0]) & (quantity <= edges[-1])
    # The last edge belongs to the last bin.
    index = np.searchsorted(edges, quantity[inside], side="right") - 1
    index = np.minimum(index, len(edges) - 2)
    count = np.bincount(index, minlength=len(edges) - 1)
    total = np.bincount(index, correct[inside], minlength=len(edges) - 1)
    accuracy = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return AccuracyBins(edges, accuracy, count)


def _bootstrap(prompt: np.ndarray, outcome: np.ndarray, resamples: int, seed: int) -> Accuracy:
    """Mean outcome over pairs; its interval resamples prompts, each with all its pairs.

    Where all pairs have the same outcome, so has every resample; the interval is then Wilson's over
    the prompts.
    """
    if len(prompt) == 0:
        raise ValueError("no pair to compare: the rankings share no strict pair")
    _, index = np.unique(prompt, return_inverse=True)
    # Sums per prompt, so that a resample adds up prompts and not pairs.
    count, total = np.bincount(index), np.bincount(index, outcome)
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        # As many prompts as there are. A resample's denominator varies with the pairs it drew.
        draw = rng.integers(len(count), size=len(count))
        means.append(total[draw].sum() / count[draw].sum())
    low, high = np.quantile(means, [0.025, 0.975])
    if low == high:
        low, high = wilson(float(outcome.mean()), len(count))
    return Accuracy(float(outcome.mean()), float(low), float(high), len(prompt))
