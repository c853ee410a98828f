"""The statistics of ``ivg check``: pure functions on numpy arrays.

Knows: numbers. Must not know models or texts. Sources: Wilson (1927) for intervals of shares; Kish (1965) for design effect and
effective sample size; Veach and Guibas (1995) for the balance heuristic; Bradley and Terry (1952) for the slope.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Z95 = 1.959964
TIE = 1e-4
"""Scores this near are equal: sums of float32 log-probabilities of one text differ by less in different batches."""
RESAMPLES = 2000


@dataclass(frozen=True)
class Share:
    """A share with its 95 % interval; ``n`` things were counted."""

    n: int
    rate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.rate:.2f}, interval {self.low:.2f}–{self.high:.2f}"


@dataclass(frozen=True)
class Mean:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


def wins(better: Numbers, worse: Numbers, tie: float = TIE) -> Numbers:
    """1 where the better scored higher, 0 where lower; ties (differences up to ``tie``) count half."""
    return np.where(np.abs(better - worse) <= tie, 0.5, (better > worse).astype(np.float64))


def share(hits: Numbers, groups: NDArray[np.int64], weights: Numbers | None = None) -> Share:
    """Wilson's interval of the mean of ``hits`` in [0, 1], or of their mean under ``weights``, which cost Kish's effective size.

    Pairs of one prompt (``groups``) are no independent witnesses: the number of pairs is divided by Kish's design effect, the
    variance of the mean over groups against that over independent pairs, where that is above one.
    """
    n = len(hits)
    w = np.ones(n) if weights is None else weights
    total = float(w.sum())
    rate = float(w @ hits) / total
    clusters = len(np.unique(groups))
    size = independent = total**2 / float((w**2).sum())
    if clusters < n:
        spread = rate * (1 - rate) / independent
        residual = np.bincount(groups, w * (hits - rate))
        clustered = float((residual**2).sum()) / total**2 * clusters / max(1, clusters - 1)
        size = independent / max(1.0, clustered / spread) if spread else min(independent, float(clusters))
    z2 = Z95**2 / size
    centre = (rate + z2 / 2) / (1 + z2)
    half = Z95 / (1 + z2) * math.sqrt(rate * (1 - rate) / size + z2 / (4 * size))
    return Share(n, rate, max(0.0, centre - half), min(1.0, centre + half))


def slope(differences: Numbers) -> tuple[float, float]:
    """(s, loss): P(chosen) = sigmoid(s * difference) at its likeliest s, and its mean loss in nats; a coin's is log 2.

    Newton's method; s is held within 50 standard deviations of the differences, which separable pairs would leave.
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


def rank_correlation(a: Numbers, b: Numbers) -> float | None:
    """Spearman's, ties at their mean rank; None where one of them does not vary."""
    first, second = ((np.searchsorted(np.sort(x), x, "left") + np.searchsorted(np.sort(x), x, "right")) / 2 for x in (a, b))
    if first.std() == 0 or second.std() == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def mixture_weights(logps: Numbers, drawn: NDArray[np.int64]) -> Numbers:
    """Importance weights of all texts for every policy (balance heuristic): pi_j(y) / sum_k share_k pi_k(y).

    A text that was drawn from any policy speaks for all of them. Where ``drawn`` holds policy j, no weight for j can exceed
    1 / share_j, so that estimate is never worse than a few times that from its own texts alone; where all texts come from the
    base, this is ordinary importance sampling, whose effective sample size dies with exp(-KL).

    Args:
        logps: log pi_j(y_i) for each text i and policy j [texts, policies].
        drawn: which policy wrote each text [texts].

    Returns:
        Weights [texts, policies]; each column up to a factor, its largest entry 1.
    """
    counts = np.bincount(drawn, minlength=logps.shape[1])
    used = np.flatnonzero(counts)
    mixed = np.logaddexp.reduce(logps[:, used] + np.log(counts[used] / len(drawn)), axis=1)
    logw = logps - mixed[:, None]
    return np.exp(logw - logw.max(0))


def effective_size(weights: Numbers) -> Numbers:
    """Kish's (sum w)^2 / sum w^2 of each column."""
    return weights.sum(0) ** 2 / (weights**2).sum(0)


def baselines(scores: Numbers, prompts: NDArray[np.int64], own: NDArray[np.bool_]) -> Numbers:
    """For each text, the mean score of its prompt's base texts (``own``) without itself [texts].

    Subtracting it takes the difference between prompts out of weighted means and biases none: it does not depend on the text.
    """
    total, count = (np.bincount(prompts, x * own) for x in (scores, np.ones_like(scores)))
    left = np.maximum(1, count[prompts] - own)
    return (total[prompts] - scores * own) / left


def weighted_means(scores: Numbers, weights: Numbers, prompts: NDArray[np.int64], seed: int = 0) -> list[Mean]:
    """Sum w s / sum w for each policy, minus that of policy 0; intervals by a bootstrap over prompts.

    Args:
        scores: of each text, for each policy or the same for all [texts, policies] or [texts, 1].
        weights: [texts, policies].
        prompts: which prompt each text answers [texts].
        seed: of the bootstrap.
    """
    groups = int(prompts.max()) + 1
    top, bottom = (np.stack([np.bincount(prompts, column, groups) for column in x.T]) for x in (scores * weights, weights))
    resampled = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), RESAMPLES)
    means = (resampled @ top.T) / np.maximum(resampled @ bottom.T, 1e-300)
    point = top.sum(1) / bottom.sum(1)
    low, high = np.percentile(means - means[:, :1], (2.5, 97.5), axis=0)
    return [Mean(float(p - point[0]), float(a), float(b)) for p, a, b in zip(point, low, high, strict=True)]


def best_of(n: int, by: Numbers, judged: Numbers) -> float:
    """Expected ``judged`` of the best of ``n`` texts by ``by``, over all choices of n from these texts, exactly.

    The i-th worst (from 0) is the best of C(i, n-1) of the C(N, n) choices.
    """
    order = np.argsort(by, kind="stable")
    chances = np.array([math.comb(i, n - 1) for i in range(len(by))]) / math.comb(len(by), n)
    return float(chances @ judged[order])


def bootstrap_mean(values: Numbers, seed: int = 0) -> Mean:
    """The mean of independent numbers with its bootstrap interval."""
    counts = np.random.default_rng(seed).multinomial(len(values), np.full(len(values), 1 / len(values)), RESAMPLES)
    low, high = np.percentile(counts @ values / len(values), (2.5, 97.5))
    return Mean(float(values.mean()), float(low), float(high))
