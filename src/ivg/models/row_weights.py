"""Rows of one forward pass that read with different weights: those of adapters (``models.adapter_rows``), or of other networks
(``models.stacked``). Must not depend on either.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn


def row_order(weights: str | None) -> str:
    """By this rows are sorted within a pass: those that read with the same weights lie side by side."""
    return weights or ""


class Part(NamedTuple):
    """Rows ``first`` to ``end`` of a pass, which read with ``weights``; None: the network's own."""

    weights: str | None
    first: int
    end: int


class RowWeights:
    """Which rows read with which weights, while :meth:`using` is open; otherwise all read with the network's own.

    Args:
        network: whose forward pass it is.

    Attributes:
        max_tokens: rows with different weights share a pass of at most so many tokens, since larger ones take longer than two; None: any.
    """

    max_tokens: int | None = None

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._thread = threading.local()

    @property
    def parts(self) -> list[Part] | None:
        """Of the pass that this thread runs, in order; None: it runs none. Passes of the user's own, in other threads, are plain ones."""
        return getattr(self._thread, "parts", None)

    def network_of(self, weights: str | None) -> nn.Module:
        """The network that has ``weights``."""
        return self.network

    @contextmanager
    def using(self, weights: Sequence[str | None]) -> Iterator[None]:
        """Row i of a batch whose rows are ``weights`` sorted by :func:`row_order` reads with the i-th of them."""
        parts, first = [], 0
        for name, count in sorted(Counter(weights).items(), key=lambda item: row_order(item[0])):
            parts.append(Part(name, first, first + count))
            first += count
        self._thread.parts = parts
        try:
            yield
        finally:
            self._thread.parts = None
