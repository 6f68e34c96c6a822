"""Continuous batching: a row that has ended its response continues with the next prompt.

The host keeps a queue of responses; the decode loop of `generate` runs on the device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from rlhf_jax.backends import on_host
from rlhf_jax.sampling.generate import (
    Decoding,
    Sampling,
    another_token,
    append_token,
    draws,
    empty_responses,
    join_responses,
    prefill,
    require_room,
    row_key,
)
from rlhf_jax.types import Cache, Model, Params, PromptBatch, Samples


class Begun(NamedTuple):
    """One refill: P prompts, and Q responses to them, of which the first `count` are real."""

    prompts: PromptBatch
    response: Int[np.ndarray, " Q"] | Int[Array, " Q"]
    """Index of each response among the R of `Decoding`."""
    source: Int[np.ndarray, " Q"] | Int[Array, " Q"]
    """Index of the prompt that it answers."""
    sample: Int[np.ndarray, " Q"] | Int[Array, " Q"]
    """Its index among the samples of that prompt."""
    count: np.int32 | Int[Array, ""]
    until: np.int32 | Int[Array, ""]
    """Decoding stops when no response waits and at most this many rows are live."""


class Waiting(NamedTuple):
    """Up to Q prefilled responses that wait for a row, and the caches of their prompts.

    Those from `given` to `count` still wait. Response q answers prompt ``source[q]`` of the cache.
    """

    response: Int[Array, " Q"]
    source: Int[Array, " Q"]
    given: Int[Array, ""]
    count: Int[Array, ""]
    cache: Cache


class Rows(NamedTuple):
    """The rows that decode responses, and their sharding."""

    count: int = 256
    """B, the number of responses that are decoded together."""
    refill: int | None = None
    """Responses that are prefilled together; None for half the rows of a stream. More responses
    take more memory."""
    streams: int = 1
    """Number of groups of rows, each decoded by its own thread with its share of the prompts. One
    decode step at a time does not keep the cores of a CPU busy: two streams are a third faster on
    two cores. Use one on an accelerator. The number does not change any token."""
    sharding: jax.sharding.Sharding | None = None
    """Sharding of the rows (`sharding.batch_sharding`); None for one device."""


def generate_many(
    model: Model,
    params: Params,
    prompts: PromptBatch,
    key: Key[Array, ""],
    sampling: Sampling,
    *,
    counts: int | Sequence[int] = 1,
    rows: Rows = Rows(),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Samples:
    """Sample any number of prompts in a fixed number of rows.

    No row waits for the longest response: a row that has ended continues with the next prompt
    inside the decode loop (continuous batching). Response lengths are heavy-tailed, and a batch
    that waits for its longest row computes mostly padding. `Rows.refill` responses are prefilled
    together and wait for rows, with caches of their own; control returns to the host only when none
    waits. The tokens are those of `generate` for the same key, prompt id and sample (in float32; in
    bfloat16 a tie may be broken differently).

    Args:
      model: a language model.
      params: its parameters.
      prompts: N prompts, in host memory; `ids` are their indices in the stream.
      key: of this stream of samples.
      sampling: as in `generate`.
      counts: K, samples per prompt: one number for all prompts, or N numbers.
      rows: how many rows, in how many streams, and their sharding.
      progress: called with (responses done, responses) after each refill.

    Returns:
      `Samples` on the host, prompt by prompt: the K samples of a prompt are consecutive.

    Raises:
      ValueError: as `generate`, or if `counts` does not fit the prompts or `rows.streams` does not
        fit the devices.
    """
    repeats = np.broadcast_to(np.asarray(counts), prompts.lengths.shape)
    if repeats.min(initial=0) < 0:
        raise ValueError(
            f"counts={int(repeats.min())} of a prompt must not be negative: 0 leaves the prompt out"
        )
    require_room(model, prompts, sampling)
    streams = _streams(rows, repeats)
    width = -(-rows.count // streams)
    if rows.sharding is None:  # no more rows than responses
        width = max(1, -(-min(rows.count, int(repeats.sum())) // streams))
    # Consecutive responses must come from consecutive prompts: a refill prefills a range of them.
    sampled = np.flatnonzero(repeats) if repeats.any() else np.arange(len(repeats))
    repeats = repeats[sampled]
    host = jax.tree.map(lambda x: np.asarray(x)[sampled], prompts)
    queues = [
        _Queue(
            jax.tree.map(lambda x, i=i: x[i], host),
            repeats[i],
            width,
            rows.refill,
            sampling.max_new_tokens,
        )
        for i in _shares(repeats, streams)
    ]
    fast = _for_decoding(model, params)

    def run(state: Decoding, begun: Begun) -> Decoding:
        return _refill_and_decode(
            model, (params, fast), key, state, begun, sampling=sampling, sharding=rows.sharding
        )

    slots = prompts.tokens.shape[1] + sampling.max_new_tokens
    empty = lambda queue: _empty(model, queue, slots, sampling.max_new_tokens, rows.sharding)
    _drain_all(queues, empty, run, progress)
    parts = [queue.samples() for queue in queues]
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def _streams(rows: Rows, repeats: np.ndarray) -> int:
    """The number of streams, at most one per prompt that is sampled."""
    several = rows.sharding is not None and len(rows.sharding.device_set) > 1
    if rows.streams < 1 or (rows.streams > 1 and several):
        raise ValueError(
            f"streams={rows.streams} must be 1 on several devices, and at least 1: pass streams=1"
        )
    return max(1, min(rows.streams, int((repeats > 0).sum())))


@partial(jax.jit, static_argnames="model")
def _for_decoding(model: Model, params: Params) -> Params:
    return model.for_decoding(params)


def _shares(counts: np.ndarray, streams: int) -> list[slice]:
    """Consecutive prompts for each stream, with about equal numbers of responses, at least one."""
    ends = np.searchsorted(np.cumsum(counts), np.arange(1, streams) * counts.sum() / streams) + 1
    # At least one prompt for each stream, also where one prompt has most of the responses.
    ends = np.clip(ends, np.arange(1, streams), len(counts) - streams + np.arange(1, streams))
    return [slice(a, b) for a, b in zip([0, *ends], [*ends, len(counts)], strict=True)]


def _empty(model: Model, queue: _Queue, slots: int, max_new_tokens: int, sharding: Any) -> Decoding:
    """Idle rows, with room for the responses that they will decode and for those that wait."""
    places = queue.places
    state = empty_responses(
        jnp.zeros((places, max_new_tokens, 2)), model.init_cache(queue.rows, slots)
    )
    # All responses count as ended and all rows as idle, until the first refill.
    state = state._replace(
        finished=jnp.ones(places, bool), response=jnp.full(queue.rows, places, jnp.int32)
    )
    return state if sharding is None else jax.device_put(state, _over_rows(state, sharding))


def _over_rows(state: Decoding, sharding: jax.sharding.NamedSharding) -> Decoding:
    """The shardings of the state: rows and their cache by `sharding`, responses replicated."""
    whole = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    rows = jax.tree.map(lambda _: sharding, (state.response, state.cache))
    return jax.tree.map(lambda _: whole, state)._replace(response=rows[0], cache=rows[1])


def _drain_all(
    queues: Sequence[_Queue], empty: Callable[[_Queue], Decoding], run: Callable[..., Decoding],
    progress: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Decode every queue to its end.

    If one fails, or the user interrupts, the others stop at their next refill.
    """
    stop, turn = threading.Event(), threading.Lock()
    total = sum(queue.total for queue in queues)

    def drain(queue: _Queue) -> None:
        state = empty(queue)
        try:
            while not (queue.empty or stop.is_set()):
                # The lock is held for the dispatch only: the first stream compiles the program, and
                # the others find it in the cache.
                with turn:
                    state = run(state, queue.next())
                queue.collect(state)
                with turn:
                    # Under the lock, because the caller's function need not be safe in threads.
                    progress(sum(q.collected for q in queues), total)
        # Whatever stops this stream, the others stop at their next refill.
        except BaseException:
            stop.set()
            raise

    if len(queues) == 1:
        return drain(queues[0])
    with ThreadPoolExecutor(len(queues)) as pool:
        jobs = [pool.submit(drain, queue) for queue in queues]
        try:
            for job in jobs:
                job.result()
        finally:
            stop.set()


class _Queue:
    """Bookkeeping on the host: which responses wait, are being decoded, and have ended."""

    def __init__(
        self,
        prompts: PromptBatch,
        counts: np.ndarray,
        rows: int,
        refill: int | None,
        max_new_tokens: int,
    ):
        self.prompts = prompts
        # The prompt of each response, and its number among the samples of that prompt.
        self.owner = np.repeat(np.arange(len(counts)), counts)
        self.sample = np.arange(len(self.owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.total = len(self.owner)
        self.rows = rows
        self.chunk = min(self.rows, refill or -(-self.rows // 2))
        # At most one response per row is being decoded while one refill waits.
        self.places = self.rows + self.chunk
        # Consecutive responses share prompts, and each prompt is prefilled once.
        fewest = max(1, int(counts[counts > 0].min(initial=self.chunk)))
        self.prefills = min(self.chunk, 1 + -(-(self.chunk - 1) // fewest))
        # Which response each place of the state has; -1 is free.
        self.holds = np.full(self.places, -1)
        self.given = self.collected = 0
        shape = (self.total, max_new_tokens)
        self.ended = (
            np.zeros(shape, np.int32),
            np.zeros(shape, np.float32),
            *np.zeros((2, self.total), np.int32),
        )

    @property
    def empty(self) -> bool:
        return self.collected == self.total

    def next(self) -> Begun:
        """The next refill, for `_refill_and_decode`."""
        free = np.flatnonzero(self.holds < 0)[: self.chunk]
        jobs = np.arange(self.given, min(self.given + len(free), self.total))
        self.holds[free[: len(jobs)]] = jobs
        self.given += len(jobs)
        first = self.owner[jobs[0]] if len(jobs) else 0
        # Shapes are fixed, so a fixed number of prompts is prefilled; past the end the last one
        # again.
        chosen = np.minimum(first + np.arange(self.prefills), len(self.prompts.lengths) - 1)
        # A place past the end marks an absent response, for which nothing is stored.
        place = np.full(self.chunk, self.places, np.int32)
        place[: len(jobs)] = free[: len(jobs)]
        source, sample = np.zeros((2, self.chunk), np.int32)
        source[: len(jobs)], sample[: len(jobs)] = self.owner[jobs] - first, self.sample[jobs]
        # While prompts are left, the loop ends as soon as no response waits, so no row is idle.
        until = self.rows if self.given < self.total else 0
        prompts = jax.tree.map(lambda x: x[chosen], self.prompts)
        return Begun(prompts, place, source, sample, np.int32(len(jobs)), np.int32(until))

    def collect(self, state: Decoding) -> None:
        """Copy the responses that have ended, and free their slots."""
        # This waits for the device, without the lock, so that other streams can run.
        seen = jax.tree.map(np.asarray, (state.tokens, state.logp, state.counts, state.finished))
        ended = (self.holds >= 0) & (seen[3] | (seen[2] == seen[0].shape[1]))
        for store, found in zip(self.ended, seen, strict=True):
            store[self.holds[ended]] = found[ended]
        self.collected += int(ended.sum())
        self.holds[ended] = -1

    def samples(self) -> Samples:
        """All samples, prompt by prompt, on the host."""
        with on_host():
            prompts, ended = jax.tree.map(
                jnp.asarray, (jax.tree.map(lambda x: x[self.owner], self.prompts), self.ended)
            )
            rows = join_responses(prompts, ended[0], ended[1], ended[2], ended[3].astype(bool))
            return jax.tree.map(np.asarray, rows)


@partial(jax.jit, static_argnames=("model", "sharding", "sampling"), donate_argnames="state")
def _refill_and_decode(
    model, weights, key, state, begun: Begun, *, sampling: Sampling, sharding
) -> Decoding:
    """Prefill responses, then decode: a row that has ended takes a response that waits.

    The loop ends when none waits and at most ``begun.until`` rows are live. `weights` are the
    parameters and their form for decoding.
    """
    params, fast = weights
    prompts, place, source, sample, count, until = jax.tree.map(jnp.asarray, begun)
    hidden, cache = prefill(model, params, prompts, slots=state.cache.segments.shape[1])
    # By prompt id and sample, so that a response has the same random numbers in any row or refill.
    keys = jax.vmap(partial(row_key, key))(prompts.ids[source], sample)
    state = state._replace(
        # A row that has ended must let go of its index, which may now belong to a new response.
        response=jnp.where(state.live, state.response, state.tokens.shape[0]),
        counts=state.counts.at[place].set(0, mode="drop"),
        finished=state.finished.at[place].set(False, mode="drop"),
        uniform=state.uniform.at[place].set(draws(keys, state.tokens.shape[1]), mode="drop"),
    )
    state = append_token(model, params, hidden[source], state, place, sampling)
    waiting = Waiting(place, source, jnp.zeros((), jnp.int32), count, cache)

    def advance(carry: tuple[Decoding, Waiting]) -> tuple[Decoding, Waiting]:
        # A loop and not a condition, because its body updates the cache in place; usually it does
        # not run at all.
        state, waiting = jax.lax.while_loop(_may_hand_over, _hand_over, carry)
        return another_token(model, fast, state, sampling), waiting

    def goes_on(carry: tuple[Decoding, Waiting]) -> Bool[Array, ""]:
        state, waiting = carry
        return (waiting.given < waiting.count) | (state.live.sum() > until)

    if sharding is not None:
        state = jax.lax.with_sharding_constraint(state, _over_rows(state, sharding))
    return jax.lax.while_loop(goes_on, advance, (state, waiting))[0]


def _may_hand_over(carry: tuple[Decoding, Waiting]) -> Bool[Array, ""]:
    state, waiting = carry
    # Only where a response waits and a row is free, else the body would copy caches for nothing.
    return (waiting.given < waiting.count) & ~state.live.all()


def _hand_over(carry: tuple[Decoding, Waiting]) -> tuple[Decoding, Waiting]:
    """Give the next waiting responses to rows that are not live, a few rows at a time."""
    state, waiting = carry
    rows, some = state.response.shape[0], max(1, state.response.shape[0] // 16)
    # `nonzero` needs a static size; missing entries get the index `rows`, which writes drop.
    free = jnp.nonzero(~state.live, size=some, fill_value=rows)[0]
    jobs = waiting.given + jnp.arange(some)
    taken = (jobs < waiting.count) & (free < rows)
    free, jobs = jnp.where(taken, free, rows), jnp.minimum(jobs, waiting.response.shape[0] - 1)
    source = waiting.source[jobs]
    state = state._replace(
        response=state.response.at[free].set(waiting.response[jobs], mode="drop"),
        cache=jax.tree.map(
            lambda old, new: old.at[free].set(new[source], mode="drop"), state.cache, waiting.cache
        ),
    )  # fmt: skip
    return state, waiting._replace(given=waiting.given + taken.sum(dtype=jnp.int32))
