"""Heads over the one decoder: a language model (logits) and a scalar model (reward and value).

Head products are float32 at the highest precision: their errors reach every log-prob, reward and
value.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlhf_jax.backends.plain import head_product
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.decoder import apply_decoder, init_decoder
from rlhf_jax.models.decoding import decoding_params, init_cache
from rlhf_jax.models.placement import spread_rows
from rlhf_jax.types import Model, Params


def _model(config: DecoderConfig, init: Callable[..., Params], head: Callable[..., Array]) -> Model:
    return Model(
        init=init,
        apply=functools.partial(apply_decoder, config),
        head=head,
        init_cache=functools.partial(init_cache, config),
        for_decoding=functools.partial(decoding_params, config),
        config=config,
        picks=True,
    )


@functools.lru_cache
def language_model(config: DecoderConfig) -> Model:
    """The policy and its reference: ``head(params, hidden)`` gives float32 logits ``[..., V]``.

    Equal configs give the same object, so that functions compiled for one are reused.
    """

    def init(key: Array) -> Params:
        params = init_decoder(config, jax.random.fold_in(key, 0))
        if not config.tied:
            shape = (config.width, config.vocab_size)
            params["unembed"] = {
                "kernel": 0.02 * jax.random.normal(jax.random.fold_in(key, 1), shape)
            }
        return params

    def head(params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        return _masked(logits(params, hidden), config.unused_ids)

    def logits(params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        # Right beside the product: else its gradient comes back in pieces of the width, as the
        # embedding is placed.
        hidden = spread_rows(config.mesh, hidden)
        if config.tied:
            return config.backend.head_logits(hidden, params["embed"]["embedding"])
        return head_product("...d,dv->...v", hidden, params["unembed"]["kernel"])

    return _model(config, init, head)


NEVER = -1e9
"""The logit of an id that has no text. It is finite, so that entropies and gradients are; its
probability is 0.
"""


def _masked(
    logits: Float[Array, "... V"], unused: tuple[tuple[int, int], ...]
) -> Float[Array, "... V"]:
    """The logits, with `NEVER` for the ids of `unused`."""
    if not unused:
        return logits
    # In numpy, because the ranges are known while JAX traces: the mask is a constant.
    mask = np.zeros(logits.shape[-1], bool)
    for start, stop in unused:
        mask[start:stop] = True
    return jnp.where(mask, NEVER, logits)


def without_ids(model: Model, unused: tuple[tuple[int, int], ...]) -> Model:
    """The language model with a head that gives the ids of `unused` probability 0.

    Sampler, log-probs, entropy and reference use the same head, so they all refer to the same
    distribution.

    Args:
      model: a language model; one that `language_model` made comes back as that of another config.
      unused: ranges of ids, ``(first, after the last)``.

    Returns:
      A model with the same parameters; equal arguments give the same object.
    """
    config = model.config
    # `language_model` is cached, so equality holds for its own results only. A model with another
    # head (adapters, say) must keep that head, and gets a wrapper.
    if isinstance(config, DecoderConfig) and model == language_model(config):
        unused = tuple(sorted({*config.unused_ids, *unused}))
        return language_model(dataclasses.replace(config, unused_ids=unused))
    return _wrapped(model, unused)


@functools.lru_cache
def _wrapped(model: Model, unused: tuple[tuple[int, int], ...]) -> Model:
    return model._replace(head=lambda params, hidden: _masked(model.head(params, hidden), unused))


@functools.lru_cache
def scalar_model(config: DecoderConfig) -> Model:
    """The reward and the value model: one linear read-out with a bias for the unembedding.

    ``head(params, hidden) = hidden . weight + bias``, float32 ``[...]``.

    Source: Ouyang et al. 2022, section 3.5 (the final unembedding layer removed, a scalar output).
    """

    def init(key: Array) -> Params:
        params = init_decoder(config, jax.random.fold_in(key, 0))
        return params | {"score": init_score(config.width, jax.random.fold_in(key, 1))}

    def head(params: Params, hidden: Float[Array, "... D"]) -> Float[Array, " ..."]:
        score = params["score"]
        return head_product("...d,d->...", hidden, score["weight"]) + score["bias"].astype(
            jnp.float32
        )

    return _model(config, init, head)


def init_score(width: int, key: Array) -> Params:
    """A fresh scalar head: ``weight ~ N(0, 1 / (D + 1))`` (variance), bias 0.

    Source: Stiennon et al. 2020, appendix B.1 (weights of the reward head).
    """
    return {"weight": jax.random.normal(key, (width,)) * (width + 1) ** -0.5, "bias": jnp.zeros(())}


def scalar_from_language_model(params: Params, key: Array) -> Params:
    """Reward-model parameters from a language model's (SFT or base), with a fresh scalar head.

    The unembedding is left out. The arrays are shared with `params`, not copied: copy them before a
    step that donates its state.
    """
    width = params["embed"]["embedding"].shape[1]
    # A tied model has no "unembed"; its embedding stays, as the input of the trunk.
    return {name: value for name, value in params.items() if name != "unembed"} | {
        "score": init_score(width, key)
    }
