"""The wheel holds tokenizer and base models and works without a checkout; set-up chooses well and says so."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from rlhf_jax.run import programs

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "rlhf_jax" / "data" / "storyland" / "assets"
PROGRAMS = ("experiments", "configs")


def run(*argv: object, cwd: Path, **environ: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environ
    done = subprocess.run(
        [str(a) for a in argv], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that no build folder is left in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (
        "pyproject.toml",
        "setup.py",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "rlhf_jax",
        *PROGRAMS,
    ):
        run("cp", "-r", ROOT / name, source, cwd=ROOT)
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        out,
        source,
        cwd=out,
    )
    (path,) = out.glob("rlhf_jax-*.whl")
    return path


def test_the_wheel_holds_every_module_and_asset_and_nothing_else(wheel):
    names = {
        n for n in zipfile.ZipFile(wheel).namelist() if not n.split("/")[0].endswith(".dist-info")
    }
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "rlhf_jax").rglob("*.py")}
    assets = {p.relative_to(ROOT).as_posix() for p in ASSETS.rglob("*") if p.is_file()}
    templates = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "rlhf_jax").rglob("*")
        if p.suffix in {".jinja", ".css"}
    }
    assert "rlhf_jax/pages/page.html.jinja" in templates
    programs = {
        f"rlhf_jax/programs/{p.relative_to(ROOT).as_posix()}"
        for folder in PROGRAMS
        for p in (ROOT / folder).rglob("*.py")
    }
    assert modules | assets | templates | programs <= names
    assert {n for n in names if n.startswith("rlhf_jax/programs/")} == programs
    assert not {n for n in names if not n.startswith("rlhf_jax/")}
    assert not {n for n in names if "__pycache__" in n or n.endswith(".pyc")}


def test_the_wheel_carries_the_licence(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [n for n in archive.namelist() if n.endswith("/LICENSE")]
    assert "Apache License" in archive.read(name).decode()[:300]


CHECK = """
import json, sys
from importlib import resources
import rlhf_jax
assert rlhf_jax.__file__.startswith(sys.argv[1]), rlhf_jax.__file__
assets = resources.files("rlhf_jax.data.storyland") / "assets"
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_str((assets / "tokenizer.json").read_text(encoding="utf-8"))
text = "Write a story about a fox."
assert tokenizer.decode(tokenizer.encode(text).ids) == text
from safetensors import safe_open
for size in ("base_small", "base_large"):
    with resources.as_file(assets / size) as folder:
        (path,) = folder.glob("*.safetensors")
        with safe_open(path, "numpy") as weights:
            assert len(list(weights.keys())) > 3
        json.loads((folder / "config.json").read_text())
from rlhf_jax.evaluation.report import render_report
assert "<title>rlhf_jax: report of a run</title>" in render_report({})
print("ok", rlhf_jax.__version__)
"""


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel, installed where a program finds it by PYTHONPATH."""
    target = tmp_path_factory.mktemp("installed") / "site"
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        target,
        wheel,
        cwd=target.parent,
    )
    return target


def test_the_installed_wheel_works_outside_a_checkout(installed, tmp_path):
    out = run(sys.executable, "-c", CHECK, installed, cwd=tmp_path, PYTHONPATH=str(installed))
    assert out.startswith("ok ")


def test_the_installed_command_trains_what_the_checkout_trains(installed, tmp_path):
    """``rlhf-jax sft --config=sft/storyland`` in an empty folder, and the script of the checkout: the same bytes."""
    data = tmp_path / "data"
    command = (sys.executable, installed / "bin" / "rlhf-jax")
    outside = {"PYTHONPATH": str(installed), "XLA_FLAGS": ""}
    run(
        *command,
        "prepare_data",
        "--config=data/storyland:smoke",
        f"--workdir={data}",
        cwd=tmp_path,
        **outside,
    )
    flags = [
        f"--config.demonstrations={data / 'demonstrations.jsonl'}",
        f"--config.validation={data / 'demonstrations_validation.jsonl'}",
        "--config.epochs=1",
    ]
    (tmp_path / "elsewhere").mkdir()
    run(
        *command,
        "sft",
        "--config=sft/storyland:smoke",
        "--workdir=run",
        *flags,
        cwd=tmp_path / "elsewhere",
        **outside,
    )
    run(
        sys.executable, ROOT / "experiments" / "sft.py", f"--config={ROOT}/configs/sft/storyland.py:smoke",
        f"--workdir={tmp_path / 'run'}", *flags, cwd=ROOT, PYTHONPATH=str(ROOT), XLA_FLAGS="",
    )  # fmt: skip
    for name in ("config.json", "sft.json", "epoch-1/model.safetensors"):
        assert (tmp_path / "elsewhere" / "run" / name).read_bytes() == (
            tmp_path / "run" / name
        ).read_bytes(), name


def test_the_command_names_its_programs(capsys):
    with pytest.raises(SystemExit, match="0"):
        programs.main(["--help"])
    assert "evaluate, instructgpt, ppo" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        programs.main(["pppo"])
    assert "did you mean 'ppo'" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- set-up


@pytest.fixture
def setup_env(monkeypatch):
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in (
        "ACCELERATOR",
        "COLAB_RELEASE_TAG",
        "TPU_ACCELERATOR_TYPE",
        "TPU_WORKER_ID",
        "COLAB_TPU_ADDR",
    ):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.mark.parametrize("wanted", ["cpu", "cuda", "tpu", "CPU"])
def test_accelerator_override_wins(setup_env, monkeypatch, wanted):
    monkeypatch.setenv("ACCELERATOR", wanted)
    assert setup_env.choose_accelerator() == (wanted.lower(), "ACCELERATOR says so")


def test_an_unknown_accelerator_is_refused_by_name(setup_env, monkeypatch):
    monkeypatch.setenv("ACCELERATOR", "npu")
    with pytest.raises(SystemExit, match="ACCELERATOR=npu must be one of cpu, cuda, tpu"):
        setup_env.choose_accelerator()


def test_the_device_decides_when_nobody_does(setup_env, monkeypatch):
    monkeypatch.setattr(setup_env, "has_tpu", lambda: False)
    monkeypatch.setattr(setup_env.Path, "exists", lambda self: str(self) == "/dev/nvidia0")
    assert setup_env.choose_accelerator()[0] == "cuda"
    monkeypatch.setattr(setup_env.Path, "exists", lambda self: False)
    monkeypatch.setattr(setup_env, "succeeds", lambda *command: False)
    assert setup_env.choose_accelerator()[0] == "cpu"
    monkeypatch.setattr(setup_env, "has_tpu", lambda: True)
    assert setup_env.choose_accelerator()[0] == "tpu"


def installs(module, monkeypatch, tmp_path, *extras: str) -> list[list[str]]:
    """The pip commands one run of set-up gives, and the constraints each was given."""
    calls = []

    def run(argv, **_):
        constraint = (
            Path(argv[argv.index("--constraint") + 1]).read_text() if "--constraint" in argv else ""
        )
        calls.append([*argv, constraint])
        return subprocess.CompletedProcess(argv, 0)

    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "venv_python", lambda: Path("python"))
    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["setup_env.py", f"--extras={','.join(extras)}"])
    module.main()
    return calls


def test_set_up_installs_again_only_when_something_changed(
    setup_env, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("ACCELERATOR", "cpu")
    (call,) = installs(setup_env, monkeypatch, tmp_path)
    assert any(
        part.endswith("[gguf]") for part in call
    )  # a command of the README reads a GGUF file
    assert "accelerator: cpu" in capsys.readouterr().out
    assert not installs(setup_env, monkeypatch, tmp_path)
    (call,) = installs(setup_env, monkeypatch, tmp_path, "dev")
    assert any(part.endswith("[dev]") for part in call)
    assert not installs(setup_env, monkeypatch, tmp_path)  # what has more is good enough
    monkeypatch.setenv("ACCELERATOR", "cuda")
    (call,) = installs(setup_env, monkeypatch, tmp_path, "dev")
    assert any(part.endswith("[cuda,dev]") for part in call)
    monkeypatch.setattr(setup_env, "pyproject_hash", lambda: "changed")
    assert len(installs(setup_env, monkeypatch, tmp_path)) == 1


def test_what_set_up_always_installs_is_in_the_developers_extra_too(setup_env):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    (inner,) = [name for name in extras["dev"] if name.startswith("rlhf_jax[")]
    assert set(inner.removeprefix("rlhf_jax[").removesuffix("]").split(",")) >= setup_env.ALWAYS
    assert set(extras) >= setup_env.ALWAYS


def test_colab_keeps_its_own_jax(setup_env, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    monkeypatch.setattr(setup_env, "choose_accelerator", lambda: ("cuda", "test"))
    (tmp_path / "pyproject.toml").write_text("")
    (call,) = installs(setup_env, monkeypatch, tmp_path)
    assert call[0] == sys.executable
    assert f"jax=={setup_env.version('jax')}\njaxlib=={setup_env.version('jaxlib')}" in call[-1]
    assert not any("cuda" in part for part in call[:-1])
    assert "never upgraded" in capsys.readouterr().out


def test_make_says_what_is_missing_when_there_is_no_python():
    done = subprocess.run(
        ["make", "run", "PYTHON="], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "Python 3.11 or newer is needed" in done.stderr


def test_ci_runs_the_tests_and_the_small_pipeline():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert "set -euo pipefail" in lines
    assert lines[-2:] == ["make test", "make smoke"]
