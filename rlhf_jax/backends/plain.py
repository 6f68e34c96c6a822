"""The definition of every operation of a backend, and the forms for one device.

Every other backend must compute what these compute, which `tests/backends` checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from rlhf_jax.backends.attention import take
from rlhf_jax.types import Params

State = TypeVar("State")

Body = Callable[..., tuple[Array, Any]]
"""One block: ``(x, layer, params) -> (x, ..)``; with ``positions=``, for those slots only."""


def linear(
    x: Float[Array, "*B I"], kernel: Float[Array, "I O"], bias: Float[Array, " O"] | None = None
) -> Float[Array, "*B O"]:
    """``x W + b`` over the last axis."""
    y = lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def linear_of_rows(
    x: Float[Array, "*B I"], kernel: Float[Array, "I O"], bias: Float[Array, " O"] | None = None
) -> Float[Array, "*B O"]:
    """`linear` over a matrix with one row per token, for one device.

    The gradient of a kernel is then a sum over one axis. For a sum over two, rows and slots, XLA on
    a CPU first transposes both activations, which took an eighth of a training step.
    """
    return linear(as_matrix(x), kernel, bias).reshape(*x.shape[:-1], -1)


def as_matrix(x: Float[Array, "*B I"]) -> Float[Array, "M I"]:
    """One row per token."""
    return x.reshape(-1, x.shape[-1])


def residual(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The residual stream between two branches, unchanged."""
    return x


def head_logits(
    hidden: Float[Array, "... D"], embedding: Float[Array, "V D"]
) -> Float[Array, "... V"]:
    """``hidden . embedding^T`` in float32: the logits of a head that is tied to the embedding."""
    return head_product("...d,vd->...v", hidden, embedding)


def head_product(subscripts: str, hidden: Array, weight: Array) -> Array:
    """The float32 product of a head, at the precision that its hidden states need.

    Errors of a head reach every log-prob, reward and value. Products of a bfloat16 model are exact
    in TF32 and in the passes of ``HIGH``.
    """
    precision = lax.Precision.HIGH if hidden.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    hidden, weight = hidden.astype(jnp.float32), weight.astype(jnp.float32)
    return jnp.einsum(subscripts, hidden, weight, precision=precision)


FEW_ROWS = 64
"""Up to this many hidden states, as in decoding, reading the head's weights takes longer than the
product."""


def narrow_head_logits(
    hidden: Float[Array, "... D"], embedding: Float[Array, "V D"]
) -> Float[Array, "... V"]:
    """`head_logits`, which for few rows does not convert bfloat16 weights: products are exact."""
    few = hidden.size <= FEW_ROWS * hidden.shape[-1]
    if few and hidden.dtype == embedding.dtype == jnp.bfloat16:
        return jnp.einsum("...d,vd->...v", hidden, embedding, preferred_element_type=jnp.float32)
    return head_logits(hidden, embedding)


# ------------------------------------------------------------------------------------------- layers


def over_layers(
    body: Body, x: Array, blocks: PyTree, *, positions: Int[Array, "B N"] | None, unroll: int | None
) -> Array:
    """All blocks one after the other, as one scan over the layers; then only `positions`.

    Args:
      body: one block.
      x: embedded tokens.
      blocks: parameters with a leading layer axis.
      positions: the slots that are wanted; None for all.
      unroll: blocks per iteration; None for all.
    """
    x = scan(body, x, blocks, unroll)
    return x if positions is None else take(x, positions)


def over_layers_to_positions(
    body: Body, x: Array, blocks: PyTree, *, positions: Int[Array, "B N"] | None, unroll: int | None
) -> Array:
    """`over_layers` with a last block that computes only `positions`: nearly 1/L less work."""
    if positions is None:
        return scan(body, x, blocks, unroll)
    below = depth(blocks) - 1
    # One stack for the scan and one layer beside it: the last block has another output shape.
    first, last = (
        jax.tree.map(lambda leaf, part=part: leaf[part], blocks) for part in (slice(below), below)
    )
    x = scan(body, x, first, unroll) if below else x
    return body(x, jnp.asarray(below), last, positions=positions)[0]


def scan(
    body: Body, x: Array, blocks: PyTree, unroll: int | None, *, layers: range | None = None
) -> Array:
    """Scan `body` over stacked layers with the indices `layers`; None for all from 0."""

    def step(x: Array, layer: tuple[Array, Any]) -> tuple[Array, None]:
        return body(x, *layer)[0], None

    layers = range(depth(blocks)) if layers is None else layers
    numbers = jnp.arange(layers.start, layers.stop)
    # A scan over some of the layers may have fewer than `unroll`.
    return lax.scan(step, x, (numbers, blocks), unroll=min(unroll or len(layers), len(layers)))[0]


def depth(blocks: PyTree) -> int:
    """The number of stacked layers."""
    return jax.tree.leaves(blocks)[0].shape[0]


def unstack(blocks: PyTree) -> tuple[PyTree, ...]:
    """Each layer's parameters, sliced from the stacks."""
    take_layer = lambda layer: jax.tree.map(lambda leaf: leaf[layer], blocks)
    return tuple(map(take_layer, range(depth(blocks))))


def all_then_take(
    block: Callable[..., tuple[Array, Any]], positions: Int[Array, "B N"]
) -> tuple[Array, Any]:
    """The last block over all slots, then only `positions`: correct for any sharding."""
    x, cache = block()
    return take(x, positions), cache


def only_positions(
    block: Callable[..., tuple[Array, Any]], positions: Int[Array, "B N"]
) -> tuple[Array, Any]:
    """The last block for `positions` only, for activations on one device."""
    return block(positions=positions)


# ------------------------------------------------------------------------------------ decode steps

JOINED = {"attention": ("query", "key", "value"), "mlp": ("gate", "up")}
"""Projections of the same input that decode steps compute as one product."""


def decode_layout(layer: Params) -> Params:
    """One layer's parameters for decode steps: unchanged."""
    return layer


def joined(layer: Params) -> Params:
    """The layer with each group of `JOINED` concatenated to one projection.

    With few rows, a small product cannot use a device well. Not for outputs that are sharded over
    devices, because those of one projection would have to move between them. Not for a layer with
    adapters either, because each adapter belongs to one projection.
    """
    modules: dict[str, dict[str, Any]] = {name: dict(module) for name, module in layer.items()}
    if any(path[-1].key == "lora_a" for path, _ in jax.tree_util.tree_leaves_with_path(layer)):
        return layer
    beside = lambda *leaves: jnp.concatenate(leaves, axis=-1)
    for name, parts in JOINED.items():
        if all(part in modules[name] for part in parts):
            together = [modules[name].pop(part) for part in parts]
            modules[name]["_".join(parts)] = jax.tree.map(beside, *together)
    return modules


def decode_blocks(ordinary: Callable[..., Any], *arguments: Any) -> Any:
    """All blocks of a step over a cache, one after the other by `ordinary`."""
    return ordinary(*arguments)


# ----------------------------------------------------------------------------------- the optimizer


def step_where(sound: Bool[Array, ""], step: Callable[[State], State], old: State) -> State:
    """``step(old)`` if `sound`, else all of `old`, leaf by leaf."""
    return jax.tree.map(lambda new, kept: jnp.where(sound, new, kept), step(old), old)
