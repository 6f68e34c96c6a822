"""Weights in and out: Hugging Face folders, GGUF files and llama2.c checkpoints."""

from rlhf_jax.models.hf.config_json import config_from_hf, hf_config
from rlhf_jax.models.hf.llama2c import load_llama2c
from rlhf_jax.models.hf.read import load_hf
from rlhf_jax.models.hf.write import save_hf

__all__ = ["config_from_hf", "hf_config", "load_hf", "load_llama2c", "save_hf"]
