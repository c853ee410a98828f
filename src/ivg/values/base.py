"""Values made of functions, of other values, and of cached language models."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

from ivg.errors import ConfigError, IVGError, ScoreFault
from ivg.models.chat_template import prompt_text
from ivg.types import Hypothesis, Prompt, Reward, Value
from ivg.types.scores import Scores, exception_fault, finite_score, require_scores, score_each, score_each_candidate

if TYPE_CHECKING:
    from torch import Tensor

    from ivg.models.cached_lm import CachedLM
    from ivg.models.vocabulary import Vocabulary


class FunctionValue(Reward):
    """A value from a Python function of (prompt text, response text).

    Args:
        function: higher is better; called once for each hypothesis.
        name: in usage and traces.
    """

    def __init__(self, function: Callable[[str, str], float], name: str = "function") -> None:
        self.function, self.name = function, name

    def judge(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        """The function's number for each (prompt, response); every pair is scored once, whatever the others do.

        Raises:
            ScoreError: some raise, or have no finite number; has the scores of all others.
        """
        return require_scores([self._call(prompt, response) for prompt, response in pairs])

    def _call(self, prompt: Prompt, response: str) -> float | ScoreFault:
        name = f"the value {self.name}"
        try:
            return finite_score(name, self.function(prompt_text(prompt), response))
        except IVGError:
            raise
        except Exception as e:  # whatever a user's function raises
            return exception_fault(name, e)


class CompositeValue(Value):
    """A weighted sum of values: linear in its parts, weights of either sign.

    Args:
        parts: (weight, value) pairs.
        name: in traces.

    Raises:
        ConfigError: a weight that is no finite number.
    """

    def __init__(self, parts: Sequence[tuple[float, Value]], name: str = "composite") -> None:
        for weight, value in parts:
            _check_finite(f"the weight of {value.name}", weight)
        self.parts, self.name = tuple(parts), name

    def score(self, hypotheses: Sequence[Hypothesis]) -> list[float]:
        """sum_i w_i * V_i for each hypothesis.

        Raises:
            ScoreError: a part has no finite number for some of them; has the scores of all others.
        """
        return self._sum([score_each(value, hypotheses) for _, value in self.parts], len(hypotheses))

    def score_candidates(self, hypotheses: Sequence[Hypothesis], candidates: Sequence[Hypothesis]) -> list[float]:
        """sum_i w_i * V_i for each candidate; raises as :meth:`score`."""
        return self._sum([score_each_candidate(value, hypotheses, candidates) for _, value in self.parts], len(candidates))

    def _sum(self, scores: Sequence[Scores], count: int) -> list[float]:
        """The sums of the parts' ``scores`` of ``count`` hypotheses."""
        totals: Scores = [0.0] * count
        for (weight, _), found in zip(self.parts, scores, strict=True):
            for i, (total, score) in enumerate(zip(totals, found, strict=True)):
                if not isinstance(total, ScoreFault):
                    totals[i] = score if isinstance(score, ScoreFault) else total + weight * score
        return require_scores(totals)

    def full_vocabulary(self) -> bool:
        """True when every part has a number for every next token."""
        return bool(self.parts) and all(value.full_vocabulary() for _, value in self.parts)

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary that the parts share.

        Raises:
            VocabularyError: when they do not share one.
        """
        first, *others = (value.vocabulary for _, value in self.parts if value.full_vocabulary())
        for other in others:
            first.require_same(other, "give the composite candidates to re-score (--guide-candidates 20)")
        return first

    def deltas(self, hypotheses: Sequence[Hypothesis]) -> Tensor:
        """sum_i w_i * deltas_i, float32 [hypotheses, smallest vocabulary of the parts], on the device of the first."""
        if not self.full_vocabulary():
            return super().deltas(hypotheses)
        return _sum_of_deltas([weight * value.deltas(hypotheses) for weight, value in self.parts])

    def recent_deltas(self, hypotheses: Sequence[Hypothesis], counts: Sequence[int]) -> list[Tensor] | None:
        """See :meth:`ivg.types.Value.recent_deltas`; None where a part has none."""
        found = [value.recent_deltas(hypotheses, counts) for _, value in self.parts]
        weighted = [[weight * d for d in deltas] for (weight, _), deltas in zip(self.parts, found, strict=True) if deltas is not None]
        return [_sum_of_deltas(rows) for rows in zip(*weighted, strict=True)] if len(weighted) == len(found) else None


def _sum_of_deltas(shifts: Sequence[Tensor]) -> Tensor:
    """The sum over the columns that all have, on the device of the first."""
    width, device = min(s.shape[1] for s in shifts), shifts[0].device
    return sum((s[:, :width].to(device) for s in shifts[1:]), shifts[0][:, :width])


class WorstCaseValue(Value):
    """The worst of several values: min_i w_i * (V_i - r_i), the achievement function of Wierzbicki (1980).

    Weights bring values of different scales to one; the references r_i say which level of each is as good as which of the others. To
    select the best candidate by it is what RMOD (Son et al. 2025, arXiv 2503.08796) plays for, with one candidate in place of a
    mixture of them: the minimum over weights of the simplex of a candidate's weighted sum is its worst value.

    Args:
        parts: (weight, value) pairs, at least one.
        name: in traces.
        reference: r_i, one number for each part; None: zeros.

    Raises:
        ConfigError: no parts; a weight or a reference that is no finite number; another number of references.
    """

    is_sum = False

    def __init__(self, parts: Sequence[tuple[float, Value]], name: str = "worst case", reference: Sequence[float] | None = None) -> None:
        levels = [0.0] * len(parts) if reference is None else reference
        if not parts or len(levels) != len(parts):
            raise ConfigError(f"{name} has {len(parts)} values and {len(levels)} references\n  expected a reference for each of its values")
        for (weight, value), level in zip(parts, levels, strict=True):
            _check_finite(f"the weight of {value.name}", weight)
            _check_finite(f"the reference of {value.name}", level)
        self.parts, self.name, self.reference = tuple(parts), name, tuple(levels)

    def score(self, hypotheses: Sequence[Hypothesis]) -> list[float]:
        """min_i w_i * (V_i - r_i) for each hypothesis.

        Raises:
            ScoreError: a part has no finite number for some of them; has the scores of all others.
        """
        return self._least([score_each(value, hypotheses) for _, value in self.parts], len(hypotheses))

    def score_candidates(self, hypotheses: Sequence[Hypothesis], candidates: Sequence[Hypothesis]) -> list[float]:
        """min_i w_i * (V_i - r_i) for each candidate; raises as :meth:`score`."""
        return self._least([score_each_candidate(value, hypotheses, candidates) for _, value in self.parts], len(candidates))

    def _least(self, scores: Sequence[Scores], count: int) -> list[float]:
        """The worst of the parts' ``scores`` of ``count`` hypotheses."""
        worst: Scores = [math.inf] * count
        for (weight, _), level, found in zip(self.parts, self.reference, scores, strict=True):
            for i, (least, score) in enumerate(zip(worst, found, strict=True)):
                if not isinstance(least, ScoreFault):
                    worst[i] = score if isinstance(score, ScoreFault) else min(least, weight * (score - level))
        return require_scores(worst)


def combine_values(parts: Sequence[tuple[float, Value]], name: str, reference: Sequence[float] | None = None) -> Value:
    """The weighted sum of (weight, value) pairs; with ``reference`` the worst of them (:class:`WorstCaseValue`)."""
    return CompositeValue(parts, name) if reference is None else WorstCaseValue(parts, name, reference)


class CombinedValues:
    """:func:`combine_values` with the same object for the same values and weights, so that equal requests are scored together.

    Args:
        size: combinations that are kept; a server may see any number of weights.
    """

    def __init__(self, size: int = 256) -> None:
        self._size, self._lock = size, Lock()
        self._known: dict[tuple[Any, ...], Value] = {}

    def __call__(self, parts: Sequence[tuple[float, Value]], name: str, reference: Sequence[float] | None = None) -> Value:
        """See :func:`combine_values`."""
        key = (reference, *((weight, id(value)) for weight, value in parts))
        with self._lock:
            while key not in self._known and len(self._known) >= self._size:
                del self._known[next(iter(self._known))]
            return self._known.setdefault(key, combine_values(parts, name, reference))  # it holds its parts, so no id is reused


def _check_finite(what: str, number: object) -> None:
    if not isinstance(number, int | float) or not math.isfinite(number):
        raise ConfigError(f"{what} must be a finite number, got {number!r}")


class CachedLMValue(Value):
    """A value that reads with language models of this process, each of which caches what it has read."""

    @abstractmethod
    def cached_lms(self) -> list[CachedLM]:
        """The models; the first one's vocabulary is the value's."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the first model; :meth:`deltas` has its columns."""
        return self.cached_lms()[0].vocabulary

    def full_vocabulary(self) -> bool:
        """Yes: a language model has a number for every next token."""
        return True

    def check(self, prompt: Prompt, new_tokens: int) -> None:
        """Raise PromptError where prompt and response exceed a model's context."""
        for model in self.cached_lms():
            model.check_length(prompt, new_tokens)

    def inherit_cache(self, hypotheses: Sequence[Hypothesis]) -> None:
        """See :meth:`CachedLM.inherit_cache`."""
        for model in self.cached_lms():
            model.inherit_cache(hypotheses)

    def truncate(self, hypotheses: Sequence[Hypothesis]) -> None:
        """See :meth:`CachedLM.truncate`."""
        for model in self.cached_lms():
            model.truncate(hypotheses)

    def release(self, keys: Sequence[int]) -> None:
        """Free the cache rows."""
        for model in self.cached_lms():
            model.release(keys)

    def reset_caches(self) -> None:
        """Empty the caches of the models."""
        for model in self.cached_lms():
            model.reset_cache()

    def release_memory(self) -> None:
        """Give cache memory that holds nothing back to the system."""
        for model in self.cached_lms():
            model.model.release_memory()

    def networks(self) -> list[tuple[str, Any]]:
        """Their networks."""
        return [(model.name, model.model.network) for model in self.cached_lms()]


class _ForeignValue(Value):
    """An object that scores hypotheses and does not derive from :class:`Value`, as version 0.1 allowed."""

    def __init__(self, value: Any, name: str) -> None:
        self.value, self.name = value, getattr(value, "name", name)

    def score(self, hypotheses: Sequence[Hypothesis]) -> list[float]:
        return self.value.score(hypotheses)

    def check(self, prompt: Prompt, new_tokens: int) -> None:
        self.value.check(prompt, new_tokens)

    def release(self, keys: Sequence[int]) -> None:
        self.value.release(keys)


def as_value(value: Any, name: str) -> Value:
    """``value`` as a :class:`Value`: itself, or a function of (prompt text, response text).

    An object with ``score``, ``check`` and ``release`` that does not derive from :class:`Value` is taken until version 0.3.

    Raises:
        ConfigError: none of these.
    """
    if isinstance(value, Value):
        return value
    if callable(getattr(value, "score", None)):
        kind = type(value).__name__
        warnings.warn(f"{kind} should derive from ivg.Value; version 0.3 will take no other objects", DeprecationWarning, stacklevel=3)
        return _ForeignValue(value, name)
    if callable(value):
        return FunctionValue(value, name)
    raise ConfigError(f"{name} is a {type(value).__name__}\n  expected an ivg.Value, or a function of (prompt text, response text)")
