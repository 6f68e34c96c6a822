"""Attention by cuDNN's flash kernel, on NVIDIA GPUs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rlhf_jax.backends import attention
from rlhf_jax.backends.attention import BLOCK, KVCache, LayerCache, View


@functools.cache
def is_here() -> bool:
    """Whether the default device is an NVIDIA GPU, which has cuDNN."""
    device = jax.devices()[0]
    # AMD's devices are of the platform gpu too.
    return device.platform == "gpu" and "cuda" in device.client.platform_version


def fits(*, head_dim: int, dtype: jnp.dtype, slots: int = BLOCK) -> bool:
    """Whether cuDNN's kernel supports this head width, dtype and number of slots per row."""
    return dtype == jnp.bfloat16 and head_dim % 8 == 0 and head_dim <= 128 and slots % 2 == 0


def require(*, head_dim: int, dtype: jnp.dtype, slots: int = BLOCK) -> None:
    """Refuse what cuDNN cannot compute, where its kernel was requested by name.

    Raises:
      ValueError: another device, dtype, head width or an odd row length.
    """
    if not (fits(head_dim=head_dim, dtype=dtype, slots=slots) and is_here()):
        raise ValueError(
            f"attention='cudnn' needs an NVIDIA device with cuDNN, dtype bfloat16 (here {dtype}), "
            f"a head width that is a multiple of 8 up to 128 (here {head_dim}) and an even row "
            f"length (here {slots}): choose 'auto'"
        )


def attend(query: Array, key: Array, value: Array, view: View, query_scalar: int) -> Array:
    """`attention.attend` by cuDNN; by XLA for short rows and what cuDNN does not support."""
    slots, head_dim = query.shape[1], query.shape[3]
    if slots < BLOCK or not fits(head_dim=head_dim, dtype=query.dtype, slots=slots):
        return attention.attend_in_blocks(query, key, value, view, query_scalar)
    return _flash(query, key, value, view, query_scalar)


def attend_always(query: Array, key: Array, value: Array, view: View, query_scalar: int) -> Array:
    """`attend` by cuDNN for rows of any length: ``attention='cudnn'``."""
    require(head_dim=query.shape[3], dtype=query.dtype, slots=query.shape[1])
    return _flash(query, key, value, view, query_scalar)


def _flash(query: Array, key: Array, value: Array, view: View, query_scalar: int) -> Array:
    """Attention by cuDNN. Queries do not see later keys, so half of the blocks are skipped."""
    how = {"is_causal": True, "scale": query_scalar**-0.5, "implementation": "cudnn"}
    if view.lengths is None:
        mask = view.bias == 0
        return jax.nn.dot_product_attention(query, key, value, mask=mask, **how)
    # One text per row: causality alone says what its tokens see, and no [B, 1, T, T] is written.
    tokens = jnp.maximum(view.lengths, 1)  # a row of padding only must see a key too
    lengths = {"query_seq_lengths": tokens, "key_value_seq_lengths": tokens}
    return jax.nn.dot_product_attention(query, key, value, **lengths, **how)


def attend_at(query: Array, key: Array, value: Array, view: View, query_scalar: int) -> Array:
    """`attention.attend_at`; the backward pass of cuDNN needs an even number of queries."""
    slots, head_dim = key.shape[1], query.shape[3]
    if slots < BLOCK or not fits(head_dim=head_dim, dtype=query.dtype, slots=slots):
        return attention.attend_at(query, key, value, view, query_scalar)
    # The added query has a bias of 0, sees every key and is cut off again: its numbers are finite,
    # and so are the gradients.
    odd = query.shape[1] % 2
    padded = jnp.pad(query, [(0, 0), (0, odd), (0, 0), (0, 0)])
    bias = jnp.pad(view.bias, [(0, 0), (0, 0), (0, odd), (0, 0)])
    mixed = _masked(padded, (key, value), view._replace(bias=bias), query_scalar)
    return mixed[:, : query.shape[1]]


def _masked(query: Array, cache: LayerCache, view: View, query_scalar: int) -> Array:
    keys, values = (x.astype(query.dtype) for x in cache)
    return jax.nn.dot_product_attention(
        query, keys, values, mask=view.bias == 0, scale=query_scalar**-0.5, implementation="cudnn"
    )


def _shapes(batch: int, slots: int, groups: int, head_dim: int):
    shape = (batch, slots, groups, head_dim)
    return shape, shape


def _write(cache: LayerCache, slots: Array, key: Array, value: Array) -> LayerCache:
    keys, values = cache
    rows = jnp.arange(slots.shape[0])[:, None]
    keys = keys.at[rows, slots].set(key.astype(keys.dtype), mode="drop")
    return keys, values.at[rows, slots].set(value.astype(values.dtype), mode="drop")


SLOTS_FIRST = KVCache(_shapes, 2, _write, _masked)
"""Keys and values ``[B, S, G, E]``, as cuDNN and `nvidia_decode` read them."""


def decode_blocks(
    ordinary: Callable[..., Any], config: Any, params: Any, x: Array, cache: Any, *others: Any
) -> Any:
    """`plain.decode_blocks` by the kernels of `nvidia_decode` where they fit the step."""
    from rlhf_jax.backends import nvidia_decode  # Pallas is slow to import and needed only here

    if not nvidia_decode.fits_step(config, params["blocks"], x, *others):
        return ordinary(config, params, x, cache, *others)
    return nvidia_decode.step(config, params, x, cache, *others)
