"""Finds, reports and removes prompts that are in two splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf_jax.data.curation.texts import Item, digest, first_turn, normalise, prompt_text
from rlhf_jax.data.schema import DataReport


@dataclasses.dataclass(frozen=True)
class Leak:
    """One prompt in two splits.

    Attributes:
      kind: "prompt" when the whole prompts are equal, "first human turn" when only the beginnings
        of the conversations are.
      text: the shared text, shortened.
      places: (split, index in it) of the two records.
      ids: of the two records, where they have any.
    """

    kind: str
    text: str
    places: tuple[tuple[str, int], tuple[str, int]]
    ids: tuple[str | None, str | None] = (None, None)

    def __str__(self) -> str:
        pairs = zip(self.places, self.ids, strict=True)
        names = [
            f"{split}[{place}]" + (f" (id {name})" if name else "")
            for (split, place), name in pairs
        ]
        return f"the same {self.kind} is in {' and '.join(names)}: {self.text}"


def leakage(splits: Mapping[str, Sequence[Any]]) -> list[Leak]:
    """Prompts that are in two splits, as a whole or by the first human turn of a conversation.

    Differences in case and spaces are ignored.

    Args:
      splits: the records of each split, of any kinds.

    Returns:
      One leak per record that shares its prompt or first turn with an earlier split, naming the
      first such split; empty when nothing leaked.
    """
    leaks: list[Leak] = []
    turns: dict[str, dict[bytes, int]] = {}
    prompts: dict[str, dict[bytes, int]] = {}
    for name, records in splits.items():
        # Added to the earlier splits after the loop only: repeats within a split are no leak.
        here: tuple[dict[bytes, int], dict[bytes, int]] = ({}, {})
        for place, record in enumerate(records):
            whole, turn = (
                digest(normalise(text)) for text in (prompt_text(record), first_turn(record))
            )
            here[0].setdefault(whole, place)
            here[1].setdefault(turn, place)
            # The whole prompt is compared first: it is the stronger finding.
            for kind, value, earlier in (
                ("prompt", whole, prompts),
                ("first human turn", turn, turns),
            ):
                other = next((split for split, known in earlier.items() if value in known), None)
                if other is not None:
                    text = prompt_text(record) if kind == "prompt" else first_turn(record)
                    first = earlier[other][value]
                    ids = (getattr(splits[other][first], "id", None), getattr(record, "id", None))
                    leaks.append(Leak(kind, _quoted(text), ((other, first), (name, place)), ids))
                    break  # equal prompts have equal first turns: one leak per record
        prompts[name], turns[name] = here
    return leaks


def check_leakage(splits: Mapping[str, Sequence[Any]]) -> None:
    """Raises a ValueError where `leakage` finds any, with both positions of the first three."""
    leaks = leakage(splits)
    if leaks:
        shown = "\n  ".join(map(str, leaks[:3]))
        raise ValueError(f"{len(leaks)} records share a prompt with another split:\n  {shown}")


def without_leaks(
    records: Iterable[Item], held_out: Iterable[Any]
) -> tuple[list[Item], DataReport]:
    """Drops the records that share their prompt or first human turn with one of `held_out`.

    Returns:
      The other records, and the counts.
    """
    texts = [(normalise(prompt_text(other)), normalise(first_turn(other))) for other in held_out]
    # Digests instead of texts, as the held-out texts may be many and long.
    prompts, turns = (
        {digest(text) for text in column}
        for column in (zip(*texts, strict=True) if texts else ((), ()))
    )
    kept, rows = [], 0
    for record in records:
        rows += 1
        if (
            digest(normalise(prompt_text(record))) in prompts
            or digest(normalise(first_turn(record))) in turns
        ):
            continue
        kept.append(record)
    dropped = {"also held out": rows - len(kept)} if rows > len(kept) else {}
    return kept, DataReport("leaks", rows, len(kept), dropped)


def _quoted(text: str, width: int = 60) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= width else line[: width - 3] + "...")
