"""Log-probabilities of tokens from hidden states, without the logits of all tokens in memory.

The targets of a row are moved to its front and the head runs on some columns at a time. What other
libraries call fused linear cross-entropy is `weighted_log_prob`.

Shape legend: B rows, T slots of a row, D width, V vocabulary, C columns of a chunk, N chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Real

from rlhf_jax.backends import backend_for
from rlhf_jax.ops import align, compact, entropy_from_logits, log_probs_from_logits

Head = Callable[[jax.Array], jax.Array]
"""Hidden states ``[..., D]`` to logits ``[..., V]``: ``functools.partial(model.head, params)``."""

CHUNK_TOKENS = 256
"""Least number of tokens per chunk: with fewer, reading the head's weights takes longer than the
products with them.
"""


def token_log_probs(
    hidden: Float[Array, "B T D"],
    head: Head,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"] | None = None,
    *,
    previous: Int[Array, "B T"] | None = None,
    temperature: Real[ArrayLike, ""] = 1.0,
    chunk: int | None = None,
) -> Float[Array, "B T"]:
    """Log-probability of each target token given what precedes it, some columns at a time.

    ``logp[b, t] = log softmax(head(hidden[b, previous[b, t]]) / temperature)[tokens[b, t]]``

    The targets of a row are moved to its front and the head runs on `chunk` columns at a time;
    chunks without a target cost nothing, and the backward pass recomputes the logits of one chunk
    at a time. Rows are not flattened, so a batch that is sharded by rows is not moved.

    Args:
      hidden: last hidden states.
      head: hidden states to logits, ``functools.partial(model.head, params)``; gradients reach its
        parameters.
      tokens: ids of the row; only targets are read.
      mask: true where ``tokens[b, t]`` is a target; None for every token that has a predecessor.
      previous: from `previous_index`; None if each row is one segment (then slot 0 has no
        predecessor).
      temperature: divides the logits.
      chunk: columns of the batch that go through the head together; None sizes it by
        `Backend.logits_per_chunk`.

    Returns:
      Log-probabilities in nats, float32, 0 where there is no target.

    Raises:
      ValueError: if `chunk` is below 1.

    >>> # A bigram model: row i predicts what follows token i.
    >>> table = jnp.log(jnp.array([[0.9, 0.1], [0.4, 0.6]]))
    >>> tokens = jnp.array([[0, 1, 1]])
    >>> logp = token_log_probs(jax.nn.one_hot(tokens, 2), lambda h: h @ table, tokens)
    >>> [round(float(p), 2) for p in jnp.exp(logp)[0]]  # entry 0 has no predecessor: log-prob 0
    [1.0, 0.1, 0.6]
    """

    def read(logits: jax.Array, targets: jax.Array) -> jax.Array:
        return log_probs_from_logits(logits, targets, temperature=temperature)

    return _read_targets(read, hidden, head, tokens, _targets(tokens, mask, previous), chunk)


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
    """`token_log_probs` and, from the same logits, the entropy of each target's distribution.

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


def weighted_log_prob(
    hidden: Float[Array, "B T D"],
    head: Head,
    tokens: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    previous: Int[Array, "B T"],
    temperature: Real[ArrayLike, ""] = 1.0,
    chunk: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """``sum_t weights_t * logp_t``; being linear, its gradient is computed in the forward pass.

    The gradient of the sum by each log-probability is its weight, which is known in advance. So the
    head's gradient is computed from each chunk's logits as soon as they exist, and the backward
    pass does not compute them again, which saves a quarter of the head's work.

    Args:
      hidden: last hidden states.
      head: hidden states to logits; gradients reach its parameters.
      tokens: ids of the row; only targets are read.
      weights: one per target; they get no gradient.
      previous: slot that each target is predicted from, -1 where there is no target.
      temperature: divides the logits.
      chunk: as in `token_log_probs`.

    Returns:
      ``(total, logp)``: the sum, and the log-probabilities in nats as `token_log_probs` gives them,
      which carry no gradient of their own.

    Raises:
      ValueError: if `chunk` is below 1.

    >>> tokens, previous = jnp.array([[0, 1]]), jnp.array([[-1, 0]])
    >>> weights = jnp.array([[5.0, 2.0]])
    >>> hidden, head = jnp.zeros((1, 2, 4)), lambda h: h
    >>> total, logp = weighted_log_prob(hidden, head, tokens, weights, previous=previous)
    >>> round(float(total), 3), [round(float(p), 3) for p in logp[0]]  # twice the log of a quarter
    (-2.773, [0.0, -1.386])
    """

    def read(logits: jax.Array, targets: jax.Array) -> jax.Array:
        return log_probs_from_logits(logits, targets, temperature=temperature)

    parts = _chunks(hidden, head, tokens, previous, chunk)
    own = parts.split(align(weights, parts.order))
    chunks = (parts.hidden, parts.tokens, parts.is_target, own)
    total, logp = _weighted_chunks(read, head, *chunks)
    # The backward pass of `_weighted_chunks` has no gradient of the log-probs, so none may be asked
    # of them.
    return total, lax.stop_gradient(parts.join(logp))


def _targets(tokens: jax.Array, mask: jax.Array | None, previous: jax.Array | None) -> jax.Array:
    """`previous` with -1 wherever there is no target."""
    if previous is None:
        previous = jnp.broadcast_to(
            jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :] - 1, tokens.shape
        )
    return previous if mask is None else jnp.where(mask, previous, -1)


class _Chunks(NamedTuple):
    """Hidden states, tokens and the target mask, ``[N, B, C]``, with the order of the targets."""

    hidden: jax.Array
    tokens: jax.Array
    is_target: jax.Array
    order: jax.Array
    place: jax.Array

    def split(self, x: jax.Array) -> jax.Array:
        """``[B, N * C, ..]`` to chunks."""
        chunks, _, columns = self.tokens.shape
        return _split(x, chunks, columns)

    def join(self, x: jax.Array) -> jax.Array:
        """Results of the chunks, moved back to the slots of their targets; 0 elsewhere."""
        rows = self.order.shape[0]
        return align(jnp.swapaxes(x, 0, 1).reshape(rows, -1), self.place)


def _split(x: jax.Array, chunks: int, columns: int) -> jax.Array:
    return jnp.swapaxes(x.reshape(x.shape[0], chunks, columns, *x.shape[2:]), 0, 1)


def _chunks(
    hidden: jax.Array, head: Head, tokens: jax.Array, previous: jax.Array, chunk: int | None
) -> _Chunks:
    """The targets, which have ``previous >= 0``, in chunks of columns from the left of each row."""
    slots = tokens.shape[1]
    columns = _chunk_columns(hidden, head, chunk)
    chunks = -(-slots // columns)
    # A whole number of chunks, with at least T columns in all, so that no target is left out.
    order, place = compact(previous >= 0, chunks * columns)
    # The slot that predicts each listed target. `align` gives 0 beyond the last one, which would be
    # a real slot, so -1 is put back.
    source = jnp.where(order >= 0, align(previous, order), -1)
    # `align` gives zeros where there is no target, so that a NaN there reaches neither results nor
    # gradients.
    return _Chunks(
        hidden=_split(align(hidden, source), chunks, columns),
        tokens=_split(align(tokens, order), chunks, columns),
        is_target=_split(order >= 0, chunks, columns),
        order=order,
        place=place,
    )


def _read_targets(
    read: Callable[[jax.Array, jax.Array], Any],
    hidden: jax.Array,
    head: Head,
    tokens: jax.Array,
    previous: jax.Array,
    chunk: int | None,
) -> Any:
    """``read(logits, tokens)`` where ``previous >= 0``, 0 elsewhere, a chunk at a time."""
    parts = _chunks(hidden, head, tokens, previous, chunk)
    work = lambda h, targets: read(head(h), targets)
    return jax.tree.map(parts.join, _over_chunks(work, parts.hidden, parts.tokens, parts.is_target))


def _over_chunks(
    work: Callable[..., Any], hidden: jax.Array, tokens: jax.Array, is_target: jax.Array
) -> Any:
    """``work(hidden, tokens)`` of each chunk that has a target, zeros for the others."""

    def skip(*piece: jax.Array) -> Any:
        # Both branches of a condition must return the same shapes and types.
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(work, *piece))

    @jax.checkpoint  # the backward pass keeps a chunk's hidden states, not its logits
    def body(carry: None, chunk: tuple[jax.Array, ...]) -> tuple[None, Any]:
        # Targets are at the front of their rows, so the last chunks of a batch often have none.
        return carry, lax.cond(jnp.any(chunk[0]), work, skip, *chunk[1:])

    return lax.scan(body, None, (is_target, hidden, tokens))[1]


def _weighted_chunks(
    read: Callable[[jax.Array, jax.Array], jax.Array], head: Head, *chunks: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum and each chunk's log-probs; its gradient is computed in the forward pass.

    `chunks` are hidden states, tokens, the target mask, and weights.
    """
    # The head closes over its parameters; custom_vjp needs them as arguments to give a gradient.
    head, params = jax.closure_convert(head, chunks[0][0])

    # JAX runs this one only where no gradient is wanted; else it runs `forward` and `backward`.
    def value(params: list[jax.Array], *chunks: jax.Array) -> tuple[jax.Array, jax.Array]:
        logp = _over_chunks(lambda h, tokens: read(head(h, *params), tokens), *chunks[:3])
        return jnp.sum(chunks[3] * logp), logp

    def forward(params: list[jax.Array], *chunks: jax.Array) -> tuple[Any, Any]:
        def body(sums: Any, chunk: tuple[jax.Array, ...]) -> tuple[Any, tuple[jax.Array, ...]]:
            h, tokens, is_target, weights = chunk

            def work(sums: Any) -> Any:
                of_chunk = lambda params, h: read(head(h, *params), tokens)
                logp, pull = jax.vjp(of_chunk, params, h)
                # The derivative of the weighted sum by each log-prob is its weight.
                by_params, by_hidden = pull(weights)
                return jax.tree.map(jnp.add, sums, by_params), (logp, by_hidden)

            def skip(sums: Any) -> Any:
                return sums, (jnp.zeros(tokens.shape, jnp.float32), jnp.zeros_like(h))

            return lax.cond(jnp.any(is_target), work, skip, sums)

        zeros = jax.tree.map(jnp.zeros_like, params)
        by_params, (logp, by_hidden) = lax.scan(body, zeros, chunks)
        return (jnp.sum(chunks[3] * logp), logp), (by_params, by_hidden)

    def backward(gradients: Any, arrived: tuple[jax.Array, jax.Array]) -> Any:
        # ``arrived[0]`` is the gradient of the total, a scalar. That of the log-probs is not used,
        # because the caller stops it.
        by_params, by_hidden = jax.tree.map(lambda g: (arrived[0] * g).astype(g.dtype), gradients)
        # Tokens and mask are not differentiable, and weights are defined to have no gradient.
        return by_params, by_hidden, None, None, None

    total = jax.custom_vjp(value)
    total.defvjp(forward, backward)
    return total(params, *chunks)


def _chunk_columns(hidden: jax.Array, head: Head, chunk: int | None) -> int:
    """Columns per chunk: `chunk`, or by the backend's budget and `CHUNK_TOKENS`."""
    rows, slots, _ = hidden.shape
    if chunk is None:
        # Only the shape is read: the logits of all tokens never exist.
        vocabulary = jax.eval_shape(head, hidden).shape[-1]
        budget = backend_for().logits_per_chunk
        # A column holds one token of each row, so tokens per chunk are divided by the rows, rounded
        # up.
        return min(-(-max(budget // vocabulary, CHUNK_TOKENS) // rows), slots)
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1: leave it out to size chunks by memory")
    return min(chunk, slots)


# ----------------------------------------------------------------------------- losses of log-probs


def linear_weights(
    total: Callable[[jax.Array], jax.Array], shape: tuple[int, ...]
) -> Float[Array, "B T"] | None:
    """The gradient of a loss by its log-probs if it does not depend on them; else None.

    The dependence is read from the jaxpr of the gradient: if there is none, the loss is linear (or
    affine), and its gradient can be the `weights` of `weighted_log_prob`. A linear loss that is not
    recognised as such gives None, which costs time but does not change a result.

    Args:
      total: log-probs to the total of the loss; it is called while JAX traces.
      shape: of the log-probs.

    Returns:
      The gradient, or None.

    >>> linear_weights(lambda logp: -2 * jnp.sum(logp), (1, 2)).tolist()
    [[-2.0, -2.0]]
    >>> linear_weights(lambda logp: jnp.sum(logp**2), (1, 2))
    """
    gradient = jax.grad(total)
    program = jax.make_jaxpr(gradient)(jax.ShapeDtypeStruct(shape, jnp.float32)).jaxpr
    if _inputs_of(program, [True])[0]:
        return None
    # Evaluated at -1, because a loss need not be finite at 0.
    return gradient(jnp.full(shape, -1.0, jnp.float32))


def _inputs_of(program: Any, outputs: list[bool]) -> list[bool]:
    """Which inputs of a jaxpr some of its outputs depend on, found backwards from these."""
    # By identity, because the literals of a jaxpr, which are inputs too, cannot be hashed.
    needed = {id(x) for x, wanted in zip(program.outvars, outputs, strict=True) if wanted}
    for equation in reversed(program.eqns):
        wanted = [id(x) in needed for x in equation.outvars]
        if not any(wanted):
            continue
        # A jitted function inside, such as `jnp.where`, is searched too, because its outputs may
        # not depend on all of its inputs. Any other operation counts as depending on all of them.
        inputs = [True] * len(equation.invars)
        if equation.primitive.name == "jit":
            inputs = _inputs_of(equation.params["jaxpr"].jaxpr, wanted)
        needed |= {id(x) for x, used in zip(equation.invars, inputs, strict=True) if used}
    return [id(x) in needed for x in program.invars]
