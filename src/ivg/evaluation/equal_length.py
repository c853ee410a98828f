"""Win rate at equal length: how often one method's answers would win if they were as long as those they are compared with.

The regression of AlpacaEval's length-controlled win rate (Dubois et al. 2024, arXiv 2404.04475) without its term for the difficulty of an
instruction, which is known for AlpacaEval's own instructions and GPT-4's judgements alone (``ivg.evaluation.length_control``):

    P(the answer wins) = sigmoid(c + a * tanh(d / s)),    d: length of the answer minus that of the other, s: standard deviation of all d,

fitted to the wins; the rate is sigmoid(c). A weak prior (normal, standard deviation 10) keeps ``a`` finite where lengths alone tell
wins from losses.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from ivg.diagnostics.stats import Estimate

Floats = NDArray[np.float64]
ROUNDS = 1000
PRIOR = 10.0
"""Standard deviation of the prior of ``a``."""
STEPS = 50
LARGEST = 30.0
"""Bound of ``c``: where all comparisons are won, its best value is infinite."""


def win_rate_at_equal_length(
    prompts: Sequence[Hashable], wins: Sequence[float], lengths: Sequence[float], others: Sequence[float], seed: int = 0
) -> Estimate | None:
    """The rate in [0, 1] with its 95 % interval (bootstrap over prompts); None where the regression says nothing.

    It says nothing where all differences of length are equal, or where all have the same sign: equal length would be outside of what was
    measured.

    Args:
        prompts: of each comparison; those of one prompt are drawn together.
        wins: 1 for a win, 0.5 for a tie, 0 for a loss.
        lengths: of the answers, in characters.
        others: of the answers that they are compared with.
        seed: of the bootstrap.
    """
    difference = np.asarray(lengths, np.float64) - np.asarray(others, np.float64)
    spread = float(difference.std())
    if spread == 0 or not difference.min() <= 0 <= difference.max():
        return None
    x, y = np.tanh(difference / spread), np.asarray(wins, np.float64)
    numbers = {p: i for i, p in enumerate(dict.fromkeys(prompts))}
    groups = np.array([numbers[p] for p in prompts])
    drawn = np.random.default_rng(seed).multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), ROUNDS)
    weights = np.concatenate([np.ones((1, len(x))), drawn[:, groups].astype(np.float64)])
    rates = fit_at_zero(x, y, weights)
    low, high = np.quantile(rates[1:], [0.025, 0.975])
    return Estimate(float(rates[0]), float(low), float(high))


def fit_at_zero(x: Floats, y: Floats, weights: Floats) -> Floats:
    """sigmoid(c) of the weighted fit of y to sigmoid(c + a x), by Newton's method; one fit for each row of weights [rows].

    Args:
        x: [comparisons].
        y: in [0, 1] [comparisons].
        weights: [rows, comparisons].
    """
    c, a = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(-(c[:, None] + a[:, None] * x)))
        residual, curvature = weights * (y - p), weights * p * (1 - p)
        first, second = residual.sum(1), (residual * x).sum(1) - a / PRIOR**2
        cc, ca, aa = curvature.sum(1) + 1e-9, (curvature * x).sum(1), (curvature * x * x).sum(1) + 1 / PRIOR**2
        determinant = cc * aa - ca * ca
        step_c, step_a = (aa * first - ca * second) / determinant, (cc * second - ca * first) / determinant
        c = np.clip(c + np.clip(step_c, -2, 2), -LARGEST, LARGEST)
        a = a + np.clip(step_a, -2, 2)
        if max(np.abs(step_c).max(), np.abs(step_a).max()) < 1e-8:
            break
    return np.asarray(1 / (1 + np.exp(-c)), dtype=np.float64)
