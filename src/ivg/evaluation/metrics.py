r"""Figures of merit as pure functions of numbers and texts; numpy only.

**KL to the base.** For an answer y of a guided method without selection, E[sum_t log pi_guided(y_t) - log pi_base(y_t)] *is* the
KL divergence per answer, and the mean of the sums over sampled answers estimates it without bias (both distributions at the
request's temperature, before top-k and top-p: ``Completion.guide_shift``). Where something cuts both distributions afterwards (top-k,
top-p, min-p, a repetition penalty, greedy choice), answers are drawn from others, and the sums estimate no divergence.

Selection adds an amount that can only be bounded (derived here). Chunk search CBS(W, K, L) draws hypotheses from pi_guided: W*K for the
first chunk and K for every kept beam and chunk after it. Let N(y) be how often a complete hypothesis y of C chunks is drawn. Every
drawn prefix is extended at most once, by K draws (W*K at the root), so E[N(y)] <= W K^C pi_guided(y). The answer is one of those drawn:

    p(y) <= P(N(y) >= 1) <= E[N(y)] <= W K^C pi_guided(y),
    KL(p || pi_base) = E_p[log p/pi_guided] + E_p[log pi_guided/pi_base] <= log W + E[C] log K + E[sum of shifts].

With one beam (W = 1) every chunk is the best of K by itself, and the chain rule with the best-of-N bound log N - (N - 1)/N (Beirami et
al. 2024, arXiv 2401.01879) for each chunk is tighter; where all answers are one chunk by the method's settings it is the best of W*K. An
answer of several beams that happens to end in its first chunk has gone on competing, and is bounded as the others are. Where the number
of draws varies from chunk to chunk, W K^C becomes the product of the draws for the answer's prefix; so it does for soft choices, to which
the tighter form does not apply.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

ROUNDS = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its bootstrap interval."""

    mean: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return {"mean": round(self.mean, 6), "low": round(self.low, 6), "high": round(self.high, 6)}


def interval(values: Sequence[float], rounds: int = ROUNDS, seed: int = 0) -> Estimate:
    """Mean of one number for each prompt, and its 95 % interval by the percentile bootstrap over prompts (Efron 1979).

    Args:
        values: one for each prompt, seeds averaged before: answers to one prompt are not independent.
        rounds: bootstrap samples.
        seed: of the resampling; the same for all methods, so that equal values have equal intervals.

    Raises:
        ValueError: no values.
    """
    data = np.asarray(values, dtype=np.float64)
    if not data.size:
        raise ValueError("no values to average\n  every answer failed, or none was asked for")
    rng = np.random.default_rng(seed)
    slab = max(1, 4_000_000 // data.size)
    means = [data[rng.integers(data.size, size=(min(slab, rounds - done), data.size))].mean(1) for done in range(0, rounds, slab)]
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(data.mean()), float(low), float(high))


def by_key(pairs: Iterable[tuple[Hashable, float]]) -> dict[Hashable, float]:
    """The mean of each key's numbers, keys in order of appearance: seeds averaged for each prompt."""
    sums: dict[Hashable, list[float]] = {}
    for key, value in pairs:
        sums.setdefault(key, []).append(value)
    return {key: sum(values) / len(values) for key, values in sums.items()}


def win(ours: float, theirs: float) -> float:
    """1 for a win, 0 for a defeat, one half for a tie."""
    return 0.5 if ours == theirs else float(ours > theirs)


def selection_bound(draws: Sequence[int], *, alone: bool, soft: bool = False) -> float:
    """How much selection adds to the KL divergence at most, in nats (see the module's text).

    Args:
        draws: for each chunk of the answer, how many continuations of its prefix were drawn: W*K, then K, K …
        alone: every chunk is the best of its draws by itself: one beam is kept (W = 1), or all answers are one chunk.
        soft: choices are drawn by weight, not the best.
    """
    if soft or not alone:
        return sum(map(math.log, draws))
    return sum(math.log(n) - (n - 1) / n for n in draws)


def chunks_of(tokens: int, chunk_length: int | None) -> int:
    """How many chunks an answer of so many tokens was drawn in."""
    return 0 if tokens == 0 else 1 if chunk_length is None else -(-tokens // chunk_length)


def perplexity(logps: Sequence[float], tokens: Sequence[int]) -> float:
    """Exp of the mean negative log-probability per token, over all answers together; NaN where there is no token."""
    total = sum(tokens)
    return math.exp(-sum(logps) / total) if total else math.nan


def distinct(texts: Iterable[str], n: int) -> float:
    """Distinct word n-grams over all word n-grams of the texts together (Li et al. 2016, arXiv 1510.03055); 0 where there is none."""
    seen: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        grams = _grams(text.lower().split(), n)
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else 0.0


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """seq-rep-n: the share of an answer's token n-grams that repeat earlier ones (Welleck et al. 2020, arXiv 1908.04319)."""
    grams = _grams(ids, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def _grams(items: Sequence, n: int) -> list[tuple]:
    return list(zip(*(items[i:] for i in range(n)), strict=False))


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that no other point beats in both coordinates (higher is better), by the first coordinate."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front[::-1]


def total(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """The sum of several counts, by name."""
    out: Counter[str] = Counter()
    for c in counts:
        out.update(c)
    return dict(sorted(out.items()))
