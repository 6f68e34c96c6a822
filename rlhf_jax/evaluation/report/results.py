"""Tolerant reading of `results.json`: a number that is missing or not finite becomes None."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

WIN_RATES = {
    "win_rate_vs_sft": "by the gold scorer",
    "win_rate_vs_sft_length_controlled": "by the gold scorer, at equal length",
    "win_rate_vs_sft_by_reward_model": "by the reward model",
}

INTERVAL = ("value", "low", "high")

Interval = tuple[float | None, float | None, float | None]


def _required() -> Iterator[str]:
    answering = ("base", "prompted_base", "sft", "ppo", "ppo_ptx")
    for rate in WIN_RATES:
        for model in ("base", "prompted_base", "ppo", "ppo_ptx"):
            yield from (f"{rate}.{model}.{end}" for end in INTERVAL)
    yield from (f"gold_score.{model}" for model in answering)
    yield from (f"response_tokens.{model}" for model in answering)
    yield from (f"pretraining_loss.{model}" for model in ("base", "sft", "ppo", "ppo_ptx"))
    for group in ("train_labelers", "heldout_labelers"):
        yield from (f"rm_accuracy.{group}.{end}" for end in INTERVAL)
    yield from ("labeler_agreement.train", "labeler_agreement.heldout")
    yield from ("kl.ppo", "kl.ppo_ptx", "peak_memory_mb")


REQUIRED = tuple(_required())
"""Dotted keys of `results.json` that have one finite number each."""

REQUIRED_MAPPINGS = ("gold_parts", "seconds", "config", "versions")


def check_results(results: Mapping[str, Any]) -> list[str]:
    """The keys that are missing in `results`, or that are not the finite number they should be.

    Args:
      results: as written to `results.json` (docs/results_schema.md).

    Returns:
      Dotted keys in the order of the schema; empty when the results are complete.

    >>> check_results({})[0]
    'win_rate_vs_sft.base.value'
    """
    missing = [key for key in REQUIRED if number(results, key) is None]
    return missing + [key for key in REQUIRED_MAPPINGS if not mapping(results, key)]


def finite(value: Any) -> bool:
    """Whether `value` is a number that can be plotted."""
    # A bool is a `Real`, and would be plotted as 0 or 1.
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def number(results: Mapping[str, Any], key: str) -> float | None:
    """The finite number at a dotted key, or None."""
    value: Any = results
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return float(value) if finite(value) else None


def interval(results: Mapping[str, Any], key: str) -> Interval:
    """``value``, ``low`` and ``high`` below a dotted key, each None where it is missing."""
    return (
        number(results, f"{key}.value"),
        number(results, f"{key}.low"),
        number(results, f"{key}.high"),
    )


def mapping(results: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The mapping at a key; an empty one if there is none."""
    value = results.get(key)
    return value if isinstance(value, Mapping) else {}


def pairs(xs: Any, ys: Any) -> list[tuple[float, float]]:
    """Points of two lists, without those that have a missing or non-finite coordinate."""
    points = zip(xs or (), ys or (), strict=False)
    return [(float(x), float(y)) for x, y in points if finite(x) and finite(y)]
