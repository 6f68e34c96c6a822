"""The run folder: locked by one process, with the config of its run, never overwritten."""

from __future__ import annotations

import contextlib
import contextvars
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows: folders are used without a lock
    fcntl = None

from ml_collections import ConfigDict

from rlhf_jax.run import checkpoint, files, processes
from rlhf_jax.run.config import diff, to_json
from rlhf_jax.run.untrusted import read_json

CONFIG_FILE = "config.json"
LOCK_FILE = "run.lock"
"""Marks a folder as a run of this program, and is locked while a process works in it."""

HARMLESS = (
    "save_every",
    "evaluate_every",
    "keep",
    "max_skipped",
    "kl_ceiling",
    "entropy_floor",
    "value_error_ceiling",
)
"""Keys, in any group, that may change on resume without changing any number of the training.

They control when a run saves, measures or gives up.
"""

_CHANGE_ALLOWED = contextvars.ContextVar("change_allowed", default=False)


def claim_workdir(workdir: str | os.PathLike[str], *, overwrite: bool = False) -> IO[str]:
    """Creates the run folder if needed and locks it until this process ends for any reason.

    Args:
      workdir: the run folder: new, empty, or created by this program.
      overwrite: rename an earlier run to ``<workdir>.old-<time>`` first.

    Returns:
      The open lock file; closing it releases the folder.

    Raises:
      ValueError: the folder is not ours (a file, a link, a folder with other files), or a live
        process works in it.
    """
    path = files.local_path("workdir", workdir)
    refuse_foreign(path)
    if overwrite and (path / CONFIG_FILE).is_file():
        # Under the lock, so that the folder of a live run is never renamed.
        with _lock(path):
            _move_aside(path)
    files.make_folder(path)
    lock = _lock(path)
    # The lock file, which marks the folder as ours, must be on disk before anything else in it.
    files.sync(path)
    # This process has the lock, so no other one is writing these files.
    files.remove_unfinished(path)
    return lock


def refuse_foreign(path: Path) -> None:
    """Raises unless a folder is empty or has our lock file, without links that lead out of it."""
    name = f"workdir={str(path)!r}"
    if path.is_symlink():
        raise ValueError(
            f"{name} is a symbolic link: pass the folder it leads to, {os.path.realpath(path)}"
        )
    if not path.exists():
        return
    # Earlier versions left only this file when killed at the very start.
    half = {"config.tmp"}
    ours = path.is_dir() and (
        (path / LOCK_FILE).is_file() or {p.name for p in path.iterdir()} <= half
    )
    if not ours:
        older = (
            f" (one of an earlier version: add an empty file {LOCK_FILE})"
            if (path / CONFIG_FILE).exists()
            else ""
        )
        raise ValueError(
            f"{name} is not a run of this program{older}: choose another, it is left as it is"
        )
    link = next(files.links_out_of(path), None)
    if link is not None:
        raise ValueError(
            f"{link} is a symbolic link out of the run folder, to {os.path.realpath(link)}: move "
            "what it leads to there instead, or remove the link"
        )


def _move_aside(path: Path) -> None:
    aside = path.with_name(f"{path.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
    if aside.exists():
        aside = aside.with_name(f"{aside.name}-{time.time_ns()}")
    files.rename(path, aside)
    print(f"The earlier run was moved to {aside}.", flush=True)


def _lock(path: Path) -> IO[str]:
    """Opens and locks the lock file; the kernel releases the lock when the process ends.

    So there are no stale locks.
    """
    # Opened for appending: another mode would erase the holder's name before the lock is known.
    file = (path / LOCK_FILE).open("a+", encoding="utf-8")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read(200).strip() or "another process"
        file.close()
        raise ValueError(
            f"workdir={str(path)!r} is in use by {holder}: wait for its end or stop it, or choose "
            "another workdir"
        ) from None
    except OSError as error:
        # Some network file systems have no locks.
        print(
            f"Warning: {path} cannot be locked ({error}): start only one process on it",
            file=sys.stderr,
            flush=True,
        )
    # Only now, with the lock: the line of an earlier holder is replaced.
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def changing_numbers(changes: Sequence[str]) -> list[str]:
    """The lines of `diff` whose key is not in `HARMLESS`.

    >>> changing_numbers(["ppo.save_every: 5 -> 9", "ppo.learning_rate: 1e-05 -> 2e-05"])
    ['ppo.learning_rate: 1e-05 -> 2e-05']
    """
    return [line for line in changes if line.partition(":")[0].rpartition(".")[2] not in HARMLESS]


@contextlib.contextmanager
def allow_change(allowed: bool = True) -> Iterator[None]:
    """The equivalent of ``--allow_config_change`` for a notebook.

    In this block a run may resume although its config has changed.
    """
    token = _CHANGE_ALLOWED.set(allowed)
    try:
        yield
    finally:
        _CHANGE_ALLOWED.reset(token)


def change_allowed() -> bool:
    """Whether a run may resume with another config, other data or other models."""
    return _CHANGE_ALLOWED.get()


def prepare_workdir(
    workdir: str | os.PathLike[str],
    config: ConfigDict,
    *,
    overwrite: bool = False,
    allow_config_change: bool = False,
) -> bool:
    """Creates the run folder and stores the config in it, or finds the run to resume there.

    Nothing is ever deleted: `overwrite` renames an earlier run to ``<workdir>.old-<time>``. Keys of
    `HARMLESS` may change; the changes are printed.

    Args:
      workdir: the folder of this run.
      config: the config of the run; stored as ``config.json``.
      overwrite: start a new run even if the folder contains one.
      allow_config_change: resume although the config differs from the stored one.

    Returns:
      True if the run is new, False if it resumes.

    Raises:
      ValueError: the folder contains something else, or a run with another config (the differences
        are listed).
    """
    path = files.local_path("workdir", workdir)
    stored = path / CONFIG_FILE
    refuse_foreign(path)
    if stored.is_file() and overwrite:
        _move_aside(path)
    text = to_json(config)
    fresh = not stored.is_file()
    if not fresh:
        changes = diff(_stored_config(stored), json.loads(text))
        refused = changing_numbers(changes)
        if refused and not allow_config_change:
            raise ValueError(
                f"{path} holds a run with another config ({'; '.join(refused[:20])}): "
                "choose another workdir, or --overwrite (keeps the old run aside), or "
                "--allow_config_change to go on"
            )
        if changes:
            print(
                f"The run in {path} goes on with another config: {'; '.join(changes)}", flush=True
            )
    # The lock file marks the folder as ours, so it is there before the config: a folder with a
    # config alone would be refused.
    files.touch(path / LOCK_FILE)
    with files.written(stored) as file:
        file.write(text + "\n")
    return fresh


def _stored_config(path: Path) -> dict[str, Any]:
    try:
        stored = read_json(path)
    except ValueError:
        stored = None
    if not isinstance(stored, dict):
        raise ValueError(f"{path} is damaged: restore it, or start afresh with --overwrite")
    return stored


def require_checkpoint(path: Path, config: ConfigDict) -> None:
    """Raises if the config has changed and there is no checkpoint to resume from.

    The run would start again and overwrite outputs of the other config.
    """
    if not (path / CONFIG_FILE).is_file() or checkpoint.was_saved(path / "checkpoints"):
        return
    changes = changing_numbers(
        diff(_stored_config(path / CONFIG_FILE), json.loads(to_json(config)))
    )
    if changes:
        raise ValueError(
            f"{path} holds a run with another config ({'; '.join(changes[:20])}) and no checkpoint "
            "to go on from: choose another workdir, or --overwrite (keeps the old run aside)"
        )


def remove_unused(path: Path, above: Sequence[Path] = ()) -> None:
    """Removes a run folder that contains only our config, so that a refused config leaves no trace.

    Args:
      path: the run folder.
      above: folders that were created for it, innermost first; those that are empty are removed
        too.
    """
    if path.is_dir() and {p.name for p in path.iterdir()} == {CONFIG_FILE, LOCK_FILE}:
        for name in (CONFIG_FILE, LOCK_FILE):
            (path / name).unlink()
        path.rmdir()
        # It raises once another process has put something there.
        with contextlib.suppress(OSError):
            for folder in above:
                folder.rmdir()


def share_workdir(path: Path, fresh: bool) -> None:
    """Raises unless all hosts see the same run folder, because they write checkpoints together."""
    if processes.count() == 1:
        return
    if fresh:
        processes.when_another_fails(lambda: remove_unused(path))
    token = path / ".shared"
    # Random, so that the mark of an earlier run cannot be taken for that of this one.
    mark = processes.on_first("workdir", lambda: _put_mark(token))
    # A network file system may show a new file only after some seconds.
    until = time.monotonic() + 10
    while not (seen := token.is_file() and token.read_text() == mark) and time.monotonic() < until:
        time.sleep(0.1)
    try:
        facts = "the folder of process 0" if seen else f"another folder ({path.absolute()})"
        processes.agree(
            "workdir", {f"workdir={str(path)!r} (one folder that all hosts share)": facts}
        )
    finally:
        # `agree` returns when every process has looked, so the mark is no longer needed.
        if processes.index() == 0:
            token.unlink(missing_ok=True)


def _put_mark(token: Path) -> str:
    mark = os.urandom(16).hex()
    with files.written(token) as file:
        file.write(mark)
    return mark
