"""Checks of files, models, prompts and numbers before anything is loaded, computed or written.

Loading a model and compiling a step take a minute; a wrong path is found in a millisecond. Each
refusal names the key, the value that was found, and the flag that corrects it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
from ml_collections import ConfigDict, FieldReference

from rlhf_jax.data import schema
from rlhf_jax.data.storyland import task_of
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.run import checks, networks, optimizers, pretrained, untrusted
from rlhf_jax.sharding import rules_from_data

LANGUAGE, REWARD = "language model", "reward model"

# -------------------------------------------------------------------------------------------- files


def check_file(field: str, path: str, *, required: bool = True) -> None:
    """Refuses a path that cannot be a data file.

    Args:
      field: the config key that names it.
      path: the file; "" where none was given.
      required: whether "" is refused.

    Raises:
      ValueError: the file is not given, missing, empty, unreadable, a folder or a pipe.
    """
    if not path:
        if required:
            raise ValueError(f"{field} is empty: pass the file with --config.{field}=FILE")
        return
    file = Path(path)
    if file.is_dir():
        inside = sorted(str(p) for p in file.glob("*.json*"))[:8]
        there = f", such as {', '.join(inside)}" if inside else ""
        raise ValueError(
            f"{field}={path} is a folder: pass one file{there} with --config.{field}=FILE"
        )
    if not file.exists():
        hint = _near(file) or f"check the path (relative ones are below {Path.cwd()})"
        raise ValueError(f"{field}={path} does not exist: {hint}")
    # A resumed run reads its data again, which a pipe cannot repeat.
    if not file.is_file():
        raise ValueError(
            f"{field}={path} is a pipe or a device: save it to a file first and pass that"
        )
    if not file.stat().st_size:
        raise ValueError(f"{field}={path} is empty, it has no byte: check how it was made")
    if not os.access(file, os.R_OK):
        raise ValueError(f"{field}={path} may not be read by this user: change its permissions")


def _near(file: Path) -> str:
    """A hint: the nearest name in the same folder, or that the folder itself is missing."""
    # The nearest existing ancestor: the first missing folder is the likely mistake.
    parent = next(p for p in file.absolute().parents if p.exists())
    if parent != file.absolute().parent:
        return f"there is no folder {file.parent}"
    if not parent.is_dir():
        return f"{parent} is a file"
    close = difflib.get_close_matches(file.name, [p.name for p in parent.iterdir()], n=1)
    return f"did you mean {str(file.with_name(close[0]))!r}?" if close else ""


# ------------------------------------------------------------------------------------------- models


def check_model(field: str, name: Any, kind: str = LANGUAGE) -> None:
    """Refuses a path that is not a model of the given kind.

    The kind is read from the config.json and the names of the tensors, without loading weights.

    Args:
      field: the config key that names it.
      name: a folder, a .gguf file, or the name of a shipped or a fetched model.
      kind: `LANGUAGE` or `REWARD`.

    Raises:
      ValueError: the model is not given, missing, not a model folder, without a tokenizer, or of
        the other kind.
    """
    if not isinstance(name, str):
        raise ValueError(f"{field}={name!r} is no path: pass the folder of a {kind}")
    if not name:
        raise ValueError(
            f"{field} is empty: pass the folder of a {kind} with --config.{field}=FOLDER"
        )
    known = name.startswith(networks.SHIPPED) or name in pretrained.MODELS
    folder = Path(name) if name in pretrained.MODELS else networks.model_folder(name)
    if not known:
        _check_folder(field, folder)
    elif name not in pretrained.MODELS and not folder.is_dir():
        shipped = (
            sorted(p.name for p in folder.parent.iterdir() if p.is_dir())
            if folder.parent.is_dir()
            else []
        )
        raise ValueError(
            f"{field}={name} is not shipped: choose one of "
            f"{', '.join(networks.SHIPPED + n for n in shipped)}"
        )
    found = LANGUAGE if known or folder.suffix == ".gguf" else kind_of(folder)
    if found and found != kind:
        fix = (
            "pass the model/ folder that reward_model.py wrote"
            if kind == REWARD
            else "pass a language model, such as an epoch-N/ folder of sft.py or ema/ of ppo.py"
        )
        raise ValueError(f"{field}={name} is a {found} and a {kind} is needed here: {fix}")


def _check_folder(field: str, folder: Path) -> None:
    name = f"{field}={folder}"
    if not folder.exists():
        raise ValueError(f"{name} does not exist: {_near(folder) or 'pass the folder of a model'}")
    if folder.suffix == ".gguf" and folder.is_file():
        return
    if not folder.is_dir():
        raise ValueError(
            f"{name} is no folder: "
            "pass the folder that holds config.json, model.safetensors, tokenizer.json"
        )
    # A run folder has a config.json too, that of the run; its run.lock tells the two apart.
    if not (folder / "config.json").exists() or (folder / "run.lock").exists():
        inside = sorted(
            str(p.parent)
            for p in folder.glob("*/config.json")
            if (p.parent / "tokenizer.json").exists()
        )
        there = (
            f": pass one of the models in it, {', '.join(inside[:8])}"
            if inside
            else ": pass the folder of a model"
        )
        raise ValueError(f"{name} holds no model (a config.json with its weights){there}")
    description = untrusted.read_json(folder / "config.json")
    if not isinstance(description, dict) or "model_type" not in description:
        raise ValueError(
            f"{name} holds a config.json that describes no model (no model_type): "
            "copy the model again"
        )
    if not (folder / "tokenizer.json").exists():
        raise ValueError(f"{folder} holds no tokenizer.json: copy the tokenizer of the model there")


def kind_of(folder: Path) -> str:
    """The kind of the model in a folder: `REWARD` with a score head and `LANGUAGE` without.

    Returns:
      The kind, or "" where the files cannot be read.
    """
    try:
        description = untrusted.read_json(folder / "config.json")
        names = _tensor_names(folder)
    except (OSError, ValueError, safetensors.SafetensorError):
        return ""  # loading the model reports what is wrong
    architectures = " ".join(map(str, description.get("architectures") or []))
    # Other libraries name the head `classifier` or `v_head`; the architecture's name counts too.
    scores = any(
        name.split(".")[-2:-1] in (["score"], ["classifier"], ["v_head"]) for name in names
    )
    if scores or "SequenceClassification" in architectures:
        return REWARD
    return LANGUAGE if names else ""


def _tensor_names(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return list(untrusted.read_json(index)["weight_map"])
    file = untrusted.check_file(folder / "model.safetensors")
    with safetensors.safe_open(file, framework="numpy") as stored:
        return list(stored.keys())


# ------------------------------------------------------------------------- prompts of a known world

GOLD_OF_STORYLAND = "rlhf_jax.data.storyland.gold:gold_of"


def check_known(field: str, without: str, prompts: Sequence[schema.Prompt], path: str) -> None:
    """Refuses prompts that storyland's labelers or its gold scorer cannot judge.

    Args:
      field: the setting that uses them, as in ``gold=rlhf_jax.data.storyland.gold:gold_of``.
      without: the flag that turns them off.
      prompts: the prompts whose responses they would judge.
      path: the file of the prompts.

    Raises:
      ValueError: the id of a prompt does not name a storyland task, or its text is that of another
        task.
    """
    for place, prompt in enumerate(prompts):
        text = prompt.prompt if isinstance(prompt.prompt, str) else prompt.prompt[-1].content
        try:
            known = task_of(str(prompt.id)).prompt in text
        except ValueError:
            known = False
        if not known:
            raise ValueError(
                f"{field} knows storyland's prompts alone, and record {place} (from 0) of {path} "
                f"has id={prompt.id!r}, {text[:40]!r}: {without} goes without it"
            )


def check_gold(field: str, gold: Any, prompts: Sequence[schema.Prompt], path: str) -> None:
    """Calls `check_known` if `gold` is storyland's scorer; other functions may know any prompt."""
    name = gold.get("fn") if isinstance(gold, Mapping | ConfigDict) else gold
    if name == GOLD_OF_STORYLAND:
        check_known(f"{field}={name}", f"--config.{field}= (empty)", prompts, path)


# ------------------------------------------------------------------------------------------ numbers

AT_LEAST: Mapping[str, float] = {
    **dict.fromkeys(
        (
            "batch_size", "row_length", "epochs", "microbatches", "max_new_tokens",
            "prompt_length", "episodes", "minibatches", "iterations", "save_every",
            "evaluate_every", "keep", "score_microbatches", "samples", "baseline_samples",
            "base_samples", "labels_each", "score_batch_size", "max_k", "held_out_row_length",
            "held_out_rows", "ptx_row_length", "held_out_batches", "candidates", "min_k",
            "max_skipped", "rank", "held_out_documents",
        ),
        1,
    ),
    **dict.fromkeys(
        (
            "temperature", "learning_rate", "value_learning_rate", "dropout", "labelers",
            "warmup_iterations", "value_warmup_iterations", "ptx_coef", "gamma", "lam", "ema_decay",
            "b1", "b2", "seed", "pretraining_fraction", "bias_demonstrations",
            "ptx_rows_per_episode", "alpha",
        ),
        0,
    ),
}  # fmt: skip
"""The smallest value of each number that a stage requires; None is refused."""

BELOW = {
    "dropout": 1.0,
    "pretraining_fraction": 1.0,
    "b1": 1.0,
    "b2": 1.0,
    "gamma": 1.0000001,
    "lam": 1.0000001,
}
"""Exclusive upper limits. That of `gamma` and `lam` is just above 1, which is allowed."""

OR_NONE = {
    **dict.fromkeys(("pieces_per_row", "prompts_per_row", "limit", "ptx_microbatches"), 1),
    **dict.fromkeys(
        ("clip_norm", "ppo_clip_norm", "ptx_clip_norm", "value_clip_norm", "spike_std"), 1e-30
    ),
}
"""The smallest value of each number that may be None; 1e-30 stands for "more than 0"."""


ONE_OF: Mapping[str, tuple[str, ...]] = {
    "optimizer": optimizers.OPTIMIZERS,
    "schedule": optimizers.SCHEDULES,
    "train": networks.TRAIN,
    "too_long": ("error", "drop"),
    "assistant_turns": ("all", "last"),
}
"""The allowed values of settings that are words."""


def check_settings(config: ConfigDict) -> None:
    """Refuses impossible numbers and unknown words in all groups of a config.

    Raises:
      ValueError: a number that `check_numbers` refuses, a word that is not in `ONE_OF`, a decoder
        that `DecoderConfig` refuses, or invalid sharding rules.
    """
    check_numbers(config)
    _check_words(config, "")


def _check_words(config: ConfigDict, group: str) -> None:
    # References are kept, so that no setting counts as read by the run (see `check_numbers`).
    for key, value in config.items(preserve_field_references=True):
        value = value.get() if isinstance(value, FieldReference) else value
        if key in ONE_OF and isinstance(value, str):
            checks.require_one_of(f"{group}{key}", value, ONE_OF[key])
        elif key == "decoder" and isinstance(value, ConfigDict):
            _check_decoder(value, f"{group}{key}")
        elif key == "sharding":
            _check_sharding(value, f"{group}{key}")
        elif isinstance(value, ConfigDict):
            _check_words(value, f"{group}{key}.")


def _check_decoder(settings: ConfigDict, field: str) -> None:
    """Refuses decoder settings that `DecoderConfig` refuses.

    They are tried with small sizes, because the real ones come from the model's folder later.
    """
    try:
        DecoderConfig(
            vocab_size=8, context_length=8, width=8, heads=1, layers=1, **settings.to_dict()
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{field}: {error}") from None


def _check_sharding(rules: Any, field: str) -> None:
    # The rules are given once for all networks, or as a group with rules per network.
    if not isinstance(rules, ConfigDict):
        rules_from_data(rules, field=field)
        return
    for network, own in rules.items():
        rules_from_data(own, field=f"{field}.{network}")


def check_numbers(config: ConfigDict, group: str = "") -> None:
    """Refuses impossible numbers in all groups: a batch of 0 rows, a negative rate, NaN.

    Raises:
      ValueError: a number is too small, too large, None or not a number.
    """
    # Keeping references avoids __getitem__: a number that is only checked must not count as one
    # that the run reads (`config.record_reads`).
    for key, value in config.items(preserve_field_references=True):
        value = value.get() if isinstance(value, FieldReference) else value
        if isinstance(value, ConfigDict):
            check_numbers(value, f"{group}{key}.")
        elif key in AT_LEAST or (key in OR_NONE and value is not None):
            least, limit = AT_LEAST.get(key, OR_NONE.get(key, 0)), BELOW.get(key, float("inf"))
            # `True` is an integer for Python, and NaN fails every comparison.
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not least <= value < limit
            ):
                bounds = f"at least {least}" if least in (0, 1) else "more than 0"
                bounds += f" and {'below' if limit <= 1 else 'at most'} 1" if key in BELOW else ""
                raise ValueError(
                    f"{group}{key}={value!r} must be a number of {bounds}: "
                    f"--config.{group}{key}=NUMBER"
                )
