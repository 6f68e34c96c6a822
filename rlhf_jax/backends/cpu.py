"""Forms that XLA compiles to faster programs on a CPU; each computes what `plain` computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from rlhf_jax.backends import plain
from rlhf_jax.types import Params

State = TypeVar("State")

TILES = 16
"""Tiles per kernel; 8 to 32 are equally fast."""


# ---------------------------------------------------------------------------------------- products


def linear(x: Array, kernel: Array, bias: Array | None = None) -> Array:
    """`plain.linear` over a matrix of tokens; a kernel with three axes is stored in tiles."""
    if kernel.ndim == 3:
        return _linear_of_tiles(x, kernel, bias)
    return plain.linear_of_rows(x, kernel, bias)


def linear_on_mesh(x: Array, kernel: Array, bias: Array | None = None) -> Array:
    """`linear` for rows that are sharded over devices and must not be flattened to one matrix."""
    if kernel.ndim == 3:
        return _linear_of_tiles(x, kernel, bias)
    return plain.linear(x, kernel, bias)


def _linear_of_tiles(x: Array, tiles: Array, bias: Array | None) -> Array:
    outputs = times_tiles(x, tiles)
    return outputs if bias is None else outputs + bias.reshape((1,) * (x.ndim - 1) + (-1,))


def times_tiles(
    x: Float[Array, "*B I"], tiles: Float[Array, "N O I"], **how: Any
) -> Float[Array, "*B NO"]:
    """``x W`` with W transposed and cut into N tiles, for few rows: about half the time.

    A decode step reads its weights from memory, not from a cache. So they are stored in the order
    in which they are read, one tile per thread.
    """
    outputs = jnp.einsum("mi,noi->nmo", plain.as_matrix(x), tiles, **how)
    return outputs.swapaxes(0, 1).reshape(*x.shape[:-1], -1)


def tile(transposed: Float[Array, "NO I"]) -> Float[Array, "N O I"] | None:
    """``W^T`` as `times_tiles` takes it; None where `TILES` does not divide its rows."""
    if transposed.shape[0] % TILES:
        return None
    return transposed.reshape(TILES, -1, transposed.shape[1])


def decode_layout(layer: Params) -> Params:
    """A layer's kernels in tiles, where `TILES` divides their outputs."""

    def tiled(path: tuple[Any, ...], leaf: Array) -> Array:
        tiles = tile(leaf.T) if path[-1].key == "kernel" else None
        return leaf if tiles is None else tiles

    return jax.tree_util.tree_map_with_path(tiled, layer)


def joined_in_tiles(layer: Params) -> Params:
    """`decode_layout` of `plain.joined` projections."""
    return decode_layout(plain.joined(layer))


def head_logits(
    hidden: Float[Array, "... D"], embedding: Float[Array, "V D"]
) -> Float[Array, "... V"]:
    """`plain.head_logits`, over tiles of the embedding where there are few rows."""
    few = hidden.size <= plain.FEW_ROWS * hidden.shape[-1]
    tiles = tile(embedding.astype(jnp.float32)) if few else None
    if tiles is None:
        return plain.narrow_head_logits(hidden, embedding)
    return times_tiles(hidden.astype(jnp.float32), tiles, precision=lax.Precision.HIGHEST)


# ------------------------------------------------------------------------------- the backward pass


@jax.custom_vjp
def residual(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """`x`, with a gradient that is computed once and kept as an array.

    XLA on a CPU recomputes an elementwise sum for each of its users. The gradient of the residual
    stream is a sum over all later layers: it was recomputed for every matrix product of every
    layer, in transposed order, which took 9 to 17% of an SFT step of four layers. XLA removes an
    `optimization_barrier` before fusion, and a condition with two equal branches too; it keeps a
    condition that it cannot decide. Reverse mode only.
    """
    return x


def _residual_forward(x: Array) -> tuple[Array, Array]:
    return x, x[(0,) * x.ndim]


def _residual_backward(some: Array, gradient: Array) -> tuple[Array]:
    # Only NaN differs from itself, and the compiler cannot exclude a NaN. If the residual stream is
    # NaN its gradient is NaN too, so the guard of a step still sees it.
    as_it_is = lambda g: g
    lost = lambda g: jnp.full_like(g, jnp.nan)
    return (lax.cond(some == some, as_it_is, lost, gradient),)


residual.defvjp(_residual_forward, _residual_backward)


# ------------------------------------------------------------------------------------------- layers


def over_layers(
    body: plain.Body,
    x: Array,
    blocks: PyTree,
    *,
    positions: Int[Array, "B N"] | None,
    unroll: int | None,
) -> Array:
    """`plain.over_layers_to_positions` as a loop over `unstack`, unless a scan is requested."""
    layers = plain.depth(blocks)
    if unroll not in (None, layers):
        return plain.over_layers_to_positions(body, x, blocks, positions=positions, unroll=unroll)
    for layer, own in enumerate(unstack(blocks)):
        last = positions is not None and layer == layers - 1
        some = {"positions": positions} if last else {}
        x, _ = body(x, jnp.asarray(layer), own, **some)
    return x


@jax.custom_vjp
def unstack(blocks: PyTree) -> tuple[PyTree, ...]:
    """Each layer's parameters, sliced from the stacks; their gradients are stacked again.

    Reverse mode only. XLA compiles identical kernels once; indexing with a value that it cannot
    fold makes every layer's slice the same kernel, and the kernels that read the slices are then
    the same for all layers too: an eighth fewer kernels in a PPO run of four layers. Both branches
    of the condition give the same index, so the result does not depend on it; a constant index
    would be folded.
    """
    some = jax.tree.leaves(blocks)[0]
    numbers = lambda: tuple(jnp.int32(layer) for layer in range(some.shape[0]))
    unknown = lax.cond(some.ravel()[0] > 0, numbers, numbers)
    index = partial(lax.dynamic_index_in_dim, keepdims=False)
    return tuple(jax.tree.map(partial(index, index=layer), blocks) for layer in unknown)


unstack.defvjp(
    lambda blocks: (unstack(blocks), None),
    lambda _, gradients: (jax.tree.map(lambda *layers: jnp.stack(layers), *gradients),),
)


# ----------------------------------------------------------------------------------- the optimizer


def step_where(sound: Bool[Array, ""], step: Callable[[State], State], old: State) -> State:
    """`plain.step_where` as a condition, at half the memory traffic.

    With a select, XLA on a CPU recomputes the new moments where it computes the new weights, so it
    cannot overwrite the old moments, copies them, and reads every array several times. On an
    accelerator, one kernel writes weights and moments together.
    """

    # A select may return a wider type than its old operand: moments of bfloat16 weights do.
    def wider(new: jax.ShapeDtypeStruct | Array, old: Array) -> Any:
        return old.dtype if new.dtype == old.dtype else jnp.result_type(new.dtype, old.dtype)

    def is_narrow(x: Array) -> bool:
        return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4

    narrow = any(map(is_narrow, jax.tree.leaves(old)))
    # Only where types can differ: finding out traces the step, a tenth of the tracing of an update.
    types = jax.tree.map(wider, jax.eval_shape(step, old) if narrow else old, old)

    def widen(state: State) -> State:
        cast = lambda x, dtype: x if x.dtype == dtype else x.astype(dtype)
        return jax.tree.map(cast, state, types)

    return lax.cond(sound, lambda old: widen(step(old)), widen, old)
