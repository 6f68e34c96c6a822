"""The networks: one decoder, its heads, and weights in and out. Only this folder knows flax nnx."""

from rlhf_jax.models.decoder import DecoderConfig, gpt2
from rlhf_jax.models.heads import init_score, language_model, scalar_from_language_model, scalar_model

__all__ = [
    "DecoderConfig",
    "gpt2",
    "init_score",
    "language_model",
    "scalar_from_language_model",
    "scalar_model",
]
