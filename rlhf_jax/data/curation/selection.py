"""Selects records: removes near-duplicates, caps them per user, and splits them by user."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Mapping

from rlhf_jax.data.curation.texts import Item, Key, digest, group_of, normalise, prompt_text
from rlhf_jax.data.schema import DataReport


def drop_long_common_prefix(
    prompts: Iterable[Item], *, prefix_length: int
) -> tuple[list[Item], DataReport]:
    """Drops prompts that begin like an earlier one.

    Such prompts are usually variations of one template, typed again and again.

    Differences in case and spaces are ignored. Prompts shorter than the prefix are compared whole,
    so exact repeats are dropped too. The pass is linear, over a set of hashes: a million prompts
    take some seconds.

    Args:
      prompts: records or bare prompts.
      prefix_length: two prompts with this many equal characters at the start are near-duplicates.
        The paper gives no number.

    Returns:
      The first prompt of each prefix in the order of the input, and the counts.

    Source: Ouyang et al. 2022, section 3.2 (a heuristic on long common prefixes).

    >>> drop_long_common_prefix(["Write a poem on rain", "write a poem on snow", "Why?"], prefix_length=12)[0]
    ['Write a poem on rain', 'Why?']
    """  # noqa: E501
    if prefix_length < 1:
        raise ValueError(f"prefix_length={prefix_length} must be 1 or more characters")
    seen: dict[bytes, tuple[int, bytes]] = {}
    kept, dropped, examples, rows = [], collections.Counter(), {}, 0
    for place, item in enumerate(prompts):
        rows += 1
        text = normalise(prompt_text(item))
        prefix, whole = digest(text[:prefix_length]), digest(text)
        if prefix not in seen:
            seen[prefix] = (place, whole)
            kept.append(item)
            continue
        first, other = seen[prefix]
        reason = "same prompt" if other == whole else "long common prefix"
        dropped[reason] += 1
        # Indices instead of texts: the report is stored, and a prompt may contain personal data.
        examples.setdefault(
            reason, f"{reason}: the first is prompt {place}, which begins as prompt {first} does"
        )
    return kept, DataReport("de-duplication", rows, len(kept), dict(dropped), examples=examples)


def cap_per_user(
    records: Iterable[Item], limit: int = 200, *, key: Key = "user"
) -> tuple[list[Item], DataReport]:
    """Keeps the first `limit` records of each user.

    Records that name no user are all kept, and counted.

    Source: Ouyang et al. 2022, section 3.2 (about 200 prompts per user; per organization according
      to appendix A.2).
    """
    if limit < 1:
        raise ValueError(f"limit={limit} must be 1 or more")
    counts: collections.Counter[str] = collections.Counter()
    kept, rows, unnamed = [], 0, 0
    for record in records:
        rows += 1
        group = group_of(record, key)
        unnamed += group is None
        if group is not None:
            counts[group] += 1
        if group is None or counts[group] <= limit:
            kept.append(record)
    name = key if isinstance(key, str) else "group"
    dropped = {f"more than {limit} of one {name}": rows - len(kept)} if rows > len(kept) else {}
    return kept, DataReport(
        "cap", rows, len(kept), dropped, {f"names no {name}": unnamed} if unnamed else {}
    )


def split_by(
    records: Iterable[Item], *, key: Key = "user", fractions: Mapping[str, float], seed: int = 0
) -> dict[str, list[Item]]:
    """Splits records so that a user (organization, conversation, ...) is in exactly one part.

    The hash of a group, with the seed, is a position in [0, 1), which the fractions divide into
    ranges in their order. So a new record of a known user joins the user's others, whatever else is
    added, and no state is needed. A record that names no user is split by its conversation. The
    sizes of the parts follow the fractions only roughly, because users differ in theirs.

    Args:
      records: of any kinds.
      key: "user", "organization", "conversation" or a function that returns a record's group (None:
        by conversation).
      fractions: share of the groups per part; they add up to 1.
      seed: of the hash.

    Returns:
      The records of each part in the order of the input.

    Source: Ouyang et al. 2022, section 3.2 (by user) and appendix A.2 (by organization).

    >>> parts = split_by(["a", "b", "A "], key="conversation", fractions={"train": 0.5, "test": 0.5})
    >>> {"a", "A "} in [set(part) - {"b"} for part in parts.values()]
    True
    """  # noqa: E501
    total = sum(fractions.values())
    if abs(total - 1) > 1e-6 or any(share < 0 for share in fractions.values()):
        raise ValueError(
            f"fractions={dict(fractions)} must be 0 or more and add up to 1, not {total:g}"
        )
    parts: dict[str, list[Item]] = {name: [] for name in fractions}
    ends = list(itertools.accumulate(fractions.values()))
    for record in records:
        group = group_of(record, key)
        # The first word keeps a conversation from sharing the hash of a user of the same name.
        named = (
            ("conversation", str(group_of(record, "conversation")))
            if group is None
            else ("group", group)
        )
        # 48 bits give a float without rounding, so the position is below 1.
        place = int.from_bytes(digest(str(seed), *named)[:6], "big") / 2**48
        # A sum of floats may end a little below 1; the last part with a share takes the rest.
        choices = [
            name
            for name, end in zip(fractions, ends, strict=True)
            if place < end and fractions[name]
        ]
        parts[
            choices[0] if choices else [name for name in fractions if fractions[name]][-1]
        ].append(record)
    return parts
