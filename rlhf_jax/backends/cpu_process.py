"""Settings of glibc, Python's garbage collector and XLA for a process on a CPU.

They are made once, before JAX initialises its devices.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from importlib import metadata, util

import jax


def settle(*, large: bool = False) -> None:
    """Prepare a process for training; call it before JAX initialises its devices.

    Tracing creates so many objects that the garbage collector runs often, each time over everything
    that was imported as well: those objects are frozen once. The other settings are made only where
    there is no accelerator.

    Args:
      large: the models are so large that memory matters more than the time of page faults.
    """
    if not gc.get_freeze_count():
        gc.collect()
        gc.freeze()
    if not has_accelerator():
        keep_freed_memory(not large)
        compile_lightly()


def has_accelerator() -> bool:
    """Whether JAX may find a GPU or TPU: its plugin is installed and not ruled out.

    Devices are not initialised by this check.
    """
    # Plugins of GPUs register an entry point; libtpu is found by its name.
    installed = (
        bool(metadata.entry_points(group="jax_plugins")) or util.find_spec("libtpu") is not None
    )
    return installed and jax.config.values["jax_platforms"] != "cpu"


def keep_freed_memory(keep: bool = True) -> None:
    """Make glibc keep freed memory for the next step; without glibc it does nothing.

    Call it before JAX initialises its devices. XLA takes the scratch memory of a CPU step from
    malloc. By default such large blocks are returned to the system after each step and faulted in
    page by page in the next one: on a virtual machine of two cores an SFT step of a million
    parameters took 1.3 to 1.6 times as long. Some faults remain: what XLA's own threads free beyond
    64 MB is still returned. One arena for all threads would keep that too, but compiling then takes
    a quarter longer.

    With ``keep=False`` large blocks are returned at once, as by default: PPO with a model of 135M
    parameters used 19 GB otherwise. Blocks above 32 MiB are also returned where glibc uses large
    pages (`make` turns them on): faults are few then, and keeping the scratch memory of a PPO step
    of 5M parameters made it 3% faster but used up to a third more memory, because a small block can
    fragment the space that the next step needs.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    large_pages = "malloc.hugetlb=1" in os.environ.get("GLIBC_TUNABLES", "")
    # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_MMAP_MAX of glibc's malloc.h, which Python does not
    # have. 65,536 mappings and 128 KiB are its defaults.
    m_trim_threshold, m_mmap_threshold, m_mmap_max = -1, -3, -4
    mallopt(m_mmap_max, 0 if keep and not large_pages else 65_536)
    mallopt(m_trim_threshold, 2**31 - 1 if keep else 2**17)
    if keep and large_pages:
        mallopt(m_mmap_threshold, 2**25)  # the largest value that glibc accepts


def release_freed_memory() -> None:
    """Return to the system what a stage has freed; without glibc it does nothing.

    `keep_freed_memory` keeps it for the next step, but the next stage has arrays of other sizes,
    and what is kept adds up.
    """
    gc.collect()
    trim()


def trim() -> None:
    """Return to the system what malloc has kept, where the C library has `malloc_trim`."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def compile_lightly() -> None:
    """Set LLVM's optimisation level to 1 unless the user has set one.

    Call it before JAX initialises its devices. Programs compiled in a fifth less time and ran as
    fast (measured on PPO, where matrix products take most of the time).
    """
    ask_xla("xla_backend_optimization_level", "1")


def ask_xla(flag: str, value: str) -> None:
    """Set a flag of XLA unless it is set already; XLA reads its flags when devices initialise."""
    flags = os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{flag}={value}".strip()


def peak_bytes() -> int:
    """Peak resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # In bytes on macOS, in KiB on Linux.
    return peak if sys.platform == "darwin" else peak * 1024
