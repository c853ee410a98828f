"""Where keys and values lie, and which of them a forward pass writes and sees. Tensors only.

Two kinds of memory for each layer. A *trunk* holds what all rows of one family begin with, [trunks, heads, capacity, size].
A row's *own* memory holds what it has behind that, [slots, depth, heads, size]. So a shared beginning is stored once, and
read once by all rows that share it (``models.attention``).

Knows transformers' cache interface. Must not know tokens, rows, families (``models.cached``).
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache

_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None  # elsewhere it is no order but advice
Pair = tuple[Tensor, Tensor]
"""Keys and values."""
MAPPED_BYTES = 1 << 16
"""Tensors of at least this size are mapped."""


@dataclass(slots=True)
class Branch:
    """Rows whose trunks are read in one product: F families of ``width`` rows each (short ones repeat a row).

    Attributes:
        trunks: which trunks: a slice where they lie side by side, else indices [F].
        families: F.
        width: rows of each family.
        length: positions of the trunks that are read.
        rows: which rows of the pass these are, family by family [F * width]; None: all rows, in their order.
        members: the rows without repetitions [m].
        places: where each of ``members`` stands in ``rows`` [m].
    """

    trunks: slice | Tensor
    families: int
    width: int
    length: int
    rows: Tensor | None
    members: Tensor
    places: Tensor


@dataclass(slots=True)
class AttentionMasks:
    """What the tokens of a pass see in layers of one kind, 0 or -inf.

    Attributes:
        trunk: [R, C, trunk_length].
        own: [R, 1, C, own_length].
        branches: ``trunk`` as each branch needs it, made by the first layer that asks; None: everything is seen.
    """

    trunk: Tensor
    own: Tensor
    branches: list[Tensor | None] = field(default_factory=list)


@dataclass(slots=True)
class ForwardMetadata:
    """One forward pass of R rows and C columns: where its keys and values go, and what every token may see.

    Attributes:
        rows: R.
        trunk_length: positions of the longest trunk that is seen.
        own_length: positions of the longest own part that is seen.
        to_trunk: (row, column, trunk, position) of every token that is written to a trunk.
        to_own: (token, place): token counts rows times columns (None: all of them), place counts slots times depth.
        slots: own slots of the rows: a slice where they lie side by side, else indices [R]; None: no row has an own part.
        branches: for attention by families; empty: keys and values are put together for each row instead.
        blocks: (first row, end, longest own part among them): own parts are read so many rows at a time.
        sights: by the address of the marker that stands for the kind of layer.
        gather: for keys and values put together: trunks [R], then (row, position, place) of every own token.
        touched: the layer whose attention is still to be called.
        given: what it was given, and has to hand over as it is.
    """

    rows: int
    trunk_length: int
    own_length: int
    to_trunk: tuple[Tensor, Tensor, Tensor, Tensor] | None
    to_own: tuple[Tensor | None, Tensor] | None
    slots: slice | Tensor | None
    branches: list[Branch] = field(default_factory=list)
    blocks: list[tuple[int, int, int]] = field(default_factory=list)
    sights: dict[int, AttentionMasks] = field(default_factory=dict)
    gather: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    touched: int | None = None
    given: Pair | None = None


class KVCache(Cache):
    """Keys and values of all rows, layer by layer; allocated at the first pass, grown as needed."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.own: list[Pair] = []
        self.trunk: list[Pair] = []
        self.slots = self.depth = self.trunks = self.capacity = 0
        self.plan: ForwardMetadata | None = None
        self.failed = False  # memory ran out between two layers: their sizes differ

    # What transformers calls

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Pair:
        """Store [rows, heads, columns, size]; give back what the rows can see, or, where attention goes by families, just that."""
        plan = self.plan
        assert plan is not None
        if layer_idx == len(self.own):
            pair = (key_states, value_states)
            self.own.append(cast("Pair", tuple(zeros((self.slots, self.depth, t.shape[1], t.shape[3]), t) for t in pair)))
            self.trunk.append(cast("Pair", tuple(zeros((self.trunks, t.shape[1], self.capacity, t.shape[3]), t) for t in pair)))
        for kind, new in enumerate((key_states, value_states)):
            if plan.to_trunk is not None:
                row, column, trunk, position = plan.to_trunk
                self.trunk[layer_idx][kind][trunk, :, position] = new[row, :, column]
            if plan.to_own is not None:
                token, place = plan.to_own
                flat = new.transpose(1, 2).flatten(0, 1)
                self.own[layer_idx][kind].flatten(0, 1).index_copy_(0, place, flat if token is None else flat[token])
        if plan.branches:
            plan.touched, plan.given = layer_idx, (key_states, value_states)
            return plan.given
        return self._together(layer_idx, plan, 0), self._together(layer_idx, plan, 1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Never used for positions: every pass gives its own."""
        return 0

    def _together(self, layer: int, plan: ForwardMetadata, kind: int) -> Tensor:
        """Trunk and own part of every row side by side [rows, heads, length, size]."""
        assert plan.gather is not None
        trunks, row, position, place = plan.gather
        out = self.trunk[layer][kind][:, :, : plan.trunk_length].index_select(0, trunks)
        if plan.own_length == 0:
            return out
        longest = max(plan.trunk_length, int(position.max()) + 1)
        full = out.new_zeros(*out.shape[:2], longest, out.shape[3])
        full[:, :, : plan.trunk_length] = out
        full[row, :, position] = self.own[layer][kind].flatten(0, 1)[place]
        return full

    # Memory

    @torch.no_grad()
    def reserve(self, slots: int = 0, depth: int = 0, trunks: int = 0, capacity: int = 0, used: int = 0) -> None:
        """Have at least so much; layer by layer, so that memory peaks low. Only the first ``used`` positions hold anything."""
        self.failed = True
        if slots > self.slots or depth > self.depth:
            slots, depth = max(slots, self.slots), max(depth, self.depth)
            for i, pair in enumerate(self.own):
                self.own[i] = _grown(pair, (slots, depth, None, None), (None, used))
            self.slots, self.depth = slots, depth
        if trunks > self.trunks or capacity > self.capacity:
            trunks, capacity = max(trunks, self.trunks), max(capacity, self.capacity)
            for i, pair in enumerate(self.trunk):
                self.trunk[i] = _grown(pair, (trunks, None, capacity, None), (None, None, used))
            self.trunks, self.capacity = trunks, capacity
        self.failed = False

    @torch.no_grad()
    def copy_own(self, moves: Sequence[tuple[int, int, int, int]], device: torch.device) -> None:
        """(source slot, its first position, target slot, count): to the front of the target. All are read before any is written."""
        if not moves or not self.own:
            return
        source = _spread([s * self.depth + first for s, first, _, _ in moves], [n for *_, n in moves]).to(device)
        target = _spread([t * self.depth for _, _, t, _ in moves], [n for *_, n in moves]).to(device)
        for tensor in self._flat_own():
            tensor.index_copy_(0, target, tensor.index_select(0, source))

    @torch.no_grad()
    def to_trunks(self, moves: Sequence[tuple[int, int, int, int, int]], device: torch.device) -> None:
        """(source slot, its first position, trunk, first position there, count): own parts become trunks."""
        if not moves or not self.own:
            return
        counts = [m[4] for m in moves]
        source = _spread([s * self.depth + first for s, first, *_ in moves], counts).to(device)
        trunk = torch.tensor([m[2] for m in moves]).repeat_interleave(torch.tensor(counts)).to(device)
        position = _spread([m[3] for m in moves], counts).to(device)
        for own, pair in zip(self.own, self.trunk, strict=True):
            for kind in (0, 1):
                pair[kind][trunk, :, position] = own[kind].flatten(0, 1).index_select(0, source)

    @torch.no_grad()
    def copy_trunk(self, source: int, target: int, length: int) -> None:
        """The first positions of one trunk to another."""
        for pair in self.trunk:
            for tensor in pair:
                tensor[target, :, :length] = tensor[source, :, :length]

    @torch.no_grad()
    def scrub(self, first: int, *, slot: int | None = None, trunk: int | None = None) -> None:
        """Zero everything from a position on. What is not seen must still be finite: its weight is 0, and 0 x NaN is NaN."""
        for own, shared in zip(self.own, self.trunk, strict=True):
            for kind in (0, 1):
                if slot is not None:
                    own[kind][slot, first:] = 0
                if trunk is not None:
                    shared[kind][trunk, :, first:] = 0

    @torch.no_grad()
    def release_memory(self, own: Sequence[int], trunk: Sequence[int]) -> None:
        """Let the system have the pages behind the first ``own[i]`` positions of slot i and ``trunk[i]`` of trunk i.

        They read as zeros from then on, and are taken again when they are written. CPUs only: on a GPU the store keeps its size.
        """
        for slots, trunks in zip(self.own, self.trunk, strict=True):
            for tensor in slots:
                position = tensor[0, 0].nbytes if tensor.numel() else 0
                _return_pages(tensor, [(i * self.depth + n, (i + 1) * self.depth) for i, n in enumerate(own)], position)
            for tensor in trunks:
                heads, position = tensor.shape[1], tensor[0, 0, 0].nbytes if tensor.numel() else 0
                lines = [(i * heads + h, n) for i, n in enumerate(trunk) for h in range(heads)]
                _return_pages(tensor, [(line * self.capacity + n, (line + 1) * self.capacity) for line, n in lines], position)

    def _flat_own(self) -> Iterator[Tensor]:
        for pair in self.own:
            for tensor in pair:
                yield tensor.flatten(0, 1)

    @property
    def nbytes(self) -> int:
        """Memory set aside; on CPUs the system gives it when it is first written."""
        return sum(t.nbytes for pair in (*self.own, *self.trunk) for t in pair)

    @property
    def token_bytes(self) -> int:
        """What one token takes in all layers; 0 before the first pass."""
        return sum(t.shape[2] * t.shape[3] * t.element_size() for pair in self.own for t in pair)


def zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """Zeros of the same type and place. On a CPU, pages that are not touched take no memory.

    Straight from the system: the allocator would hand out what was freed before, and would have to clear it.
    """
    size = math.prod(shape) * like.element_size()
    with torch.inference_mode(False):  # else it could not be written outside of that mode
        if like.device.type != "cpu" or size < MAPPED_BYTES:
            return torch.zeros(*shape, dtype=like.dtype, device=like.device)
        return torch.frombuffer(_mapped(size), dtype=like.dtype).view(*shape)


def _mapped(size: int) -> mmap.mmap:
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    return mmap.mmap(-1, size, **flags)


def _return_pages(tensor: Tensor, spans: Sequence[tuple[int, int]], size: int) -> None:
    """Whole pages within ``spans`` (first, end; in order; units of ``size`` bytes) of a tensor that :func:`zeros` mapped."""
    if tensor.device.type != "cpu" or tensor.nbytes < MAPPED_BYTES or _madvise is None:
        return
    merged: list[list[int]] = []
    for first, end in spans:
        if merged and merged[-1][1] == first:
            merged[-1][1] = end
        else:
            merged.append([first, end])
    start = tensor.data_ptr()
    for first, end in merged:
        low, high = -(-first * size // mmap.PAGESIZE) * mmap.PAGESIZE, end * size // mmap.PAGESIZE * mmap.PAGESIZE
        if low < high:
            _madvise(ctypes.c_void_p(start + low), ctypes.c_size_t(high - low), mmap.MADV_DONTNEED)


def _grown(pair: Pair, sizes: Sequence[int | None], used: Sequence[int | None]) -> Pair:
    out = []
    for old in pair:
        new = zeros([have if want is None else want for have, want in zip(old.shape, sizes, strict=True)], old)
        part = tuple(slice(0, n) for n in old[tuple(slice(0, n) for n in used)].shape)
        new[part] = old[part]
        out.append(new)
    return out[0], out[1]


def _spread(firsts: Sequence[int], counts: Sequence[int]) -> Tensor:
    """first, first + 1, … for each: ``counts[i]`` numbers from ``firsts[i]`` on."""
    number = torch.tensor(counts)
    before = number.cumsum(0) - number
    return (torch.tensor(firsts) - before).repeat_interleave(number) + torch.arange(int(number.sum()))
