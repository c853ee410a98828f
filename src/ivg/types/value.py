"""The interface of values: numbers for hypotheses; sums of values, and normalised ones. Standard library only.

Only :meth:`Value.score` must be written; the default of all else does it for each of :attr:`Value.parts`. :mod:`ivg.testing` has the laws.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, Protocol

from ivg.errors import ConfigError
from ivg.types.beam import Hypothesis
from ivg.types.messages import Prompt
from ivg.types.scores import check_finite, combine_scores, finite_score, require_scores, score_each, score_each_candidate
from ivg.types.steps import Steps


class Drafter(Protocol):
    """Drafts tokens for some hypotheses ahead of the base, and remembers what it read meanwhile (:meth:`Value.drafter`)."""

    def logits(self, hypotheses: Sequence[Hypothesis]) -> Any:
        """Draft logits after the last token of each; float32 tensor [hypotheses, vocabulary].

        When it is called again for a hypothesis, that has one token more.
        """

    def deltas(self, hypotheses: Sequence[Hypothesis]) -> Any:
        """:meth:`Value.deltas` at all positions for which :meth:`logits` was called: row after row, in order, one tensor."""


class Value(ABC):
    """Scores hypotheses; higher is better.

    A score depends neither on what was scored before nor on the rest of the batch; caches are only an optimisation.
    """

    name: str = "value"
    """In usage, traces and errors."""
    parts: tuple[tuple[float, Value], ...] = ()
    """(weight, value) pairs that this value is made of; empty: it is not made of others."""
    is_sum: bool = True
    """It is the weighted sum of :attr:`parts`; False: another function of them."""

    @abstractmethod
    def score(self, hypotheses: Sequence[Hypothesis]) -> list[float]:
        """One finite number for each hypothesis.

        Raises:
            ScoreError: some have none; has the scores of all others.
            PromptError: a text that cannot be read.
        """

    def score_candidates(self, hypotheses: Sequence[Hypothesis], candidates: Sequence[Hypothesis]) -> list[float]:
        """As :meth:`score` of ``candidates``, each one token more than its ``parent``, which is one of ``hypotheses``.

        Nothing is kept of the candidates; what is kept of ``hypotheses`` is released as usual.
        """
        try:
            return self.score(candidates)
        finally:
            self.release([h.key for h in candidates])

    def check(self, prompt: Prompt, new_tokens: int) -> None:
        """Raise where prompt and a response of ``new_tokens`` base tokens cannot be read. Default: any can.

        Raises:
            PromptError: names the limit.
        """
        for _, part in self.parts:
            part.check(prompt, new_tokens)

    def with_steps(self, steps: Steps) -> Value | None:
        """This value with other settings of steps (the same object for the same settings); None: it scores no steps, the default."""
        return None

    # Caches of hypotheses

    def inherit_cache(self, hypotheses: Sequence[Hypothesis]) -> None:
        """Give hypotheses the cache of their parents without reading anything, because the parents are about to be released."""
        for _, part in self.parts:
            part.inherit_cache(hypotheses)

    def truncate(self, hypotheses: Sequence[Hypothesis]) -> None:
        """The last tokens of these were replaced: forget what was read after their last token but one (drafts, :meth:`drafter`)."""
        for _, part in self.parts:
            part.truncate(hypotheses)

    def release(self, keys: Sequence[int]) -> None:
        """Free what is kept for the hypotheses with these keys; unknown keys are ignored."""
        for _, part in self.parts:
            part.release(keys)

    # Guidance of every token

    @property
    def vocabulary(self) -> Any:
        """What the columns of :meth:`deltas` mean (:class:`ivg.models.vocabulary.Vocabulary`). Default: None, it has no columns."""
        return None

    def full_vocabulary(self) -> bool:
        """Can :meth:`deltas` be called? Default: no; such a value guides tokens by scoring the base's likeliest candidates."""
        return False

    def deltas(self, hypotheses: Sequence[Hypothesis]) -> Any:
        """What to add to the base's logits, before the guidance weight; float32 tensor [hypotheses, vocabulary].

        Raises:
            ConfigError: by default.
        """
        raise ConfigError(f"{self.name} needs a vocabulary head to shift all logits\n  give candidates to re-score (--guide-candidates 20)")

    def recent_deltas(self, hypotheses: Sequence[Hypothesis], counts: Sequence[int]) -> list[Any] | None:
        """:meth:`deltas` behind the prefixes that the last ``counts[i]`` tokens of each hypothesis followed, in one pass.

        Float32 tensors [counts[i], vocabulary], in order, for hypotheses in its own vocabulary. Default: None, there is no faster way than
        :meth:`deltas` of one prefix after the other; so it is for a class that overrides :meth:`deltas` and not this.
        """
        return None

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "deltas" in cls.__dict__ and "recent_deltas" not in cls.__dict__:
            cls.recent_deltas = Value.recent_deltas  # type: ignore[method-assign]

    def drafter(self, beta: float) -> Drafter | None:
        """Drafts a stretch of tokens guided with weight ``beta``. Default: None, it cannot draft."""
        return None

    def draft_model(self) -> Any:
        """The language model of this value that can write chunks in the base's place (:class:`ivg.models.cached_lm.CachedLM`).

        Default: None, it has none.
        """
        return None

    # Life cycle

    def reset_caches(self) -> None:
        """Empty all caches, so that later results do not depend on earlier calls, to the last bit."""
        for _, part in self.parts:
            part.reset_caches()

    def release_memory(self) -> None:
        """Give memory that is not needed now back to the system; results do not change."""
        for _, part in self.parts:
            part.release_memory()

    def restart(self) -> bool:
        """Start what runs in another process again if it died. True if it had died.

        Raises:
            ModelError: it does not start.
        """
        died = [part.restart() for _, part in self.parts]
        return any(died)

    def close(self) -> None:
        """Stop what runs in another process; a second call does nothing."""
        for _, part in self.parts:
            part.close()

    # What it is made of

    def cached_lms(self) -> list[Any]:
        """The :class:`~ivg.models.cached_lm.CachedLM` objects that it reads with in this process."""
        return [model for _, part in self.parts for model in part.cached_lms()]

    def networks(self) -> list[tuple[str, Any]]:
        """(name in usage, network) of all networks in this process."""
        return [pair for _, part in self.parts for pair in part.networks()]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    # Algebra: values are logarithms of weights, so their sums are products of these

    def __add__(self, other: Value | Literal[0]) -> Value:
        """The sum of two values; 0 is taken for ``sum(values)``."""
        if isinstance(other, Value):
            return CompositeValue.of([*_terms(self), *_terms(other)])
        return self if isinstance(other, int) and other == 0 else NotImplemented

    __radd__ = __add__

    def __sub__(self, other: Value) -> Value:
        """The difference of two values."""
        return self + -other if isinstance(other, Value) else NotImplemented

    def __neg__(self) -> Value:
        """The opposite: what this value finds good is bad."""
        return -1.0 * self

    def __mul__(self, factor: float) -> Value:
        """This value times a number.

        Raises:
            ConfigError: infinity or NaN.
        """
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            return NotImplemented
        return CompositeValue.of([(factor * weight, value) for weight, value in _terms(self)])

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Value:
        """This value divided by a number."""
        return self * (1 / divisor) if isinstance(divisor, int | float) else NotImplemented

    def normalize(self) -> NormalizedValue:
        """Log-probabilities in place of weights of next tokens (:class:`NormalizedValue`).

        Raises:
            ConfigError: it has no number for every next token.
        """
        return NormalizedValue(self)


class CombinedValue(Value):
    """A number made of those of its parts (:meth:`combine`)."""

    @abstractmethod
    def combine(self, scores: Sequence[float]) -> float:
        """The score of one hypothesis, from the scores that the parts give it."""

    def score(self, hypotheses: Sequence[Hypothesis]) -> list[float]:
        """See :meth:`Value.score`; a fault of a part is a fault of the whole."""
        found = [score_each(value, hypotheses) for _, value in self.parts]
        return combine_scores(found, len(hypotheses), self.combine)

    def score_candidates(self, hypotheses: Sequence[Hypothesis], candidates: Sequence[Hypothesis]) -> list[float]:
        """See :meth:`Value.score_candidates`; raises as :meth:`score`."""
        found = [score_each_candidate(value, hypotheses, candidates) for _, value in self.parts]
        return combine_scores(found, len(candidates), self.combine)


class CompositeValue(CombinedValue):
    """A weighted sum of values: linear in its parts, weights of either sign.

    Args:
        parts: (weight, value) pairs.
        name: in traces.

    Raises:
        ConfigError: a weight that is no finite number.
    """

    def __init__(self, parts: Sequence[tuple[float, Value]], name: str = "composite") -> None:
        for weight, value in parts:
            check_finite(f"the weight of {value.name}", weight)
        self.parts, self.name = tuple(parts), name

    @classmethod
    def of(cls, terms: Sequence[tuple[float, Value]]) -> CompositeValue:
        """The sum of weighted values, each once, named after them: ``2*tuned-0.5*length``."""
        weights: dict[int, tuple[float, Value]] = {}
        for weight, value in terms:
            weights[id(value)] = weights.get(id(value), (0.0, value))[0] + weight, value
        signed = [("-" if w < 0 else "+") + ("" if abs(w) == 1 else f"{abs(w):g}*") + v.name for w, v in weights.values()]
        return cls(list(weights.values()), "".join(signed).removeprefix("+"))

    def combine(self, scores: Sequence[float]) -> float:
        """sum_i w_i * V_i."""
        return sum((weight * score for (weight, _), score in zip(self.parts, scores, strict=True)), 0.0)

    def full_vocabulary(self) -> bool:
        """True when every part has a number for every next token."""
        return bool(self.parts) and all(value.full_vocabulary() for _, value in self.parts)

    @property
    def vocabulary(self) -> Any:
        """The vocabulary that the parts share.

        Raises:
            VocabularyError: when they do not share one.
        """
        first, *others = (value.vocabulary for _, value in self.parts if value.full_vocabulary())
        for other in others:
            first.require_same(other, "give the composite candidates to re-score (--guide-candidates 20)")
        return first

    def deltas(self, hypotheses: Sequence[Hypothesis]) -> Any:
        """sum_i w_i * deltas_i, float32 [hypotheses, smallest vocabulary of the parts], on the device of the first."""
        if not self.full_vocabulary():
            return super().deltas(hypotheses)
        return _sum_of_deltas([weight * value.deltas(hypotheses) for weight, value in self.parts])

    def recent_deltas(self, hypotheses: Sequence[Hypothesis], counts: Sequence[int]) -> list[Any] | None:
        """See :meth:`ivg.types.Value.recent_deltas`; None where a part has none."""
        found = [value.recent_deltas(hypotheses, counts) for _, value in self.parts]
        weighted = [[weight * d for d in deltas] for (weight, _), deltas in zip(self.parts, found, strict=True) if deltas is not None]
        return [_sum_of_deltas(rows) for rows in zip(*weighted, strict=True)] if len(weighted) == len(found) else None


def _sum_of_deltas(shifts: Sequence[Any]) -> Any:
    """The sum over the columns that all have, on the device of the first."""
    width, device = min(s.shape[1] for s in shifts), shifts[0].device
    return sum((s[:, :width].to(device) for s in shifts[1:]), shifts[0][:, :width])


def _terms(value: Value) -> list[tuple[float, Value]]:
    """(weight, value) pairs whose sum ``value`` is."""
    return list(value.parts) if type(value) is CompositeValue else [(1.0, value)]


class NormalizedValue(Value):
    """Log-probabilities of the distribution over next tokens that another value's numbers define.

    With d_t the value's :meth:`~Value.deltas` behind the first t tokens, the numbers for next tokens are log softmax(d_t), and the score is
    sum_t log softmax(d_t)[y_t] <= 0: the log-probability of the response, its end included. An autoregressive reward is normalised already.
    Guidance of tokens by one value stays the same (a constant of a position cancels); sums, selection and particle filters do not.

    Args:
        value: has a number for every next token of the base's vocabulary.
        name: in traces; default: that of the value, marked.

    Raises:
        ConfigError: it has not.
    """

    is_sum = False

    def __init__(self, value: Value, name: str | None = None) -> None:
        if not value.full_vocabulary():
            raise ConfigError(f"{value.name} has no number for every next token, so it cannot be normalised\n  use it as it is")
        self.value, self.name, self.parts = value, name or f"normalize({value.name})", ((1.0, value),)
        self._known: dict[int, tuple[int, float]] = {}
        """By key of a hypothesis: how many of its tokens have been read, and the sum over these."""

    @property
    def vocabulary(self) -> Any:
        """That of the value."""
        return self.value.vocabulary

    def full_vocabulary(self) -> bool:
        """Yes."""
        return True

    def deltas(self, hypotheses: Sequence[Hypothesis]) -> Any:
        """Log softmax of the value's numbers, float32 [hypotheses, vocabulary]."""
        return self.value.deltas(hypotheses).log_softmax(-1)

    def recent_deltas(self, hypotheses: Sequence[Hypothesis], counts: Sequence[int]) -> list[Any] | None:
        """See :meth:`Value.recent_deltas`."""
        found = self.value.recent_deltas(hypotheses, counts)
        return None if found is None else [deltas.log_softmax(-1) for deltas in found]

    def score(self, hypotheses: Sequence[Hypothesis]) -> list[float]:
        """The log-probability of each response, in nats; only tokens behind the last scored ancestor are read.

        Raises:
            ConfigError: the value cannot read several positions (:meth:`Value.recent_deltas`).
            VocabularyError: the response has other tokens than the value.
            ScoreError: a token that the value does not know.
        """
        starts = {h.key: self._before(h) for h in hypotheses}
        new = {h.key: h for h in hypotheses if len(h.token_ids) > starts[h.key][0]}
        for h in new.values():
            self.vocabulary.require_same(h.vocabulary, "a normalised value scores responses in its own tokens")
        counts = [len(h.token_ids) - starts[h.key][0] for h in new.values()]
        rows = self.recent_deltas(list(new.values()), counts) if new else []
        if rows is None:
            raise ConfigError(f"{self.value.name} reads one position at a time, so its normalised form cannot score\n  use it as it is")
        for h, row, count in zip(new.values(), rows, counts, strict=True):
            tokens = h.token_ids[-count:]
            inside = max(tokens) < row.shape[1]
            total = float(row.gather(1, row.new_tensor(tokens).long().unsqueeze(1)).double().sum()) if inside else -math.inf
            self._known[h.key] = len(h.token_ids), starts[h.key][1] + total
        return require_scores([finite_score(f"the value {self.name}", self._before(h)[1]) for h in hypotheses])

    def _before(self, h: Hypothesis) -> tuple[int, float]:
        """What is known of a hypothesis, or of an ancestor."""
        known = [found for key in (h.key, h.parent, h.ancestor_key) if key is not None and (found := self._known.get(key)) is not None]
        return max((found for found in known if found[0] <= len(h.token_ids)), default=(0, 0.0))

    def inherit_cache(self, hypotheses: Sequence[Hypothesis]) -> None:
        """See :meth:`Value.inherit_cache`."""
        super().inherit_cache(hypotheses)
        for h in hypotheses:
            if (found := self._before(h))[0]:
                self._known[h.key] = found

    def truncate(self, hypotheses: Sequence[Hypothesis]) -> None:
        """See :meth:`Value.truncate`."""
        super().truncate(hypotheses)
        for h in hypotheses:
            if self._known.get(h.key, (0, 0.0))[0] >= len(h.token_ids):
                del self._known[h.key]

    def release(self, keys: Sequence[int]) -> None:
        """See :meth:`Value.release`."""
        super().release(keys)
        for key in keys:
            self._known.pop(key, None)

    def reset_caches(self) -> None:
        """See :meth:`Value.reset_caches`."""
        super().reset_caches()
        self._known = {}
