"""ops.py against numpy loops, hand numbers and poisoned padding. `PITFALLS` numbers stand in the docstrings."""

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

from rlhf_jax import ops

pytestmark = pytest.mark.usefixtures("strict_dtypes")

POISONS = pytest.mark.parametrize("poison", [np.nan, np.inf, 1e6])


# --- the shift --------------------------------------------------------------------------------------------------------


def previous_by_loops(segments: np.ndarray, parents: np.ndarray) -> np.ndarray:
    """The definition, one token at a time."""
    out = np.full(segments.shape, -1)
    for b, t in np.ndindex(*segments.shape):
        if segments[b, t] == 0:
            continue
        own = [s for s in range(t) if segments[b, s] == segments[b, t]]
        parent = [s for s in range(t) if parents[b, t] > 0 and segments[b, s] == parents[b, t]]
        out[b, t] = own[-1] if own else parent[-1] if parent else -1
    return out


@st.composite
def rows_with_parents(draw):
    """Rows of contiguous pieces, padded; a piece may continue any earlier piece."""
    pieces = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    segments, parents = [], []
    for piece, length in enumerate(pieces, start=1):
        parent = draw(st.integers(0, piece - 1))
        segments += [piece] * length
        parents += [parent] * length
    padding = draw(st.integers(0, 3))
    return np.array([segments + [0] * padding]), np.array([parents + [0] * padding])


@given(rows_with_parents())
@settings(max_examples=40, deadline=None)
def test_previous_index_is_the_token_before_in_segment_or_the_parents_last(row):
    segments, parents = row
    width = 24  # one compiled program for all examples
    segments, parents = (np.pad(x, ((0, 0), (0, width - x.shape[1]))).astype(np.int32) for x in (segments, parents))
    got = jax.jit(ops.previous_index)(jnp.asarray(segments), jnp.asarray(parents))
    np.testing.assert_array_equal(got, previous_by_loops(segments, parents))
    alone = jax.jit(ops.previous_index)(jnp.asarray(segments))
    np.testing.assert_array_equal(alone, previous_by_loops(segments, np.zeros_like(parents)))


def test_previous_index_takes_any_segment_ids_and_ignores_parents_of_padding():
    segments = jnp.array([[70, 70, 9, 9, 0, 0]])
    parents = jnp.array([[0, 0, 70, 70, 70, 9]])
    assert ops.previous_index(segments, parents).tolist() == [[-1, 0, 1, 2, -1, -1]]
    # A parent that is not there (cut away) or stands later in the row cannot be attended to: no predecessor.
    assert ops.previous_index(segments, jnp.array([[9, 9, 5, 5, 0, 0]])).tolist() == [[-1, 0, -1, 2, -1, -1]]


def test_align_reads_any_trailing_shape_and_keeps_dtype():
    x = np.random.default_rng(0).normal(size=(2, 4, 3, 2)).astype(np.float32)
    previous = np.array([[-1, 0, 0, 3], [2, -1, 1, -1]], np.int32)
    got = ops.align(jnp.asarray(x), jnp.asarray(previous))
    for b, t in np.ndindex(2, 4):
        np.testing.assert_array_equal(got[b, t], x[b, previous[b, t]] if previous[b, t] >= 0 else 0 * x[0, 0])
    assert ops.align(jnp.array([[True, True]]), jnp.array([[-1, 0]])).tolist() == [[False, True]]
    assert ops.align(jnp.ones((1, 2), jnp.bfloat16), jnp.array([[0, 1]])).dtype == jnp.bfloat16


@POISONS
def test_align_gradient_is_finite_where_nothing_precedes(poison):
    x = jnp.array([[poison, 2.0, 3.0]])
    previous = jnp.array([[-1, -1, 1]])
    assert ops.align(x, previous).tolist() == [[0.0, 0.0, 2.0]]
    grad = jax.grad(lambda x: jnp.sum(ops.align(x, previous) ** 2))(x)
    assert grad.tolist() == [[0.0, 4.0, 0.0]]


# --- log-probabilities ------------------------------------------------------------------------------------------------


def head(weights: jax.Array, hidden: jax.Array) -> jax.Array:
    return hidden @ weights


def language_case(seed: int = 0, rows: int = 3, slots: int = 11, width: int = 5, vocabulary: int = 7):
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
    logp = ops.token_log_probs(
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
    alone = ops.token_log_probs(hidden, read, tokens, mask, **options)
    return alone, *ops.token_log_probs_and_entropy(hidden, read, tokens, mask, **options)


@pytest.mark.parametrize("chunk", [None, 1, 4, 50])
def test_token_log_probs_equal_a_loop_for_every_chunk(chunk):
    """PITFALLS 5: with the sampler's temperature as well."""
    hidden, weights, tokens, mask = language_case()
    previous = jnp.asarray(np.random.default_rng(1).integers(-1, 11, mask.shape).astype(np.int32))
    shifted, every = jnp.tile(jnp.arange(11)[None] - 1, (3, 1)), jnp.ones_like(mask)
    for where, before, temperature in [(mask, previous, 0.7), (every, shifted, 1.0), (~every, shifted, 1.0)]:
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
        ops.token_log_probs(hidden, functools.partial(head, weights), tokens, chunk=0)


def test_token_log_probs_have_the_gradient_of_the_dense_formula():
    hidden, weights, tokens, mask = language_case()
    previous = ops.previous_index(jnp.array([[1] * 3 + [2] * 4 + [3] * 4] * 3), jnp.array([[0] * 3 + [1] * 8] * 3))
    cotangent = jnp.asarray(np.random.default_rng(2).normal(size=mask.shape).astype(np.float32))

    def chunked(hidden, weights):
        options = {"previous": previous, "temperature": 0.8, "chunk": 3}
        return jnp.sum(
            cotangent * ops.token_log_probs(hidden, functools.partial(head, weights), tokens, mask, **options)
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


def gradients_with(cotangent, arriving, *, masked=True, chunk=3):
    """Gradients of ``sum(arriving * logp)`` where the function is told `cotangent` beforehand; compiled."""
    hidden, weights, tokens, mask = language_case()
    previous = ops.previous_index(jnp.array([[1] * 3 + [2] * 4 + [3] * 4] * 3), jnp.array([[0] * 3 + [1] * 8] * 3))
    options = {"previous": previous, "temperature": 0.8, "chunk": chunk, "cotangent": cotangent}

    def total(hidden, weights):
        where = mask if masked else jnp.zeros_like(mask)
        return jnp.sum(
            arriving * ops.token_log_probs(hidden, functools.partial(head, weights), tokens, where, **options)
        )

    return jax.jit(jax.value_and_grad(total, (0, 1)))(hidden, weights)


@pytest.mark.parametrize("masked", [True, False])
def test_a_gradient_known_beforehand_changes_no_result(masked):
    arriving = jnp.asarray(np.random.default_rng(2).normal(size=(3, 11)).astype(np.float32))
    expected = gradients_with(None, arriving, masked=masked)
    one_wrong = arriving.at[1].multiply(1.0 + 1e-6)
    for told in (arriving, one_wrong, jnp.zeros_like(arriving), jnp.full_like(arriving, jnp.nan)):
        got = gradients_with(told, arriving, masked=masked)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), got, expected)


def test_a_gradient_known_beforehand_is_taken_while_the_logits_are_there():
    """The way back does not read the head's weights, unless another gradient arrives than was told."""
    hidden, weights, tokens, mask = language_case()
    cotangent = jnp.where(mask, -1.0, 0.0)

    def log_probs(weights, cotangent=None):
        return ops.token_log_probs(hidden, functools.partial(head, weights), tokens, mask, cotangent=cotangent)

    def without_weights(x):
        return jnp.full_like(x, jnp.nan) if x.shape == weights.shape and bool(jnp.all(x == weights)) else x

    _, pull = jax.vjp(functools.partial(log_probs, cotangent=cotangent), weights)
    blind = jax.tree.map(without_weights, pull)
    np.testing.assert_allclose(blind(cotangent)[0], jax.vjp(log_probs, weights)[1](cotangent)[0], atol=2e-6)
    assert np.isnan(blind(2 * cotangent)[0]).all()


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
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                shapes |= arrays_of(getattr(inner, "jaxpr", inner))
    return shapes


@pytest.mark.parametrize("told", [False, True])
def test_no_array_of_all_logits_exists_forward_or_backward(told):
    rows, slots, vocabulary = 2, 64, 50
    hidden, weights, tokens, mask = language_case(rows=rows, slots=slots, vocabulary=vocabulary)

    cotangent = mask.astype(jnp.float32) if told else None

    def loss(hidden, weights):
        read = functools.partial(head, weights)
        return jnp.sum(ops.token_log_probs(hidden, read, tokens, mask, chunk=8, cotangent=cotangent))

    shapes = arrays_of(jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, weights).jaxpr)
    largest = max(int(np.prod(s)) for s in shapes if vocabulary in s)
    assert largest == rows * 8 * vocabulary  # one chunk; all of them would be eight times as much


def test_default_chunk_bounds_logits_and_keeps_small_vocabularies_in_few_pieces(monkeypatch):
    monkeypatch.setattr(ops, "CHUNK_LOGITS", {"cpu": 2**12, "gpu": 2**12})
    monkeypatch.setattr(ops, "CHUNK_TOKENS", 16)
    hidden, weights, tokens, _ = language_case(rows=4, slots=64, vocabulary=50)
    shapes = arrays_of(
        jax.make_jaxpr(lambda h: ops.token_log_probs(h, functools.partial(head, weights), tokens))(hidden).jaxpr
    )
    assert max(int(np.prod(s)) for s in shapes if s and s[-1] == 50) == 4 * 21 * 50  # ceil(4096 // 50 / 4) columns


def test_chunks_without_a_target_cost_no_head_work():
    hidden, weights, tokens, _ = language_case(slots=12)
    calls = []

    def counted(h):
        jax.debug.callback(lambda: calls.append(1))
        return head(weights, h)

    mask = np.zeros(tokens.shape, bool)
    mask[0, [2, 7, 11]] = True  # scattered, but compacted they fit one chunk of 4
    mask[1, [5]] = True
    ops.token_log_probs(hidden, counted, tokens, jnp.asarray(mask), chunk=4).block_until_ready()
    jax.effects_barrier()
    assert len(calls) == 1
    calls.clear()
    ops.token_log_probs(hidden, counted, tokens, jnp.zeros(tokens.shape, bool), chunk=4).block_until_ready()
    jax.effects_barrier()
    assert not calls


def test_rows_stay_on_their_device():
    """Compaction never crosses the data axis: no hidden state, token or logit is gathered from another device."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    by_row = NamedSharding(mesh, PartitionSpec("data"))
    hidden, weights, tokens, mask = language_case(rows=16, slots=12)

    def log_probs(hidden, weights, tokens, mask):
        return ops.token_log_probs(hidden, functools.partial(head, weights), tokens, mask, chunk=4)

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
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 300)).astype(np.float32) * 4).astype(jnp.bfloat16)
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
    np.testing.assert_allclose(plain, shifted, atol=1e-4)  # float32 keeps 50 + x to 4e-6, divided by T = 0.2
    everything = ops.log_probs_from_logits(
        jnp.tile(logits[:, None], (1, 6, 1)), jnp.tile(jnp.arange(6)[None], (5, 1)), temperature=temperature
    )
    np.testing.assert_allclose(jnp.sum(jnp.exp(everything), axis=1), 1, atol=1e-5)


def test_temperature_is_in_entropy_as_in_log_probs():
    """PITFALLS 6: entropy is that of softmax(logits / T), the distribution that was sampled."""
    logits = np.array([[0.0, 1.0, 3.0]])
    p = np.exp(logits / 0.5) / np.sum(np.exp(logits / 0.5))
    got = ops.entropy_from_logits(jnp.asarray(logits, jnp.float32), temperature=0.5)
    np.testing.assert_allclose(got, -np.sum(p * np.log(p), axis=1), rtol=1e-5)


whiten = jax.jit(ops.whiten, static_argnames="shift_mean")
whiten_gradient = jax.jit(jax.grad(lambda x, mask: jnp.sum(ops.whiten(x, mask) ** 3)))
shaped_rewards = jax.jit(ops.shaped_rewards)


# --- masked statistics ------------------------------------------------------------------------------------------------


def ragged(seed: int = 0, shape: tuple[int, int] = (4, 9)):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, shape[1] + 1, (shape[0], 1))
    return rng.normal(2.0, 3.0, shape).astype(np.float32), np.arange(shape[1])[None] < lengths


@POISONS
def test_masked_mean_equals_the_hand_sum_on_a_ragged_batch(poison):
    """PITFALLS 42: padding is in neither numerator nor denominator."""
    x, mask = ragged()
    dirty = jnp.asarray(np.where(mask, x, poison))
    np.testing.assert_allclose(ops.masked_mean(dirty, jnp.asarray(mask)), x[mask].mean(), rtol=1e-5)
    grad = jax.grad(ops.masked_mean)(dirty, jnp.asarray(mask))
    np.testing.assert_allclose(grad, mask / mask.sum(), rtol=1e-6)


def test_masked_mean_of_bf16_is_summed_and_counted_in_float32():
    """PITFALLS 36: bf16 stops counting at 256."""
    x = jnp.arange(1000).astype(jnp.float32) % 7
    mean = ops.masked_mean(x.astype(jnp.bfloat16), jnp.ones(1000, bool))
    assert float(mean) == pytest.approx(float(np.mean(np.arange(1000) % 7)), rel=1e-5)


def test_masked_mean_of_nothing_is_zero_but_a_real_nan_shows():
    x, mask = jnp.array([jnp.nan, 1.0]), jnp.array([True, True])
    assert float(ops.masked_mean(x, jnp.zeros_like(mask))) == 0.0
    assert bool(jnp.isnan(ops.masked_mean(x, mask)))


def test_whiten_reproduces_the_published_unit_test():
    """RECIPE D17: 1.2 .. 2.0 in steps of 0.1, mean kept."""
    x = jnp.arange(1.2, 2.05, 0.1, dtype=jnp.float32)
    expected = [0.0508, 0.4381, 0.8254, 1.2127, 1.6000, 1.9873, 2.3746, 2.7619, 3.1492]
    np.testing.assert_allclose(whiten(x, jnp.ones(9, bool), shift_mean=False), expected, atol=1e-4)
    np.testing.assert_allclose(whiten(x, jnp.ones(9, bool)), np.array(expected) - 1.6, atol=1e-4)


@POISONS
def test_whiten_ignores_padding_and_uses_population_variance(poison):
    """PITFALLS 18: statistics of the masked-in entries only, divided by n; twice the padding changes nothing."""
    x, mask = ragged(1)
    expected = np.where(mask, (x - x[mask].mean()) / np.sqrt(x[mask].var() + 1e-8), 0)
    dirty = np.where(mask, x, poison)
    np.testing.assert_allclose(whiten(jnp.asarray(dirty), jnp.asarray(mask)), expected, atol=1e-5)
    wide = np.concatenate([dirty, np.full_like(dirty, poison)], axis=1)
    wide_mask = np.concatenate([mask, np.zeros_like(mask)], axis=1)
    again = whiten(jnp.asarray(wide), jnp.asarray(wide_mask))
    np.testing.assert_allclose(again[:, :9], expected, atol=1e-5)
    np.testing.assert_array_equal(again[:, 9:], 0)
    grad = whiten_gradient(jnp.asarray(dirty), jnp.asarray(mask))
    assert np.isfinite(grad).all()
    np.testing.assert_array_equal(np.asarray(grad)[~mask], 0)


@pytest.mark.parametrize("value", [0.1, -3.3, 123.456])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_whiten_of_single_or_equal_entries_is_zero(value, count):
    """PITFALLS 20: variance 0, n - 1 = 0; a rounding error of the mean must not become an advantage."""
    mask = jnp.arange(8) < count
    x = jnp.where(mask, jnp.float32(value), jnp.nan)
    np.testing.assert_array_equal(whiten(x, mask), np.zeros(8))
    np.testing.assert_array_equal(whiten(x, mask, shift_mean=False), jnp.where(mask, jnp.float32(value), 0))
    assert np.isfinite(whiten_gradient(x, mask)).all()


def test_whiten_over_devices_is_global():
    """PITFALLS 19: eight devices give the advantages of one."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x, mask = ragged(2, (16, 9))
    placed = [jax.device_put(jnp.asarray(a), NamedSharding(mesh, PartitionSpec("data"))) for a in (x, mask)]
    np.testing.assert_allclose(whiten(*placed), whiten(jnp.asarray(x), jnp.asarray(mask)), atol=1e-6)


# --- KL ---------------------------------------------------------------------------------------------------------------


def test_kl_estimators_by_hand():
    logp, ref_logp = jnp.array([-1.0, -2.0, -0.5]), jnp.array([-2.0, -0.5, -0.5])
    d = np.array([1.0, -1.5, 0.0])
    np.testing.assert_allclose(ops.kl_estimate(logp, ref_logp), d)
    np.testing.assert_allclose(ops.kl_estimate(logp, ref_logp, kind="k2"), d**2 / 2)
    np.testing.assert_allclose(ops.kl_estimate(logp, ref_logp, kind="k3"), np.exp(-d) - 1 + d, rtol=1e-6)


def test_unknown_kl_estimator_is_refused_by_name():
    checked = ops.kl_estimate
    inner = getattr(checked, "__wrapped__", checked)  # the type checker of the tests would refuse it first
    with pytest.raises(ValueError, match="kind='k4' is no KL estimator"):
        inner(jnp.zeros(1), jnp.zeros(1), kind="k4")


@given(st.lists(st.floats(-8, 3), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_k3_is_never_negative_and_zero_for_equal_policies(log_ratios):
    ref = jnp.full(6, -3.0)
    logp = ref + jnp.pad(jnp.asarray(log_ratios, jnp.float32), (0, 6 - len(log_ratios)))
    assert bool(jnp.all(ops.kl_estimate(logp, ref, kind="k3") >= -1e-6))
    np.testing.assert_array_equal(ops.kl_estimate(ref, ref, kind="k3"), 0)


def exact_kl(logits, ref_logp):
    logp = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(logp) * (logp - ref_logp))


LOGITS = jnp.array([0.3, -0.2, 0.9])
REF_LOGP = jnp.log(jnp.array([0.2, 0.5, 0.3]))


def test_kl_estimators_in_a_loss_have_the_expected_gradients_they_state():
    """PITFALLS 27: k1 has zero mean gradient, k2 the KL's, k3 neither; expectation over all three tokens, exactly."""

    def expected_gradient(kind):
        def at(logits):  # samples are constants, as in training: no gradient through the sampling weights
            logp = jax.nn.log_softmax(logits)
            return jnp.sum(jax.lax.stop_gradient(jnp.exp(logp)) * ops.kl_estimate(logp, REF_LOGP, kind=kind))

        return jax.grad(at)(LOGITS)

    kl_gradient = jax.grad(exact_kl)(LOGITS, REF_LOGP)
    assert float(jnp.max(jnp.abs(kl_gradient))) > 0.05
    np.testing.assert_allclose(expected_gradient("k1"), 0, atol=1e-6)
    np.testing.assert_allclose(expected_gradient("k2"), kl_gradient, atol=1e-6)
    reverse = jax.grad(lambda x: jnp.sum(jnp.exp(REF_LOGP) * (REF_LOGP - jax.nn.log_softmax(x))))(LOGITS)
    np.testing.assert_allclose(expected_gradient("k3"), reverse, atol=1e-6)
    assert float(jnp.max(jnp.abs(expected_gradient("k3") - kl_gradient))) > 0.02


def test_kl_estimators_k1_and_k3_are_unbiased():
    logp = jax.nn.log_softmax(LOGITS)
    for kind in ("k1", "k3"):
        mean = jnp.sum(jnp.exp(logp) * ops.kl_estimate(logp, REF_LOGP, kind=kind))
        np.testing.assert_allclose(mean, exact_kl(LOGITS, REF_LOGP), rtol=1e-5)


# --- shaped rewards ---------------------------------------------------------------------------------------------------


def shaped_case():
    logp = np.array([[0, 0, -1.0, -2.0, -0.5, 0], [0, -1.5, -0.25, 0, 0, 0]], np.float32)
    ref_logp = np.array([[0, 0, -1.5, -1.0, -0.5, 0], [0, -1.0, -0.5, 0, 0, 0]], np.float32)
    mask = np.array([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]], bool)
    return np.array([0.75, -1.6], np.float32), logp, ref_logp, mask


def test_fractional_and_negative_scores_arrive_unchanged_on_the_last_token():
    """PITFALLS J1 and 13: no integer buffer, and never on EOS + 1 or on padding."""
    score, logp, ref_logp, mask = (jnp.asarray(x) for x in shaped_case())
    rewards = shaped_rewards(score, logp, ref_logp, mask, kl_coef=0)
    expected = np.zeros((2, 6), np.float32)
    expected[0, 4], expected[1, 2] = 0.75, -1.6
    np.testing.assert_array_equal(rewards, expected)


@POISONS
def test_kl_penalty_is_charged_on_response_tokens_only(poison):
    """PITFALLS 16 and 42: poisoned prompt and padding change nothing; the penalties add up to the KL that is logged."""
    score, logp, ref_logp, mask = shaped_case()
    expected = np.array([[0, 0, -0.05, 0.1, 0.75, 0], [0, 0.05, -1.625, 0, 0, 0]])
    for value, ref_value in [(0, 0), (poison, 0), (0, poison), (poison, -poison)]:
        dirty, ref_dirty = np.where(mask, logp, value), np.where(mask, ref_logp, ref_value)
        inputs = [jnp.asarray(x.astype(np.float32)) for x in (score, dirty, ref_dirty)]
        rewards = shaped_rewards(*inputs, jnp.asarray(mask), kl_coef=jnp.float32(0.1))
        np.testing.assert_allclose(rewards, expected, atol=1e-6)


def test_row_without_response_gets_no_score():
    rewards = shaped_rewards(
        jnp.array([5.0]), jnp.ones((1, 3)), jnp.zeros((1, 3)), jnp.zeros((1, 3), bool), kl_coef=1.0
    )
    np.testing.assert_array_equal(rewards, 0)


def test_kl_reward_lowers_the_exact_kl():
    """PITFALLS 28: reward 0, beta 1, one policy-gradient step from a perturbed policy."""
    logp = jax.nn.log_softmax(LOGITS)
    mask = jnp.ones((3, 1), bool)
    tokens = jnp.arange(3)  # each token once, weighted by its probability: the exact policy gradient

    rewards = shaped_rewards(jnp.zeros(3), logp[:, None], REF_LOGP[:, None], mask, kl_coef=1.0)[:, 0]

    def objective(logits):
        ratio = jnp.exp(ops.log_probs_from_logits(jnp.tile(logits[None], (3, 1)), tokens) - logp)
        return jnp.sum(jnp.exp(logp) * ratio * rewards)

    after = LOGITS + 0.5 * jax.grad(objective)(LOGITS)
    assert float(exact_kl(after, REF_LOGP)) < 0.9 * float(exact_kl(LOGITS, REF_LOGP))


@pytest.mark.parametrize("masked", [-np.inf, float(np.finfo(np.float32).min)])
def test_entropy_with_masked_logits_is_that_of_the_others_and_its_gradient_finite(masked):
    """Rows of a padded vocabulary can never be drawn: 0 log 0 is 0, in the backward pass too."""
    logits = np.array([[0.3, -1.2, 2.0, 0.0, 0.0]], np.float32)
    padded = jnp.asarray(np.where(np.arange(5) < 3, logits, masked), jnp.float32)
    for temperature in (1.0, 0.5):
        read = functools.partial(ops.entropy_from_logits, temperature=temperature)
        np.testing.assert_allclose(read(padded), read(jnp.asarray(logits[:, :3])), rtol=1e-6)
        grad = jax.grad(lambda x, read=read: jnp.sum(read(x)))(padded)
        wanted = jax.grad(lambda x, read=read: jnp.sum(read(x)))(jnp.asarray(logits[:, :3]))
        np.testing.assert_allclose(grad[:, :3], wanted, atol=1e-6)
        np.testing.assert_array_equal(grad[:, 3:], 0)


def test_entropy_of_targets_with_a_masked_head_is_finite():
    hidden, weights, tokens, mask = language_case()
    closed = lambda h: head(weights, h).at[..., 0].set(-jnp.inf)  # noqa: E731
    tokens = jnp.where(tokens == 0, 1, tokens)
    _, entropy = ops.token_log_probs_and_entropy(hidden, closed, tokens, mask)
    assert np.isfinite(entropy).all()
    assert np.max(entropy) > 0
