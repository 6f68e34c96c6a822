"""Formats the numbers as one table with the sentences below it, or as one line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rlhf_jax.data.overview.numbers import SHORT, Look, PairNumbers, look
from rlhf_jax.data.overview.sentences import judgements, percent

WIDTH = 100
"""Most columns of the table."""


LINES = 24
"""Most lines of the table, including the sentences below it."""


def summary(
    records: Iterable[Any] | Mapping[str, Look],
    *,
    aside: Mapping[str, int] | None = None,
    tokens: Callable[[str], int] | None = None,
    tokenizer: Any = None,
) -> str:
    """The numbers as a table of at most `LINES` lines of `WIDTH` columns.

    It has one column per kind of record.

    Args:
      records: of any kinds, or the result of `look`.
      aside: columns of the source that no record has a field for, and how many rows have them.
      tokens: as for `look`.
      tokenizer: as for `look`.
    """
    looks = (
        dict(records)
        if isinstance(records, Mapping)
        else look(records, tokens=tokens, tokenizer=tokenizer)
    )
    table = _table([["One look", *looks], *_rows(list(looks.values()))])
    if aside:
        names = [
            f"{name} ({rows:,})" for name, rows in sorted(aside.items(), key=lambda item: -item[1])
        ]
        table.append(_cut("columns left aside: " + ", ".join(names)))
    lines = [line for text in judgements(looks, aside) for line in _wrapped(text)]
    if len(table) + 1 + len(lines) > LINES:  # the headline counts all of them
        # One line for the heading and one for the two dots.
        lines = [*lines[: LINES - len(table) - 2], "  .."]
    return "\n".join([*table, *(["Look at:", *lines] if lines else ["Nothing suspicious."])])


def headline(
    records: Iterable[Any] | Mapping[str, Look],
    *,
    aside: Mapping[str, int] | None = None,
    where: str = "data_report.txt",
) -> str:
    """The data set in one line: how many records per kind, and the most suspicious number.

    The line has at most `WIDTH` columns.

    Args:
      records: of any kinds, or the result of `look`.
      aside: as for `summary`.
      where: the file with the full report.

    >>> from rlhf_jax.data.schema import Prompt
    >>> headline([Prompt("Why is the sky blue?"), Prompt("Name a bird.")])
    '2 prompts; nothing suspicious (data_report.txt)'
    """
    looks = dict(records) if isinstance(records, Mapping) else look(records)
    sizes = ", ".join(f"{seen.rows:,} {name}" for name, seen in looks.items())
    found = judgements(looks, aside)
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    end = f"{more} ({where})"
    if not found:
        return _cut(f"{sizes or 'no records'}; nothing suspicious ({where})")
    # A sentence gives the finding before its first colon, and the remedy after it.
    first = f"{sizes}; look at: {found[0].partition(':')[0]}"
    return _cut(first, WIDTH - len(end)) + end


def _rows(looks: Sequence[Look]) -> list[list[str]]:
    """The rows of the table, without those that are empty for every kind."""

    def row(label: str, part: str, cell: Callable[[Any], str]) -> list[str]:
        parts = [getattr(seen, part) for seen in looks]
        return [label, *("" if p is None else cell(p) for p in parts)]

    rows = [
        ["records", *(f"{seen.rows:,}" for seen in looks)],
        row("different prompts", "prompts", lambda p: f"{p.different:,}"),
        row("nearly repeat another", "prompts", lambda p: f"{p.near:,}"),
        row("characters of a prompt *", "prompts", lambda p: str(p.characters)),
        row("turns of a prompt *", "prompts", lambda p: str(p.turns)),
        row("with a system message", "prompts", lambda p: percent(p.system, p.rows)),
        row("characters of an answer *", "answers", lambda a: str(a.characters)),
        row(f"empty, up to {SHORT} characters", "answers", lambda a: f"{a.empty:,}, {a.short:,}"),
        row("begin with, hold the prompt", "answers",
            lambda a: f"{percent(a.begin, a.count)}, {percent(a.contain, a.count)}"),
        row("repeat the last turn", "answers", lambda a: percent(a.echo, a.count)),
        row("pairs, ties", "pairs",
            lambda p: f"{p.strict:,}, {percent(p.tied, p.strict + p.tied)}"),
        row("preferred is longer", "pairs", _longer),
        row("pairs of equal answers", "pairs", lambda p: f"{p.equal:,}"),
        row("rankings with equal answers", "pairs", lambda p: f"{p.rankings_with_equal:,}"),
        row("pairs repeated, contradicted", "pairs",
            lambda p: f"{p.repeated:,}, {p.contradicted:,}"),
        ["written by a chat template", *(f"{seen.templated:,}" for seen in looks)],
    ]  # fmt: skip
    rows = [cells for cells in rows if any(cells[1:])]
    return [*rows, ["* least / median / 90% / most"]]


def _longer(pairs: PairNumbers) -> str:
    said = percent(pairs.longer, pairs.strict)
    return (
        f"{said} (tokens {percent(pairs.longer_tokens, pairs.counted)})" if pairs.counted else said
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    # The footnote in the last row must not widen the first column.
    widths[0] = max(len(row[0]) for row in rows[:-1])
    lines = []
    for row in rows:
        cells = "".join(
            f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=False)
        )
        lines.append(_cut((row[0].ljust(widths[0]) + cells).rstrip()))
    return lines


def _wrapped(text: str) -> list[str]:
    """A sentence wrapped to `WIDTH` columns as a list item."""
    lines = [""]
    for word in text.split(" "):
        if len(lines[-1]) + len(word) + 5 > WIDTH:
            lines.append("")
        lines[-1] += f" {word}"
    return [("  -" if i == 0 else "   ") + line for i, line in enumerate(lines)]


def _cut(line: str, width: int = WIDTH) -> str:
    return line if len(line) <= width else line[: width - 2] + ".."
