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
"""Queries per block: a row of 384 slots then costs two thirds of the plain product, a long row one
half."""

RECOMPUTE_FROM = 1024
"""Row length from which the backward pass recomputes a block's scores; those of shorter rows fit
into memory."""

Angles = tuple[Float[Array, "B T 1 E2"], Float[Array, "B T 1 E2"]]
"""Cosines and sines of rotary positions."""

LayerCache = tuple[Array, Array]
"""Keys and values of one layer, in the layout of its `KVCache`."""


class View(NamedTuple):
    """Which keys the queries of a layer attend to, and the rotary angles of queries and keys.

    Attributes:
      bias: 0 where a query sees a key, very negative elsewhere; every query sees at least one key.
      query_angles: of the query slots; None without rotary positions.
      key_angles: of the key slots.
      segments: the segments of whole rows, if each query sees exactly the keys of its own segment
        that are not later; None if `bias` is not determined by that rule.
      lengths: the number of tokens of each row, if each row is one text from its first slot on, so
        that the causal mask is enough; else None.
    """

    bias: Float[Array, "B 1 T S"]
    query_angles: Angles | None
    key_angles: Angles | None
    segments: Int[Array, "B T"] | None = None
    lengths: Int[Array, " B"] | None = None

    def at(self, positions: Int[Array, "B N"]) -> View:
        """The view for the queries at some slots of each row, over the keys of the whole row."""
        return self._replace(
            bias=take(self.bias[:, 0], positions)[:, None],
            query_angles=jax.tree.map(lambda angle: take(angle, positions), self.query_angles),
        )


class KVCache(NamedTuple):
    """How one layer's keys and values are stored, and attention over them.

    Attributes:
      shapes: ``(batch, slots, groups, head_dim)`` to the shapes of keys and values.
      head_axis: the axis of key-value heads in both.
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
    """Attention of every query over the keys of its row, all scores of the layer in memory.

    Args:
      query: one vector per head and slot.
      key: may have fewer heads: query head h reads head ``h // (H / G)``.
      value: as `key`.
      view: what each query sees.
      query_scalar: scores are divided by its square root.

    Returns:
      Mixed values, in the dtype of `value`.
    """
    return over_keys(query, jnp.moveaxis(key, 1, 3), value.swapaxes(1, 2), view.bias, query_scalar)


def attend_in_blocks(
    query: Array, key: Array, value: Array, view: View, query_scalar: int
) -> Array:
    """`attend` in blocks of queries, each without the keys that come after it."""
    slots = query.shape[1]
    key, value = jnp.moveaxis(key, 1, 3), value.swapaxes(1, 2)
    part = functools.partial(over_keys, query_scalar=query_scalar)
    # Per block, so that the backward pass has the scores of one block at a time.
    part = jax.checkpoint(part) if slots >= RECOMPUTE_FROM else part
    mixed = []
    for begin in range(0, slots, BLOCK):
        end = min(begin + BLOCK, slots)
        bias = view.bias[:, :, begin:end, :end]
        mixed.append(part(query[:, begin:end], key[..., :end], value[:, :, :end], bias))
    return jnp.concatenate(mixed, axis=1)


def attend_recomputed(
    query: Array, key: Array, value: Array, view: View, query_scalar: int
) -> Array:
    """`attend` with the memory use of a flash kernel: the backward pass recomputes the scores."""
    run = functools.partial(attend_in_blocks, query_scalar=query_scalar)
    return jax.checkpoint(run)(query, key, value, view)


def attend_at(
    query: Float[Array, "B N H E"],
    key: Float[Array, "B T G E"],
    value: Float[Array, "B T G E"],
    view: View,
    query_scalar: int,
) -> Float[Array, "B N H E"]:
    """Some queries of a row over all its keys; `bias` alone decides what they see."""
    part = functools.partial(over_keys, query_scalar=query_scalar)
    part = jax.checkpoint(part) if key.shape[1] >= RECOMPUTE_FROM else part
    key, value = jnp.moveaxis(key, 1, 3), value.swapaxes(1, 2)
    mixed = []
    for begin in range(0, query.shape[1], BLOCK):
        end = begin + BLOCK
        mixed.append(part(query[:, begin:end], key, value, view.bias[:, :, begin:end]))
    return jnp.concatenate(mixed, axis=1)


def over_keys(
    query: Float[Array, "B T H E"],
    key: Float[Array, "B G E S"],
    value: Float[Array, "B G S E"],
    bias: Float[Array, "B 1 T S"],
    query_scalar: int,
) -> Float[Array, "B T H E"]:
    """The products, on keys and values in the layout of `HEADS_FIRST`; softmax in float32.

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
    product = _row_times if query.shape[2] == 1 else _rows_times
    scores = product(query, key).reshape(batch, heads, length, -1) + bias
    # The softmax is normalised after the product with the values, which saves one pass over the
    # scores, forward and backward.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    grouped = weights.astype(value.dtype).reshape(batch, groups, -1, scores.shape[-1])
    mixed = product(grouped, value).reshape(batch, heads, length, head_dim)
    # In float32: the weights of the product may be bfloat16, their sum is not.
    mixed = mixed / weights.sum(axis=-1, keepdims=True)
    return mixed.astype(value.dtype).swapaxes(1, 2)


_rows_times = functools.partial(jnp.einsum, "bgnm,bgms->bgns", preferred_element_type=jnp.float32)
"""The batched product ``rows @ matrix`` in float32."""


def _row_times(
    row: Float[Array, "B G 1 M"], matrix: Float[Array, "B G M S"]
) -> Float[Array, "B G 1 S"]:
    """`_rows_times` of one row (decoding) as multiply and add, which does not copy the cache.

    As a matrix product of one row, XLA on a CPU copied the cache first, which took twice the time.
    """
    return jnp.sum(row.astype(jnp.float32).swapaxes(2, 3) * matrix, axis=2, keepdims=True)


# ------------------------------------------------------------------------------------------- caches


def _heads_first(batch: int, slots: int, groups: int, head_dim: int):
    return (batch, groups, head_dim, slots), (batch, groups, slots, head_dim)


def _write_heads_first(cache: LayerCache, slots: Array, key: Array, value: Array) -> LayerCache:
    keys, values = cache
    rows = jnp.arange(slots.shape[0])[:, None]
    # Index arrays separated by slices put their axes first, so this update is ``[B, T, G, E]`` like
    # `key`, without a transposition.
    keys = keys.at[rows, :, :, slots].set(key.astype(keys.dtype), mode="drop")
    return keys, values.at[rows, :, slots].set(value.astype(values.dtype), mode="drop")


def _attend_heads_first(query: Array, cache: LayerCache, view: View, query_scalar: int) -> Array:
    keys, values = (x.astype(query.dtype) for x in cache)
    return over_keys(query, keys, values, view.bias, query_scalar)


HEADS_FIRST = KVCache(_heads_first, 1, _write_heads_first, _attend_heads_first)
"""Keys ``[B, G, E, S]`` and values ``[B, G, S, E]``, as the plain products read them."""
