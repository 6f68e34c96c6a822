"""Splits records into parts that share no conversation, in an order fixed by a seed, with ids."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from msgspec import structs

from rlhf_jax.data import sources


class Parts:
    """Assigns conversations to parts by a hash.

    The hash is a position in [0, 1), which the parts' shares divide into ranges. So prompts of one
    conversation are always in one part, whatever file they come from.
    """

    def __init__(self, config: Any):
        self.seed, shares = config.seed, config.shares
        total = sum(shares.values())
        if abs(total - 1) >= 1e-6:
            raise ValueError(f"shares={dict(shares)!r}: add up to {total:g}: make it 1")
        self.ranges, start = {}, 0.0
        for name, share in shares.items():
            # Ranges follow the order of the config, so adding a part at the end moves no
            # conversation.
            self.ranges[name] = (start, start + share)
            start += share
        # Shares such as .1 are rounded: their sum may end a little below 1, where a conversation
        # would be in no part.
        last = next(reversed(self.ranges))
        self.ranges[last] = (self.ranges[last][0], 1.0)

    def take(
        self, records: Iterable[Any], parts: Sequence[str], count: int, keep: Callable[[Any], Any]
    ) -> list[Any]:
        """Takes at most `count` records of `parts`, in an order fixed by the seed.

        `keep` returns the record to take, which it may have shortened, or None to skip it.
        """

        def here(record: Any) -> bool:
            place = sources.conversation_place(record.prompt)
            return any(low <= place < high for low, high in (self.ranges[part] for part in parts))

        # OpenAssistant's records come first: there are few of them, and they compare more than two
        # responses.
        order = sorted(
            (r for r in records if here(r)),
            key=lambda r: (
                not str(r.source).startswith("oasst"),
                shuffled(self.seed, r.prompt, r.id),
            ),
        )
        taken: list[Any] = []
        for record in order:
            if len(taken) == count:
                break
            kept = keep(record)
            taken += [] if kept is None else [kept]
        return taken


def require_records(files: dict[str, Any]) -> None:
    """Refuses empty files, held-out rankings aside: a source may have none of those."""
    for name, records in files.items():
        if not records and not name.startswith("rankings_held_out"):
            raise ValueError(
                f"no record is left for {name}.jsonl: raise prompt_length, response_length or "
                "ranked_response_length, or the part's share"
            )


def shuffled(seed: int, *parts: str | None) -> bytes:
    """A sort key that shuffles: its order depends on `seed` and the parts alone.

    Unlike a random permutation, it keeps the order of the old records when new ones are added.
    """
    return hashlib.sha256("\0".join([str(seed), *map(str, parts)]).encode()).digest()


def named(records: Sequence[Any]) -> list[Any]:
    """The records with unique ids: the source and the index in `records`."""
    return [structs.replace(r, id=f"{r.source}-{place}") for place, r in enumerate(records)]


def distinct(records: Iterable[Any]) -> list[Any]:
    """The first record of each prompt."""
    first: dict[Any, Any] = {}
    for record in records:
        first.setdefault(record.prompt, record)
    return list(first.values())


def unique_ids(records: Sequence[Any]) -> list[Any]:
    """Makes ids unique by appending a number to every repeat of an id but the first.

    Records of different files may come with the same id.
    """
    seen: collections.Counter[str] = collections.Counter()
    result = []
    for record in records:
        seen[record.id] += 1
        count = seen[record.id]
        result.append(record if count == 1 else structs.replace(record, id=f"{record.id}/{count}"))
    return result


def with_ids(name: str, records: Iterable[Any]) -> list[Any]:
    """The records, where those without an id get `name` and their index as one."""
    return [
        r if r.id else structs.replace(r, id=f"{name}-{place}") for place, r in enumerate(records)
    ]
