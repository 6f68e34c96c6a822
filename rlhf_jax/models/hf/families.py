"""The model families of Hugging Face that the decoder covers, and how each names its tensors."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_jax.models.config import DecoderConfig

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
    # The same name as in Llama, where it is the norm before the MLP; here it is the one after
    # attention.
    "blocks.attention.post_norm": "model.layers.{}.post_attention_layernorm",
    "blocks.mlp_norm": "model.layers.{}.pre_feedforward_layernorm",
    "blocks.mlp.post_norm": "model.layers.{}.post_feedforward_layernorm",
}


GPT2 = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "norm": "transformer.ln_f",
    "unembed": "lm_head",
    "blocks.attention_norm": "transformer.h.{}.ln_1",
    # Files store these three as one c_attn: stored.split_c_attn reads it, write._joined writes it.
    "blocks.attention.query": "transformer.h.{}.attn.query",
    "blocks.attention.key": "transformer.h.{}.attn.key",
    "blocks.attention.value": "transformer.h.{}.attn.value",
    "blocks.attention.out": "transformer.h.{}.attn.c_proj",
    "blocks.mlp_norm": "transformer.h.{}.ln_2",
    "blocks.mlp.up": "transformer.h.{}.mlp.c_fc",
    "blocks.mlp.down": "transformer.h.{}.mlp.c_proj",
}


GGUF = {
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


NAMES = {
    "gpt2": GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma3_text": _GEMMA3,
}
"""model_type of config.json -> our module -> the module's name in a file."""


ARCHITECTURES = {
    "gpt2": "GPT2",
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma3_text": "Gemma3",
}
"""model_type of config.json -> how the names of its classes begin."""


def tensor_name(names: Mapping[str, str], path: tuple[str, ...]) -> str:
    """The name in a file of one parameter; ``{}`` in it is the layer.

    Args:
      names: of the family, one of `NAMES` or `GGUF`.
      path: of the parameter, ``("blocks", "mlp", "up", "kernel")``.

    >>> tensor_name(GPT2, ("blocks", "mlp", "up", "kernel"))
    'transformer.h.{}.mlp.c_fc.weight'
    """
    return f"{names['.'.join(path[:-1])]}.{'bias' if path[-1] == 'bias' else 'weight'}"


def is_flipped(path: tuple[str, ...], *, transposed: bool) -> bool:
    """Whether a file stores this matrix as (out, in): all of them, or in GPT-2 the head only.

    Args:
      path: of the parameter.
      transposed: whether the family stores its matrices that way; GPT-2 does not.
    """
    return path[-1] == "kernel" and (transposed or path[0] == "unembed")


def family_of(config: DecoderConfig) -> str:
    """The model_type under which a decoder is written.

    Raises:
      ValueError: the parts are not those of GPT-2, Llama, Qwen2, Qwen3 or Gemma 3.
    """
    parts = (config.positions, config.norm, config.activation)
    gemma = (
        config.qk_norm,
        config.post_norm,
        config.embedding_scaled,
        config.window > 0,
        config.bias,
    )
    if parts == ("rotary", "rmsnorm_plus_one", "geglu") and gemma == (
        True,
        True,
        True,
        True,
        "none",
    ):
        return "gemma3_text"
    own = (
        config.post_norm,
        config.embedding_scaled,
        config.window,
        config.query_scalar not in (0, config.head_dim),
    )
    # c_attn has one width for query, key and value, so GPT-2 can have no grouped or wider heads.
    multi_head = config.kv_heads == config.heads and config.heads * config.head_dim == config.width
    plain = config.bias == "all" and multi_head and not config.qk_norm
    if (
        parts[:2] == ("learned", "layernorm")
        and parts[2] in ("gelu", "gelu_tanh")
        and plain
        and not any(own)
    ):
        return "gpt2"
    if (
        parts == ("rotary", "rmsnorm", "swiglu")
        and not any(own)
        and not (config.qk_norm and config.bias != "none")
    ):
        # Mistral has the parts of Llama (its window only limits the context) and is written as
        # llama.
        return "qwen3" if config.qk_norm else "qwen2" if config.bias == "qkv" else "llama"
    raise ValueError(
        f"positions={parts[0]!r}, norm={parts[1]!r}, activation={parts[2]!r}, "
        f"bias={config.bias!r}, qk_norm={config.qk_norm}, post_norm={config.post_norm}, "
        f"window={config.window} is no Hugging Face family: choose the gpt2 preset, or rotary + "
        "rmsnorm + swiglu, with qk_norm only without biases, or all parts of Gemma 3"
    )
