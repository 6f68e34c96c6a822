r"""All long scripts of this folder, one after the other: what ``make reliability`` runs.

    python -m tests.reliability.everything                       # all of them, within the hour
    python -m tests.reliability.everything power kill            # those with one of these words
    python -m tests.reliability.everything --minutes=20

Exit status 1 when one of them lost something or could not be run in the time; one that this machine does not allow
(no root for a file system of its own) is said and does not count.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.reliability import power, runs

SCRIPTS: tuple[tuple[str, ...], ...] = (
    ("power", "--programs=sft,reward_model,ppo"),
    ("power", "--programs=pipeline"),
    ("stages",),
    ("recorded", "--cuts=sft:8,reward_model:8,ppo:4"),
    ("kill", "--kills=6"),
    ("disk",),
    ("signals",),
    ("signals", "pipeline"),
    ("processes",),
    ("damage",),
    ("scaling",),
)
"""Each script with its arguments; what cuts, stops and damages whole pipelines comes first."""


def chosen(words: list[str]) -> list[tuple[str, ...]]:
    """The scripts that are there, of which one of `words` is a part; all without words."""
    here = Path(__file__).parent
    found = [script for script in SCRIPTS if (here / f"{script[0]}.py").is_file()]
    return [
        script for script in found if not words or any(word in " ".join(script) for word in words)
    ]


def run(script: tuple[str, ...], seconds: float) -> str:
    """Runs a script to its end, for `seconds` at most: ``ok``, ``not allowed here``, ``LOST`` or ``NOT IN TIME``."""
    name, *arguments = script
    argv = [sys.executable, "-m", f"tests.reliability.{name}", *arguments]
    process = subprocess.Popen(argv, cwd=runs.ROOT, env=environment())
    try:
        status = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # so that it takes down what it mounted and started
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60)
        process.kill()
        return "NOT IN TIME"
    return {0: "ok", power.NOT_ALLOWED: "not allowed here"}.get(status, "LOST")


def environment() -> dict[str, str]:
    """One CPU device, as the scripts expect."""
    return {
        **os.environ,
        "PYTHONPATH": str(runs.ROOT),
        "JAX_PLATFORMS": "cpu",
        "PYTHONUNBUFFERED": "1",
    }


def main() -> int:
    """Runs them and prints one line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*")
    parser.add_argument("--minutes", type=float, default=60.0, help="for all of them together")
    flags = parser.parse_args()
    begun, lines = time.monotonic(), []
    for script in chosen(flags.words):
        left = 60 * flags.minutes - (time.monotonic() - begun)
        since = time.monotonic()
        print(f"== {' '.join(script)}", flush=True)
        ended = run(script, left) if left > 0 else "NOT IN TIME"
        lines.append((" ".join(script), ended, time.monotonic() - since))
        print(f"== {lines[-1][0]}: {ended}, {lines[-1][2] / 60:.1f} minutes", flush=True)
    print("\n| script | minutes | outcome |\n|---|---|---|")
    for name, ended, seconds in lines:
        print(f"| {name} | {seconds / 60:.1f} | {ended} |")
    return int(any(ended.isupper() for _, ended, _ in lines))


if __name__ == "__main__":
    sys.exit(main())
