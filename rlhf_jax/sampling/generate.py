"""Sampling: one prefill for the K samples of a prompt, then cached decode steps.

`generate` samples one batch in one compiled program, whose loop ends when every row has ended.
`refill.generate_many` decodes any number of prompts in a fixed number of rows: a row whose response
has ended continues with the next prompt.

Rows are contiguous from the left: prompt, response with its EOS, padding (id 0). The random numbers
of a token depend only on (key, prompt id, sample k, index in the response), so batching, refill and
padding change no token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from rlhf_jax.types import Cache, Model, Params, PromptBatch, Samples


class Decoding(NamedTuple):
    """The state of the decode loop: R responses, and B rows that each decode one of them.

    N = max_new_tokens. `tokens`, `logp`, `counts`, `finished` and `uniform` are indexed by
    response. A response ends when it is finished (a stop id) or full (N tokens). A row is live
    until its response has ended; ``response == R`` marks an idle row. Only live rows are advanced.
    `uniform` has the random numbers of every token. They are drawn before the loop, because inside
    it they would cost a dozen small kernels per token.
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
        """Rows that decode another token."""
        going = ~self.finished & (self.counts < self.tokens.shape[1])
        # An idle row has the index R and reads the False that is appended.
        return jnp.concatenate([going, jnp.zeros((1,), bool)])[self.response]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn and when a response ends; checked on construction.

    Raises:
      ValueError: a number out of range; the message names the field.
    """

    max_new_tokens: int
    """N, tokens; a response that reaches it without a stop id has ``finished`` False."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Then keep the smallest set of likeliest tokens with a total probability of at least p."""
    stop_ids: Sequence[int] = ()
    """The ids that end a response (EOS and others); the stop token belongs to the response."""

    def __post_init__(self):
        # Plain Python numbers hash alike, so that equal settings share one compiled program.
        plain = {
            "max_new_tokens": int(self.max_new_tokens),
            "temperature": float(self.temperature),
            "top_k": int(self.top_k),
            "top_p": float(self.top_p),
            "stop_ids": tuple(int(i) for i in self.stop_ids),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.temperature < 0:
            raise ValueError(
                f"temperature={self.temperature} must not be negative: choose 0 for greedy decoding"
            )
        if self.top_k < 0:
            raise ValueError(
                f"top_k={self.top_k} must not be negative: choose 0 to keep every token"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p={self.top_p} must lie in (0, 1]: choose 1.0 to keep every token"
            )


def generate(
    model: Model,
    params: Params,
    prompts: PromptBatch,
    key: Key[Array, ""],
    sampling: Sampling,
    *,
    samples_per_prompt: int = 1,
) -> Samples:
    """Sample responses; compiled as a whole, once per model, shape and setting.

    Args:
      model: a language model.
      params: its parameters.
      prompts: B prompts of at least one token each; `ids` are their indices in the stream.
      key: of the iteration, ``fold_in(key(seed), step)``.
      sampling: how tokens are drawn and when a response ends.
      samples_per_prompt: K; sample k of prompt b is the row ``b * K + k``.

    Returns:
      `Samples` with ``T = P + N`` slots. ``logp`` (nats, float32) is under the sampling
      distribution, that is after temperature, top-k and top-p; a greedy token has probability 1, so
      its ``logp`` is 0.

    Raises:
      ValueError: a row may outgrow the model's context, or `samples_per_prompt` is below 1.
    """
    if samples_per_prompt < 1:
        raise ValueError(f"samples_per_prompt={samples_per_prompt} must be at least 1")
    require_room(model, prompts, sampling)
    return _generate(model, params, prompts, key, sampling=sampling, copies=int(samples_per_prompt))


def lower_generate(
    model: Model,
    params: Params,
    prompts: PromptBatch,
    key: Key[Array, ""] | jax.ShapeDtypeStruct,
    sampling: Sampling,
) -> jax.stages.Lowered:
    """The lowered program that `generate` would run for these arguments; nothing is sampled.

    Args:
      model: a language model.
      params: its parameters, or their shapes with shardings.
      prompts: B prompts, or their shapes.
      key: a key, or its shape.
      sampling: as in `generate`.

    Returns:
      The program, to be compiled or measured.

    Raises:
      ValueError: as `generate`.
    """
    require_room(model, prompts, sampling)
    return _generate.lower(model, params, prompts, key, sampling=sampling, copies=1)


def require_room(model: Model, prompts: PromptBatch, sampling: Sampling) -> None:
    """Refuse prompts that leave no room for a whole response in the model's context.

    Raises:
      ValueError: there is no room; the message has the numbers and a setting that fits.
    """
    width = prompts.tokens.shape[1]
    slots = width + sampling.max_new_tokens
    context = getattr(model.config, "context_length", slots)
    if slots > context:
        raise ValueError(
            f"max_new_tokens={sampling.max_new_tokens} after prompts of {width} slots needs "
            f"{slots} positions, more than the context_length={context}: choose at most "
            f"{context - width}"
        )


@partial(jax.jit, static_argnames=("model", "sampling", "copies"))
def _generate(model, params, prompts, key, *, sampling: Sampling, copies: int) -> Samples:
    hidden, cache = prefill(
        model, params, prompts, slots=prompts.tokens.shape[1] + sampling.max_new_tokens
    )
    # Once per rollout and after the prefill, which reads the parameters in their own layout.
    params = model.for_decoding(params)
    keys = row_keys(key, prompts.ids, copies)
    hidden = jnp.repeat(hidden, copies, axis=0)
    state = empty_responses(draws(keys, sampling.max_new_tokens), cache.repeat(copies))
    # The prefill has computed what predicts the first token.
    state = append_token(model, params, hidden, state, state.response, sampling)
    state = jax.lax.while_loop(
        lambda s: s.live.any(), partial(another_token, model, params, sampling=sampling), state
    )
    prompts = jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), prompts)
    return join_responses(prompts, state.tokens, state.logp, state.counts, state.finished)


def prefill(
    model: Model, params: Params, prompts: PromptBatch, *, slots: int
) -> tuple[Float[Array, "B D"], Cache]:
    """The hidden state of each prompt's last token, and a cache of `slots` slots per row."""
    batch, width = prompts.tokens.shape
    places = jnp.broadcast_to(jnp.arange(width), (batch, width))
    segments = (places < jnp.asarray(prompts.lengths)[:, None]).astype(jnp.int32)
    rows = {"segments": segments, "positions": places, "cache": model.init_cache(batch, width)}
    last = jnp.asarray(prompts.lengths)[:, None] - 1
    hidden, cache = model.apply_at(params, jnp.asarray(prompts.tokens), last, **rows)
    # The prefill attends to the prompt's slots only; the cache gets its full length afterwards.
    return hidden[:, 0], jax.tree.map(_at_origin, model.init_cache(batch, slots), cache)


def _at_origin(whole: Array, part: Array) -> Array:
    return jax.lax.dynamic_update_slice(whole, part, (0,) * whole.ndim)


def empty_responses(uniform: Float[Array, "B N 2"], cache: Cache) -> Decoding:
    """An empty response for each prefilled row, with the random numbers of `draws`."""
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


def another_token(model: Model, params: Params, state: Decoding, sampling: Sampling) -> Decoding:
    """Decode one more token of each live row."""
    # From the state before the step; the index R drops the writes of rows that are not live.
    response = jnp.where(state.live, state.response, state.tokens.shape[0])
    hidden, state = decode_step(model, params, state)
    return append_token(model, params, hidden, state, response, sampling)


def decode_step(
    model: Model, params: Params, state: Decoding
) -> tuple[Float[Array, "B D"], Decoding]:
    """Run the model on each live row's last token: its hidden state, and the advanced cache.

    The hidden state predicts the next token.
    """
    last = jnp.maximum(state.counts - 1, 0)[:, None]
    # Per response; each row then takes that of its own one.
    last = jnp.take_along_axis(state.tokens, last, axis=1)[:, 0]
    output = model.apply(
        params,
        jnp.where(state.live, last[jnp.minimum(state.response, last.shape[0] - 1)], 0)[:, None],
        # The input of a row that is not live is padding, which the cache does not store.
        segments=state.live.astype(jnp.int32)[:, None],
        positions=state.cache.lengths[:, None],
        cache=state.cache,
    )
    return output.hidden[:, 0], state._replace(cache=output.cache)


def row_key(
    key: Key[Array, ""], prompt_id: Int[Array, ""], sample: Int[Array, ""]
) -> Key[Array, ""]:
    """The key of one response, independent of the row that decodes it."""
    return jax.random.fold_in(jax.random.fold_in(key, prompt_id), sample)


def row_keys(
    key: Key[Array, ""], ids: Int[Array, " B"], samples_per_prompt: int
) -> Key[Array, " BK"]:
    """One key per row: ``fold_in(fold_in(key, prompt id), k)``."""
    samples = jnp.arange(samples_per_prompt)
    fold = jax.vmap(jax.vmap(partial(row_key, key), (None, 0)), (0, None))
    return fold(jnp.asarray(ids), samples).reshape(-1)


def draws(keys: Key[Array, " B"], max_new_tokens: int) -> Float[Array, "B N 2"]:
    """Two numbers in [0, 1) per token of each row, from ``fold_in(row's key, token index)``."""
    places = jnp.arange(max_new_tokens)
    one = lambda key, place: jax.random.uniform(jax.random.fold_in(key, place), (2,))
    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(keys, places)


def sample_token(
    logits: Float[Array, "B V"],
    uniform: Float[Array, "B 2"],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """A token per row and its log-prob (nats) under the sampling distribution.

    Sampling inverts the cumulative distribution. The vocabulary is cut into about sqrt(V) blocks:
    one uniform number chooses the block by its mass, another one the token in it. So a row needs
    two random numbers and one pass over its logits, that of the log-sum-exp; the Gumbel trick needs
    V numbers. The width of a block is a power of two, which vector units sum fastest.

    Args:
      logits: float32.
      uniform: two random numbers per row, used for no other token (`draws`).
      temperature: 0 is greedy.
      top_k: 0 keeps all.
      top_p: 1.0 keeps all.

    Returns:
      Tokens and log-probs (0 when greedy: the distribution is a point).
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.zeros(
            logits.shape[0], jnp.float32
        )
    logits = truncate(logits.astype(jnp.float32) / temperature, top_k=top_k, top_p=top_p)
    size = logits.shape[1]
    # The largest weight becomes 1: no exponential overflows, and their sum is at least 1.
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    # The first power of two that is at least sqrt(V).
    width = 1 << math.isqrt(size - 1).bit_length()
    # The padding has weight 0 and is never chosen.
    blocks = jnp.pad(logits, ((0, 0), (0, -size % width)), constant_values=-jnp.inf).reshape(
        len(logits), -1, width
    )
    block, mass = _invert(jnp.sum(jnp.exp(blocks), axis=2), uniform[:, 0])
    # Computing the chosen block's weights again is cheaper than keeping those of all blocks.
    places = block[:, None] * width + jnp.arange(width)[None, :]
    weights = jnp.exp(jnp.take_along_axis(logits, places, axis=1, mode="fill", fill_value=-jnp.inf))
    inside, _ = _invert(weights, uniform[:, 1])
    tokens = block * width + inside
    # `mass` is the sum over all blocks, so this is the log-softmax of the truncated logits.
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jnp.log(mass)


def _invert(
    weights: Float[Array, "B N"], uniform: Float[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The first index with a cumulative weight above ``uniform * total``, and the total.

    An index with weight 0 is never chosen.
    """
    cumulative = jnp.cumsum(weights, axis=1)
    total = cumulative[:, -1]
    # uniform < 1, so that the last cumulative sum always exceeds the threshold.
    return jnp.argmax(cumulative > (uniform * total)[:, None], axis=1).astype(jnp.int32), total


def truncate(logits: Float[Array, "B V"], *, top_k: int, top_p: float) -> Float[Array, "B V"]:
    """Set to -inf every logit outside the k likeliest, then outside the nucleus of mass p.

    The likeliest token is always kept. Of equal logits, the first ones are kept, and only as many
    as are needed.

    Source: Holtzman et al. 2020, section 3.1 (nucleus sampling).
    """
    if 0 < top_k < logits.shape[-1]:
        # By index and not by comparing with the k-th logit, which would keep all that are equal to
        # it.
        best = jax.lax.top_k(logits, top_k)[1]
        logits = jnp.where(_chosen(logits, best, True), logits, -jnp.inf)
    if top_p < 1:
        order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
        probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        # The mass before a token, so that the one that crosses p is kept, and the likeliest always.
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        logits = jnp.where(_chosen(logits, order, before < top_p), logits, -jnp.inf)
    return logits


def _chosen(logits: Float[Array, "B V"], index: Int[Array, "B N"], kept: Any) -> Bool[Array, "B V"]:
    """True at the ids of each row that `index` lists and for which `kept` is true."""
    none = jnp.zeros(logits.shape, bool)
    return jnp.put_along_axis(
        none, index, jnp.broadcast_to(kept, index.shape), axis=-1, inplace=False
    )


def append_token(
    model: Model,
    params: Params,
    hidden: Float[Array, "B D"],
    state: Decoding,
    response: Int[Array, " B"],
    sampling: Sampling,
) -> Decoding:
    """Sample the next token of each response in `response`, and append it.

    An index of R or more marks an idle row, for which nothing is stored.
    """
    # Reads must be in range for idle rows too; only writes drop an index past the end.
    at = jnp.minimum(response, state.tokens.shape[0] - 1)
    places = state.counts[at]
    token, logp = sample_token(
        model.head(params, hidden),
        state.uniform[at, places],
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
    )
    stopped = (token[:, None] == jnp.asarray(sampling.stop_ids, jnp.int32)[None, :]).any(axis=1)
    return state._replace(
        tokens=state.tokens.at[response, places].set(token, mode="drop"),
        logp=state.logp.at[response, places].set(logp, mode="drop"),
        counts=state.counts.at[response].add(1, mode="drop"),
        # The maximum of booleans is their disjunction: what is finished stays so.
        finished=state.finished.at[response].max(stopped, mode="drop"),
    )


def join_responses(
    prompts: PromptBatch,
    tokens: Int[Array, "B N"],
    logp: Float[Array, "B N"],
    counts: Int[Array, " B"],
    finished: Bool[Array, " B"],
) -> Samples:
    """Join prompts and responses without a gap."""
    lengths = jnp.asarray(prompts.lengths)
    slots = jnp.arange(prompts.tokens.shape[1] + tokens.shape[1])[None, :]
    # The index in the response of each slot; rows have prompts of different lengths, so this is a
    # gather and not a slice.
    place = slots - lengths[:, None]
    in_response = (place >= 0) & (place < counts[:, None])
    place = jnp.clip(place, 0, tokens.shape[1] - 1)
    prompt = jnp.take_along_axis(
        jnp.asarray(prompts.tokens), jnp.minimum(slots, prompts.tokens.shape[1] - 1), axis=1
    )
    prompt = jnp.where(slots < lengths[:, None], prompt, 0).astype(jnp.int32)
    return Samples(
        tokens=jnp.where(in_response, jnp.take_along_axis(tokens, place, axis=1), prompt),
        prompt_lengths=lengths,
        lengths=lengths + counts,
        logp=jnp.where(in_response, jnp.take_along_axis(logp, place, axis=1), 0.0),
        finished=finished,
    )
