"""Batches as a pure function of (seed, step).

So the loader's state in a checkpoint is one integer, and a restart repeats no row and skips none.

`Batches.at` makes one batch; `Batches.stream` gives the same batches in order, made ahead of time
by a thread or by worker processes (grain). A batch does not depend on which of the two makes it, or
on the number of workers.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import Bool, Int

Rows = TypeVar("Rows")
"""A struct of `rlhf_jax.types` or a dict of arrays with rows first, or a list of records."""


class Batches(Generic[Rows]):
    """An endless stream of batches, shuffled anew each epoch, addressed by step.

    The stream is the concatenation of one permutation of the rows per epoch, a function of (seed,
    epoch); batch `step` is its entries ``step * batch_size .. (step + 1) * batch_size - 1``. So
    every row comes once per epoch and no tail is dropped: a batch at the border has the end of one
    epoch and the start of the next. Resuming at a step needs the step alone, and the global batch
    does not depend on the number of processes.

    The rows are arrays, or a source of records that are read by index: a list, or a
    `tfds.data_source`. Records are read when a batch needs them, and `transform` turns them into
    the batch.

    >>> batches = Batches({"x": np.arange(5)}, batch_size=2, seed=0)
    >>> rows = np.concatenate([batches.at(step)["x"] for step in range(5)])
    >>> sorted(rows[:5]) == sorted(rows[5:]) == [0, 1, 2, 3, 4]
    True
    >>> lengths = lambda texts: {"n": np.array([len(text) for text in texts])}
    >>> words = Batches(["a", "bb", "ccc"], batch_size=3, seed=0, transform=lengths)
    >>> sorted(words.at(0)["n"].tolist())
    [1, 2, 3]

    Args:
      rows: struct or dict of numpy arrays with rows first; or a source of records with `len` and
        ``source[i]`` (``__getitems__`` is used where the source has it).
      batch_size: rows per batch, over all processes.
      seed: of the shuffling.
      process_index: which slice of the batch this process gets.
      process_count: number of processes.
      transform: makes the batch from this process's rows, for example tokenises and pads the list
        of records. It must be a function of the rows alone, without random state, so that a batch
        remains a function of (seed, step). None: the rows as they are.

    Raises:
      ValueError: there are no rows, the arrays differ in their number, or the batch does not
        divide.
    """

    def __init__(
        self,
        rows: Rows | Sequence[Any],
        *,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        transform: Callable[[Any], Rows] | None = None,
    ) -> None:
        self.rows, self.batch_size, self.seed, self.transform = rows, batch_size, seed, transform
        self.size = _row_count(rows)
        if batch_size < 1 or batch_size % process_count:
            raise ValueError(
                f"batch_size={batch_size} must be a positive multiple of the {process_count} "
                f"processes: choose {max(1, round(batch_size / process_count)) * process_count}"
            )
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index={process_index} must be 0 to {process_count - 1}")
        # Each process takes a contiguous slice, so the global batch is the same for any number of
        # them.
        share = batch_size // process_count
        self._slice = slice(process_index * share, (process_index + 1) * share)
        self._permutations: dict[int, np.ndarray] = {}

    def at(self, step: int) -> Rows:
        """This process's rows of batch `step`."""
        rows = _take(self.rows, self.indices(step)[self._slice])
        return rows if self.transform is None else self.transform(rows)

    def stream(
        self, start_step: int = 0, *, workers: int = 0, prefetch: int = 2
    ) -> Generator[Rows, None, None]:
        """The batches ``at(start_step)``, ``at(start_step + 1)``, ...

        The stream is endless, and batches are made ahead of time.

        To resume, pass the step of the next batch; there is no other state. With workers each batch
        is made by one of them, in turn. They take a second or two to start and get a copy of this
        object, so they pay off where `transform` is slow or the source is read from a disk; arrays
        in memory are best served with ``workers=0``. Rows and `transform` must then be picklable;
        functions of a notebook and lambdas are. A script that uses workers needs the usual
        ``if __name__ == "__main__":``, as `multiprocessing` imports it again in each.

        Workers ignore Ctrl-C and SIGTERM, which the training process handles, and end with it
        however it ends. Closing or dropping the iterator ends them at once.

        Args:
          start_step: the first batch.
          workers: processes that make batches; 0 = a thread of this process.
          prefetch: batches kept ready, per worker where there are any; 0 (without workers) = made
            on demand.

        Raises:
          ValueError: a negative number, no `prefetch` for workers, or batches of workers that are
            not arrays.
          OSError: a worker ended, for example out of memory. Errors of `transform` are raised as
            they are.
        """
        for name, value, least in (
            ("start_step", start_step, 0),
            ("workers", workers, 0),
            ("prefetch", prefetch, 1 if workers else 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be {least} or more")
        stream = self._stream(start_step, workers, prefetch)
        # Only weakly: a stream that the caller drops is closed by the garbage collector as before.
        _OPEN_STREAMS.add(stream)
        return stream

    def _stream(self, start_step: int, workers: int, prefetch: int) -> Generator[Rows, None, None]:
        import grain  # takes a second or two, which `at` alone does not need
        from absl import flags

        # grain reads absl's flags, which a notebook, pytest and our own command line never parse.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        # The batch of a worker is packed, since arrays alone travel through shared memory.
        make: Callable[[int], Any] = _PackedAt(self) if workers else self.at
        # The source is the range of steps from `start_step`, so resuming needs no state of grain's.
        batches = grain.MapDataset.range(start_step, sys.maxsize).map(make)
        # With workers, `mp_prefetch` below reads ahead, and threads inside each of them would add
        # nothing.
        ahead = 0 if workers else prefetch
        iterator = batches.to_iter_dataset(
            grain.ReadOptions(num_threads=min(1, ahead), prefetch_buffer_size=ahead)
        )
        if workers:
            options = grain.MultiprocessingOptions(
                num_workers=workers, per_worker_buffer_size=prefetch
            )
            iterator = iterator.mp_prefetch(options, worker_init_fn=_start_worker)
        iterator = iter(iterator)
        _close_streams_at_exit()
        step = start_step
        try:
            while True:
                batch: Any = next(iterator)
                yield _unpack(batch) if workers else batch
                step += 1
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise OSError(
                f"a loader worker ended while it made a batch from step {step} on ({error}): if "
                "the machine ran out of memory (or of /dev/shm) take fewer workers or a smaller "
                "prefetch; workers=0 shows transform's errors"
            ) from error
        finally:
            # However the stream ends, so that neither threads nor workers outlive it.
            iterator.close()

    def indices(self, step: int) -> Int[np.ndarray, " B"]:
        """Row indices of the whole batch `step`, for example to report the rows of a bad step."""
        if step < 0:
            raise ValueError(f"step={step} must be 0 or more")
        # Entry i of the stream is entry i % size of the permutation of epoch i // size.
        place = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, offsets = np.divmod(place, self.size)
        return np.concatenate(
            [self._permutation(int(e))[offsets[epochs == e]] for e in np.unique(epochs)]
        )

    def each_once(self, most: int | None = None) -> Iterator[tuple[Rows, Bool[np.ndarray, " b"]]]:
        """The batches of one epoch for evaluation, each with a mask of the rows that count.

        The last batch is filled up with rows of the next epoch, so that all have one shape (and one
        compilation); the mask leaves those rows out, so that every row counts once.

        Args:
          most: the number of batches to stop after; None = the whole epoch.

        >>> batches = Batches({"x": np.arange(5)}, batch_size=2, seed=0)
        >>> sorted(x for rows, counts in batches.each_once() for x in rows["x"][counts].tolist())
        [0, 1, 2, 3, 4]
        """
        # One epoch, rounded up to whole batches.
        steps = self.steps(1) if most is None else min(most, self.steps(1))
        for step in range(steps):
            place = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
            # The mask of the whole batch is cut like its rows, so that each process gets its own
            # part.
            yield self.at(step), (place < self.size)[self._slice]

    def epoch(self, step: int) -> float:
        """Epochs completed before batch `step`, as a fraction."""
        return step * self.batch_size / self.size

    def steps(self, epochs: float) -> int:
        """The number of steps that cover at least this many epochs."""
        return int(np.ceil(epochs * self.size / self.batch_size))

    def _permutation(self, epoch: int) -> np.ndarray:
        known = self._permutations.get(epoch)
        if known is None:
            # Seed and epoch are separate entries: their sum would give seed 0, epoch 1 the order of
            # seed 1.
            known = np.random.default_rng([self.seed, epoch]).permutation(self.size)
            # The cache keeps the two newest epochs, for batches at a border. It is replaced and
            # never changed in place, because the thread of a stream may be reading it.
            self._permutations = {**dict([*self._permutations.items()][-1:]), epoch: known}
        return known

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_permutations": {}}  # a worker computes its own


_OPEN_STREAMS: weakref.WeakSet[Any] = weakref.WeakSet()
_SHARED: set[type] = set()
"""Types of the arrays that arrived through shared memory."""


@functools.cache
def _close_streams_at_exit() -> None:
    """Registers the shutdown of open streams, which must run while all modules are still loaded."""
    atexit.register(_close_streams)


def _close_streams() -> None:
    for stream in list(_OPEN_STREAMS):
        stream.close()
    # Grain frees shared memory in a thread of its own. If the program ends before that thread is
    # done, Python warns that the last batch has leaked.
    for kind in _SHARED:
        pool = getattr(kind, "_del_thread_pool", None)
        if pool is not None:
            pool.close()
            pool.join()


class _PackedAt:
    """Makes the batch of a step in a worker, as its class and its arrays.

    Arrays travel in shared memory. Anything else would go through a pipe, where a worker that dies
    halfway leaves the reader waiting, so a batch of anything else is refused.
    """

    def __init__(self, batches: Batches[Any]) -> None:
        self.batches = batches

    def __call__(self, step: int) -> tuple[type, dict[str, np.ndarray]]:
        try:
            rows = self.batches.at(step)
        except SystemExit as error:
            # The training process would wait for ever for a worker that ends with status 0.
            raise RuntimeError(
                f"transform exits ({error}) in batch {step}: raise an error instead"
            ) from error
        # Shared memory is copied as one block, so each array must be contiguous.
        arrays = (
            {k: np.ascontiguousarray(v) for k, v in _fields(rows).items()}
            if _is_columns(rows)
            else {}
        )
        # An array of Python objects holds pointers, which mean nothing in another process.
        if not arrays or any(array.dtype.hasobject for array in arrays.values()):
            raise ValueError(
                "with workers a batch must be a dict or struct of arrays of numbers, got "
                f"{type(rows).__name__}: give a transform that tokenises and pads, or workers=0"
            )
        return type(rows), arrays


def _unpack(packed: tuple[type, dict[str, np.ndarray]]) -> Any:
    kind, arrays = packed
    _SHARED.update(map(type, arrays.values()))
    # The arrays are copied, because grain frees the shared memory at once.
    return kind(**{name: np.array(array) for name, array in arrays.items()})


def _start_worker(index: int, count: int) -> None:
    """Makes a worker ignore signals and end with the training process, however that ends."""
    del index, count
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    # A thread, because the worker itself is busy making batches.
    def end_with_parent() -> None:
        parent.join()
        os._exit(1)  # at once: `sys.exit` in a thread would end that thread alone

    threading.Thread(target=end_with_parent, daemon=True).start()


def fingerprint(rows: Any) -> str:
    """sha256 of the rows: names, types, shapes and bytes of all arrays.

    Two different data sets never have the same fingerprint.
    """
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


def _is_columns(rows: Any) -> bool:
    return isinstance(rows, dict) or dataclasses.is_dataclass(rows)


def _take(rows: Any, index: Int[np.ndarray, " b"]) -> Any:
    """The chosen rows: the same struct of arrays, or a list of records."""
    if _is_columns(rows):
        arrays = {name: np.asarray(value)[index] for name, value in _fields(rows).items()}
        return type(rows)(**arrays)
    # One call for all rows where the source offers it, as `tfds.data_source` does.
    many = getattr(rows, "__getitems__", None)
    places = index.tolist()
    return list(many(places)) if many else [rows[place] for place in places]


def _row_count(rows: Any) -> int:
    sizes = (
        {name: len(value) for name, value in _fields(rows).items()}
        if _is_columns(rows)
        else {"": len(rows)}
    )
    if len(set(sizes.values())) != 1:
        raise ValueError(
            f"the arrays must have one number of rows, got {sizes}: build them together"
        )
    size = next(iter(sizes.values()))
    if not size:
        raise ValueError(
            "the data set has no rows: check the source and what was dropped in its report"
        )
    return size
