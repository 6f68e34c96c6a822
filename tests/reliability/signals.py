"""Ctrl-C and SIGTERM, once and twice, at every moment of real commands in one process.

    python -m tests.reliability.signals             # stages
    python -m tests.reliability.signals pipeline    # the whole smoke pipeline, stopped in each of its stages (minutes)

Survived means: the documented exit status (130 for Ctrl-C, 143 for SIGTERM), a word on stderr, no traceback; once is
answered by a save at the step boundary, twice by an end within ten seconds (the machine is busy); and the same
command goes on to models and log equal to those of a run that nothing happened to.
"""

from __future__ import annotations

import functools
import itertools
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rlhf_jax.run.checkpoint import Checkpoints
from tests.reliability import runs

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
SLOW = {"JAX_ENABLE_COMPILATION_CACHE": "0", "JAX_LOG_COMPILES": "1"}
"""Compiles anew, and says so."""


class Moment(NamedTuple):
    """When a signal comes: a name, a test of (run folder, seconds since the start), and whether a step is saved."""

    name: str
    when: Callable[[Path, float], bool]
    saves: bool


def exists(run: Path, pattern: str) -> bool:
    """Whether the run folder has such a file."""
    return run.exists() and next(run.glob(pattern), None) is not None


MOMENTS = [
    Moment("while models and data are read", lambda run, s: exists(run, "config.json"), False),
    Moment("while the step compiles", lambda run, s: exists(run, "metrics.jsonl"), True),
    Moment("in training", lambda run, s: runs.logged(run, 3)(), True),
    Moment("while a model is written", lambda run, s: exists(run, "epoch-1*"), True),
    Moment("while a checkpoint is written", lambda run, s: exists(run, "checkpoints/*"), True),
    Moment(
        "in the last step",
        lambda run, s: runs.logged(run, runs.EPOCHS * runs.EPOCH_STEPS - 1)(),
        True,
    ),
]


def once(source: Path, run: Path, expected: dict, moment: Moment, number: int) -> tuple[bool, str]:
    """One signal, then the same command."""
    begun = time.monotonic()
    ended, _ = runs.signalled(
        "sft",
        runs.sft_flags(source, run),
        lambda: moment.when(run, time.monotonic() - begun),
        number,
    )
    sealed = runs.steps(run)
    good = (
        ended.status == STATUS[signal.Signals(number)]
        and "Traceback" not in ended.err
        and "Stopped" in ended.err
    )
    good &= bool(sealed) or not moment.saves
    good &= "at once" not in ended.line  # one signal is not two
    again = runs.command("sft", runs.sft_flags(source, run))
    equal = again.status == 0 and runs.outcome(run) == expected
    return (
        good and equal,
        f"status {ended.status}, sealed {sealed}, went on to the same end: {equal}; {ended.line}",
    )


def twice(
    source: Path, run: Path, expected: dict, moment: Moment, number: int, pause: float
) -> tuple[bool, str]:
    """Two signals: the second one ends the run at once, also in the middle of compiling and saving."""
    begun = time.monotonic()
    ended, seconds = runs.signalled(
        "sft", runs.sft_flags(source, run), lambda: moment.when(run, time.monotonic() - begun), number, number,
        pause=pause, env=runs.environment(**(SLOW if "compiles" in moment.name else {})),
    )  # fmt: skip
    sealed = runs.steps(run)
    intact = Checkpoints(run / "checkpoints").newest_good() in (None, *sealed)
    good = ended.status == STATUS[signal.Signals(number)] and seconds < 10 and intact
    again = runs.command("sft", runs.sft_flags(source, run))
    equal = again.status == 0 and runs.outcome(run) == expected
    return (
        good and equal,
        f"status {ended.status} after {seconds:.2f} s, sealed {sealed}, the same end: {equal}",
    )


def same_one_twice(source: Path, run: Path, expected: dict) -> tuple[bool, str]:
    """A SIGTERM that comes twice within a second, as srun sends it, is one: the run still saves."""
    ended, _ = runs.signalled(
        "sft",
        runs.sft_flags(source, run),
        runs.logged(run, 3),
        signal.SIGTERM,
        signal.SIGTERM,
        pause=0.05,
    )
    sealed = runs.steps(run)
    again = runs.command("sft", runs.sft_flags(source, run))
    equal = again.status == 0 and runs.outcome(run) == expected
    return ended.status == 143 and bool(
        sealed
    ) and equal, f"status {ended.status}, sealed {sealed}, {equal}"


def sampling(source: Path, run: Path, number: int) -> tuple[bool, str]:
    """``sample.py`` has no steps to save at: it stops at once, leaves no half a file, and can be started again."""
    flags = [f"--config={runs.ROOT}/configs/sample/storyland.py:smoke", f"--workdir={run}", "--config.labelers=0",
             f"--config.models=('{source}/model',)", f"--config.prompts={source}/prompts.jsonl",
             "--config.max_new_tokens=12", "--config.prompt_length=32"]  # fmt: skip
    ended, _ = runs.signalled("sample", flags, lambda: exists(run, "metrics.jsonl"), number)
    good = ended.status == STATUS[signal.Signals(number)] and "Traceback" not in ended.err
    good &= not exists(run, "samples.jsonl") and not exists(run, ".samples*")
    again = runs.command("sample", flags)
    good &= again.status == 0 and len((run / "samples.jsonl").read_text().splitlines()) == 64
    return good, f"status {ended.status}; {ended.line}"


def pipeline(folder: Path, table: runs.Table) -> None:
    """The smoke pipeline whole, and stopped in each of its stages: results equal but for times and memory."""
    flags = [f"--config={runs.ROOT}/configs/instructgpt/storyland.py:smoke"]
    whole = runs.command("instructgpt", [*flags, f"--workdir={folder}/pipeline"])
    assert whole.status == 0, whole.err
    run = folder / "cut"
    for place, stage in enumerate(("data", "sft", "ppo_init", "samples", "reward_model", "baseline", "ppo", "ppo_ptx",
                                   "evaluation")):  # fmt: skip
        number = (signal.SIGTERM, signal.SIGINT)[place % 2]
        ended, _ = runs.signalled(
            "instructgpt",
            [*flags, f"--workdir={run}"],
            lambda stage=stage: (run / stage).exists(),
            number,
        )
        good = ended.status == STATUS[number] and "Traceback" not in ended.err
        table.add(
            f"{NAMES[number]} in the stage {stage} of the pipeline",
            good,
            f"status {ended.status}; {ended.line}",
        )
    again = runs.command("instructgpt", [*flags, f"--workdir={run}"])
    equal = again.status == 0 and results(folder / "pipeline") == results(run)
    table.add(
        "the pipeline that was stopped nine times ends like the whole one",
        equal,
        f"status {again.status}",
    )


def results(run: Path) -> dict:
    """``results.json`` without times, memory and the name of the folder."""
    found = json.loads((run / "results.json").read_text().replace(str(run), "RUN"))
    return {
        key: value
        for key, value in found.items()
        if key not in ("seconds", "peak_memory_mb", "stages")
    }


def stages(folder: Path, table: runs.Table) -> None:
    """Every moment of a stage, each signal once and twice."""
    source = runs.inputs(folder / "inputs")
    assert runs.command("sft", runs.sft_flags(source, folder / "whole")).status == 0
    expected = runs.outcome(folder / "whole")
    places = (folder / f"run{i}" for i in itertools.count())
    cases: list[tuple[str, Callable[[], tuple[bool, str]]]] = []
    for number, name in NAMES.items():
        pause = 0.3 if number == signal.SIGINT else 1.3
        for moment in MOMENTS:
            seen = functools.partial(once, source, next(places), expected, moment, number)
            cases.append((f"{name} {moment.name}", seen))
        for moment in MOMENTS[:-1]:
            seen = functools.partial(twice, source, next(places), expected, moment, number, pause)
            cases.append((f"{name} twice, {pause} s apart, {moment.name}", seen))
        cases.append(
            (f"{name} while sampling", functools.partial(sampling, source, next(places), number))
        )
    seen = functools.partial(same_one_twice, source, next(places), expected)
    table.judge([*cases, ("SIGTERM twice within 0.05 s is one", seen)])


def main() -> None:
    """Stages, or the pipeline."""
    chosen = pipeline if "pipeline" in sys.argv[1:] else stages
    table = runs.Table(f"signals to real commands in one process: {chosen.__name__}")
    with tempfile.TemporaryDirectory() as scratch:
        chosen(Path(scratch), table)
    table.show()


if __name__ == "__main__":
    main()
