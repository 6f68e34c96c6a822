"""One safetensors file, read by windows and written block by block."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors

from rlhf_jax.models.hf.stored import Window, blocks
from rlhf_jax.run.files import written
from rlhf_jax.run.untrusted import check_file, parse_json

FLOATS = ("F64", "F32", "F16", "BF16")
"""The format's names of the types that are read; all others are for quantised weights, or for
tensors that are not weights."""


_HEADER_LIMIT = 100_000_000
"""Largest header of a safetensors file in bytes, the limit of the library."""


@dataclasses.dataclass(frozen=True)
class InFile:
    """A tensor of a safetensors file (`stored.Stored`).

    Attributes:
      file: the file that contains it.
      name: its name in the file.
      shape: its shape in the file.
      kind: the format's name of its type, such as "BF16".
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str

    def __getitem__(self, window: Window, /) -> np.ndarray:
        # Opened anew for each block: what was read of a mapped file counts as memory of this
        # process until it closes.
        with safetensors.safe_open(self.file, framework="numpy") as file:
            return file.get_slice(self.name)[window]


def tensors_of(file: Path) -> Iterator[InFile]:
    """The tensors of a safetensors file, from its header.

    Raises:
      ValueError: the file is corrupt.
    """
    _check_header(file)
    try:
        with safetensors.safe_open(file, framework="numpy") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            kinds = {
                name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()
            }
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{file} is corrupt ({error}): copy it again") from error
    for name, (kind, shape) in kinds.items():
        yield InFile(file, name, shape, kind)


def _check_header(file: Path) -> None:
    """Refuse headers that the library would accept: with a tensor twice, or nested too deeply."""
    check_file(file)
    with file.open("rb") as stream:
        # Read before the library does, with a limit: the length is from the file and may be any
        # number.
        length = int.from_bytes(stream.read(8), "little")
        if length > _HEADER_LIMIT:
            raise ValueError(
                f"{file} is corrupt (its header of {length:,} bytes is above the limit of "
                f"{_HEADER_LIMIT:,}): it is no safetensors file; copy it again"
            )
        header = parse_json(stream.read(length), str(file))
    if not isinstance(header, dict):
        raise ValueError(f"{file} is corrupt (its header is no object): copy it again")


class Outgoing(NamedTuple):
    """A tensor to be written.

    Attributes:
      shape: as the header has it.
      dtype: of the file.
      fetch: brings it to the host when its turn comes.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


_HEADER_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


def file_order(tensors: Mapping[str, Outgoing]) -> dict[str, Outgoing]:
    """Tensors in their order in a file: wider types first, which aligns each with its own width."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))


def write_file(file: Path, tensors: Mapping[str, Outgoing]) -> None:
    """Write a safetensors file block by block.

    The library's own writer needs all tensors in memory at once. The format: eight bytes of length,
    the header as JSON padded to a multiple of eight, then the tensors one after the other.

    Args:
      file: the file to write; it is written completely or not at all.
      tensors: name -> tensor; each is fetched when its turn comes.
    """
    # transformers 4 refuses a file that does not name the framework of its tensors.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    ordered = file_order(tensors)
    for name, tensor in ordered.items():
        start, end = end, end + tensor.size
        kind = _HEADER_TYPES[tensor.dtype.name]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    # Padding the JSON with spaces aligns the first tensor.
    text += b" " * (-len(text) % 8)
    with written(file, binary=True) as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for tensor in ordered.values():
            value = tensor.fetch()
            for block in blocks(len(value), value[:1].nbytes):
                # As bytes, because bfloat16 arrays have no buffer format.
                out.write(np.ascontiguousarray(value[block]).reshape(-1).view(np.uint8).data)
