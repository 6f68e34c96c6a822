"""Attention by the splash kernel, on TPUs: over one chip, and over a mesh under `shard_map`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from rlhf_jax.backends import attention
from rlhf_jax.backends.attention import BLOCK, View

ROWS = ("data", "fsdp")
"""Mesh axes of the rows of a batch."""

HEADS = "tensor"
"""Mesh axis of the heads."""


@functools.lru_cache
def attend_on(mesh: Mesh | None, *, always: bool = False) -> Callable[..., Array]:
    """`attention.attend` by the splash kernel, on one chip or over the devices of a mesh.

    The kernel compares the segment of a query with those of the keys. An equality cannot express
    that a query also sees its parent's segment, and a mask per row would take a `[T, T]` array per
    row. So rows with parents or windows, and rows of other lengths, are computed in blocks of
    queries by XLA.

    Args:
      mesh: ``(data, fsdp, tensor)``; None for one chip.
      always: raise an error for what the kernel cannot compute, instead of using blocks.
    """

    def attend(query: Array, key: Array, value: Array, view: View, query_scalar: int) -> Array:
        slots = query.shape[1]
        if view.segments is None or slots % BLOCK:
            if always:
                raise ValueError(
                    f"attention='splash' needs rows of a multiple of {BLOCK} slots "
                    f"(here {slots}), without parents, windows or a cache: choose 'auto'"
                )
            return attention.attend_in_blocks(query, key, value, view, query_scalar)
        if mesh is None or mesh.size == 1:
            return _splash(query * query_scalar**-0.5, key, value, view.segments)
        if not _divides(mesh, query, key):
            return attention.attend_in_blocks(query, key, value, view, query_scalar)
        by_head, by_row = PartitionSpec(ROWS, None, HEADS, None), PartitionSpec(ROWS, None)
        over_devices = jax.shard_map(
            _splash,
            mesh=mesh,
            in_specs=(by_head, by_head, by_head, by_row),
            out_specs=by_head,
            # The check needs declarations that the kernel's outputs do not have.
            check_vma=False,
        )
        return over_devices(query * query_scalar**-0.5, key, value, view.segments)

    return attend


def _divides(mesh: Mesh, query: Array, key: Array) -> bool:
    """Whether rows and heads divide over the mesh: the compiler cannot partition the kernel."""
    rows = math.prod(mesh.shape[axis] for axis in ROWS)
    heads = mesh.shape[HEADS]
    return query.shape[0] % rows == 0 and query.shape[2] % heads == 0 and key.shape[2] % heads == 0


def _splash(query: Array, key: Array, value: Array, segments: Array) -> Array:
    """The kernel, for queries that are already scaled; interpreted if there is no TPU."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import

    slots, heads = query.shape[1:3]
    causal = splash.MultiHeadMask([splash.CausalMask((slots, slots))] * heads)
    # The largest block up to 512 that divides the row.
    block = next(n for n in (4 * BLOCK, 2 * BLOCK, BLOCK) if slots % n == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    run = splash.make_splash_mha(
        causal,
        head_shards=1,
        q_seq_shards=1,
        interpret=jax.default_backend() != "tpu",
        block_sizes=sizes,
    )

    def row(query: Array, key: Array, value: Array, segments: Array) -> Any:
        return run(query, key, value, segment_ids=splash.SegmentIds(segments, segments))

    # The kernel takes one row, heads first.
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    return jax.vmap(row)(query, key, value, segments).swapaxes(1, 2)
