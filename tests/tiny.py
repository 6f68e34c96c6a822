"""Networks of a few hundred numbers and batches for them: they compile fast, so that steps can be tested often."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import scoring, steps
from rlhf_jax.types import KLState, LMBatch, Model, Output, PPOState, Rollout

VOCABULARY, SLOTS, WIDTH = 7, 10, 5


def _apply(params, tokens, *, segments, positions, parents=None, cache=None, key=None):
    """Causal running sum of embeddings: small, smooth, and different at every place."""
    x = params["embed"][tokens] + params["places"][positions]
    mixed = jnp.cumsum(x * (segments > 0)[..., None], axis=1)
    if key is not None:
        mixed = mixed * jax.random.bernoulli(key, 0.5, mixed.shape)
    return Output(jnp.tanh(x + 0.3 * mixed), cache)


def _init(key, head_shape):
    keys = jax.random.split(key, 3)
    return {
        "embed": jax.random.normal(keys[0], (VOCABULARY, WIDTH)),
        "places": 0.3 * jax.random.normal(keys[1], (SLOTS, WIDTH)),
        "head": {
            "kernel": jax.random.normal(keys[2], head_shape),
            "bias": jnp.zeros(head_shape[1:]),
        },
    }


def _logits(params, hidden):
    bias = params["head"]["bias"]
    return hidden @ params["head"]["kernel"] + jnp.broadcast_to(
        bias, (*hidden.shape[:-1], *bias.shape)
    )


def _scalars(params, hidden):
    return hidden @ params["head"]["kernel"] + params["head"]["bias"]


def _no_cache(batch, length):
    raise NotImplementedError


LANGUAGE = Model(partial(_init, head_shape=(WIDTH, VOCABULARY)), _apply, _logits, _no_cache)
SCALAR = Model(partial(_init, head_shape=(WIDTH,)), _apply, _scalars, _no_cache)


log_probs = jax.jit(partial(scoring.sequence_log_probs, LANGUAGE))


def lm_batch(rows: int, seed: int = 0) -> LMBatch:
    """Ragged rows of one text each, everything but the first token a target."""
    random = np.random.default_rng(seed)
    lengths = jnp.asarray(random.integers(2, SLOTS + 1, rows), jnp.int32)
    segments, positions = scoring.row_layout(lengths, SLOTS)
    tokens = jnp.asarray(random.integers(0, VOCABULARY, (rows, SLOTS)), jnp.int32)
    return LMBatch(tokens, segments, positions, (segments > 0) & (positions > 0))


def rollout(rows: int, policy_params, seed: int = 0, *, temperature: float = 1.0) -> Rollout:
    """Ragged rows as if sampled from `policy_params`: `old_logp` are its log-probs, the rest is noise."""
    random = np.random.default_rng(seed)
    prompt_lengths = random.integers(1, 4, rows)
    lengths = prompt_lengths + random.integers(1, SLOTS - 3, rows)
    prompt_lengths, lengths = (jnp.asarray(x, jnp.int32) for x in (prompt_lengths, lengths))
    tokens = jnp.asarray(random.integers(0, VOCABULARY, (rows, SLOTS)), jnp.int32)
    mask = scoring.response_mask(prompt_lengths, lengths, SLOTS)
    noise = lambda: jnp.asarray(random.normal(size=(rows, SLOTS)), jnp.float32) * mask
    logp = log_probs(policy_params, tokens, lengths, mask, temperature=temperature)
    return Rollout(
        tokens=tokens,
        mask=mask,
        old_logp=logp,
        ref_logp=logp + 0.1 * noise(),
        old_values=noise(),
        rewards=noise(),
        advantages=noise(),
        returns=noise(),
        score=jnp.asarray(random.normal(size=rows), jnp.float32),
        prompt_lengths=prompt_lengths,
        lengths=lengths,
        finished=lengths < SLOTS,
        ids=jnp.arange(rows, dtype=jnp.int32),
    )


def ppo_state(policy_tx, value_tx, *, ema: bool = True) -> PPOState:
    """Both networks at step 0."""
    return PPOState(
        policy=steps.train_state(LANGUAGE.init(jax.random.key(1)), policy_tx, ema=ema),
        value=steps.train_state(SCALAR.init(jax.random.key(2)), value_tx),
        kl=KLState(jnp.float32(0.02)),
        iteration=jnp.zeros((), jnp.int32),
    )


def take(rows: Rollout, index) -> Rollout:
    """Some rows of a struct."""
    return dataclasses.replace(
        rows, **{f.name: getattr(rows, f.name)[index] for f in dataclasses.fields(rows)}
    )


def assert_bit_equal(tree, other) -> None:
    """Every leaf equal to the last bit, NaN equal to NaN."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def distance(tree, other) -> float:
    """Norm of the difference over the norm of `other`."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in leaves]
    return float(
        np.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(b**2) for _, b in pairs))
    )
