"""A disk that fills up, is read-only or refuses, under the real SFT command.

    python -m tests.reliability.disk

Needs the right to mount a file system in memory (root, or a user namespace). Each size fills at another moment: before
the first file, in a model folder, in a checkpoint, in the log. Survived means: exit status 1 with one clear line, no
traceback, sealed steps as they were; and after space was made the same command goes on and ends as if nothing had been.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from rlhf_jax.run.checkpoint import Checkpoints
from tests.reliability import runs

SIZES = ("0k", "40k", "120k", "180k", "240k", "600k", "900k", "1200k")
"""A whole run takes about a megabyte and a half."""


def refused(ended: runs.Ended, words: str) -> bool:
    """Whether a command ended as a refusing machine makes it: status 1, `words` said, no traceback."""
    return ended.status == 1 and words in ended.err and "Traceback" not in ended.err


def intact(run: Path) -> bool:
    """Whether every sealed step is still good."""
    sealed = runs.steps(run)
    return Checkpoints(run / "checkpoints").newest_good() == (sealed[-1] if sealed else None)


def full(source: Path, place: Path, expected: dict, size: str) -> tuple[bool, str]:
    """A disk of `size` fills up; then it gets larger."""
    run = place / "run"
    with runs.small_disk(place, "16k" if size == "0k" else size):
        if size == "0k":
            (place / "filler").write_bytes(bytes(4096 * 3))
        ended = runs.command("sft", runs.sft_flags(source, run))
        said = refused(ended, "Free disk space")
        sealed, good = runs.steps(run), intact(run)
        runs.remount(place, "size=64m")
        again = runs.command("sft", runs.sft_flags(source, run))
        equal = again.status == 0 and runs.outcome(run) == expected
    return (
        said and good and equal,
        f"sealed {sealed}, went on to the same end: {equal}; {ended.line}",
    )


def read_only(source: Path, place: Path, expected: dict) -> tuple[bool, str]:
    """The file system turns read-only between two starts."""
    run = place / "run"
    with runs.small_disk(place, "64m"):
        assert runs.stop_early(source, run).status == 143
        runs.remount(place, "ro")
        ended = runs.command("sft", runs.sft_flags(source, run))
        good = refused(ended, "Read-only file system") and intact(run)
        runs.remount(place, "rw")
        again = runs.command("sft", runs.sft_flags(source, run))
        equal = again.status == 0 and runs.outcome(run) == expected
    return good and equal, f"went on to the same end: {equal}; {ended.line}"


def file_in_the_way(source: Path, place: Path, expected: dict) -> tuple[bool, str]:
    """A file where a folder has to be."""
    run = place / "run"
    assert runs.stop_early(source, run).status == 143
    folder = run / "checkpoints"
    folder.rename(run / "kept")
    folder.write_text("a file")
    ended = runs.command("sft", runs.sft_flags(source, run))
    good = refused(ended, "could not be written")
    folder.unlink()
    (run / "kept").rename(folder)
    good &= intact(run)
    again = runs.command("sft", runs.sft_flags(source, run))
    equal = again.status == 0 and runs.outcome(run) == expected
    return good and equal, f"went on to the same end: {equal}; {ended.line}"


def large_files_refused(source: Path, place: Path, expected: dict) -> tuple[bool, str]:
    """The process may not write files of more than 150 kB: weights fail, small files do not."""
    run = place / "run"
    place.mkdir(parents=True, exist_ok=True)
    (place / "limited.py").write_text(LIMITED)
    script = os.path.relpath(place / "limited", runs.ROOT / "experiments")
    ended = runs.command(script, runs.sft_flags(source, run))
    good = refused(ended, "Free disk space") and intact(run)
    again = runs.command("sft", runs.sft_flags(source, run))
    equal = again.status == 0 and runs.outcome(run) == expected
    return good and equal, f"went on to the same end: {equal}; {ended.line}"


LIMITED = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
runpy.run_path("experiments/sft.py", run_name="__main__")
"""


def main() -> None:
    """All of them."""
    table = runs.Table("disks that are full, read-only or refuse, under the real SFT command")
    others: dict[str, Callable[[Path, Path, dict], tuple[bool, str]]] = {
        "read-only between two starts": read_only,
        "a file in the place of the checkpoints": file_in_the_way,
        "files of more than 150 kB refused (RLIMIT_FSIZE)": large_files_refused,
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = runs.inputs(folder / "inputs")
        assert runs.command("sft", runs.sft_flags(source, folder / "whole")).status == 0
        expected = runs.outcome(folder / "whole")
        cases: list[tuple[str, Callable[[], tuple[bool, str]]]] = []
        for size in SIZES:
            seen = functools.partial(full, source, folder / size, expected, size)
            cases.append((f"tmpfs of {size}", seen))
        for i, (name, fault) in enumerate(others.items()):
            seen = functools.partial(fault, source, folder / f"other{i}", expected)
            cases.append((name, seen))
        table.judge(cases)
    table.show()


if __name__ == "__main__":
    main()
