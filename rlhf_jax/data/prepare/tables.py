"""The tables of a data report: records per split, their lengths, and leaks between splits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlhf_jax.data import curation


def tables(
    files: dict[str, Any],
    tokens: Callable[[str], int] | None,
    identify: Callable[[str], str] | None = None,
) -> str:
    """The tables of the files, and how many held-out records share a prompt with a training file.

    The end of a file's name is its split; a name without one is a training file.
    """
    splits: dict[str, list[Any]] = {"train": [], "validation": [], "test": [], "held out": []}
    for name, records in files.items():
        split = name.rpartition("_")[2] if name.endswith(("_validation", "_test")) else "train"
        splits["held out" if "held_out" in name else split] += records
    held_out = [
        record for split, records in splits.items() if split != "train" for record in records
    ]
    # The held-out splits are compared with training together; leaks among them do not count.
    leaks = len(curation.leakage({"train": splits["train"], "held out": held_out}))
    tables = curation.data_tables(
        {k: v for k, v in splits.items() if v}, tokens=tokens, identify=identify
    )
    return (
        f"Held-out records whose prompt or first human turn is in a training file: {leaks}\n\n"
        f"{tables}"
    )


def identifier() -> Callable[[str], str] | None:
    """The function that identifies languages, or None where its package is not installed."""
    try:
        return curation.default_identifier()
    except ValueError:  # the tables then leave languages out
        return None
