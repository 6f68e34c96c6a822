"""Attention over whole rows: one meaning, a kernel for the device at hand.

All kernels compute the same thing: ``softmax(q k / sqrt(scalar) + bias) v`` with the bias of `decoder.visible`, packed
rows and shared prefixes included. `kernel_for` picks one; `DecoderConfig.attention` names one.

Shape legend: B rows, T slots, H query heads, G key-value heads, E head width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

KERNELS = ("auto", "plain", "blocked", "cudnn")
"""``plain`` holds all scores of a layer; ``blocked`` those of one block of queries, and leaves out the keys that come
after it; ``cudnn`` is NVIDIA's flash attention, for bfloat16."""

BLOCK = 128
"""Queries of a block: a row of 384 slots then costs two thirds of the plain product, a long one half."""

RECOMPUTE_FROM = 1024
"""Slots from which the backward pass computes a block's scores again; shorter rows have room for them."""


def kernel_for(asked: str, *, slots: int, head_dim: int, dtype: jnp.dtype) -> str:
    """The kernel that rows of `slots` get.

    Args:
      asked: one of `KERNELS`; ``auto`` decides by device, dtype and size.
      slots: T.
      head_dim: E.
      dtype: compute dtype.

    Returns:
      ``plain``, ``blocked`` or ``cudnn``.

    Raises:
      ValueError: ``cudnn`` was asked for and cannot take this.
    """
    fits = dtype == jnp.bfloat16 and head_dim % 8 == 0 and head_dim <= 128 and slots % 2 == 0
    if asked == "cudnn" and not (fits and _has_cudnn()):
        raise ValueError(
            f"attention='cudnn' needs an NVIDIA device with cuDNN, dtype bfloat16 (here {dtype}), a head width that is "
            f"a multiple of 8 up to 128 (here {head_dim}) and an even row length (here {slots}): choose 'auto'"
        )
    if asked != "auto":
        return asked
    if fits and slots >= BLOCK and _has_cudnn():
        return "cudnn"
    return "blocked" if slots > BLOCK else "plain"


@functools.cache
def _has_cudnn() -> bool:
    device = jax.devices()[0]
    return device.platform == "gpu" and "cuda" in device.client.platform_version


def over_rows(
    kernel: str,
    query: Float[Array, "B T H E"],
    key: Float[Array, "B T G E"],
    value: Float[Array, "B T G E"],
    bias: Float[Array, "B 1 T T"],
    query_scalar: int,
) -> Float[Array, "B T H E"]:
    """Every query over the keys of its row.

    Args:
      kernel: from `kernel_for`.
      query: one vector a head and slot.
      key: fewer heads where they are grouped: query head h reads head ``h // (H / G)``.
      value: as `key`.
      bias: 0 where a query sees a key, very negative elsewhere; every query sees at least one.
      query_scalar: scores are divided by its root.

    Returns:
      Mixed values, in the dtype of `value`.
    """
    if kernel == "cudnn":  # no query sees what comes after it: half of the blocks need not be looked at
        return jax.nn.dot_product_attention(
            query, key, value, mask=bias == 0, is_causal=True, scale=query_scalar**-0.5, implementation="cudnn"
        )
    key, value = jnp.moveaxis(key, 1, 3), value.swapaxes(1, 2)
    if kernel == "plain":
        return over_keys(query, key, value, bias, query_scalar)
    return _blocked(query, key, value, bias, query_scalar)


def _blocked(query: Array, key: Array, value: Array, bias: Array, query_scalar: int) -> Array:
    """Block by block of queries; keys after a block's last slot are seen by none of it and are not multiplied."""
    slots = query.shape[1]
    part = functools.partial(over_keys, query_scalar=query_scalar)
    part = jax.checkpoint(part) if slots >= RECOMPUTE_FROM else part
    mixed = []
    for begin in range(0, slots, BLOCK):
        end = min(begin + BLOCK, slots)
        mixed.append(part(query[:, begin:end], key[..., :end], value[:, :, :end], bias[:, :, begin:end, :end]))
    return jnp.concatenate(mixed, axis=1)


def over_cache(
    kernel: str, query: Float[Array, "B T H E"], keys: Array, values: Array, bias: Array, query_scalar: int
) -> Float[Array, "B T H E"]:
    """New queries over keys and values as `cache_shapes` lays them out for `kernel`; else as `over_rows`."""
    if kernel == "cudnn":
        return jax.nn.dot_product_attention(
            query, keys, values, mask=bias == 0, scale=query_scalar**-0.5, implementation="cudnn"
        )
    return over_keys(query, keys, values, bias, query_scalar)


def cache_kernel(asked: str, *, head_dim: int, dtype: jnp.dtype) -> str:
    """The kernel for queries over a cache, ``plain`` or ``cudnn``; arguments as in `kernel_for`."""
    best = kernel_for(asked, slots=BLOCK, head_dim=head_dim, dtype=dtype)
    return best if best == "cudnn" else "plain"


def cache_shapes(kernel: str, batch: int, slots: int, heads: int, head_dim: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of a layer's cached keys and values: as one query of the plain products reads them, or slots first."""
    if kernel == "cudnn":
        return ((batch, slots, heads, head_dim),) * 2
    return (batch, heads, head_dim, slots), (batch, heads, slots, head_dim)


def over_keys(
    query: Float[Array, "B T H E"],
    key: Float[Array, "B G E S"],
    value: Float[Array, "B G S E"],
    bias: Float[Array, "B 1 T S"],
    query_scalar: int,
) -> Float[Array, "B T H E"]:
    """The plain products, on keys and values as a cache holds them; softmax in float32.

    Args:
      query: T of them a row.
      key: S of them a row.
      value: as `key`.
      bias: as in `over_rows`.
      query_scalar: as in `over_rows`.
    """
    # Heads before time: one plain batched matrix product per key-value head, measured no slower on CPU than the
    # same einsum over [B, T, H, E]. The R = H / G query heads of a group are stacked along time.
    batch, length, heads, head_dim = query.shape
    groups = key.shape[1]
    query = (query * query_scalar**-0.5).swapaxes(1, 2).reshape(batch, groups, -1, head_dim)
    scores = _rows_times(query, key).reshape(batch, heads, length, -1) + bias
    # Softmax with its division after the product with the values: one pass over the scores less, there and back.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    mixed = _rows_times(weights.astype(value.dtype).reshape(batch, groups, -1, scores.shape[-1]), value)
    mixed = mixed.reshape(batch, heads, length, head_dim) / weights.sum(axis=-1, keepdims=True)
    return mixed.astype(value.dtype).swapaxes(1, 2)


def _rows_times(rows: Float[Array, "B G N M"], matrix: Float[Array, "B G M S"]) -> Float[Array, "B G N S"]:
    """The batched product ``rows @ matrix`` in float32; one row (decoding) as multiply and add.

    That reads the cache once where it lies. As a matrix product of one row it took a copy of the cache first and twice
    the time on CPU.
    """
    if rows.shape[2] > 1:
        return jnp.einsum("bgnm,bgms->bgns", rows, matrix, preferred_element_type=jnp.float32)
    return jnp.sum(rows.astype(jnp.float32).swapaxes(2, 3) * matrix, axis=2, keepdims=True)
