"""The stages of a pipeline: functions of a config and inputs, computed again only when needed.

The key of a stage is a sha256 of what it reads: its part of the config, the content of its input
files and models, the source of the user's functions that the config names, and the version of its
algorithm. At each start `Stages` compares keys and outputs with the records of the run folder,
prints which stages are kept and which run and why, and computes only those. Earlier outputs are set
aside and never overwritten.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.run import files, records
from rlhf_jax.run.config import diff
from rlhf_jax.run.plans import STRANGE, Step, describe, time_left, told

Inputs = Mapping[str, str]
"""Name of an input (a key of the config, say) -> path of a file or of a folder."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage and everything that it reads.

    Attributes:
      name: name of the stage and of its folder.
      work: computes in the folder that it is given, and returns JSON data.
      config: the part of the config that it reads, as plain data under the config's own names.
      needs: names of the stages whose outputs it reads.
      inputs: returns its files and models; called once all that it `needs` is done.
      named: the user's name for an input, where it is not a path: ``storyland:base_large``.
      version: version of its algorithm, raised by hand when its numbers change.
      cost: how much it computes, in a unit shared by all stages of the pipeline; None if unknown.
    """

    name: str
    work: Callable[[str], Any]
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    needs: tuple[str, ...] = ()
    inputs: Callable[[], Inputs] = dict
    named: Mapping[str, str] = dataclasses.field(default_factory=dict)
    version: int = 1
    cost: float | None = None


class Measure(NamedTuple):
    """The cost of a stage for this process, besides its seconds."""

    compile_seconds: float = 0.0
    peak_memory_mb: float = 0.0


class Stages:
    """The stages of one run folder, in the order in which they run.

    Args:
      folder: the run folder.
      stages: the stages, each after those that it needs.
      harmless: last parts of config keys that change no number and are left out of the key of a
        stage.
      allow_change: whether a stage that is half done may resume with another config or other data.
      measure: returns what this process has compiled so far, and its peak memory.
      after: called after each stage that ran.
      say: prints a line.
    """

    def __init__(
        self,
        folder: str | Path,
        stages: Sequence[Stage],
        *,
        harmless: Iterable[str] = (),
        allow_change: bool = False,
        measure: Callable[[], Measure] = Measure,
        after: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
    ):
        self.folder = Path(folder).absolute()
        self._shown = str(folder)
        self._stages = {stage.name: stage for stage in stages}
        self._harmless, self._allow = frozenset(harmless), allow_change
        self._measure, self._after, self._say = measure, after, say
        # Stages verified by this process; hashing all their outputs again would take long.
        self._intact: set[str] = set()
        self._digests: dict[str, Any] = {}
        self._records: dict[str, tuple[Any, tuple[dict[str, Any] | None, str]]] = {}

    # --------------------------------------------------------------------------------- what is done

    def record(self, name: str) -> dict[str, Any]:
        """The record of a finished stage.

        Raises:
          ValueError: the stage is not done, or its record is damaged.
        """
        record, trouble = self._read(name)
        if record is None:
            what = f"{records.DONE} {trouble}" if trouble else "it is not done"
            raise ValueError(f"stage {name} of {self._shown}: {what}; run it first")
        return record

    def _read(self, name: str) -> tuple[dict[str, Any] | None, str]:
        """A stage's record and what is wrong with it; read again only if the file has changed."""
        path = self.folder / name / records.DONE
        try:
            seen = path.lstat()
        except OSError:
            return records.read(path)
        same = (seen.st_ino, seen.st_mtime_ns, seen.st_size)
        if self._records.get(name, (None,))[0] != same:
            self._records[name] = (same, records.read(path))
        return self._records[name][1]

    def result(self, name: str) -> Any:
        """The result of a finished stage; its paths are those of the run folder as it is now."""
        record = self.record(name)
        return records.absolute(record["result"], record["paths"], self.folder)

    # ------------------------------------------------------------------------------------- planning

    def plan(self) -> list[Step]:
        """Plans the action for each stage; nothing is computed or written.

        Raises:
          ValueError: a stage that is half done was begun with something else, and that is not
            allowed; or an input of a stage that has to run does not exist.
        """
        steps: dict[str, Step] = {}
        for stage in self._stages.values():
            steps[stage.name] = self._decide(stage, steps)
        return list(steps.values())

    def _decide(self, stage: Stage, before: Mapping[str, Step]) -> Step:
        """The action for `stage`, given the actions still planned for the stages before it."""
        folder = self.folder / stage.name
        # A repaired stage gives the same outputs as before: it is a function of the same inputs.
        waiting = [n for n in stage.needs if n in before and before[n].action in ("run", "resume")]
        spread = any(before[name].changed for name in waiting)
        record, trouble = self._read(stage.name)
        if record is not None:
            changes = self._changes(stage, record, waiting, spread)
            if changes:
                self._require_inputs(stage, waiting)
                own = any(not line.startswith("reads ") for line in changes)
                return Step(stage.name, "run", tuple(changes), changed=own or spread)
            return self._kept(stage, record, waiting)
        self._require_inputs(stage, waiting)
        if trouble:
            return Step(stage.name, "run", (f"{records.DONE} {trouble}",))
        step = records.newest_step(folder)
        if step is None:
            return Step(stage.name, "run", ("not done yet",))
        return self._half_done(stage, step, waiting, spread)

    def _kept(self, stage: Stage, record: Mapping[str, Any], waiting: Sequence[str]) -> Step:
        """A stage with unchanged inputs is kept if its outputs are still what it wrote."""
        folder = self.folder / stage.name
        if stage.name not in self._intact:
            bad = records.damage(folder, record["outputs"])
            if bad:
                return Step(stage.name, "repair", told(bad))
            strange = records.strangers(folder, record["outputs"])
            if strange:
                return Step(stage.name, "repair", told(dict.fromkeys(strange, STRANGE)))
            self._intact.add(stage.name)
        if waiting:
            return Step(stage.name, "keep", (f"if {' and '.join(waiting)} come out as before",))
        return Step(stage.name, "keep", self._gone(stage))

    def _gone(self, stage: Stage) -> tuple[str, ...]:
        """A note on the user's files that no longer exist; outputs made from them remain valid."""
        missing = [
            (n, p) for n, p in stage.inputs().items() if not self._owner(p) and not Path(p).exists()
        ]
        return tuple(f"its input {name} ({path}) is not there any more" for name, path in missing)

    def _half_done(self, stage: Stage, step: int, waiting: Sequence[str], spread: bool) -> Step:
        """A stage with a checkpoint and no final record is resumed, if its inputs are the same."""
        begun, _ = records.read(self.folder / stage.name / records.BEGUN)
        changes = [] if begun is None else self._changes(stage, begun, waiting, spread)
        if changes and not self._allow:
            raise ValueError(
                f"stage {stage.name} is half done (checkpoint of step {step}) and was begun with "
                f"something else ({'; '.join(changes)}): put it back, choose another workdir, or "
                "--allow_config_change to go on from that step; to begin the stage anew move "
                f"{self._shown}/{stage.name} away"
            )
        why = [f"goes on from its checkpoint of step {step}"]
        if changes:
            why.append(f"with something else from there on: {'; '.join(changes)}")
        return Step(stage.name, "resume", tuple(why), changed=bool(changes))

    def _changes(
        self, stage: Stage, record: Mapping[str, Any], waiting: Sequence[str], spread: bool
    ) -> list[str]:
        """The differences between the stage's recorded and current inputs, one line each.

        Args:
          stage: the stage as it is now.
          record: its record.
          waiting: stages that it reads and that run first, so that their outputs are not yet known.
          spread: whether those stages have other inputs than before; if not, they are expected to
            write the same outputs, which is checked once they have run.
        """
        changes = [f"config.{line}" for line in diff(record["config"], self._config(stage))]
        changes = [line.replace(": ", " ", 1) for line in changes]
        if record["version"] != stage.version:
            changes.append(f"version of the algorithm {record['version']} -> {stage.version}")
        now = records.functions(stage.config)
        changes += [
            f"the source of {name} has changed"
            for name in now
            if record["functions"].get(name) != now[name]
        ]
        if waiting:
            return [*changes, *(f"reads {name}" for name in waiting if spread)]
        return changes + self._changed_inputs(stage, record["inputs"])

    def _changed_inputs(self, stage: Stage, before: Mapping[str, Any]) -> list[str]:
        changes = []
        now = stage.inputs()
        for name in sorted({*before, *now}):
            if name not in now or name not in before:
                changes.append(f"{name} is {'new' if name in now else 'not read any more'}")
                continue
            same_place = self._place_of(stage, name, now[name]) == before[name]["path"]
            try:
                content = self._digest(
                    now[name], missing=before[name]["sha256"] if same_place else None
                )
            except ValueError as error:
                # A new path that does not exist is a mistake, not a file that has been deleted.
                raise ValueError(f"{name} of stage {stage.name}: {error}") from None
            if content != before[name]["sha256"]:
                owner = self._owner(now[name])
                which = (
                    f"{owner} wrote another {name}"
                    if owner
                    else f"the content of {name} ({now[name]}) has changed"
                )
                changes.append(which)
        return changes

    def _require_inputs(self, stage: Stage, waiting: Sequence[str]) -> None:
        """Raises if a stage that has to run lacks a file, before any stage is computed."""
        if waiting or not all(self._read(name)[0] for name in stage.needs):
            return
        for name, path in stage.inputs().items():
            try:
                self._digest(path)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

    # -------------------------------------------------------------------------------------- the key

    def _config(self, stage: Stage) -> dict[str, Any]:
        # As JSON reads it back, so that it compares equal to the config in a record.
        return records.without(json.loads(json.dumps(stage.config)), self._harmless)

    def parts(self, stage: Stage) -> dict[str, Any]:
        """The data of which the key of a stage is a hash."""
        paths = stage.inputs()
        inputs = {
            name: {"path": self._place_of(stage, name, path), "sha256": self._digest(path)}
            for name, path in sorted(paths.items())
        }
        return {
            "config": self._config(stage),
            "inputs": inputs,
            "functions": records.functions(stage.config),
            "version": stage.version,
        }

    def _place_of(self, stage: Stage, name: str, path: str) -> str:
        """The location of an input in a record: a name or a path, relative if in the run folder."""
        return stage.named.get(name) or records.relative(path, self.folder)[0]

    def _digest(self, path: str, *, missing: Any = None) -> Any:
        """The digest of an input: from the record if a stage wrote it, else from the file itself.

        Args:
          path: a file or a folder.
          missing: the digest to assume for a user's file that no longer exists; None raises.
        """
        owner = self._owner(path)
        if owner:
            return self._recorded(owner, Path(path).relative_to(self.folder / owner).as_posix())
        if path not in self._digests:
            if missing is not None and not Path(path).exists():
                # Outputs made from the deleted file remain valid.
                return missing
            self._digests[path] = records.digest(Path(path))
        return self._digests[path]

    def _owner(self, path: str) -> str:
        """The stage that wrote a path; empty for files outside the run folder."""
        inside = Path(path).is_relative_to(self.folder)
        name = Path(path).relative_to(self.folder).parts[0] if inside else ""
        return name if name in self._stages else ""

    def _recorded(self, owner: str, name: str) -> Any:
        written = self.record(owner)["outputs"]
        if name in written:
            return written[name]["sha256"]
        inside = {
            other.removeprefix(f"{name}/"): entry["sha256"]
            for other, entry in written.items()
            if other.startswith(f"{name}/") and records.is_input(other)
        }
        if not inside:
            raise ValueError(
                f"stage {owner} of {self._shown} wrote no {name}, which a later stage reads"
            )
        return inside

    # -------------------------------------------------------------------------------------- running

    def run(self, steps: Sequence[Step] | None = None) -> None:
        """Prints the plan and executes it; `steps` is a plan that was just made."""
        steps = self.plan() if steps is None else steps
        self._say(describe(steps, self._shown))
        self._digests.clear()  # the user's files may change between planning and running
        for step in steps:
            self.stage(step.stage, planned=step)

    def stage(
        self, name: str, work: Callable[[str], Any] | None = None, *, planned: Step | None = None
    ) -> Any:
        """Keeps, repairs, resumes or runs one stage, and returns its result.

        All stages that it needs must be done.

        Args:
          name: of the stage.
          work: replaces the stage's own function; it must compute the same.
          planned: the step that was planned for it earlier.
        """
        stage = self._stages[name]
        if work is not None:
            stage = dataclasses.replace(stage, work=work)
        step = self._decide(stage, {})
        if step.action == "keep":
            if planned is not None and planned.action != "keep":
                self._say(f"== {self._place(name)}  kept: what it reads has come out as it was")
            return self.result(name)
        self._say(f"== {self._place(name)}{self._left(name)}")
        if step.action == "repair":
            self._repair(stage, step)
        else:
            self._compute(stage, step)
        self._after()
        return self.result(name)

    def _compute(self, stage: Stage, step: Step) -> None:
        folder, moved = self.folder / stage.name, None
        parts = self.parts(stage)
        if step.action == "run":
            # A stage that was begun with the same key and has not ended continues in its own
            # folder.
            begun, _ = records.read(folder / records.BEGUN)
            same = (
                begun is not None
                and begun["key"] == self._key(parts)
                and not (folder / records.DONE).exists()
            )
            if not same:
                moved = records.set_aside(self.folder, stage.name)
                self._tell_moved(moved)
        begin, before = time.monotonic(), self._measure()
        try:
            result, places = records.relative(_plain(self._begun(stage, parts)), self.folder)
        except BaseException:
            # A stage that refuses its config or is stopped at once must not lose the earlier
            # outputs.
            if moved is not None and records.put_back(self.folder, stage.name, moved):
                self._say(
                    f"stage {stage.name} has written nothing: what was there before is back in its "
                    "place"
                )
            raise
        self._require_unchanged(stage, parts)
        after = self._measure()
        # The outputs must be on disk before the record that lists them.
        files.sync_tree(folder)
        record = {
            "stage": stage.name,
            "key": self._key(parts),
            **parts,
            "result": result,
            "paths": places,
            "outputs": records.outputs(folder),
            "seconds": round(time.monotonic() - begin, 2),
            "compile_seconds": round(after.compile_seconds - before.compile_seconds, 2),
            "peak_memory_mb": round(after.peak_memory_mb),
            "cost": stage.cost,
        }
        changes = records.config_changes(folder)
        records.write(
            folder / records.DONE, record | ({"config_changes": changes} if changes else {})
        )
        # After the record: if a crash leaves both files, `done.json` counts.
        files.remove(folder / records.BEGUN)
        self._intact.add(stage.name)

    def _begun(self, stage: Stage, parts: Mapping[str, Any]) -> Any:
        """Runs the stage's function after recording its inputs in ``begun.json``."""
        folder = self.folder / stage.name
        files.make_folder(folder)
        files.remove_unfinished(folder)
        path, step = folder / records.BEGUN, records.newest_step(folder)
        earlier, _ = records.read(path)
        records.write(path, {"key": self._key(parts), **parts})
        try:
            return stage.work(str(folder))
        except BaseException:
            # Without a new checkpoint, the newest one still belongs to the earlier record.
            if earlier is not None and step is not None and records.newest_step(folder) == step:
                records.write(path, earlier)
            raise

    def _key(self, parts: Mapping[str, Any]) -> str:
        """The key of a stage: an input counts by name and content, not by its path."""
        inputs = {name: entry["sha256"] for name, entry in parts["inputs"].items()}
        return files.json_digest({**parts, "inputs": inputs})

    def _require_unchanged(self, stage: Stage, parts: Mapping[str, Any]) -> None:
        """Raises if an input changed while the stage ran: its key would be that of another file."""
        self._digests.clear()
        for name, path in stage.inputs().items():
            if not self._owner(path) and self._digest(path) != parts["inputs"][name]["sha256"]:
                raise ValueError(
                    f"{name} ({path}) changed while the stage {stage.name} ran: nobody knows which "
                    "of it was read. Give the same command again when it is complete"
                )

    def _repair(self, stage: Stage, step: Step) -> None:
        """Recreates damaged outputs, from the newest checkpoint if possible, else from scratch."""
        folder, record = self.folder / stage.name, self.record(stage.name)
        bad = records.damage(folder, record["outputs"])
        strange = records.strangers(folder, record["outputs"])
        for line in step.why:
            self._say(f"stage {stage.name}: {line}")
        # A damaged model folder is moved as a whole, so that the program sees that it is missing.
        gone = dict.fromkeys([*(name.partition("/")[0] for name in bad), *strange])
        self._tell_moved(records.set_aside(self.folder, stage.name, list(gone)))
        newest = records.newest_step(folder)
        if bad and newest is not None and not any(records.is_log(name) for name in bad):
            self._say(f"stage {stage.name}: made again from its checkpoint of step {newest}")
            try:
                stage.work(str(folder))
            except ValueError as error:
                # The checkpoints are damaged too; the stage then runs from scratch below.
                self._say(f"stage {stage.name}: {error}")
            files.sync_tree(folder)
            bad = records.damage(folder, record["outputs"])
        if not bad:
            self._intact.add(stage.name)
            return
        self._say(f"stage {stage.name}: runs again from its beginning")
        self._tell_moved(records.set_aside(self.folder, stage.name))
        self._compute(stage, step._replace(action="run"))
        made = self.record(stage.name)["outputs"]
        other = [
            n for n, e in record["outputs"].items() if made.get(n) != e and not records.is_log(n)
        ]
        self._say(
            f"stage {stage.name}: {', '.join(other[:5])} came out differently; what reads it runs "
            "again"
            if other
            else f"stage {stage.name}: all its outputs are what they were"
        )

    def _tell_moved(self, place: Path | None) -> None:
        if place is not None:
            self._say(f"What was there before is in {self._shown}/{place.relative_to(self.folder)}")

    # ------------------------------------------------------------------------------------- progress

    def _place(self, name: str) -> str:
        order = list(self._stages)
        return f"{order.index(name) + 1} of {len(order)}: {name}"

    def _left(self, name: str) -> str:
        """The estimated time of this stage and the later ones; empty if it cannot be estimated."""
        order = list(self._stages)
        later = [n for n in order[order.index(name) :] if n == name or n not in self._intact]
        known = [record for n in self._stages if (record := self._read(n)[0])]
        return time_left(
            [(self._stages[n].cost, records.earlier(self.folder, n)) for n in later], known
        )


def _plain(result: Any) -> Any:
    return json.loads(json.dumps(result, default=float))
