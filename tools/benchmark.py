"""Times the parts of the recipe next to what the hardware can do and next to other libraries.

    python tools/benchmark.py sft                     # supervised step, every token a target
    python tools/benchmark.py reward --k=9            # K-way reward-model step, shared prefix
    python tools/benchmark.py decode                  # sampling with a cache
    python tools/benchmark.py ppo --epochs=4          # a PPO iteration and its three pieces
    python tools/benchmark.py slots                   # ragged responses: refilled rows or static
    python tools/benchmark.py sft_epoch --data=FILE   # an epoch over real ragged text, packed

``--peer=trl|transformers|tunix`` runs that library on the same work in a virtual environment of its
own, in turn (A B A B), and prints the ratios. ``--sweep=batch=1,2,4,8`` repeats a suite over a
size. ``--json`` makes the last line one JSON object. Weights and tokens are random; nothing is
downloaded but a peer's packages.

FLOPs are those of matrix products and causal attention, with the head at target positions only.
What the last block may skip because its output is not read still counts, so that figures compare.
The "matrix rate" is that of a plain matrix product measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.run import devices, memory
from rlhf_jax.run.files import write_lines
from tools.rates import matrix_rate, timed
from tools.suites import SUITES, read_ids

PEERS = {
    "trl": ("torch==2.13.0", "trl==1.12.0", "transformers", "accelerate", "datasets"),
    "transformers": ("torch==2.13.0", "transformers"),
    "tunix": ("google-tunix==0.1.7",),
}
"""The packages in each peer's virtual environment; `tools/peers` has the scripts."""


# ---------------------------------------------------------------------------------------- measuring


def measure(a: argparse.Namespace) -> dict[str, Any]:
    """Runs one suite at one size; returns the seconds of its steps and derived figures."""
    work = SUITES[a.suite](a)
    first = timed(work.step, [0])[0]  # includes compilation
    # Warm-up continues with step 1, so that no step's inputs are used twice.
    timed(work.step, range(1, a.warmup))
    seconds = timed(work.step, range(a.warmup, a.warmup + a.steps))
    middle = statistics.median(seconds)
    peak = memory.peak_memory_mb()  # before the probes below, which allocate large matrices
    rate = matrix_rate(a.dtype)
    found = {
        "library": "rlhf_jax", "suite": a.suite, "s_per_step_median": middle,
        "s_per_step_min": min(seconds), "s_per_step_max": max(seconds),
        "tokens_per_s": work.tokens / middle, "tokens_per_step": work.tokens,
        "compile_s": max(0.0, first - middle), "peak_rss_mb": peak, "flops_per_step": work.flops,
        "flops_per_s": work.flops / middle, "matrix_flops_per_s": rate,
        "share_of_matrix_rate": work.flops / middle / rate,
    }  # fmt: skip
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        found["peak_device_mb"] = stats["peak_bytes_in_use"] / 2**20
    if work.floor_s is not None:
        found["floor_s"] = work.floor_s()
        found["times_the_floor"] = middle / found["floor_s"]
    if work.pieces is not None:
        found |= work.pieces()
    found["device"], found["jax"] = jax.devices()[0].device_kind, jax.__version__
    return found | {name: getattr(a, name) for name in SIZES}


def show(found: dict[str, Any]) -> str:
    """The figures of one run as a small table."""
    rows = [
        ("step, median", f"{found['s_per_step_median'] * 1e3:.1f} ms"),
        (
            "step, fastest and slowest",
            " and ".join(f"{found[f's_per_step_{x}'] * 1e3:.1f}" for x in ("min", "max")) + " ms",
        ),
        ("tokens/s", f"{found['tokens_per_s']:,.0f}"),
        ("model GFLOP/s", f"{found['flops_per_s'] / 1e9:,.1f}"),
        ("matrix products, same process", f"{found['matrix_flops_per_s'] / 1e9:,.1f} GFLOP/s"),
        ("share of the matrix rate", f"{found['share_of_matrix_rate']:.1%}"),
        (
            "times the floor",
            f"{found['times_the_floor']:.2f}" if "times_the_floor" in found else None,
        ),
        *((name, f"{found[name] * 1e3:.1f} ms") for name in PIECES if name in found),
        *((name, f"{found[name]:.2f}") for name in RATIOS if name in found),
        ("compiling, first step", f"{found['compile_s']:.1f} s"),
        ("peak memory", f"{found.get('peak_device_mb', found['peak_rss_mb']):,.0f} MB"),
    ]
    shown = [(name, value) for name, value in rows if value]
    width = max(len(name) for name, _ in shown)
    return "\n".join(
        [f"{found['suite']} on {found['device']}", *(f"  {n:<{width}}  {v}" for n, v in shown)]
    )


PIECES = ("rollout_s", "score_s", "update_s", "static_s", "refilled_s", "refilled_streams_s")
RATIOS = ("static_over_refilled", "static_over_refilled_streams", "mean_response_tokens")


# ----------------------------------------------------------------------------- sweeps, peers, flags


def sweep(a: argparse.Namespace) -> list[dict[str, Any]]:
    """The suite at each value of one flag, in separate processes; prints relative costs."""
    name, _, values = a.sweep.partition("=")
    runs = [run_script(a, [f"--{name}={value}"]) for value in values.split(",")]
    first = runs[0]["s_per_step_median"]
    print(
        f"\n{a.suite} by {name}\n{name:>12}  ms/step  of the first  tokens/s  of matrix rate  peak "
        "MB"
    )
    for value, run in zip(values.split(","), runs, strict=True):
        step = run["s_per_step_median"]
        print(f"{value:>12}  {step * 1e3:7.1f}  {step / first:12.2f}  {run['tokens_per_s']:8,.0f}  "
              f"{run['share_of_matrix_rate']:14.1%}  {run['peak_rss_mb']:7,.0f}")  # fmt: skip
    return runs


def run_script(
    a: argparse.Namespace, extra: Sequence[str], command: Sequence[str] = ()
) -> dict[str, Any]:
    """Runs a suite, ours or a peer's, in a process of its own and returns its JSON."""
    command = list(command or [sys.executable, "-m", "tools.benchmark"])
    # A peer's script shares only the sizes of the work with ours.
    names = (*SHARED, *OWN) if "tools.benchmark" in command else SHARED
    flags = [f"--{name}={getattr(a, name)}" for name in names if getattr(a, name) not in ("", None)]
    done = subprocess.run(
        [*command, a.suite, *flags, *extra, *(["--json"] if "tools.benchmark" in command else [])],
        capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} {a.suite} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(a: argparse.Namespace) -> dict[str, Any]:
    """Runs ours and a peer's in turn on the same work; returns how many times as fast ours is."""
    python, script = peer_python(a), Path(__file__).parent / "peers" / f"with_{a.peer}.py"
    with tempfile.TemporaryDirectory() as folder:
        own = [f"--cache={folder}"]
        if a.suite == "sft_epoch":
            a.data = write_ids(read_ids(a), Path(folder) / "ids.jsonl")
        rounds = []
        for number in range(a.rounds):
            ours, theirs = (
                run_script(a, own),
                run_script(a, a.peer_flags.split(), [python, str(script)]),
            )
            rounds.append((ours, theirs))
            print(f"round {number + 1}: rlhf_jax {ours['s_per_step_median']:.4f} s, {a.peer} "
                  f"{theirs['s_per_step_median']:.4f} s, peak {ours['peak_rss_mb']:,.0f} and "
                  f"{theirs['peak_rss_mb']:,.0f} MB", flush=True)  # fmt: skip
    found = ratios(rounds) | {
        "peer": a.peer,
        "suite": a.suite,
        "compile_cold_s": rounds[0][0]["compile_s"],
    }
    # The first round fills the empty cache of compiled programs; later rounds read from it.
    found |= {"compile_warm_s": rounds[-1][0]["compile_s"]} if a.rounds > 1 else {}
    print(f"\n{a.suite}: {found['ratio_median']:.2f} times {a.peer} by medians "
        f"({found['ratio_min']:.2f} by fastest "
          f"steps); rounds {', '.join(f'{x:.2f}' for x in found['ratio_of_each_round'])}; peak "
          "memory "
          f"{found['memory_ratio']:.2f} of the peer's")  # fmt: skip
    return found | {"ours": rounds[-1][0], "theirs": rounds[-1][1]}


def ratios(rounds: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """A peer's time over ours: by medians over rounds, by fastest steps, and for each round."""

    def over(name: str, pick: Callable[[list[float]], float]) -> float:
        return pick([b[name] for _, b in rounds]) / pick([a[name] for a, _ in rounds])

    return {
        "ratio_median": over("s_per_step_median", statistics.median),
        "ratio_min": over("s_per_step_min", min),
        "ratio_of_each_round": [b["s_per_step_median"] / a["s_per_step_median"] for a, b in rounds],
        # The other way round than the times: our peak over the peer's.
        "memory_ratio": 1 / over("peak_rss_mb", max),
    }


def write_ids(documents: Sequence[Sequence[int]], path: Path) -> str:
    """Writes the same token ids for both sides."""
    write_lines(path, ({"input_ids": list(ids)} for ids in documents))
    return str(path)


def peer_python(a: argparse.Namespace) -> str:
    """The Python of the peer's environment, which is made in the user's cache folder when needed.

    ``--peer_python`` names another one.
    """
    if a.peer_python:
        return a.peer_python
    folder = (
        Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        / "rlhf_jax"
        / "peers"
        / a.peer
    )
    python = folder / "bin" / "python"
    # The mark is made last, so that an interrupted installation is done again.
    if not (folder / "ready").exists():
        print(f"Installing {', '.join(PEERS[a.peer])} in {folder} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PEERS[a.peer]], check=True)
        (folder / "ready").touch()
    return str(python)


SIZES = {
    "layers": 4, "width": 256, "heads": 4, "vocab": 8192, "batch": 8, "prompt_len": 64,
    "new_tokens": 64, "k": 4, "epochs": 1, "minibatches": 1, "steps": 5, "warmup": 3,
    "dtype": "float32", "family": "gpt2", "kv_heads": 0, "mlp_width": 0, "seed": 0,
}  # fmt: skip
SHARED = (*SIZES, "data")
"""Flags that a peer's script also takes."""
OWN = ("remat", "unroll", "prompts", "model", "longest")
"""Flags of ours that a peer's script does not know."""

OWN_SIZES = {"reward": {"prompt_len": 96, "new_tokens": 32}}
"""Defaults of single suites that differ from `SIZES`."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags; a suite's own defaults fill in what is not given."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("suite", choices=SUITES)
    for name, value in SIZES.items():
        p.add_argument(f"--{name}", type=type(value), default=None, help=f"default {value}")
    p.add_argument("--remat", default="none", choices=("none", "block"))
    p.add_argument(
        "--unroll", type=int, default=0, help="blocks an iteration of the layer scan, 0 = all"
    )
    p.add_argument("--prompts", type=int, default=64, help="slots: how many prompts")
    p.add_argument("--data", default="", help="sft_epoch: demonstrations as JSON lines")
    p.add_argument("--model", default="smollm2", help="sft_epoch: whose tokenizer")
    p.add_argument("--longest", type=int, default=512, help="sft_epoch: longer texts are left out")
    p.add_argument(
        "--cache",
        default="",
        help="folder of compiled programs; empty: a new one, so that all is compiled",
    )
    p.add_argument(
        "--sweep", default="", metavar="FLAG=A,B,..", help="repeat over the values of a size"
    )
    p.add_argument("--peer", default="", choices=("", *PEERS))
    p.add_argument(
        "--peer_python",
        default="",
        help="Python of the peer's environment; empty: made when first needed",
    )
    p.add_argument(
        "--peer_flags", default="", help="more flags for the peer's script, in one string"
    )
    p.add_argument("--rounds", type=int, default=2, help="of ours and the peer's in turn")
    p.add_argument("--json", action="store_true", help="the last line is one JSON object")
    a = p.parse_args(argv)
    # Filled in here and not by the parser, because the defaults depend on the suite.
    for name, value in (SIZES | OWN_SIZES.get(a.suite, {})).items():
        if getattr(a, name) is None:
            setattr(a, name, value)
    check(p, a)
    return a


def check(p: argparse.ArgumentParser, a: argparse.Namespace) -> None:
    """Refuses flags that do not fit together, before anything runs."""
    if a.suite == "sft_epoch" and not Path(a.data).is_file():
        p.error(
            f"--data={a.data!r} is no file: pass demonstrations as JSON lines "
            "(experiments/prepare_data.py)"
        )
    if a.sweep and a.sweep.partition("=")[0] not in SIZES:
        p.error(
            f"--sweep={a.sweep!r} names no size: choose one of {', '.join(SIZES)}, as in "
            "--sweep=batch=1,2,4"
        )
    for name in (
        "layers", "width", "heads", "vocab", "batch", "prompt_len", "new_tokens", "k", "steps",
        "warmup",
    ):  # fmt: skip
        if getattr(a, name) < 1:
            p.error(f"--{name}={getattr(a, name)} must be at least 1")
    if a.width % a.heads:
        p.error(f"--heads={a.heads} must divide --width={a.width}")
    if a.batch % a.minibatches:
        p.error(f"--minibatches={a.minibatches} must divide --batch={a.batch}")
    if a.dtype not in ("float32", "bfloat16"):
        p.error(f"--dtype={a.dtype} is unknown: choose float32 or bfloat16")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what the flags ask for."""
    a = parse(argv)
    if a.peer:
        found: Any = compare(a)
    elif a.sweep:
        found = sweep(a)
    else:
        # Without `--cache` every program is compiled, so the compile time is that of a first run.
        with tempfile.TemporaryDirectory() as folder:
            jax.config.update("jax_compilation_cache_dir", a.cache or folder)
            # Fast compilations are kept too, for the warm time that `compare` reports.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            devices.start((-1, 1, 1))
            found = measure(a)
        print(show(found), flush=True)
    if a.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
