"""What a reader has just read, for others that need the same: outputs of its last pass, and the hidden states behind its hypotheses.

Must not depend on who needs them (``models.cached_lm``, ``models.head_reader``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ivg.types import Hypothesis, Prompt


@dataclass(slots=True)
class KeptOutputs:
    """Outputs of one pass.

    Attributes:
        places: (tokens of the response, row) of each hypothesis, by key.
        rows: [hypotheses, vocabulary or 1].
    """

    places: dict[int, tuple[int, int]]
    rows: Tensor

    @classmethod
    def of(cls, hypotheses: Sequence[Hypothesis], rows: Tensor) -> Self:
        """``rows`` are those of ``hypotheses``, in order."""
        return cls({h.key: (len(h.token_ids), i) for i, h in enumerate(hypotheses)}, rows)

    def find(self, hypotheses: Sequence[Hypothesis]) -> list[int] | None:
        """The row of each; None: some are not here, or have grown."""
        if not hypotheses or any(self.places.get(h.key, (-1, 0))[0] != len(h.token_ids) for h in hypotheses):
            return None
        return [self.places[h.key][1] for h in hypotheses]

    def without(self, keys: Sequence[int]) -> Self | None:
        """Those of other hypotheses; None: there are none."""
        left = {key: self.places[key] for key in self.places.keys() - set(keys)}
        return type(self)(left, self.rows) if left else None

    def select(self, index: Sequence[int]) -> Tensor:
        """A copy of these rows."""
        return self.rows[torch.tensor(index, device=self.rows.device)]


@dataclass(frozen=True, slots=True)
class KeptState:
    """The hidden state behind the last token of a text.

    Attributes:
        prompt: of the text.
        tokens: its response.
        states: of one pass, [rows, hidden].
        row: which of them it is.
    """

    prompt: Prompt
    tokens: tuple[int, ...]
    states: Tensor
    row: int


class KeptStates:
    """For each hypothesis the state behind the last token of it that was read. One that ended keeps it until it is released."""

    def __init__(self) -> None:
        self._known: dict[int, KeptState] = {}

    def __len__(self) -> int:
        return len(self._known)

    def add(self, hypotheses: Sequence[Hypothesis], states: Tensor) -> None:
        """``states`` [hypotheses, hidden] were read behind them."""
        own = states.clone()  # what a pass gave is part of a tensor with all its positions
        for i, h in enumerate(hypotheses):
            self._known[h.key] = KeptState(h.prompt, tuple(h.token_ids), own, i)

    def find(self, h: Hypothesis, drop: int) -> KeptState | None:
        """The state behind ``h`` without its last ``drop`` tokens, which it or its parent has read last; None: they have not."""
        tokens = tuple(h.token_ids[: len(h.token_ids) - drop])
        if len(tokens) + drop != len(h.token_ids):
            return None
        known = (self._known.get(key) for key in (h.key, h.parent) if key is not None)
        return next((state for state in known if state is not None and state.tokens == tokens), None)

    def inherit(self, hypotheses: Sequence[Hypothesis]) -> None:
        """Let hypotheses that ended with their first token of their own keep the state of their parent, which may be released."""
        for h in hypotheses:
            if h.key not in self._known and (state := self.find(h, 1)) is not None:
                self._known[h.key] = state

    def release(self, keys: Sequence[int]) -> None:
        """Forget these hypotheses."""
        for key in keys:
            self._known.pop(key, None)

    def clear(self) -> None:
        """Forget all."""
        self._known.clear()


def stack_states(found: Sequence[KeptState]) -> Tensor:
    """[found, hidden]."""
    first = found[0].states
    if all(state.states is first for state in found):
        return first[torch.tensor([state.row for state in found], device=first.device)]
    return torch.stack([state.states[state.row] for state in found])
