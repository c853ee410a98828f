"""Metrics of answers: pure functions of numbers and texts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from ivg.diagnostics.stats import bootstrap_mean


def mean_by_key(pairs: Iterable[tuple[Hashable, float]]) -> dict[Hashable, float]:
    """The mean of each key's values, in order of appearance; averages over seeds if the key is the prompt."""
    sums: dict[Hashable, list[float]] = {}
    for key, value in pairs:
        sums.setdefault(key, []).append(value)
    return {key: sum(values) / len(values) for key, values in sums.items()}


def mean_over_prompts(pairs: Iterable[tuple[str, float]], rounds: int = 10_000) -> dict[str, float]:
    """Mean and 95 % interval of (id of the prompt, value), averaged over seeds first: answers to one prompt are not independent."""
    return bootstrap_mean(list(mean_by_key(pairs).values()), rounds).to_dict()


def win(score: float, other: float, *, same: bool = False) -> float:
    """1 for a win, 0.5 for a tie, 0 for a loss.

    ``same``: the texts are equal, and so is what they are worth: a judge's number of one text differs in its last digits between batches.
    """
    return 0.5 if same or score == other else float(score > other)


def perplexity(logps: Sequence[float], tokens: Sequence[int]) -> float:
    """Exp of the mean negative log-probability per token over all answers; NaN without tokens."""
    total = sum(tokens)
    return math.exp(-sum(logps) / total) if total else math.nan


def distinct(texts: Iterable[str], n: int) -> float:
    """Distinct word n-grams divided by all word n-grams of the texts (Li et al. 2016, arXiv 1510.03055); 0 without any."""
    seen: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        grams = _grams(text.lower().split(), n)
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else 0.0


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """seq-rep-n: fraction of an answer's token n-grams that repeat earlier ones (Welleck et al. 2020, arXiv 1908.04319)."""
    grams = _grams(ids, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def _grams(items: Sequence, n: int) -> list[tuple]:
    return list(zip(*(items[i:] for i in range(n)), strict=False))


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats in both coordinates (higher is better), sorted by the first coordinate."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front[::-1]


def sum_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """The sum of several counts by name."""
    out: Counter[str] = Counter()
    for c in counts:
        out.update(c)
    return dict(sorted(out.items()))
