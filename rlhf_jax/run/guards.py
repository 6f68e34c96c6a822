"""Guards of a run (docs/guards.md): skipped steps are reported, and only the same run is resumed.

The guard inside the compiled step (`guard.is_spike`) decides which steps are skipped; here its
decisions are counted and reported, and too many in a row stop the run. `origin` describes the run
that a checkpoint belongs to, and `check_origin` compares it on resume.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from rlhf_jax.data import parsed, text
from rlhf_jax.data.loader import Batches
from rlhf_jax.run import checks, cli, metrics, numerics, processes
from rlhf_jax.run import config as config_lib
from rlhf_jax.run import files as run_files
from rlhf_jax.run.files import append_line, json_digest
from rlhf_jax.run.workdir import change_allowed, changing_numbers

FILE = "skipped.jsonl"
"""The log with one line per skipped step or dropped score, with the records concerned."""

SHOWN = 64
"""The maximal number of records that a message names; the file names all of them."""


class RowRecords:
    """Maps rows to the records of a data file that are in them; a packed row contains several.

    Args:
      path: the file, for the message.
      ids: the id of each record, or None.
      sizes: the number of tokens of each record where rows are packed (best fit); None where row i
        is record i.
      capacity: tokens per row.
      max_items: the maximal number of records per row.
      places: the index of each record in its file, where some records were left out.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        ids: Sequence[str | None],
        sizes: Sequence[int] | None = None,
        *,
        capacity: int = 0,
        max_items: int | None = None,
        places: Sequence[int] | None = None,
    ):
        self.path, self._ids = str(path), list(ids)
        self._sizes, self._capacity, self._max_items = sizes, capacity, max_items
        self._places = range(len(self._ids)) if places is None else places

    def of(self, rows: Iterable[int]) -> list[tuple[int, str | None]]:
        """The index in the file and the id of each record in these rows.

        Rows of other text that was mixed in have no records.
        """
        wanted = [int(row) for row in rows]
        if self._sizes is None:
            items = wanted
        else:
            # The packing is repeated here rather than kept, because most runs never skip a step.
            packed = text.best_fit(self._sizes, capacity=self._capacity, max_items=self._max_items)
            items = [item for row in wanted if row < len(packed) for item in packed[row]]
        return [(int(self._places[i]), self._ids[i]) for i in items if i < len(self._ids)]

    def of_step(
        self, batches: Batches, step: int
    ) -> tuple[list[int], list[tuple[int, str | None]]]:
        """The rows of a step and their records."""
        rows = batches.indices(step).tolist()
        return rows, self.of(rows)


class Event(NamedTuple):
    """A step, minibatch or score that was left out of training."""

    step: int
    """The number of steps (PPO: iterations) done when it had been left out."""
    what: str
    """``step``, ``minibatch 3`` or ``score``."""
    why: str
    rows: list[int]
    """Rows of the stage's data."""
    records: list[tuple[int, str | None]]
    """Index in the file and id of each record in these rows."""


class Skips:
    """Reports the skipped steps of a stage, and stops it after too many in a row.

    The counts are stored in the checkpoint (`counts`), so that a resumed run stops at the same step
    as an uninterrupted one.

    Args:
      workdir: folder of the stage; one line is appended to its `FILE` for each event.
      stage: the name of the stage.
      path: the data file of the records.
      limit: how many consecutive skipped steps stop the stage.
      resume_step: lines of later steps are removed first, as in `metrics.StageLog`.
      counts: the counts in the checkpoint.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        stage: str,
        path: str,
        *,
        limit: int,
        resume_step: int = 0,
        counts: Mapping[str, int] | None = None,
    ):
        checks.require_range("guard.max_skipped", limit, low=1)
        self._file, self._stage, self._path, self._limit = Path(workdir) / FILE, stage, path, limit
        kept = counts or {}
        self._total, self._in_a_row, self._taken = (
            int(kept.get(k, 0)) for k in ("skipped", "in_a_row", "taken")
        )
        self._run: list[Event] = []
        self._waiting: tuple[metrics.Values, Callable[[], Event]] | None = None
        if self._writes:
            metrics.drop_after(self._file, stage, resume_step)

    @property
    def counts(self) -> dict[str, int]:
        """The steps skipped, skipped in a row until now, and taken, as data for a checkpoint."""
        return {"skipped": self._total, "in_a_row": self._in_a_row, "taken": self._taken}

    def watch(
        self, step: int, measured: metrics.Values, rows: Callable[[], tuple[list[int], list]]
    ) -> None:
        """Takes a step's metrics, to be examined one step later so that the device never waits.

        Args:
          step: the number of steps done.
          measured: its metrics, among them ``skipped`` and ``spiked``.
          rows: returns the step's rows and records; called only if the step was skipped.

        Raises:
          FloatingPointError: `limit` steps in a row were skipped; the message names their records.
        """
        self.flush()
        told = {name: measured[name] for name in ("skipped", "spiked")}
        self._waiting = (told, lambda: Event(step, "step", "", *rows()))

    def flush(self, *, last: bool = False) -> None:
        """Examines the pending step; called before a checkpoint and at the end of the stage.

        Args:
          last: whether the stage ends: it fails if not a single step was taken.

        Raises:
          FloatingPointError: as `watch` does, or no step was taken.
        """
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            measured, event = waiting
            skipped, spiked = metrics.to_host(measured).values()
            self.add(bool(skipped), event()._replace(why=reason(bool(spiked))) if skipped else None)
        # A stage shorter than `limit` must not end as a success with weights that never changed.
        if last and self._run and not self._taken:
            self._stop(f"each of the {self._total} steps was")

    def add(self, skipped: bool, event: Event | None = None) -> None:
        """Counts a step and, if it was skipped, reports its records; raises as `watch` does."""
        if not skipped or event is None:
            self._in_a_row, self._run, self._taken = 0, [], self._taken + 1
            return
        self._total, self._in_a_row = self._total + 1, self._in_a_row + 1
        self._run.append(event)
        self.tell(event)
        if self._in_a_row >= self._limit:
            self._stop(f"{self._in_a_row} steps in a row were")

    def tell(self, event: Event) -> None:
        """Prints and logs an event with its rows of the data and the records of its file."""
        if not self._writes:
            return
        print(
            f"Warning: {self._stage} {event.step}: the {event.what} was left out, {event.why}; "
            f"{named(event.records, self._path)}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        line = {
            "step": event.step,
            "stage": self._stage,
            "what": event.what,
            "why": event.why,
            "rows": event.rows,
            "file": self._path,
            "records": [place for place, _ in event.records],
            "ids": [name for _, name in event.records],
        }
        append_line(self._file, line)

    def stop(self, what: str, events: Sequence[Event]) -> None:
        """Raises the error that stops the stage and names the records of `events`."""
        self._run = list(events)
        self._stop(what)

    def _stop(self, what: str) -> None:
        # `dict.fromkeys` removes repetitions and keeps the order.
        records = list(dict.fromkeys(record for event in self._run for record in event.records))
        reasons = " and ".join(dict.fromkeys(event.why for event in self._run))
        step = self._run[-1].step if self._run else 0
        raise FloatingPointError(
            f"{self._stage} stopped at {step}: {what} left out, {reasons or 'not finite'}; "
            f"{named(records, self._path)} (all are in {self._file}). What was saved before is "
            "intact. Look at these records, or lower learning_rate "
            f"(guard.max_skipped={self._limit})"
        )

    @property
    def _writes(self) -> bool:
        return processes.index() == 0


def reason(spiked: bool) -> str:
    """The reason why a step was skipped, for a message."""
    return "its loss, gradient or reward spiked" if spiked else "its loss or gradient is not finite"


def named(records: Sequence[tuple[int, str | None]], path: str) -> str:
    """Records for a message: ``records 3 (d3), 17 (d17) of demonstrations.jsonl (from 0)``."""
    if not records:
        return f"no record of {path}"
    shown = [str(place) if name is None else f"{place} ({name})" for place, name in records[:SHOWN]]
    more = f" and {len(records) - SHOWN} more" if len(records) > SHOWN else ""
    return f"records {', '.join(shown)}{more} of {path} (from 0)"


# ------------------------------------------------------------------------------------- the same run


def origin(
    config: ConfigDict,
    *,
    files: Mapping[str, str],
    models: Mapping[str, str | os.PathLike[str]],
    tokenizer: Any,
) -> dict[str, Any]:
    """Describes a run for `Checkpoints.save(extra=...)`: its config, data, models and versions.

    The config is stored without secrets. The fingerprint of a data file is taken of the bytes that
    this run has parsed (`rlhf_jax.data.parsed`), and that of a model of the files from which it was
    loaded. Several processes compare their fingerprints here.

    Args:
      config: of the stage.
      files: config key -> the data file it names; empty paths are left out.
      models: config key -> the folder or file of a model that is only read: the KL reference, the
        reward model, the weights from which training starts.
      tokenizer: of the stage.

    Raises:
      ValueError: a file changed while the run read it, or the processes have read different files.
    """
    data = {key: _file_print(key, path) for key, path in files.items() if path}
    folders = {key: _model_print(key, Path(path)) for key, path in models.items() if str(path)}
    flags = numerics.meaning()
    facts = {f"the content of {key}": each["sha256"] for key, each in (data | folders).items()}
    processes.agree("origin", facts | flags)
    # Infinity and NaN are kept as text, because the seal of a checkpoint is strict JSON.
    plain = json.loads(config_lib.to_json(config), parse_constant=str)
    return {
        "config": plain,
        "config_sha256": json_digest(plain),
        "data": data,
        "models": folders,
        "tokenizer": text.tokenizer_fingerprint(tokenizer),
        "seed": config.seed,
        "numerics": flags,
        "rounding": numerics.rounding() | numerics.surroundings(),
        "versions": {name: metadata.version(name) for name in cli.PACKAGES},
    }


def check_origin(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Refuses to resume from a checkpoint of a different run.

    With ``--allow_config_change`` it prints what differs instead.

    Args:
      stored: the `extra` of the checkpoint.
      current: `origin` of the run that resumes.

    Returns:
      The differences that change numbers, one line each; `changed_config` records them with the
      step.

    Raises:
      ValueError: the data, tokenizer, reference or reward model differ, or a config key or a flag
        of JAX or XLA that changes numbers.
    """
    if "config" not in stored:
        return []  # a checkpoint of a user's own loop
    # Data and models are compared by content below: moving them to another path is not a change.
    moved = {*current["data"], *current["models"]}
    changes = [
        line
        for line in config_lib.diff(stored["config"], current["config"])
        if line.partition(":")[0] not in moved
    ]
    changes = changing_numbers(changes)
    for group in ("data", "models"):
        changes += _changed_files(stored[group], current[group])
    if stored["tokenizer"] != current["tokenizer"]:
        changes.append("tokenizer: another one encodes the texts")
    # A checkpoint of an older version lacks this entry, which is reported with the notes below.
    changes += numerics.differences(
        stored.get("numerics", current["numerics"]), current["numerics"]
    )
    if changes and not change_allowed():
        raise ValueError(
            f"this run was begun with something else ({'; '.join(changes)}): put it back, choose "
            "another workdir, or --allow_config_change to go on all the same"
        )
    # Versions and rounding are only reported: a run may resume after an upgrade or elsewhere.
    notes = changes + config_lib.diff(stored["versions"], current["versions"], "version of ")
    if "numerics" in stored:
        notes += numerics.differences(stored["rounding"], current["rounding"])
    else:
        notes.append(
            "flags of JAX: those it was begun with are not known, "
            "its checkpoint is of an older version"
        )
    if notes and jax.process_index() == 0:
        print(
            f"Note: the run goes on although it differs from its beginning: {'; '.join(notes)}",
            flush=True,
        )
    return changes


def changed_config(
    stored: Mapping[str, Any], changes: Sequence[str], *, step: int, steps: int
) -> dict[str, list[dict[str, Any]]]:
    """The history of changes to a resumed run, for the `extra` of its next checkpoints.

    Args:
      stored: the `extra` of the checkpoint.
      changes: the result of `check_origin`.
      step: the number of steps done.
      steps: the number of steps of the whole run.

    Returns:
      ``{"config_changes": [{"from_step": 30, "changes": [..]}, ..]}``, or an empty dict when
      nothing was ever changed.

    Raises:
      ValueError: there are changes, but no step is left to which they could apply.
    """
    if changes and step >= steps:
        raise ValueError(
            f"all {steps} steps were done with something else ({'; '.join(changes)}), so that no "
            "step is left for the change: put it back, choose another workdir, or --overwrite "
            "(keeps the old run aside)"
        )
    history = [*stored.get("config_changes", [])]
    if changes:
        history.append({"from_step": step, "changes": list(changes)})
    return {"config_changes": history} if history else {}


def _changed_files(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    changes = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if old is None or new is None:
            changes.append(f"{key}: {'absent' if old is None else old['path']} -> "
                           f"{'absent' if new is None else new['path']}")  # fmt: skip
        elif old["sha256"] != new["sha256"]:
            changes.append(
                f"{key}: the content of {new['path']} has changed"
                f"{_which(old['sha256'], new['sha256'])}"
            )
    return changes


def _which(old: Any, new: Any) -> str:
    # A data file has one sha256, and a model one for each of its files.
    if isinstance(old, str) or isinstance(new, str):
        return f" (sha256 {str(old)[:12]}.. -> {str(new)[:12]}..)"
    return (
        f" ({', '.join(name for name in sorted({*old, *new}) if old.get(name) != new.get(name))})"
    )


def check_read(made_of: Mapping[str, Any]) -> None:
    """Refuses data files that changed between the fingerprints of `made_of` and their last reading.

    Args:
      made_of: what `origin` returned.

    Raises:
      ValueError: a file changed in between; the message names it.
    """
    for key, each in made_of.get("data", {}).items():
        if parsed.of(each["path"]).sha256 != each["sha256"]:
            raise ValueError(
                f"{key}: {each['path']} changed while this run trained: put back what it held and "
                "give the same command again (the checkpoints are intact), or choose another "
                "workdir for the new content"
            )


def _file_print(key: str, path: str) -> dict[str, Any]:
    """The path, sha256, bytes and lines of a data file as it was parsed."""
    try:
        return {"path": str(path), **parsed.of(path)._asdict()}
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _model_print(key: str, path: Path) -> dict[str, Any]:
    """The path and the sha256 of each file of a model folder, or of a single file."""
    folder, found = (path, run_files.model_files(path)) if path.is_dir() else (path.parent, [path])
    prints = {p.relative_to(folder).as_posix(): run_files.sha256(p) for p in found}
    # Checked after hashing: only then are the hashes those of the bytes that were loaded.
    changed = parsed.changed_since_loading(path)
    if changed:
        raise ValueError(
            f"{key}: {', '.join(changed)} of {path} changed while this run loaded it: start again "
            "when nothing writes there any more"
        )
    return {"path": str(path), "sha256": prints}


def rows_on_host(flags: jax.Array) -> np.ndarray:
    """The indices of the rows that are true, the same on every process."""
    return np.flatnonzero(processes.gather(flags))
