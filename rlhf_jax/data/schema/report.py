"""Reports how many rows of a source were kept or dropped, and the first rows of each reason."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from rlhf_jax.data.schema.rules import RowError

SCREEN = 24
"""Most lines of a data report."""


PLACES = 3
"""Most rows that a data report names per reason."""


@dataclasses.dataclass(frozen=True)
class DataReport:
    """The outcome of the rows of a source; ``dataclasses.asdict(report)`` is its JSON form.

    Attributes:
      source: where the rows came from.
      rows: rows read.
      kept: records returned; ``kept + sum(dropped.values()) == rows``.
      dropped: numbers of rows dropped, by reason.
      noted: numbers of rows kept that deserve a look, by reason, such as rankings in which all
        responses tie.
      examples: the first error message of each reason, with its file:line.
      places: file:line of the first rows of each reason, at most `PLACES`.
      aside: columns of a table that no record has a field for, and the number of rows in which each
        has a value.
    """

    source: str
    rows: int = 0
    kept: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    noted: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)
    places: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    aside: dict[str, int] = dataclasses.field(default_factory=dict)

    def __add__(self, other: DataReport) -> DataReport:
        reasons = {**self.places, **other.places}
        return DataReport(
            source=", ".join(dict.fromkeys([self.source, other.source])),
            rows=self.rows + other.rows,
            kept=self.kept + other.kept,
            dropped=_add_counts(self.dropped, other.dropped),
            noted=_add_counts(self.noted, other.noted),
            # The earlier example of a reason wins, as the reports are added in reading order.
            examples={**other.examples, **self.examples},
            places={
                r: [*self.places.get(r, []), *other.places.get(r, [])][:PLACES] for r in reasons
            },
            aside=_add_counts(self.aside, other.aside),
        )

    def summary(self) -> str:
        """The report as text of at most `SCREEN` lines.

        It gives each reason with its count and first rows, and below them as many of the first
        error messages as there is room for; `examples` has all of them.

        >>> places = {"duplicate key": ["rows.jsonl:4", "rows.jsonl:9"]}
        >>> print(DataReport("rows.jsonl", rows=9, kept=7, dropped={"duplicate key": 2}, places=places).summary())
        rows.jsonl: 9 rows, 7 kept, 2 dropped
          dropped: duplicate key 2 (rows.jsonl:4, 9)
        """  # noqa: E501
        lines = [
            f"{self.source}: {self.rows} rows, {self.kept} kept, {sum(self.dropped.values())} "
            "dropped"
        ]
        # A common folder would be repeated at each place.
        folders = {os.path.dirname(place) for places in self.places.values() for place in places}
        # The first line of the report names the folder where all places are in one.
        folder = os.path.join(folders.pop(), "") if len(folders) == 1 else ""
        items = []
        for outcome, counts in (("dropped", self.dropped), ("noted", self.noted)):
            for reason, n in sorted(counts.items()):
                places = [place.removeprefix(folder) for place in self.places.get(reason, [])]
                items.append(f"{outcome}: {reason} {n}{_places(places, n)}")
        if self.aside:
            columns = [f"{name} {n}" for name, n in sorted(self.aside.items())]
            items.append(f"columns left aside: {', '.join(columns)}")
        # Many reasons share lines (rounded up), so that all of them fit on the screen.
        in_a_line = -(-len(items) // (SCREEN - 1)) or 1
        lines += [
            "  " + "; ".join(items[i : i + in_a_line]) for i in range(0, len(items), in_a_line)
        ]
        # Examples fill what the reasons leave of the screen; the reasons themselves are never cut.
        room = max(SCREEN, len(lines))
        lines += [f"  {example}" for example in self.examples.values()]
        return "\n".join(lines[:room])


def _places(places: Sequence[str], count: int) -> str:
    """`` (a.jsonl:4, 9, b.jsonl:2, ..)``; the file is named where it changes."""
    if not places:
        return ""
    named, before = [], None
    for place in places:
        file, _, line = place.rpartition(":")
        named.append(line if file == before else f"{file}:{line}")
        before = file
    if count > len(places):
        named.append("..")
    return f" ({', '.join(named)})"


def _add_counts(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {k: a.get(k, 0) + b.get(k, 0) for k in {**a, **b}}


class Tally:
    """The report of one file while it is read."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = str(path)
        self.rows = 0
        self.dropped: dict[str, dict[int, str]] = {}  # reason -> line -> message
        self.noted: dict[str, list[int]] = {}

    def drop(self, line: int, error: RowError) -> None:
        """Counts a line that is dropped."""
        self.dropped.setdefault(error.reason, {})[line] = str(error)

    def note(self, line: int, reason: str) -> None:
        """Counts a line that is kept and deserves a look."""
        self.noted.setdefault(reason, []).append(line)

    def report(self, kept: int) -> DataReport:
        """The report, once all lines have been read and `kept` records are left."""
        # Sorted, because a later revision drops an earlier line after the lines between them.
        lines = {r: sorted(found) for r, found in self.dropped.items()} | self.noted
        examples = {}
        for reason, found in self.dropped.items():
            first = lines[reason][0]
            examples[reason] = f"{self.path}:{first}: {found[first]}"
        return DataReport(
            self.path,
            self.rows,
            kept,
            dropped={reason: len(found) for reason, found in self.dropped.items()},
            noted={reason: len(found) for reason, found in self.noted.items()},
            examples=examples,
            places={
                reason: [f"{self.path}:{n}" for n in found[:PLACES]]
                for reason, found in lines.items()
            },
        )
