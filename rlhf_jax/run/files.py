"""Files and folders, written so that they survive a power cut, and their checksums.

A file is on the disk when both its bytes and its entry in the folder are. `written`,
`write_json` and `write_lines` replace a whole file, `put_folder` replaces a whole folder, and
`append_line` appends a line; each returns only when the result would survive a power cut. Nothing
else in the package writes a file of a run (``tests/run/test_files.py`` checks that on the syntax
trees).

Paths. Everything is read from and written to a file system that the operating system has mounted;
`local_path` refuses addresses such as ``gs://bucket/run``, which `Path` would turn into a local
folder named ``gs:``. A bucket can neither rename a folder nor sync, and all of this depends on
both.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

StrPath = str | os.PathLike[str]

# ------------------------------------------------------------------------------------------ writing


@contextlib.contextmanager
def written(path: StrPath, *, binary: bool = False) -> Iterator[IO[Any]]:
    """A stream that replaces the file `path` when the block ends without an error.

    Until that moment `path` is unchanged; afterwards its new content survives a power cut. The
    stream writes to a temporary file beside it, which is synced, renamed over `path`, and made
    permanent by syncing the folder.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with written(folder / "a.txt") as file:
    ...     _ = file.write("hello")
    >>> (folder / "a.txt").read_text(), [p.name for p in folder.iterdir()]
    ('hello', ['a.txt'])

    Args:
      path: the file; its folder is created where it is missing.
      binary: whether the stream takes bytes; otherwise it takes text and writes UTF-8 with lines
        ending in LF.

    Raises:
      OSError: the file could not be written; the old one is unchanged, and no temporary file is
        left beside it.
    """
    path = local_path("the file to write", path)
    make_folder(path.parent)
    # In the same folder, because a rename is atomic only within one file system.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        encoding, newline = (None, None) if binary else ("utf-8", "\n")
        with open(handle, "wb" if binary else "w", encoding=encoding, newline=newline) as stream:
            yield stream
            # Before the rename: after a power cut the new name could otherwise stand for an empty
            # file.
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes the file private
        os.replace(name, path)
    except BaseException:
        # On a full disk a leftover temporary file would take the space that is needed.
        Path(name).unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: StrPath, data: Any, *, indent: int | None = None) -> None:
    """Writes JSON as `written` does.

    Raises:
      ValueError: the data contain a number that is not finite; `path` is unchanged.
      OSError: as `written` raises it.
    """
    text = json.dumps(data, indent=indent, allow_nan=False)
    with written(path) as file:
        file.write(text + "\n" * (indent is not None))


def write_lines(path: StrPath, rows: Iterable[Any]) -> None:
    """Writes `rows` as JSON lines, as `written` does."""
    with written(path) as file:
        file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def append_line(path: StrPath, row: Any) -> None:
    """Appends `row` as a line of JSON, which survives a power cut when this returns."""
    with appending(path) as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")
        flush(file)


def appending(path: StrPath) -> IO[str]:
    """Opens a text file for appending, for a log to which many lines are written.

    The entry of a new file in its folder is on the disk when this returns; lines are on the disk
    after `flush`.
    """
    path = local_path("the file to write", path)
    make_folder(path.parent)
    new = not path.exists()
    file = path.open("a", encoding="utf-8", newline="\n")
    if new:
        sync(path.parent)
    return file


def flush(file: IO[Any]) -> None:
    """Waits until what was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def touch(path: StrPath) -> None:
    """Creates an empty file where there is none, so that it survives a power cut."""
    if not os.path.lexists(path):
        appending(path).close()


def rename(source: StrPath, target: StrPath) -> None:
    """Renames a file or a folder so that the rename survives a power cut."""
    source, target = Path(source), Path(target)
    source.rename(target)
    # The new entry is synced first: a crash in between can leave both names but not neither.
    sync(target.parent)
    if source.parent != target.parent:
        sync(source.parent)


def make_folder(folder: StrPath) -> Path:
    """Creates a folder and its missing parents so that they survive a power cut."""
    folder = local_path("the folder to write", folder)
    # A new folder is an entry of its parent, so each parent of a new folder is synced.
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        sync(made.parent)
    return folder


def sync(path: StrPath) -> None:
    """Waits until a file's content, or a folder's list of entries, is on the disk.

    Systems and file systems that cannot sync a folder (Windows, some network mounts) are tolerated.
    """
    folder = os.path.isdir(path)
    if folder and os.name == "nt":
        return
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        if folder:  # write permission without read permission: such a folder cannot be synced
            return
        raise
    try:
        os.fsync(handle)
    except OSError:
        if not folder:
            raise
    finally:
        os.close(handle)


def sync_tree(folder: StrPath) -> None:
    """Waits until `folder` and all files and folders below it are on the disk.

    It is needed after another library has written files, which does not sync them.
    """
    # Bottom-up, so that a folder's list of entries is synced after the files that it names.
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            # The target of a link may be outside the tree; the link itself is an entry of its
            # folder.
            if not os.path.islink(os.path.join(root, name)):
                sync(os.path.join(root, name))
        sync(root)


def put_folder(temporary: StrPath, folder: StrPath) -> None:
    """Replaces a folder by a finished one; after a power cut one of the two is there, complete.

    Between the two renames the old folder is named ``<folder>.old``; `settle_folder` restores it
    after a crash at that point.

    Args:
      temporary: the finished folder, on the same file system.
      folder: its final path.
    """
    temporary, folder = Path(temporary), Path(folder)
    old = folder.with_name(folder.name + ".old")
    # The final name must never stand for files whose content a power cut can still lose.
    sync_tree(temporary)
    if os.path.lexists(folder):
        remove(old)
        rename(folder, old)
    rename(temporary, folder)
    remove(old)


def settle_folder(folder: StrPath) -> None:
    """Cleans up after a crash in `put_folder`; restores the old folder if there is no new one."""
    folder = Path(folder)
    temporary, old = (folder.with_name(folder.name + end) for end in (".tmp", ".old"))
    if os.path.lexists(old) and not os.path.lexists(folder):
        rename(old, folder)
    remove(temporary, old)


def remove(*paths: StrPath) -> None:
    """Removes files, links (not their targets) and whole folders; missing paths are ignored."""
    for path in map(Path, paths):
        if path.is_symlink() or path.is_file():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)


def remove_unfinished(folder: StrPath) -> None:
    """Removes temporary files that `written` left below `folder` when its process was killed."""
    for path in Path(folder).rglob(".*.tmp"):
        if _UNFINISHED.fullmatch(path.name):
            remove(path)


_UNFINISHED = re.compile(r"^\..+\.[a-z0-9_]{8}\.tmp")
"""The temporary names that `written` uses, such as ``.sft.json.k3xw_9ab.tmp``."""


def _umask() -> int:
    # The mask can only be read by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


# -------------------------------------------------------------------------------------------- paths

_ADDRESS = re.compile(r"^(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/(?P<rest>.*)", re.DOTALL)
"""Matches ``gs://bucket/run``, and ``gs:/bucket/run``, to which `Path` normalizes it.

A scheme has at least two letters, as one letter is a Windows drive (``C:/runs``).
"""


def local_path(what: str, value: StrPath) -> Path:
    """Returns `value` as a path; an address such as ``gs://bucket/run`` is refused.

    >>> local_path("workdir", "runs/sft").as_posix()
    'runs/sft'
    >>> local_path("workdir", "gs://bucket/run")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: workdir='gs://bucket/run' is an address (gs://), and only paths on local or ...

    Args:
      what: the flag, config key or use of the path, for the message.
      value: the value that was given for it.

    Raises:
      ValueError: it is an address; the message contains no user name, password or query.
    """
    text = os.fspath(value)
    found = _ADDRESS.match(text.lstrip())
    if found is None and "://" not in text:
        return Path(value)
    scheme = found["scheme"] if found else text.partition("://")[0].rpartition(":")[2]
    rest = re.split(r"[?#]", (found["rest"] if found else text.partition("://")[2]).lstrip("/"))[0]
    # A message must not repeat credentials: no query, and nothing before the @ of a host.
    shown = f"{scheme}://{rest.rpartition('@')[2]}"[:200]
    raise ValueError(
        f"{what}={shown!r} is an address ({scheme}://), and only paths on local or network disks "
        "are supported: mount it, or copy what is read from it; let runs write to a disk and copy "
        "them there at their end"
    )


def links_out_of(folder: StrPath) -> Iterator[Path]:
    """The symbolic links below `folder`, at any depth, with targets outside it or none.

    Links to targets inside `folder` are not returned, even if they form a cycle. Links are never
    followed, so the walk ends, and no file is opened: a folder of ten thousand entries takes a few
    hundredths of a second.
    """
    root = os.path.realpath(folder)
    inside = os.path.join(root, "")
    for place, folders, names in os.walk(root, followlinks=False):
        # `os.walk` lists a link to a folder among the folders.
        for name in (*folders, *names):
            path = os.path.join(place, name)
            # With the separator at both ends, since `/run-2` is not inside `/run`.
            if os.path.islink(path) and not (os.path.realpath(path) + os.sep).startswith(inside):
                yield Path(folder) / os.path.relpath(path, root)


# ------------------------------------------------------------------------------------ what is there


def sha256(path: StrPath) -> str:
    """sha256 of a file's bytes, which are read in chunks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(data: Any) -> str:
    """sha256 of JSON data, independent of the order of its keys.

    >>> json_digest({"a": 1, "b": 2}) == json_digest({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def contents(root: StrPath) -> dict[str, dict[str, Any]]:
    """Size and sha256 of a file, or of every file below a folder.

    Returns:
      ``{"sub/name": {"bytes": 12, "sha256": "..."}}``, sorted by name relative to `root` (``""``
      where `root` is a file), without hidden temporary files (``.*.tmp``).

    Raises:
      OSError: nothing is there, or there is a symbolic link: its target is outside our control and
        may change at any time.
    """
    root = Path(root)
    if root.is_symlink():
        raise OSError(f"{root} is a symbolic link")
    if root.is_file():
        return {"": _content(root)}
    if not root.is_dir():
        raise FileNotFoundError(f"there is no {root}")
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            raise OSError(f"{path} is a symbolic link")
        if path.is_file() and not (path.name.startswith(".") and path.name.endswith(".tmp")):
            found[path.relative_to(root).as_posix()] = _content(path)
    return found


def model_files(folder: Path) -> list[Path]:
    """The files that may be read of a model folder: its own, and its chat templates."""
    # Chat templates are the only files that are read from a folder inside a model's.
    found = [*folder.iterdir(), *folder.glob("*chat_templates/*")]
    return sorted(path for path in found if path.is_file())


def digest(path: Path) -> str:
    """A short sha256 of a file or of all files in a folder; large weights are sampled.

    Of a weight file above 64 MiB only the size and 64 pieces of 1 MiB count, so that comparing a
    model between processes does not read all of it.
    """
    digest, piece = hashlib.sha256(), 2**20
    inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if not path.exists():
        return "no such file"
    for file in inside:
        size = file.stat().st_size
        # Name and size mark where each file begins, so bytes cannot move between files unnoticed.
        digest.update(f"{file.relative_to(path)} {size}\n".encode())
        whole = size <= 64 * piece or file.suffix not in (".safetensors", ".gguf", ".bin")
        # The 64 pieces are evenly spaced, from the first bytes of the file to its last ones.
        offsets = range(0, size, piece) if whole else [(size - piece) * i // 63 for i in range(64)]
        with file.open("rb") as f:
            for offset in offsets:
                f.seek(offset)
                digest.update(f.read(piece))
    return digest.hexdigest()[:16]


def _content(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}
