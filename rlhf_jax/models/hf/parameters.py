"""Parameters on their devices, filled from stored tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from rlhf_jax.models.hf.families import is_flipped, tensor_name
from rlhf_jax.models.hf.stored import Read, Stored, Window, blocks, checked, whole
from rlhf_jax.types import Model, Params

Shardings = Callable[[Params], Any]
"""Parameters as `jax.ShapeDtypeStruct`s -> the same tree of shardings."""


def assemble(
    model: Model,
    names: Mapping[str, str],
    read: Read,
    dtype: Any,
    shardings: Shardings | None,
    *,
    transposed: bool,
    bias: np.floating | float = 0.0,
    check: Callable[[], None] = lambda: None,
) -> Params:
    """Parameters in the shapes that `model` expects.

    Every tensor is looked up, and `check` called, before the first of them is read.

    Args:
      model: the model to which they belong.
      names: our module -> its name in the file (`families`).
      read: gives the tensors of the file.
      dtype: of the parameters.
      shardings: where to put them; None = the default device.
      transposed: whether the file stores matrices as (out, in).
      bias: of a score head, which has no tensor in a file.
      check: raises if the file has something that was not read.

    Raises:
      ValueError: a tensor is missing or has another shape.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    placements = {} if shardings is None else traverse_util.flatten_dict(shardings(shapes))
    expected: dict[Any, Any] = traverse_util.flatten_dict(shapes)
    makers = {}
    for path, leaf in expected.items():
        stacked, flip = path[0] == "blocks", is_flipped(path, transposed=transposed)
        if path[0] == "score":
            makers[path] = partial(
                _window_of, _score(read, path[1], leaf.shape, bias).astype(dtype)
            )
        else:
            name, shape = tensor_name(names, path), leaf.shape[1:] if stacked else leaf.shape
            layers = [name.format(i) for i in range(leaf.shape[0])] if stacked else [name]
            # Looking a tensor up marks it as read, which is what `check` goes by.
            stored = [checked(n, read(n), shape[::-1] if flip else shape) for n in layers]
            makers[path] = partial(_read_piece, stored, dtype, stacked=stacked, flip=flip)
    check()
    params = {
        path: _place(expected[path].shape, dtype, placements.get(path), make)
        for path, make in makers.items()
    }
    return traverse_util.unflatten_dict(params)


def _score(read: Read, leaf: str, shape: tuple[int, ...], bias: np.floating | float) -> np.ndarray:
    if leaf == "bias":
        return np.asarray(bias)
    return whole(checked("score.weight", read("score.weight"), (1, *shape)))[0]


def _window_of(value: np.ndarray, index: Window) -> np.ndarray:
    return np.array(value[index])


def _place(
    shape: tuple[int, ...], dtype: Any, sharding: Any, make: Callable[[Window], np.ndarray]
) -> jax.Array:
    """An array on its devices; each device's shard is read once."""

    def piece(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        return make(
            # JAX gives ``slice(None)`` for a whole axis; a window has numbers.
            tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))
        )

    if sharding is None:
        placed = jax.device_put(piece((slice(None),) * len(shape)))
    else:
        placed = jax.make_array_from_callback(shape, sharding, piece, dtype=dtype)
    # Without waiting, the shards in transfer to a device would add up in host memory.
    return placed.block_until_ready()


def _read_piece(
    stored: Sequence[Stored], dtype: Any, index: Window, *, stacked: bool, flip: bool
) -> np.ndarray:
    """The window `index` of a parameter.

    Args:
      stored: the tensors that it consists of.
      dtype: of the parameter.
      index: a window of the parameter.
      stacked: whether its first axis is the layer; then each layer is a tensor of its own.
      flip: whether the file stores the matrix transposed.
    """
    target = _aligned(tuple(part.stop - part.start for part in index), dtype)
    layers, window = (index[0], index[1:]) if stacked else (slice(0, 1), index)
    for i, layer in enumerate(stored[layers]):
        part = target[i] if stacked else target
        # A transposed view of the target is filled, so that no transposed copy is made.
        _copy(layer, window[::-1] if flip else window, part.T if flip else part)
    return target


def _copy(source: Stored, window: Window, target: np.ndarray) -> None:
    """Fill `target`, in its dtype, from a window of the file, block by block of rows."""
    rows, *others = window
    for block in blocks(len(target), target.dtype.itemsize * math.prod(source.shape[1:])):
        target[block] = source[(slice(rows.start + block.start, rows.start + block.stop), *others)]


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that starts on a multiple of 64 bytes.

    On a CPU `jax.device_put` then copies nothing.
    """
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(jnp.dtype(dtype)).reshape(shape)


def over_fsdp(mesh: jax.sharding.Mesh, params: Params) -> Any:
    """Shardings that split each array over ``fsdp``, along its longest axis that divides.

    An array without such an axis is replicated.

    Args:
      mesh: of the devices.
      params: as `jax.ShapeDtypeStruct`s.
    """
    parts = mesh.shape.get("fsdp", 1)

    def place(leaf: jax.ShapeDtypeStruct) -> jax.sharding.NamedSharding:
        axes = [axis for axis in range(leaf.ndim) if parts > 1 and leaf.shape[axis] % parts == 0]
        spec: list[str | None] = [None] * leaf.ndim
        if axes:
            spec[max(axes, key=lambda axis: leaf.shape[axis])] = "fsdp"
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    return jax.tree.map(place, params)
