"""Seconds of a step, and the rates of this machine that they are compared with."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def timed(step: Callable[[int], Any], numbers: Sequence[int]) -> list[float]:
    """Seconds of the steps of these numbers, each waited for."""
    seconds = []
    for i in numbers:
        begun = time.perf_counter()
        jax.block_until_ready(step(i))
        seconds.append(time.perf_counter() - begun)
    return seconds


def in_turn(runs: dict[str, Callable[[int], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of several steps that take turns (A B A B), so that a busy moment hits all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        for name, run in runs.items():
            times[name] += timed(run, [i])
    return times


@functools.cache
def matrix_rate(dtype: str) -> float:
    """FLOP/s of a plain matrix product in this process."""
    # Large enough to reach the peak rate of an accelerator; a CPU reaches its own with less.
    size = 1024 if jax.default_backend() == "cpu" else 8192
    # Random numbers, because a matrix of ones would multiply faster than real data.
    x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    product = jax.jit(lambda x: x @ x)
    # A matrix product takes a multiplication and an addition for each of its size^3 terms.
    return 2 * size**3 / _seconds_each(lambda: product(x))


@functools.cache
def bandwidth() -> float:
    """Bytes/s at which weights can be read.

    The faster of two uses of a matrix larger than any cache: times a few rows, or doubled.
    """
    matrix = jax.random.normal(jax.random.key(0), (8192, 8192))
    rows = jnp.ones((8, 8192), jnp.float32)
    product, double = (
        jax.jit(lambda rows, matrix: rows @ matrix),
        jax.jit(lambda matrix: 2 * matrix),
    )
    read = matrix.nbytes / _seconds_each(lambda: product(rows, matrix))
    # Doubling reads the matrix once and writes a result of the same size.
    return max(read, 2 * matrix.nbytes / _seconds_each(lambda: double(matrix)))


def _seconds_each(run: Callable[[], Any], *, together: int = 5) -> float:
    """Seconds per call in the fastest of several rounds.

    Calls of a round are enqueued together, so that waiting for the device hardly counts.
    """

    def round_of_calls(_: int) -> Any:
        return [run() for _ in range(together)]

    return min(timed(round_of_calls, range(6))) / together
