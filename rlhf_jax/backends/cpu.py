"""Forms that XLA on a CPU compiles to faster programs; each computes what `plain` computes."""

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
"""Tiles of a kernel; 8 to 32 are alike."""


# ------------------------------------------------------------------------------------------
# products


def linear(x: Array, kernel: Array, bias: Array | None = None) -> Array:
    """`plain.linear` over a matrix of tokens; a kernel of three axes is in tiles."""
    if kernel.ndim == 3:
        return _linear_of_tiles(x, kernel, bias)
    return plain.linear_of_rows(x, kernel, bias)


def linear_on_mesh(x: Array, kernel: Array, bias: Array | None = None) -> Array:
    """`linear` where rows are spread over devices, so that they do not become one matrix."""
    if kernel.ndim == 3:
        return _linear_of_tiles(x, kernel, bias)
    return plain.linear(x, kernel, bias)


def _linear_of_tiles(x: Array, tiles: Array, bias: Array | None) -> Array:
    outputs = times_tiles(x, tiles)
    return outputs if bias is None else outputs + bias.reshape((1,) * (x.ndim - 1) + (-1,))


def times_tiles(
    x: Float[Array, "*B I"], tiles: Float[Array, "N O I"], **how: Any
) -> Float[Array, "*B NO"]:
    """``x W`` with W transposed and cut into N tiles, for a few rows: about half the time.

    The weights of a decode step come from memory, not from a cache. So they are stored in the order
    in which they are read, a tile per thread.
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
    """`x`, whose gradient is computed once and kept as an array.

    XLA on a CPU computes an elementwise sum again for each of its users. The gradient of the
    residual stream is a sum over all later layers: it was computed for every matrix product of
    every layer anew, in transposed order, 9 to 17% of an SFT step of four layers. An
    `optimization_barrier` is removed there before fusion, and so are two equal branches; a
    condition stays if the compiler cannot decide it. Reverse mode only.
    """
    return x


def _residual_forward(x: Array) -> tuple[Array, Array]:
    return x, x[(0,) * x.ndim]


def _residual_backward(some: Array, gradient: Array) -> tuple[Array]:
    # Only NaN differs from itself, which the compiler cannot exclude. Where the residual stream is
    # NaN its gradient is NaN too, so nothing is hidden from the guard of a step.
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
    """`plain.over_layers_to_positions` as a loop over `unstack`, where no scan is asked for."""
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
    """Each layer's parameters out of the stacks, whose gradients are stacked again.

    Reverse mode only. XLA compiles identical kernels once; indexing with a value that it cannot
    fold makes every layer's slice the same kernel, and what reads the slices is the same for all
    layers too: an eighth fewer kernels in a PPO run of four layers. Both branches of the condition
    give the same numbers, so it need not hold; as constants the compiler would fold them.
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


# ------------------------------------------------------------------------------------- the
# optimizer


def step_where(sound: Bool[Array, ""], step: Callable[[State], State], old: State) -> State:
    """`plain.step_where` as a condition, at half the memory traffic.

    Behind a select XLA computes new weights from moments that it does not keep, so that it copies
    the old ones, which it may no longer overwrite, and reads every array several times. On an
    accelerator one kernel writes weights and moments together.
    """

    # A select may return a wider type than its old operand: moments of bfloat16 weights do.
    def wider(new: jax.ShapeDtypeStruct | Array, old: Array) -> Any:
        return old.dtype if new.dtype == old.dtype else jnp.result_type(new.dtype, old.dtype)

    def is_narrow(x: Array) -> bool:
        return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4

    narrow = any(map(is_narrow, jax.tree.leaves(old)))
    # Only where it can differ: the step is traced for the answer, a tenth of the tracing of an
    # update.
    types = jax.tree.map(wider, jax.eval_shape(step, old) if narrow else old, old)

    def widen(state: State) -> State:
        cast = lambda x, dtype: x if x.dtype == dtype else x.astype(dtype)
        return jax.tree.map(cast, state, types)

    return lax.cond(sound, lambda old: widen(step(old)), widen, old)
