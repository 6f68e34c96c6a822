"""Where arrays live: one mesh ``(data, fsdp, tensor)``, ordered regex rules for parameters, batches by rows.

One device is the mesh ``(1, 1, 1)``; there is no other path. Data parallel as `pmap` users know it is ``(n, 1, 1)``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

AXES = ("data", "fsdp", "tensor")
"""Rows of a batch go over data and fsdp; parameters over fsdp and tensor."""

Rules = Sequence[tuple[str, PartitionSpec]]
"""Ordered ``(regex, PartitionSpec)``; the first regex found in the path of a leaf decides."""

P = PartitionSpec

DECODER_RULES: Rules = (
    # Blocks are stacked: axis 0 is the layer. Column-parallel into a branch, row-parallel out of it.
    (r"blocks/attention/(query|key|value)/kernel$", P(None, "fsdp", "tensor")),
    (r"blocks/mlp/(gate|up)/kernel$", P(None, "fsdp", "tensor")),
    (r"blocks/(attention/out|mlp/down)/kernel$", P(None, "tensor", "fsdp")),
    (r"blocks/(attention/(query|key|value)|mlp/(gate|up))/bias$", P(None, "tensor")),
    # Adapters [L, inputs, r] and [L, r, outputs] lie as the kernel that they are added to.
    (r"blocks/(attention/(query|key|value)|mlp/(gate|up))/lora_a$", P(None, "fsdp")),
    (r"blocks/(attention/(query|key|value)|mlp/(gate|up))/lora_b$", P(None, None, "tensor")),
    (r"blocks/(attention/out|mlp/down)/lora_a$", P(None, "tensor")),
    (r"blocks/(attention/out|mlp/down)/lora_b$", P(None, None, "fsdp")),
    # By width and not by vocabulary: 50,257 rows divide by no mesh.
    (r"(embed|positions)/embedding$", P(None, ("fsdp", "tensor"))),
    (r"unembed/kernel$", P(("fsdp", "tensor"), None)),
)
"""Rules for `rlhf_jax.models.decoder`; optimizer moments and EMA have the same paths inside, so they follow.
Norms, scalar heads and counters are replicated."""

T = TypeVar("T")


def rules_from_data(rules: Sequence[Any], *, field: str = "sharding") -> Rules:
    """Rules as they stand in a config: ``((regex, (axes of dimension 0, of dimension 1, ..)), ..)``.

    Args:
      rules: for each dimension None, the name of a mesh axis, or a tuple of names; ``()`` replicates everything.
      field: of the config, for errors.

    Returns:
      The same rules for `tree_shardings`.

    Raises:
      ValueError: an entry is not such a pair, its regex does not compile, or it names no mesh axis.

    >>> rules_from_data((("mlp/up/kernel$", (None, "fsdp", "tensor")),))
    (('mlp/up/kernel$', P(None, 'fsdp', 'tensor')),)
    """
    found = []
    for rule in rules:
        if not (isinstance(rule, tuple | list) and len(rule) == 2 and isinstance(rule[1], tuple | list)):
            raise ValueError(f"{field}: {rule!r} is not a pair (regex, (axes of dimension 0, ..))")
        pattern, axes = rule
        for group in axes:
            for name in (group,) if isinstance(group, str) else group or ():
                if name not in AXES:
                    raise ValueError(f"{field}: {rule!r} names the mesh axis {name!r}: the axes are {', '.join(AXES)}")
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"{field}: {pattern!r} is not a regular expression ({error})") from None
        found.append((pattern, P(*(tuple(group) if isinstance(group, list) else group for group in axes))))
    return tuple(found)


def rules_as_data(rules: Rules) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """Rules as plain tuples for a config, the inverse of `rules_from_data`."""
    return tuple((pattern, tuple(spec)) for pattern, spec in rules)


def make_mesh(shape: Sequence[int] = (-1, 1, 1), *, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh ``(data, fsdp, tensor)`` over all devices.

    Args:
      shape: sizes of the three axes; one of them may be -1, which takes what is left.
      devices: None for all devices of all hosts.

    Returns:
      A mesh with automatic axes, so that the compiler places what nobody annotated.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices.

    >>> make_mesh((1, 1, 1), devices=jax.devices()[:1]).shape["tensor"]
    1
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = tuple(int(n) for n in shape)
    if len(sizes) != len(AXES) or sizes.count(-1) > 1 or any(n < 1 and n != -1 for n in sizes):
        raise ValueError(f"mesh shape {sizes} must be three sizes (data, fsdp, tensor), at most one of them -1")
    known = math.prod(n for n in sizes if n != -1)
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise ValueError(
            f"mesh shape {sizes} (data, fsdp, tensor) needs {known} devices and there are {len(devices)}: "
            f"choose sizes that multiply to {len(devices)}, or -1 for one of them"
        )
    sizes = tuple(len(devices) // known if n == -1 else n for n in sizes)
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def tree_shardings(tree: PyTree, mesh: Mesh | AbstractMesh, rules: Rules = DECODER_RULES) -> PyTree:
    """A sharding for each leaf: the first rule whose regex is found in the leaf's path, else replicated.

    Paths read like ``policy/params/blocks/mlp/up/kernel`` or ``opt_state/0/mu/embed/embedding``.

    Args:
      tree: parameters, a `TrainState`, a `PPOState`, or their `jax.eval_shape`.
      mesh: from `make_mesh`; to plan an `AbstractMesh`.
      rules: ordered.

    Returns:
      The same tree of `NamedSharding`: for `jax.device_put`, `compile_step` and checkpoints.

    Raises:
      ValueError: if a rule does not fit a leaf: more axes than the leaf has, or a size that the mesh does not divide.
        Nothing is replicated silently; put a rule for that leaf before the others.
    """

    def place(path: tuple, leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        name = "/".join(_step_name(step) for step in path)
        spec = next((spec for pattern, spec in rules if re.search(pattern, name)), P())
        _check_fits(name, tuple(leaf.shape), spec, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, tree)


def _step_name(step: object) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(step, attribute):
            return str(getattr(step, attribute))
    return str(step)


def _check_fits(name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> None:
    if len(spec) > len(shape):
        raise ValueError(f"rule {spec} has more axes than {name} of shape {shape}: put a rule for it before that one")
    for dimension, axes in enumerate(spec):
        pieces = _axes_size(mesh, axes)
        if shape[dimension] % pieces:
            raise ValueError(
                f"{name} of shape {shape} does not divide: mesh axes {axes} cut dimension {dimension} into {pieces}. "
                f"Choose another mesh, or put the rule ({name!r}, PartitionSpec()) first"
            )


def _axes_size(mesh: Mesh | AbstractMesh, axes: str | tuple[str, ...] | None) -> int:
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    for name in names:
        if name not in mesh.shape:
            raise ValueError(f"a rule names the mesh axis {name!r}: the axes are {', '.join(mesh.shape)}")
    return math.prod(mesh.shape[name] for name in names)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Rows over data and fsdp, everything else whole: for batches, rollouts and `make_ppo_step(batch_sharding=...)`."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def place_batch(batch: T, mesh: Mesh) -> T:
    """Put a batch on the devices, rows over data and fsdp; with several hosts each gives its own rows.

    Args:
      batch: a struct of numpy arrays with rows first, this process's part of the global batch.
      mesh: from `make_mesh`.

    Returns:
      The same struct of global arrays; process i's rows come after those of process i - 1.

    Raises:
      ValueError: if the global rows do not divide over data and fsdp.
    """
    sharding = batch_sharding(mesh)
    pieces, processes = mesh.shape["data"] * mesh.shape["fsdp"], _processes(mesh)

    def place(path: tuple, x: np.ndarray | jax.Array) -> jax.Array:
        rows = x.shape[0] * processes
        if rows % pieces:
            name = "/".join(_step_name(step) for step in path)
            raise ValueError(
                f"batch of {rows} rows ({name}) does not divide over data={mesh.shape['data']} x "
                f"fsdp={mesh.shape['fsdp']}: choose a multiple of {pieces}"
            )
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree_util.tree_map_with_path(place, batch)


def place_state(state: T, mesh: Mesh, rules: Rules = DECODER_RULES) -> T:
    """Put parameters or a whole training state on the devices as `rules` say.

    Args:
      state: a tree of arrays that every process holds in full.
      mesh: from `make_mesh`.
      rules: ordered.

    Returns:
      The same tree of global arrays, always copies: a step that donates them leaves `state` alone.

    Raises:
      ValueError: as `tree_shardings`.
    """
    # device_put would share the shard that is on the right device already, and a donating step would then delete it.
    return jax.device_put(jax.tree.map(np.array, state), tree_shardings(state, mesh, rules))


def build_state(make: Callable[..., T], *arguments: PyTree, mesh: Mesh, rules: Rules = DECODER_RULES) -> tuple[T, T]:
    """``make(*arguments)``, computed where its leaves belong: no device and no host ever holds more than its part.

    Args:
      make: a function of arrays, such as ``lambda params: train_state(params, tx)``.
      *arguments: arrays on the mesh.
      mesh: from `make_mesh`.
      rules: ordered.

    Returns:
      ``(tree, shardings)``: what `make` returned, always new arrays, and `tree_shardings` of it for `compile_step`.

    Raises:
      ValueError: as `tree_shardings`.
    """
    where = tree_shardings(jax.eval_shape(make, *arguments), mesh, rules)
    return jax.jit(make, out_shardings=where)(*arguments), where


def _processes(mesh: Mesh) -> int:
    return len({device.process_index for device in mesh.devices.flat})
