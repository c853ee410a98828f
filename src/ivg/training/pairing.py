"""Pairs for ``ivg train reward`` and ``ivg train dpo`` from rated responses: which responses are compared, and which one is chosen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ivg.diagnostics.ranking import like_length
from ivg.errors import ConfigError
from ivg.settings.train import PairSettings
from ivg.training.data import RatedResponse, consecutive_pairs, preference, sampled_preference
from ivg.training.length import length_controlled, word_count
from ivg.training.split import last_share
from ivg.types import Preference, Prompt
from ivg.utils.rng import mix, uniform

Comparable = Preference | RatedResponse


@dataclass(frozen=True)
class Comparisons:
    """Pairs to train on, and all that a trained model is measured on.

    Attributes:
        pairs: all of them, in order.
        held_out: prompts for evaluation.
        rated: the held-out rated responses, not only those in pairs, with the scores that the pairs were made by.
        given: the same with the scores of the data.
        finished: held-out pairs that the data had as pairs.
        settings: what the pairs were made by.
        length_slope: of the scores over log(1 + words), where length was regressed out.
        left_out: pairs whose scores differ by less than the smallest margin (of those in order; of drawn pairs none is counted).
    """

    pairs: Sequence[Preference]
    held_out: frozenset[Prompt]
    rated: Sequence[RatedResponse] = ()
    given: Sequence[RatedResponse] = ()
    finished: Sequence[Preference] = ()
    settings: PairSettings = field(default_factory=PairSettings)
    length_slope: float | None = None
    left_out: int = 0

    def split(self) -> tuple[list[Preference], list[Preference]]:
        """(pairs to train on, pairs held out)."""
        return (
            [pair for pair in self.pairs if pair.prompt not in self.held_out],
            [pair for pair in self.pairs if pair.prompt in self.held_out],
        )

    @property
    def provenance(self) -> dict[str, Any]:
        """For ``run.json``: the settings, where they are not the defaults."""
        return {} if self.settings == PairSettings() else {"pairs": asdict(self.settings)}

    @property
    def metrics(self) -> dict[str, Any]:
        """For the metrics of the run."""
        out: dict[str, Any] = {"length_slope": self.length_slope} if self.length_slope is not None else {}
        return {**out, "pairs_below_min_margin": self.left_out} if self.settings.min_margin and not self.settings.pairs_per_prompt else out


def compare(
    sources: Sequence[Sequence[Comparable]],
    settings: PairSettings | None = None,
    *,
    seed: int = 0,
    eval_share: float = 0.05,
    limit: int | None = None,
) -> Comparisons:
    """Make pairs of the rows of each source (:func:`ivg.training.data.read_comparable`), and hold out the last prompts.

    Which prompts are held out does not depend on scores, so that models trained with other settings are measured on the same prompts.

    Args:
        sources: rows.
        settings: how pairs are made; None: of consecutive responses, labelled by the Bradley-Terry model.
        seed: of the draws.
        eval_share: share of the prompts that is held out.
        limit: largest number of pairs; None: all.

    Raises:
        ConfigError: no pair, or settings that need scores for rows without.
    """
    how = settings or PairSettings()
    rows = [row for source in sources for row in source]
    _require_scores(rows, how)
    rated = [row for row in rows if isinstance(row, RatedResponse)]
    items: list[Preference | _Candidate] = []
    if how.pairs_per_prompt is None:
        items = _in_order(sources)[:limit]
        prompts = [rated[i.first].prompt if isinstance(i, _Candidate) else i.prompt for i in items]
    else:
        prompts = [row.prompt for row in rated]
        if limit is not None:
            prompts = list(dict.fromkeys(prompts))[: -(-limit // how.pairs_per_prompt)]
    kept, test = set(prompts), last_share(prompts, eval_share)
    rated_by, slope = rated, None
    if how.control_length:
        rated_by, slope = length_controlled(rated, {row.prompt for row in rated if row.prompt in test or row.prompt not in kept})
    if how.pairs_per_prompt is None:
        pairs = list(_labelled(items, rated_by, how, seed))
    else:
        pairs = _drawn([row for row in rated_by if row.prompt in kept], how, seed)[:limit]
    if not pairs:
        apart = f" whose scores differ by {how.min_margin:g} or more" if how.min_margin else ""
        raise ConfigError(f"the data hold no pair of different responses to one prompt{apart}")
    both = [(a, b) for a, b in zip(rated_by, rated, strict=True) if a.prompt in test]
    return Comparisons(
        pairs,
        test,
        rated=[a for a, _ in both],
        given=[b for _, b in both],
        finished=[pair for pair in items if isinstance(pair, Preference) and pair.prompt in test],
        settings=how,
        length_slope=slope,
        left_out=len(items) - len(pairs) if items else 0,
    )


@dataclass(frozen=True)
class _Candidate:
    """Indices of two rated responses, and what their label is drawn by."""

    first: int
    second: int
    number: int


def _require_scores(rows: Iterable[Comparable], how: PairSettings) -> None:
    finished = [row for row in rows if isinstance(row, Preference)]
    if finished and how.by_score:
        raise ConfigError(
            "--pairs-per-prompt, --label higher and --control-length need scores of single responses, and the data have finished pairs\n"
            "  give rows with prompt, response, score; or leave these options out"
        )
    if how.min_margin and any(pair.margin is None for pair in finished):
        raise ConfigError(
            "--min-margin needs scores, and the data have pairs without\n  give chosen_score and rejected_score too, or leave it out"
        )


def _in_order(sources: Sequence[Sequence[Comparable]]) -> list[Preference | _Candidate]:
    """Finished pairs as they are, rated responses of a source paired in order."""
    out: list[Preference | _Candidate] = []
    start = 0
    for source in sources:
        rated = [row for row in source if isinstance(row, RatedResponse)]
        out += [row for row in source if isinstance(row, Preference)]
        out += [_Candidate(start + i, start + j, j) for i, j in consecutive_pairs(rated)]
        start += len(rated)
    return out


def _labelled(
    items: Iterable[Preference | _Candidate], rated: Sequence[RatedResponse], how: PairSettings, seed: int
) -> Iterable[Preference]:
    for item in items:
        if isinstance(item, Preference):
            if not how.min_margin or abs(item.margin or 0.0) >= how.min_margin:
                yield item
            continue
        first, second = rated[item.first], rated[item.second]
        apart = abs(first.score - second.score)
        if apart >= how.min_margin and (apart > 0 or how.label == "sampled"):
            yield _pair(first, second, how, uniform(seed, item.number))


def _pair(first: RatedResponse, second: RatedResponse, how: PairSettings, draw: float) -> Preference:
    if how.label == "sampled":
        return sampled_preference(first, second, draw)
    return preference(first, second) if first.score > second.score else preference(second, first)


def _drawn(rated: Sequence[RatedResponse], how: PairSettings, seed: int) -> list[Preference]:
    groups: dict[Prompt, list[RatedResponse]] = {}
    for row in rated:
        groups.setdefault(row.prompt, []).append(row)
    out: list[Preference] = []
    for number, members in enumerate(groups.values()):
        for first, second in draw_pairs(members, how, mix(seed, number)):
            out.append(_pair(members[first], members[second], how, uniform(seed, number, first, second)))
    return out


def draw_pairs(rows: Sequence[RatedResponse], settings: PairSettings, seed: int) -> list[tuple[int, int]]:
    """Different pairs (i < j) of the responses to one prompt, each response in about as many as every other.

    Pairs are drawn one after the other, at random among those whose responses are in the fewest pairs so far. Same texts, equal scores and
    scores that differ by less than the smallest margin make no pair.

    Args:
        rows: rated responses to one prompt.
        settings: number of pairs (:attr:`PairSettings.pairs_per_prompt`), smallest margin, share of pairs of like length.
        seed: of the draws.

    Returns:
        As many pairs as wanted, or all there are.
    """
    wanted = settings.pairs_per_prompt or 1
    first, second = np.triu_indices(len(rows), 1)
    scores = np.array([row.score for row in rows])
    words = np.array([word_count(row.response) for row in rows], dtype=np.float64)
    number: dict[str, int] = {}
    texts = np.array([number.setdefault(row.response, len(number)) for row in rows])
    apart = np.abs(scores[first] - scores[second])
    usable = (texts[first] != texts[second]) & (apart > 0) & (apart >= settings.min_margin)
    first, second = first[usable], second[usable]
    draw = _Draw(first, second, len(rows), np.random.default_rng(seed).random(len(first)))
    draw.take(like_length(words[first], words[second]), round(wanted * settings.like_length))
    draw.take(np.ones(len(first), dtype=bool), wanted - len(draw.taken))
    return [(int(first[k]), int(second[k])) for k in sorted(draw.taken)]


class _Draw:
    """Pairs that were taken of all candidates, and how many pairs each response is in."""

    def __init__(self, first: NDArray[np.int64], second: NDArray[np.int64], responses: int, order: NDArray[np.float64]) -> None:
        self.first, self.second, self.order = first, second, order
        self.uses = np.zeros(responses)
        self.taken: list[int] = []

    def take(self, allowed: NDArray[np.bool_], count: int) -> None:
        """Take ``count`` of the allowed candidates [candidates], or all of them."""
        free = allowed.copy()
        free[self.taken] = False
        for _ in range(min(count, int(free.sum()))):
            a, b = self.uses[self.first], self.uses[self.second]
            rank = np.maximum(a, b) * (2 * len(self.order) + 2) + a + b + self.order  # the most used first, then both, then at random
            best = int(np.argmin(np.where(free, rank, np.inf)))
            free[best] = False
            self.taken.append(best)
            self.uses[[self.first[best], self.second[best]]] += 1
