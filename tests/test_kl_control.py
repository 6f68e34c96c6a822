"""kl_control.py: units, hand numbers, and that the loop it closes is stable."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.kl_control import adaptive_kl, fixed_kl, kl_nats_per_sequence
from rlhf_jax.types import KLState

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def test_fixed_kl_never_moves():
    control = fixed_kl(coef=0.02)
    state = control.init()
    for kl in (0.0, 1e3, -5.0):
        state = control.update(state, jnp.float32(kl))
    assert float(state.coef) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("kl", "error"),
    [(6.0, 0.0), (6.6, 0.1), (5.4, -0.1), (60.0, 0.2), (0.0, -0.2), (-3.0, -0.2)],
)
def test_adaptive_kl_by_hand(kl, error):
    """PITFALLS 29: KL in nats per sequence; beta *= 1 + clip(KL / target - 1, -0.2, 0.2) * n_steps / horizon."""
    control = adaptive_kl(coef=0.15, target=6, horizon=10_000, n_steps=512)
    after = control.update(control.init(), jnp.float32(kl))
    assert float(after.coef) == pytest.approx(0.15 * (1 + error * 512 / 10_000), rel=1e-5)


def test_adaptive_kl_is_a_pure_function_of_a_pytree():
    control = adaptive_kl(coef=0.1, target=6.0, horizon=100, n_steps=10)
    state = control.init()
    assert isinstance(state, KLState)
    assert jax.tree.leaves(state)[0].dtype == jnp.float32
    step = jax.jit(control.update)
    first, second = step(state, jnp.float32(9.0)), step(state, jnp.float32(9.0))
    assert float(first.coef) == float(second.coef) > float(state.coef)


def test_adaptive_kl_settles_where_the_kl_meets_the_target():
    """A policy whose KL is 0.6 / beta: the fixed point is beta = 0.1 for a target of 6, from either side."""
    for start in (0.02, 0.5):
        control = adaptive_kl(coef=start, target=6.0, horizon=100, n_steps=25)
        state = control.init()
        update = jax.jit(lambda state, control=control: control.update(state, 0.6 / state.coef))
        for _ in range(100):
            state = update(state)
        assert float(state.coef) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coef": -0.1}, "coef=-0.1 must not be negative"),
        ({"target": 0.0}, "target=0.0 must be above 0"),
        ({"horizon": -1}, "horizon=-1 must be above 0"),
        ({"n_steps": 0}, "n_steps=0 must be above 0"),
        ({"clip": 0}, "clip=0 must be above 0"),
        ({"n_steps": 512, "horizon": 100}, "horizon=100 lets one update take beta to 0"),
    ],
)
def test_adaptive_kl_names_the_bad_number(change, message):
    with pytest.raises(ValueError, match=message):
        adaptive_kl(**({"coef": 0.1, "target": 6.0, "horizon": 10_000, "n_steps": 512} | change))


def test_fixed_kl_refuses_a_negative_coefficient():
    with pytest.raises(ValueError, match=r"coef=-1\.0 must not be negative"):
        fixed_kl(coef=-1.0)


@pytest.mark.parametrize("poison", [0.0, np.nan, 1e6])
def test_kl_is_a_mean_over_sequences_of_a_sum_over_tokens(poison):
    """PITFALLS 29 and 42: not a token mean, nothing from padding, rows without a response not counted."""
    mask = np.array([[0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]], bool)
    logp = np.where(
        mask, np.float32([[0, -1, -2, -1], [0, -0.5, 0, 0], [0, 0, 0, 0]]), np.float32(poison)
    )
    ref_logp = np.where(mask, np.float32(-1.5), np.float32(-poison))
    kl = kl_nats_per_sequence(*(jnp.asarray(x) for x in (logp, ref_logp, mask)))
    assert float(kl.value) == pytest.approx(((0.5 - 0.5 + 0.5) + 1.0) / 2)
    assert float(kl.count) == 2
