"""What all values share, and values made of plain functions.

A value that knows the whole vocabulary also has ``deltas`` and can shift all logits at once; any other steers tokens by
re-scoring candidates (``engine.guidance``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ivg.models.chat import prompt_text
from ivg.types import Hypothesis, Prompt, Value

if TYPE_CHECKING:
    from torch import Tensor

    from ivg.models.vocab import Vocabulary


@runtime_checkable
class VocabularyValue(Protocol):
    """A value with a number for every next token."""

    name: str

    @property
    def vocabulary(self) -> Vocabulary:
        """What the columns of :meth:`deltas` mean."""

    def deltas(self, hypotheses: Sequence[Hypothesis]) -> Tensor:
        """What to add to the base's logits, before the guidance weight; float32 [hypotheses, vocabulary]."""

    def score(self, hypotheses: Sequence[Hypothesis]) -> list[float]:
        """One number for each hypothesis."""

    def release(self, keys: Sequence[int]) -> None:
        """Forget these hypotheses."""


class FunctionValue:
    """A value from a Python function of (prompt text, response text); nothing is cached.

    Args:
        function: higher is better; called once for each hypothesis.
        name: in usage and traces.
    """

    def __init__(self, function: Callable[[str, str], float], name: str = "function") -> None:
        self.function, self.name = function, name

    def score(self, hypotheses: Sequence[Hypothesis]) -> list[float]:
        """The function's number for each hypothesis."""
        return [float(self.function(prompt_text(h.prompt), h.text)) for h in hypotheses]

    def check(self, prompt: Prompt, new_tokens: int) -> None:
        """Any text will do."""

    def release(self, keys: Sequence[int]) -> None:
        """Nothing is kept."""


class CompositeValue:
    """A weighted sum of values: linear in its parts, weights of either sign.

    Args:
        parts: (weight, value) pairs.
        name: in traces.
    """

    def __init__(self, parts: Sequence[tuple[float, Value]], name: str = "composite") -> None:
        self.parts, self.name = tuple(parts), name

    def score(self, hypotheses: Sequence[Hypothesis]) -> list[float]:
        """sum_i w_i * V_i for each hypothesis."""
        totals = [0.0] * len(hypotheses)
        for weight, value in self.parts:
            for i, score in enumerate(value.score(hypotheses)):
                totals[i] += weight * score
        return totals

    def check(self, prompt: Prompt, new_tokens: int) -> None:
        """Every part must be able to read them."""
        for _, value in self.parts:
            value.check(prompt, new_tokens)

    def release(self, keys: Sequence[int]) -> None:
        """Release them in every part."""
        for _, value in self.parts:
            value.release(keys)

    def full_vocabulary(self) -> bool:
        """True when every part has a number for every next token."""
        return all(has_deltas(value) for _, value in self.parts)

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary that the parts share.

        Raises:
            VocabularyError: when they do not share one.
        """
        first, *others = (value.vocabulary for _, value in self.parts if isinstance(value, VocabularyValue))
        for other in others:
            first.require_same(other, "give the composite candidates to re-score (--guide-candidates 20)")
        return first

    def deltas(self, hypotheses: Sequence[Hypothesis]) -> Tensor:
        """sum_i w_i * deltas_i, float32 [hypotheses, smallest vocabulary of the parts]."""
        shifts = [weight * value.deltas(hypotheses) for weight, value in self.parts if isinstance(value, VocabularyValue)]
        width = min(s.shape[1] for s in shifts)
        return sum((s[:, :width] for s in shifts[1:]), shifts[0][:, :width])


def has_deltas(value: Value) -> bool:
    """Can ``value`` shift the whole vocabulary at once?"""
    full = getattr(value, "full_vocabulary", None)
    return isinstance(value, VocabularyValue) and (full is None or full())
