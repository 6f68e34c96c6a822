"""One decoder for GPT-2, Llama, Mistral, Qwen2, Qwen3 and Gemma 3: flax nnx modules handed out as pure functions.

Outside this folder nobody sees nnx: parameters are a nested dict of arrays, and `apply_decoder` rebuilds the modules
from it while JAX traces, so a compiled step pays nothing for them. The blocks are stacked: every leaf of
``params["blocks"]`` has a leading layer axis, and one `lax.scan` runs them.

Shape legend: B rows, T query slots, S key slots, D width, H query heads, G key-value heads, E head width, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from rlhf_jax.models import attention
from rlhf_jax.types import Cache, Output, Params

_CHOICES = {
    "positions": ("learned", "rotary"),
    "norm": ("layernorm", "rmsnorm", "rmsnorm_plus_one"),
    "activation": ("gelu", "gelu_tanh", "swiglu", "geglu"),
    "bias": ("none", "qkv", "all"),
    "dtype": ("float32", "bfloat16"),
    "remat": ("none", "block"),
    "attention": attention.KERNELS,
}
# Finite, so that a query without any key gives a uniform softmax and zero gradients instead of NaN.
_MASKED = -1e30
_ADAPTERS = ("lora_a", "lora_b")
_JOINED = {"attention": ("query", "key", "value"), "mlp": ("gate", "up")}
_Leaves = dict[Any, Array]
"""Arrays by their path in the parameters, a tuple of names."""


class RotaryScaling(NamedTuple):
    """How Llama 3.1 and later stretch rotary positions to a longer context than they were first trained on.

    Frequencies whose wavelength exceeds ``original_context / low`` turn `factor` times slower, those below
    ``original_context / high`` stay, and between the two the share that stays falls linearly in
    ``original_context / wavelength``. Source: Llama 3 Herd of Models 2024 and the rope_scaling of its config.json.
    """

    factor: float
    low: float
    high: float
    original_context: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and family of a decoder. The defaults are the Llama family; `gpt2` names the other one.

    `kv_heads`, `head_dim` and `mlp_width` given as 0 are filled in at once: `dataclasses.replace` keeps them.

    Attributes:
      vocab_size: V, rows of the embedding.
      context_length: the largest number of positions.
      layers, width, heads: L, D, H.
      kv_heads: G, key-value heads; 0 means `heads` (no grouping).
      head_dim: E; 0 means ``width // heads``.
      mlp_width: hidden width of the MLP; 0 means ``4 * width``.
      positions: learned table (GPT-2) or rotary in the half-split layout (Llama).
      norm: pre-norm kind; `norm_eps` is added to the variance. ``rmsnorm_plus_one`` multiplies by 1 + scale (Gemma).
      activation: ``gelu`` (erf), ``gelu_tanh`` (GPT-2), gated ``swiglu`` (Llama) or gated tanh ``geglu`` (Gemma).
      bias: biases of the projections: ``none`` (Llama), ``qkv`` (Qwen2) or ``all`` (GPT-2; LayerNorm has one too).
      tied: the unembedding is the embedding.
      rotary_base: theta of the rotary angles.
      rotary_scaling: their stretch to a long context (Llama 3.1); None = none.
      qk_norm: an RMSNorm over each head's query and key before they are rotated (Qwen3, Gemma).
      post_norm: a norm after attention and after the MLP too, before they are added (Gemma).
      embedding_scaled: embeddings are multiplied by ``sqrt(width)`` (Gemma).
      query_scalar: queries are divided by its root; 0 means `head_dim`.
      window: positions a query looks back in a local layer, its own included; 0 = no layer is local.
      window_every: n, where every n-th layer is global and the others are local.
      local_rotary_base: theta in local layers.
      dropout: rate on the embedding and both residual branches; acts only where `apply` is given a key.
      dtype: compute dtype, float32 or bfloat16; parameters stay as they are (float32 masters). Not float16: its
        gradients underflow without loss scaling, which bfloat16 does not need.
      remat: ``block`` recomputes each block in the backward pass.
      attention: the kernel for whole rows; ``auto`` takes the fastest of the device (`models.attention`), and on an
        NVIDIA GPU kernels of our own for decode steps where they know the family (`models.fused`).
      unroll: blocks per iteration of the layer scan; None means all, 1 compiles fastest.
      mesh: ``(data, fsdp, tensor)`` that activations and caches are spread over, as `sharding` does with batches and
        parameters; None leaves them to the compiler, which is right for one device.
      unused_ids: ids that have no text, as ranges ``(first, after the last)``: the padded rows of an embedding. The
        head of a language model gives them no probability, so that they are never sampled.
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
                object.__setattr__(self, name, derived)
        _validate(self)

    @property
    def on_one_device(self) -> bool:
        """Whether activations stay on one device, as far as the config says."""
        return self.mesh is None or self.mesh.size == 1


def gpt2(vocab_size: int, context_length: int, layers: int, width: int, heads: int, **overrides) -> DecoderConfig:
    """A decoder of the GPT-2 and GPT-3 family: learned positions, LayerNorm, tanh-GELU, biases, tied head."""
    family = {"positions": "learned", "norm": "layernorm", "activation": "gelu_tanh", "bias": "all", "tied": True}
    return DecoderConfig(vocab_size, context_length, layers, width, heads, **(family | overrides))


def _validate(config: DecoderConfig) -> None:
    for name in ("vocab_size", "context_length", "layers", "width", "heads", "kv_heads", "head_dim", "mlp_width"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            raise ValueError(f"{name}={getattr(config, name)!r} is unknown: choose one of {', '.join(choices)}")
    if config.heads % config.kv_heads:
        divisors = [n for n in range(1, config.heads + 1) if config.heads % n == 0]
        raise ValueError(f"kv_heads={config.kv_heads} must divide heads={config.heads}: choose one of {divisors}")
    if config.positions == "rotary" and config.head_dim % 2:
        raise ValueError(f"head_dim={config.head_dim} must be even for rotary positions: set head_dim, width or heads")
    if config.rotary_scaling is not None and not 0 < config.rotary_scaling.low < config.rotary_scaling.high:
        raise ValueError(f"rotary_scaling={config.rotary_scaling} must have 0 < low < high: copy it from config.json")
    if config.window < 0 or config.window_every < 1:
        raise ValueError(
            f"window={config.window} must be at least 0 and window_every={config.window_every} at least 1: "
            "copy sliding_window and its pattern from config.json"
        )
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout={config.dropout} must lie in [0, 1): it is the share of activations set to 0")
    if config.unroll is not None and not 1 <= config.unroll <= config.layers:
        raise ValueError(f"unroll={config.unroll} must lie in 1..layers={config.layers}: choose 1 or leave it None")


# ----------------------------------------------------------------------------------------------- modules


class Linear(nnx.Linear):
    """A projection ``x W``; where its parameters also hold ``lora_a, lora_b`` it is ``x W + (x A) B`` (`models.lora`).

    In this order the backward pass never forms the gradient of W, a third of the work. A kernel of three axes lies in
    tiles (`decoding_params`).
    """

    lora_a: nnx.Param
    lora_b: nnx.Param
    on_one_device: bool = False

    def __call__(self, inputs: Float[Array, "*B I"], out_sharding: Any = None) -> Float[Array, "*B O"]:
        """Apply the projection to the last axis."""
        rows = as_matrix(inputs) if self.on_one_device else inputs
        tiled = self.kernel[...].ndim == 3
        outputs = self._over_tiles(rows) if tiled else super().__call__(rows, out_sharding)
        if hasattr(self, "lora_a"):
            rows = rows.astype(outputs.dtype)
            outputs += rows @ self.lora_a[...].astype(rows.dtype) @ self.lora_b[...].astype(rows.dtype)
        return outputs.reshape(*inputs.shape[:-1], outputs.shape[-1])

    def _over_tiles(self, inputs: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        outputs = times_tiles(inputs.astype(self.dtype), self.kernel[...])
        if self.bias is None:
            return outputs
        return outputs + self.bias[...].astype(outputs.dtype).reshape((1,) * (outputs.ndim - 1) + (-1,))


def as_matrix(x: Float[Array, "*B I"]) -> Float[Array, "M I"]:
    """One row a token, on one device: the gradient of a kernel then sums over one axis.

    Over two, rows and slots, XLA on a CPU transposes both activations first: an eighth of a training step.
    """
    return x.reshape(-1, x.shape[-1])


TILES = 16
"""8 to 32 are alike; on an accelerator plain matrices are as good."""


def times_tiles(x: Float[Array, "*B I"], tiles: Float[Array, "N O I"], **how: Any) -> Float[Array, "*B NO"]:
    """``x W`` with W transposed and cut into N tiles, for a few rows on a CPU: about half the time.

    The weights of a decode step come from memory, not from a cache. So they lie in the order in which they are read, a
    tile a thread.
    """
    outputs = jnp.einsum("mi,noi->nmo", as_matrix(x), tiles, **how)
    return outputs.swapaxes(0, 1).reshape(*x.shape[:-1], -1)


def tile(kernel: Float[Array, "O I"]) -> Float[Array, "..."]:
    """``W^T`` as `times_tiles` takes it, where that is faster; else as it is."""
    if jax.default_backend() != "cpu" or kernel.shape[0] % TILES:
        return kernel
    return kernel.reshape(TILES, -1, kernel.shape[1])


def _linear(config: DecoderConfig, inputs: int, outputs: int, *, bias: bool, std: float = 0.02, rngs: nnx.Rngs):
    layer = Linear(
        inputs,
        outputs,
        use_bias=bias,
        kernel_init=nnx.initializers.normal(std),
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
    )
    layer.on_one_device = config.on_one_device
    return layer


def _norm(config: DecoderConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    if config.norm != "layernorm":
        return _rms_norm(config, config.width, rngs=rngs)
    return nnx.LayerNorm(
        config.width, epsilon=config.norm_eps, use_bias=config.bias == "all", use_fast_variance=False,
        dtype=jnp.dtype(config.dtype), rngs=rngs,
    )  # fmt: skip


class PlusOneRMSNorm(nnx.Module):
    """RMSNorm times ``1 + scale``, all in float32 (Gemma); the scale starts at 0."""

    def __init__(self, width: int, epsilon: float):
        self.scale = nnx.Param(jnp.zeros(width))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalise the last axis."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.epsilon)
        scale = 1 + self.scale[...].astype(jnp.float32)
        return (wide * scale.reshape((1,) * (x.ndim - 1) + scale.shape)).astype(x.dtype)


def _rms_norm(config: DecoderConfig, width: int, *, rngs: nnx.Rngs) -> nnx.Module:
    if config.norm == "rmsnorm_plus_one":
        return PlusOneRMSNorm(width, config.norm_eps)
    return nnx.RMSNorm(width, epsilon=config.norm_eps, dtype=jnp.dtype(config.dtype), rngs=rngs)


def _residual_std(config: DecoderConfig) -> float:
    # GPT-2: the sum of 2L branches keeps the variance of one.
    return 0.02 / (2 * config.layers) ** 0.5


class Attention(nnx.Module):
    """Grouped-query self-attention; query head h reads key-value head ``h // (H / G)``.

    `joined`: the three projections are one, as `decoding_params` makes them.
    """

    def __init__(self, config: DecoderConfig, *, joined: bool = False, rngs: nnx.Rngs):
        self.config = config
        bias = config.bias in ("qkv", "all")
        query_width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        if joined:
            self.query_key_value = _linear(config, config.width, query_width + 2 * kv_width, bias=bias, rngs=rngs)
        else:
            self.query = _linear(config, config.width, query_width, bias=bias, rngs=rngs)
            self.key = _linear(config, config.width, kv_width, bias=bias, rngs=rngs)
            self.value = _linear(config, config.width, kv_width, bias=bias, rngs=rngs)
        std = _residual_std(config)
        self.out = _linear(config, query_width, config.width, bias=config.bias == "all", std=std, rngs=rngs)
        if config.qk_norm:
            self.query_norm = _rms_norm(config, config.head_dim, rngs=rngs)
            self.key_norm = _rms_norm(config, config.head_dim, rngs=rngs)
        if config.post_norm:
            self.post_norm = _norm(config, rngs=rngs)

    def project(self, x: Float[Array, "B T D"], angles: _Angles | None):
        """Queries ``[B, T, H, E]``, keys and values ``[B, T, G, E]``, rotated where `angles` are given."""
        if hasattr(self, "query_key_value"):
            heads, groups = self.config.heads, self.config.kv_heads
            projected = self.query_key_value(x).reshape(*x.shape[:2], -1, self.config.head_dim)
            query, key, value = jnp.split(projected, [heads, heads + groups], axis=2)
        else:
            split = lambda y: y.reshape(*y.shape[:2], -1, self.config.head_dim)  # noqa: E731
            query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        if self.config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if angles is not None:
            query, key = _rotate(query, angles), _rotate(key, angles)
        return query, key, value

    def __call__(self, mixed: Float[Array, "B T H E"]) -> Float[Array, "B T D"]:
        """What the mixed values of all heads add to the residual."""
        mixed = self.out(mixed.reshape(*mixed.shape[:2], -1))
        return self.post_norm(mixed) if self.config.post_norm else mixed


_GATES = {"swiglu": jax.nn.silu, "geglu": partial(jax.nn.gelu, approximate=True)}


class MLP(nnx.Module):
    """``down(act(up x))``, or ``down(act(gate x) * up x)`` for SwiGLU and GEGLU.

    `joined`: gate and up are one projection, as `decoding_params` makes them.
    """

    def __init__(self, config: DecoderConfig, *, joined: bool = False, rngs: nnx.Rngs):
        self.config = config
        bias = config.bias == "all"
        if joined and config.activation in _GATES:
            self.gate_up = _linear(config, config.width, 2 * config.mlp_width, bias=bias, rngs=rngs)
        else:
            if config.activation in _GATES:
                self.gate = _linear(config, config.width, config.mlp_width, bias=bias, rngs=rngs)
            self.up = _linear(config, config.width, config.mlp_width, bias=bias, rngs=rngs)
        std = _residual_std(config)
        self.down = _linear(config, config.mlp_width, config.width, bias=bias, std=std, rngs=rngs)
        if config.post_norm:
            self.post_norm = _norm(config, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply the MLP to each place."""
        if self.config.activation in _GATES:
            gate, up = jnp.split(self.gate_up(x), 2, -1) if hasattr(self, "gate_up") else (self.gate(x), self.up(x))
            y = self.down(_GATES[self.config.activation](gate) * up)
        else:
            y = self.down(jax.nn.gelu(self.up(x), approximate=self.config.activation == "gelu_tanh"))
        return self.post_norm(y) if self.config.post_norm else y


class Block(nnx.Module):
    """Pre-norm residual block: ``x + attention(norm x)``, then ``x + mlp(norm x)``."""

    def __init__(self, config: DecoderConfig, *, joined: bool = False, rngs: nnx.Rngs):
        self.attention_norm = _norm(config, rngs=rngs)
        self.attention = Attention(config, joined=joined, rngs=rngs)
        self.mlp_norm = _norm(config, rngs=rngs)
        self.mlp = MLP(config, joined=joined, rngs=rngs)


class Embedding(nnx.Module):
    """Token embedding, the learned positions of GPT-2, and the norm after the last block."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        init = partial(nnx.Embed, embedding_init=nnx.initializers.normal(0.02), dtype=jnp.dtype(config.dtype))
        self.embed = init(config.vocab_size, config.width, rngs=rngs)
        if config.positions == "learned":
            self.positions = init(config.context_length, config.width, rngs=rngs)
        self.norm = _norm(config, rngs=rngs)
        self.factor = config.width**0.5 if config.embedding_scaled else 1.0
        self.mesh = config.mesh

    def __call__(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embed tokens, with their learned positions where the family has them."""
        x = _look_up(self.mesh, self.embed, tokens) * self.factor
        return x + _look_up(self.mesh, self.positions, positions) if hasattr(self, "positions") else x


# --------------------------------------------------------------------------------------- array functions

_ROWS = ("data", "fsdp")
_WIDTH = ("fsdp", "tensor")


def _spread(mesh: Mesh | None, x: Array, *axes: Any) -> Array:
    """`x` over the mesh axes given for its dimensions; a dimension that they do not divide stays whole."""
    if mesh is None or mesh.size == 1:
        return x
    names = [(a,) if isinstance(a, str) else a or () for a in axes]
    fits = [x.shape[i] % math.prod(mesh.shape[n] for n in group) == 0 for i, group in enumerate(names)]
    spec = PartitionSpec(*(group if fit and group else None for group, fit in zip(names, fits, strict=True)))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def spread_rows(mesh: Mesh | None, x: Float[Array, "B *rest"]) -> Float[Array, "B *rest"]:
    """Hidden states with their rows over data and fsdp, everything else whole; so does their gradient lie."""
    return _spread(mesh, x, _ROWS, *[None] * (x.ndim - 1))


def _look_up(mesh: Mesh | None, table: Callable[[Array], Array], ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of a table that lies in pieces of the width, brought to the devices of their rows.

    In small moves, there and (the gradient) back: pieces are joined over tensor, then exchanged for rows over fsdp.
    Left to itself the compiler finds no way in one, and copies the activations of the whole batch to every device.
    """
    by_width = _spread(mesh, table(_spread(mesh, ids, "data", None)), "data", None, _WIDTH)
    return _spread(mesh, _spread(mesh, by_width, "data", None, "fsdp"), _ROWS, None, None)


_Angles = tuple[Float[Array, "B T 1 E2"], Float[Array, "B T 1 E2"]]


def _rotary_angles(config: DecoderConfig, positions: Int[Array, "B T"]) -> _Angles | None:
    if config.positions != "rotary":
        return None
    angle = positions[..., None, None].astype(jnp.float32) * _rotary_frequencies(config)[None, None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


_View = tuple[Float[Array, "B 1 T S"], _Angles | None]
"""What a layer's attention is given: which keys each query sees, and its rotary angles."""


_LayerCache = tuple[Array, Array]
"""Keys and values of a layer, laid out as `attention.cache_shapes`."""


def _views(
    config: DecoderConfig,
    seen: Bool[Array, "B T S"],
    positions: Int[Array, "B T"],
    key_positions: Int[Array, "#B S"],
) -> Callable[[Any], _View]:
    """A layer's view: all layers have the same one, or local layers a window and rotary angles of their own."""
    whole = jnp.where(seen, 0.0, _MASKED)[:, None], _rotary_angles(config, positions)
    if not config.window:
        return lambda layer: whole
    near = positions[:, :, None] - key_positions[:, None, :] < config.window
    plain = dataclasses.replace(config, rotary_base=config.local_rotary_base, rotary_scaling=None)
    local = jnp.where(seen & near, 0.0, _MASKED)[:, None], _rotary_angles(plain, positions)

    def view(layer: Any) -> _View:
        is_global = (layer + 1) % config.window_every == 0
        return jax.tree.map(lambda a, b: jnp.where(is_global, a, b), whole, local)

    return view


def _rotary_frequencies(config: DecoderConfig) -> Float[Array, " E2"]:
    frequency = config.rotary_base ** (-jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    if config.rotary_scaling is None:
        return frequency
    factor, low, high, original = config.rotary_scaling
    turns = original * frequency / (2 * jnp.pi)  # within the context of the first training
    stays = jnp.clip((turns - low) / (high - low), 0, 1)
    return frequency * (stays + (1 - stays) / factor)


def _rotate(x: Float[Array, "B T H E"], angles: _Angles) -> Float[Array, "B T H E"]:
    """Rotary positions in the half-split layout: coordinate i turns with coordinate i + E/2."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def visible(
    query_segments: Int[Array, "B T"],
    query_parents: Int[Array, "B T"],
    query_slots: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
) -> Bool[Array, "B T S"]:
    """The one attention rule: a query sees keys not later in the row, of its own segment or its parent segment.

    "Later" is the slot, not the position. Padding (segment 0) sees padding: its outputs are ignored but finite.
    """
    own, keys = query_segments[:, :, None], key_segments[:, None, :]
    parent = query_parents[:, :, None]
    not_later = jnp.arange(key_segments.shape[1])[None, None, :] <= query_slots[:, :, None]
    return not_later & ((keys == own) | ((keys == parent) & (parent > 0)))


def _dropout(x: Array, rate: float, key: Array | None) -> Array:
    if key is None or rate == 0:
        return x
    # 16 random bits an entry, half of what `bernoulli` draws.
    dropped = round(rate * 2**16)
    keep = jax.random.bits(key, x.shape, jnp.uint16) >= dropped
    return jnp.where(keep, x / (1 - dropped / 2**16), 0)


@jax.custom_vjp
def _gradient_once(x: Float[Array, "B T D"], true: Bool[Array, ""]) -> Float[Array, "B T D"]:
    """`x`, whose gradient is computed once and kept as an array.

    XLA on a CPU computes an elementwise sum again for each of its users. The gradient of the residual stream is a sum
    over all later layers: it was computed for every matrix product of every layer anew, in transposed order, 9 to 17%
    of an SFT step of four layers. An `optimization_barrier` is gone there before fusion; a condition stays if the
    compiler cannot decide it. Reverse mode only.
    """
    return x


def _forward_once(x: Array, true: Array) -> tuple[Array, Array]:
    return x, true


def _backward_once(true: Array, gradient: Array) -> tuple[Array, None]:
    return jax.lax.cond(true, lambda g: g, jnp.zeros_like, gradient), None


_gradient_once.defvjp(_forward_once, _backward_once)


# ------------------------------------------------------------------------------- the decoder as functions


def init_decoder(config: DecoderConfig, key: Array) -> Params:
    """Fresh float32 parameters: GPT-2's N(0, 0.02), the two projections into the residual divided by sqrt(2L).

    Returns:
      ``{"embed", "positions" (learned only), "norm", "blocks"}``; leaves of ``blocks`` have a leading axis L.
    """
    embedding_key, block_key = jax.random.split(key)
    params = _init_module(Embedding, config, embedding_key)
    block_keys = jax.random.split(block_key, config.layers)
    return params | {"blocks": jax.vmap(lambda k: _init_module(Block, config, k))(block_keys)}


def _init_module(kind: Callable[..., nnx.Module], config: DecoderConfig, key: Array) -> Params:
    return nnx.to_pure_dict(nnx.state(kind(config, rngs=nnx.Rngs(key)), nnx.Param))


@functools.lru_cache
def _graph(kind: Callable[..., nnx.Module], config: DecoderConfig, **how: bool) -> Any:
    """What a module is without its arrays. Building it takes a tenth of a training step's tracing: once a config."""
    return nnx.split(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0), **how)))[0]


def _bind(kind: Callable[..., nnx.Module], config: DecoderConfig, params: Params, **how: bool) -> Any:
    """The module over `params`. It runs only while JAX traces, so compiled calls pay no nnx dispatch."""
    graph = _graph(kind, config, **how)
    flat: dict[Any, Any] = traverse_util.flatten_dict(params)
    adapters = {path: flat.pop(path) for path in list(flat) if path[-1] in _ADAPTERS}
    module = nnx.merge(graph, traverse_util.unflatten_dict(flat))
    for (*path, name), value in adapters.items():
        setattr(functools.reduce(getattr, path, module), name, nnx.Param(value))
    return module


def apply_decoder(
    config: DecoderConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    segments: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    parents: Int[Array, "B T"] | None = None,
    cache: Cache | None = None,
    key: Array | None = None,
    at: Int[Array, "B N"] | None = None,
) -> Output:
    """Hidden states after the last norm, with one attention rule for packing, shared prefixes and caches (`visible`).

    With a cache the tokens take the slots ``lengths + 0, 1, ..`` of their row and also see what is cached; tokens of
    segment 0 must stand right of the others, and are not stored.

    Args:
      config: the decoder.
      params: as from `init_decoder`.
      tokens: ids.
      segments: 0 = padding, 1.. = pieces of the row.
      positions: place of each token in its text (the caller adds a prompt's length for its responses).
      parents: the segment each token may also attend to; 0 or None = none.
      cache: as from `init_cache`; None = the tokens are whole rows.
      key: turns dropout on.
      at: the slots whose hidden states are wanted; None for all. The last block then computes keys and values of all
        tokens, and everything else for these alone: with L layers nearly 1/L of the work of the others is left out. Not
        with adapters, nor where activations are spread over devices: all is computed there, and these are taken.

    Returns:
      ``Output(hidden [B, T, D] in the compute dtype, cache)``; ``[B, N, D]`` with `at`.
    """
    embedding = _bind(Embedding, config, {k: v for k, v in params.items() if k in ("embed", "positions", "norm")})
    only_segments = parents is None
    parents = jnp.zeros_like(segments) if parents is None else parents
    slots = jnp.arange(tokens.shape[1])[None, :]
    if cache is None:
        key_segments, slots = segments, jnp.broadcast_to(slots, tokens.shape)
        key_positions = positions
    else:
        slots = cache.lengths[:, None] + slots
        cache, slots_to_write = _advance(cache, segments, slots)
        key_segments = cache.segments
        key_positions = jnp.arange(key_segments.shape[1])[None, :]  # a cached row is one text from its first slot on
    view = _views(config, visible(segments, parents, slots, key_segments), positions, key_positions)
    once = _gradient_once if jax.default_backend() == "cpu" and config.on_one_device and cache is None else None
    true = segments[0, 0] >= 0

    def block(kernel: str, x: Array, layer: Any, own: Params, **how: Any) -> tuple[Array, _LayerCache | None]:
        keys = (None, None) if key is None else tuple(jax.random.split(jax.random.fold_in(key, layer + 1)))
        return _block(config, kernel, once, x, own, view(layer), dropout_keys=keys, true=true, **how)

    x = _dropout(embedding(tokens, positions), config.dropout, None if key is None else jax.random.fold_in(key, 0))
    if cache is None:
        rows = segments if only_segments and not config.window else None
        return Output(embedding.norm(_scan_blocks(config, block, params["blocks"], x, rows, at)), None)
    if key is None and at is None and _is_fused(config, params["blocks"], tokens):
        return _fused_blocks(config, params, x, cache, slots_to_write, view)
    x, cache = _cached_blocks(config, block, params["blocks"], x, cache, slots_to_write, at)
    return Output(embedding.norm(x), cache)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _block(
    config: DecoderConfig,
    kernel: str,
    once: Callable[..., Array] | None,
    x: Float[Array, "B T D"],
    params: Params,
    view: _View,
    *,
    dropout_keys: tuple[Array | None, Array | None],
    true: Bool[Array, ""],
    at: Int[Array, "B N"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    cached: _LayerCache | None = None,
    slots: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B Q D"], _LayerCache | None]:
    """One layer, over whole rows or with a cache.

    Its jit is for tracing: once for all layers and networks of a shape. The compiler puts it back in its place.
    """
    module = _bind(Block, config, params, joined="query_key_value" in params["attention"])
    (bias, angles), scalar = view, config.query_scalar or config.head_dim
    query, new_keys, new_values = module.attention.project(module.attention_norm(x), angles)
    if at is not None:  # the queries of all are left out by the compiler
        x, bias = pick(x, at), pick(bias[:, 0], at)[:, None]
        angles = jax.tree.map(lambda angle: pick(angle, at), angles)
        query = module.attention.project(module.attention_norm(x), angles)[0]
    if cached is not None:
        assert slots is not None
        keys, values = cached = _write(kernel, cached, slots, new_keys, new_values)
        mixed = attention.over_cache(kernel, query, keys.astype(x.dtype), values.astype(x.dtype), bias, scalar)
    elif at is not None:
        mixed = attention.over_picked(kernel, query, new_keys, new_values, bias, scalar)
    else:
        mixed = attention.over_rows(kernel, query, new_keys, new_values, bias, scalar, segments)
    x += _dropout(module.attention(mixed), config.dropout, dropout_keys[0])
    x = x if once is None else once(x, true)
    x += _dropout(module.mlp(module.mlp_norm(x)), config.dropout, dropout_keys[1])
    return (x if once is None else once(x, true)), cached


def pick(x: Shaped[Array, "B T *rest"], at: Int[Array, "B N"]) -> Shaped[Array, "B N *rest"]:
    """The slots `at` of each row."""
    return jnp.take_along_axis(x, at.reshape(*at.shape, *[1] * (x.ndim - 2)), axis=1, mode="clip")


def _is_taken_apart(config: DecoderConfig, blocks: Params) -> bool:
    """Whether stacked layers come apart by `_take_apart`: one CPU, no loop asked for, no adapters."""
    one_cpu = jax.default_backend() == "cpu" and config.on_one_device
    return one_cpu and config.unroll in (None, config.layers) and not _without_adapters(blocks)[1]


@jax.custom_vjp
def _take_apart(blocks: Params) -> tuple[Params, ...]:
    """Each layer's parameters out of the stacks; the gradient is stacked again. For one CPU; reverse mode only.

    XLA compiles equal kernels once, but one that reads layer 2 of a stack differs from one that reads layer 3. Out of
    places that the compiler cannot know all layers are read by the same kernels, and what reads the copies is the same
    for all layers too: an eighth fewer kernels in a PPO run of four layers. Both branches of the condition say the same
    so that it need not hold; as constants alone the places would be known.
    """
    some = jax.tree.leaves(blocks)[0]
    places = lambda: tuple(jnp.int32(layer) for layer in range(some.shape[0]))  # noqa: E731
    unknown = jax.lax.cond(some.ravel()[0] > 0, places, places)
    take = partial(jax.lax.dynamic_index_in_dim, keepdims=False)
    return tuple(jax.tree.map(partial(take, index=place), blocks) for place in unknown)


_take_apart.defvjp(
    lambda blocks: (_take_apart(blocks), None),
    lambda _, gradients: (jax.tree.map(lambda *layers: jnp.stack(layers), *gradients),),
)


def _scan_blocks(
    config: DecoderConfig,
    block: Callable[..., tuple[Array, Any]],
    blocks: Params,
    x: Array,
    segments: Array | None,
    at: Array | None,
) -> Array:
    """All blocks over whole rows, as one scan over the stacked layers; as two where only the last ones are adapted.

    Where `_is_taken_apart`, one after the other.

    `segments` where they alone say what a query sees; `at` the slots that are wanted of the last block.
    """
    kernel = attention.kernel_for(
        config.attention, slots=x.shape[1], head_dim=config.head_dim, dtype=x.dtype, by_segments=segments is not None
    )

    def checked(body: Callable[..., Any]) -> Callable[..., Any]:
        return jax.checkpoint(body) if config.remat == "block" else body

    if _is_taken_apart(config, blocks):
        for layer, own in enumerate(_take_apart(blocks)):
            picked = at is not None and layer == config.layers - 1
            how: dict[str, Any] = {"at": at} if picked else {"segments": segments}
            run = partial(block, kernel, layer=jnp.asarray(layer), **how)
            x = checked(lambda x, own, run=run: run(x=x, own=own)[0])(x, own)
        return x

    def scan(x: Array, layers: Array, stacked: Any, at: Callable[[Array, Any], Params]) -> Array:
        def body(x: Array, layer: tuple[Array, Any]) -> tuple[Array, None]:
            return block(kernel, x, layer[0], at(*layer), segments=segments)[0], None

        return jax.lax.scan(
            checked(body), x, (layers, stacked), unroll=min(config.unroll or config.layers, len(layers))
        )[0]

    plain, adapters = _without_adapters(blocks)
    if not adapters and (at is None or not config.on_one_device):
        x = scan(x, jnp.arange(config.layers), blocks, lambda layer, stacked: stacked)
        return x if at is None else pick(x, at)
    if not adapters:
        below = config.layers - 1
        first, last = (jax.tree.map(lambda leaf, part=part: leaf[part], blocks) for part in (slice(below), below))
        x = scan(x, jnp.arange(below), first, lambda layer, stacked: stacked) if below else x
        return checked(lambda x, last: block(kernel, x, jnp.asarray(below), last, at=at)[0])(x, last)

    def adapted(layer: Array, own: _Leaves) -> Params:
        # Frozen weights are read where they lie: as a scanned operand the two parts would be copies.
        return traverse_util.unflatten_dict({path: leaf[layer] for path, leaf in plain.items()} | own)

    below = config.layers - next(iter(adapters.values())).shape[0]
    x = scan(x, jnp.arange(below), {}, adapted) if below else x
    x = scan(x, jnp.arange(below, config.layers), adapters, adapted)
    return x if at is None else pick(x, at)


def _without_adapters(blocks: Params) -> tuple[_Leaves, _Leaves]:
    """Leaves by path: the weights, and the low-rank adapters of the last blocks."""
    flat: dict[Any, Any] = traverse_util.flatten_dict(blocks)
    adapters = {path: flat.pop(path) for path in list(flat) if path[-1] in _ADAPTERS}
    return flat, adapters


def _cached_blocks(
    config: DecoderConfig, block: Callable[..., Any], blocks: Any, x: Array, cache: Cache, slots: Array,
    at: Array | None,
) -> tuple[Array, Cache]:  # fmt: skip
    """All blocks over new tokens that also see what is cached.

    A plain loop over layers that hold their own arrays: a scan would copy each layer's part out of a stacked cache,
    which took a third of a decode step on CPU.
    """
    keys, values, kernel = list(cache.keys), list(cache.values), _cache_kernel(config)
    picked = at if config.on_one_device else None
    for layer, own in enumerate(_layers(config, blocks)):
        where = {"slots": slots, "at": picked if layer == config.layers - 1 else None}
        x, (keys[layer], values[layer]) = block(kernel, x, layer, own, cached=(keys[layer], values[layer]), **where)
    x = x if at is None or at is picked else pick(x, at)
    return x, dataclasses.replace(cache, keys=tuple(keys), values=tuple(values))


def _is_fused(config: DecoderConfig, blocks: Any, tokens: Int[Array, "B T"]) -> bool:
    """Whether the blocks of a decode step are those of `models.fused`: one token a row, on an NVIDIA GPU."""
    asked = config.attention == "auto" and _cache_kernel(config) == "cudnn"
    if not asked or tokens.shape[1] != 1 or not isinstance(blocks, tuple) or not attention.on_nvidia():
        return False
    from rlhf_jax.models import fused  # Pallas is slow to import, and for this alone

    return fused.fits(config, len(tokens)) and "query_key_value" in blocks[0]["attention"]


def _fused_blocks(
    config: DecoderConfig, params: Params, x: Array, cache: Cache, slots: Array, view: Callable[[Any], _View]
) -> Output:
    from rlhf_jax.models import fused

    of_rows = x[:, 0], cache.keys, cache.values, slots[:, 0]
    hidden, keys, values = fused.blocks(config, params["blocks"], params["norm"]["scale"], *of_rows, view)
    return Output(hidden[:, None], dataclasses.replace(cache, keys=keys, values=values))


def _layers(config: DecoderConfig, blocks: Any) -> Sequence[Params]:
    """Each layer's parameters: stacked blocks taken apart, or as `decoding_params` did before."""
    if isinstance(blocks, tuple):
        return blocks
    if _is_taken_apart(config, blocks):
        return _take_apart(blocks)
    plain, adapters = _without_adapters(blocks)
    below = config.layers - next((leaf.shape[0] for leaf in adapters.values()), 0)
    layers = []
    for layer in range(config.layers):
        own = {path: leaf[layer] for path, leaf in plain.items()}
        own |= {path: leaf[layer - below] for path, leaf in adapters.items() if layer >= below}
        layers.append(traverse_util.unflatten_dict(own))
    return layers


def decoding_params(config: DecoderConfig, params: Params) -> Params:
    """Parameters as decode steps read them fastest: each layer's arrays of their own, in the compute dtype.

    Out of stacked arrays every decode step would copy every weight, and convert it where the master is wider.
    Projections of the same input are one (`Attention`, `MLP`): few rows keep a small product from using a device well.
    On a CPU kernels lie in tiles too (`times_tiles`). Make it once for a rollout; it takes the memory of the blocks.

    Args:
      config: the decoder.
      params: as from `init_decoder`, with or without a head.

    Returns:
      `params` with ``blocks`` as a tuple of layers, for `apply_decoder` with a cache only.
    """

    def narrow(path: tuple[str, ...], leaf: Array) -> Array:
        if path[-1] not in ("kernel", "bias") or "norm" in path[-2]:
            return leaf
        leaf = leaf.astype(config.dtype)
        tiled = tile(leaf.T) if path[-1] == "kernel" else leaf
        return tiled if tiled.ndim == 3 else leaf

    def faster(layer: Params) -> Params:
        leaves: dict[Any, Any] = traverse_util.flatten_dict(_with_joined(config, layer))
        return traverse_util.unflatten_dict({path: narrow(path, leaf) for path, leaf in leaves.items()})

    return params | {"blocks": tuple(faster(layer) for layer in _layers(config, params["blocks"]))}


def _with_joined(config: DecoderConfig, layer: Any) -> Params:
    """The layer with each group of `_JOINED` as one projection: its outputs side by side.

    Not where outputs are spread over devices: those of one projection would have to move. Nor beside adapters.
    """
    adapted = any(path[-1] in _ADAPTERS for path in traverse_util.flatten_dict(layer))
    if adapted or (config.mesh is not None and config.mesh.shape["tensor"] > 1):
        return layer
    layer = {name: dict(module) for name, module in layer.items()}
    for module, names in _JOINED.items():
        if all(name in layer[module] for name in names):
            parts = [layer[module].pop(name) for name in names]
            layer[module]["_".join(names)] = jax.tree.map(lambda *x: jnp.concatenate(x, axis=-1), *parts)
    return layer


def _cache_kernel(config: DecoderConfig) -> str:
    return attention.cache_kernel(config.attention, head_dim=config.head_dim, dtype=jnp.dtype(config.dtype))


def _advance(cache: Cache, segments: Int[Array, "B T"], slots: Int[Array, "B T"]) -> tuple[Cache, Int[Array, "B T"]]:
    """The cache with the new tokens' segments and lengths, and the slots for their keys and values."""
    # Padding aims past the end, and mode="drop" leaves it out.
    slots = jnp.where(segments > 0, slots, cache.segments.shape[1])
    rows = jnp.arange(segments.shape[0])[:, None]
    stored = cache.segments.at[rows, slots].set(segments.astype(cache.segments.dtype), mode="drop")
    lengths = cache.lengths + (segments > 0).sum(axis=1).astype(cache.lengths.dtype)
    return dataclasses.replace(cache, segments=stored, lengths=lengths), slots


def _write(kernel: str, cached: _LayerCache, slots: Int[Array, "B T"], key: Array, value: Array) -> _LayerCache:
    """Stores ``[B, T, G, E]`` in the slots of a layer's keys and values, laid out as `attention.cache_shapes`."""
    (keys, values), rows = cached, jnp.arange(slots.shape[0])[:, None]
    if kernel == "cudnn":
        keys = keys.at[rows, slots].set(key.astype(keys.dtype), mode="drop")
        return keys, values.at[rows, slots].set(value.astype(values.dtype), mode="drop")
    keys = keys.at[rows, :, :, slots].set(key.astype(keys.dtype), mode="drop")
    return keys, values.at[rows, :, slots].set(value.astype(values.dtype), mode="drop")


def init_cache(config: DecoderConfig, batch: int, length: int) -> Cache:
    """An empty cache of `length` slots a row, in the compute dtype; rows and heads are spread over `config.mesh`."""
    kernel, dtype = _cache_kernel(config), jnp.dtype(config.dtype)
    shapes = attention.cache_shapes(kernel, batch, length, config.kv_heads, config.head_dim)
    axes = (_ROWS, None, "tensor", None) if kernel == "cudnn" else (_ROWS, "tensor", None, None)

    def empty(shape: tuple[int, ...]) -> tuple[Array, ...]:
        return tuple(_spread(config.mesh, jnp.zeros(shape, dtype), *axes) for _ in range(config.layers))

    keys, values = (empty(shape) for shape in shapes)
    return Cache(
        keys=keys,
        values=values,
        segments=jnp.zeros((batch, length), jnp.int32),
        lengths=jnp.zeros((batch,), jnp.int32),
    )
