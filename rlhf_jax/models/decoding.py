"""Steps over a cache: prefill and decode, and parameters laid out for them.

Shape legend: B rows, T new tokens per row, N wanted slots, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float, Int

from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.layers import Shared, bind_embedding, run_block, without_adapters
from rlhf_jax.models.placement import ROWS, spread
from rlhf_jax.types import Cache, Params


def init_cache(config: DecoderConfig, batch: int, length: int) -> Cache:
    """An empty cache of `length` slots per row, in the compute dtype; spread over `config.mesh`."""
    layout, dtype = config.backend.cache, jnp.dtype(config.dtype)
    shapes = layout.shapes(batch, length, config.kv_heads, config.head_dim)
    axes: list[Any] = [ROWS, None, None, None]
    axes[layout.head_axis] = "tensor"

    def empty(shape: tuple[int, ...]) -> tuple[Array, ...]:
        layers = range(config.layers)
        # Arrays of their own, and not the same zeros L times: each is overwritten in place.
        return tuple(spread(config.mesh, jnp.zeros(shape, dtype), *axes) for _ in layers)

    return Cache(
        keys=empty(shapes[0]),
        values=empty(shapes[1]),
        segments=jnp.zeros((batch, length), jnp.int32),
        lengths=jnp.zeros((batch,), jnp.int32),
    )


def with_tokens(
    cache: Cache, segments: Int[Array, "B T"], slots: Int[Array, "B T"]
) -> tuple[Cache, Int[Array, "B T"]]:
    """The cache with the new tokens' segments and lengths, and the slots for their keys."""
    # Padding aims past the end, and mode="drop" leaves it out.
    slots = jnp.where(segments > 0, slots, cache.segments.shape[1])
    rows = jnp.arange(segments.shape[0])[:, None]
    stored = cache.segments.at[rows, slots].set(segments.astype(cache.segments.dtype), mode="drop")
    # Padding does not advance a row, so its next token follows the last real one without a gap.
    lengths = cache.lengths + (segments > 0).sum(axis=1).astype(cache.lengths.dtype)
    return dataclasses.replace(cache, segments=stored, lengths=lengths), slots


def blocks_over_cache(
    config: DecoderConfig,
    params: Params,
    x: Float[Array, "B T D"],
    cache: Cache,
    slots: Int[Array, "B T"],
    shared: Shared,
    at: Int[Array, "B N"] | None = None,
) -> tuple[Float[Array, "B N D"], Cache]:
    """All blocks and the last norm over new tokens, which also attend to the cache.

    This is a plain loop over layers with arrays of their own: a scan would copy each layer's part
    out of a stacked cache, which took a third of a decode step on a CPU.

    Args:
      config: the decoder.
      params: with stacked blocks, or as from `decoding_params`.
      x: embedded tokens.
      cache: with the segments of the new tokens.
      slots: where their keys and values are stored; those past the end are dropped.
      shared: what the queries of each layer see.
      at: the slots whose hidden states are wanted; None for all.

    Returns:
      Hidden states after the last norm, and the cache with the new keys and values.
    """
    keys, values, backend = list(cache.keys), list(cache.values), config.backend
    for layer, own in enumerate(layers_of(config, params["blocks"])):
        stored = (keys[layer], values[layer]), slots
        block = partial(run_block, config, backend, shared, x, layer, own, cache=stored)
        # Only the last block may leave slots out: all others feed the keys and values of the next.
        is_read = at is not None and layer == config.layers - 1
        x, stored = backend.last_block(block, at) if is_read else block()
        keys[layer], values[layer] = stored
    cache = dataclasses.replace(cache, keys=tuple(keys), values=tuple(values))
    return bind_embedding(config, params).norm(x), cache


def layers_of(config: DecoderConfig, blocks: Any) -> Sequence[Params]:
    """Each layer's parameters: unstacked here, or already by `decoding_params`."""
    if isinstance(blocks, tuple):
        return blocks
    weights, adapters = without_adapters(blocks)
    if not adapters:
        return config.backend.unstack(blocks)
    # Adapters are of the last layers; index 0 of their stacks is layer `below`.
    below = config.layers - next(iter(adapters.values())).shape[0]
    layers = []
    for layer in range(config.layers):
        own = {path: leaf[layer] for path, leaf in weights.items()}
        if layer >= below:
            own |= {path: leaf[layer - below] for path, leaf in adapters.items()}
        layers.append(traverse_util.unflatten_dict(own))
    return layers


def decoding_params(config: DecoderConfig, params: Params) -> Params:
    """Parameters in the layout that decode steps read fastest.

    Each layer has arrays of its own, in the compute dtype. From stacked arrays every decode step
    would copy every weight, and convert it where the master is wider. The rest of the layout is up
    to the backend. Call it once per rollout; it takes as much memory as the blocks.

    Args:
      config: the decoder.
      params: as from `init_decoder`, with or without a head.

    Returns:
      `params` with ``blocks`` as a tuple of layers, for `apply_decoder` with a cache only.
    """

    def narrow(path: tuple[Any, ...], leaf: Array) -> Array:
        module, name = path[-2].key, path[-1].key
        # Norms keep their dtype: that of Gemma computes ``1 + scale`` in float32. So do adapters,
        # which `Linear` converts itself.
        computes = name in ("kernel", "bias") and "norm" not in module
        return leaf.astype(config.dtype) if computes else leaf

    layout = config.backend.decode_layout
    layers = [
        layout(jax.tree_util.tree_map_with_path(narrow, layer))
        for layer in layers_of(config, params["blocks"])
    ]
    return params | {"blocks": tuple(layers)}
