"""The interface between a network's runner and its cache: rows of tokens that can be opened, forked, cut, read on and freed.

A row is one sequence of tokens that the network has read. The cache holds its state (keys and values, or a recurrent state) and
is only an optimisation: every output is that of a forward pass over the row's tokens alone.

Must not depend on prompts, beams, tokenizers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ivg.errors import ModelError

if TYPE_CHECKING:
    from ivg.models.image_prompts import ImageInputs


@dataclass(frozen=True)
class PassLimits:
    """How much one forward pass reads and returns.

    Attributes:
        row_tokens: new tokens of one row at most.
        batch_tokens: new tokens of all rows at most, padding included.
        outputs: numbers (rows x positions x vocabulary) at most where several positions of a row are wanted: 128 MiB in float32 on a CPU.
        padding: rows of different lengths share a pass if that pads fewer tokens than this: about what a pass costs by itself.
        grouped_columns: attention goes by prefix groups (``models.attention``) where every row reads at most so many tokens.
        grouped_scores: and then has at most so many scores (rows x heads x tokens x positions) at a time.
    """

    row_tokens: int = 2048
    batch_tokens: int = 8192
    outputs: int = 1 << 25
    padding: int = 48
    grouped_columns: int = 64
    grouped_scores: int = 1 << 24

    @classmethod
    def on(cls, device: torch.device) -> PassLimits:
        """The limits for ``device``. A pass on a GPU costs its launches: it takes more rows, of which 2 GB hold the scores."""
        if device.type == "cpu":
            return cls()
        return cls(batch_tokens=1 << 14, outputs=1 << 27, padding=1 << 12, grouped_scores=1 << 27)


@dataclass(eq=False, slots=True)
class CacheRow:
    """One row; the cache that made it may add where its state lies.

    Attributes:
        group: rows that were forked from one another have the same.
        ids: tokens whose state the row holds. Change it through the cache alone.
        rope_range: which rotary factors it was read with (``models.rotary``).
        nonfinite: the network returned NaN or infinity for it.
        finite_length: tokens that were read before that pass; the state of the others may be spoilt.
        images: what is read beside the first ``images.length`` tokens, in one pass with all of them.
        weights: it is read with (``models.row_weights``); None: the network's own.
    """

    group: Any
    ids: list[int]
    rope_range: int = 0
    nonfinite: bool = False
    finite_length: int = 0
    images: ImageInputs | None = None
    weights: str | None = None

    @property
    def unread_images(self) -> int:
        """Tokens of which the next pass takes at least so many: the row begins with pictures that were not read."""
        return self.images.length if self.images is not None and not self.ids else 0


class RowCache(ABC):
    """The state of all rows of one network.

    A cache may hold more than its rows need, for later prompts that begin alike. ``batches`` decides which rows share a forward pass,
    ``forward`` runs it.

    Attributes:
        rolls_back: a row that is cut keeps all tokens before the cut.
        mixes_weights: rows of different weights may share a pass, sorted by :func:`~ivg.models.row_weights.row_order`.
    """

    rolls_back = True
    mixes_weights = False

    @abstractmethod
    def open(self, ids: Sequence[int], rope_range: int, mark: int = 0, weights: str | None = None) -> CacheRow:
        """A row for ``ids``, holding already as many of them as the cache knows (all but the last at most).

        ``mark``: length to which rows that descend from it are likely to be cut. ``weights``: it is read with, for a cache that
        :attr:`mixes_weights`.
        """

    def open_with_images(self, ids: Sequence[int], rope_range: int, images: ImageInputs) -> CacheRow:
        """As :meth:`open`, for a text whose first ``images.length`` tokens are read with pictures; that is also its mark.

        Raises:
            ModelError: a cache of networks that read no pictures (the default).
        """
        raise ModelError("this model reads no pictures\n  give text")

    @abstractmethod
    def fork(self, row: CacheRow) -> CacheRow:
        """A second row with the same tokens."""

    @abstractmethod
    def truncate(self, row: CacheRow, length: int) -> None:
        """Keep the first ``length`` tokens of ``row`` at most; ``row.ids`` says how many a cache was able to keep."""

    @abstractmethod
    def reopen(self, row: CacheRow, ids: Sequence[int], rope_range: int) -> None:
        """Give up what ``row`` holds and begin ``ids`` as :meth:`open` does."""

    @abstractmethod
    def reopen_as_fork(self, row: CacheRow, other: CacheRow) -> None:
        """Give up what ``row`` holds and become a fork of ``other``."""

    @abstractmethod
    def free(self, row: CacheRow) -> None:
        """The row is not used any more."""

    @abstractmethod
    def clear(self) -> None:
        """Forget all rows and everything kept for later: what comes next is computed as by a new cache, to the last bit."""

    @abstractmethod
    def release_memory(self) -> None:
        """Return memory that no row needs to the operating system. Changes no output."""

    @abstractmethod
    def prepare(self, rows: Sequence[CacheRow]) -> None:
        """Called before ``rows`` are read, once for one or more passes.

        Raises:
            ModelError: the cache cannot be used any more.
        """

    @abstractmethod
    def batches(self, rows: Sequence[CacheRow], counts: dict[int, int], outputs: dict[int, int], output_size: int) -> Iterator[list[int]]:
        """Which rows share a forward pass, as indices into ``rows``; rows of one pass have the same ``rope_range``.

        Args:
            rows: all rows.
            counts: new tokens of each row that is to be read, by index.
            outputs: positions of it whose outputs are wanted; 1 where an index is missing.
            output_size: numbers for each position.
        """

    @abstractmethod
    def forward(self, rows: Sequence[CacheRow], pieces: Sequence[Sequence[int]], keep: int) -> tuple[Tensor, list[int]]:
        """One forward pass: ``pieces[i]`` (at least one token) behind what ``rows[i]`` holds; afterwards it holds them, too.

        Returns:
            Outputs of the last ``keep`` columns [rows, keep, vocabulary or 1], and the index into ``rows`` of each.
        """

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Rows in use."""

    @property
    @abstractmethod
    def unshared_bytes(self) -> int:
        """What the rows in use would hold if none shared anything."""

    @property
    @abstractmethod
    def used_bytes(self) -> int:
        """What they hold, shared parts counted once."""


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many tokens two lists begin with in common; compares slices, which is fast."""
    if type(a) is not type(b):  # slices of a tuple and of a list are never equal
        a, b = list(a), list(b)
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low + 1 < high:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low if high == 0 or a[low] != b[low] else low + 1
