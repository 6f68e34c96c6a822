"""Batches as a pure function of (seed, step): nothing to save but one integer, nothing to lose on a restart."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import Int

Rows = TypeVar("Rows")
"""A struct of `rlhf_jax.types` (or a dict) whose arrays share their first axis: the rows."""


class Batches(Generic[Rows]):
    """An endless stream of batches, shuffled anew each epoch, addressed by step.

    The stream is the concatenation of one permutation of the rows per epoch, a function of (seed, epoch); batch
    `step` is its entries ``step * batch_size .. (step + 1) * batch_size - 1``. So every row comes once per epoch and
    no tail is dropped: a batch over the border holds the end of one epoch and the start of the next. Resuming at a
    step needs nothing but the step, and how many processes share the work changes nothing.

    >>> batches = Batches({"x": np.arange(5)}, batch_size=2, seed=0)
    >>> rows = np.concatenate([batches.at(step)["x"] for step in range(5)])
    >>> sorted(rows[:5]) == sorted(rows[5:]) == [0, 1, 2, 3, 4]
    True

    Args:
      rows: struct of numpy arrays with rows first.
      batch_size: rows of a batch, over all processes.
      seed: of the shuffling.
      process_index: which slice of the batch this process gets.
      process_count: number of processes.

    Raises:
      ValueError: there are no rows, the arrays differ in their number, or the batch does not divide.
    """

    def __init__(
        self, rows: Rows, *, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
    ) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.size = _row_count(rows)
        if batch_size < 1 or batch_size % process_count:
            raise ValueError(
                f"batch_size={batch_size} must be a positive multiple of the {process_count} processes: "
                f"choose {max(1, round(batch_size / process_count)) * process_count}"
            )
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index={process_index} must be 0 to {process_count - 1}")
        share = batch_size // process_count
        self._slice = slice(process_index * share, (process_index + 1) * share)
        self._permutations: dict[int, np.ndarray] = {}

    def at(self, step: int) -> Rows:
        """This process's rows of batch `step`."""
        index = self.indices(step)[self._slice]
        return _map(lambda x: np.asarray(x)[index], self.rows)

    def indices(self, step: int) -> Int[np.ndarray, " B"]:
        """Row numbers of the whole batch `step`: to name the rows of a step that went wrong."""
        if step < 0:
            raise ValueError(f"step={step} must be 0 or more")
        place = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, offsets = np.divmod(place, self.size)
        return np.array([self._permutation(int(e))[o] for e, o in zip(epochs, offsets, strict=True)])

    def epoch(self, step: int) -> float:
        """Epochs that lie before batch `step`."""
        return step * self.batch_size / self.size

    def steps(self, epochs: float) -> int:
        """Steps that hold at least this many epochs."""
        return int(np.ceil(epochs * self.size / self.batch_size))

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            # A cache of the two newest, for batches over a border; the value depends on (seed, epoch) alone.
            while len(self._permutations) > 1:
                self._permutations.pop(next(iter(self._permutations)))
            self._permutations[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.size)
        return self._permutations[epoch]


def fingerprint(rows: Any) -> str:
    """sha256 of the rows: names, types, shapes and bytes of all arrays. Two data sets never pass for each other."""
    digest = hashlib.sha256()
    for name, value in _fields(rows).items():
        array = np.ascontiguousarray(value)
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _fields(rows: Any) -> dict[str, Any]:
    if isinstance(rows, dict):
        return rows
    return {f.name: getattr(rows, f.name) for f in dataclasses.fields(rows)}


def _map(fn: Callable[[Any], Any], rows: Rows) -> Rows:
    arrays = {name: fn(value) for name, value in _fields(rows).items()}
    return type(rows)(**arrays)


def _row_count(rows: Any) -> int:
    sizes = {name: len(value) for name, value in _fields(rows).items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"the arrays must have one number of rows, got {sizes}: build them together")
    size = next(iter(sizes.values()))
    if not size:
        raise ValueError("the data set has no rows: check the source and what was dropped in its report")
    return size
