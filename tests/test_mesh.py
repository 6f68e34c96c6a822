"""One recipe on every mesh: equal losses, gradient norms and tokens, one compilation, nothing copied everywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.meshes import MESHES

ROOT = Path(__file__).parents[1]
WARNING = "Involuntary full rematerialization"
OTHERS = MESHES[1:]
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
FAST = f"{FLAGS} --xla_llvm_disable_expensive_passes=true"  # a compiler that hurries


@pytest.fixture(scope="module")
def ran() -> SimpleNamespace:
    """All meshes in one process; what its compiler said of the recipe, and of a program that it is known to warn of."""
    # A program out of the cache is not compiled and warns of nothing.
    environment = os.environ | {
        "XLA_FLAGS": FAST,
        "PYTHONPATH": str(ROOT),
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.meshes"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    recipe, _, known = done.stderr.partition("== a program that is known to be warned of")
    return SimpleNamespace(meshes={tuple(m["mesh"]): m for m in found}, recipe=recipe, known=known)


def close(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("shape", OTHERS)
@pytest.mark.parametrize("kind", ["sft", "reward", "ppo"])
def test_losses_and_gradient_norms_are_those_of_one_device(ran, shape, kind):
    """PITFALL 19: two steps, so that the update is held too; the metrics are those of the global batch."""
    expected = ran.meshes[1, 1, 1][kind]["metrics"]
    assert {name.split("/")[1] for name in expected} >= {"loss", "grad_norm"}
    close(ran.meshes[shape][kind]["metrics"], expected)


@pytest.mark.parametrize("shape", MESHES)
def test_each_step_is_compiled_once(ran, shape):
    found = ran.meshes[shape]
    assert {kind: found[kind]["compiled"] for kind in ("sft", "reward", "ppo")} == dict.fromkeys(
        ("sft", "reward", "ppo"), 1
    )


def test_the_compiler_copies_nothing_to_every_device_against_our_will(ran):
    assert WARNING not in ran.recipe
    assert WARNING in ran.known  # it would have been seen


@pytest.mark.parametrize("shape", OTHERS)
@pytest.mark.parametrize("sampler", ["tokens", "refilled"])
def test_rollouts_are_equal_token_for_token(ran, shape, sampler):
    alone = ran.meshes[1, 1, 1]
    assert alone["tokens"] == alone["refilled"]
    assert 0 < alone["finished"] < len(alone["tokens"])
    assert ran.meshes[shape][sampler] == alone[sampler]


@pytest.mark.parametrize("shape", OTHERS)
def test_weights_moments_average_cache_and_batches_lie_in_pieces(ran, shape):
    data, fsdp, tensor = shape
    found = ran.meshes[shape]
    for kind in ("sft", "reward", "ppo"):
        held = {
            k: v for k, v in found[kind]["pieces"].items() if k.endswith(("kernel", "embedding"))
        }
        policy = {k: v for k, v in held.items() if not k.startswith("value/")}
        assert len(policy) >= 3 * 8  # weights and two moments
        assert set(policy.values()) == {1 / (fsdp * tensor)}, kind
        assert all(
            v == 1.0 for k, v in held.items() if k.startswith("value/")
        )  # its rules replicate it
    assert any(name.startswith("policy/ema/") for name in found["ppo"]["pieces"])
    assert set(found["batch"].values()) == set(found["samples"].values()) == {1 / (data * fsdp)}
    keys = {v for k, v in found["cache"].items() if k.startswith(("keys", "values"))}
    assert keys == {1 / (data * fsdp * tensor)}
