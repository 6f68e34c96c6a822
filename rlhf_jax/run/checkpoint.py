"""Atomic checkpoints, sealed with checksums and quarantined (never deleted) when damaged.

Folder layout: ``<step>/`` (Orbax), ``manifests/<step>.json`` (the seal: sha256 of each file, shape
and dtype of each leaf, the `extra` of the caller), ``quarantine/`` (damaged or unfinished steps,
renamed). The seal is written last, so a step without one was never finished, and a flipped byte in
an array file, which Orbax loads without an error, is detected.

A sealed step survives a power cut: all its files and the folders above them are on the disk before
the seal is written, and the seal is on the disk before an older step is removed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import backends
from rlhf_jax.run import files, processes
from rlhf_jax.run.files import json_digest, sha256, write_json
from rlhf_jax.run.untrusted import read_json

__all__ = [
    "FORMAT",
    "Checkpoints",
    "json_digest",
    "refuse_non_finite",
    "sealed_steps",
    "write_json",
]

FORMAT = 1
_PATIENCE = 30.0
"""Seconds until a rename by one process must be visible to the others on a network file system."""


class Checkpoints:
    """The checkpoints of one run or stage, used in a ``with`` block and saved in the background.

    >>> import tempfile
    >>> state = {"w": jnp.arange(3.0)}
    >>> with tempfile.TemporaryDirectory() as root:
    ...     with Checkpoints(root) as checkpoints:
    ...         checkpoints.save(10, state, extra={"seed": 0})
    ...     with Checkpoints(root) as checkpoints:
    ...         step = checkpoints.newest_good()
    ...         restored, extra = checkpoints.restore(step, state)
    >>> step, extra, restored["w"].tolist()
    (10, {'seed': 0}, [0.0, 1.0, 2.0])

    Args:
      root: the folder, created by the first save.
      keep: how many of the newest steps to keep; None keeps all. Only steps sealed by this class
        are ever removed.
    """

    def __init__(self, root: str | os.PathLike[str], *, keep: int | None = 3):
        if keep is not None and keep < 1:
            raise ValueError(f"keep={keep} must be at least 1, or None to keep every checkpoint")
        # Imported here, because only saving needs Orbax: importing the package without it takes a
        # second and 25 MB less.
        from orbax.checkpoint import v1

        logging.getLogger("absl").addFilter(_not_told_twice)
        _drop_late_answers()
        self._orbax = v1
        self.root = files.local_path("the folder of checkpoints", root).absolute()
        self._keep = keep
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._verified: set[int] = set()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        try:
            self.wait()
        except OSError as failed:
            if error is None:
                raise
            # Raising here would replace the error that ended the block, which matters more.
            _warn(str(failed))
        finally:
            self._worker.shutdown()

    # --------------------------------------------------------------------------------------- saving

    def save(self, step: int, state: Any, *, extra: Mapping[str, Any] | None = None) -> None:
        """Starts saving; `state` may be donated or changed as soon as this returns.

        Args:
          step: larger than every step saved before.
          state: a tree of arrays.
          extra: JSON data to store with the state: counters, the config, fingerprints.

        Raises:
          FloatingPointError: a leaf is not finite; nothing is written.
          ValueError: `step` is not larger than the newest one, or a leaf is not an array.
          OSError: this save or the previous one could not be written; earlier sealed steps are
            unchanged.
        """
        self.wait()
        # Without it a slow process could list the saved steps while others already write this one.
        processes.barrier("save")
        leaves = _named_leaves(state)
        newest = max(self.steps(), default=-1)
        if step <= newest:
            raise ValueError(
                f"step={step} must be larger than the newest checkpoint in {self.root}, {newest}"
            )
        refuse_non_finite(leaves, f"the state of step {step}")
        seal = {
            "format": FORMAT,
            "step": step,
            "extra": dict(extra or {}),
            "leaves": _signature(leaves),
        }
        # What JSON cannot represent is refused before anything is written.
        seal = json.loads(json.dumps(seal, allow_nan=False))
        with self._cleaned_up(step):
            if jax.process_index() == 0:
                files.make_folder(self.root / "manifests")
                if os.path.lexists(self.root / str(step)):
                    self._quarantine(step, "it was never finished")
            # Leftovers of an unfinished save must be moved away before any process writes.
            processes.barrier("folder")
            # Orbax refuses to store arrays of size 0; `restore` makes them again from their shapes.
            writing = self._orbax.save_async(
                str(self.root / str(step)), {k: v for k, v in leaves.items() if v.size}
            )
        self._pending = self._worker.submit(self._finish, step, writing, seal)

    def wait(self) -> None:
        """Waits until the pending save is sealed; raises the OSError of a save that failed."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def _finish(self, step: int, writing: Any, seal: dict[str, Any]) -> None:
        with self._cleaned_up(step):
            writing.result()
            self._make_durable(step)
            if jax.process_index() == 0:
                seal["files"] = _checksums(self.root / str(step))
                write_json(self._manifest(step), seal | {"sha256": json_digest(seal)})
                # From here on a folder without any sealed step means damage, not a first save that
                # was interrupted (see `_newest_good`).
                files.touch(self.root / "manifests" / "sealed")
            # `wait` must not return on any process before process 0 has written the seal.
            processes.barrier("sealed")
        self._verified.add(step)
        if jax.process_index() == 0:
            self._prune()

    def _make_durable(self, step: int) -> None:
        """Waits until the files of a step, their folders and the step's own name are on the disk.

        Each process syncs all files: on a network file system the data that are not on the disk
        yet are in the memory of the machine that wrote them. Process 0 may have renamed the folder
        just now, which other machines see with a delay.
        """
        folder = self.root / str(step)
        processes.barrier("written")
        until = time.monotonic() + _PATIENCE
        while not folder.is_dir():
            if time.monotonic() > until:
                raise OSError(
                    f"{folder} is not to be seen by process {processes.index()}: is it a shared "
                    "folder?"
                )
            time.sleep(0.05)
        files.sync_tree(folder)
        files.sync(self.root)
        processes.barrier("on the disk")

    @contextlib.contextmanager
    def _cleaned_up(self, step: int) -> Iterator[None]:
        """On an error removes the half-written step and reports which checkpoint is intact."""
        try:
            yield
        except Exception as error:
            # The disk may be the reason of the failure; what cannot be removed must not hide it.
            with contextlib.suppress(OSError):
                files.remove(*self.root.glob(f"{step}.orbax-checkpoint-tmp*"))
                if not self._manifest(step).exists():
                    files.remove(self.root / str(step))
            kept = [s for s in self.steps() if s != step]
            still = (
                f"the checkpoint of step {max(kept)} is intact"
                if kept
                else "there is no earlier one"
            )
            reason = (
                str(error).strip().splitlines()[0][:300]
                if str(error).strip()
                else type(error).__name__
            )
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.root} ({reason}); "
                f"{still}. Free disk space, or choose a workdir that can be written, and give the "
                "same command again."
            ) from error

    def _prune(self) -> None:
        """Removes the oldest steps; called when the newest step and its seal are on the disk."""
        sealed = self.steps()
        for step in sealed[: -self._keep] if self._keep else []:
            # The seal is removed first: a half-removed step then counts as unfinished, not damaged.
            # The sync preserves that order across a power cut.
            self._manifest(step).unlink()
            files.sync(self.root / "manifests")
            files.remove(self.root / str(step))

    # -------------------------------------------------------------------------------------- finding

    def steps(self) -> list[int]:
        """The sealed steps, oldest first; their files are not checked (`newest_good` does that)."""
        return sealed_steps(self.root)

    def newest_good(self) -> int | None:
        """The newest step that equals its seal; damaged and unfinished later steps are quarantined.

        Returns:
          The step, or None when nothing was ever saved here.

        Raises:
          ValueError: there were checkpoints, and every one is damaged. Training never restarts
            silently.
          OSError: `root` exists and is not a folder.
        """
        if os.path.lexists(self.root) and not self.root.is_dir():
            raise OSError(
                f"{self.root} is no folder: checkpoints could not be written there; move it away"
            )
        # A number, as processes exchange JSON: -1 where nothing was saved, -2 where all is damaged.
        chosen = processes.on_first("newest good step", self._newest_good)
        # Process 0 has verified the step for all of them; the others compare its seal below, which
        # detects a folder that is not shared.
        self._verified |= {chosen} - {-1, -2}
        if processes.count() > 1:
            processes.agree(
                "resume step", {f"the newest good step in {self.root}": self._sealed(chosen)}
            )
        if chosen == -2:
            raise ValueError(
                f"every checkpoint in {self.root} is damaged (they are in "
                f"{self.root / 'quarantine'}): restore one from a backup, or start afresh with "
                "--overwrite (keeps this run aside)"
            )
        return chosen if chosen >= 0 else None

    def _sealed(self, step: int) -> str:
        """Names a step and its seal, as this process sees them."""
        try:
            return f"{step} (sealed {json.loads(self._manifest(step).read_bytes())['sha256'][:12]})"
        except (OSError, ValueError, KeyError):
            return f"{step} (not to be seen)" if step >= 0 else "none"

    def _newest_good(self) -> int:
        folders = [p for p in self.root.glob("*") if _is_step(p.name)]
        files.remove(*self.root.glob("*.orbax-checkpoint-tmp*"))  # Orbax's own unfinished files
        files.remove_unfinished(self.root / "manifests")
        for step in sorted((int(p.name) for p in folders), reverse=True):
            damage = self._damage(step)
            if damage is None:
                self._verified.add(step)
                return step
            self._quarantine(step, damage)
        # Unfinished steps without any seal come from a process that was killed during its very
        # first save: nothing is lost, so the run starts from the beginning (-1).
        seals = [*self.root.glob("manifests/*.json"), *self.root.glob("quarantine/*.json")]
        return -2 if seals or (self.root / "manifests" / "sealed").exists() else -1

    def _damage(self, step: int) -> str | None:
        """Describes what is wrong with a step; None when its files equal its seal."""
        try:
            seal = read_json(self._manifest(step))
            digest = seal.pop("sha256")
        except FileNotFoundError:
            return "it was never finished"
        except (ValueError, KeyError, TypeError, AttributeError):
            return "its seal cannot be read"
        if digest != json_digest(seal):
            return "its seal was changed"
        try:
            found = _checksums(self.root / str(step))
        except OSError as error:
            return str(error)
        expected = seal.get("files")
        if not isinstance(expected, dict) or seal.get("step") != step:
            return "its seal is of another step"
        bad = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        return f"{bad[0]} is not what was written" if bad else None

    def _quarantine(self, step: int, why: str) -> None:
        folder = self.root / "quarantine"
        files.make_folder(folder)
        # The time makes the name unique: the same step may be damaged again after a resume.
        place = folder / f"{step}-{time.time_ns()}"
        files.rename(self.root / str(step), place)
        if self._manifest(step).exists():
            files.rename(self._manifest(step), place.with_name(place.name + ".json"))
        _warn(f"the checkpoint of step {step} is not used, {why}; it was moved to {place}")

    def _manifest(self, step: int) -> Path:
        return self.root / "manifests" / f"{step}.json"

    # ------------------------------------------------------------------------------------ restoring

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """The state saved at `step`, bit for bit, with the shardings of `abstract_state`.

        Args:
          step: what `newest_good` returned, or any sealed step.
          abstract_state: a tree with the structure of the saved one, of arrays or
            `jax.ShapeDtypeStruct`s (with shardings on a mesh).

        Returns:
          ``(state, extra)``.

        Raises:
          ValueError: there is no such step, or the config makes a different state: the first
            leaves that differ are named, and nothing is quarantined.
          OSError: the files of the step are damaged.
        """
        self.wait()
        if step not in self.steps():
            raise ValueError(
                f"there is no checkpoint of step {step} in {self.root}; there are: {self.steps()}"
            )
        damage = None if step in self._verified else self._damage(step)
        if damage:
            raise OSError(f"the checkpoint of step {step} in {self.root} is damaged: {damage}")
        seal = read_json(self._manifest(step))
        wanted = _named_leaves(abstract_state)
        _check_signature(step, seal["leaves"], _signature(wanted))
        specs = {name: _spec(leaf) for name, leaf in wanted.items()}
        stored = self._orbax.load(
            str(self.root / str(step)), {k: v for k, v in specs.items() if v.size}
        )
        empty = {
            k: jnp.zeros(v.shape, v.dtype, device=v.sharding)
            for k, v in specs.items()
            if not v.size
        }
        leaves = [{**stored, **empty}[name] for name in specs]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), seal["extra"]


# ----------------------------------------------------------------------------------------- the tree


def refuse_non_finite(tree: Any, what: str) -> None:
    """Raises a FloatingPointError that names leaves of `tree` with NaN or infinity.

    All leaves are checked in one program, with one transfer from the device.
    """
    leaves = {k: v for k, v in _named_leaves(tree).items() if jnp.issubdtype(v.dtype, jnp.inexact)}
    finite = jax.device_get(_all_finite(leaves))
    bad = [name for name in leaves if not finite[name]]
    if bad:
        raise FloatingPointError(f"{what} is not finite ({', '.join(bad[:3])}): it was not saved")


@jax.jit
def _all_finite(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(leaf).all() for name, leaf in leaves.items()}


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their path, in tree order.

    A flat dict is stored, so that a checkpoint does not depend on the types of the containers.
    """
    leaves = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise ValueError(
                f"{name} is a {type(leaf).__name__}: a checkpoint holds arrays, data goes in extra"
            )
        # A NumPy float64 would come back as float32, which is not what was saved.
        if isinstance(leaf, np.ndarray) and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            raise ValueError(f"{name} is {leaf.dtype}, which JAX would narrow: convert it first")
        assert name not in leaves, f"two leaves are called {name}"
        leaves[name] = leaf
    return leaves


def _signature(leaves: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in leaves.items()}


def _check_signature(step: int, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    def show(entry: Any) -> str:
        return f"{entry[1]}{tuple(entry[0])}" if entry else "absent"

    names = [n for n in {**wanted, **stored} if stored.get(n) != wanted.get(n)]
    if names:
        lines = [
            f"{n}: stored {show(stored.get(n))}, config makes {show(wanted.get(n))}"
            for n in names[:3]
        ]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"the checkpoint of step {step} is of another model or optimizer "
            f"({'; '.join(lines)}{more}): use the config it was made with, or another workdir"
        )


def _spec(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(
        backends.first_device()
    )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


# -------------------------------------------------------------------------------------------- files


def sealed_steps(root: Path) -> list[int]:
    """The steps in a folder of checkpoints that have a seal, oldest first; files not checked."""
    names = root.glob("manifests/*.json")
    return sorted(int(p.stem) for p in names if _is_step(p.stem) and (root / p.stem).is_dir())


def was_saved(root: Path) -> bool:
    """Whether a folder of checkpoints has a seal; the files of the step may be missing."""
    return next(root.glob("manifests/*.json"), None) is not None


def _is_step(name: str) -> bool:
    # The name must be the usual spelling: `007` would be a second name of step 7.
    return name.isascii() and name.isdecimal() and str(int(name)) == name


def _checksums(folder: Path) -> dict[str, str]:
    """sha256 of each file in `folder`, by relative name.

    Symbolic links are refused: their targets are outside our control and may change at any time.
    """
    for path in (folder, *folder.rglob("*")):
        if path.is_symlink():
            raise OSError(f"{path.name} is a symbolic link")
    return {
        p.relative_to(folder).as_posix(): sha256(p)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def _not_told_twice(record: logging.LogRecord) -> bool:
    """A log filter that drops the traceback Orbax logs when a save fails in a thread.

    `save` or `wait` raises the same error, so that it would be shown twice.
    """
    return not (
        record.exc_info and "orbax" in record.pathname and "_SignalingThread" in str(record.msg)
    )


def _drop_late_answers() -> None:
    """Makes `sys.unraisablehook` pass over the arrays that answer after their save has failed.

    When the write of one array fails, Orbax closes the event loop of the save while TensorStore
    still writes the others. Each of those then finds the loop closed and shows a traceback from a
    C++ thread, below the error that `save` or `wait` raises.
    """
    told = sys.unraisablehook
    if getattr(told, "drops_late_answers", False):
        return

    def hook(unraisable: Any) -> None:
        in_main_thread = threading.current_thread() is threading.main_thread()
        error = unraisable.exc_value
        if in_main_thread or repr(error) != "RuntimeError('Event loop is closed')":
            told(unraisable)

    hook.drops_late_answers = True  # pyright: ignore[reportFunctionMemberAccess]
    sys.unraisablehook = hook


def _warn(text: str) -> None:
    print(f"Warning: {text}", file=sys.stderr, flush=True)
