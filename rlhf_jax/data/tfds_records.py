"""Converts records to rows of TensorFlow Datasets and back.

Rows are plain features, so `tfds.data_source` reads them without this package.
"""

from __future__ import annotations

import functools
import hashlib
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import msgspec
import numpy as np

from rlhf_jax.data import schema
from rlhf_jax.data.sources.hub import first_line

try:
    import tensorflow_datasets as tfds
except ModuleNotFoundError as error:
    raise ValueError(f'TFDS builders need {error.name}: pip install "rlhf_jax[data]"') from None


_BATCH = 256
"""Rows that an iteration reads from disk at once."""


class TfdsRecords(Sequence[Any]):
    """Rows of a TFDS data source as records of `schema`, decoded on access.

    An instance is also a random-access data source for grain.
    """

    def __init__(self, source: Any, kind: type):
        self.source = source
        self.kind = kind

    def __len__(self) -> int:
        return len(self.source)

    @overload
    def __getitem__(self, index: typing.SupportsIndex) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return self._take(range(len(self))[index])
        # `range` turns negative indices into positions and raises an IndexError beyond the end.
        return self._take([range(len(self))[index]])[0]

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self), _BATCH):
            yield from self._take(range(start, min(start + _BATCH, len(self))))

    def _take(self, places: Sequence[int]) -> list[Any]:
        if not places:
            return []
        take = getattr(self.source, "__getitems__", None)
        try:
            rows = take(list(places)) if take else [self.source[place] for place in places]
        except Exception as error:  # array_record raises types of its own for damaged bytes
            why = f"{type(error).__name__}: {first_line(error)}"
            raise ValueError(
                f"rows {places[0]} to {places[-1]} of {self.source!r} cannot be read ({why}): "
                "remove the folder of the data set and build it again"
            ) from error
        return [record(row, self.kind) for row in rows]


def features(kind: type) -> tfds.features.FeaturesDict:
    """The TFDS features of a record, one per field.

    A prompt of several turns is stored in an additional feature, `messages`. Fields of variable
    length are sequences. None is stored as "", [] or -1, which are not valid values of any field.
    """
    text = tfds.features.Text()
    columns: dict[str, Any] = {}
    for name, (base, _) in _fields(kind).items():
        if name == "prompt":
            columns["messages"] = tfds.features.Sequence({"role": text, "content": text})
        columns[name] = {
            str: text,
            int: np.int32,
            tuple[str, ...]: tfds.features.Sequence(text),
            tuple[int, ...]: tfds.features.Sequence(np.int32),
            # Plain float features are stored with 32 bits; as bytes a float keeps all 64.
            tuple[float, ...]: tfds.features.Tensor(
                shape=(None,), dtype=np.float64, encoding="bytes"
            ),
        }[base]
    return tfds.features.FeaturesDict(columns)


def record(row: Mapping[str, Any], kind: type) -> Any:
    """The record of a TFDS row; a field that the row lacks, as in an older build, is None."""
    values = {name: _value(row[name], *form) for name, form in _fields(kind).items() if name in row}
    turns = row.get("messages", {}).get("role", [])
    if len(turns):
        contents = row["messages"]["content"]
        pairs = zip(turns, contents, strict=True)
        values["prompt"] = tuple(
            schema.Message(role.decode(), content.decode()) for role, content in pairs
        )
    return kind(**values)


def row_of(item: Any) -> dict[str, Any]:
    """A record as the row that TFDS stores; the reverse of `record`."""
    row: dict[str, Any] = {}
    for name, (base, _) in _fields(type(item)).items():
        value = getattr(item, name)
        if name == "prompt":
            turns = () if isinstance(value, str) else value
            row["messages"] = [msgspec.structs.asdict(turn) for turn in turns]
            # An empty prompt is no valid text, so it marks a prompt that is stored as messages.
            value = "" if turns else value
        absent = -1 if base is int else "" if base is str else ()
        value = absent if value is None else value
        row[name] = np.asarray(value, np.float64) if base == tuple[float, ...] else value
    return row


def _value(value: Any, base: Any, optional: bool) -> Any:
    if base is str:
        value = value.decode()
    elif base is int:
        value = None if value < 0 else int(value)
    else:
        item = {tuple[str, ...]: bytes.decode, tuple[int, ...]: int, tuple[float, ...]: float}[base]
        value = tuple(map(item, value))
    # A required field is never absent, so its empty value stands for itself.
    return None if optional and value in ("", ()) else value


@functools.cache
def _fields(kind: type) -> dict[str, tuple[Any, bool]]:
    """The type of each field without None, and whether it may be None.

    A `Conversation` counts as `str`, its first alternative.
    """
    hints = typing.get_type_hints(kind)
    fields = {}
    for name in kind.__struct_fields__:
        hint = hints[name]
        is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
        options = typing.get_args(hint) if is_union else (hint,)
        fields[name] = (options[0], types.NoneType in options)
    return fields


def digests_of(splits: Mapping[str, Iterable[Any]]) -> dict[str, str]:
    """The digest of each split (`digest_of`)."""
    return {split: digest_of(records) for split, records in splits.items()}


def digest_of(records: Iterable[Any]) -> str:
    """sha256 of records in order.

    Fields that are None are skipped, so that a new optional field changes no digest.
    """
    total = hashlib.sha256()
    for item in records:
        values = {
            name: value for name, value in msgspec.to_builtins(item).items() if value is not None
        }
        total.update(json.dumps(values, sort_keys=True).encode() + b"\n")
    return total.hexdigest()
