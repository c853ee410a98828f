"""Keys and values of all rows: two kinds of slots for each layer. Tensors only.

A *prefix slot* holds what all rows of one prefix group begin with, [prefix slots, heads, capacity, size]; a row's *suffix slot* holds
what it has behind that, [suffix slots, capacity, heads, size]. So a shared beginning is stored once, and read once by all rows that
share it (``models.attention``).

Those of a layer lie on the layer's device. Handles transformers' cache interface. Must not depend on tokens, rows or prefix groups
(``models.slot_cache``).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ivg.models.forward_metadata import ForwardMetadata, Pair
from ivg.models.mapped_memory import return_pages, zeros

MIN_CAPACITY = 64
"""Positions of a slot at first."""


class Slots:
    """Keys and values of one kind of slots, layer by layer; allocated at the first pass, grown as needed.

    Args:
        axis: along which the tensors [slots, …, size] have a slot's positions.
        growth: slots to add at least.

    Attributes:
        tensors: keys and values of the first layer, of the second …
        count: slots.
        capacity: positions of each.
        token_bytes: what one position takes in all layers.
        failed: memory ran out between two layers, so their sizes differ.
    """

    def __init__(self, axis: int, growth: int) -> None:
        self.axis, self.growth = axis, growth
        self.tensors: list[Tensor] = []
        self.count = self.capacity = self.token_bytes = 0
        self.failed = False
        self.unused: list[int] = []
        """A heap: the lowest comes first."""

    def __getitem__(self, layer: int) -> Pair:
        """Keys and values of a layer."""
        return self.tensors[2 * layer], self.tensors[2 * layer + 1]

    def add(self, like: Tensor) -> None:
        """Room for the next keys or values, which a pass gives as [rows, heads, columns, size]."""
        shape = [self.count, like.shape[1], like.shape[3]]
        shape.insert(self.axis, self.capacity)
        self.tensors.append(zeros(shape, like))
        self.token_bytes += like.shape[1] * like.shape[3] * like.element_size()

    def allocate(self, used: Callable[[], int]) -> int:
        """The lowest unused slot; where there is none, twice as many are made (see :meth:`reserve`)."""
        if not self.unused:
            self.reserve(self.count + max(self.growth, self.count), MIN_CAPACITY, used)
        return heapq.heappop(self.unused)

    def free(self, slot: int) -> None:
        """The slot is unused."""
        heapq.heappush(self.unused, slot)

    @torch.no_grad()
    def reserve(self, count: int, capacity: int, used: Callable[[], int]) -> None:
        """Have at least that many slots and positions; only the first ``used()`` hold anything. Layer by layer: memory peaks low."""
        had, count, capacity = self.count, max(count, self.count), max(capacity, self.capacity)
        if (count, capacity) == (had, self.capacity):
            return
        kept = used()
        self.failed = True
        for i, old in enumerate(self.tensors):
            shape = list(old.shape)
            shape[0], shape[self.axis] = count, capacity
            self.tensors[i], part = zeros(shape, old), self.by_position(old)[:, :kept]
            self.by_position(self.tensors[i])[: part.shape[0], : part.shape[1]] = part
        self.count, self.capacity, self.failed = count, capacity, False
        self.unused += range(had, count)  # higher than all others, so it stays a heap

    def by_position(self, tensor: Tensor) -> Tensor:
        """A view of one of the tensors as [slots, capacity, heads, size]."""
        return tensor.transpose(1, self.axis)

    @torch.no_grad()
    def copy(self, source: int, target: int, length: int) -> None:
        """The first positions of one slot to another."""
        for view in map(self.by_position, self.tensors):
            view[target, :length] = view[source, :length]

    @torch.no_grad()
    def zero(self, slot: int, first: int) -> None:
        """Zero a slot from a position on. What is not seen must still be finite: its weight is 0, and 0 x NaN is NaN."""
        for view in map(self.by_position, self.tensors):
            view[slot, first:] = 0

    def release_memory(self, lengths: Sequence[int]) -> None:
        """Return the pages behind the first ``lengths[i]`` positions of slot i to the operating system.

        They read as zeros from then on, and take memory again when they are written. CPUs only: on a GPU the slots keep their size.
        """
        for tensor in self.tensors:
            lines = tensor.shape[1] if self.axis == 2 else 1  # of positions side by side, for each slot
            ends = enumerate(n for n in lengths for _ in range(lines))
            spans = [(i * self.capacity + n, (i + 1) * self.capacity) for i, n in ends]
            return_pages(tensor, spans, tensor.stride(self.axis) * tensor.element_size())


class PassMetadata:
    """The metadata of one pass for each device that layers lie on.

    Args:
        build: makes it for a device.
    """

    def __init__(self, build: Callable[[torch.device], ForwardMetadata]) -> None:
        self._build = build
        self._made: dict[torch.device, ForwardMetadata] = {}

    def on(self, device: torch.device) -> ForwardMetadata:
        """With tensors on ``device``."""
        if device not in self._made:
            self._made[device] = self._build(device)
        return self._made[device]

    @property
    def attention_pending(self) -> bool:
        """Did a layer store keys and values without calling attention by prefix groups?"""
        return any(made.pending_layer is not None for made in self._made.values())


class KVCache(Cache):
    """Keys and values of all rows.

    Attributes:
        prefixes: the prefix slots.
        suffixes: the suffix slots.
        metadata: of the pass that runs now, for the layers of one device; made when the first of them asks. None: no pass runs.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.prefixes, self.suffixes = Slots(axis=2, growth=4), Slots(axis=1, growth=8)
        self.metadata: PassMetadata | None = None

    # What transformers calls

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Pair:
        """Store the new [rows, heads, columns, size]; return what the rows can see, or, for attention by prefix groups, just the new."""
        assert self.metadata is not None
        metadata = self.metadata.on(key_states.device)
        if 2 * layer_idx == len(self.prefixes.tensors):
            for slots in (self.prefixes, self.suffixes):
                slots.add(key_states)
                slots.add(value_states)
        for kind, new in enumerate((key_states, value_states)):
            if metadata.prefix_span is not None:
                slot, end, first = metadata.prefix_span
                self.prefixes[layer_idx][kind][slot:end, :, first : first + new.shape[2]] = new
            if metadata.prefix_writes is not None:
                row, column, places, position = metadata.prefix_writes
                self.prefixes[layer_idx][kind][places, :, position] = new[row, :, column]
            if metadata.suffix_writes is not None:
                token, place = metadata.suffix_writes
                flat = new.transpose(1, 2).flatten(0, 1)
                self.suffixes[layer_idx][kind].flatten(0, 1).index_copy_(0, place, flat if token is None else flat[token])
        if metadata.prefix_batches:
            metadata.pending_layer, metadata.new = layer_idx, (key_states, value_states)
            return metadata.new
        return self._concatenated(layer_idx, metadata, 0), self._concatenated(layer_idx, metadata, 1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Never used for positions: every pass gives its own."""
        return 0

    def _concatenated(self, layer: int, metadata: ForwardMetadata, kind: int) -> Tensor:
        """Prefix and suffix of every row side by side [rows, heads, length, size]."""
        assert metadata.dense is not None
        slots, row, position, place = metadata.dense
        out = self.prefixes[layer][kind][:, :, : metadata.prefix_length].index_select(0, slots)
        if metadata.suffix_length == 0:
            return out
        longest = max(metadata.prefix_length, int(position.max()) + 1)
        full = out.new_zeros(*out.shape[:2], longest, out.shape[3])
        full[:, :, : metadata.prefix_length] = out
        full[row, :, position] = self.suffixes[layer][kind].flatten(0, 1)[place]
        return full

    # Moves

    @torch.no_grad()
    def copy_suffixes(self, moves: Sequence[tuple[int, int, int, int]]) -> None:
        """(source slot, its first position, target slot, count): to the front of the target. All are read before any is written."""
        if not moves or not self.suffixes.tensors:
            return
        source = _Beside(_ranges([s * self.suffixes.capacity + first for s, first, _, _ in moves], [n for *_, n in moves]))
        target = _Beside(_ranges([t * self.suffixes.capacity for _, _, t, _ in moves], [n for *_, n in moves]))
        for flat in (t.flatten(0, 1) for t in self.suffixes.tensors):
            flat.index_copy_(0, target(flat), flat.index_select(0, source(flat)))

    @torch.no_grad()
    def move_to_prefixes(self, moves: Sequence[tuple[int, int, int, int, int]]) -> None:
        """(suffix slot, its first position, prefix slot, first position there, count)."""
        if not moves or not self.suffixes.tensors:
            return
        counts = [m[4] for m in moves]
        source = _Beside(_ranges([s * self.suffixes.capacity + first for s, first, *_ in moves], counts))
        slot = _Beside(torch.tensor([m[2] for m in moves]).repeat_interleave(torch.tensor(counts)))
        position = _Beside(_ranges([m[3] for m in moves], counts))
        for suffixes, prefixes in zip(self.suffixes.tensors, self.prefixes.tensors, strict=True):
            prefixes[slot(prefixes), :, position(prefixes)] = suffixes.flatten(0, 1).index_select(0, source(suffixes))

    @property
    def token_bytes(self) -> int:
        """What one token takes in all layers; 0 before the first pass."""
        return self.suffixes.token_bytes


class _Beside:
    """Indices where the tensor lies that they are for: one copy to each device."""

    def __init__(self, indices: Tensor) -> None:
        self._copies = {indices.device: indices}
        self._indices = indices

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.device not in self._copies:
            self._copies[tensor.device] = self._indices.to(tensor.device)
        return self._copies[tensor.device]


def _ranges(firsts: Sequence[int], counts: Sequence[int]) -> Tensor:
    """first, first + 1, … for each: ``counts[i]`` numbers from ``firsts[i]`` on."""
    number = torch.tensor(counts)
    before = number.cumsum(0) - number
    return (torch.tensor(firsts) - before).repeat_interleave(number) + torch.arange(int(number.sum()))
