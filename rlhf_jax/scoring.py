"""A network over finished rows: log-probs, values and scores, under the one index convention.

Every forward pass outside of sampling goes through this file: the update, the reference, the reward
model and the checks at step 0. So the policy and its reference run the same program, and there is
only one place where the shift could be wrong.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key, Real

from rlhf_jax import ops
from rlhf_jax.log_probs import token_log_probs, token_log_probs_and_entropy, weighted_log_prob
from rlhf_jax.types import LMBatch, Model, Output, Params, RankingBatch


def row_layout(
    lengths: Int[Array, " B"], slots: int
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Segments and positions of rows of one text each, contiguous from the left.

    Args:
      lengths: tokens of each row, without padding.
      slots: T.

    Returns:
      ``(segments, positions)``: 1 on the text and 0 on padding; ``0, 1, 2, ..``.

    >>> row_layout(jnp.array([2]), 3)[0].tolist()
    [[1, 1, 0]]
    """
    place = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32)[None, :], (lengths.shape[0], slots))
    return (place < lengths[:, None]).astype(jnp.int32), place


def response_mask(
    prompt_lengths: Int[Array, " B"], lengths: Int[Array, " B"], slots: int
) -> Bool[Array, "B T"]:
    """True on response tokens, EOS included: ``prompt_lengths <= t < lengths``.

    Token ids are not read, so a prompt may contain the EOS or padding id.

    Args:
      prompt_lengths: tokens of each prompt.
      lengths: tokens of prompt and response.
      slots: T.

    Returns:
      The mask of the tokens that PPO trains on.

    >>> response_mask(jnp.array([1]), jnp.array([3]), 4).tolist()
    [[False, True, True, False]]
    """
    place = jnp.arange(slots, dtype=jnp.int32)[None, :]
    return (place >= prompt_lengths[:, None]) & (place < lengths[:, None])


def pair_rows(model: Model) -> Model:
    """The same network with two texts packed per row of 7/6 the width: 7/12 of the work.

    The longest text shares a row with the shortest, the second longest with the second shortest and
    so on, each as a segment of its own; hidden states come back at the rows and slots of the input.
    Sampled lengths are heavy-tailed, so a batch padded to the length limit is mostly padding. Check
    `pairs_fit` first: if any pair is longer than a packed row, all hidden states are NaN. Meant for
    rows on one device: over several devices, exchanging rows costs more than it saves.

    Args:
      model: any network; its cache and heads are unchanged.

    Returns:
      A `Model` whose `apply` gives the same hidden states up to rounding (undefined on padding).
    """

    def apply(
        params: Params, tokens: Any, *, segments: Any, positions: Any, **others: Any
    ) -> Output:
        del positions
        assert not any(value is not None for value in others.values()), (
            "rows of one text each, without a cache"
        )
        places = jnp.arange(_pair_width(tokens.shape[1]))[None, :]
        lengths = jnp.sum(segments > 0, axis=1)
        tokens = jnp.pad(tokens, ((0, 0), (0, places.shape[1] - tokens.shape[1])))
        first, second = _longest_with_shortest(lengths)
        ends = lengths[first][:, None]
        # Slots before `ends` hold the first text; slot ``ends + i`` holds token i of the second
        # one.
        own, behind = places < ends, jnp.maximum(places - ends, 0)
        in_second = ~own & (behind < lengths[second][:, None])
        hidden = model.apply(
            params,
            jnp.where(own, tokens[first], jnp.take_along_axis(tokens[second], behind, axis=1)),
            segments=jnp.where(own, 1, jnp.where(in_second, 2, 0)),
            positions=jnp.where(own, places, behind),
        ).hidden
        # The second text of a row starts where the first one ends; shift it back to slot 0.
        there = jnp.minimum(places + ends, places.shape[1] - 1)[:, : segments.shape[1]]
        behind = jnp.take_along_axis(hidden, there[:, :, None], axis=1)
        both = jnp.concatenate([hidden[:, : segments.shape[1]], behind])
        # A compiled program cannot raise, so a pair that is too long must show as NaN.
        fits = jnp.all(lengths[first] + lengths[second] <= places.shape[1])
        return Output(
            jnp.where(fits, both[jnp.argsort(jnp.concatenate([first, second]))], jnp.nan), None
        )

    # This `apply` takes neither `at` nor `lengths`.
    return model._replace(apply=apply, picks=False)


def _pair_width(slots: int) -> int:
    return slots * 7 // 6


def _longest_with_shortest(
    lengths: Int[Array, " B"],
) -> tuple[Int[Array, " B2"], Int[Array, " B2"]]:
    order = jnp.argsort(lengths)
    return order[::-1][: len(order) // 2], order[: len(order) // 2]


def pairs_fit(lengths: ArrayLike, slots: int) -> bool:
    """Whether `pair_rows` can take these batches.

    Args:
      lengths: ``[..., B]``, tokens of the rows of each batch, on the host.
      slots: T.

    Returns:
      True if B is even and every pair of every batch (longest with shortest and so on) fits into
      ``7/6 T`` slots.

    >>> [pairs_fit(np.array(lengths), 6) for lengths in ([5, 2, 3, 4], [6, 3, 2, 4], [1])]
    [True, False, False]
    """
    ordered = np.sort(np.asarray(lengths), axis=-1)
    return ordered.shape[-1] % 2 == 0 and bool(
        np.all(ordered + ordered[..., ::-1] <= _pair_width(slots))
    )


def sequence_log_probs(
    model: Model,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    mask: Bool[Array, "B T"],
    *,
    temperature: Real[ArrayLike, ""] = 1.0,
    targets: int | None = None,
) -> Float[Array, "B T"]:
    """Log-probs of the masked-in tokens: ``logp[:, t] = log p(tokens[t] | tokens[:t])``.

    Args:
      model: a language model.
      params: its parameters.
      tokens: rows of one text each.
      lengths: tokens of each row.
      mask: which tokens to read, `response_mask` in PPO.
      temperature: the sampler's; policy, old policy and reference must share it.
      targets: the most tokens that `mask` has in any row, `max_new_tokens` in PPO; None for no
        limit. The last block is computed for this many tokens per row. A row with more gives NaN.

    Returns:
      Log-probs in nats at `temperature`, float32, 0 outside `mask`. Dropout is off.
    """
    own, head = _targets(tokens, mask, targets), partial(model.head, params)
    hidden = model.apply_at(params, tokens, own.at, **_texts(model, tokens, lengths)).hidden
    how = {"previous": own.previous, "temperature": temperature}
    return own.at_slots(token_log_probs(hidden, head, own.tokens, own.mask, **how))


def sequence_log_probs_and_entropy(
    model: Model,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    mask: Bool[Array, "B T"],
    *,
    temperature: Real[ArrayLike, ""] = 1.0,
    targets: int | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`sequence_log_probs` and the entropies, in nats, of the same logits."""
    own, head = _targets(tokens, mask, targets), partial(model.head, params)
    hidden = model.apply_at(params, tokens, own.at, **_texts(model, tokens, lengths)).hidden
    how = {"previous": own.previous, "temperature": temperature}
    logp, entropy = token_log_probs_and_entropy(hidden, head, own.tokens, own.mask, **how)
    return own.at_slots(logp), own.at_slots(entropy)


class _Targets(NamedTuple):
    """The targets of rows: all slots as they are, or at most N per row, moved to its front.

    `at` are the slots that predict the targets, None for all slots; `previous` are the indices into
    what is computed at `at`. `place` moves results back to their slots of the row, and `fits` is
    true for a row with at most N targets.
    """

    at: Int[Array, "B N"] | None
    tokens: Int[Array, "B N"]
    mask: Bool[Array, "B N"]
    previous: Int[Array, "B N"] | None = None
    place: Int[Array, "B T"] | None = None
    fits: Bool[Array, "B 1"] | None = None

    def at_slots(self, x: Float[Array, "B N"]) -> Float[Array, "B T"]:
        """Results of the targets, moved back to their slots; NaN in rows with too many targets."""
        if self.place is None or self.fits is None:
            return x
        return jnp.where(self.fits, ops.align(x, self.place), jnp.nan)


def _targets(tokens: Array, mask: Array, targets: int | None) -> _Targets:
    """The masked-in tokens of rows of one text each, at most `targets` per row (None: no limit)."""
    if targets is None or targets >= tokens.shape[1]:
        return _Targets(None, tokens, mask)
    # Moving the targets to the front gives all rows the same N slots for the last block.
    order, place = ops.compact(mask, targets)
    # Hidden states will exist for the slots `before` only, in this order, so target n is predicted
    # by their entry n.
    itself = jnp.broadcast_to(jnp.arange(targets, dtype=jnp.int32)[None, :], order.shape)
    fits = (jnp.sum(mask, axis=1) <= targets)[:, None]
    before = jnp.maximum(order - 1, 0)
    # ``order > 0``: -1 marks the end of the list, and a token in slot 0 has nothing before it that
    # could predict it.
    return _Targets(before, ops.align(tokens, order), order > 0, itself, place, fits)


def _texts(model: Model, tokens: Array, lengths: Array) -> dict[str, Array]:
    """The layout of rows of one text each, as `Model.apply` takes it."""
    segments, positions = row_layout(lengths, tokens.shape[1])
    rows = {"segments": segments, "positions": positions}
    # With lengths, some kernels need no mask over all pairs of slots.
    return rows | {"lengths": lengths} if model.picks else rows


def lm_log_probs(
    model: Model, params: Params, batch: LMBatch, *, key: Key[Array, ""] | None = None
) -> Float[Array, "B T"]:
    """Log-probs of the targets of packed rows; no segment attends to another.

    Args:
      model: a language model.
      params: its parameters.
      batch: packed rows.
      key: turns dropout on.

    Returns:
      Log-probs in nats, float32, 0 outside ``batch.mask``.
    """
    rows = {"segments": batch.segments, "positions": batch.positions}
    hidden = model.apply(params, batch.tokens, **rows, key=key).hidden
    head, previous = partial(model.head, params), ops.previous_index(batch.segments)
    return token_log_probs(hidden, head, batch.tokens, batch.mask, previous=previous)


def lm_weighted_log_prob(
    model: Model,
    params: Params,
    batch: LMBatch,
    weights: Float[Array, "B T"],
    *,
    key: Key[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """The weighted sum of `lm_log_probs`, its head gradient computed in the forward pass.

    Args:
      model: a language model.
      params: its parameters.
      batch: packed rows.
      weights: one per target; they get no gradient.
      key: turns dropout on.

    Returns:
      ``(total, logp)`` as `log_probs.weighted_log_prob` returns them.
    """
    rows = {"segments": batch.segments, "positions": batch.positions}
    hidden = model.apply(params, batch.tokens, **rows, key=key).hidden
    previous = jnp.where(batch.mask, ops.previous_index(batch.segments), -1)
    head = partial(model.head, params)
    return weighted_log_prob(hidden, head, batch.tokens, weights, previous=previous)


def sequence_values(
    model: Model,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    mask: Bool[Array, "B T"] | None = None,
    *,
    targets: int | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, " B"]]:
    """Values before each token and after the last one.

    ``values[:, t] = V(tokens[:t])``, read at hidden index ``t - 1``;
    ``last = V(tokens[:lengths])``.

    Args:
      model: a scalar model.
      params: its parameters.
      tokens: rows of one text each.
      lengths: tokens of each row, at least 1.
      mask: which values are wanted; None for all.
      targets: the most tokens that `mask` has in any row, as in `sequence_log_probs`; None for no
        limit.

    Returns:
      ``(values, last)``. For a value network `last` is the bootstrap of a truncated row, one step
      after the last entry of `values`; for a reward model it is the score (`sequence_scores`
      computes only that).
    """
    values, last = _read_values(model, params, tokens, lengths, mask, targets, lengths[:, None] - 1)
    return values, last[:, 0]


def response_values(
    model: Model,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    mask: Bool[Array, "B T"],
    *,
    targets: int | None = None,
) -> Float[Array, "B T"]:
    """The `values` of `sequence_values` alone: before each masked-in token, none after the last."""
    return _read_values(
        model, params, tokens, lengths, mask, targets, jnp.zeros((len(tokens), 0), jnp.int32)
    )[0]


def _read_values(
    model: Model,
    params: Params,
    tokens: Array,
    lengths: Array,
    mask: Array | None,
    targets: int | None,
    also: Array,
) -> tuple[Array, Array]:
    """Values before the tokens of `mask`, and the scalars at the slots `also` ``[B, M]``."""
    # Nothing is saved by picking slots where as many are read as a row has.
    if mask is None or targets is None or targets + also.shape[1] >= tokens.shape[1]:
        hidden = model.apply(params, tokens, **_texts(model, tokens, lengths)).hidden
        scalars = model.head(params, hidden)
        segments, _ = row_layout(lengths, tokens.shape[1])
        return ops.align(scalars, ops.previous_index(segments)), jnp.take_along_axis(
            scalars, also, axis=1
        )
    order, place = ops.compact(mask, targets)
    at = jnp.concatenate([jnp.maximum(order - 1, 0), also], axis=1)
    hidden = model.apply_at(params, tokens, at, **_texts(model, tokens, lengths)).hidden
    scalars = model.head(params, hidden)
    values = ops.align(jnp.where(order > 0, scalars[:, :targets], 0), place)
    return jnp.where((jnp.sum(mask, axis=1) <= targets)[:, None], values, jnp.nan), scalars[
        :, targets:
    ]


def sequence_scores(
    model: Model, params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
) -> Float[Array, " B"]:
    """Reward-model score of each row, read at its last token: ``r(tokens[:lengths])``.

    Args:
      model: a scalar model.
      params: its parameters.
      tokens: rows of one text each.
      lengths: tokens of each row, at least 1.

    Returns:
      Raw scores, before any scale or shift.
    """
    last = lengths[:, None] - 1
    hidden = model.apply_at(params, tokens, last, **_texts(model, tokens, lengths)).hidden
    return model.head(params, hidden)[:, 0]


def ranking_hidden(model: Model, params: Params, batch: RankingBatch) -> Float[Array, "B NK D"]:
    """Hidden state at the last token of each ranked response.

    The K responses of a prompt share one row, so the prompt is computed once.

    Args:
      model: any network.
      params: its parameters.
      batch: shared-prefix rows.

    Returns:
      The states that the head reads, at index ``n * K + k`` for response k of prompt n; undefined
      where the response is absent.
    """
    # An absent response reads slot 0; whoever uses the result masks it by its rank.
    ends = jnp.maximum(batch.ends.reshape(batch.ends.shape[0], -1), 0)
    rows = {"segments": batch.segments, "positions": batch.positions, "parents": batch.parents}
    return model.apply_at(params, batch.tokens, ends, **rows).hidden


def ranking_scores(model: Model, params: Params, batch: RankingBatch) -> Float[Array, "B N K"]:
    """Score of each ranked response, read at its last token.

    Args:
      model: a scalar model.
      params: its parameters.
      batch: shared-prefix rows.

    Returns:
      Scores; 0 where the response is absent (rank -1).
    """
    # The head runs only on the N * K states that are scored.
    scores = model.head(params, ranking_hidden(model, params, batch)).reshape(batch.ends.shape)
    return jnp.where(batch.ranks >= 0, scores, 0)
