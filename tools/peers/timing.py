"""What the peer scripts share: flags, the arithmetic on their clocks, the one-line JSON report.

Claim: every script here times work that its flags define completely. Models are random and of the
given size, token ids are random, no sequence can end early, nothing is downloaded. Only the
standard library is imported, so that this file runs in any peer's environment. Source: our own;
each script names the library that it times.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import resource
import statistics
import sys
from collections.abc import Sequence


def require(*packages: str) -> None:
    """Ends the script with one line if the environment lacks a package that it times or needs."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"Error: {', '.join(missing)} not installed here: tools/benchmark.py --peer=NAME makes "
            "an "
            "environment with all of it and runs this script there"
        )


def parser(description: str, suites: Sequence[str]) -> argparse.ArgumentParser:
    """The flags that all peers know, with the same defaults, after the name of the suite."""
    flags = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("suite", choices=suites)
    numbers = {
        "layers": (4, "blocks of the model"),
        "width": (256, "width of the residual stream"),
        "heads": (4, "attention heads"),
        "vocab": (8192, "rows of the embedding"),
        "batch": (8, "rows (sft, sft_epoch, decode) or prompts (reward, ppo) of one step"),
        "prompt_len": (64, "tokens of each prompt"),
        "new_tokens": (64, "tokens of each response"),
        "k": (4, "responses to each prompt (reward)"),
        "epochs": (1, "passes over each rollout (ppo)"),
        "minibatches": (1, "optimizer steps of each pass (ppo)"),
        "steps": (5, "timed steps"),
        "warmup": (3, "untimed steps before them"),
        "threads": (0, "CPU threads; 0: all cores"),
        "seed": (0, "seed of weights and tokens"),
        "mlp_width": (0, "hidden width of the MLP; 0: 4 x width"),
        "kv_heads": (0, "key and value heads (llama); 0: as many as heads"),
    }
    for name, (default, meaning) in numbers.items():
        flags.add_argument(
            f"--{name}", type=int, default=default, help=f"{meaning} (default {default})"
        )
    flags.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    flags.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    flags.add_argument("--family", choices=("gpt2", "llama"), default="gpt2")
    flags.add_argument(
        "--data", default="", metavar="FILE", help='JSON lines {"input_ids": [...]} (sft_epoch)'
    )
    return flags


def parse(flags: argparse.ArgumentParser) -> argparse.Namespace:
    """Reads the command line; replaces a 0 that means "all" or a default by the actual number."""
    chosen = flags.parse_args()
    if chosen.width % chosen.heads or chosen.heads % (chosen.kv_heads or chosen.heads):
        flags.error("--heads must divide --width, and --kv_heads must divide --heads")
    if chosen.family == "gpt2" and chosen.kv_heads not in (0, chosen.heads):
        flags.error("--kv_heads is for --family llama: GPT-2 has as many key heads as query heads")
    if chosen.batch % chosen.minibatches:
        flags.error("--minibatches must divide --batch")
    if chosen.steps < 1 or chosen.warmup < 1:
        flags.error("--steps and --warmup must be at least 1: a first step is never typical")
    chosen.threads = chosen.threads or cores()
    chosen.mlp_width = chosen.mlp_width or 4 * chosen.width
    chosen.kv_heads = chosen.kv_heads or chosen.heads
    return chosen


def cores() -> int:
    """Cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def laps(stamps: Sequence[float], skip: int = 0) -> list[float]:
    """Seconds between neighbouring stamps, without the first ``skip``."""
    return [end - start for start, end in itertools.pairwise(stamps)][skip:]


def check(holds: bool, message: str) -> None:
    """Stops a run whose work is not what its report claims; unlike ``assert``, also with ``-O``."""
    if not holds:
        raise RuntimeError(f"not the work that the flags define: {message}")


def peak_rss_mb() -> float:
    """The peak memory of this process; Linux counts it in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)


def report(
    flags: argparse.Namespace,
    library: str,
    seconds: Sequence[float],
    tokens: tuple[int, str],
    *,
    params: int,
    versions: dict[str, str],
    compile_s: float = 0.0,
    **more: object,
) -> None:
    """Prints the report as the last line of stdout; ``tokens`` are per step, with their unit."""
    median = statistics.median(seconds)
    measured = {
        "library": library,
        "suite": flags.suite,
        "s_per_step_median": round(median, 6),
        "s_per_step_min": round(min(seconds), 6),
        "s_per_step_mean": round(statistics.fmean(seconds), 6),
        "s_per_step": [round(second, 6) for second in seconds],
        # The median, because a step disturbed by another process does not measure the library.
        "tokens_per_s": round(tokens[0] / median, 1),
        "tokens": tokens[1],
        "tokens_per_step": tokens[0],
        "compile_s": round(compile_s, 3),
        "peak_rss_mb": peak_rss_mb(),
        "params": params,
        "versions": versions,
    }
    print(json.dumps({**measured, **more, **vars(flags)}), flush=True)
