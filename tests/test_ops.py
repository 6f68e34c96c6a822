"""ops.py against numpy loops, hand numbers and poisoned padding. `PITFALLS` numbers stand in the docstrings."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

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
    segments, parents = (
        np.pad(x, ((0, 0), (0, width - x.shape[1]))).astype(np.int32) for x in (segments, parents)
    )
    got = jax.jit(ops.previous_index)(jnp.asarray(segments), jnp.asarray(parents))
    np.testing.assert_array_equal(got, previous_by_loops(segments, parents))
    alone = jax.jit(ops.previous_index)(jnp.asarray(segments))
    np.testing.assert_array_equal(alone, previous_by_loops(segments, np.zeros_like(parents)))


def test_previous_index_takes_any_segment_ids_and_ignores_parents_of_padding():
    segments = jnp.array([[70, 70, 9, 9, 0, 0]])
    parents = jnp.array([[0, 0, 70, 70, 70, 9]])
    assert ops.previous_index(segments, parents).tolist() == [[-1, 0, 1, 2, -1, -1]]
    # A parent that is not there (cut away) or stands later in the row cannot be attended to: no predecessor.
    assert ops.previous_index(segments, jnp.array([[9, 9, 5, 5, 0, 0]])).tolist() == [
        [-1, 0, -1, 2, -1, -1]
    ]


def test_align_reads_any_trailing_shape_and_keeps_dtype():
    x = np.random.default_rng(0).normal(size=(2, 4, 3, 2)).astype(np.float32)
    previous = np.array([[-1, 0, 0, 3], [2, -1, 1, -1]], np.int32)
    got = ops.align(jnp.asarray(x), jnp.asarray(previous))
    for b, t in np.ndindex(2, 4):
        np.testing.assert_array_equal(
            got[b, t], x[b, previous[b, t]] if previous[b, t] >= 0 else 0 * x[0, 0]
        )
    assert ops.align(jnp.array([[True, True]]), jnp.array([[-1, 0]])).tolist() == [[False, True]]
    assert ops.align(jnp.ones((1, 2), jnp.bfloat16), jnp.array([[0, 1]])).dtype == jnp.bfloat16


@POISONS
def test_align_gradient_is_finite_where_nothing_precedes(poison):
    x = jnp.array([[poison, 2.0, 3.0]])
    previous = jnp.array([[-1, -1, 1]])
    assert ops.align(x, previous).tolist() == [[0.0, 0.0, 2.0]]
    grad = jax.grad(lambda x: jnp.sum(ops.align(x, previous) ** 2))(x)
    assert grad.tolist() == [[0.0, 4.0, 0.0]]


# --- masked statistics ------------------------------------------------------------------------------------------------

whiten = jax.jit(ops.whiten, static_argnames="shift_mean")
whiten_gradient = jax.jit(jax.grad(lambda x, mask: jnp.sum(ops.whiten(x, mask) ** 3)))
shaped_rewards = jax.jit(ops.shaped_rewards)


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
    np.testing.assert_array_equal(
        whiten(x, mask, shift_mean=False), jnp.where(mask, jnp.float32(value), 0)
    )
    assert np.isfinite(whiten_gradient(x, mask)).all()


def test_whiten_over_devices_is_global():
    """PITFALLS 19: eight devices give the advantages of one."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x, mask = ragged(2, (16, 9))
    placed = [
        jax.device_put(jnp.asarray(a), NamedSharding(mesh, PartitionSpec("data")))
        for a in (x, mask)
    ]
    np.testing.assert_allclose(
        whiten(*placed), whiten(jnp.asarray(x), jnp.asarray(mask)), atol=1e-6
    )


# --- KL ---------------------------------------------------------------------------------------------------------------


def test_kl_estimators_by_hand():
    logp, ref_logp = jnp.array([-1.0, -2.0, -0.5]), jnp.array([-2.0, -0.5, -0.5])
    d = np.array([1.0, -1.5, 0.0])
    np.testing.assert_allclose(ops.kl_estimate(logp, ref_logp), d)
    np.testing.assert_allclose(ops.kl_estimate(logp, ref_logp, kind="k2"), d**2 / 2)
    np.testing.assert_allclose(
        ops.kl_estimate(logp, ref_logp, kind="k3"), np.exp(-d) - 1 + d, rtol=1e-6
    )


def test_unknown_kl_estimator_is_refused_by_name():
    checked = ops.kl_estimate
    inner = getattr(
        checked, "__wrapped__", checked
    )  # the type checker of the tests would refuse it first
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
        def at(
            logits,
        ):  # samples are constants, as in training: no gradient through the sampling weights
            logp = jax.nn.log_softmax(logits)
            return jnp.sum(
                jax.lax.stop_gradient(jnp.exp(logp)) * ops.kl_estimate(logp, REF_LOGP, kind=kind)
            )

        return jax.grad(at)(LOGITS)

    kl_gradient = jax.grad(exact_kl)(LOGITS, REF_LOGP)
    assert float(jnp.max(jnp.abs(kl_gradient))) > 0.05
    np.testing.assert_allclose(expected_gradient("k1"), 0, atol=1e-6)
    np.testing.assert_allclose(expected_gradient("k2"), kl_gradient, atol=1e-6)
    reverse = jax.grad(lambda x: jnp.sum(jnp.exp(REF_LOGP) * (REF_LOGP - jax.nn.log_softmax(x))))(
        LOGITS
    )
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
    tokens = jnp.arange(
        3
    )  # each token once, weighted by its probability: the exact policy gradient

    rewards = shaped_rewards(jnp.zeros(3), logp[:, None], REF_LOGP[:, None], mask, kl_coef=1.0)[
        :, 0
    ]

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
