"""The shape and family of a decoder, and the checks of its settings."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from jax.sharding import Mesh

from rlhf_jax.backends import KERNELS, Backend, backend_for
from rlhf_jax.models.norms import NORMS

_CHOICES = {
    "positions": ("learned", "rotary"),
    "norm": tuple(NORMS),
    "activation": ("gelu", "gelu_tanh", "swiglu", "geglu"),
    "bias": ("none", "qkv", "all"),
    "dtype": ("float32", "bfloat16"),
    "remat": ("none", "block"),
    "attention": KERNELS,
}


class RotaryScaling(NamedTuple):
    """How Llama 3.1 and later stretch rotary positions to a longer context.

    Frequencies with a wavelength above ``original_context / low`` are divided by `factor`, those
    with one below ``original_context / high`` are unchanged, and between the two the result is
    interpolated linearly in ``original_context / wavelength``.

    Source: Llama 3 Herd of Models 2024, and the rope_scaling of its config.json.
    """

    factor: float
    low: float
    high: float
    original_context: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and family of a decoder. The defaults are the Llama family; `gpt2` names the other one.

    `kv_heads`, `head_dim` and `mlp_width` given as 0 are filled in at once: `dataclasses.replace`
    keeps them.

    Attributes:
      vocab_size: V, rows of the embedding.
      context_length: the largest number of positions.
      layers, width, heads: L, D, H.
      kv_heads: G, key-value heads; 0 means `heads` (no grouping).
      head_dim: E; 0 means ``width // heads``.
      mlp_width: hidden width of the MLP; 0 means ``4 * width``.
      positions: learned table (GPT-2) or rotary in the half-split layout (Llama).
      norm: pre-norm kind; `norm_eps` is added to the variance. ``rmsnorm_plus_one`` multiplies by 1
        + scale (Gemma).
      activation: ``gelu`` (erf), ``gelu_tanh`` (GPT-2), gated ``swiglu`` (Llama) or gated tanh
        ``geglu`` (Gemma).
      bias: biases of the projections: ``none`` (Llama), ``qkv`` (Qwen2) or ``all`` (GPT-2;
        LayerNorm has one too).
      tied: the unembedding is the embedding.
      rotary_base: theta of the rotary angles.
      rotary_scaling: how they are scaled to a longer context (Llama 3.1); None = not scaled.
      qk_norm: an RMSNorm over each head's query and key before they are rotated (Qwen3, Gemma).
      post_norm: also a norm after attention and after the MLP, before they are added (Gemma).
      embedding_scaled: embeddings are multiplied by ``sqrt(width)`` (Gemma).
      query_scalar: queries are divided by its root; 0 means `head_dim`.
      window: positions a query looks back in a local layer, its own included; 0 = no layer is
        local.
      window_every: n, where every n-th layer is global and the others are local.
      local_rotary_base: theta in local layers.
      dropout: rate on the embedding and both residual branches; acts only where `apply` is given a
        key.
      dtype: compute dtype, float32 or bfloat16; parameters keep theirs (float32 masters). Not
        float16: its gradients underflow without loss scaling, which bfloat16 does not need.
      remat: ``block`` recomputes each block in the backward pass.
      attention: the kernel for whole rows; ``auto`` takes the fastest of the device (`backends`),
        and on an NVIDIA GPU kernels of our own for decode steps of the families that they compute
        (`backends.nvidia_decode`).
      unroll: blocks per iteration of the layer scan; None means all, 1 compiles fastest.
      mesh: ``(data, fsdp, tensor)`` over which activations and caches are sharded, as `sharding`
        does for batches and parameters; None leaves that to the compiler, which is right for one
        device.
      unused_ids: ids that have no text, as ranges ``(first, after the last)``: the padded rows of
        an embedding. The head of a language model gives them probability 0, so that they are never
        sampled.
    """

    vocab_size: int
    context_length: int
    layers: int
    width: int
    heads: int
    kv_heads: int = 0
    head_dim: int = 0
    mlp_width: int = 0
    positions: str = "rotary"
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    activation: str = "swiglu"
    bias: str = "none"
    tied: bool = True
    rotary_base: float = 10_000.0
    rotary_scaling: RotaryScaling | None = None
    qk_norm: bool = False
    post_norm: bool = False
    embedding_scaled: bool = False
    query_scalar: int = 0
    window: int = 0
    window_every: int = 6
    local_rotary_base: float = 10_000.0
    dropout: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
    unroll: int | None = None
    mesh: Mesh | None = None
    unused_ids: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        for name, derived in (
            ("kv_heads", self.heads),
            ("head_dim", self.width // max(self.heads, 1)),
            ("mlp_width", 4 * self.width),
        ):
            if not getattr(self, name):
                # The dataclass is frozen, and configs are keys of caches: sizes are filled in
                # before the first use, so that equal decoders have equal configs.
                object.__setattr__(self, name, derived)
        _validate(self)

    @property
    def backend(self) -> Backend:
        """The operations of the machine for this decoder."""
        return backend_for(self.attention, mesh=self.mesh, dtype=self.dtype, head_dim=self.head_dim)


def gpt2(
    vocab_size: int, context_length: int, layers: int, width: int, heads: int, **overrides
) -> DecoderConfig:
    """A decoder of the GPT-2 family: learned positions, LayerNorm, tanh-GELU, biases, tied head."""
    family = {
        "positions": "learned",
        "norm": "layernorm",
        "activation": "gelu_tanh",
        "bias": "all",
        "tied": True,
    }
    return DecoderConfig(vocab_size, context_length, layers, width, heads, **(family | overrides))


_POSITIVE = (
    "vocab_size", "context_length", "layers", "width", "heads", "kv_heads", "head_dim", "mlp_width",
)  # fmt: skip


def _validate(config: DecoderConfig) -> None:
    for name in _POSITIVE:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    for name, choices in _CHOICES.items():
        value = getattr(config, name)
        if value not in choices:
            raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(choices)}")
    if config.heads % config.kv_heads:
        # Each key-value head serves the same number of query heads.
        divisors = [n for n in range(1, config.heads + 1) if config.heads % n == 0]
        raise ValueError(
            f"kv_heads={config.kv_heads} must divide heads={config.heads}: choose one of {divisors}"
        )
    if not 0 <= config.dropout < 1:
        raise ValueError(
            f"dropout={config.dropout} must lie in [0, 1): it is the share of activations set to 0"
        )
    if config.unroll is not None and not 1 <= config.unroll <= config.layers:
        raise ValueError(
            f"unroll={config.unroll} must lie in 1..layers={config.layers}: choose 1 or leave it "
            "None"
        )
    _validate_positions(config)


def _validate_positions(config: DecoderConfig) -> None:
    if config.positions == "rotary" and config.head_dim % 2:
        raise ValueError(
            f"head_dim={config.head_dim} must be even for rotary positions: set head_dim, width or "
            "heads"
        )
    scaling = config.rotary_scaling
    if scaling is not None and not 0 < scaling.low < scaling.high:
        raise ValueError(
            f"rotary_scaling={scaling} must have 0 < low < high: copy it from config.json"
        )
    if config.window < 0 or config.window_every < 1:
        raise ValueError(
            f"window={config.window} must be at least 0 and "
            f"window_every={config.window_every} at least 1: "
            "copy sliding_window and its pattern from config.json"
        )
