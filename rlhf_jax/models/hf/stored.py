"""Tensors in files that are read by windows.

A window is a range of indices for each axis. Reading by windows keeps the memory beside the
parameters to a few blocks of `BLOCK` bytes, whatever the size of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import numpy as np

from rlhf_jax.models.config import DecoderConfig

BLOCK = 2**22
"""Bytes that are read or written at once."""


Window = tuple[slice, ...]
"""A start and a stop for each axis; neither is None."""


@runtime_checkable
class Stored(Protocol):
    """A tensor in a file, read by windows. A numpy array is one too."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As the file has it."""
        ...

    def __getitem__(self, window: Window, /) -> np.ndarray:
        """Reads a window."""
        ...


Read = Callable[[str], Stored]
"""Name of a tensor -> the tensor; raises ValueError if it is missing."""


def blocks(rows: int, row_size: int) -> Iterator[slice]:
    """Cut rows into blocks of about `BLOCK` bytes.

    Args:
      rows: number of rows.
      row_size: bytes of a whole row, because reading part of a row from a file reads all of it.
    """
    step = max(1, BLOCK // max(1, row_size))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def whole(tensor: Stored) -> np.ndarray:
    """All of a tensor, in memory."""
    return tensor[tuple(slice(0, size) for size in tensor.shape)]


def checked(name: str, value: Stored, shape: tuple[int, ...]) -> Stored:
    """`value` itself.

    Raises:
      ValueError: its shape is not the one that follows from config.json.
    """
    if tuple(value.shape) != shape:
        raise ValueError(
            f"tensor {name!r} has the shape {value.shape}, config.json asks for {shape}: not its "
            "weights"
        )
    return value


class _Columns:
    """Some columns of a tensor."""

    def __init__(self, whole: Stored, start: int, width: int):
        self._whole, self._start = whole, start
        self.shape = (*whole.shape[:-1], width)

    def __getitem__(self, window: Window, /) -> np.ndarray:
        *others, columns = window
        return self._whole[
            (*others, slice(self._start + columns.start, self._start + columns.stop))
        ]


def split_c_attn(read: Read, config: DecoderConfig) -> Read:
    """A reader that splits GPT-2's matrix ``c_attn [D, 3D]`` into query, key and value."""

    def split(name: str) -> Stored:
        for index, part in enumerate(("query", "key", "value")):
            if f".attn.{part}." in name:
                joined = read(name.replace(f".attn.{part}.", ".attn.c_attn."))
                return _Columns(joined, index * config.width, config.width)
        return read(name)

    return split


def _half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a query or key matrix (out, in).

    GGUF and llama2.c files pair the neighbouring rows (0, 1), (2, 3), .. for rotation; this decoder
    pairs row i of a head with row i + head_dim / 2.
    """
    # ``[heads, pair, member, in]`` to ``[heads, member, pair, in]``.
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


class _HalfSplit:
    """A query or key matrix in the rotary layout of this decoder; it is read when it is indexed."""

    def __init__(self, tensor: Stored, heads: int):
        self._tensor, self._heads = tensor, heads
        self.shape = tuple(tensor.shape)

    def __getitem__(self, window: Window, /) -> np.ndarray:
        return _half_split(whole(self._tensor), self._heads)[window]


def unpermuted(read: Read, config: DecoderConfig) -> Read:
    """A reader that reorders queries and keys to the rotary layout of this decoder."""
    heads = {"attn_q": config.heads, "attn_k": config.kv_heads}

    def unpermute(name: str) -> Stored:
        part = next((part for part in heads if f".{part}." in name), None)
        # Rows are interleaved within a head, so a range of them is no range in the file: all are
        # read.
        return read(name) if part is None else _HalfSplit(read(name), heads[part])

    return unpermute
