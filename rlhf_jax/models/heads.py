"""Heads over the one decoder: a language model (logits) and a scalar model (reward and value).

Head products are float32, their errors would reach every log-prob, reward and value: at the highest precision for
float32 hidden states. Those of a bfloat16 model are exact in TF32 and in the passes of ``HIGH``, which rounds their
products with the weights less than bfloat16 rounded them before.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlhf_jax.models.decoder import (
    DecoderConfig,
    apply_decoder,
    decoding_params,
    init_cache,
    init_decoder,
    spread_rows,
    tile,
    times_tiles,
)
from rlhf_jax.types import Model, Params


def _model(config: DecoderConfig, init, head) -> Model:
    return Model(
        init=init,
        apply=functools.partial(apply_decoder, config),
        head=head,
        init_cache=functools.partial(init_cache, config),
        for_decoding=functools.partial(decoding_params, config),
        config=config,
        picks=True,
    )


FEW_ROWS = 64
"""Up to so many hidden states, as in decoding, reading the head's weights costs more than using them."""


@functools.lru_cache
def language_model(config: DecoderConfig) -> Model:
    """The policy and its reference: ``head(params, hidden)`` gives float32 logits ``[..., V]``.

    Equal configs give the same object, so that what was compiled for one is used by all.
    """

    def init(key: Array) -> Params:
        params = init_decoder(config, jax.random.fold_in(key, 0))
        if not config.tied:
            shape = (config.width, config.vocab_size)
            params["unembed"] = {"kernel": 0.02 * jax.random.normal(jax.random.fold_in(key, 1), shape)}
        return params

    def head(params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        return _masked(logits(params, hidden), config.unused_ids)

    def logits(params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        weight = params["embed"]["embedding"] if config.tied else params["unembed"]["kernel"]
        # Right beside the product: else its gradient comes back in pieces of the width, as the embedding lies.
        hidden = spread_rows(config.mesh, hidden)
        if config.tied and hidden.size <= FEW_ROWS * config.width:
            tiles = tile(weight.astype(jnp.float32))
            if tiles.ndim == 3:
                return times_tiles(hidden.astype(jnp.float32), tiles, precision=jax.lax.Precision.HIGHEST)
            if weight.dtype == hidden.dtype:  # bfloat16 weights are read as they are: their products are exact
                return jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=jnp.float32)
        return _product("...d,vd->...v" if config.tied else "...d,dv->...v", hidden, weight)

    return _model(config, init, head)


NEVER = -1e9
"""The logit of an id that has no text. It is finite, so that entropies and gradients are; its probability is 0."""


def _masked(logits: Float[Array, "... V"], unused: tuple[tuple[int, int], ...]) -> Float[Array, "... V"]:
    """`NEVER` in the place of the logits of `unused`; without any the logits themselves."""
    if not unused:
        return logits
    mask = np.zeros(logits.shape[-1], bool)
    for start, stop in unused:
        mask[start:stop] = True
    return jnp.where(mask, NEVER, logits)


def without_ids(model: Model, unused: tuple[tuple[int, int], ...]) -> Model:
    """The language model whose head gives the ids of `unused` no probability.

    Sampler, log-probs, entropy and reference read the same head, so they all speak of one distribution.

    Args:
      model: a language model; one that `language_model` made comes back as that of another config.
      unused: ranges of ids, ``(first, after the last)``.

    Returns:
      A model with the same parameters; equal arguments give the same object.
    """
    config = model.config
    if isinstance(config, DecoderConfig) and model == language_model(config):
        unused = tuple(sorted({*config.unused_ids, *unused}))
        return language_model(dataclasses.replace(config, unused_ids=unused))
    return _wrapped(model, unused)


@functools.lru_cache
def _wrapped(model: Model, unused: tuple[tuple[int, int], ...]) -> Model:
    return model._replace(head=lambda params, hidden: _masked(model.head(params, hidden), unused))


@functools.lru_cache
def scalar_model(config: DecoderConfig) -> Model:
    """The reward and the value model: the unembedding is replaced by one linear read-out with a bias.

    ``head(params, hidden) = hidden . weight + bias``, float32 ``[...]``.

    Source: Ouyang et al. 2022, section 3.5 (the final unembedding layer removed, a scalar put out).
    """

    def init(key: Array) -> Params:
        params = init_decoder(config, jax.random.fold_in(key, 0))
        return params | {"score": init_score(config.width, jax.random.fold_in(key, 1))}

    def head(params: Params, hidden: Float[Array, "... D"]) -> Float[Array, " ..."]:
        score = params["score"]
        return _product("...d,d->...", hidden, score["weight"]) + score["bias"].astype(jnp.float32)

    return _model(config, init, head)


def _product(subscripts: str, hidden: Array, weight: Array) -> Array:
    precision = jax.lax.Precision.HIGH if hidden.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    hidden, weight = hidden.astype(jnp.float32), weight.astype(jnp.float32)
    return jnp.einsum(subscripts, hidden, weight, precision=precision)


def init_score(width: int, key: Array) -> Params:
    """A fresh scalar head: ``weight ~ N(0, 1 / (D + 1))`` (variance), bias 0.

    Source: Stiennon et al. 2020, appendix B.1 (weights of the reward head).
    """
    return {"weight": jax.random.normal(key, (width,)) * (width + 1) ** -0.5, "bias": jnp.zeros(())}


def scalar_from_language_model(params: Params, key: Array) -> Params:
    """Reward-model parameters from a language model's (SFT or base): the unembedding goes, a fresh scalar head comes.

    The arrays are shared with `params`, not copied: copy them before a step that donates its state.
    """
    width = params["embed"]["embedding"].shape[1]
    return {name: value for name, value in params.items() if name != "unembed"} | {"score": init_score(width, key)}
