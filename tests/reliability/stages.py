"""What is done stays done, on the real pipeline: damaged outputs, copied and moved folders, changed configs.

    python -m tests.reliability.stages          # about a quarter of an hour on two cores

Survived means: exactly the stages that had to ran again, this was said before anything was computed, and models,
samples, rankings and numbers are those of a run that nothing happened to (or of a fresh run with the changed config),
bit for bit. Logs hold times and are not compared.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from experiments.instructgpt import STAGES, Pipeline
from rlhf_jax.run import records
from rlhf_jax.run.config import load_config
from tests.reliability import damage, runs

CONFIG = f"{runs.ROOT}/configs/instructgpt/storyland.py:smoke"

CHANGES = (
    # Groups of (key, value, stages that run again); the keys of a group are changed one after the other in one folder,
    # which is then held against a fresh run with all of them.
    (
        ("evaluate.base_samples", "2", ("evaluation",)),
        ("ppo.ptx_coef", "0.3", ("ppo_ptx", "evaluation")),
        ("ppo.kl.coef", "0.3", ("ppo", "ppo_ptx", "evaluation")),
    ),
    (
        ("validation_samples", "3", ("baseline",)),
        ("reward_model.learning_rate", "5e-4", ("reward_model", "baseline", "ppo", "ppo_ptx", "evaluation")),
        ("ppo_init.learning_rate", "2e-3", ("ppo_init", "ppo", "ppo_ptx", "evaluation")),
    ),
    (
        ("sample.max_k", "5", ("samples", "reward_model", "baseline", "ppo", "ppo_ptx", "evaluation")),
        ("sft.learning_rate", "2e-3", tuple(s for s in STAGES if s not in ("data", "ppo_init"))),
        ("data.documents", "420", ("data", "ppo_init", "ppo", "ppo_ptx", "evaluation")),
    ),
)  # fmt: skip
"""The second sets of stages leave out what comes out as it was: another choice of the same epoch, the same prompts."""


def flags(run: Path, *more: str) -> list[str]:
    """The command of a smoke pipeline."""
    return [f"--config={CONFIG}", f"--workdir={run}", *more]


def command(arguments: list[str], cwd: Path = runs.ROOT) -> runs.Ended:
    """Runs the pipeline to its end, however busy the machine is."""
    program = [sys.executable, str(runs.ROOT / "experiments" / "instructgpt.py"), *arguments]
    ended = subprocess.run(
        program, cwd=cwd, env=runs.environment(), capture_output=True, text=True, check=False
    )
    return runs.Ended(ended.returncode, ended.stdout, ended.stderr)


def outcome(run: Path) -> dict[str, str]:
    """All that a pipeline amounts to: every output but logs, and its results without times."""
    found = {}
    for stage in STAGES:
        for name, entry in records.outputs(run / stage).items():
            if not name.endswith("metrics.jsonl"):
                found[f"{stage}/{name}"] = entry["sha256"]
    results = json.loads((run / "results.json").read_text())
    for key in ("seconds", "peak_memory_mb", "stages", "config"):
        results.pop(key)
    return found | {"results": json.dumps(results, sort_keys=True)}


def ran(out: str) -> list[str]:
    """The stages that worked, by what the command said."""
    found = re.findall(r"^== \d of \d: (\w+)(.*)$", out, flags=re.MULTILINE)
    return [stage for stage, rest in found if "kept" not in rest]


def same(run: Path, expected: dict[str, str]) -> str:
    """Empty when `run` amounts to what is expected, else what differs."""
    found = outcome(run)
    return ", ".join(
        sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    )[:120]


def every_output(
    run: Path, table: runs.Table, overrides: dict[str, str] | None = None, config: str = CONFIG
) -> None:
    """Each output of each stage deleted, emptied and flipped: what the plan says of it; nothing is computed."""
    settings = load_config(config, overrides or {})
    for stage in STAGES:
        names, missed = ["done.json", *records.outputs(run / stage)], []
        for name in names:
            path = run / stage / name
            before = path.read_bytes()
            for fault in ("deleted", "emptied", "flipped"):
                if fault == "deleted":
                    path.unlink()
                elif fault == "emptied":
                    path.write_bytes(b"")
                else:
                    damage.flip(path)
                plan = {step.stage: step.action for step in Pipeline(settings, run).stages.plan()}
                right = {s: "repair" if s == stage else "keep" for s in STAGES}
                if name == "done.json":
                    plan[stage] = "repair" if plan[stage] in ("run", "resume") else plan[stage]
                missed += [] if plan == right else [f"{name} {fault}"]
                path.write_bytes(before)
        count = 3 * len(names)
        table.add(
            f"{stage}: each output deleted, emptied, flipped ({count} faults)",
            not missed,
            "; ".join(missed),
        )


FAULTS = {
    "data/demonstrations.jsonl": "flipped",
    "sft/epoch-2/model.safetensors": "emptied",
    "ppo_init/epoch-1/model.safetensors": "deleted",
    "samples/rankings.jsonl": "deleted",
    "reward_model/model/model.safetensors": "flipped",
    "baseline/done.json": "emptied",
    "ppo/ema": "deleted",
    "ppo_ptx/last/config.json": "flipped",
    "evaluation/evaluation.json": "emptied",
}
"""One of each stage, for the real repair: a model flipped, a whole folder lost, a record emptied, .."""


def harm(run: Path, faults: dict[str, str]) -> None:
    """Does the `faults` to a run folder."""
    for name, fault in faults.items():
        path = run / name
        if fault == "flipped":
            damage.flip(path)
        elif fault == "emptied":
            path.write_bytes(b"")
        else:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def repaired(whole: Path, run: Path, expected: dict[str, str], table: runs.Table) -> None:
    """One output of each stage at once: all is made again, and is what it was."""
    shutil.copytree(whole, run)
    harm(run, FAULTS)
    ended = command(flags(run))
    note = same(run, expected) if ended.status == 0 else ended.line
    table.add(
        "one output of each stage damaged at once, made again",
        not note and ran(ended.out) == [*STAGES],
        note,
    )
    again = command(flags(run))
    table.add(
        "after that nothing is done again", again.status == 0 and not ran(again.out), again.line
    )


def moved(whole: Path, folder: Path, expected: dict[str, str], table: runs.Table) -> None:
    """A copy whose original holds other things, a moved folder, another working directory."""
    original, copy = folder / "original", folder / "far" / "copy"
    shutil.copytree(whole, original)
    shutil.copytree(original, copy)
    for path in original.rglob("*"):
        if path.is_file():
            path.write_bytes(b"not this")
    harm(
        copy,
        {
            "sft/epoch-2/model.safetensors": "emptied",
            "ppo/ema": "deleted",
            "ppo_ptx/done.json": "deleted",
        },
    )
    ended = command(flags(Path("copy")), cwd=copy.parent)
    note = same(copy, expected) if ended.status == 0 else ended.line
    right = ran(ended.out) == ["sft", "ppo", "ppo_ptx"]
    table.add(
        "a damaged copy, from its own folder, the original being something else",
        right and not note,
        note,
    )
    copy.rename(folder / "moved")
    ended = command(flags(folder / "moved"))
    table.add("a moved folder", ended.status == 0 and not ran(ended.out), ended.line)
    named = [
        p
        for p in (folder / "moved").rglob("*.json")
        if "checkpoints" not in p.parts and "aside" not in p.parts
    ]
    told = [str(p) for p in named if str(folder) in p.read_text()]
    table.add("no record names the place of the folder", not told, ", ".join(told)[:120])


def changed(whole: Path, folder: Path, table: runs.Table, groups: Sequence = CHANGES) -> None:
    """For keys of each stage: the stages that have to run do, and it all equals a fresh run with that config."""
    for number, group in enumerate(groups):
        run, given = folder / f"changed-{number}", []
        shutil.copytree(whole, run)
        for key, value, stages in group:
            given.append(f"--config.{key}={value}")
            ended = command(flags(run, *given))
            worked = ran(ended.out)
            table.add(
                f"{key}={value}",
                ended.status == 0 and tuple(worked) == tuple(stages),
                f"{worked} {ended.err}",
            )
        fresh = folder / f"fresh-{number}"
        ended = command(flags(fresh, *given))
        note = same(run, outcome(fresh)) if ended.status == 0 else ended.line
        table.add(f"equals a fresh run with {' '.join(given)}", not note, note)


def half_done(whole: Path, folder: Path, table: runs.Table) -> None:
    """A stage with a checkpoint and no record: refused with another config, nothing computed; else it goes on."""
    run = folder / "half"
    shutil.copytree(whole, run)
    done = run / "reward_model" / "done.json"
    record = json.loads(done.read_text())
    done.unlink()
    begun = {key: record[key] for key in ("key", "config", "inputs", "functions", "version")}
    records.write(run / "reward_model" / "begun.json", begun)
    refused = command(flags(run, "--config.reward_model.learning_rate=5e-4"))
    good = (
        refused.status == 2
        and "config.reward_model.learning_rate" in refused.line
        and not ran(refused.out)
    )
    table.add("half done, then another learning rate: refused", good, refused.line)
    none_left = command(
        flags(run, "--config.reward_model.learning_rate=5e-4", "--allow_config_change")
    )
    table.add("allowed, but no step is left: refused", none_left.status == 2 and "no step is left" in none_left.line,
              none_left.line)  # fmt: skip
    goes_on = command(flags(run))
    table.add("half done, the same config: goes on", goes_on.status == 0 and ran(goes_on.out) == ["reward_model"],
              goes_on.line)  # fmt: skip


def main() -> None:
    """All of it, one after the other."""
    table = runs.Table("stages of the real pipeline")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        whole = folder / "whole"
        ended = command(flags(whole))
        assert ended.status == 0, ended.err
        expected = outcome(whole)
        every_output(whole, table)
        repaired(whole, folder / "repaired", expected, table)
        moved(whole, folder / "places", expected, table)
        half_done(whole, folder, table)
        changed(whole, folder, table)
    table.show()


if __name__ == "__main__":
    main()
