"""Sampling: one prefill for the K samples of a prompt, then a cached decode loop that stops when every row has.

Rows are contiguous from the left: prompt, response with its EOS, padding (id 0). The key of a sampled token folds in
(key, the prompt's id, the sample k, the response index), so batching and padding change no token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from rlhf_jax.types import Cache, Model, Params, PromptBatch, Samples


class Decoding(NamedTuple):
    """What the decode loop carries; N = max_new_tokens. `tokens` and `logp` are indexed by response place."""

    step: Int[Array, ""]
    last: Int[Array, " B"]
    tokens: Int[Array, "B N"]
    logp: Float[Array, "B N"]
    counts: Int[Array, " B"]
    finished: Bool[Array, " B"]
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


_STATIC = ("max_new_tokens", "temperature", "top_k", "top_p", "stop_ids", "samples_per_prompt")


@partial(jax.jit, static_argnames=("model", *_STATIC))
def _generate(
    model, params, prompts, key, *, max_new_tokens, temperature, top_k, top_p, stop_ids, samples_per_prompt
) -> Samples:
    sample = partial(sample_token, temperature=temperature, top_k=top_k, top_p=top_p)
    hidden, cache = prefill(model, params, prompts, slots=prompts.tokens.shape[1] + max_new_tokens)
    state = start(hidden, cache, samples_per_prompt=samples_per_prompt, max_new_tokens=max_new_tokens)
    keys = row_keys(key, prompts.ids, samples_per_prompt)
    hidden = jnp.repeat(hidden, samples_per_prompt, axis=0)
    state = _append(state, *sample(model.head(params, hidden), keys, state.step), stop_ids=stop_ids)

    def unfinished(state: Decoding) -> Bool[Array, ""]:
        return (state.step < max_new_tokens) & ~state.finished.all()

    def advance(state: Decoding) -> Decoding:
        hidden, state = decode_step(model, params, state)
        return _append(state, *sample(model.head(params, hidden), keys, state.step), stop_ids=stop_ids)

    return _rows(prompts, jax.lax.while_loop(unfinished, advance, state), samples_per_prompt)


def prefill(model: Model, params: Params, prompts: PromptBatch, *, slots: int) -> tuple[Float[Array, "B D"], Cache]:
    """Run the prompts once: the hidden state of each prompt's last token, and a cache of `slots` slots a row."""
    batch, width = prompts.tokens.shape
    places = jnp.broadcast_to(jnp.arange(width), (batch, width))
    segments = (places < jnp.asarray(prompts.lengths)[:, None]).astype(jnp.int32)
    output = model.apply(
        params,
        jnp.asarray(prompts.tokens),
        segments=segments,
        positions=places,
        cache=model.init_cache(batch, slots),
    )
    assert output.cache is not None
    last = jnp.asarray(prompts.lengths)[:, None, None] - 1
    return jnp.take_along_axis(output.hidden, last, axis=1)[:, 0], output.cache


def start(hidden: Float[Array, "B D"], cache: Cache, *, samples_per_prompt: int, max_new_tokens: int) -> Decoding:
    """An empty response for each of the K samples of each prefilled prompt."""
    rows = hidden.shape[0] * samples_per_prompt
    return Decoding(
        step=jnp.int32(0),
        last=jnp.zeros((rows,), jnp.int32),
        tokens=jnp.zeros((rows, max_new_tokens), jnp.int32),
        logp=jnp.zeros((rows, max_new_tokens), jnp.float32),
        counts=jnp.zeros((rows,), jnp.int32),
        finished=jnp.zeros((rows,), bool),
        cache=cache.repeat(samples_per_prompt),
    )


def decode_step(model: Model, params: Params, state: Decoding) -> tuple[Float[Array, "B D"], Decoding]:
    """Feed each live row's last token: its hidden state (which predicts the next token) and the advanced cache."""
    output = model.apply(
        params,
        state.last[:, None],
        # A finished row feeds padding, which the cache does not store.
        segments=(~state.finished).astype(jnp.int32)[:, None],
        positions=state.cache.lengths[:, None],
        cache=state.cache,
    )
    return output.hidden[:, 0], state._replace(cache=output.cache)


def row_keys(key: Key[Array, ""], ids: Int[Array, " B"], samples_per_prompt: int) -> Key[Array, " BK"]:
    """One key per row: ``fold_in(fold_in(key, prompt id), k)``."""
    samples = jnp.arange(samples_per_prompt)
    fold = jax.vmap(jax.vmap(lambda i, k: jax.random.fold_in(jax.random.fold_in(key, i), k), (None, 0)), (0, None))
    return fold(jnp.asarray(ids), samples).reshape(-1)


def sample_token(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    place: Int[Array, ""],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """A token per row and its log-prob (nats) under the distribution sampled from, by the Gumbel-max trick.

    ``token = argmax_v (logits[v] / temperature + G_v)`` with standard Gumbel noise G is a draw from
    ``softmax(logits / temperature)``.

    Args:
      logits: float32.
      keys: one per row; `place`, the response index, is folded in.
      place: response index of this token.
      temperature: 0 is greedy.
      top_k: 0 keeps all.
      top_p: 1.0 keeps all.

    Returns:
      Tokens and log-probs (0 when greedy: the distribution is a point).
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.zeros(logits.shape[0], jnp.float32)
    logits = truncate(logits.astype(jnp.float32) / temperature, top_k=top_k, top_p=top_p)
    noise = jax.vmap(lambda k: jax.random.gumbel(jax.random.fold_in(k, place), logits.shape[1:]))(keys)
    tokens = jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def truncate(logits: Float[Array, "B V"], *, top_k: int, top_p: float) -> Float[Array, "B V"]:
    """Set to -inf every logit outside the k likeliest, then outside the nucleus of mass p. The likeliest always stays.

    Source: Holtzman et al. 2020, section 3.1 (nucleus sampling).
    """
    if 0 < top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        smallest = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return logits


def _append(
    state: Decoding, token: Int[Array, " B"], logp: Float[Array, " B"], *, stop_ids: tuple[int, ...]
) -> Decoding:
    live = ~state.finished
    token, logp = jnp.where(live, token, 0), jnp.where(live, logp, 0.0)
    stopped = (token[:, None] == jnp.asarray(stop_ids, jnp.int32)[None, :]).any(axis=1)
    return state._replace(
        step=state.step + 1,
        last=token,
        tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.step)),
        logp=jax.lax.dynamic_update_slice(state.logp, logp[:, None], (0, state.step)),
        counts=state.counts + live,
        finished=state.finished | (live & stopped),
    )


def _rows(prompts: PromptBatch, state: Decoding, samples_per_prompt: int) -> Samples:
    """Prompt and response joined without a gap."""
    tokens = jnp.repeat(jnp.asarray(prompts.tokens), samples_per_prompt, axis=0)
    lengths = jnp.repeat(jnp.asarray(prompts.lengths), samples_per_prompt, axis=0)
    slots = jnp.arange(tokens.shape[1] + state.tokens.shape[1])[None, :]
    place = slots - lengths[:, None]
    in_response = (place >= 0) & (place < state.counts[:, None])
    place = jnp.clip(place, 0, state.tokens.shape[1] - 1)
    prompt = jnp.take_along_axis(tokens, jnp.minimum(slots, tokens.shape[1] - 1), axis=1)
    prompt = jnp.where(slots < lengths[:, None], prompt, 0).astype(jnp.int32)
    return Samples(
        tokens=jnp.where(in_response, jnp.take_along_axis(state.tokens, place, axis=1), prompt),
        prompt_lengths=lengths,
        lengths=lengths + state.counts,
        logp=jnp.where(in_response, jnp.take_along_axis(state.logp, place, axis=1), 0.0),
        finished=state.finished,
    )
