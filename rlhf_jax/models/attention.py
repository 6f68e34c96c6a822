"""Attention over whole rows: one meaning, a kernel for the device at hand.

All kernels compute the same thing: ``softmax(q k / sqrt(scalar) + bias) v`` with the bias of `decoder.visible`, packed
rows and shared prefixes included. `kernel_for` picks one; `DecoderConfig.attention` names one.

Shape legend: B rows, T slots, H query heads, G key-value heads, E head width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

KERNELS = ("auto", "plain", "blocked", "cudnn", "splash")
"""``plain`` holds all scores of a layer; ``blocked`` those of one block of queries, and leaves out the keys that come
after it; ``cudnn`` is NVIDIA's flash attention, for bfloat16; ``splash`` is that of a TPU, for rows without parents on
one chip (the compiler cannot partition it)."""

BLOCK = 128
"""Queries of a block: a row of 384 slots then costs two thirds of the plain product, a long one half."""

RECOMPUTE_FROM = 1024
"""Slots from which the backward pass computes a block's scores again; shorter rows have room for them."""


def kernel_for(asked: str, *, slots: int, head_dim: int, dtype: jnp.dtype, by_segments: bool = False) -> str:
    """The kernel that rows of `slots` get.

    Args:
      asked: one of `KERNELS`; ``auto`` decides by device, dtype and size.
      slots: T.
      head_dim: E.
      dtype: compute dtype.
      by_segments: whether a query sees all of its own segment that is not later, and nothing else.

    Returns:
      One of the others.

    Raises:
      ValueError: ``cudnn`` or ``splash`` was asked for and cannot take this.
    """
    fits = dtype == jnp.bfloat16 and head_dim % 8 == 0 and head_dim <= 128 and slots % 2 == 0
    if asked == "cudnn" and not (fits and on_nvidia()):
        raise ValueError(
            f"attention='cudnn' needs an NVIDIA device with cuDNN, dtype bfloat16 (here {dtype}), a head width that is "
            f"a multiple of 8 up to 128 (here {head_dim}) and an even row length (here {slots}): choose 'auto'"
        )
    splashes = by_segments and slots % BLOCK == 0
    if asked == "splash" and not splashes:
        raise ValueError(
            f"attention='splash' needs rows of a multiple of {BLOCK} slots (here {slots}), without parents, windows "
            "or a cache: choose 'auto'"
        )
    if asked != "auto":
        return asked
    if splashes and jax.default_backend() == "tpu" and jax.device_count() == 1:
        return "splash"
    if fits and slots >= BLOCK and on_nvidia():
        return "cudnn"
    return "blocked" if slots > BLOCK else "plain"


@functools.cache
def on_nvidia() -> bool:
    """Whether the default device is an NVIDIA GPU, which has cuDNN."""
    device = jax.devices()[0]
    return device.platform == "gpu" and "cuda" in device.client.platform_version


def over_rows(
    kernel: str,
    query: Float[Array, "B T H E"],
    key: Float[Array, "B T G E"],
    value: Float[Array, "B T G E"],
    bias: Float[Array, "B 1 T T"],
    query_scalar: int,
    segments: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H E"]:
    """Every query over the keys of its row.

    Args:
      kernel: from `kernel_for`.
      query: one vector a head and slot.
      key: fewer heads where they are grouped: query head h reads head ``h // (H / G)``.
      value: as `key`.
      bias: 0 where a query sees a key, very negative elsewhere; every query sees at least one.
      query_scalar: scores are divided by its root.
      segments: what `bias` was made of, for ``splash``.

    Returns:
      Mixed values, in the dtype of `value`.
    """
    if kernel == "cudnn":  # no query sees what comes after it: half of the blocks need not be looked at
        return jax.nn.dot_product_attention(
            query, key, value, mask=bias == 0, is_causal=True, scale=query_scalar**-0.5, implementation="cudnn"
        )
    if kernel == "splash":
        return _splash(query * query_scalar**-0.5, key, value, segments)
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


def over_picked(
    kernel: str,
    query: Float[Array, "B N H E"],
    key: Float[Array, "B T G E"],
    value: Float[Array, "B T G E"],
    bias: Float[Array, "B 1 N T"],
    query_scalar: int,
) -> Float[Array, "B N H E"]:
    """Some queries of a row over all its keys: `over_rows` where a query's place does not say what it sees."""
    if kernel == "cudnn":  # whose backward pass wants an even number of queries
        even = lambda x, axis: jnp.pad(x, [(0, x.shape[axis] % 2 if i == axis else 0) for i in range(x.ndim)])  # noqa: E731
        return over_cache(kernel, even(query, 1), key, value, even(bias, 2), query_scalar)[:, : query.shape[1]]
    part = functools.partial(over_keys, query_scalar=query_scalar)
    part = jax.checkpoint(part) if key.shape[1] >= RECOMPUTE_FROM else part
    key, value = jnp.moveaxis(key, 1, 3), value.swapaxes(1, 2)
    begins = range(0, query.shape[1], BLOCK)
    return jnp.concatenate(
        [part(query[:, i : i + BLOCK], key, value, bias[:, :, i : i + BLOCK]) for i in begins], axis=1
    )


def _splash(query: Array, key: Array, value: Array, segments: Array | None) -> Array:
    """On anything but a TPU it is interpreted, for tests."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import, and for TPUs alone

    slots, heads = query.shape[1:3]
    causal = splash.MultiHeadMask([splash.CausalMask((slots, slots))] * heads)
    block = next(n for n in (4 * BLOCK, 2 * BLOCK, BLOCK) if slots % n == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    run = splash.make_splash_mha(
        causal, head_shards=1, q_seq_shards=1, interpret=jax.default_backend() != "tpu", block_sizes=sizes
    )

    def row(query: Array, key: Array, value: Array, segments: Array) -> Any:
        return run(query, key, value, segment_ids=splash.SegmentIds(segments, segments))

    assert segments is not None
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    return jax.vmap(row)(query, key, value, segments).swapaxes(1, 2)


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
