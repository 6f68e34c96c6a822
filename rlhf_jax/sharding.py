"""Sharding: one mesh ``(data, fsdp, tensor)``, regex rules for parameters, batches by rows.

One device is the mesh ``(1, 1, 1)``; there is no other code path. Pure data parallelism, as `pmap`
users know it, is ``(n, 1, 1)``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from rlhf_jax.run import processes

AXES = ("data", "fsdp", "tensor")
"""Rows of a batch are split over data and fsdp; parameters over fsdp and tensor."""

Rules = Sequence[tuple[str, PartitionSpec]]
"""Ordered ``(regex, PartitionSpec)``; the first regex found in the path of a leaf applies."""

P = PartitionSpec

DECODER_RULES: Rules = (
    # Blocks are stacked: axis 0 is the layer. Column-parallel into a branch and row-parallel out of
    # it, as in Megatron, so that a branch needs one reduction over the tensor axis.
    (r"blocks/attention/(query|key|value)/kernel$", P(None, "fsdp", "tensor")),
    (r"blocks/mlp/(gate|up)/kernel$", P(None, "fsdp", "tensor")),
    (r"blocks/(attention/out|mlp/down)/kernel$", P(None, "tensor", "fsdp")),
    (r"blocks/(attention/(query|key|value)|mlp/(gate|up))/bias$", P(None, "tensor")),
    # Adapters [L, inputs, r] and [L, r, outputs] are sharded as the kernel that they are added to.
    (r"blocks/(attention/(query|key|value)|mlp/(gate|up))/lora_a$", P(None, "fsdp")),
    (r"blocks/(attention/(query|key|value)|mlp/(gate|up))/lora_b$", P(None, None, "tensor")),
    (r"blocks/(attention/out|mlp/down)/lora_a$", P(None, "tensor")),
    (r"blocks/(attention/out|mlp/down)/lora_b$", P(None, None, "fsdp")),
    # By width and not by vocabulary: the 50,257 rows of GPT-2 do not divide over usual meshes.
    (r"(embed|positions)/embedding$", P(None, ("fsdp", "tensor"))),
    (r"unembed/kernel$", P(("fsdp", "tensor"), None)),
)
"""Rules for `rlhf_jax.models.decoder`. Paths of optimizer moments and EMA end in the same names, so
the rules apply to them too. Norms, scalar heads and counters are replicated."""

T = TypeVar("T")


def rules_from_data(rules: Sequence[Any], *, field: str = "sharding") -> Rules:
    """Rules from a config's ``((regex, (axes of dimension 0, of dimension 1, ..)), ..)``.

    Args:
      rules: for each dimension None, the name of a mesh axis, or a tuple of names; ``()``
        replicates everything.
      field: name of the config field, for error messages.

    Returns:
      The same rules for `tree_shardings`.

    Raises:
      ValueError: an entry is not such a pair, its regex does not compile, or an axis is unknown.

    >>> rules_from_data((("mlp/up/kernel$", (None, "fsdp", "tensor")),))
    (('mlp/up/kernel$', P(None, 'fsdp', 'tensor')),)
    """
    found = []
    for rule in rules:
        if not (
            isinstance(rule, tuple | list) and len(rule) == 2 and isinstance(rule[1], tuple | list)
        ):
            raise ValueError(f"{field}: {rule!r} is not a pair (regex, (axes of dimension 0, ..))")
        pattern, axes = rule
        for group in axes:
            for name in (group,) if isinstance(group, str) else group or ():
                if name not in AXES:
                    raise ValueError(
                        f"{field}: {rule!r} names the mesh axis {name!r}: the axes are "
                        f"{', '.join(AXES)}"
                    )
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"{field}: {pattern!r} is not a regular expression ({error})"
            ) from None
        found.append(
            (pattern, P(*(tuple(group) if isinstance(group, list) else group for group in axes)))
        )
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
      A mesh with automatic axes, so that the compiler chooses shardings that are not given.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices.

    >>> make_mesh((1, 1, 1), devices=jax.devices()[:1]).shape["tensor"]
    1
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = tuple(int(n) for n in shape)
    if len(sizes) != len(AXES) or sizes.count(-1) > 1 or any(n < 1 and n != -1 for n in sizes):
        raise ValueError(
            f"mesh shape {sizes} must be three sizes (data, fsdp, tensor), at most one of them -1"
        )
    known = math.prod(n for n in sizes if n != -1)
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise ValueError(
            f"mesh shape {sizes} (data, fsdp, tensor) needs {known} devices and there are "
            f"{len(devices)}: choose sizes that multiply to {len(devices)}, or -1 for one of them"
        )
    sizes = tuple(len(devices) // known if n == -1 else n for n in sizes)
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def tree_shardings(tree: PyTree, mesh: Mesh | AbstractMesh, rules: Rules = DECODER_RULES) -> PyTree:
    """A sharding for each leaf, by the first rule that matches its path; replicated if none does.

    Paths read like ``policy/params/blocks/mlp/up/kernel`` or ``opt_state/0/mu/embed/embedding``.

    Args:
      tree: parameters, a `TrainState`, a `PPOState`, or their `jax.eval_shape`.
      mesh: from `make_mesh`, or an `AbstractMesh` for planning without devices.
      rules: ordered.

    Returns:
      The same tree of `NamedSharding`: for `jax.device_put`, `compile_step` and checkpoints.

    Raises:
      ValueError: if a rule does not fit a leaf: more axes than the leaf has, or a size that the
        mesh does not divide. Such a leaf is not silently replicated; put a rule for it first.
    """

    def place(path: tuple, leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        name = "/".join(_step_name(step) for step in path)
        # `search` and not `match`: the same rule applies below ``policy/params/`` and
        # ``opt_state/0/mu/``.
        spec = next((spec for pattern, spec in rules if re.search(pattern, name)), P())
        _check_fits(name, tuple(leaf.shape), spec, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, tree)


def _step_name(step: object) -> str:
    # The steps of a path are `DictKey` (key), `GetAttrKey` (name) and `SequenceKey` (idx) of JAX.
    for attribute in ("key", "name", "idx"):
        if hasattr(step, attribute):
            return str(getattr(step, attribute))
    return str(step)


def _check_fits(
    name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh | AbstractMesh
) -> None:
    if len(spec) > len(shape):
        raise ValueError(
            f"rule {spec} has more axes than {name} of shape {shape}: put a rule for it before "
            "that one"
        )
    for dimension, axes in enumerate(spec):
        pieces = _axes_size(mesh, axes)
        if shape[dimension] % pieces:
            raise ValueError(
                f"{name} of shape {shape} does not divide: mesh axes {axes} cut dimension "
                f"{dimension} into {pieces}. Choose another mesh, or put the rule "
                f"({name!r}, PartitionSpec()) first"
            )


def _axes_size(mesh: Mesh | AbstractMesh, axes: str | tuple[str, ...] | None) -> int:
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    for name in names:
        if name not in mesh.shape:
            raise ValueError(
                f"a rule names the mesh axis {name!r}: the axes are {', '.join(mesh.shape)}"
            )
    return math.prod(mesh.shape[name] for name in names)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Rows over data and fsdp, other axes whole: for batches, rollouts and `make_ppo_step`."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Which share of a batch this process reads, as ``(index, count)``.

    They are the arguments of ``Batches(process_index=, process_count=)``. Processes that share a
    tensor axis have the same rows and so the same share. If the mesh mixes the rows of processes,
    each process reads the whole batch: ``(0, 1)``.

    Args:
      mesh: from `make_mesh`.

    Returns:
      ``(0, 1)`` in a program of one process.

    >>> batch_share(make_mesh())
    (0, 1)
    """
    # One line for each piece of the rows, data x fsdp, with the processes of its tensor axis.
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    return _share(owners.reshape(-1, mesh.shape["tensor"]), processes.index())


def _share(owners: np.ndarray, process: int) -> tuple[int, int]:
    """The share of `process`, given the processes ``owners[piece]`` of each piece of the rows."""
    held = {
        int(owner): {*np.flatnonzero((owners == owner).any(axis=1)).tolist()}
        for owner in np.unique(owners)
    }
    size = len(held[process])
    # A process reads one slice of the batch, so a share must be a run of neighbouring pieces, and
    # all shares must be equally long and either equal or disjoint.
    shares = [set(range(start, start + size)) for start in range(0, len(owners), size)]
    if any(pieces not in shares for pieces in held.values()):
        return 0, 1
    return shares.index(held[process]), len(shares)


def own_rows(batch: T, mesh: Mesh) -> T:
    """This process's share of a batch that every process has in full, for `place_batch`.

    Args:
      batch: a struct of arrays with rows first.
      mesh: from `make_mesh`.

    Returns:
      The struct with this share of the rows; all rows if there is one process.

    Raises:
      ValueError: if the rows do not divide over data and fsdp.
    """
    index, count = batch_share(mesh)

    def part(path: tuple, x: np.ndarray) -> np.ndarray:
        _check_rows(path, x.shape[0], mesh)
        share = x.shape[0] // count
        return x[index * share : (index + 1) * share]

    return jax.tree_util.tree_map_with_path(part, batch)


def place_batch(batch: T, mesh: Mesh) -> T:
    """Put a batch on the devices, rows over data and fsdp.

    With several processes, each passes its share of the rows.

    Args:
      batch: a struct of numpy arrays with rows first, this process's `batch_share` of the global
        batch.
      mesh: from `make_mesh`.

    Returns:
      The same struct of global arrays; the rows of share i come after those of share i - 1.

    Raises:
      ValueError: if the global rows do not divide over data and fsdp.
    """
    sharding, (index, count) = batch_sharding(mesh), batch_share(mesh)

    def place(path: tuple, x: np.ndarray | jax.Array) -> jax.Array:
        _check_rows(path, x.shape[0] * count, mesh)
        own, first = np.asarray(x), index * x.shape[0]

        def piece(window: tuple[slice, ...] | None) -> np.ndarray:
            assert window is not None
            # JAX asks for the windows of this process's devices only; they lie within its share,
            # which begins at row `first` of the global batch.
            start, stop, _ = window[0].indices(x.shape[0] * count)
            return own[start - first : stop - first]

        return jax.make_array_from_callback((x.shape[0] * count, *x.shape[1:]), sharding, piece)

    return jax.tree_util.tree_map_with_path(place, batch)


def _check_rows(path: tuple, rows: int, mesh: Mesh) -> None:
    pieces = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % pieces:
        name = "/".join(_step_name(step) for step in path)
        raise ValueError(
            f"batch of {rows} rows ({name}) does not divide over data={mesh.shape['data']} x "
            f"fsdp={mesh.shape['fsdp']}: choose a multiple of {pieces}"
        )


def place_state(state: T, mesh: Mesh, rules: Rules = DECODER_RULES) -> T:
    """Put parameters or a whole training state on the devices by `rules`.

    Args:
      state: a tree of arrays that every process has in full, or of arrays that are already sharded
        over the devices of all processes.
      mesh: from `make_mesh`.
      rules: ordered.

    Returns:
      The same tree of global arrays, always copies: donating them does not invalidate `state`.

    Raises:
      ValueError: as `tree_shardings`.
    """
    return jax.tree.map(_place, state, tree_shardings(state, mesh, rules))


def _place(leaf: Any, place: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.jit(jnp.copy, out_shardings=place)(leaf)
    # device_put would share a shard that is already on the right device, and a donating step would
    # then delete it. Over several processes it would also send the whole array to all of them, to
    # check that it is the same everywhere.
    whole = np.array(leaf)
    if place.is_fully_addressable:
        return jax.device_put(whole, place)
    return jax.make_array_from_callback(whole.shape, place, lambda window: whole[window])


def build_state(
    make: Callable[..., T], *arguments: PyTree, mesh: Mesh, rules: Rules = DECODER_RULES
) -> tuple[T, T]:
    """``make(*arguments)``, computed directly in its sharding.

    No device and no host ever has more than its part of the result.

    Args:
      make: a function of arrays, such as ``lambda params: train_state(params, tx)``.
      *arguments: arrays on the mesh.
      mesh: from `make_mesh`.
      rules: ordered.

    Returns:
      ``(tree, shardings)``: what `make` returned, always new arrays, and `tree_shardings` of it for
      `compile_step`.

    Raises:
      ValueError: as `tree_shardings`.
    """
    where = tree_shardings(jax.eval_shape(make, *arguments), mesh, rules)
    return jax.jit(make, out_shardings=where)(*arguments), where
