"""Sampling: one prefill for the K samples of a prompt, then a cached decode loop that stops when every row has.

`generate` samples one batch in one compiled program; `generate_many` sends any number of prompts through a fixed number
of rows, where a finished row makes room for the next prompt.

Rows are contiguous from the left: prompt, response with its EOS, padding (id 0). The key of a sampled token folds in
(key, the prompt's id, the sample k, the response index), so batching, slot refill and padding change no token.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from rlhf_jax.backends import on_host
from rlhf_jax.types import Cache, Model, Params, PromptBatch, Samples


class Decoding(NamedTuple):
    """What the decode loop carries: R responses, each at its place, and B rows that decode those in `response`.

    N = max_new_tokens; `tokens` and `logp` are indexed by response place. A response goes on until it has finished (a
    stop id) or is full (N tokens). A row whose response has ended is not live, and neither is one that holds nobody's
    (R): only live rows are advanced. `uniform` holds the random numbers of every token, drawn before the loop: inside
    it they would cost a dozen small kernels a token.
    """

    tokens: Int[Array, "R N"]
    logp: Float[Array, "R N"]
    counts: Int[Array, " R"]
    finished: Bool[Array, " R"]
    uniform: Float[Array, "R N 2"]
    response: Int[Array, " B"]
    cache: Cache

    @property
    def live(self) -> Bool[Array, " B"]:
        """Rows that want another token."""
        going = ~self.finished & (self.counts < self.tokens.shape[1])
        return jnp.concatenate([going, jnp.zeros((1,), bool)])[self.response]


class Waiting(NamedTuple):
    """Responses that have begun and wait for a row: Q places, and the caches of the prompts they answer.

    Those from `given` to `count` still wait. Response q answers prompt ``source[q]`` of the cache.
    """

    response: Int[Array, " Q"]
    source: Int[Array, " Q"]
    given: Int[Array, ""]
    count: Int[Array, ""]
    cache: Cache


def generate(
    model: Model,
    params: Params,
    prompts: PromptBatch,
    key: Key[Array, ""],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_ids: Sequence[int] = (),
    samples_per_prompt: int = 1,
) -> Samples:
    """Sample responses; compiled as a whole, once per model, shape and setting.

    Args:
      model: a language model.
      params: its parameters.
      prompts: B prompts of at least one token each; `ids` are their places in the stream.
      key: of the iteration, ``fold_in(key(seed), step)``.
      max_new_tokens: N, tokens; a response that reaches it without a stop id has ``finished`` False.
      temperature: divides the logits; 0 is greedy.
      top_k: keep the k likeliest tokens; 0 keeps all.
      top_p: then keep the fewest likeliest tokens whose probability reaches p.
      stop_ids: the ids that end a response (EOS and others); the stop token belongs to the response.
      samples_per_prompt: K; sample k of prompt b is the row ``b * K + k``.

    Returns:
      `Samples` with ``T = P + N`` slots. ``logp`` (nats, float32) is under the distribution sampled from, that is after
      temperature, top-k and top-p; a greedy token has probability 1 there, so its ``logp`` is 0.

    Raises:
      ValueError: a setting is out of range, or a row may outgrow the model's context.
    """
    _validate(model, prompts, max_new_tokens, temperature, top_k, top_p, samples_per_prompt)
    return _generate(
        model,
        params,
        prompts,
        key,
        max_new_tokens=int(max_new_tokens),
        temperature=float(temperature),
        top_k=int(top_k),
        top_p=float(top_p),
        stop_ids=tuple(int(i) for i in stop_ids),
        samples_per_prompt=int(samples_per_prompt),
    )


def lower_generate(
    model: Model,
    params: Params,
    prompts: PromptBatch,
    key: Key[Array, ""] | jax.ShapeDtypeStruct,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    stop_ids: Sequence[int] = (),
) -> jax.stages.Lowered:
    """The program that `generate` would run for such arguments, to be compiled and looked at; nothing is sampled.

    Args:
      model: a language model.
      params: its parameters, or their shapes with shardings.
      prompts: B prompts, or their shapes.
      key: a key, or its shape.
      max_new_tokens: as in `generate`.
      temperature: as in `generate`.
      stop_ids: as in `generate`.

    Raises:
      ValueError: as `generate`.
    """
    _validate(model, prompts, max_new_tokens, temperature, 0, 1.0, 1)
    stops = tuple(int(i) for i in stop_ids)
    return _generate.lower(
        model, params, prompts, key, max_new_tokens=int(max_new_tokens), samples_per_prompt=1,
        temperature=float(temperature), top_k=0, top_p=1.0, stop_ids=stops,
    )  # fmt: skip


def _validate(model, prompts, max_new_tokens, temperature, top_k, top_p, samples_per_prompt) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("samples_per_prompt", samples_per_prompt)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must not be negative: choose 0 for greedy decoding")
    if top_k < 0:
        raise ValueError(f"top_k={top_k} must not be negative: choose 0 to keep every token")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in (0, 1]: choose 1.0 to keep every token")
    width = prompts.tokens.shape[1]
    slots = width + max_new_tokens
    context = getattr(model.config, "context_length", slots)
    if slots > context:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} after prompts of {width} slots needs {slots} positions, "
            f"more than the context_length={context}: choose at most {context - width}"
        )


_SAMPLING = ("temperature", "top_k", "top_p", "stop_ids")


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "samples_per_prompt", *_SAMPLING))
def _generate(model, params, prompts, key, *, max_new_tokens, samples_per_prompt, **sampling) -> Samples:
    hidden, cache = prefill(model, params, prompts, slots=prompts.tokens.shape[1] + max_new_tokens)
    params = model.for_decoding(params)
    keys = row_keys(key, prompts.ids, samples_per_prompt)
    hidden = jnp.repeat(hidden, samples_per_prompt, axis=0)
    state = start(draws(keys, max_new_tokens), cache.repeat(samples_per_prompt))
    state = _draw(model, params, hidden, state, state.response, **sampling)
    state = jax.lax.while_loop(lambda s: s.live.any(), partial(_advance, model, params, **sampling), state)
    prompts = jax.tree.map(lambda x: jnp.repeat(x, samples_per_prompt, axis=0), prompts)
    return _rows(prompts, state.tokens, state.logp, state.counts, state.finished)


def prefill(model: Model, params: Params, prompts: PromptBatch, *, slots: int) -> tuple[Float[Array, "B D"], Cache]:
    """Run the prompts once: the hidden state of each prompt's last token, and a cache of `slots` slots a row."""
    batch, width = prompts.tokens.shape
    places = jnp.broadcast_to(jnp.arange(width), (batch, width))
    segments = (places < jnp.asarray(prompts.lengths)[:, None]).astype(jnp.int32)
    rows = {"segments": segments, "positions": places, "cache": model.init_cache(batch, width)}
    last = jnp.asarray(prompts.lengths)[:, None] - 1
    hidden, cache = model.apply_at(params, jnp.asarray(prompts.tokens), last, **rows)
    # The prompts looked at their own slots alone: the others come only now.
    return hidden[:, 0], jax.tree.map(_at_origin, model.init_cache(batch, slots), cache)


def _at_origin(whole: Array, part: Array) -> Array:
    return jax.lax.dynamic_update_slice(whole, part, (0,) * whole.ndim)


def start(uniform: Float[Array, "B N 2"], cache: Cache) -> Decoding:
    """An empty response for each prefilled row; its random numbers as from `draws`."""
    rows = uniform.shape[0]
    return Decoding(
        tokens=jnp.zeros(uniform.shape[:2], jnp.int32),
        logp=jnp.zeros(uniform.shape[:2], jnp.float32),
        counts=jnp.zeros((rows,), jnp.int32),
        finished=jnp.zeros((rows,), bool),
        uniform=uniform,
        response=jnp.arange(rows, dtype=jnp.int32),
        cache=cache,
    )


def _advance(model: Model, params: Params, state: Decoding, **sampling: Any) -> Decoding:
    """Another token for each live row."""
    response = jnp.where(state.live, state.response, state.tokens.shape[0])
    hidden, state = decode_step(model, params, state)
    return _draw(model, params, hidden, state, response, **sampling)


def decode_step(model: Model, params: Params, state: Decoding) -> tuple[Float[Array, "B D"], Decoding]:
    """Feed each live row's last token: its hidden state (which predicts the next token) and the advanced cache."""
    last = jnp.maximum(state.counts - 1, 0)[:, None]
    last = jnp.take_along_axis(state.tokens, last, axis=1)[:, 0]
    output = model.apply(
        params,
        jnp.where(state.live, last[jnp.minimum(state.response, last.shape[0] - 1)], 0)[:, None],
        # A row that is not live feeds padding, which the cache does not store.
        segments=state.live.astype(jnp.int32)[:, None],
        positions=state.cache.lengths[:, None],
        cache=state.cache,
    )
    return output.hidden[:, 0], state._replace(cache=output.cache)


def _row_key(key: Key[Array, ""], prompt_id: Int[Array, ""], sample: Int[Array, ""]) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.fold_in(key, prompt_id), sample)


def row_keys(key: Key[Array, ""], ids: Int[Array, " B"], samples_per_prompt: int) -> Key[Array, " BK"]:
    """One key per row: ``fold_in(fold_in(key, prompt id), k)``."""
    samples = jnp.arange(samples_per_prompt)
    fold = jax.vmap(jax.vmap(partial(_row_key, key), (None, 0)), (0, None))
    return fold(jnp.asarray(ids), samples).reshape(-1)


def draws(keys: Key[Array, " B"], max_new_tokens: int) -> Float[Array, "B N 2"]:
    """Two numbers in [0, 1) for each token of each row, from ``fold_in(row's key, place)``."""
    places = jnp.arange(max_new_tokens)
    one = lambda key, place: jax.random.uniform(jax.random.fold_in(key, place), (2,))  # noqa: E731
    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(keys, places)


def sample_token(
    logits: Float[Array, "B V"],
    uniform: Float[Array, "B 2"],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """A token per row and its log-prob (nats) under the distribution sampled from, by inverting its cumulative sums.

    The vocabulary is cut into about sqrt(V) blocks: one uniform number chooses the block by its mass, another the token
    in it. So a row needs two random numbers and one pass over its logits, the pass of the log-sum-exp; the Gumbel trick
    needs V numbers. Blocks are as wide as a power of two, which is what vector units sum fastest.

    Args:
      logits: float32.
      uniform: two random numbers a row, of this token alone (`draws`).
      temperature: 0 is greedy.
      top_k: 0 keeps all.
      top_p: 1.0 keeps all.

    Returns:
      Tokens and log-probs (0 when greedy: the distribution is a point).
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.zeros(logits.shape[0], jnp.float32)
    logits = truncate(logits.astype(jnp.float32) / temperature, top_k=top_k, top_p=top_p)
    size = logits.shape[1]
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    width = 1 << math.isqrt(size - 1).bit_length()  # the first power of two that is at least sqrt(V)
    blocks = jnp.pad(logits, ((0, 0), (0, -size % width)), constant_values=-jnp.inf).reshape(len(logits), -1, width)
    block, mass = _invert(jnp.sum(jnp.exp(blocks), axis=2), uniform[:, 0])
    # The chosen block's weights again, which is cheaper than to keep those of all.
    places = block[:, None] * width + jnp.arange(width)[None, :]
    weights = jnp.exp(jnp.take_along_axis(logits, places, axis=1, mode="fill", fill_value=-jnp.inf))
    inside, _ = _invert(weights, uniform[:, 1])
    tokens = block * width + inside
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jnp.log(mass)


def _invert(weights: Float[Array, "B N"], uniform: Float[Array, " B"]) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The first index whose cumulative weight exceeds ``uniform * total``, and the total. Weight 0 is never chosen."""
    cumulative = jnp.cumsum(weights, axis=1)
    total = cumulative[:, -1]
    # uniform < 1, so that the last cumulative sum always exceeds the threshold.
    return jnp.argmax(cumulative > (uniform * total)[:, None], axis=1).astype(jnp.int32), total


def truncate(logits: Float[Array, "B V"], *, top_k: int, top_p: float) -> Float[Array, "B V"]:
    """Set to -inf every logit outside the k likeliest, then outside the nucleus of mass p. The likeliest always stays.

    Of equal logits the first stay, no more of them than are needed.

    Source: Holtzman et al. 2020, section 3.1 (nucleus sampling).
    """
    if 0 < top_k < logits.shape[-1]:
        best = jax.lax.top_k(logits, top_k)[1]
        logits = jnp.where(_chosen(logits, best, True), logits, -jnp.inf)
    if top_p < 1:
        order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
        probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        logits = jnp.where(_chosen(logits, order, before < top_p), logits, -jnp.inf)
    return logits


def _chosen(logits: Float[Array, "B V"], index: Int[Array, "B N"], kept: Any) -> Bool[Array, "B V"]:
    """True at those places of each row that `index` lists and for which `kept` holds."""
    none = jnp.zeros(logits.shape, bool)
    return jnp.put_along_axis(none, index, jnp.broadcast_to(kept, index.shape), axis=-1, inplace=False)


def _draw(
    model: Model,
    params: Params,
    hidden: Float[Array, "B D"],
    state: Decoding,
    response: Int[Array, " B"],
    *,
    stop_ids: tuple[int, ...],
    **how: Any,
) -> Decoding:
    """Sample the next token of each of the responses `response` (past the end: nobody's) and append it."""
    at = jnp.minimum(response, state.tokens.shape[0] - 1)
    places = state.counts[at]
    token, logp = sample_token(model.head(params, hidden), state.uniform[at, places], **how)
    stopped = (token[:, None] == jnp.asarray(stop_ids, jnp.int32)[None, :]).any(axis=1)
    return state._replace(
        tokens=state.tokens.at[response, places].set(token, mode="drop"),
        logp=state.logp.at[response, places].set(logp, mode="drop"),
        counts=state.counts.at[response].add(1, mode="drop"),
        finished=state.finished.at[response].max(stopped, mode="drop"),
    )


def _rows(
    prompts: PromptBatch,
    tokens: Int[Array, "B N"],
    logp: Float[Array, "B N"],
    counts: Int[Array, " B"],
    finished: Bool[Array, " B"],
) -> Samples:
    """Prompt and response joined without a gap."""
    lengths = jnp.asarray(prompts.lengths)
    slots = jnp.arange(prompts.tokens.shape[1] + tokens.shape[1])[None, :]
    place = slots - lengths[:, None]
    in_response = (place >= 0) & (place < counts[:, None])
    place = jnp.clip(place, 0, tokens.shape[1] - 1)
    prompt = jnp.take_along_axis(jnp.asarray(prompts.tokens), jnp.minimum(slots, prompts.tokens.shape[1] - 1), axis=1)
    prompt = jnp.where(slots < lengths[:, None], prompt, 0).astype(jnp.int32)
    return Samples(
        tokens=jnp.where(in_response, jnp.take_along_axis(tokens, place, axis=1), prompt),
        prompt_lengths=lengths,
        lengths=lengths + counts,
        logp=jnp.where(in_response, jnp.take_along_axis(logp, place, axis=1), 0.0),
        finished=finished,
    )


# ----------------------------------------------------------------------------------------- more prompts than rows


def generate_many(
    model: Model,
    params: Params,
    prompts: PromptBatch,
    key: Key[Array, ""],
    *,
    counts: int | Sequence[int] = 1,
    rows: int = 256,
    refill: int | None = None,
    streams: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_ids: Sequence[int] = (),
    sharding: jax.sharding.Sharding | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Samples:
    """Samples of any number of prompts through a fixed number of rows, without waiting for the longest response.

    A row that ends goes on with the next prompt inside the decode loop (continuous batching): response lengths are
    heavy-tailed, and a batch that waits for its longest row computes mostly padding. `refill` prompts are prefilled
    together and wait for rows, with caches of their own; the host is asked only when none waits. The tokens are those
    of `generate` for the same key, prompt id and sample (in float32; in bfloat16 a tie may fall otherwise).

    Args:
      model: a language model.
      params: its parameters.
      prompts: N prompts, in host memory; `ids` are their places in the stream.
      key: of this stream of samples.
      counts: K, samples of each prompt: one number for all, or N numbers.
      rows: B, responses that are decoded together.
      refill: responses that begin together; None for half the rows of a stream. More take more memory.
      streams: the rows are cut into this many groups, each decoded by a thread of its own with its share of the
        prompts. One token at a time does not keep the cores of a CPU busy: two streams are a third faster on two
        cores. An accelerator wants one. It changes no token either.
      max_new_tokens: tokens, EOS included.
      temperature: divides the logits; 0 is greedy.
      top_k: as in `generate`.
      top_p: as in `generate`.
      stop_ids: the ids that end a response.
      sharding: where rows live (`sharding.batch_sharding`); None for one device.
      progress: called with (responses done, responses) after each refill.

    Returns:
      `Samples` on the host, prompt by prompt: the K samples of a prompt follow each other.

    Raises:
      ValueError: as `generate`, or when `counts` does not fit the prompts, or `streams` the devices.
    """
    repeats = np.broadcast_to(np.asarray(counts), prompts.lengths.shape)
    if repeats.min(initial=0) < 0:
        raise ValueError(f"counts={int(repeats.min())} of a prompt must not be negative: 0 leaves the prompt out")
    _validate(model, prompts, max_new_tokens, temperature, top_k, top_p, 1)
    if streams < 1 or (streams > 1 and sharding is not None and len(sharding.device_set) > 1):
        raise ValueError(f"streams={streams} must be 1 on several devices, and at least 1: pass streams=1")
    streams = max(1, min(streams, int((repeats > 0).sum())))
    rows = -(-rows // streams) if sharding is not None else max(1, -(-min(rows, int(repeats.sum())) // streams))
    host = jax.tree.map(np.asarray, prompts)
    shares = _shares(repeats, streams)
    queues = [_Queue(jax.tree.map(lambda x, i=i: x[i], host), repeats[i], rows, refill, max_new_tokens) for i in shares]
    run = partial(
        _refill_and_decode, model, params, _for_decoding(model, params), key, sharding=sharding,
        temperature=float(temperature), top_k=int(top_k), top_p=float(top_p), stop_ids=tuple(int(i) for i in stop_ids),
    )  # fmt: skip
    slots = prompts.tokens.shape[1] + max_new_tokens
    _drain_all(queues, lambda queue: _empty(model, queue, slots, max_new_tokens, sharding), run, progress)
    parts = [queue.samples() for queue in queues]
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


@partial(jax.jit, static_argnames="model")
def _for_decoding(model: Model, params: Params) -> Params:
    return model.for_decoding(params)


def _shares(counts: np.ndarray, streams: int) -> list[slice]:
    """Consecutive prompts for each stream, about the same number of responses to each, at least one prompt."""
    ends = np.searchsorted(np.cumsum(counts), np.arange(1, streams) * counts.sum() / streams) + 1
    ends = np.clip(ends, np.arange(1, streams), len(counts) - streams + np.arange(1, streams))
    return [slice(a, b) for a, b in zip([0, *ends], [*ends, len(counts)], strict=True)]


def _empty(model: Model, queue: _Queue, slots: int, max_new_tokens: int, sharding: Any) -> Decoding:
    """Rows that nobody holds, and places for the responses in them and for those that wait."""
    places = queue.places
    state = start(jnp.zeros((places, max_new_tokens, 2)), model.init_cache(queue.rows, slots))
    state = state._replace(finished=jnp.ones(places, bool), response=jnp.full(queue.rows, places, jnp.int32))
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
    """Samples each queue to its end; when one fails, or the user interrupts, the others stop at their next refill."""
    stop, turn = threading.Event(), threading.Lock()
    total = sum(queue.total for queue in queues)

    def drain(queue: _Queue) -> None:
        state = empty(queue)
        try:
            while not (queue.empty or stop.is_set()):
                with turn:  # only to dispatch: the program is compiled by one stream, and the others find it
                    state = run(state, *queue.next())
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
    """Bookkeeping on the host: which response is at each place, what is still to be sampled, what has ended."""

    def __init__(self, prompts: PromptBatch, counts: np.ndarray, rows: int, refill: int | None, max_new_tokens: int):
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
        self.ended = (np.zeros(shape, np.int32), np.zeros(shape, np.float32), *np.zeros((2, self.total), np.int32))

    @property
    def empty(self) -> bool:
        return self.collected == self.total

    def next(self) -> tuple[PromptBatch, np.ndarray, np.ndarray, np.ndarray, np.int32, np.int32]:
        """What begins next: prompts; place, prompt and sample of each response; how many; rows that may stay live."""
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
        return prompts, place, source, sample, np.int32(len(jobs)), np.int32(until)

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
            rows = _rows(prompts, ended[0], ended[1], ended[2], ended[3].astype(bool))
            return jax.tree.map(np.asarray, rows)


@partial(jax.jit, static_argnames=("model", "sharding", *_SAMPLING), donate_argnames="state")
def _refill_and_decode(
    model, params, fast, key, state, prompts, place, source, sample, count, until, *, sharding, **sampling
) -> Decoding:
    """Begin responses to `prompts` at the places `place`, then decode: whenever a row ends, it takes one that waits.

    Ends when none waits and at most `until` rows are live. `fast` are the parameters for decoding.
    """
    hidden, cache = prefill(model, params, prompts, slots=state.cache.segments.shape[1])
    keys = jax.vmap(partial(_row_key, key))(prompts.ids[source], sample)
    state = state._replace(
        response=jnp.where(state.live, state.response, state.tokens.shape[0]),  # its old place has a new response now
        counts=state.counts.at[place].set(0, mode="drop"),
        finished=state.finished.at[place].set(False, mode="drop"),
        uniform=state.uniform.at[place].set(draws(keys, state.tokens.shape[1]), mode="drop"),
    )
    state = _draw(model, params, hidden[source], state, place, **sampling)
    waiting = Waiting(place, source, jnp.zeros((), jnp.int32), count, cache)

    def advance(carry: tuple[Decoding, Waiting]) -> tuple[Decoding, Waiting]:
        # A loop, not a condition: its body works in place, and mostly it does not run.
        state, waiting = jax.lax.while_loop(_may_hand_over, _hand_over, carry)
        return _advance(model, fast, state, **sampling), waiting

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
