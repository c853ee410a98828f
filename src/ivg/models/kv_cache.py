"""Keys and values of all rows: two kinds of slots for each layer. Tensors only.

A *prefix slot* holds what all rows of one prefix group begin with, [prefix slots, heads, capacity, size]; a row's *suffix slot* holds
what it has behind that, [suffix slots, capacity, heads, size]. So a shared beginning is stored once, and read once by all rows that
share it (``models.attention``).

Knows transformers' cache interface. Must not know tokens, rows or prefix groups (``models.slot_cache``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache

from ivg.models.forward_metadata import ForwardMetadata, Pair
from ivg.models.mapped_memory import return_pages, zeros


class KVCache(Cache):
    """Keys and values, layer by layer; allocated at the first pass, grown as needed.

    Attributes:
        prefixes: for each layer, as above.
        suffixes: the same.
        failed: memory ran out between two layers, so their sizes differ.
        metadata: of the pass that runs now.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.prefixes: list[Pair] = []
        self.suffixes: list[Pair] = []
        self.prefix_slots = self.prefix_capacity = self.suffix_slots = self.suffix_capacity = 0
        self.metadata: ForwardMetadata | None = None
        self.failed = False

    # What transformers calls

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Pair:
        """Store the new [rows, heads, columns, size]; return what the rows can see, or, for attention by prefix groups, just the new."""
        metadata = self.metadata
        assert metadata is not None
        if layer_idx == len(self.suffixes):
            self._add_layer((key_states, value_states))
        for kind, new in enumerate((key_states, value_states)):
            if metadata.prefix_writes is not None:
                row, column, slot, position = metadata.prefix_writes
                self.prefixes[layer_idx][kind][slot, :, position] = new[row, :, column]
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

    def _add_layer(self, pair: Pair) -> None:
        suffix, prefix = (self.suffix_slots, self.suffix_capacity), (self.prefix_slots, self.prefix_capacity)
        self.suffixes.append(cast("Pair", tuple(zeros((*suffix, t.shape[1], t.shape[3]), t) for t in pair)))
        self.prefixes.append(cast("Pair", tuple(zeros((prefix[0], t.shape[1], prefix[1], t.shape[3]), t) for t in pair)))

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

    # Memory

    @torch.no_grad()
    def reserve_suffixes(self, slots: int, capacity: int, used: int) -> None:
        """Have at least so many slots and positions; only the first ``used`` positions hold anything. Layer by layer: memory peaks low."""
        slots, capacity = max(slots, self.suffix_slots), max(capacity, self.suffix_capacity)
        if (slots, capacity) == (self.suffix_slots, self.suffix_capacity):
            return
        self.failed = True
        for i, pair in enumerate(self.suffixes):
            self.suffixes[i] = _grown(pair, (slots, capacity, None, None), (None, used))
        self.suffix_slots, self.suffix_capacity, self.failed = slots, capacity, False

    @torch.no_grad()
    def reserve_prefixes(self, slots: int, capacity: int, used: int) -> None:
        """As :meth:`reserve_suffixes`."""
        slots, capacity = max(slots, self.prefix_slots), max(capacity, self.prefix_capacity)
        if (slots, capacity) == (self.prefix_slots, self.prefix_capacity):
            return
        self.failed = True
        for i, pair in enumerate(self.prefixes):
            self.prefixes[i] = _grown(pair, (slots, None, capacity, None), (None, None, used))
        self.prefix_slots, self.prefix_capacity, self.failed = slots, capacity, False

    @torch.no_grad()
    def copy_suffixes(self, moves: Sequence[tuple[int, int, int, int]], device: torch.device) -> None:
        """(source slot, its first position, target slot, count): to the front of the target. All are read before any is written."""
        if not moves or not self.suffixes:
            return
        source = _ranges([s * self.suffix_capacity + first for s, first, _, _ in moves], [n for *_, n in moves]).to(device)
        target = _ranges([t * self.suffix_capacity for _, _, t, _ in moves], [n for *_, n in moves]).to(device)
        for pair in self.suffixes:
            for tensor in pair:
                flat = tensor.flatten(0, 1)
                flat.index_copy_(0, target, flat.index_select(0, source))

    @torch.no_grad()
    def move_to_prefixes(self, moves: Sequence[tuple[int, int, int, int, int]], device: torch.device) -> None:
        """(suffix slot, its first position, prefix slot, first position there, count)."""
        if not moves or not self.suffixes:
            return
        counts = [m[4] for m in moves]
        source = _ranges([s * self.suffix_capacity + first for s, first, *_ in moves], counts).to(device)
        slot = torch.tensor([m[2] for m in moves]).repeat_interleave(torch.tensor(counts)).to(device)
        position = _ranges([m[3] for m in moves], counts).to(device)
        for suffixes, prefixes in zip(self.suffixes, self.prefixes, strict=True):
            for kind in (0, 1):
                prefixes[kind][slot, :, position] = suffixes[kind].flatten(0, 1).index_select(0, source)

    @torch.no_grad()
    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """The first positions of one prefix slot to another."""
        for pair in self.prefixes:
            for tensor in pair:
                tensor[target, :, :length] = tensor[source, :, :length]

    @torch.no_grad()
    def zero_suffix(self, slot: int, first: int) -> None:
        """Zero a slot from a position on. What is not seen must still be finite: its weight is 0, and 0 x NaN is NaN."""
        for pair in self.suffixes:
            for tensor in pair:
                tensor[slot, first:] = 0

    @torch.no_grad()
    def zero_prefix(self, slot: int, first: int) -> None:
        """As :meth:`zero_suffix`."""
        for pair in self.prefixes:
            for tensor in pair:
                tensor[slot, :, first:] = 0

    def release_memory(self, suffix_lengths: Sequence[int], prefix_lengths: Sequence[int]) -> None:
        """Return the pages behind the first ``suffix_lengths[i]`` positions of suffix slot i, and so on, to the operating system.

        They read as zeros from then on, and take memory again when they are written. CPUs only: on a GPU the cache keeps its size.
        """
        for suffixes, prefixes in zip(self.suffixes, self.prefixes, strict=True):
            for tensor in suffixes:
                position = tensor[0, 0].nbytes if tensor.numel() else 0
                size = self.suffix_capacity
                return_pages(tensor, [(i * size + n, (i + 1) * size) for i, n in enumerate(suffix_lengths)], position)
            for tensor in prefixes:
                heads, position = tensor.shape[1], tensor[0, 0, 0].nbytes if tensor.numel() else 0
                lines = [(i * heads + h, n) for i, n in enumerate(prefix_lengths) for h in range(heads)]
                size = self.prefix_capacity
                return_pages(tensor, [(line * size + n, (line + 1) * size) for line, n in lines], position)

    @property
    def token_bytes(self) -> int:
        """What one token takes in all layers; 0 before the first pass."""
        return sum(t.shape[2] * t.shape[3] * t.element_size() for pair in self.suffixes for t in pair)


def _grown(pair: Pair, sizes: Sequence[int | None], used: Sequence[int | None]) -> Pair:
    out = []
    for old in pair:
        new = zeros([have if want is None else want for have, want in zip(old.shape, sizes, strict=True)], old)
        part = tuple(slice(0, n) for n in old[tuple(slice(0, n) for n in used)].shape)
        new[part] = old[part]
        out.append(new)
    return out[0], out[1]


def _ranges(firsts: Sequence[int], counts: Sequence[int]) -> Tensor:
    """first, first + 1, … for each: ``counts[i]`` numbers from ``firsts[i]`` on."""
    number = torch.tensor(counts)
    before = number.cumsum(0) - number
    return (torch.tensor(firsts) - before).repeat_interleave(number) + torch.arange(int(number.sum()))
