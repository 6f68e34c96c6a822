"""Packs several items into a row, and counts the items that do not fit."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from rlhf_jax.types import LMBatch, RankingBatch

Item = TypeVar("Item")


def best_fit(
    sizes: Sequence[int], *, capacity: int, max_items: int | None = None
) -> list[list[int]]:
    """Groups items into rows by best-fit decreasing, as indices.

    The largest item is placed first, each in the fullest row that still has room.

    Args:
      sizes: tokens of each item.
      capacity: tokens per row.
      max_items: most items per row; None = no limit.

    >>> best_fit([3, 5, 2, 6], capacity=8)
    [[3, 2], [1, 0]]
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted: bisect finds the tightest fit
    # The index breaks ties, so that equal sizes are packed in the order of the input.
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if sizes[item] > capacity:
            raise ValueError(
                f"item {item} has {sizes[item]} tokens but length={capacity}: raise length, or "
                "leave such items out with drop_too_long, which counts them"
            )
        # With -1, below every row number, the search finds the fullest of the rows that have room.
        place = bisect.bisect_left(room, (sizes[item], -1))
        free, row = room.pop(place) if place < len(room) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(item)
        # A row with all its items is not offered again, however much room is left.
        if max_items is None or len(rows[row]) < max_items:
            bisect.insort(room, (free - sizes[item], row))
    return rows


def drop_too_long(items: Sequence[Item], *, length: int) -> tuple[list[Item], int]:
    """The items that fit in a row of `length` tokens, and how many do not.

    An item is anything that a row function takes.

    >>> drop_too_long([([1, 2], [3]), ([1, 2, 3], [4, 5])], length=4)
    ([([1, 2], [3])], 1)
    """
    kept = [item for item in items if slots_of(item) <= length]
    return kept, len(items) - len(kept)


def padding_share(batch: LMBatch | RankingBatch) -> float:
    """Share of the slots that are padding, which is wasted compute."""
    return float(np.mean(np.asarray(batch.segments) == 0))


def slots_of(item: Any) -> int:
    """Slots that a document, a pair, a masked piece or a ranking takes.

    Responses of rank -1 take none.
    """
    # A document is a flat list of ids; all other items are lists of lists.
    if not len(item) or np.ndim(item[0]) == 0:
        return len(item)
    # Both are pairs: ids with a mask of the same length, or the ids of a prompt and a response.
    if len(item) == 2 and isinstance(item[1][0] if len(item[1]) else 0, bool):
        return len(item[0])
    if len(item) == 2:
        return sum(len(ids) for ids in item)
    prompt, responses, ranks = item
    return len(prompt) + sum(len(r) for r, rank in zip(responses, ranks, strict=True) if rank >= 0)
