"""What a process on a CPU asks of glibc, of Python's garbage collector and of XLA, once, before
devices are found.
"""

from __future__ import annotations

import ctypes
import gc
import os
from importlib import metadata, util

import jax


def settle(*, large: bool = False) -> None:
    """Prepares a process for training where no accelerator may be found; call it before devices
    are.

    Tracing makes so many objects that Python looks for garbage again and again, among all that was
    imported too: that is frozen once. The rest is for the CPU alone.

    Args:
      large: whether the models are so large that memory is scarcer than the time to fault it in.
    """
    if not gc.get_freeze_count():
        gc.collect()
        gc.freeze()
    if not has_accelerator():
        keep_freed_memory(not large)
        compile_lightly()


def has_accelerator() -> bool:
    """Whether JAX may find a GPU or TPU: its plugin is installed and not ruled out. Devices are not
    touched.
    """
    installed = (
        bool(metadata.entry_points(group="jax_plugins")) or util.find_spec("libtpu") is not None
    )
    return installed and jax.config.values["jax_platforms"] != "cpu"


def keep_freed_memory(keep: bool = True) -> None:
    """Has glibc keep what is freed, for the next step; elsewhere it does nothing. Call it before
    devices are found.

    XLA takes the scratch memory of a CPU step from malloc. By default such large pieces go back to
    the system after each step and are faulted in page by page in the next one: on a virtual machine
    of two cores an SFT step of a million parameters took 1.3 to 1.6 times as long. Not all faults
    go: what XLA's own threads free beyond 64 MB is still handed back. One arena for all threads
    would keep that too, but compiling then takes a quarter longer.

    With ``keep=False`` large pieces go back at once again, as by default: a model of 135M
    parameters in PPO held 19 GB otherwise. So they do, above 32 MiB, where glibc takes large pages
    (`make` asks it to): faults are few then, and a PPO step of 5M parameters whose scratch memory
    was kept ran 3% faster and held up to a third more, because a small piece may lie in the way of
    the next step's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    large_pages = "malloc.hugetlb=1" in os.environ.get("GLIBC_TUNABLES", "")
    m_trim_threshold, m_mmap_threshold, m_mmap_max = -1, -3, -4
    mallopt(m_mmap_max, 0 if keep and not large_pages else 65_536)
    mallopt(m_trim_threshold, 2**31 - 1 if keep else 2**17)
    if keep and large_pages:
        mallopt(m_mmap_threshold, 2**25)  # the largest that it takes


def release_freed_memory() -> None:
    """Hands back to the system what a stage has freed; elsewhere than under glibc it does nothing.

    `keep_freed_memory` keeps it for the next step, but the next stage has arrays of other sizes,
    and what is kept adds up.
    """
    gc.collect()
    trim()


def trim() -> None:
    """Hands back to the system what malloc keeps, where it can be asked to."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def compile_lightly() -> None:
    """Asks XLA for LLVM's level 1 where nothing was asked for. Call it before devices are found.

    Programs compiled in a fifth less time and ran as fast (measured on PPO's, whose time is in
    matrix products).
    """
    ask_xla("xla_backend_optimization_level", "1")


def ask_xla(flag: str, value: str) -> None:
    """Sets a flag of XLA's unless it was set already. XLA reads them when devices are found."""
    flags = os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{flag}={value}".strip()
