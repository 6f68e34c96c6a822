"""Reading a model folder (config.json, safetensors, tokenizer.json), or a GGUF file.

There is no torch, no pickle and no remote code, and no path is built from a name found in a file:
the shards are the ``*.safetensors`` files of the folder, whatever is in an index. Headers are read
with limits (`rlhf_jax.run.untrusted`).

Memory: each parameter is allocated once, in its sharding, and filled from the files a block of rows
at a time.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.heads import language_model, scalar_model
from rlhf_jax.models.hf.adapter import Adapter, find_adapter
from rlhf_jax.models.hf.config_json import config_from_hf
from rlhf_jax.models.hf.families import GPT2, NAMES
from rlhf_jax.models.hf.gguf import load_gguf
from rlhf_jax.models.hf.parameters import Shardings, assemble, over_fsdp
from rlhf_jax.models.hf.settings import SCORE_BIAS, check_settings, clipped, tell_unread
from rlhf_jax.models.hf.stored import blocks, checked, split_c_attn, whole
from rlhf_jax.models.hf.tensors import FolderTensors, is_buffer, refuse_unread, same_values
from rlhf_jax.models.hf.tokenizer import model_tokenizer
from rlhf_jax.models.vocabulary import unused_ids
from rlhf_jax.run.files import local_path
from rlhf_jax.run.untrusted import read_json
from rlhf_jax.types import Model, Params


def load_hf(
    path: str | Path,
    *,
    dtype: Any = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    shardings: Shardings | None = None,
) -> tuple[Model, Params, Any]:
    """Load a text model from a local folder or a GGUF file.

    Folders may contain GPT-2, Llama, Mistral, Qwen2, Qwen3 or Gemma 3 models, GGUF files Llama.

    Each parameter is read from the file directly to its devices, so the host never has two copies.
    A folder with a score head (saved by `save_hf`, or a ``...ForSequenceClassification`` of one
    label) gives a scalar model. Compute is float32; for bfloat16 compute build the model again from
    ``replace(model.config, dtype=...)``.

    Every tensor and every setting is read, harmless, or refused by its name; a plain LoRA adapter
    of PEFT beside the base is merged. Deviations from config.json are printed. Ids without a token
    in the tokenizer are in ``model.config.unused_ids`` and get probability 0.

    Args:
      path: a folder with config.json, safetensors and (optional) tokenizer.json; or a .gguf file.
      dtype: of the parameters.
      mesh: where to put them: each array is split over the ``fsdp`` axis; None = the default
        device.
      shardings: where to put them instead, as in training:
        ``partial(sharding.tree_shardings, mesh=mesh)``.

    Returns:
      The model, its parameters, and the tokenizer (None if the folder has no tokenizer.json; a GGUF
      file describes its own if it is byte-level BPE).

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is corrupt, of an unknown kind, or does not fit the others; or `mesh`
        beside `shardings`.
    """
    path = local_path("model", path)
    if mesh is not None and shardings is not None:
        raise ValueError("mesh and shardings both say where parameters go: pass one of them")
    if mesh is not None:
        shardings = partial(over_fsdp, mesh)
    if path.suffix == ".gguf":
        return load_gguf(path, dtype, shardings)
    adapter = find_adapter(path)
    description = _read_config(path)
    config = config_from_hf(description)
    tell_unread(f"{path / 'config.json'} has settings", check_settings(description))
    tensors = FolderTensors(path)
    names = NAMES[description["model_type"]]
    scalar = _is_scalar(description, tensors)
    config = _with_own_head(config, names, tensors, scalar=scalar)
    tokenizer = model_tokenizer(path, config)
    # A scalar model is not sampled from and has no logits to mask.
    if tokenizer is not None and not scalar:
        config = dataclasses.replace(config, unused_ids=unused_ids(tokenizer, config.vocab_size))
    model = scalar_model(config) if scalar else language_model(config)
    # The adapter first: PEFT adapts c_attn as one matrix, which is split only afterwards.
    read = tensors if adapter is None else adapter.applied(tensors, transposed=names is not GPT2)
    read = split_c_attn(read, config) if names is GPT2 else read
    check = partial(_all_read, tensors, config, adapter)
    bias = _score_bias(description, tensors)
    params = assemble(
        model, names, read, dtype, shardings, transposed=names is not GPT2, bias=bias, check=check
    )
    return model, params, tokenizer


def _read_config(path: Path) -> dict[str, Any]:
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"no config.json in {path}: pass the folder of a saved model or a .gguf file"
        )
    description = read_json(path / "config.json")
    if not isinstance(description, dict):
        raise ValueError(f"{path / 'config.json'} holds no object: copy it again")
    return description


def _is_scalar(description: Mapping[str, Any], tensors: FolderTensors) -> bool:
    """Whether the folder has a reward model, that is, a score head with one row."""
    classifier = [
        n for n in description.get("architectures") or [] if n.endswith("ForSequenceClassification")
    ]
    if "score.weight" not in tensors:
        if classifier:
            raise ValueError(
                f"architectures={classifier} in config.json speaks of a classifier, and "
                f"{tensors.path} holds no tensor 'score.weight': a shard is missing, or the head "
                "has another name; rename it to score.weight"
            )
        if description.get(SCORE_BIAS):
            raise ValueError(
                f"{SCORE_BIAS}={description[SCORE_BIAS]} in config.json is of a reward model, and "
                f"{tensors.path} holds no tensor 'score.weight': a shard is missing, or it is "
                "another model's config.json"
            )
        return False
    shape = tuple(tensors("score.weight").shape)
    # Other shapes than ``[labels, D]`` are left to `assemble`, which compares them with the model.
    if len(shape) == 2 and shape[0] != 1:
        raise ValueError(
            f"tensor 'score.weight' of {tensors.path} has the shape {list(shape)}: a classifier of "
            f"{shape[0]} labels (id2label={clipped(description.get('id2label'))}) is no reward "
            "model; choose one with num_labels=1"
        )
    return True


def _score_bias(description: Mapping[str, Any], tensors: FolderTensors) -> np.floating:
    """The bias that is added to ``hidden . score.weight``.

    Our own exports have it in config.json, some others as a tensor.
    """
    own = np.float32(description.get(SCORE_BIAS, 0.0))
    if "score.bias" not in tensors or "score.weight" not in tensors:
        return own
    found = whole(checked("score.bias", tensors("score.bias"), (1,)))[0].astype(np.float32)
    if own and own != found:
        raise ValueError(
            f"{tensors.path} holds tensor 'score.bias' ({found}) of shape [1], and config.json has "
            f"{SCORE_BIAS}={own}: take the one out that does not belong to the model"
        )
    return found


def _with_own_head(
    config: DecoderConfig, names: Mapping[str, str], tensors: FolderTensors, *, scalar: bool
) -> DecoderConfig:
    """The config with `tied` set by the head in the file.

    A head that equals the embedding is a second copy of it, and is skipped. If it differs, the two
    are untied, as in transformers: merging an adapter that trained the head gives such a file.
    """
    head, embedding = f"{names['unembed']}.weight", f"{names['embed']}.weight"
    if not config.tied or head not in tensors or embedding not in tensors:
        return config
    one, other = tensors.peek(head), tensors.peek(embedding)
    equal = one.shape == other.shape and len(one.shape) == 2
    # The size of a row in float32, whatever the file has: it only decides the size of the blocks.
    if equal and same_values(one, other, blocks(one.shape[0], 4 * one.shape[1])):
        tensors(head)  # Counts as read.
        return config
    if scalar:
        return config  # A reward model has no unembedding: `_all_read` refuses this tensor.
    print(
        f"Note: tie_word_embeddings=true in config.json, but {tensors.path} holds a {head!r} of "
        f"shape {list(one.shape)} that differs from {embedding!r}: the model is read as untied",
        file=sys.stderr,
        flush=True,
    )
    return dataclasses.replace(config, tied=False)


def _all_read(tensors: FolderTensors, config: DecoderConfig, adapter: Adapter | None) -> None:
    """Refuse tensors that have not been read, in the base and in its adapter."""
    unread = {
        name: shape for name, shape in tensors.unread.items() if not is_buffer(name, config.layers)
    }
    refuse_unread(tensors.path, unread, config.layers)
    if adapter is None:
        return
    for module in adapter.pairs:
        name = f"{module}.weight"
        if name not in tensors.read or (config.tied and module == "lm_head"):
            raise ValueError(
                f"the adapter in {adapter.folder} changes {name!r}, which the base does not have "
                "(as a matrix of its own): it is of another base; merge it with PEFT and pass the "
                "merged model"
            )
    print(
        f"Note: the LoRA adapter in {adapter.folder} is merged into its base: "
        f"{len(adapter.pairs)} matrices, weight {adapter.scale:g}",
        file=sys.stderr,
        flush=True,
    )
