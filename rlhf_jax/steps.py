"""Training steps as pure functions: supervised, reward model, PPO, PPO-ptx.

A step takes everything from its arguments and returns the new state and metrics; `compile_step` is
the only jit of a step. Losses are functions of arrays, and a step binds their arguments by name
from what it has (`ppo.POLICY_ARGUMENTS` and the tuples beside it), so a loss of your own needs no
change of this file. Each loss returns a total and a count: gradients are summed over micro-batches
and divided once, so any number of micro-batches gives the same step.

A step whose loss or gradient norm is not finite, or is far above those of the last sound steps
(`spike_std`), leaves the state as it was and reports ``skipped``. So `TrainState.step` counts
applied updates; the position in the data is the loop's own counter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Int, Key, PyTree

from rlhf_jax import guard as guards
from rlhf_jax import ops, scoring
from rlhf_jax.backends import backend_for
from rlhf_jax.log_probs import linear_weights
from rlhf_jax.losses.binding import BoundLoss, Loss, bind_arguments, with_metrics
from rlhf_jax.losses.ranking import ranking_loss
from rlhf_jax.losses.supervised import sft_loss
from rlhf_jax.ppo import (
    LM_ARGUMENTS,
    POLICY_ARGUMENTS,
    PPO,
    RANKING_ARGUMENTS,
    VALUE_ARGUMENTS,
    Losses,
    Optimizers,
)
from rlhf_jax.types import (
    LMBatch,
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
from rlhf_jax.update import (
    Gradient,
    Limits,
    LossOfBatch,
    accumulate_grads,
    add_up,
    update_both,
    update_one,
)

T = TypeVar("T")


# ---------------------------------------------------------------------------------------- the steps


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
      loss: takes arguments by name from `LM_ARGUMENTS`. If it is linear in the log-probs, a quarter
        of the head's work is saved (`log_probs.weighted_log_prob`).
      microbatches: pieces of the batch that go through the model one after the other; must divide
        its rows.
      spike_limit: skip the step when the gradient norm is above it; None for no fixed limit.
      spike_std: skip the step when the loss or the gradient norm is more than this many standard
        deviations above the mean of the last sound steps (`guard.is_spike`); None for no such
        check. Needs a state with a window: ``train_state(..., guard=True)``.

    Returns:
      ``(TrainState, LMBatch, key) -> (TrainState, metrics)``. The key turns dropout on; None leaves
      it off.

    Raises:
      ValueError: if `loss` requires an argument that is not in `LM_ARGUMENTS`.

    Source: Ouyang et al. 2022, section 3.5 and appendix C.1.
    """
    bound = bind_arguments(loss, LM_ARGUMENTS, name="loss")
    loss_fn = _lm_loss_fn(model, bound)

    def step(
        state: TrainState, batch: LMBatch, key: Key[Array, ""] | None
    ) -> tuple[TrainState, Metrics]:
        # One key per row: splitting the rows into micro-batches then splits the keys with them.
        keys = None if key is None else jax.random.split(key, batch.tokens.shape[0])
        grads = accumulate_grads(loss_fn, state.params, (batch, keys), microbatches)
        gradient = Gradient.of(*grads, name="sft")
        return update_one(state, tx, gradient, name="sft", limits=Limits(spike_limit, spike_std))

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
      loss: takes arguments by name from `RANKING_ARGUMENTS`.
      microbatches: must divide the rows of the batch; a prompt is never split, because all its
        responses are in one row.
      spike_limit: as in `make_sft_step`.
      spike_std: as in `make_sft_step`.

    Returns:
      ``(TrainState, RankingBatch, key) -> (TrainState, metrics)``. Dropout is off and the key
      unused.

    Raises:
      ValueError: if `loss` requires an argument that is not in `RANKING_ARGUMENTS`.

    Source: Ouyang et al. 2022, eq. 1 and appendix C.2.
    """
    bound = bind_arguments(loss, RANKING_ARGUMENTS, name="loss")

    def loss_fn(params: Params, batch: RankingBatch) -> tuple[Mean, Metrics]:
        rewards = scoring.ranking_scores(model, params, batch)
        return with_metrics(bound.loss(**bound.arguments(rewards=rewards, ranks=batch.ranks)))

    def step(
        state: TrainState, batch: RankingBatch, key: Key[Array, ""] | None
    ) -> tuple[TrainState, Metrics]:
        del key
        grads = accumulate_grads(loss_fn, state.params, batch, microbatches)
        gradient = Gradient.of(*grads, name="reward")
        return update_one(state, tx, gradient, name="reward", limits=Limits(spike_limit, spike_std))

    return step


def make_ppo_step(
    policy: Model,
    value: Model,
    optimizers: Optimizers,
    ppo: PPO = PPO(),
    *,
    losses: Losses = Losses(),
    batch_sharding: jax.sharding.Sharding | None = None,
    rollout_model: Callable[[Model], Model] = lambda model: model,
) -> StepFn:
    """One PPO update: epochs x minibatches optimizer steps on a rollout, with the pretraining mix.

    ``grad = grad L_policy / n_tokens + ptx_coef * grad L_ptx / n_ptx_tokens``, then one optimizer
    step per minibatch.

    The value network has its own loss and optimizer, and no pretraining term. Both networks step
    together: a minibatch with a non-finite number or a spike in either leaves both as they were.

    Args:
      policy: a language model.
      value: a scalar model, its own network.
      optimizers: of the policy and of the value network.
      ppo: the settings of the update.
      losses: of the policy, of the value network and of the pretraining rows.
      batch_sharding: how the rows of a minibatch are sharded (`sharding.batch_sharding`); None lets
        the compiler choose.
      rollout_model: wraps both networks for the rows of the rollout; `scoring.pair_rows` packs two
        texts per row.

    Returns:
      ``(PPOState, Rollout, LMBatch | None, key) -> (PPOState, metrics)``. The rows of the `LMBatch`
      are spread over the optimizer steps; without one the step is plain PPO. The key orders the
      minibatches. The `Each` ``skipped_steps`` is 1 for each optimizer step that was skipped.

    Raises:
      ValueError: if a loss requires an argument that is not available, or a batch does not divide.

    Source: Ouyang et al. 2022, eq. 2 and appendix C.4; Schulman et al. 2017.
    """
    optimizers = Optimizers(*optimizers)
    policy_loss = bind_arguments(losses.policy, POLICY_ARGUMENTS, name="policy_loss")
    value_loss = bind_arguments(losses.value, VALUE_ARGUMENTS, name="value_loss")
    ptx_loss = bind_arguments(losses.ptx, LM_ARGUMENTS, name="ptx_loss")
    policy_fn = _policy_loss_fn(
        rollout_model(policy), policy_loss, ppo.temperature, ppo.max_new_tokens
    )
    value_fn = _value_loss_fn(rollout_model(value), value_loss, ppo.max_new_tokens)
    ptx_fn = _lm_loss_fn(policy, ptx_loss)

    def policy_gradient(params: Params, rows: Rollout, lm_rows: LMBatch | None) -> Gradient:
        grads = accumulate_grads(policy_fn, params, rows, ppo.microbatches)
        gradient = Gradient.of(*grads, name="policy").clipped(ppo.ppo_clip_norm)
        if lm_rows is None:
            return gradient
        pieces = ppo.ptx_microbatches or ppo.microbatches
        ptx = Gradient.of(*accumulate_grads(ptx_fn, params, (lm_rows, None), pieces), name="ptx")
        return gradient.plus(ptx, coef=ppo.ptx_coef, clip_norm=ppo.ptx_clip_norm)

    def value_gradient(params: Params, rows: Rollout) -> Gradient:
        grads = accumulate_grads(value_fn, params, rows, ppo.microbatches)
        gradient = Gradient.of(*grads, name="value")
        # The largest absolute reward is one of the three numbers that the guard watches.
        return gradient._replace(reward=jnp.max(jnp.where(rows.mask, jnp.abs(rows.rewards), 0)))

    def optimizer_step(
        rollout: Rollout, states: tuple[TrainState, TrainState], index: tuple[Array, LMBatch | None]
    ):
        # Gathering random rows loses their sharding, so it is stated again for the compiler.
        rows, lm_rows = _constrain((_minibatch(rollout, index[0]), index[1]), batch_sharding)
        policy_grad = policy_gradient(states[0].params, rows, lm_rows)
        gradients = policy_grad, value_gradient(states[1].params, rows)
        limits = Limits(ppo.spike_limit, ppo.spike_std)
        return update_both(states, optimizers, gradients, ema_decay=ppo.ema_decay, limits=limits)

    def step(
        state: PPOState, rollout: Rollout, lm_batch: LMBatch | None, key: Key[Array, ""]
    ) -> tuple[PPOState, Metrics]:
        # Here and not in a minibatch: the statistics are those of the whole rollout.
        if ppo.whiten_advantages:
            advantages = ops.whiten(rollout.advantages, rollout.mask)
            rollout = dataclasses.replace(rollout, advantages=advantages)
        # With a coefficient of 0 the pretraining rows are not even read, so that the step is plain
        # PPO bit for bit.
        each = _rows_of_each_step(key, rollout, lm_batch if ppo.ptx_coef != 0 else None, ppo)
        before = state.policy, state.value
        # A scan, so that the program does not grow with the number of optimizer steps.
        states, metrics = lax.scan(partial(optimizer_step, rollout), before, each)
        state = dataclasses.replace(
            state, policy=states[0], value=states[1], iteration=state.iteration + 1
        )
        return state, add_up(metrics)

    return step


def _rows_of_each_step(
    key: Key[Array, ""], rollout: Rollout, lm_batch: LMBatch | None, ppo: PPO
) -> tuple[Int[Array, "steps rows_of_minibatch"], LMBatch | None]:
    """Which rows of the rollout each optimizer step takes, and its rows of pretraining text."""
    rows = rollout.tokens.shape[0]
    order = minibatch_order(key, rows, epochs=ppo.epochs, minibatches=ppo.minibatches)
    steps = ppo.epochs * ppo.minibatches
    # None is a tree without leaves: splitting it gives None, and `scan` passes None on.
    return order, ops.split_rows(lm_batch, steps, "epochs * minibatches", "pretraining batch")


def compile_step(
    step: StepFn, *, state_sharding: PyTree | None = None, donate: bool = True
) -> StepFn:
    """Compile a step: the only `jit` of a step in the package.

    The state is donated: its buffers become those of the new state, and the old one must not be
    used again. Anything frozen (the KL reference) must therefore not share its buffers, which is
    why `train_state` copies the weights.

    Args:
      step: from a ``make_*_step``.
      state_sharding: `sharding.tree_shardings` of the state, so that the new state is placed as the
        old one was; None on one device.
      donate: False keeps the old state usable, at twice the memory.

    Returns:
      The same function, compiled once per shape.
    """
    donated = (0,) if donate else ()
    if state_sharding is None:
        return jax.jit(step, donate_argnums=donated)
    return jax.jit(step, donate_argnums=donated, out_shardings=(state_sharding, None))


def compile_frozen_step(
    make_step: Callable[[Any], StepFn],
    frozen: PyTree,
    *,
    state_sharding: PyTree | None = None,
    donate: bool = True,
) -> StepFn:
    """Compile a step with frozen weights: LoRA, or a trained head on a frozen trunk.

    `frozen` is an argument of the compiled program: it is not a constant of it, which would be a
    second copy, and it is not donated, because it may also be the KL reference. The state contains
    only what is trained.

    Args:
      make_step: ``frozen -> step``, for example
        ``lambda base: make_sft_step(lora_model(model, base, alpha=16), tx)``.
      frozen: a tree of arrays; empty where everything is trained.
      state_sharding: as in `compile_step`.
      donate: as in `compile_step`.

    Returns:
      The step, compiled once per shape.
    """
    if not jax.tree.leaves(frozen):
        return compile_step(make_step(frozen), state_sharding=state_sharding, donate=donate)
    donated = (1,) if donate else ()

    def step(frozen: PyTree, state: Any, *others: Any) -> Any:
        return make_step(frozen)(state, *others)

    if state_sharding is None:
        return partial(jax.jit(step, donate_argnums=donated), frozen)
    return partial(
        jax.jit(step, donate_argnums=donated, out_shardings=(state_sharding, None)), frozen
    )


def train_state(
    params: Params, tx: optax.GradientTransformation, *, ema: bool = False, guard: bool = False
) -> TrainState:
    """The training state at step 0, on copies of `params`.

    The copies keep `params` usable after a step has donated the state.

    Args:
      params: initial weights.
      tx: the optimizer.
      ema: keep a float32 average of the weights.
      guard: keep the window of the last sound steps, for a step with `spike_std`.

    Returns:
      The state before the first update.
    """
    params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
    # A copy of its own: a buffer that occurs twice in a donated state cannot be donated.
    average = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params) if ema else None
    window = guards.guard_state() if guard else None
    step = jnp.zeros((), jnp.int32)
    return TrainState(
        step=step, params=params, opt_state=tx.init(params), ema=average, guard=window
    )


# ------------------------------------------------------------------------------- gradients and rows


def minibatch_order(
    key: Key[Array, ""], rows: int, *, epochs: int, minibatches: int
) -> Int[Array, "steps rows_of_minibatch"]:
    """Which rows each optimizer step takes: every row once per epoch, in a new random order.

    With one minibatch, a step takes all rows and no loss depends on their order, so they are not
    shuffled.

    Args:
      key: of the iteration.
      rows: number of rows of the rollout.
      epochs: passes over the rollout.
      minibatches: optimizer steps per pass.

    Returns:
      Row indices ``[epochs * minibatches, rows / minibatches]``.

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
    # One key per epoch, so that the order of an epoch does not depend on how many there are.
    orders = [
        jax.random.permutation(jax.random.fold_in(key, epoch), rows) for epoch in range(epochs)
    ]
    return jnp.concatenate([order.reshape(-1, minibatches).T for order in orders])


def _minibatch(rollout: Rollout, rows: Int[Array, " B"]) -> Rollout:
    """Rows of the rollout; without a gather if it is all rows, which are then in their order."""
    return rollout if len(rows) == len(rollout.ids) else jax.tree.map(lambda x: x[rows], rollout)


def _constrain(tree: T, sharding: jax.sharding.Sharding | None) -> T:
    if sharding is None:
        return tree
    return jax.tree.map(lambda x: lax.with_sharding_constraint(x, sharding), tree)


# ------------------------------------------------------------------------------------------- losses


def _fields(batch: Any) -> dict[str, Array]:
    return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}


def _lm_loss_fn(model: Model, loss: BoundLoss) -> LossOfBatch:
    def loss_fn(params: Params, rows: tuple[LMBatch, Array | None]) -> tuple[Mean, Metrics]:
        batch, keys = rows
        # Dropout takes one key per micro-batch: that of its first row.
        key = None if keys is None else keys[0]
        backend = getattr(model.config, "backend", None) or backend_for()
        call = lambda logp: with_metrics(loss.loss(**loss.arguments(logp=logp, **_fields(batch))))
        of_logp = _traced_once(call, batch.tokens.shape)
        weights = None
        if backend.head_forward:
            # This asks only whether the gradient by the log-probs is constant, as in maximum
            # likelihood.
            weights = linear_weights(lambda logp: of_logp(logp)[0].total, batch.tokens.shape)
        if weights is None:
            return of_logp(scoring.lm_log_probs(model, params, batch, key=key))
        total, logp = scoring.lm_weighted_log_prob(model, params, batch, weights, key=key)
        mean, metrics = of_logp(logp)
        # The value comes from the loss and the gradient from `total`, the same function up to a
        # constant; `total - stop_gradient(total)` is 0 and carries only the gradient.
        only_gradient = total - lax.stop_gradient(total)
        return dataclasses.replace(mean, total=mean.total + only_gradient), metrics

    return loss_fn


def _traced_once(
    loss: Callable[[Array], tuple[Mean, Metrics]], shape: tuple[int, ...]
) -> Callable[[Array], tuple[Mean, Metrics]]:
    """Trace `loss` once, so that using it twice does not call the user's function twice."""
    program, constants = jax.closure_convert(loss, jnp.zeros(shape, jnp.float32))
    return lambda logp: program(logp, *constants)


def _policy_loss_fn(
    model: Model, loss: BoundLoss, temperature: float | int, targets: int | None = None
) -> LossOfBatch:
    how = {"temperature": temperature, "targets": targets}

    def loss_fn(params: Params, rows: Rollout) -> tuple[Mean, Metrics]:
        where = (rows.tokens, rows.lengths, rows.mask)
        if "entropy" not in loss.names:
            logp = scoring.sequence_log_probs(model, params, *where, **how)
            return with_metrics(loss.loss(**loss.arguments(logp=logp, **_fields(rows))))
        logp, entropy = scoring.sequence_log_probs_and_entropy(model, params, *where, **how)
        arrays = loss.arguments(logp=logp, entropy=entropy, **_fields(rows))
        mean, metrics = with_metrics(loss.loss(**arrays))
        # For the log only: the loss has used the entropy with its gradient.
        total = lax.stop_gradient(jnp.sum(jnp.where(rows.mask, entropy, 0)))
        return mean, {"entropy": Mean(total, jnp.sum(rows.mask, dtype=jnp.float32))} | metrics

    return loss_fn


def _value_loss_fn(model: Model, loss: BoundLoss, targets: int | None = None) -> LossOfBatch:
    def loss_fn(params: Params, rows: Rollout) -> tuple[Mean, Metrics]:
        where = (rows.tokens, rows.lengths, rows.mask)
        values = scoring.response_values(model, params, *where, targets=targets)
        return with_metrics(loss.loss(**loss.arguments(values=values, **_fields(rows))))

    return loss_fn
