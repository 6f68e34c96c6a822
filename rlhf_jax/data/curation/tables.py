"""Tables that describe a data set as the paper's appendix A describes its own."""

from __future__ import annotations

import collections
import functools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rlhf_jax.data.curation.languages import language_share
from rlhf_jax.data.curation.texts import group_of, prompt_text
from rlhf_jax.data.schema import (
    ABSENT,
    Demonstration,
    PlainText,
    Prompt,
    Ranking,
    strict_pairs,
)

WIDTH = 120
"""Most columns of a table."""


KINDS = {
    Demonstration: "demonstrations",
    Ranking: "rankings",
    Prompt: "prompts",
    PlainText: "documents",
}


MOST_ROWS = 14
"""Most sources, use cases or languages in a table; the others are summed in one row."""


LANGUAGE_SAMPLE = 2_000
"""Most prompts (evenly spaced) whose language is identified, at a millisecond or two for each."""


def data_tables(
    splits: Mapping[str, Sequence[Any]],
    *,
    tokens: Callable[[str], int] | None = None,
    identify: Callable[[str], str] | None = None,
) -> str:
    """Tables that describe a data set as the paper's appendix A describes its own.

    They are sizes by kind, source and split (the paper's table 6), use cases (table 1), prompts per
    user (table 8), lengths of prompts by kind and split, use case and source (tables 9 and 10),
    lengths of demonstrations (table 11), numbers of ranked responses, labelers and languages. Where
    no record has a field, one line replaces its table. No line is longer than `WIDTH`.

    Args:
      splits: the records of each split, of any kinds.
      tokens: length of a text in tokens; None = counted in words.
      identify: language of a text, for `language_share`; None leaves that table out.

    Source: Ouyang et al. 2022, tables 1, 6 and 8 to 11.
    """
    unit = "words" if tokens is None else "tokens"
    # Several tables need the length of the same text, and a tokenizer is slow.
    count = functools.cache(tokens or (lambda text: len(text.split())))
    records = [record for part in splits.values() for record in part]
    prompted = [record for record in records if not isinstance(record, PlainText)]
    blocks = [
        _sizes(splits),
        _use_cases(prompted),
        *(_per_group(splits, key) for key in ("user", "organization")),
        _lengths(
            f"Prompts: {unit} by kind and split", _by_split(splits), lambda r: count(prompt_text(r))
        ),
        *_lengths_by(prompted, f"Prompts: {unit}", lambda r: count(prompt_text(r))),
        *_lengths_by(
            _of_kind(records, Demonstration), f"Demonstrations: {unit}", lambda r: count(r.response)
        ),
        _ranked(_of_kind(records, Ranking)),
        _labelers(prompted),
        _languages(prompted, identify),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _of_kind(records: Iterable[Any], kind: type) -> list[Any]:
    return [record for record in records if isinstance(record, kind)]


def _by(records: Iterable[Any], name: Callable[[Any], str]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for record in records:
        groups.setdefault(name(record), []).append(record)
    return groups


def _by_split(splits: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Records with prompts by kind and split, in the order of the kinds."""
    return {
        f"{word}, {name}": _of_kind(part, kind)
        for kind, word in KINDS.items()
        if kind is not PlainText
        for name, part in splits.items()
        if _of_kind(part, kind)
    }


def _most(groups: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The largest groups, largest first, and all others as one group."""
    order = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    shown = dict(order[:MOST_ROWS])
    if len(order) > MOST_ROWS:
        rest = order[MOST_ROWS:]
        shown[f"({len(rest)} others)"] = [record for _, group in rest for record in group]
    return shown


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table with columns as wide as their widest cell.

    The first column is shortened where the table would be wider than `WIDTH`.
    """
    cells = [list(map(str, row)) for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    # The other columns are numbers and never cut; the first one keeps at least 8 characters.
    widths[0] = min(widths[0], max(8, WIDTH - sum(widths[1:]) - 2 * len(widths[1:])))
    lines = []
    for row in cells:
        first = row[0] if len(row[0]) <= widths[0] else row[0][: widths[0] - 2] + ".."
        numbers = "".join(
            f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)
        )
        lines.append((first.ljust(widths[0]) + numbers)[:WIDTH].rstrip())
    return "\n".join([title[:WIDTH], *lines])


def _sizes(splits: Mapping[str, Sequence[Any]]) -> str:
    rows = []
    for kind, word in KINDS.items():
        of_kind = {name: _of_kind(part, kind) for name, part in splits.items()}
        everything = [record for part in of_kind.values() for record in part]
        if not everything:
            continue
        sources = _most(_by(everything, lambda r: r.source or "(no source)"))
        # With a single source the total below says the same, so no row per source is written.
        for source, group in sources.items() if len(sources) > 1 else ():
            # By identity, as equal records of two splits must each count in their own.
            members = {id(record) for record in group}
            counts = [sum(id(record) in members for record in part) for part in of_kind.values()]
            rows.append([f"{word}, {source}", *counts, len(group)])
        label = word if len(sources) > 1 else f"{word}, {next(iter(sources))}"
        rows.append([label, *map(len, of_kind.values()), len(everything)])
    return _table("Sizes: records by kind, source and split", ["", *splits, "all"], rows)


def _use_cases(records: Sequence[Any]) -> str:
    if not any(record.use_case for record in records):
        return "Use cases: no record names one"
    kinds = {
        word: _of_kind(records, kind) for kind, word in KINDS.items() if _of_kind(records, kind)
    }
    rows = []
    for use_case, group in _most(_by(records, lambda r: r.use_case or "(none)")).items():
        members = set(map(id, group))
        shares = [sum(id(r) in members for r in part) / len(part) for part in kinds.values()]
        rows.append([use_case, *(f"{share:.1%}" for share in shares), len(group)])
    return _table("Use cases: share of each kind", ["", *kinds, "records"], rows)


def _per_group(splits: Mapping[str, Sequence[Any]], key: str) -> str:
    rows = []
    for name, part in _by_split(splits).items():
        counts = collections.Counter(group_of(record, key) for record in part)
        # Records that name no group are counted apart, so that they do not appear as one large
        # group.
        unnamed = counts.pop(None, 0)
        if counts:
            numbers = sorted(counts.values())
            mean = f"{statistics.mean(numbers):.2f}"
            rows.append(
                [name, len(numbers), mean, f"{statistics.median(numbers):g}", numbers[-1], unnamed]
            )
    if not rows:
        return f"Records per {key}: no record names one"
    return _table(
        f"Records per {key}", ["", f"{key}s", "mean", "median", "most", f"without {key}"], rows
    )


def _lengths(title: str, groups: Mapping[str, Sequence[Any]], length: Callable[[Any], int]) -> str:
    header = ["", "n", "mean", "std", "min", "25%", "50%", "75%", "max"]
    return _table(
        title,
        header,
        [[name, *_quantiles(list(map(length, g)))] for name, g in groups.items() if g],
    )


def _lengths_by(records: Sequence[Any], what: str, length: Callable[[Any], int]) -> list[str]:
    """Two tables of lengths, by source and by use case.

    A table is left out where there are no records, or all have the same use case.
    """
    tables = []
    for field, word in (("source", "source"), ("use_case", "use case")):
        groups = _most(
            _by(
                records,
                lambda r, field=field: getattr(r, field) or f"(no {field.replace('_', ' ')})",
            )
        )
        if len(groups) > 1 or (records and field == "source"):
            tables.append(_lengths(f"{what} by {word}", groups, length))
    return tables


def _quantiles(lengths: list[int]) -> list[Any]:
    """Count, mean, sample standard deviation, minimum, quartiles and maximum of some lengths.

    Quartiles are interpolated linearly.
    """
    order = sorted(lengths)

    def at(share: float) -> float:
        # The position between two neighbours: its whole part is the lower one, the rest their
        # weight.
        low, part = divmod(share * (len(order) - 1), 1)
        high = min(int(low) + 1, len(order) - 1)
        return order[int(low)] + part * (order[high] - order[int(low)])

    # The sample standard deviation needs two values.
    spread = statistics.stdev(order) if len(order) > 1 else 0.0
    middle = [f"{at(share):.0f}" for share in (0.25, 0.5, 0.75)]
    return [
        len(order),
        f"{statistics.mean(order):.0f}",
        f"{spread:.0f}",
        order[0],
        *middle,
        order[-1],
    ]


def _ranked(rankings: Sequence[Ranking]) -> str:
    if not rankings:
        return ""
    rows = []
    sizes = _by(rankings, lambda r: str(sum(rank != ABSENT for rank in r.ranks)))
    for k, group in sorted(sizes.items(), key=lambda item: int(item[0])):
        pairs = sum(strict_pairs(r.ranks) for r in group)
        # Of all K(K - 1)/2 comparisons, those that prefer neither response.
        tied = len(group) * math.comb(int(k), 2) - pairs
        rows.append([f"K = {k}", len(group), f"{len(group) / len(rankings):.1%}", pairs, tied])
    rows.append(
        ["all", len(rankings), "100.0%", sum(row[3] for row in rows), sum(row[4] for row in rows)]
    )
    return _table(
        "Rankings: responses ranked, and their pairs",
        ["", "prompts", "share", "pairs", "tied"],
        rows,
    )


def _labelers(records: Sequence[Any]) -> str:
    rows = []
    for kind in (Demonstration, Ranking):
        counts = collections.Counter(record.labeler for record in _of_kind(records, kind))
        unnamed = counts.pop(None, 0)
        if counts:
            numbers = sorted(counts.values())
            middle = f"{statistics.median(numbers):g}"
            rows.append([KINDS[kind], len(numbers), numbers[0], middle, numbers[-1], unnamed])
    if not rows:
        return (
            "Labelers: no record names one"
            if any(hasattr(record, "labeler") for record in records)
            else ""
        )
    return _table(
        "Labelers, and records of each",
        ["", "labelers", "least", "median", "most", "unnamed"],
        rows,
    )


def _languages(records: Sequence[Any], identify: Callable[[str], str] | None) -> str:
    if identify is None or not records:
        return ""
    # Evenly spaced, so that every split is sampled.
    chosen = records[:: math.ceil(len(records) / LANGUAGE_SAMPLE)]
    shares = language_share((prompt_text(record) for record in chosen), identify)
    shown = list(shares.items())[:MOST_ROWS]
    rows = [[name, f"{share:.1%}"] for name, share in shown]
    rest = len(shares) - len(shown)
    rows += [[f"({rest} others)", f"{sum(list(shares.values())[MOST_ROWS:]):.1%}"]] if rest else []
    return _table(f"Languages of {len(chosen)} of the {len(records)} prompts", ["", "share"], rows)
