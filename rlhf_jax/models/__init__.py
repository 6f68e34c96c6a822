"""The networks: one decoder, its heads, and weights in and out. Only this folder knows flax nnx."""

from rlhf_jax.models.config import DecoderConfig, gpt2
from rlhf_jax.models.heads import (
    init_score,
    language_model,
    scalar_from_language_model,
    scalar_model,
)
from rlhf_jax.models.hf import config_from_hf, hf_config, load_hf, load_llama2c, save_hf
from rlhf_jax.models.lora import init_lora, lora_model, merge_lora, with_lora

__all__ = [
    "DecoderConfig",
    "config_from_hf",
    "gpt2",
    "hf_config",
    "init_lora",
    "init_score",
    "language_model",
    "load_hf",
    "load_llama2c",
    "lora_model",
    "merge_lora",
    "save_hf",
    "scalar_from_language_model",
    "scalar_model",
    "with_lora",
]
