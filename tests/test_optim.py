"""Schedules at their ends, Adam in both forms against numpy, averages, and the guard (PITFALLS 23, 37, 38, 48, J10)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import optim


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
@pytest.mark.parametrize("scale", [1.0, 1e-5])  # gradients of the size of epsilon tell the two forms apart
def test_adam_epsilon_form_against_numpy(make, tf_form, scale):
    grads = scale * np.array([1.0, -0.5, 0.25, 2.0, -1.0])
    expected = _numpy_adam(grads, lr=0.1, b1=0.9, b2=0.95, eps=1e-5, tf_form=tf_form)
    np.testing.assert_allclose(_path(make(0.1, eps=1e-5), grads), expected, rtol=2e-5)
    if scale < 1:
        other = _numpy_adam(grads, lr=0.1, b1=0.9, b2=0.95, eps=1e-5, tf_form=not tf_form)
        assert abs(other[0] - expected[0]) > 0.01


def test_tf_adam_first_step_is_smaller_by_the_root_of_the_correction():
    # theta_1 = -lr * g / (|g| + eps / sqrt(1 - b2)) with g = eps: 1 / (1 + 1 / sqrt(0.05)) against 1 / 2.
    assert _path(optim.tf_adam(1.0, eps=1e-3), [1e-3])[0] == pytest.approx(-1 / (1 + 0.05**-0.5), rel=1e-4)
    assert _path(optim.adam(1.0, eps=1e-3), [1e-3])[0] == pytest.approx(-0.5, rel=1e-4)


def test_default_betas_are_the_papers():
    # After one step of g = 1 the moments are 1 - b1 and 1 - b2.
    tx = optim.adam(1.0)
    _, state = tx.update({"w": jnp.float32(1.0)}, tx.init({"w": jnp.float32(0.0)}), {"w": jnp.float32(0.0)})
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
        sound = optim.is_sound(jnp.float32(0.0), norm=jnp.abs(jnp.float32(bad)))
        old = optim.keep_unless(sound, new, old)
    assert float(old[0]["w"]) == 1.0
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(old[1]))


def test_guard_looks_at_losses_and_at_the_limit():
    one = jnp.float32(1.0)
    assert bool(optim.is_sound(one, one, norm=one))
    assert not bool(optim.is_sound(one, jnp.float32(jnp.nan), norm=one))
    assert bool(optim.is_sound(one, norm=jnp.float32(2.0), limit=2))
    assert not bool(optim.is_sound(one, norm=jnp.float32(2.1), limit=2))
