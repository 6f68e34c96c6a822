"""Untrusted files: model folders, tokenizers and checkpoints that come from other people.

Their content is parsed with limits and never executed, and a name found in it never becomes a path.
Each refusal is a ValueError with the file, the value and the limit.
"""

from __future__ import annotations

import collections
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

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
"""The maximal bytes of files in a model folder; the largest in use have a tenth of it."""

OTHER_LIMIT = 64 * MEBIBYTE
"""The maximal bytes of any other JSON file."""

NESTING = 64
"""The maximal nesting depth of lists and objects in a JSON file."""

PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""The form that a name found in a file must have before it is used as a name."""


def check_file(file: str | os.PathLike[str], *, limit: int | None = None) -> Path:
    """Returns `file` if it is a regular file of its folder with at most `limit` bytes.

    A symbolic link may point into the same folder, or to the ``../../blobs`` folder to which the
    snapshot folders of a Hugging Face cache link. Any other target is refused, so that a model
    folder cannot make us read a private file of this machine.

    Args:
      file: its path.
      limit: the maximal bytes; None looks the name up in `LIMITS`, and other names have no limit.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is a folder, a pipe or a device, leads out of its folder, or is too large.
    """
    file = Path(file)
    # Resolved, because the checks below are about the file that would really be read.
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
            f"{file} is a link out of its folder, to {real}: "
            "copy that file there if it belongs to it"
        )
    most = LIMITS.get(file.name) if limit is None else limit
    size = real.stat().st_size
    if most is not None and size > most:
        raise ValueError(
            f"{file} has {size:,} bytes, more than the limit of {most:,}: "
            "it is not what its name says"
        )
    return file


def read_json(file: str | os.PathLike[str], *, limit: int | None = None) -> Any:
    """The content of an untrusted JSON file.

    Args:
      file: its path; it has to pass `check_file`.
      limit: the maximal bytes; None takes the limit for its name, or `OTHER_LIMIT`.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is not JSON in UTF-8, repeats a key, or is nested deeper than `NESTING`.
    """
    file = Path(file)
    check_file(file, limit=LIMITS.get(file.name, OTHER_LIMIT) if limit is None else limit)
    return parse_json(file.read_bytes(), str(file))


def parse_json(data: bytes, where: str) -> Any:
    """Parses JSON in UTF-8 without repeated keys and nested no deeper than `NESTING`.

    >>> parse_json(b'{"a": 1, "a": 2}', "x.json")
    Traceback (most recent call last):
    ValueError: x.json is corrupt (the key 'a' is given twice): copy it again

    Raises:
      ValueError: it is anything else; the message begins with `where`.
    """
    # The parser itself raises a RecursionError where nesting exceeds the interpreter's limit.
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=_each_key_once)
        if is_nested_deeper(found, NESTING):
            raise RecursionError
    except RecursionError:
        raise ValueError(
            f"{where} is corrupt (nested deeper than the limit of {NESTING}): copy it again"
        ) from None
    # This includes UnicodeDecodeError, JSONDecodeError, too many digits and a repeated key.
    except ValueError as error:
        raise ValueError(f"{where} is corrupt ({str(error)[:200]}): copy it again") from None
    return found


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key {repeated_key(pairs)[:60]!r} is given twice")
    return found


def repeated_key(pairs: Sequence[tuple[str, Any]]) -> str:
    """The first repeated key of a JSON object, which must have one."""
    counts = collections.Counter(key for key, _ in pairs)
    return next(key for key, n in counts.items() if n > 1)


def is_nested_deeper(value: Any, most: int) -> bool:
    """Whether lists and objects are nested more than `most` levels inside the outermost."""
    # Level by level rather than recursively: the depth of the call stack must not depend on data.
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(most + 1):
        inner = (item for box in level for item in (box.values() if isinstance(box, dict) else box))
        level = [item for item in inner if isinstance(item, dict | list)]
    return bool(level)


def check_tokenizer(folder: str | os.PathLike[str]) -> Path:
    """Checks every file that the tokenizer library would read in a folder.

    Returns:
      The path of its ``tokenizer.json``.

    Raises:
      FileNotFoundError: there is no tokenizer.json.
      ValueError: a file is not a regular file, too large or not a JSON object, or the name of a
        chat template is not allowed.
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
    """Refuses the name of a chat template that is not a plain file name.

    Saving a tokenizer writes each template to a file of that name, so ``../x`` would escape.

    Raises:
      ValueError: the name is not a `PLAIN_NAME`.
    """
    if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
        raise ValueError(
            f"{where} names a chat template {str(name)[:80]!r}: "
            "names are letters, digits, '.', '_', '-'"
        )


# --------------------------------------------------------------------------------------- GGUF files

# In the order of the format: integers of 8, 16 and 32 bits, float32, bool, string, array, integers
# of 64 bits, float64.
_GGUF_SCALARS = dict(zip(range(13), (1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8), strict=True))
"""Type of a GGUF value -> its size in bytes; strings (8) and arrays (9) have no fixed size."""
_GGUF_STRING, _GGUF_ARRAY = 8, 9
_GGUF_ENTRIES = 10**6
"""The maximal number of tensors, and of fields, in a GGUF file."""


def check_gguf(path: Path) -> None:
    """Walks the header of a GGUF file and refuses counts and lengths that exceed the file.

    The reader of the gguf package trusts them: for an array of 2**60 entries it runs until memory
    is exhausted.

    Raises:
      ValueError: a count or length is too large, or the file is not a GGUF file.
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
            # The number type (4 bytes) and the offset of the data (8 bytes).
            header.take(12)


class _GGUFHeader:
    """A cursor over the header that refuses to move beyond the end of the file."""

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
        if kind not in _GGUF_SCALARS:
            self.refuse(f"an array of the type {kind}")
        # Entries of a fixed size are skipped together.
        if kind not in (_GGUF_STRING, _GGUF_ARRAY):
            return self.skip(count * _GGUF_SCALARS[kind])
        # Each entry takes at least 8 bytes, for its length, so the file bounds the loop below.
        if count * 8 > self._left:
            self.refuse(f"an array of {count:,} entries where {self._left:,} bytes are left")
        for _ in range(count):
            self.value(kind, depth + 1)
