"""Values made of functions, of other values, and of cached language models."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

from ivg.errors import ConfigError, IVGError, ScoreFault
from ivg.models.chat_template import prompt_text
from ivg.types import Hypothesis, Prompt, Reward, Value
from ivg.types.scores import check_finite, checked_scores, exception_fault, finite_score, require_scores
from ivg.types.value import CombinedValue
from ivg.types.value import CompositeValue as CompositeValue
from ivg.types.value import NormalizedValue as NormalizedValue

RewardFunction = Callable[[str, str], float]
"""Of (prompt text, response text)."""
BatchFunction = Callable[[list[str], list[str]], Sequence[float]]
"""Of prompts and responses: one number for each pair."""

if TYPE_CHECKING:
    from ivg.models.cached_lm import CachedLM
    from ivg.models.vocabulary import Vocabulary


_MARK = "ivg_batched"


def batched(function: BatchFunction) -> BatchFunction:
    """Mark a function of (prompts, responses) that gives one number for each pair, as TRL's reward functions do; for use as a decorator.

    ``add_value``, ``--reward file.py:function`` and recipes then call it once for all hypotheses of all requests that are scored together.
    """
    setattr(function, _MARK, True)
    return function


class FunctionValue(Reward):
    """A value from a Python function of (prompt text, response text); or of lists of both, where it is batched.

    Args:
        function: higher is better; called once for each hypothesis, or once for all of them: ``f(prompts, responses)`` gives as many
            numbers, in a list, an array or a tensor.
        name: in usage and traces.
        batched: is it a function of lists? None: if it is marked by :func:`batched`.
    """

    def __init__(self, function: RewardFunction | BatchFunction, name: str = "function", *, batched: bool | None = None) -> None:
        self.function: Callable[..., Any] = function
        self.name = name
        self.batched = bool(getattr(function, _MARK, False)) if batched is None else batched

    def judge(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        """The function's number for each (prompt, response).

        A batched function that raises is called again with halves of the pairs, so that one bad pair does not cost the others; another
        function is called once for every pair.

        Raises:
            ScoreError: some raise, or have no finite number; has the scores of all others.
        """
        if self.batched:
            return require_scores(checked_scores(f"the value {self.name}", self._call_all, pairs))
        return require_scores([self._call(prompt, response) for prompt, response in pairs])

    def _call_all(self, pairs: Sequence[tuple[Prompt, str]]) -> Any:
        return self.function([prompt_text(prompt) for prompt, _ in pairs], [response for _, response in pairs])

    def _call(self, prompt: Prompt, response: str) -> float | ScoreFault:
        name = f"the value {self.name}"
        try:
            found = self.function(prompt_text(prompt), response)
            if isinstance(found, list | tuple):
                return ScoreFault(f"{name} gave a {type(found).__name__}: expected a number; a function of lists: @ivg.batched")
            return finite_score(name, found)
        except IVGError:
            raise
        except Exception as e:  # whatever a user's function raises
            return exception_fault(name, e)


class WorstCaseValue(CombinedValue):
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
            check_finite(f"the weight of {value.name}", weight)
            check_finite(f"the reference of {value.name}", level)
        self.parts, self.name, self.reference = tuple(parts), name, tuple(levels)

    def combine(self, scores: Sequence[float]) -> float:
        """min_i w_i * (V_i - r_i)."""
        return min(weight * (score - level) for (weight, _), score, level in zip(self.parts, scores, self.reference, strict=True))


def combine_values(parts: Sequence[tuple[float, Value]], name: str, reference: Sequence[float] | None = None) -> Value:
    """The weighted sum of (weight, value) pairs; with ``reference`` the worst of them (:class:`WorstCaseValue`)."""
    return CompositeValue(parts, name) if reference is None else WorstCaseValue(parts, name, reference)


class CombinationCache:
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
        return [(model.name, model.network) for model in self.cached_lms()]


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
