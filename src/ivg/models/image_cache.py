"""The cache of a network that reads text over slots, and prompts with pictures over transformers' own cache for each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor
from typing_extensions import override

from ivg.models.cache import CacheRow, RowCache
from ivg.models.image_prompts import ImageInputs
from ivg.models.state_cache import StateCache, StateRow


class TextAndImageCache(RowCache):
    """Two caches of one network as one: a row lies in that which made it, and no pass has rows of both.

    Args:
        text: for rows of text.
        images: for rows that begin with pictures.
    """

    def __init__(self, text: RowCache, images: StateCache) -> None:
        self.text, self.images = text, images
        self.rolls_back = text.rolls_back

    def _of(self, row: CacheRow) -> RowCache:
        return self.images if isinstance(row, StateRow) else self.text

    @override
    def open(self, ids: Sequence[int], rope_range: int, mark: int = 0, weights: str | None = None) -> CacheRow:
        return self.text.open(ids, rope_range, mark)

    @override
    def open_with_images(self, ids: Sequence[int], rope_range: int, images: ImageInputs) -> CacheRow:
        return self.images.open_with_images(ids, rope_range, images)

    @override
    def fork(self, row: CacheRow) -> CacheRow:
        return self._of(row).fork(row)

    @override
    def truncate(self, row: CacheRow, length: int) -> None:
        self._of(row).truncate(row, length)

    @override
    def reopen(self, row: CacheRow, ids: Sequence[int], rope_range: int) -> None:
        self._of(row).reopen(row, ids, rope_range)

    @override
    def reopen_as_fork(self, row: CacheRow, other: CacheRow) -> None:
        self._of(row).reopen_as_fork(row, other)

    @override
    def free(self, row: CacheRow) -> None:
        self._of(row).free(row)

    @override
    def clear(self) -> None:
        self.text.clear()
        self.images.clear()

    @override
    def release_memory(self) -> None:
        self.text.release_memory()
        self.images.release_memory()

    @override
    def prepare(self, rows: Sequence[CacheRow]) -> None:
        for cache in (self.text, self.images):
            if some := [row for row in rows if self._of(row) is cache]:
                cache.prepare(some)

    @override
    def batches(self, rows: Sequence[CacheRow], counts: dict[int, int], outputs: dict[int, int], output_size: int) -> Iterator[list[int]]:
        for cache in (self.text, self.images):
            if some := {i: count for i, count in counts.items() if self._of(rows[i]) is cache}:
                yield from cache.batches(rows, some, outputs, output_size)

    @override
    def forward(self, rows: Sequence[CacheRow], pieces: Sequence[Sequence[int]], keep: int) -> tuple[Tensor, list[int]]:
        return self._of(rows[0]).forward(rows, pieces, keep)

    @property
    @override
    def num_rows(self) -> int:
        return self.text.num_rows + self.images.num_rows

    @property
    @override
    def unshared_bytes(self) -> int:
        return self.text.unshared_bytes + self.images.unshared_bytes

    @property
    @override
    def used_bytes(self) -> int:
        return self.text.used_bytes + self.images.used_bytes
