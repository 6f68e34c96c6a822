"""One decoder for GPT-2, Llama, Mistral, Qwen2, Qwen3 and Gemma 3, as pure functions.

Outside this folder nobody sees nnx: parameters are a nested dict of arrays, and `apply_decoder`
  rebuilds
the modules of `layers` from it while JAX traces. The blocks are stacked: every leaf of
``params["blocks"]`` has a leading layer axis.

Shape legend: B rows, T query slots, S key slots, N wanted slots, D width, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.backends import View, take
from rlhf_jax.backends.plain import scan
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.decoding import blocks_over_cache, with_tokens
from rlhf_jax.models.layers import (
    Block,
    Embedding,
    bind_embedding,
    dropout,
    dropout_keys,
    init_module,
    rotary_angles,
    run_block,
    without_adapters,
)
from rlhf_jax.types import Cache, Output, Params

# Finite, so that a query without any key gives a uniform softmax and zero gradients instead of NaN.
_MASKED = -1e30


class Rows(NamedTuple):
    """How the tokens of a batch stand in their rows.

    Attributes:
      segments: 0 = padding, 1.. = pieces of the row.
      positions: the place of each token in its text (the caller adds a prompt's length for its
        responses).
      parents: the segment each token may also attend to; 0 or None = none.
      lengths: the tokens of each row, where it is known that every row holds one text from its
        first slot on; `segments` and `positions` say the same. None where that is not known.
    """

    segments: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    parents: Int[Array, "B T"] | None = None
    lengths: Int[Array, " B"] | None = None


def init_decoder(config: DecoderConfig, key: Array) -> Params:
    """Fresh float32 parameters.

    GPT-2's N(0, 0.02), the two projections into the residual stream divided by sqrt(2L).

    Returns:
      ``{"embed", "positions" (learned only), "norm", "blocks"}``; leaves of ``blocks`` have a
      leading axis L.
    """
    embedding_key, block_key = jax.random.split(key)
    params = init_module(Embedding, config, embedding_key)
    block_keys = jax.random.split(block_key, config.layers)
    return params | {"blocks": jax.vmap(lambda k: init_module(Block, config, k))(block_keys)}


def apply_decoder(
    config: DecoderConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    rows: Rows,
    *,
    cache: Cache | None = None,
    key: Array | None = None,
    at: Int[Array, "B N"] | None = None,
) -> Output:
    """Hidden states after the last norm.

    One attention rule serves packing, shared prefixes and caches: `visible`. With a cache the
      tokens take the slots ``lengths + 0, 1, ..`` of their row
    and also see what is cached; tokens of segment 0 must stand right of the others, and are not
    stored.

    Args:
      config: the decoder.
      params: as from `init_decoder`.
      tokens: ids.
      rows: segments, positions and parents of the tokens.
      cache: as from `decoding.init_cache`; None = the tokens are whole rows.
      key: turns dropout on.
      at: the slots whose hidden states are wanted; None for all. On one device and without adapters
        the last block then computes keys and values of all tokens, and everything else for these
        alone: with L layers nearly 1/L of the work of the others is left out.

    Returns:
      ``Output(hidden [B, T, D] in the compute dtype, cache)``; ``[B, N, D]`` with `at`.
    """
    embedding = bind_embedding(config, params)
    dropout_key = None if key is None else jax.random.fold_in(key, 0)
    x = dropout(embedding(tokens, rows.positions), config.dropout, dropout_key)
    slots = jnp.arange(tokens.shape[1])[None, :]
    if cache is None:
        view = _views(config, rows, jnp.broadcast_to(slots, tokens.shape), rows)
        return Output(embedding.norm(_whole_rows(config, params["blocks"], x, view, at, key)), None)
    slots = cache.lengths[:, None] + slots
    cache, stored_at = with_tokens(cache, rows.segments, slots)
    # A cached row is one text from its first slot on.
    keys = Rows(cache.segments, jnp.arange(cache.segments.shape[1])[None, :])
    view = _views(config, rows, slots, keys)
    step = config.backend.decode_blocks
    return Output(*step(blocks_over_cache, config, params, x, cache, stored_at, view, at, key))


def _whole_rows(
    config: DecoderConfig,
    blocks: Params,
    x: Float[Array, "B T D"],
    view: Callable[[Any], View],
    at: Int[Array, "B N"] | None,
    key: Array | None,
) -> Float[Array, "B N D"]:
    """All blocks over whole rows: stacked layers one after the other."""
    backend = config.backend

    def body(x: Array, layer: Array, own: Params, **some: Any) -> Array:
        keys = dropout_keys(key, layer)
        return run_block(config, backend, x, own, view(layer), keys=keys, **some)[0]

    recomputed = jax.checkpoint if config.remat == "block" else lambda body: body
    weights, adapters = without_adapters(blocks)
    if not adapters:
        return backend.over_layers(recomputed(body), x, blocks, positions=at, unroll=config.unroll)

    # Only the last layers are adapted, so there are two scans. Frozen weights are read from the
    # stacks: as a scanned operand each part of them would be a copy.
    def adapted(x: Array, layer: Array, own: dict[Any, Array]) -> Array:
        frozen = {path: leaf[layer] for path, leaf in weights.items()}
        return body(x, layer, traverse_util.unflatten_dict(frozen | own))

    adapted = recomputed(adapted)
    below = config.layers - next(iter(adapters.values())).shape[0]
    x = scan(adapted, x, {}, config.unroll, layers=range(below)) if below else x
    x = scan(adapted, x, adapters, config.unroll, layers=range(below, config.layers))
    return x if at is None else take(x, at)


# ------------------------------------------------------------------------------- what a query sees


def visible(
    query_segments: Int[Array, "B T"],
    query_parents: Int[Array, "B T"],
    query_slots: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
) -> Bool[Array, "B T S"]:
    """A query sees keys not later in its row, of its own segment or its parent segment.

    This is the one attention rule. "Later" is the slot, not the position. Padding (segment 0) sees
    padding: its outputs are ignored but finite.
    """
    own, keys = query_segments[:, :, None], key_segments[:, None, :]
    parent = query_parents[:, :, None]
    not_later = jnp.arange(key_segments.shape[1])[None, None, :] <= query_slots[:, :, None]
    return not_later & ((keys == own) | ((keys == parent) & (parent > 0)))


def _views(config: DecoderConfig, rows: Rows, slots: Int[Array, "B T"], keys: Rows) -> Callable[[Any], View]:
    """A layer's view: the same for all layers, or a window and angles of its own for local layers.

    `keys` is `rows` itself where whole rows see themselves.
    """
    parents = jnp.zeros_like(rows.segments) if rows.parents is None else rows.parents
    seen = visible(rows.segments, parents, slots, keys.segments)
    whole = _view(config, seen, rows.positions)
    if not config.window:
        by_segments = keys is rows and rows.parents is None
        segments, lengths = (rows.segments, rows.lengths) if by_segments else (None, None)
        whole = whole._replace(segments=segments, lengths=lengths)
        return lambda layer: whole
    near = rows.positions[:, :, None] - keys.positions[:, None, :] < config.window
    base = config.local_rotary_base
    plain = dataclasses.replace(config, rotary_base=base, rotary_scaling=None)
    local = _view(plain, seen & near, rows.positions)

    def view(layer: Any) -> View:
        is_global = (layer + 1) % config.window_every == 0
        return jax.tree.map(lambda a, b: jnp.where(is_global, a, b), whole, local)

    return view


def _view(config: DecoderConfig, seen: Bool[Array, "B T S"], positions: Int[Array, "B T"]) -> View:
    angles = rotary_angles(config, positions)
    return View(jnp.where(seen, 0.0, _MASKED)[:, None], angles, angles)
