"""Fingerprints of the bytes that this run has parsed, whatever their files contain now.

The fingerprint of a run must be that of the data it trains on. A file that is hashed some time
after it was read may have grown in between; the run would then be recorded with the longer file and
take other batches after a resume. So the readers record what they read (`seen`), and the
fingerprint is looked up here (`of`).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

StrPath = str | os.PathLike[str]


class Print(NamedTuple):
    """The fingerprint of a file's bytes as stored on disk, compressed where the file is."""

    sha256: str
    bytes: int
    lines: int


Stat = dict[str, tuple[int, int]]
"""Size and time of the last change (in ns) of each file of a folder, by name."""

_seen: dict[Path, list[Print]] = {}
_loaded: dict[Path, Stat] = {}


def begin() -> None:
    """Clears the record at the start of a stage, which reads its files itself."""
    _seen.clear()
    _loaded.clear()


def seen(path: StrPath, data: bytes) -> None:
    """Records that `data` was read from a file and is about to be parsed."""
    found = Print(hashlib.sha256(data).hexdigest(), len(data), data.count(b"\n"))
    prints = _seen.setdefault(_key(path), [])
    # The same content read twice is one entry, so a second entry means that the file changed.
    if found not in prints:
        prints.append(found)


def forget(path: StrPath) -> None:
    """Drops the record of a file that this program has rewritten."""
    _seen.pop(_key(path), None)


def of(path: StrPath) -> Print:
    """The fingerprint of what was parsed of a file, or of the file itself if it was not read yet.

    Raises:
      ValueError: it was read more than once with different contents.
    """
    prints = _seen.get(_key(path), [])
    if len(prints) > 1:
        sizes = ", then ".join(
            f"{each.bytes:,} bytes (sha256 {each.sha256[:12]}..)" for each in prints
        )
        raise ValueError(
            f"{path} changed while this run read it: it held {sizes}. Start again when nothing "
            "writes to it any more"
        )
    return prints[0] if prints else _of_file(Path(path))


def _of_file(path: Path) -> Print:
    digest, size, lines = hashlib.sha256(), 0, 0
    with path.open("rb") as file:
        # In chunks, as a file that was not read yet may be larger than the memory.
        while piece := file.read(2**20):
            digest.update(piece)
            size, lines = size + len(piece), lines + piece.count(b"\n")
    return Print(digest.hexdigest(), size, lines)


# ------------------------------------------------------------------------------------------- models


def loading(path: StrPath) -> None:
    """Records the sizes and times of a model's files, just before they are read.

    Weights are memory-mapped and never read in one piece, so their bytes are not fingerprinted when
    they are loaded. If sizes and times are unchanged when the files are hashed, then the hash is
    that of the loaded weights.
    """
    # `setdefault`, because a model that is loaded twice must not have changed in between either.
    _loaded.setdefault(_key(path), _stat(Path(path)))


def changed_since_loading(path: StrPath) -> list[str]:
    """Names of a model's files that changed since `loading`; none where it was not loaded."""
    before, now = _loaded.get(_key(path)), _stat(Path(path))
    return (
        [] if before is None else sorted(n for n in {*before, *now} if before.get(n) != now.get(n))
    )


def _stat(path: Path) -> Stat:
    if not path.exists():
        return {}
    files = [p for p in path.iterdir() if p.is_file()] if path.is_dir() else [path]
    stats = {file.name: file.stat() for file in files}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def _key(path: StrPath) -> Path:
    # Resolved, so that a link and its target are one file.
    return Path(os.path.realpath(path))
