r"""Power cuts without a disk that could be cut: the real programs under `recorder.Recorder`, and runs that go on.

    python -m tests.reliability.recorded                     # 12 cuts of each program, three minutes
    python -m tests.reliability.recorded --cuts=sft:40,ppo:20

Three questions. When a seal, a result or a model folder gets its final name: is everything that it speaks of on the
disk? After a cut at each moment of the run: does what is there keep the promises of docs/reliability.md? And after the
chosen cuts: does the same command end with the bits of the run that nothing happened to?
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.reliability import kill, runs
from tests.reliability.recorder import Event, Recorder, tree

PROGRAMS = ("sft", "reward_model", "ppo")
FEWER: dict[str, dict[str, object]] = {
    "sft": {"epochs": 3, "keep": 2},
    "reward_model": {"epochs": 1, "save_every": 2, "keep": 2},
    "ppo": {"iterations": 4, "save_every": 1, "keep": 2},
}
"""Short runs with more checkpoints than are kept."""


def main() -> None:
    """The table; with ``--json`` all that was found, for the test that starts this."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cuts", default=",".join(f"{name}:12" for name in PROGRAMS))
    parser.add_argument("--json", action="store_true")
    flags = parser.parse_args()
    found: dict[str, Any] = {}
    table = runs.Table("cuts built from what was synced")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        kill.make_inputs(folder / "inputs")
        for name, count in (pair.split(":") for pair in flags.cuts.split(",")):
            with (
                contextlib.redirect_stdout(io.StringIO())
                if flags.json
                else contextlib.nullcontext()
            ):
                found[name] = cut_short(name, folder / "inputs", folder / name, int(count))
            if not flags.json:
                for moment, broken in found[name]["ends"].items():
                    table.add(
                        f"{name}, moment {moment} of {found[name]['moments']}",
                        not broken,
                        str(broken),
                    )
                table.add(
                    f"{name}, every moment", not found[name]["broken"], str(found[name]["broken"])
                )
                table.add(
                    f"{name}, final names",
                    not found[name]["unsynced"],
                    str(found[name]["unsynced"]),
                )
    if flags.json:
        print(json.dumps(found))
    else:
        table.show()


def cut_short(name: str, inputs: Path, folder: Path, count: int) -> dict[str, Any]:
    """Records one run and cuts it: see the top of this file.

    Returns:
      ``moments`` (how many there are), ``unsynced`` (final names given too early), ``broken`` (promises that do not
      hold at some moment), ``ends`` (moment of a cut -> what differs at the end of the same command).
    """
    disk = folder / "disk"
    disk.mkdir(parents=True)
    recorder, unsynced = Recorder(disk, folder / "store"), []
    recorder.on_rename = lambda event: unsynced.extend(too_early(recorder, event, folder / "look"))
    with recorder:
        status = run(name, inputs, disk / "run")
    assert status == 0, f"{name} ended with {status}"
    moments = len(recorder.events)
    broken = broken_promises(recorder, disk / "run", folder / "look")
    ends = {}
    for moment in spread(count, moments):
        place = recorder.build(moment, folder / f"cut-{moment}")
        status = run(name, inputs, place / "run")
        ends[moment] = (
            differences(disk / "run", place / "run") if status == 0 else [f"status {status}"]
        )
        shutil.rmtree(place)
    recorder.close()
    return {"moments": moments, "unsynced": unsynced, "broken": broken, "ends": ends}


def spread(count: int, moments: int) -> list[int]:
    """`count` moments from the first to the last, both left out."""
    return sorted({1 + round((i + 1) * (moments - 1) / (count + 1)) for i in range(count)})


def run(name: str, inputs: Path, workdir: Path) -> int:
    """The program as a user starts it, in this process; its exit status."""
    import importlib

    from rlhf_jax.run import cli

    program = importlib.import_module(f"experiments.{name}").run
    try:
        cli.main(program, argv=kill.command(name, inputs, workdir, **FEWER[name])[2:])
    except SystemExit as ended:
        return int(str(ended.code))
    return 0


# --------------------------------------------------------------------------------------------------- the promises


def too_early(recorder: Recorder, event: Event, look: Path) -> list[str]:
    """What a final name speaks of and is not on the disk at the moment when it is given."""
    target, before = Path(event.path), Path(event.before)
    if before.is_file() and not any(
        e.what == "file" and e.path == event.before for e in recorder.events
    ):
        return [f"{target.name} itself"]
    if before.is_dir() and before.name == f"{target.name}.tmp":
        spoken_of, called = before, target.name
    elif target.parent.name == "manifests" and target.suffix == ".json":
        spoken_of, called = target.parent.parent / target.stem, f"the seal of step {target.stem}"
    elif (
        target.suffix == ".json"
        and target.name != "config.json"
        and ".tmp" not in str(target.parent)
    ):
        spoken_of, called = target.parent, target.name
    else:
        return []
    durable = tree(
        recorder.build(len(recorder.events), look) / os.path.relpath(spoken_of, recorder.root)
    )
    shutil.rmtree(look)
    live = tree(spoken_of)
    hidden = {
        name for name in live if Path(name).name.startswith(".") or Path(name).name == "run.lock"
    }
    late = sorted(name for name in {*live} - hidden if durable.get(name) != live[name])
    return [f"{called}: {name}" for name in late]


def broken_promises(recorder: Recorder, whole: Path, look: Path) -> list[str]:
    """What does not hold in the folder that a cut leaves, for a cut after each event that can change it."""
    found: list[str] = []
    newest = -1
    for moment, event in enumerate(recorder.events, start=1):
        if event.what == "rename":
            continue
        run = recorder.build(moment, look) / "run"
        sealed = [int(p.stem) for p in run.glob("checkpoints/manifests/*.json")]
        found += [f"moment {moment}: {what}" for what in broken_in(run, whole)]
        if max(sealed, default=-1) < newest:
            found.append(f"moment {moment}: the seal of step {newest} is gone")
        newest = max(sealed, default=newest)
        shutil.rmtree(look)
    return found


def broken_in(run: Path, whole: Path) -> Iterator[str]:
    """Whether seals, models and results of a folder are what they say, compared with the `whole` run's."""
    for seal in sorted(run.glob("checkpoints/manifests/*.json")):
        yield from (f"step {seal.stem}: {what}" for what in broken_seal(seal))
    models = [p.parent for p in whole.glob("*/config.json")]
    for model in models:
        here = run / model.name
        if here.exists() and tree(here) != tree(model):
            yield f"{model.name} is not what was written"
    for result in whole.glob("*.json"):
        here = run / result.name
        if here.exists() and here.read_bytes() != result.read_bytes():
            yield f"{result.name} is not what was written"
    if (run / "config.json").exists() and not (run / "run.lock").exists():
        yield "config.json without run.lock: the folder would be taken for somebody else's"
    done = [p for p in whole.glob("*.json") if p.name != "config.json" and (run / p.name).exists()]
    if done and (
        not all((run / m.name).is_dir() for m in models) or kill.history(run) != kill.history(whole)
    ):
        yield f"{done[0].name} without its models or its log"


def broken_seal(seal: Path) -> Iterator[str]:
    """What of a step is not what its seal says."""
    try:
        files = json.loads(seal.read_bytes())["files"]
    except ValueError:
        yield "its seal is no JSON"
        return
    step = seal.parent.parent / seal.stem
    here = tree(step) if step.is_dir() else {}
    import hashlib

    for name in sorted({*files, *here}):
        if files.get(name) != hashlib.sha256(here.get(name, b"-")).hexdigest():
            yield f"{name} is not what was sealed"


def differences(whole: Path, again: Path) -> list[str]:
    """What two finished runs do not have in common: models, results, log, arrays of the last checkpoint."""
    found = kill.differences(whole, again)
    for result in sorted(whole.glob("*.json")):
        if result.name != "config.json":
            one, two = (
                relative(json.loads((run / result.name).read_text()), run) for run in (whole, again)
            )
            found += [result.name] * (one != two)
    left = [p.name for p in again.rglob("*") if p.name.endswith((".tmp", ".old"))]
    return found + [f"{name} is left over" for name in left]


def relative(value: Any, run: Path) -> Any:
    """A result without the place of its run."""
    return json.loads(json.dumps(value).replace(str(run), "RUN"))


if __name__ == "__main__":
    main()
