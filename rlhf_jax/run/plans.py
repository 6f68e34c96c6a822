"""The plan of a pipeline: what is to be done with each stage and why, and how that is told to
people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

STRANGE = "this stage did not write it"
"""What is wrong with a file that is set aside, while everything that the stage wrote is as it
was."""


class Step(NamedTuple):
    """What is to be done with a stage."""

    stage: str
    action: str
    """``keep``, ``run`` (from its beginning), ``resume`` (from a checkpoint), or ``repair`` (some
    outputs)."""
    why: tuple[str, ...] = ()
    changed: bool = False
    """Whether its config, inputs or version are others than before."""


def describe(steps: Sequence[Step], where: str) -> str:
    """The plan for people: one line if every stage is to be done, or none; else a line for each
    stage.

    >>> print(describe([Step("data", "keep"), Step("sft", "run", ("config.sft.epochs 2 -> 3",))], "runs/x"))
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
        word = "kept, others' files set aside" if tidied else words[step.action]
        lines.append(f"{number:3} {step.stage:13} {word}{reasons}")
    return "\n".join(lines)


def told(bad: Mapping[str, str]) -> tuple[str, ...]:
    """Outputs of a stage that are not what it wrote, and what is wrong with them; the first three
    by name.
    """
    shown = [
        f"{name} is not what was written ({trouble})" for name, trouble in list(bad.items())[:3]
    ]
    return (*shown, f"and {len(bad) - 3} more") if len(bad) > 3 else tuple(shown)
