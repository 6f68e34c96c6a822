"""The claims of the paper that a small run can check, judged by the numbers of `results.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_jax.evaluation.report.results import number

MAXIMAL_DROP = 0.05
"""Accuracy that a reward model may lose on labelers that it was not trained on."""
MINIMAL_ACCURACY = 0.6
MAXIMAL_KL = 30.0
"""Largest KL, in nats per sequence, of a policy that counts as near its reference."""


class Claim(NamedTuple):
    """A claim, whether the run supports it (None: not measured), and the numbers for it."""

    text: str
    seen: bool | None
    detail: str


def claims(results: Mapping[str, Any]) -> list[Claim]:
    """Every claim with its verdict.

    Args:
      results: as written to `results.json` (docs/results_schema.md).
    """
    win, equal = "win_rate_vs_sft", "win_rate_vs_sft_length_controlled"
    return [
        _judged(
            results,
            "Preference rises from base to prompted base to SFT to PPO-ptx.",
            [f"{win}.base.value", f"{win}.prompted_base.value", f"{win}.ppo_ptx.value"],
            lambda base, prompted, ptx: base < prompted < 0.5 < ptx,
            "Win rates against SFT: base {0:.1%}, prompted base {1:.1%}, PPO-ptx {2:.1%}.",
        ),
        _judged(
            results,
            "PPO-ptx beats SFT beyond chance, and not by length alone.",
            [f"{win}.ppo_ptx.low", f"{equal}.ppo_ptx.low"],
            lambda plain, controlled: min(plain, controlled) > 0.5,
            "Lower ends of the 95% intervals: {0:.1%}, and {1:.1%} at equal length.",
        ),
        _judged(
            results,
            "PPO forgets pretraining text; mixing it in (PPO-ptx) prevents part of that.",
            ["pretraining_loss.ppo", "pretraining_loss.ppo_ptx"],
            lambda ppo, ptx: ppo > ptx,
            "Held-out loss: PPO {0:.3f}, PPO-ptx {1:.3f} nats per token.",
        ),
        _judged(
            results,
            "The reward model agrees with labelers it never learnt from.",
            ["rm_accuracy.train_labelers.value", "rm_accuracy.heldout_labelers.value"],
            _labelers_agree,
            "Accuracy {0:.1%} on training labelers, {1:.1%} on held-out ones.",
        ),
        _judged(
            results,
            "The policy stays near the model that it started from.",
            ["kl.ppo", "kl.ppo_ptx"],
            lambda ppo, ptx: max(ppo, ptx) < MAXIMAL_KL,
            "KL: PPO {0:.1f}, PPO-ptx {1:.1f} nats per sequence; "
            f"the limit set for this check is {MAXIMAL_KL:.0f}.",
        ),
    ]


def _labelers_agree(train: float, heldout: float) -> bool:
    # Not the difference alone: a model that learnt nothing agrees equally little with both groups.
    return train - heldout <= MAXIMAL_DROP and min(train, heldout) > MINIMAL_ACCURACY


def _judged(
    results: Mapping[str, Any],
    text: str,
    keys: Sequence[str],
    test: Callable[..., bool],
    detail: str,
) -> Claim:
    """A claim whose `test` is called with the numbers at `keys`, which also fill `detail`."""
    numbers = [number(results, key) for key in keys]
    if any(value is None for value in numbers):
        return Claim(text, None, "Its numbers are missing from this run.")
    return Claim(text, bool(test(*numbers)), detail.format(*numbers))
