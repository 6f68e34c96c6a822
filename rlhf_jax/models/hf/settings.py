"""Every setting of a config.json is read, known to be harmless, refused or reported.

A decoder that ignores a setting still gives plausible logits, so no setting is silently skipped:

* what `config_json.config_from_hf` reads is listed per family (`_READ`);
* what does not change the logits, or only training and sampling (which have settings of their own
  here), is listed by the reason (`_HARMLESS`);
* what would change the logits is refused by its name and value, unless the value has no effect
  (`_NEUTRAL`);
* an unknown setting is refused if its name suggests the forward pass (`_COMPUTES`), and otherwise
  printed: a new harmless field of some library must not make a model unreadable.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCORE_BIAS = "rlhf_jax_score_bias"
"""Our own setting: the bias of a score head, for which the Hugging Face layout has no tensor."""

_SHARED = {
    "model_type",
    "vocab_size",
    "tie_word_embeddings",
    "architectures",
    "num_labels",
    "_num_labels",
    "id2label",
}
_ROTARY = {
    "max_position_embeddings", "num_hidden_layers", "hidden_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps", "rope_theta",
    "rope_parameters", "rope_scaling", "sliding_window", "layer_types", "attention_bias",
}  # fmt: skip
_LLAMA = _SHARED | _ROTARY | {"hidden_act", "mlp_bias", "use_sliding_window"}
_READ = {
    "gpt2": _SHARED | {
        "n_positions", "n_layer", "n_embd", "n_head", "n_inner", "layer_norm_epsilon",
        "activation_function",
    },
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma3_text": _SHARED | _ROTARY | {
        "hidden_activation", "query_pre_attn_scalar", "sliding_window_pattern",
        "_sliding_window_pattern", "rope_local_base_freq",
    },
}  # fmt: skip
"""model_type -> the settings that `config_json.config_from_hf` reads."""

_HARMLESS = {
    "where the model comes from and how it is stored": {
        "_name_or_path", "name_or_path", "_commit_hash", "transformers_version",
        "transformers.js_config", "dtype", "torch_dtype", "tokenizer_class", "processor_class",
        "unsloth_version", "unsloth_fixed", "model_max_length", "mlx_version", "vllm_version",
        "license", "_class_name", "save_format", "max_seq_len", "seq_length",
    },
    "which kernel computes the same numbers": {
        "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
        "_attn_implementation_internal", "_experts_implementation", "use_flash_attention_2",
        "use_flash_attention", "use_flash_attn", "use_sdpa", "_flash_attn_2_enabled", "use_cache",
        "cache_implementation", "torchscript", "pretraining_tp", "reorder_and_upcast_attn",
        "gradient_checkpointing", "use_bfloat16", "chunk_size_feed_forward", "fused_rms_norm",
        "use_memory_efficient_attention", "use_fused_rmsnorm", "use_fused_crossentropy",
    },
    "where training starts and what it drops; ours has settings of its own": {
        "initializer_range", "initializer_factor", "init_std", "attention_dropout", "attn_pdrop",
        "embd_pdrop", "resid_pdrop", "hidden_dropout", "hidden_dropout_prob",
        "attention_probs_dropout_prob", "resid_dropout", "embedding_dropout", "mlp_dropout",
        "dropout", "classifier_dropout", "summary_first_dropout", "mlp_dropout_prob",
        "max_sequence_length", "z_loss", "problem_type", "neftune_noise_alpha",
    },
    "how somebody samples; ours has settings of its own": {
        "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
        "temperature", "diversity_penalty", "top_k", "top_p", "typical_p", "repetition_penalty",
        "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
        "num_return_sequences", "forced_bos_token_id", "forced_eos_token_id",
        "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
        "begin_suppress_tokens", "num_logits_to_keep", "task_specific_params", "max_new_tokens",
        "max_window_layers",
    },
    "ids, which the tokenizer has": {
        "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
        "cls_token_id", "mask_token_id", "decoder_start_token_id", "boi_token_index",
        "eoi_token_index", "image_token_index", "image_token_id", "mm_tokens_per_image", "prefix",
    },
    "names of classes, and heads for other tasks, whose tensors would be refused": {
        "label2id", "finetuning_task", "summary_activation", "summary_proj_to_labels",
        "summary_type", "summary_use_proj", "is_decoder", "return_dict", "output_attentions",
        "output_hidden_states", "output_scores", "return_dict_in_generate", "tie_encoder_decoder",
        "tf_legacy_loss", "trust_remote_code", "is_llama_config",
    },
    "our own": {SCORE_BIAS},
}  # fmt: skip
"""The reason why settings do not change the numbers of this decoder -> those settings."""
_KNOWN_HARMLESS = frozenset().union(*_HARMLESS.values())

_OFF = (None, False, 0, "", "none", "default")
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("residual_multiplier", "embedding_multiplier", "logits_scaling", "logit_scale",
         "lm_head_multiplier", "scale_emb", "residual_scale", "embedding_scale",
         "partial_rotary_factor", "rotary_pct", "rope_scaling_factor", "attention_factor",
         "rope_factor", "factor", "decoder_sparse_step", "ep_size"),
        (None, 1, 1.0),
    ),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), (None, 0, 1)),
    "scale_attn_weights": (True,),
    "is_causal": (None, True),
    "causal": (None, True),
    "use_bidirectional_attention": (None, False),
    "norm_topk_prob": (None, True, False),
    "n_ctx": (None,),
}  # fmt: skip
"""Settings of other decoders -> the values with which they change nothing. Other settings that
match `_COMPUTES` may have the values `_OFF`."""
_REFUSED = re.compile(
    r"^(scale_attn_\w+|add_cross_attention|cross_attention_hidden_size|is_encoder_decoder"
    r"|pruned_heads|text_config|vision_config|audio_config|clip_qkv|alibi|dim_model_base"
    r"|scale_depth|mup_\w+|depth_scale\w*|no_rope_layer\w*|mlp_only_layers|first_k_dense_replace)$"
)
_COMPUTES = re.compile(
    r"scal|soft_?cap|logit|mlp|glu|(^|_)ffn|(^|_)gated?(_|$)|mamba|(^|_)ssm|multiplier"
    r"|norm|rope|rotary|bias|window|expert|moe|attn|attention|attend|alibi|parallel|clip|clamp"
    r"|quant|compress|activation|hidden_act|residual|lora|router|mtp|nextn|layer|position"
    r"|embed|head|causal|multimodal|vision|audio|tie_|kv_"
)
"""Parts of the names of settings that are likely to change what a decoder computes."""


def check_settings(description: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse a config.json with a setting that this decoder does not implement.

    Args:
      description: the content of config.json; its ``model_type`` is a family of `_READ`.

    Returns:
      The settings that are unknown here, to be printed (`tell_unread`).

    Raises:
      ValueError: naming the setting, its value, and what to do.
    """
    kind = description["model_type"]
    unknown = {}
    for name, value in description.items():
        if name in _READ[kind] or name in _KNOWN_HARMLESS or _is_plain(name, value, description):
            continue
        if name in _NEUTRAL or _REFUSED.search(name) or _COMPUTES.search(name):
            raise ValueError(
                f"{name}={clipped(value)} in config.json is not supported for model_type={kind!r}: "
                "this decoder would compute other numbers; choose a model without it, or take the "
                "field out if it changes nothing"
            )
        unknown[name] = value
    _check_architecture(kind, description.get("architectures"))
    tied = description.get("tie_word_embeddings", False)
    if type(tied) is not bool:
        raise ValueError(
            f"tie_word_embeddings={clipped(tied)} in config.json must be true or false"
        )
    return unknown


def tell_unread(what: str, unknown: Mapping[str, Any]) -> None:
    """Print the names and values of settings that are not read, if there are any.

    Args:
      what: the file and what it has, ``"config.json has settings"``.
      unknown: name -> value.
    """
    if unknown:
        told = ", ".join(f"{name}={clipped(value)}" for name, value in unknown.items())
        print(f"Note: {what} that are not read: {told}", file=sys.stderr, flush=True)


def _is_plain(name: str, value: Any, description: Mapping[str, Any]) -> bool:
    """Whether a setting that is not read has a value without effect."""
    derived = {
        "n_ctx": description.get("n_positions"),
        "num_heads": description.get("num_attention_heads"),
        "multi_query_group_num": description.get("num_key_value_heads"),
        "layer_norm_eps": description.get("rms_norm_eps"),
        "norm_eps": description.get("rms_norm_eps"),
        "hidden_size": description.get("n_embd"),
        "num_hidden_layers": description.get("n_layer"),
        "num_attention_heads": description.get("n_head"),
        "max_position_embeddings": description.get("n_positions"),
        "rotary_dim": _head_dim(description),
        "query_pre_attn_scalar": _head_dim(description),
        "position_embedding_type": "absolute" if description["model_type"] == "gpt2" else "rope",
        "hidden_activation": description.get("hidden_act"),
        "hidden_act": description.get("hidden_activation"),
    }
    # Granite multiplies scores by it; plain attention has ``head_dim ** -0.5``.
    if name == "attention_multiplier" and type(value) is float and _head_dim(description):
        return abs(value * _head_dim(description) ** 0.5 - 1) < 1e-6
    # Many files repeat a size under the name that another family uses for it.
    if name in derived and value == derived[name]:
        return True
    if name in ("qk_norm", "use_qk_norm", "qk_layernorm") and description["model_type"] in (
        "qwen3",
        "gemma3_text",
    ):
        return value in (None, True)
    # A 1 in this list of SmolLM3 is a layer with rotary positions.
    if name in ("no_rope_layers",):
        return isinstance(value, list) and all(part == 1 for part in value)
    if name in _NEUTRAL:
        return value is None or any(
            value == plain and type(value) is not str for plain in _NEUTRAL[name]
        )
    return value in _OFF or value in ([], {})


def _head_dim(description: Mapping[str, Any]) -> int:
    heads = description.get("num_attention_heads") or 0
    return description.get("head_dim") or (
        description.get("hidden_size", 0) // heads if heads else 0
    )


_CLASSES = re.compile(
    r"(gpt2|llama|mistral|qwen2|qwen3|gemma3|gemma3text)"
    r"(model|lmheadmodel|forcausallm|forsequenceclassification)"
)


def _check_architecture(kind: str, names: Any) -> None:
    """Check that `architectures` is a plain language model or classifier of this model_type."""
    if names is None or names == []:
        return
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"architectures={clipped(names)} in config.json must be a list of names")
    for name in names:
        # A class with another name may compute other numbers from the same settings.
        if not _CLASSES.fullmatch(name.lower()):
            raise ValueError(
                f"architectures={names} in config.json: {name!r} is no plain language model or "
                f"sequence classifier of model_type={kind!r}, so its numbers may be others; if "
                "they are not, write the plain class there"
            )


def check_rope(rope: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    """Refuse a field of a rope description that its kind does not read.

    Args:
      rope: ``rope_scaling`` or ``rope_parameters``, or one part of them.
      names: the fields that its kind reads.
      where: what it is called in config.json.

    Raises:
      ValueError: another field is there, with a value that means something.
    """
    for name, value in rope.items():
        if name not in (*names, "rope_type", "type", "rope_theta") and not _is_plain(
            name, value, {"model_type": ""}
        ):
            raise ValueError(
                f"{name}={clipped(value)} in {where} of config.json is not supported: choose a "
                "model with plain or llama3 rotary positions"
            )


_GGUF_HARMLESS = re.compile(
    r"general\.(?!type$).*|quantize\..*|split\.(no|tensors\.count)"
    r"|llama\.(tensor_data_layout|rope\.scaling\.finetuned|rope\.scaling\.original_context_length"
    r"|context_length|attention\.layer_norm_epsilon|leading_dense_block_count)"
)
"""Fields of a GGUF file that do not change the logits: names, sources, and how it was quantised."""
_GGUF_PLAIN: dict[str, tuple[Any, ...]] = {
    "general.type": ("model",),
    "split.count": (0, 1),
    "llama.attention.causal": (True,),
    "llama.use_parallel_residual": (False,),
    **dict.fromkeys(
        ("llama.rope.scale_linear", "llama.rope.scaling.factor", "llama.rope.scaling.attn_factor",
         "llama.logit_scale", "llama.residual_scale", "llama.embedding_scale", "llama.rope.scale"),
        (1, 1.0),
    ),
}  # fmt: skip
"""Fields of a GGUF file -> the values with which they change nothing; other fields of its family
may have the values `_OFF`."""


def check_gguf_fields(path: Path, fields: Mapping[str, Any], plain: Mapping[str, Any]) -> None:
    """Refuse a GGUF file with a field that changes the logits and is not read.

    Unknown fields are printed.

    Args:
      path: of the file.
      fields: those that are not read.
      plain: field -> the value that follows from what is read.

    Raises:
      ValueError: naming the field and its value.
    """
    unknown = {}
    for name, value in fields.items():
        if (
            _GGUF_HARMLESS.fullmatch(name)
            or _near(value, plain.get(name))
            or value in _GGUF_PLAIN.get(name, _OFF)
        ):
            continue
        if name in _GGUF_PLAIN or name.startswith(("llama.", "adapter.")):
            raise ValueError(
                f"{name}={clipped(value)} in {path} is not supported: this decoder would compute "
                "other numbers; choose a plain llama model in one file"
            )
        unknown[name] = value
    tell_unread(f"{path} has fields", unknown)


def _near(value: Any, plain: Any) -> bool:
    if type(value) not in (int, float) or plain is None:
        return False
    # GGUF stores float32, and the plain value is computed in float64.
    return abs(value - plain) <= 1e-5 * abs(plain)


def clipped(value: Any) -> str:
    """A value as an error may quote it: on one line of at most 60 characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python writes
        return "a huge integer"
    return text if len(text) <= 60 else text[:57] + "..."
