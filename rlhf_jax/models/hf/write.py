"""Writing a model folder that `load_hf` and transformers read.

Memory: tensors are fetched one after the other, a layer at a time, and written block by block.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from rlhf_jax import backends
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.hf.adapter import refuse_to_save_beside
from rlhf_jax.models.hf.config_json import hf_config
from rlhf_jax.models.hf.families import NAMES, is_flipped, tensor_name
from rlhf_jax.models.hf.safetensors_file import Outgoing, file_order, write_file
from rlhf_jax.models.hf.settings import SCORE_BIAS
from rlhf_jax.models.hf.tensors import INDEX
from rlhf_jax.models.hf.tokenizer import save_tokenizer, special_ids, template_names
from rlhf_jax.run import processes
from rlhf_jax.run.files import local_path, make_folder, sync_tree, written
from rlhf_jax.run.untrusted import check_template_name
from rlhf_jax.types import Model, Params


def save_hf(
    path: str | Path,
    model: Model,
    params: Params,
    tokenizer: Any = None,
    *,
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Write a folder that `load_hf` and transformers read: weights, config, tokenizer, model card.

    The folder and all its files have been synced to disk when this returns. Tensors keep the dtype
    of `params` (bfloat16 included). The Hugging Face layout has no tensor for the bias of a score
    head, so it is written to config.json as ``rlhf_jax_score_bias``: score = logits + bias. A
    sequence classifier of transformers reads the last token that is not ``pad_token_id``, so that
    id is never the one of EOS.

    Args:
      path: the folder; weights and, with a tokenizer, chat templates of an earlier save in it are
        removed.
      model: as from `language_model` or `scalar_model`.
      params: its parameters, on any devices. Where they are sharded over several processes, all
        call this together; process 0 writes, and has at most a layer of the others' shards at a
        time.
      tokenizer: saved beside them, with its chat template.
      max_shard_size: bytes of tensors in one file; above it there are several and an index.

    Raises:
      ValueError: the model has no config, its parts are not those of a known family, or the folder
        contains a base with an adapter.
      OSError: a file could not be written.
    """
    if not isinstance(model.config, DecoderConfig):
        raise ValueError(
            f"model.config={model.config!r} must be a DecoderConfig: build the model with "
            "language_model"
        )
    path = local_path("the folder to write", path)
    refuse_to_save_beside(path)
    for name in template_names(tokenizer):
        check_template_name(name, "the tokenizer")
    description = hf_config(model.config, score="score" in params)
    # ``dtype="auto"`` of transformers goes by this.
    description["dtype"] = str(params["embed"]["embedding"].dtype)
    if "score" in params:
        description[SCORE_BIAS] = float(params["score"]["bias"])
    tensors = dict(_outgoing(model.config, description["model_type"], params))
    if processes.index() > 0 and any(
        not leaf.is_fully_addressable for leaf in _device_arrays(params)
    ):
        for names in _shards(tensors, max_shard_size):
            for tensor in file_order({name: tensors[name] for name in names}).values():
                # The gather is collective: every process calls it, in the order of process 0.
                tensor.fetch()
        return
    special = {} if tokenizer is None else special_ids(tokenizer, model.config.vocab_size)
    make_folder(path)
    _write_json(path / "config.json", description | special)
    if special and "score" not in params:
        # The distribution that PPO trains; transformers decodes greedily unless told otherwise.
        _write_json(
            path / "generation_config.json", {"do_sample": True, "temperature": 1.0, **special}
        )
    elif special:
        # A reward model generates nothing; a file of an earlier language model would be read with
        # it.
        (path / "generation_config.json").unlink(missing_ok=True)
    with written(path / "README.md") as file:
        file.write(_card(description))
    _write_shards(path, tensors, max_shard_size)
    if tokenizer is not None:
        save_tokenizer(path, tokenizer)
    sync_tree(path)  # The tokenizer's own writer does not wait for the disk.


def _device_arrays(params: Params) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with written(path) as file:
        file.write(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _card(description: Mapping[str, Any]) -> str:
    """The model card; for a reward model it gives the bias to add to the logits."""
    head = "---\nlibrary_name: transformers\ntags:\n- rlhf_jax\n---\n\n"
    loading = (
        "Loads with `rlhf_jax.load_hf(folder)` or as transformers' "
        f"`{description['architectures'][0]}`.\n"
    )
    if SCORE_BIAS not in description:
        return f"{head}# Language model\n\n{loading}"
    bias = description[SCORE_BIAS]
    return (
        f"{head}# Reward model\n\n{loading}\nThe score of a text is `logits[:, 0] + {bias!r}`: the "
        "layout of a sequence classifier has no bias, so it stands in `config.json` as "
        f"`{SCORE_BIAS}`. With it the labelers' demonstrations score 0 on average. Pad on the "
        "right; the score is read at the last token that is not `pad_token_id`.\n"
    )


def _outgoing(config: DecoderConfig, kind: str, params: Params) -> Iterator[tuple[str, Outgoing]]:
    """Every tensor under its Hugging Face name, layer by layer, as files are commonly laid out."""
    flat: dict[Any, Any] = traverse_util.flatten_dict(params)

    def named(path: tuple[str, ...], layer: int | None) -> tuple[str, Outgoing]:
        flip = is_flipped(path, transposed=kind != "gpt2")
        return tensor_name(NAMES[kind], path).format(layer), _tensor(flat[path], layer, flip)

    for path in flat:
        if path[0] not in ("blocks", "score"):
            yield named(path, None)
    for layer in range(config.layers):
        tensors = dict(named(path, layer) for path in flat if path[0] == "blocks")
        yield from (_joined(tensors, layer) if kind == "gpt2" else tensors).items()
    if "score" in params:
        weight = params["score"]["weight"]
        # A classifier of one label: ``[labels, D]``.
        row = Outgoing((1, *weight.shape), weight.dtype, lambda: _fetch(weight, None)[None])
        yield "score.weight", row


def _tensor(leaf: Any, layer: int | None, flip: bool) -> Outgoing:
    shape = leaf.shape if layer is None else leaf.shape[1:]

    def fetch() -> np.ndarray:
        value = _fetch(leaf, layer)
        return value.T if flip else value

    return Outgoing(shape[::-1] if flip else shape, np.dtype(leaf.dtype), fetch)


def _fetch(leaf: Any, layer: int | None) -> np.ndarray:
    """An array, or one layer of it, on the host."""
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf if layer is None else leaf[layer])
    if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return processes.gather(leaf if layer is None else leaf[layer])
    shards = leaf.addressable_shards
    if len(leaf.sharding.device_set) == 1:
        return _pull(shards[0].data, layer)
    value = np.empty(leaf.shape if layer is None else leaf.shape[1:], leaf.dtype)
    for shard in shards:
        if layer is None:
            value[shard.index] = _pull(shard.data, None)
        # Only shards whose part of the layer axis has this layer; others are not pulled to the
        # host.
        elif layer in range(*shard.index[0].indices(leaf.shape[0])):
            value[shard.index[1:]] = _pull(shard.data, layer - (shard.index[0].start or 0))
    return value


def _pull(piece: jax.Array, layer: int | None) -> np.ndarray:
    if backends.is_on_host(piece):
        value = np.asarray(piece)  # No copy.
        return value if layer is None else value[layer]
    # An array keeps the copy that np.asarray makes on the host. A copy on the device takes it along
    # when it is freed.
    return np.asarray(jnp.copy(piece) if layer is None else piece[layer])


def _joined(tensors: dict[str, Outgoing], layer: int) -> dict[str, Outgoing]:
    """A layer of GPT-2 with query, key and value joined as c_attn."""
    for leaf in ("weight", "bias"):
        parts = [
            tensors.pop(f"transformer.h.{layer}.attn.{part}.{leaf}")
            for part in ("query", "key", "value")
        ]
        shape = (*parts[0].shape[:-1], 3 * parts[0].shape[-1])
        joined = Outgoing(shape, parts[0].dtype, partial(_side_by_side, parts))
        tensors[f"transformer.h.{layer}.attn.c_attn.{leaf}"] = joined
    return tensors


def _side_by_side(parts: Sequence[Outgoing]) -> np.ndarray:
    return np.concatenate([part.fetch() for part in parts], axis=-1)


def _write_shards(folder: Path, tensors: Mapping[str, Outgoing], max_shard_size: int) -> None:
    """Write one file, or several and an index, after deleting the weights of an earlier save."""
    # Before writing: `load_hf` looks at every such file and would refuse a shard that is left over.
    for old in (
        *folder.glob("model.safetensors"),
        *folder.glob("model-*-of-*.safetensors"),
        *folder.glob(INDEX),
    ):
        old.unlink()
    shards = _shards(tensors, max_shard_size)
    if len(shards) == 1:
        return write_file(folder / "model.safetensors", tensors)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    total = sum(tensor.size for tensor in tensors.values())
    # Last, because it must name complete files only.
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(tensors: Mapping[str, Outgoing], limit: int) -> list[list[str]]:
    """Group names into files of at most `limit` bytes; a larger tensor gets its own file."""
    shards: list[list[str]] = [[]]
    free = limit
    for name, tensor in tensors.items():
        if shards[-1] and tensor.size > free:
            shards.append([])
            free = limit
        shards[-1].append(name)
        free -= tensor.size
    return shards
