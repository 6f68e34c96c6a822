r"""Kills the real command again and again with ``kill -9`` and compares what it ends with to a run that was left alone.

    python tests/reliability/kill.py
    python tests/reliability/kill.py --stages=ppo --kills=10 --seed=1

A third of the kills comes while a checkpoint is being written, a third somewhere between two, a third at a random
moment after the start. Weights, moments, average, KL coefficient, guard and log must be equal to the last bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
STAGES = ("sft", "reward_model", "ppo")
TOTAL = {"sft": 64, "reward_model": 62, "ppo": 40}
"""Steps of each stage as `command` sets it."""
AT_ONCE = min(2, len(os.sched_getaffinity(0)))
"""Stages that are run side by side."""
ENOUGH = 600.0
"""Seconds after which a start that does nothing is given up."""


class Outcome(NamedTuple):
    """What came of a run that was killed again and again."""

    tried: int
    survived: int
    """Starts after a kill that went on from a checkpoint (or from nothing, when none had been written)."""
    lost: int
    """Starts that failed, or went back behind a checkpoint that had been sealed."""
    while_saving: int
    differences: list[str]


def make_inputs(folder: Path) -> None:
    """A random model of a few thousand numbers, a reward model grown from it, and data of storyland's kind."""
    import jax

    from rlhf_jax.data.schema import Demonstration, PlainText, Prompt, Ranking, write_jsonl
    from rlhf_jax.data.storyland import tokenizer as storyland_assets
    from rlhf_jax.data.text import load_tokenizer
    from rlhf_jax.models.config import gpt2
    from rlhf_jax.models.heads import language_model, scalar_from_language_model, scalar_model
    from rlhf_jax.models.hf import save_hf

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(storyland_assets.assets())
    model = language_model(gpt2(len(tokenizer), 128, 1, 16, 2))
    params = model.init(jax.random.key(0))
    save_hf(folder / "model", model, params, tokenizer)
    rewards = scalar_from_language_model(params, jax.random.key(1))
    save_hf(folder / "reward", scalar_model(model.config), rewards, tokenizer)
    animals = ("dog", "cat", "wolf", "owl", "hen", "fox", "pig", "cow")
    said = [f"A {a} and a {b}." for a in animals for b in animals]
    write_jsonl(folder / "prompts.jsonl", [Prompt("Write a story.", id=f"p{i}") for i in range(16)])
    write_jsonl(
        folder / "text.jsonl", [PlainText(f"{text} Number {i}.") for i, text in enumerate(said)]
    )
    answers = [Demonstration("Write a story.", text, id=f"d{i}") for i, text in enumerate(said)]
    write_jsonl(folder / "demonstrations.jsonl", answers)
    write_jsonl(folder / "validation.jsonl", answers[:16])
    ranked = [
        Ranking(
            "Write a story.", (said[i], said[i + 1], said[i + 2]), (i % 2, 1 - i % 2, 2), id=f"r{i}"
        )
        for i in range(len(said) - 2)
    ]
    write_jsonl(folder / "rankings.jsonl", ranked)


def command(stage: str, inputs: Path, workdir: Path, **overrides: object) -> list[str]:
    """The command line of a stage, as a user gives it."""
    keys: dict[str, dict[str, object]] = {
        "sft": {
            "model": inputs / "model", "demonstrations": inputs / "demonstrations.jsonl",
            "validation": inputs / "validation.jsonl", "row_length": 32, "pieces_per_row": 1, "batch_size": 8,
            "epochs": 8,
        },
        "reward_model": {
            "model": inputs / "model", "rankings": inputs / "rankings.jsonl", "batch_size": 8, "prompts_per_row": 1,
            "demonstrations": inputs / "demonstrations.jsonl", "row_length": 64, "epochs": 8, "save_every": 3,
        },
        "ppo": {
            "model": inputs / "model", "reward_model": inputs / "reward", "prompts": inputs / "prompts.jsonl",
            "pretraining_text": inputs / "text.jsonl", "iterations": 40, "episodes": 8, "epochs": 2, "minibatches": 2,
            "save_every": 3, "prompt_length": 16, "max_new_tokens": 8, "ptx_row_length": 32,
            "ptx_rows_per_episode": 1.0, "gold": "", "learning_rate": 0.005, "kl.controller": "adaptive",
            "kl.target": 0.05, "kl.horizon": 40, "kl_ceiling": 1e6,
        },
    }  # fmt: skip
    flags = [f"--config.{key}={value}" for key, value in (keys[stage] | overrides).items()]
    config = f"--config={ROOT}/configs/{stage}/storyland.py:smoke"
    return [
        sys.executable,
        str(ROOT / "experiments" / f"{stage}.py"),
        config,
        f"--workdir={workdir}",
        *flags,
    ]


def start(argv: Sequence[str], **kw: Any) -> subprocess.Popen[str]:
    """Starts it in a process group of its own; `kw` as of `subprocess.Popen`."""
    environ = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "PYTHONUNBUFFERED": "1",
    }
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rlhf_jax" / "compiled"
    environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = (
        "0"  # a start after a kill compiles nothing again
    )
    environ.pop(
        "XLA_FLAGS", None
    )  # one device, also where a test suite pretends that there are eight
    kw = {"env": environ, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | kw
    return subprocess.Popen(argv, cwd=ROOT, start_new_session=True, **kw)


def steps_logged(workdir: Path) -> int:
    """Whole lines of the log."""
    file = workdir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def sealed(workdir: Path) -> set[int]:
    """Checkpoints that were finished."""
    return {int(p.stem) for p in workdir.glob("checkpoints/manifests/*.json")}


def being_saved(workdir: Path) -> bool:
    """Whether a checkpoint is on its way: Orbax's unfinished folder, or a finished one without its seal."""
    folder = workdir / "checkpoints"
    unfinished = next(folder.glob("*.orbax-checkpoint-tmp*"), None) is not None
    return unfinished or {int(p.name) for p in folder.glob("*") if p.name.isdecimal()} > sealed(
        workdir
    )


def kill_once(
    argv: Sequence[str], workdir: Path, moment: str, progress: int, wait: float
) -> str | None:
    """Starts the command and kills it: `wait` seconds after the start, after the next line, or into the next save.

    Returns:
      None when it was killed, else its output: it ended before.
    """
    process, begin, before = start(argv), time.monotonic(), steps_logged(workdir)
    armed = moment == "start"
    while process.poll() is None and time.monotonic() - begin < ENOUGH:
        logged = steps_logged(workdir)
        if armed or (
            logged >= progress
            and logged > before - 3
            and (moment != "saving" or being_saved(workdir))
        ):
            time.sleep(wait if moment != "saving" else wait / 50)
            break
        time.sleep(0.0005)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None
    return process.communicate()[0]


def run_killed(
    stage: str, inputs: Path, workdir: Path, kills: int, seed: int, **overrides: object
) -> tuple:
    """Kills the command `kills` times, then lets it end.

    Returns:
      kills, starts that went on, starts that failed or lost a sealed checkpoint, kills while saving.
    """
    dice, argv = random.Random(seed), command(stage, inputs, workdir, **overrides)
    total = int(str(overrides.get("iterations", TOTAL[stage])))
    done = survived = lost = saving = 0
    newest: int = 0
    for turn in range(kills):
        moment = ("saving", "step", "start")[turn % 3]
        wait = dice.uniform(0, 6.0) if moment == "start" else dice.uniform(0, 0.2)
        output = kill_once(argv, workdir, moment, (turn + 1) * (total - 4) // (kills + 1), wait)
        if output is not None:
            print(f"{stage}: it ended before kill {turn + 1}: {output[-500:]}", flush=True)
            break
        done, saving = done + 1, saving + (moment == "saving")
        now = max(sealed(workdir), default=0)
        lost, survived, newest = lost + (now < newest), survived + (now >= newest), max(newest, now)
    process = start(argv)
    output = process.communicate(timeout=ENOUGH)[0]
    if process.returncode:
        print(output[-2000:], flush=True)
        lost, survived = lost + 1, survived - 1
    return done, survived, lost, saving


# ------------------------------------------------------------------------------------------------------ comparing


def differences(one: Path, other: Path) -> list[str]:
    """What two runs do not have in common: arrays of the last checkpoint, model files, records of the log."""
    import numpy as np

    found, (a, b) = [], (arrays(one), arrays(other))
    found += [f"leaf {name} in one alone" for name in sorted({*a} ^ {*b})]
    found += [
        f"leaf {name}"
        for name in a
        if name in b and not np.array_equal(bits(a[name]), bits(b[name]))
    ]
    models = [p.relative_to(one) for p in sorted(one.rglob("*.safetensors"))]
    found += [f"no model in {one}"] * (not models)
    found += [f"file {p}" for p in models if (one / p).read_bytes() != (other / p).read_bytes()]
    log, other_log = history(one), history(other)
    steps = [record["step"] for record in other_log]
    found += ["steps of the log"] * (steps != list(range(1, len(log) + 1)))
    found += [f"log of step {x['step']}" for x, y in zip(log, other_log, strict=False) if x != y]
    return found


def arrays(workdir: Path) -> dict[str, Any]:
    """Every array of the newest checkpoint, by name: weights, moments, averages, KL coefficient, guard, counters."""
    import jax

    from rlhf_jax.run.checkpoint import Checkpoints

    with Checkpoints(workdir / "checkpoints") as saved:
        step = saved.newest_good()
        assert step is not None
        leaves = json.loads((workdir / "checkpoints" / "manifests" / f"{step}.json").read_text())[
            "leaves"
        ]
        specs = {
            name: jax.ShapeDtypeStruct(tuple(shape), dtype)
            for name, (shape, dtype) in leaves.items()
        }
        return saved.restore(step, specs)[0]


def bits(array: Any) -> Any:
    """Bytes, so that NaN equals itself and -0 is not 0."""
    import numpy as np

    return np.frombuffer(np.asarray(array).tobytes(), np.uint8)


def history(workdir: Path) -> list[dict[str, Any]]:
    """The log without the times."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


def compare(stage: str, folder: Path, kills: int, seed: int, **overrides: object) -> Outcome:
    """A run that is left alone, and one that is killed."""
    whole, killed = folder / f"{stage}-whole", folder / f"{stage}-killed"
    process = start(command(stage, folder / "inputs", whole, **overrides))
    output = process.communicate(timeout=ENOUGH)[0]
    assert process.returncode == 0, output[-3000:]
    counts = run_killed(stage, folder / "inputs", killed, kills, seed, **overrides)
    return Outcome(*counts, differences(whole, killed))


def main() -> int:
    """Prints the table; exit status 1 when something was lost or is not equal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", default="ppo,sft,reward_model")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        make_inputs(Path(root) / "inputs")

        def seen(stage: str) -> tuple[str, Outcome, float]:
            begin = time.monotonic()
            result = compare(stage, Path(root), flags.kills, flags.seed)
            print(stage, result, flush=True)
            return stage, result, time.monotonic() - begin

        with ThreadPoolExecutor(AT_ONCE) as pool:
            rows = list(pool.map(seen, flags.stages.split(",")))
    print(
        "\n| command | kills tried | of them while saving | survived | lost | equal to the bit | seconds |"
    )
    print("|---|---|---|---|---|---|---|")
    for stage, r, seconds in rows:
        equal = "no: " + ", ".join(r.differences[:3]) if r.differences else "yes"
        print(
            f"| {stage}.py | {r.tried} | {r.while_saving} | {r.survived} | {r.lost} | {equal} | {seconds:.0f} |"
        )
    return int(any(r.lost or r.differences or r.tried < flags.kills for _, r, _ in rows))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
