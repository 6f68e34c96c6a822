"""Compilation: the cache across runs, the seconds spent, and several programs in parallel."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from rlhf_jax.backends import cpu_process
from rlhf_jax.run import cache, processes
from rlhf_jax.types import StepFn


def keep_compiled() -> None:
    """Keeps compiled programs in the user's cache folder, so that a second run starts at once.

    Where that folder cannot be written, programs are compiled in each run.
    """
    compiled = cache.folder("compiled")
    # A cache folder that the user gave to JAX takes precedence.
    if jax.config.values["jax_compilation_cache_dir"] is None and compiled is not None:
        jax.config.update("jax_compilation_cache_dir", str(compiled))
        # By default JAX keeps only programs that took at least a second to compile.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


_COMPILED = "/jax/core/compile/backend_compile_duration"


class Compiling:
    """Counts the seconds that this process has spent compiling, cache look-ups included.

    Memory that the compiler took and freed, up to 300 MB for a step, is returned to the system
    after each longer compilation: otherwise the first step's arrays would come on top of it.
    """

    seconds = 0.0
    _together = False

    @classmethod
    def listen(cls) -> None:
        """Starts counting; further calls have no effect."""
        if not getattr(cls, "_listening", False):
            jax.monitoring.register_event_duration_secs_listener(cls._add)
            cls._listening = True

    @classmethod
    def _add(cls, event: str, duration_secs: float, **kwargs: str | int) -> None:
        # With programs in parallel the sum of their seconds would exceed the time that passed.
        if (
            event in (_COMPILED, "/jax/core/compile/jaxpr_to_mlir_module_duration")
            and not cls._together
        ):
            cls.seconds += duration_secs
        if event == _COMPILED and duration_secs > 0.5:
            cpu_process.trim()

    @classmethod
    @contextlib.contextmanager
    def together(cls) -> Iterator[None]:
        """Counts the wall time of the block, in which programs that compile in parallel overlap."""
        begun, cls._together = time.monotonic(), True
        try:
            yield
        finally:
            cls.seconds, cls._together = cls.seconds + time.monotonic() - begun, False


def compile_together(programs: Iterator[jax.stages.Lowered]) -> None:
    """Compiles programs in parallel, each while the next is traced, ahead of their first calls.

    The three programs of PPO take half the time on a GPU that they take one after the other.
    Nothing is done on a CPU, where one compilation keeps all cores busy, nor with several
    processes, which might not compile in the same order.

    Args:
      programs: from ``jit(..).lower(..)``, the longest first; the iterator traces each program when
        it is reached. An error here is ignored: the same error is raised and reported when the
        function is called.
    """
    if not cpu_process.has_accelerator() or processes.count() > 1:
        return
    # In this order the pool waits for its programs inside the time that is counted.
    with Compiling.together(), ThreadPoolExecutor(4) as pool, contextlib.suppress(Exception):
        for program in programs:
            pool.submit(program.compile)


def lower(step: StepFn, *arguments: Any) -> jax.stages.Lowered:
    """Lowers a step of `compile_step` or `compile_frozen_step` for the given arguments."""
    # A step with frozen parameters is a `partial`, which has no `lower` of its own.
    frozen = step.args if isinstance(step, functools.partial) else ()
    function: Any = step.func if isinstance(step, functools.partial) else step
    return function.lower(*frozen, *arguments)
