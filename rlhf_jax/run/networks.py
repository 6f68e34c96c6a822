"""Networks: models loaded onto a mesh and saved, and the subset of parameters that is trained."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

# Otherwise transformers warns that PyTorch is missing, which is intended here.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import contextlib

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rlhf_jax import sharding
from rlhf_jax.backends import cpu_process
from rlhf_jax.data import parsed, text
from rlhf_jax.data.storyland import tokenizer as storyland_assets
from rlhf_jax.models.heads import language_model, scalar_model
from rlhf_jax.models.hf import config_from_hf, load_hf, save_hf
from rlhf_jax.models.lora import init_lora, lora_model, merge_lora, with_lora
from rlhf_jax.run import checks, files, pretrained, processes
from rlhf_jax.run.results import read_json
from rlhf_jax.types import Model, Params

SHIPPED = "storyland:"
"""Prefix of a model that ships with the package: ``storyland:base_large``."""


TRAIN = ("all", "lora", "head")
"""The values of `config.train` that `trainable` accepts."""


LARGE = 20_000_000
"""Number of parameters above which memory is scarcer than the time to fault it in."""


class Network(NamedTuple):
    """A model with its parameters and tokenizer, as stored in a model folder."""

    model: Model
    params: Params
    tokenizer: Any
    name: str = "samples"
    """What the console calls its responses."""


def model_folder(name: str) -> Path:
    """The folder of a model: a path, a shipped model (``storyland:..``) or a name (``smollm2``).

    A model of `pretrained.MODELS` is fetched on first use.
    """
    if name.startswith(SHIPPED):
        return storyland_assets.assets() / checks.require_name("model", name.removeprefix(SHIPPED))
    return pretrained.folder(name) if name in pretrained.MODELS else files.local_path("model", name)


def load_network(
    name: str,
    mesh: jax.sharding.Mesh,
    decoder: Mapping[str, Any] | ConfigDict | None = None,
    *,
    dropout: float = 0.0,
    rules: sharding.Rules = sharding.DECODER_RULES,
) -> Network:
    """Loads a language or scalar model with its tokenizer; its parameters are sharded on the mesh.

    Args:
      name: a folder, or a shipped model.
      mesh: where the parameters go.
      decoder: overrides of fields of `DecoderConfig` (`config.decoder`), such as dtype and remat.
      dropout: residual dropout, for training.
      rules: sharding rules of the parameters.

    Raises:
      ValueError: the folder is missing, damaged, or its tokenizer does not fit.
    """
    folder = model_folder(name)
    try:
        # Each array is read directly onto its devices and never moved again.
        shardings = functools.partial(sharding.tree_shardings, mesh=mesh, rules=rules)
        parsed.loading(folder)
        model, params, tokenizer = load_hf(folder, shardings=shardings)
    except FileNotFoundError as error:
        raise ValueError(
            f"model {name!r} cannot be read: {error}; pass the folder of a model"
        ) from None
    if tokenizer is None:
        raise ValueError(f"{folder} holds no tokenizer.json: copy the tokenizer of the model there")
    # A small model steps faster if freed memory stays with the process; a large one would keep
    # gigabytes of it.
    if size(params) > LARGE:
        cpu_process.keep_freed_memory(False)
    # Without a mesh no sharding constraints are traced; on one device they would mean nothing.
    changes = {**(decoder or {}), "dropout": dropout, "mesh": mesh if mesh.size > 1 else None}
    model = type_of(model)(dataclasses.replace(model.config, **changes))
    return Network(model, params, tokenizer)


def save_network(folder: str | os.PathLike[str], network: Network) -> None:
    """Writes a model folder atomically: after a crash the old model is intact, if there was one.

    The old model is then in `folder` or in ``<folder>.old``. All processes call this, and process 0
    writes. The folder survives a power cut once this returns.

    Raises:
      OSError: the model could not be written; the previous contents are intact.
    """
    folder = files.local_path("the folder of the model", folder)
    temporary = folder.with_name(folder.name + ".tmp")
    first = processes.index() == 0
    if first:
        # An earlier crash may have left the folder half replaced.
        files.settle_folder(folder)
    try:
        save_hf(temporary, network.model, network.params, network.tokenizer)
        if first:
            files.put_folder(temporary, folder)
    except OSError as error:
        if first:
            files.settle_folder(folder)
        raise OSError(
            f"the model could not be written to {folder} ({error}); what was saved before is "
            "intact. Free disk space, "
            "or choose a workdir that can be written, and give the same command again."
        ) from error
    # No process may read the folder before process 0 has written it.
    processes.barrier("model saved")


def check_shape(field: str, name: str, shape: Mapping[str, Any] | ConfigDict) -> None:
    """Raises unless a model on disk has the decoder sizes of `shape`; an empty `shape` accepts any.

    Raises:
      ValueError: a size differs, or there is no such model.
    """
    if not name:
        raise ValueError(
            f"{field} is empty: pass the folder of a pretrained model with --config.{field}=FOLDER"
        )
    found = config_from_hf(read_json(model_folder(name) / "config.json"))
    for key, wanted in shape.items():
        if getattr(found, key) != wanted:
            raise ValueError(
                f"{field}={name} has {key}={getattr(found, key)} and this config is for "
                f"{key}={wanted}: choose another model, or set the size under --config.shapes"
            )


def type_of(model: Model) -> Callable[..., Model]:
    """The function that builds this kind of model from a `DecoderConfig`."""
    # The initialization is traced for its shapes only, so no parameter is computed.
    return (
        scalar_model if "score" in jax.eval_shape(model.init, jax.random.key(0)) else language_model
    )


def size(params: Params) -> int:
    """The number of elements in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def tokenizer_of(name: str) -> Any:
    """The tokenizer of a model that is loaded later; None if it cannot be read.

    Loading the model then raises the error.
    """
    with contextlib.suppress(ValueError, OSError):
        return text.load_tokenizer(model_folder(name))
    return None


# --------------------------------------------------------------------------- which parameters train


class TrainableParams(NamedTuple):
    """The trainable parameters of a stage and the frozen ones, whose arrays are never copied."""

    params: Params
    """The trainable parameters at step 0: all of them, or LoRA adapters and a score head."""
    frozen: Params
    """The frozen parameters; empty if everything is trained."""
    alpha: float

    def model(self, model: Model, frozen: Params) -> Model:
        """`model` as a function of `params`, for `compile_frozen_step`."""
        if not self.frozen:
            return model
        return lora_model(model, frozen, alpha=self.alpha)

    def whole(self, params: Params) -> Params:
        """Trainable and frozen parameters together, for `Model.apply`; frozen arrays are shared."""
        return with_lora(self.frozen, params, alpha=self.alpha)

    def merged(self, params: Params) -> Params:
        """Plain parameters without adapters, for sampling and for saving."""
        return merge_lora(self.frozen, params, alpha=self.alpha)


def trainable(params: Params, config: ConfigDict) -> TrainableParams:
    """Selects the parameters of `config.train`: ``all``, ``lora`` adapters, or the score ``head``.

    With ``lora`` (`config.lora`) a score head is trained in full, together with the adapters of the
    trunk. A head trained alone is initialized to zero: its problem is convex, and a random head
    would add noise that takes a few thousand pairs to unlearn.

    Raises:
      ValueError: an unknown value, ``head`` for a language model, or adapters that do not fit the
        model.
    """
    checks.require_one_of("train", config.train, TRAIN)
    rank, alpha, targets, layers = (
        config.lora[name] for name in ("rank", "alpha", "targets", "layers")
    )
    if config.train == "all":
        return TrainableParams(params, {}, alpha)
    # A score head always trains: in full beside adapters, or alone.
    frozen = {name: part for name, part in params.items() if name != "score"}
    own = {name: part for name, part in params.items() if name == "score"}
    if config.train == "lora":
        own |= init_lora(
            frozen, jax.random.key(config.seed), rank=rank, targets=targets, layers=layers
        )
    else:
        own = jax.tree.map(jnp.zeros_like, own)
    checks.require(
        bool(own),
        "train",
        config.train,
        "needs a reward model; for a language model use lora or all",
    )
    return TrainableParams(own, frozen, alpha)
