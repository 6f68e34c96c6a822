"""The recipes of launch/, each run as far as one machine can: what they start is real, the cluster around it is not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
STAGE = ("pretrain", "--config=pretrain/storyland:smoke", "--dry_run")
"""A stage that reads no files, compiled and not trained."""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def surroundings(tmp_path) -> dict[str, str]:
    """The environment of a recipe; commands of a cluster are looked up in ``bin`` first."""
    (tmp_path / "bin").mkdir()
    return os.environ | {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "CALLS": str(tmp_path / "calls"),
    }  # fmt: skip


def stand_in(folder: Path, name: str, script: str) -> None:
    """A command of a cluster that is not here."""
    file = folder / "bin" / name
    file.write_text(f"#!/usr/bin/env bash\n{script}\n")
    file.chmod(0o755)


def launch(
    recipe: str, *argv: str, env: dict[str, str], cwd: Path
) -> subprocess.CompletedProcess[str]:
    command = [str(LAUNCH / recipe), *argv]
    return subprocess.run(
        command, env=env, cwd=cwd, capture_output=True, text=True, check=False, timeout=400
    )


def test_a_gpu_node_runs_the_command_and_hands_on_its_status(surroundings, tmp_path):
    done = launch("gpu_node.sh", *STAGE, "--workdir=run", env=surroundings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Dry run on 1 x cpu" in done.stdout
    wrong = launch(
        "gpu_node.sh",
        "ppo",
        "--config=ppo/storylnd",
        "--workdir=run",
        env=surroundings,
        cwd=tmp_path,
    )
    assert wrong.returncode == 2  # a mistake is not tried again
    assert "no config file ppo/storylnd" in wrong.stderr


def test_slurm_starts_a_process_for_each_task(surroundings, tmp_path):
    """Two tasks, as srun would start them; SLURM's own variables are tested in tests/test_processes.py."""
    port = free_port()
    stand_in(
        tmp_path,
        "srun",
        f"""
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do
  "$@" --coordinator_address=127.0.0.1:{port} --num_processes=2 --process_id=$task &
  tasks+=($!)
done
for task in "${{tasks[@]}}"; do wait "$task" || exit $?; done""",
    )
    stand_in(tmp_path, "scontrol", "echo requeued >> $CALLS")
    done = launch(
        "slurm.sbatch",
        *STAGE,
        "--workdir=run",
        env=surroundings | {"SLURM_JOB_ID": "7"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "Dry run on 2 x cpu (data=2, fsdp=1, tensor=1)" in done.stdout
    assert not (tmp_path / "calls").exists()
    usage = launch("slurm.sbatch", env=surroundings, cwd=tmp_path)
    assert usage.returncode == 2
    assert "slurm.sbatch STAGE --config=" in usage.stderr


def test_a_tpu_vm_gets_the_checkout_and_runs_the_command_there(surroundings, tmp_path):
    """gcloud's ssh is a shell in an empty folder, and set-up is this environment."""
    worker = tmp_path / "worker"
    worker.mkdir()
    stand_in(
        tmp_path,
        "gcloud",
        f"""
echo "$@" >> $CALLS
if [[ $4 == scp ]]; then cp "$5" {worker}/rlhf_jax.tgz; exit; fi
for word in "$@"; do
  if [[ $word == --command=* ]]; then cd {worker} && bash -c "${{word#--command=}}"; exit; fi
done""",
    )
    stand_in(
        tmp_path,
        "make",
        f"""
mkdir -p .venv/bin
printf '#!/bin/sh\\nexec {sys.executable} "$@"\\n' > .venv/bin/python
chmod +x .venv/bin/python""",
    )
    address = (
        f"--coordinator_address=127.0.0.1:{free_port()}",
        "--num_processes=1",
        "--process_id=0",
    )
    cluster = {"TPU": "my-tpu", "ZONE": "us-central2-b"}
    done = launch(
        "tpu_vm.sh", *STAGE, "--workdir=run", *address, env=surroundings | cluster, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "Dry run on 1 x cpu" in done.stdout
    copied, unpacked, started = (tmp_path / "calls").read_text().splitlines()
    assert "scp" in copied
    assert "make setup" in unpacked
    assert started.endswith("--distributed")
    assert (worker / "rlhf_jax" / "experiments" / "pretrain.py").is_file()


def test_the_pods_of_gke_run_a_command_that_the_package_knows(surroundings, tmp_path):
    job = yaml.safe_load((LAUNCH / "gke_tpu_job.yaml").read_text())
    pod = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    python, *command = pod["containers"][0]["command"]
    assert python == "python"
    done = subprocess.run(
        [sys.executable, *command],
        env=surroundings,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2  # there is no cluster around it, which it says before anything else
    assert "--distributed found no SLURM, Open MPI, TPU pod or GKE job" in done.stderr
    assert not [*tmp_path.glob("run*")]
