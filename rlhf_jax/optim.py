"""Optimizers as optax chains, learning-rate schedules, weight averaging, and skipped steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from rlhf_jax.backends import backend_for
from rlhf_jax.types import Params

LearningRate = float | int | optax.Schedule

State = TypeVar("State")


def cosine_to(
    peak: float | int, total_steps: int, *, final_fraction: float | int = 0.1
) -> optax.Schedule:
    """Half a cosine from `peak` at step 0 to ``final_fraction * peak`` at `total_steps`.

    ``lr(s) = peak * (f + (1 - f) * (1 + cos(pi * s / total_steps)) / 2)``, constant after
    `total_steps`; no warmup.

    Args:
      peak: learning rate of the first step.
      total_steps: optimizer steps of the whole training (not micro-batches).
      final_fraction: f.

    Returns:
      Optimizer step to learning rate.

    Raises:
      ValueError: if `total_steps` is below 1.

    Source: Ouyang et al. 2022, appendices C.1 and C.2 (supervised and reward models decay to 10%).

    >>> schedule = cosine_to(2.0, 10)
    >>> [round(float(schedule(s)), 3) for s in (0, 5, 10, 99)]
    [2.0, 1.1, 0.2, 0.2]
    """
    _require_steps("total_steps", total_steps)
    return optax.cosine_decay_schedule(peak, total_steps, alpha=final_fraction)


def warmup_then_constant(
    peak: float | int, warmup_steps: int, *, initial_fraction: float | int = 0.1
) -> optax.Schedule:
    """A line from ``initial_fraction * peak`` to `peak` at `warmup_steps`, then constant.

    Args:
      peak: learning rate after the warmup.
      warmup_steps: optimizer steps; for PPO iterations x epochs x minibatches. 0 means no warmup.
      initial_fraction: where the line starts, as a share of `peak`.

    Returns:
      Optimizer step to learning rate.

    Raises:
      ValueError: if `warmup_steps` is negative.

    Source: Ouyang et al. 2022, appendix C.4 (the first 10 iterations, from one tenth of the peak).

    >>> schedule = warmup_then_constant(1.0, 4)
    >>> [round(float(schedule(s)), 3) for s in (0, 2, 4, 99)]
    [0.1, 0.55, 1.0, 1.0]
    """
    return with_warmup(
        optax.constant_schedule(peak), warmup_steps, initial_fraction=initial_fraction
    )


def with_warmup(
    schedule: optax.Schedule, warmup_steps: int, *, initial_fraction: float | int = 0.1
) -> optax.Schedule:
    """`schedule`, started `warmup_steps` later, after a line up to its first rate.

    Args:
      schedule: what comes after the warmup, counted from its own step 0.
      warmup_steps: optimizer steps. 0 means no warmup.
      initial_fraction: where the line starts, as a share of ``schedule(0)``.

    Returns:
      Optimizer step to learning rate.

    Raises:
      ValueError: if `warmup_steps` is negative.

    >>> schedule = with_warmup(linear_to_zero(1.0, 4), 4)
    >>> [round(float(schedule(s)), 3) for s in (0, 2, 4, 6, 8)]
    [0.1, 0.55, 1.0, 0.5, 0.0]
    """
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps} is negative: use 0 for no warmup")
    if warmup_steps == 0:
        return schedule
    first = float(jnp.asarray(schedule(0)))
    line = optax.linear_schedule(initial_fraction * first, first, warmup_steps)
    # `join_schedules` counts the second schedule from the boundary, that is from its own step 0.
    return optax.join_schedules([line, schedule], [warmup_steps])


def linear_to_zero(peak: float | int, total_steps: int) -> optax.Schedule:
    """A line from `peak` at step 0 to 0 at `total_steps`, so that the last step still learns.

    Args:
      peak: learning rate of the first step.
      total_steps: optimizer steps of the whole training.

    Returns:
      Optimizer step to learning rate.

    Raises:
      ValueError: if `total_steps` is below 1.

    Source: Ziegler et al. 2019, released code; Stiennon et al. 2020, appendix B.1.

    >>> schedule = linear_to_zero(1.0, 4)
    >>> [float(schedule(s)) for s in (0, 3, 4)]
    [1.0, 0.25, 0.0]
    """
    _require_steps("total_steps", total_steps)
    return optax.linear_schedule(peak, 0.0, total_steps)


def _require_steps(name: str, steps: int) -> None:
    if steps < 1:
        raise ValueError(
            f"{name}={steps} must be at least 1: it counts the optimizer steps of the whole "
            "training"
        )


def adam(
    learning_rate: LearningRate,
    *,
    b1: float | int = 0.9,
    b2: float | int = 0.95,
    eps: float | int = 1e-8,
    weight_decay: float | int = 0.0,
    clip_norm: float | int | None = None,
    first_moment_dtype: str | None = None,
) -> optax.GradientTransformation:
    """Adam with epsilon after the bias correction, the form of PyTorch and optax.

    ``theta -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * theta)``

    Its state takes 8 bytes per parameter, 6 with a bfloat16 first moment. The second moment is
    always float32: it decays by ``1 - b2`` of itself per step, and bfloat16 rounds away relative
    changes below 0.4% (every decay step of ``b2=0.999``).

    Args:
      learning_rate: a number or a schedule over optimizer steps.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the corrected second moment.
      weight_decay: decoupled, on kernels and embeddings only (see `decay_mask`).
      clip_norm: gradients with a larger global norm are scaled down to it first; None for no
        clipping.
      first_moment_dtype: dtype of m, ``"bfloat16"`` to save memory; None for that of the
        parameters.

    Returns:
      An optax chain. Its state records the learning rate of the last step (`last_learning_rate`).

    Source: Ouyang et al. 2022, appendix C (betas); Kingma and Ba 2015; Loshchilov and Hutter 2019
    (decay).
    """
    scale = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=first_moment_dtype)
    return _chain(scale, learning_rate, weight_decay, clip_norm)


def tf_adam(
    learning_rate: LearningRate,
    *,
    b1: float | int = 0.9,
    b2: float | int = 0.95,
    eps: float | int = 1e-5,
    weight_decay: float | int = 0.0,
    clip_norm: float | int | None = None,
) -> optax.GradientTransformation:
    """Adam with epsilon before the bias correction, the form of TensorFlow 1.

    ``theta -= lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)``

    The released code of the 2019 and 2020 papers uses it. Early steps are smaller than those of
    `adam`: the same step in `adam` would need the epsilon ``eps / sqrt(1 - b2^t)``.

    Args:
      learning_rate: a number or a schedule over optimizer steps.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the uncorrected second moment.
      weight_decay: decoupled, on kernels and embeddings only.
      clip_norm: as in `adam`.

    Returns:
      An optax chain. Its state records the learning rate of the last step.

    Source: Kingma and Ba 2015, section 2 (its "epsilon hat"); Ziegler et al. 2019, released code.
    """
    return _chain(_scale_by_tf_adam(b1, b2, eps), learning_rate, weight_decay, clip_norm)


def _scale_by_tf_adam(
    b1: float | int, b2: float | int, eps: float | int
) -> optax.GradientTransformation:
    inner = optax.scale_by_adam(b1=b1, b2=b2)

    # optax keeps the moments; only its update, with epsilon after the bias correction, is replaced.
    def update(updates, state, params=None):
        _, state = inner.update(updates, state, params)
        assert isinstance(state, optax.ScaleByAdamState)
        # `count` has been increased already: it is t, 1 in the first step.
        correction = jnp.sqrt(1 - b2**state.count) / (1 - b1**state.count)
        updates = jax.tree.map(
            lambda m, v: correction * m / (jnp.sqrt(v) + eps), state.mu, state.nu
        )
        return updates, state

    return optax.GradientTransformation(inner.init, update)


def adafactor(
    learning_rate: LearningRate,
    *,
    decay_rate: float | int = 0.8,
    eps: float | int = 1e-30,
    clip_update: float | int = 1.0,
    factor_from: int = 128,
    weight_decay: float | int = 0.0,
    clip_norm: float | int | None = None,
) -> optax.GradientTransformation:
    """Adafactor without a first moment: second moments are kept as row and column averages only.

    ``v_hat = row column^T / mean(row)``, averages of ``g^2 + eps`` that decay by
    ``1 - t^-decay_rate``; ``u = g / sqrt(v_hat)``;
    ``theta -= lr * (u / max(1, rms(u) / clip_update) + weight_decay * theta)``

    Its state is tiny: ``4 (n + m)`` bytes for a matrix of ``n m`` parameters, where Adam keeps
    ``8 n m``. Each layer of a stacked leaf has its own rows and columns; `rms` is over the whole
    leaf. The learning rate is absolute, as in `adam`, and not relative to the size of the
    parameters.

    Args:
      learning_rate: a number or a schedule over optimizer steps.
      decay_rate: how fast the averages lengthen; larger keeps more history.
      eps: added to squared gradients.
      clip_update: updates with a larger root mean square over a leaf are scaled down to it.
      factor_from: a leaf with a second longest axis below this keeps all its second moments (4
        bytes per parameter).
      weight_decay: decoupled, on kernels and embeddings only.
      clip_norm: as in `adam`.

    Returns:
      An optax chain. Its state records the learning rate of the last step.

    Source: Shazeer and Stern 2018, algorithms 4 and 5 (factors, update clipping, increasing decay).
    """
    scale = optax.chain(
        _scale_by_factors(decay_rate, eps, factor_from), optax.clip_by_block_rms(clip_update)
    )
    return _chain(scale, learning_rate, weight_decay, clip_norm)


class FactoredMoments(NamedTuple):
    """Steps taken, and per parameter ``{"row", "column"}``, or ``{"full"}`` if it is not factored.

    These names come after the parameter's own. Sharding rules for parameters end in a parameter's
    name, so they do not match these vectors, which are replicated.
    """

    count: Int[Array, ""]
    moments: PyTree


def _scale_by_factors(
    decay_rate: float | int, eps: float | int, factor_from: int
) -> optax.GradientTransformation:
    inner = optax.scale_by_factored_rms(
        decay_rate=decay_rate, epsilon=eps, min_dim_size_to_factor=factor_from
    )
    # Its state has three trees in the shape of the parameters, with a placeholder of one number for
    # what a parameter does not have. `packed` drops the placeholders, `unpacked` puts them back.

    def packed(state: optax.FactoredState) -> FactoredMoments:
        def pack(row: Array, column: Array, full: Array) -> dict[str, Array]:
            return {"row": row, "column": column} if row.size > 1 else {"full": full}

        return FactoredMoments(
            jnp.asarray(state.count), jax.tree.map(pack, state.v_row, state.v_col, state.v)
        )

    def unpacked(state: FactoredMoments, params: PyTree) -> optax.FactoredState:
        def tree(name: str) -> PyTree:
            return jax.tree.map(
                lambda p, found: found.get(name, jnp.zeros(1, p.dtype)), params, state.moments
            )

        return optax.FactoredState(state.count, tree("row"), tree("column"), tree("full"))

    def init(params):
        state = inner.init(params)
        assert isinstance(state, optax.FactoredState)
        return packed(state)

    def update(updates, state, params=None):
        updates, state = inner.update(updates, unpacked(state, updates), params)
        assert isinstance(state, optax.FactoredState)
        return updates, packed(state)

    return optax.GradientTransformation(init, update)


def _chain(
    scale, learning_rate: LearningRate, weight_decay: float | int, clip_norm: float | int | None
):
    # The order matters: the clip sees the raw gradient, weight decay bypasses the moments (that is
    # what decouples it), and the learning rate multiplies both.
    parts = [] if clip_norm is None else [_clip_by_global_norm(clip_norm)]
    parts.append(scale)
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay, mask=decay_mask))
    return optax.chain(*parts, _scale_by_learning_rate(learning_rate))


def _clip_by_global_norm(limit: float | int) -> optax.GradientTransformation:
    """``g * min(1, limit / |g|)``: one factor, so no second copy of the gradients is written.

    `optax.clip_by_global_norm` writes ``g / |g|`` in addition to ``g``.
    """

    def update(updates, state, params=None):
        del params
        factor = clip_factor(optax.tree.norm(updates), limit)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def clip_factor(norm: Float[Array, ""], limit: float | int) -> Float[Array, ""]:
    """The factor ``min(1, limit / norm)`` that scales gradients to a norm of at most `limit`."""
    return jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))


def decay_mask(params: PyTree) -> PyTree:
    """Which leaves weight decay acts on: everything but biases and the scales of norms.

    Args:
      params: a tree of arrays.

    Returns:
      A tree of Python booleans.

    >>> decay_mask({"kernel": jnp.ones(2), "bias": jnp.ones(2), "norm": {"scale": jnp.ones(2)}})
    {'bias': False, 'kernel': True, 'norm': {'scale': False}}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key not in ("bias", "scale"), params
    )


class LearningRateState(NamedTuple):
    """Steps taken, and the learning rate of the last one, for logging."""

    count: Int[Array, ""]
    learning_rate: Float[Array, ""]


def _scale_by_learning_rate(learning_rate: LearningRate) -> optax.GradientTransformation:
    schedule = learning_rate if callable(learning_rate) else optax.constant_schedule(learning_rate)

    def init(params):
        del params
        return LearningRateState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update(updates, state, params=None):
        del params
        rate = jnp.asarray(schedule(state.count), jnp.float32)
        # Negative because optax adds updates. Without the cast, a float32 rate would turn the
        # updates of bfloat16 parameters into float32.
        updates = jax.tree.map(lambda u: -rate.astype(u.dtype) * u, updates)
        return updates, LearningRateState(jnp.asarray(optax.safe_increment(state.count)), rate)

    return optax.GradientTransformation(init, update)


def last_learning_rate(opt_state: PyTree) -> Float[Array, ""] | None:
    """Learning rate of the last step, or None if the optimizer does not record it.

    Args:
      opt_state: of `adam`, `tf_adam`, `adafactor`, or of anything made with
        `optax.inject_hyperparams`.

    Returns:
      The rate that the last update was scaled by; 0 before the first.
    """
    # Found by its name at any depth, so that wrapping the chain does not hide it.
    return optax.tree_utils.tree_get(opt_state, "learning_rate")


def ema_update(ema: Params, params: Params, *, decay: float | int) -> Params:
    """Exponential moving average of weights: ``ema <- decay * ema + (1 - decay) * params``.

    The average is float32 whatever the parameters are: in bfloat16, most increments of 0.8% of the
    difference would round away.

    Args:
      ema: the average so far, float32.
      params: the weights after an optimizer step.
      decay: 0.992 in the paper.

    Returns:
      The new average. After n updates the initial average has weight ``decay ** n``.

    Source: Ouyang et al. 2022, appendix C.4.

    >>> float(ema_update({"w": jnp.float32(1.0)}, {"w": jnp.float32(0.0)}, decay=0.75)["w"])
    0.75
    """

    def update(average, value):
        return decay * average.astype(jnp.float32) + (1 - decay) * value.astype(jnp.float32)

    return jax.tree.map(update, ema, params)


def keep_unless(sound: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """`new` when `sound`, else the whole of `old`: weights, moments, counters and average.

    A bad step must leave no trace. `optax.apply_if_finite` gives up after a number of bad steps and
    then applies one; this never does. The training loop counts `skipped` steps and decides when to
    stop.

    Args:
      sound: from `is_sound`.
      new: state after the step.
      old: state before it.

    Returns:
      One of the two, leaf by leaf.
    """
    return jax.tree.map(lambda n, o: jnp.where(sound, n, o), new, old)


def step_where(sound: Bool[Array, ""], step: Callable[[State], State], old: State) -> State:
    """``keep_unless(sound, step(old), old)`` in the form with the least memory traffic here.

    Args:
      sound: from `is_sound`.
      step: maps the state before the step to the state after it, in the same shapes.
      old: state before the step.

    Returns:
      One of the two.
    """
    return backend_for().step_where(sound, step, old)
