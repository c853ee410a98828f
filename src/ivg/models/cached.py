"""A network whose keys and values stay: prompts are read once, rows fork, freed slots are used again.

Keys and values lie in slots: per layer one tensor [slots, heads, capacity, head size]. A :class:`Row` is a slot and the
tokens stored there; every row has its own length, so requests of different lengths share a batch without padding the
cache. A slot keeps its content after it is freed: a later fork into it copies only the positions in which the two
differ, and mostly the rows of one request differ only in their last chunk (DESIGN, section 4).

Knows transformers' forward signature. Must not know prompts, beams, tokenizers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache

from ivg.errors import ModelError, PromptError

MERGE_PADDING = 48
"""Rows of different lengths share a forward pass if that pads fewer tokens than this: about what a pass costs by itself."""
BLOCK_TOKENS = 2048
"""A pass reads at most this many tokens of one row, and :data:`PASS_TOKENS` of all."""
PASS_TOKENS = 8192
PASS_OUTPUTS = 1 << 25
"""A pass puts out at most this many numbers (rows x positions x vocabulary): 128 MiB in float32."""


@dataclass(eq=False, slots=True)
class Row:
    """A slot in use: ``ids`` are the tokens whose keys and values it holds; ``family`` the row it was first forked from."""

    slot: int
    ids: list[int]
    family: int


@dataclass(slots=True)
class _Pass:
    """Where the keys and values of the current forward pass go."""

    slots: Tensor
    first: int | None  # rows lie side by side from this slot on: no gather is needed
    rows: Tensor  # [tokens] row, slot, column and position of every token that is no padding
    targets: Tensor
    columns: Tensor
    positions: Tensor
    length: int


class SlotCache(Cache):
    """Slots for every layer, allocated at the first pass, doubled in number or capacity when they run out."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.plan: _Pass | None = None
        self.slots = self.capacity = 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store [rows, heads, columns, size]; give back what the rows can see, [rows, heads, length, size]."""
        plan = self.plan
        assert plan is not None
        if layer_idx == len(self.keys):
            heads, size = key_states.shape[1], key_states.shape[3]
            self.keys.append(key_states.new_zeros(self.slots, heads, self.capacity, size))
            self.values.append(value_states.new_zeros(self.slots, value_states.shape[1], self.capacity, value_states.shape[3]))
        out = []
        for store, new in ((self.keys[layer_idx], key_states), (self.values[layer_idx], value_states)):
            store[plan.targets, :, plan.positions] = new[plan.rows, :, plan.columns].to(store.dtype)
            seen = store[:, :, : plan.length]
            count = len(plan.slots)
            out.append(seen.index_select(0, plan.slots) if plan.first is None else seen[plan.first : plan.first + count])
        return out[0], out[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Never used for positions: every pass gives its own."""
        return 0

    @torch.no_grad()
    def reserve(self, slots: int, capacity: int) -> None:
        """Have at least this many slots of at least this many positions; one layer at a time, so that memory peaks low."""
        if slots <= self.slots and capacity <= self.capacity:
            return
        slots, capacity = max(slots, self.slots), max(capacity, self.capacity)
        for store in (self.keys, self.values):
            for i, old in enumerate(store):
                store[i] = old.new_zeros(slots, old.shape[1], capacity, old.shape[3])
                store[i][: old.shape[0], :, : old.shape[2]] = old
        self.slots, self.capacity = slots, capacity

    @torch.no_grad()
    def copy(self, source: int, target: int, begin: int, end: int) -> None:
        """Positions [begin, end) of slot ``source`` to slot ``target``."""
        if begin < end:
            for store in (*self.keys, *self.values):
                store[target, :, begin:end] = store[source, :, begin:end]

    @property
    def nbytes(self) -> int:
        """Memory held by all slots."""
        return sum(t.nbytes for t in (*self.keys, *self.values))


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
    """A causal network (language model or :class:`~ivg.models.value_head.ValueModel`) with a slot cache.

    Args:
        network: takes ``input_ids, position_ids, attention_mask, past_key_values, use_cache, logits_to_keep``.
        name: how errors and usage call it.
    """

    network: nn.Module
    name: str
    cache: SlotCache = field(default_factory=SlotCache, repr=False)

    def __post_init__(self) -> None:
        self.network.eval()
        self.device = next(self.network.parameters()).device
        config = self.config = cast("Any", self.network).config.get_text_config()
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        self._eager = getattr(config, "_attn_implementation", "sdpa") == "eager"
        self._windows = _windows(config)
        self._free: dict[int, Row] = {}
        self._live: set[Row] = set()
        self._families: dict[int, dict[int, None]] = {}
        self._next_family = 0
        forward = inspect.signature((getattr(self.network, "backbone", None) or self.network).forward).parameters
        for needed in ("position_ids", "past_key_values"):
            if needed not in forward:
                raise ModelError(f"{self.name}: {type(self.network).__name__} takes no {needed}; ivg needs a decoder that does")

    # Rows

    @property
    def live_rows(self) -> int:
        """Rows in use."""
        return len(self._live)

    def open(self, ids: Sequence[int]) -> Row:
        """A row for ``ids``, holding already as many of them as some slot has (all but the last at most)."""
        best, shared = None, 0
        for row in (*self._free.values(), *self._live):
            n = common_length(row.ids, ids)
            if n > shared:
                best, shared = row, n
        shared = min(shared, len(ids) - 1)
        if best is not None and best.slot in self._free and shared:
            return self._take(best.slot, list(ids[:shared]), best.family)
        self._next_family += 1
        row = self._take(self._free_slot(None, ids), list(ids[:shared]), self._next_family)
        if best is not None and shared:
            self.cache.copy(best.slot, row.slot, 0, shared)
        return row

    def fork(self, row: Row) -> Row:
        """A second row with the same tokens; copies only what its slot does not hold already."""
        slot = self._free_slot(row.family, row.ids)
        left = self._free.get(slot)
        shared = common_length(left.ids, row.ids) if left is not None else 0
        self.cache.copy(row.slot, slot, shared, len(row.ids))
        return self._take(slot, list(row.ids), row.family)

    def free(self, row: Row) -> None:
        """Give the slot back; what it holds may serve a later row."""
        self._live.discard(row)
        self._free[row.slot] = row
        self._families.setdefault(row.family, {})[row.slot] = None

    def clear(self) -> None:
        """Forget all rows and give the memory back: what comes next is computed as by a fresh model, to the last bit."""
        self.cache = SlotCache()
        self._free, self._live, self._families, self._next_family = {}, set(), {}, 0

    def _take(self, slot: int, ids: list[int], family: int) -> Row:
        left = self._free.pop(slot, None)
        if left is not None:
            members = self._families[left.family]
            members.pop(slot, None)
            if not members:
                del self._families[left.family]
        row = Row(slot, ids, family)
        self._live.add(row)
        return row

    def _free_slot(self, family: int | None, ids: Sequence[int]) -> int:
        """The free slot whose content is nearest: of the same family, else the one freed longest ago, else a new one."""
        members = self._families.get(family) if family is not None else None
        if members:
            return max(members, key=lambda s: common_length(self._free[s].ids, ids))
        if not self._free:
            have = self.cache.slots
            self.cache.reserve(max(4, 2 * have), max(self.cache.capacity, 64))
            for slot in reversed(range(have, self.cache.slots)):
                self.free(Row(slot, [], 0))
        empty = self._families.get(0)
        return min(empty) if empty else next(iter(self._free))

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
        longest = max((len(r.ids) + len(n) for r, n in zip(rows, new, strict=True)), default=0)
        if self.max_positions is not None and longest > self.max_positions:
            raise PromptError(f"{self.name} reads at most {self.max_positions} tokens, got {longest}\n  shorten the prompt or the answer")
        if longest > self.cache.capacity:
            capacity = max(64, 2 * self.cache.capacity, 1 << (longest - 1).bit_length())
            self.cache.reserve(self.cache.slots, min(capacity, self.max_positions or capacity))
        while pending:
            sizes = {i: min(len(new[i]) - done[i], BLOCK_TOKENS) for i in pending}
            for group in _groups(pending, sizes):
                wanted = [max(0, min(sizes[i], done[i] + sizes[i] - (len(new[i]) - keep[i]))) for i in group]
                pieces = [list(new[i][done[i] : done[i] + sizes[i]]) for i in group]
                outputs = self._pass([rows[i] for i in group], pieces, max(1, *wanted))
                for i, count, output, piece in zip(group, wanted, outputs, pieces, strict=True):
                    rows[i].ids.extend(piece)
                    done[i] += len(piece)
                    if count:
                        yield i, output[-count:]
            pending = [i for i in pending if done[i] < len(new[i])]

    def last(self, rows: Sequence[Row], new: Sequence[Sequence[int]]) -> Tensor:
        """Read ``new`` and give the output behind each row's last token, float32 [rows, vocabulary or 1]."""
        out: list[Tensor] = [torch.empty(0)] * len(rows)
        for i, output in self.feed(rows, new, [1] * len(rows)):
            out[i] = output[-1]
        return torch.stack(out).float()

    @torch.no_grad()
    def _pass(self, rows: list[Row], pieces: list[list[int]], keep: int) -> list[Tensor]:
        """One forward pass over pieces that are aligned at their ends, so that "the last positions" are the same columns."""
        order = sorted(range(len(rows)), key=lambda i: rows[i].slot)
        width = max(map(len, pieces))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        positions = torch.zeros(len(rows), width, dtype=torch.long)
        for k, i in enumerate(order):
            n, start = len(pieces[i]), len(rows[i].ids)
            ids[k, width - n :] = torch.tensor(pieces[i])
            positions[k, width - n :] = torch.arange(start, start + n)
        counts = torch.tensor([len(pieces[i]) for i in order])
        real = torch.arange(width)[None] >= (width - counts)[:, None]
        ids, positions, real = ids.to(self.device), positions.to(self.device), real.to(self.device)
        slots = [rows[i].slot for i in order]
        length = max(len(rows[i].ids) + len(pieces[i]) for i in order)
        r, c = real.nonzero(as_tuple=True)
        first = slots[0] if slots[-1] - slots[0] == len(slots) - 1 else None
        where = torch.tensor(slots, device=self.device)
        self.cache.plan = _Pass(where, first, r, where[r], c, positions[r, c], length)
        logits = self.network(
            input_ids=ids,
            position_ids=positions,
            attention_mask=self._masks(positions, length),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits
        self.cache.plan = None
        out: list[Tensor] = [logits] * len(rows)
        for k, i in enumerate(order):
            out[i] = logits[k]
        return out

    def _masks(self, positions: Tensor, length: int) -> Any:
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
        return masks if len(masks) > 1 else next(iter(masks.values()))


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


def _groups(pending: list[int], sizes: dict[int, int]) -> Iterator[list[int]]:
    """Rows of like size together: no more than :data:`MERGE_PADDING` tokens of padding for a pass that is saved."""
    group: list[int] = []
    padding = 0
    for i in sorted(pending, key=lambda i: -sizes[i]):
        extra = sizes[group[0]] - sizes[i] if group else 0
        if group and (padding + extra > MERGE_PADDING or (len(group) + 1) * sizes[group[0]] > PASS_TOKENS):
            yield group
            group, padding, extra = [], 0, 0
        group.append(i)
        padding += extra
    if group:
        yield group
