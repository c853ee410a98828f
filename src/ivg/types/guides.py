"""What a value must be able to do to guide tokens: know every next token, or draft some ahead. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from ivg.types import Hypothesis, Value


@runtime_checkable
class VocabularyValue(Value, Protocol):
    """A value with a number for every next token; it can shift all logits at once (see :func:`knows_vocabulary`)."""

    @property
    def vocabulary(self) -> Any:
        """What the columns of :meth:`deltas` mean (``models.vocab.Vocabulary``)."""

    def deltas(self, hypotheses: Sequence[Hypothesis]) -> Any:
        """What to add to the base's logits, before the guidance weight; float32 tensor [hypotheses, vocabulary]."""


class Drafter(Protocol):
    """Drafts one stretch of tokens for some hypotheses, and remembers what it read meanwhile."""

    def logits(self, hypotheses: Sequence[Hypothesis]) -> Any:
        """Of the next token as this value would have it, behind the last token of each; float32 tensor [hypotheses, vocabulary].

        Asked again for a hypothesis, that has one token more.
        """

    def deltas(self, hypotheses: Sequence[Hypothesis]) -> Any:
        """:meth:`VocabularyValue.deltas` at all places where these were asked for logits: row after row, in order, one tensor."""


@runtime_checkable
class DraftingValue(VocabularyValue, Protocol):
    """A value that can say what the guided base will probably write, and can be taken back when it was wrong."""

    def drafter(self, beta: float) -> Drafter:
        """For one stretch of tokens, guided with weight ``beta``."""

    def truncate(self, hypotheses: Sequence[Hypothesis]) -> None:
        """The last tokens of these were changed; what was read behind their last but one is forgotten."""


def knows_vocabulary(value: Value) -> bool:
    """Can ``value`` shift the whole vocabulary at once? A class whose instances differ has ``full_vocabulary()``."""
    full = getattr(value, "full_vocabulary", None)
    return isinstance(value, VocabularyValue) and (full is None or full())
