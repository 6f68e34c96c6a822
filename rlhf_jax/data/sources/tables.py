"""Reads the rows of a table on disk: JSON lines, a JSON list, CSV, TSV, parquet, arrow, or folders.

Nothing is unpickled, and sizes are bounded. A row is located by file:line, or by file:row counted
from 1 where rows are not lines (a JSON list, parquet, arrow).
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.data import schema
from rlhf_jax.data.schema import RowError, read_bytes
from rlhf_jax.data.sources.hub import first_line
from rlhf_jax.run.files import local_path
from rlhf_jax.run.untrusted import read_json


class Located(NamedTuple):
    """A row of a file.

    Attributes:
      place: file:line.
      values: its columns, or its error.
      cells: whether all values of the file are texts.
    """

    place: str
    values: dict[str, Any] | RowError
    cells: bool = False


def rows(path: Path, split: str | None = None) -> Iterator[Located]:
    """The rows of all files of a table, in order.

    Args:
      path: a file, or a folder of `Dataset.save_to_disk`, `DatasetDict.save_to_disk` or shards.
      split: which split, where there are several; None = the only one.

    Raises:
      ValueError: there is nothing to read, a file is damaged, or a shard or pyarrow is missing.
    """
    for file in table_files(path, split):
        yield from _rows_of(file)


def _rows_of(file: Path) -> Iterator[Located]:
    kind = file.name.lower().removesuffix(".gz").rpartition(".")[2]
    if kind in ("parquet", "arrow"):
        numbered = enumerate((row for batch in _batches(file) for row in batch), start=1)
        yield from (Located(f"{file}:{number}", row) for number, row in numbered)
    elif kind in _SEPARATORS:
        yield from _cells(file, _SEPARATORS[kind])
    else:
        yield from _json(file)


def _json(file: Path) -> Iterator[Located]:
    """Rows of JSON lines, or of one list; the content decides, as both may be named ``.json``."""
    listed = schema.json_list(file)
    if listed is not None:
        yield from (Located(f"{file}:{number}", row) for number, row in enumerate(listed, start=1))
        return
    found = list(schema.json_rows(file))
    # The first line of an object that is printed over several lines is no JSON by itself.
    if (
        len(found) > 1
        and isinstance(found[0][1], RowError)
        and found[0][1].reason == "malformed JSON"
    ):
        _refuse_one_object(file)
    yield from (Located(f"{file}:{line}", row) for line, row in found)


def _refuse_one_object(file: Path) -> None:
    """Raise where the file is one JSON object over several lines instead of a list of rows."""
    try:
        whole = schema.json_value(file)
    except ValueError:
        return
    if isinstance(whole, dict):
        raise ValueError(
            f"{file} is one JSON object (with {', '.join(list(whole)[:6])}), and not a row a line: "
            "export the list of rows itself (in pandas to_json(orient='records', lines=True))"
        )


# ----------------------------------------------------------------------------------------- CSV, TSV

_SEPARATORS = {"csv": ",", "tsv": "\t", "tab": "\t"}


def _cells(file: Path, separator: str) -> Iterator[Located]:
    try:
        text = read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: byte {error.start} is not UTF-8: save the file as UTF-8"
        ) from None
    # newline="" leaves the line ends inside a quoted cell as they are.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    # The limit is one of the whole module, so it is set back below.
    limit = csv.field_size_limit(schema.LINE_LIMIT)
    try:
        header = _header(file, next(reader, []), separator)
        # A quoted cell may span lines, and a row is named by the first of its lines.
        start = reader.line_num + 1
        for cells in reader:
            # A spreadsheet writes empty rows as separators alone.
            if any(cell.strip() for cell in cells):
                yield Located(f"{file}:{start}", _record(header, cells), True)
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{file}:{reader.line_num}: {error}: quote cells as Excel and pandas do, and save again"
        ) from None
    finally:
        csv.field_size_limit(limit)


def _header(file: Path, names: list[str], separator: str) -> list[str]:
    names = [name.strip().lstrip("\ufeff") for name in names]
    # A spreadsheet may write empty columns after the last one with a name.
    while names.count("") > 1 and not names[-1]:
        names.pop()
    other = next(
        (sign for sign in (";", "\t", ",") if sign != separator and sign in "".join(names)), None
    )
    if len(names) == 1 and other:
        raise ValueError(
            f"{file}:1: the columns are separated by {other!r} and not by {separator!r}: save it "
            "again"
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if not names or twice is not None:
        what = f"names the column {twice!r} twice" if names else "is empty"
        raise ValueError(f"{file}:1: the first line {what}: it must name each column once")
    return names


def _record(header: list[str], cells: list[str]) -> dict[str, Any] | RowError:
    # A spreadsheet may write empty cells beyond the last column.
    if not any(cell.strip() for cell in cells[len(header) :]):
        cells = cells[: len(header)]
    if len(cells) != len(header):
        return RowError(
            "uneven row",
            f"{len(cells)} cells where the first line names {len(header)} columns: quote cells "
            "that hold the separator or a line end",
        )
    return dict(zip(header, cells, strict=True))


# --------------------------------------------------------------------------------- files of a table

_TABLES = ("*.parquet", "*.arrow", "*.jsonl", "*.jsonl.gz")
"""The files to look for in a folder, which may also have others, such as dataset_info.json."""
_FILES = (
    *_TABLES,
    "*.json",
    "*.json.gz",
    "*.csv",
    "*.csv.gz",
    "*.tsv",
    "*.tsv.gz",
    "*.tab",
    "*.ndjson",
)
_ONLY_ALONE = ("*.csv", "*.tsv", "*.json", "*.csv.gz", "*.tsv.gz", "*.json.gz")
_NOT_DATA = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "config.json",
)
_SHARD = re.compile(r"(?P<table>.+?)(?:-(?P<place>\d{5})-of-(?P<count>\d{5})(?:-[0-9a-f]{16})?)?")
"""train, train-00000-of-00002, NAME-train-00000-of-00002, train-00000-of-00002-0123456789abcdef;
without the suffix."""
# Arrow's stream format ends with a continuation mark and a length of 0.
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def table_files(path: Path, split: str | None) -> list[Path]:
    """The files of a table, in order.

    Raises:
      ValueError: there is none, one is missing, or several tables could be meant.
    """
    path = local_path("the data", path)
    if path.is_file():
        if not any(
            path.match(pattern) or Path(path.name.lower()).match(pattern) for pattern in _FILES
        ):
            raise ValueError(f"{path} is none of {', '.join(_FILES)}: convert it to one of these")
        if split is not None:
            raise ValueError(f"{path} is one file: leave split={split!r} out, or pass its folder")
        return [path]
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a pipe or a device: save it to a file first and pass that")
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: check the path")
    if (path / "dataset_dict.json").is_file():
        names = sorted(f.parent.name for f in path.glob("*/state.json"))
        return _saved_files(path / _choose(path, names, split))
    if (path / "state.json").is_file():
        if split is not None:
            raise ValueError(f"{path} holds one data set without splits: leave split={split!r} out")
        return _saved_files(path)
    return _shards(path, split)


def _choose(path: Path, names: Sequence[str], split: str | None) -> str:
    if split is None and len(names) == 1:
        return names[0]
    if split is None or split not in names:
        raise ValueError(
            f"split={split!r} of {path}: choose one of {', '.join(names) or '(none found)'}"
        )
    return split


def _saved_files(folder: Path) -> list[Path]:
    """The arrow files of `Dataset.save_to_disk`, in the order of its state.json."""
    try:
        state = read_json(folder / "state.json")
        names = [str(file["filename"]) for file in state["_data_files"]]
        moved = bool(state.get("_indices_data_files"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / 'state.json'} is not as save_to_disk writes it ({error!r}): save again"
        ) from None
    if moved:
        raise ValueError(
            f"{folder} was saved with an index file: save it again after flatten_indices()"
        )
    # A name is looked up in the folder, never joined to it: it could point anywhere.
    files = {file.name: file for file in folder.iterdir()}
    missing = [name for name in names if name not in files]
    if missing or not names:
        raise ValueError(
            f"{folder} lacks {missing or 'data files'}, which its state.json names: copy the "
            "folder again"
        )
    return [files[name] for name in names]


def _shards(root: Path, split: str | None) -> list[Path]:
    groups: dict[str, list[tuple[Path, re.Match[str]]]] = {}
    for file in _found(root):
        match = _SHARD.fullmatch(
            re.sub(r"\.(parquet|arrow|jsonl|json|csv|tsv)(\.gz)?$", "", file.name)
        )
        hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
        if match is None or hidden or match["table"].startswith(("cache-", "tmp")):
            continue  # what `datasets` and the hub client leave behind
        name = match["table"].rsplit("-", 1)[-1]
        name = file.parent.name if name.isdigit() else name  # train/0000.parquet
        groups.setdefault(name, []).append((file, match))
    if not groups:
        raise ValueError(
            f"{root} holds no {' or '.join(_TABLES)}: pass the file or the folder that does"
        )
    chosen = groups[_choose(root, sorted(groups), split)]
    folders = sorted({str(file.parent) for file, _ in chosen})
    if len(folders) > 1:
        raise ValueError(f"{root} holds several data sets: pass one of {', '.join(folders)}")
    _check_shards(chosen)
    return [file for file, _ in chosen]


def _found(root: Path) -> list[Path]:
    """The files of a folder that may be shards.

    JSON, CSV and TSV files count only where there is nothing else.
    """
    # At any depth, as a snapshot from the hub keeps the folders of its data set.
    found = sorted(f for pattern in _TABLES for f in root.rglob(pattern))
    others = sorted(
        f for pattern in _ONLY_ALONE for f in root.rglob(pattern) if f.name not in _NOT_DATA
    )
    return found or others


def _check_shards(chosen: Sequence[tuple[Path, re.Match[str]]]) -> None:
    """Raise unless each index of ``-00000-of-00002`` occurs exactly once."""
    places = [(int(match["place"]), int(match["count"])) for _, match in chosen if match["count"]]
    if not places and len({match["table"] for _, match in chosen}) == len(chosen):
        return
    counts = {count for _, count in places}
    if (
        len(counts) != 1
        or len(places) != len(chosen)
        or sorted(p for p, _ in places) != list(range(max(counts)))
    ):
        names = ", ".join(file.name for file, _ in chosen[:4])
        raise ValueError(
            f"{chosen[0][0].parent}: {names} .. are not the shards of one table: copy the missing "
            "ones"
        )


def _batches(path: Path) -> Iterator[list[dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ValueError(f'reading {path} needs pyarrow: pip install "rlhf_jax[data]"') from None
    try:
        if path.suffix == ".parquet":
            with pyarrow.parquet.ParquetFile(path) as table:
                # In batches, so that the columns of a large file are never in memory at once as
                # Python objects.
                for batch in table.iter_batches(batch_size=1024):
                    yield batch.to_pylist()
            return
        with pyarrow.memory_map(str(path)) as file:
            for batch in _record_batches(file, pyarrow):
                yield batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} cannot be read ({first_line(error)}): copy or download it again"
        ) from None


def _record_batches(file: Any, pyarrow: Any) -> Iterator[Any]:
    """Batches of arrow's stream format, which `datasets` writes, or of its file format."""
    if file.read(6) == b"ARROW1":
        reader = pyarrow.ipc.open_file(file)
        yield from (reader.get_batch(k) for k in range(reader.num_record_batches))
        return
    # A stream that is truncated between two batches would be read as a shorter table.
    file.seek(max(file.size() - len(_END_OF_STREAM), 0))
    if file.read() != _END_OF_STREAM:
        raise OSError("it has no end mark, so it is cut off")
    file.seek(0)
    yield from pyarrow.ipc.open_stream(file)
