"""Real commands as several processes on this machine, over gloo, and the small inputs they train on."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from rlhf_jax.data.schema import Demonstration, PlainText, Prompt, Ranking, write_jsonl
from rlhf_jax.data.storyland import tokenizer as storyland_assets
from rlhf_jax.data.text import load_tokenizer
from rlhf_jax.models.config import gpt2
from rlhf_jax.models.heads import language_model, scalar_from_language_model, scalar_model
from rlhf_jax.models.hf import save_hf

ROOT = Path(__file__).parents[1]


def write_inputs(folder: Path) -> Path:
    """A random model, a reward model grown from it, and a few lines of each kind of data."""
    tokenizer = load_tokenizer(storyland_assets.assets())
    model = language_model(gpt2(len(tokenizer), 64, 1, 16, 2))
    params = model.init(jax.random.key(0))
    save_hf(folder / "model", model, params, tokenizer)
    save_hf(
        folder / "reward",
        scalar_model(model.config),
        scalar_from_language_model(params, jax.random.key(1)),
        tokenizer,
    )
    asked = [f"Write a story about number {i}." for i in range(24)]
    told = [f"A dog and a cat met. They saw the number {i}." for i in range(24)]
    write_jsonl(
        folder / "demonstrations.jsonl",
        [Demonstration(p, r) for p, r in zip(asked, told, strict=True)],
    )
    ranked = [
        Ranking(p, (r, "A cat is here.", "No."), (0, 1, 2))
        for p, r in zip(asked, told, strict=True)
    ]
    write_jsonl(folder / "rankings.jsonl", ranked)
    write_jsonl(folder / "prompts.jsonl", [Prompt(p, id=f"p{i}") for i, p in enumerate(asked)])
    write_jsonl(folder / "text.jsonl", [PlainText(r) for r in told])
    return folder


def command(stage: str, inputs: Path, workdir: Path, **overrides: object) -> list[str]:
    """The command of a stage at its smallest, on `inputs`."""
    files = {
        "sft": {
            "model": "model", "demonstrations": "demonstrations.jsonl", "validation": "demonstrations.jsonl",
        },
        "reward_model": {"model": "model", "rankings": "rankings.jsonl", "demonstrations": "demonstrations.jsonl"},
        "ppo": {
            "model": "model", "reward_model": "reward", "prompts": "prompts.jsonl", "pretraining_text": "text.jsonl",
            "held_out_text": "text.jsonl",
        },
    }[stage]  # fmt: skip
    small = {
        "sft": {"row_length": 64, "batch_size": 8, "pieces_per_row": 1, "dropout": 0.1},
        "reward_model": {"row_length": 64, "batch_size": 8, "score_batch_size": 8, "save_every": 1, "epochs": 1},
        "ppo": {
            "iterations": 3, "episodes": 8, "minibatches": 2, "prompt_length": 16, "max_new_tokens": 8,
            "ptx_row_length": 32, "ptx_rows_per_episode": 1.0, "gold": "", "kl_ceiling": 1e6, "held_out_rows": 4,
            "save_every": 1,
        },
    }[stage]  # fmt: skip
    values = {key: inputs / name for key, name in files.items()} | small | overrides
    return [
        sys.executable, str(ROOT / "experiments" / f"{stage}.py"),
        f"--config={ROOT}/configs/{stage}/storyland.py:smoke", f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in values.items()),
    ]  # fmt: skip


@dataclasses.dataclass
class Ended:
    """How a process ended: exit status (negative: the signal), what it printed, seconds from the start of all."""

    status: int
    out: str
    err: str
    seconds: float


class Together:
    """Processes of one run. Without `slurm` they are given the address, with it JAX finds it in the surroundings."""

    def __init__(
        self, commands: Sequence[Sequence[str]], folder: Path, *, devices: int = 2, slurm: bool = False,
        heartbeat: int = 10, folders: Sequence[Path] = (), environments: Sequence[dict[str, str]] = (),
    ) -> None:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        self.begun, self.files, self.running = time.monotonic(), [], []
        port, count = free_port(), len(commands)
        for i, arguments in enumerate(commands):
            environment = surroundings(devices) | (environments[i] if environments else {})
            extra: list[str] = []
            if slurm:
                environment |= _slurm(i, count, port)
                extra = ["--distributed"]
            elif count > 1:
                extra = [
                    f"--coordinator_address=127.0.0.1:{port}",
                    f"--num_processes={count}",
                    f"--process_id={i}",
                ]
            if count > 1:
                extra += [f"--heartbeat_timeout={heartbeat}"]
            paths = [folder / f"{name}{i}.txt" for name in ("out", "err")]
            with paths[0].open("w") as out, paths[1].open("w") as err:
                self.running.append(
                    subprocess.Popen(
                        [*arguments, *extra],
                        cwd=(folders or [ROOT] * count)[i],
                        env=environment,
                        stdout=out,
                        stderr=err,
                    )
                )
            self.files.append(paths)

    def wait(self, timeout: float = 300) -> list[Ended]:
        """How each ended; whatever runs after `timeout` seconds is killed and says so by its status."""
        until, ended = time.monotonic() + timeout, []
        for process, (out, err) in zip(self.running, self.files, strict=True):
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            ended.append(
                Ended(
                    process.returncode,
                    out.read_text(),
                    err.read_text(),
                    time.monotonic() - self.begun,
                )
            )
        return ended

    def until(self, path: Path, text: str, timeout: float = 120) -> None:
        """Waits for `text` in a file."""
        end = time.monotonic() + timeout
        while not (path.is_file() and text in path.read_text()):
            assert time.monotonic() < end, f"no {text!r} in {path} after {timeout} s"
            assert any(p.poll() is None for p in self.running), [e.err for e in self.wait()]
            time.sleep(0.02)


def surroundings(devices: int) -> dict[str, str]:
    """This environment, with so many CPU devices."""
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    flags += [f"--xla_force_host_platform_device_count={devices}"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}


def _slurm(index: int, count: int, port: int) -> dict[str, str]:
    """What `srun` sets for its tasks, of all on one node."""
    return {
        "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(index), "SLURM_LOCALID": str(index), "SLURM_STEP_NUM_NODES": "1",
        "JAX_COORDINATOR_PORT": str(port),
    }  # fmt: skip


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def history(workdir: Path) -> list[dict]:
    """The metrics of a run, without times."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time" and "second" not in k} for line in lines]


def reward_of_words(prompt_id: str, response: str) -> float:
    """A reward that is a function of texts; it counts, and differs from prompt to prompt."""
    return len(response.split()) / 4 + 0.1 * int(prompt_id.removeprefix("p"))
