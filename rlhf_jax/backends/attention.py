"""Attention as XLA's own products: whole rows, some queries of a row, and queries over a cache.

All of it computes ``softmax(q k / sqrt(scalar) + bias) v`` with the bias of
`models.decoder.visible`, packed rows and shared prefixes included. The kernels of `nvidia` and
`tpu` compute the same.

Shape legend: B rows, T query slots, S key slots, H query heads, G key-value heads, E head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

BLOCK = 128
"""Queries of a block: a row of 384 slots then costs two thirds of the plain product, a long row
one half."""

RECOMPUTE_FROM = 1024
"""Slots from which the backward pass computes a block's scores again; the scores of shorter rows
fit into memory."""

Angles = tuple[Float[Array, "B T 1 E2"], Float[Array, "B T 1 E2"]]
"""Cosines and sines of rotary positions."""

LayerCache = tuple[Array, Array]
"""Keys and values of one layer, laid out as its `KVCache` says."""


class View(NamedTuple):
    """What the queries of a layer see, and the rotary angles of queries and keys.

    Attributes:
      bias: 0 where a query sees a key, very negative elsewhere; every query sees at least one key.
      query_angles: of the slots that ask; None without rotary positions.
      key_angles: of the slots that are seen.
      segments: the segments of whole rows in which a query sees all of its own segment that is not
        later, and nothing else; None where `bias` says more than that.
      lengths: the tokens of each row where a row holds one text from its first slot on, so that
        causality alone says what a token sees; None where that is not known.
    """

    bias: Float[Array, "B 1 T S"]
    query_angles: Angles | None
    key_angles: Angles | None
    segments: Int[Array, "B T"] | None = None
    lengths: Int[Array, " B"] | None = None

    def at(self, positions: Int[Array, "B N"]) -> View:
        """The view of the queries at some slots of each row; what is seen stays the whole row."""
        return self._replace(
            bias=take(self.bias[:, 0], positions)[:, None],
            query_angles=jax.tree.map(lambda angle: take(angle, positions), self.query_angles),
        )


class KVCache(NamedTuple):
    """How one layer's keys and values are kept, and attention over them.

    Attributes:
      shapes: ``(batch, slots, groups, head_dim)`` to the shapes of keys and values.
      head_axis: the axis of both that counts key-value heads.
      write: ``(cache, slots, key, value) -> cache``; slots past the end store nothing.
      attend: ``(query, cache, view, query_scalar)`` to mixed values ``[B, T, H, E]``.
    """

    shapes: Callable[[int, int, int, int], tuple[tuple[int, ...], tuple[int, ...]]]
    head_axis: int
    write: Callable[[LayerCache, Array, Array, Array], LayerCache]
    attend: Callable[[Array, LayerCache, View, int], Array]


def take(x: Shaped[Array, "B T *rest"], at: Int[Array, "B N"]) -> Shaped[Array, "B N *rest"]:
    """The slots `at` of each row."""
    index = at.reshape(*at.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="clip")


def attend(
    query: Float[Array, "B T H E"],
    key: Float[Array, "B T G E"],
    value: Float[Array, "B T G E"],
    view: View,
    query_scalar: int,
) -> Float[Array, "B T H E"]:
    """Every query over the keys of its row, with all scores of the layer in memory.

    Args:
      query: one vector per head and slot.
      key: fewer heads where they are grouped: query head h reads head ``h // (H / G)``.
      value: as `key`.
      view: what each query sees.
      query_scalar: scores are divided by its root.

    Returns:
      Mixed values, in the dtype of `value`.
    """
    return over_keys(query, jnp.moveaxis(key, 1, 3), value.swapaxes(1, 2), view.bias, query_scalar)


def attend_in_blocks(query: Array, key: Array, value: Array, view: View, query_scalar: int) -> Array:
    """`attend` block by block of queries, without the keys that come after a block."""
    slots = query.shape[1]
    key, value = jnp.moveaxis(key, 1, 3), value.swapaxes(1, 2)
    part = functools.partial(over_keys, query_scalar=query_scalar)
    part = jax.checkpoint(part) if slots >= RECOMPUTE_FROM else part
    mixed = []
    for begin in range(0, slots, BLOCK):
        end = min(begin + BLOCK, slots)
        bias = view.bias[:, :, begin:end, :end]
        mixed.append(part(query[:, begin:end], key[..., :end], value[:, :, :end], bias))
    return jnp.concatenate(mixed, axis=1)


def attend_recomputed(query: Array, key: Array, value: Array, view: View, query_scalar: int) -> Array:
    """`attend` as a flash kernel uses memory: the backward pass computes the scores again."""
    run = functools.partial(attend_by_length, query_scalar=query_scalar)
    return jax.checkpoint(run)(query, key, value, view)


def attend_by_length(query: Array, key: Array, value: Array, view: View, query_scalar: int) -> Array:
    """`attend`, in blocks where a row is longer than one block."""
    run = attend_in_blocks if query.shape[1] > BLOCK else attend
    return run(query, key, value, view, query_scalar)


def attend_at(
    query: Float[Array, "B N H E"],
    key: Float[Array, "B T G E"],
    value: Float[Array, "B T G E"],
    view: View,
    query_scalar: int,
) -> Float[Array, "B N H E"]:
    """Some queries of a row over all its keys; their order does not say what they see."""
    part = functools.partial(over_keys, query_scalar=query_scalar)
    part = jax.checkpoint(part) if key.shape[1] >= RECOMPUTE_FROM else part
    key, value = jnp.moveaxis(key, 1, 3), value.swapaxes(1, 2)
    mixed = [
        part(query[:, i : i + BLOCK], key, value, view.bias[:, :, i : i + BLOCK])
        for i in range(0, query.shape[1], BLOCK)
    ]
    return jnp.concatenate(mixed, axis=1)


def over_keys(
    query: Float[Array, "B T H E"],
    key: Float[Array, "B G E S"],
    value: Float[Array, "B G S E"],
    bias: Float[Array, "B 1 T S"],
    query_scalar: int,
) -> Float[Array, "B T H E"]:
    """The products, on keys and values as `HEADS_FIRST` holds them; softmax in float32.

    Args:
      query: T queries per row.
      key: S keys per row.
      value: as `key`.
      bias: as in `View`.
      query_scalar: as in `attend`.
    """
    # Heads before time: one plain batched matrix product per key-value head, measured no slower on
    # CPU than the same einsum over [B, T, H, E]. The H / G query heads of a group are stacked
    # along time.
    batch, length, heads, head_dim = query.shape
    groups = key.shape[1]
    query = (query * query_scalar**-0.5).swapaxes(1, 2).reshape(batch, groups, -1, head_dim)
    scores = _rows_times(query, key).reshape(batch, heads, length, -1) + bias
    # The division of the softmax comes after the product with the values: one pass over the scores
    # less, forward and backward.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    grouped = weights.astype(value.dtype).reshape(batch, groups, -1, scores.shape[-1])
    mixed = _rows_times(grouped, value).reshape(batch, heads, length, head_dim)
    mixed = mixed / weights.sum(axis=-1, keepdims=True)
    return mixed.astype(value.dtype).swapaxes(1, 2)


def _rows_times(rows: Float[Array, "B G N M"], matrix: Float[Array, "B G M S"]) -> Float[Array, "B G N S"]:
    """The batched product ``rows @ matrix`` in float32; one row (decoding) as multiply and add.

    Multiply and add reads the cache where it is. As a matrix product of one row XLA on a CPU copied
    the cache first, which took twice the time.
    """
    if rows.shape[2] > 1:
        return jnp.einsum("bgnm,bgms->bgns", rows, matrix, preferred_element_type=jnp.float32)
    return jnp.sum(rows.astype(jnp.float32).swapaxes(2, 3) * matrix, axis=2, keepdims=True)


# ------------------------------------------------------------------------------------------- caches


def _heads_first(batch: int, slots: int, groups: int, head_dim: int):
    return (batch, groups, head_dim, slots), (batch, groups, slots, head_dim)


def _write_heads_first(cache: LayerCache, slots: Array, key: Array, value: Array) -> LayerCache:
    keys, values = cache
    rows = jnp.arange(slots.shape[0])[:, None]
    keys = keys.at[rows, :, :, slots].set(key.astype(keys.dtype), mode="drop")
    return keys, values.at[rows, :, slots].set(value.astype(values.dtype), mode="drop")


def _attend_heads_first(query: Array, cache: LayerCache, view: View, query_scalar: int) -> Array:
    keys, values = (x.astype(query.dtype) for x in cache)
    return over_keys(query, keys, values, view.bias, query_scalar)


HEADS_FIRST = KVCache(_heads_first, 1, _write_heads_first, _attend_heads_first)
"""Keys ``[B, G, E, S]`` and values ``[B, G, S, E]``, as the plain products read them."""
