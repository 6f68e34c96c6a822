"""Every file of the newest checkpoint of a real SFT run damaged in every way, and folders that are no checkpoints.

    python -m tests.reliability.damage [WORD ...]      # with words: the faults with one of them in their name

Each fault hits a copy of a run that SIGTERM stopped in its last epoch; then the same command is given again. Survived
means: exit status 0, the step before was chosen and the bad one put in quarantine (or the newest stands, where it is
not the one that was damaged), later saves work, and models and log equal those of a run that nothing happened to.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.reliability import runs

Fault = tuple[str, Callable[[Path], None], bool]
"""Name, what is done to the folder of checkpoints, and whether the newest step is lost by it."""


def flip(file: Path) -> None:
    """One bit in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncate": lambda p: os.truncate(p, p.stat().st_size // 2),
    "flip": flip,
    "delete": lambda p: p.unlink(),
    "empty": lambda p: os.truncate(p, 0),
    "pickle": lambda p: p.write_bytes(pickle.dumps({"a": 1})) and None,
}


def file_faults(run: Path) -> Iterator[Fault]:
    """Each file of the newest step and its seal, in each way."""
    newest = runs.steps(run)[-1]
    folder = run / "checkpoints" / str(newest)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for file in [*files, run / "checkpoints" / "manifests" / f"{newest}.json"]:
        name = file.relative_to(run / "checkpoints")
        for how, damage in DAMAGE.items():
            if file.stat().st_size or how in ("delete", "pickle"):
                yield (
                    f"{how} {_short(name)}",
                    lambda root, name=name, damage=damage: damage(root / name),
                    True,
                )


def _short(name: Path) -> str:
    parts = [p if len(p) < 24 else f"{p[:8]}.." for p in name.parts]
    return "/".join(parts)


def folder_faults(run: Path) -> Iterator[Fault]:
    """Folders, links and seals that are not what they seem."""
    older, newest = runs.steps(run)[-2:]

    def edit(root: Path, **fields) -> None:
        file = root / "manifests" / f"{newest}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    def linked(root: Path) -> None:
        (root / str(newest)).rename(root.parent / "moved")
        (root / str(newest)).symlink_to(root.parent / "moved")

    def file_for_folder(root: Path) -> None:
        shutil.rmtree(root / str(newest))
        (root / str(newest)).write_text("not a folder")

    def swapped(root: Path) -> None:
        shutil.copy(root / "manifests" / f"{older}.json", root / "manifests" / f"{newest}.json")

    def copied(root: Path) -> None:
        shutil.copytree(root / str(older), root / "999")
        shutil.copy(root / "manifests" / f"{older}.json", root / "manifests" / "999.json")

    def extra_file(root: Path) -> None:
        (root / str(newest) / "extra").write_text("x")

    def inner_link(root: Path) -> None:
        file = max((root / str(newest)).rglob("d/*"), key=lambda p: p.stat().st_size)
        shutil.copy(file, root.parent / "blob")
        file.unlink()
        file.symlink_to(root.parent / "blob")

    def leftovers(root: Path) -> None:
        (root / f"{newest + 1}.orbax-checkpoint-tmp").mkdir()
        (root / "manifests" / f"{newest + 1}.json.tmp").write_text("{")
        (root.parent / "epoch-3.tmp").mkdir()
        (root.parent / "epoch-3.tmp" / "model.safetensors").write_text("half")

    def cut_log(root: Path) -> None:
        with (root.parent / "metrics.jsonl").open("a") as file:
            file.write('{"step": 17, "sta')

    yield "a stray empty folder 999/", lambda r: (r / "999").mkdir(), False
    yield (
        "a stray folder 999/ with a file",
        lambda r: ((r / "999").mkdir(), (r / "999" / "x").write_text("x")),
        False,
    )
    yield "a stray older folder 1/", lambda r: (r / "1").mkdir(), False
    yield "a stray folder in the way of the next save", lambda r: (r / "18").mkdir(), False
    yield "a stray file 999", lambda r: (r / "999").write_text("x"), False
    yield "a stray file in the way of the next save", lambda r: (r / "18").write_text("x"), False
    yield "a link 999 to an older step", lambda r: (r / "999").symlink_to(r / str(older)), False
    yield "a dangling link 18", lambda r: (r / "18").symlink_to(r / "nowhere"), False
    yield "an older step copied to 999/ with its seal", copied, False
    yield "the newest step is a link", linked, True
    yield "a file of the newest step is a link", inner_link, True
    yield "the newest step is a file", file_for_folder, True
    yield (
        "the newest step is gone, its seal is there",
        lambda r: shutil.rmtree(r / str(newest)),
        True,
    )
    yield "a file too many in the newest step", extra_file, True
    yield "the seal's step edited", lambda r: edit(r, step=older), True
    yield "the seal's extra edited", lambda r: edit(r, extra={"x": 1}), True
    yield "the seal's files edited", lambda r: edit(r, files={}), True
    yield "the seal of another step", swapped, True
    yield (
        "a seal of nested lists",
        lambda r: (r / "manifests" / f"{newest}.json").write_text("[" * 10**5),
        True,
    )
    yield (
        "a seal that is no object",
        lambda r: (r / "manifests" / f"{newest}.json").write_text("3"),
        True,
    )
    yield "leftovers of a killed save", leftovers, False
    yield "half a line at the end of the log", cut_log, False


def judge(
    source: Path, run: Path, expected: dict, loses_newest: bool, before: list[int]
) -> tuple[bool, str]:
    """Gives the command again, and says whether every promise held and what was seen.

    Args:
      source: what `runs.inputs` wrote.
      run: the damaged run.
      expected: `runs.outcome` of a run that nothing happened to.
      loses_newest: whether the newest step is damaged.
      before: the steps that were sealed before the damage.
    """
    older, newest = before[-2:]
    begun = time.time()
    ended = runs.command("sft", runs.sft_flags(source, run))
    if ended.status or "Traceback" in ended.err:
        return False, f"status {ended.status}: {ended.line}"
    chosen = went_on_from(run, begun)
    aside = [
        p.name
        for p in (run / "checkpoints" / "quarantine").glob("*")
        if p.name.startswith(f"{newest}-")
    ]
    equal, last = runs.outcome(run) == expected, runs.steps(run)[-1]
    good = (
        equal
        and chosen == (older if loses_newest else newest)
        and last == runs.EPOCHS * runs.EPOCH_STEPS
    )
    good &= bool(aside) == loses_newest or not os.path.lexists(run / "checkpoints" / str(newest))
    return (
        good,
        f"went on from {chosen}, put aside: {'yes' if aside else 'no'}, last {last}, final state equal: {equal}",
    )


def went_on_from(run: Path, begun: float) -> int:
    """The step a run went on from: the last that its log has from before."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return max((row["step"] for row in rows if row["time"] < begun), default=0)


def main() -> None:
    """All faults, one after the other."""
    table = runs.Table("damage to checkpoints of the real SFT command")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = runs.inputs(folder / "inputs")
        whole, cut = folder / "whole", folder / "cut"
        assert runs.command("sft", runs.sft_flags(source, whole)).status == 0
        assert runs.stop_early(source, cut).status == 143
        expected, before = runs.outcome(whole), runs.steps(cut)
        places = (folder / f"run{i}" for i in itertools.count())

        def damaged(fault: Callable[[Path], None], loses: bool, run: Path) -> tuple[bool, str]:
            shutil.copytree(cut, run, symlinks=True)
            fault(run / "checkpoints")
            seen = judge(source, run, expected, loses, before)
            shutil.rmtree(run)
            return seen

        words = sys.argv[1:]
        table.judge(
            (name, functools.partial(damaged, fault, loses, place))
            for (name, fault, loses), place in zip(
                [*file_faults(cut), *folder_faults(cut)], places, strict=False
            )
            if not words or any(word in name for word in words)
        )
    table.show()


if __name__ == "__main__":
    main()
