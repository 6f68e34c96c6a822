"""One decoder for GPT-2, Llama, Mistral, Qwen2, Qwen3 and Gemma 3, as pure functions.

nnx is not visible outside this folder: parameters are a nested dict of arrays, and `apply_decoder`
rebuilds the modules of `layers` from it while JAX traces. The blocks are stacked: every leaf of
``params["blocks"]`` has a leading layer axis.

Shape legend: B rows, T query slots, S key slots, N wanted slots, D width, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.backends import View, take
from rlhf_jax.backends.plain import Body, depth, scan
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.decoding import blocks_over_cache, with_tokens
from rlhf_jax.models.layers import (
    Block,
    Embedding,
    Shared,
    bind_embedding,
    dropout,
    init_module,
    rotary_angles,
    run_block,
    without_adapters,
)
from rlhf_jax.types import Cache, Output, Params

# Finite, so that a query without any key gives a uniform softmax and zero gradients instead of NaN.
_MASKED = -1e30


class RowLayout(NamedTuple):
    """How the tokens of a batch are laid out in their rows.

    Attributes:
      segments: 0 = padding, 1.. = segments of the row.
      positions: the position of each token in its text (the caller adds a prompt's length for its
        responses).
      parents: the segment that each token may also attend to; 0 or None = none.
      lengths: the number of tokens of each row, if every row is known to be one text from its first
        slot on, in agreement with `segments` and `positions`; else None.
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
    # `vmap` over one key per layer gives the stacked leaves of a scan directly.
    block_keys = jax.random.split(block_key, config.layers)
    return params | {"blocks": jax.vmap(lambda k: init_module(Block, config, k))(block_keys)}


def apply_decoder(
    config: DecoderConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    cache: Cache | None = None,
    key: Array | None = None,
    at: Int[Array, "B N"] | None = None,
    **rows: Any,
) -> Output:
    """Hidden states after the last norm.

    One attention rule serves packing, shared prefixes and caches: `visible`. With a cache the
    tokens take the slots ``lengths + 0, 1, ..`` of their row and also see what is cached; tokens of
    segment 0 must come after the others, and are not stored.

    Args:
      config: the decoder.
      params: as from `init_decoder`.
      tokens: ids.
      cache: as from `decoding.init_cache`; None = the tokens are whole rows.
      key: turns dropout on.
      at: the slots whose hidden states are wanted; None for all. On one device and without
        adapters, the last block then computes keys and values of all tokens and everything else
        only for these, which saves nearly 1/L of the work of L layers on the other slots.
      **rows: the fields of `RowLayout`: segments, positions, parents and lengths.

    Returns:
      ``Output(hidden [B, T, D] in the compute dtype, cache)``; ``[B, N, D]`` with `at`.
    """
    own, backend, blocks = RowLayout(**rows), config.backend, params["blocks"]
    embedding = bind_embedding(config, params)
    # 0 is the embedding's; the layers fold in 1, 2, .. (`Shared.dropout_keys`).
    dropout_key = None if key is None else jax.random.fold_in(key, 0)
    x = dropout(embedding(tokens, own.positions), config.dropout, dropout_key)
    slots = jnp.arange(tokens.shape[1])[None, :]
    if cache is not None:
        slots = cache.lengths[:, None] + slots
        cache, stored_at = with_tokens(cache, own.segments, slots)
        # A cached row is one text from its first slot on.
        keys = RowLayout(cache.segments, jnp.arange(cache.segments.shape[1])[None, :])
        shared = _shared(config, own, slots, keys, key)
        step = backend.decode_blocks
        return Output(*step(blocks_over_cache, config, params, x, cache, stored_at, shared, at))
    shared = _shared(config, own, jnp.broadcast_to(slots, tokens.shape), own, key)
    body, over_layers = partial(run_block, config, backend, shared), backend.over_layers
    recomputed = jax.checkpoint if config.remat == "block" else lambda body: body
    # Adapters may exist for the last layers only, and one scan needs stacks of the same depth.
    if without_adapters(blocks)[1]:
        over_layers = partial(_over_adapted_layers, recomputed=recomputed)
    else:
        body = recomputed(body)
    x = over_layers(body, x, blocks, positions=at, unroll=config.unroll)
    return Output(embedding.norm(x), None)


def _over_adapted_layers(
    body: Body,
    x: Float[Array, "B T D"],
    blocks: Params,
    *,
    positions: Int[Array, "B N"] | None,
    unroll: int | None,
    recomputed: Callable[[Body], Body],
) -> Float[Array, "B N D"]:
    """`Backend.over_layers` as two scans, where only the last blocks have adapters.

    Frozen weights are sliced from their stacks inside the loop: splitting the stacks into scanned
    operands would copy them.
    """
    weights, adapters = without_adapters(blocks)

    def adapted(x: Array, layer: Array, own: dict[Any, Array]) -> tuple[Array, Any]:
        # Inside of what is recomputed, so that the backward pass keeps no layer's slice.
        frozen = {path: leaf[layer] for path, leaf in weights.items()}
        return body(x, layer, traverse_util.unflatten_dict(frozen | own))

    layers, body_of_layer = depth(weights), recomputed(adapted)
    below = layers - depth(adapters)
    x = scan(body_of_layer, x, {}, unroll, layers=range(below)) if below else x
    x = scan(body_of_layer, x, adapters, unroll, layers=range(below, layers))
    return x if positions is None else take(x, positions)


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


def _shared(
    config: DecoderConfig,
    rows: RowLayout,
    slots: Int[Array, "B T"],
    keys: RowLayout,
    key: Array | None,
) -> Shared:
    """The inputs that all layers share; `keys` is `rows` itself if there is no cache."""
    parents = jnp.zeros_like(rows.segments) if rows.parents is None else rows.parents
    seen = visible(rows.segments, parents, slots, keys.segments)
    whole = _view(config, seen, rows.positions)
    if not config.window:
        # Kernels that take segments or lengths instead of a bias can express neither parents nor
        # windows, nor a cache.
        by_segments = keys is rows and rows.parents is None
        segments, lengths = (rows.segments, rows.lengths) if by_segments else (None, None)
        return Shared(whole._replace(segments=segments, lengths=lengths), None, key)
    # Distances are in positions and not in slots: in a shared-prefix row, each response continues
    # the positions of its prompt, wherever its slots are. Causality is in `seen`.
    near = rows.positions[:, :, None] - keys.positions[:, None, :] < config.window
    base = config.local_rotary_base
    # Gemma 3 stretches the rotary positions of its global layers only.
    plain = dataclasses.replace(config, rotary_base=base, rotary_scaling=None)
    return Shared(whole, _view(plain, seen & near, rows.positions), key)


def _view(config: DecoderConfig, seen: Bool[Array, "B T S"], positions: Int[Array, "B T"]) -> View:
    # The same angles for queries and keys: these are of the new tokens, as cached keys are stored
    # already rotated.
    angles = rotary_angles(config, positions)
    return View(jnp.where(seen, 0.0, _MASKED)[:, None], angles, angles)
