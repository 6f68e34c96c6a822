import inspect
import math

import numpy as np
import pytest

from rlhf_jax.evaluation.win_rate import length_controlled_win_rate, outcomes, win_rate


def test_win_tie_loss_and_threshold_by_hand():
    a = np.array([1.0, 0.5, 0.0, 0.55])
    b = np.full(4, 0.5)
    assert outcomes(a, b).tolist() == [1.0, 0.5, 0.0, 1.0]
    assert outcomes(a, b, tie=0.1).tolist() == [1.0, 0.5, 0.0, 0.5]


def test_swapping_the_policies_mirrors_value_and_interval():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 1, 50), rng.normal(size=50)
    forth, back = win_rate(a, b, tie=0.2), win_rate(b, a, tie=0.2)
    np.testing.assert_allclose(
        back[:3], (1 - forth.value, 1 - forth.high, 1 - forth.low), atol=1e-12
    )


def test_interval_without_ties_is_wilsons():
    a = np.array([1.0] * 7 + [0.0] * 3)
    got = win_rate(a, np.full(10, 0.5))
    z, p, n = 1.959963984540054, 0.7, 10
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    np.testing.assert_allclose(got[:3], (0.7, centre - half, centre + half), rtol=1e-12)
    assert got.n == 10


def test_all_wins_keep_an_honest_width():
    got = win_rate(np.ones(20), np.zeros(20))
    assert got.value == 1.0
    assert got.high == 1.0
    # Rule of Wilson: n / (n + z^2).
    assert got.low == pytest.approx(20 / (20 + 1.959963984540054**2))


def test_ties_shorten_the_interval_but_never_to_nothing():
    n = 100
    split = win_rate(np.tile([1.0, 0.0], n // 2), np.full(n, 0.5))
    tied = win_rate(np.zeros(n), np.zeros(n))
    assert split.value == tied.value == 0.5
    assert 0 < tied.high - tied.low < 0.2 * (split.high - split.low)


def test_prompt_is_the_unit_however_many_samples():
    """Repeating every sample adds no information: value and interval stay."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=40), rng.normal(size=40)
    once = win_rate(a, b)
    many = win_rate(np.repeat(a[:, None], 5, 1), np.repeat(b[:, None], 3, 1))
    np.testing.assert_allclose(many, once, atol=1e-12)


def test_every_sample_meets_every_sample_of_the_same_prompt():
    a, b = np.array([[1.0, 3.0]]), np.array([[0.0, 2.0, 3.0]])
    loop = np.mean([[1.0 if x > y else 0.5 if x == y else 0.0 for y in b[0]] for x in a[0]])
    assert outcomes(a, b)[0] == pytest.approx(loop)


@pytest.mark.parametrize(("p_win", "p_tie"), [(0.6, 0.0), (0.3, 0.5), (0.9, 0.05)])
def test_interval_covers_the_truth(p_win, p_tie):
    rng = np.random.default_rng(2)
    truth, hits, trials = p_win + p_tie / 2, 0, 600
    for _ in range(trials):
        y = rng.choice([1.0, 0.5, 0.0], size=120, p=[p_win, p_tie, 1 - p_win - p_tie])
        got = win_rate(y, np.full(120, 0.5))
        hits += got.low <= truth <= got.high
    # 0.95 minus three standard errors of 600 trials, and not so wide that it covers always.
    assert 0.923 <= hits / trials <= 0.985


def test_interval_covers_the_truth_with_correlated_samples_of_a_prompt():
    """Treating 4 samples of 80 prompts as 320 prompts would cover far too seldom."""
    rng = np.random.default_rng(3)
    hits, trials = 0, 400
    for _ in range(trials):
        p = rng.beta(0.5, 0.5, 80)
        a = (rng.random((80, 4)) < p[:, None]).astype(float)
        got = win_rate(a, np.full(80, 0.5))
        hits += got.low <= 0.5 <= got.high
    assert 0.917 <= hits / trials <= 0.985


def _length_world(rng, n, skill, bias):
    """A is longer; the judge likes length: P(A wins) = sigmoid(skill + bias * log ratio)."""
    la, lb = rng.integers(20, 80, n), rng.integers(10, 60, n)
    p = 1 / (1 + np.exp(-(skill + bias * np.log(la / lb))))
    a = (rng.random(n) < p).astype(float)
    return a, np.full(n, 0.5), la, lb


def test_win_by_length_alone_disappears_at_equal_length():
    a, b, la, lb = _length_world(np.random.default_rng(4), 4000, skill=0.0, bias=2.0)
    assert win_rate(a, b).low > 0.6
    controlled = length_controlled_win_rate(a, b, la, lb)
    assert controlled.low < 0.5 < controlled.high
    assert controlled.value == pytest.approx(0.5, abs=0.03)


def test_length_controlled_interval_covers_the_truth():
    rng = np.random.default_rng(5)
    truth, hits, trials = 1 / (1 + math.exp(-0.7)), 0, 300
    for _ in range(trials):
        got = length_controlled_win_rate(*_length_world(rng, 200, skill=0.7, bias=1.0))
        hits += got.low <= truth <= got.high
    assert 0.91 <= hits / trials <= 0.99


def test_equal_lengths_leave_the_win_rate_as_it_is():
    rng = np.random.default_rng(6)
    a, b, lengths = rng.normal(0.5, 1, 300), rng.normal(size=300), rng.integers(5, 50, 300)
    plain, controlled = win_rate(a, b), length_controlled_win_rate(a, b, lengths, lengths)
    # The weak prior moves the value by less than a tenth of a percent.
    np.testing.assert_allclose(controlled[:3], plain[:3], atol=2e-3)


def test_length_controlled_is_mirrored_when_policies_swap():
    a, b, la, lb = _length_world(np.random.default_rng(7), 200, skill=0.4, bias=1.0)
    forth, back = length_controlled_win_rate(a, b, la, lb), length_controlled_win_rate(b, a, lb, la)
    np.testing.assert_allclose(
        back[:3], (1 - forth.value, 1 - forth.high, 1 - forth.low), atol=1e-9
    )


def test_perfect_separation_stays_finite():
    n = 60
    la, lb = np.full(n, 40), np.tile([20, 80], n // 2)
    a = np.tile([1.0, 0.0], n // 2)  # A wins exactly when it is longer
    got = length_controlled_win_rate(a, np.full(n, 0.5), la, lb)
    assert got.value == pytest.approx(0.5, abs=1e-6)
    assert 0 < got.low < 0.5 < got.high < 1
    always = length_controlled_win_rate(np.ones(n), np.zeros(n), la, lb)
    assert always.value > 0.99
    assert 0.85 < always.low < 0.96 < always.value <= always.high <= 1


def test_length_controlled_repeated_samples_add_no_information():
    a, b, la, lb = _length_world(np.random.default_rng(8), 80, skill=0.4, bias=1.0)
    once = length_controlled_win_rate(a, b, la, lb)
    many = length_controlled_win_rate(*(np.repeat(x[:, None], 3, 1) for x in (a, b, la, lb)))
    np.testing.assert_allclose(many, once, atol=1e-9)


@pytest.mark.parametrize(
    ("a", "b", "tie", "message"),
    [
        (np.zeros(0), np.zeros(0), 0.0, "at least one"),
        (np.array([np.nan, 1.0]), np.zeros(2), 0.0, "non-finite"),
        (np.zeros(2), np.zeros(2), -1.0, "tie=-1.0"),
    ],
)
def test_bad_scores_are_named(a, b, tie, message):
    with pytest.raises(ValueError, match=message):
        win_rate(a, b, tie=tie)


def test_different_prompts_are_refused():
    with pytest.raises(ValueError, match="same prompts"):
        inspect.unwrap(outcomes)(np.zeros(3), np.zeros(4))  # past the shape checks of the tests


def test_bad_lengths_are_named():
    with pytest.raises(ValueError, match="count the EOS"):
        length_controlled_win_rate(np.ones(2), np.zeros(2), np.array([3, 0]), np.array([3, 3]))
    with pytest.raises(ValueError, match="one length per score"):
        inspect.unwrap(length_controlled_win_rate)(
            np.ones((2, 2)), np.zeros((2, 2)), np.ones((2, 1)), np.ones((2, 2))
        )


def test_scores_that_differ_by_rounding_are_a_tie():
    """The same text in another batch: float32 sums in another order, near 0 and far from it."""
    a = np.array([3.1, -2.7, 0.0004, 1.5, 2.0], np.float32)
    b = a * np.float32(1 + 2e-7) + np.float32(1e-7)
    assert (a != b).any()
    assert outcomes(a, b).tolist() == [0.5] * 5
    assert win_rate(a, b).value == win_rate(b, a).value == 0.5
    assert win_rate(a, b + 0.001).value == 0.0  # and a difference that is one stays one
    assert outcomes(np.array([0.1 + 0.2]), np.array([0.3])).tolist() == [0.5]


def test_an_outlier_does_not_make_ties_of_the_others():
    a, b = np.array([1.0, 2.0, 3.0, 1e12]), np.array([1.001, 1.999, 3.001, 0.0])
    assert outcomes(a, b).tolist() == [0.0, 1.0, 0.0, 1.0]


def test_rows_of_one_prompt_count_as_one():
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=60), rng.normal(size=60)
    twice = np.concatenate([a, a]), np.concatenate([b, b])
    groups = np.tile(np.arange(60), 2)
    np.testing.assert_allclose(win_rate(*twice, groups=groups), win_rate(a, b), atol=1e-12)
    too_sure = win_rate(*twice)
    assert too_sure.high - too_sure.low < 0.75 * (win_rate(a, b).high - win_rate(a, b).low)
    lengths = rng.integers(5, 50, 60), rng.integers(5, 50, 60)
    once = length_controlled_win_rate(a, b, *lengths)
    again = length_controlled_win_rate(
        *twice, *(np.tile(each, 2) for each in lengths), groups=groups
    )
    np.testing.assert_allclose(again, once, atol=1e-9)
    with pytest.raises(ValueError, match=r"groups has shape \(3,\) for 60 rows"):
        win_rate(a, b, groups=np.arange(3))


def test_interval_covers_the_truth_where_prompts_have_several_rows():
    """Three rows of each of 80 prompts, alike within a prompt: as 240 prompts the interval would be far too short."""
    rng = np.random.default_rng(6)
    groups, trials, hits = np.repeat(np.arange(80), 3), 500, 0
    for _ in range(trials):
        chance = np.repeat(rng.beta(0.9, 0.6, 80), 3)  # a prompt is easy or hard; on average 0.6
        a = (rng.random(240) < chance).astype(float)
        got = win_rate(a, np.full(240, 0.5), groups=groups)
        hits += got.low <= 0.6 <= got.high
    assert 0.93 <= hits / trials <= 0.97
    too_sure = win_rate(a, np.full(240, 0.5))
    assert too_sure.high - too_sure.low < 0.8 * (got.high - got.low)
