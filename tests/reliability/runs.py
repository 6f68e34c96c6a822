"""Small real commands for the tests of reliability: inputs, how a stage is started, what its run amounts to.

The scripts of this folder (``damage.py``, ``disk.py``, ``signals.py``) are run by hand and print a table for
docs/reliability.md; pytest runs a short version of each (``test_*.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from rlhf_jax.data.schema import Demonstration, Prompt, write_jsonl
from rlhf_jax.data.storyland import tokenizer as storyland_assets
from rlhf_jax.data.text import load_tokenizer
from rlhf_jax.models.config import gpt2
from rlhf_jax.models.heads import language_model
from rlhf_jax.models.hf import save_hf

ROOT = Path(__file__).parents[2]
EPOCHS, EPOCH_STEPS, BATCH = 3, 6, 8
AT_ONCE = min(4, len(os.sched_getaffinity(0)))
"""Commands that run side by side where they have nothing in common."""


def inputs(folder: Path) -> Path:
    """A random model of one layer with storyland's tokenizer, demonstrations and prompts."""
    tokenizer = load_tokenizer(storyland_assets.assets())
    model = language_model(gpt2(len(tokenizer), 64, 1, 16, 2))
    save_hf(folder / "model", model, model.init(jax.random.key(0)), tokenizer)
    pairs = [
        Demonstration(f"Write about number {i}.", f"A dog saw {i} cats.", id=f"d{i}")
        for i in range(64)
    ]
    write_jsonl(folder / "demonstrations.jsonl", pairs[: BATCH * EPOCH_STEPS])
    write_jsonl(folder / "validation.jsonl", pairs[BATCH * EPOCH_STEPS :])
    write_jsonl(folder / "prompts.jsonl", [Prompt(p.prompt, id=p.id) for p in pairs])
    return folder


def sft_flags(source: Path, workdir: Path, *more: str) -> list[str]:
    """Flags of ``experiments/sft.py``: three epochs of six steps, a checkpoint and a model after each epoch."""
    return [
        f"--config={ROOT}/configs/sft/storyland.py:smoke", f"--workdir={workdir}", f"--config.model={source}/model",
        f"--config.demonstrations={source}/demonstrations.jsonl", f"--config.validation={source}/validation.jsonl",
        f"--config.epochs={EPOCHS}", f"--config.batch_size={BATCH}", "--config.row_length=48",
        "--config.pieces_per_row=1", "--config.dropout=0.1", *more,
    ]  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    """One CPU device; output as it comes."""
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    own = {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(flags),
    }
    return {**os.environ, **own, **more}


def start(script: str, flags: list[str], **kw) -> subprocess.Popen[str]:
    """A command as a user gives it, from the root of the checkout."""
    kw = {
        "env": environment(),
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "cwd": ROOT,
    } | kw
    return subprocess.Popen([sys.executable, f"experiments/{script}.py", *flags], **kw)


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The last thing it said."""
        return (self.err.strip().splitlines() or self.out.strip().splitlines() or [""])[-1]


def command(script: str, flags: list[str], **kw) -> Ended:
    """Runs it to its end."""
    process = start(script, flags, **kw)
    out, err = process.communicate(timeout=300)
    return Ended(process.returncode, out, err)


def signalled(
    script: str, flags: list[str], when: Callable[[], bool], *numbers: int, pause: float = 0.0, **kw
) -> tuple[Ended, float]:
    """Sends signals, `pause` seconds apart, as soon as `when` holds; and the seconds from the last one to the end."""
    process = start(script, flags, **kw)
    until = time.monotonic() + 120
    while not when() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    for i, number in enumerate(numbers):
        time.sleep(pause if i else 0)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
    sent = time.monotonic()
    out, err = process.communicate(timeout=300)
    return Ended(process.returncode, out, err), time.monotonic() - sent


def logged(workdir: Path, step: int) -> Callable[[], bool]:
    """Whether the log has reached `step`."""

    def reached() -> bool:
        with contextlib.suppress(OSError, ValueError, IndexError):
            return (
                json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["step"] >= step
            )
        return False

    return reached


def outcome(workdir: Path) -> dict[str, str | list]:
    """All that an SFT run amounts to: the bytes of each epoch's model, and the log without its times."""
    models = {
        str(p.relative_to(workdir)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(workdir.glob("epoch-*/*"))
    }
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((workdir / "sft.json").read_text())
    return {
        **models,
        "log": [{k: v for k, v in row.items() if k != "time"} for row in rows],
        "epochs": result["epochs"],
    }


def steps(workdir: Path) -> list[int]:
    """Sealed steps, oldest first."""
    return sorted(int(p.stem) for p in (workdir / "checkpoints" / "manifests").glob("*.json"))


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[None]:
    """A file system in memory of a few hundred kilobytes at `place`; RuntimeError where it may not be mounted."""
    place.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=False, capture_output=True)


def remount(place: Path, option: str) -> None:
    """Changes a `small_disk`: ``size=64m``, ``ro``, ``rw``."""
    _mount("-o", f"remount,{option}", str(place))


def _mount(*arguments: str) -> None:
    tool = shutil.which("mount")
    done = (
        subprocess.run([tool, *arguments], capture_output=True, text=True, check=False)
        if tool
        else None
    )
    if done is None or done.returncode:
        raise RuntimeError(
            f"mount {' '.join(arguments)}: {done.stderr.strip() if done else 'there is no mount'}"
        )


def stop_early(source: Path, workdir: Path, *more: str) -> Ended:
    """An SFT run that SIGTERM stopped in its third epoch: sealed are that of the second epoch and a later step."""
    late = logged(workdir, 2 * EPOCH_STEPS + 1)
    return signalled("sft", sft_flags(source, workdir, *more), late, signal.SIGTERM)[0]


class Table:
    """What was tried, what survived, what was lost; printed as Markdown."""

    def __init__(self, title: str):
        self.title, self.rows = title, []

    def add(self, fault: str, good: bool, note: str = "") -> None:
        """A fault, whether everything that was promised held, and what was seen."""
        self.rows.append((fault, good, note))
        print(f"{'ok  ' if good else 'LOST'} {fault}  {note}"[:200], flush=True)

    def judge(self, cases: Iterable[tuple[str, Callable[[], tuple[bool, str]]]]) -> None:
        """Runs cases that have nothing in common, a few at a time, and adds each in order.

        The commands are small: half of a run is Python's start, on one core.
        """
        names, judges = zip(*cases, strict=True)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for name, seen in zip(names, pool.map(lambda judge: judge(), judges), strict=True):
                self.add(name, *seen)

    def show(self) -> None:
        """Prints the counts; exits with 1 when something was lost."""
        lost = sum(not good for _, good, _ in self.rows)
        print(
            f"\n| {self.title} | tried {len(self.rows)} | survived {len(self.rows) - lost} | lost {lost} |",
            flush=True,
        )
        sys.exit(bool(lost))
