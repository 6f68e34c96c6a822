"""Dry runs and memory that runs out: what the user reads, and that nothing was written or trained."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments import ppo, pretrain, reward_model, sft
from rlhf_jax import sharding
from rlhf_jax.data.schema import Demonstration, Ranking, write_jsonl
from rlhf_jax.run import cli, memory
from rlhf_jax.run.config import load_config
from rlhf_jax.run.loop import Loop
from rlhf_jax.run.ppo import programs
from tests.test_ppo_stage import inputs

ROOT = Path(__file__).parents[2]
SMALL = {
    "iterations": "1", "episodes": "8", "minibatches": "2", "prompt_length": "16", "max_new_tokens": "8",
    "ptx_row_length": "32", "ptx_rows_per_episode": "1.0", "gold": "", "kl_ceiling": "1e6",
}  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, str]:
    """A tiny model and its data."""
    folder = tmp_path_factory.mktemp("memory")
    found = inputs(folder)
    write_jsonl(
        folder / "demonstrations.jsonl",
        [Demonstration("Say yes.", "Yes.", id=f"d{i}") for i in range(16)],
    )
    write_jsonl(
        folder / "rankings.jsonl", [Ranking("Say yes.", ("Yes.", "No.", "Why?"), (0, 1, 2))] * 16
    )
    return found | {
        "demonstrations": str(folder / "demonstrations.jsonl"),
        "rankings": str(folder / "rankings.jsonl"),
    }


def flags(**overrides: str) -> list[str]:
    return [f"--config.{key}={value}" for key, value in overrides.items()]


def stage(name: str, given: dict[str, str]) -> list[str]:
    """The command line of a stage on the tiny model."""
    head = [f"--config={ROOT}/configs/{name}/storyland.py:smoke"]
    if name == "pretrain":
        return head
    if name == "ppo":
        keys = ("model", "reward_model", "prompts", "pretraining_text")
        return head + flags(**SMALL, **{key: given[key] for key in keys})
    own = {
        "model": given["model"],
        "demonstrations": given["demonstrations"],
        "batch_size": "8",
        "row_length": "64",
    }
    extra = (
        {"validation": given["demonstrations"]}
        if name == "sft"
        else {"rankings": given["rankings"]}
    )
    return head + flags(**own, **extra)


PROGRAMS = {"pretrain": pretrain, "sft": sft, "reward_model": reward_model, "ppo": ppo}
TOLD = {
    "pretrain": ["train"],
    "sft": ["train"],
    "reward_model": ["train"],
    "ppo": ["rollout", "score", "update"],
}


def run_main(name: str, given: dict[str, str], workdir: Path, *more: str) -> int:
    module = PROGRAMS[name]
    arguments = [*stage(name, given), f"--workdir={workdir}", *more]
    with pytest.raises(SystemExit) as left:
        cli.main(module.run, argv=arguments, dry_run=module.dry_run)
    return left.value.code


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_dry_run_tells_each_phase_and_writes_nothing(name, given, tmp_path, capsys, monkeypatch):
    compiled = []
    needs = memory.needs
    monkeypatch.setattr(memory, "needs", lambda program: compiled.append(program) or needs(program))
    monkeypatch.setattr(PROGRAMS[name], "run", lambda *_: pytest.fail("it ran"))
    assert run_main(name, given, tmp_path / "run", "--dry_run") == 0
    assert not (tmp_path / "run").exists()
    said = capsys.readouterr().out
    assert "8 x cpu (data=8, fsdp=1, tensor=1)" in said
    for phase, program in zip(TOLD[name], compiled, strict=True):
        line = next(line for line in said.splitlines() if line.split()[:1] == [phase])
        assert f"temporary {memory.in_units(needs(program).temporary):>10}" in line
    assert "Nothing was trained and nothing was written" in said


ERRORS = {
    "xla": jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory allocating 14400000000 bytes."
    ),
    "numpy": MemoryError("Unable to allocate 26.8 GiB for an array"),
    "malloc": RuntimeError("INTERNAL: std::bad_alloc"),
    "bare": MemoryError(),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_every_form_of_no_memory_is_told_in_the_users_terms(kind):
    with (
        pytest.raises(memory.OutOfMemory) as told,
        memory.phase("outer", lower=("config.other",)),
        memory.phase(
            "update",
            lower=("config.microbatches", "config.mesh"),
            rows=512,
            parameters=1_300_000_000,
        ),
    ):
        raise ERRORS[kind]
    text = str(told.value)
    assert "out of memory in the phase update (rows=512, parameters=1,300,000,000)" in text
    assert "Lower or change config.microbatches, config.mesh" in text
    assert "outer" not in text


@pytest.mark.parametrize(
    "error",
    [RuntimeError("INTERNAL: something else"), ValueError("a mistake"), KeyboardInterrupt()],
)
def test_other_errors_pass_a_phase_as_they_are(error):
    with pytest.raises(type(error)) as same, memory.phase("train", lower=()):
        raise error
    assert same.value is error


def test_the_programs_own_numbers_are_in_the_error():
    program = (
        jax.jit(lambda x: jnp.sort(x[:, None] * x[None, :], axis=0)[0])
        .lower(jnp.ones(512))
        .compile()
    )
    with (
        pytest.raises(memory.OutOfMemory) as told,
        memory.phase("train", lower=(), programs=lambda: [("train", program)]),
    ):
        raise MemoryError
    assert f"{memory.in_units(memory.needs(program).temporary)} of temporary memory" in str(
        told.value
    )


def test_a_program_that_cannot_be_compiled_does_not_hide_the_error():
    def broken():
        raise RuntimeError("no memory to compile either")

    with (
        pytest.raises(memory.OutOfMemory, match="out of memory in the phase train"),
        memory.phase("train", lower=(), programs=broken),
    ):
        raise MemoryError


@pytest.mark.parametrize("phase", TOLD["ppo"])
def test_ppo_names_the_phase_that_ran_out_and_exits_with_1(
    phase, given, tmp_path, capsys, monkeypatch
):
    def fail(*_, **__):
        raise ERRORS["xla"]

    samples = {}
    if phase == "rollout":
        monkeypatch.setattr(ppo, "sample", fail)
    else:
        prepare = ppo.prepare

        def broken(*arguments):
            setup = prepare(*arguments)
            part = {"score": "score_and_shape", "update": "step"}[phase]
            return setup._replace(pieces=setup.pieces._replace(**{part: fail}), paired=None)

        monkeypatch.setattr(ppo, "prepare", broken)
        monkeypatch.setattr(ppo, "check_step_zero", lambda *_: samples.setdefault("seen", True))
    assert run_main("ppo", given, tmp_path / "run") == 1
    told = capsys.readouterr().err
    assert f"Error: out of memory in the phase {phase} (rows=8, slots=24, minibatches=2" in told
    assert programs.LOWER[phase][0].split()[0] in told
    assert "Traceback" not in told


@pytest.mark.parametrize("name", ["sft", "reward_model"])
def test_training_that_runs_out_is_named_with_its_compiled_numbers(
    name, given, tmp_path, capsys, monkeypatch
):
    def fail(*_, **__):
        raise ERRORS["malloc"]

    monkeypatch.setattr(Loop, "__iter__", fail)
    assert run_main(name, given, tmp_path / "run") == 1
    told = capsys.readouterr().err
    assert "out of memory in the phase train (rows=8, slots=64, microbatches=1, parameters=" in told
    assert "of temporary memory, beside" in told
    assert "Lower or change config.microbatches" in told
    assert "Traceback" not in told


CHILD = """
import resource, sys
import jax, jax.numpy as jnp
from rlhf_jax.run import cli, memory

def run(config, workdir):
    program = jax.jit(lambda x: jnp.sort((x[:, None] * x[None, :]).ravel())[5])
    jax.block_until_ready(program(jnp.ones(8)))
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
    with memory.phase("update", lower=("config.microbatches",), rows=60_000):
        jax.block_until_ready(program(jnp.ones(60_000)))

cli.main(run)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
def test_a_real_allocation_that_is_too_large_is_one_line_and_status_1(tmp_path):
    config = f"--config={ROOT}/configs/sft/storyland.py:smoke"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, config, f"--workdir={tmp_path / 'run'}"], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Error: out of memory in the phase update (rows=60,000)" in done.stderr
    assert "14400000000 bytes" in done.stderr
    assert "Traceback" not in done.stderr


def test_held_bytes_are_those_of_one_device():
    mesh = sharding.make_mesh((2, 2, 2))
    params = {"blocks": {"mlp": {"up": {"kernel": jnp.ones((2, 8, 8))}}}, "norm": jnp.ones(8)}
    placed = sharding.place_state(params, mesh)
    assert memory.held(placed) == 2 * 8 * 8 * 4 // 4 + 8 * 4
    assert memory.held(placed, placed) == memory.held(placed)
    assert memory.held(memory.abstract(placed)) == memory.held(placed)
    assert load_config(f"{ROOT}/configs/ppo/storyland.py").ptx_microbatches is None
