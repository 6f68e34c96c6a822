"""Two real processes of two devices beside one of four: the same numbers, one fate, checkpoints that fit either."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import yaml

from experiments import sft
from rlhf_jax import sharding
from rlhf_jax.models.hf import load_hf
from rlhf_jax.run import cli, files, processes, programs
from rlhf_jax.run import config as config_lib
from rlhf_jax.run.checkpoint import Checkpoints
from tests import together
from tests.together import ROOT, Together, command, history

SLOW = bool(os.environ.get("RLHF_JAX_SLOW_TESTS"))
"""Two processes compile everything twice: by default one stage has to do."""
STAGES = ("sft", "reward_model", "ppo") if SLOW else ("sft",)
PPO: dict[str, object] = {"text_reward": "tests.together:reward_of_words", "held_out_text": ""}
EPOCHS = 12
"""Of SFT: enough steps for a signal to arrive before the end."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return together.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def runs(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """All stages as ``one`` process and as ``two``, at the same time; the two find each other as under SLURM."""
    folder = tmp_path_factory.mktemp("runs")
    begun = []
    for name, count in (("one", 1), ("two", 2)):
        extra = {"sft": {"epochs": EPOCHS}, "ppo": PPO}
        commands = [command(s, inputs, folder / name / s, **extra.get(s, {})) for s in STAGES]
        stages = [sys.executable, "-m", "tests.run_stages", json.dumps(commands)]
        begun.append(
            Together([stages] * count, folder / f"log_{name}", devices=4 // count, slurm=count > 1)
        )
    for run in begun:
        for ended in run.wait():
            assert ended.status == 0, ended.err
    return SimpleNamespace(folder=folder, one=folder / "one", two=folder / "two")


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_compute_what_one_does(runs, stage):
    one, two = history(runs.one / stage), history(runs.two / stage)
    assert [line["step"] for line in one] == [line["step"] for line in two]
    assert len(one) >= 3
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            # One process sums in another order than two: an accuracy of rewards that nearly tie may differ, and says
            # nothing then (tests/test_mesh.py compares it where none do).
            if not isinstance(a[name], str) and not name.endswith(("accuracy", "clip_fraction")):
                np.testing.assert_allclose(
                    b[name], a[name], rtol=2e-5, atol=2e-5, err_msg=f"{name} of {a['step']}"
                )
    assert any("grad_norm" in name for name in one[0])
    for saved in sorted((runs.one / stage).rglob("model.safetensors")):
        same = runs.two / stage / saved.parent.relative_to(runs.one / stage)
        for x, y in zip(
            jax.tree.leaves(load_hf(saved.parent)[1]),
            jax.tree.leaves(load_hf(same)[1]),
            strict=True,
        ):
            np.testing.assert_allclose(y, x, atol=2e-5)


def test_only_one_process_writes(runs):
    assert not list(runs.two.rglob("*.tmp"))
    assert not list(runs.two.rglob(".shared"))
    assert "sft/loss" in (runs.folder / "log_two" / "out0.txt").read_text()
    assert "sft/loss" not in (runs.folder / "log_two" / "out1.txt").read_text()


@pytest.mark.skipif(not SLOW, reason="slow: RLHF_JAX_SLOW_TESTS=1 runs it")
@pytest.mark.parametrize(("saved_by", "count"), [("one", 2), ("two", 1)])
def test_what_one_layout_saved_the_other_restores_to_the_bit(
    runs, inputs, tmp_path, saved_by, count
):
    """A finished run does nothing but restore its last checkpoint and write the models that are in it."""
    before = getattr(runs, saved_by) / "ppo"
    shutil.copytree(before, tmp_path / "ppo")
    for name in ("last", "ema"):
        shutil.rmtree(tmp_path / "ppo" / name)
    again = command("ppo", inputs, tmp_path / "ppo", **PPO)
    run = Together([again] * count, tmp_path / "log", devices=4 // count)
    assert [ended.status for ended in run.wait()] == [0] * count, [
        ended.err for ended in run.wait()
    ]
    for name in ("last", "ema"):
        assert (tmp_path / "ppo" / name / "model.safetensors").read_bytes() == (
            before / name / "model.safetensors"
        ).read_bytes()


def test_a_killed_process_ends_the_other_and_a_signal_to_one_saves_for_both(runs, inputs, tmp_path):
    """kill -9, restart, SIGTERM to one, and one process alone finishes: the numbers of a run without any of it."""
    workdir = tmp_path / "sft"
    start = command("sft", inputs, workdir, epochs=EPOCHS)
    run = Together([start] * 2, tmp_path / "first", heartbeat=5)
    run.until(
        workdir / "checkpoints" / "manifests" / "3.json", "sha256"
    )  # sealed, and training goes on
    run.running[1].send_signal(signal.SIGKILL)
    ended = run.wait(60)
    assert ended[1].status == -signal.SIGKILL
    assert ended[0].status not in (0, -signal.SIGKILL), "it was still there after a minute"
    with Checkpoints(workdir / "checkpoints") as saved:
        good = saved.newest_good()
    assert good
    assert good % 3 == 0

    run = Together([start] * 2, tmp_path / "second")
    run.until(run.files[0][0], "sft/loss")  # the log still holds what the first one wrote
    run.running[1].send_signal(signal.SIGTERM)
    stopped = run.wait(120)
    assert [e.status for e in stopped] == [143, 143], [e.err for e in stopped]
    steps = [re.search(r"Stopped \(sft at step (\d+) of", e.err)[1] for e in stopped]  # pyright: ignore
    assert steps[0] == steps[1]
    with Checkpoints(workdir / "checkpoints") as saved:
        assert saved.newest_good() == int(steps[0]) > good

    (last,) = Together([start], tmp_path / "third", devices=4).wait()
    assert last.status == 0, last.err
    whole, broken = history(runs.one / "sft"), history(workdir)
    assert [(a["step"], sorted(a)) for a in broken] == [(a["step"], sorted(a)) for a in whole]
    for a, b in zip(whole, broken, strict=True):
        for name in ("sft/loss", "sft/grad_norm", "validation_loss"):
            np.testing.assert_allclose(
                b.get(name, 0), a.get(name, 0), rtol=1e-4
            )  # 36 steps on, in another order


def test_processes_that_differ_stop_before_any_work(inputs, tmp_path):
    commands = [
        command("sft", inputs, tmp_path / "run", learning_rate=rate) for rate in (1e-3, 2e-3)
    ]
    run = Together(commands, tmp_path / "log")
    for ended in run.wait(200):  # a slow machine takes a minute to import JAX twice
        assert ended.status == 2, ended.err
        assert re.search(
            r"config\.learning_rate is 0\.001 on process 0 \(.+\), 0\.002 on process 1 \(",
            ended.err,
        )
        assert "Traceback" not in ended.err
    assert not (tmp_path / "run").exists()


def test_processes_under_other_flags_of_jax_stop_before_any_work(inputs, tmp_path):
    """One has 64-bit numbers and another random generator: their programs would wait for each other, or train apart."""
    commands = [command("sft", inputs, tmp_path / "run")] * 2
    other = {"JAX_ENABLE_X64": "1", "JAX_DEFAULT_PRNG_IMPL": "rbg"}
    run = Together(commands, tmp_path / "log", environments=[{}, other])
    for ended in run.wait(200):
        assert ended.status == 2, ended.err
        assert re.search(
            r"jax_enable_x64 is False on process 0 \(.+\), True on process 1 \(", ended.err
        )
        assert re.search(
            r"jax_default_prng_impl is 'threefry2x32' on process 0 \(.+\), 'rbg' on", ended.err
        )
        assert "Traceback" not in ended.err
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ without processes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--coordinator_address=a:1"],
            "--num_processes is missing: --coordinator_address, --num_processes",
        ),
        (["--process_id=0", "--num_processes=2"], "--coordinator_address is missing"),
        (["--coordinator_address=a", "--process_id=0", "--num_processes=2"], "must be HOST:PORT"),
        (
            ["--coordinator_address=a:1", "--process_id=2", "--num_processes=2"],
            "--process_id=2 must be 0 to",
        ),
        (["--distributed"], "--distributed found no SLURM"),
        (["--distributed", "--heartbeat_timeout=0"], "--heartbeat_timeout=0 must be at least 1"),
    ],
)
def test_flags_that_say_too_little_are_a_mistake_of_the_user(
    flags, message, tmp_path, capsys, monkeypatch
):
    def found_nothing(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", found_nothing)
    with pytest.raises(SystemExit) as ended:
        cli.main(
            sft.run,
            config="configs/sft/storyland.py",
            argv=[*flags, f"--workdir={tmp_path / 'run'}"],
        )
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_programs_of_one_process_say_what_to_do_instead(capsys):
    with pytest.raises(SystemExit):
        cli.main(
            sft.run,
            config="x.py",
            workdir="x",
            argv=["--distributed"],
            one_process="Run the stages.",
        )
    assert (
        "runs as one process, on all devices of its host. Run the stages."
        in capsys.readouterr().err
    )


def test_differences_name_the_processes_and_their_hosts():
    said = [
        {"host": f"node{i}", "facts": {"seed": 0, "jax": "1" if i else "2", f"only{i == 7}": 1}}
        for i in range(8)
    ]
    lines = processes._differences(said)
    assert (
        lines[0]
        == "jax is '2' on process 0 (node0), '1' on processes 1 (node1), 2 (node2), 3 (node3) and 4 more"
    )
    assert "onlyTrue is 'absent' on processes 0 (node0)" in lines[2]
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("owners", "shares"),
    [
        ([[0], [0], [1], [1]], [(0, 2), (1, 2)]),
        ([[0, 0], [1, 1]], [(0, 2), (1, 2)]),
        ([[0, 0, 1, 1]], [(0, 1), (0, 1)]),  # the tensor axis over both: the same rows for both
        ([[0, 0, 1, 1], [2, 2, 3, 3]], [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ([[1], [1], [0], [0]], [(1, 2), (0, 2)]),
        ([[0], [1], [0], [1]], [(0, 1), (0, 1)]),  # mixed: everybody reads everything
        ([[0], [0], [0], [1]], [(0, 1), (0, 1)]),
    ],
)
def test_each_process_reads_the_rows_of_its_devices(owners, shares):
    for process, share in enumerate(shares):
        assert sharding._share(np.array(owners), process) == share


def test_the_digest_of_inputs_sees_every_byte_of_small_files(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100)
    before = files.digest(tmp_path)
    (tmp_path / "a").write_bytes(b"x" * 99 + b"y")
    assert files.digest(tmp_path) != before
    assert files.digest(tmp_path / "none") == "no such file"


# ---------------------------------------------------------------------------------------------------------- recipes

RECIPES = sorted((ROOT / "launch").iterdir())


def test_shell_recipes_parse():
    scripts = [path for path in RECIPES if path.suffix in (".sh", ".sbatch")]
    assert len(scripts) == 3
    for path in scripts:
        subprocess.run(["bash", "-n", str(path)], check=True)
        assert path.stat().st_mode & 0o100, f"{path.name} is not executable"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_use_flags_and_keys_that_exist(path):
    text = re.sub(r"\\\n\s*#?", " ", path.read_text())
    flags = set(re.findall(r"(?<![\w-])--(distributed|config\S*|workdir\S*)", text))
    assert "distributed" in flags or path.name == "gpu_node.sh"
    found = re.findall(r"\b(\w+)[\s-]+--config=(\w+/\w+)", text)
    assert found
    for stage, named in found:
        argv = [f"--{flag}" for flag in flags if "..." not in flag]
        parsed, overrides = cli._parse_flags(
            programs.program(stage).run, "", "", [a.replace("'", "") for a in argv]
        )
        assert parsed.config == named
        config_lib.load_config(named, overrides)


def test_the_kubernetes_recipe_is_a_jobset_of_as_many_pods_as_hosts():
    job = yaml.safe_load((ROOT / "launch" / "gke_tpu_job.yaml").read_text())
    assert job["kind"] == "JobSet"
    slice_ = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = slice_["template"]["spec"]
    chips = np.prod(
        [int(n) for n in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")]
    )
    assert slice_["parallelism"] == slice_["completions"]
    assert (
        chips
        == slice_["parallelism"] * pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    )
    assert pod["containers"][0]["command"][:4] == ["python", "-m", "rlhf_jax", "ppo"]
