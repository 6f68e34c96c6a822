"""The equations under every stage: shift, masked statistics, KL, shaped rewards, log-probs.

Every per-token array is ``[B, T]`` and entry ``t`` belongs to ``tokens[:, t]``. `previous_index`
and `align` are the only shift in the package: ``logp[:, t]`` and ``values[:, t]`` are read at the
token before ``t``.

Masked-out entries may have any value, NaN included: every function selects its inputs before it
computes with them, so neither results nor gradients depend on what is outside the mask.

Shape legend: B rows, T slots of a row, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Real, Shaped


def previous_index(
    segments: Int[Array, "B T"], parents: Int[Array, "B T"] | None = None
) -> Int[Array, "B T"]:
    """Slot of the token that each token is predicted from, -1 where there is none.

    That is the slot before it in its segment, and for a segment's first token the last token of the
    parent segment.

    Args:
      segments: segment of each slot, 0 for padding; the slots of a segment are contiguous.
      parents: segment that this one continues, 0 for none; None when no segment has a parent.

    Returns:
      Slots in ``[-1, T)``. Padding and first tokens without a parent get -1: they are never
      targets.

    >>> segments = jnp.array([[1, 1, 2, 2, 3, 0]])  # a prompt, two responses, padding
    >>> previous_index(segments, jnp.array([[0, 0, 1, 1, 1, 0]])).tolist()
    [[-1, 0, 1, 2, 1, -1]]
    >>> previous_index(segments).tolist()  # three packed documents
    [[-1, 0, -1, 2, -1, -1]]
    """
    slots = jnp.arange(segments.shape[1], dtype=jnp.int32)
    # The segment of the slot before; slot 0 gets 0, which is no token's segment.
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    if parents is None:
        parent_end = jnp.full_like(slots, -1)[None, :]
    else:
        # Compare and reduce fuse into one loop, so no [B, T, T] array is written.
        visible = (segments[:, None, :] == parents[:, :, None]) & (slots[None, :] < slots[:, None])[
            None
        ]
        # Segment 0 is padding: a token without a parent must not find its predecessor there.
        visible &= (parents > 0)[:, :, None]
        parent_end = jnp.max(jnp.where(visible, slots[None, None, :], -1), axis=2)
    inside = segments == before
    return jnp.where(segments == 0, -1, jnp.where(inside, slots[None, :] - 1, parent_end))


def align(x: Shaped[Array, "B T *rest"], previous: Int[Array, "B S"]) -> Shaped[Array, "B S *rest"]:
    """Read `x` at the token before each token, 0 where there is none.

    ``y[b, t] = x[b, previous[b, t]]``

    Args:
      x: anything that a network computed per token (hidden states, values).
      previous: slots from `previous_index`; -1 gives zeros.

    Returns:
      The same entries under the index convention of the package: entry ``t`` belongs to token
      ``t``.

    >>> align(jnp.array([[5.0, 6.0, 7.0]]), jnp.array([[-1, 0, 1]])).tolist()
    [[0.0, 5.0, 6.0]]
    """
    index = previous.reshape(previous.shape + (1,) * (x.ndim - 2))
    # Every index is in range; "clip" only saves the fill that the default mode would compute.
    taken = jnp.take_along_axis(x, jnp.maximum(index, 0), axis=1, mode="clip")
    return jnp.where(index >= 0, taken, jnp.zeros((), x.dtype))


def log_probs_from_logits(
    logits: Float[Array, "*batch V"],
    tokens: Int[Array, "*batch"],
    *,
    temperature: Real[ArrayLike, ""] = 1.0,
) -> Float[Array, "*batch"]:
    """Log-probability of each token: ``log softmax(logits / temperature)[token]``.

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
    # float32 first: in bfloat16, a log-prob of -10 has a rounding error of up to 0.03 nats, as
    # large as the log-ratios that PPO compares.
    scaled = logits.astype(jnp.float32) / temperature
    chosen = jnp.take_along_axis(scaled, tokens[..., None], axis=-1, mode="clip")[..., 0]
    return chosen - jax.nn.logsumexp(scaled, axis=-1)


def entropy_from_logits(
    logits: Float[Array, "*batch V"], *, temperature: Real[ArrayLike, ""] = 1.0
) -> Float[Array, "*batch"]:
    """Entropy of the sampling distribution ``p = softmax(logits / temperature)``.

    ``H = -sum_v p_v log p_v``

    Args:
      logits: one distribution per position; a token with the logit -inf can never be drawn.
      temperature: the sampler's.

    Returns:
      Entropies in nats, float32, between 0 and ``log V``.

    >>> round(float(entropy_from_logits(jnp.zeros((1, 8)))[0] / jnp.log(8.0)), 5)
    1.0
    """
    logp = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)
    # A masked token (logit -inf) has probability 0 and adds nothing: 0 log 0 is 0 here, and so is
    # its gradient.
    never = logp == -jnp.inf
    logp = jnp.where(never, 0.0, logp)
    return -jnp.sum(jnp.where(never, 0.0, jnp.exp(logp)) * logp, axis=-1)


def compact(
    is_target: Bool[Array, "B T"], width: int
) -> tuple[Int[Array, "B N"], Int[Array, "B T"]]:
    """The slots of each row's targets in order, and the index of each target in that list.

    Args:
      is_target: which slots are targets.
      width: N, the most targets per row; those beyond are left out.

    Returns:
      ``(order, place)``: ``order[b, n]`` is the slot of target n, -1 beyond the last target;
      ``place[b, t]`` is the index of slot t in `order`, -1 where t is not a target.
      ``align(x, order)`` moves targets to the front and ``align(y, place)`` moves them back.

    >>> [x.tolist() for x in compact(jnp.array([[False, True, False, True]]), 3)]
    [[[1, 3, -1]], [[-1, 0, -1, 1]]]
    """
    slots = is_target.shape[1]
    number = jnp.sum(is_target, axis=1, dtype=jnp.int32)
    # Targets are False here and sort first; a stable sort keeps them in the order of their slots.
    order = jnp.argsort(~is_target, axis=1, stable=True)[:, :width]
    order = jnp.where(
        jnp.arange(order.shape[1], dtype=jnp.int32)[None, :] < number[:, None], order, -1
    )
    place = jnp.where(is_target, jnp.cumsum(is_target, axis=1, dtype=jnp.int32) - 1, -1)
    order = jnp.pad(order, ((0, 0), (0, width - order.shape[1])), constant_values=-1)
    return order, jnp.where(place < width, place, -1) if width < slots else place


def masked_mean(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Mean over the mask: ``sum(mask * x) / sum(mask)``; 0 when the mask is empty.

    Args:
      x: anything; entries outside the mask may be NaN.
      mask: true where `x` counts.

    Returns:
      A float32 scalar in the unit of `x`; bfloat16 could not represent a count of 257.

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

    Over a global batch the statistics are global: call it once on the whole rollout, not per device
    or per minibatch.

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
    # A second pass removes the rounding error of the mean, which 1 / sqrt(1e-8) would amplify when
    # all entries are equal.
    mean = mean + masked_mean(x - mean, mask)
    centred = jnp.where(mask, x, mean) - mean
    scaled = centred * lax.rsqrt(masked_mean(jnp.square(centred), mask) + 1e-8)
    return jnp.where(mask, scaled if shift_mean else scaled + mean, 0)


def kl_estimate(
    logp: Float[Array, "*shape"],
    ref_logp: Float[Array, "*shape"],
    *,
    kind: Literal["k1", "k2", "k3"] = "k1",
) -> Float[Array, "*shape"]:
    """Per-token estimate of ``KL(policy || reference)`` from samples of the policy.

    With ``d = logp - ref_logp``: ``k1 = d`` (unbiased, may be negative), ``k2 = d^2 / 2``
    (biased; its expected gradient is that of the KL), ``k3 = exp(-d) - 1 + d`` (unbiased, never
    negative; its gradient is not that of the KL).

    Inside a loss, differentiate k2: the expected gradient of k1 at the policy's own samples is 0.

    Args:
      logp: log-probs of sampled tokens under the policy, in nats.
      ref_logp: the same tokens under the reference.
      kind: which estimator.

    Returns:
      Estimates in nats per token, not masked. Gradients need finite entries everywhere, which
      `token_log_probs` gives: it is 0 outside its mask.

    Raises:
      ValueError: if `kind` is unknown.

    Source: Schulman 2020, "Approximating KL divergence".

    >>> logp, ref_logp = jnp.float32(-1.0), jnp.float32(-2.0)
    >>> [round(float(kl_estimate(logp, ref_logp, kind=k)), 4) for k in ("k1", "k2", "k3")]
    [1.0, 0.5, 0.3679]
    """
    difference = logp - ref_logp
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * jnp.square(difference)
    if kind == "k3":
        # `expm1`, because ``exp(-d) - 1`` cancels for the small d of a policy near its reference.
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
      score: reward-model score of each row.
      logp: sampled tokens under the policy, in nats.
      ref_logp: the same tokens under the frozen reference.
      mask: true on response tokens (EOS included).
      kl_coef: beta, score units per nat.

    Returns:
      Rewards, 0 outside the mask. A row without response tokens gets no score.

    Source: Ouyang et al. 2022, eq. 2 (the per-token form of its KL term); Ziegler et al. 2019,
    section 2.2.

    >>> mask = jnp.array([[False, True, True, False]])
    >>> logp, ref_logp = jnp.array([[9.0, -1.0, -2.0, 9.0]]), jnp.array([[0.0, -1.5, -2.0, 0.0]])
    >>> shaped_rewards(jnp.array([3.0]), logp, ref_logp, mask, kl_coef=0.5).tolist()
    [[0.0, -0.25, 3.0, 0.0]]
    """
    slots = jnp.arange(mask.shape[1], dtype=jnp.int32)[None, :]
    # -1 in a row without response tokens, which is equal to no slot.
    last = jnp.max(jnp.where(mask, slots, -1), axis=1, keepdims=True)
    # Masked before the subtraction, because outside the mask both can be -inf, whose difference is
    # NaN.
    difference = jnp.where(mask, logp, 0) - jnp.where(mask, ref_logp, 0)
    return jnp.where(slots == last, score[:, None], 0) - kl_coef * difference


def split_rows(tree: Any, pieces: int, name: str, what: str) -> Any:
    """Split ``[rows, ...]`` into ``[pieces, rows / pieces, ...]``: row i goes to ``i % pieces``.

    Contiguous pieces would each be on one device of a sharded batch, and XLA would replicate the
    activations. `join_rows` is the inverse.

    Args:
      tree: arrays with the same first dimension.
      pieces: number of pieces.
      name: the setting that gives `pieces`, for the error message.
      what: what the rows are, for the error message.

    Returns:
      The same tree with the axis of pieces first, as `lax.scan` and `lax.map` take it.

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
    """Join ``[pieces, rows per piece, ...]`` to ``[rows, ...]``, the inverse of `split_rows`.

    >>> join_rows(jnp.array([[0, 2], [1, 3]])).tolist()
    [0, 1, 2, 3]
    """
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), tree)


def require_divides(name: str, pieces: int, rows: int, what: str) -> None:
    """Check that `pieces` divides `rows`.

    Raises:
      ValueError: if it does not; the message lists the numbers that do.
    """
    if pieces < 1 or rows % pieces:
        fits = [str(n) for n in range(1, rows + 1) if rows % n == 0]
        choices = ", ".join(fits[:-1]) + " or " + fits[-1] if len(fits) > 1 else fits[0]
        raise ValueError(f"{name}={pieces} must divide the {what} of {rows}: choose {choices}")
