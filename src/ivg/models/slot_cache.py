"""The prefix-sharing cache: which slots hold which row's tokens. Tensors are moved by ``models.kv_cache``.

The rows that descend from one prompt are a prefix group. What all live rows of a group begin with lies in the group's prefix slot; each
row holds its suffix in a slot of its own. A fork copies the suffix alone, and not before the next pass; the prefix grows when rows were
freed and the others share more. A row that is alone in its group writes to the prefix slot directly. So cost and memory of many beams
are those of one answer and a little more. Every row has its own length: requests of different lengths share a batch without padding
the cache.

Must not depend on what tokens mean, nor networks (``models.slot_forward``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn
from typing_extensions import override

from ivg.errors import ModelError
from ivg.models.cache import CacheRow, PassLimits, RowCache, common_length
from ivg.models.forward_metadata import RowLayout
from ivg.models.kv_cache import MIN_CAPACITY, KVCache, Slots
from ivg.models.row_weights import row_order
from ivg.models.slot_forward import SlotForward
from ivg.models.support import NetworkSupport

MIN_GROWTH = 4
"""A prefix grows when at least this many more tokens are common to its rows."""


@dataclass(eq=False, slots=True)
class PrefixGroup:
    """Rows that descend from one :meth:`SlotCache.open`.

    Attributes:
        slot: its prefix slot.
        prefix: tokens that lie there.
        rope_range: which rotary factors they were read with.
        weights: they were read with.
        rows: rows in use.
        spare_slots: suffix slots that its freed rows left, kept at hand so that a group's slots stay side by side.
        stale: rows were freed since it was last looked how much the others share.
        nonfinite: its prefix slot may hold NaN.
    """

    slot: int
    prefix: list[int]
    rope_range: int = 0
    weights: str | None = None
    rows: dict[SlotRow, None] = field(default_factory=dict)
    spare_slots: list[int] = field(default_factory=list)
    stale: bool = False
    nonfinite: bool = False


@dataclass(eq=False, slots=True)
class SlotRow(CacheRow):
    """The first ``prefix_length`` tokens lie in the prefix slot of its ``group``, the others in ``slot``.

    A row that is ``nonfinite`` has its memory zeroed before others, or itself after a cut, use it again.
    """

    group: PrefixGroup
    prefix_length: int = 0
    slot: int | None = None

    @property
    def suffix_length(self) -> int:
        """Tokens behind the prefix."""
        return len(self.ids) - self.prefix_length


class SlotCache(RowCache):
    """All rows of one network with keys and values for each token.

    Args:
        network: the causal network.
        support: how it is read.
        limits: of one pass.
    """

    mixes_weights = True

    def __init__(self, network: nn.Module, support: NetworkSupport, limits: PassLimits) -> None:
        self.limits, self.max_positions = limits, support.max_positions
        self.network = SlotForward(network, support, limits)
        self.device = self.network.device
        self.clear()

    @override
    def clear(self) -> None:
        self.memory = KVCache()
        self.rows: dict[SlotRow, None] = {}
        self.groups: dict[PrefixGroup, None] = {}
        self.idle_groups: dict[PrefixGroup, None] = {}
        """Without rows; their prefixes may serve a later prompt. The one that has not been used for longest comes first."""
        self._pending_copies: dict[int, tuple[int, int]] = {}  # forks to be made: target slot -> source slot, count

    # Rows

    @override
    def open(self, ids: Sequence[int], rope_range: int = 0, mark: int = 0, weights: str | None = None) -> SlotRow:
        group, shared = self._group_for(ids, rope_range, weights)
        return self._add(SlotRow(group, list(ids[:shared]), rope_range, weights=weights, prefix_length=shared))

    def fork(self, row: CacheRow) -> SlotRow:
        """A second row with the same tokens; copies only what is not in the prefix, and that not before the next pass."""
        return self._become_fork(SlotRow(row.group, []), cast("SlotRow", row))

    @override
    def truncate(self, row: CacheRow, length: int) -> None:
        row = cast("SlotRow", row)
        del row.ids[length:]
        row.prefix_length = min(row.prefix_length, len(row.ids))

    @override
    def reopen(self, row: CacheRow, ids: Sequence[int], rope_range: int) -> None:
        row = cast("SlotRow", row)
        self.free(row)
        row.group, row.prefix_length = self._group_for(ids, rope_range, row.weights)
        row.ids, row.rope_range, row.nonfinite = list(ids[: row.prefix_length]), rope_range, False
        self._add(row)

    @override
    def reopen_as_fork(self, row: CacheRow, other: CacheRow) -> None:
        self.free(row)
        self._become_fork(cast("SlotRow", row), cast("SlotRow", other))

    def free(self, row: CacheRow) -> None:
        """Give its slot back; a prefix without rows stays until its slot is needed, and may serve a later prompt."""
        row = cast("SlotRow", row)
        group = row.group
        self.rows.pop(row, None)
        group.rows.pop(row, None)
        group.stale = True
        if row.nonfinite:
            group.nonfinite = True
            self._make_copies()  # a fork of it may be waiting
            if row.slot is not None:
                self.memory.suffixes.zero(row.slot, 0)
        self._leave_slot(row)
        if not group.rows:
            for slot in group.spare_slots:
                self.memory.suffixes.free(slot)
            group.spare_slots = []
            self.groups.pop(group, None)
            self.idle_groups[group] = None
            if group.nonfinite:
                self.memory.prefixes.zero(group.slot, 0)
                group.prefix, group.nonfinite = [], False

    def _group_for(self, ids: Sequence[int], rope_range: int, weights: str | None) -> tuple[PrefixGroup, int]:
        """(a group whose prefix begins as ``ids``, for how many tokens)."""
        best, shared = None, 0
        for group in (*self.idle_groups, *self.groups):
            n = common_length(group.prefix, ids) if (group.rope_range, group.weights) == (rope_range, weights) else 0
            if n > shared:
                best, shared = group, n
        shared = max(0, min(shared, len(ids) - 1))
        if best is not None and shared and best in self.idle_groups and 2 * shared >= len(best.prefix):
            del self.idle_groups[best]
            group = best
            del group.prefix[shared:]
        else:
            group = PrefixGroup(self._new_prefix_slot(best), list(ids[:shared]), rope_range, weights)
            if best is not None and shared:
                self.memory.prefixes.copy(best.slot, group.slot, shared)
        self.groups[group] = None
        return group, shared

    def _become_fork(self, row: SlotRow, other: SlotRow) -> SlotRow:
        row.group, row.ids, row.prefix_length = other.group, list(other.ids), other.prefix_length
        row.rope_range, row.nonfinite, row.finite_length = other.rope_range, other.nonfinite, other.finite_length
        row.weights = other.weights
        if other.suffix_length:
            if other.slot in self._pending_copies:
                self._make_copies()
            row.slot = self._new_suffix_slot(row.group)
            assert other.slot is not None
            self._pending_copies[row.slot] = (other.slot, other.suffix_length)
        return self._add(row)

    def _add(self, row: SlotRow) -> SlotRow:
        self.rows[row] = None
        row.group.rows[row] = None
        return row

    # Slots

    def _leave_slot(self, row: SlotRow) -> None:
        if row.slot is not None:
            self._pending_copies.pop(row.slot, None)
            row.group.spare_slots.append(row.slot)
            row.slot = None

    def _new_suffix_slot(self, group: PrefixGroup) -> int:
        """One that the group had before, else the lowest."""
        return group.spare_slots.pop() if group.spare_slots else self.memory.suffixes.allocate(self._longest_suffix)

    def _new_prefix_slot(self, keep: PrefixGroup | None) -> int:
        """An unused slot, else that of the idle prefix unused for longest (but for ``keep``), else a new one."""
        oldest = next((g for g in self.idle_groups if g is not keep), None)
        if self.memory.prefixes.unused or oldest is None:
            return self.memory.prefixes.allocate(self._longest_prefix)
        del self.idle_groups[oldest]
        return oldest.slot

    def _reserve_capacity(self, slots: Slots, positions: int, used: Callable[[], int]) -> None:
        """Have so many positions in each slot; a power of two of them, but no more than the network reads."""
        if positions > slots.capacity:
            capacity = max(MIN_CAPACITY, 1 << (positions - 1).bit_length())
            slots.reserve(0, min(capacity, max(positions, self.max_positions or capacity)), used)

    def _longest_prefix(self) -> int:  # this and the next look at all rows: only where slots grow
        return max((len(g.prefix) for g in (*self.groups, *self.idle_groups)), default=0)

    def _longest_suffix(self) -> int:
        return max((row.suffix_length for row in self.rows), default=0)

    # Before a pass

    def prepare(self, rows: Sequence[CacheRow]) -> None:
        """Make the forks that wait, and let prefixes grow."""
        if self.memory.prefixes.failed or self.memory.suffixes.failed:
            raise ModelError("memory ran out while the cache grew\n  call reset_caches(), then ask for fewer beams or shorter texts")
        self._make_copies()
        for row in cast("Sequence[SlotRow]", rows):
            if row.nonfinite:  # it was cut behind what made it so, or will be found to be so again
                group = row.group
                group.nonfinite, row.nonfinite = True, False
                if row.slot is not None:
                    self.memory.suffixes.zero(row.slot, row.suffix_length)
                seen = max(r.prefix_length for r in group.rows)
                del group.prefix[seen:]
                self.memory.prefixes.zero(group.slot, seen)
        self._grow_prefixes([g for g in dict.fromkeys(row.group for row in rows) if g.stale])

    def _make_copies(self) -> None:
        self.memory.copy_suffixes([(source, 0, target, n) for target, (source, n) in self._pending_copies.items()])
        self._pending_copies.clear()

    def _grow_prefixes(self, groups: Sequence[PrefixGroup]) -> None:
        """Move what all live rows of a group have in common to its prefix slot."""
        to_prefix, shifts = [], []
        for group in groups:
            group.stale = False
            common = _new_prefix_length(group)
            if common is None:
                continue
            donor, have = next(iter(group.rows)), len(group.prefix)
            if common > have:
                assert donor.slot is not None
                to_prefix.append((donor.slot, have - donor.prefix_length, group.slot, have, common - have))
                group.prefix += donor.ids[have:common]
            for row in group.rows:
                rest, moved = len(row.ids) - common, common - row.prefix_length
                row.prefix_length = common
                if rest == 0:
                    self._leave_slot(row)
                elif moved:
                    assert row.slot is not None
                    shifts.append((row.slot, moved, row.slot, rest))
        if to_prefix:
            self._reserve_capacity(self.memory.prefixes, max(begin + n for *_, begin, n in to_prefix), self._longest_prefix)
            self.memory.move_to_prefixes(to_prefix)
        self.memory.copy_suffixes(shifts)

    # The pass

    def batches(self, rows: Sequence[CacheRow], counts: dict[int, int], outputs: dict[int, int], output_size: int) -> Iterator[list[int]]:
        """Rows with the same factors and of like count together: at most ``limits.padding`` tokens of padding for a pass saved."""
        limits = self.limits
        batch: list[int] = []
        padding = longest = most = 0
        for i in sorted(counts, key=lambda i: (rows[i].rope_range, -counts[i])):
            widest = counts[batch[0]] if batch else counts[i]
            extra = widest - counts[i]
            length = max(longest, len(rows[i].ids) + counts[i])
            tokens = (len(batch) + 1) * widest
            scores = tokens * self.network.heads * length if widest <= limits.grouped_columns else 0
            wanted = max(most, outputs.get(i, 1))
            many = wanted > 1 and (len(batch) + 1) * wanted * output_size > limits.outputs
            full = padding + extra > limits.padding or tokens > limits.batch_tokens or scores > limits.grouped_scores or many
            if batch and (full or rows[batch[0]].rope_range != rows[i].rope_range):
                yield batch
                batch, padding, extra, length, wanted = [], 0, 0, len(rows[i].ids) + counts[i], outputs.get(i, 1)
            batch.append(i)
            padding, longest, most = padding + extra, length, wanted
        if batch:
            yield batch

    @override
    def forward(self, rows: Sequence[CacheRow], pieces: Sequence[Sequence[int]], keep: int) -> tuple[Tensor, list[int]]:
        slots = cast("Sequence[SlotRow]", rows)
        self._find_room(slots, pieces)
        order = sorted(range(len(slots)), key=lambda i: _place_in_pass(slots[i]))
        layouts = [RowLayout(len(r.ids), len(pieces[i]), r.prefix_length, r.group.slot, r.slot) for i in order for r in (slots[i],)]
        outputs = self.network.run(self.memory, layouts, [pieces[i] for i in order], [rows[i].ids for i in order], keep)
        for row, piece in zip(slots, pieces, strict=True):
            row.ids.extend(piece)
            if row.slot is None:
                row.group.prefix.extend(piece)
                row.prefix_length = len(row.ids)
        return outputs, order

    def _find_room(self, rows: Sequence[SlotRow], pieces: Sequence[Sequence[int]]) -> None:
        """A row that is alone, without suffix, writes to its prefix slot; others get a suffix slot where they have none."""
        capacity = 0
        without = []
        for row, piece in zip(rows, pieces, strict=True):
            if not row.suffix_length and len(row.group.rows) == 1:
                self._leave_slot(row)
                del row.group.prefix[row.prefix_length :]
                self._reserve_capacity(self.memory.prefixes, len(row.ids) + len(piece), self._longest_prefix)
                continue
            if row.slot is None:
                without.append(row)
            capacity = max(capacity, row.suffix_length + len(piece))
        suffixes = self.memory.suffixes
        missing = len(without) - len(suffixes.unused) - sum(len(g.spare_slots) for g in {row.group for row in without})
        if missing > 0:
            suffixes.reserve(suffixes.count + max(missing, suffixes.growth), MIN_CAPACITY, self._longest_suffix)
        for row in without:
            row.slot = self._new_suffix_slot(row.group)
        self._reserve_capacity(suffixes, capacity, self._longest_suffix)

    # Memory

    def release_memory(self) -> None:
        """Return what no row holds to the operating system; prefixes that may serve a later prompt stay. CPUs only."""
        if self.device.type != "cpu":
            return
        suffixes, prefixes = [0] * self.memory.suffixes.count, [0] * self.memory.prefixes.count
        for row in self.rows:
            if row.slot is not None:
                suffixes[row.slot] = row.suffix_length
        for source, count in self._pending_copies.values():  # possibly of slots that are free
            suffixes[source] = max(suffixes[source], count)
        for group in (*self.groups, *self.idle_groups):
            prefixes[group.slot] = len(group.prefix)
        self.memory.suffixes.release_memory(suffixes)
        self.memory.prefixes.release_memory(prefixes)

    @property
    @override
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    @override
    def unshared_bytes(self) -> int:
        return sum([len(row.ids) for row in self.rows]) * self.memory.token_bytes

    @property
    @override
    def used_bytes(self) -> int:
        suffixes = sum([len(row.ids) - row.prefix_length for row in self.rows])
        return (suffixes + sum([len(group.prefix) for group in self.groups])) * self.memory.token_bytes


def _place_in_pass(row: SlotRow) -> tuple[str, bool, int, int]:
    """By this the rows of a pass are sorted: those of the same weights side by side, then as they lie in memory."""
    return row_order(row.weights), row.slot is None, row.slot or 0, row.group.slot


def _new_prefix_length(group: PrefixGroup) -> int | None:
    """How many tokens the prefix slot should hold; None: as it does. Cuts off what no row reads any more."""
    rows = list(group.rows)
    if len(rows) == 1:
        if not rows[0].suffix_length:
            return None
        del group.prefix[rows[0].prefix_length :]
        return len(rows[0].ids)
    if min(row.suffix_length for row in rows) < MIN_GROWTH:
        return None
    begin = min(row.prefix_length for row in rows)
    del group.prefix[max(row.prefix_length for row in rows) :]
    first = rows[0].ids[begin:]
    for row in rows[1:]:
        shared = common_length(first, row.ids[begin : begin + len(first)])
        if begin + shared < len(group.prefix) + MIN_GROWTH:
            return None
        del first[shared:]
    return begin + len(first)
