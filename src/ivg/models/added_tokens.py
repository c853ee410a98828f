"""Tokens that only the base has: what guidance does to them, in all engines.

A chat model often has tokens behind the last one of the model that it was made from (``<|im_end|>``), and guides of that model do not know
them. Adding nothing to their logits would not be neutral: what a guide adds to the others has a constant of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ivg.models.vocabulary import Vocabulary


@dataclass(frozen=True)
class AddedTokens:
    """Tokens of the base behind the last one of a guide.

    Attributes:
        ends: those that end a response: what the guide says of its own end-of-sequence token holds for them.
        end: that token of the guide.
        others: the guide says nothing of them: each keeps the probability that the base gives it.
    """

    ends: tuple[int, ...]
    end: int
    others: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"ends": list(self.ends), "end": self.end, "others": list(self.others)}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> AddedTokens:
        """What :meth:`to_dict` gave."""
        return cls(tuple(row["ends"]), int(row["end"]), tuple(row["others"]))

    def hold(self, logits: Tensor) -> tuple[Tensor, Tensor] | None:
        """Forbid ``others`` in ``logits`` [rows, vocabulary] until :meth:`release`; None: there are none."""
        if not self.others:
            return None
        own = logits[:, list(self.others)]
        logits[:, list(self.others)] = -torch.inf
        return own, logits.logsumexp(-1, keepdim=True)

    def add_to_ends(self, logits: Tensor, delta: Tensor) -> None:
        """Add to ``ends`` what the guide adds to its own end, ``delta`` [rows, 1], weighted."""
        if self.ends:
            logits[:, list(self.ends)] += delta.to(logits.device)

    def release(self, logits: Tensor, held: tuple[Tensor, Tensor] | None) -> None:
        """Give ``others`` the probability back that they had before the guide's deltas were added."""
        if held is None:
            return
        own, before = held
        moved = logits.logsumexp(-1, keepdim=True) - before
        logits[:, list(self.others)] = own + moved.masked_fill(before == -torch.inf, 0.0)  # a grammar may have forbidden all the rest


@lru_cache(maxsize=256)
def added_tokens(base: Vocabulary, guide: Vocabulary) -> AddedTokens | None:
    """The tokens that ``base`` has behind the last one of ``guide``; None: there are none. Their other tokens are the same."""
    ids = sorted(i for i in base.pieces if i >= guide.size)
    if not ids:
        return None
    ends = () if guide.eos_id is None else tuple(i for i in ids if i in base.eos_ids)
    return AddedTokens(ends, guide.eos_id or 0, tuple(i for i in ids if i not in ends))
