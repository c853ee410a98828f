"""How well a reward ranks the responses to a prompt, and how well their length alone does: pure functions of numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ivg.diagnostics.stats import Floats, spearman, tie_tolerance, wilson, wins

CLEAR_MARGIN = 1.0
"""Pairs whose scores differ by more are clear: of log-odds, the better response then wins at least 73 % of comparisons by Bradley-Terry."""
LIKE_LENGTH = 0.2
"""Word counts are alike if the smaller is less than the larger by at most this fraction of the larger."""


@dataclass(frozen=True)
class ScoredPairs:
    """Pairs of responses to one prompt, of which one is the better.

    Attributes:
        better: index of the better response [pairs].
        worse: index of the other [pairs].
        margin: difference of their scores; NaN: unknown [pairs].
        groups: number of the prompt [pairs].
    """

    better: NDArray[np.int64]
    worse: NDArray[np.int64]
    margin: Floats
    groups: NDArray[np.int64]


def like_length(first: Floats, second: Floats) -> NDArray[np.bool_]:
    """Are these word counts within :data:`LIKE_LENGTH` of each other? [pairs]."""
    return np.minimum(first, second) >= (1 - LIKE_LENGTH) * np.maximum(first, second)


def all_pairs(scores: Floats, groups: NDArray[np.int64], texts: NDArray[np.int64]) -> ScoredPairs:
    """All pairs of different texts with different scores in one group.

    Args:
        scores: of responses [responses].
        groups: number of the prompt [responses].
        texts: the same number for the same text [responses].
    """
    parts = []
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        first, second = np.triu_indices(len(members), 1)
        parts.append(np.stack([members[first], members[second]]))
    a, b = np.concatenate(parts, axis=1) if parts else np.zeros((2, 0), dtype=np.int64)
    kept = (texts[a] != texts[b]) & (scores[a] != scores[b])
    a, b = a[kept], b[kept]
    higher = scores[a] > scores[b]
    return ScoredPairs(np.where(higher, a, b), np.where(higher, b, a), np.abs(scores[a] - scores[b]), groups[a])


def pair_accuracies(pairs: ScoredPairs, words: Floats, rewards: Mapping[str, Floats]) -> dict[str, Any]:
    """For all pairs, clear pairs, and clear pairs of like length: their number, and the accuracy of every reward with its interval.

    Args:
        pairs: of responses.
        words: word counts [responses].
        rewards: of the responses, by name; equal ones count half [responses].

    Returns:
        ``{"pairs": {"count": …, NAME: {"rate", "low", "high"}}, "clear_pairs": …, "clear_pairs_of_like_length": …}``; kinds of pairs of
        which there are none have a count of 0 alone, and where no margin is known there are no clear pairs.
    """
    clear = pairs.margin > CLEAR_MARGIN  # False where it is unknown
    kinds = {"pairs": np.ones(len(clear), dtype=bool)}
    if not np.isnan(pairs.margin).all():
        kinds |= {"clear_pairs": clear, "clear_pairs_of_like_length": clear & like_length(words[pairs.better], words[pairs.worse])}
    out: dict[str, Any] = {}
    for kind, chosen in kinds.items():
        out[kind] = {"count": int(chosen.sum())}
        for name, found in rewards.items():
            if chosen.any():
                tolerance = tie_tolerance(found[pairs.better], found[pairs.worse])
                hits = wins(found[pairs.better[chosen]], found[pairs.worse[chosen]], tolerance)
                measured = asdict(wilson(hits, np.unique(pairs.groups[chosen], return_inverse=True)[1]))
                out[kind][name] = {key: round(measured[key], 5) for key in ("rate", "low", "high")}
    return out


def spearman_within(scores: Floats, groups: NDArray[np.int64], rewards: Mapping[str, Floats]) -> dict[str, Any]:
    """The mean over groups of Spearman's rank correlation with ``scores``; a constant reward has 0, a group of equal scores is left out.

    Args:
        scores: of responses [responses].
        groups: number of the prompt [responses].
        rewards: of the responses, by name [responses].

    Returns:
        ``{"prompts": number of groups, NAME: mean}``; no means without a group.
    """
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    members = [m for m in members if np.unique(scores[m]).size > 1]
    out: dict[str, Any] = {"prompts": len(members)}
    for name, found in rewards.items():
        if members:
            out[name] = round(float(np.mean([spearman(found[m], scores[m]) or 0.0 for m in members])), 5)
    return out
