"""Where activations are placed on the mesh ``(data, fsdp, tensor)``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

ROWS = ("data", "fsdp")
"""Mesh axes of the rows of a batch."""

WIDTH = ("fsdp", "tensor")
"""Mesh axes of the width of an embedding."""


def spread(mesh: Mesh | None, x: Array, *axes: Any) -> Array:
    """`x` over the mesh axes of each dimension; one that they do not divide stays whole."""
    if mesh is None or mesh.size == 1:
        return x
    spec = []
    for size, axis in zip(x.shape, axes, strict=True):
        group = (axis,) if isinstance(axis, str) else axis or ()
        divides = size % math.prod(mesh.shape[name] for name in group) == 0
        spec.append(group if group and divides else None)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


def spread_rows(mesh: Mesh | None, x: Float[Array, "B *rest"]) -> Float[Array, "B *rest"]:
    """Hidden states with rows over data and fsdp, all else whole; so is their gradient."""
    return spread(mesh, x, ROWS, *[None] * (x.ndim - 1))


def look_up(
    mesh: Mesh | None, table: Callable[[Array], Array], ids: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Rows of a table that is in pieces of the width, brought to the devices of their rows.

    It goes in small moves, forward and (the gradient) backward: pieces are joined over tensor, then
    exchanged for rows over fsdp. Left to itself the compiler finds no way in one move, and copies
    the activations of the whole batch to every device.
    """
    by_width = spread(mesh, table(spread(mesh, ids, "data", None)), "data", None, WIDTH)
    return spread(mesh, spread(mesh, by_width, "data", None, "fsdp"), ROWS, None, None)
