"""The plan of a pipeline: the action for each stage and its reason, and how it is printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

STRANGE = "this stage did not write it"
"""The reason for setting aside a file while the outputs of its stage are intact."""


class Step(NamedTuple):
    """The action planned for a stage."""

    stage: str
    action: str
    """``keep``, ``run`` (from scratch), ``resume`` (a checkpoint) or ``repair`` (some outputs)."""
    why: tuple[str, ...] = ()
    changed: bool = False
    """Whether its config, inputs or version differ from those of the previous run."""


def describe(steps: Sequence[Step], where: str) -> str:
    """Formats the plan: one line if all stages run or all are kept, else one line per stage.

    >>> steps = [Step("data", "keep"), Step("sft", "run", ("config.sft.epochs 2 -> 3",))]
    >>> print(describe(steps, "runs/x"))
    Plan of 2 stages in runs/x (old outputs of those that run are set aside):
      1 data          kept
      2 sft           runs: config.sft.epochs 2 -> 3
    """
    actions = {step.action for step in steps}
    if actions == {"keep"} and not any(step.why for step in steps):
        return (
            f"All {len(steps)} stages in {where} are done, and their outputs are what was written"
        )
    if all(step.why == ("not done yet",) for step in steps):
        return f"{len(steps)} stages in {where}: {', '.join(step.stage for step in steps)}"
    words = {"keep": "kept", "run": "runs", "resume": "resumed", "repair": "made again"}
    lines = [
        f"Plan of {len(steps)} stages in {where} (old outputs of those that run are set aside):"
    ]
    for number, step in enumerate(steps, start=1):
        reasons = f": {'; '.join(step.why)}" if step.why else ""
        tidied = step.action == "repair" and STRANGE in reasons
        # Its own outputs are intact, so the stage does not run: only files of others are moved.
        word = "kept, others' files set aside" if tidied else words[step.action]
        lines.append(f"{number:3} {step.stage:13} {word}{reasons}")
    return "\n".join(lines)


def told(bad: Mapping[str, str]) -> tuple[str, ...]:
    """Describes the damaged outputs of a stage; at most three are named."""
    shown = [
        f"{name} is not what was written ({trouble})" for name, trouble in list(bad.items())[:3]
    ]
    return (*shown, f"and {len(bad) - 3} more") if len(bad) > 3 else tuple(shown)


def time_left(
    later: Sequence[tuple[float | None, Mapping[str, Any] | None]],
    known: Sequence[Mapping[str, Any]],
) -> str:
    """The estimated time of the stages still to run, in words; empty if it cannot be estimated.

    Args:
      later: of each such stage its cost (how much it computes, in any unit) and the record of its
        last run, or None.
      known: the records of all finished stages; their seconds for each unit of cost count where a
        stage has not run yet.
    """
    seconds = [_expected(cost, earlier, known) for cost, earlier in later]
    if None in seconds:
        return ""
    minutes = round(sum(filter(None, seconds)) / 60)
    if minutes < 1:
        return "  (under a minute to the end)"
    if minutes < 100:
        return f"  (about {minutes} min to the end)"
    return f"  (about {minutes / 60:.0f} h to the end)"


def _expected(
    cost: float | None, earlier: Mapping[str, Any] | None, known: Sequence[Mapping[str, Any]]
) -> float | None:
    """Seconds of a stage, in proportion to what it computes; None if nothing tells them."""
    if earlier is not None:
        # The stage's own last run tells most; a changed config scales its time by the cost.
        scale = cost / earlier["cost"] if cost and earlier.get("cost") else 1.0
        return earlier["seconds"] * scale
    if cost == 0:
        return 0.0
    both = [(r["seconds"], r["cost"]) for r in known if r.get("cost") and r.get("seconds")]
    if cost is None or not both:
        return None
    return cost * sum(seconds for seconds, _ in both) / sum(cost for _, cost in both)
