"""Records of finished stages: the key of a stage's inputs, and size and sha256 of its outputs.

A stage is stored in ``<run>/<name>/``. ``done.json`` in that folder is its record, written last. A
stage that has begun and not ended has ``begun.json`` instead. All paths in a record are relative to
the run folder, so that the folder can be moved and copied; a path is resolved against the folder
from which the record is read.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.run import files, untrusted
from rlhf_jax.run.checkpoint import sealed_steps

DONE = "done.json"
BEGUN = "begun.json"
CHECKPOINTS = "checkpoints"
ASIDE = "aside"
"""Folder of a run for earlier outputs, one subfolder per time at which they were moved."""

FORMAT = 1

# -------------------------------------------------------------------------------------------- paths


def relative(value: Any, root: Path) -> tuple[Any, list[list[str | int]]]:
    """Makes paths below `root` relative in JSON data, and returns where in the data they are.

    A path is a string that begins with `root` itself, as returned by a stage that was given a
    folder below it.

    >>> relative({"model": "/run/sft/epoch-1", "loss": 0.5}, Path("/run"))
    ({'model': 'sft/epoch-1', 'loss': 0.5}, [['model']])

    Args:
      value: JSON data.
      root: an absolute folder.

    Returns:
      The data, and the keys and indices that lead to each relative path.
    """
    places: list[list[str | int]] = []

    def walk(node: Any, place: list[str | int]) -> Any:
        if isinstance(node, dict):
            return {key: walk(item, [*place, key]) for key, item in node.items()}
        if isinstance(node, list | tuple):
            return [walk(item, [*place, index]) for index, item in enumerate(node)]
        # With the separator, since `/run-2` is not below `/run`.
        if isinstance(node, str) and node.startswith(f"{root}{os.sep}"):
            places.append(place)
            return Path(node).relative_to(root).as_posix()
        return node

    return walk(value, []), places


def absolute(value: Any, places: Sequence[Sequence[str | int]], root: Path) -> Any:
    """Inverts `relative` for a run folder that is now at `root`.

    >>> absolute({"model": "sft/epoch-1"}, [["model"]], Path("/moved"))
    {'model': '/moved/sft/epoch-1'}

    Raises:
      ValueError: a path leaves the run folder.
    """
    # A copy, so that the record itself keeps its relative paths.
    value = json.loads(json.dumps(value))
    for place in places:
        node = value
        for step in place[:-1]:
            node = node[step]
        name = Path(node[place[-1]])
        if name.is_absolute() or ".." in name.parts:
            raise ValueError(f"the path {name} leads out of the run folder")
        node[place[-1]] = str(root / name)
    return value


# ------------------------------------------------------------------------------------------ outputs


def names(folder: Path) -> dict[str, Path]:
    """Every file and link of a stage's folder, by relative name, except checkpoints.

    Checkpoints have their own seals. The records themselves, and temporary files left by a killed
    process, are not outputs.
    """
    found: dict[str, Path] = {}
    for root, folders, entries in os.walk(folder):
        here = Path(root)
        # `os.walk` lists a link to a folder among the folders, and does not follow it.
        links = [name for name in folders if (here / name).is_symlink()]
        if here == folder:
            folders[:] = [name for name in folders if name != CHECKPOINTS]
            entries = [name for name in entries if name not in (DONE, BEGUN)]
        for name in [*entries, *links]:
            if not (name.startswith(".") and name.endswith(".tmp")):
                found[(here / name).relative_to(folder).as_posix()] = here / name
    return dict(sorted(found.items()))


def outputs(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of everything that a stage wrote, by its name in the stage's folder.

    Raises:
      OSError: one of them is a link, whose target may change or disappear at any time.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, path in names(folder).items():
        found[name] = files.contents(path)[""]
    return found


def damage(folder: Path, recorded: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The damaged outputs of a stage: name -> ``it is missing``, ``it is empty``, ...

    Sizes are compared first, because hashing is slow.

    Args:
      folder: folder of the stage.
      recorded: what `outputs` returned when the stage had ended.
    """
    found = names(folder)
    bad = {
        name: trouble
        for name, entry in recorded.items()
        if (trouble := _trouble(found.get(name), entry))
    }
    if bad:
        # The stage is repaired in any case, so the rest need not be hashed.
        return bad
    changed = [
        name for name, entry in recorded.items() if files.sha256(found[name]) != entry["sha256"]
    ]
    return dict.fromkeys(changed, "its bytes have changed")


def _trouble(path: Path | None, entry: Mapping[str, Any]) -> str:
    if path is None or not os.path.lexists(path):
        return "it is missing"
    if path.is_symlink() or not path.is_file():
        return "a link is in its place" if path.is_symlink() else "something else is in its place"
    size = path.stat().st_size
    if size == entry["bytes"]:
        return ""
    return f"it has {size:,} bytes and had {entry['bytes']:,}" if size else "it is empty"


def earlier(run: Path, stage: str) -> dict[str, Any] | None:
    """The record of a stage's last run that counted its seconds, set aside or not."""
    # The folders are named by time, so this order is from the newest to the oldest.
    aside = sorted((run / ASIDE).glob(f"*/{stage}"), reverse=True)
    for folder in (run / stage, *aside):
        seen, _ = read(folder / DONE)
        if seen and seen.get("seconds"):
            return seen
    return None


def strangers(folder: Path, recorded: Mapping[str, Any]) -> list[str]:
    """Names of files in a stage's folder that the stage did not write.

    An extra file in a model folder, or an extra file of rankings, would be read by the next stage.
    """
    return [name for name in names(folder) if name not in recorded]


def set_aside(run: Path, stage: str, only: Sequence[str] | None = None) -> Path | None:
    """Moves a stage's folder, or some of its files, to ``<run>/aside/<time>/<stage>``.

    Nothing is deleted.

    Args:
      run: the run folder.
      stage: the stage's name.
      only: names in its folder; None moves the whole folder.

    Returns:
      Where they are now; None if there was nothing to move.
    """
    folder = run / stage
    # An empty folder has no outputs to keep, and is left for the stage to write into.
    empty = folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())
    if not os.path.lexists(folder) or empty or (only is not None and not only):
        return None
    place = _free(run / ASIDE / time.strftime("%Y%m%d-%H%M%S"), stage)
    for name in [None] if only is None else only:
        source, target = (folder, place) if name is None else (folder / name, place / name)
        if os.path.lexists(source):
            files.make_folder(target.parent)
            files.rename(source, target)
    return place


def put_back(run: Path, stage: str, place: Path) -> bool:
    """Undoes `set_aside` for a whole stage, unless something was written in its place.

    Args:
      run: the run folder.
      stage: the stage's name.
      place: where its folder was moved to.

    Returns:
      Whether it is back; if the stage has written anything, both folders remain where they are.
    """
    folder = run / stage
    if os.path.lexists(folder):
        written = [path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]
        # An empty file (a log that was only opened) and the mark of a begun stage hold no results.
        if any(
            path.is_symlink() or (path.name != BEGUN and path.stat().st_size) for path in written
        ):
            return False
        shutil.rmtree(folder)
    files.rename(place, folder)
    for empty in (place.parent, place.parent.parent):
        # It raises if the folder contains other outputs that were set aside.
        with contextlib.suppress(OSError):
            empty.rmdir()
    return True


def _free(place: Path, stage: str) -> Path:
    """An unused folder for `stage` below `place`; two moves may happen within one second."""
    attempt, number = place / stage, 1
    while os.path.lexists(attempt):
        number += 1
        attempt = place.with_name(f"{place.name}-{number}") / stage
    return attempt


# ------------------------------------------------------------------------------------------- inputs

_NO_INPUT = re.compile(r"^(readme.*|license.*|licence.*|notice.*|.*\.md)$", re.IGNORECASE)
"""Files of a folder that are meant for people and not read by any program."""


def digest(path: Path) -> str | dict[str, str]:
    """sha256 of a file, or of each file of a folder by relative name; links to files are followed.

    For a model folder (one with a ``config.json``) only its top-level files and its chat templates
    count, because nothing else is read.

    Raises:
      ValueError: the path does not exist, or is neither a file nor a folder.
    """
    if path.is_file():
        return files.sha256(path)
    if not path.is_dir():
        what = "is not a plain file" if path.exists() else "is not there"
        raise ValueError(f"{path} {what}: put the file or folder there, or correct the path")
    is_model = (path / "config.json").is_file()
    return {
        name: files.sha256(file)
        for file in (files.model_files(path) if is_model else sorted(path.rglob("*")))
        if file.is_file() and is_input(name := file.relative_to(path).as_posix())
    }


def is_input(name: str) -> bool:
    """Whether a file can change what a program does: not if hidden, a README or a licence.

    >>> [is_input(name) for name in ("model.safetensors", "README.md", ".cache/x", "LICENSE")]
    [True, False, False, False]
    """
    parts = name.split("/")
    return not any(part.startswith(".") for part in parts) and not _NO_INPUT.fullmatch(parts[-1])


_FUNCTION = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def functions(
    config: Any, known: Sequence[str] = ("rlhf_jax", "experiments", "configs")
) -> dict[str, str]:
    """sha256 of the source of each module that the config names as ``module:function``.

    The user's own loss is a part of the algorithm just as a number in the config is. Our own
    packages are covered by the versions of the stages. Modules that the module imports are not
    hashed.

    Args:
      config: plain data.
      known: packages whose changes are covered by the versions of the stages.
    """
    found: dict[str, str] = {}
    for text in _texts(config):
        module = text.partition(":")[0]
        if _FUNCTION.fullmatch(text) and module.partition(".")[0] not in known:
            source = _source(module)
            if source:
                found[module] = files.sha256(source)
    return dict(sorted(found.items()))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _source(module: str) -> Path | None:
    # Looking up a dotted name imports its parent packages, which may fail in any of these ways.
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    origin = Path(spec.origin) if spec is not None and spec.origin else None
    return origin if origin is not None and origin.suffix == ".py" and origin.is_file() else None


# --------------------------------------------------------------------------------- writing, reading


def write(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a record together with its own sha256, and returns what was written.

    This is the very last step of a stage.
    """
    # As JSON reads it back, with lists for tuples, so that the digest can be verified.
    plain = json.loads(json.dumps({"format": FORMAT, **record}))
    plain["sha256"] = files.json_digest(plain)
    files.write_json(path, plain)
    return plain


def read(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Reads a record; returns None and what is wrong with it, or ``(None, "")`` if absent."""
    try:
        record = untrusted.read_json(path)
        if not isinstance(record, dict):
            raise ValueError("it holds no object")
        stored = record.pop("sha256", None)
    except FileNotFoundError:
        # A dangling link exists as a directory entry, but is not a record.
        return None, "is a link that leads nowhere" if os.path.islink(path) else ""
    except (ValueError, OSError, RecursionError) as error:
        # The error advises to copy the file again; this one is recomputed, so the advice is cut.
        said = str(error).removeprefix(f"{path} ").partition("): copy it again")
        return None, f"is damaged ({(said[0] + ')' if said[1] else said[0])[:120]})"
    # Such a record has no sha256 because its version did not write one, so it is not damaged.
    if stored is None and "outputs" not in record and "key" not in record:
        return None, "is of an earlier version, which did not note what it had written"
    if stored != files.json_digest(record):
        return None, "is damaged (it is not what was written)"
    if record.get("format") != FORMAT:
        return None, f"has the format {record.get('format')} and this version reads {FORMAT}"
    return record, ""


def newest_step(folder: Path) -> int | None:
    """The newest sealed checkpoint of a stage, or None; restoring it checks its files."""
    return max(sealed_steps(folder / CHECKPOINTS), default=None)


def config_changes(folder: Path) -> list[Any]:
    """The steps from which a stage used another config, according to its newest checkpoint."""
    step = newest_step(folder)
    if step is None:
        return []
    try:
        return list(
            untrusted.read_json(folder / CHECKPOINTS / "manifests" / f"{step}.json")["extra"][
                "config_changes"
            ]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return []


def without(config: Any, names: Iterable[str]) -> Any:
    """Removes the keys with these names from plain data, at every depth.

    >>> without({"ppo": {"keep": 2, "lr": 1e-5}}, ("keep",))
    {'ppo': {'lr': 1e-05}}
    """
    if isinstance(config, dict):
        return {key: without(value, names) for key, value in config.items() if key not in names}
    return config


def is_log(name: str) -> bool:
    """Whether a file is a log, which includes times and is not an input of another stage."""
    return name.rpartition("/")[2] in ("metrics.jsonl", "skipped.jsonl")
