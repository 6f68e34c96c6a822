"""The machinery of a pipeline on toy stages: what is kept and what runs again, in damaged and in copied folders."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_jax.run import files, records
from rlhf_jax.run.checkpoint import Checkpoints
from rlhf_jax.run.plans import describe
from rlhf_jax.run.records import without
from rlhf_jax.run.stages import Stage, Stages


class Kitchen:
    """Three stages and a user's file: dough (reads the flour) -> bread (needs dough) -> tasting (needs both)."""

    def __init__(self, folder: Path, flour: Path, config: dict | None = None, **kw):
        self.folder, self.flour, self.ran, self.said = folder, flour, [], []
        self.config = {
            "dough": {"water": 3, "keep": 2},
            "bread": {"heat": 200},
            "tasting": {"guests": 4},
            "seed": 0,
        }
        self.config |= config or {}
        self.versions = {"dough": 1, "bread": 1, "tasting": 1}
        self.versions |= kw.pop("versions", {})
        self.stages = Stages(folder, self._stages(), harmless=("keep",), say=self.said.append, **kw)

    def _stages(self) -> list[Stage]:
        def stage(name: str, work: Callable, needs: tuple, inputs: Callable, **more) -> Stage:
            part = {name: self.config[name]} | more
            return Stage(name, work, part, needs, inputs, version=self.versions[name])

        return [
            stage(
                "dough",
                self.dough,
                (),
                lambda: {"flour": str(self.flour)},
                seed=self.config["seed"],
            ),
            stage("bread", self.bread, ("dough",), lambda: {"dough": self.path("dough", "ball")}),
            stage("tasting", self.tasting, ("dough", "bread"), self._tasting_inputs),
        ]

    def path(self, stage: str, key: str) -> str:
        return self.stages.result(stage)[key]

    def _tasting_inputs(self) -> dict[str, str]:
        return {"bread": self.path("bread", "loaf"), "note": self.path("dough", "note")}

    def dough(self, folder: str) -> dict:
        self.ran.append("dough")
        ball = Path(folder) / "ball"
        ball.mkdir(exist_ok=True)
        # More water than five makes no difference, so that a change may come out the same.
        (ball / "config.json").write_text(
            json.dumps({"water": min(self.config["dough"]["water"], 5)})
        )
        (ball / "weights").write_text(self.flour.read_text() * 3 + str(self.config["seed"]))
        (Path(folder) / "note").write_text("salted")
        return {"ball": str(ball), "note": str(Path(folder) / "note"), "grams": 700}

    def bread(self, folder: str) -> dict:
        self.ran.append("bread")
        ball = Path(self.path("dough", "ball"))
        text = (
            (ball / "weights").read_text()
            + (ball / "config.json").read_text()
            + str(self.config["bread"])
        )
        (Path(folder) / "loaf").write_text(text)
        (Path(folder) / "metrics.jsonl").write_text('{"step": 1}\n')
        return {"loaf": str(Path(folder) / "loaf"), "size": len(text)}

    def tasting(self, folder: str) -> dict:
        self.ran.append("tasting")
        said = f"{self.config['tasting']['guests']} guests on {Path(self.path('bread', 'loaf')).read_text()}"
        (Path(folder) / "words.json").write_text(json.dumps(said))
        return {"said": said}

    def run(self) -> Kitchen:
        self.stages.run()
        return self

    def plan(self) -> dict[str, str]:
        return {step.stage: step.action for step in self.stages.plan()}

    def why(self, name: str) -> str:
        return "; ".join(next(step.why for step in self.stages.plan() if step.stage == name))


ALL = ["dough", "bread", "tasting"]
KEPT = dict.fromkeys(ALL, "keep")


@pytest.fixture
def flour(tmp_path: Path) -> Path:
    (tmp_path / "flour.txt").write_text("rye")
    return tmp_path / "flour.txt"


@pytest.fixture
def kitchen(tmp_path: Path, flour: Path) -> Callable[..., Kitchen]:
    """A new process each time: the same run folder, the same file."""
    return lambda config=None, folder=None, **kw: Kitchen(
        folder or tmp_path / "run", flour, config, **kw
    )


def contents(folder: Path) -> dict[str, str]:
    """Every output by its bytes, without logs and records."""
    return {
        f"{stage}/{name}": entry["sha256"]
        for stage in ALL
        for name, entry in records.outputs(folder / stage).items()
        if not name.endswith(".jsonl")
    }


def test_what_is_done_is_not_done_again(kitchen):
    assert kitchen().run().ran == ALL
    again = kitchen().run()
    assert again.ran == []
    assert again.said == [
        f"All 3 stages in {again.folder} are done, and their outputs are what was written"
    ]
    record = again.stages.record("bread")
    assert record["outputs"]["loaf"] == files.contents(again.folder / "bread" / "loaf")[""]
    assert record["result"]["loaf"] == "bread/loaf"
    assert record["inputs"]["dough"]["path"] == "dough/ball"
    assert again.stages.result("bread")["loaf"] == str(again.folder / "bread" / "loaf")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "delete": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "flip": flip,
    "append": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "rename": lambda path: path.rename(path.with_name("other")),
    "link": lambda path: (
        path.rename(path.parents[2] / "elsewhere"),
        path.symlink_to(path.parents[2] / "elsewhere"),
    ),
}
OUTPUTS = ("dough/ball/weights", "dough/ball/config.json", "dough/note", "bread/loaf", "bread/metrics.jsonl",
           "tasting/words.json")  # fmt: skip


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("fault", DAMAGE)
def test_a_damaged_output_is_found_told_and_made_again(kitchen, output, fault):
    before = contents(kitchen().run().folder)
    stage, _, name = output.partition("/")
    run = kitchen()
    DAMAGE[fault](run.folder / output)
    assert run.plan() == KEPT | {stage: "repair"}
    assert f"{name} is not what was written" in run.why(stage)
    run.run()
    assert run.ran == [stage]
    assert contents(run.folder) == before
    assert any(f"{name} is not what was written" in line for line in run.said)
    assert f"stage {stage}: all its outputs are what they were" in run.said
    if fault != "delete":  # what was there is set aside
        assert any(p.is_file() for p in (run.folder / "aside").rglob("*"))
    assert kitchen().plan() == KEPT


@pytest.mark.parametrize(
    "fault", ["delete", "empty", "flip", "cut", "list", "other format", "another stage's number"]
)
@pytest.mark.parametrize("stage", ALL)
def test_a_damaged_record_is_told_and_its_stage_runs_again(kitchen, stage, fault):
    before = contents(kitchen().run().folder)
    run = kitchen()
    path = run.folder / stage / "done.json"
    record = json.loads(path.read_text())
    {
        "delete": path.unlink,
        "empty": lambda: path.write_text(""),
        "flip": lambda: flip(path),
        "cut": lambda: path.write_bytes(path.read_bytes()[:40]),
        "list": lambda: path.write_text("[3]"),
        "other format": lambda: path.write_text(json.dumps(record | {"format": 99})),
        "another stage's number": lambda: path.write_text(json.dumps(record | {"seconds": 99})),
    }[fault]()
    assert run.plan()[stage] == "run"
    assert ("done.json is damaged" in run.why(stage)) == (fault != "delete")
    run.run()
    assert run.ran == [stage]  # what the others read is what it was
    assert contents(run.folder) == before
    assert kitchen().plan() == KEPT


def test_a_record_of_an_earlier_version_is_told(kitchen):
    run = kitchen().run()
    (run.folder / "bread" / "done.json").write_text(json.dumps({"result": {}, "seconds": 3.0}))
    assert "earlier version, which did not note what it had written" in kitchen().why("bread")


def test_a_strange_file_in_a_stages_folder_is_set_aside(kitchen):
    """In a model folder it would be read."""
    run = kitchen().run()
    (run.folder / "dough" / "ball" / "weights-2").write_text("more")
    assert "dough         kept, others' files set aside: ball/weights-2" in describe(
        kitchen().stages.plan(), "x"
    )
    again = kitchen().run()
    assert again.ran == []
    assert [p.name for p in (run.folder / "aside").rglob("weights-2")] == ["weights-2"]
    assert not (run.folder / "dough" / "ball" / "weights-2").exists()
    assert any(
        "weights-2 is not what was written (this stage did not write it)" in line
        for line in again.said
    )


@pytest.mark.parametrize(
    ("config", "runs", "why"),
    [
        ({"tasting": {"guests": 5}}, ["tasting"], "config.tasting.guests 4 -> 5"),
        ({"bread": {"heat": 220}}, ["bread", "tasting"], "config.bread.heat 200 -> 220"),
        ({"dough": {"water": 4, "keep": 2}}, ALL, "config.dough.water 3 -> 4"),
        ({"seed": 1}, ALL, "config.seed 0 -> 1"),
        ({"dough": {"water": 3, "keep": 9}}, [], ""),
        ({"unused": 1}, [], ""),
    ],
)
def test_after_a_change_of_config_the_stages_that_depend_on_it_run(kitchen, config, runs, why):
    old = contents(kitchen().run().folder)
    run = kitchen(config)
    assert [name for name, action in run.plan().items() if action == "run"] == runs
    run.run()
    assert run.ran == runs
    if runs:
        assert why in run.said[0]  # before anything is computed
        assert f"reads {runs[0]}" in run.said[0] or len(runs) == 1
        moved = {files.sha256(path) for path in (run.folder / "aside").rglob("*") if path.is_file()}
        assert {digest for name, digest in old.items() if name.partition("/")[0] in runs} <= moved
    fresh = kitchen(config, folder=run.folder.with_name("fresh")).run()
    assert contents(run.folder) == contents(fresh.folder)
    assert kitchen(config).plan() == KEPT


def test_a_change_that_comes_out_the_same_goes_no_further(kitchen):
    """Water beyond five parts makes no other dough, so the bread is kept."""
    kitchen({"dough": {"water": 6, "keep": 2}}).run()
    run = kitchen({"dough": {"water": 7, "keep": 2}})
    assert run.plan() == dict.fromkeys(ALL, "run")
    run.run()
    assert run.ran == ["dough"]
    assert sum("kept: what it reads has come out as it was" in line for line in run.said) == 2


def test_a_raised_version_runs_its_stage_again(kitchen):
    kitchen().run()
    run = kitchen(versions={"bread": 2})
    assert run.why("bread") == "version of the algorithm 1 -> 2"
    assert run.run().ran == ["bread", "tasting"] or run.ran == ["bread"]  # the loaf is the same
    assert run.stages.record("bread")["version"] == 2


def test_another_file_of_the_users_is_found_by_its_content(kitchen, flour):
    kitchen().run()
    os.utime(flour, (0, 0))
    assert kitchen().plan() == KEPT
    flour.write_text("oat")
    run = kitchen()
    assert "the content of flour" in run.why("dough")
    assert run.run().ran == ALL


def test_a_function_of_the_users_own_is_a_part_of_the_key(tmp_path, flour, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "our_sourdough.py").write_text("def rise(): pass\n")
    config = {"bread": {"heat": 200, "fn": "our_sourdough:rise"}}
    Kitchen(tmp_path / "run", flour, config).run()
    assert Kitchen(tmp_path / "run", flour, config).plan() == KEPT
    (tmp_path / "our_sourdough.py").write_text("def rise(): return 2\n")
    run = Kitchen(tmp_path / "run", flour, config)
    assert run.plan() == {"dough": "keep", "bread": "run", "tasting": "run"}
    assert run.why("bread") == "the source of our_sourdough has changed"


def test_a_copied_folder_is_its_own_and_a_moved_one_goes_on(kitchen, tmp_path, monkeypatch):
    kitchen().run()
    original, copy = tmp_path / "run", tmp_path / "far" / "copy"
    shutil.copytree(original, copy)
    before = contents(original)
    for path in original.rglob("*"):
        if path.is_file():
            path.write_text("other")
    monkeypatch.chdir(copy.parent)
    assert kitchen(folder=Path("copy")).plan() == KEPT
    (copy / "tasting" / "words.json").unlink()
    run = kitchen(folder=Path("copy")).run()
    assert run.ran == ["tasting"]
    assert contents(copy) == before
    copy.rename(tmp_path / "moved")
    assert kitchen(folder=tmp_path / "moved").plan() == KEPT
    for path in (tmp_path / "moved").rglob("*.json"):
        assert str(tmp_path) not in path.read_text().replace(str(kitchen().flour), "")


def test_a_missing_file_is_named_before_anything_is_computed(kitchen, flour):
    flour.unlink()
    run = kitchen()
    with pytest.raises(
        ValueError, match=r"flour: .*flour\.txt is not there: put the file or folder there"
    ):
        run.run()
    assert run.ran == []
    assert not run.folder.exists()


def test_a_finished_stage_is_kept_when_the_file_it_was_made_of_is_gone(kitchen, flour):
    kitchen().run()
    flour.unlink()
    run = kitchen().run()
    assert run.ran == []
    assert "is not there any more" in run.said[0]
    with pytest.raises(ValueError, match="flour"):
        kitchen({"seed": 3}).run()


def test_a_file_that_changes_while_its_stage_runs_is_refused(kitchen, flour):
    run = kitchen()
    whole = run.dough

    def appended(folder: str) -> dict:
        result = whole(folder)
        flour.write_text("rye and a line more")
        return result

    run.dough = appended
    run.stages = Stages(run.folder, run._stages(), say=run.said.append)
    with pytest.raises(ValueError, match=r"flour .* changed while the stage dough ran"):
        run.run()
    assert not (run.folder / "dough" / "done.json").exists()


# ------------------------------------------------------------------------------------- stages with checkpoints


class Oven:
    """A stage of four steps with checkpoints after each; it can be stopped, and writes its result from the last."""

    def __init__(self, folder: Path, heat: int = 200, stop: int | None = None, allow: bool = False):
        self.folder, self.heat, self.stop, self.ran, self.said = folder, heat, stop, [], []
        stage = Stage("bake", self.bake, {"bake": {"heat": heat}})
        self.stages = Stages(folder, [stage], allow_change=allow, say=self.said.append)

    def bake(self, folder: str) -> dict:
        import numpy as np

        with Checkpoints(Path(folder) / "checkpoints", keep=2) as saved:
            done, crust = saved.newest_good() or 0, np.zeros(2, np.float32)
            if done:
                crust = np.asarray(saved.restore(done, crust)[0])
            log = Path(folder) / "metrics.jsonl"
            for step in range(done, 4):
                self.ran.append(step)
                crust = crust + self.heat
                files.append_line(log, {"step": step + 1})
                saved.save(step + 1, crust)
                if self.stop == step + 1:
                    saved.wait()
                    raise KeyboardInterrupt
        (Path(folder) / "crust").write_text(str(crust.tolist()))
        return {"crust": str(Path(folder) / "crust")}


def test_a_damaged_output_is_made_again_from_the_newest_checkpoint(tmp_path):
    Oven(tmp_path / "run").stages.run()
    before = records.outputs(tmp_path / "run" / "bake")
    (tmp_path / "run" / "bake" / "crust").write_text("")
    again = Oven(tmp_path / "run")
    again.stages.run()
    assert again.ran == []
    assert any("made again from its checkpoint of step 4" in line for line in again.said)
    assert records.outputs(tmp_path / "run" / "bake") == before


@pytest.mark.parametrize("lost", ["metrics.jsonl", "checkpoints"])
def test_what_no_checkpoint_gives_back_is_made_from_the_beginning(tmp_path, lost):
    Oven(tmp_path / "run").stages.run()
    folder = tmp_path / "run" / "bake"
    crust = (folder / "crust").read_text()
    if lost == "checkpoints":
        for path in folder.rglob("checkpoints/[0-9]*/**/*"):
            if path.is_file():
                path.write_bytes(b"")
        (folder / "crust").write_text("")
    else:
        (folder / lost).unlink()
    again = Oven(tmp_path / "run")
    again.stages.run()
    assert again.ran == [0, 1, 2, 3]
    assert (folder / "crust").read_text() == crust
    assert [step.action for step in Oven(tmp_path / "run").stages.plan()] == ["keep"]


def test_half_done_and_changed_is_refused_with_the_key_named(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Oven(tmp_path / "run", stop=2).stages.run()
    with pytest.raises(
        ValueError, match=r"half done \(checkpoint of step 2\).*config\.bake\.heat 200 -> 300"
    ):
        Oven(tmp_path / "run", heat=300).stages.plan()
    same = Oven(tmp_path / "run")
    assert [step.action for step in same.stages.plan()] == ["resume"]
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    same.stages.run()
    assert same.ran == [2, 3]
    assert not (tmp_path / "run" / "bake" / "begun.json").exists()
    failing = Oven(tmp_path / "copy", heat=300, allow=True)
    failing.stages._stages["bake"] = dataclasses.replace(
        failing.stages._stages["bake"], work=lambda folder: 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        failing.stages.run()
    assert [step.action for step in Oven(tmp_path / "copy").stages.plan()] == [
        "resume"
    ]  # nothing was changed yet
    allowed = Oven(tmp_path / "copy", heat=300, allow=True)
    allowed.stages.run()
    assert allowed.ran == [2, 3]
    assert (tmp_path / "copy" / "bake" / "crust").read_text() == "[1000.0, 1000.0]"
    assert "with something else from there on: config.bake.heat 200 -> 300" in allowed.said[0]


def test_interrupted_before_its_first_checkpoint_a_changed_stage_begins_anew(tmp_path):
    """Nothing that was computed is lost, so nothing is refused."""
    oven = Oven(tmp_path / "run")
    oven.bake = None  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        Stages(
            tmp_path / "run",
            [Stage("bake", oven.bake, {"bake": {"heat": 200}})],
            say=oven.said.append,
        ).run()  # pyright: ignore[reportArgumentType]
    changed = Oven(tmp_path / "run", heat=300)
    changed.stages.run()
    assert changed.ran == [0, 1, 2, 3]


def test_what_a_killed_write_left_is_gone_when_its_stage_goes_on(tmp_path):
    """A power cut in the middle of `files.written` leaves a file that nobody reads, at any depth."""
    with pytest.raises(KeyboardInterrupt):
        Oven(tmp_path / "run", stop=2).stages.run()
    inner = tmp_path / "run" / "bake" / "inner"
    inner.mkdir()
    for folder in (inner, inner.parent):
        (folder / ".crust.r2em6lh5.tmp").write_text("[4")
    oven = Oven(tmp_path / "run")
    oven.stages.run()
    assert oven.ran == [2, 3]
    assert not [p for p in (tmp_path / "run").rglob("*.tmp") if p.name.startswith(".")]


# --------------------------------------------------------------------------------------------------------- progress


def test_stages_are_numbered_and_the_time_left_is_told_from_what_ran(tmp_path):
    said: list[str] = []
    stages = [
        Stage(name, lambda folder: {}, cost=cost)
        for name, cost in (("a", 1.0), ("b", 600.0), ("c", 1.0))
    ]
    run = Stages(tmp_path / "run", stages, say=said.append)
    run.stage("a")
    assert said == ["== 1 of 3: a"]  # nothing is known yet
    path = tmp_path / "run" / "a" / "done.json"
    record, _ = records.read(path)
    assert record is not None
    records.write(path, record | {"seconds": 2.0})
    run.stage("b")
    assert said[-1] == "== 2 of 3: b  (about 20 min to the end)"


def test_nothing_is_written_by_a_plan(tmp_path, flour):
    run = Kitchen(tmp_path / "run", flour)
    assert run.plan() == dict.fromkeys(ALL, "run")
    assert not (tmp_path / "run").exists()
    assert describe(run.stages.plan(), "x") == "3 stages in x: dough, bread, tasting"


def test_harmless_keys_are_left_out_at_every_depth():
    assert without({"a": {"keep": 1, "b": {"keep": 2, "c": 3}}}, ("keep",)) == {
        "a": {"b": {"c": 3}}
    }


# ------------------------------------------------------------------------------------------- a refusal costs nothing


class Refusing(Kitchen):
    """A kitchen that takes no heat above 250."""

    def bread(self, folder: str) -> dict:
        if self.config["bread"]["heat"] > 250:
            (Path(folder) / "metrics.jsonl").touch()  # opened and not yet written
            raise ValueError("config.bread.heat=900 burns it")
        return super().bread(folder)


def test_a_config_that_a_stage_refuses_costs_nothing_of_what_was_done(tmp_path, flour):
    Refusing(tmp_path / "run", flour).run()
    before = contents(tmp_path / "run")
    mistaken = Refusing(tmp_path / "run", flour, {"bread": {"heat": 900}})
    with pytest.raises(ValueError, match="burns it"):
        mistaken.run()
    assert "back in its place" in mistaken.said[-1]
    assert contents(tmp_path / "run") == before
    assert not (tmp_path / "run" / "aside").exists()
    corrected = Refusing(tmp_path / "run", flour).run()
    assert corrected.ran == []


def test_what_a_failed_stage_has_written_is_not_taken_for_nothing(tmp_path, flour):
    Kitchen(tmp_path / "run", flour).run()
    failing = Kitchen(tmp_path / "run", flour, {"bread": {"heat": 210}})
    whole = failing.bread

    def burnt(folder: str) -> dict:
        whole(folder)
        raise OSError("no power")

    failing.bread = burnt
    failing.stages = Stages(failing.folder, failing._stages(), say=failing.said.append)
    with pytest.raises(OSError, match="no power"):
        failing.run()
    assert len([*(tmp_path / "run" / "aside").rglob("loaf")]) == 1
    assert (tmp_path / "run" / "bread" / "loaf").is_file()


def test_another_path_that_leads_nowhere_is_a_slip_and_not_a_file_that_is_gone(kitchen, flour):
    kitchen().run()
    mistyped = kitchen()
    mistyped.flour = flour.with_name("fluor.txt")
    with pytest.raises(
        ValueError, match=r"flour of stage dough: .*fluor\.txt is not there.* correct the path"
    ):
        mistyped.run()
    assert kitchen().plan() == KEPT
