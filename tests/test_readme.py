"""The README's examples run as they stand: blocks marked `readme-test`; one with a file name is that file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from configs import storyland as sizes
from experiments import prepare_data
from rlhf_jax.data import text
from rlhf_jax.data.storyland import tokenizer as storyland_assets
from rlhf_jax.models import DecoderConfig, language_model, scalar_model
from rlhf_jax.run import networks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


class Block(NamedTuple):
    """A fenced block: its language, the file it is (empty: it is run), its text."""

    language: str
    file: str
    text: str


def blocks(markdown: str) -> list[Block]:
    found = re.findall(
        r"^```(\w+) readme-test *(\S*)\n(.*?)^```$", markdown, flags=re.MULTILINE | re.DOTALL
    )
    return [Block(*groups) for groups in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which `make run` has been, with models of a few thousand parameters."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("experiments", "configs"):
        (folder / name).symlink_to(ROOT / name)
    for block in blocks(README):
        if block.file:
            (folder / block.file).write_text(block.text, encoding="utf-8")
    run = folder / "runs" / "instructgpt"
    amounts = sizes.data()
    sizes.smoke_data(amounts)
    (run / "data").mkdir(parents=True)
    prepare_data.run(amounts, str(run / "data"))
    tokenizer = text.load_tokenizer(storyland_assets.assets())
    config = DecoderConfig(len(tokenizer), context_length=128, layers=1, width=16, heads=2)
    for name, make in (("ppo_init/epoch-2", language_model), ("reward_model/model", scalar_model)):
        model = make(config)
        (run / name).parent.mkdir()
        networks.save_network(
            run / name, networks.Network(model, model.init(jax.random.key(0)), tokenizer)
        )
    return folder


def test_the_readme_has_its_examples():
    kinds = [(block.language, bool(block.file)) for block in blocks(README)]
    assert kinds == [("python", False), ("python", True), ("bash", False), ("python", False)]
    assert "<!-- results -->" in README


@pytest.mark.parametrize(
    "block", [b for b in blocks(README) if not b.file], ids=lambda b: b.language
)
def test_examples_of_the_readme_run(block: Block, folder: Path):
    env = os.environ | {
        "XLA_FLAGS": "",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    argv = (
        ["bash", "-euc", block.text]
        if block.language == "bash"
        else [sys.executable, "-c", block.text]
    )
    done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    if block.language == "bash":
        assert "dual_clip" in done.stdout
        assert "floor=2.0" in done.stdout
        assert '"floor": 2.0' in (folder / "runs" / "dual_clip" / "config.json").read_text()
        assert (folder / "runs" / "dual_clip" / "ema" / "model.safetensors").is_file()
    elif "make_ppo_step" in block.text:
        assert "policy loss" in done.stdout
    else:
        losses = [
            float(loss) for loss in re.findall(r"^loss (\S+) nats", done.stdout, flags=re.MULTILINE)
        ]
        assert len(losses) == 10
        assert losses[-1] < losses[0]


def test_every_command_of_the_readme_names_real_files_and_keys():
    """The stage-by-stage commands are too long to run here: their scripts, configs and keys must exist."""
    from rlhf_jax.run.config import load_config

    commands = re.findall(
        r"^python (experiments/\w+\.py) --config=(\S+)((?:.*\\\n)*.*)$", README, flags=re.MULTILINE
    )
    assert len(commands) >= 8
    for script, config, rest in commands:
        assert (ROOT / script).is_file(), script
        flags = re.findall(r"--config\.([\w.]+)=(\"[^\"]*\"|\S*)", rest)
        overrides = {
            key: value.strip('"') for key, value in flags if not key.startswith("policy_loss")
        }
        load_config(str(ROOT / config), overrides)


def test_links_of_the_readme_lead_somewhere():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README) + re.findall(
        r' src(?:set)?="([^"]+)"', README
    )
    for target in targets:
        assert (ROOT / target).exists(), target
    assert all(
        (ROOT / target).stat().st_size < 200_000 for target in targets if target.endswith(".png")
    )
