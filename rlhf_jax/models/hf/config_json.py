"""A config.json as a `DecoderConfig`, and a `DecoderConfig` as a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_jax.models.config import DecoderConfig, RotaryScaling
from rlhf_jax.models.hf.families import ARCHITECTURES, NAMES, family_of
from rlhf_jax.models.hf.settings import SCORE_BIAS, check_rope, check_settings, clipped


def config_from_hf(description: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a config.json describes.

    Raises:
      ValueError: a family or a feature that this decoder does not have.
    """
    kind = description.get("model_type")
    if not isinstance(kind, str) or kind not in NAMES:
        raise ValueError(
            f"model_type={clipped(kind)} is not supported: choose a model of {', '.join(NAMES)}"
        )
    if description.get("quantization_config"):
        raise ValueError(
            "quantization_config in config.json: choose the model's weights that are not quantised"
        )
    for name, value in description.items():
        check_number(name, value, "config.json")
    check_settings(description)
    try:
        readers = {"gpt2": _gpt2_config, "gemma3_text": _gemma3_config}
        return readers.get(kind, _llama_config)(description)
    except KeyError as error:
        raise ValueError(
            f"config.json lacks the field {error}: copy the model folder again"
        ) from error
    # config.json is not trusted: a list or text where a number belongs fails somewhere in a reader.
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"config.json holds a value of a wrong kind ({error}): copy the model folder again"
        ) from error


_MILLION = 10**6


_COUNTS = {
    "vocab_size": 10 * _MILLION,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "sliding_window"), 100 * _MILLION),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "sliding_window_pattern"), 10_000),
    **dict.fromkeys(("hidden_size", "n_embd"), _MILLION),
    **dict.fromkeys(("intermediate_size", "n_inner"), 10 * _MILLION),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "head_dim"), 100_000),
}
"""Integers of a config.json and the largest accepted value, far above that of any known model."""


_REALS = {
    **dict.fromkeys(("layer_norm_epsilon", "rms_norm_eps"), 1.0),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq", "query_pre_attn_scalar"), 1e15),
}
"""Positive numbers of a config.json, and the largest accepted value."""


def check_number(name: str, value: Any, where: str) -> None:
    """Refuse a size or constant of a model description that is not a number, or out of range.

    Args:
      name: of the field; fields that are neither a size nor a constant are accepted.
      value: of the field.
      where: the file, for the message.

    Raises:
      ValueError: the value is refused.
    """
    if (
        # `type`, because ``true`` in JSON is an integer for `isinstance`.
        name in _COUNTS
        and value is not None
        and not (type(value) is int and 0 <= value <= _COUNTS[name])
    ):
        raise ValueError(
            f"{where} has {name}={clipped(value)}: it must be an integer from 0 to "
            f"{_COUNTS[name]:,}"
        )
    if (
        name in _REALS
        and value is not None
        and not (type(value) in (int, float) and 0 < value <= _REALS[name])
    ):
        raise ValueError(
            f"{where} has {name}={clipped(value)}: it must be a number above 0, at most "
            f"{_REALS[name]:g}"
        )
    if name == SCORE_BIAS and (
        isinstance(value, bool) or not isinstance(value, int | float) or not -1e6 <= value <= 1e6
    ):
        raise ValueError(
            f"{where} has {name}={clipped(value)}: it must be a number from -1e6 to 1e6"
        )


# ``gelu_new`` and ``gelu_pytorch_tanh`` are the tanh approximation, ``gelu`` is the one with erf.
_GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def _gpt2_config(d: Mapping[str, Any]) -> DecoderConfig:
    activation = d.get("activation_function", "gelu_new")
    if activation not in _GPT2_ACTIVATIONS:
        raise ValueError(
            f"activation_function={activation!r} is not supported: {', '.join(_GPT2_ACTIVATIONS)} "
            "are"
        )
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
        raise ValueError(
            f"hidden_act={d['hidden_act']!r} is not supported: choose a model with silu"
        )
    attention, mlp = (bool(d.get(name, False)) for name in ("attention_bias", "mlp_bias"))
    # Qwen2 always has biases on query, key and value, whatever attention_bias is.
    if kind == "qwen2":
        attention = False
    if attention != mlp:
        raise ValueError(
            f"attention_bias={attention} and mlp_bias={mlp} must be equal: choose such a model"
        )
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
    """The rotary settings of config.json.

    transformers 5 writes them as rope_parameters, earlier versions as rope_scaling.
    """
    # A file may have both. rope_theta is compared below, and `type` is the older name of rope_type,
    # so neither makes them differ.
    new, old = (d.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
    if (
        new
        and old
        and {**new, "rope_theta": 0, "type": 0} != {**new, **old, "rope_theta": 0, "type": 0}
    ):
        raise ValueError(
            f"rope_parameters={clipped(new)} and rope_scaling={clipped(old)} in config.json "
            "differ: keep one"
        )
    rope = new or old
    theta, other = rope.get("rope_theta"), d.get("rope_theta")
    if theta is not None and other is not None and theta != other:
        raise ValueError(
            f"rope_theta={other} in config.json, and {theta} in its rope_parameters: keep the "
            "right one"
        )
    return rope


_MISTRAL_WINDOW = 4096
"""The sliding window of Mistral if config.json has none, the default of its config class."""


def _context_within_window(d: Mapping[str, Any]) -> int:
    """The context length, limited to the sliding window if there is one.

    Up to that length, windowed attention is plain attention.
    """
    context, types = d["max_position_embeddings"], d.get("layer_types") or []
    if set(types) - {_LOCAL, _GLOBAL} or (types and len(types) != d["num_hidden_layers"]):
        raise ValueError(
            f"layer_types={clipped(types)} in config.json is not supported: one of {_LOCAL!r} and "
            f"{_GLOBAL!r} for each of {d['num_hidden_layers']} layers is"
        )
    # Qwen's config class has the window off by default, whatever `sliding_window` is; Mistral's has
    # no such switch.
    used = d.get("use_sliding_window", d["model_type"] not in ("qwen2", "qwen3"))
    if _LOCAL in types and not d.get("sliding_window"):
        raise ValueError(
            f"layer_types in config.json has {_LOCAL!r}, and there is no sliding_window: copy it "
            "again"
        )
    window = d.get("sliding_window", _MISTRAL_WINDOW if d["model_type"] == "mistral" else None)
    if window and (used or _LOCAL in types):
        return min(context, window)
    return context


_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def _gemma3_config(d: Mapping[str, Any]) -> DecoderConfig:
    for name in (
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "use_bidirectional_attention",
        "attention_bias",
    ):
        if d.get(name):
            raise ValueError(
                f"{name}={d[name]} is not supported: choose a Gemma 3 text model without it"
            )
    if d.get("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise ValueError(
            f"hidden_activation={d['hidden_activation']!r} is not supported: choose a Gemma 3 text "
            "model"
        )
    # Gemma 3 has rotary settings of each kind of layer; rope_theta and rope_local_base_freq are the
    # older form of the same two.
    rope = d.get("rope_parameters") or {}
    if set(rope) - {_GLOBAL, _LOCAL}:
        raise ValueError(
            f"rope_parameters={clipped(rope)} in config.json is not supported: Gemma 3 has those "
            f"of {_GLOBAL!r} and of {_LOCAL!r}"
        )
    far = _rope({**d, "rope_parameters": rope.get(_GLOBAL)})
    near = _rope({"rope_parameters": rope.get(_LOCAL), "rope_theta": d.get("rope_local_base_freq")})
    if _rotary_scaling(near) is not None:
        raise ValueError(
            f"rope_parameters of sliding_attention={near} are not supported: choose plain ones "
            "there"
        )
    # What may be missing has the default of transformers' config class.
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


def _window_every(d: Mapping[str, Any], layers: int) -> int:
    """Which layers are global: every n-th."""
    types = d.get("layer_types")
    if types is None:
        return d.get("sliding_window_pattern") or d.get("_sliding_window_pattern") or 6
    # Without a global layer, the period is longer than the model.
    every = types.index(_GLOBAL) + 1 if _GLOBAL in types else layers + 1
    if types != _layer_types(layers, every):
        raise ValueError(
            f"layer_types={types} is not supported: choose a model whose every n-th layer is global"
        )
    return every


def _layer_types(layers: int, every: int) -> list[str]:
    """The kind of each layer as config.json lists it."""
    return [_LOCAL if (layer + 1) % every else _GLOBAL for layer in range(layers)]


_ROPE_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
"""The fields of `RotaryScaling`, in its order, as config.json names them."""


def _rotary_scaling(rope: Mapping[str, Any]) -> RotaryScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(
            f"rope type {kind!r} is not supported: choose a model with plain or llama3 rotary "
            "positions"
        )
    check_rope(
        rope, _ROPE_LLAMA3 if kind == "llama3" else (), "the rope_parameters or rope_scaling"
    )
    if kind == "default":
        return None
    return RotaryScaling(*(rope[name] for name in _ROPE_LLAMA3))


def hf_config(config: DecoderConfig, *, score: bool) -> dict[str, Any]:
    """The config.json of a decoder.

    `score` names the sequence classifier instead of the language model.

    Raises:
      ValueError: the parts are not those of GPT-2, Llama, Qwen2, Qwen3 or Gemma 3.
    """
    kind = family_of(config)
    task = (
        "ForSequenceClassification" if score else "LMHeadModel" if kind == "gpt2" else "ForCausalLM"
    )
    if kind == "gemma3_text" and score:
        task = f"Text{task}"  # the class without Text in its name also takes images
    shared = {
        "model_type": kind,
        "architectures": [ARCHITECTURES[kind] + task],
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
        **(
            {"attention_bias": config.bias == "all", "mlp_bias": config.bias == "all"}
            if kind == "llama"
            else {}
        ),
    }


def _gemma3_fields(config: DecoderConfig) -> dict[str, Any]:
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config.query_scalar or config.head_dim,
        "sliding_window": config.window,
        # The pattern in both forms: earlier versions of transformers read sliding_window_pattern,
        # later ones layer_types.
        "layer_types": _layer_types(config.layers, config.window_every),
        "sliding_window_pattern": config.window_every,
        "rope_theta": config.rotary_base,
        "rope_local_base_freq": config.local_rotary_base,
        **_rope_scaling(config.rotary_scaling),
    }


def _rope_scaling(scaling: RotaryScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {}
    return {
        "rope_scaling": {"rope_type": "llama3", **dict(zip(_ROPE_LLAMA3, scaling, strict=True))}
    }
