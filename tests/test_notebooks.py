"""The notebooks run from top to bottom at smoke size, each in its own kernel, and are committed without outputs."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.test_packaging import installed, wheel  # noqa: F401

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))
PICTURES = {"01_sft": 3, "02_reward_model": 3, "03_ppo": 3, "04_swap_a_loss": 2}


def name_of(path: Path) -> str:
    return path.stem


def test_there_is_a_notebook_for_each_stage():
    assert [p.stem for p in NOTEBOOKS] == list(PICTURES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebooks_are_committed_without_outputs(path: Path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_notebooks_share_one_set_up_cell_for_a_colab_tpu():
    first = [
        next(c.source for c in nbformat.read(p, as_version=4).cells if c.cell_type == "code")
        for p in NOTEBOOKS
    ]
    assert len(set(first)) == 1
    assert "setup_env.py" in first[0]
    assert "COLAB_RELEASE_TAG" in first[0]
    assert "TPU" in first[0]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebooks_import_the_package_alone(path: Path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert "from experiments" not in cell.source
            assert "from configs" not in cell.source


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all: a notebook finds the stages that an earlier one has done."""
    return tmp_path_factory.mktemp("colabs") / "runs"


# The client warns about sockets and event loops of its own; what the cells warn about is in their outputs.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebook_runs_and_draws(path: Path, runs: Path, installed: Path):  # noqa: F811
    """From the installed package, in a folder without a checkout, on eight fake devices."""
    notebook = nbformat.read(path, as_version=4)
    env = os.environ | {
        "RLHF_JAX_SMOKE": "1",
        "RLHF_JAX_RUNS": str(runs),
        "PYTHONPATH": str(installed),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "IPYTHONDIR": str(runs.parent / "ipython"),
    }
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(runs.parent)}},
    )
    client.execute(env=env)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == PICTURES[path.stem]
    assert all(len(base64.b64decode(picture)) > 3000 for picture in pictures)
    told = "".join(o.get("text", "") for o in outputs if o.get("name") == "stderr")
    assert "Warning" not in told, told
