"""Rows, families and trunks: who holds which tokens where. Bookkeeping only; tensors are moved by the store.

The rows that descend from one prompt are a family. What all live rows of a family begin with lies in the family's *trunk*;
each row holds its *own* part behind that. A fork copies the own part alone, and not before the next pass; the trunk grows when
rows were freed and the others share more. A row that is alone writes to its trunk directly.

Must not know networks (``models.cached``), nor what tokens mean.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ivg.models.kv_cache import KVCache

OWN_POSITIONS = 64
"""Positions of a slot at first."""
SETTLE_TOKENS = 4
"""A trunk grows when at least this many more tokens are common to its rows."""


@dataclass(eq=False, slots=True)
class PrefixGroup:
    """Rows that descend from one :meth:`ModelRunner.open`.

    Attributes:
        trunk: number of the trunk.
        ids: tokens that lie there.
        live: rows in use.
        slots: own slots that its freed rows left, kept at hand so that a family's slots stay side by side.
        stale: rows were freed since it was last seen how much the others share.
        broken: its trunk may hold NaN.
        factors: which rotary factors its keys were turned by (``models.rotary``).
    """

    trunk: int
    ids: list[int]
    live: dict[Row, None] = field(default_factory=dict)
    slots: list[int] = field(default_factory=list)
    stale: bool = False
    broken: bool = False
    factors: int = 0


@dataclass(eq=False, slots=True)
class Row:
    """``ids`` are the tokens whose keys and values it holds: the first ``start`` in its family's trunk, the others in ``slot``.

    ``broken``: the network gave NaN or infinity for it; its memory is zeroed before others, or itself after a cut, use it again.
    Only its first ``sound`` tokens were read before that pass: the others may be spoilt with it.
    """

    family: PrefixGroup
    ids: list[int]
    start: int
    slot: int | None = None
    broken: bool = False
    sound: int = 0

    @property
    def own(self) -> int:
        """Tokens behind the trunk; the owner of ``ids`` may have cut them short."""
        self.start = min(self.start, len(self.ids))
        return len(self.ids) - self.start


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
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


class CacheManager:
    """All rows of one model.

    Args:
        device: of the store.
        max_positions: that the model can have, if that is known.
    """

    def __init__(self, device: torch.device, max_positions: int | None = None) -> None:
        self.device, self.max_positions = device, max_positions
        self.store = KVCache()
        self.live: dict[Row, None] = {}
        self._families: dict[PrefixGroup, None] = {}
        self._idle: dict[PrefixGroup, None] = {}
        self._free_trunks: list[int] = []
        self._free_slots: list[int] = []
        self._copies: dict[int, tuple[int, int]] = {}  # forks to be made: target slot -> source slot, count

    def open(self, ids: Sequence[int], factors: int = 0) -> Row:
        """A row for ``ids``, holding already as many of them as some trunk has (all but the last at most)."""
        family, shared = self._family_for(ids, factors)
        return self._enter(Row(family, list(ids[:shared]), shared))

    def fork(self, row: Row) -> Row:
        """A second row with the same tokens; copies only what is not in the trunk, and that not before the next pass."""
        return self._begin_as(Row(row.family, [], 0), row)

    def renew(self, row: Row, ids: Sequence[int], factors: int) -> None:
        """Give up what it holds, and begin ``ids`` as :meth:`open` does, among rows with these factors."""
        self.free(row)
        row.family, row.start = self._family_for(ids, factors)
        row.ids = list(ids[: row.start])
        row.broken = False
        self._enter(row)

    def renew_as(self, row: Row, other: Row) -> None:
        """Give up what it holds, and become a fork of another."""
        self.free(row)
        self._begin_as(row, other)

    def _family_for(self, ids: Sequence[int], factors: int) -> tuple[PrefixGroup, int]:
        """(a family whose trunk begins as ``ids``, for how many tokens)."""
        best, shared = None, 0
        for family in (*self._idle, *self._families):
            n = common_length(family.ids, ids) if family.factors == factors else 0
            if n > shared:
                best, shared = family, n
        shared = max(0, min(shared, len(ids) - 1))
        if best is not None and shared and best in self._idle and 2 * shared >= len(best.ids):
            del self._idle[best]
            family = best
            del family.ids[shared:]
        else:
            family = PrefixGroup(self._free_trunk(best), list(ids[:shared]), factors=factors)
            if best is not None and shared:
                self.store.copy_trunk(best.trunk, family.trunk, shared)
        self._families[family] = None
        return family, shared

    def _begin_as(self, row: Row, other: Row) -> Row:
        own = other.own
        row.family, row.ids, row.start, row.broken, row.sound = other.family, list(other.ids), other.start, other.broken, other.sound
        if own:
            if other.slot in self._copies:
                self._make_copies()
            row.slot = self._free_slot(row.family)
            assert other.slot is not None
            self._copies[row.slot] = (other.slot, own)
        return self._enter(row)

    def free(self, row: Row) -> None:
        """Give its memory back; a trunk without rows stays until its place is needed, and may serve a later prompt."""
        family = row.family
        self.live.pop(row, None)
        family.live.pop(row, None)
        family.stale = True
        if row.broken:
            family.broken = True
            self._make_copies()  # a fork of it may be waiting
            if row.slot is not None:
                self.store.scrub(0, slot=row.slot)
        self._leave_slot(row)
        if not family.live:
            for slot in family.slots:
                heapq.heappush(self._free_slots, slot)
            family.slots = []
            self._families.pop(family, None)
            self._idle[family] = None
            if family.broken:
                self.store.scrub(0, trunk=family.trunk)
                family.ids, family.broken = [], False

    def _enter(self, row: Row) -> Row:
        self.live[row] = None
        row.family.live[row] = None
        return row

    def _leave_slot(self, row: Row) -> None:
        if row.slot is not None:
            self._copies.pop(row.slot, None)
            row.family.slots.append(row.slot)
            row.slot = None

    def _free_slot(self, family: PrefixGroup) -> int:
        """One that the family had before, else the lowest."""
        if family.slots:
            return family.slots.pop()
        if not self._free_slots:
            self._more_slots(max(8, self.store.slots))
        return heapq.heappop(self._free_slots)

    def _more_slots(self, count: int) -> None:
        have = self.store.slots
        self.store.reserve(slots=have + count, depth=OWN_POSITIONS, used=max((row.own for row in self.live), default=0))
        for slot in range(have, self.store.slots):
            heapq.heappush(self._free_slots, slot)

    def _free_trunk(self, but: PrefixGroup | None) -> int:
        """An unused trunk, else that of the prompt that nobody has asked for longest, else a new one."""
        if self._free_trunks:
            return self._free_trunks.pop()
        oldest = next((f for f in self._idle if f is not but), None)
        if oldest is not None:
            del self._idle[oldest]
            return oldest.trunk
        have = self.store.trunks
        self.store.reserve(trunks=max(4, 2 * have), capacity=64, used=self._longest_trunk())
        self._free_trunks = list(reversed(range(have, self.store.trunks)))
        return self._free_trunks.pop()

    def _make_copies(self) -> None:
        self.store.copy_own([(source, 0, target, n) for target, (source, n) in self._copies.items()], self.device)
        self._copies.clear()

    def prepare(self, rows: Sequence[Row]) -> None:
        """Before ``rows`` are read: make the forks that are asked for, let trunks grow."""
        self._make_copies()
        for row in rows:
            if row.broken:  # it was cut behind what broke it, or will be found broken again
                family = row.family
                family.broken, row.broken = True, False
                self.store.scrub(row.own, slot=row.slot)
                seen = max(len(r.ids) - r.own for r in family.live)
                del family.ids[seen:]
                self.store.scrub(seen, trunk=family.trunk)
        self._settle([f for f in dict.fromkeys(row.family for row in rows) if f.stale])

    def _settle(self, families: Sequence[PrefixGroup]) -> None:
        """Move what all live rows of a family have in common to its trunk."""
        to_trunk, shifts = [], []
        for family in families:
            family.stale = False
            rows = list(family.live)
            common = self._common(family, rows)
            if common is None:
                continue
            donor, have = rows[0], len(family.ids)
            if common > have:
                assert donor.slot is not None
                to_trunk.append((donor.slot, have - donor.start, family.trunk, have, common - have))
                family.ids += donor.ids[have:common]
            for row in rows:
                rest, moved = len(row.ids) - common, common - row.start
                row.start = common
                if rest == 0:
                    self._leave_slot(row)
                elif moved:
                    assert row.slot is not None
                    shifts.append((row.slot, moved, row.slot, rest))
        if to_trunk:
            self._have_capacity(max(begin + n for *_, begin, n in to_trunk))
            self.store.to_trunks(to_trunk, self.device)
        self.store.copy_own(shifts, self.device)

    @staticmethod
    def _common(family: PrefixGroup, rows: Sequence[Row]) -> int | None:
        """How many tokens the trunk should hold; None: as it does."""
        if len(rows) == 1:
            if not rows[0].own:
                return None
            del family.ids[rows[0].start :]
            return len(rows[0].ids)
        own = [row.own for row in rows]
        if min(own) < SETTLE_TOKENS:
            return None
        begin = min(row.start for row in rows)
        del family.ids[max(row.start for row in rows) :]  # cut off by all of them
        first = rows[0].ids[begin:]
        for row in rows[1:]:
            shared = common_length(first, row.ids[begin : begin + len(first)])
            if begin + shared < len(family.ids) + SETTLE_TOKENS:
                return None
            del first[shared:]
        return begin + len(first)

    def _have_capacity(self, positions: int) -> None:
        if positions > self.store.capacity:
            capacity = max(64, 2 * self.store.capacity, 1 << (positions - 1).bit_length())
            capacity = min(capacity, max(positions, self.max_positions or capacity))
            self.store.reserve(capacity=capacity, used=self._longest_trunk())

    def _longest_trunk(self) -> int:
        return max((len(f.ids) for f in (*self._families, *self._idle)), default=0)

    def find_room(self, rows: Sequence[Row], pieces: Sequence[Sequence[int]]) -> None:
        """A row that is alone, with nothing of its own, writes to its trunk; others get a slot where they have none."""
        depth = 0
        homeless = []
        for row, piece in zip(rows, pieces, strict=True):
            if not row.own and len(row.family.live) == 1:
                self._leave_slot(row)
                del row.family.ids[row.start :]
                self._have_capacity(len(row.ids) + len(piece))
                continue
            if row.slot is None:
                homeless.append(row)
            depth = max(depth, row.own + len(piece))
        missing = len(homeless) - len(self._free_slots) - sum(len(f.slots) for f in {row.family for row in homeless})
        if missing > 0:
            self._more_slots(max(missing, 8))
        for row in homeless:
            row.slot = self._free_slot(row.family)
        if depth > self.store.depth:
            used = max(row.own for row in self.live)
            self.store.reserve(depth=max(OWN_POSITIONS, 1 << (depth - 1).bit_length()), used=used)

    def have_read(self, rows: Sequence[Row], pieces: Sequence[Sequence[int]]) -> None:
        """These tokens' keys and values lie where :meth:`find_room` found room."""
        for row, piece in zip(rows, pieces, strict=True):
            row.ids.extend(piece)
            if row.slot is None:
                row.family.ids.extend(piece)
                row.start = len(row.ids)

    def release_memory(self) -> None:
        """Let the system have what no row holds; trunks that may serve a later prompt stay."""
        if self.device.type != "cpu":
            return
        own, trunk = [0] * self.store.slots, [0] * self.store.trunks
        for row in self.live:
            if row.slot is not None:
                own[row.slot] = row.own
        for source, count in self._copies.values():  # forks to be made, from slots that are free, maybe
            own[source] = max(own[source], count)
        for family in (*self._families, *self._idle):
            trunk[family.trunk] = len(family.ids)
        self.store.release_memory(own, trunk)

    @property
    def needed_bytes(self) -> int:
        """What all live rows hold together, each by itself."""
        return sum(len(row.ids) for row in self.live) * self.store.token_bytes

    @property
    def held_bytes(self) -> int:
        """What they hold with each trunk counted once."""
        return sum(len(f.ids) + sum(row.own for row in f.live) for f in self._families) * self.store.token_bytes
