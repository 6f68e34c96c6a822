"""Settings outside of the config that change numbers: each flag has its class, and what differs is named."""

from __future__ import annotations

import jax
import pytest

from rlhf_jax.run import numerics

READ_IN = ("0.10",)
"""Versions of JAX whose flags were all read and classified. Another version's new flags count as `rounding`."""


@pytest.mark.skipif(
    not jax.__version__.startswith(READ_IN), reason="another JAX may have flags of its own"
)
def test_every_flag_of_jax_has_its_class():
    assert not numerics.unclassified(), (
        "does it change numbers? give it a place in rlhf_jax/run/numerics.py"
    )


def test_no_flag_has_two_classes():
    classes = (numerics.MEANING, numerics.ROUNDING, numerics.HARMLESS)
    assert sum(map(len, classes)) == len(frozenset.union(*classes))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("jax_default_prng_impl", "rbg"),
        ("jax_threefry_partitionable", False),
        ("jax_enable_x64", True),
        ("jax_default_matmul_precision", "highest"),
        ("jax_numpy_dtype_promotion", "strict"),
        ("jax_random_seed_offset", 7),
    ],
)
def test_a_flag_that_makes_another_computation_is_named(flag, value):
    before, was = numerics.meaning(), jax.config.values[flag]
    jax.config.update(flag, value)
    try:
        (line,) = numerics.differences(before, numerics.meaning())
    finally:
        jax.config.update(flag, was)
    assert line.startswith(f"{flag}: ")
    assert line.lower().endswith(f" -> {value}".lower())  # enumerations go by their names
    assert numerics.meaning() == before


def test_flags_of_xla_are_told_apart(monkeypatch, tmp_path):
    monkeypatch.setenv(
        "XLA_FLAGS",
        "--xla_cpu_enable_fast_math=true --xla_dump_to=/tmp/secret --xla_force_host_platform_device_count=8 "
        "--xla_allow_excess_precision --xla_backend_optimization_level=1",
    )
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    meaning, rounding = numerics.meaning(), numerics.rounding()
    assert (
        meaning["--xla_cpu_enable_fast_math"] == meaning["--xla_allow_excess_precision"] == "true"
    )
    assert meaning["NVIDIA_TF32_OVERRIDE"] == "0"
    assert rounding["--xla_backend_optimization_level"] == "1"
    assert not any("dump" in name or "device_count" in name for name in meaning | rounding)
    (tmp_path / "flags.txt").write_text("--xla_gpu_deterministic_ops=true\n")
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "flags.txt"))  # XLA takes a file too
    assert numerics.meaning()["--xla_gpu_deterministic_ops"] == "true"


def test_a_flag_nobody_has_heard_of_is_held(monkeypatch):
    values = jax.config.values | {"jax_of_the_future": 3}
    monkeypatch.setattr(type(jax.config), "values", property(lambda self: values))
    assert numerics.rounding()["jax_of_the_future"] == 3
    assert numerics.unclassified() >= {"jax_of_the_future"}


def test_a_flag_that_only_logs_is_held_nowhere():
    held = numerics.meaning() | numerics.rounding()
    assert "jax_log_compiles" not in held
    assert "jax_compilation_cache_dir" not in held
