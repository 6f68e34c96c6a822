"""Training steps as pure functions: supervised, reward model, PPO, PPO-ptx. `compile_step` is the only jit of a step.

A step takes everything from its arguments and returns the new state and metrics. Losses are functions of arrays; a step
binds their arguments by name from what it has (`POLICY_ARGUMENTS` and the other tuples below), so that a loss of your
own needs no other file. Each loss comes back as a total and a count: gradients are summed over micro-batches and
divided once, and any number of micro-batches gives the same step.

A step whose loss or gradient norm is not finite, or lies far above those of the last sound steps (`spike_std`),
leaves the state as it was and reports ``skipped``. So `TrainState.step` counts applied updates; the place in the data
is the loop's own counter.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from rlhf_jax import ops, optim, scoring
from rlhf_jax.backends import backend_for
from rlhf_jax.log_probs import linear_weights
from rlhf_jax.losses.policy import ppo_policy_loss
from rlhf_jax.losses.ranking import ranking_loss
from rlhf_jax.losses.supervised import sft_loss
from rlhf_jax.losses.value import ppo_value_loss
from rlhf_jax.types import (
    Each,
    GuardState,
    LMBatch,
    Max,
    Mean,
    Metrics,
    Model,
    Params,
    PPOState,
    RankingBatch,
    Rollout,
    StepFn,
    TrainState,
)

Loss = Callable[..., Any]
"""Arrays in, ``(Mean, dict of Mean or Max)`` out; a bare `Mean` will do."""

LossOfBatch = Callable[[Any, Any], tuple[Mean, Metrics]]

LM_ARGUMENTS = ("logp", *(field.name for field in dataclasses.fields(LMBatch)))
"""What the loss of `make_sft_step` and the `ptx_loss` may name."""

RANKING_ARGUMENTS = ("rewards", "ranks")
"""What the loss of `make_reward_step` may name, both ``[B, N, K]``."""

POLICY_ARGUMENTS = ("logp", "entropy", *(field.name for field in dataclasses.fields(Rollout)))
"""What a `policy_loss` may name; entropy is computed only for a loss that names it."""

VALUE_ARGUMENTS = ("values", *(field.name for field in dataclasses.fields(Rollout)))
"""What a `value_loss` may name."""

T = TypeVar("T")


# --------------------------------------------------------------------------------------------- the steps


def make_sft_step(
    model: Model,
    tx: optax.GradientTransformation,
    *,
    loss: Loss = sft_loss,
    microbatches: int = 1,
    spike_limit: float | int | None = None,
    spike_std: float | int | None = None,
) -> StepFn:
    """Maximum likelihood on packed rows: SFT, pretraining, and the two mixed.

    ``L = -sum log p(token) / number of targets``

    Args:
      model: a language model.
      tx: an optimizer from `rlhf_jax.optim`, or any optax chain.
      loss: arguments by name from `LM_ARGUMENTS`. Where it is linear in the log-probs a quarter of the head's work is
        saved (`log_probs.weighted_log_prob`).
      microbatches: pieces of the batch that go through the model one after the other; must divide its rows.
      spike_limit: skip the step when the gradient norm is above it; None for no fixed limit.
      spike_std: skip the step when loss or gradient norm is more standard deviations above the mean of the last sound
        steps (`optim.is_spike`); None not to. Asks for a state with a window: ``train_state(..., guard=True)``.

    Returns:
      ``(TrainState, LMBatch, key) -> (TrainState, metrics)``. The key turns dropout on; None leaves it off.

    Raises:
      ValueError: if `loss` asks for something that is not there.

    Source: Ouyang et al. 2022, section 3.5 and appendix C.1.
    """
    bound = bind_arguments(loss, LM_ARGUMENTS, name="loss")
    loss_fn = _lm_loss_fn(model, bound)

    def step(state: TrainState, batch: LMBatch, key: Key[Array, ""] | None) -> tuple[TrainState, Metrics]:
        # One key a row, so that each micro-batch finds its own.
        keys = None if key is None else jax.random.split(key, batch.tokens.shape[0])
        grads, mean, metrics = accumulate_grads(loss_fn, state.params, (batch, keys), microbatches)
        return _supervised_update(state, tx, grads, mean, metrics, name="sft", limits=(spike_limit, spike_std))

    return step


def make_reward_step(
    model: Model,
    tx: optax.GradientTransformation,
    *,
    loss: Loss = ranking_loss,
    microbatches: int = 1,
    spike_limit: float | int | None = None,
    spike_std: float | int | None = None,
) -> StepFn:
    """Reward model: all pairs of a prompt in one step, each response scored once.

    ``L = -mean over prompts of 1 / C(K, 2) sum_{w > l} log sigmoid(r_w - r_l)``

    Args:
      model: a scalar model.
      tx: an optimizer.
      loss: arguments by name from `RANKING_ARGUMENTS`.
      microbatches: must divide the rows of the batch; never splits a prompt, because a prompt lies in one row.
      spike_limit: as in `make_sft_step`.
      spike_std: as in `make_sft_step`.

    Returns:
      ``(TrainState, RankingBatch, key) -> (TrainState, metrics)``. Dropout is off and the key unused.

    Raises:
      ValueError: if `loss` asks for something that is not there.

    Source: Ouyang et al. 2022, eq. 1 and appendix C.2.
    """
    bound = bind_arguments(loss, RANKING_ARGUMENTS, name="loss")

    def loss_fn(params: Params, batch: RankingBatch) -> tuple[Mean, Metrics]:
        return bound(rewards=scoring.ranking_scores(model, params, batch), ranks=batch.ranks)

    def step(state: TrainState, batch: RankingBatch, key: Key[Array, ""] | None) -> tuple[TrainState, Metrics]:
        del key
        grads, mean, metrics = accumulate_grads(loss_fn, state.params, batch, microbatches)
        return _supervised_update(state, tx, grads, mean, metrics, name="reward", limits=(spike_limit, spike_std))

    return step


def make_ppo_step(
    policy: Model,
    value: Model,
    policy_tx: optax.GradientTransformation,
    value_tx: optax.GradientTransformation,
    *,
    policy_loss: Loss = ppo_policy_loss,
    value_loss: Loss = ppo_value_loss,
    ptx_loss: Loss = sft_loss,
    ptx_coef: float | int = 27.8,
    whiten_advantages: bool = True,
    ema_decay: float | int = 0.992,
    epochs: int = 1,
    minibatches: int = 8,
    microbatches: int = 1,
    ptx_microbatches: int | None = None,
    temperature: float | int = 1.0,
    ppo_clip_norm: float | int | None = None,
    ptx_clip_norm: float | int | None = None,
    spike_limit: float | int | None = None,
    spike_std: float | int | None = None,
    batch_sharding: jax.sharding.Sharding | None = None,
    rollout_model: Callable[[Model], Model] = lambda model: model,
    max_new_tokens: int | None = None,
) -> StepFn:
    """One PPO update: epochs x minibatches optimizer steps on a rollout, with the pretraining mix of PPO-ptx.

    ``grad = grad L_policy / n_tokens + ptx_coef * grad L_ptx / n_ptx_tokens``, then one optimizer step a minibatch.

    The value network has its own loss and optimizer, and no pretraining term. Both networks step together: a minibatch
    with a non-finite number or a spike in either leaves both as they were.

    Args:
      policy: a language model.
      value: a scalar model, its own network.
      policy_tx: optimizer of the policy; its schedule counts optimizer steps, ``epochs * minibatches`` a rollout.
      value_tx: optimizer of the value network.
      policy_loss: arguments by name from `POLICY_ARGUMENTS`; `advantages` are whitened when `whiten_advantages`.
      value_loss: arguments by name from `VALUE_ARGUMENTS`.
      ptx_loss: arguments by name from `LM_ARGUMENTS`.
      ptx_coef: gamma of eq. 2; 0 is plain PPO, bit for bit.
      whiten_advantages: scale them to mean 0 and variance 1 once, over the response tokens of the whole rollout.
      ema_decay: of the policy's average, updated every optimizer step where the state keeps one.
      epochs: passes over the rollout, each in a new random order.
      minibatches: optimizer steps a pass; must divide the rows of the rollout.
      microbatches: pieces of a minibatch that go through the networks one after the other.
      ptx_microbatches: the same for the pretraining rows; None for `microbatches`.
      temperature: the sampler's.
      ppo_clip_norm: largest norm of the PPO term alone; None for no clipping.
      ptx_clip_norm: largest norm of ``ptx_coef * grad L_ptx / n_ptx_tokens`` alone. One clip over the sum (in
        `policy_tx`) would let a large pretraining term shrink the PPO term.
      spike_limit: skip a minibatch when a network's gradient norm is above it.
      spike_std: as in `make_sft_step`, for both networks; of the value network the largest reward of a minibatch counts
        too.
      batch_sharding: where the rows of a minibatch live (`sharding.batch_sharding`); None lets the compiler choose.
      rollout_model: how both networks run over the rows of the rollout; `scoring.pair_rows` computes two to a row.
      max_new_tokens: of the sampler: the last block of each network then computes responses alone. None where that is
        not known; a row with a longer response gives a loss that is not finite.

    Returns:
      ``(PPOState, Rollout, LMBatch | None, key) -> (PPOState, metrics)``. The rows of the `LMBatch` are spread over the
      optimizer steps; without one the step is plain PPO. The key orders the minibatches. The `Each` ``skipped_steps``
      is 1 for the optimizer steps that were left out.

    Raises:
      ValueError: if a loss asks for something that is not there, or a batch does not divide.

    Source: Ouyang et al. 2022, eq. 2 and appendix C.4; Schulman et al. 2017.
    """
    policy_loss = bind_arguments(policy_loss, POLICY_ARGUMENTS, name="policy_loss")
    policy_fn = _policy_loss_fn(rollout_model(policy), policy_loss, temperature, max_new_tokens)
    value_loss = bind_arguments(value_loss, VALUE_ARGUMENTS, name="value_loss")
    value_fn = _value_loss_fn(rollout_model(value), value_loss, max_new_tokens)
    ptx_fn = _lm_loss_fn(policy, bind_arguments(ptx_loss, LM_ARGUMENTS, name="ptx_loss"))
    ptx_microbatches = microbatches if ptx_microbatches is None else ptx_microbatches

    def policy_gradient(params: Params, rows: Rollout, lm_rows: LMBatch | None) -> _Gradient:
        ppo = _Gradient.of(*accumulate_grads(policy_fn, params, rows, microbatches), name="policy")
        if lm_rows is None:
            return ppo.clipped(ppo_clip_norm)
        ptx = _Gradient.of(*accumulate_grads(ptx_fn, params, (lm_rows, None), ptx_microbatches), name="ptx")
        return ppo.clipped(ppo_clip_norm).plus(ptx, coef=ptx_coef, clip_norm=ptx_clip_norm)

    def optimizer_step(rollout: Rollout, states: tuple[TrainState, TrainState], index: tuple[Array, LMBatch | None]):
        rows, lm_rows = _constrain((_minibatch(rollout, index[0]), index[1]), batch_sharding)
        policy_grad = policy_gradient(states[0].params, rows, lm_rows)
        value_grad = _Gradient.of(*accumulate_grads(value_fn, states[1].params, rows, microbatches), name="value")
        value_grad = value_grad._replace(reward=jnp.max(jnp.where(rows.mask, jnp.abs(rows.rewards), 0)))
        txs, limits = (policy_tx, value_tx), (spike_limit, spike_std)
        return _update_both(states, txs, (policy_grad, value_grad), ema_decay=ema_decay, limits=limits)

    def step(
        state: PPOState, rollout: Rollout, lm_batch: LMBatch | None, key: Key[Array, ""]
    ) -> tuple[PPOState, Metrics]:
        if whiten_advantages:
            rollout = dataclasses.replace(rollout, advantages=ops.whiten(rollout.advantages, rollout.mask))
        order = minibatch_order(key, rollout.tokens.shape[0], epochs=epochs, minibatches=minibatches)
        lm_rows = lm_batch if ptx_coef != 0 else None
        lm_rows = ops.split_rows(lm_rows, epochs * minibatches, "epochs * minibatches", "pretraining batch")
        states, metrics = lax.scan(partial(optimizer_step, rollout), (state.policy, state.value), (order, lm_rows))
        state = dataclasses.replace(state, policy=states[0], value=states[1], iteration=state.iteration + 1)
        return state, _add_up(metrics)

    return step


def compile_step(step: StepFn, *, state_sharding: PyTree | None = None, donate: bool = True) -> StepFn:
    """Compile a step: the only `jit` of a step in the package.

    The state is donated: its buffers become those of the new state, and the old one must not be used again. Anything
    frozen (the KL reference) therefore needs its own copy, which `train_state` makes.

    Args:
      step: from a ``make_*_step``.
      state_sharding: `sharding.tree_shardings` of the state, so that it stays where it was placed; None on one device.
      donate: False keeps the old state alive, at twice the memory.

    Returns:
      The same function, compiled once per shape.
    """
    donated = (0,) if donate else ()
    if state_sharding is None:
        return jax.jit(step, donate_argnums=donated)
    return jax.jit(step, donate_argnums=donated, out_shardings=(state_sharding, None))


def compile_frozen_step(
    make_step: Callable[[Any], StepFn], frozen: PyTree, *, state_sharding: PyTree | None = None, donate: bool = True
) -> StepFn:
    """Compile a step over weights that it reads and never changes: LoRA, or a trained head on a frozen trunk.

    `frozen` is an argument of the compiled program: neither a constant in it (a second copy) nor donated (it may be the
    KL reference too). The state holds only what is trained.

    Args:
      make_step: ``frozen -> step``, for example ``lambda base: make_sft_step(lora_model(model, base, alpha=16), tx)``.
      frozen: a tree of arrays; empty where everything is trained.
      state_sharding: as in `compile_step`.
      donate: as in `compile_step`.

    Returns:
      The step, compiled once per shape.
    """
    donated = (1,) if donate else ()

    def step(frozen: PyTree, state: Any, *others: Any) -> Any:
        return make_step(frozen)(state, *others)

    if state_sharding is None:
        return partial(jax.jit(step, donate_argnums=donated), frozen)
    return partial(jax.jit(step, donate_argnums=donated, out_shardings=(state_sharding, None)), frozen)


def train_state(
    params: Params, tx: optax.GradientTransformation, *, ema: bool = False, guard: bool = False
) -> TrainState:
    """A network at step 0, on copies of `params`, so that a donating step cannot touch what was passed in.

    Args:
      params: initial weights.
      tx: the optimizer.
      ema: keep an average of the weights, in float32, from here on.
      guard: remember the last sound steps, for a step with `spike_std`.

    Returns:
      The state of a training that has not begun.
    """
    params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
    average = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params) if ema else None
    window = optim.guard_state() if guard else None
    step = jnp.zeros((), jnp.int32)
    return TrainState(step=step, params=params, opt_state=tx.init(params), ema=average, guard=window)


# ------------------------------------------------------------------------------------- gradients and rows


def accumulate_grads(
    loss_fn: LossOfBatch, params: PyTree, batch: PyTree, microbatches: int = 1
) -> tuple[PyTree, Mean, Metrics]:
    """Gradient of a loss over a batch, a micro-batch at a time: totals are differentiated and divided once.

    ``grads = (sum_i d total_i / d params) / sum_i count_i``

    A mean of micro-batch means would weigh tokens of short rows more; this is the gradient of the whole batch.

    Args:
      loss_fn: ``(params, micro-batch) -> (Mean, metrics)``.
      params: what to differentiate by.
      batch: a tree of arrays with the same number of rows.
      microbatches: how many pieces; row i goes to piece ``i % microbatches``, so that rows stay on their device.

    Returns:
      Gradients (float32; 0 when nothing was counted), the loss and the metrics of the whole batch.

    Raises:
      ValueError: if `microbatches` does not divide the rows.

    >>> fn = lambda w, x: (Mean(jnp.sum(w * x), jnp.float32(x.size)), {})
    >>> [float(accumulate_grads(fn, jnp.float32(1.0), jnp.array([1.0, 2.0, 3.0, 6.0]), n)[0]) for n in (1, 2, 4)]
    [3.0, 3.0, 3.0]
    """

    def gradient(piece: PyTree) -> tuple[PyTree, tuple[Mean, Metrics]]:
        def total(params: PyTree) -> tuple[Float[Array, ""], tuple[Mean, Metrics]]:
            loss, metrics = loss_fn(params, piece)
            return loss.total, (loss, metrics)

        grads, aux = jax.grad(total, has_aux=True)(params)
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
        loss, metrics = _add_up(aux)
    count = jnp.where(loss.count == 0, 1, loss.count).astype(jnp.float32)
    return jax.tree.map(lambda g: g / count, totals), loss, metrics


def minibatch_order(
    key: Key[Array, ""], rows: int, *, epochs: int, minibatches: int
) -> Int[Array, "steps rows_of_minibatch"]:
    """Which rows each optimizer step takes: every row once an epoch, in a new random order each time.

    With one minibatch a step takes all rows, and no loss depends on their order: they stay as they are.

    Args:
      key: of the iteration.
      rows: rows of the rollout.
      epochs: passes.
      minibatches: optimizer steps a pass.

    Returns:
      Row indices, ``epochs * minibatches`` lines of ``rows / minibatches``.

    Raises:
      ValueError: if `minibatches` does not divide `rows`.

    >>> order = minibatch_order(jax.random.key(0), 6, epochs=1, minibatches=3)
    >>> order.shape, sorted(order.ravel().tolist())
    ((3, 2), [0, 1, 2, 3, 4, 5])
    """
    ops.require_divides("minibatches", minibatches, rows, "rollout batch")
    if epochs < 1:
        raise ValueError(f"epochs={epochs} must be at least 1: every rollout is used once or more")
    if minibatches == 1:
        return jnp.tile(jnp.arange(rows), (epochs, 1))
    orders = [jax.random.permutation(jax.random.fold_in(key, epoch), rows) for epoch in range(epochs)]
    return jnp.concatenate([order.reshape(-1, minibatches).T for order in orders])


def _minibatch(rollout: Rollout, rows: Int[Array, " B"]) -> Rollout:
    """Rows of the rollout; all of them are in their order (`minibatch_order`), and nothing is gathered."""
    return rollout if len(rows) == len(rollout.ids) else jax.tree.map(lambda x: x[rows], rollout)


def _constrain(tree: T, sharding: jax.sharding.Sharding | None) -> T:
    if sharding is None:
        return tree
    return jax.tree.map(lambda x: lax.with_sharding_constraint(x, sharding), tree)


# ------------------------------------------------------------------------------------------------- losses


class BoundLoss(NamedTuple):
    """A loss and the arguments that it takes by name from what a step has."""

    loss: Loss
    names: tuple[str, ...]

    def __call__(self, **arrays: Array) -> tuple[Mean, Metrics]:
        """Call the loss with those of `arrays` that it names; a bare `Mean` gets empty metrics."""
        result = self.loss(**{name: arrays[name] for name in self.names})
        return (result, {}) if isinstance(result, Mean) else result


def bind_arguments(loss: Loss, available: tuple[str, ...], *, name: str) -> BoundLoss:
    """Find which of `available` the loss names.

    Keyword-only arguments with a default are hyperparameters and stay as they are; so do defaults of other arguments
    that are not in `available`.

    Args:
      loss: a function of arrays, or a `functools.partial` of one.
      available: what the step can hand over.
      name: of the argument, for the error.

    Returns:
      The loss, to be called with at least its `names`.

    Raises:
      ValueError: if the loss requires an argument that is not available; the message lists those that are.

    >>> bind_arguments(lambda logp, mask, *, beta=1.0: None, LM_ARGUMENTS, name="loss").names
    ('logp', 'mask')
    """
    names = []
    for argument in inspect.signature(loss).parameters.values():
        if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
            continue
        required = argument.default is argument.empty
        if argument.name in available and (required or argument.kind is not argument.KEYWORD_ONLY):
            names.append(argument.name)
        elif required:
            function = getattr(loss, "__name__", repr(loss))
            raise ValueError(
                f"{name}={function} asks for {argument.name!r}, which this step does not have: "
                f"name any of {', '.join(available)}, or give it a default"
            )
    return BoundLoss(loss, tuple(names))


def _fields(batch: Any) -> dict[str, Array]:
    return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}


def _lm_loss_fn(model: Model, loss: BoundLoss) -> LossOfBatch:
    def loss_fn(params: Params, rows: tuple[LMBatch, Array | None]) -> tuple[Mean, Metrics]:
        batch, keys = rows
        key = None if keys is None else keys[0]
        backend = getattr(model.config, "backend", None) or backend_for()
        of_logp = _traced_once(lambda logp: loss(logp=logp, **_fields(batch)), batch.tokens.shape)
        weights = None
        if backend.head_forward:
            weights = linear_weights(lambda logp: of_logp(logp)[0].total, batch.tokens.shape)
        if weights is None:
            return of_logp(scoring.lm_log_probs(model, params, batch, key=key))
        total, logp = scoring.lm_weighted_log_prob(model, params, batch, weights, key=key)
        mean, metrics = of_logp(logp)
        # The value is the loss's own, the gradient that of `total`, which is the same function.
        only_gradient = total - lax.stop_gradient(total)
        return dataclasses.replace(mean, total=mean.total + only_gradient), metrics

    return loss_fn


def _traced_once(
    loss: Callable[[Array], tuple[Mean, Metrics]], shape: tuple[int, ...]
) -> Callable[[Array], tuple[Mean, Metrics]]:
    """`loss` as the program that it is: whatever that is used for, the user's function is called once."""
    program, constants = jax.closure_convert(loss, jnp.zeros(shape, jnp.float32))
    return lambda logp: program(logp, *constants)


def _policy_loss_fn(model: Model, loss: BoundLoss, temperature: float | int, targets: int | None = None) -> LossOfBatch:
    how = {"temperature": temperature, "targets": targets}

    def loss_fn(params: Params, rows: Rollout) -> tuple[Mean, Metrics]:
        where = (rows.tokens, rows.lengths, rows.mask)
        if "entropy" not in loss.names:
            logp = scoring.sequence_log_probs(model, params, *where, **how)
            return loss(logp=logp, **_fields(rows))
        logp, entropy = scoring.sequence_log_probs_and_entropy(model, params, *where, **how)
        mean, metrics = loss(logp=logp, entropy=entropy, **_fields(rows))
        total = lax.stop_gradient(jnp.sum(jnp.where(rows.mask, entropy, 0)))
        return mean, {"entropy": Mean(total, jnp.sum(rows.mask, dtype=jnp.float32))} | metrics

    return loss_fn


def _value_loss_fn(model: Model, loss: BoundLoss, targets: int | None = None) -> LossOfBatch:
    def loss_fn(params: Params, rows: Rollout) -> tuple[Mean, Metrics]:
        where = (rows.tokens, rows.lengths, rows.mask)
        values = scoring.response_values(model, params, *where, targets=targets)
        return loss(values=values, **_fields(rows))

    return loss_fn


# --------------------------------------------------------------------------------- one optimizer step


class _Gradient(NamedTuple):
    """Gradients of one optimizer step, with what the guard and the log need."""

    grads: Params
    losses: tuple[Array, ...]
    norm: Array
    metrics: Metrics
    mean_loss: Array
    reward: Array

    @classmethod
    def of(cls, grads: Params, loss: Mean, metrics: Metrics, *, name: str) -> _Gradient:
        norm = optax.tree.norm(grads)
        own = {"loss": loss, "grad_norm": _one(norm)}
        named = {f"{name}/{key}": metric for key, metric in (metrics | own).items()}
        return cls(grads, (loss.total,), norm, named, loss.value, jnp.zeros((), jnp.float32))

    def clipped(self, limit: float | int | None) -> _Gradient:
        if limit is None:
            return self
        scale = optim.clip_factor(self.norm, limit)
        return self._replace(grads=jax.tree.map(lambda g: scale * g, self.grads))

    def plus(self, other: _Gradient, *, coef: float | int, clip_norm: float | int | None) -> _Gradient:
        """``self + coef * other`` with each term clipped alone; logs the cosine and the norm of the sum."""
        # Not `vdot`: it flattens, and pieces of a matrix have no flat form, so each device would get all layers whole.
        dot = sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), self.grads, other.grads)))
        cosine = dot / jnp.maximum(optax.tree.norm(self.grads) * other.norm, 1e-12)
        term = other._replace(grads=jax.tree.map(lambda g: coef * g, other.grads), norm=abs(coef) * other.norm)
        grads = jax.tree.map(jnp.add, self.grads, term.clipped(clip_norm).grads)
        norm = optax.tree.norm(grads)
        own = {"ptx/cosine": _one(cosine), "policy/total_grad_norm": _one(norm)}
        # The guard looks at the larger one: clipping must not hide a spike of the PPO term.
        guard_norm = jnp.maximum(norm, self.norm)
        return self._replace(
            grads=grads, losses=self.losses + other.losses, norm=guard_norm, metrics=self.metrics | other.metrics | own
        )

    @property
    def watched(self) -> Array:
        """What the window of the guard remembers of a step."""
        return jnp.stack([jnp.asarray(x, jnp.float32) for x in (self.mean_loss, self.norm, self.reward)])


Limits = tuple[float | int | None, float | int | None]
"""``(spike_limit, spike_std)``."""


def _verdict(
    gradients: tuple[tuple[_Gradient, GuardState | None], ...], limits: Limits
) -> tuple[Bool[Array, ""], Metrics]:
    """Whether the networks may step, all or none: everything finite and, where it is looked for, no spike."""
    finite, calm = jnp.bool_(True), jnp.bool_(True)
    for gradient, guard in gradients:
        finite &= optim.is_sound(*gradient.losses, gradient.reward, norm=gradient.norm)
        if limits[0] is not None:
            calm &= gradient.norm <= limits[0]
        if limits[1] is not None:
            if guard is None:
                raise ValueError(f"spike_std={limits[1]} needs a window in the state: train_state(..., guard=True)")
            calm &= ~optim.is_spike(guard, gradient.watched, std=limits[1])
    sound = finite & calm
    return sound, {"skipped": _one(~sound), "spiked": _one(finite & ~calm)}


def _advance(
    state: TrainState, tx: optax.GradientTransformation, gradient: _Gradient, ema_decay: float | int | None
) -> TrainState:
    updates, opt_state = tx.update(gradient.grads, state.opt_state, state.params)
    params: Params = optax.apply_updates(state.params, updates)  # pyright: ignore[reportAssignmentType]
    ema = state.ema
    if ema is not None and ema_decay is not None:
        ema = optim.ema_update(ema, params, decay=ema_decay)
    guard = None if state.guard is None else optim.remember(state.guard, gradient.watched)
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema, guard=guard)


def _update_both(
    states: tuple[TrainState, TrainState],
    txs: tuple[optax.GradientTransformation, optax.GradientTransformation],
    gradients: tuple[_Gradient, _Gradient],
    *,
    ema_decay: float | int,
    limits: Limits,
) -> tuple[tuple[TrainState, TrainState], Metrics]:
    """Policy and value network take an optimizer step together, or neither does."""
    sound, told = _verdict(((gradients[0], states[0].guard), (gradients[1], states[1].guard)), limits)

    def advance(states: tuple[TrainState, TrainState]) -> tuple[TrainState, TrainState]:
        policy = _advance(states[0], txs[0], gradients[0], ema_decay)
        return policy, _advance(states[1], txs[1], gradients[1], ema_decay)

    new = optim.step_where(sound, advance, states)
    metrics = gradients[0].metrics | gradients[1].metrics | told | {"skipped_steps": Each(jnp.float32(~sound))}
    metrics |= _learning_rate("policy", new[0]) | _learning_rate("value", new[1])
    return new, metrics


def _supervised_update(
    state: TrainState,
    tx: optax.GradientTransformation,
    grads: Params,
    loss: Mean,
    metrics: Metrics,
    *,
    name: str,
    limits: Limits,
) -> tuple[TrainState, Metrics]:
    gradient = _Gradient.of(grads, loss, metrics, name=name)
    sound, told = _verdict(((gradient, state.guard),), limits)
    new = optim.step_where(sound, lambda state: _advance(state, tx, gradient, None), state)
    return new, gradient.metrics | told | _learning_rate(name, new)


def _learning_rate(name: str, state: TrainState) -> Metrics:
    rate = optim.last_learning_rate(state.opt_state)
    return {} if rate is None else {f"{name}/lr": _one(rate)}


def _one(x: ArrayLike) -> Mean:
    return Mean(jnp.asarray(x, jnp.float32), jnp.float32(1.0))


def _add_up(stacked: T) -> T:
    """Metrics with a leading axis, as `lax.scan` stacks them, to one of each."""

    def reduce(metric: Mean | Max | Each) -> Mean | Max | Each:
        if isinstance(metric, Each):
            return metric
        if isinstance(metric, Max):
            return Max(jnp.max(metric.value, axis=0))
        return Mean(jnp.sum(metric.total, axis=0), jnp.sum(metric.count, axis=0))

    return jax.tree.map(reduce, stacked, is_leaf=lambda x: isinstance(x, (Mean, Max, Each)))
