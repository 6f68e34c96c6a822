"""Normalisations over the last axis. A new one is a class here and a line in `NORMS`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


def layer_norm(width: int, epsilon: float, **how: Any) -> nnx.LayerNorm:
    """LayerNorm in two passes (GPT-2)."""
    # The fast variance, ``E[x^2] - E[x]^2``, cancels in float32 where the mean is large.
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, **how)


def rms_norm(width: int, epsilon: float, *, use_bias: bool, **how: Any) -> nnx.RMSNorm:
    """RMSNorm (Llama)."""
    # `DecoderConfig.bias` concerns projections and LayerNorm: an RMSNorm has no bias.
    del use_bias
    return nnx.RMSNorm(width, epsilon=epsilon, **how)


class PlusOneRMSNorm(nnx.Module):
    """RMSNorm times ``1 + scale``, all in float32 (Gemma); the scale starts at 0."""

    def __init__(self, width: int, epsilon: float, **how: Any):
        del how  # no bias; its dtype is that of the input; nothing random
        self.scale = nnx.Param(jnp.zeros(width))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalise the last axis."""
        # ``1 + scale`` in float32 too: in bfloat16 the sum would lose the digits of a small scale.
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.epsilon)
        scale = 1 + self.scale[...].astype(jnp.float32)
        return (wide * scale.reshape((1,) * (x.ndim - 1) + scale.shape)).astype(x.dtype)


NORMS = {"layernorm": layer_norm, "rmsnorm": rms_norm, "rmsnorm_plus_one": PlusOneRMSNorm}
"""By the name that `DecoderConfig.norm` has: ``(width, epsilon, *, use_bias, dtype, rngs)``."""
