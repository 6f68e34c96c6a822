"""Refuses rows that repeat an earlier one: equal ids, or the same ranking by the same labeler."""

from __future__ import annotations

from typing import Any

from rlhf_jax.data.schema.records import Ranking
from rlhf_jax.data.schema.report import Tally
from rlhf_jax.data.schema.rules import RowError, shown


class KeptRecords:
    """The records so far by line, and the keys that must be unique."""

    def __init__(self):
        self.records: dict[int, Any] = {}
        self.ids: dict[str, tuple[int, Any]] = {}
        self.lines: dict[Any, int] = {}  # (labeler, prompt, responses) -> line

    def add(self, line: int, record: Any, tally: Tally) -> None:
        """Keeps a record and drops the one it revises.

        Raises:
          RowError: it may not be kept.
        """
        # Sorted, as a labeler may see the same responses in another order. Without a labeler's name
        # two rankings may come from two people.
        key = None
        if isinstance(record, Ranking) and record.labeler is not None:
            key = (record.labeler, record.prompt, tuple(sorted(record.responses)))
        self._check_id(record.id, key)
        if key is not None:
            if key in self.lines:
                self._revise(line, record, self.lines[key], tally)
            self.lines[key] = line
        self.records[line] = record
        if record.id is not None:
            # The first line of an id is named in errors, so later revisions do not replace it.
            self.ids.setdefault(record.id, (line, key))

    def _check_id(self, name: str | None, key: Any) -> None:
        if name is None or name not in self.ids:
            return
        first, first_key = self.ids[name]
        # The revisions of one ranking may share its id.
        if key is None or key != first_key:
            raise RowError(
                "duplicate id",
                f"field 'id' = {shown(name)} is also in line {first}: make ids unique",
            )

    def _revise(self, line: int, record: Ranking, before: int, tally: Tally) -> None:
        new, old = record.revision, self.records[before].revision
        if new is None or old is None or new == old:
            raise RowError(
                "ranked twice",
                f"labeler {shown(record.labeler)} ranks the prompt and responses of line {before} "
                f"again (revisions {shown(old)} and {shown(new)}): remove one, or number them "
                "with 'revision'",
            )
        if new < old:
            raise RowError(
                "superseded by revision", f"revision {shown(new)} < {shown(old)} of line {before}"
            )
        tally.drop(
            before,
            RowError(
                "superseded by revision", f"revision {shown(old)} < {shown(new)} of line {line}"
            ),
        )
        # Removed and not replaced in place: the newer revision has the place of its own line.
        del self.records[before]
