"""A network over finished rows: log-probs, values and scores, under the one index convention.

Everything that reads a network outside of sampling goes through here: the update, the reference, the reward model and
the checks at step 0. So the policy and its reference run the same program, and a shift can be wrong in one place only.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key, Real

from rlhf_jax import ops
from rlhf_jax.types import LMBatch, Model, Params, RankingBatch


def row_layout(lengths: Int[Array, " B"], slots: int) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Segments and positions of rows that hold one text each, contiguous from the left.

    Args:
      lengths: tokens of each row, padding not counted.
      slots: T.

    Returns:
      ``(segments, positions)``: 1 on the text and 0 on padding; ``0, 1, 2, ..``.

    >>> row_layout(jnp.array([2]), 3)[0].tolist()
    [[1, 1, 0]]
    """
    place = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32)[None, :], (lengths.shape[0], slots))
    return (place < lengths[:, None]).astype(jnp.int32), place


def response_mask(prompt_lengths: Int[Array, " B"], lengths: Int[Array, " B"], slots: int) -> Bool[Array, "B T"]:
    """True on response tokens, EOS included: ``prompt_lengths <= t < lengths``. Ids are never looked at.

    Args:
      prompt_lengths: tokens of each prompt.
      lengths: tokens of prompt and response.
      slots: T.

    Returns:
      The mask of everything that PPO trains on.

    >>> response_mask(jnp.array([1]), jnp.array([3]), 4).tolist()
    [[False, True, True, False]]
    """
    place = jnp.arange(slots, dtype=jnp.int32)[None, :]
    return (place >= prompt_lengths[:, None]) & (place < lengths[:, None])


def sequence_log_probs(
    model: Model,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    mask: Bool[Array, "B T"],
    *,
    temperature: Real[ArrayLike, ""] = 1.0,
) -> Float[Array, "B T"]:
    """Log-probs of the masked-in tokens: ``logp[:, t] = log p(tokens[t] | tokens[:t])`` at `temperature`.

    Args:
      model: a language model.
      params: its parameters.
      tokens: rows of one text each.
      lengths: tokens of each row.
      mask: which tokens to read, `response_mask` in PPO.
      temperature: the sampler's; policy, old policy and reference must share it.

    Returns:
      Log-probs in nats, float32, 0 outside `mask`. Dropout is off.
    """
    segments, positions = row_layout(lengths, tokens.shape[1])
    hidden = model.apply(params, tokens, segments=segments, positions=positions).hidden
    return ops.token_log_probs(hidden, partial(model.head, params), tokens, mask, temperature=temperature)


def sequence_log_probs_and_entropy(
    model: Model,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    mask: Bool[Array, "B T"],
    *,
    temperature: Real[ArrayLike, ""] = 1.0,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`sequence_log_probs` and, from the same logits, the entropy of the distribution of each token, in nats."""
    segments, positions = row_layout(lengths, tokens.shape[1])
    hidden = model.apply(params, tokens, segments=segments, positions=positions).hidden
    head = partial(model.head, params)
    return ops.token_log_probs_and_entropy(hidden, head, tokens, mask, temperature=temperature)


def lm_log_probs(
    model: Model, params: Params, batch: LMBatch, *, key: Key[Array, ""] | None = None
) -> Float[Array, "B T"]:
    """Log-probs of the targets of packed rows; no piece sees another one.

    Args:
      model: a language model.
      params: its parameters.
      batch: packed rows.
      key: turns dropout on.

    Returns:
      Log-probs in nats, float32, 0 outside ``batch.mask``.
    """
    hidden = model.apply(params, batch.tokens, segments=batch.segments, positions=batch.positions, key=key).hidden
    previous = ops.previous_index(batch.segments)
    return ops.token_log_probs(hidden, partial(model.head, params), batch.tokens, batch.mask, previous=previous)


def sequence_values(
    model: Model, params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
) -> tuple[Float[Array, "B T"], Float[Array, " B"]]:
    """Values before each token and after the last one.

    ``values[:, t] = V(tokens[:t])``, read at hidden index ``t - 1``; ``last = V(tokens[:lengths])``.

    Args:
      model: a scalar model.
      params: its parameters.
      tokens: rows of one text each.
      lengths: tokens of each row, at least 1.

    Returns:
      ``(values, last)``. For a reward model `last` is the score; for a value network it is the bootstrap of a
      truncated row, one place after the last entry of `values`.
    """
    segments, positions = row_layout(lengths, tokens.shape[1])
    hidden = model.apply(params, tokens, segments=segments, positions=positions).hidden
    scalars = model.head(params, hidden)
    values = ops.align(scalars, ops.previous_index(segments))
    return values, jnp.take_along_axis(scalars, lengths[:, None] - 1, axis=1)[:, 0]


def ranking_scores(model: Model, params: Params, batch: RankingBatch) -> Float[Array, "B N K"]:
    """Score of each ranked response, read at its last token; the K responses of a prompt share one forward row.

    Args:
      model: a scalar model.
      params: its parameters.
      batch: shared-prefix rows.

    Returns:
      Scores; 0 where the response is absent (rank -1).
    """
    hidden = model.apply(
        params, batch.tokens, segments=batch.segments, positions=batch.positions, parents=batch.parents
    ).hidden
    rows, *group = batch.ends.shape
    ends = batch.ends.reshape(rows, -1)
    # The head runs on the N * K read-outs only.
    scores = model.head(params, ops.align(hidden, ends)).reshape(rows, *group)
    return jnp.where(batch.ranks >= 0, scores, 0)
