"""Memory needed by each compiled phase of a stage, and errors that report it when it runs out."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax import backends
from rlhf_jax.backends import cpu_process
from rlhf_jax.run.console import patiently

Programs = Iterable[tuple[str, jax.stages.Compiled]]
"""The phases of a stage by name, each compiled when the iterator reaches it."""


class Needs(NamedTuple):
    """Bytes per device that a compiled program needs, as its compiler counts them."""

    arguments: int
    outputs: int
    temporary: int
    reused: int
    """The part of the outputs that reuses the buffers of donated arguments."""

    @property
    def new(self) -> int:
        """Bytes that the program needs beyond its arguments."""
        return self.outputs - self.reused + self.temporary


class OutOfMemory(MemoryError):
    """A phase ran out of memory; the message is in terms of the user's config."""


def needs(compiled: jax.stages.Compiled) -> Needs | None:
    """The memory of a compiled program per device; None if the backend does not report it."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    return Needs(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.temp_size_in_bytes,
        found.alias_size_in_bytes,
    )


def held(*trees: Any) -> int:
    """Bytes per device of arrays or of shapes with shardings; an array in two trees counts once.

    >>> held({"a": (x := jax.numpy.zeros(3)), "b": x})
    12
    """
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(trees)}
    return sum(map(_bytes_per_device, leaves.values()))


def _bytes_per_device(leaf: Any) -> int:
    # A key array has an extended dtype without a usable item size.
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        # Two words of 32 bits, as in the default generator.
        return 8 * math.prod(leaf.shape)
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def abstract(tree: Any, shardings: Any = None) -> Any:
    """Replaces arrays by shapes, with their own shardings or with `shardings`."""
    if shardings is None:
        # A leaf without a sharding of its own counts with its whole size on each device.
        shardings = jax.tree.map(lambda leaf: getattr(leaf, "sharding", None), tree)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        shardings,
    )


def in_units(size: float) -> str:
    """Formats a number of bytes for people.

    >>> in_units(1_536), in_units(3 * 2**30)
    ('1.5 KiB', '3.0 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


# ------------------------------------------------------------------------------------------ dry run


def dry_run(programs: Programs, mesh: jax.sharding.Mesh, *, state: int) -> dict[str, Needs]:
    """Compiles every phase and prints its memory; nothing is run.

    Args:
      programs: the phases.
      mesh: the mesh of the stage.
      state: bytes per device that stay allocated throughout the stage: weights, moments, averages,
        frozen networks.

    Returns:
      What each phase needs.
    """
    platform = backends.platform_of(mesh)
    shape = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    print(f"Dry run on {mesh.size} x {platform} ({shape}): memory of each device", flush=True)
    print(
        f"  {'weights and optimizer states':<34}{in_units(state):>12}  stay from start to end",
        flush=True,
    )
    found, begun = {}, time.monotonic()
    for name, compiled in programs:
        # The iterator compiles each program just before it yields it, so the interval between two
        # programs is the time of the compilation.
        seconds, begun = time.monotonic() - begun, time.monotonic()
        told = needs(compiled)
        if told is None:
            print(f"  {name:<12}compiled in {seconds:.1f} s; {platform} tells no sizes", flush=True)
            continue
        found[name] = told
        print(
            f"  {name:<12}arguments {in_units(told.arguments):>10}  outputs "
            f"{in_units(told.outputs):>10} ({in_units(told.reused)} in their place)  temporary "
            f"{in_units(told.temporary):>10}  compiled in {seconds:.1f} s",
            flush=True,
        )
    if found:
        # The largest phase decides: phases run one after the other and free what they needed.
        name = max(found, key=lambda name: found[name].new)
        print(
            f"  {'largest':<12}{name}: {in_units(state + found[name].new)} with what stays",
            flush=True,
        )
    # Devices of other processes cannot be queried; each process prints its own limit.
    limit = backends.memory_stats().get("bytes_limit")
    print(
        f"  {'device':<12}{'tells no limit' if limit is None else f'has {in_units(limit)}'}",
        flush=True,
    )
    print(
        f"The sizes are those of the {platform} compiler. Nothing was trained and nothing was "
        "written.",
        flush=True,
    )
    return found


# ------------------------------------------------------------------------------------ out of memory

_NO_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory|bad_alloc", re.IGNORECASE)


@contextlib.contextmanager
def phase(
    name: str, *, lower: Sequence[str], programs: Callable[[], Programs] = lambda: (), **sizes: int
) -> Iterator[None]:
    """Turns an out-of-memory failure in the block into an error with advice.

    The error names the phase, its sizes and the config keys to lower. Dispatch is asynchronous: the
    block should wait for its results, or the next phase gets the blame.

    Args:
      name: name of the phase, as in `programs`.
      lower: the config keys that help, most effective first.
      programs: the compiled phases, looked up only when memory ran out.
      **sizes: problem sizes of the phase, by name: rows, slots, parameters.

    Raises:
      OutOfMemory: instead of RESOURCE_EXHAUSTED, bad_alloc or MemoryError. Other errors propagate.
    """
    try:
        with (
            patiently("set-up, reading models and data")
            if name == "set-up"
            else contextlib.nullcontext()
        ):
            yield
    except OutOfMemory:
        # An inner phase has already explained it.
        raise
    except (MemoryError, RuntimeError) as error:
        # XLA reports memory errors as a RuntimeError, so the text has to decide.
        if not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        listed = ", ".join(f"{key}={value:,}" for key, value in sizes.items())
        raise OutOfMemory(
            f"out of memory in the phase {name} ({listed}). "
            f"{_compiled_needs(name, programs)}{_devices()}Lower or change {', '.join(lower)}; "
            "--dry_run tells each phase's memory before any work. What was saved before is intact. "
            f"({_first_line(error)})"
        ) from error


def _compiled_needs(name: str, programs: Callable[[], Programs]) -> str:
    # Memory is short: a shorter message is better than a second error.
    with contextlib.suppress(Exception):
        for other, compiled in programs():
            told = needs(compiled) if other == name else None
            if told is not None:
                return (
                    f"Its program asks each device for {in_units(told.temporary)} of temporary "
                    f"memory, beside {in_units(told.arguments)} of arguments and "
                    f"{in_units(told.outputs - told.reused)} of new outputs. "
                )
    return ""


def _devices() -> str:
    stats = backends.memory_stats()
    if "bytes_in_use" not in stats:
        return ""
    limit = f" of {in_units(stats['bytes_limit'])}" if "bytes_limit" in stats else ""
    return f"In use on the first device: {in_units(stats['bytes_in_use'])}{limit}. "


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def peak_memory_mb() -> float:
    """Peak resident memory of this process so far, in MB."""
    return cpu_process.peak_bytes() / 2**20
