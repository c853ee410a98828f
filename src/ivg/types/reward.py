"""The interface of rewards: values of whole texts. Standard library only."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from ivg.types.beam import Hypothesis
from ivg.types.messages import Prompt
from ivg.types.value import Value


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
