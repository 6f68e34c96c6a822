"""The equations under every stage, on plain arrays: shift, log-probabilities, masked statistics, KL, shaped rewards.

Every per-token array is ``[B, T]`` and entry ``t`` belongs to ``tokens[:, t]``. `previous_index` and `align` are the
only shift in the package: ``logp[:, t]`` and ``values[:, t]`` are read at the token before ``t``.

Masked-out entries may hold anything, NaN included: every function selects its inputs before it computes with them, so
that neither results nor gradients see what is outside the mask.

Shape legend: B rows, T slots of a row, D width, V vocabulary, C slots of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Real, Shaped

Head = Callable[[jax.Array], jax.Array]
"""Hidden states ``[..., D]`` to logits ``[..., V]``: ``functools.partial(model.head, params)``."""

CHUNK_LOGITS = {"cpu": 2**20, "gpu": 2**26, "tpu": 2**26}
"""Logits that one chunk of `token_log_probs` may hold when `chunk` is not given: 4 MiB in float32 stay in the cache of
a processor, 256 MiB keep an accelerator busy."""

CHUNK_TOKENS = 256
"""A chunk holds at least this many tokens: below it reading the head's weights costs more than using them."""


def previous_index(segments: Int[Array, "B T"], parents: Int[Array, "B T"] | None = None) -> Int[Array, "B T"]:
    """Slot of the token that each token is predicted from, -1 where there is none.

    That is the slot before it in its segment, and for a segment's first token the last token of the parent segment.

    Args:
      segments: piece of each slot, 0 for padding; the slots of a piece are contiguous.
      parents: segment that the piece continues, 0 for none; None when no piece has a parent.

    Returns:
      Slots in ``[-1, T)``. Padding and first tokens without a parent get -1: they are never targets.

    >>> segments = jnp.array([[1, 1, 2, 2, 3, 0]])  # a prompt, two responses, padding
    >>> previous_index(segments, jnp.array([[0, 0, 1, 1, 1, 0]])).tolist()
    [[-1, 0, 1, 2, 1, -1]]
    >>> previous_index(segments).tolist()  # three packed documents
    [[-1, 0, -1, 2, -1, -1]]
    """
    slots = jnp.arange(segments.shape[1], dtype=jnp.int32)
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    if parents is None:
        parent_end = jnp.full_like(slots, -1)[None, :]
    else:
        # Compare and reduce fuse into one loop, so no [B, T, T] array is written.
        visible = (segments[:, None, :] == parents[:, :, None]) & (slots[None, :] < slots[:, None])[None]
        visible &= (parents > 0)[:, :, None]
        parent_end = jnp.max(jnp.where(visible, slots[None, None, :], -1), axis=2)
    inside = segments == before
    return jnp.where(segments == 0, -1, jnp.where(inside, slots[None, :] - 1, parent_end))


def align(x: Shaped[Array, "B T *rest"], previous: Int[Array, "B S"]) -> Shaped[Array, "B S *rest"]:
    """Read `x` at the token before each token: ``y[b, t] = x[b, previous[b, t]]``, 0 where there is none.

    Args:
      x: anything that a network computed per token (hidden states, values).
      previous: slots from `previous_index`; -1 gives zeros.

    Returns:
      The same entries under the index convention of the package: entry ``t`` belongs to token ``t``.

    >>> align(jnp.array([[5.0, 6.0, 7.0]]), jnp.array([[-1, 0, 1]])).tolist()
    [[0.0, 5.0, 6.0]]
    """
    index = previous.reshape(previous.shape + (1,) * (x.ndim - 2))
    taken = jnp.take_along_axis(x, jnp.maximum(index, 0), axis=1, mode="clip")
    return jnp.where(index >= 0, taken, jnp.zeros((), x.dtype))


def log_probs_from_logits(
    logits: Float[Array, "*batch V"], tokens: Int[Array, "*batch"], *, temperature: Real[ArrayLike, ""] = 1.0
) -> Float[Array, "*batch"]:
    """Log-probability of each token under logits that predict it: ``log softmax(logits / temperature)[token]``.

    Args:
      logits: already aligned: ``logits[:, t]`` predicts ``tokens[:, t]``.
      tokens: ids in ``[0, V)``.
      temperature: the sampler's; old, new and reference log-probs must all use the same one.

    Returns:
      Log-probabilities in nats, float32 whatever the logits are.

    Source: Ziegler et al. 2019, section 2 (the policy is the model at the sampling temperature).

    >>> logits = jnp.log(jnp.array([[0.25, 0.75]]))
    >>> [round(float(p), 2) for p in jnp.exp(log_probs_from_logits(logits, jnp.array([1])))]
    [0.75]
    """
    scaled = logits.astype(jnp.float32) / temperature
    chosen = jnp.take_along_axis(scaled, tokens[..., None], axis=-1, mode="clip")[..., 0]
    return chosen - jax.nn.logsumexp(scaled, axis=-1)


def entropy_from_logits(
    logits: Float[Array, "*batch V"], *, temperature: Real[ArrayLike, ""] = 1.0
) -> Float[Array, "*batch"]:
    """Entropy of the distribution sampled from: ``-sum_v p_v log p_v`` with ``p = softmax(logits / temperature)``.

    Args:
      logits: one distribution a position; a token with the logit -inf can never be drawn.
      temperature: the sampler's.

    Returns:
      Entropies in nats, float32, between 0 and ``log V``.

    >>> round(float(entropy_from_logits(jnp.zeros((1, 8)))[0] / jnp.log(8.0)), 5)
    1.0
    """
    logp = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)
    # A masked token (logit -inf) has probability 0 and adds nothing: 0 log 0 is 0 here, and so is its gradient.
    never = logp == -jnp.inf
    logp = jnp.where(never, 0.0, logp)
    return -jnp.sum(jnp.where(never, 0.0, jnp.exp(logp)) * logp, axis=-1)


def token_log_probs(
    hidden: Float[Array, "B T D"],
    head: Head,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"] | None = None,
    *,
    previous: Int[Array, "B T"] | None = None,
    temperature: Real[ArrayLike, ""] = 1.0,
    chunk: int | None = None,
    cotangent: Float[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """Log-probability of each target token given what precedes it, without ever holding the logits of all tokens.

    ``logp[b, t] = log softmax(head(hidden[b, previous[b, t]]) / temperature)[tokens[b, t]]``

    The targets of a row are moved to its front and the head runs on `chunk` columns at a time; chunks without a target
    cost nothing, and the backward pass recomputes the logits of one chunk at a time. Rows stay rows, so a batch that is
    sharded over devices stays where it is.

    Args:
      hidden: last hidden states.
      head: hidden states to logits, ``functools.partial(model.head, params)``; gradients reach its parameters.
      tokens: ids of the row; only targets are read.
      mask: true where ``tokens[b, t]`` is a target; None for every token that has a predecessor.
      previous: from `previous_index`; None when each row is one piece (then slot 0 has no predecessor).
      temperature: divides the logits.
      chunk: columns of the batch that go through the head together; None sizes it by `CHUNK_LOGITS`.
      cotangent: the gradient of the loss by these log-probabilities, where it is known before them, as for a loss that
        is linear in them. Then the head's gradient is computed with its logits, which are not computed a second time:
        a quarter of the head's work less. If another gradient arrives the logits are computed again, so a wrong
        `cotangent` costs time and never a result.

    Returns:
      Log-probabilities in nats, float32, 0 where there is no target.

    Raises:
      ValueError: if `chunk` is below 1.

    >>> table = jnp.log(jnp.array([[0.9, 0.1], [0.4, 0.6]]))  # a bigram model: row i predicts what follows token i
    >>> tokens = jnp.array([[0, 1, 1]])
    >>> logp = token_log_probs(jax.nn.one_hot(tokens, 2), lambda h: h @ table, tokens)
    >>> [round(float(p), 2) for p in jnp.exp(logp)[0]]  # entry 0 has no predecessor: log-prob 0
    [1.0, 0.1, 0.6]
    """

    def read(logits: jax.Array, targets: jax.Array) -> jax.Array:
        return log_probs_from_logits(logits, targets, temperature=temperature)

    return _read_targets(read, hidden, head, tokens, _targets(tokens, mask, previous), chunk, cotangent)


def token_log_probs_and_entropy(
    hidden: Float[Array, "B T D"],
    head: Head,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"] | None = None,
    *,
    previous: Int[Array, "B T"] | None = None,
    temperature: Real[ArrayLike, ""] = 1.0,
    chunk: int | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`token_log_probs` and, from the same logits, the entropy of the distribution each target was drawn from.

    Args:
      hidden: last hidden states.
      head: hidden states to logits.
      tokens: ids of the row.
      mask: true where ``tokens[b, t]`` is a target.
      previous: from `previous_index`.
      temperature: divides the logits of both.
      chunk: columns that go through the head together.

    Returns:
      Log-probabilities and entropies in nats, float32, 0 where there is no target.

    Raises:
      ValueError: if `chunk` is below 1.

    >>> tokens = jnp.array([[0, 1]])
    >>> _, entropy = token_log_probs_and_entropy(jnp.zeros((1, 2, 4)), lambda h: h, tokens)
    >>> [round(float(e), 3) for e in entropy[0]]  # uniform over 4: log 4
    [0.0, 1.386]
    """

    def read(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logp = log_probs_from_logits(logits, targets, temperature=temperature)
        return logp, entropy_from_logits(logits, temperature=temperature)

    return _read_targets(read, hidden, head, tokens, _targets(tokens, mask, previous), chunk)


def _targets(tokens: jax.Array, mask: jax.Array | None, previous: jax.Array | None) -> jax.Array:
    """`previous` with -1 wherever there is no target: one array says what to predict and from where."""
    if previous is None:
        previous = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :] - 1, tokens.shape)
    return previous if mask is None else jnp.where(mask, previous, -1)


def _read_targets(
    read: Callable[[jax.Array, jax.Array], Any],
    hidden: jax.Array,
    head: Head,
    tokens: jax.Array,
    previous: jax.Array,
    chunk: int | None,
    cotangent: jax.Array | None = None,
) -> Any:
    """``read(logits, tokens)`` at the slots with ``previous >= 0``, 0 elsewhere, a chunk of columns at a time."""
    rows, slots = tokens.shape
    columns = _chunk_columns(hidden, head, chunk)
    chunks = -(-slots // columns)
    order, place = compact(previous >= 0, chunks * columns)
    source = jnp.where(order >= 0, align(previous, order), -1)

    def split(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x.reshape(rows, chunks, columns, *x.shape[2:]), 0, 1)

    # `align` puts zeros where there is no target: whatever stood there can reach neither result nor gradient.
    pieces = jax.tree.map(split, (align(hidden, source), align(tokens, order), order >= 0))
    if cotangent is None:
        out = _over_chunks(lambda h, targets: read(head(h), targets), *pieces)
    else:
        out = _over_chunks_with_gradient(read, head, *pieces, cotangent=split(align(cotangent, order)))
    return jax.tree.map(lambda x: align(jnp.swapaxes(x, 0, 1).reshape(rows, chunks * columns), place), out)


def _over_chunks(work: Callable[..., Any], hidden: jax.Array, targets: jax.Array, is_target: jax.Array) -> Any:
    """``work(hidden, targets)`` of each chunk that has a target, zeros for the others."""

    def skip(*piece: jax.Array) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(work, *piece))

    @jax.checkpoint  # the backward pass keeps a chunk's hidden states, not its logits
    def body(carry: None, chunk: tuple[jax.Array, ...]) -> tuple[None, Any]:
        return carry, lax.cond(jnp.any(chunk[0]), work, skip, *chunk[1:])

    return lax.scan(body, None, (is_target, hidden, targets))[1]


def _over_chunks_with_gradient(
    read: Callable[[jax.Array, jax.Array], jax.Array],
    head: Head,
    hidden: jax.Array,
    targets: jax.Array,
    is_target: jax.Array,
    cotangent: jax.Array,
) -> jax.Array:
    """`_over_chunks` whose gradient for `cotangent` is computed on the way forward, while the logits are there."""
    head, weights = jax.closure_convert(head, hidden[0])

    def plain(weights: list[jax.Array], hidden: jax.Array, targets: jax.Array, is_target: jax.Array, *_: Any) -> Any:
        return _over_chunks(lambda h, targets: read(head(h, *weights), targets), hidden, targets, is_target)

    def forward(weights: list[jax.Array], *pieces: jax.Array) -> tuple[jax.Array, Any]:
        def body(total: Any, chunk: tuple[jax.Array, ...]) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            h, targets, is_target, cotangent = chunk

            def work(total: Any) -> Any:
                out, pull = jax.vjp(lambda weights, h: read(head(h, *weights), targets), weights, h)
                by_weights, by_hidden = pull(cotangent)
                return jax.tree.map(jnp.add, total, by_weights), (out, by_hidden)

            def skip(total: Any) -> Any:
                return total, (jnp.zeros(targets.shape, jnp.float32), jnp.zeros_like(h))

            return lax.cond(jnp.any(is_target), work, skip, total)

        by_weights, (out, by_hidden) = lax.scan(body, jax.tree.map(jnp.zeros_like, weights), pieces)
        return out, (weights, pieces, (by_weights, by_hidden))

    def backward(saved: Any, arrived: jax.Array) -> tuple[Any, ...]:
        weights, (hidden, *others), known = saved

        def again() -> tuple[Any, jax.Array]:
            return jax.vjp(lambda weights, hidden: plain(weights, hidden, *others), weights, hidden)[1](arrived)

        return *lax.cond(jnp.all(arrived == others[-1]), lambda: known, again), None, None, None

    out = jax.custom_vjp(plain)
    out.defvjp(forward, backward)
    return out(weights, hidden, targets, is_target, cotangent)


def compact(is_target: Bool[Array, "B T"], width: int) -> tuple[Int[Array, "B N"], Int[Array, "B T"]]:
    """The slots of each row's targets from the left, and the place of each target among them.

    Args:
      is_target: which slots.
      width: N, places a row; the targets beyond are left out.

    Returns:
      ``(order, place)``: slots, -1 where a row has no more; places, -1 where there is no target. `align` by the one
      brings targets to the front, by the other back.

    >>> [x.tolist() for x in compact(jnp.array([[False, True, False, True]]), 3)]
    [[[1, 3, -1]], [[-1, 0, -1, 1]]]
    """
    slots = is_target.shape[1]
    number = jnp.sum(is_target, axis=1, dtype=jnp.int32)
    order = jnp.argsort(~is_target, axis=1, stable=True)[:, :width]
    order = jnp.where(jnp.arange(order.shape[1], dtype=jnp.int32)[None, :] < number[:, None], order, -1)
    place = jnp.where(is_target, jnp.cumsum(is_target, axis=1, dtype=jnp.int32) - 1, -1)
    order = jnp.pad(order, ((0, 0), (0, width - order.shape[1])), constant_values=-1)
    return order, jnp.where(place < width, place, -1) if width < slots else place


def _chunk_columns(hidden: jax.Array, head: Head, chunk: int | None) -> int:
    """Columns of a chunk: as asked, or as many as `CHUNK_LOGITS` and `CHUNK_TOKENS` allow."""
    rows, slots, _ = hidden.shape
    if chunk is None:
        vocabulary = jax.eval_shape(head, hidden).shape[-1]
        budget = CHUNK_LOGITS.get(jax.default_backend(), CHUNK_LOGITS["gpu"])
        return min(-(-max(budget // vocabulary, CHUNK_TOKENS) // rows), slots)
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1: leave it out to size chunks by memory")
    return min(chunk, slots)


def masked_mean(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Mean over the entries where `mask` is true: ``sum(mask * x) / sum(mask)``; 0 when there are none.

    Args:
      x: anything; entries outside the mask may be NaN.
      mask: true where `x` counts.

    Returns:
      A float32 scalar in the unit of `x`: bf16 could not even count to 257.

    >>> float(masked_mean(jnp.array([1.0, 3.0, 1e6]), jnp.array([True, True, False])))
    2.0
    """
    total = jnp.sum(jnp.where(mask, x, 0), dtype=jnp.float32)
    return total / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1)


def whiten(
    x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], *, shift_mean: bool = True
) -> Float[Array, "*shape"]:
    """Scale the masked-in entries to variance 1 and, when `shift_mean`, to mean 0.

    ``y = (x - mean) / sqrt(var + 1e-8)  (+ mean, when shift_mean is False)``, population variance

    Over a global batch the statistics are global: call it once, on the whole rollout, not per device or minibatch.

    Args:
      x: advantages or rewards.
      mask: true where `x` counts.
      shift_mean: False keeps the mean (for rewards, whose level matters).

    Returns:
      Whitened entries, 0 outside the mask; all-equal or single entries give 0 (or the mean).

    Source: Ziegler et al. 2019, released code (``whiten``).

    >>> y = whiten(jnp.array([1.0, 2.0, 3.0, 9.0]), jnp.array([True, True, True, False]))
    >>> [round(float(v), 4) for v in y]
    [-1.2247, 0.0, 1.2247, 0.0]
    """
    x = x.astype(jnp.float32)
    mean = masked_mean(x, mask)
    # A second pass takes out the rounding error of the mean, which 1 / sqrt(1e-8) would blow up in all-equal batches.
    mean = mean + masked_mean(x - mean, mask)
    centred = jnp.where(mask, x, mean) - mean
    scaled = centred * lax.rsqrt(masked_mean(jnp.square(centred), mask) + 1e-8)
    return jnp.where(mask, scaled if shift_mean else scaled + mean, 0)


def kl_estimate(
    logp: Float[Array, "*shape"], ref_logp: Float[Array, "*shape"], *, kind: Literal["k1", "k2", "k3"] = "k1"
) -> Float[Array, "*shape"]:
    """Per-token estimate of ``KL(policy || reference)`` from samples of the policy, with ``d = logp - ref_logp``.

    ``k1 = d`` (unbiased, may be negative), ``k2 = d^2 / 2`` (biased; its expected gradient is that of the KL),
    ``k3 = exp(-d) - 1 + d`` (unbiased, never negative, its gradient is not that of the KL).

    Inside a loss differentiate k2: the expected gradient of k1 at the policy's own samples is zero.

    Args:
      logp: log-probs of sampled tokens under the policy, in nats.
      ref_logp: the same tokens under the reference.
      kind: which estimator.

    Returns:
      Estimates in nats per token. Mask them; entries must be finite for gradients (`token_log_probs` gives zeros).

    Raises:
      ValueError: if `kind` is unknown.

    Source: Schulman 2020, "Approximating KL divergence".

    >>> [round(float(kl_estimate(jnp.float32(-1.0), jnp.float32(-2.0), kind=k)), 4) for k in ("k1", "k2", "k3")]
    [1.0, 0.5, 0.3679]
    """
    difference = logp - ref_logp
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * jnp.square(difference)
    if kind == "k3":
        return jnp.expm1(-difference) + difference
    raise ValueError(f"kind={kind!r} is no KL estimator: choose 'k1', 'k2' or 'k3'")


def shaped_rewards(
    score: Float[Array, " B"],
    logp: Float[Array, "B T"],
    ref_logp: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    kl_coef: Real[ArrayLike, ""],
) -> Float[Array, "B T"]:
    """Reward of each response token: the KL penalty everywhere, the score on the last token.

    ``rewards[t] = -kl_coef * (logp[t] - ref_logp[t]) + score * [t is the last masked-in token]``

    Args:
      score: reward-model output of each row.
      logp: sampled tokens under the policy, in nats.
      ref_logp: the same tokens under the frozen reference.
      mask: true on response tokens (EOS included).
      kl_coef: beta, score units per nat.

    Returns:
      Rewards, 0 outside the mask. A row without response tokens gets no score.

    Source: Ouyang et al. 2022, eq. 2 (the per-token form of its KL term); Ziegler et al. 2019, section 2.2.

    >>> mask = jnp.array([[False, True, True, False]])
    >>> logp, ref_logp = jnp.array([[9.0, -1.0, -2.0, 9.0]]), jnp.array([[0.0, -1.5, -2.0, 0.0]])
    >>> shaped_rewards(jnp.array([3.0]), logp, ref_logp, mask, kl_coef=0.5).tolist()
    [[0.0, -0.25, 3.0, 0.0]]
    """
    slots = jnp.arange(mask.shape[1], dtype=jnp.int32)[None, :]
    last = jnp.max(jnp.where(mask, slots, -1), axis=1, keepdims=True)
    difference = jnp.where(mask, logp, 0) - jnp.where(mask, ref_logp, 0)
    return jnp.where(slots == last, score[:, None], 0) - kl_coef * difference


def split_rows(tree: Any, pieces: int, name: str, what: str) -> Any:
    """``[rows, ...]`` to ``[pieces, rows / pieces, ...]``, row i in piece ``i % pieces``; back by `join_rows`.

    Contiguous pieces would put each on one device of a sharded batch, and XLA would replicate the activations.

    Args:
      tree: arrays with the same first dimension.
      pieces: how many.
      name: the setting that asked for so many.
      what: what the rows are.

    Raises:
      ValueError: if `pieces` does not divide the rows.

    >>> split_rows(jnp.arange(4), 2, "pieces", "batch").tolist()
    [[0, 2], [1, 3]]
    """

    def split(x: jax.Array) -> jax.Array:
        require_divides(name, pieces, x.shape[0], what)
        return jnp.swapaxes(x.reshape(-1, pieces, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, tree)


def join_rows(tree: Any) -> Any:
    """``[pieces, rows of a piece, ...]`` back to the rows of `split_rows`, in their order.

    >>> join_rows(jnp.array([[0, 2], [1, 3]])).tolist()
    [0, 1, 2, 3]
    """
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), tree)


def require_divides(name: str, pieces: int, rows: int, what: str) -> None:
    """Refuses a number of pieces that does not divide the rows.

    Raises:
      ValueError: with the numbers that do.
    """
    if pieces < 1 or rows % pieces:
        fits = [str(n) for n in range(1, rows + 1) if rows % n == 0]
        choices = ", ".join(fits[:-1]) + " or " + fits[-1] if len(fits) > 1 else fits[0]
        raise ValueError(f"{name}={pieces} must divide the {what} of {rows}: choose {choices}")
