"""Schedules at their ends, Adam in both forms against numpy, averages, and the guard (PITFALLS 23, 37, 38, 48, J10)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import guard as guards
from rlhf_jax import optim, scoring, sharding, steps
from rlhf_jax.models import DecoderConfig, language_model
from rlhf_jax.run import checkpoint
from rlhf_jax.types import LMBatch


def _numpy_adam(grads, *, lr, b1, b2, eps, tf_form):
    theta, m, v = 0.0, 0.0, 0.0
    path = []
    for t, g in enumerate(grads, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        if tf_form:
            theta -= lr * np.sqrt(1 - b2**t) / (1 - b1**t) * m / (np.sqrt(v) + eps)
        else:
            theta -= lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        path.append(theta)
    return path


def _path(tx, grads):
    params, path = {"w": jnp.float32(0.0)}, []
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update({"w": jnp.float32(g)}, state, params)
        params = optax.apply_updates(params, updates)
        path.append(float(params["w"]))
    return path


@pytest.mark.parametrize(("make", "tf_form"), [(optim.adam, False), (optim.tf_adam, True)])
@pytest.mark.parametrize(
    "scale", [1.0, 1e-5]
)  # gradients of the size of epsilon tell the two forms apart
def test_adam_epsilon_form_against_numpy(make, tf_form, scale):
    grads = scale * np.array([1.0, -0.5, 0.25, 2.0, -1.0])
    expected = _numpy_adam(grads, lr=0.1, b1=0.9, b2=0.95, eps=1e-5, tf_form=tf_form)
    np.testing.assert_allclose(_path(make(0.1, eps=1e-5), grads), expected, rtol=2e-5)
    if scale < 1:
        other = _numpy_adam(grads, lr=0.1, b1=0.9, b2=0.95, eps=1e-5, tf_form=not tf_form)
        assert abs(other[0] - expected[0]) > 0.01


def test_tf_adam_first_step_is_smaller_by_the_root_of_the_correction():
    # theta_1 = -lr * g / (|g| + eps / sqrt(1 - b2)) with g = eps: 1 / (1 + 1 / sqrt(0.05)) against 1 / 2.
    assert _path(optim.tf_adam(1.0, eps=1e-3), [1e-3])[0] == pytest.approx(
        -1 / (1 + 0.05**-0.5), rel=1e-4
    )
    assert _path(optim.adam(1.0, eps=1e-3), [1e-3])[0] == pytest.approx(-0.5, rel=1e-4)


def test_default_betas_are_the_papers():
    # After one step of g = 1 the moments are 1 - b1 and 1 - b2.
    tx = optim.adam(1.0)
    _, state = tx.update(
        {"w": jnp.float32(1.0)}, tx.init({"w": jnp.float32(0.0)}), {"w": jnp.float32(0.0)}
    )
    moments = optax.tree_utils.tree_get(state, "mu"), optax.tree_utils.tree_get(state, "nu")
    assert [round(float(x["w"]), 4) for x in moments] == [0.1, 0.05]


@pytest.mark.parametrize("make", [optim.adam, optim.tf_adam])
def test_clipping_bounds_what_reaches_the_moments(make):
    tx = make(1.0, clip_norm=1.0)
    params = {"a": jnp.zeros(3), "b": jnp.zeros(())}
    grads = {"a": jnp.full(3, 1e6), "b": jnp.float32(1e6)}
    _, state = tx.update(grads, tx.init(params), params)
    moments = optax.tree_utils.tree_get(state, "mu")
    assert float(optax.tree.norm(moments)) == pytest.approx(0.1, rel=1e-5)  # (1 - b1) * 1


def test_weight_decay_spares_biases_and_norm_scales():
    params = {"dense": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "norm": {"scale": jnp.ones(2)}}
    tx = optim.adam(0.1, weight_decay=0.5)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["dense"]["kernel"], -0.05, rtol=1e-6)
    assert not np.any(updates["dense"]["bias"])
    assert not np.any(updates["norm"]["scale"])


def test_schedule_endpoints():
    cosine = optim.cosine_to(9.65e-6, 6363)
    assert float(cosine(0)) == pytest.approx(9.65e-6)
    assert float(cosine(6363)) == pytest.approx(9.65e-7)
    warm = optim.warmup_then_constant(2e-6, 80)
    assert [float(warm(s)) for s in (0, 80, 4000)] == pytest.approx([2e-7, 2e-6, 2e-6])
    assert float(optim.warmup_then_constant(2e-6, 0)(0)) == pytest.approx(2e-6)
    line = optim.linear_to_zero(1e-5, 100)
    assert [float(line(s)) for s in (0, 50, 99, 100)] == pytest.approx([1e-5, 5e-6, 1e-7, 0.0])


@pytest.mark.parametrize("make", [optim.cosine_to, optim.linear_to_zero])
def test_schedule_without_steps_is_refused(make):
    with pytest.raises(ValueError, match="total_steps=0 must be at least 1"):
        make(1e-5, 0)
    with pytest.raises(ValueError, match="warmup_steps=-1"):
        optim.warmup_then_constant(1e-5, -1)


def test_last_learning_rate_is_the_one_that_was_used():
    tx = optim.adam(optim.linear_to_zero(1.0, 4), clip_norm=1.0)
    params = {"w": jnp.float32(0.0)}
    state, seen = tx.init(params), []
    for _ in range(4):
        _, state = tx.update({"w": jnp.float32(1.0)}, state, params)
        seen.append(float(optim.last_learning_rate(state)))
    assert seen == [1.0, 0.75, 0.5, 0.25]
    injected = optax.inject_hyperparams(optax.adam)(learning_rate=0.5)
    assert float(optim.last_learning_rate(injected.init(params))) == 0.5
    assert optim.last_learning_rate(optax.sgd(0.1).init(params)) is None


def test_ema_equals_its_closed_form_and_stays_float32():
    # 500 updates towards 1 from 0: 1 - 0.992^500 = 0.982. In bfloat16 the increments round away long before.
    ema = {"w": jnp.zeros((), jnp.float32)}
    params = {"w": jnp.ones((), jnp.bfloat16)}
    ema = jax.lax.fori_loop(0, 500, lambda _, e: optim.ema_update(e, params, decay=0.992), ema)
    assert ema["w"].dtype == jnp.float32
    assert float(ema["w"]) == pytest.approx(1 - 0.992**500, rel=1e-4)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_guard_never_gives_in_to_bad_steps(bad):
    tx = optim.adam(0.1)
    params = {"w": jnp.float32(1.0)}
    old = (params, tx.init(params))
    for _ in range(5):  # optax.apply_if_finite(..., 3) would apply the fourth
        updates, state = tx.update({"w": jnp.float32(bad)}, old[1], old[0])
        new = (optax.apply_updates(old[0], updates), state)
        sound = guards.is_sound(jnp.float32(0.0), norm=jnp.abs(jnp.float32(bad)))
        old = optim.keep_unless(sound, new, old)
    assert float(old[0]["w"]) == 1.0
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(old[1]))


OPTIMIZERS = {
    "adam": optim.adam(0.1, clip_norm=1.0, weight_decay=0.1),
    "adafactor": optim.adafactor(0.1),
    "a moment wider than its weight": optax.inject_hyperparams(optax.adam)(0.1),
    "a random key in the state": optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)),
}


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("sound", [True, False])
def test_a_step_behind_the_guard_is_a_select_of_old_and_new(tx, sound):
    params = {
        "kernel": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4),
        "bias": jnp.ones(4, jnp.bfloat16),
    }
    old = (params, tx.init(params))

    def step(state):
        grads = jax.tree.map(lambda p: 2 * p + 1, state[0])
        updates, opt_state = tx.update(grads, state[1], state[0])
        return optax.apply_updates(state[0], updates), opt_state

    got = jax.jit(lambda sound, old: optim.step_where(sound, step, old))(sound, old)
    expected = jax.jit(lambda sound, old: optim.keep_unless(sound, step(old), old))(sound, old)
    assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=1e-6)


def test_a_guarded_step_takes_no_second_copy_of_the_moments():
    tx = optim.adam(0.1, clip_norm=1.0, weight_decay=0.1)
    params = {"kernel": jnp.ones((256, 256))}
    state = (params, tx.init(params))

    def guarded(state, grads):
        def step(state):
            updates, opt_state = tx.update(grads, state[1], state[0])
            return optax.apply_updates(state[0], updates), opt_state

        return optim.step_where(jnp.isfinite(optax.tree.norm(grads)), step, state)

    compiled = jax.jit(guarded, donate_argnums=0).lower(state, params).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < params["kernel"].nbytes / 4


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_clipping_by_one_factor_is_clipping_by_global_norm(limit):
    grads = {"kernel": jnp.linspace(-3.0, 4.0, 12).reshape(3, 4), "bias": jnp.ones(4)}
    ours, theirs = optim._clip_by_global_norm(limit), optax.clip_by_global_norm(limit)
    got, _ = ours.update(grads, ours.init(grads))
    expected, _ = theirs.update(grads, theirs.init(grads))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), got, expected)


def test_guard_looks_at_losses_and_at_the_limit():
    one = jnp.float32(1.0)
    assert bool(guards.is_sound(one, one, norm=one))
    assert not bool(guards.is_sound(one, jnp.float32(jnp.nan), norm=one))
    assert bool(guards.is_sound(one, norm=jnp.float32(2.0), limit=2))
    assert not bool(guards.is_sound(one, norm=jnp.float32(2.1), limit=2))


# --------------------------------------------------------------------------------- lean optimizers and precision

SMALL = DecoderConfig(48, 16, 2, 128, 4, kv_heads=2, mlp_width=256, bias="qkv")
LEAN = {
    "adam": optim.adam,
    "adam_bf16": functools.partial(optim.adam, first_moment_dtype="bfloat16"),
    "adafactor": optim.adafactor,
}
RATE = optim.cosine_to(
    4e-3, 60
)  # as the paper's: without a decay a method without a first moment stays noisy


def _counting(seed: int) -> LMBatch:
    """Rows that count up by one, two or three: after two tokens the next one is certain."""
    noise = np.random.default_rng(seed)
    start, pace = noise.integers(0, 48, (16, 1)), noise.integers(1, 4, (16, 1))
    tokens = jnp.asarray((start + pace * np.arange(16)) % 48, jnp.int32)
    segments, positions = scoring.row_layout(jnp.full(16, 16, jnp.int32), 16)
    return LMBatch(tokens, segments, positions, positions > 1)


def _trained(config: DecoderConfig, tx: optax.GradientTransformation, count: int = 60):
    """The state after `count` steps, and the losses on the way."""
    model = language_model(config)
    state = steps.train_state(model.init(jax.random.key(0)), tx)
    step = steps.compile_step(steps.make_sft_step(model, tx))
    losses = []
    for place in range(count):
        state, metrics = step(state, _counting(place), None)
        losses.append(float(metrics["sft/loss"].value))
    return state, losses


def _bytes(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_bytes_of_each_optimizer_state():
    """8 a parameter for Adam, 6 with a bfloat16 first moment, rows and columns only for adafactor."""
    params = language_model(SMALL).init(jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    bytes_of = {name: _bytes(make(1e-3).init(params)) for name, make in LEAN.items()}
    counters = 4 + 8  # steps of the moments; steps and rate of the learning rate
    assert bytes_of["adam"] == 8 * count + counters
    assert bytes_of["adam_bf16"] == 6 * count + counters
    square, up = 128 + 128, 128 + 256
    per_layer = 2 * square + 3 * up  # query, out; gate, up, down
    # Key and value are 128 x 64, below 128: not factored; neither are biases, norms and the embedding of 48 x 128.
    whole = 2 * (2 * 128 * 64 + (128 + 64 + 64) + 2 * 128) + 128 + 48 * 128
    assert bytes_of["adafactor"] == 4 * (2 * per_layer + whole) + counters
    model = language_model(DecoderConfig(4096, 1024, 12, 1024, 16))
    large = jax.eval_shape(model.init, jax.random.key(0))
    state = jax.eval_shape(optim.adafactor(1e-3).init, large)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state, large)]
    assert sizes[0] < 0.01 * sizes[1]


@pytest.fixture(scope="module")
def adam_losses():
    return _trained(SMALL, optim.adam(RATE))[1]


@pytest.mark.parametrize("name", ["adam_bf16", "adafactor"])
def test_lean_optimizers_train_as_adam_does(name, adam_losses):
    """From ln 48 = 3.9 to 0.26 (adam_bf16) and 0.29 (adafactor) where Adam comes to 0.35."""
    losses = _trained(SMALL, LEAN[name](RATE, clip_norm=1.0))[1]
    assert losses[0] > 3.5
    assert np.mean(adam_losses[-5:]) < 0.5
    assert np.mean(losses[-5:]) < np.mean(adam_losses[-5:]) + 0.1


def test_adafactor_is_the_formula_of_its_docstring():
    noise = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(noise.normal(size=(2, 3, 4)), jnp.float32), "bias": jnp.ones(2)}
    tx = optim.adafactor(0.1, factor_from=3, clip_update=1.0)
    state = tx.init(params)
    row, column, full = np.zeros((2, 3)), np.zeros((2, 4)), np.zeros(2)
    for t in range(1, 4):
        grads = {"kernel": noise.normal(size=(2, 3, 4)), "bias": noise.normal(size=2)}
        updates, state = tx.update(
            jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads), state, params
        )
        decay = 1 - t**-0.8
        square = grads["kernel"] ** 2 + 1e-30
        row, column = (
            decay * row + (1 - decay) * square.mean(2),
            decay * column + (1 - decay) * square.mean(1),
        )
        full = decay * full + (1 - decay) * (grads["bias"] ** 2 + 1e-30)
        wanted = {
            "kernel": grads["kernel"]
            / np.sqrt(np.einsum("lr,lc->lrc", row / row.mean(1, keepdims=True), column)),
            "bias": grads["bias"] / np.sqrt(full),
        }
        for name, u in wanted.items():
            clipped = -0.1 * u / max(1, np.sqrt((u**2).mean()))
            np.testing.assert_allclose(updates[name], clipped, rtol=1e-4)


@pytest.mark.parametrize("name", ["adam_bf16", "adafactor"])
def test_lean_states_are_placed_by_the_rules_and_give_the_same_step(name):
    mesh, tx, model = (
        sharding.make_mesh((2, 2, 2)),
        LEAN[name](1e-2, clip_norm=1.0),
        language_model(SMALL),
    )
    state = steps.train_state(model.init(jax.random.key(0)), tx)
    shardings = sharding.tree_shardings(state, mesh)
    placed = sharding.place_state(state, mesh)
    kernels = [leaf for leaf in jax.tree.leaves(placed) if leaf.size >= 2 * 128 * 256]
    assert all(leaf.addressable_shards[0].data.size == leaf.size // 4 for leaf in kernels)
    step = steps.make_sft_step(model, tx)
    alone, _ = steps.compile_step(step)(state, _counting(0), None)
    batch = sharding.place_batch(jax.tree.map(np.asarray, _counting(0)), mesh)
    together, _ = steps.compile_step(step, state_sharding=shardings)(placed, batch, None)
    assert jax.tree.map(lambda x: x.sharding, together) == shardings
    # float32 in another order of summation; an update is at most 1e-2.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), alone.params, together.params
    )


@pytest.mark.parametrize("name", ["adam_bf16", "adafactor"])
def test_lean_states_survive_a_checkpoint_bit_for_bit(name, tmp_path):
    tx = LEAN[name](3e-3)
    state, _ = _trained(SMALL, tx, count=2)
    with checkpoint.Checkpoints(tmp_path) as saved:
        saved.save(2, state)
        restored, _ = saved.restore(2, jax.eval_shape(lambda: state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for one, two in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)


def test_bfloat16_compute_with_float32_masters_trains_as_float32_does(adam_losses):
    """Rematerialised blocks, one block per iteration of the scan; the parameters stay float32."""
    config = dataclasses.replace(SMALL, dtype="bfloat16", remat="block", unroll=1)
    state, losses = _trained(config, optim.adam(RATE))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert losses[0] == pytest.approx(adam_losses[0], abs=0.02)
    assert np.mean(losses[-5:]) < np.mean(adam_losses[-5:]) + 0.1
    assert losses[1] != adam_losses[1]  # it did compute in another precision


def test_float16_is_refused_with_the_alternative():
    with pytest.raises(
        ValueError, match=r"dtype='float16' is unknown: choose one of float32, bfloat16"
    ):
        dataclasses.replace(SMALL, dtype="float16")


# --------------------------------------------------------------------------------------------- spikes


def _window(values, size=128):
    guard = guards.guard_state(size)
    for value in values:
        guard = guards.remember(guard, jnp.array([value, 1.0, 0.0]))
    return guard


def _spikes(guard, *watched, std=6.0):
    return bool(guards.is_spike(guard, jnp.array(watched, jnp.float32), std=std))


def test_a_spike_is_measured_against_the_mean_and_spread_of_the_last_sound_steps():
    """Against numpy, with the oldest steps pushed out."""
    values = np.random.default_rng(0).normal(3.0, 0.5, 11).astype(np.float32)
    guard, last = _window(values, 8), values[-8:]
    assert int(guard.count) == 11
    np.testing.assert_array_equal(np.sort(np.asarray(guard.window)[:, 0]), np.sort(last))
    limit = last.mean() + 6 * last.std()
    assert not _spikes(guard, limit * 0.999, 1.0, 0.0)
    assert _spikes(guard, limit * 1.001, 1.0, 0.0)
    assert not _spikes(guard, -1e9, 1.0, 0.0)  # a fall is no spike


def test_no_spike_is_seen_before_half_of_the_window_is_filled():
    for count, seen in ((63, False), (64, True)):
        guard = _window([1.0 + 0.1 * (i % 2) for i in range(count)])
        assert _spikes(guard, 1e6, 1.0, 0.0) == seen


def test_numbers_that_hardly_vary_do_not_make_trifles_spikes():
    guard = _window([1.0] * 64)
    assert not _spikes(guard, 1.2, 1.2, 0.0)
    assert _spikes(guard, 1.0, 1.4, 0.0)  # 1 + 6 * 0.05: each of the numbers is looked at
    assert not _spikes(guard, 1.0, 1.0, 9.0)  # has always been 0: there is nothing to measure it by
