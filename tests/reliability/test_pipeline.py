"""A short version of stages.py: the real pipeline with a model of one layer, damaged, repaired, copied and changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import pytest

from rlhf_jax.data.storyland import tokenizer as storyland_assets
from rlhf_jax.data.text import load_tokenizer
from rlhf_jax.models.config import gpt2
from rlhf_jax.models.heads import language_model
from rlhf_jax.models.hf import save_hf
from tests.reliability import stages

FEW = {
    **dict.fromkeys(
        ("demonstrations", "ranking_prompts", "ppo_prompts", "validation_prompts", "test_prompts"),
        "8",
    ),
    "documents": "60",
    "held_out_documents": "40",
}


def flags(model: Path, run: Path, *more: str) -> list[str]:
    """The smallest pipeline: one iteration of PPO, eight prompts. Its own process has one device, not eight."""
    few = {f"data.{key}": value for key, value in FEW.items()}
    few |= {
        "base": str(model),
        "evaluate.baseline_samples": "1",
        "ppo.iterations": "1",
        "ppo.episodes": "8",
    }
    few |= {"sample.max_new_tokens": "8", "ppo.max_new_tokens": "8", "evaluate.max_new_tokens": "8"}
    few |= {
        "sample.max_k": "4",
        "evaluate.few_shot.examples": "1",
        "evaluate.few_shot.trial_prompts": "2",
    }
    few |= {"ppo.ptx_rows_per_episode": "0.25"}
    return stages.flags(run, *(f"--config.{key}={value}" for key, value in few.items()), *more)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of one layer, with room for a whole row of rankings."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), load_tokenizer(storyland_assets.assets())
    network = language_model(gpt2(len(tokenizer), 512, 1, 16, 2))
    save_hf(folder, network, network.init(jax.random.key(0)), tokenizer)
    return folder


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that nothing happened to."""
    run = tmp_path_factory.mktemp("pipeline") / "whole"
    ended = stages.command(flags(model, run))
    assert ended.status == 0, ended.err
    return run


def test_a_damaged_copy_is_made_whole_from_its_own_files(whole, model, tmp_path):
    expected = stages.outcome(whole)
    original, copy = tmp_path / "original", tmp_path / "far" / "copy"
    shutil.copytree(whole, original)
    shutil.copytree(whole, copy)
    for path in original.rglob("*"):
        if path.is_file():
            path.write_bytes(b"not this")
    stages.harm(
        copy,
        {
            "sft/epoch-2/model.safetensors": "emptied",  # the last epoch: its checkpoint has it
            "ppo_init/epoch-1": "deleted",  # an earlier one: nothing has it
            "reward_model/model/model.safetensors": "flipped",
            "baseline/done.json": "emptied",
            "ppo_ptx/ema": "deleted",
        },
    )
    ended = stages.command(flags(model, Path("copy")), cwd=copy.parent)
    assert ended.status == 0, ended.err
    said = ended.out
    assert stages.ran(said) == ["sft", "ppo_init", "reward_model", "baseline", "ppo_ptx"]
    assert "stage sft: made again from its checkpoint of step" in said
    assert "stage ppo_init: runs again from its beginning" in said
    assert stages.same(copy, expected) == ""
    assert str(tmp_path) not in (copy / "results.json").read_text()


def test_after_a_change_only_what_follows_from_it_runs_and_the_report_says_with_what(
    whole, model, tmp_path
):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    ended = stages.command(flags(model, run, "--config.ppo.ptx_coef=0.3"))
    assert ended.status == 0, ended.err
    assert stages.ran(ended.out) == ["ppo_ptx", "evaluation"]
    results = json.loads((run / "results.json").read_text())
    assert results["stages"]["ppo_ptx"]["config"]["ppo"]["ptx_coef"] == 0.3
    assert "ptx_coef" not in results["stages"]["ppo"]["config"]["ppo"]
    report = (run / "report.html").read_text()
    row = report[report.index("Pretraining coefficient") :][:400]
    assert "0.3" in row
    aside = [path.parent.name for path in (run / "aside").rglob("done.json")]
    assert sorted(aside) == ["evaluation", "ppo_ptx"]
    assert stages.same(run, stages.outcome(whole)) != ""
