"""A power cut at any moment: what is called done is on the disk, and the same command ends as if nothing had been.

`recorder.Recorder` knows what was synced and builds the folder that a cut leaves. The real programs run under it in
``recorded.py``; ``power.py`` cuts a real file system, where the machine allows to mount one.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.storyland import tokenizer as storyland_assets
from rlhf_jax.data.text import load_tokenizer
from rlhf_jax.models.config import gpt2
from rlhf_jax.models.heads import language_model
from rlhf_jax.run import compiling, files, metrics, networks
from rlhf_jax.run.checkpoint import Checkpoints
from rlhf_jax.run.console import Screen
from tests.reliability import kill, power, recorded
from tests.reliability.recorder import Recorder, tree

# ------------------------------------------------------------------------------------------------ the real programs

CUTS = "sft:2,reward_model:1,ppo:1"


@pytest.fixture(scope="module")
def found() -> dict:
    """What ``recorded.py`` finds: three programs in one process of one device."""
    process = kill.start(
        [kill.sys.executable, "-m", "tests.reliability.recorded", "--json", f"--cuts={CUTS}"]
    )
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output[-3000:]
    return json.loads(output.splitlines()[-1])


@pytest.mark.parametrize("program", recorded.PROGRAMS)
def test_what_a_final_name_speaks_of_is_on_the_disk_when_it_is_given(found, program):
    assert found[program]["moments"] > 60  # seals, models, the log and the result were seen
    assert found[program]["unsynced"] == []


@pytest.mark.parametrize("program", recorded.PROGRAMS)
def test_after_a_cut_at_each_moment_seals_models_and_results_are_what_they_say(found, program):
    assert found[program]["broken"] == []


@pytest.mark.parametrize("program", recorded.PROGRAMS)
def test_after_a_cut_the_same_command_ends_with_the_same_bits(found, program):
    ends = found[program]["ends"]
    assert len(ends) == int(dict(pair.split(":") for pair in CUTS.split(","))[program])
    assert [found for found in ends.values() if found] == []


def test_a_file_system_that_is_cut_while_mounted(tmp_path):
    """One cut of a real ext4, in the middle of SFT."""
    try:
        rows = power.cut_program("sft", tmp_path, cuts=1, quickly=True)
    except power.NotAllowedError as refused:
        pytest.skip(str(refused))
    assert [(row.broken, row.differences) for row in rows] == [([], [])]


# ----------------------------------------------------------------------------------------------- piece by piece


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    (tmp_path / "disk").mkdir()
    with Recorder(tmp_path / "disk", tmp_path / "store") as recorder:
        yield recorder
    recorder.close()


def cuts(recorder: Recorder, tmp_path: Path) -> Iterator[Path]:
    """The folder after a cut, for each moment."""
    for moment in range(len(recorder.events) + 1):
        yield recorder.build(moment, tmp_path / f"cut-{moment}")


def save_four_times(root: Path) -> None:
    with Checkpoints(root, keep=2) as checkpoints:
        for step in range(1, 5):
            checkpoints.save(step, {"w": jnp.full(5, float(step))}, extra={"step": step})


def test_of_four_saves_one_is_good_at_every_moment_after_the_first_seal(recorder, tmp_path):
    save_four_times(recorder.root / "run")
    newest = []
    for cut in cuts(recorder, tmp_path):
        for seal in cut.glob("run/manifests/*.json"):
            assert list(recorded.broken_seal(seal)) == []
        with Checkpoints(cut / "run") as checkpoints:
            step = checkpoints.newest_good()
            newest.append(step or 0)
            if step:
                state, extra = checkpoints.restore(step, {"w": jnp.zeros(5)})
                assert extra == {"step": step}
                assert np.array_equal(state["w"], np.full(5, float(step)))
    assert newest == sorted(newest)
    assert newest[-1] == 4


def test_a_step_that_is_not_synced_is_seen_by_these_checks(recorder, tmp_path, monkeypatch):
    """With what the checkpoints did before: renamed and sealed, and never asked for on the disk."""
    monkeypatch.setattr(files, "sync_tree", lambda folder: None)
    early: list[str] = []
    recorder.on_rename = lambda event: early.extend(
        recorded.too_early(recorder, event, tmp_path / "look")
    )
    save_four_times(recorder.root / "run")
    last = recorder.build(len(recorder.events), tmp_path / "last")
    assert all(any(recorded.broken_seal(seal)) for seal in last.glob("run/manifests/*.json"))
    assert any(line.startswith("the seal of step 1: ") for line in early)
    with (
        Checkpoints(last / "run") as checkpoints,
        pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"),
    ):
        checkpoints.newest_good()


def test_a_step_put_aside_is_at_each_moment_in_one_of_both_places(recorder, tmp_path):
    root = recorder.root / "run"
    save_four_times(root)
    file = max((root / "4").rglob("d/*"), key=lambda p: p.stat().st_size)
    file.write_bytes(b"damaged")
    files.sync(file)
    begun = len(recorder.events)
    with Checkpoints(root) as checkpoints:
        assert checkpoints.newest_good() == 3
    for moment in range(begun, len(recorder.events) + 1):
        cut = recorder.build(moment, tmp_path / f"cut-{moment}") / "run"
        assert (cut / "4").is_dir() or [p for p in cut.glob("quarantine/4-*") if p.is_dir()]
        with Checkpoints(cut) as checkpoints:
            assert checkpoints.newest_good() == 3


@pytest.mark.parametrize("shape", ["new", "in the place of another"])
def test_a_model_folder_is_whole_or_the_one_of_before(recorder, tmp_path, shape):
    tokenizer = load_tokenizer(storyland_assets.assets())
    model = language_model(gpt2(len(tokenizer), 32, 1, 8, 1))
    folder, wholes = recorder.root / "model", []
    for seed in range(1 if shape == "new" else 2):
        begun = len(recorder.events)
        networks.save_network(
            folder, networks.Network(model, model.init(compiling.jax.random.key(seed)), tokenizer)
        )
        wholes.append(tree(folder))
    for moment in range(begun, len(recorder.events) + 1):
        cut = recorder.build(moment, tmp_path / f"cut-{moment}")
        files.settle_folder(cut / "model")
        here = tree(cut / "model") if (cut / "model").exists() else None
        assert here in wholes or (here is None and shape == "new")
    assert here == wholes[-1]
    assert len(here) >= 6


def test_lines_of_a_log_that_a_checkpoint_counts_on_are_there(recorder, tmp_path):
    with metrics.StageLog(
        recorder.root / "run", "sft", total=2, screen=Screen(stream=io.StringIO())
    ) as log:
        log(1, {"loss": 1.0})
        log.flush()
        flushed = len(recorder.events)
        log(2, {"loss": 2.0})
    before = recorder.build(flushed, tmp_path / "before") / "run" / "metrics.jsonl"
    after = recorder.build(len(recorder.events), tmp_path / "after") / "run" / "metrics.jsonl"
    assert [row["step"] for row in metrics.read(before)] == [1]
    assert [row["step"] for row in metrics.read(after)] == [1, 2]
    begun = len(recorder.events)
    metrics.drop_after(recorder.root / "run" / "metrics.jsonl", "sft", 1)
    for moment in range(begun, len(recorder.events) + 1):
        cut = recorder.build(moment, tmp_path / f"cut-{moment}") / "run" / "metrics.jsonl"
        assert [row["step"] for row in metrics.read(cut)] in ([1, 2], [1])
    assert [row["step"] for row in metrics.read(cut)] == [1]


def test_the_recorder_keeps_what_was_synced_and_no_more(recorder, tmp_path):
    root = recorder.root
    (root / "never").write_text("x")
    (root / "file").write_text("one")
    files.sync(root / "file")
    (root / "file").write_text("two")
    files.sync(root)
    os.rename(root / "file", root / "renamed")
    (root / "late").write_text("y")
    files.sync(root / "late")
    assert tree(recorder.build(len(recorder.events), tmp_path / "cut")) == {
        "never": b"",
        "file": b"one",
    }
    files.sync(root)
    assert tree(recorder.build(len(recorder.events), tmp_path / "cut2")) == {
        "never": b"", "renamed": b"one", "late": b"y",
    }  # fmt: skip


def test_power_says_so_where_nothing_can_be_mounted(tmp_path):
    environ = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(kill.ROOT)}
    ended = subprocess.run(
        [kill.sys.executable, "-m", "tests.reliability.power", "--programs=sft"], cwd=kill.ROOT, env=environ,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == power.NOT_ALLOWED
    assert "needs root" in ended.stderr
    assert "recorded" in ended.stderr
