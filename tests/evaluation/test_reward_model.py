import itertools
import math

import numpy as np
import pytest

from rlhf_jax.evaluation import reward_model as rm


def _ranked(rng, n=60, k=5, noise=1.0):
    """Rankings by a noisy labeler with ties and absent responses; scores are the noiseless truth."""
    truth = rng.normal(size=(n, k))
    level = np.round(2 * (truth + noise * rng.normal(size=(n, k))))
    ranks = np.stack([np.unique(-row, return_inverse=True)[1] for row in level])
    ranks[rng.random((n, k)) < 0.15] = -1
    return truth, ranks


def _loop_pairs(ranks):
    for n, row in enumerate(ranks):
        for i, j in itertools.permutations(range(len(row)), 2):
            if 0 <= row[i] < row[j]:
                yield n, i, j


def test_strict_pairs_are_all_pairs_less_ties():
    """C(K, 2) less C(t, 2) for every tie group of t."""
    ranks = np.array([[0, 1, 1, 1, 2, -1]])
    assert len(rm.strict_pairs(ranks).prompt) == math.comb(5, 2) - math.comb(3, 2)
    _, ranks = _ranked(np.random.default_rng(0))
    pairs = rm.strict_pairs(ranks)
    assert set(zip(*(x.tolist() for x in pairs), strict=True)) == set(_loop_pairs(ranks))


def test_accuracy_and_log_loss_against_a_loop():
    scores, ranks = _ranked(np.random.default_rng(1))
    scores[0, :2], ranks[0, :2] = 0.25, [0, 1]  # a tie in score counts half
    pairs = list(_loop_pairs(ranks))
    right = [
        1.0 if scores[n, i] > scores[n, j] else 0.5 * (scores[n, i] == scores[n, j])
        for n, i, j in pairs
    ]
    loss = [math.log1p(math.exp(-(scores[n, i] - scores[n, j]))) for n, i, j in pairs]
    got = rm.pairwise_accuracy(scores, ranks)
    assert got.value == pytest.approx(np.mean(right))
    assert got.n == len(pairs)
    assert got.low < got.value < got.high
    assert rm.pairwise_log_loss(scores, ranks) == pytest.approx(np.mean(loss))


def test_absent_responses_are_never_read():
    scores, ranks = _ranked(np.random.default_rng(2))
    poisoned = np.where(ranks < 0, np.nan, scores)
    assert rm.pairwise_accuracy(poisoned, ranks) == rm.pairwise_accuracy(scores, ranks)


def test_adding_a_constant_to_the_reward_changes_nothing():
    scores, ranks = _ranked(np.random.default_rng(3))
    assert rm.pairwise_accuracy(scores + 7, ranks) == rm.pairwise_accuracy(scores, ranks)
    assert rm.pairwise_log_loss(scores + 7, ranks) == pytest.approx(
        rm.pairwise_log_loss(scores, ranks)
    )


def test_log_loss_of_an_extreme_margin_is_finite():
    assert rm.pairwise_log_loss(np.array([[-1e4, 1e4]]), np.array([[0, 1]])) == pytest.approx(2e4)


def test_interval_resamples_prompts_not_pairs():
    """Ten responses that agree within a prompt are one observation, not forty-five."""
    rng = np.random.default_rng(4)
    good = rng.random(40) < 0.7
    ranks = np.tile(np.arange(10), (40, 1))
    scores = np.where(good[:, None], -ranks, ranks).astype(float)
    got = rm.pairwise_accuracy(scores, ranks)
    half = 1.96 * math.sqrt(good.mean() * (1 - good.mean()) / 40)
    assert (got.high - got.low) / 2 == pytest.approx(half, rel=0.15)


def test_same_inputs_give_the_same_interval():
    scores, ranks = _ranked(np.random.default_rng(5))
    assert rm.pairwise_accuracy(scores, ranks) == rm.pairwise_accuracy(scores, ranks)
    assert rm.pairwise_accuracy(scores, ranks, seed=1) != rm.pairwise_accuracy(scores, ranks)


def test_calibrated_scores_lie_on_the_curve_and_inflated_ones_below():
    rng = np.random.default_rng(6)
    scores = rng.normal(size=(20000, 2))
    second_wins = rng.random(20000) > 1 / (1 + np.exp(scores[:, 1] - scores[:, 0]))
    ranks = np.stack([second_wins, ~second_wins], axis=1).astype(int)
    true = rm.calibration(scores, ranks)
    np.testing.assert_allclose(true.observed, true.predicted, atol=0.035)
    assert true.count.sum() == 20000
    assert (np.diff(true.margin) > 0).all()
    inflated = rm.calibration(3 * scores, ranks)
    assert (inflated.predicted - inflated.observed)[1:].min() > 0.05


def test_accuracy_by_margin_by_hand():
    scores = np.array([[0.1, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    got = rm.accuracy_by_margin(
        scores, np.array([[0, 1]] * 4), edges=np.array([0.0, 0.5, 2.0, 2.5, 3.0])
    )
    assert got.count.tolist() == [1, 2, 0, 1]
    np.testing.assert_array_equal(got.accuracy, [1.0, 0.5, np.nan, 0.0])


def test_length_bias_is_seen():
    """A model that scores length is right where the longer response is preferred and wrong where it is not."""
    rng = np.random.default_rng(7)
    lengths = rng.permuted(np.tile(np.arange(5, 45, 5), (30, 1)), axis=1)
    _, ranks = _ranked(rng, n=30, k=8)
    got = rm.accuracy_by_length_difference(
        lengths * 1.0, ranks, lengths, edges=np.array([-50.0, 0.0, 50.0])
    )
    assert got.accuracy.tolist() == [0.0, 1.0]
    longer = np.mean([lengths[n, i] > lengths[n, j] for n, i, j in _loop_pairs(ranks)])
    assert rm.length_only_accuracy(lengths, ranks).value == pytest.approx(longer)


def test_labeler_agreement_by_hand_with_and_without_ties():
    a, b = np.array([[0, 1, 1, 2]]), np.array([[0, 2, 1, 1]])
    # Pairs 01 02 03 agree; 12: tie in a; 13: opposite; 23: tie in b.
    strict = rm.labeler_agreement(a, b)
    assert (strict.value, strict.n) == (3 / 4, 4)
    aware = rm.tie_aware_agreement(a, b)
    assert (aware.value, aware.n) == (4 / 6, 6)
    assert rm.tie_aware_agreement(a, a).value == 1.0


def test_agreement_ignores_responses_absent_in_either():
    assert rm.labeler_agreement(np.array([[0, 1, -1]]), np.array([[0, 1, 2]])).n == 1


def test_bias_makes_demonstrations_score_zero():
    scores = np.random.default_rng(8).normal(3, 1, 100).astype(np.float32)
    assert abs(np.mean(scores + rm.demonstration_bias(scores))) < 1e-4


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="no strict pair"):
        rm.pairwise_accuracy(np.zeros((2, 3)), np.zeros((2, 3), int))
    with pytest.raises(ValueError, match="not all finite"):
        rm.pairwise_accuracy(np.array([[np.nan, 0.0]]), np.array([[0, 1]]))
    with pytest.raises(ValueError, match="no strict pair"):
        rm.labeler_agreement(np.array([[0, 0]]), np.array([[0, 1]]))
    with pytest.raises(ValueError, match="rising"):
        rm.accuracy_by_margin(
            np.array([[1.0, 0.0]]), np.array([[0, 1]]), edges=np.array([1.0, 0.0])
        )
    with pytest.raises(ValueError, match="at least one"):
        rm.demonstration_bias(np.zeros(0))
    with pytest.raises(ValueError, match="bins=0"):
        rm.calibration(np.array([[1.0, 0.0]]), np.array([[0, 1]]), bins=0)


def _two_labelers(rng, prompts):
    """Two labelers rank two responses of each prompt; how clear the better one is depends on the prompt. 2/3 right."""
    clear = np.repeat(rng.beta(0.6, 0.3, prompts), 2)
    right = rng.random(2 * prompts) < clear
    ranks = np.where(right[:, None], [[0, 1]], [[1, 0]])
    return np.tile([1.0, 0.0], (2 * prompts, 1)), ranks, np.repeat(np.arange(prompts), 2)


def test_interval_covers_the_truth_with_two_labelers_of_each_prompt():
    rng, trials, hits = np.random.default_rng(8), 300, 0
    for _ in range(trials):
        scores, ranks, groups = _two_labelers(rng, 120)
        got = rm.pairwise_accuracy(scores, ranks, resamples=200, groups=groups)
        hits += got.low <= 2 / 3 <= got.high
    assert 0.93 <= hits / trials <= 0.97
    sure = rm.pairwise_accuracy(scores, ranks)
    assert sure.high - sure.low < 0.9 * (got.high - got.low)


def test_a_second_labeler_who_says_the_same_adds_no_certainty():
    """Rows of one prompt are drawn together, wherever they stand in the file."""
    scores, ranks = _ranked(np.random.default_rng(9), n=80)
    once = rm.pairwise_accuracy(scores, ranks)
    order = np.random.default_rng(0).permutation(160)
    twice = (np.tile(x, (2, 1))[order] for x in (scores, ranks))
    groups = np.tile(np.arange(80), 2)[order]
    together = rm.pairwise_accuracy(*twice, groups=groups)
    assert together.value == pytest.approx(once.value)
    assert together.n == 2 * once.n
    np.testing.assert_allclose(together[1:3], once[1:3], atol=1e-12)
    alike = rm.labeler_agreement(
        np.tile(ranks, (2, 1)), np.tile(ranks[::-1], (2, 1)), groups=np.tile(np.arange(80), 2)
    )
    np.testing.assert_allclose(
        alike[1:3], rm.labeler_agreement(ranks, ranks[::-1])[1:3], atol=1e-12
    )
    with pytest.raises(ValueError, match=r"groups has shape \(2,\) for 80 rankings"):
        rm.pairwise_accuracy(scores, ranks, groups=np.arange(2))


def test_all_pairs_right_is_no_certainty():
    ranks = np.tile([0, 1], (20, 1))
    got = rm.pairwise_accuracy(np.tile([1.0, 0.0], (20, 1)), ranks)
    assert got.value == got.high == 1.0
    assert 0.7 < got.low < 0.9  # Wilson's for 20 of 20: 0.839


def test_scores_that_differ_by_rounding_count_half():
    scores = np.array([[1.25, 1.25 * (1 + 1e-7)], [0.5, 0.25]], np.float32)
    assert rm.pairwise_accuracy(scores, np.array([[0, 1], [0, 1]])).value == 0.75
