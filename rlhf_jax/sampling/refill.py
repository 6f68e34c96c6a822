"""More prompts than rows: a row whose response has ended goes on with the next prompt.

This is continuous batching. The host keeps a queue of responses; the decode loop of `generate` runs
on the device.
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
    """What begins next: P prompts, and Q responses to them, of which the first `count` are real."""

    prompts: PromptBatch
    response: Int[np.ndarray, " Q"] | Int[Array, " Q"]
    """Where each response is kept among the R of `Decoding`."""
    source: Int[np.ndarray, " Q"] | Int[Array, " Q"]
    """Which of the prompts it answers."""
    sample: Int[np.ndarray, " Q"] | Int[Array, " Q"]
    """Its number among the samples of that prompt, from 0."""
    count: np.int32 | Int[Array, ""]
    until: np.int32 | Int[Array, ""]
    """Decoding goes on until no response waits and at most so many rows are live."""


class Waiting(NamedTuple):
    """Up to Q responses that have begun and wait for a row, and the caches of their prompts.

    Those from `given` to `count` still wait. Response q answers prompt ``source[q]`` of the cache.
    """

    response: Int[Array, " Q"]
    source: Int[Array, " Q"]
    given: Int[Array, ""]
    count: Int[Array, ""]
    cache: Cache


class Rows(NamedTuple):
    """The rows that responses go through, and where they are placed."""

    count: int = 256
    """B, responses that are decoded together."""
    refill: int | None = None
    """Responses that begin together; None for half the rows of a stream. More take more memory."""
    streams: int = 1
    """The rows are cut into this many groups, each decoded by a thread of its own with its share of
    the prompts. One token at a time does not keep the cores of a CPU busy: two streams are a third
    faster on two cores. An accelerator wants one. It changes no token either."""
    sharding: jax.sharding.Sharding | None = None
    """Where rows live (`sharding.batch_sharding`); None for one device."""


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
    """Samples of any number of prompts through a fixed number of rows.

    No row waits for the longest response. A row that ends goes on with the next prompt inside the
    decode loop (continuous batching): response lengths are heavy-tailed, and a batch that waits for
    its longest row computes mostly padding. `Rows.refill` prompts are prefilled together and wait
    for rows, with caches of their own; the host is asked only when none waits. The tokens are those
    of `generate` for the same key, prompt id and sample (in float32; in bfloat16 a tie may fall
    otherwise).

    Args:
      model: a language model.
      params: its parameters.
      prompts: N prompts, in host memory; `ids` are their places in the stream.
      key: of this stream of samples.
      sampling: as in `generate`.
      counts: K, samples of each prompt: one number for all, or N numbers.
      rows: how many rows, in how many streams, and where they are placed.
      progress: called with (responses done, responses) after each refill.

    Returns:
      `Samples` on the host, prompt by prompt: the K samples of a prompt follow each other.

    Raises:
      ValueError: as `generate`, or when `counts` does not fit the prompts, or `rows.streams` the
        devices.
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
    host = jax.tree.map(np.asarray, prompts)
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
    """The streams that there are prompts for."""
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
    """Consecutive prompts for each stream, with about equally many responses, at least one."""
    ends = np.searchsorted(np.cumsum(counts), np.arange(1, streams) * counts.sum() / streams) + 1
    ends = np.clip(ends, np.arange(1, streams), len(counts) - streams + np.arange(1, streams))
    return [slice(a, b) for a, b in zip([0, *ends], [*ends, len(counts)], strict=True)]


def _empty(model: Model, queue: _Queue, slots: int, max_new_tokens: int, sharding: Any) -> Decoding:
    """Idle rows, and room for the responses that they will decode and for those that wait."""
    places = queue.places
    state = empty_responses(
        jnp.zeros((places, max_new_tokens, 2)), model.init_cache(queue.rows, slots)
    )
    state = state._replace(
        finished=jnp.ones(places, bool), response=jnp.full(queue.rows, places, jnp.int32)
    )
    return state if sharding is None else jax.device_put(state, _over_rows(state, sharding))


def _over_rows(state: Decoding, sharding: jax.sharding.NamedSharding) -> Decoding:
    """Rows and their cache as `sharding` says; every device has all responses."""
    whole = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    rows = jax.tree.map(lambda _: sharding, (state.response, state.cache))
    return jax.tree.map(lambda _: whole, state)._replace(response=rows[0], cache=rows[1])


def _drain_all(
    queues: Sequence[_Queue], empty: Callable[[_Queue], Decoding], run: Callable[..., Decoding],
    progress: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Samples each queue to its end.

    When one fails, or the user interrupts, the others stop at their next refill.
    """
    stop, turn = threading.Event(), threading.Lock()
    total = sum(queue.total for queue in queues)

    def drain(queue: _Queue) -> None:
        state = empty(queue)
        try:
            while not (queue.empty or stop.is_set()):
                # Only to dispatch: the program is compiled by one stream, and the others find it.
                with turn:
                    state = run(state, queue.next())
                queue.collect(state)
                with turn:
                    progress(sum(q.collected for q in queues), total)
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
    """Bookkeeping on the host: responses that are decoded, to be sampled, and ended."""

    def __init__(
        self,
        prompts: PromptBatch,
        counts: np.ndarray,
        rows: int,
        refill: int | None,
        max_new_tokens: int,
    ):
        self.prompts = prompts
        self.owner = np.repeat(np.arange(len(counts)), counts)
        self.sample = np.arange(len(self.owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.total = len(self.owner)
        self.rows = rows
        self.chunk = min(self.rows, refill or -(-self.rows // 2))
        self.places = self.rows + self.chunk
        # Consecutive responses share prompts, and each prompt is prefilled once.
        fewest = max(1, int(counts[counts > 0].min(initial=self.chunk)))
        self.prefills = min(self.chunk, 1 + -(-(self.chunk - 1) // fewest))
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
        """What begins next, as `_refill_and_decode` takes it.

        Prompts; place, prompt and sample of each response; how many; rows that may stay live.
        """
        free = np.flatnonzero(self.holds < 0)[: self.chunk]
        jobs = np.arange(self.given, min(self.given + len(free), self.total))
        self.holds[free[: len(jobs)]] = jobs
        self.given += len(jobs)
        first = self.owner[jobs[0]] if len(jobs) else 0
        chosen = np.minimum(first + np.arange(self.prefills), len(self.prompts.lengths) - 1)
        place = np.full(self.chunk, self.places, np.int32)
        place[: len(jobs)] = free[: len(jobs)]
        source, sample = np.zeros((2, self.chunk), np.int32)
        source[: len(jobs)], sample[: len(jobs)] = self.owner[jobs] - first, self.sample[jobs]
        # While more prompts come the loop ends as soon as none waits: no row shall stand idle.
        until = self.rows if self.given < self.total else 0
        prompts = jax.tree.map(lambda x: x[chosen], self.prompts)
        return Begun(prompts, place, source, sample, np.int32(len(jobs)), np.int32(until))

    def collect(self, state: Decoding) -> None:
        """Take over the responses that have ended."""
        seen = jax.tree.map(np.asarray, (state.tokens, state.logp, state.counts, state.finished))
        ended = (self.holds >= 0) & (seen[3] | (seen[2] == seen[0].shape[1]))
        for store, found in zip(self.ended, seen, strict=True):
            store[self.holds[ended]] = found[ended]
        self.collected += int(ended.sum())
        self.holds[ended] = -1

    def samples(self) -> Samples:
        """Everything, prompt by prompt, on the host."""
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
    """Begin responses, then decode them: whenever a row ends, it takes a response that waits.

    Ends when none waits and at most ``begun.until`` rows are live. `weights` are the parameters,
    and those for decoding.
    """
    params, fast = weights
    prompts, place, source, sample, count, until = jax.tree.map(jnp.asarray, begun)
    hidden, cache = prefill(model, params, prompts, slots=state.cache.segments.shape[1])
    keys = jax.vmap(partial(row_key, key))(prompts.ids[source], sample)
    state = state._replace(
        # Its old place has a new response now.
        response=jnp.where(state.live, state.response, state.tokens.shape[0]),
        counts=state.counts.at[place].set(0, mode="drop"),
        finished=state.finished.at[place].set(False, mode="drop"),
        uniform=state.uniform.at[place].set(draws(keys, state.tokens.shape[1]), mode="drop"),
    )
    state = append_token(model, params, hidden[source], state, place, sampling)
    waiting = Waiting(place, source, jnp.zeros((), jnp.int32), count, cache)

    def advance(carry: tuple[Decoding, Waiting]) -> tuple[Decoding, Waiting]:
        # A loop, not a condition: its body works in place, and mostly it does not run.
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
    return (waiting.given < waiting.count) & ~state.live.all()


def _hand_over(carry: tuple[Decoding, Waiting]) -> tuple[Decoding, Waiting]:
    """Rows that are not live, some at a time, take the next responses that wait."""
    state, waiting = carry
    rows, some = state.response.shape[0], max(1, state.response.shape[0] // 16)
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
