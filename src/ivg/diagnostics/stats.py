"""Statistics of ``ivg check`` and ``ivg eval``: pure functions of numpy arrays, so that neither needs scipy.

Sources: Wilson (1927) for intervals of proportions; Kish (1965) for design effect and effective sample size; Efron (1979) for the
percentile bootstrap; Veach and Guibas (1995) for the balance heuristic; Bradley and Terry (1952) for the slope.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ivg.utils.rounding import keep_digits

Floats = NDArray[np.float64]
Z95 = 1.959964
"""The 97.5 % quantile of the normal distribution."""
TIE_TOLERANCE = 1e-4
"""Scores this close are equal, unless all are close: sums of float32 log-probabilities of one text differ by less between batches."""
TIE_SHARE = 0.01
"""Of scores whose differences are small, those closer than this share of the root mean square of all differences are equal."""


@dataclass(frozen=True)
class Proportion:
    """A proportion of ``n`` observations with its 95 % interval."""

    n: int
    rate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.rate:.2f}, interval {self.low:.2f}–{self.high:.2f}"


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Rounded values for JSON."""
        return {name: keep_digits(number, 6) for name, number in (("mean", self.mean), ("low", self.low), ("high", self.high))}


def tie_tolerance(better: Floats, worse: Floats) -> float:
    """Up to which difference two of these scores are equal: :data:`TIE_TOLERANCE`, or less where the scale of the differences is small."""
    differences = better - worse
    if not differences.size:
        return TIE_TOLERANCE
    rounding = 4 * float(np.finfo(np.float32).eps * max(np.abs(better).max(), np.abs(worse).max()))  # models compute in float32
    return min(TIE_TOLERANCE, max(rounding, TIE_SHARE * float(np.sqrt((differences**2).mean()))))


def wins(better: Floats, worse: Floats, tolerance: float | None = None) -> Floats:
    """1 where ``better`` is higher, 0 where it is lower, 0.5 where they differ by at most ``tolerance`` (:func:`tie_tolerance`)."""
    if tolerance is None:
        tolerance = tie_tolerance(better, worse)
    return np.where(np.abs(better - worse) <= tolerance, 0.5, (better > worse).astype(np.float64))


def wilson(hits: Floats, groups: NDArray[np.int64], weights: Floats | None = None) -> Proportion:
    """The mean of ``hits`` with Wilson's interval, corrected for clusters.

    Observations of one group are not independent: n is divided by Kish's design effect (the variance of the mean over groups divided
    by that over independent observations) where that is above 1. Weights reduce n to Kish's effective sample size.

    Args:
        hits: in [0, 1], any fraction for ties [observations].
        groups: number of each observation's group [observations].
        weights: of each observation; None: equal [observations].
    """
    n = len(hits)
    w = np.ones(n) if weights is None else weights
    total = float(w.sum())
    rate = float(w @ hits) / total
    clusters = len(np.unique(groups))
    size = independent = total**2 / float((w**2).sum())
    if clusters < n:
        variance = rate * (1 - rate) / independent
        residual = np.bincount(groups, w * (hits - rate))
        clustered = float((residual**2).sum()) / total**2 * clusters / max(1, clusters - 1)
        size = independent / max(1.0, clustered / variance) if variance else min(independent, float(clusters))
    z2 = Z95**2 / size
    centre = (rate + z2 / 2) / (1 + z2)
    half = Z95 / (1 + z2) * math.sqrt(rate * (1 - rate) / size + z2 / (4 * size))
    return Proportion(n, rate, max(0.0, centre - half), min(1.0, centre + half))


def bradley_terry_slope(differences: Floats) -> tuple[float, float]:
    """Maximum-likelihood s of P(chosen) = sigmoid(s * difference), and its mean loss in nats (log 2 without any information).

    Newton's method. For separable pairs, whose s is infinite, s stops at 50 standard deviations of the differences.
    """
    scale = float(np.sqrt((differences**2).mean()))
    if scale == 0:
        return 0.0, math.log(2)
    x, s = differences / scale, 0.0
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(s * x, -500, 500)))
        step = float(((1 - p) * x).sum() / ((p * (1 - p) * x**2).sum() + 1e-9))
        s = float(np.clip(s + np.clip(step, -2, 2), -50, 50))
    return s / scale, float(np.logaddexp(0, -s * x).mean())


def spearman(a: Floats, b: Floats) -> float | None:
    """Spearman's rank correlation; ties get their mean rank. None where ``a`` or ``b`` is constant."""
    first, second = ((np.searchsorted(np.sort(x), x, "left") + np.searchsorted(np.sort(x), x, "right")) / 2 for x in (a, b))
    if first.std() == 0 or second.std() == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def bootstrap_mean(values: Sequence[float] | Floats, rounds: int = 10_000, seed: int = 0) -> Estimate:
    """The mean of independent values with its 95 % percentile-bootstrap interval.

    Args:
        values: for example one for each prompt, averaged over seeds (answers to one prompt are not independent).
        rounds: number of resamples.
        seed: of the resampling; equal values have equal intervals.

    Raises:
        ValueError: no values.
    """
    data = np.asarray(values, dtype=np.float64)
    if not data.size:
        raise ValueError("no values to average\n  every answer failed, or none was asked for")
    rng = np.random.default_rng(seed)
    slab = max(1, 4_000_000 // data.size)  # bounds the memory of the resampled indices
    means = [data[rng.integers(data.size, size=(min(slab, rounds - done), data.size))].mean(1) for done in range(0, rounds, slab)]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Estimate(float(data.mean()), float(low), float(high))


def mixture_weights(logps: Floats, sampled_by: NDArray[np.int64]) -> Floats:
    """Importance weights of all texts for every policy by the balance heuristic: pi_j(y) / sum_k fraction_k pi_k(y).

    Every text informs the estimate for every policy. Where some texts were sampled from policy j, no weight for j exceeds
    1 / fraction_j. Where all texts come from one policy, this is ordinary importance sampling, whose effective sample size shrinks
    with exp(-KL).

    Args:
        logps: log pi_j(y_i) of text i under policy j [texts, policies].
        sampled_by: index of the policy that each text was sampled from [texts].

    Returns:
        Weights [texts, policies]; each column is known up to a factor and scaled to a maximum of 1.
    """
    counts = np.bincount(sampled_by, minlength=logps.shape[1])
    used = np.flatnonzero(counts)
    mixture = np.logaddexp.reduce(logps[:, used] + np.log(counts[used] / len(sampled_by)), axis=1)
    log_weights = logps - mixture[:, None]
    return np.exp(log_weights - log_weights.max(0))


def effective_size(weights: Floats) -> Floats:
    """Kish's effective sample size (sum w)^2 / sum w^2 of each column."""
    return weights.sum(0) ** 2 / (weights**2).sum(0)


def leave_one_out_baselines(scores: Floats, prompts: NDArray[np.int64], from_base: NDArray[np.bool_]) -> Floats:
    """For each text, the mean score of its prompt's base texts, itself left out [texts].

    Subtracting it removes the variance between prompts without bias, since it does not depend on the text.
    """
    total, count = (np.bincount(prompts, x * from_base) for x in (scores, np.ones_like(scores)))
    return (total[prompts] - scores * from_base) / np.maximum(1, count[prompts] - from_base)


def weighted_means(scores: Floats, weights: Floats, prompts: NDArray[np.int64], seed: int = 0) -> list[Estimate]:
    """Sum w s / sum w for each policy minus that of policy 0, with bootstrap intervals over prompts.

    Args:
        scores: of each text, for each policy or the same for all [texts, policies] or [texts, 1].
        weights: [texts, policies].
        prompts: index of the prompt that each text answers [texts].
        seed: of the bootstrap.
    """
    groups = int(prompts.max()) + 1
    top, bottom = (np.stack([np.bincount(prompts, column, groups) for column in x.T]) for x in (scores * weights, weights))
    resampled = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), 2000)
    means = (resampled @ top.T) / np.maximum(resampled @ bottom.T, 1e-300)
    point = top.sum(1) / bottom.sum(1)
    low, high = np.percentile(means - means[:, :1], (2.5, 97.5), axis=0)
    return [Estimate(float(p - point[0]), float(a), float(b)) for p, a, b in zip(point, low, high, strict=True)]


def expected_best_of(n: int, values: Floats, scores: Floats) -> float:
    """Expected score of the text with the highest value among ``n`` of these texts, exactly, over all choices of n.

    The text with the i-th lowest value (from 0) is the best of C(i, n-1) of the C(N, n) choices.
    """
    order = np.argsort(values, kind="stable")
    chances = np.array([math.comb(i, n - 1) for i in range(len(values))]) / math.comb(len(values), n)
    return float(chances @ scores[order])
