"""The numbers of a whole pipeline in short: what ``results.json`` and the last lines on the screen say of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_jax.data import schema
from rlhf_jax.evaluation import reward_model as quality


def agreement(rankings: Sequence[schema.Ranking]) -> float:
    """How often two labelers of the group order a pair the same way, from prompts that two of them ranked."""
    pairs: dict[str, list[tuple[int, ...]]] = {}
    for ranking in rankings:
        pairs.setdefault(str(ranking.id).rsplit("/", 1)[0], []).append(ranking.ranks)
    both = [ranks for ranks in pairs.values() if len(ranks) == 2]
    k = max(len(a) for a, _ in both)
    fill = lambda ranks: list(ranks) + [-1] * (k - len(ranks))  # noqa: E731
    first, second = (np.array([fill(ranks[i]) for ranks in both]) for i in (0, 1))
    return quality.labeler_agreement(first, second).value


MEASURED_ON = {"validation_train": "train_labelers", "validation_heldout": "heldout_labelers"}
"""Sets of held-out rankings under the names of the results schema; people's own keep theirs (held_out_hh_rlhf)."""


def reward_model_results(rewards: dict) -> dict:
    """What the results say of the reward model: accuracy on each held-out set, the rest on the largest of them."""
    sets = {name: found for name, found in rewards.items() if isinstance(found, dict) and "accuracy" in found}
    # Of storyland's two, equally large, the held-out labelers' counts: it is the later one.
    main = max(reversed(list(sets.values())), key=lambda found: found["prompts"])
    agreed = {g: rewards[f"agreement_{g}"] for g in ("train", "heldout") if f"agreement_{g}" in rewards}
    return {
        "rm_accuracy": {MEASURED_ON.get(name, name): found["accuracy"] for name, found in sets.items()},
        **({"labeler_agreement": agreed} if agreed else {}),
        "calibration": calibration_points(main["calibration"]),
        "length_only_accuracy": main["length_only_accuracy"],
    }


def calibration_points(calibration: dict[str, list[float]]) -> dict[str, list[float]]:
    """The calibration curve under the names of the results schema."""
    return {key: calibration[key] for key in ("predicted", "observed", "count")}


def headline(results: dict) -> str:
    """The result in a few lines."""
    judge = "the gold scorer" if "win_rate_vs_sft" in results else "the reward model"
    lines = ["", f"Win rate against SFT by {judge} (95% interval):"]
    for model, rate in results.get("win_rate_vs_sft", results["win_rate_vs_sft_by_reward_model"]).items():
        lines.append(f"  {model:14} {rate['value']:.3f}  ({rate['low']:.3f} to {rate['high']:.3f})")
    return "\n".join(lines)
