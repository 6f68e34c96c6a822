"""Files: written so that a power cut loses nothing that was called done, read as if somebody else
wrote them.

Writing. A file is on the disk when its bytes and the entry of its folder are: `written`,
`write_json` and `write_lines` put a whole file in place of the old one, `put_folder` a whole
folder, `append_line` a line at the end, and each returns only when that would survive a power cut.
Nothing else in the package writes a file of a run (``tests/run/test_files.py`` reads the syntax
trees for it).

Paths. Everything is read from and written to a file system that the operating system has mounted;
`local_path` refuses addresses such as ``gs://bucket/run``, which `Path` would turn into a local
folder named ``gs:``. A bucket has no renaming of folders and no sync, which all of this stands on.

Reading. Model folders, tokenizers and checkpoints come from other people. What they hold is parsed
with limits, never executed, and a name found in one never becomes a path. Each refusal is a
ValueError with the file, the value and the limit.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

StrPath = str | os.PathLike[str]

# ------------------------------------------------------------------------------------------ writing


@contextlib.contextmanager
def written(path: StrPath, *, binary: bool = False) -> Iterator[IO[Any]]:
    """A stream whose content becomes `path` when the block ends without an error, and survives a
    power cut then.

    Until that moment `path` is what it was. The stream writes to a temporary file beside it, which
    is synced, renamed over `path`, and made permanent by syncing the folder.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with written(folder / "a.txt") as file:
    ...     _ = file.write("hello")
    >>> (folder / "a.txt").read_text(), [p.name for p in folder.iterdir()]
    ('hello', ['a.txt'])

    Args:
      path: the file; its folder is made where it is missing.
      binary: whether the stream takes bytes; otherwise it takes text and writes UTF-8 with lines
        ending in LF.

    Raises:
      OSError: it could not be written; what was there before still is, and no half file is left
        beside it.
    """
    path = local_path("the file to write", path)
    make_folder(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        encoding, newline = (None, None) if binary else ("utf-8", "\n")
        with open(handle, "wb" if binary else "w", encoding=encoding, newline=newline) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes the file private
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)  # half a file on a full disk is space that is missing
        raise
    sync(path.parent)


def write_json(path: StrPath, data: Any, *, indent: int | None = None) -> None:
    """Writes JSON as `written` does.

    Raises:
      ValueError: the data hold a number that is not finite; `path` is what it was.
      OSError: as of `written`.
    """
    text = json.dumps(data, indent=indent, allow_nan=False)
    with written(path) as file:
        file.write(text + "\n" * (indent is not None))


def write_lines(path: StrPath, rows: Iterable[Any]) -> None:
    """Writes JSON lines, one for each of `rows`, as `written` does."""
    with written(path) as file:
        file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def append_line(path: StrPath, row: Any) -> None:
    """Appends `row` as a line of JSON; it survives a power cut when this returns."""
    with appending(path) as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")
        flush(file)


def appending(path: StrPath) -> IO[str]:
    """Opens a text file to append lines to it, for a log that many lines are written to.

    The entry of a new file in its folder is on the disk when this returns; its lines are after
    `flush`.
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
    """Makes an empty file where none is, so that it survives a power cut."""
    if not os.path.lexists(path):
        appending(path).close()


def rename(source: StrPath, target: StrPath) -> None:
    """Renames a file or a folder; the new name, and that the old one is gone, survive a power
    cut.
    """
    source, target = Path(source), Path(target)
    source.rename(target)
    sync(target.parent)
    if source.parent != target.parent:
        sync(source.parent)


def make_folder(folder: StrPath) -> Path:
    """Makes a folder and those above it where they are missing, so that they survive a power
    cut.
    """
    folder = local_path("the folder to write", folder)
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        sync(made.parent)
    return folder


def sync(path: StrPath) -> None:
    """Waits until a file's content, or a folder's list of entries, is on the disk.

    A system or file system that cannot sync a folder (Windows, some network mounts) is left alone.
    """
    folder = os.path.isdir(path)
    if folder and os.name == "nt":
        return
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        if folder:  # it may be written to and not be read; then its entries cannot be waited for
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
    """Waits until all files and folders below `folder`, and itself, are on the disk: what libraries
    wrote there.
    """
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not os.path.islink(os.path.join(root, name)):
                sync(os.path.join(root, name))
        sync(root)


def put_folder(temporary: StrPath, folder: StrPath) -> None:
    """Puts a finished folder in the place of another: after a power cut one of the two is there,
    whole.

    The old one is ``<folder>.old`` between the two renames; `settle_folder` brings it back after a
    crash there.

    Args:
      temporary: the finished folder, on the same file system.
      folder: its final path.
    """
    temporary, folder = Path(temporary), Path(folder)
    old = folder.with_name(folder.name + ".old")
    sync_tree(temporary)
    if os.path.lexists(folder):
        remove(old)
        rename(folder, old)
    rename(temporary, folder)
    remove(old)


def settle_folder(folder: StrPath) -> None:
    """Ends what a crash in `put_folder` left: brings the old folder back where no new one is,
    removes leftovers.
    """
    folder = Path(folder)
    temporary, old = (folder.with_name(folder.name + end) for end in (".tmp", ".old"))
    if os.path.lexists(old) and not os.path.lexists(folder):
        rename(old, folder)
    remove(temporary, old)


def remove(*paths: StrPath) -> None:
    """Removes files, links and whole folders; what is not there is fine. Of a link only the link
    goes.
    """
    for path in map(Path, paths):
        if path.is_symlink() or path.is_file():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)


def remove_unfinished(folder: StrPath) -> None:
    """Removes what `written` left beside its files in `folder` where the process was killed in the
    middle of it.
    """
    for path in Path(folder).glob(".*.tmp"):
        if _UNFINISHED.fullmatch(path.name):
            remove(path)


_UNFINISHED = re.compile(r"^\..+\.[a-z0-9_]{8}\.tmp")
"""What `written` calls a file until it is whole: ``.sft.json.k3xw_9ab.tmp``."""


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# -------------------------------------------------------------------------------------------- paths

_ADDRESS = re.compile(r"^(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/(?P<rest>.*)", re.DOTALL)
"""``gs://bucket/run``, and ``gs:/bucket/run``, which `Path` makes of it. A drive (``C:/runs``) has
one letter."""


def local_path(what: str, value: StrPath) -> Path:
    """`value` as a path, if it is one: an address such as ``gs://bucket/run`` is refused.

    >>> local_path("workdir", "runs/sft").as_posix()
    'runs/sft'
    >>> local_path("workdir", "gs://bucket/run")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: workdir='gs://bucket/run' is an address (gs://), and only paths on local or network
      disks are ...

    Args:
      what: the flag, config key or use of the path, for the message.
      value: what was given for it.

    Raises:
      ValueError: it is an address; the message holds no user name, password or query of it.
    """
    text = os.fspath(value)
    found = _ADDRESS.match(text.lstrip())
    if found is None and "://" not in text:
        return Path(value)
    scheme = found["scheme"] if found else text.partition("://")[0].rpartition(":")[2]
    rest = re.split(r"[?#]", (found["rest"] if found else text.partition("://")[2]).lstrip("/"))[0]
    shown = f"{scheme}://{rest.rpartition('@')[2]}"[:200]
    raise ValueError(
        f"{what}={shown!r} is an address ({scheme}://), and only paths on local or network disks "
        "are supported: "
        "mount it, or copy what is read from it; let runs write to a disk and copy them there at "
        "their end"
    )


def links_out_of(folder: StrPath) -> Iterator[Path]:
    """The links below `folder`, at any depth, that lead out of it: to another folder, a file
    elsewhere, or nowhere.

    A link that stays inside is fine, and so is one that leads in a circle. Links are never
    followed, so this ends, and it looks at no file's content: a folder of ten thousand entries
    takes a few hundredths of a second.
    """
    root = os.path.realpath(folder)
    inside = os.path.join(root, "")
    for place, folders, names in os.walk(root, followlinks=False):
        for name in (*folders, *names):
            path = os.path.join(place, name)
            if os.path.islink(path) and not (os.path.realpath(path) + os.sep).startswith(inside):
                yield Path(folder) / os.path.relpath(path, root)


# ------------------------------------------------------------------------------------ what is there


def sha256(path: StrPath) -> str:
    """sha256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(data: Any) -> str:
    """sha256 of JSON data, whatever the order of its keys.

    >>> json_digest({"a": 1, "b": 2}) == json_digest({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def contents(root: StrPath) -> dict[str, dict[str, Any]]:
    """Size and sha256 of a file, or of every file below a folder, by names relative to it (``""``
    for a file).

    Returns:
      ``{"sub/name": {"bytes": 12, "sha256": "..."}}``, sorted by name, without hidden temporary
      files (``.*.tmp``).

    Raises:
      OSError: nothing is there, or a link is: what it leads to is not ours and may change or go at
        any time.
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


def digest(path: Path) -> str:
    """sha256 of the files in a folder, or of one; of larger weights the size and 64 pieces."""
    digest, piece = hashlib.sha256(), 2**20
    inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if not path.exists():
        return "no such file"
    for file in inside:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}\n".encode())
        whole = size <= 64 * piece or file.suffix not in (".safetensors", ".gguf", ".bin")
        offsets = range(0, size, piece) if whole else [(size - piece) * i // 63 for i in range(64)]
        with file.open("rb") as f:
            for offset in offsets:
                f.seek(offset)
                digest.update(f.read(piece))
    return digest.hexdigest()[:16]


def _content(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


# ------------------------------------------------------------------------------------------ reading

MEBIBYTE = 2**20

LIMITS: Mapping[str, int] = {
    "config.json": MEBIBYTE,
    "generation_config.json": MEBIBYTE,
    "tokenizer.json": 256 * MEBIBYTE,
    "tokenizer_config.json": 16 * MEBIBYTE,
    "special_tokens_map.json": 16 * MEBIBYTE,
    "added_tokens.json": 16 * MEBIBYTE,
    "chat_template.jinja": MEBIBYTE,
    "model.safetensors.index.json": 64 * MEBIBYTE,
}
"""Most bytes of the files of a model folder; the largest in use have a tenth of it."""

OTHER_LIMIT = 64 * MEBIBYTE
"""Most bytes of any other JSON file."""

NESTING = 64
"""Most lists and objects in each other in a JSON file."""

PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""What a name found in a file must look like before it may name anything."""


def check_file(file: str | os.PathLike[str], *, limit: int | None = None) -> Path:
    """`file`, if it is a regular file of its folder, not larger than `limit` bytes.

    A link may lead to another place in the folder, or to where the Hugging Face cache keeps what
    its snapshot folders link to (``../../blobs``); nowhere else, so that a model folder cannot hand
    in a file of its reader's machine.

    Args:
      file: its path.
      limit: most bytes; None looks its name up in `LIMITS`, and knows no limit for other names.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is a folder, a pipe or a device, leads out of its folder, or is too large.
    """
    file = Path(file)
    real, folder = file.resolve(), file.parent.resolve()
    if not real.exists():
        raise FileNotFoundError(f"there is no file {file}")
    if not real.is_file():
        raise ValueError(f"{file} is not a regular file: put a plain file there")
    blobs = folder.parent.parent / "blobs"
    if not (
        real.is_relative_to(folder)
        or (folder.parent.name == "snapshots" and real.is_relative_to(blobs))
    ):
        raise ValueError(
            f"{file} is a link out of its folder, to {real}: copy that file there if it belongs to "
            "it"
        )
    most = LIMITS.get(file.name) if limit is None else limit
    size = real.stat().st_size
    if most is not None and size > most:
        raise ValueError(
            f"{file} has {size:,} bytes, more than the limit of {most:,}: it is not what its name "
            "says"
        )
    return file


def read_json(file: str | os.PathLike[str], *, limit: int | None = None) -> Any:
    """The content of a JSON file that somebody else wrote.

    Args:
      file: its path; it has to pass `check_file`.
      limit: most bytes; None takes that of its name, or `OTHER_LIMIT`.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is no JSON in UTF-8, gives a key twice, or is nested deeper than `NESTING`.
    """
    file = Path(file)
    check_file(file, limit=LIMITS.get(file.name, OTHER_LIMIT) if limit is None else limit)
    return parse_json(file.read_bytes(), str(file))


def parse_json(data: bytes, where: str) -> Any:
    """JSON in UTF-8, each key once, nested no deeper than `NESTING`.

    >>> parse_json(b'{"a": 1, "a": 2}', "x.json")
    Traceback (most recent call last):
    ValueError: x.json is corrupt (the key 'a' is given twice): copy it again

    Raises:
      ValueError: it is not; the message begins with `where`.
    """
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=_each_key_once)
        if is_nested_deeper(found, NESTING):
            raise RecursionError
    except RecursionError:
        raise ValueError(
            f"{where} is corrupt (nested deeper than the limit of {NESTING}): copy it again"
        ) from None
    except (
        ValueError
    ) as error:  # UnicodeDecodeError, JSONDecodeError, too many digits, a key given twice
        raise ValueError(f"{where} is corrupt ({str(error)[:200]}): copy it again") from None
    return found


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key {repeated_key(pairs)[:60]!r} is given twice")
    return found


def repeated_key(pairs: Sequence[tuple[str, Any]]) -> str:
    """The first key of a JSON object that is given more than once; there has to be one."""
    counts = collections.Counter(key for key, _ in pairs)
    return next(key for key, n in counts.items() if n > 1)


def is_nested_deeper(value: Any, most: int) -> bool:
    """Whether lists and objects are nested more than `most` deep inside the outermost."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(most + 1):
        inner = (item for box in level for item in (box.values() if isinstance(box, dict) else box))
        level = [item for item in inner if isinstance(item, dict | list)]
    return bool(level)


def check_tokenizer(folder: str | os.PathLike[str]) -> Path:
    """The ``tokenizer.json`` of a folder, after a look at every file that the tokenizer library
    would read there.

    Raises:
      FileNotFoundError: there is no tokenizer.json.
      ValueError: a file is no regular one, too large or no JSON object, or a chat template has a
        name that is no name.
    """
    folder = Path(folder)
    check_file(folder / "tokenizer.json")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if not (folder / name).exists():
            continue
        content = read_json(folder / name)
        if not isinstance(content, dict):
            raise ValueError(f"{folder / name} holds no object: copy it again")
        templates = content.get("chat_template") if name == "tokenizer_config.json" else None
        if isinstance(templates, list):
            for entry in templates:
                check_template_name(
                    entry.get("name") if isinstance(entry, dict) else entry, str(folder / name)
                )
    for file in (
        folder / "chat_template.jinja",
        *folder.glob("*_chat_templates/*"),
        *folder.glob("chat_templates/*"),
    ):
        if file.exists() or file.is_symlink():
            check_file(file, limit=LIMITS["chat_template.jinja"])
    return folder / "tokenizer.json"


def check_template_name(name: Any, where: str) -> None:
    """Refuses a chat template whose name could not be the name of a file: saving a tokenizer makes
    it one.

    Raises:
      ValueError: it could not.
    """
    if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
        raise ValueError(
            f"{where} names a chat template {str(name)[:80]!r}: names are letters, digits, '.', "
            "'_', '-'"
        )


# --------------------------------------------------------------------------------------- GGUF files

_GGUF_SCALARS = dict(zip(range(13), (1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8), strict=True))
"""Type of a GGUF value -> its bytes; 8 is a string, 9 an array."""
_GGUF_STRING, _GGUF_ARRAY = 8, 9
_GGUF_ENTRIES = 10**6
"""Most tensors, and most fields, of a GGUF file."""


def check_gguf(path: Path) -> None:
    """Walks the header of a GGUF file, in which no count and no length may go beyond the file.

    The reader of the gguf package believes them: an array of 2**60 entries keeps it busy until
    memory ends.

    Raises:
      ValueError: one does, or the file is no GGUF file.
    """
    check_file(path)
    with path.open("rb") as stream:
        header = _GGUFHeader(stream, path)
        magic, version = header.take(4), header.number(4)
        tensors, fields = header.number(8), header.number(8)
        if magic != b"GGUF" or version not in (2, 3):
            header.refuse(f"it begins with {magic!r} and version {version}")
        if max(tensors, fields) > _GGUF_ENTRIES:
            header.refuse(
                f"{tensors:,} tensors and {fields:,} fields, the limit is {_GGUF_ENTRIES:,}"
            )
        for _ in range(fields):
            header.string()
            header.value(header.number(4))
        for _ in range(tensors):
            header.string()
            dimensions = header.number(4)
            if dimensions > 4:
                header.refuse(f"a tensor of {dimensions} dimensions, the limit is 4")
            if math.prod(header.number(8) for _ in range(dimensions)) > 2**48:
                header.refuse("a tensor of more than 2**48 numbers")
            header.take(12)


class _GGUFHeader:
    """A cursor that refuses to leave its file."""

    def __init__(self, stream: Any, path: Path):
        self._stream, self._path, self._left = stream, path, path.stat().st_size

    def refuse(self, what: str) -> NoReturn:
        raise ValueError(f"{self._path} is corrupt ({what}): copy it again")

    def claim(self, size: int) -> int:
        if size > self._left:
            self.refuse(f"a length of {size:,} bytes where {self._left:,} are left")
        self._left -= size
        return size

    def take(self, size: int) -> bytes:
        return self._stream.read(self.claim(size))

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def skip(self, size: int) -> None:
        self._stream.seek(self.claim(size), 1)

    def string(self) -> None:
        self.skip(self.number(8))

    def value(self, kind: int, depth: int = 0) -> None:
        if kind not in _GGUF_SCALARS or depth > 2:
            self.refuse(f"a value of the type {kind} inside {depth} arrays")
        if kind == _GGUF_STRING:
            return self.string()
        if kind != _GGUF_ARRAY:
            return self.skip(_GGUF_SCALARS[kind])
        kind, count = self.number(4), self.number(8)
        if kind not in (_GGUF_STRING, _GGUF_ARRAY):
            return self.skip(count * _GGUF_SCALARS.get(kind, 1))
        if count * 8 > self._left:
            self.refuse(f"an array of {count:,} entries where {self._left:,} bytes are left")
        for _ in range(count):
            self.value(kind, depth + 1)
