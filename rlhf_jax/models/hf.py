"""Weights in and out: Hugging Face folders (config.json + safetensors), GGUF files and llama2.c checkpoints.

No torch, no pickle, no remote code, and no path is ever built from a name found in a file: shards are the
``*.safetensors`` files of the folder, whatever an index says. Headers are read with limits (`rlhf_jax.run.files`).

Memory: each parameter is allocated once, on its devices' terms, and filled from the files a block of rows at a time;
saving writes a block at a time. So beside the parameters only a few blocks of `_BLOCK` bytes are ever held.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import traverse_util

from rlhf_jax import processes
from rlhf_jax.data.special_ids import follow_folder, set_folder_end_ids
from rlhf_jax.data.text import end_of_turn_id, exported_end_ids
from rlhf_jax.models.config import DecoderConfig, RotaryScaling
from rlhf_jax.models.heads import language_model, scalar_model
from rlhf_jax.models.hf_adapter import find_adapter, refuse_to_save_beside
from rlhf_jax.models.hf_settings import check_gguf_fields, check_rope, check_settings, tell_unread
from rlhf_jax.models.hf_tensors import (
    INDEX,
    check_index,
    full_name,
    is_buffer,
    refuse_unread,
    same_values,
    weight_files,
)
from rlhf_jax.models.vocabulary import check_ids, unused_ids
from rlhf_jax.run.files import (
    PLAIN_NAME,
    check_file,
    check_gguf,
    check_template_name,
    check_tokenizer,
    local_path,
    make_folder,
    parse_json,
    read_json,
    sync_tree,
    written,
)
from rlhf_jax.types import Model, Params

# Our module -> the module's name in a Hugging Face file; {} is the layer.
_LLAMA = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "unembed": "lm_head",
    "blocks.attention_norm": "model.layers.{}.input_layernorm",
    "blocks.attention.query": "model.layers.{}.self_attn.q_proj",
    "blocks.attention.key": "model.layers.{}.self_attn.k_proj",
    "blocks.attention.value": "model.layers.{}.self_attn.v_proj",
    "blocks.attention.out": "model.layers.{}.self_attn.o_proj",
    "blocks.attention.query_norm": "model.layers.{}.self_attn.q_norm",
    "blocks.attention.key_norm": "model.layers.{}.self_attn.k_norm",
    "blocks.mlp_norm": "model.layers.{}.post_attention_layernorm",
    "blocks.mlp.gate": "model.layers.{}.mlp.gate_proj",
    "blocks.mlp.up": "model.layers.{}.mlp.up_proj",
    "blocks.mlp.down": "model.layers.{}.mlp.down_proj",
}
_GEMMA3 = _LLAMA | {
    "blocks.attention.post_norm": "model.layers.{}.post_attention_layernorm",
    "blocks.mlp_norm": "model.layers.{}.pre_feedforward_layernorm",
    "blocks.mlp.post_norm": "model.layers.{}.post_feedforward_layernorm",
}
_GPT2 = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "norm": "transformer.ln_f",
    "unembed": "lm_head",
    "blocks.attention_norm": "transformer.h.{}.ln_1",
    # GPT-2 stores these three as one c_attn, split and joined by _fused.
    "blocks.attention.query": "transformer.h.{}.attn.query",
    "blocks.attention.key": "transformer.h.{}.attn.key",
    "blocks.attention.value": "transformer.h.{}.attn.value",
    "blocks.attention.out": "transformer.h.{}.attn.c_proj",
    "blocks.mlp_norm": "transformer.h.{}.ln_2",
    "blocks.mlp.up": "transformer.h.{}.mlp.c_fc",
    "blocks.mlp.down": "transformer.h.{}.mlp.c_proj",
}
_GGUF = {
    "embed": "token_embd",
    "norm": "output_norm",
    "unembed": "output",
    "blocks.attention_norm": "blk.{}.attn_norm",
    "blocks.attention.query": "blk.{}.attn_q",
    "blocks.attention.key": "blk.{}.attn_k",
    "blocks.attention.value": "blk.{}.attn_v",
    "blocks.attention.out": "blk.{}.attn_output",
    "blocks.mlp_norm": "blk.{}.ffn_norm",
    "blocks.mlp.gate": "blk.{}.ffn_gate",
    "blocks.mlp.up": "blk.{}.ffn_up",
    "blocks.mlp.down": "blk.{}.ffn_down",
}
_NAMES = {"gpt2": _GPT2, "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "gemma3_text": _GEMMA3}
_ARCHITECTURES = {"gpt2": "GPT2", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3_text": "Gemma3"}
_GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_SCORE_BIAS = "rlhf_jax_score_bias"

_INDEX = INDEX
_BLOCK = 2**22
"""Bytes that are read or written at once."""

Window = tuple[slice, ...]
"""A start and a stop for each axis, both numbers."""


@runtime_checkable
class Stored(Protocol):
    """A tensor in a file: its shape, and the windows of it that somebody asks for. A numpy array is one too."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As it lies in the file."""
        ...

    def __getitem__(self, window: Window, /) -> np.ndarray:
        """Reads a window."""
        ...


Read = Callable[[str], Stored]
"""Name of a tensor -> the tensor; ValueError where it is missing."""

Shardings = Callable[[Params], Any]
"""Parameters as `jax.ShapeDtypeStruct`s -> the same tree of shardings."""


def load_hf(
    path: str | Path,
    *,
    dtype: Any = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    shardings: Shardings | None = None,
) -> tuple[Model, Params, Any]:
    """Load a GPT-2, Llama, Mistral, Qwen or Gemma 3 text model from a local folder, or a Llama model from a GGUF file.

    Each parameter goes from the file straight to its devices: the host never holds the model twice. A folder with a
    score head (saved by `save_hf`, or a ``...ForSequenceClassification`` of one label) gives a scalar model. Compute
    is float32; for bfloat16 compute build the model again from ``replace(model.config, dtype=...)``.

    Every tensor and every setting is read, or harmless, or refused by its name; a plain LoRA adapter of PEFT beside the
    base is merged. What is read otherwise than config.json says is printed. Ids that the tokenizer has no token for are
    in ``model.config.unused_ids`` and get no probability.

    Args:
      path: a folder with config.json, safetensors and (optional) tokenizer.json; or a .gguf file.
      dtype: of the parameters.
      mesh: where to put them: each array is split over the ``fsdp`` axis; None = the default device.
      shardings: where to put them instead, as in training: ``partial(sharding.tree_shardings, mesh=mesh)``.

    Returns:
      The model, its parameters, and the tokenizer (None where the folder holds no tokenizer.json; a GGUF file describes
      its own where it is byte-level BPE).

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is corrupt, of an unknown kind, or does not fit the others; or `mesh` beside `shardings`.
    """
    path = local_path("model", path)
    if mesh is not None and shardings is not None:
        raise ValueError("mesh and shardings both say where parameters go: pass one of them")
    if mesh is not None:
        shardings = partial(_over_fsdp, mesh)
    if path.suffix == ".gguf":
        return _load_gguf(path, dtype, shardings)
    adapter = find_adapter(path, _tensors_of, full_name)
    description = _read_config(path)
    config = config_from_hf(description)
    tell_unread(f"{path / 'config.json'} has settings", check_settings(description))
    tensors = _Tensors(path)
    names = _NAMES[description["model_type"]]
    scalar = _is_scalar(description, tensors)
    config = _with_own_head(config, names, tensors, scalar=scalar)
    tokenizer = _load_tokenizer(path, config)
    if tokenizer is not None and not scalar:
        config = dataclasses.replace(config, unused_ids=unused_ids(tokenizer, config.vocab_size))
    model = scalar_model(config) if scalar else language_model(config)
    read = tensors if adapter is None else adapter.applied(tensors, transposed=names is not _GPT2)
    read = _fused(read, config) if names is _GPT2 else read
    check = partial(_all_read, tensors, config, adapter)
    bias = _score_bias(description, tensors)
    params = _assemble(model, names, read, dtype, shardings, transposed=names is not _GPT2, bias=bias, check=check)
    return model, params, tokenizer


def _is_scalar(description: Mapping[str, Any], tensors: _Tensors) -> bool:
    """Whether the folder holds a reward model: it has a score head, which has one row."""
    classifier = [n for n in description.get("architectures") or [] if n.endswith("ForSequenceClassification")]
    if "score.weight" not in tensors:
        if classifier:
            raise ValueError(
                f"architectures={classifier} in config.json speaks of a classifier, and {tensors.path} holds no tensor "
                "'score.weight': a shard is missing, or the head has another name; rename it to score.weight"
            )
        if description.get(_SCORE_BIAS):
            raise ValueError(
                f"{_SCORE_BIAS}={description[_SCORE_BIAS]} in config.json is of a reward model, and {tensors.path} "
                "holds no tensor 'score.weight': a shard is missing, or it is another model's config.json"
            )
        return False
    shape = tuple(tensors("score.weight").shape)
    if len(shape) == 2 and shape[0] != 1:
        raise ValueError(
            f"tensor 'score.weight' of {tensors.path} has the shape {list(shape)}: a classifier of {shape[0]} labels "
            f"(id2label={_short(description.get('id2label'))}) is no reward model; choose one with num_labels=1"
        )
    return True


def _score_bias(description: Mapping[str, Any], tensors: _Tensors) -> np.floating:
    """What is added to ``hidden . score.weight``: our own exports have it in config.json, some others as a tensor."""
    own = np.float32(description.get(_SCORE_BIAS, 0.0))
    if "score.bias" not in tensors or "score.weight" not in tensors:
        return own
    found = _whole(_checked("score.bias", tensors("score.bias"), (1,)))[0].astype(np.float32)
    if own and own != found:
        raise ValueError(
            f"{tensors.path} holds tensor 'score.bias' ({found}) of shape [1], and config.json has {_SCORE_BIAS}="
            f"{own}: take the one out that does not belong to the model"
        )
    return found


def _with_own_head(
    config: DecoderConfig, names: Mapping[str, str], tensors: _Tensors, *, scalar: bool
) -> DecoderConfig:
    """The config as the file has the head: a second copy of a tied one is read over, another head unties the two.

    transformers keeps both where they differ, as a merged adapter that trained the head leaves them.
    """
    head, embedding = f"{names['unembed']}.weight", f"{names['embed']}.weight"
    if not config.tied or head not in tensors or embedding not in tensors:
        return config
    one, other = tensors.peek(head), tensors.peek(embedding)
    equal = one.shape == other.shape and len(one.shape) == 2
    if equal and same_values(one, other, _blocks(one.shape[0], 4 * one.shape[1])):
        tensors(head)  # counts as read
        return config
    if scalar:
        return config  # a reward model has no unembedding: it is named with what else nothing reads
    print(
        f"Note: tie_word_embeddings=true in config.json, but {tensors.path} holds a {head!r} of shape "
        f"{list(one.shape)} that differs from {embedding!r}: the model is read as untied",
        file=sys.stderr,
        flush=True,
    )
    return dataclasses.replace(config, tied=False)


def _all_read(tensors: _Tensors, config: DecoderConfig, adapter: Any) -> None:
    """Refuses what nothing has asked for, in the base and in its adapter."""
    unread = {name: shape for name, shape in tensors.unread.items() if not is_buffer(name, config.layers)}
    refuse_unread(tensors.path, unread, config.layers)
    for module in adapter.pairs if adapter else ():
        name = f"{module}.weight"
        if name not in tensors.read or (config.tied and module == "lm_head"):
            raise ValueError(
                f"the adapter in {adapter.folder} changes {name!r}, which the base does not have (as a matrix of its "
                "own): it is of another base; merge it with PEFT and pass the merged model"
            )
    if adapter:
        print(
            f"Note: the LoRA adapter in {adapter.folder} is merged into its base: {len(adapter.pairs)} matrices, "
            f"weight {adapter.scale:g}",
            file=sys.stderr,
            flush=True,
        )


def save_hf(
    path: str | Path, model: Model, params: Params, tokenizer: Any = None, *, max_shard_size: int = 5_000_000_000
) -> None:
    """Write a folder that `load_hf` and transformers read: weights, config, tokenizer, model card.

    The folder and all its files are on the disk when this returns. Tensors keep the dtype of `params` (bfloat16
    included) and are written one after the other, without a second copy
    of the model on the host. The bias of a score head has no place in the Hugging Face layout and goes to config.json
    as ``rlhf_jax_score_bias``: score = logits + bias. A sequence classifier of transformers reads the last token that
    is not ``pad_token_id``, so the id written there is never that of EOS.

    Args:
      path: the folder; weights and, with a tokenizer, chat templates of an earlier save in it are removed.
      model: as from `language_model` or `scalar_model`.
      params: its parameters, on any devices. Where they lie on those of several processes all call this together;
        process 0 writes, and no process holds more than a layer of what the others have.
      tokenizer: saved beside them, with its chat template.
      max_shard_size: bytes of tensors in one file; above it there are several and an index.

    Raises:
      ValueError: the model has no config, its mixture of parts is no known family, or the folder holds a base
        with an adapter.
      OSError: a file could not be written.
    """
    if not isinstance(model.config, DecoderConfig):
        raise ValueError(f"model.config={model.config!r} must be a DecoderConfig: build the model with language_model")
    path = local_path("the folder to write", path)
    refuse_to_save_beside(path)
    for name in _template_names(tokenizer):
        check_template_name(name, "the tokenizer")
    description = hf_config(model.config, score="score" in params)
    description["dtype"] = str(params["embed"]["embedding"].dtype)
    if "score" in params:
        description[_SCORE_BIAS] = float(params["score"]["bias"])
    tensors = dict(_outgoing(model.config, description["model_type"], params))
    if processes.index() > 0 and any(not leaf.is_fully_addressable for leaf in _device_arrays(params)):
        for names in _shards(tensors, max_shard_size):
            for tensor in _in_file({name: tensors[name] for name in names}).values():
                tensor.fetch()  # its part of what process 0 gathers, in the same order
        return
    special = {} if tokenizer is None else _special_ids(tokenizer, model.config.vocab_size)
    make_folder(path)
    _write_json(path / "config.json", description | special)
    if special and "score" not in params:
        _write_json(path / "generation_config.json", {"do_sample": True, "temperature": 1.0, **special})
    elif special:  # a reward model says nothing, and what a language model left here would be read with it
        (path / "generation_config.json").unlink(missing_ok=True)
    with written(path / "README.md") as file:
        file.write(_card(description))
    _write_shards(path, tensors, max_shard_size)
    if tokenizer is not None:
        _save_tokenizer(path, tokenizer)
    sync_tree(path)  # the tokenizer's own writer does not wait for the disk


def _save_tokenizer(path: Path, tokenizer: Any) -> None:
    # Its own writer leaves the templates of an earlier save there, and loading would take them for this tokenizer's.
    for old in (*path.glob("chat_template.jinja"), *path.glob("additional_chat_templates/*.jinja")):
        old.unlink()
    try:
        tokenizer.save_pretrained(path)
    except Exception as error:
        if type(error) is not Exception:  # the Rust writer raises a bare one where a disk is full
            raise
        raise OSError(f"the tokenizer could not be written to {path}: {error}") from error


def _template_names(tokenizer: Any) -> list[Any]:
    """Names of a tokenizer's chat templates where it has several: the library saves each under its name."""
    templates = getattr(tokenizer, "chat_template", None)
    return list(templates) if isinstance(templates, dict) else []


def _device_arrays(params: Params) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with written(path) as file:
        file.write(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _special_ids(tokenizer: Any, rows: int) -> dict[str, int | list[int]]:
    """Ids of BOS, of all that ends a response (a list where there are several) and of padding, for config.json.

    Padding never has the id of EOS or of the end of a turn, even where the tokenizer says so, nor one beyond the `rows`
    of the embedding, as in a tokenizer that was given a padding token later.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ends = [] if eos is None else list(exported_end_ids(tokenizer))
    last = {eos, end_of_turn_id(tokenizer)}
    choices = (tokenizer.pad_token_id, bos, 0, 1, 2)
    pad = next(i for i in choices if i is not None and i not in last and i < rows)
    ids: dict[str, int | list[int]] = {} if bos is None else {"bos_token_id": int(bos)}
    if ends:
        ids["eos_token_id"] = [int(i) for i in ends] if len(ends) > 1 else int(ends[0])
    return ids | {"pad_token_id": int(pad)}


def _card(description: Mapping[str, Any]) -> str:
    """The model card: what this is, and what a reader of a reward model has to add to its logits."""
    head = "---\nlibrary_name: transformers\ntags:\n- rlhf_jax\n---\n\n"
    loading = f"Loads with `rlhf_jax.load_hf(folder)` or as transformers' `{description['architectures'][0]}`.\n"
    if _SCORE_BIAS not in description:
        return f"{head}# Language model\n\n{loading}"
    bias = description[_SCORE_BIAS]
    return (
        f"{head}# Reward model\n\n{loading}\nThe score of a text is `logits[:, 0] + {bias!r}`: the layout of a "
        f"sequence classifier has no bias, so it stands in `config.json` as `{_SCORE_BIAS}`. With it the labelers' "
        "demonstrations score 0 on average. Pad on the right; the score is read at the last token that is not "
        "`pad_token_id`.\n"
    )


# ------------------------------------------------------------------------------------------------ configs


def config_from_hf(description: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a config.json describes.

    Raises:
      ValueError: a family or a feature this decoder does not have.
    """
    kind = description.get("model_type")
    if not isinstance(kind, str) or kind not in _NAMES:
        raise ValueError(f"model_type={_short(kind)} is not supported: choose a model of {', '.join(_NAMES)}")
    if description.get("quantization_config"):
        raise ValueError("quantization_config in config.json: choose the model's weights that are not quantised")
    for name, value in description.items():
        check_number(name, value, "config.json")
    check_settings(description)
    try:
        readers = {"gpt2": _gpt2_config, "gemma3_text": _gemma3_config}
        return readers.get(kind, _llama_config)(description)
    except KeyError as error:
        raise ValueError(f"config.json lacks the field {error}: copy the model folder again") from error
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"config.json holds a value of a wrong kind ({error}): copy the model folder again") from error


_MILLION = 10**6
_COUNTS = {
    "vocab_size": 10 * _MILLION,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "sliding_window"), 100 * _MILLION),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "sliding_window_pattern"), 10_000),
    **dict.fromkeys(("hidden_size", "n_embd"), _MILLION),
    **dict.fromkeys(("intermediate_size", "n_inner"), 10 * _MILLION),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "head_dim"), 100_000),
}
"""Integers of a config.json and the largest that is believed: far above every model there is."""
_REALS = {
    **dict.fromkeys(("layer_norm_epsilon", "rms_norm_eps"), 1.0),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq", "query_pre_attn_scalar"), 1e15),
}
"""Numbers above 0, and the largest."""


def check_number(name: str, value: Any, where: str) -> None:
    """Refuses a size or constant of a model description that is no number, or absurd; other names are not looked at.

    Raises:
      ValueError: it is.
    """
    if name in _COUNTS and value is not None and not (type(value) is int and 0 <= value <= _COUNTS[name]):
        raise ValueError(f"{where} has {name}={_short(value)}: it must be an integer from 0 to {_COUNTS[name]:,}")
    if name in _REALS and value is not None and not (type(value) in (int, float) and 0 < value <= _REALS[name]):
        raise ValueError(f"{where} has {name}={_short(value)}: it must be a number above 0, at most {_REALS[name]:g}")
    if name == _SCORE_BIAS and not (isinstance(value, int | float) and -1e6 <= value <= 1e6):
        raise ValueError(f"{where} has {name}={_short(value)}: it must be a number from -1e6 to 1e6")


def _short(value: Any) -> str:
    try:
        return repr(value)[:60]
    except ValueError:  # an integer with more digits than Python writes
        return "a huge integer"


def _gpt2_config(d: Mapping[str, Any]) -> DecoderConfig:
    activation = d.get("activation_function", "gelu_new")
    if activation not in _GPT2_ACTIVATIONS:
        raise ValueError(f"activation_function={activation!r} is not supported: {', '.join(_GPT2_ACTIVATIONS)} are")
    return DecoderConfig(
        vocab_size=d["vocab_size"],
        context_length=d["n_positions"],
        layers=d["n_layer"],
        width=d["n_embd"],
        heads=d["n_head"],
        mlp_width=d.get("n_inner") or 0,
        positions="learned",
        norm="layernorm",
        norm_eps=d.get("layer_norm_epsilon", 1e-5),
        activation=_GPT2_ACTIVATIONS[activation],
        bias="all",
        tied=d.get("tie_word_embeddings", True),
    )


def _llama_config(d: Mapping[str, Any]) -> DecoderConfig:
    kind = d["model_type"]
    rope = _rope(d)
    if d.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act={d['hidden_act']!r} is not supported: choose a model with silu")
    attention, mlp = (bool(d.get(name, False)) for name in ("attention_bias", "mlp_bias"))
    if kind == "qwen2":  # its biases are fixed: on query, key and value, whatever attention_bias says
        attention = False
    if attention != mlp:
        raise ValueError(f"attention_bias={attention} and mlp_bias={mlp} must be equal: choose such a model")
    context = _context_within_window(d)
    return DecoderConfig(
        vocab_size=d["vocab_size"],
        context_length=context,
        layers=d["num_hidden_layers"],
        width=d["hidden_size"],
        heads=d["num_attention_heads"],
        kv_heads=d.get("num_key_value_heads") or 0,
        head_dim=d.get("head_dim") or 0,
        mlp_width=d["intermediate_size"],
        norm_eps=d.get("rms_norm_eps", 1e-6),
        bias="qkv" if kind == "qwen2" else "all" if attention else "none",
        tied=d.get("tie_word_embeddings", False),
        rotary_base=float(rope.get("rope_theta", d.get("rope_theta", 10_000.0))),
        rotary_scaling=_rotary_scaling(rope),
        qk_norm=kind == "qwen3",
    )


def _rope(d: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of rotary positions: transformers 5 writes rope_parameters, earlier ones rope_scaling."""
    new, old = (d.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
    if new and old and {**new, "rope_theta": 0, "type": 0} != {**new, **old, "rope_theta": 0, "type": 0}:
        raise ValueError(
            f"rope_parameters={_short(new)} and rope_scaling={_short(old)} in config.json differ: keep one"
        )
    rope = new or old
    theta, other = rope.get("rope_theta"), d.get("rope_theta")
    if theta is not None and other is not None and theta != other:
        raise ValueError(f"rope_theta={other} in config.json, and {theta} in its rope_parameters: keep the right one")
    return rope


def _context_within_window(d: Mapping[str, Any]) -> int:
    """The context, up to the sliding window where there is one: within it, attention is plain attention."""
    context, types = d["max_position_embeddings"], d.get("layer_types") or []
    if set(types) - {_LOCAL, _GLOBAL} or (types and len(types) != d["num_hidden_layers"]):
        raise ValueError(
            f"layer_types={_short(types)} in config.json is not supported: one of {_LOCAL!r} and {_GLOBAL!r} for each "
            f"of {d['num_hidden_layers']} layers is"
        )
    used = d.get("use_sliding_window", d["model_type"] not in ("qwen2", "qwen3"))
    if _LOCAL in types and not d.get("sliding_window"):
        raise ValueError(f"layer_types in config.json has {_LOCAL!r}, and there is no sliding_window: copy it again")
    # Mistral's own config class has a window of 4096 where config.json does not speak of one.
    window = d.get("sliding_window", _MISTRAL_WINDOW if d["model_type"] == "mistral" else None)
    if window and (used or _LOCAL in types):
        return min(context, window)
    return context


_MISTRAL_WINDOW = 4096


def _gemma3_config(d: Mapping[str, Any]) -> DecoderConfig:
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention", "attention_bias"):
        if d.get(name):
            raise ValueError(f"{name}={d[name]} is not supported: choose a Gemma 3 text model without it")
    if d.get("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise ValueError(f"hidden_activation={d['hidden_activation']!r} is not supported: choose a Gemma 3 text model")
    rope = d.get("rope_parameters") or {}
    if set(rope) - {_GLOBAL, _LOCAL}:
        raise ValueError(
            f"rope_parameters={_short(rope)} in config.json is not supported: Gemma 3 has those of {_GLOBAL!r} and of "
            f"{_LOCAL!r}"
        )
    far = _rope({**d, "rope_parameters": rope.get(_GLOBAL)})
    near = _rope({"rope_parameters": rope.get(_LOCAL), "rope_theta": d.get("rope_local_base_freq")})
    if _rotary_scaling(near) is not None:
        raise ValueError(f"rope_parameters of sliding_attention={near} are not supported: choose plain ones there")
    layers = d["num_hidden_layers"]
    return DecoderConfig(
        vocab_size=d["vocab_size"],
        context_length=d["max_position_embeddings"],
        layers=layers,
        width=d["hidden_size"],
        heads=d["num_attention_heads"],
        kv_heads=d["num_key_value_heads"],
        head_dim=d["head_dim"],
        mlp_width=d["intermediate_size"],
        norm="rmsnorm_plus_one",
        norm_eps=d.get("rms_norm_eps", 1e-6),
        activation="geglu",
        tied=d.get("tie_word_embeddings", True),
        rotary_base=float(far.get("rope_theta", d.get("rope_theta", 1_000_000.0))),
        rotary_scaling=_rotary_scaling(far),
        qk_norm=True,
        post_norm=True,
        embedding_scaled=True,
        query_scalar=d.get("query_pre_attn_scalar", 256),
        window=d["sliding_window"],
        window_every=_window_every(d, layers),
        local_rotary_base=float(near.get("rope_theta", d.get("rope_local_base_freq", 10_000.0))),
    )


_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def _window_every(d: Mapping[str, Any], layers: int) -> int:
    """Which layers are global: every n-th."""
    types = d.get("layer_types")
    if types is None:
        return d.get("sliding_window_pattern") or d.get("_sliding_window_pattern") or 6
    every = types.index(_GLOBAL) + 1 if _GLOBAL in types else layers + 1
    if types != _layer_types(layers, every):
        raise ValueError(f"layer_types={types} is not supported: choose a model whose every n-th layer is global")
    return every


def _layer_types(layers: int, every: int) -> list[str]:
    """The kind of each layer as config.json lists it."""
    return [_LOCAL if (layer + 1) % every else _GLOBAL for layer in range(layers)]


_ROPE_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
"""The fields of `RotaryScaling`, in its order, as config.json names them."""


def _rotary_scaling(rope: Mapping[str, Any]) -> RotaryScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope type {kind!r} is not supported: choose a model with plain or llama3 rotary positions")
    check_rope(rope, _ROPE_LLAMA3 if kind == "llama3" else (), "the rope_parameters or rope_scaling")
    if kind == "default":
        return None
    return RotaryScaling(*(rope[name] for name in _ROPE_LLAMA3))


def hf_config(config: DecoderConfig, *, score: bool) -> dict[str, Any]:
    """The config.json of a decoder; `score` names the sequence classifier instead of the language model.

    Raises:
      ValueError: the mixture of parts is none of GPT-2, Llama, Qwen2, Qwen3 and Gemma 3.
    """
    kind = _family(config)
    task = "ForSequenceClassification" if score else "LMHeadModel" if kind == "gpt2" else "ForCausalLM"
    if kind == "gemma3_text" and score:
        task = f"Text{task}"  # the one without Text reads images too
    shared = {
        "model_type": kind,
        "architectures": [_ARCHITECTURES[kind] + task],
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
        **({"num_labels": 1} if score else {}),
    }
    if kind == "gpt2":
        return shared | {
            "n_positions": config.context_length,
            "n_layer": config.layers,
            "n_embd": config.width,
            "n_head": config.heads,
            "n_inner": config.mlp_width,
            "layer_norm_epsilon": config.norm_eps,
            "activation_function": "gelu_new" if config.activation == "gelu_tanh" else "gelu",
        }
    shared |= {
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "rms_norm_eps": config.norm_eps,
    }
    if kind == "gemma3_text":
        return shared | _gemma3_fields(config)
    return shared | {
        "hidden_act": "silu",
        "rope_theta": config.rotary_base,
        **_rope_scaling(config.rotary_scaling),
        **({"attention_bias": config.bias == "all", "mlp_bias": config.bias == "all"} if kind == "llama" else {}),
    }


def _gemma3_fields(config: DecoderConfig) -> dict[str, Any]:
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config.query_scalar or config.head_dim,
        "sliding_window": config.window,
        "layer_types": _layer_types(config.layers, config.window_every),
        "sliding_window_pattern": config.window_every,
        "rope_theta": config.rotary_base,
        "rope_local_base_freq": config.local_rotary_base,
        **_rope_scaling(config.rotary_scaling),
    }


def _rope_scaling(scaling: RotaryScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {}
    return {"rope_scaling": {"rope_type": "llama3", **dict(zip(_ROPE_LLAMA3, scaling, strict=True))}}


def _family(config: DecoderConfig) -> str:
    parts = (config.positions, config.norm, config.activation)
    gemma = config.qk_norm, config.post_norm, config.embedding_scaled, config.window > 0, config.bias
    if parts == ("rotary", "rmsnorm_plus_one", "geglu") and gemma == (True, True, True, True, "none"):
        return "gemma3_text"
    own = config.post_norm, config.embedding_scaled, config.window, config.query_scalar not in (0, config.head_dim)
    multi_head = config.kv_heads == config.heads and config.heads * config.head_dim == config.width
    plain = config.bias == "all" and multi_head and not config.qk_norm
    if parts[:2] == ("learned", "layernorm") and parts[2] in ("gelu", "gelu_tanh") and plain and not any(own):
        return "gpt2"
    if parts == ("rotary", "rmsnorm", "swiglu") and not any(own) and not (config.qk_norm and config.bias != "none"):
        return "qwen3" if config.qk_norm else "qwen2" if config.bias == "qkv" else "llama"
    raise ValueError(
        f"positions={parts[0]!r}, norm={parts[1]!r}, activation={parts[2]!r}, bias={config.bias!r}, qk_norm="
        f"{config.qk_norm}, post_norm={config.post_norm}, window={config.window} is no Hugging Face family: choose the "
        "gpt2 preset, or rotary + rmsnorm + swiglu, with qk_norm only without biases, or all parts of Gemma 3"
    )


# ------------------------------------------------------------------------------------------------ tensors


def _read_config(path: Path) -> dict[str, Any]:
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {path}: pass the folder of a saved model or a .gguf file")
    description = read_json(path / "config.json")
    if not isinstance(description, dict):
        raise ValueError(f"{path / 'config.json'} holds no object: copy it again")
    return description


class _Tensors:
    """The tensors of a model folder, and which of them have been asked for."""

    def __init__(self, path: Path):
        self.path = path
        self.read: set[str] = set()
        self._tensors: dict[str, _InFile] = {}
        for file in weight_files(path):
            for tensor in _tensors_of(file):
                name = full_name(tensor.name)
                if name in self._tensors:
                    twice = f"{self._tensors[name].file.name} and {file.name} in {path}"
                    raise ValueError(f"tensor {name!r} is in both {twice}: delete the file of the other model")
                self._tensors[name] = tensor
        self._check_index()

    def _check_index(self) -> None:
        """The index is believed in one thing only: which tensors there should be, and in which file."""
        if not (self.path / _INDEX).exists():
            return
        index = read_json(self.path / _INDEX)
        try:
            weight_map = index["weight_map"]
            missing = {str(shard): name for name, shard in weight_map.items() if full_name(name) not in self}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path / _INDEX} is corrupt ({error!r}): copy it again") from error
        if missing:
            shard, name = min(missing.items())
            raise ValueError(
                f"a shard is missing: tensor {name!r} should be in {shard!r} in {self.path}: copy that file again"
            )
        for shard in weight_map.values():
            if not isinstance(shard, str) or not PLAIN_NAME.fullmatch(shard):
                raise ValueError(
                    f"{self.path / _INDEX} names the shard {_short(shard)}, which is no file of this folder: "
                    "an index holds plain file names; copy the model again from a source you trust"
                )
        check_index(self.path, weight_map, self._tensors, full_name)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __call__(self, name: str) -> Stored:
        tensor = self.peek(name)
        self.read.add(name)
        return tensor

    def peek(self, name: str) -> _InFile:
        """The tensor, which does not count as read for it."""
        if name not in self._tensors:
            raise ValueError(
                f"{self.path} holds no tensor {name!r}: a shard is missing, or config.json is another's"
                f"{self._hint(name)}"
            )
        tensor = self._tensors[name]
        if tensor.kind not in _FLOATS:
            raise ValueError(
                f"tensor {tensor.name!r} of {tensor.file} is of the type {tensor.kind}: choose weights that are not "
                "quantised"
            )
        return tensor

    def _hint(self, name: str) -> str:
        if name == "lm_head.weight":
            return "; if the unembedding is the embedding, write tie_word_embeddings=true there"
        unread = [other for other in self._tensors if other not in self.read]
        return f"; among what it holds beside is {unread[0]!r} {list(self._tensors[unread[0]].shape)}" if unread else ""

    @property
    def unread(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that nobody asked for."""
        return {name: tensor.shape for name, tensor in self._tensors.items() if name not in self.read}


@dataclasses.dataclass(frozen=True)
class _InFile:
    """A tensor of a safetensors file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str

    def __getitem__(self, window: Window, /) -> np.ndarray:
        # Opened anew for each block: what was read of a mapped file counts as memory of this process until it closes.
        with safetensors.safe_open(self.file, framework="numpy") as file:
            return file.get_slice(self.name)[window]


_FLOATS = ("F64", "F32", "F16", "BF16")


_HEADER_LIMIT = 100_000_000
"""Bytes of the header of a safetensors file, as the library has it."""


def _check_header(file: Path) -> None:
    """Refuses a header that the library would take: one that gives a tensor twice, or is nested without end."""
    check_file(file)
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > _HEADER_LIMIT:
            raise ValueError(
                f"{file} is corrupt (its header of {length:,} bytes is above the limit of {_HEADER_LIMIT:,}): "
                "it is no safetensors file; copy it again"
            )
        header = parse_json(stream.read(length), str(file))
    if not isinstance(header, dict):
        raise ValueError(f"{file} is corrupt (its header is no object): copy it again")


def _tensors_of(file: Path) -> Iterator[_InFile]:
    _check_header(file)
    try:
        with safetensors.safe_open(file, framework="numpy") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            kinds = {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{file} is corrupt ({error}): copy it again") from error
    for name, (kind, shape) in kinds.items():
        yield _InFile(file, name, shape, kind)


class _Columns:
    """Some columns of a tensor."""

    def __init__(self, whole: Stored, start: int, width: int):
        self._whole, self._start = whole, start
        self.shape = (*whole.shape[:-1], width)

    def __getitem__(self, window: Window, /) -> np.ndarray:
        *others, columns = window
        return self._whole[(*others, slice(self._start + columns.start, self._start + columns.stop))]


def _fused(read: Read, config: DecoderConfig) -> Read:
    """GPT-2's c_attn [D, 3D] served as query, key and value."""

    def split(name: str) -> Stored:
        for place, part in enumerate(("query", "key", "value")):
            if f".attn.{part}." in name:
                fused = read(name.replace(f".attn.{part}.", ".attn.c_attn."))
                return _Columns(fused, place * config.width, config.width)
        return read(name)

    return split


def _hf_name(names: Mapping[str, str], path: tuple[str, ...]) -> str:
    return f"{names['.'.join(path[:-1])]}.{'bias' if path[-1] == 'bias' else 'weight'}"


def _flipped(path: tuple[str, ...], *, transposed: bool) -> bool:
    """Whether a file keeps this matrix as (out, in): all of them, or in GPT-2 the head only."""
    return path[-1] == "kernel" and (transposed or path[0] == "unembed")


def _assemble(
    model: Model,
    names: Mapping[str, str],
    read: Read,
    dtype: Any,
    shardings: Shardings | None,
    *,
    transposed: bool,
    bias: np.floating | float = 0.0,
    check: Callable[[], None] = lambda: None,
) -> Params:
    """Parameters of the shapes `model` expects; `transposed` files keep matrices as (out, in).

    Every tensor is found, and `check` called, before the first of them is read.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    places = {} if shardings is None else traverse_util.flatten_dict(shardings(shapes))
    expected: dict[Any, Any] = traverse_util.flatten_dict(shapes)
    makers = {}
    for path, leaf in expected.items():
        stacked, flip = path[0] == "blocks", _flipped(path, transposed=transposed)
        if path[0] == "score":
            makers[path] = partial(_window_of, _score(read, path[1], leaf.shape, bias).astype(dtype))
        else:
            name, shape = _hf_name(names, path), leaf.shape[1:] if stacked else leaf.shape
            layers = [name.format(i) for i in range(leaf.shape[0])] if stacked else [name]
            stored = [_checked(n, read(n), shape[::-1] if flip else shape) for n in layers]
            makers[path] = partial(_read_piece, stored, dtype, stacked=stacked, flip=flip)
    check()
    params = {path: _place(expected[path].shape, dtype, places.get(path), make) for path, make in makers.items()}
    return traverse_util.unflatten_dict(params)


def _checked(name: str, value: Stored, shape: tuple[int, ...]) -> Stored:
    if tuple(value.shape) != shape:
        raise ValueError(f"tensor {name!r} has the shape {value.shape}, config.json asks for {shape}: not its weights")
    return value


def _place(shape: tuple[int, ...], dtype: Any, sharding: Any, make: Callable[[Window], np.ndarray]) -> jax.Array:
    """An array on its devices; each device's piece is made once. One that starts on 64 bytes is taken over by a CPU."""

    def piece(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        return make(tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True)))

    if sharding is None:
        placed = jax.device_put(piece((slice(None),) * len(shape)))
    else:
        placed = jax.make_array_from_callback(shape, sharding, piece, dtype=dtype)
    return placed.block_until_ready()  # else pieces on their way to a device would add up on the host


def _read_piece(stored: Sequence[Stored], dtype: Any, index: Window, *, stacked: bool, flip: bool) -> np.ndarray:
    """The part `index` of a parameter: of all layers (`stacked`), or of the one tensor it is; `flip` turns matrices."""
    target = _aligned(tuple(part.stop - part.start for part in index), dtype)
    layers, window = (index[0], index[1:]) if stacked else (slice(0, 1), index)
    for place, layer in enumerate(stored[layers]):
        part = target[place] if stacked else target
        _copy(layer, window[::-1] if flip else window, part.T if flip else part)
    return target


def _copy(source: Stored, window: Window, target: np.ndarray) -> None:
    """Fills `target` from a window of the file, in its dtype, one block of rows after the other."""
    rows, *others = window
    for block in _blocks(len(target), target.dtype.itemsize * math.prod(source.shape[1:])):
        target[block] = source[(slice(rows.start + block.start, rows.start + block.stop), *others)]


def _blocks(rows: int, row_size: int) -> Iterator[slice]:
    """Rows of `row_size` bytes by blocks of about `_BLOCK`: of the whole row, which a file brings in for a part too."""
    step = max(1, _BLOCK // max(1, row_size))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that starts on a multiple of 64 bytes: `jax.device_put` takes such a one as it is on a CPU."""
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(jnp.dtype(dtype)).reshape(shape)


def _score(read: Read, leaf: str, shape: tuple[int, ...], bias: np.floating | float) -> np.ndarray:
    if leaf == "bias":
        return np.asarray(bias)
    return _whole(_checked("score.weight", read("score.weight"), (1, *shape)))[0]


def _whole(tensor: Stored) -> np.ndarray:
    return tensor[tuple(slice(0, size) for size in tensor.shape)]


def _window_of(value: np.ndarray, index: Window) -> np.ndarray:
    return np.array(value[index])


def _over_fsdp(mesh: jax.sharding.Mesh, params: Params) -> Any:
    """The longest axis that divides is split over ``fsdp``; what has none is replicated."""
    parts = mesh.shape.get("fsdp", 1)

    def place(leaf: jax.ShapeDtypeStruct) -> jax.sharding.NamedSharding:
        axes = [axis for axis in range(leaf.ndim) if parts > 1 and leaf.shape[axis] % parts == 0]
        spec: list[str | None] = [None] * leaf.ndim
        if axes:
            spec[max(axes, key=lambda axis: leaf.shape[axis])] = "fsdp"
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    return jax.tree.map(place, params)


# ------------------------------------------------------------------------------------------------ writing


class _Outgoing(NamedTuple):
    """A tensor to be written: what the header says of it, and how it is fetched when its turn comes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def _outgoing(config: DecoderConfig, kind: str, params: Params) -> Iterator[tuple[str, _Outgoing]]:
    """Every tensor under its Hugging Face name, layer by layer, as files are commonly laid out."""
    flat: dict[Any, Any] = traverse_util.flatten_dict(params)
    for path, leaf in flat.items():
        if path[0] not in ("blocks", "score"):
            yield _hf_name(_NAMES[kind], path), _tensor(leaf, None, _flipped(path, transposed=kind != "gpt2"))
    blocks = {path: leaf for path, leaf in flat.items() if path[0] == "blocks"}
    for layer in range(config.layers):
        tensors = {
            _hf_name(_NAMES[kind], path).format(layer): _tensor(leaf, layer, _flipped(path, transposed=kind != "gpt2"))
            for path, leaf in blocks.items()
        }
        yield from (_joined(tensors, layer) if kind == "gpt2" else tensors).items()
    if "score" in params:
        weight = params["score"]["weight"]
        yield "score.weight", _Outgoing((1, *weight.shape), weight.dtype, lambda: _fetch(weight, None)[None])


def _tensor(leaf: Any, layer: int | None, flip: bool) -> _Outgoing:
    shape = leaf.shape if layer is None else leaf.shape[1:]

    def fetch() -> np.ndarray:
        value = _fetch(leaf, layer)
        return value.T if flip else value

    return _Outgoing(shape[::-1] if flip else shape, np.dtype(leaf.dtype), fetch)


def _fetch(leaf: Any, layer: int | None) -> np.ndarray:
    """An array or one layer of it on the host: as it lies on one CPU device, else put together from pieces."""
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
        elif layer in range(*shard.index[0].indices(leaf.shape[0])):
            value[shard.index[1:]] = _pull(shard.data, layer - (shard.index[0].start or 0))
    return value


def _pull(piece: jax.Array, layer: int | None) -> np.ndarray:
    if next(iter(piece.devices())).platform == "cpu":
        value = np.asarray(piece)  # no copy
        return value if layer is None else value[layer]
    # An array keeps the host's copy that np.asarray makes of it. So it is made of a copy on the device, which goes.
    return np.asarray(jnp.copy(piece) if layer is None else piece[layer])


def _joined(tensors: dict[str, _Outgoing], layer: int) -> dict[str, _Outgoing]:
    """A layer of GPT-2 with its query, key and value as one c_attn."""
    for leaf in ("weight", "bias"):
        parts = [tensors.pop(f"transformer.h.{layer}.attn.{part}.{leaf}") for part in ("query", "key", "value")]
        shape = (*parts[0].shape[:-1], 3 * parts[0].shape[-1])
        fused = _Outgoing(shape, parts[0].dtype, partial(_side_by_side, parts))
        tensors[f"transformer.h.{layer}.attn.c_attn.{leaf}"] = fused
    return tensors


def _side_by_side(parts: Sequence[_Outgoing]) -> np.ndarray:
    return np.concatenate([part.fetch() for part in parts], axis=-1)


def _write_shards(folder: Path, tensors: Mapping[str, _Outgoing], max_shard_size: int) -> None:
    """One file, or several and their index; the weights of an earlier save go first."""
    for old in (*folder.glob("model.safetensors"), *folder.glob("model-*-of-*.safetensors"), *folder.glob(_INDEX)):
        old.unlink()
    shards = _shards(tensors, max_shard_size)
    if len(shards) == 1:
        return _write_file(folder / "model.safetensors", tensors)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    total = sum(tensor.size for tensor in tensors.values())
    _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(tensors: Mapping[str, _Outgoing], limit: int) -> list[list[str]]:
    """Names in files of at most `limit` bytes; a larger tensor has a file of its own."""
    shards: list[list[str]] = [[]]
    free = limit
    for name, tensor in tensors.items():
        if shards[-1] and tensor.size > free:
            shards.append([])
            free = limit
        shards[-1].append(name)
        free -= tensor.size
    return shards


_HEADER_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


def _in_file(tensors: Mapping[str, _Outgoing]) -> dict[str, _Outgoing]:
    """The order in a file: wider types first, so that each tensor starts on a multiple of its own width."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))


def _write_file(file: Path, tensors: Mapping[str, _Outgoing]) -> None:
    """A safetensors file, written a block at a time: the library's own writer wants all tensors in memory at once.

    Eight bytes of length, the header as JSON padded to a multiple of eight, then the tensors one after the other.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    ordered = _in_file(tensors)
    for name, tensor in ordered.items():
        start, end = end, end + tensor.size
        kind = _HEADER_TYPES[tensor.dtype.name]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with written(file, binary=True) as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for tensor in ordered.values():
            value = tensor.fetch()
            for block in _blocks(len(value), value[:1].nbytes):
                out.write(np.ascontiguousarray(value[block]).reshape(-1).view(np.uint8).data)


def _load_tokenizer(folder: Path, config: DecoderConfig) -> Any:
    if not (folder / "tokenizer.json").exists():
        return None
    file = check_tokenizer(folder)
    import transformers  # slow to import, and only this needs it

    try:  # the file is named, so that tokenizer_config.json cannot name another
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, tokenizer_file=str(file)
        )
    except Exception as error:  # tokenizers raises bare Exception on a malformed file
        raise ValueError(f"the tokenizer in {folder} cannot be read ({error}): copy or save it again") from error
    follow_folder(tokenizer, folder, vocab_size=config.vocab_size)
    return _fitting(tokenizer, config, folder)


def _fitting(tokenizer: Any, config: DecoderConfig, where: Path) -> Any:
    check_ids(tokenizer, config.vocab_size, where)
    return tokenizer


# --------------------------------------------------------------------------------------- GGUF and llama2.c


def _half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key matrix (out, in) from interleaved rotary pairs (0,1),(2,3).. to half-split pairs."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _unpermuted(read: Read, config: DecoderConfig) -> Read:
    heads = {"attn_q": config.heads, "attn_k": config.kv_heads}

    def unpermute(name: str) -> Stored:
        part = next((part for part in heads if f".{part}." in name), None)
        return read(name) if part is None else _half_split(_whole(read(name)), heads[part])

    return unpermute


class _Quantised:
    """A tensor of a GGUF file, dequantised by rows."""

    def __init__(self, tensor: Any, dequantise: Callable[..., np.ndarray]):
        self._tensor, self._dequantise = tensor, dequantise
        self.shape = tuple(int(size) for size in reversed(tensor.shape))

    def __getitem__(self, window: Window, /) -> np.ndarray:
        rows, *others = window
        block = np.array(self._dequantise(self._tensor.data[rows], self._tensor.tensor_type)[(slice(None), *others)])
        _let_go(self._tensor.data)
        return block


def _let_go(mapped: Any) -> None:
    """What was read of a mapped file no longer counts as memory of this process; reading it again is possible."""
    while mapped is not None and not isinstance(mapped, mmap.mmap):
        mapped = getattr(mapped, "base", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _load_gguf(path: Path, dtype: Any, shardings: Shardings | None) -> tuple[Model, Params, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: pass a .gguf file or the folder of a saved model")
    try:
        import gguf  # an extra: pip install rlhf_jax[gguf]
    except ImportError as error:
        raise ValueError("reading .gguf files needs the gguf package: pip install gguf") from error
    check_gguf(path)
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # the reader fails with whatever the bytes lead it to
        raise ValueError(f"{path} is corrupt ({error}): copy it again") from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    if len(tensors) < len(reader.tensors):
        raise ValueError(f"{path} holds a tensor twice: copy it again")
    found: set[str] = set()

    def read(name: str) -> Stored:
        if name not in tensors:
            raise ValueError(f"{path} holds no tensor {name!r}: only plain llama models are supported")
        found.add(name)
        return _Quantised(tensors[name], gguf.quants.dequantize)

    def check() -> None:
        left = {name: [int(n) for n in reversed(one.shape)] for name, one in tensors.items() if name not in found}
        refuse_unread(path, left, config.layers)

    config = _gguf_config(reader, path, read, tied="output.weight" not in tensors)
    if "rope_freqs.weight" in tensors:
        raise ValueError(f"{path} scales its rotary frequencies: choose a model with plain rotary positions")
    tokenizer = _load_tokenizer(path.parent, config) or _gguf_tokenizer(reader)
    if tokenizer is not None:
        _fitting(tokenizer, config, path)
        config = dataclasses.replace(config, unused_ids=unused_ids(tokenizer, config.vocab_size))
    model = language_model(config)
    params = _assemble(model, _GGUF, _unpermuted(read, config), dtype, shardings, transposed=True, check=check)
    return model, params, tokenizer


_GGUF_CONTROL, _GGUF_USER_DEFINED = 3, 4
"""Types in ``tokenizer.ggml.token_type``: control tokens, and tokens that a text is cut at before the merges."""


def _gguf_tokenizer(reader) -> Any:
    """The byte-level BPE tokenizer that a GGUF file describes; None where it describes another kind."""

    def field(name: str) -> Any:
        entry = reader.get_field(f"tokenizer.ggml.{name}")
        return None if entry is None else entry.contents()

    if field("model") != "gpt2":
        return None
    import tokenizers
    import transformers  # slow to import and 60 MB large, and only this needs it
    from tokenizers import decoders, models, pre_tokenizers

    # How the text is cut before the merges: as GPT-2 does, and for SmolLM each digit by itself first.
    cuts = {"gpt-2": [], "smollm": [pre_tokenizers.Digits(individual_digits=True)]}
    if field("pre") not in cuts:
        return None
    pieces, kinds, merges = field("tokens"), field("token_type"), field("merges")
    merges = [tuple(merge.split(" ")) for merge in merges or ()]
    kinds = kinds or [1] * len(pieces)
    if not len(pieces) == len(kinds) == len(set(pieces)):
        raise ValueError(
            f"the tokenizer of the GGUF file has {len(pieces)} tokens, {len(set(pieces))} of them different, and "
            f"{len(kinds)} types: copy the file again, or put the model's tokenizer.json beside it"
        )
    try:
        inner = tokenizers.Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    except Exception as error:  # the Rust library raises a bare one where a merge makes a piece that is no token
        raise ValueError(f"the tokenizer of the GGUF file cannot be read ({error}): copy the file again") from error
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts[field("pre")], pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    control = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == _GGUF_CONTROL]
    inner.add_special_tokens([tokenizers.AddedToken(piece, normalized=False, special=True) for piece in control])
    own = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == _GGUF_USER_DEFINED]
    inner.add_tokens([tokenizers.AddedToken(piece, normalized=False, special=False) for piece in own])
    _add_ends(inner, pieces, field)
    ids = {name: field(f"{part}_token_id") for name, part in _GGUF_SPECIAL.items()}
    template = reader.get_field("tokenizer.chat_template")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        clean_up_tokenization_spaces=False,
        chat_template=template and template.contents(),
        **{name: pieces[i] for name, i in ids.items() if i is not None},
    )
    end_of_turn = field("eot_token_id")
    if end_of_turn is not None and end_of_turn != ids["eos_token"]:
        set_folder_end_ids(tokenizer, (int(end_of_turn),))
    return tokenizer


def _add_ends(inner: Any, pieces: Sequence[str], field: Callable[[str], Any]) -> None:
    """BOS and EOS around a text, where the file says that the model was trained so."""
    from tokenizers import processors

    ends = {}
    for name in ("bos", "eos"):
        i = field(f"{name}_token_id")
        if field(f"add_{name}_token"):
            if i is None or i >= len(pieces):
                raise ValueError(
                    f"tokenizer.ggml.add_{name}_token is true in the GGUF file, and {name}_token_id is {i}: copy it "
                    "again, or put the model's tokenizer.json beside it"
                )
            ends[name] = (pieces[i], i)
    if ends:
        before, after = (f"{ends[name][0]}:0" if name in ends else "" for name in ("bos", "eos"))
        single = [part for part in (before, "$A:0", after) if part]
        inner.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[*dict(ends.values()).items()]
        )


_GGUF_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _speaks(name: str) -> bool:
    """Whether a field of a GGUF file may say how the model computes: not the header's own, nor what is only a name."""
    return name not in _GGUF_COUNTS.values() and not name.startswith(("GGUF.", "tokenizer."))


_GGUF_COUNTS = {
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.attention.key_length",
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "max_position_embeddings": "llama.context_length",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_theta": "llama.rope.freq_base",
}
"""config.json's name of a number -> its name in a GGUF file."""


def _gguf_config(reader, path: Path, read: Read, *, tied: bool) -> DecoderConfig:
    def field(name: str, default: Any = None) -> Any:
        entry = reader.get_field(name)
        if entry is None and default is None:
            raise ValueError(f"{path} lacks the field {name!r}: only llama models are supported")
        return default if entry is None else entry.contents()

    kind = field("general.architecture")
    if kind != "llama":
        raise ValueError(f"general.architecture={_short(kind)} is not supported: choose a llama GGUF file")
    heads, width = field("llama.attention.head_count"), field("llama.embedding_length")
    for name, key in _GGUF_COUNTS.items():
        check_number(name, field(key, 1), str(path))
    head_dim = field("llama.attention.key_length", width // max(heads, 1))
    plain = {
        "llama.vocab_size": read("token_embd.weight").shape[0],
        "llama.rope.dimension_count": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.attention.scale": head_dim**-0.5,
    }
    check_gguf_fields(path, {f.name: f.contents() for f in reader.fields.values() if _speaks(f.name)}, plain)
    return DecoderConfig(
        vocab_size=read("token_embd.weight").shape[0],
        context_length=field("llama.context_length"),
        layers=field("llama.block_count"),
        width=width,
        heads=heads,
        kv_heads=field("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_width=field("llama.feed_forward_length"),
        norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rotary_base=field("llama.rope.freq_base", 10_000.0),
        tied=tied,
    )


def load_llama2c(path: str | Path, tokenizer_path: str | Path | None = None) -> tuple[Model, Params, Any]:
    """Load a llama2.c checkpoint (.bin, version 0, float32) and its tokenizer (.bin).

    The header is seven int32: width, mlp_width, layers, heads, kv_heads, vocabulary (negative: untied head), context.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the file's size does not fit its header.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: pass a llama2.c .bin checkpoint")
    content = path.read_bytes()
    if len(content) < 28:
        raise ValueError(f"{path} is corrupt ({len(content)} bytes is less than a header): copy it again")
    if content[:4] == b"24ka":
        raise ValueError(
            f"{path} is of version {struct.unpack('<i', content[4:8])[0]} of llama2.c, and only version 0 is read: "
            "export it again with --version 0"
        )
    width, mlp_width, layers, heads, kv_heads, vocabulary, context = struct.unpack("<7i", content[:28])
    sizes = {"hidden_size": width, "intermediate_size": mlp_width, "num_hidden_layers": layers,
             "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": abs(vocabulary),
             "max_position_embeddings": context}  # fmt: skip
    for name, value in sizes.items():
        check_number(name, value, str(path))
    config = DecoderConfig(
        vocab_size=abs(vocabulary),
        context_length=context,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        mlp_width=mlp_width,
        tied=vocabulary > 0,
    )
    if len(content) % 4:
        raise ValueError(f"{path} is corrupt ({len(content)} bytes are no whole number of float32): copy it again")
    tensors = _llama2c_tensors(config, np.frombuffer(content, "<f4", offset=28), path)
    _check_rotary_tables(config, tensors.pop("rotary tables.weight"), path)
    model = language_model(config)
    read = _unpermuted(tensors.__getitem__, config)
    params = _assemble(model, _GGUF, read, jnp.float32, None, transposed=True)
    return model, params, None if tokenizer_path is None else _load_llama2c_tokenizer(Path(tokenizer_path), config)


def _llama2c_tensors(config: DecoderConfig, values: np.ndarray, path: Path) -> dict[str, np.ndarray]:
    """The file's tensors under their GGUF names: the file has them in this order, each for all layers."""
    d, m, v = config.width, config.mlp_width, config.vocab_size
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    blocks = {"attn_norm": (d,), "attn_q": (q, d), "attn_k": (kv, d), "attn_v": (kv, d), "attn_output": (d, q)}
    blocks |= {"ffn_norm": (d,), "ffn_gate": (m, d), "ffn_down": (d, m), "ffn_up": (m, d)}
    order = {"token_embd": (v, d)} | {f"blk.{{}}.{name}": shape for name, shape in blocks.items()}
    order |= {"output_norm": (d,), "rotary tables": (config.context_length, config.head_dim)}
    if not config.tied:
        order["output"] = (v, d)
    tensors, offset = {}, 0
    for name, shape in order.items():
        for layer in range(config.layers if "{}" in name else 1):
            size = math.prod(shape)
            if offset + size > values.size:
                raise ValueError(f"{path} is corrupt (it ends in {name!r}): copy it again")
            tensors[f"{name.format(layer)}.weight"] = values[offset : offset + size].reshape(shape)
            offset += size
    if offset != values.size:
        raise ValueError(f"{path} is corrupt ({values.size - offset} values too many): copy it again")
    return tensors


def _check_rotary_tables(config: DecoderConfig, tables: np.ndarray, path: Path) -> None:
    """The tables of cosines and sines are those of the base that the file has no field for; zeros are none."""
    frequencies = config.rotary_base ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    angles = np.arange(config.context_length)[:, None] * frequencies
    wanted = np.concatenate([np.cos(angles).ravel(), np.sin(angles).ravel()])
    if tables.any() and np.abs(tables.ravel() - wanted).max() > 0.01:
        raise ValueError(
            f"{path} holds rotary tables of shape {list(tables.shape)} that are not those of the base "
            f"{config.rotary_base:g}: pass the model as a Hugging Face folder, whose config.json has rope_theta"
        )


def _load_llama2c_tokenizer(path: Path, config: DecoderConfig) -> Any:
    import tokenizers
    import transformers  # slow to import, and only this needs it
    from tokenizers import decoders, models, normalizers, processors

    scores = _llama2c_pieces(path, config.vocab_size)
    vocabulary = {piece: place for place, piece in enumerate(scores)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=_merges(scores), unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _llama2c_pieces(path: Path, vocab_size: int) -> dict[str, float]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: pass the llama2.c tokenizer .bin")
    content, offset, scores = path.read_bytes(), 4, {}
    try:
        for place in range(vocab_size):
            score, length = struct.unpack_from("<fI", content, offset)
            piece = content[offset + 8 : offset + 8 + length].decode("utf-8")
            offset += 8 + length
            # llama2.c wraps the control tokens in line breaks.
            name = {0: "<unk>", 1: "<s>", 2: "</s>"}.get(place, piece)
            if name in scores:
                raise ValueError(f"{path} is corrupt (the piece {name!r} stands in it twice): copy it again")
            scores[name] = score
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is corrupt ({error}): copy it again") from error
    if offset != len(content):
        raise ValueError(
            f"{path} holds more pieces than the model's {vocab_size}: it is the tokenizer of another model"
        )
    return scores


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the best score first: what llama2.c searches greedily."""
    joined = sorted((piece for piece in list(scores)[259:] if len(piece) > 1), key=lambda piece: -scores[piece])
    return [
        (piece[:cut], piece[cut:])
        for piece in joined
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
