"""What a process on a CPU asks of malloc and of XLA before it touches a device."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhf_jax.backends import cpu_process
from rlhf_jax.run import responses

ROOT = Path(__file__).parents[2]

COUNT_FAULTS = """
import ctypes, resource, sys
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
if sys.argv[1] == "keep":
    from rlhf_jax.backends import cpu_process
    cpu_process.keep_freed_memory()
def use(size=64 * 2**20):
    place = libc.malloc(size)
    libc.memset(place, 1, size)
    libc.free(place)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


COUNT_RELEASED = """
import ctypes, sys
from rlhf_jax.backends import cpu_process
cpu_process.keep_freed_memory()
if sys.argv[1] == "large model":
    cpu_process.keep_freed_memory(False)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
place, size = libc.malloc(256 * 2**20), 256 * 2**20
libc.memset(place, 1, size)
above = libc.malloc(1000)  # keeps the freed piece away from the top, which free() itself might hand back
before = resident()
libc.free(place)
if sys.argv[1] == "end of stage":
    before = resident()
    cpu_process.release_freed_memory()
print(before - resident())
"""


def faults(how: str) -> int:
    env = os.environ | {"PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": ""}
    command = [sys.executable, "-c", COUNT_FAULTS, how]
    return int(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc hands freed memory back at once"
)
def test_freed_memory_is_kept_so_that_no_step_faults_it_in_again():
    pages = 4 * 64 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert faults("keep") < pages // 100 < faults("plain")


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc keeps freed memory"
)
@pytest.mark.parametrize(
    ("when", "back"),
    [("end of stage", True), ("large model", True), ("small model", False), ("large pages", True)],
)
def test_freed_memory_goes_back_at_the_end_of_a_stage_and_at_once_under_a_large_model_or_with_large_pages(
    when, back
):
    tunables = "glibc.malloc.hugetlb=1" if when == "large pages" else ""
    env = os.environ | {"PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": tunables}
    command = [sys.executable, "-c", COUNT_RELEASED, when]
    released = float(
        subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    )
    assert (released > 200) == back


def test_light_compiling_is_asked_for_unless_the_user_chose_a_level(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    cpu_process.compile_lightly()
    cpu_process.compile_lightly()
    asked = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1"
    assert os.environ["XLA_FLAGS"] == asked
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")
    cpu_process.compile_lightly()
    assert os.environ["XLA_FLAGS"] == "--xla_backend_optimization_level=3"


def test_an_accelerator_is_seen_by_its_plugin_and_can_be_ruled_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        cpu_process.metadata,
        "entry_points",
        lambda group: ["cuda"] if group == "jax_plugins" else [],
    )
    ruled_out = jax.config.values["jax_platforms"]
    try:
        jax.config.update("jax_platforms", None)
        assert cpu_process.has_accelerator()
        jax.config.update("jax_platforms", "cpu")
        assert not cpu_process.has_accelerator()
    finally:
        jax.config.update("jax_platforms", ruled_out)


def test_batches_by_length_hold_every_row_once_and_waste_little():
    lengths = [40, 3, 64, 30, 90]
    batches = list(responses.by_length(lengths, 2))
    assert [slots for _, slots in batches] == [32, 64, 96]
    assert [index.tolist() for index, _ in batches] == [[1, 3], [0, 2], [4, 4]]


@pytest.mark.parametrize(
    ("cores", "devices", "streams"), [(2, 1, 2), (16, 1, 2), (1, 1, 1), (2, 8, 1)]
)
def test_one_cpu_device_samples_in_two_streams_if_it_has_two_cores(
    monkeypatch, cores, devices, streams
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:devices]).reshape(-1, 1, 1), ("data", "fsdp", "model")
    )
    assert responses.sampling_streams(mesh) == streams
