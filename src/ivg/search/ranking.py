"""Selection by scores: numbers in, positions out. Pure functions on lists."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def top(scores: Sequence[float], width: int) -> list[int]:
    """Positions of the ``width`` best scores, best first; among equals the earlier one."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:width]


def soft(scores: Sequence[float], width: int, scale: float, uniform: Callable[[int], float]) -> list[int]:
    """``width`` positions drawn without replacement with probability proportional to exp(score / scale).

    ``uniform(i)`` gives the i-th number in [0, 1). Soft best-of-N is this with width 1.
    """
    remaining, chosen = list(range(len(scores))), []
    for draw in range(min(width, len(scores))):
        best = max(scores[i] for i in remaining)
        weights = [math.exp((scores[i] - best) / scale) for i in remaining]
        threshold, total = uniform(draw) * sum(weights), 0.0
        pick = len(remaining) - 1
        for position, weight in enumerate(weights):
            total += weight
            if total > threshold:
                pick = position
                break
        chosen.append(remaining.pop(pick))
    return chosen


def systematic(weights: Sequence[float], count: int, uniform: float) -> list[int]:
    """``count`` positions, each on the average ``count * weight`` times, by one number in [0, 1) (Kitagawa 1996).

    Position i is chosen once for every k with (uniform + k) / count inside its piece of the cumulated ``weights``, which
    sum to 1. In the order of the weights.
    """
    chosen: list[int] = []
    total, last = 0.0, max(i for i, w in enumerate(weights) if w > 0)
    for i, weight in enumerate(weights):
        total += weight
        while len(chosen) < count and ((uniform + len(chosen)) / count < total or i == last):
            chosen.append(i)
    return chosen


def common_prefix(texts: Sequence[str]) -> str:
    """The longest text with which all of ``texts`` begin."""
    return texts[0][: common_length(texts)] if texts else ""


def common_length(sequences: Sequence[str] | Sequence[tuple[int, ...]]) -> int:
    """With how many characters or tokens all of ``sequences`` begin."""
    low, high = min(sequences, default=()), max(sequences, default=())
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
