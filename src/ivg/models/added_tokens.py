"""Tokens that only the base has: what guidance does to them, in all engines.

A chat model often has tokens behind the last one of the model that it was made from (``<|im_end|>``), and guides of that model do not know
them. Adding nothing to their logits would not be neutral: what a guide adds to the others has a constant of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ivg.models.vocabulary import Vocabulary


@dataclass(frozen=True)
class AddedTokens:
    """The columns of the base's logits behind those that a guide moves, where tokens are among them.

    Attributes:
        first: of these columns.
        ends: those that end a response: what the guide says of its own end-of-sequence token holds for them.
        end: that token of the guide.
        others: there are other tokens, of which the guide says nothing: each keeps the probability that the base gives it.
    """

    first: int
    ends: tuple[int, ...]
    end: int
    others: bool

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> AddedTokens:
        """What :meth:`to_dict` gave."""
        return cls(int(row["first"]), tuple(row["ends"]), int(row["end"]), bool(row["others"]))

    def hold(self, logits: Tensor) -> tuple[Tensor, Tensor] | None:
        """Forbid the other tokens in ``logits`` [rows, vocabulary] until :meth:`release`; None: there are none."""
        if not self.others:
            return None
        own = logits[:, self.first :].clone()
        logits[:, self.first :] = -torch.inf
        for i in self.ends:
            logits[:, i] = own[:, i - self.first]
        return own, logits.logsumexp(-1, keepdim=True)

    def add_to_ends(self, logits: Tensor, delta: Tensor) -> None:
        """Add to ``ends`` what the guide adds to its own end, ``delta`` [rows, 1], weighted."""
        for i in self.ends:
            logits[:, i : i + 1] += delta.to(logits.device)

    def release(self, logits: Tensor, held: tuple[Tensor, Tensor] | None) -> None:
        """Give the other tokens the probability back that they had before the guide's deltas were added."""
        if held is None:
            return
        own, before = held
        moved = logits.logsumexp(-1, keepdim=True) - before
        own += moved.masked_fill(before == -torch.inf, 0.0)  # a grammar may have forbidden all the rest
        for i in self.ends:
            own[:, i - self.first] = logits[:, i]
        logits[:, self.first :] = own


def add_known(logits: Tensor, deltas: Tensor, beta: float, width: int, added: AddedTokens | None) -> Tensor:
    """``logits`` + beta * ``deltas`` [rows, vocabulary] in the first ``width`` columns, and the rule for ``added``; written over."""
    held = None if added is None else added.hold(logits)
    logits[:, :width].add_(deltas[:, :width].to(logits.device), alpha=beta)
    if added is not None:
        added.add_to_ends(logits, beta * deltas[:, added.end : added.end + 1])
        added.release(logits, held)
    return logits


_KNOWN: WeakKeyDictionary[Vocabulary, dict[tuple[int, int, int | None], AddedTokens | None]] = WeakKeyDictionary()


def added_tokens(base: Vocabulary, guide: Vocabulary, width: int, columns: int) -> AddedTokens | None:
    """The tokens of ``base`` that a guide does not move; None: there are none.

    Args:
        base: whose other tokens are the guide's, too.
        guide: whose end-of-sequence token speaks for the base's.
        width: columns that the guide moves.
        columns: of the base's logits.
    """
    end = guide.eos_id_below(width)
    known = _KNOWN.setdefault(base, {})
    if (width, columns, end) not in known:
        ids = [i for i in base.pieces if width <= i < columns]
        own = () if end is None else tuple(sorted(i for i in ids if i in base.eos_ids))
        known[width, columns, end] = AddedTokens(width, own, end or 0, len(own) < len(ids)) if ids else None
    return known[width, columns, end]
