"""The steps: counts, micro-batches, guards, PPO-ptx, donation, devices.

PITFALLS 1, 2, 5, 6, 19, 21-23, 26, 30, 38, 39, 44, 45, 47-49, J5, J6, J9, J10; RECIPE 57, 58, 62.
"""

from __future__ import annotations

import dataclasses
import traceback
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax import guard as guards
from rlhf_jax import ops, optim, scoring, sharding, steps, update
from rlhf_jax import ppo as ppo_lib
from rlhf_jax.backends import attention
from rlhf_jax.losses.binding import bind_arguments
from rlhf_jax.losses.policy import ppo_policy_loss
from rlhf_jax.losses.ranking import ranking_loss
from rlhf_jax.losses.supervised import sft_loss
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.heads import language_model, scalar_model
from rlhf_jax.types import LMBatch, Mean, RankingBatch
from tests import tiny

KEY = jax.random.key(0)
SGD = optax.sgd(1.0)
BOTH = ppo_lib.Optimizers(SGD, SGD)


@lru_cache  # tests with the same settings share one compiled program
def ppo_step(policy_tx=SGD, value_tx=SGD, **options):
    losses = {
        name: options.pop(f"{name}_loss")
        for name in ("policy", "value", "ptx")
        if f"{name}_loss" in options
    }
    txs = ppo_lib.Optimizers(policy_tx, value_tx)
    return jax.jit(
        steps.make_ppo_step(
            tiny.LANGUAGE, tiny.SCALAR, txs, ppo_lib.PPO(**options), losses=ppo_lib.Losses(**losses)
        )
    )


def start(policy_tx=SGD, value_tx=SGD, **options):
    state = tiny.ppo_state(policy_tx, value_tx, **options)
    return state, tiny.rollout(8, state.policy.params)


def value_of(metrics, name):
    return float(metrics[name].value)


# -------------------------------------------------------------------------------------------- a user's loss


@pytest.mark.parametrize("is_linear", [True, False])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_loss_is_called_once_a_step_and_has_its_gradient(is_linear, microbatches):
    """Once while JAX traces, whether or not its gradient is known before the log-probs."""
    calls = []

    def squared(logp, mask):
        calls.append(logp)
        return Mean(jnp.sum(jnp.where(mask, logp**2, 0)), jnp.sum(mask, dtype=jnp.float32))

    def linear(logp, mask):
        calls.append(logp)
        return sft_loss(logp, mask)

    own = linear if is_linear else squared
    state, batch = steps.train_state(tiny.LANGUAGE.init(KEY), SGD), tiny.lm_batch(8)
    step = steps.make_sft_step(tiny.LANGUAGE, SGD, loss=own, microbatches=microbatches)
    moved, metrics = jax.jit(step)(state, batch, None)
    assert len(calls) == 1

    def mean(params):
        logp = scoring.lm_log_probs(tiny.LANGUAGE, params, batch)
        result = own(logp, batch.mask)
        return (result if isinstance(result, Mean) else result[0]).value

    value, grads = jax.jit(jax.value_and_grad(mean))(state.params)
    assert value_of(metrics, "sft/loss") == pytest.approx(float(value), rel=1e-6)
    expected = jax.tree.map(lambda p, g: p - g, state.params, grads)
    assert tiny.distance(moved.params, expected) < 1e-5


def test_the_pretraining_loss_is_called_once_a_ppo_step():
    calls = []

    def ptx_loss(logp, mask):
        calls.append(logp)
        return sft_loss(logp, mask)

    state, rollout = start()
    settings, losses = ppo_lib.PPO(minibatches=2, ptx_coef=1.0), ppo_lib.Losses(ptx=ptx_loss)
    step = steps.make_ppo_step(tiny.LANGUAGE, tiny.SCALAR, BOTH, settings, losses=losses)
    jax.eval_shape(step, state, rollout, tiny.lm_batch(8), KEY)
    assert len(calls) == 1


def test_the_policys_equation_is_eight_calls_from_the_program_and_attention_eight_more(monkeypatch):
    """``iterate`` of experiments/ppo.py calls the step; whoever reads on needs no more calls than this."""
    here = str(Path(steps.__file__).parent)
    seen: dict[str, list[str]] = {}

    def calls_from_the_step() -> list[str]:
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(here)]
        return [f"{Path(f.filename).stem}.{f.name}" for f in frames]

    def policy_loss(logp, old_logp, advantages, mask):
        seen["equation"] = calls_from_the_step()
        return ppo_policy_loss(logp, old_logp, advantages, mask)

    def over_keys(*arguments, **how):
        calls = calls_from_the_step()
        if "accumulate_grads" in "".join(calls) and "sequence_log_probs" in "".join(calls):
            seen.setdefault("attention", calls)
        return product(*arguments, **how)

    product = attention.over_keys
    monkeypatch.setattr(attention, "over_keys", over_keys)
    # A width of its own: blocks of this shape were not traced before.
    model = language_model(DecoderConfig(tiny.VOCABULARY, 16, 1, 24, 2))
    state, rollout = start()
    state = dataclasses.replace(state, policy=steps.train_state(model.init(KEY), SGD))
    settings, losses = ppo_lib.PPO(minibatches=2), ppo_lib.Losses(policy=policy_loss)
    step = steps.make_ppo_step(model, tiny.SCALAR, BOTH, settings, losses=losses)
    jax.eval_shape(step, state, rollout, None, KEY)
    assert len(seen["equation"]) < 8, seen["equation"]  # its own call is the last one
    assert len(seen["attention"]) < 8 + 8, seen["attention"]


# ------------------------------------------------------------------------------------------- counting steps


@pytest.mark.parametrize(
    ("epochs", "minibatches", "microbatches"), [(1, 8, 1), (2, 4, 2), (3, 1, 8)]
)
def test_optimizer_steps_are_epochs_times_minibatches_whatever_the_microbatches(
    epochs, minibatches, microbatches
):
    state, rollout = start()
    step = ppo_step(epochs=epochs, minibatches=minibatches, microbatches=microbatches)
    state, metrics = step(state, rollout, None, KEY)
    assert int(state.policy.step) == int(state.value.step) == epochs * minibatches
    assert int(state.iteration) == 1
    assert float(metrics["policy/grad_norm"].count) == epochs * minibatches


def test_learning_rate_schedule_counts_optimizer_steps_and_ends_where_it_should():
    tx = optim.adam(optim.linear_to_zero(1e-3, 2 * 4 * 2))
    state, rollout = start(tx, tx)
    step = ppo_step(tx, tx, epochs=2, minibatches=4, microbatches=2)
    for iteration in range(2):
        state, metrics = step(state, rollout, None, jax.random.fold_in(KEY, iteration))
    assert float(optim.last_learning_rate(state.policy.opt_state)) == pytest.approx(1e-3 / 16)
    assert value_of(metrics, "policy/lr") == pytest.approx(
        1e-3 * np.mean(np.arange(1, 9) / 16), rel=1e-5
    )


def test_every_row_is_visited_once_an_epoch_in_a_new_order():
    order = np.asarray(steps.minibatch_order(KEY, 64, epochs=3, minibatches=8))
    assert order.shape == (24, 8)
    epochs = order.reshape(3, 64)
    assert all(sorted(epoch) == list(range(64)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = np.asarray(
        steps.minibatch_order(jax.random.fold_in(KEY, 1), 64, epochs=1, minibatches=8)
    )
    assert not np.array_equal(other, order[:8])


def test_one_minibatch_takes_all_rows_as_they_are_and_their_order_does_not_matter():
    assert steps.minibatch_order(KEY, 4, epochs=2, minibatches=1).tolist() == [[0, 1, 2, 3]] * 2
    state, rollout = start()
    other = tiny.take(rollout, np.random.default_rng(0).permutation(len(rollout.ids)))
    assert not np.array_equal(rollout.tokens, other.tokens)
    step = ppo_step(minibatches=1, epochs=2)
    here, there = (step(state, rows, None, KEY)[0] for rows in (rollout, other))
    assert tiny.distance(here.policy.params, there.policy.params) < 1e-6
    assert tiny.distance(here.value.params, there.value.params) < 1e-6


def test_one_compilation_for_many_iterations():
    state, rollout = start()
    step = steps.compile_step(
        steps.make_ppo_step(tiny.LANGUAGE, tiny.SCALAR, BOTH, ppo_lib.PPO(minibatches=2))
    )
    for iteration in range(3):
        state, _ = step(
            state, rollout, tiny.lm_batch(8, iteration), jax.random.fold_in(KEY, iteration)
        )
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"minibatches": 6},
            "minibatches=6 must divide the rollout batch of 8: choose 1, 2, 4 or 8",
        ),
        (
            {"minibatches": 2, "microbatches": 3},
            "microbatches=3 must divide the batch of 4: choose 1, 2 or 4",
        ),
        ({"minibatches": 8}, "epochs \\* minibatches=8 must divide the pretraining batch of 12"),
        ({"epochs": 0}, "epochs=0 must be at least 1"),
    ],
)
def test_batches_that_do_not_divide_are_refused_with_the_choices(options, message):
    state, rollout = start()
    with pytest.raises(ValueError, match=message):
        ppo_step(**options)(state, rollout, tiny.lm_batch(12), KEY)


# ------------------------------------------------------------------------------------------- micro-batches


def test_microbatches_give_the_gradient_of_the_whole_ragged_batch():
    params, batch = tiny.LANGUAGE.init(KEY), tiny.lm_batch(8)
    loss_fn = steps._lm_loss_fn(
        tiny.LANGUAGE, bind_arguments(sft_loss, ppo_lib.LM_ARGUMENTS, name="loss")
    )
    accumulate = jax.jit(partial(update.accumulate_grads, loss_fn), static_argnums=2)
    whole, loss, _ = accumulate(params, (batch, None), 1)
    for microbatches in (2, 8):
        grads, split_loss, _ = accumulate(params, (batch, None), microbatches)
        assert tiny.distance(grads, whole) < 1e-6
        np.testing.assert_allclose(split_loss.value, loss.value, rtol=1e-6)
    # The mean of micro-batch means is another gradient: the rows are ragged enough to tell.
    means = [
        accumulate(params, (jax.tree.map(lambda x, i=i: x[i : i + 1], batch), None), 1)[0]
        for i in range(8)
    ]
    assert tiny.distance(jax.tree.map(lambda *g: sum(g) / 8, *means), whole) > 1e-2


def test_microbatches_do_not_change_a_ppo_step():
    state, rollout = start()
    lm_batch = tiny.lm_batch(16)
    plain, metrics = ppo_step(minibatches=1)(state, rollout, lm_batch, KEY)
    split, split_metrics = ppo_step(minibatches=1, microbatches=8, ptx_microbatches=4)(
        state, rollout, lm_batch, KEY
    )
    assert tiny.distance(split.policy.params, plain.policy.params) < 1e-6
    assert tiny.distance(split.value.params, plain.value.params) < 1e-6
    for name, metric in metrics.items():
        np.testing.assert_allclose(
            split_metrics[name].value, metric.value, rtol=1e-4, atol=1e-6, err_msg=name
        )


def test_microbatches_are_split_strided_so_that_rows_stay_on_their_device():
    mesh = sharding.make_mesh((8, 1, 1))
    x = jax.device_put(jnp.arange(32.0).reshape(32, 1), sharding.batch_sharding(mesh))
    split = jax.jit(lambda x: ops.split_rows(x, 4, "microbatches", "batch"))
    np.testing.assert_array_equal(split(x)[1, :, 0], np.arange(1, 32, 4))
    program = split.lower(x).compile().as_text()
    assert not any(
        word in program for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce")
    )
    contiguous = jax.jit(
        lambda x: x.reshape(4, 8, 1) * 1.0,
        out_shardings=NamedSharding(mesh, PartitionSpec(None, "data")),
    )
    program = contiguous.lower(x).compile().as_text()
    assert any(word in program for word in ("all-gather", "all-to-all", "collective-permute"))


def test_a_batch_without_targets_changes_nothing_and_is_not_nan():
    batch = tiny.lm_batch(4)
    batch = dataclasses.replace(batch, mask=jnp.zeros_like(batch.mask))
    state = steps.train_state(tiny.LANGUAGE.init(KEY), SGD)
    new, metrics = jax.jit(steps.make_sft_step(tiny.LANGUAGE, SGD))(state, batch, None)
    assert value_of(metrics, "sft/loss") == 0
    assert value_of(metrics, "skipped") == 0
    tiny.assert_bit_equal(new.params, state.params)


def test_only_targets_have_a_say_in_the_sft_loss():
    """PITFALL 44: prompt tokens are no targets, the first response token is one; checked by hand from logits."""
    params, batch = tiny.LANGUAGE.init(KEY), tiny.lm_batch(3)
    prompt = jnp.array([[1], [2], [1]])
    batch = dataclasses.replace(batch, mask=batch.mask & (batch.positions >= prompt))
    state = steps.train_state(params, SGD)
    _, metrics = jax.jit(steps.make_sft_step(tiny.LANGUAGE, SGD))(state, batch, None)
    hidden = tiny.LANGUAGE.apply(
        params, batch.tokens, segments=batch.segments, positions=batch.positions
    ).hidden
    logp = np.asarray(jax.nn.log_softmax(tiny.LANGUAGE.head(params, hidden)))
    tokens, lengths = np.asarray(batch.tokens), np.asarray(batch.segments.sum(axis=1))
    spots = [(b, t) for b in range(3) for t in range(int(prompt[b, 0]), lengths[b])]
    assert float(metrics["sft/loss"].count) == len(spots)
    expected = -np.mean([logp[b, t - 1, tokens[b, t]] for b, t in spots])
    assert value_of(metrics, "sft/loss") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("power", [1, 2])
def test_sft_gradient_is_that_of_the_loss_linear_in_the_log_probs_or_not(power):
    """The head's gradient is taken before the loss is computed where that is sound, and only there."""

    def loss(logp, mask):
        return Mean(jnp.sum(jnp.where(mask, (-logp) ** power, 0)), jnp.sum(mask, dtype=jnp.float32))

    batch, params = tiny.lm_batch(4), tiny.LANGUAGE.init(KEY)

    def plain(params):
        logp = scoring.lm_log_probs(tiny.LANGUAGE, params, batch)
        return loss(logp, batch.mask).value

    state = steps.train_state(params, SGD)
    moved, _ = jax.jit(steps.make_sft_step(tiny.LANGUAGE, SGD, loss=loss))(state, batch, None)
    expected = jax.tree.map(lambda p, g: p - g, params, jax.jit(jax.grad(plain))(params))
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-6), moved.params, expected)


def test_dropout_acts_in_sft_only_where_a_key_is_given():
    state, batch = steps.train_state(tiny.LANGUAGE.init(KEY), SGD), tiny.lm_batch(8)
    step = jax.jit(steps.make_sft_step(tiny.LANGUAGE, SGD, microbatches=2))
    dry = step(state, batch, None)[0]
    wet, again, other = (step(state, batch, jax.random.fold_in(KEY, i))[0] for i in (0, 0, 1))
    tiny.assert_bit_equal(wet, again)
    assert tiny.distance(wet.params, dry.params) > 1e-3
    assert tiny.distance(wet.params, other.params) > 1e-3


# ------------------------------------------------------------------------------------------- ratios, clipping


def test_ratio_is_one_at_the_first_minibatch_and_not_at_the_second():
    state, rollout = start(optax.sgd(0.1))
    _, first = ppo_step(optax.sgd(0.1), minibatches=1, epochs=1)(state, rollout, None, KEY)
    assert value_of(first, "policy/log_ratio_max") < 1e-5
    assert value_of(first, "policy/clip_fraction") == 0
    _, second = ppo_step(optax.sgd(0.1), minibatches=1, epochs=2)(state, rollout, None, KEY)
    assert value_of(second, "policy/log_ratio_max") > 1e-3


def test_ratio_is_one_with_dropout_in_the_model():
    """PITFALL 2: the update never turns dropout on, and two forwards of the same batch are bit-equal."""
    model = language_model(DecoderConfig(tiny.VOCABULARY, 16, 1, 8, 2, dropout=0.5))
    params = model.init(KEY)
    rollout = tiny.rollout(8, tiny.LANGUAGE.init(KEY))
    score = jax.jit(partial(scoring.sequence_log_probs, model))
    old = score(params, rollout.tokens, rollout.lengths, rollout.mask)
    tiny.assert_bit_equal(old, score(params, rollout.tokens, rollout.lengths, rollout.mask))
    state = dataclasses.replace(tiny.ppo_state(SGD, SGD), policy=steps.train_state(params, SGD))
    step = jax.jit(steps.make_ppo_step(model, tiny.SCALAR, BOTH, ppo_lib.PPO(minibatches=1)))
    _, metrics = step(state, dataclasses.replace(rollout, old_logp=old), None, KEY)
    assert value_of(metrics, "policy/log_ratio_max") < 1e-5


def test_temperature_of_the_sampler_is_used_in_the_update():
    state, _ = start()
    rollout = tiny.rollout(8, state.policy.params, temperature=0.5)
    _, cold = ppo_step(minibatches=1, temperature=0.5)(state, rollout, None, KEY)
    _, wrong = ppo_step(minibatches=1)(state, rollout, None, KEY)
    assert value_of(cold, "policy/log_ratio_max") < 1e-5
    assert value_of(wrong, "policy/log_ratio_max") > 0.1
    assert value_of(cold, "value/loss") == pytest.approx(value_of(wrong, "value/loss"), rel=1e-6)


def test_norm_is_logged_before_clipping_and_clipping_bounds_the_update():
    huge = lambda logp, mask: Mean(-1e6 * jnp.sum(jnp.where(mask, logp, 0)), jnp.sum(mask))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    state = steps.train_state(tiny.LANGUAGE.init(KEY), tx)
    new, metrics = jax.jit(steps.make_sft_step(tiny.LANGUAGE, tx, loss=huge))(
        state, tiny.lm_batch(8), None
    )
    update = jax.tree.map(jnp.subtract, new.params, state.params)
    assert float(optax.tree.norm(update)) == pytest.approx(1.0, rel=1e-3)
    assert value_of(metrics, "sft/grad_norm") > 1e4


# ------------------------------------------------------------------------------------------- two networks


def test_value_network_learns_from_the_value_loss_only():
    """PITFALL 26: with a value loss of 0 it keeps every bit, whatever the policy loss and the pretraining."""
    state, rollout = start()
    nothing = lambda values, mask: Mean(0.0 * jnp.sum(values), jnp.sum(mask))
    new, _ = ppo_step(minibatches=2, value_loss=nothing)(state, rollout, tiny.lm_batch(8), KEY)
    tiny.assert_bit_equal(new.value.params, state.value.params)
    assert tiny.distance(new.policy.params, state.policy.params) > 0


def test_value_network_receives_no_pretraining_gradient():
    state, rollout = start()
    step = ppo_step(minibatches=2)
    with_ptx, _ = step(state, rollout, tiny.lm_batch(8), KEY)
    without, _ = step(state, rollout, None, KEY)
    # Not bit for bit: these are two compiled programs.
    assert tiny.distance(with_ptx.value.params, without.value.params) < 1e-6
    assert tiny.distance(with_ptx.policy.params, without.policy.params) > 1e-2


def test_reference_is_neither_moved_nor_donated():
    reference = tiny.LANGUAGE.init(jax.random.key(1))
    kept = jax.tree.map(np.array, reference)
    tx = optim.adam(1e-2)
    state = tiny.ppo_state(tx, tx)
    state = dataclasses.replace(state, policy=steps.train_state(reference, tx, ema=True))
    rollout = tiny.rollout(8, reference)
    where = (rollout.tokens, rollout.lengths, rollout.mask)
    score = jax.jit(partial(scoring.sequence_log_probs, tiny.LANGUAGE))
    tiny.assert_bit_equal(score(state.policy.params, *where), score(reference, *where))
    step = steps.compile_step(
        steps.make_ppo_step(
            tiny.LANGUAGE, tiny.SCALAR, ppo_lib.Optimizers(tx, tx), ppo_lib.PPO(minibatches=4)
        )
    )
    for iteration in range(3):
        state, _ = step(state, rollout, None, jax.random.fold_in(KEY, iteration))
    tiny.assert_bit_equal(reference, kept)
    assert np.max(np.abs(score(state.policy.params, *where) - score(reference, *where))) > 1e-3


def test_compiled_step_donates_its_state():
    state, rollout = start()
    step = steps.compile_step(
        steps.make_ppo_step(tiny.LANGUAGE, tiny.SCALAR, BOTH, ppo_lib.PPO(minibatches=2))
    )
    step(state, rollout, None, KEY)
    assert state.policy.params["embed"].is_deleted()
    state, rollout = start()
    step = steps.compile_step(
        steps.make_ppo_step(tiny.LANGUAGE, tiny.SCALAR, BOTH, ppo_lib.PPO(minibatches=2)),
        donate=False,
    )
    step(state, rollout, None, KEY)
    assert not state.policy.params["embed"].is_deleted()


# ------------------------------------------------------------------------------------------- PPO-ptx


@jax.jit
def _gradients(state, rollout, lm_batch):
    whitened = dataclasses.replace(
        rollout, advantages=steps.ops.whiten(rollout.advantages, rollout.mask)
    )
    policy_fn = steps._policy_loss_fn(
        tiny.LANGUAGE,
        bind_arguments(ppo_policy_loss, ppo_lib.POLICY_ARGUMENTS, name="policy_loss"),
        1.0,
    )
    lm_fn = steps._lm_loss_fn(
        tiny.LANGUAGE, bind_arguments(sft_loss, ppo_lib.LM_ARGUMENTS, name="loss")
    )
    ppo = update.accumulate_grads(policy_fn, state.policy.params, whitened)[0]
    return ppo, update.accumulate_grads(lm_fn, state.policy.params, (lm_batch, None))[0]


def test_ptx_and_ppo_gradients_add_up_in_one_optimizer_step():
    state, rollout = start()
    lm_batch = tiny.lm_batch(16)
    ppo, ptx = _gradients(state, rollout, lm_batch)
    new, metrics = ppo_step(minibatches=1, ptx_coef=3.0)(state, rollout, lm_batch, KEY)
    expected = jax.tree.map(lambda p, a, b: p - (a + 3.0 * b), state.policy.params, ppo, ptx)
    assert int(new.policy.step) == 1
    assert tiny.distance(new.policy.params, expected) < 1e-6
    assert value_of(metrics, "policy/grad_norm") == pytest.approx(
        float(optax.tree.norm(ppo)), rel=1e-5
    )
    assert value_of(metrics, "ptx/grad_norm") == pytest.approx(
        float(optax.tree.norm(ptx)), rel=1e-5
    )
    cosine = optax.tree.vdot(ppo, ptx) / (optax.tree.norm(ppo) * optax.tree.norm(ptx))
    assert value_of(metrics, "ptx/cosine") == pytest.approx(float(cosine), abs=1e-5)


def test_ptx_gradient_is_that_of_the_summed_loss():
    """RECIPE 58: one loss ``ppo + gamma * ptx`` has the gradient that the two passes accumulate."""
    state, rollout = start()
    lm_batch = tiny.lm_batch(16)
    whitened = dataclasses.replace(
        rollout, advantages=steps.ops.whiten(rollout.advantages, rollout.mask)
    )

    def summed(params):
        logp = scoring.sequence_log_probs(
            tiny.LANGUAGE, params, whitened.tokens, whitened.lengths, whitened.mask
        )
        ppo, _ = ppo_policy_loss(logp, whitened.old_logp, whitened.advantages, whitened.mask)
        ptx, _ = sft_loss(scoring.lm_log_probs(tiny.LANGUAGE, params, lm_batch), lm_batch.mask)
        return ppo.value + 27.8 * ptx.value

    new, _ = ppo_step(minibatches=1)(state, rollout, lm_batch, KEY)
    expected = jax.tree.map(
        jnp.subtract, state.policy.params, jax.jit(jax.grad(summed))(state.policy.params)
    )
    assert tiny.distance(new.policy.params, expected) < 1e-6


def test_ptx_coef_zero_is_plain_ppo_bit_for_bit():
    """The unused text is dropped before anything is compiled: it is the same program."""
    tx = optim.adam(1e-2)
    state, rollout = start(tx, tx)
    plain, _ = ppo_step(tx, tx, minibatches=4)(state, rollout, None, KEY)
    zero, metrics = ppo_step(tx, tx, minibatches=4, ptx_coef=0)(
        state, rollout, tiny.lm_batch(16), KEY
    )
    tiny.assert_bit_equal(zero, plain)
    assert "ptx/loss" not in metrics


def test_pretraining_rows_are_spread_over_the_optimizer_steps():
    state, rollout = start(optax.sgd(0.0))
    batch = tiny.lm_batch(16)
    _, metrics = ppo_step(optax.sgd(0.0), minibatches=4, epochs=2)(state, rollout, batch, KEY)
    assert float(metrics["ptx/loss"].count) == int(batch.mask.sum())
    logp = scoring.lm_log_probs(tiny.LANGUAGE, state.policy.params, batch)
    assert value_of(metrics, "ptx/loss") == pytest.approx(
        float(sft_loss(logp, batch.mask)[0].value), rel=1e-5
    )


def test_a_large_pretraining_term_can_be_clipped_alone():
    state, rollout = start()
    lm_batch = tiny.lm_batch(16)
    ppo, ptx = _gradients(state, rollout, lm_batch)
    new, metrics = ppo_step(minibatches=1, ptx_coef=1e3, ptx_clip_norm=0.5)(
        state, rollout, lm_batch, KEY
    )
    scale = 0.5 / float(optax.tree.norm(ptx))
    expected = jax.tree.map(lambda p, a, b: p - (a + scale * b), state.policy.params, ppo, ptx)
    assert tiny.distance(new.policy.params, expected) < 1e-6
    assert value_of(metrics, "ptx/grad_norm") == pytest.approx(
        float(optax.tree.norm(ptx)), rel=1e-5
    )
    clipped, _ = ppo_step(minibatches=1, ppo_clip_norm=0.01)(state, rollout, None, KEY)
    update = jax.tree.map(jnp.subtract, clipped.policy.params, state.policy.params)
    assert float(optax.tree.norm(update)) == pytest.approx(0.01, rel=1e-3)


# ------------------------------------------------------------------------------------------- EMA and guard


def test_ema_is_updated_once_an_optimizer_step_in_float32():
    state, rollout = start(optax.sgd(0.5))
    path = [state.policy.params]
    current = state
    order = steps.minibatch_order(KEY, 8, epochs=1, minibatches=4)
    whitened = dataclasses.replace(
        rollout, advantages=steps.ops.whiten(rollout.advantages, rollout.mask)
    )
    one = ppo_step(optax.sgd(0.5), minibatches=1, whiten_advantages=False)
    for index in order:
        current, _ = one(current, tiny.take(whitened, index), None, KEY)
        path.append(current.policy.params)
    closed = jax.tree.map(
        lambda *p: 0.9**4 * p[0] + 0.1 * sum(0.9 ** (4 - i) * p[i] for i in range(1, 5)), *path
    )
    step = ppo_step(optax.sgd(0.5), minibatches=4, microbatches=2, ema_decay=0.9)
    new, _ = step(state, rollout, None, KEY)
    assert tiny.distance(new.policy.params, path[-1]) < 1e-5
    assert tiny.distance(new.policy.ema, closed) < 1e-5
    assert {leaf.dtype for leaf in jax.tree.leaves(new.policy.ema)} == {jnp.dtype("float32")}


def test_ema_of_bfloat16_weights_is_float32():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.LANGUAGE.init(KEY))
    state = steps.train_state(params, SGD, ema=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.ema)} == {jnp.dtype("float32")}


def test_a_bad_minibatch_leaves_policy_and_value_as_they_were():
    """PITFALL J10: one NaN return among 8 rows costs one of 4 minibatches, for both networks."""
    tx = optim.adam(1e-2)
    state, rollout = start(tx, tx)
    spot = int(rollout.prompt_lengths[3])
    rollout = dataclasses.replace(rollout, returns=rollout.returns.at[3, spot].set(jnp.nan))
    new, metrics = ppo_step(tx, tx, minibatches=4)(state, rollout, None, KEY)
    assert float(metrics["skipped"].total) == 1
    assert int(new.policy.step) == int(new.value.step) == 3
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((new.policy, new.value)))
    one = ppo_step(tx, tx, minibatches=1)
    for _ in range(5):  # never gives in
        state_after, metrics = one(state, rollout, None, KEY)
        tiny.assert_bit_equal((state_after.policy, state_after.value), (state.policy, state.value))
        assert float(metrics["skipped"].total) == 1


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_non_finite_supervised_step_is_skipped_and_counted(bad):
    tx = optim.adam(1e-2)
    state = steps.train_state(tiny.LANGUAGE.init(KEY), tx)
    broken = lambda logp, mask: Mean(bad * jnp.sum(jnp.where(mask, logp, 0)), jnp.sum(mask))
    new, metrics = jax.jit(steps.make_sft_step(tiny.LANGUAGE, tx, loss=broken))(
        state, tiny.lm_batch(8), None
    )
    tiny.assert_bit_equal(new, state)
    assert value_of(metrics, "skipped") == 1


def test_a_spike_above_the_limit_is_skipped():
    state = steps.train_state(tiny.LANGUAGE.init(KEY), SGD)
    free, metrics = jax.jit(steps.make_sft_step(tiny.LANGUAGE, SGD))(state, tiny.lm_batch(8), None)
    norm = value_of(metrics, "sft/grad_norm")
    for limit, moved in ((1.01 * norm, True), (0.99 * norm, False)):
        new, metrics = jax.jit(steps.make_sft_step(tiny.LANGUAGE, SGD, spike_limit=limit))(
            state, tiny.lm_batch(8), None
        )
        if moved:  # a program with one more comparison: equal up to rounding
            assert tiny.distance(new.params, free.params) < 1e-6
        else:
            tiny.assert_bit_equal(new, state)
        assert value_of(metrics, "skipped") == (not moved)


FLAGGED = 100
"""Added to the segments of a batch that the loss below is to spoil."""


def _spoilt(kind: str):
    """A loss that is sound but for batches that are flagged: NaN, infinite gradient of a finite loss, or a spike."""

    def loss(logp, mask, segments):
        flagged, total = jnp.max(segments) > FLAGGED, -jnp.sum(jnp.where(mask, logp, 0))
        if kind == "loss":
            total = total * jnp.where(flagged, jnp.nan, 1.0)
        elif kind == "gradient":
            difference = jnp.where(flagged, total - jax.lax.stop_gradient(total), 1.0)
            total = total + jnp.where(flagged, jnp.sqrt(difference), 0.0)
        else:
            total = total * jnp.where(flagged, 1e3, 1.0)
        return Mean(total, jnp.sum(mask, dtype=jnp.float32))

    return loss


def _flagged(batch: LMBatch) -> LMBatch:
    return dataclasses.replace(
        batch, segments=jnp.where(batch.segments > 0, batch.segments + FLAGGED, 0)
    )


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_bad_step_k_leaves_a_run_as_if_it_had_never_been(kind):
    """Weights, moments, counters, average and window: only the step's own place in the data is used up."""
    tx = optim.adam(1e-2)
    step = jax.jit(steps.make_sft_step(tiny.LANGUAGE, tx, loss=_spoilt(kind), spike_std=20.0))
    batches = [tiny.lm_batch(8, seed) for seed in range(5)]

    def run(batches):
        state, skipped = steps.train_state(tiny.LANGUAGE.init(KEY), tx, guard=True), []
        for batch in batches:
            state, metrics = step(state, batch, None)
            skipped.append(value_of(metrics, "skipped"))
        return state, skipped

    with_bad, skipped = run([*batches[:2], _flagged(batches[2]), *batches[3:]])
    without, _ = run([*batches[:2], *batches[3:]])
    assert skipped == [0, 0, 1, 0, 0]
    tiny.assert_bit_equal(with_bad, without)
    assert int(with_bad.guard.count) == int(with_bad.step) == 4


def test_a_spike_is_skipped_and_told_from_a_number_that_is_not_finite():
    state = steps.train_state(tiny.LANGUAGE.init(KEY), SGD, guard=True)
    state = dataclasses.replace(state, params=jax.tree.map(lambda x: 0.1 * x, state.params))
    step = jax.jit(
        steps.make_sft_step(tiny.LANGUAGE, optim.adam(1e-4), loss=_spoilt("spike"), spike_std=6.0)
    )
    state = dataclasses.replace(state, opt_state=optim.adam(1e-4).init(state.params))
    for i in range(64):
        state, metrics = step(state, tiny.lm_batch(8, i), None)
        assert value_of(metrics, "skipped") == 0
    after, metrics = step(state, _flagged(tiny.lm_batch(8, 64)), None)
    tiny.assert_bit_equal(after, state)
    assert value_of(metrics, "skipped") == value_of(metrics, "spiked") == 1
    _, metrics = step(state, tiny.lm_batch(8, 64), None)
    assert value_of(metrics, "skipped") == 0


def test_the_spike_rule_needs_a_window_in_the_state():
    step = steps.make_sft_step(tiny.LANGUAGE, SGD, spike_std=6.0)
    with pytest.raises(ValueError, match=r"spike_std=6.0 needs a window.*guard=True"):
        step(steps.train_state(tiny.LANGUAGE.init(KEY), SGD), tiny.lm_batch(8), None)


def test_ppo_tells_which_minibatch_was_left_out_and_watches_rewards():
    """The reward of one row spikes; its minibatch alone is skipped, for both networks."""
    tx = optim.adam(1e-3)
    state, rollout = start(tx, tx)
    window = jnp.tile(jnp.array([[1e3, 1e3, 1.0]]), (128, 1)) * jnp.linspace(0.9, 1.1, 128)[:, None]
    guard = dataclasses.replace(guards.guard_state(), window=window, count=jnp.int32(128))
    state = dataclasses.replace(
        state, policy=dataclasses.replace(state.policy, guard=guard),
        value=dataclasses.replace(state.value, guard=guard),
    )  # fmt: skip
    rewards = jnp.where(rollout.mask, 1.0, 0.0)
    spot = int(rollout.prompt_lengths[3])
    rollout = dataclasses.replace(rollout, rewards=rewards.at[3, spot].set(50.0))
    new, metrics = ppo_step(tx, tx, minibatches=4, spike_std=20.0)(state, rollout, None, KEY)
    order = np.asarray(steps.minibatch_order(KEY, len(rollout.ids), epochs=1, minibatches=4))
    expected = [float(3 in rows) for rows in order]
    assert np.asarray(metrics["skipped_steps"].value).tolist() == expected
    assert float(metrics["spiked"].total) == float(metrics["skipped"].total) == 1
    assert int(new.policy.step) == int(new.value.step) == 3
    assert int(new.policy.guard.count) == int(new.value.guard.count) == 131


# ------------------------------------------------------------------------------------------- losses by name


def test_a_loss_gets_what_it_names_and_nothing_else():
    seen = {}

    def loss(logp, mask, ref_logp, entropy, score, *, beta=0.5):
        seen.update(
            logp=logp.shape,
            ref_logp=ref_logp.shape,
            entropy=entropy.shape,
            score=score.shape,
            beta=beta,
        )
        total = jnp.sum(jnp.where(mask, beta * (logp - ref_logp) - 0.01 * entropy, 0))
        return Mean(total, jnp.sum(mask)), {"mine": Mean(total, jnp.sum(mask))}

    state, rollout = start()
    _, metrics = ppo_step(minibatches=2, policy_loss=partial(loss, beta=0.25))(
        state, rollout, None, KEY
    )
    shape = (4, tiny.SLOTS)
    assert seen == {"logp": shape, "ref_logp": shape, "entropy": shape, "score": (4,), "beta": 0.25}
    assert "policy/mine" in metrics
    # Entropy of the policy that entered the step, first of two minibatches with lr 1: within log V.
    assert 0 < value_of(metrics, "policy/entropy") <= np.log(tiny.VOCABULARY)


def test_entropy_is_computed_only_for_a_loss_that_names_it(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("entropy was computed")

    monkeypatch.setattr(scoring, "sequence_log_probs_and_entropy", refuse)
    state, rollout = start()
    _, metrics = ppo_step(minibatches=1)(state, rollout, None, KEY)
    assert "policy/entropy" not in metrics


@pytest.mark.parametrize(
    ("make", "name", "listed"),
    [
        (lambda loss: steps.make_sft_step(tiny.LANGUAGE, SGD, loss=loss), "loss", "logp"),
        (
            lambda loss: steps.make_reward_step(tiny.SCALAR, SGD, loss=loss),
            "loss",
            "rewards, ranks",
        ),
        (
            lambda loss: ppo_step(policy_loss=loss),
            "policy_loss",
            "logp, entropy, tokens, mask, old_logp, ref_logp",
        ),
        (lambda loss: ppo_step(value_loss=loss), "value_loss", "values, tokens, mask"),
        (lambda loss: ppo_step(ptx_loss=loss), "ptx_loss", "logp, tokens"),
    ],
)
def test_a_loss_that_asks_for_something_unknown_is_told_what_there_is(make, name, listed):
    def my_loss(log_probabilities):
        return Mean(log_probabilities, log_probabilities)

    with pytest.raises(ValueError, match=f"{name}=my_loss asks for 'log_probabilities'.*{listed}"):
        make(my_loss)


# ------------------------------------------------------------------------------------------- reward model


def _ranking_batch(groups: int, k: int, seed: int = 0) -> RankingBatch:
    """Rows with a prompt of 2 tokens and K responses of 2 tokens that share it."""
    random = np.random.default_rng(seed)
    response = np.repeat(np.arange(1, k + 1), 2)
    segments = np.concatenate([[1, 1], response + 1])
    parents = np.where(segments > 1, 1, 0)
    positions = np.concatenate([[0, 1], np.tile([2, 3], k)])
    rows = lambda x: jnp.asarray(np.tile(x, (groups, 1)), jnp.int32)
    ends = np.tile((3 + 2 * np.arange(k)).reshape(1, 1, k), (groups, 1, 1))
    ranks = np.stack([random.permutation(k) for _ in range(groups)]).reshape(groups, 1, k)
    tokens = jnp.asarray(random.integers(0, tiny.VOCABULARY, (groups, 2 + 2 * k)), jnp.int32)
    return RankingBatch(
        tokens,
        rows(segments),
        rows(parents),
        rows(positions),
        jnp.asarray(ends, jnp.int32),
        jnp.asarray(ranks, jnp.int32),
    )


REWARD_MODEL = scalar_model(DecoderConfig(tiny.VOCABULARY, 8, 1, 8, 2))


def test_shared_prefix_scores_equal_separate_rows():
    params, batch = REWARD_MODEL.init(KEY), _ranking_batch(2, 3)
    scores = jax.jit(partial(scoring.ranking_scores, REWARD_MODEL))(params, batch)
    alone_of = jax.jit(partial(scoring.sequence_values, REWARD_MODEL))
    for b in range(2):
        for k in range(3):
            end = int(batch.ends[b, 0, k])
            row = jnp.concatenate([batch.tokens[b, :2], batch.tokens[b, end - 1 : end + 1]])[None]
            _, alone = alone_of(params, row, jnp.array([4], jnp.int32))
            np.testing.assert_allclose(scores[b, 0, k], alone[0], atol=1e-5)


def test_reward_step_learns_the_ranking_in_one_forward_a_row():
    tx = optim.adam(3e-2)
    state, batch = steps.train_state(REWARD_MODEL.init(KEY), tx), _ranking_batch(4, 4)
    calls = []
    counting = REWARD_MODEL._replace(
        apply=lambda *a, **kw: calls.append(a[1].shape) or REWARD_MODEL.apply(*a, **kw)
    )
    step = steps.compile_step(steps.make_reward_step(counting, tx))
    state, first = step(state, batch, KEY)
    for _ in range(40):
        state, last = step(state, batch, KEY)
    assert set(calls) == {
        batch.tokens.shape
    }  # PITFALL 45: K responses in one row, never K (K - 1) forwards
    assert value_of(last, "reward/loss") < 0.5 * value_of(first, "reward/loss")
    assert value_of(last, "reward/accuracy") > 0.9
    assert int(state.step) == 41


def test_absent_responses_have_neither_score_nor_gradient():
    params, batch = REWARD_MODEL.init(KEY), _ranking_batch(2, 3)
    absent = dataclasses.replace(
        batch, ranks=batch.ranks.at[:, :, 2].set(-1), ends=batch.ends.at[:, :, 2].set(0)
    )
    poisoned = dataclasses.replace(absent, ends=absent.ends.at[:, :, 2].set(1))

    @jax.jit  # with the batch as an argument both are runs of one program
    def gradient(params, batch):
        loss = lambda p: (
            ranking_loss(scoring.ranking_scores(REWARD_MODEL, p, batch), batch.ranks)[0].value
        )
        return jax.grad(loss)(params)

    tiny.assert_bit_equal(gradient(params, absent), gradient(params, poisoned))
    assert not np.any(scoring.ranking_scores(REWARD_MODEL, params, absent)[:, :, 2])


# ------------------------------------------------------------------------------------------- devices, resume


def test_whitening_over_eight_devices_equals_one():
    rollout = tiny.rollout(16, tiny.LANGUAGE.init(KEY))
    placed = sharding.place_batch(jax.tree.map(np.asarray, rollout), sharding.make_mesh((8, 1, 1)))
    whiten = jax.jit(steps.ops.whiten)
    np.testing.assert_allclose(
        whiten(placed.advantages, placed.mask),
        whiten(rollout.advantages, rollout.mask),
        rtol=2e-5,
        atol=2e-5,
    )


def test_data_parallel_step_equals_a_pmap_reference():
    batch, params = tiny.lm_batch(16), tiny.LANGUAGE.init(KEY)

    def reference(params, batch: LMBatch):
        def total(params):
            loss, _ = sft_loss(scoring.lm_log_probs(tiny.LANGUAGE, params, batch), batch.mask)
            return loss.total, loss.count

        grads, count = jax.grad(total, has_aux=True)(params)
        grads, count = jax.lax.psum((grads, count), "devices")
        return jax.tree.map(lambda p, g: p - g / count, params, grads)

    pieces = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), batch)
    expected = jax.pmap(reference, axis_name="devices", in_axes=(None, 0))(params, pieces)

    mesh = sharding.make_mesh((8, 1, 1))
    state = jax.device_put(steps.train_state(params, SGD), sharding.replicated(mesh))
    step = steps.compile_step(steps.make_sft_step(tiny.LANGUAGE, SGD))
    new, _ = step(state, sharding.place_batch(jax.tree.map(np.asarray, batch), mesh), None)
    for i in (0, 7):
        assert tiny.distance(new.params, jax.tree.map(lambda x, i=i: x[i], expected)) < 1e-6


def test_resume_is_bit_exact_with_keys_from_the_step_number():
    """Ingredients of PITFALL 49: everything that a run carries is in the state, and nothing random is."""
    tx = optim.adam(optim.warmup_then_constant(1e-2, 8))
    step = ppo_step(tx, tx, minibatches=2)

    def run(state, iterations):
        for i in iterations:
            rollout = tiny.rollout(8, tiny.LANGUAGE.init(KEY), seed=i)
            state, _ = step(state, rollout, tiny.lm_batch(8, seed=i), jax.random.fold_in(KEY, i))
        return state

    whole = run(tiny.ppo_state(tx, tx), range(4))
    half = jax.tree.map(np.asarray, run(tiny.ppo_state(tx, tx), range(2)))
    tiny.assert_bit_equal(run(jax.tree.map(jnp.asarray, half), range(2, 4)), whole)
    assert int(whole.iteration) == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0), ("minibatches", 0), ("microbatches", -1), ("ptx_microbatches", 0), ("ema_decay", 1.5),
        ("temperature", 0.0), ("ppo_clip_norm", 0.0), ("spike_std", -1.0), ("max_new_tokens", 0),
    ],
)  # fmt: skip
def test_numbers_that_no_update_can_have_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field}={value} must be"):
        ppo_lib.PPO(**{field: value})
