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
        eos_ids: those that end a response: what the guide says of its own end-of-sequence token holds for them.
        guide_eos_id: that token of the guide.
        has_unknown: there are other tokens, of which the guide says nothing: each keeps the probability that the base gives it.
    """

    first: int
    eos_ids: tuple[int, ...]
    guide_eos_id: int
    has_unknown: bool

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> AddedTokens:
        """What :meth:`to_dict` gave."""
        return cls(int(row["first"]), tuple(row["eos_ids"]), int(row["guide_eos_id"]), bool(row["has_unknown"]))

    def mask(self, logits: Tensor) -> tuple[Tensor, Tensor] | None:
        """Forbid the other tokens in ``logits`` [rows, vocabulary] until :meth:`restore`; None: there are none."""
        if not self.has_unknown:
            return None
        own = logits[:, self.first :].clone()
        logits[:, self.first :] = -torch.inf
        for i in self.eos_ids:
            logits[:, i] = own[:, i - self.first]
        return own, logits.logsumexp(-1, keepdim=True)

    def add_to_eos(self, logits: Tensor, delta: Tensor) -> None:
        """Add to ``eos_ids`` what the guide adds to its own end-of-sequence token, ``delta`` [rows, 1], weighted."""
        for i in self.eos_ids:
            own = logits[:, i : i + 1]
            own += delta.to(logits.device).masked_fill(own == -torch.inf, 0.0)  # what is forbidden stays so, whatever the guide says

    def restore(self, logits: Tensor, masked: tuple[Tensor, Tensor] | None) -> None:
        """Give the other tokens the probability back that they had before the guide's deltas were added."""
        if masked is None:
            return
        own, before = masked
        moved = logits.logsumexp(-1, keepdim=True) - before
        own += moved.masked_fill(before == -torch.inf, 0.0)  # a grammar may have forbidden all the rest
        for i in self.eos_ids:
            own[:, i - self.first] = logits[:, i]
        logits[:, self.first :] = own


def add_known(logits: Tensor, deltas: Tensor, beta: float, width: int, added: AddedTokens | None, *, candidates: bool = False) -> Tensor:
    """``logits`` + beta * ``deltas`` [rows, vocabulary] in the first ``width`` columns, and the rule for ``added``; written over.

    ``candidates``: tokens that are minus infinity are no candidates, and their deltas need not be numbers.
    """
    masked = None if added is None else added.mask(logits)
    known, moved = logits[:, :width], deltas[:, :width].to(logits.device)
    known.add_(moved.masked_fill(known == -torch.inf, 0.0) if candidates else moved, alpha=beta)
    if added is not None:
        added.add_to_eos(logits, beta * deltas[:, added.guide_eos_id : added.guide_eos_id + 1])
        added.restore(logits, masked)
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
