"""The main numbers of a pipeline, for ``results.json`` and the summary that is printed last."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_jax.data import schema
from rlhf_jax.evaluation import reward_model as quality


def agreement(rankings: Sequence[schema.Ranking]) -> float:
    """How often two labelers order a pair the same way, over prompts that both ranked."""
    pairs: dict[str, list[tuple[int, ...]]] = {}
    for ranking in rankings:
        # The id of a simulated ranking is that of its prompt, a slash and the labeler's name.
        pairs.setdefault(str(ranking.id).rsplit("/", 1)[0], []).append(ranking.ranks)
    both = [ranks for ranks in pairs.values() if len(ranks) == 2]
    k = max(len(ranks) for ranks, _ in both)
    first = np.array([_padded(ranks, k) for ranks, _ in both])
    second = np.array([_padded(ranks, k) for _, ranks in both])
    return quality.labeler_agreement(first, second).value


def _padded(ranks: Sequence[int], k: int) -> list[int]:
    """The ranks of k responses, those beyond the last one absent."""
    return [*ranks, *[-1] * (k - len(ranks))]


MEASURED_ON = {"validation_train": "train_labelers", "validation_heldout": "heldout_labelers"}
"""Held-out rankings in the results schema; other sets keep their name (``held_out_hh_rlhf``)."""


def reward_model_results(rewards: dict) -> dict:
    """Accuracy on each held-out set; the other results are those of the largest set."""
    sets = {}
    for name, found in rewards.items():
        if isinstance(found, dict) and "accuracy" in found:
            sets[name] = found
    # Storyland's two sets are equally large. `max` returns the first maximum, so the reversed order
    # gives the later set, that of the held-out labelers.
    main = max(reversed(list(sets.values())), key=lambda found: found["prompts"])
    accuracy = {MEASURED_ON.get(name, name): found["accuracy"] for name, found in sets.items()}
    agreed = {}
    for group in ("train", "heldout"):
        if f"agreement_{group}" in rewards:
            agreed[group] = rewards[f"agreement_{group}"]
    return {
        "rm_accuracy": accuracy,
        **({"labeler_agreement": agreed} if agreed else {}),
        "calibration": calibration_points(main["calibration"]),
        "length_only_accuracy": main["length_only_accuracy"],
    }


def calibration_points(calibration: dict[str, list[float]]) -> dict[str, list[float]]:
    """The calibration curve, with the names of the results schema."""
    return {key: calibration[key] for key in ("predicted", "observed", "count")}


def headline(results: dict) -> str:
    """The result in a few lines."""
    judge = "the gold scorer" if "win_rate_vs_sft" in results else "the reward model"
    lines = ["", f"Win rate against SFT by {judge} (95% interval):"]
    rates = results.get("win_rate_vs_sft", results["win_rate_vs_sft_by_reward_model"])
    for model, rate in rates.items():
        interval = f"({rate['low']:.3f} to {rate['high']:.3f})"
        lines.append(f"  {model:14} {rate['value']:.3f}  {interval}")
    return "\n".join(lines)
