"""Compiled programs: kept between runs, counted in seconds, compiled side by side where that is
faster.
"""

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
    """Keeps compiled programs in a cache folder of the user, so that a second run starts at once.

    Where none can be written they are compiled each time.
    """
    compiled = cache.folder("compiled")
    if jax.config.values["jax_compilation_cache_dir"] is None and compiled is not None:
        jax.config.update("jax_compilation_cache_dir", str(compiled))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


_COMPILED = "/jax/core/compile/backend_compile_duration"


class Compiling:
    """Seconds that XLA has compiled in this process, cache look-ups included.

    What the compiler took and freed, up to 300 MB for a step, goes back to the system after each
    longer compilation: the first step's arrays would come on top of it.
    """

    seconds = 0.0
    _together = False

    @classmethod
    def listen(cls) -> None:
        """Starts to count; calling it again changes nothing."""
        if not getattr(cls, "_listening", False):
            jax.monitoring.register_event_duration_secs_listener(cls._add)
            cls._listening = True

    @classmethod
    def _add(cls, event: str, duration_secs: float, **kwargs: str | int) -> None:
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
        """Counts the time of the block, and not that of programs which overlap in it."""
        begun, cls._together = time.monotonic(), True
        try:
            yield
        finally:
            cls.seconds, cls._together = cls.seconds + time.monotonic() - begun, False


def compile_together(programs: Iterator[jax.stages.Lowered]) -> None:
    """Compiles programs side by side, while the next ones are traced; their functions then find
    them compiled.

    The three of PPO take half the time of one after the other on a GPU. Not on a CPU, whose cores a
    compiler keeps busy as it is: nothing is done there; nor with several processes, which might not
    compile in the same order.

    Args:
      programs: from ``jit(..).lower(..)``, each made when it is asked for, the longest first. What
        fails is left out: it fails again where its function is called, and is told there.
    """
    if not cpu_process.has_accelerator() or processes.count() > 1:
        return
    with Compiling.together(), ThreadPoolExecutor(4) as pool, contextlib.suppress(Exception):
        for program in programs:
            pool.submit(program.compile)


def lower(step: StepFn, *arguments: Any) -> jax.stages.Lowered:
    """The program of a step from `compile_step` or `compile_frozen_step` for such arguments, not
    yet compiled.
    """
    frozen = step.args if isinstance(step, functools.partial) else ()
    function: Any = step.func if isinstance(step, functools.partial) else step
    return function.lower(*frozen, *arguments)
