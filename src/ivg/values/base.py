"""Values made of functions and of other values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ivg.errors import ConfigError, IVGError, ScoreFault
from ivg.models.chat_template import prompt_text
from ivg.types import Hypothesis, Prompt, Value
from ivg.types.guides import VocabularyValue, knows_vocabulary
from ivg.types.scores import Scores, every, number, raised, score_each

if TYPE_CHECKING:
    from torch import Tensor

    from ivg.models.vocabulary import Vocabulary


class FunctionValue:
    """A value from a Python function of (prompt text, response text); nothing is cached.

    Args:
        function: higher is better; called once for each hypothesis.
        name: in usage and traces.
    """

    def __init__(self, function: Callable[[str, str], float], name: str = "function") -> None:
        self.function, self.name = function, name

    def score(self, hypotheses: Sequence[Hypothesis]) -> list[float]:
        """The function's number for each hypothesis; raises as :meth:`judge`."""
        return self.judge([(h.prompt, h.text) for h in hypotheses])

    def judge(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        """The function's number for each (prompt, response); every pair is asked for once, whatever the others do.

        Raises:
            ScoreError: some raise, or have no finite number; has the scores of all others.
        """
        return every([self._ask(prompt, response) for prompt, response in pairs])

    def _ask(self, prompt: Prompt, response: str) -> float | ScoreFault:
        name = f"the value {self.name}"
        try:
            return number(name, self.function(prompt_text(prompt), response))
        except IVGError:
            raise
        except Exception as e:  # whatever a user's function raises
            return raised(name, e)

    def check(self, prompt: Prompt, new_tokens: int) -> None:
        """Any text will do."""

    def release(self, keys: Sequence[int]) -> None:
        """Nothing is kept."""


class CompositeValue:
    """A weighted sum of values: linear in its parts, weights of either sign.

    Args:
        parts: (weight, value) pairs.
        name: in traces.

    Raises:
        ConfigError: a weight that is no finite number.
    """

    def __init__(self, parts: Sequence[tuple[float, Value]], name: str = "composite") -> None:
        for weight, value in parts:
            if not isinstance(weight, int | float) or not math.isfinite(weight):
                raise ConfigError(f"the weight of {value.name} must be a finite number, got {weight!r}")
        self.parts, self.name = tuple(parts), name

    def score(self, hypotheses: Sequence[Hypothesis]) -> list[float]:
        """sum_i w_i * V_i for each hypothesis.

        Raises:
            ScoreError: a part has no finite number for some of them; has the scores of all others.
        """
        totals: Scores = [0.0] * len(hypotheses)
        for weight, value in self.parts:
            for i, (total, score) in enumerate(zip(totals, score_each(value, hypotheses), strict=True)):
                if not isinstance(total, ScoreFault):
                    totals[i] = score if isinstance(score, ScoreFault) else total + weight * score
        return every(totals)

    def check(self, prompt: Prompt, new_tokens: int) -> None:
        """Every part must be able to read them."""
        for _, value in self.parts:
            value.check(prompt, new_tokens)

    def inherit_cache(self, hypotheses: Sequence[Hypothesis]) -> None:
        """Hand caches on in every part that keeps one."""
        for _, value in self.parts:
            inherit_cache = getattr(value, "inherit_cache", None)
            if inherit_cache is not None:
                inherit_cache(hypotheses)

    def release(self, keys: Sequence[int]) -> None:
        """Release them in every part."""
        for _, value in self.parts:
            value.release(keys)

    def full_vocabulary(self) -> bool:
        """True when every part has a number for every next token."""
        return all(knows_vocabulary(value) for _, value in self.parts)

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
