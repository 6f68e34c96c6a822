"""The block of the decoder and what it is made of: the file to change for another architecture.

Modules are flax nnx. They call the operations of `DecoderConfig.backend` and name no device. The
functions at the end turn them into pure functions of a nested dict of parameters.

Shape legend: B rows, T query slots, S key slots, D width, H query heads, G key-value heads,
E head width, Q slots that a block computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jaxtyping import Array, Float, Int

from rlhf_jax.backends import Angles, Backend, LayerCache, View, take
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.norms import NORMS
from rlhf_jax.models.placement import look_up
from rlhf_jax.types import Params

ADAPTERS = ("lora_a", "lora_b")
"""Names of the low-rank arrays beside a kernel (`models.lora`)."""

DropoutKeys = tuple[Array | None, Array | None]
"""Of the two branches of a block; None turns dropout off."""


# ------------------------------------------------------------------------------------------ modules


class Linear(nnx.Linear):
    """A projection ``x W + b``; with ``lora_a`` and ``lora_b`` it is ``x W + b + (x A) B``.

    In this order the backward pass of an adapter never computes the gradient of W, which saves a
    third of the work.
    """

    # Declared for type checkers only: `bind` sets them where a layer has adapters.
    lora_a: nnx.Param
    lora_b: nnx.Param

    def __init__(
        self,
        config: DecoderConfig,
        inputs: int,
        outputs: int,
        *,
        bias: bool,
        std: float = 0.02,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.normal(std)
        super().__init__(inputs, outputs, use_bias=bias, kernel_init=init, rngs=rngs)
        self.config = config

    def __call__(self, inputs: Float[Array, "*B I"], out_sharding: Any = None) -> Array:
        """Apply the projection to the last axis, in the compute dtype."""
        linear, dtype = self.config.backend.linear, jnp.dtype(self.config.dtype)
        # Converted at each use: the masters stay float32, and gradients reach them through the
        # cast.
        x = inputs.astype(dtype)
        bias = None if self.bias is None else self.bias[...].astype(dtype)
        y = linear(x, self.kernel[...].astype(dtype), bias)
        if hasattr(self, "lora_a"):
            low = linear(x, self.lora_a[...].astype(dtype))
            y += linear(low, self.lora_b[...].astype(dtype))
        return y


def _norm(config: DecoderConfig, *, rngs: nnx.Rngs) -> Any:
    return NORMS[config.norm](
        config.width,
        config.norm_eps,
        use_bias=config.bias == "all",
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
    )


def _head_norm(config: DecoderConfig, *, rngs: nnx.Rngs) -> Any:
    """An RMSNorm over the width of a head, of Gemma's kind in a decoder of Gemma's kind."""
    kind = config.norm if config.norm == "rmsnorm_plus_one" else "rmsnorm"
    dtype = jnp.dtype(config.dtype)
    return NORMS[kind](config.head_dim, config.norm_eps, use_bias=False, dtype=dtype, rngs=rngs)


def _residual_std(config: DecoderConfig) -> float:
    # GPT-2: the sum of 2L branches keeps the variance of one.
    return 0.02 / (2 * config.layers) ** 0.5


class Attention(nnx.Module):
    """Grouped-query self-attention; query head h reads key-value head ``h // (H / G)``.

    `joined`: the three projections are one, as `decoding.decoding_params` makes them.
    """

    def __init__(self, config: DecoderConfig, *, joined: bool = False, rngs: nnx.Rngs):
        self.config = config
        heads, groups = config.heads * config.head_dim, config.kv_heads * config.head_dim
        into = partial(Linear, config, config.width, bias=config.bias in ("qkv", "all"), rngs=rngs)
        if joined:
            self.query_key_value = into(heads + 2 * groups)
        else:
            self.query, self.key, self.value = into(heads), into(groups), into(groups)
        std = _residual_std(config)
        self.out = Linear(
            config, heads, config.width, bias=config.bias == "all", std=std, rngs=rngs
        )
        if config.qk_norm:
            self.query_norm = _head_norm(config, rngs=rngs)
            self.key_norm = _head_norm(config, rngs=rngs)
        if config.post_norm:
            self.post_norm = _norm(config, rngs=rngs)

    def __call__(
        self,
        queries: Float[Array, "B Q D"],
        x: Float[Array, "B T D"],
        view: View,
        *,
        cache: tuple[LayerCache, Array] | None = None,
    ) -> tuple[Float[Array, "B Q D"], LayerCache | None]:
        """What attention adds to the residual stream.

        Args:
          queries: the slots with queries; `x` itself if all have one.
          x: the slots that are attended to.
          view: what each query sees, and the rotary angles.
          cache: keys and values of earlier tokens, and the slots that take those of `x`.

        Returns:
          The branch, and the keys and values with those of `x`; None without a cache.
        """
        backend, scalar = self.config.backend, self.config.query_scalar or self.config.head_dim
        query, key, value = self.project(x)
        # Identity says whether all slots have queries. What separate projections compute in vain is
        # dead code, which the compiler removes.
        if queries is not x:
            query, _, _ = self.project(queries)
        if self.config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        # After the norm of queries and keys, as in Qwen3 and Gemma, and before keys are cached.
        query, key = rotate(query, view.query_angles), rotate(key, view.key_angles)
        if cache is not None:
            stored = backend.cache.write(*cache, key, value)
            mixed = backend.cache.attend(query, stored, view, scalar)
        else:
            stored, attend = None, backend.attend if queries is x else backend.attend_at
            mixed = attend(query, key, value, view, scalar)
        mixed = self.out(mixed.reshape(*mixed.shape[:2], -1))
        return self.post_norm(mixed) if self.config.post_norm else mixed, stored

    def project(self, x: Float[Array, "B T D"]) -> tuple[Array, Array, Array]:
        """Queries ``[B, T, H, E]``, keys and values ``[B, T, G, E]``."""
        heads, groups = self.config.heads, self.config.kv_heads
        by_head = lambda y: y.reshape(*y.shape[:2], -1, self.config.head_dim)
        if hasattr(self, "query_key_value"):
            together = by_head(self.query_key_value(x))
            query, key, value = jnp.split(together, [heads, heads + groups], axis=2)
            return query, key, value
        return by_head(self.query(x)), by_head(self.key(x)), by_head(self.value(x))


_GATES = {"swiglu": jax.nn.silu, "geglu": partial(jax.nn.gelu, approximate=True)}


class MLP(nnx.Module):
    """``down(act(up x))``, or ``down(act(gate x) * up x)`` for SwiGLU and GEGLU.

    `joined`: gate and up are one projection, as `decoding.decoding_params` makes them.
    """

    def __init__(self, config: DecoderConfig, *, joined: bool = False, rngs: nnx.Rngs):
        self.config = config
        bias, inner = config.bias == "all", config.mlp_width
        gated = config.activation in _GATES
        if joined and gated:
            self.gate_up = Linear(config, config.width, 2 * inner, bias=bias, rngs=rngs)
        else:
            if gated:
                self.gate = Linear(config, config.width, inner, bias=bias, rngs=rngs)
            self.up = Linear(config, config.width, inner, bias=bias, rngs=rngs)
        std = _residual_std(config)
        self.down = Linear(config, inner, config.width, bias=bias, std=std, rngs=rngs)
        if config.post_norm:
            self.post_norm = _norm(config, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply the MLP to each slot."""
        activation = self.config.activation
        if activation in _GATES:
            joined = hasattr(self, "gate_up")
            gate, up = jnp.split(self.gate_up(x), 2, -1) if joined else (self.gate(x), self.up(x))
            y = self.down(_GATES[activation](gate) * up)
        else:
            y = self.down(jax.nn.gelu(self.up(x), approximate=activation == "gelu_tanh"))
        return self.post_norm(y) if self.config.post_norm else y


class Block(nnx.Module):
    """Pre-norm residual block: ``x + attention(norm x)``, then ``x + mlp(norm x)``."""

    def __init__(self, config: DecoderConfig, *, joined: bool = False, rngs: nnx.Rngs):
        self.config = config
        self.attention_norm = _norm(config, rngs=rngs)
        self.attention = Attention(config, joined=joined, rngs=rngs)
        self.mlp_norm = _norm(config, rngs=rngs)
        self.mlp = MLP(config, joined=joined, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        view: View,
        *,
        cache: tuple[LayerCache, Array] | None = None,
        positions: Int[Array, "B Q"] | None = None,
        keys: DropoutKeys = (None, None),
    ) -> tuple[Float[Array, "B Q D"], LayerCache | None]:
        """The residual stream after this block, and the cache of this layer."""
        residual, rate = self.config.backend.residual, self.config.dropout
        seen = queries = self.attention_norm(x)
        if positions is not None:  # keys and values of all slots, the rest of these only
            x, view = take(x, positions), view.at(positions)
            queries = self.attention_norm(x)
        mixed, stored = self.attention(queries, seen, view, cache=cache)
        x = residual(x + dropout(mixed, rate, keys[0]))
        x = residual(x + dropout(self.mlp(self.mlp_norm(x)), rate, keys[1]))
        return x, stored


class Embedding(nnx.Module):
    """Token embedding, the learned positions of GPT-2, and the norm after the last block."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        init, dtype = nnx.initializers.normal(0.02), jnp.dtype(config.dtype)
        table = partial(nnx.Embed, embedding_init=init, dtype=dtype, rngs=rngs)
        self.embed = table(config.vocab_size, config.width)
        if config.positions == "learned":
            self.positions = table(config.context_length, config.width)
        self.norm = _norm(config, rngs=rngs)
        self.factor = config.width**0.5 if config.embedding_scaled else 1.0
        self.mesh = config.mesh

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Embed tokens, with their learned positions where the family has them."""
        x = look_up(self.mesh, self.embed, tokens) * self.factor
        if not hasattr(self, "positions"):
            return x
        return x + look_up(self.mesh, self.positions, positions)


# --------------------------------------------------------------------------------- array functions


def rotary_angles(config: DecoderConfig, positions: Int[Array, "B T"]) -> Angles | None:
    """Cosines and sines of each position's angles; None where positions are learned."""
    if config.positions != "rotary":
        return None
    frequency = _rotary_frequencies(config)
    # In float32, because bfloat16 rounds integers above 256. The axis of size 1 is that of heads.
    angle = positions[..., None, None].astype(jnp.float32) * frequency[None, None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def _rotary_frequencies(config: DecoderConfig) -> Float[Array, " E2"]:
    exponent = -jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequency = config.rotary_base**exponent
    if config.rotary_scaling is None:
        return frequency
    factor, low, high, original = config.rotary_scaling
    turns = original * frequency / (2 * jnp.pi)  # full turns within the original context
    stays = jnp.clip((turns - low) / (high - low), 0, 1)
    return frequency * (stays + (1 - stays) / factor)


def rotate(x: Float[Array, "B T H E"], angles: Angles | None) -> Float[Array, "B T H E"]:
    """Rotary positions in the half-split layout: coordinate i turns with coordinate i + E/2."""
    if angles is None:
        return x
    cos, sin = angles
    # Not the neighbouring coordinates (2i, 2i + 1) of the paper: checkpoints of Hugging Face are
    # stored for this half-split layout.
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Entries set to 0 with probability `rate`, the others scaled up; `x` itself without a key."""
    if key is None or rate == 0:
        return x
    # 16 random bits per entry, half of what `bernoulli` draws.
    dropped = round(rate * 2**16)
    keep = jax.random.bits(key, x.shape, jnp.uint16) >= dropped
    # By the rate as it was rounded, which keeps the expectation exact.
    return jnp.where(keep, x / (1 - dropped / 2**16), 0)


# ---------------------------------------------------------------------- modules as pure functions


def init_module(kind: Callable[..., Any], config: DecoderConfig, key: Array) -> Params:
    """Fresh float32 parameters of a module, as a nested dict."""
    return nnx.to_pure_dict(nnx.state(kind(config, rngs=nnx.Rngs(key)), nnx.Param))


@functools.lru_cache
def _graph(kind: Callable[..., Any], config: DecoderConfig, **how: bool) -> Any:
    """A module without its arrays; building one takes 10% of a training step's tracing time."""
    return nnx.split(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0), **how)))[0]


def bind(kind: Callable[..., Any], config: DecoderConfig, params: Params, **how: bool) -> Any:
    """The module over `params`, built while JAX traces, so that compiled calls do not run nnx."""
    leaves, adapters = without_adapters(params)
    module = nnx.merge(_graph(kind, config, **how), traverse_util.unflatten_dict(leaves))
    # The cached graph has no adapters, so they are attached to the finished module.
    for (*path, name), value in adapters.items():
        setattr(functools.reduce(getattr, path, module), name, nnx.Param(value))
    return module


def bind_embedding(config: DecoderConfig, params: Params) -> Any:
    """The `Embedding` over a decoder's parameters."""
    own = {name: params[name] for name in ("embed", "positions", "norm") if name in params}
    return bind(Embedding, config, own)


def without_adapters(params: Params) -> tuple[dict[Any, Array], dict[Any, Array]]:
    """Leaves by path: the weights, and the low-rank adapters."""
    flat: dict[Any, Any] = traverse_util.flatten_dict(params)
    adapters = {path: flat.pop(path) for path in list(flat) if path[-1] in ADAPTERS}
    return flat, adapters


class Shared(NamedTuple):
    """The inputs of every layer besides its parameters.

    Attributes:
      whole: what queries see, and their rotary angles.
      local: the same within a window, for local layers; None where no layer is local.
      key: of dropout; None turns it off.
    """

    whole: View
    local: View | None
    key: Array | None

    def view(self, config: DecoderConfig, layer: Array | int) -> View:
        """What the queries of one layer see."""
        if self.local is None:
            return self.whole
        # `layer` may be traced, because all layers share one program. So both views exist, and one
        # is selected.
        is_global = (layer + 1) % config.window_every == 0
        return jax.tree.map(lambda a, b: jnp.where(is_global, a, b), self.whole, self.local)

    def dropout_keys(self, layer: Array | int) -> DropoutKeys:
        """The keys of one layer's two branches."""
        if self.key is None:
            return None, None
        # + 1, because `apply_decoder` has used 0 for the embedding.
        attention, mlp = jax.random.split(jax.random.fold_in(self.key, layer + 1))
        return attention, mlp


@partial(jax.jit, static_argnums=(0, 1))
def run_block(
    config: DecoderConfig,
    backend: Backend,
    shared: Shared,
    x: Float[Array, "B T D"],
    layer: Array | int,
    params: Params,
    **how: Any,
) -> tuple[Float[Array, "B Q D"], LayerCache | None]:
    """One layer as a function of its parameters; `how` as for `Block`.

    Its jit saves tracing: layers and networks of one shape are traced once, and the compiler
    inlines the function again. `backend` is the config's, passed to be part of jit's cache key.
    """
    del backend
    block = bind(Block, config, params, joined="query_key_value" in params["attention"])
    return block(x, shared.view(config, layer), keys=shared.dropout_keys(layer), **how)
