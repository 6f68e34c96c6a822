import inspect
import itertools
import math

import numpy as np
import pytest

from rlhf_jax.evaluation import overoptimization as oo


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_best_of_n_equals_the_mean_over_all_subsets(n):
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    every = [
        gold[p, max(subset, key=lambda i: proxy[p, i])]
        for p in range(3)
        for subset in itertools.combinations(range(6), n)
    ]
    assert oo.best_of_n(proxy, gold, n=n) == pytest.approx(np.mean(every))


def test_tied_proxies_are_drawn_by_lot_whatever_their_order():
    proxy = np.array([[1.0, 1.0, 0.0]])
    for gold in ([[4.0, 0.0, 9.0]], [[0.0, 4.0, 9.0]]):
        assert oo.best_of_n(proxy, np.array(gold), n=3) == pytest.approx(2.0)


def test_best_of_one_is_the_mean_and_own_curve_never_falls():
    scores = np.random.default_rng(1).normal(size=(4, 64))
    assert oo.best_of_n(scores, scores, n=1) == pytest.approx(scores.mean())
    curve = [oo.best_of_n(scores, scores, n=n) for n in range(1, 65)]
    assert (np.diff(curve) > 0).all()
    assert curve[-1] == pytest.approx(scores.max(axis=1).mean())


@pytest.mark.parametrize(
    ("n", "kl"), [(1, 0.0), (8, 1.2), (64, 3.2), (128, 3.9), (256, 4.5), (512, 5.2)]
)
def test_kl_bon_against_the_published_table(n, kl):
    assert round(oo.kl_bon(n), 1) == kl


def test_fits_recover_their_own_law():
    kl, fit = np.linspace(0.2, 9, 30), oo.GaoFit(0.6, 0.1)
    np.testing.assert_allclose(oo.fit_best_of_n_law(kl, oo.best_of_n_law(kl, fit)), fit)
    np.testing.assert_allclose(oo.fit_rl_law(kl, oo.rl_law(kl, fit)), fit)


def test_points_near_zero_do_not_rule_the_fit():
    kl, fit = np.linspace(0.2, 9, 30), oo.GaoFit(0.6, 0.1)
    near = np.concatenate([kl, [0.0, 1e-6]]), np.concatenate([oo.rl_law(kl, fit), [5.0, -5.0]])
    np.testing.assert_allclose(oo.fit_rl_law(*near), fit)


def test_peaks_are_the_maxima_of_their_laws():
    fit, kl = oo.GaoFit(0.6, 0.15), np.linspace(0.01, 3000, 600001)
    for law, peak in ((oo.best_of_n_law, oo.best_of_n_peak(fit)), (oo.rl_law, oo.rl_peak(fit))):
        values = law(kl, fit)
        assert peak.kl == pytest.approx(kl[values.argmax()], rel=1e-2)
        assert peak.gold == pytest.approx(values.max(), rel=1e-6)


def test_a_law_that_never_falls_has_no_peak():
    assert (
        oo.best_of_n_peak(oo.GaoFit(1.0, 0.0)).kl
        == oo.rl_peak(oo.GaoFit(1.0, -0.1)).gold
        == math.inf
    )


def test_bad_input_is_named():
    scores = np.zeros((2, 3))
    with pytest.raises(ValueError, match=r"n=4 must be within 1\.\.3"):
        oo.best_of_n(scores, scores, n=4)
    with pytest.raises(ValueError, match="same samples"):
        inspect.unwrap(oo.best_of_n)(
            scores, np.zeros((2, 4)), n=1
        )  # past the shape checks of the tests
    with pytest.raises(ValueError, match="n=0"):
        oo.kl_bon(0)
    with pytest.raises(ValueError, match="two different"):
        oo.fit_rl_law(np.array([0.0, 1.0, 1.0]), np.zeros(3))
    with pytest.raises(ValueError, match="min_kl=0"):
        oo.fit_rl_law(np.array([0.0, 1.0]), np.zeros(2), min_kl=0.0)


def test_proxies_that_differ_by_rounding_share_their_weight():
    """One text sampled twice and scored in two batches: neither of them is the better one."""
    gold = np.array([[1.0, 3.0, 0.0]])
    for second in (2.0, 2.0 * (1 + 1e-7), 2.0 * (1 - 1e-7)):
        assert oo.best_of_n(np.array([[2.0, second, 1.0]], np.float32), gold, n=3) == pytest.approx(
            2.0
        )
