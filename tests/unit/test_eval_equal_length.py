"""Win rate at equal length: against scikit-learn's logistic regression, and where it says nothing."""

import numpy as np
import pytest

from ivg.evaluation.equal_length import PRIOR, fit_at_zero, win_rate_at_equal_length


def simulated(true_c, a, count=2000, longer=30.0, seed=0):
    rng = np.random.default_rng(seed)
    others = rng.uniform(50, 150, count)
    lengths = np.maximum(0, others + rng.normal(longer, 40, count))
    difference = lengths - others
    p = 1 / (1 + np.exp(-(true_c + a * np.tanh(difference / difference.std()))))
    return (rng.uniform(size=count) < p).astype(float), lengths, others


def test_it_is_the_fit_of_a_logistic_regression():
    linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    won, lengths, others = simulated(0.3, 1.2, 500)
    difference = lengths - others
    x = np.tanh(difference / difference.std())
    # scikit-learn divides the prior by the variance C: equal to ours for C = PRIOR ** 2
    model = linear.LogisticRegression(C=PRIOR**2, tol=1e-10, max_iter=1000).fit(x[:, None], won)
    expected = 1 / (1 + np.exp(-model.intercept_[0]))
    found = win_rate_at_equal_length(range(500), won, lengths, others)
    assert found.mean == pytest.approx(expected, abs=1e-4)
    assert found.low < expected < found.high


@pytest.mark.parametrize("a", [0.0, 1.5])
def test_what_length_alone_wins_is_taken_away(a):
    """Answers that are longer and liked for it alone: many wins, half of them at equal length."""
    won, lengths, others = simulated(0.0, a)
    found = win_rate_at_equal_length(range(len(won)), won, lengths, others)
    assert found.low <= 0.5 <= found.high
    assert (won.mean() > 0.6) == (a > 0)


def test_the_intercept_by_hand():
    """Two comparisons at each of x = -1 and x = 1, with rates 1/4 and 3/4 by ties: c = 0. Shifted to 1/2 and 3/4: between them."""
    x, weights = np.array([-1.0, -1.0, 1.0, 1.0]), np.ones((1, 4))
    assert fit_at_zero(x, np.array([0.0, 0.5, 0.5, 1.0]), weights)[0] == pytest.approx(0.5)
    # logits 0 and log 3, but for the prior of the slope: c = log(3) / 2
    assert fit_at_zero(x, np.array([0.5, 0.5, 0.5, 1.0]), weights)[0] == pytest.approx(1 / (1 + 3**-0.5), abs=2e-3)


def test_seeds_of_a_prompt_are_drawn_together():
    """The same comparison four times is no more evidence than once."""
    won, lengths, others = simulated(0.3, 1.0, 100)
    once = win_rate_at_equal_length(range(100), won, lengths, others)
    again = win_rate_at_equal_length(
        [i for i in range(100) for _ in range(4)], np.repeat(won, 4), np.repeat(lengths, 4), np.repeat(others, 4)
    )
    assert again.mean == pytest.approx(once.mean, abs=2e-3)
    assert again.high - again.low == pytest.approx(once.high - once.low, rel=0.05)


def test_all_won_is_all():
    found = win_rate_at_equal_length(range(6), [1.0] * 6, [1, 2, 3, 4, 5, 6], [3] * 6)
    assert (found.mean, found.low, found.high) == pytest.approx((1, 1, 1))


@pytest.mark.parametrize("lengths", [[5, 5, 5], [4, 5, 6]])
def test_where_equal_length_was_not_measured_there_is_no_rate(lengths):
    """All differences equal, or every answer longer than the other."""
    assert win_rate_at_equal_length("abc", [1, 0, 1], lengths, [3, 3, 3]) is None


def test_wins_that_length_alone_tells_apart_have_a_finite_fit():
    found = win_rate_at_equal_length(range(8), [0, 0, 0, 0, 1, 1, 1, 1], [1, 2, 3, 4, 6, 7, 8, 9], [5] * 8)
    assert found.mean == pytest.approx(0.5, abs=1e-6)
    assert 0 <= found.low <= found.high <= 1
