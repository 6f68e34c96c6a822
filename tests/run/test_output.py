"""A run outlives its console, and goes on without a home, a cache or an encoding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_jax.run import cache, devices

ROOT = Path(__file__).parents[2]
PROGRAM = """
from pathlib import Path
import time
from rlhf_jax.run.cli import main
from rlhf_jax.run.console import Screen
from rlhf_jax.run.metrics import StageLog

def run(config, workdir):
    with StageLog(workdir, "toy", total=config.steps, show=("loss",), screen=Screen(every=0.0)) as log:
        for step in range(config.steps):
            if step == 3:
                time.sleep(0.5)  # whoever reads has gone
            log(step + 1, {"loss": 1.0 / (step + 1)})
    print("caf\\u00e9 \\u4f60 and an end " + "x" * 100_000)
    Path(workdir, "result.txt").write_text("done")

if __name__ == "__main__":
    main(run)
"""
CONFIG = """
from ml_collections import ConfigDict

def get_config(arg=""):
    return ConfigDict({"steps": 200})
"""


@pytest.fixture
def program(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "c.py").write_text(CONFIG)
    return f"{sys.executable} program.py --config=c.py --workdir=run"


def shell(folder: Path, command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    known = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=known | environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("{} | head -n 1; exit ${{PIPESTATUS[0]}}", "standard output cannot be written any more (Broken pipe)"),
        ("{} <&- >&- 2>&-", ""),
        ("{} 2>&1 | head -n 1; exit ${{PIPESTATUS[0]}}", ""),
        ("{} > /dev/full", "standard output cannot be written any more (No space left on device)"),
        ("LC_ALL=C PYTHONIOENCODING=ascii {} | cat", ""),
    ],
)  # fmt: skip
def test_a_run_goes_on_when_nobody_reads_it(tmp_path, program, form, said):
    done = shell(tmp_path, form.format(program))
    assert done.returncode == 0, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert len(done.stderr.splitlines()) <= 1
    assert (tmp_path / "run" / "result.txt").read_text() == "done"
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 200
    assert all(line.startswith("{") for line in lines)


def test_a_run_needs_no_home(tmp_path, program):
    """Not in the environment, and not a folder."""
    for home in ({}, {"HOME": "/dev/null"}):
        done = shell(tmp_path, f"{program} --overwrite", **home)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("given", ["", "relative/cache"])
def test_a_cache_is_where_the_user_keeps_caches(tmp_path, monkeypatch, given):
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert cache.folder("compiled") == tmp_path / "home" / ".cache" / "rlhf_jax" / "compiled"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert cache.folder("compiled") == tmp_path / "elsewhere" / "rlhf_jax" / "compiled"
    assert {p.name for p in tmp_path.iterdir()} == {"home", "elsewhere"}


def test_no_cache_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for home, given in (
        (str(tmp_path / "file"), ""),
        ("/dev/null", ""),
        ("/x", str(tmp_path / "file")),
    ):
        monkeypatch.setenv("HOME", home)
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert cache.folder("compiled") is None

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", nowhere)
    assert cache.folder("compiled") is None
    assert devices.start((-1, 1, 1)).size >= 1
