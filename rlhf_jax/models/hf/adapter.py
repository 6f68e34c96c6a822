"""A PEFT LoRA adapter in the folder of its base model, merged into the weights as they are read.

transformers applies an adapter that it finds beside the base, so ignoring it would load another
model. Plain LoRA on the projections is merged, ``W + alpha / r * B A``; every other feature of PEFT
is refused by its name.

Source: Hu et al. 2021, arXiv 2106.09685; Kalajdzievski 2023, arXiv 2312.03732, for
``alpha / sqrt(r)``.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.models.hf.safetensors_file import tensors_of
from rlhf_jax.models.hf.stored import Read, Stored, Window, whole
from rlhf_jax.models.hf.tensors import ADAPTER, ADAPTER_CONFIG, full_name
from rlhf_jax.run.untrusted import read_json

_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type",
    "peft_version", "lora_dropout", "layers_pattern", "layers_to_transform", "exclude_modules",
    "eva_config", "corda_config", "loftq_config", "lora_ga_config", "megatron_core", "arrow_config",
    "qalora_group_size", "runtime_config", "ensure_weight_tying", "fan_in_fan_out",
}  # fmt: skip
"""Fields of adapter_config.json that do not change the merged weights: they concern only training,
or can be seen from the tensors."""
_READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "target_modules",
    "bias",
    "init_lora_weights",
}
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that do not change the base, as PiSSA and similar methods do."""


_OUT_IN = ("lm_head.weight", "score.weight")
"""Matrices that are stored as (out, in) in GPT-2 too."""


class Adapter(NamedTuple):
    """The adapter of a folder.

    Attributes:
      folder: of the model.
      pairs: module (``model.layers.0.mlp.up_proj``) -> its A ``[r, in]`` and B ``[out, r]``.
      scale: what ``B A`` is multiplied by.
    """

    folder: Path
    pairs: Mapping[str, tuple[Stored, Stored]]
    scale: float

    def applied(self, read: Read, *, transposed: bool) -> Read:
        """A reader of tensors that adds the adapter to the matrices that it was trained on.

        Args:
          read: name -> tensor.
          transposed: whether files store matrices as (out, in); those of GPT-2 do not.
        """

        def merged(name: str) -> Stored:
            tensor, pair = read(name), self.pairs.get(name.removesuffix(".weight"))
            if pair is None or not name.endswith(".weight"):
                return tensor
            a, b = (np.asarray(whole(part), np.float32) for part in pair)
            # GPT-2 stores its matrices as (in, out), where the change is ``(B A)^T = A^T B^T``;
            # heads are (out, in) in every family.
            left, right = (b, a) if transposed or name in _OUT_IN else (a.T, b.T)
            if tuple(tensor.shape) != (len(left), right.shape[1]):
                raise ValueError(
                    f"the adapter in {self.folder} changes {name!r} by a matrix of shape "
                    f"{(len(left), right.shape[1])}, and the model has {tuple(tensor.shape)}: it "
                    "is of another base"
                )
            return _Merged(tensor, left, right, self.scale)

        return merged


@dataclasses.dataclass(frozen=True)
class _Merged:
    """A tensor with ``scale * left @ right`` added, in float32, window by window."""

    base: Stored
    left: np.ndarray
    right: np.ndarray
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    def __getitem__(self, window: Window, /) -> np.ndarray:
        rows, columns = window
        # The product of this window only: `left` and `right` are thin, the whole change is as large
        # as the base.
        change = self.left[rows] @ self.right[:, columns]
        return self.base[window].astype(np.float32) + np.float32(self.scale) * change


def find_adapter(folder: Path) -> Adapter | None:
    """The adapter in a model folder, or None; the base must be there too.

    Raises:
      ValueError: it has no base, is incomplete, or is more than plain LoRA; the message names the
        file or setting.
    """
    description, weights = folder / ADAPTER_CONFIG, folder / ADAPTER
    if not description.exists() and not weights.exists():
        return None
    if not description.exists():
        raise ValueError(
            f"{weights} has no {ADAPTER_CONFIG} beside it: copy it there, or move the adapter away"
        )
    config = read_json(description)
    if not isinstance(config, dict):
        raise ValueError(f"{description} holds no object: copy it again")
    if not any(file.name != ADAPTER for file in folder.glob("*.safetensors")):
        base = config.get("base_model_name_or_path")
        raise ValueError(
            f"{folder} holds an adapter alone; its base is {str(base)[:200]!r}: copy the files of "
            "the base (config.json, *.safetensors, tokenizer.json) into this folder, where the "
            "adapter is merged on loading, or merge it with PEFT (merge_and_unload) and pass the "
            "merged model"
        )
    if not weights.exists():
        raise ValueError(
            f"{folder} has {ADAPTER_CONFIG} but no {ADAPTER}: copy the adapter there as "
            f"safetensors, or move {ADAPTER_CONFIG} away if the base is meant without it"
        )
    scale, rank = _scale(config, description)
    pairs = _pairs(weights, rank)
    _check_targets(config.get("target_modules"), pairs, description)
    return Adapter(folder, pairs, scale)


def refuse_to_save_beside(folder: Path) -> None:
    """Refuse to write a model over the base of an adapter.

    The model that was loaded from there already has the adapter merged, and loading would merge it
    again.

    Args:
      folder: the folder to write; it need not exist. It may contain an adapter without a base.

    Raises:
      ValueError: it contains a base and its adapter; nothing was written.
    """
    adapter = next((name for name in (ADAPTER, ADAPTER_CONFIG) if (folder / name).exists()), None)
    if adapter and any(file.name != ADAPTER for file in folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} holds a model with {adapter}, which would be merged again into what is to "
            "be saved there: choose another folder, or move the adapter away"
        )


def _scale(config: Mapping[str, Any], where: Path) -> tuple[float, int]:
    """The weight of B A, and the rank, of a plain LoRA adapter."""
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"peft_type={config.get('peft_type')!r} in {where} is not supported: merge it with "
            "PEFT first"
        )
    plain = {"init_lora_weights": _PLAIN_STARTS, "bias": (None, "none")}
    for name, value in config.items():
        # An unknown field may be a method of PEFT that changes the weights: it is accepted only if
        # it is off.
        refused = (
            value not in plain[name]
            if name in plain
            else name not in _READ | _HARMLESS and bool(value)
        )
        if refused:
            raise ValueError(
                f"{name}={str(value)[:80]} in {where} is more than plain LoRA: merge the adapter "
                "with PEFT (merge_and_unload) and pass the merged model"
            )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    numbers = (
        # `type`, because ``true`` in JSON is an integer for `isinstance`.
        type(rank) is int
        and rank > 0
        and isinstance(alpha, int | float)
        and type(alpha) is not bool
    )
    if not (
        numbers
        and isinstance(rank, int)
        and isinstance(alpha, int | float)
        and math.isfinite(alpha)
    ):
        raise ValueError(
            f"r={rank!r} and lora_alpha={alpha!r} in {where} must be a positive integer and a "
            "number"
        )
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank), rank


# ``default`` is PEFT's name for the adapter in memory; some tools write it into the file.
_PART = re.compile(r"^(?P<module>.+)\.lora_(?P<part>[AB])(\.default)?\.weight")


def _pairs(file: Path, rank: int) -> dict[str, tuple[Stored, Stored]]:
    halves: dict[str, dict[str, Stored]] = {}
    for tensor in tensors_of(file):
        found = _PART.fullmatch(full_name(tensor.name))
        shape = list(tensor.shape)
        if found is None or len(shape) != 2:
            raise ValueError(
                f"{file} holds tensor {tensor.name!r} of shape {shape}, which is more than plain "
                "LoRA: merge the adapter with PEFT (merge_and_unload) and pass the merged model"
            )
        # A is ``[r, in]`` and B is ``[out, r]``.
        if shape[0 if found["part"] == "A" else 1] != rank:
            raise ValueError(
                f"tensor {tensor.name!r} of {file} has the shape {shape}, and r={rank}: copy it "
                "again"
            )
        if found["part"] in halves.setdefault(found["module"], {}):
            raise ValueError(
                f"{file} holds lora_{found['part']} of {found['module']!r} twice: save one adapter "
                "alone"
            )
        halves[found["module"]][found["part"]] = tensor
    for module, parts in halves.items():
        if set(parts) != {"A", "B"}:
            raise ValueError(
                f"{file} holds lora_{min(parts)} of {module!r} without its other half: copy it "
                "again"
            )
    if not halves:
        raise ValueError(f"{file} holds no tensor: copy the adapter again")
    return {module: (parts["A"], parts["B"]) for module, parts in halves.items()}


def _check_targets(targets: Any, pairs: Mapping[str, Any], where: Path) -> None:
    """Check that the listed `target_modules` have matrices; a regex pattern is not checked."""
    if not isinstance(targets, list):
        return
    for module in pairs:
        if not any(module == target or module.endswith(f".{target}") for target in targets):
            raise ValueError(
                f"target_modules={targets} in {where} lacks {module!r}, for which there are tensors"
            )
    for target in targets:
        if not any(module == target or module.endswith(f".{target}") for module in pairs):
            raise ValueError(
                f"target_modules of {where} names {target!r}, for which {ADAPTER} holds no tensor"
            )
