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
    """Shard each dimension of `x` over its mesh axes, unless they do not divide it."""
    if mesh is None or mesh.size == 1:
        return x
    spec = []
    for size, axis in zip(x.shape, axes, strict=True):
        group = (axis,) if isinstance(axis, str) else axis or ()
        divides = size % math.prod(mesh.shape[name] for name in group) == 0
        spec.append(group if group and divides else None)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


def spread_rows(mesh: Mesh | None, x: Float[Array, "B *rest"]) -> Float[Array, "B *rest"]:
    """Shard the rows of hidden states, and of their gradient, over data and fsdp."""
    return spread(mesh, x, ROWS, *[None] * (x.ndim - 1))


def look_up(
    mesh: Mesh | None, table: Callable[[Array], Array], ids: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Reshard rows looked up in a table that is sharded by width, to be sharded by rows.

    It is done in two steps, forward and for the gradient backward: widths are gathered over tensor,
    then exchanged for rows over fsdp. Given only the final sharding, the compiler would replicate
    the activations of the whole batch on every device.
    """
    # Ids are spread over data only, so that fsdp and tensor are free for the width of the table.
    by_width = spread(mesh, table(spread(mesh, ids, "data", None)), "data", None, WIDTH)
    return spread(mesh, spread(mesh, by_width, "data", None, "fsdp"), ROWS, None, None)
