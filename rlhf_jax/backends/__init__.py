"""Backends: one set of operations per kind of device, behind one interface.

`PLAIN` defines every operation; all other backends compute the same, which a test checks.
`backend_for` is the only function that asks which device this machine has. A model takes its
backend from its config and calls its operations; it never branches on which backend that is.

Each faster form is one entry of a `_replace` below; without the entry, `PLAIN`'s form is used.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.backends import attention, cpu, nvidia, plain, tpu
from rlhf_jax.backends.attention import Angles, KVCache, LayerCache, View, take
from rlhf_jax.types import Params

__all__ = [
    "ACCELERATOR", "KERNELS", "PLAIN", "Angles", "Backend", "KVCache", "LayerCache", "View",
    "backend_for", "description", "first_device", "is_on_host", "memory_stats", "on_host",
    "planned_for_accelerators", "platform_of", "take",
]  # fmt: skip

KERNELS = ("auto", "plain", "blocked", "cudnn", "splash")
"""Attention over whole rows: ``plain`` has all scores of a layer in memory; ``blocked`` those of
one block of queries, and skips the keys that come after it; ``cudnn`` is NVIDIA's flash attention,
for bfloat16; ``splash`` is that of a TPU, for rows without parents. ``auto`` takes the fastest."""


class Backend(NamedTuple):
    """The operations whose fastest form differs between kinds of devices.

    Attributes:
      linear: ``(x, kernel, bias) -> x W + b``.
      residual: ``x -> x``, the residual stream between two branches.
      attend: ``(query, key, value, view, query_scalar)``, attention over whole rows.
      attend_at: the same, for some queries of each row.
      cache: how keys and values are kept for decoding, and attention over them.
      head_logits: ``(hidden, embedding) -> logits`` of a tied head, float32.
      over_layers: ``(body, x, blocks, positions=, unroll=) -> x``, all blocks over whole rows.
      unstack: ``blocks -> layers``, each layer's parameters sliced from the stacks.
      last_block: ``(block, positions)``, the last block of a step with a cache, for some slots.
      decode_layout: one layer's parameters in the layout that decode steps read fastest.
      decode_blocks: ``(ordinary, ...)``, the blocks of a step with a cache (`models.decoding`).
      step_where: ``(sound, step, old)``: ``step(old)`` if `sound`, else `old`.
      logits_per_chunk: the most logits of one chunk of `log_probs`.
      exact_products: whether float32 matrices are multiplied in float32 by default.
      head_forward: whether `log_probs.weighted_log_prob` computes its gradient in the forward pass.
    """

    linear: Callable[..., jax.Array]
    residual: Callable[[jax.Array], jax.Array]
    attend: Callable[..., jax.Array]
    attend_at: Callable[..., jax.Array]
    cache: KVCache
    head_logits: Callable[[jax.Array, jax.Array], jax.Array]
    over_layers: Callable[..., jax.Array]
    unstack: Callable[[Any], tuple[Any, ...]]
    last_block: Callable[..., tuple[jax.Array, Any]]
    decode_layout: Callable[[Params], Params]
    decode_blocks: Callable[..., Any]
    step_where: Callable[..., Any]
    logits_per_chunk: int
    exact_products: bool
    head_forward: bool


PLAIN = Backend(
    linear=plain.linear,
    residual=plain.residual,
    attend=attention.attend,
    attend_at=attention.attend_at,
    cache=attention.HEADS_FIRST,
    head_logits=plain.head_logits,
    over_layers=plain.over_layers,
    unstack=plain.unstack,
    last_block=plain.all_then_take,
    decode_layout=plain.decode_layout,
    decode_blocks=plain.decode_blocks,
    step_where=plain.step_where,
    logits_per_chunk=2**26,  # 256 MiB in float32: enough to keep an accelerator busy
    exact_products=False,
    head_forward=False,
)
"""The definition of every operation; it runs on any device and for any sharding of the arrays."""

ACCELERATOR = PLAIN._replace(
    attend=attention.attend_in_blocks, head_logits=plain.narrow_head_logits
)
"""What GPUs and TPUs have in common, for any sharding of the arrays."""

CPU = PLAIN._replace(
    linear=cpu.linear_on_mesh,
    decode_layout=cpu.decode_layout,
    attend=attention.attend_in_blocks,
    head_logits=cpu.head_logits,
    step_where=cpu.step_where,
    logits_per_chunk=2**20,  # 4 MiB in float32: fits into a processor's cache
    exact_products=True,
)
"""Forms for CPUs, for any sharding of the arrays."""


def backend_for(
    kernel: str = "auto",
    *,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    head_dim: int = 0,
) -> Backend:
    """The fastest backend of this machine; no other function asks for its devices.

    Args:
      kernel: attention over whole rows, one of `KERNELS`.
      mesh: ``(data, fsdp, tensor)`` over which activations are sharded; None for one device.
      dtype: the compute dtype of the model.
      head_dim: the width of its heads; 0 if there is no attention.

    Returns:
      The backend; equal arguments give the same object on the same machine.

    Raises:
      ValueError: ``cudnn`` was requested and does not support these arguments. (Row lengths are
        checked when a kernel is called.)
    """
    # A mesh of one device does not need the forms for sharded arrays.
    mesh = None if mesh is None or mesh.size == 1 else mesh
    alone = jax.device_count() == 1
    return _assemble(_platform(), kernel, mesh, jnp.dtype(dtype), head_dim, alone)


def _platform() -> str:
    """``cpu``, ``tpu``, ``nvidia``, another platform's name, or the one that is planned for."""
    return _PLANNED.get() or ("nvidia" if nvidia.is_here() else jax.default_backend())


@functools.lru_cache
def _assemble(
    platform: str, kernel: str, mesh: Mesh | None, dtype: jnp.dtype, head_dim: int, alone: bool
) -> Backend:
    """The backend of a platform, from the general forms to those of one attention kernel."""
    # Every other platform, known or not, gets the forms of an accelerator.
    backend = CPU if platform == "cpu" else ACCELERATOR
    if platform == "planned":
        backend = backend._replace(attend=attention.attend_recomputed)
    if mesh is None:
        backend = _on_one_device(backend, platform)
    if mesh is None or mesh.shape["tensor"] == 1:
        # Outputs that are not sharded over tensor can be joined without moving them between
        # devices.
        layout = cpu.joined_in_tiles if platform == "cpu" else plain.joined
        backend = backend._replace(decode_layout=layout)
    if platform == "nvidia" and kernel == "auto":
        backend = _with_cudnn(backend, mesh, dtype, head_dim)
    # Without a mesh the compiler may shard rows over several chips, and it cannot partition splash.
    if platform == "tpu" and kernel == "auto" and (mesh is not None or alone):
        backend = backend._replace(attend=tpu.attend_on(mesh))
    return _with_kernel(backend, kernel, mesh, dtype, head_dim)


def _on_one_device(backend: Backend, platform: str) -> Backend:
    backend = backend._replace(
        linear=plain.linear_of_rows,
        over_layers=plain.over_layers_to_positions,
        last_block=plain.only_positions,
        # XLA (jaxlib 0.10, eight devices on a CPU) crashed while it partitioned this over data,
        # fsdp and tensor.
        head_forward=True,
    )
    if platform != "cpu":
        return backend
    return backend._replace(
        linear=cpu.linear,
        residual=cpu.residual,
        over_layers=cpu.over_layers,
        unstack=cpu.unstack,
    )


def _with_cudnn(backend: Backend, mesh: Mesh | None, dtype: jnp.dtype, head_dim: int) -> Backend:
    if not nvidia.fits(head_dim=head_dim, dtype=dtype):
        return backend
    backend = backend._replace(
        attend=nvidia.attend, attend_at=nvidia.attend_at, cache=nvidia.SLOTS_FIRST
    )
    # The compiler cannot partition a Pallas kernel over a mesh.
    return backend if mesh is not None else backend._replace(decode_blocks=nvidia.decode_blocks)


def _with_kernel(
    backend: Backend, kernel: str, mesh: Mesh | None, dtype: jnp.dtype, head_dim: int
) -> Backend:
    """The backend with the attention kernel that a config names."""
    if kernel == "plain":
        return backend._replace(attend=attention.attend)
    if kernel == "blocked":
        return backend._replace(attend=attention.attend_in_blocks)
    if kernel == "splash":
        return backend._replace(attend=tpu.attend_on(mesh, always=True))
    if kernel == "cudnn":
        nvidia.require(head_dim=head_dim, dtype=dtype)
        return backend._replace(
            attend=nvidia.attend_always, attend_at=nvidia.attend_at, cache=nvidia.SLOTS_FIRST
        )
    return backend


# A context variable and not a global: planning in one thread does not change the programs that
# others trace.
_PLANNED: contextvars.ContextVar[str] = contextvars.ContextVar("planned", default="")


@contextlib.contextmanager
def planned_for_accelerators() -> Iterator[None]:
    """Trace programs inside this context in an accelerator's forms, whatever this machine is.

    It is for planning. The programs must compile on CPUs, so attention takes the form of XLA that
    is nearest to a flash kernel: one block of scores at a time, recomputed in the backward pass.
    """
    token = _PLANNED.set("planned")
    try:
        yield
    finally:
        _PLANNED.reset(token)


def description() -> dict[str, str | int]:
    """What this process computes on: platform, kind of device, and how many devices there are."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device kind": device.device_kind,
        "number of devices": jax.device_count(),
    }


def memory_stats() -> dict[str, int]:
    """Bytes in use and the limit of this process's first device; empty where it does not tell."""
    return first_device().memory_stats() or {}


def first_device() -> Any:
    """The device on which arrays without a placement are made."""
    return jax.local_devices()[0]


def platform_of(mesh: Mesh) -> str:
    """The platform of a mesh's devices: ``cpu``, ``gpu`` or ``tpu``."""
    return mesh.devices.flat[0].platform


def on_host() -> contextlib.AbstractContextManager[Any]:
    """Inside this context, arrays without a sharding are created and computed in host memory."""
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def is_on_host(x: jax.Array) -> bool:
    """Whether an array of one device is in host memory, where numpy reads it without a copy."""
    return next(iter(x.devices())).platform == "cpu"
