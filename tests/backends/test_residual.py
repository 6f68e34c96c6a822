"""The residual stream on a CPU: its gradient is computed once, and is the same to the last bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.backends import cpu


@jax.custom_vjp
def with_two_arguments(x, true):
    """The form with a condition that the caller makes: what `cpu.residual` has in the place of it."""
    return x


with_two_arguments.defvjp(
    lambda x, true: (x, true),
    lambda true, gradient: (jax.lax.cond(true, lambda g: g, jnp.zeros_like, gradient), None),
)


def layers(x, weights, residual):
    """Four branches of a residual stream, each read by two products."""
    for w in weights:
        x = residual(x + jnp.tanh(x @ w) * jnp.sin(x @ w.T))
    return jnp.sum(x**2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_is_that_of_the_form_with_two_arguments_to_the_last_bit(dtype):
    x = jax.random.normal(jax.random.key(0), (2, 12, 16)).astype(dtype)
    weights = (0.3 * jax.random.normal(jax.random.key(1), (4, 16, 16))).astype(dtype)
    segments = jnp.ones((2, 12), jnp.int32)

    def compiled(residual):
        def loss(x, weights, segments):
            return layers(x, weights, lambda y: residual(y, segments))

        return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x, weights, segments).compile()

    one = compiled(lambda y, segments: cpu.residual(y))
    two = compiled(lambda y, segments: with_two_arguments(y, segments[0, 0] >= 0))
    assert one.as_text().count(" conditional(") == two.as_text().count(" conditional(") == 4
    jax.tree.map(
        np.testing.assert_array_equal, one(x, weights, segments), two(x, weights, segments)
    )


def test_a_residual_stream_that_is_nan_has_a_gradient_that_is_nan():
    def total(x):
        return jnp.sum(cpu.residual(x) * 2)

    x = jnp.ones((1, 2, 3))
    assert np.array_equal(jax.grad(total)(x), 2 * x)
    assert np.isnan(jax.grad(total)(x.at[0, 0, 0].set(jnp.nan))).all()
