"""How well a reward model's scores agree with rankings: accuracy, overall and in bins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.data import schema
from rlhf_jax.evaluation import reward_model as quality

Scores = dict[tuple[schema.Conversation, str], float]
"""Score of each (prompt, response)."""


MARGIN_QUANTILES = np.linspace(0, 1, 6)


LENGTH_EDGES = np.array([-1e4, -50.0, -15.0, 0.0, 1.0, 16.0, 51.0, 1e4])
"""Bins of (words of the preferred response) - (words of the other one); the middle bin is for equal
lengths."""


def evaluate(rankings: Sequence[schema.Ranking], scores: Scores) -> dict:
    """Accuracy on strict pairs with its interval, overall and in bins.

    The accuracy of the rule "longer is better" is given for comparison.
    """
    grid, ranks, lengths = pad_ranked(rankings, scores)
    # Rankings of one prompt by several labelers are not independent, so the intervals resample
    # prompts.
    number = {
        prompt: place for place, prompt in enumerate(dict.fromkeys(r.prompt for r in rankings))
    }
    groups = np.array([number[r.prompt] for r in rankings])
    calibration = quality.calibration(grid, ranks)
    # Bins need rising edges, and quantiles coincide where many margins are equal. 0 is added so
    # that the first bin begins there.
    margins = np.unique(
        np.quantile(np.concatenate([[0.0], np.abs(pair_margins(grid, ranks))]), MARGIN_QUANTILES)
    )
    by_margin = quality.accuracy_by_margin(grid, ranks, edges=margins) if len(margins) > 1 else None
    by_length = quality.accuracy_by_length_difference(grid, ranks, lengths, edges=LENGTH_EDGES)
    length_only = quality.length_only_accuracy(lengths, ranks, groups=groups)
    return {
        "accuracy": quality.pairwise_accuracy(grid, ranks, groups=groups)._asdict(),
        "log_loss": quality.pairwise_log_loss(grid, ranks),
        "length_only_accuracy": length_only.value,
        "length_only": length_only._asdict(),
        "accuracy_by_margin": None if by_margin is None else _lists(by_margin),
        "accuracy_by_length_difference": _lists(by_length),
        "calibration": _lists(calibration),
        "prompts": len(rankings),
    }


def pair_margins(grid: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Score of the preferred response minus that of the other, of each strict pair."""
    pairs = quality.strict_pairs(ranks)
    return grid[pairs.prompt, pairs.better] - grid[pairs.prompt, pairs.worse]


def _lists(table: Any) -> dict[str, list[float | None]]:
    """A named tuple of arrays for JSON; NaN, the value of an empty bin, becomes null."""
    columns = {name: np.asarray(column).tolist() for name, column in table._asdict().items()}
    return {name: [None if x != x else x for x in column] for name, column in columns.items()}


def pad_ranked(
    rankings: Sequence[schema.Ranking], scores: Scores
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, ranks and lengths (words) of each ranking as ``[N, K]`` with -1 for absent ranks."""
    k = max(len(r.responses) for r in rankings)
    grid, ranks, lengths = (
        np.zeros((len(rankings), k)),
        np.full((len(rankings), k), -1),
        np.zeros((len(rankings), k)),
    )
    for row, ranking in enumerate(rankings):
        count = len(ranking.responses)
        grid[row, :count] = [scores[ranking.prompt, response] for response in ranking.responses]
        ranks[row, :count] = ranking.ranks
        lengths[row, :count] = [len(response.split()) for response in ranking.responses]
    return grid, ranks, lengths
