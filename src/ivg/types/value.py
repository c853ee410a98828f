"""The interface of values: numbers for hypotheses. Standard library only.

Only :meth:`Value.score` must be written. Everything else has a default, which does the same for the values that a value is made of
(:attr:`Value.parts`) and nothing where there are none. :mod:`ivg.testing` has the laws that every value obeys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from ivg.errors import ConfigError
from ivg.types.beam import Hypothesis
from ivg.types.messages import Prompt
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


class Reward(Value):
    """A value of whole texts, which needs no hypotheses: a reward model, or a Python function."""

    @abstractmethod
    def judge(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        """The reward of each (prompt, response).

        Raises:
            ScoreError: some have no finite number; has the scores of all others.
        """

    def note(self, prompt: Prompt, response: str) -> str | None:
        """What is left out when this is scored; None: nothing."""
        return None

    def score(self, hypotheses: Sequence[Hypothesis]) -> list[float]:
        """The reward of prompt and response of each hypothesis; raises as :meth:`judge`."""
        return self.judge([(h.prompt, h.text) for h in hypotheses])
