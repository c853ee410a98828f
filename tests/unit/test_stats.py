"""Statistics of diagnostics and evaluation, against values worked out by hand, enumeration, and scipy."""

import itertools
import math

import numpy as np
import pytest

from ivg.diagnostics import stats
from ivg.diagnostics.stats import bootstrap_mean


def test_wilson_interval():
    hits = np.array([1.0] * 8 + [0.0] * 2)
    s = stats.wilson(hits, np.arange(10))
    assert (s.n, s.rate) == (10, 0.8)
    assert (s.low, s.high) == (pytest.approx(0.4902, abs=1e-3), pytest.approx(0.9433, abs=1e-3))


def test_pairs_of_one_prompt_are_not_independent():
    hits = np.repeat([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], 10)  # ten pairs of each of six prompts agree with each other
    alone = stats.wilson(hits, np.arange(60))
    together = stats.wilson(hits, np.repeat(np.arange(6), 10))
    assert together.rate == alone.rate
    assert together.high - together.low > 2.4 * (alone.high - alone.low)
    assert stats.wilson(np.ones(60), np.repeat(np.arange(6), 10)).low < 0.65  # six observations, not sixty


def test_ties_count_half():
    assert stats.wins(np.array([1.0, 0.0, 2.0]), np.array([0.0, 1.0, 2.0 + 1e-6])).tolist() == [1, 0, 0.5]


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-5, 1e-9])
def test_ties_do_not_depend_on_the_scale_of_the_scores(scale):
    rng = np.random.default_rng(0)
    better, worse = rng.normal(0.5, 1, 200) * scale, rng.normal(0, 1, 200) * scale
    assert abs(stats.wins(better, worse).mean() - (better > worse).mean()) < 0.02
    assert stats.wins(better, better).tolist() == [0.5] * 200
    assert stats.tie_tolerance(better, worse) <= stats.TIE_TOLERANCE


def test_scores_that_differ_by_rounding_are_ties():
    rng = np.random.default_rng(0)
    better = rng.normal(size=200) + 5
    assert set(stats.wins(better, better + rng.normal(size=200) * 1e-7)) == {0.5}
    assert set(stats.wins(better * 1e-5, better * 1e-5 - 1e-6)) == {1.0}, "a small scale is no rounding"


def test_slope_finds_bradley_terry():
    rng = np.random.default_rng(0)
    x = rng.normal(size=20000)
    chosen_first = rng.random(20000) < 1 / (1 + np.exp(-0.7 * x))
    s, loss = stats.bradley_terry_slope(np.where(chosen_first, x, -x))
    assert s == pytest.approx(0.7, abs=0.05)
    p = 1 / (1 + np.exp(-0.7 * x))
    assert loss == pytest.approx(float(-(p * np.log(p) + (1 - p) * np.log(1 - p)).mean()), abs=0.01)
    assert stats.bradley_terry_slope(np.zeros(3)) == (0.0, math.log(2))
    assert stats.bradley_terry_slope(np.array([1.0, 2.0]))[1] < 0.01  # separable: finite, and sure


def test_rank_correlation():
    assert stats.spearman(np.array([1.0, 2.0, 9.0]), np.array([0.1, 0.2, 0.3])) == pytest.approx(1.0)
    assert stats.spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 1.0, 1.0])) is None


def test_best_of_n_is_the_mean_over_all_choices():
    by, judged = np.array([0.3, -1.0, 2.0, 0.5, 0.1]), np.array([5.0, 1.0, 2.0, 8.0, 3.0])
    chosen = [judged[max(c, key=lambda i: by[i])] for c in itertools.combinations(range(5), 3)]
    assert stats.expected_best_of(3, by, judged) == pytest.approx(np.mean(chosen))


def test_weights_from_the_base_alone_are_plain_importance_weights():
    logps = np.log(np.array([[0.5, 0.2], [0.3, 0.3], [0.2, 0.5]]))
    w = stats.mixture_weights(logps, np.zeros(3, dtype=int))
    assert w[:, 1] / w[:, 1].sum() == pytest.approx(np.array([0.4, 1.0, 2.5]) / 3.9)
    assert w[:, 0].tolist() == [1, 1, 1]
    assert stats.effective_size(w)[1] == pytest.approx(3.9**2 / (0.16 + 1 + 6.25))


def test_weights_of_policies_that_share_nothing_are_zero_and_one():
    logps = np.array([[-1.0, -900.0], [-2.0, -900.0], [-900.0, -3.0]])
    w = stats.mixture_weights(logps, np.array([0, 0, 1]))
    assert w == pytest.approx(np.array([[1, 0], [1, 0], [0, 1]]))


def test_baselines_leave_a_text_out_of_its_own():
    scores, prompts = np.array([1.0, 3.0, 5.0, 10.0, 20.0]), np.array([0, 0, 0, 1, 1])
    own = np.array([True, True, False, True, True])
    assert stats.leave_one_out_baselines(scores, prompts, own).tolist() == [3.0, 1.0, 2.0, 20.0, 10.0]


@pytest.mark.parametrize(("k", "n"), [(0, 5), (3, 7), (50, 80), (9, 9)])
def test_wilson_of_independent_observations_is_scipy_s(k, n):
    scipy = pytest.importorskip("scipy.stats")
    found = stats.wilson(np.array([1.0] * k + [0.0] * (n - k)), np.arange(n))
    expected = scipy.binomtest(k, n).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-5)


def test_spearman_is_scipy_s():
    scipy, rng = pytest.importorskip("scipy.stats"), np.random.default_rng(3)
    a, b = rng.integers(0, 6, 40).astype(float), rng.normal(size=40)
    assert stats.spearman(a, b) == pytest.approx(scipy.spearmanr(a, b).statistic)


def test_bootstrap_is_scipy_s():
    scipy, values = pytest.importorskip("scipy.stats"), np.random.default_rng(5).exponential(size=60)
    expected = scipy.bootstrap((values,), np.mean, method="percentile", rng=1).confidence_interval
    found = bootstrap_mean(values)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_interval_of_equal_values_is_a_point():
    e = bootstrap_mean([2.0, 2.0, 2.0])
    assert (e.mean, e.low, e.high) == (2.0, 2.0, 2.0)


def test_interval_is_that_of_the_normal_distribution_for_many():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=2000)
    e = bootstrap_mean(values.tolist())
    half = 1.96 * values.std() / math.sqrt(2000)
    assert e.mean == pytest.approx(values.mean())
    assert e.high - e.low == pytest.approx(2 * half, rel=0.05)
    assert bootstrap_mean(values.tolist()) == e


def test_interval_of_two_values_by_enumeration():
    """Two values: the bootstrap means are 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4, so both tails reach the ends."""
    e = bootstrap_mean([0.0, 1.0])
    assert (e.mean, e.low, e.high) == (0.5, 0.0, 1.0)


def test_an_interval_of_no_values_is_an_error():
    with pytest.raises(ValueError, match="no values"):
        bootstrap_mean([])
