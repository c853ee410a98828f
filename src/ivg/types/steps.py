"""Steps of a response: the pieces of its text that a separator ends. Standard library only.

Process rewards score each step, and chunks may end where a step does (``chunk_until``). A piece of white space alone is no step: a blank
line between two lines that a line break ends is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ivg.settings.schema import validate
from ivg.settings.search import SearchSettings, StepAggregation

DEFAULT_SEPARATOR = "\n"
"""As in TRL's ``PRMTrainer``."""


@dataclass(frozen=True, slots=True)
class Steps:
    """What a request says of steps; None: as the value has it.

    Attributes:
        step_aggregation: how the scores of the steps make one number (:func:`aggregate`).
        step_separator: ends a step.
    """

    step_aggregation: StepAggregation | None = SearchSettings.step_aggregation
    step_separator: str | None = SearchSettings.step_separator

    def __post_init__(self) -> None:
        validate(self, SearchSettings)


def split_steps(text: str, separator: str) -> list[str]:
    """The steps of a response without their separators, the last one complete or not; a text of white space alone is one step."""
    return [piece for piece in text.split(separator) if piece.strip()] or [text]


def finished_steps(text: str, separator: str) -> int:
    """How many steps of ``text`` the separator has ended."""
    return sum(bool(piece.strip()) for piece in text.split(separator)[:-1])


def aggregate(log_probabilities: Sequence[float], how: StepAggregation) -> float:
    """One number for a response from log p of each of its steps, p the probability that the step is right.

    Returns:
        ``last``, ``min``, ``mean``: of the p, in [0, 1]. ``product``: the logarithm of the product of all p, so the sum of the log p, in
        nats: 0 or less, and comparable also where the product is too small for a number.
    """
    if how == "product":
        return math.fsum(log_probabilities)
    p = [math.exp(x) for x in log_probabilities]
    return p[-1] if how == "last" else min(p) if how == "min" else math.fsum(p) / len(p)
