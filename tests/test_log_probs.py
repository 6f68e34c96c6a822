"""Log-probabilities a chunk at a time, and the weighted sum whose gradient is computed on the way forward."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from rlhf_jax import log_probs, ops
from rlhf_jax.backends import PLAIN
from rlhf_jax.log_probs import (
    linear_weights,
    token_log_probs,
    token_log_probs_and_entropy,
    weighted_log_prob,
)
from rlhf_jax.losses.supervised import sft_loss

pytestmark = pytest.mark.usefixtures("strict_dtypes")

POISONS = pytest.mark.parametrize("poison", [np.nan, np.inf, 1e6])


def head(weights: jax.Array, hidden: jax.Array) -> jax.Array:
    return hidden @ weights


def language_case(
    seed: int = 0, rows: int = 3, slots: int = 11, width: int = 5, vocabulary: int = 7
):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(rows, slots, width)).astype(np.float32))
    weights = jnp.asarray(rng.normal(size=(width, vocabulary)).astype(np.float32))
    tokens = jnp.asarray(rng.integers(0, vocabulary, (rows, slots)).astype(np.int32))
    mask = jnp.asarray(rng.random((rows, slots)) < 0.4)
    return hidden, weights, tokens, mask


def log_probs_by_loops(hidden, weights, tokens, mask, previous, temperature):
    """float64, one token at a time; also the entropy."""
    hidden, weights = np.float64(hidden), np.float64(weights)
    logp, entropy = np.zeros(tokens.shape), np.zeros(tokens.shape)
    for b, t in np.ndindex(*tokens.shape):
        if mask[b, t] and previous[b, t] >= 0:
            logits = hidden[b, previous[b, t]] @ weights / temperature
            table = logits - np.log(np.sum(np.exp(logits)))
            logp[b, t] = table[tokens[b, t]]
            entropy[b, t] = -np.sum(np.exp(table) * table)
    return logp, entropy


def test_log_prob_equals_the_bigram_table_entry():
    """PITFALLS 3: logits at t score token t + 1, and nothing else does."""
    table = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]], np.float32))
    tokens = np.array([[0, 1, 2, 0, 0], [2, 2, 1, 0, 1]], np.int32)
    logp = token_log_probs(
        jax.nn.one_hot(tokens, 3), functools.partial(head, jnp.asarray(table)), jnp.asarray(tokens)
    )
    expected = np.zeros(tokens.shape)
    for b, t in itertools.product(range(2), range(1, 5)):
        expected[b, t] = table[tokens[b, t - 1], tokens[b, t]]
    np.testing.assert_allclose(logp, expected, atol=1e-6)
    np.testing.assert_array_equal(logp[:, 0], 0)


@functools.partial(jax.jit, static_argnames="chunk")
def read_both(hidden, weights, tokens, mask, previous, temperature, chunk):
    read = functools.partial(head, weights)
    options = {"previous": previous, "temperature": temperature, "chunk": chunk}
    alone = token_log_probs(hidden, read, tokens, mask, **options)
    return alone, *token_log_probs_and_entropy(hidden, read, tokens, mask, **options)


@pytest.mark.parametrize("chunk", [None, 1, 4, 50])
def test_token_log_probs_equal_a_loop_for_every_chunk(chunk):
    """PITFALLS 5: with the sampler's temperature as well."""
    hidden, weights, tokens, mask = language_case()
    previous = jnp.asarray(np.random.default_rng(1).integers(-1, 11, mask.shape).astype(np.int32))
    shifted, every = jnp.tile(jnp.arange(11)[None] - 1, (3, 1)), jnp.ones_like(mask)
    for where, before, temperature in [
        (mask, previous, 0.7),
        (every, shifted, 1.0),
        (~every, shifted, 1.0),
    ]:
        dense = (np.asarray(x) for x in (hidden, weights, tokens, where, before))
        logp, entropy = log_probs_by_loops(*dense, temperature)
        got = read_both(hidden, weights, tokens, where, before, jnp.float32(temperature), chunk)
        np.testing.assert_allclose(np.stack(got), [logp, logp, entropy], atol=2e-6)


def test_no_mask_and_no_previous_mean_the_plain_row_shift():
    hidden, weights, tokens, mask = language_case()
    shifted, every = jnp.tile(jnp.arange(11)[None] - 1, (3, 1)), jnp.ones_like(mask)
    explicit = read_both(hidden, weights, tokens, every, shifted, jnp.float32(1), 4)
    plain = read_both(hidden, weights, tokens, None, None, jnp.float32(1), 4)
    np.testing.assert_allclose(plain, explicit, atol=2e-6)  # two programs: rounding may differ
    assert not np.any(np.asarray(explicit)[:, :, 0])


def test_token_log_probs_refuse_a_chunk_below_one():
    hidden, weights, tokens, _ = language_case()
    with pytest.raises(ValueError, match="chunk=0 must be at least 1"):
        token_log_probs(hidden, functools.partial(head, weights), tokens, chunk=0)


def test_token_log_probs_have_the_gradient_of_the_dense_formula():
    hidden, weights, tokens, mask = language_case()
    previous = ops.previous_index(
        jnp.array([[1] * 3 + [2] * 4 + [3] * 4] * 3), jnp.array([[0] * 3 + [1] * 8] * 3)
    )
    cotangent = jnp.asarray(np.random.default_rng(2).normal(size=mask.shape).astype(np.float32))

    def chunked(hidden, weights):
        options = {"previous": previous, "temperature": 0.8, "chunk": 3}
        return jnp.sum(
            cotangent
            * token_log_probs(hidden, functools.partial(head, weights), tokens, mask, **options)
        )

    def dense(hidden, weights):
        logits = head(weights, ops.align(hidden, previous)) / 0.8
        table = jax.nn.log_softmax(logits)
        logp = jnp.take_along_axis(table, tokens[..., None], -1)[..., 0]
        return jnp.sum(cotangent * jnp.where(mask & (previous >= 0), logp, 0))

    for got, expected in zip(
        jax.jit(jax.grad(chunked, (0, 1)))(hidden, weights),
        jax.jit(jax.grad(dense, (0, 1)))(hidden, weights),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, atol=2e-6)
    check_grads(jax.jit(chunked), (hidden, weights), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def weighted(hidden, weights, tokens, mask, by_target, *, known, chunk=3):
    """``(2 * sum(by_target * logp), logp)``, with its gradient computed on the way forward where it is `known`."""
    previous = ops.previous_index(
        jnp.array([[1] * 3 + [2] * 4 + [3] * 4] * 3), jnp.array([[0] * 3 + [1] * 8] * 3)
    )
    read, how = functools.partial(head, weights), {"temperature": 0.8, "chunk": chunk}
    if known:
        previous = jnp.where(mask, previous, -1)
        total, logp = weighted_log_prob(hidden, read, tokens, by_target, previous=previous, **how)
    else:
        logp = token_log_probs(hidden, read, tokens, mask, previous=previous, **how)
        total = jnp.sum(by_target * logp)
    return 2 * total, logp


@pytest.mark.parametrize("masked", [True, False])
def test_the_weighted_sum_has_the_value_and_gradient_of_the_plain_one(masked):
    hidden, weights, tokens, mask = language_case()
    mask = mask if masked else jnp.zeros_like(mask)
    by_target = jnp.asarray(np.random.default_rng(2).normal(size=(3, 11)).astype(np.float32))

    def gradients(known):
        run = functools.partial(weighted, known=known)
        with_aux = jax.value_and_grad(run, (0, 1), has_aux=True)
        return jax.jit(with_aux)(hidden, weights, tokens, mask, by_target)

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=2e-6), gradients(True), gradients(False)
    )


def test_the_gradient_of_the_weighted_sum_is_taken_while_the_logits_are_there():
    """The way back does not read the head's weights."""
    hidden, weights, tokens, mask = language_case()
    by_target = jnp.where(mask, -1.0, 0.0)

    def total(weights, known=True):
        return weighted(hidden, weights, tokens, mask, by_target, known=known)[0]

    def without_weights(x):
        return (
            jnp.full_like(x, jnp.nan)
            if x.shape == weights.shape and bool(jnp.all(x == weights))
            else x
        )

    _, pull = jax.vjp(total, weights)
    blind = jax.tree.map(without_weights, pull)
    expected = jax.vjp(functools.partial(total, known=False), weights)[1](jnp.float32(1))[0]
    np.testing.assert_allclose(blind(jnp.float32(1))[0], expected, atol=2e-6)


def test_no_gradient_reaches_the_log_probs_beside_the_weighted_sum():
    hidden, weights, tokens, mask = language_case()
    by_target = jnp.ones(mask.shape)

    def beside(weights):
        return jnp.sum(weighted(hidden, weights, tokens, mask, by_target, known=True)[1])

    assert not np.asarray(jax.grad(beside)(weights)).any()


LINEAR = {
    "supervised": lambda logp, mask: sft_loss(logp, mask)[0].total,
    "weighted": lambda logp, mask: (
        -jnp.vdot(jnp.linspace(0, 1, logp.size), jnp.where(mask, logp, 0).ravel())
    ),
    "affine": lambda logp, mask: 3 - jax.jit(jnp.sum)(jnp.where(mask, logp, 1)) / 2,
}
OTHERS = {
    "squared": lambda logp, mask: jnp.sum(jnp.where(mask, logp, 0) ** 2),
    "clipped": lambda logp, mask: -jnp.sum(jnp.where(mask, jnp.maximum(logp, -0.5), 0)),
    "focal": lambda logp, mask: -jnp.sum(jnp.where(mask, jax.nn.sigmoid(-logp) * logp, 0)),
    "a product of two tokens": lambda logp, mask: logp[0, 1] * logp[1, 2],
}


@pytest.mark.parametrize("loss", [*LINEAR.values(), *OTHERS.values()], ids=[*LINEAR, *OTHERS])
def test_which_losses_have_a_gradient_that_is_known_before_the_log_probs(loss):
    _, _, _, mask = language_case()
    found = linear_weights(functools.partial(loss, mask=mask), mask.shape)
    assert (found is not None) == any(loss is linear for linear in LINEAR.values())
    if found is not None:
        np.testing.assert_array_equal(found, jax.grad(loss)(jnp.zeros(mask.shape), mask))


@jax.jit
def read_gradient(hidden, weights, tokens, mask):
    def total(hidden, weights):
        _, *both = read_both(hidden, weights, tokens, mask, None, jnp.float32(1), 4)
        return sum(jnp.sum(x) for x in both)

    return jax.value_and_grad(total, (0, 1))(hidden, weights)


@POISONS
def test_poison_at_masked_positions_reaches_neither_log_probs_nor_gradients(poison):
    """PITFALLS 17: NaN * 0 is NaN, in the backward pass too."""
    hidden, weights, tokens, mask = language_case()
    used = np.zeros(mask.shape, bool)
    used[:, :-1] = np.asarray(mask)[:, 1:]
    dirty = jnp.where(jnp.asarray(used)[..., None], hidden, poison)
    strange = jnp.where(mask, tokens, -100)

    clean = read_gradient(hidden, weights, tokens, mask)
    poisoned = read_gradient(dirty, weights, strange, mask)
    jax.tree.map(np.testing.assert_array_equal, clean, poisoned)
    assert np.isfinite(poisoned[0])


def arrays_of(jaxpr) -> set[tuple[int, ...]]:
    """Shapes of everything a program computes, inner programs included."""
    shapes = set()
    for eqn in jaxpr.eqns:
        shapes |= {tuple(v.aval.shape) for v in eqn.outvars if hasattr(v.aval, "shape")}
        for inner in jax.tree.leaves(
            eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                shapes |= arrays_of(getattr(inner, "jaxpr", inner))
    return shapes


@pytest.mark.parametrize("known", [False, True])
def test_no_array_of_all_logits_exists_forward_or_backward(known):
    rows, slots, vocabulary = 2, 64, 50
    hidden, weights, tokens, mask = language_case(rows=rows, slots=slots, vocabulary=vocabulary)

    def loss(hidden, weights):
        read = functools.partial(head, weights)
        if not known:
            return jnp.sum(token_log_probs(hidden, read, tokens, mask, chunk=8))
        previous = jnp.where(mask, jnp.arange(slots)[None] - 1, -1)
        ones = jnp.ones(mask.shape)
        return weighted_log_prob(hidden, read, tokens, ones, previous=previous, chunk=8)[0]

    shapes = arrays_of(jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, weights).jaxpr)
    largest = max(int(np.prod(s)) for s in shapes if vocabulary in s)
    assert largest == rows * 8 * vocabulary  # one chunk; all of them would be eight times as much


def test_default_chunk_bounds_logits_and_keeps_small_vocabularies_in_few_pieces(monkeypatch):
    monkeypatch.setattr(log_probs, "backend_for", lambda: PLAIN._replace(logits_per_chunk=2**12))
    monkeypatch.setattr(log_probs, "CHUNK_TOKENS", 16)
    hidden, weights, tokens, _ = language_case(rows=4, slots=64, vocabulary=50)
    shapes = arrays_of(
        jax.make_jaxpr(lambda h: token_log_probs(h, functools.partial(head, weights), tokens))(
            hidden
        ).jaxpr
    )
    assert (
        max(int(np.prod(s)) for s in shapes if s and s[-1] == 50) == 4 * 21 * 50
    )  # ceil(4096 // 50 / 4) columns


def test_chunks_without_a_target_cost_no_head_work():
    hidden, weights, tokens, _ = language_case(slots=12)
    calls = []

    def counted(h):
        jax.debug.callback(lambda: calls.append(1))
        return head(weights, h)

    mask = np.zeros(tokens.shape, bool)
    mask[0, [2, 7, 11]] = True  # scattered, but compacted they fit one chunk of 4
    mask[1, [5]] = True
    token_log_probs(hidden, counted, tokens, jnp.asarray(mask), chunk=4).block_until_ready()
    jax.effects_barrier()
    assert len(calls) == 1
    calls.clear()
    token_log_probs(
        hidden, counted, tokens, jnp.zeros(tokens.shape, bool), chunk=4
    ).block_until_ready()
    jax.effects_barrier()
    assert not calls


def test_rows_stay_on_their_device():
    """Compaction never crosses the data axis: no hidden state, token or logit is gathered from another device."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    by_row = NamedSharding(mesh, PartitionSpec("data"))
    hidden, weights, tokens, mask = language_case(rows=16, slots=12)

    def log_probs(hidden, weights, tokens, mask):
        return token_log_probs(hidden, functools.partial(head, weights), tokens, mask, chunk=4)

    placed = [jax.device_put(x, by_row) for x in (hidden, tokens, mask)]
    weights_everywhere = jax.device_put(weights, NamedSharding(mesh, PartitionSpec()))
    compiled = jax.jit(log_probs).lower(placed[0], weights_everywhere, *placed[1:]).compile()
    text = compiled.as_text() or ""
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
    got = compiled(placed[0], weights_everywhere, *placed[1:])
    np.testing.assert_allclose(got, log_probs(hidden, weights, tokens, mask), atol=1e-6)
    assert got.sharding.is_equivalent_to(by_row, 2)


def test_bf16_logits_are_normalised_in_float32():
    """PITFALLS 36: a log-softmax in bf16 is off by 1e-2; this one is exact for the logits it was given."""
    logits = jnp.asarray(
        np.random.default_rng(0).normal(size=(4, 300)).astype(np.float32) * 4
    ).astype(jnp.bfloat16)
    tokens = jnp.array([0, 1, 2, 299])
    exact = np.float64(np.asarray(logits.astype(jnp.float32)))
    expected = exact[np.arange(4), tokens] - np.log(np.sum(np.exp(exact), axis=1))
    got = ops.log_probs_from_logits(logits, tokens)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=3e-6)
    assert ops.entropy_from_logits(logits).dtype == jnp.float32


@given(st.floats(-50, 50), st.floats(0.2, 3))
@settings(max_examples=20, deadline=None)
def test_log_probs_do_not_see_a_shift_of_the_logits_and_sum_to_one(shift, temperature):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32))
    tokens = jnp.array([0, 1, 2, 3, 5])
    plain = ops.log_probs_from_logits(logits, tokens, temperature=temperature)
    shifted = ops.log_probs_from_logits(logits + shift, tokens, temperature=temperature)
    np.testing.assert_allclose(
        plain, shifted, atol=1e-4
    )  # float32 keeps 50 + x to 4e-6, divided by T = 0.2
    everything = ops.log_probs_from_logits(
        jnp.tile(logits[:, None], (1, 6, 1)),
        jnp.tile(jnp.arange(6)[None], (5, 1)),
        temperature=temperature,
    )
    np.testing.assert_allclose(jnp.sum(jnp.exp(everything), axis=1), 1, atol=1e-5)


def test_temperature_is_in_entropy_as_in_log_probs():
    """PITFALLS 6: entropy is that of softmax(logits / T), the distribution that was sampled."""
    logits = np.array([[0.0, 1.0, 3.0]])
    p = np.exp(logits / 0.5) / np.sum(np.exp(logits / 0.5))
    got = ops.entropy_from_logits(jnp.asarray(logits, jnp.float32), temperature=0.5)
    np.testing.assert_allclose(got, -np.sum(p * np.log(p), axis=1), rtol=1e-5)


def test_entropy_of_targets_with_a_masked_head_is_finite():
    hidden, weights, tokens, mask = language_case()
    closed = lambda h: head(weights, h).at[..., 0].set(-jnp.inf)
    tokens = jnp.where(tokens == 0, 1, tokens)
    _, entropy = token_log_probs_and_entropy(hidden, closed, tokens, mask)
    assert np.isfinite(entropy).all()
    assert np.max(entropy) > 0
