"""Length regressed out of scores: what remains says more than "the longer one is better".

Judges prefer longer responses (Singhal et al. 2023, arXiv 2310.03716; Dubois et al. 2024, arXiv 2404.04475). A model that is steered by a
reward fitted to such judgements gives longer answers, whatever else it learned.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from statistics import fmean

from ivg.errors import ConfigError
from ivg.training.data import RatedResponse
from ivg.types import Prompt


def word_count(text: str) -> int:
    """Words between white space."""
    return len(text.split())


def length_controlled(rows: Sequence[RatedResponse], held_out: Collection[Prompt] = frozenset()) -> tuple[list[RatedResponse], float]:
    """(the rows with scores from which length is regressed out, the fitted slope).

    With x = log(1 + words), both x and score less their means over the responses to the same prompt, the slope b is that of least squares.
    Each score loses b·(x - mean of x over its prompt), so the mean score of a prompt stays as it was.

    Args:
        rows: rated responses.
        held_out: prompts whose rows do not enter the fit.

    Raises:
        ConfigError: no prompt has responses of different lengths.
    """
    groups: dict[Prompt, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.prompt, []).append(i)
    x = [math.log1p(word_count(row.response)) for row in rows]
    above, squares = [0.0] * len(rows), 0.0
    products = 0.0
    for prompt, members in groups.items():
        middle = fmean(x[i] for i in members)
        for i in members:
            above[i] = x[i] - middle
            if prompt not in held_out:
                squares += above[i] ** 2
                products += above[i] * rows[i].score
    if squares < 1e-12:
        raise ConfigError(
            "--control-length fits scores over lengths within prompts, and no training prompt has responses of different lengths\n"
            "  give several rated responses to a prompt, or leave it out"
        )
    slope = products / squares
    return [replace(row, score=row.score - slope * a) for row, a in zip(rows, above, strict=True)], slope
