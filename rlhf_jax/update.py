"""One optimizer step: gradient and metrics of a batch, the guard's verdict, the new states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PyTree

from rlhf_jax import guard as guards
from rlhf_jax import ops, optim
from rlhf_jax.types import Each, GuardState, Max, Mean, Metrics, Params, TrainState

LossOfBatch = Callable[[Any, Any], tuple[Mean, Metrics]]
"""``(params, rows) -> (loss, metrics)``."""

T = TypeVar("T")


def accumulate_grads(
    loss_fn: LossOfBatch, params: PyTree, batch: PyTree, microbatches: int = 1
) -> tuple[PyTree, Mean, Metrics]:
    """Gradient of a loss over a batch, a micro-batch at a time; totals are divided once at the end.

    ``grads = (sum_i d total_i / d params) / sum_i count_i``

    This is the gradient of the whole batch. A mean of micro-batch means would give tokens of
    micro-batches with few tokens more weight.

    Args:
      loss_fn: ``(params, micro-batch) -> (Mean, metrics)``.
      params: what to differentiate by.
      batch: a tree of arrays with the same number of rows.
      microbatches: number of pieces; row i goes to piece ``i % microbatches``, so rows do not move
        between devices.

    Returns:
      Gradients (float32; 0 when nothing was counted), the loss and the metrics of the whole batch.

    Raises:
      ValueError: if `microbatches` does not divide the rows.

    >>> fn = lambda w, x: (Mean(jnp.sum(w * x), jnp.float32(x.size)), {})
    >>> w, rows = jnp.float32(1.0), jnp.array([1.0, 2.0, 3.0, 6.0])
    >>> [float(accumulate_grads(fn, w, rows, n)[0]) for n in (1, 2, 4)]
    [3.0, 3.0, 3.0]
    """

    def gradient(piece: PyTree) -> tuple[PyTree, tuple[Mean, Metrics]]:
        def total(params: PyTree) -> tuple[Float[Array, ""], tuple[Mean, Metrics]]:
            loss, metrics = loss_fn(params, piece)
            return loss.total, (loss, metrics)

        grads, aux = jax.grad(total, has_aux=True)(params)
        # A sum of many micro-batches in bfloat16 would lose the small terms.
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), aux

    def body(totals: PyTree, piece: PyTree) -> tuple[PyTree, tuple[Mean, Metrics]]:
        grads, aux = gradient(piece)
        return jax.tree.map(jnp.add, totals, grads), aux

    if microbatches == 1:
        totals, (loss, metrics) = gradient(batch)
    else:
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        pieces = ops.split_rows(batch, microbatches, "microbatches", "batch")
        totals, aux = lax.scan(body, zeros, pieces)
        loss, metrics = add_up(aux)
    # An empty mask gives a gradient of 0 and not of 0 / 0.
    count = jnp.where(loss.count == 0, 1, loss.count).astype(jnp.float32)
    return jax.tree.map(lambda g: g / count, totals), loss, metrics


class Gradient(NamedTuple):
    """The gradient of one optimizer step, with what the guard and the log need."""

    grads: Params
    losses: tuple[Array, ...]
    """Loss totals; the step is taken only if all are finite."""
    norm: Array
    metrics: Metrics
    mean_loss: Array
    reward: Array
    """Largest absolute reward of the rows; 0 where there is none."""

    @classmethod
    def of(cls, grads: Params, loss: Mean, metrics: Metrics, *, name: str) -> Gradient:
        """From what `accumulate_grads` returns; its metrics get the prefix `name`."""
        norm = optax.tree.norm(grads)
        own = {"loss": loss, "grad_norm": once(norm)}
        named = {f"{name}/{key}": metric for key, metric in (metrics | own).items()}
        return cls(grads, (loss.total,), norm, named, loss.value, jnp.zeros((), jnp.float32))

    def clipped(self, limit: float | int | None) -> Gradient:
        """The same direction with a norm of at most `limit`; `norm` remains the unclipped one."""
        if limit is None:
            return self
        scale = optim.clip_factor(self.norm, limit)
        return self._replace(grads=jax.tree.map(lambda g: scale * g, self.grads))

    def plus(
        self, other: Gradient, *, coef: float | int, clip_norm: float | int | None
    ) -> Gradient:
        """``self + coef * other``, the second term clipped alone; logs the cosine of the two."""
        # Not `vdot`: it flattens, and a matrix sharded over two axes has no flat sharding, so each
        # device would gather all layers in full.
        products = jax.tree.map(lambda a, b: jnp.sum(a * b), self.grads, other.grads)
        dot = sum(jax.tree.leaves(products))
        # ``self.norm`` is the norm before clipping, so that of the clipped gradient is computed
        # here.
        cosine = dot / jnp.maximum(optax.tree.norm(self.grads) * other.norm, 1e-12)
        scaled = jax.tree.map(lambda g: coef * g, other.grads)
        # The norm of ``coef * g`` is ``|coef|`` times that of g: it is not computed again.
        term = other._replace(grads=scaled, norm=abs(coef) * other.norm).clipped(clip_norm)
        grads = jax.tree.map(jnp.add, self.grads, term.grads)
        norm = optax.tree.norm(grads)
        own = {"ptx/cosine": once(cosine), "policy/total_grad_norm": once(norm)}
        return self._replace(
            grads=grads,
            losses=self.losses + other.losses,
            # The guard gets the larger norm: clipping must not hide a spike of the PPO term.
            norm=jnp.maximum(norm, self.norm),
            metrics=self.metrics | other.metrics | own,
        )

    @property
    def watched(self) -> Array:
        """The three numbers of a step that the window of the guard records."""
        return jnp.stack(
            [jnp.asarray(x, jnp.float32) for x in (self.mean_loss, self.norm, self.reward)]
        )


class Limits(NamedTuple):
    """When a step is skipped, besides when a number is not finite."""

    norm: float | int | None = None
    """Largest gradient norm; None for no limit."""
    std: float | int | None = None
    """Standard deviations above the mean of the last sound steps (`guard.is_spike`); None for no
    limit."""


def update_both(
    states: tuple[TrainState, TrainState],
    optimizers: tuple[optax.GradientTransformation, optax.GradientTransformation],
    gradients: tuple[Gradient, Gradient],
    *,
    ema_decay: float | int,
    limits: Limits,
) -> tuple[tuple[TrainState, TrainState], Metrics]:
    """Policy and value network take an optimizer step together, or neither does.

    Args:
      states: of the policy and of the value network.
      optimizers: of both.
      gradients: of both.
      ema_decay: of the policy's average.
      limits: when the step is skipped.

    Returns:
      The states after the step, and its metrics.

    Raises:
      ValueError: `limits.std` is set and a state has no window.
    """
    sound, verdict = _verdict(
        ((gradients[0], states[0].guard), (gradients[1], states[1].guard)), limits
    )

    def apply_both(states: tuple[TrainState, TrainState]) -> tuple[TrainState, TrainState]:
        policy = _apply(states[0], optimizers[0], gradients[0], ema_decay)
        return policy, _apply(states[1], optimizers[1], gradients[1], ema_decay)

    # One condition over both networks, so that they always have taken the same steps.
    new = optim.step_where(sound, apply_both, states)
    metrics = (
        gradients[0].metrics
        | gradients[1].metrics
        | verdict
        | {"skipped_steps": Each(jnp.float32(~sound))}
    )
    metrics |= _learning_rate("policy", new[0]) | _learning_rate("value", new[1])
    return new, metrics


def update_one(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    gradient: Gradient,
    *,
    name: str,
    limits: Limits,
) -> tuple[TrainState, Metrics]:
    """One network takes an optimizer step, unless it is skipped.

    Args:
      state: of the network.
      optimizer: its own.
      gradient: of the step.
      name: prefix of the metrics.
      limits: when the step is skipped.

    Returns:
      The state after the step, and its metrics.

    Raises:
      ValueError: `limits.std` is set and the state has no window.
    """
    sound, verdict = _verdict(((gradient, state.guard),), limits)
    new = optim.step_where(sound, lambda state: _apply(state, optimizer, gradient, None), state)
    return new, gradient.metrics | verdict | _learning_rate(name, new)


def _verdict(
    gradients: tuple[tuple[Gradient, GuardState | None], ...], limits: Limits
) -> tuple[Bool[Array, ""], Metrics]:
    """Whether the networks may step, all or none: all finite and within `limits`."""
    finite, calm = jnp.bool_(True), jnp.bool_(True)
    for gradient, window in gradients:
        finite &= guards.is_sound(*gradient.losses, gradient.reward, norm=gradient.norm)
        if limits.norm is not None:
            calm &= gradient.norm <= limits.norm
        if limits.std is not None:
            if window is None:
                raise ValueError(
                    f"spike_std={limits.std} needs a window in the state: train_state(..., "
                    "guard=True)"
                )
            calm &= ~guards.is_spike(window, gradient.watched, std=limits.std)
    # A step that is not finite is skipped but is no spike, whatever a comparison says of a NaN.
    sound = finite & calm
    return sound, {"skipped": once(~sound), "spiked": once(finite & ~calm)}


def _apply(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    gradient: Gradient,
    ema_decay: float | int | None,
) -> TrainState:
    """The state after an optimizer step that the guard has allowed."""
    updates, opt_state = optimizer.update(gradient.grads, state.opt_state, state.params)
    params: Params = optax.apply_updates(state.params, updates)  # pyright: ignore[reportAssignmentType]
    ema = state.ema
    if ema is not None and ema_decay is not None:
        ema = optim.ema_update(ema, params, decay=ema_decay)
    # Kept only with an allowed step, so a spike never enters the window and raises no threshold.
    window = None if state.guard is None else guards.remember(state.guard, gradient.watched)
    return TrainState(
        step=state.step + 1, params=params, opt_state=opt_state, ema=ema, guard=window
    )


def _learning_rate(name: str, state: TrainState) -> Metrics:
    """The rate of the last step that was taken; empty if the optimizer does not record it."""
    rate = optim.last_learning_rate(state.opt_state)
    return {} if rate is None else {f"{name}/lr": once(rate)}


def once(x: ArrayLike) -> Mean:
    """A number as a mean over one observation."""
    return Mean(jnp.asarray(x, jnp.float32), jnp.float32(1.0))


def add_up(stacked: T) -> T:
    """Reduce metrics that `lax.scan` has stacked along a leading axis.

    Args:
      stacked: a tree whose leaves are `Mean`, `Max` or `Each`.

    Returns:
      Sums of totals and counts, the maximum of each `Max`, every `Each` unchanged.
    """

    def reduce(metric: Mean | Max | Each) -> Mean | Max | Each:
        if isinstance(metric, Each):
            return metric
        if isinstance(metric, Max):
            return Max(jnp.max(metric.value, axis=0))
        return Mean(jnp.sum(metric.total, axis=0), jnp.sum(metric.count, axis=0))

    return jax.tree.map(reduce, stacked, is_leaf=lambda x: isinstance(x, (Mean, Max, Each)))
