"""How a trained reward orders held-out responses, beside what their length alone does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ivg.diagnostics.ranking import ScoredPairs, all_pairs, pair_accuracies, spearman_within
from ivg.diagnostics.stats import Floats
from ivg.training.data import RatedResponse
from ivg.training.length import word_count
from ivg.training.pairing import Comparisons
from ivg.types import Preference, Prompt
from ivg.values.reward import RewardModel


def measure_ranking(reward: RewardModel, rows: Comparisons | Sequence[Preference], max_length: int) -> dict[str, Any]:
    """Metrics of a reward on held-out rows; ``length`` is the rule that the response with more words is the better one.

    Args:
        reward: as it was trained.
        rows: held-out preferences; or comparisons, of which all held-out rated responses are scored, not only those in pairs.
        max_length: responses of which prompt and response have more tokens are left out, and counted.

    Returns:
        ``ranking``: ``responses``, ``responses_left_out``, accuracies of :func:`ivg.diagnostics.ranking.pair_accuracies` and, of rated
        responses, ``spearman_within_prompts``. Where length was regressed out of the scores, these are by the scores that remain, and
        ``ranking_by_given_scores`` has the same by the scores of the data. Empty if no row was held out.
    """
    rated = rows.rated if isinstance(rows, Comparisons) else ()
    given = rows.given if isinstance(rows, Comparisons) else ()
    finished = rows.finished if isinstance(rows, Comparisons) else rows
    texts = dict.fromkeys((row.prompt, row.response) for row in rated)
    texts |= dict.fromkeys((pair.prompt, text) for pair in finished for text in (pair.chosen, pair.rejected))
    ids = {key: reward.ids(reward.text(*key)) for key in texts}
    kept = [key for key, read in ids.items() if len(read) <= max_length]
    if not kept:
        return {}
    scores = dict(zip(kept, reward.logits([ids[key] for key in kept]), strict=True))
    known = [i for i, row in enumerate(rated) if (row.prompt, row.response) in scores]
    pairs = [pair for pair in finished if (pair.prompt, pair.chosen) in scores and (pair.prompt, pair.rejected) in scores]
    counts = {"responses": len(kept), "responses_left_out": len(ids) - len(kept)}
    out = {"ranking": {**counts, **ranking([rated[i] for i in known], {"reward": scores}, pairs)}}
    if isinstance(rows, Comparisons) and rows.length_slope is not None:
        out["ranking_by_given_scores"] = {**counts, **ranking([given[i] for i in known], {"reward": scores})}
    return out


Scores = dict[tuple[Prompt, str], float]


def ranking(rated: Sequence[RatedResponse], rewards: dict[str, Scores], finished: Sequence[Preference] = ()) -> dict[str, Any]:
    """The numbers of :func:`measure_ranking` of rewards that are known.

    Args:
        rated: rated responses.
        rewards: of each (prompt, response) in ``rated`` and ``finished``, by name.
        finished: preferences.
    """
    prompts: dict[Prompt, int] = {}
    number: dict[tuple[Prompt, str], int] = {}
    for prompt, text in [(row.prompt, row.response) for row in rated] + [(p.prompt, t) for p in finished for t in (p.chosen, p.rejected)]:
        number.setdefault((prompt, text), len(number))
        prompts.setdefault(prompt, len(prompts))
    words = np.array([float(word_count(text)) for _, text in number])
    columns = {name: np.array([scores[key] for key in number]) for name, scores in rewards.items()} | {"length": words}
    scores = np.array([row.score for row in rated])
    groups = np.array([prompts[row.prompt] for row in rated], dtype=np.int64)
    texts = np.array([number[row.prompt, row.response] for row in rated], dtype=np.int64)
    pairs = _both(all_pairs(scores, groups, texts), texts, finished, number, prompts)
    out = pair_accuracies(pairs, words, columns)
    if rated:
        of_rated: dict[str, Floats] = {name: column[texts] for name, column in columns.items()}
        out["spearman_within_prompts"] = spearman_within(scores, groups, of_rated)
    return out


def _both(
    pairs: ScoredPairs,
    texts: np.ndarray,
    finished: Sequence[Preference],
    number: dict[tuple[Prompt, str], int],
    prompts: dict[Prompt, int],
) -> ScoredPairs:
    """Pairs of rated responses, by the numbers of their texts, and the finished pairs."""
    more = [(number[p.prompt, p.chosen], number[p.prompt, p.rejected]) for p in finished]
    added = np.array(more, dtype=np.int64).reshape(-1, 2)
    margins = [np.nan if p.margin is None else abs(p.margin) for p in finished]
    return ScoredPairs(
        np.concatenate([texts[pairs.better], added[:, 0]]),
        np.concatenate([texts[pairs.worse], added[:, 1]]),
        np.concatenate([pairs.margin, np.array(margins, dtype=np.float64)]),
        np.concatenate([pairs.groups, np.array([prompts[p.prompt] for p in finished], dtype=np.int64)]),
    )
