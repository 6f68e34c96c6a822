"""Short versions of damage.py, disk.py and signals.py, on the real SFT command; and a secret looked for everywhere."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import sft
from rlhf_jax.evaluation.report import write_report
from rlhf_jax.run import cli
from rlhf_jax.run.secrets import REDACTED
from tests.evaluation import sample_run
from tests.reliability import damage, disk, runs


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run that nothing happened to, and one that SIGTERM stopped in its third epoch."""
    folder = tmp_path_factory.mktemp("runs")
    source = runs.inputs(folder / "inputs")
    whole = runs.command("sft", runs.sft_flags(source, folder / "whole"))
    assert whole.status == 0, whole.err
    stopped = runs.stop_early(source, folder / "cut")
    return SimpleNamespace(
        folder=folder, source=source, expected=runs.outcome(folder / "whole"), stopped=stopped
    )


def copy(ran: SimpleNamespace, place: Path) -> Path:
    return Path(shutil.copytree(ran.folder / "cut", place))


def here(ran: SimpleNamespace, run: Path, capfd) -> runs.Ended:
    """The command in this process, which saves the time of its imports."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(sft.run, argv=runs.sft_flags(ran.source, run))
    return runs.Ended(int(str(ended.value.code)), *capfd.readouterr())


def test_sigterm_saves_at_the_step_boundary_and_says_so(ran):
    older, newest = runs.steps(ran.folder / "cut")
    assert older == 2 * runs.EPOCH_STEPS < newest < runs.EPOCHS * runs.EPOCH_STEPS
    assert ran.stopped.status == 143
    assert f"Stopped (sft at step {newest} of 18). The same command goes on" in ran.stopped.err
    assert "Traceback" not in ran.stopped.err


def test_a_damaged_newest_step_among_things_that_are_no_steps(ran, tmp_path):
    """The step before is chosen, the bad one kept aside, the next saves work, the end is as if nothing had been."""
    run, before = copy(ran, tmp_path / "run"), runs.steps(ran.folder / "cut")
    root = run / "checkpoints"
    damage.flip(max((root / str(before[-1])).rglob("d/*"), key=lambda p: p.stat().st_size))
    (root / "999").mkdir()
    (root / "998").write_text("no folder")
    (root / "18").symlink_to(root / str(before[0]))
    (run / "epoch-3.tmp").mkdir()
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 99, "sta')
    good, note = damage.judge(ran.source, run, ran.expected, True, before)
    assert good, note
    names = {p.name.split("-")[0] for p in (root / "quarantine").iterdir()}
    assert names == {"18", "998", "999", str(before[-1])}


def test_links_in_checkpoints_are_put_aside_and_the_run_refuses_to_restart_from_nothing(
    ran, tmp_path, capfd
):
    run = copy(ran, tmp_path / "run")
    root = run / "checkpoints"
    older, newest = runs.steps(run)
    (root / str(newest)).rename(run / "moved")
    (root / str(newest)).symlink_to(run / "moved")
    file = root / "manifests" / f"{older}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"extra": {"x": 1}}))
    ended = here(ran, run, capfd)
    assert ended.status == 2
    assert f"step {newest} is not used, {newest} is a symbolic link" in ended.err
    assert f"step {older} is not used, its seal was changed" in ended.err
    assert "Error: every checkpoint in" in ended.line
    assert (run / "moved" / "state").is_dir()
    assert {p.name.split("-")[0] for p in (root / "quarantine").iterdir()} == {
        str(newest),
        str(older),
    }


def test_a_full_disk_is_one_clear_line_and_the_same_command_goes_on(ran, tmp_path):
    """In a file system of 600 kB in memory; where none may be mounted, under a limit on the size of files."""
    try:
        good, note = disk.full(ran.source, tmp_path / "small", ran.expected, "600k")
    except RuntimeError:
        good, note = disk.large_files_refused(ran.source, tmp_path / "limited", ran.expected)
    assert good, note


def test_a_disk_that_turned_read_only_is_one_clear_line(ran, tmp_path, capfd):
    run = tmp_path / "small" / "run"
    try:
        with runs.small_disk(tmp_path / "small", "64m"):
            copy(ran, run)
            runs.remount(tmp_path / "small", "ro")
            ended = here(ran, run, capfd)
            assert disk.refused(ended, "Read-only file system"), ended.err
            assert disk.intact(run)
    except RuntimeError as error:
        pytest.skip(f"a file system in memory cannot be mounted here: {error}")


# ---------------------------------------------------------------------------------------------------------- secrets

CANARY = "canary-4711-Qx"
CONFIG = """
from configs import storyland
from rlhf_jax.run.config import apply_arg

def get_config(arg=""):
    config = storyland.sft()
    config.hub_token = "CANARY-default"
    config.db_password = 3
    config.tracker = {"apiKey": "CANARY-group", "credentials": {"user": "CANARY-u", "pair": (("CANARY-p",), "CANARY")}}
    config.mirrors = ("https://me:CANARY-url@example.org/x?access_token=CANARY-query", ("s3://CANARY-user@bucket/y",))
    return apply_arg(config, arg, smoke=storyland.smoke_sft)
""".replace("CANARY", CANARY)
WATCHED = f"""
import runpy, sys
def watch(event, _):
    if event == "pickle.find_class":
        print("UNPICKLED", file=sys.stderr)
sys.addaudithook(watch)
sys.path.insert(0, {str(runs.ROOT)!r})
runpy.run_path({str(runs.ROOT / "experiments" / "sft.py")!r}, run_name="__main__")
"""
PLANTED = {"HF_TOKEN": CANARY, "WANDB_API_KEY": f"{CANARY}-w", "DB_PASSWORD": f"{CANARY}-d"}


def spilled(*places: Path, **texts: str) -> list[str]:
    """Where the canary is: names of files and of texts."""
    files = [p for place in places for p in [place, *place.rglob("*")]]
    found = [
        str(p)
        for p in files
        if CANARY in p.name or (p.is_file() and CANARY.encode() in p.read_bytes())
    ]
    return found + [name for name, text in texts.items() if CANARY in text]


@pytest.fixture(scope="module")
def secret_run(ran, tmp_path_factory) -> SimpleNamespace:
    """The real command with secrets in the environment, in keys, groups, tuples and URLs, and on the command line."""
    folder = tmp_path_factory.mktemp("secret")
    (folder / "secret.py").write_text(CONFIG)
    (folder / "watched.py").write_text(WATCHED)
    flags = runs.sft_flags(
        ran.source, folder / "run", f"--config.hub_token={CANARY}-flag", "--config.epochs=1"
    )
    flags[0] = f"--config={folder}/secret.py:smoke"
    env = runs.environment(**PLANTED, JAX_LOG_COMPILES="1")
    script = os.path.relpath(folder / "watched", runs.ROOT / "experiments")
    return SimpleNamespace(
        folder=folder, run=folder / "run", flags=flags, ended=runs.command(script, flags, env=env)
    )


def test_a_secret_is_in_no_output_of_a_run(secret_run):
    run, ended = secret_run.run, secret_run.ended
    assert ended.status == 0, ended.err
    assert "Compiling" in ended.err  # the most talkative setting
    assert not spilled(run, stdout=ended.out, stderr=ended.err)
    stored = json.loads((run / "config.json").read_text())
    assert (
        stored["hub_token"]
        == stored["tracker"]["apiKey"]
        == stored["tracker"]["credentials"]["user"]
        == REDACTED
    )
    assert stored["mirrors"] == [
        f"https://example.org/x?access_token={REDACTED}",
        ["s3://bucket/y"],
    ]
    page = write_report(
        secret_run.folder / "report.html", {**sample_run.results(), "config": stored}
    )
    assert "redacted" in page.read_text()
    assert not spilled(page)


def test_a_run_unpickles_nothing(secret_run):
    """Models, tokenizer, data, checkpoints and compiled programs: none of them is read with pickle."""
    assert secret_run.ended.status == 0
    assert "UNPICKLED" not in secret_run.ended.err


@pytest.mark.parametrize(
    "flag",
    [
        f"--config.db_password={CANARY}",
        f"--config.hub_tokn={CANARY}",
        f"--hub_token={CANARY}",
        f"--config.model=https://me:{CANARY}@example.org/model",
        f"--config.model=https://{CANARY}@example.org/model",
        f"--config.demonstrations=/nowhere?password={CANARY}",
        f"--config.tracker.apiKey={CANARY}-other",
        f"--overwrite={CANARY}",
    ],
)
def test_no_error_message_holds_a_secret(secret_run, tmp_path, capfd, monkeypatch, flag):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    if "tracker" in flag:  # the run's config is another: both values would be shown
        shutil.copytree(secret_run.run, run)
        flag = f"{flag} --config.seed=1"
    with pytest.raises(SystemExit) as ended:
        cli.main(sft.run, argv=[*secret_run.flags, f"--workdir={run}", *flag.split()])
    said = capfd.readouterr()
    assert ended.value.code == 2
    assert said.err.startswith("Error: ")
    assert len(said.err.splitlines()) == 1
    assert not spilled(tmp_path, stdout=said.out, stderr=said.err)


def test_the_traceback_of_a_bug_holds_no_secret(tmp_path):
    (tmp_path / "bug.py").write_text(
        "from rlhf_jax.run.cli import main\n"
        "def run(config, workdir):\n"
        "    raise RuntimeError(f'{config.hub_token} of https://me:pw@example.org, {config.__class__}')\n"
        "main(run)\n"
    )
    (tmp_path / "secret.py").write_text(CONFIG)
    flags = [
        f"--config={tmp_path}/secret.py",
        f"--workdir={tmp_path}/run",
        f"--config.hub_token={CANARY}-flag",
    ]
    ended = runs.command(os.path.relpath(tmp_path / "bug", runs.ROOT / "experiments"), flags)
    assert ended.status == 1
    assert f"RuntimeError: {REDACTED} of https://example.org" in ended.err
    assert "Traceback" in ended.err
    assert not spilled(tmp_path / "run", stdout=ended.out, stderr=ended.err)


# ---------------------------------------------------------------------------------------------------------- Ctrl-C


def test_ctrl_c_ends_with_130_and_a_second_one_at_once(ran, tmp_path):
    run = tmp_path / "run"
    flags = runs.sft_flags(ran.source, run)
    ended, seconds = runs.signalled(
        "sft", flags, runs.logged(run, 2), signal.SIGINT, signal.SIGINT, pause=0.2
    )
    assert ended.status == 130
    assert seconds < 5
    assert "Traceback" not in ended.err
