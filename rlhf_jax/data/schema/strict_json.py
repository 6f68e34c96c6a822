"""Reads files of JSON strictly.

Duplicate keys, NaN, deep nesting, and lines or compressed files that would fill the memory are
errors, and so is everything else that Python's parser accepts beyond JSON. All text is UTF-8.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_jax.data import parsed
from rlhf_jax.data.schema.rules import NESTING, RowError, shown
from rlhf_jax.run.files import local_path
from rlhf_jax.run.untrusted import is_nested_deeper, repeated_key

LINE_LIMIT = 2**24
"""Most bytes of a line; a record of a hundred thousand words has about a million."""


UNPACKED_LIMIT = 2**26
"""Any .gz file may decompress to this many bytes, or to `UNPACKED_RATIO` times its size."""


UNPACKED_RATIO = 200
"""Text compresses by a factor of 3 to 20, one line repeated endlessly by a factor of 1,000.

A file above this limit is a decompression bomb.
"""


def json_rows(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """Each object of a file of JSON lines (or its error), with its line number."""
    for line, data in lines_of(path):
        try:
            yield line, json_object(data)
        except RowError as error:
            yield line, error


def json_list(path: str | os.PathLike[str]) -> list[dict[str, Any] | RowError] | None:
    """The rows of a file that is one JSON list, or the error of each.

    None where the file is not a list.

    Raises:
      ValueError: the list is truncated or not valid JSON; the message gives line and column.
    """
    # A byte order mark, as some editors and spreadsheets write it.
    data = read_bytes(path).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not data.startswith(b"["):
        return None
    try:
        rows = _ROW_BY_ROW.decode(data.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {error.start} is not UTF-8: save the file as UTF-8"
        ) from None
    except RecursionError:
        raise ValueError(
            f"{path}: the JSON is nested too deep: write a flat object a row"
        ) from None
    except RowError as error:
        raise ValueError(f"{path}: {error}") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a file of JSON lines, each of which is a list
            return None
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(
            f"{path}: the JSON list is damaged at {where} ({error.msg}): export it again"
        ) from None
    return [_checked_row(row) for row in rows]


def json_value(path: str | os.PathLike[str]) -> Any:
    """The file as one JSON value.

    Raises:
      ValueError: it is not one.
    """
    try:
        return _DECODER.decode(
            read_bytes(path).removeprefix(b"\xef\xbb\xbf").decode("utf-8").strip()
        )
    except RecursionError:
        raise ValueError(f"{path}: the JSON is nested too deep") from None


def first_rows(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file in order, to recognise its format.

    The iterator ends before the first line that is not an object.
    """
    try:
        for _, data in lines_of(path):
            yield json_object(data)
    except RowError:
        return


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The whole file, decompressed when its name ends in .gz.

    Raises:
      ValueError: it is missing or damaged, or the path is a URL (``gs://..``).
    """
    local_path("the file to read", path)
    if not os.path.isfile(path) and os.path.exists(path):
        # A pipe can be read only once and may never end, but a run reads its data again when it is
        # resumed.
        what = (
            "a folder: pass one file"
            if os.path.isdir(path)
            else "no regular file: save it to a file first"
        )
        raise ValueError(f"{path} is {what}")
    try:
        data = Path(path).read_bytes()
        # The fingerprint of a run is that of these very bytes; the file may change later.
        parsed.seen(path, data)
        return _unpacked(data, path) if str(path).endswith(".gz") else data
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: check the path") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}): copy or download it again") from error


def lines_of(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers from 1.

    Raises:
      ValueError: a line is too long, or as for `read_bytes`.
    """
    data = read_bytes(path).removeprefix(b"\xef\xbb\xbf")
    # Split at this byte alone: `splitlines` would also cut at characters inside JSON strings.
    for number, line in enumerate(data.split(b"\n"), start=1):
        if len(line) > LINE_LIMIT:
            raise ValueError(
                f"{path}:{number}: the line has {len(line):,} bytes, the limit is {LINE_LIMIT:,}: "
                "write a record a line"
            )
        if line.strip():
            yield number, line


def json_object(data: bytes) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
      RowError: it is not one, or not strict JSON.
    """
    try:
        row = _DECODER.decode(data.decode("utf-8"))
    # Raised by the hooks of the decoder; it is a ValueError, which is caught below.
    except RowError:
        raise
    except UnicodeDecodeError as error:
        raise RowError(
            "not UTF-8", f"byte {error.start} is not UTF-8: save the file as UTF-8"
        ) from None
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError as error:
        what = f"malformed JSON (character {error.pos}: {error.msg})"
        raise RowError("malformed JSON", f"{what}: write one JSON object a line") from None
    except ValueError:  # from Python's own limit on the digits of an integer
        what = "malformed JSON (an integer of more digits than Python reads)"
        raise RowError("number too long", f"{what}: write it as a string, or remove it") from None
    # Counting brackets is fast and spares nearly every row the walk of `_is_deep`.
    if data.count(b"[") + data.count(b"{") > NESTING and _is_deep(row):
        raise _too_deep()
    if not isinstance(row, dict):
        raise RowError(
            "not an object", f"expected a JSON object, got {type(row).__name__}: write {{...}}"
        )
    return row


def _checked_row(row: Any) -> dict[str, Any] | RowError:
    if not isinstance(row, dict):
        return RowError(
            "not an object", f"expected a JSON object, got {type(row).__name__}: write {{...}}"
        )
    try:
        _refuse_constants(row)
    except RowError as error:
        return error
    return _too_deep() if _is_deep(row) else row


def _refuse_constants(value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError("not a number", f"{value} is not JSON: use a finite number or null")
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _refuse_constants(inner)


def _unpacked(data: bytes, path: str | os.PathLike[str]) -> bytes:
    # A small file may unpack to any multiple of its size, as the result is small in any case.
    limit = max(UNPACKED_LIMIT, UNPACKED_RATIO * len(data))
    # One byte beyond the limit is enough to know that there is more, whatever the file claims.
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        found = file.read(limit + 1)
    if len(found) > limit:
        raise ValueError(
            f"{path} unpacks to more than {UNPACKED_RATIO} times its {len(data):,} bytes (limit "
            f"{limit:,}): it is no ordinary text; unpack it yourself if you trust it"
        )
    return found


def _too_deep() -> RowError:
    return RowError("nested too deep", "the JSON is nested too deep: write one flat object a line")


def _is_deep(value: Any) -> bool:
    """Whether more than `NESTING` lists and objects are nested; Python's own limit varies."""
    # One less, because the function counts levels inside the outermost one.
    return is_nested_deeper(value, NESTING - 1)


def _reject_constant(name: str) -> Any:
    raise RowError("not a number", f"{name} is not JSON: use a finite number or null")


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = shown(repeated_key(pairs))
        raise RowError("duplicate key", f"field {twice} is given twice: keep one")
    return row


_DECODER = json.JSONDecoder(parse_constant=_reject_constant, object_pairs_hook=_reject_duplicates)


_ROW_BY_ROW = json.JSONDecoder(object_pairs_hook=_reject_duplicates)
"""Decodes a list of rows and accepts NaN, so that `_checked_row` can report it per row."""
