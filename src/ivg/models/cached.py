"""A network whose keys and values stay: prompts are read once, rows fork, what rows have in common lies in one place.

The rows that descend from one prompt are a family. What all live rows of a family begin with lies in the family's *trunk*;
each row holds its *own* part behind that. A fork copies the own part alone, and the trunk grows after every selection, so
both cost and memory of many beams are those of one answer and a little more (DESIGN, section 4). Every row has its own length:
requests of different lengths share a batch without padding the cache. A row that is alone writes to its trunk directly.

Knows transformers' forward signature. Must not know prompts, beams, tokenizers.
"""

from __future__ import annotations

import heapq
import inspect
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ivg.errors import ModelError, PromptError
from ivg.models.attention import UnsupportedAttentionError, by_families
from ivg.models.plan import Place, make_plan, positions_of
from ivg.models.store import KVStore

MERGE_PADDING = 48
"""Rows of different lengths share a forward pass if that pads fewer tokens than this: about what a pass costs by itself."""
BLOCK_TOKENS = 2048
"""A pass reads at most this many tokens of one row, and :data:`PASS_TOKENS` of all."""
PASS_TOKENS = 8192
PASS_OUTPUTS = 1 << 25
"""A pass puts out at most this many numbers (rows x positions x vocabulary): 128 MiB in float32."""
FAMILY_COLUMNS = 64
"""Attention goes by families (``models.attention``) where every row reads at most this many tokens."""
FAMILY_SCORES = 1 << 24
"""… and then has at most this many scores (rows x heads x tokens x positions) at a time."""
OWN_POSITIONS = 64
"""Positions of a slot at first."""
SETTLE_TOKENS = 4
"""A trunk grows when at least this many more tokens are common to its rows."""


@dataclass(eq=False, slots=True)
class Family:
    """Rows that descend from one :meth:`CachedModel.open`.

    Attributes:
        trunk: number of the trunk.
        ids: tokens that lie there.
        live: rows in use.
        slots: own slots that its freed rows left, kept at hand so that a family's slots stay side by side.
        stale: rows were freed since it was last seen how much the others share.
    """

    trunk: int
    ids: list[int]
    live: dict[Row, None] = field(default_factory=dict)
    slots: list[int] = field(default_factory=list)
    stale: bool = False


@dataclass(eq=False, slots=True)
class Row:
    """``ids`` are the tokens whose keys and values it holds: the first ``start`` in its family's trunk, the others in ``slot``."""

    family: Family
    ids: list[int]
    start: int
    slot: int | None = None

    @property
    def own(self) -> int:
        """Tokens behind the trunk; the owner of ``ids`` may have cut them short."""
        self.start = min(self.start, len(self.ids))
        return len(self.ids) - self.start


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two lists begin with in common; compares slices, which is fast."""
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


@dataclass(eq=False)
class CachedModel:
    """A causal network (language model or :class:`~ivg.models.value_head.ValueModel`) that remembers what it has read.

    Args:
        network: takes ``input_ids, position_ids, attention_mask, past_key_values, use_cache, logits_to_keep``.
        name: how errors and usage call it.

    ``needed_peak``: bytes of keys and values of all live rows together, each by itself, at the busiest moment since
    :meth:`clear`; what is really held is less, because rows share trunks.
    """

    network: nn.Module
    name: str
    cache: KVStore = field(default_factory=KVStore, repr=False)

    def __post_init__(self) -> None:
        self.network.eval()
        self.device = next(self.network.parameters()).device
        config = self.config = cast("Any", self.network).config.get_text_config()
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        self._eager = getattr(config, "_attn_implementation", "sdpa") == "eager"
        self._windows = _windows(config)
        self._markers = {kind: torch.zeros(1, 1, 1, 1, device=self.device) for kind in self._windows}
        self._by_families = not self._eager and _attends_by_interface(self.network)
        self._heads = int(getattr(config, "num_attention_heads", 1) or 1)
        self._reset()
        forward = inspect.signature((getattr(self.network, "backbone", None) or self.network).forward).parameters
        for needed in ("position_ids", "past_key_values"):
            if needed not in forward:
                raise ModelError(f"{self.name}: {type(self.network).__name__} takes no {needed}; ivg needs a decoder that does")

    def _reset(self) -> None:
        self._live: dict[Row, None] = {}
        self._families: dict[Family, None] = {}
        self._idle: dict[Family, None] = {}
        self._free_trunks: list[int] = []
        self._free_slots: list[int] = []
        self._copies: dict[int, tuple[int, int]] = {}  # forks to be made: target slot -> source slot, count
        self.needed_peak = 0

    # Rows

    @property
    def live_rows(self) -> int:
        """Rows in use."""
        return len(self._live)

    def open(self, ids: Sequence[int]) -> Row:
        """A row for ``ids``, holding already as many of them as some trunk has (all but the last at most)."""
        best, shared = None, 0
        for family in (*self._idle, *self._families):
            n = common_length(family.ids, ids)
            if n > shared:
                best, shared = family, n
        shared = min(shared, len(ids) - 1)
        if best is not None and shared and best in self._idle:
            del self._idle[best]
            family = best
            del family.ids[shared:]
        else:
            family = Family(self._free_trunk(best), list(ids[:shared]))
            if best is not None and shared:
                self.cache.copy_trunk(best.trunk, family.trunk, shared)
        self._families[family] = None
        return self._enter(Row(family, list(ids[:shared]), shared))

    def fork(self, row: Row) -> Row:
        """A second row with the same tokens; copies only what is not in the trunk, and that not before the next pass."""
        own = row.own
        new = Row(row.family, list(row.ids), row.start)
        if own:
            if row.slot in self._copies:
                self._make_copies()
            new.slot = self._free_slot(row.family)
            assert row.slot is not None
            self._copies[new.slot] = (row.slot, own)
        return self._enter(new)

    def free(self, row: Row) -> None:
        """Give its memory back; a trunk without rows stays until its place is needed, and may serve a later prompt."""
        family = row.family
        self._live.pop(row, None)
        family.live.pop(row, None)
        family.stale = True
        self._leave_slot(row)
        if not family.live:
            for slot in family.slots:
                heapq.heappush(self._free_slots, slot)
            family.slots = []
            self._families.pop(family, None)
            self._idle[family] = None

    def clear(self) -> None:
        """Forget all rows and give the memory back: what comes next is computed as by a fresh model, to the last bit."""
        self.cache = KVStore()
        self._reset()

    def _enter(self, row: Row) -> Row:
        self._live[row] = None
        row.family.live[row] = None
        return row

    def _leave_slot(self, row: Row) -> None:
        if row.slot is not None:
            self._copies.pop(row.slot, None)
            row.family.slots.append(row.slot)
            row.slot = None

    def _free_slot(self, family: Family) -> int:
        """One that the family had before, else the lowest."""
        if family.slots:
            return family.slots.pop()
        if not self._free_slots:
            self._more_slots(max(8, self.cache.slots))
        return heapq.heappop(self._free_slots)

    def _more_slots(self, count: int) -> None:
        have = self.cache.slots
        self.cache.reserve(slots=have + count, depth=OWN_POSITIONS, used=max((row.own for row in self._live), default=0))
        for slot in range(have, self.cache.slots):
            heapq.heappush(self._free_slots, slot)

    def _free_trunk(self, but: Family | None) -> int:
        """An unused trunk, else that of the prompt that nobody has asked for longest, else a new one."""
        if self._free_trunks:
            return self._free_trunks.pop()
        oldest = next((f for f in self._idle if f is not but), None)
        if oldest is not None:
            del self._idle[oldest]
            return oldest.trunk
        have = self.cache.trunks
        self.cache.reserve(trunks=max(4, 2 * have), capacity=64, used=self._longest_trunk())
        self._free_trunks = list(reversed(range(have, self.cache.trunks)))
        return self._free_trunks.pop()

    # What rows share

    def _make_copies(self) -> None:
        self.cache.copy_own([(source, 0, target, n) for target, (source, n) in self._copies.items()], self.device)
        self._copies.clear()

    def _settle(self, families: Sequence[Family]) -> None:
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
            self.cache.to_trunks(to_trunk, self.device)
        self.cache.copy_own(shifts, self.device)

    @staticmethod
    def _common(family: Family, rows: Sequence[Row]) -> int | None:
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
        first = rows[0].ids[begin:]
        for row in rows[1:]:
            shared = common_length(first, row.ids[begin : begin + len(first)])
            if begin + shared < len(family.ids) + SETTLE_TOKENS:
                return None
            del first[shared:]
        return begin + len(first)

    def _have_capacity(self, positions: int) -> None:
        if positions > self.cache.capacity:
            capacity = max(64, 2 * self.cache.capacity, 1 << (positions - 1).bit_length())
            capacity = min(capacity, max(positions, self.max_positions or capacity))
            self.cache.reserve(capacity=capacity, used=self._longest_trunk())

    def _longest_trunk(self) -> int:
        return max((len(f.ids) for f in (*self._families, *self._idle)), default=0)

    # Passes

    def feed(self, rows: Sequence[Row], new: Sequence[Sequence[int]], keep: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Read ``new[i]`` (at least one token) behind what ``rows[i]`` holds.

        Yields (i, outputs [positions, vocabulary or 1]): together those of the last ``keep[i]`` tokens, in order, in
        one or more pieces. Nothing larger than :data:`PASS_OUTPUTS` exists at any time.

        Raises:
            PromptError: a row would outgrow the model's positions.
        """
        done = [0] * len(rows)
        pending = list(range(len(rows)))
        self._prepare(rows, new)
        while pending:
            sizes = {i: min(len(new[i]) - done[i], BLOCK_TOKENS) for i in pending}
            for group in self._groups(pending, sizes, rows):
                wanted = [max(0, min(sizes[i], done[i] + sizes[i] - (len(new[i]) - keep[i]))) for i in group]
                pieces = [list(new[i][done[i] : done[i] + sizes[i]]) for i in group]
                outputs, order = self._pass([rows[i] for i in group], pieces, max(1, *wanted))
                for k, place in enumerate(order):
                    i, count = group[place], wanted[place]
                    done[i] += len(pieces[place])
                    if count:
                        yield i, outputs[k, -count:]
            pending = [i for i in pending if done[i] < len(new[i])]

    def last(self, rows: Sequence[Row], new: Sequence[Sequence[int]]) -> Tensor:
        """Read ``new`` and give the output behind each row's last token, [rows, vocabulary or 1], in the network's type."""
        longest, shortest = max(map(len, new)), min(map(len, new))
        if longest == shortest <= FAMILY_COLUMNS:
            self._prepare(rows, new)
            groups = list(self._groups(list(range(len(rows))), dict.fromkeys(range(len(rows)), longest), rows))
            if len(groups) == 1:
                outputs, order = self._pass(rows, new, 1)
                if order == list(range(len(rows))):
                    return outputs[:, -1]
                back = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=outputs.device)
                return outputs[:, -1].index_select(0, back)
        out: list[Tensor] = [torch.empty(0)] * len(rows)
        for i, output in self.feed(rows, new, [1] * len(rows)):
            out[i] = output[-1]
        return torch.stack(out)

    def _prepare(self, rows: Sequence[Row], new: Sequence[Sequence[int]]) -> None:
        """Make the forks that are asked for, let trunks grow, see that there is room."""
        longest = max((len(r.ids) + len(n) for r, n in zip(rows, new, strict=True)), default=0)
        if self.max_positions is not None and longest > self.max_positions:
            raise PromptError(f"{self.name} reads at most {self.max_positions} tokens, got {longest}\n  shorten the prompt or the answer")
        self._make_copies()
        self._settle([f for f in dict.fromkeys(row.family for row in rows) if f.stale])

    def _groups(self, pending: list[int], sizes: dict[int, int], rows: Sequence[Row]) -> Iterator[list[int]]:
        """Rows of like size together: no more than :data:`MERGE_PADDING` tokens of padding for a pass that is saved."""
        group: list[int] = []
        padding = longest = 0
        for i in sorted(pending, key=lambda i: -sizes[i]):
            extra = sizes[group[0]] - sizes[i] if group else 0
            widest = sizes[group[0]] if group else sizes[i]
            length = max(longest, len(rows[i].ids) + sizes[i])
            tokens = (len(group) + 1) * widest
            scores = tokens * self._heads * length if widest <= FAMILY_COLUMNS else 0
            if group and (padding + extra > MERGE_PADDING or tokens > PASS_TOKENS or scores > FAMILY_SCORES):
                yield group
                group, padding, extra, length = [], 0, 0, len(rows[i].ids) + sizes[i]
            group.append(i)
            padding, longest = padding + extra, length
        if group:
            yield group

    @torch.no_grad()
    def _pass(self, rows: Sequence[Row], pieces: Sequence[Sequence[int]], keep: int) -> tuple[Tensor, list[int]]:
        """One forward pass: outputs of the last ``keep`` columns [rows, keep, vocabulary or 1], and whose each row is."""
        self._find_room(rows, pieces)
        order = sorted(range(len(rows)), key=lambda i: (rows[i].slot is None, rows[i].slot or 0, rows[i].family.trunk))
        places = [Place(len(r.ids), len(pieces[i]), r.start, r.family.trunk, r.slot) for i in order for r in (rows[i],)]
        positions, real = positions_of(places)
        width = positions.shape[1]
        ids = torch.tensor([[0] * (width - len(pieces[i])) + list(pieces[i]) for i in order]).to(self.device)
        by = self._by_families and width <= FAMILY_COLUMNS
        try:
            logits = self._forward(ids, places, positions, real, keep, by=by)
        except UnsupportedAttentionError:
            self._by_families = False
            logits = self._forward(ids, places, positions, real, keep, by=False)
        for row, piece in zip(rows, pieces, strict=True):
            row.ids.extend(piece)
            if row.slot is None:
                row.family.ids.extend(piece)
                row.start = len(row.ids)
        self.needed_peak = max(self.needed_peak, sum(len(r.ids) for r in self._live) * self.cache.token_bytes)
        return logits, order

    def _forward(self, ids: Tensor, places: Sequence[Place], positions: Tensor, real: Tensor, keep: int, *, by: bool) -> Tensor:
        self.cache.plan = make_plan(places, positions, real, self.cache.depth, self._markers, self._windows, self.device, by_families=by)
        there = positions.to(self.device)
        masks: dict[str, Tensor] = self._markers if by else self._masks(there, int(positions.max()) + 1)
        try:
            with by_families(self.config, self.cache) if by else nullcontext():
                logits: Tensor = self.network(
                    input_ids=ids,
                    position_ids=there,
                    attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
                    past_key_values=self.cache,
                    use_cache=True,
                    logits_to_keep=keep,
                ).logits
            if by and self.cache.plan.touched is not None:
                raise UnsupportedAttentionError  # it never asked
        finally:
            self.cache.plan = None
        return logits

    def _find_room(self, rows: Sequence[Row], pieces: Sequence[Sequence[int]]) -> None:
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
        if depth > self.cache.depth:
            used = max(row.own for row in self._live)
            self.cache.reserve(depth=max(OWN_POSITIONS, 1 << (depth - 1).bit_length()), used=used)

    def _masks(self, positions: Tensor, length: int) -> dict[str, Tensor]:
        """What every token may see [rows, 1, columns, length]; per kind of layer where the model has several.

        Padding is given position 0 and sees the row's first token: nothing of it is stored, and it stays finite.
        """
        keys = torch.arange(length, device=self.device)
        causal = keys <= positions[:, None, :, None]
        masks = {}
        for kind, window in self._windows.items():
            seen = causal if window is None else causal & (keys > positions[:, None, :, None] - window)
            if self._eager:
                dtype = next(self.network.parameters()).dtype
                seen = torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill(~seen, torch.finfo(dtype).min)
            masks[kind] = seen
        return masks


def _attends_by_interface(network: nn.Module) -> bool:
    """Does the network look its attention up by name, so that it can be given another?"""
    body = getattr(network, "backbone", None) or network
    return bool(getattr(body, "_supports_attention_backend", False))


def _windows(config: Any) -> dict[str, int | None]:
    """Kinds of attention layers and their windows, as transformers names them."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) is not False else None
    kinds = dict.fromkeys(getattr(config, "layer_types", None) or ())
    if not kinds:
        return {"all": window}
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ModelError(f"layers of kind {', '.join(sorted(unknown))} keep no keys and values per token; ivg cannot fork them")
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}
