"""Test surroundings: 8 fake CPU devices, strict shapes, no network, compiled programs kept between runs."""

from __future__ import annotations

import gc
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

DEVICES = 8

collect_ignore = ["golden", "accelerator"]  # scripts run by hand


def _environment() -> None:
    """What JAX and the tokenizers read when they are imported; a process a test starts inherits it."""
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    flags += [f"--xla_force_host_platform_device_count={DEVICES}"]
    os.environ["XLA_FLAGS"] = " ".join(flags)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["MPLBACKEND"] = "agg"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    if not os.access(Path(cache).parent, os.W_OK):
        cache = tempfile.gettempdir()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(cache) / "rlhf_jax" / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


_environment()

import hypothesis  # noqa: E402
import jax  # noqa: E402  (after the environment is set)
import pytest  # noqa: E402

hypothesis.settings.register_profile("busy machine", deadline=None)  # slowness is no failure
hypothesis.settings.load_profile("busy machine")

jax.config.update("jax_numpy_rank_promotion", "raise")


LONGEST = (
    "test_processes", "test_lora", "test_configs", "test_prepare_data", "test_generate", "test_guards", "test_mesh",
    "test_notebooks", "test_loader", "test_ppo_stage", "test_reliability", "test_power", "test_pipeline", "test_steps",
    "test_instructgpt", "test_plan", "test_memory", "test_conversations", "test_mistakes", "test_regular_expressions",
)  # fmt: skip
"""Files of half a minute and more, longest first: begun last, one of them would keep a worker busy alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; a worker takes them in this order (``--no-loadscope-reorder``)."""
    items.sort(
        key=lambda item: (
            LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)
        )
    )


MAPPINGS = 20_000
"""Of the 65,530 memory mappings that Linux allows a process unless told otherwise."""


@pytest.fixture(scope="module", autouse=True)
def _few_mappings() -> Iterator[None]:
    """Lets go of compiled programs before a worker has too many.

    XLA takes two or three mappings for every kernel it loads: the suite's longest files take 35,000 of one worker, the
    whole suite 65,000 and more, and where the system gives none it ends in a segmentation fault.
    """
    yield
    try:
        with open("/proc/self/maps") as mappings:
            held = sum(1 for _ in mappings)
    except OSError:
        return  # no Linux, no such limit
    if held > MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def _eight_devices() -> None:
    assert jax.device_count() == DEVICES, (
        "JAX was initialised before conftest.py could ask for 8 CPU devices"
    )


@pytest.fixture(scope="session")
def compiled() -> list[str]:
    """Names of the functions compiled in this process from now on, those found in the cache of programs included."""
    names: list[str] = []

    def add(event: str, duration: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(kwargs.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(add)
    return names


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this machine may be reached, so that no test passes thanks to a download."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        if self.family != socket.AF_UNIX:
            assert isinstance(address, tuple)
            assert str(address[0]) in ("127.0.0.1", "::1", "localhost"), (
                f"a test wants to reach {address}"
            )
        connect(self, address)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture
def strict_dtypes() -> Iterator[None]:
    """No implicit promotion: an int reward buffer that swallows float scores is an error (PITFALLS: dtypes)."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets (HH-RLHF, OpenAssistant, tiny checkpoints) that `RLHF_JAX_DATA` names."""
    value = os.environ.get("RLHF_JAX_DATA", "")
    if not value:
        pytest.skip(
            "RLHF_JAX_DATA is not set: it names the folder of real data sets this test reads"
        )
    if not Path(value).is_dir():
        pytest.fail(f"RLHF_JAX_DATA={value} is not a folder")
    return Path(value)
