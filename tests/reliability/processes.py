"""Faults of runs of two processes, on the real commands: a table of what was tried, survived and lost.

    python -m tests.reliability.processes            # all, some minutes
    python -m tests.reliability.processes killed     # those whose name holds a word

A fault counts as survived when the run ends as documented (docs/launching.md): the right exit status on every process,
within the time, the newest checkpoint good, and where it says so the numbers of an undisturbed run after a restart.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rlhf_jax.run.checkpoint import Checkpoints
from tests import together
from tests.together import Together, command, history

STAGES = {"sft": {"epochs": 12}, "reward_model": {"epochs": 12}, "ppo": {"iterations": 6}}
LIMIT = 15.0
"""Seconds in which a process that lost another one must be gone."""


class Bench:
    """Inputs, and the undisturbed run of each stage by one process of four devices."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.inputs = folder, together.write_inputs(folder / "inputs")
        self._whole: dict[str, Path] = {}

    def command(self, stage: str, workdir: Path, **overrides: object) -> list[str]:
        return command(stage, self.inputs, workdir, **(STAGES[stage] | overrides))

    def whole(self, stage: str) -> Path:
        """The undisturbed run, made when first asked for."""
        if stage not in self._whole:
            workdir = self.folder / f"whole_{stage}"
            (ended,) = Together(
                [self.command(stage, workdir)], self.folder / f"log_whole_{stage}", devices=4
            ).wait(600)
            assert ended.status == 0, ended.err
            self._whole[stage] = workdir
        return self._whole[stage]

    def two(self, stage: str, workdir: Path, name: str, **how: object) -> Together:
        return Together(
            [self.command(stage, workdir)] * 2, workdir.with_name(f"{workdir.name}_{name}"), **how
        )  # pyright: ignore[reportArgumentType]

    def one(self, stage: str, workdir: Path, name: str) -> Together:
        return Together(
            [self.command(stage, workdir)], workdir.with_name(f"{workdir.name}_{name}"), devices=4
        )


def statuses(run: Together, timeout: float = 600) -> list[int]:
    """Exit statuses; what went wrong is shown when one is a crash."""
    return [ended.status for ended in run.wait(timeout)]


def newest(workdir: Path) -> int:
    """The newest good step; the checkpoints are looked through as at a start."""
    with Checkpoints(workdir / "checkpoints") as saved:
        step = saved.newest_good()
    assert step, "no good checkpoint"
    return step


def same_numbers(workdir: Path, whole: Path, tolerance: float) -> str:
    """Each step once, and its numbers; returns the largest difference."""
    found, wanted = history(workdir), history(whole)
    assert [(a["step"], sorted(a)) for a in found] == [(a["step"], sorted(a)) for a in wanted], (
        "other steps in the log"
    )
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        for name in (n for n in a if isinstance(a[n], float)):
            np.testing.assert_allclose(
                a[name], b[name], rtol=tolerance, atol=tolerance, err_msg=f"{name}, {a['step']}"
            )
            worst = max(worst, abs(a[name] - b[name]) / max(1.0, abs(b[name])))
    return f"largest difference {worst:.1e}"


# ---------------------------------------------------------------------------------------------------------- faults


def equal(bench: Bench, stage: str, workdir: Path) -> str:
    """Nothing happens: two processes compute what one does."""
    assert statuses(bench.two(stage, workdir, "log")) == [0, 0]
    return same_numbers(workdir, bench.whole(stage), 2e-5)


def sigterm(bench: Bench, stage: str, workdir: Path) -> str:
    """SIGTERM to one of two: both save one step; one process goes on."""
    run = bench.two(stage, workdir, "log")
    run.until(workdir / "metrics.jsonl", '"step": 1,', 600)
    run.running[1].send_signal(signal.SIGTERM)
    ended = run.wait(600)
    assert [e.status for e in ended] == [143, 143], [e.err[-500:] for e in ended]
    steps = [re.findall(r"at \w+ (\d+) of", e.err)[-1] for e in ended]
    assert steps[0] == steps[1] == str(newest(workdir)), steps
    assert statuses(bench.one(stage, workdir, "after")) == [0]
    return f"both saved step {steps[0]}; " + same_numbers(workdir, bench.whole(stage), 1e-3)


def ctrl_c(bench: Bench, stage: str, workdir: Path) -> str:
    """Ctrl-C in one of two: as SIGTERM; two processes go on."""
    run = bench.two(stage, workdir, "log")
    run.until(workdir / "metrics.jsonl", '"step": 1,', 600)
    run.running[0].send_signal(signal.SIGINT)
    assert statuses(run) == [143, 143]
    step = newest(workdir)
    assert statuses(bench.two(stage, workdir, "after")) == [0, 0]
    return f"both saved step {step}; " + same_numbers(workdir, bench.whole(stage), 1e-3)


def killed(bench: Bench, stage: str, workdir: Path, rank: int) -> str:
    """kill -9 of one of two: the other is gone soon, the newest checkpoint is good, a restart goes on."""
    run = bench.two(stage, workdir, "log")
    run.until(workdir / "metrics.jsonl", '"step": 2,', 600)
    while not list((workdir / "checkpoints" / "manifests").glob("*.json")):
        time.sleep(0.02)
    run.running[rank].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    other = run.running[1 - rank].wait(60)
    seconds = time.monotonic() - begin
    assert other != 0, "the other one ended as if all were well"
    assert seconds < LIMIT, f"the other one took {seconds:.0f} s"
    step = newest(workdir)
    assert statuses(bench.two(stage, workdir, "after")) == [0, 0]
    return f"other ended with {other} after {seconds:.1f} s; on from {step}; " + same_numbers(
        workdir, bench.whole(stage), 1e-3
    )


def other_layout(bench: Bench, stage: str, workdir: Path) -> str:
    """A step saved by one process is restored by two, which finish."""
    run = bench.one(stage, workdir, "log")
    run.until(workdir / "metrics.jsonl", '"step": 1,', 600)
    run.running[0].send_signal(signal.SIGTERM)
    assert statuses(run)[0] in (130, 143)
    step = newest(workdir)
    assert statuses(bench.two(stage, workdir, "after")) == [0, 0]
    return f"step {step}; " + same_numbers(workdir, bench.whole(stage), 1e-3)


def refused(run: Together, message: str) -> str:
    """All processes end with 2 and one message, without a traceback."""
    ended = run.wait(120)
    for one in ended:
        assert one.status == 2, one.err
        assert re.search(message, one.err), one.err
        assert "Traceback" not in one.err, one.err
    return f"gone {max(one.seconds for one in ended):.0f} s after the start"


def other_config(bench: Bench, stage: str, workdir: Path) -> str:
    """Another learning rate on one of two."""
    commands = [bench.command(stage, workdir, learning_rate=rate) for rate in (1e-3, 2e-3)]
    found = refused(
        Together(commands, workdir.with_name(f"{workdir.name}_log")),
        r"config\.learning_rate is 0\.001 on",
    )
    assert not workdir.exists(), "work was begun"
    return found


def other_workdir(bench: Bench, stage: str, workdir: Path) -> str:
    """Another run folder on one of two, as where it is not shared: the step to go on from cannot be agreed on."""
    commands = [bench.command(stage, workdir.with_name(f"{workdir.name}_{i}")) for i in range(2)]
    return refused(
        Together(commands, workdir.with_name(f"{workdir.name}_log")),
        "the folder of process 0' on process 0",
    )


def other_data(bench: Bench, stage: str, workdir: Path) -> str:
    """One byte differs in a file of one of two: same path, another host."""
    folders = [workdir.with_name(f"{workdir.name}_host{i}") for i in range(2)]
    for folder in folders:
        shutil.copytree(bench.inputs, folder / "inputs")
    file = next((folders[1] / "inputs").glob("demonstrations.jsonl"))
    file.write_text(file.read_text().replace("dog", "fog", 1))
    one = command(stage, Path("inputs"), workdir)
    return refused(
        Together([one] * 2, workdir.with_name(f"{workdir.name}_log"), folders=folders),
        r"what is in inputs/demonstrations\.jsonl is '\w+' on process 0",
    )


def other_version(bench: Bench, stage: str, workdir: Path) -> str:
    """Another optax on one of two."""
    fake = workdir.with_name(f"{workdir.name}_packages") / "optax-9.9.9.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: optax\nVersion: 9.9.9\n")
    run = Together(
        [bench.command(stage, workdir)] * 2, workdir.with_name(f"{workdir.name}_log"),
        environments=[{}, {"PYTHONPATH": os.pathsep.join([str(fake.parent), str(together.ROOT)])}],
    )  # fmt: skip
    return refused(
        run, r"the version of optax is '[^']+' on process 0 \(.+\), '9\.9\.9' on process 1"
    )


def missing_file(bench: Bench, stage: str, workdir: Path) -> str:
    """A model folder that one of two does not have."""
    folders = [workdir.with_name(f"{workdir.name}_host{i}") for i in range(2)]
    for folder in folders:
        shutil.copytree(bench.inputs, folder / "inputs")
    shutil.rmtree(folders[1] / "inputs" / "model")
    one = command(stage, Path("inputs"), workdir)
    return refused(
        Together([one] * 2, workdir.with_name(f"{workdir.name}_log"), folders=folders),
        # Said by the process that lacks it, before what each has is compared.
        "model=inputs/model does not exist: pass the folder of a model",
    )


FAULTS: dict[str, Callable[[Bench, Path], str]] = {
    **{f"none, {s}": lambda b, w, s=s: equal(b, s, w) for s in STAGES},
    **{f"SIGTERM to one, {s}": lambda b, w, s=s: sigterm(b, s, w) for s in STAGES},
    "Ctrl-C in one, sft": lambda b, w: ctrl_c(b, "sft", w),
    **{f"restored by two, {s}": lambda b, w, s=s: other_layout(b, s, w) for s in STAGES},
    **{
        f"process {r} killed, {s}": lambda b, w, s=s, r=r: killed(b, s, w, r)
        for s in STAGES
        for r in (0, 1)
    },
    "config differs": lambda b, w: other_config(b, "sft", w),
    "run folder differs": lambda b, w: other_workdir(b, "sft", w),
    "data differ": lambda b, w: other_data(b, "sft", w),
    "version differs": lambda b, w: other_version(b, "sft", w),
    "model missing on one": lambda b, w: missing_file(b, "sft", w),
}


def main(words: list[str]) -> int:
    """Runs the faults whose name holds all words and prints the table; 1 where one was not survived."""
    chosen = {name: fault for name, fault in FAULTS.items() if all(word in name for word in words)}
    lost = 0
    print("| fault | result | seconds |\n| --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for i, (name, fault) in enumerate(chosen.items()):
            begin = time.monotonic()
            try:
                result = "survived: " + fault(bench, Path(folder) / f"run{i}")
            except Exception:
                lost += 1
                result = "LOST"
                traceback.print_exc()
            print(f"| {name} | {result} | {time.monotonic() - begin:.0f} |", flush=True)
    print(f"\n{len(chosen)} tried, {len(chosen) - lost} survived, {lost} lost", flush=True)
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
