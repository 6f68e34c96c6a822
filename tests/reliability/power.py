r"""Cuts the power of a real file system in the middle of real programs, and gives the same command again.

    python -m tests.reliability.power                                   # as root; ten cuts of each program
    python -m tests.reliability.power --programs=sft,pipeline --cuts=3

A program runs in an ext4 in a file that is mounted through a loop device. At ten moments of the run, some of them right
after a seal, a model or a result appeared, the file is copied while it is mounted: that is what a power cut at that
moment leaves, without what the kernel had not written yet. Each copy is mounted, which replays its journal, and the
same command runs there to its end. Models, samples, logs and results must be those of a run that nothing happened to.

Exit status 77 where nothing can be mounted.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.reliability import kill, recorded

PROGRAMS = ("sft", "reward_model", "ppo", "pipeline")
NOT_ALLOWED = 77
"""Exit status where nothing can be mounted; the one that test drivers take for "skipped"."""
SIZE = {"pipeline": 2**30}
"""Bytes of the file system, 128 MiB if not said otherwise; the file is sparse."""
MARKS = {"sft": 20, "reward_model": 24, "ppo": 20, "pipeline": 50}
"""About how many seals, models and results a program writes, for cuts without a run that counts them."""
SAMPLING = "sample"
"""The log of this stage says how far it was when two threads reported; its samples are compared."""
TIMES = ("seconds", "compile_seconds", "peak_memory_mb", "time")
"""Keys of results that are of no interest here."""
ENOUGH = 1800.0
"""Seconds after which a command is given up."""


class NotAllowedError(RuntimeError):
    """This machine does not let us make and mount a file system."""


class Row(NamedTuple):
    """One cut."""

    program: str
    moment: str
    seconds: float
    """From the start of the program to the cut."""
    found: str
    """What was in the folder after the cut."""
    broken: list[str]
    """Seals that are not what they say, before the command was given again."""
    differences: list[str]
    """What differs at the end from the run that nothing happened to."""


# ---------------------------------------------------------------------------------------------------------- the disk


def tool(name: str) -> str:
    """The path of a program of the system.

    Raises:
      NotAllowedError: it is missing.
    """
    found = shutil.which(name)
    if found is None:
        raise NotAllowedError(f"there is no {name}")
    return found


def system(*argv: str) -> None:
    """Runs a program of the system.

    Raises:
      NotAllowedError: it fails.
    """
    done = subprocess.run([tool(argv[0]), *argv[1:]], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotAllowedError(f"{' '.join(argv)}: {done.stderr.strip()}")


def make_disk(image: Path, size: int) -> None:
    """An ext4 in a sparse file."""
    if os.geteuid():
        raise NotAllowedError(f"user {os.geteuid()} is not root")
    with image.open("wb") as file:
        file.truncate(size)
    system("mkfs.ext4", "-q", "-F", str(image))


@contextlib.contextmanager
def mounted(image: Path, place: Path) -> Iterator[None]:
    """The file system of a file, mounted at `place`; its journal is replayed if it was cut."""
    place.mkdir(parents=True, exist_ok=True)
    system("mount", "-o", "loop", str(image), str(place))
    try:
        yield
    finally:
        for _ in range(50):
            if (
                subprocess.run(
                    [tool("umount"), str(place)], capture_output=True, check=False
                ).returncode
                == 0
            ):
                break
            time.sleep(0.1)
        else:
            subprocess.run([tool("umount"), "-l", str(place)], check=False)


def cut(image: Path, copy: Path) -> None:
    """Copies a mounted file system as it is at one moment: again, until two copies in a row are equal."""
    other = copy.with_suffix(".again")
    for _ in range(20):
        for target in (copy, other):
            system("cp", "--sparse=always", str(image), str(target))
        if filecmp.cmp(copy, other, shallow=False):
            other.unlink()
            return
    raise RuntimeError(f"the kernel did not stop writing to {image}")


# ------------------------------------------------------------------------------------------------------ the programs


def command(name: str, inputs: Path, workdir: Path) -> list[str]:
    """The command line, as a user gives it."""
    if name != "pipeline":
        return kill.command(name, inputs, workdir)
    config = f"--config={kill.ROOT}/configs/instructgpt/storyland.py:smoke"
    return [
        sys.executable,
        str(kill.ROOT / "experiments" / "instructgpt.py"),
        config,
        f"--workdir={workdir}",
    ]


def ended(process: subprocess.Popen[str], log: Path) -> None:
    """Waits for the end of a program and refuses every status but 0."""
    status = process.wait(timeout=ENOUGH)
    if status:
        raise RuntimeError(f"exit status {status}: {log.read_text()[-2000:]}")


@contextlib.contextmanager
def started(argv: Sequence[str], log: Path) -> Iterator[subprocess.Popen[str]]:
    """A program that writes to `log`; it is killed if it is still there at the end of the block."""
    with log.open("w") as file:
        process = kill.start(argv, stdout=file)
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def marks(run: Path) -> set[str]:
    """What says that something is done: seals, folders of models, results."""
    found = set()
    for folder, _, names in os.walk(run):  # which goes on where a folder is gone meanwhile
        found |= {os.path.join(folder, name) for name in names if name.endswith(".json")}
    return {
        name
        for name in found
        if not any(part in name for part in (".tmp", "quarantine", "tokenizer"))
    }


def watch(process: subprocess.Popen[str], run: Path) -> tuple[int, float]:
    """Waits for the end; how many marks there were, seals that went again too, and how many seconds it took."""
    begun, seen = time.monotonic(), set()
    while process.poll() is None and time.monotonic() - begun < ENOUGH:
        seen |= marks(run)
        time.sleep(0.02)
    return len(seen | marks(run)), time.monotonic() - begun


def moments(count: int, all_marks: int, seconds: float) -> list[tuple[str, int, float]]:
    """When to cut: name, marks to wait for, and seconds to wait then (or since the start, where no mark is waited for).

    One of them is right after the end; of the others two of three are right after a mark, and one is at any time.
    """
    chosen: list[tuple[str, int, float]] = []
    for i in range(count - (count > 1)):
        share = (i + 1) / (count + 1)
        if i % 3 == 2:
            chosen.append((f"{share:.0%} of its time", 0, share * seconds))
        else:
            wait = (0.0, 0.3)[i % 3]
            mark = max(1, round(share * all_marks))
            chosen.append((f"{wait:.1f} s after mark {mark} of {all_marks}", mark, wait))
    return chosen + [("right after its end", 10**9, 0.0)] * (count > 1)


def cut_often(
    process: subprocess.Popen[str],
    run: Path,
    image: Path,
    folder: Path,
    when: list[tuple[str, int, float]],
) -> list[tuple[str, float, Path]]:
    """Copies the mounted file system at each of these moments, while the program stands still."""
    begun, copies, waiting, all_seen = time.monotonic(), [], list(when), set()
    paused = 0.0  # the seconds in which it stood still are not its own
    while waiting:
        over = process.poll() is not None
        all_seen |= marks(run)
        now, seen = time.monotonic() - begun - paused, len(all_seen)
        due = [w for w in waiting if over or (now >= w[2] if w[1] == 0 else seen >= w[1])]
        for name, mark, wait in due[:1]:
            time.sleep(wait if mark else 0.0)
            stopped = time.monotonic()
            if not over:
                os.killpg(process.pid, signal.SIGSTOP)
            copy = folder / f"cut-{len(copies)}.img"
            cut(image, copy)
            if not over:
                os.killpg(process.pid, signal.SIGCONT)
            copies.append((name, now, copy))
            waiting.remove((name, mark, wait))
            paused += time.monotonic() - stopped
        time.sleep(0.01)
    return copies


def cut_program(name: str, folder: Path, *, cuts: int, quickly: bool = False) -> list[Row]:
    """Runs a program, cuts it, and runs it again on what each cut left.

    Args:
      name: of `PROGRAMS`.
      folder: for everything that is made.
      cuts: how many.
      quickly: compares with the run that was copied while it stood still, and runs no other for that; cuts come after
        marks alone.

    Raises:
      NotAllowedError: nothing can be mounted here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place, image, whole = folder / "disk", folder / "disk.img", folder / "whole"
    make_disk(image, SIZE.get(name, 2**27))
    with mounted(image, place):
        pass  # fails here, before anything was computed, where it is not allowed
    if not (folder / "inputs").exists():
        kill.make_inputs(folder / "inputs")
    run, log = place / "run", folder / "log.txt"
    argv = command(name, folder / "inputs", run)
    when = [
        (f"after mark {n}", n, 0.0)
        for n in (MARKS[name] * (i + 1) // (cuts + 1) for i in range(cuts))
    ]
    if not quickly:
        with started(
            argv, log
        ) as process:  # in a folder of the same name, so that results name the same paths
            counted = watch(process, run)
            ended(process, log)
        shutil.move(run, whole)
        when = moments(cuts, *counted)
    with mounted(image, place), started(argv, log) as process:
        copies = cut_often(process, run, image, folder, when)
        ended(process, log)
        if quickly:
            shutil.copytree(run, whole)
        assert not differences(whole, run), "two runs that nothing happened to differ"
    rows = []
    for moment, seconds, copy in copies:
        with mounted(copy, place):
            rows.append(again(name, argv, run, whole, log, moment, seconds))
        copy.unlink()
    shutil.rmtree(whole)
    return rows


def again(
    name: str, argv: list[str], run: Path, whole: Path, log: Path, moment: str, seconds: float
) -> Row:
    """The same command on what a cut left."""
    broken = [
        f"{seal.parent.parent.parent.name} step {seal.stem}: {what}"
        for seal in run.rglob("manifests/*.json") for what in recorded.broken_seal(seal)
    ]  # fmt: skip
    seals = len(list(run.rglob("manifests/*.json")))
    found = f"{seals} seals, {len(list(run.rglob('*.safetensors')))} weights, {len(list(run.rglob('done.json')))} done"
    try:
        with started(argv, log) as process:
            ended(process, log)
        unlike = differences(whole, run)
    except (RuntimeError, OSError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
        unlike = [str(error)]
    return Row(name, moment, seconds, found, broken, unlike)


# --------------------------------------------------------------------------------------------------------- comparing


def differences(whole: Path, run: Path) -> list[str]:
    """What two finished runs do not have in common: weights, data, samples, logs and results, without their times."""
    one, other = outcome(whole), outcome(run)
    return [f"there is no {name}" for name in one if name not in other] + [
        name for name in other if one.get(name) != other[name]
    ]


def outcome(run: Path) -> dict[str, Any]:
    """Each file that a run is done for, by its name: sha256, or what it holds beside times."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if (
            not path.is_file()
            or "checkpoints/" in name
            or path.name in ("done.json", "run.lock", "report.html")
        ):
            continue
        if path.name == "metrics.jsonl":
            rows = [without_times(json.loads(line)) for line in path.read_text().splitlines()]
            found[name] = [row for row in rows if not row["stage"].startswith(SAMPLING)]
        elif path.suffix == ".json":
            found[name] = without_times(json.loads(path.read_text()))
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def without_times(value: Any) -> Any:
    """JSON data without the keys of `TIMES`, at any depth."""
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key not in TIMES}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def main() -> int:
    """Prints a table for docs/reliability.md; exit status 1 when something was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--programs", default=",".join(PROGRAMS))
    parser.add_argument("--cuts", type=int, default=10)
    parser.add_argument("--quickly", action="store_true", help="no undisturbed run beforehand")
    flags = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in flags.programs.split(","):
            try:
                new = cut_program(
                    name, Path(scratch) / name, cuts=flags.cuts, quickly=flags.quickly
                )
            except NotAllowedError as refused:
                print(
                    f"power.py needs root and ext4 on a loop device: {refused}. Without them the same is shown by "
                    "python -m tests.reliability.recorded, which needs neither.", file=sys.stderr,
                )  # fmt: skip
                return NOT_ALLOWED
            for row in new:
                print(*row, sep=" | ", flush=True)
            rows += new
    print(
        "\n| program | cuts | seals not what they say | same bits at the end |\n|---|---|---|---|"
    )
    for name in flags.programs.split(","):
        own = [row for row in rows if row.program == name]
        broken, equal = (
            sum(bool(row.broken) for row in own),
            sum(not row.differences for row in own),
        )
        print(f"| {name} | {len(own)} | {broken} | {equal} |")
    return int(any(row.broken or row.differences for row in rows))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
