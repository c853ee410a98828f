"""What one forward pass over rows with shared prefixes writes, and what each of its tokens sees.

Made before the pass from where the rows lie (:class:`RowLayout`); used by the cache (``models.kv_cache``) and by attention
(``models.attention``). Must not depend on how slots are assigned, nor the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_COST = 256
"""What one more block costs on a CPU, in positions of a row that are read: some 400 in bfloat16, 100 in float32 (dev/LOG.md)."""
BLOCK_POSITIONS = 4096
"""Positions of one block on a CPU, at most; a single row may have more. More take memory and no less time (dev/LOG.md). On a GPU all rows
are one block."""

Pair = tuple[Tensor, Tensor]
"""Keys and values."""


class RowLayout(NamedTuple):
    """Where a row lies in one pass.

    Attributes:
        length: tokens that it holds before the pass.
        new: tokens that it reads.
        prefix_length: so many of ``length`` lie in the prefix slot.
        prefix_slot: of its group.
        suffix_slot: its own; None: the row writes to the prefix slot.
    """

    length: int
    new: int
    prefix_length: int
    prefix_slot: int
    suffix_slot: int | None


@dataclass(slots=True)
class PrefixBatch:
    """Groups of rows whose prefixes are read in one matrix product: G groups of ``width`` rows each (short ones repeat a row).

    Attributes:
        slots: prefix slots: a slice where they lie side by side, else indices [G].
        groups: G.
        width: rows of each group.
        length: positions of the prefixes that are read.
        rows: which rows of the pass these are, group by group [G * width]; None: all rows, in their order, and no others are needed.
        members: the rows without repetitions [m].
        places: where each of ``members`` stands in ``rows`` [m].
    """

    slots: slice | Tensor
    groups: int
    width: int
    length: int
    rows: Tensor | None = None
    members: Tensor | None = None
    places: Tensor | None = None


class BatchMask(NamedTuple):
    """What the queries of some rows see.

    Attributes:
        bias: [groups, 1, queries, length], 0 or -inf; None: everything is seen.
        fully_masked: [groups, 1, queries, 1]: those that see nothing; None: there are none.
    """

    bias: Tensor | None = None
    fully_masked: Tensor | None = None


@dataclass(slots=True)
class AttentionMasks:
    """What the tokens of a pass see in layers of one kind, 0 or -inf.

    Attributes:
        prefix: [R, C, prefix_length].
        suffix: [R, C, suffix_length].
        batches: ``prefix`` as each prefix batch needs it, made by the first layer that needs it.
        blocks: ``suffix`` as each block of suffixes needs it, likewise.
    """

    prefix: Tensor
    suffix: Tensor
    batches: list[BatchMask] = field(default_factory=list)
    blocks: list[BatchMask] = field(default_factory=list)


@dataclass(slots=True)
class ForwardMetadata:
    """One forward pass of R rows and C columns.

    Attributes:
        prefix_length: positions of the longest prefix that is seen.
        suffix_length: positions of the longest suffix that is seen.
        prefix_span: (first slot, end, first position) where the rows write to prefix slots side by side, all at the same positions.
        prefix_writes: else (row, column, slot, position) of every token that is written to a prefix slot.
        suffix_writes: (token, place): token counts rows times columns (None: all of them), place counts slots times their capacity.
        suffix_slots: of the rows: a slice where they lie side by side, else indices [R]; None: no row has a suffix.
        prefix_batches: for attention by prefix groups; empty: keys and values are concatenated for each row instead (``dense``).
        suffix_blocks: (first row, end, longest suffix among them): suffixes are read so many rows at a time.
        masks: by the address of the marker that stands for the kind of layer.
        dense: prefix slots [R], then (row, position, place) of every suffix token.
        pending_layer: the layer that has stored its keys and values and whose attention is still to be called.
        new: the keys and values that it stored; attention must be called with the same tensors.
    """

    prefix_length: int
    suffix_length: int
    prefix_span: tuple[int, int, int] | None = None
    prefix_writes: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    suffix_writes: tuple[Tensor | None, Tensor] | None = None
    suffix_slots: slice | Tensor | None = None
    prefix_batches: list[PrefixBatch] = field(default_factory=list)
    suffix_blocks: list[tuple[int, int, int]] = field(default_factory=list)
    masks: dict[int, AttentionMasks] = field(default_factory=dict)
    dense: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    pending_layer: int | None = None
    new: Pair | None = None


class PassLayout:
    """All rows of one pass as tensors [R] on the CPU, each made when it is first needed.

    Attributes:
        rows: they.
        even: they write to their prefix slots, which lie side by side, at the same positions.
        width: columns C.
    """

    def __init__(self, rows: Sequence[RowLayout]) -> None:
        self.rows = rows
        self.width = max(r.new for r in rows)
        first = rows[0]
        self.even = all(
            r.suffix_slot is None and (r.prefix_slot, r.length, r.new) == (first.prefix_slot + i, first.length, first.new)
            for i, r in enumerate(rows)
        )

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens that the rows hold."""
        return torch.tensor([r.length for r in self.rows])

    @cached_property
    def counts(self) -> Tensor:
        """Tokens that they read."""
        return torch.tensor([r.new for r in self.rows])

    @cached_property
    def prefix_lengths(self) -> Tensor:
        """Tokens that lie in their prefix slots."""
        return torch.tensor([r.prefix_length for r in self.rows])

    @cached_property
    def prefix_slots(self) -> Tensor:
        """Of their groups."""
        return torch.tensor([r.prefix_slot for r in self.rows])

    @cached_property
    def suffix_slots(self) -> Tensor:
        """Their own; -1: none."""
        return torch.tensor([-1 if r.suffix_slot is None else r.suffix_slot for r in self.rows])

    @cached_property
    def in_prefix(self) -> Tensor:
        """Which write to their prefix slots."""
        return self.suffix_slots < 0

    @cached_property
    def is_token(self) -> Tensor:
        """False at padding [R, C]; pieces are aligned at their ends."""
        return self._columns >= 0

    @cached_property
    def positions(self) -> Tensor:
        """Of every token [R, C]; padding has position 0."""
        if self.even:
            return torch.arange(self.rows[0].length, self.rows[0].length + self.width).repeat(len(self.rows), 1)
        return (self.lengths[:, None] + self._columns) * self.is_token

    @cached_property
    def seen_prefixes(self) -> Tensor:
        """Positions of its prefix slot that each row sees."""
        return torch.where(self.in_prefix, self.lengths + self.counts, self.prefix_lengths)

    @cached_property
    def seen_suffixes(self) -> Tensor:
        """Positions of its suffix slot that each row sees."""
        return torch.where(self.in_prefix, 0, self.lengths + self.counts - self.prefix_lengths)

    @cached_property
    def _columns(self) -> Tensor:
        """Which of its row's new tokens stands where [R, C]; negative: padding."""
        return torch.arange(self.width)[None] - (self.width - self.counts)[:, None]


def build_metadata(
    layout: PassLayout, suffix_capacity: int, markers: Mapping[str, Tensor], windows: Mapping[str, int | None], *, grouped: bool
) -> ForwardMetadata:
    """The metadata of one pass.

    Args:
        layout: the rows.
        suffix_capacity: positions of one suffix slot.
        markers: for each kind of layer the tensor that stands for its mask, on the device of the layers that use what is made.
        windows: for each kind of layer how far it sees; None: everything.
        grouped: attention goes by prefix groups; otherwise keys and values are concatenated for each row.
    """
    if grouped and (metadata := _even_tokens(layout, markers, windows)) is not None:
        return metadata
    device = next(iter(markers.values())).device
    metadata = ForwardMetadata(max(1, int(layout.seen_prefixes.max())), int(layout.seen_suffixes.max()))
    if not bool(layout.in_prefix.all()):
        metadata.suffix_slots = _as_slice(layout.suffix_slots.clamp(min=0), device)
    _add_writes(metadata, layout, suffix_capacity, device)
    if grouped:
        metadata.prefix_batches = _prefix_batches([r.prefix_slot for r in layout.rows], layout.seen_prefixes.tolist(), device)
        metadata.masks = {marker.data_ptr(): _masks(metadata, layout, windows[kind], device) for kind, marker in markers.items()}
        lengths = layout.seen_suffixes.clamp(min=1).tolist()
        metadata.suffix_blocks = suffix_blocks(lengths) if device.type == "cpu" else [(0, len(lengths), max(lengths))]
    else:
        metadata.dense = _dense_places(layout, suffix_capacity, device)
    return metadata


def _even_tokens(layout: PassLayout, markers: Mapping[str, Tensor], windows: Mapping[str, int | None]) -> ForwardMetadata | None:
    """Of a pass of one token a row that sees all its row holds, and all rows as much: no masks, no indices. None: it is another pass."""
    row, count = layout.rows[0], len(layout.rows)
    if not layout.even or row.new > 1 or any(window is not None and window <= row.length for window in windows.values()):
        return None
    slots = slice(row.prefix_slot, row.prefix_slot + count)
    everything = AttentionMasks(torch.empty(0), torch.empty(0), [BatchMask()])
    return ForwardMetadata(
        row.length + 1,
        0,
        prefix_span=(slots.start, slots.stop, row.length),
        prefix_batches=[PrefixBatch(slots, count, 1, row.length + 1)],
        masks={marker.data_ptr(): everything for marker in markers.values()},
    )


def _as_slice(indices: Tensor, device: torch.device) -> slice | Tensor:
    """Consecutive indices as a slice: no gather is needed."""
    first, count = int(indices[0]), len(indices)
    return slice(first, first + count) if bool((indices == torch.arange(first, first + count)).all()) else indices.to(device)


def _add_writes(metadata: ForwardMetadata, layout: PassLayout, suffix_capacity: int, device: torch.device) -> None:
    if layout.even:
        first = layout.rows[0]
        metadata.prefix_span = (first.prefix_slot, first.prefix_slot + len(layout.rows), first.length)
        return
    suffix, prefix = layout.is_token & ~layout.in_prefix[:, None], layout.is_token & layout.in_prefix[:, None]
    if bool(suffix.any()):
        place = layout.suffix_slots[:, None] * suffix_capacity + layout.positions - layout.prefix_lengths[:, None]
        everything = bool(suffix.all())
        token = None if everything else suffix.flatten().nonzero()[:, 0].to(device)
        metadata.suffix_writes = (token, place.flatten().to(device) if everything else place[suffix].to(device))
    if bool(prefix.any()):
        row, column = prefix.nonzero(as_tuple=True)
        slot, position = layout.prefix_slots[row], layout.positions[row, column]
        metadata.prefix_writes = (row.to(device), column.to(device), slot.to(device), position.to(device))


def _masks(metadata: ForwardMetadata, layout: PassLayout, window: int | None, device: torch.device) -> AttentionMasks:
    """What every token sees. Padding has position 0 and sees the row's first token: nothing of it is stored, and it stays finite."""
    here = layout.positions[:, :, None]
    in_prefix = torch.arange(metadata.prefix_length)[None, None]
    in_suffix = layout.prefix_lengths[:, None, None] + torch.arange(metadata.suffix_length)[None, None]
    prefix = (in_prefix <= here) & (in_prefix < layout.seen_prefixes[:, None, None])
    suffix = (in_suffix <= here) & ~layout.in_prefix[:, None, None]
    if window is not None:
        prefix &= in_prefix > here - window
        suffix &= in_suffix > here - window
    bias = [torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf).to(device) for seen in (prefix, suffix)]
    return AttentionMasks(bias[0], bias[1])


def suffix_blocks(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Rows whose suffixes of ``lengths`` (at least 1) are read together: (first row, end, longest).

    A block reads as much of each row as of its longest. Rows side by side, which have the same group and like lengths, share a block
    where that reads at most :data:`BLOCK_COST` positions more.
    """
    blocks: list[tuple[int, int, int]] = []
    start = 0
    for length, run in groupby(lengths):
        end = start + sum(1 for _ in run)
        if blocks:
            first, _, longest = blocks[-1]
            together = max(longest, length)
            padding = (together - longest) * (start - first) + (together - length) * (end - start)
        if blocks and padding <= BLOCK_COST and together * (end - first) <= BLOCK_POSITIONS:
            blocks[-1] = (first, end, together)
        else:
            most = max(1, BLOCK_POSITIONS // length)
            blocks += [(i, min(i + most, end), length) for i in range(start, end, most)]
        start = end
    return blocks


def _dense_places(layout: PassLayout, suffix_capacity: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lengths = layout.seen_suffixes
    row = torch.arange(len(lengths)).repeat_interleave(lengths)
    behind = torch.arange(len(row)) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    place = layout.suffix_slots[row] * suffix_capacity + behind
    return layout.prefix_slots.to(device), row.to(device), (layout.prefix_lengths[row] + behind).to(device), place.to(device)


def _prefix_batches(slots: Sequence[int], seen: Sequence[int], device: torch.device) -> list[PrefixBatch]:
    """Groups of like size and length together."""
    groups: dict[int, list[int]] = {}
    for row, slot in enumerate(slots):
        groups.setdefault(slot, []).append(row)
    lengths = {slot: max(1, *(seen[r] for r in rows)) for slot, rows in groups.items()}
    out = []
    for batch in _like_groups(groups, lengths):
        width = max(len(groups[s]) for s in batch)
        flat = [row for s in batch for row in groups[s] + groups[s][:1] * (width - len(groups[s]))]
        found = PrefixBatch(_as_slice(torch.tensor(batch), device), len(batch), width, max(lengths[s] for s in batch))
        if flat != list(range(len(slots))):
            places = [k * width + i for k, s in enumerate(batch) for i in range(len(groups[s]))]
            found.rows = torch.tensor(flat, device=device)
            found.members = torch.tensor([flat[p] for p in places], device=device)
            found.places = torch.tensor(places, device=device)
        out.append(found)
    return out


def _like_groups(groups: Mapping[int, list[int]], lengths: Mapping[int, int]) -> list[list[int]]:
    """Prefix slots by size of group and length; all in one product where that wastes less than half of it: each costs by itself."""
    needed = sum(len(rows) * lengths[slot] for slot, rows in groups.items())
    if len(groups) * max(map(len, groups.values())) * max(lengths.values()) <= 2 * needed:
        return [list(groups)]
    buckets: dict[tuple[int, int], list[int]] = {}
    for slot, rows in groups.items():
        buckets.setdefault(((len(rows) - 1).bit_length(), max(5, (lengths[slot] - 1).bit_length())), []).append(slot)
    return list(buckets.values())
