"""Which bytes are on the disk at each moment of a run, by what the program waited for; and that folder, built again.

A power cut leaves what was synced and nothing that may be expected beyond it: of a file what it held when it was last
synced (else nothing: it is empty), of a folder the entries that it had when it was last synced. No file system keeps
less than that, and some keep no more. `Recorder` watches `os.fsync` in this process and copies what each call makes
permanent, so every moment of a run can be laid out as a folder (`Recorder.build`) and the same command be given there.

Writers that are not Python (Orbax's) count by what Python asks the disk for afterwards.
"""

from __future__ import annotations

import os
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Key = tuple[int, int]
"""Device and number of an inode; the recorder holds each one open, so that no number is given twice."""


class Entry(NamedTuple):
    """An entry of a folder: what it leads to."""

    key: Key
    kind: str
    """``file``, ``folder`` or ``link``."""
    target: str = ""


class Event(NamedTuple):
    """Something that happened, in order."""

    what: str
    """``file`` or ``folder``: it was synced; ``rename``: something got its final name."""
    path: str
    key: Key = (0, 0)
    content: Path | None = None
    entries: dict[str, Entry] = {}  # noqa: RUF012 (never changed)
    before: str = ""
    """The name before a renaming."""


class Recorder:
    """Records in a ``with`` block what of the folder `root` is made permanent.

    Args:
      root: an empty folder; it is on the disk.
      store: where copies of synced files are kept, outside of `root`.
    """

    def __init__(self, root: Path, store: Path):
        self.root, self.store = Path(os.path.realpath(root)), store
        store.mkdir(parents=True, exist_ok=True)
        self.events: list[Event] = []
        self._held: dict[Key, int] = {}
        self._lock = threading.RLock()
        self._saved: dict[str, Any] = {}
        self.on_rename: Callable[[Event], None] = lambda event: None
        self._root_key = self._hold(str(self.root))

    def __enter__(self) -> Recorder:
        self._saved = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}
        os.fsync = self._fsync
        os.rename = self._renaming("rename")
        os.replace = self._renaming("replace")
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self._saved.items():
            setattr(os, name, function)

    def close(self) -> None:
        """Lets go of the inodes, when nothing is built any more."""
        for handle in self._held.values():
            os.close(handle)
        self._held.clear()

    # ------------------------------------------------------------------------------------------------- recording

    def _fsync(self, handle: Any) -> None:
        number = handle if isinstance(handle, int) else handle.fileno()
        path = os.readlink(f"/proc/self/fd/{number}")
        with self._lock:
            if path == str(self.root) or path.startswith(f"{self.root}{os.sep}"):
                # Before the call: what is written while it waits may or may not be among what it makes permanent.
                self.events.append(self._synced(number, path))
            self._saved["fsync"](handle)

    def _synced(self, number: int, path: str) -> Event:
        here = f"/proc/self/fd/{number}"
        key = self._hold(here, follow=True)
        if not stat.S_ISDIR(os.fstat(number).st_mode):
            content = self.store / str(len(self.events))
            shutil.copyfile(here, content)
            return Event("file", path, key, content)
        entries = {}
        for entry in os.scandir(here):
            kind = "link" if entry.is_symlink() else "folder" if entry.is_dir() else "file"
            target = os.readlink(entry.path) if kind == "link" else ""
            try:
                entries[entry.name] = Entry(self._hold(entry.path), kind, target)
            except FileNotFoundError:  # gone meanwhile
                continue
        return Event("folder", path, key, entries=entries)

    def _hold(self, path: str, *, follow: bool = False) -> Key:
        handle = os.open(path, os.O_PATH | (0 if follow else os.O_NOFOLLOW))
        found = os.fstat(handle)
        key = (found.st_dev, found.st_ino)
        if key in self._held:
            os.close(handle)
        else:
            self._held[key] = handle
        return key

    def _renaming(self, name: str) -> Callable[..., None]:
        def rename(source: Any, target: Any, **kw: Any) -> None:
            event = Event("rename", os.path.abspath(target), before=os.path.abspath(source))
            with self._lock:
                if event.path.startswith(f"{self.root}{os.sep}"):
                    self.on_rename(event)
                    self.events.append(event)
                self._saved[name](source, target, **kw)

        return rename

    # -------------------------------------------------------------------------------------------------- building

    def build(self, moment: int, place: Path) -> Path:
        """The folder as a power cut after the first `moment` events leaves it, at `place`."""
        contents: dict[Key, Path] = {}
        folders: dict[Key, dict[str, Entry]] = {}
        for event in self.events[:moment]:
            if event.what == "file":
                assert event.content is not None
                contents[event.key] = event.content
            elif event.what == "folder":
                folders[event.key] = event.entries

        def lay(key: Key, path: Path) -> None:
            path.mkdir()
            for name, entry in folders.get(key, {}).items():
                if entry.kind == "folder":
                    lay(entry.key, path / name)
                elif entry.kind == "link":
                    (path / name).symlink_to(entry.target)
                elif entry.key in contents:
                    shutil.copyfile(contents[entry.key], path / name)
                else:
                    (path / name).touch()

        lay(self._root_key, place)
        return place


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative name, with its bytes."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
