"""Results of stages: JSON files, and the combined ``results.json`` and report."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rlhf_jax import backends
from rlhf_jax.data import schema
from rlhf_jax.evaluation.report import check_results
from rlhf_jax.evaluation.summary import reward_model_results
from rlhf_jax.run import files, metrics, processes, records, untrusted
from rlhf_jax.run.config import resolve, to_json

PPO_CURVES = {
    "rollout/score": "score",
    "rollout/kl_nats_per_sequence": "kl",
    "rollout/response_tokens": "response_tokens",
    "gold_score": "gold_score",
    "held_out_loss": "pretraining_loss",
}
"""Maps names in the PPO log to names in the report."""
SFT_CURVES = {
    "epoch": "epoch",
    "validation_loss": "validation_loss",
    "reward_score": "score",
    "gold_score": "gold_score",
}


def history(
    folder: Path, stages: Sequence[str], epochs: Sequence[Mapping[str, Any]]
) -> dict[str, list[dict]]:
    """The curves of the report: each iteration of the PPO `stages`, and each SFT epoch.

    Args:
      folder: the run folder.
      stages: names of PPO stages.
      epochs: epochs of the SFT stage, with the scores of the baseline stage.
    """
    curves: dict[str, list[dict]] = {}
    for stage in stages:
        rows = metrics.read(folder / stage / metrics.FILE)
        curves[stage] = [{"iteration": row["step"]} | _renamed(row, PPO_CURVES) for row in rows]
    return curves | {"sft": [_renamed(row, SFT_CURVES) for row in epochs]}


def _renamed(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {short: row[long] for long, short in names.items() if long in row}


def samples(file: Path, count: int = 12) -> list[dict]:
    """The responses of all models to the first prompts of an evaluation's ``samples.jsonl``."""
    by_prompt: dict[str, dict] = {}
    # Not `splitlines`, which also splits at separators that JSON strings may contain.
    for line in file.read_text(encoding="utf-8").split("\n"):
        if not line:
            continue
        row = json.loads(line)
        entry = by_prompt.setdefault(row["prompt"], {"prompt": row["prompt"], "responses": {}})
        entry["responses"][row["model"]] = {
            "text": row["response"],
            "gold_score": row.get("gold_score"),
        }
    return list(by_prompt.values())[:count]


def log_rows(folder: Path, stage: str) -> list[dict[str, Any]]:
    """The rows of a stage's log, each with the stage's name; empty if it wrote no log."""
    file = folder / stage / metrics.FILE
    return [{**row, "stage": stage} for row in metrics.read(file)] if file.is_file() else []


def gathered(recorded: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Combines the records of all stages for ``results.json`` (docs/results_schema.md).

    Args:
      recorded: the record of each stage, by its name.
    """
    rewards = recorded["reward_model"]["result"]
    seconds = {name: record["seconds"] for name, record in recorded.items()}
    seconds["compile"] = round(sum(record["compile_seconds"] for record in recorded.values()), 2)
    seconds["total"] = round(sum(record["seconds"] for record in recorded.values()), 2)
    return {
        **recorded["evaluation"]["result"],
        **reward_model_results(rewards),
        "reward_model": {
            k: rewards[k] for k in ("prompts", "responses", "pairs", "steps", "padding_share")
        },
        "sft": recorded["baseline"]["result"],
        "seconds": seconds,
        "peak_memory_mb": max(record["peak_memory_mb"] for record in recorded.values()),
        "stages": stated(recorded),
    }


def write(
    folder: Path, recorded: Mapping[str, Mapping[str, Any]], config: ConfigDict,
    demonstrations: str, gold: Any,
) -> dict[str, Any]:  # fmt: skip
    """Writes ``results.json`` and ``metrics.jsonl`` of all stages; returns the results.

    Args:
      folder: the run folder.
      recorded: the record of each stage, by its name.
      config: of the pipeline.
      demonstrations: the file whose responses `gold` scores too.
      gold: the gold scorer; empty where people judge, who leave half of the keys out.
    """
    found = gathered(recorded)
    if gold:
        found["demonstration_gold_score"] = mean_gold_score(demonstrations, gold)
    found |= {"config": json.loads(to_json(config)), "versions": versions()}
    files.write_json(folder / "results.json", found)
    rows = (row for name in recorded for row in log_rows(folder, name))
    files.write_lines(folder / "metrics.jsonl", rows)
    missing = check_results(found)
    if missing and gold:
        print(f"Note: results.json lacks {', '.join(missing)}", flush=True)
    return found


def recorded_config(
    found: Mapping[str, Any], groups: Mapping[str, str], base: str
) -> dict[str, Any]:
    """The config that the stages recorded when they ran.

    Args:
      found: what `write` returned.
      groups: the group of the config that each stage reads.
      base: the base model as the user names it, where the stage SFT recorded no path.
    """
    stages = found["stages"]
    config = {group: stages[name]["config"][group] for name, group in groups.items()}
    return config | {"base": stages["sft"]["inputs"].get("base", {"path": base})["path"]}


def mean_gold_score(path: str, gold: Any) -> float:
    """The mean gold score of the labelers' own responses in a file of demonstrations."""
    judge = resolve(gold)
    records, _ = schema.read_jsonl(path, schema.Demonstration)
    return float(np.mean([judge(str(r.id), r.response).score for r in records]))


STATED = (
    "config",
    "inputs",
    "key",
    "version",
    "seconds",
    "compile_seconds",
    "peak_memory_mb",
    "config_changes",
)
"""The fields of a stage's record that ``results.json`` includes."""


def stated(recorded: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The config, inputs and cost of each stage, from the records of all stages."""
    return {
        name: {key: record[key] for key in STATED if key in record}
        for name, record in recorded.items()
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries, and the device."""
    names = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy", "rlhf_jax")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    machine = backends.description()
    device = f"{machine['number of devices']} x {machine['device kind']}"
    return {
        "python": platform.python_version(),
        **found,
        "device": device,
        "machine": platform.machine(),
    }


# ------------------------------------------------------------------------------------- of one stage


def write_result(path: str | os.PathLike[str], make: Callable[[], Any]) -> Any:
    """Computes and writes the result of a stage on process 0, and returns it on all processes.

    Only process 0 calls `make`, because it may read the log, which only process 0 writes.
    """

    def made() -> Any:
        result = make()
        # Paths below the folder are stored relative to it, so that it can be moved and copied.
        files.write_json(path, records.relative(result, Path(path).parent)[0])
        return result

    return processes.on_first("result", made)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads what `write_result` wrote.

    Raises:
      ValueError: the file is missing or damaged.
    """
    try:
        return untrusted.read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: run the stage that makes it first") from None
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): run the stage that makes it again"
        ) from None
