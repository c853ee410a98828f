"""A network whose keys and values stay: prompts are read once, rows fork, what rows have in common lies in one place.

Both cost and memory of many beams are those of one answer and a little more, because they share trunks (``models.rows``) and
attention reads a trunk once for all of them (``models.attention``; DESIGN, section 4). Every row has its own length: requests
of different lengths share a batch without padding the cache.

Knows transformers' forward signature. Must not know prompts, beams, tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ivg.errors import ModelError, PromptError
from ivg.models.attention import UnsupportedAttentionError, by_families
from ivg.models.cache_manager import CacheManager, PrefixGroup, Row, common_length
from ivg.models.kv_cache import KVCache
from ivg.models.rotary import factors_beyond, rotary_modules
from ivg.models.row_layout import RowLayout, make_plan, positions_of
from ivg.models.support import body_of, reading_of

MERGE_PADDING = 48
"""Rows of different lengths share a forward pass if that pads fewer tokens than this: about what a pass costs by itself."""
BLOCK_TOKENS = 2048
"""A pass reads at most this many tokens of one row, and :data:`PASS_TOKENS` of all."""
PASS_TOKENS = 8192
PASS_OUTPUTS = 1 << 25
"""A pass that puts out several positions of a row gives at most this many numbers (rows x positions x vocabulary): 128 MiB in float32."""
FAMILY_COLUMNS = 64
"""Attention goes by families (``models.attention``) where every row reads at most this many tokens."""
FAMILY_SCORES = 1 << 24
"""… and then has at most this many scores (rows x heads x tokens x positions) at a time."""


@dataclass(eq=False)
class ModelRunner:
    """A causal network (language model or :class:`~ivg.models.value_head.ValueModel`) that remembers what it has read.

    Args:
        network: takes ``input_ids, position_ids, attention_mask, past_key_values, use_cache, logits_to_keep``.
        name: how errors and usage call it.

    ``needed_peak``: bytes of keys and values of all live rows together, each by itself, at the busiest moment since
    :meth:`clear`. ``held_peak``: the same with what rows share counted once.
    """

    network: nn.Module
    name: str

    def __post_init__(self) -> None:
        self.network.eval()
        self.device = next(self.network.parameters()).device
        config = self.config = cast("Any", self.network).config.get_text_config()
        self.reading = reading_of(self.network, self.name)
        self.max_positions, self._windows, self._borders = self.reading.max_positions, self.reading.windows, self.reading.borders
        self._rotary = rotary_modules(self.network) if self._borders else []
        self._eager = getattr(config, "_attn_implementation", "sdpa") == "eager"
        self._markers = {kind: torch.zeros(1, 1, 1, 1, device=self.device) for kind in self._windows}
        self._by_families = _attends_by_interface(self.network)
        self._heads = int(getattr(config, "num_attention_heads", 1) or 1)
        self._outputs = 1 if getattr(self.network, "kind", None) == "scalar" else int(config.vocab_size)
        self.clear()

    # Rows

    def clear(self) -> None:
        """Forget all rows and give the memory back: what comes next is computed as by a fresh model, to the last bit."""
        self.rows = CacheManager(self.device, self.max_positions)
        self.needed_peak = self.held_peak = 0

    @property
    def cache(self) -> KVCache:
        """The keys and values."""
        return self.rows.store

    @property
    def live_rows(self) -> int:
        """Rows in use."""
        return len(self.rows.live)

    def open(self, ids: Sequence[int]) -> Row:
        """A row for ``ids``, holding already as many of them as some trunk has (all but the last at most)."""
        return self.rows.open(ids, self._factors(len(ids)))

    def fork(self, row: Row) -> Row:
        """A second row with the same tokens; copies only what is not in the trunk, and that not before the next pass."""
        return self.rows.fork(row)

    def free(self, row: Row) -> None:
        """Give its memory back; a trunk without rows stays until its place is needed, and may serve a later prompt."""
        self.rows.free(row)

    def release_memory(self) -> None:
        """Let the system have the memory that no row holds: else a process keeps every page that any row ever touched.

        No output changes. CPUs only.
        """
        self.rows.release_memory()

    # Passes

    def feed(self, rows: Sequence[Row], new: Sequence[Sequence[int]], keep: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Read ``new[i]`` (at least one token) behind what ``rows[i]`` holds.

        Yields (i, outputs [positions, vocabulary or 1]): together those of the last ``keep[i]`` tokens, in order, in
        one or more pieces; where several positions of a row are wanted, never more than :data:`PASS_OUTPUTS` numbers at a time.

        Raises:
            PromptError: a row would outgrow the model's positions.
        """
        left, wanted = {i: list(tokens) for i, tokens in enumerate(new)}, list(keep)
        while left:
            index, pieces, counts = list(left), [], []
            for i in index:
                held, total = len(rows[i].ids), len(rows[i].ids) + len(left[i])
                end = self._end(total - max(0, wanted[i] - 1), total)
                pieces.append(left[i][: end - held])
                counts.append(max(0, wanted[i] - (total - end)))
                left[i], wanted[i] = left[i][end - held :], wanted[i] - counts[-1]
            some = [rows[i] for i in index]
            for k, output in self._feed(some, self._turned(some, pieces), counts):
                yield index[k], output
            left = {i: tokens for i, tokens in left.items() if tokens}

    def _feed(self, rows: Sequence[Row], new: Sequence[Sequence[int]], keep: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """As :meth:`feed`, each row under the factors that it has."""
        done = [0] * len(rows)
        pending = list(range(len(rows)))
        self._prepare(rows, new)
        while pending:
            sizes = {i: self._block(len(new[i]) - done[i], keep[i]) for i in pending}
            wants = {i: max(0, min(sizes[i], done[i] + sizes[i] - (len(new[i]) - keep[i]))) for i in pending}
            for group in self._groups(pending, sizes, rows, wants):
                wanted = [wants[i] for i in group]
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
        new = self._turned(rows, new)
        longest, shortest = max(map(len, new)), min(map(len, new))
        if longest == shortest <= FAMILY_COLUMNS:
            self._prepare(rows, new)
            groups = list(self._groups(list(range(len(rows))), dict.fromkeys(range(len(rows)), longest), rows, {}))
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

    def _factors(self, length: int) -> int:
        """Which rotary factors a text of this length has: how many borders it is beyond."""
        return sum(length > border for border in self._borders)

    def _end(self, first: int, total: int) -> int:
        """The longest text of at most ``total`` tokens that has the factors of one of ``first``."""
        return min([total, *(border for border in self._borders if border >= first)])

    def _turned(self, rows: Sequence[Row], new: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """What is to be read if rows that would outgrow their rotary factors, or were cut below them, begin anew.

        Rows of one family stay one: what they have in common is read once.
        """
        families: dict[tuple[PrefixGroup, int], list[int]] = {}
        if not self._borders:
            return new
        for i, row in enumerate(rows):
            if row.family.factors != (factors := self._factors(len(row.ids) + len(new[i]))):
                families.setdefault((row.family, factors), []).append(i)
        if not families:
            return new
        texts = {i: [*rows[i].ids, *new[i]] for some in families.values() for i in some}
        for (_, factors), some in families.items():
            first, shared = rows[some[0]], min(common_length(texts[some[0]], texts[i][:-1]) for i in some)
            self.rows.renew(first, texts[some[0]] if len(some) == 1 else texts[some[0]][: shared + 1], factors)
            if len(some) > 1 and len(first.ids) < shared:
                list(self._feed([first], [texts[some[0]][len(first.ids) : shared]], [0]))
            for i in some[1:]:
                self.rows.renew_as(rows[i], first)
        return [texts[i][len(row.ids) :] if i in texts else new[i] for i, row in enumerate(rows)]

    def _prepare(self, rows: Sequence[Row], new: Sequence[Sequence[int]]) -> None:
        """See that there is room, and that rows are where they belong."""
        longest = max((len(r.ids) + len(n) for r, n in zip(rows, new, strict=True)), default=0)
        if self.max_positions is not None and longest > self.max_positions:
            why = f" ({self.reading.limit_reason})" if self.reading.limit_reason else ""
            raise PromptError(
                f"{self.name} reads at most {self.max_positions} tokens{why}, got {longest}\n  shorten the prompt or the answer"
            )
        if self.cache.failed:
            raise ModelError(
                f"{self.name}: memory ran out while its cache grew\n  call reset_caches(), then ask for fewer beams or shorter texts"
            )
        self.rows.prepare(rows)

    def _block(self, left: int, keep: int) -> int:
        """Tokens of a row for one pass, of ``left`` that are to be read and the last ``keep`` whose outputs are wanted."""
        most = max(1, PASS_OUTPUTS // self._outputs)
        before = max(0, left - keep)
        return min(left, BLOCK_TOKENS, before + most if before < BLOCK_TOKENS else BLOCK_TOKENS)

    def _groups(self, pending: list[int], sizes: dict[int, int], rows: Sequence[Row], wants: dict[int, int]) -> Iterator[list[int]]:
        """Rows with the same factors and of like size together: at most :data:`MERGE_PADDING` tokens of padding for a pass saved."""
        group: list[int] = []
        padding = longest = most = 0
        for i in sorted(pending, key=lambda i: (rows[i].family.factors, -sizes[i])):
            extra = sizes[group[0]] - sizes[i] if group else 0
            widest = sizes[group[0]] if group else sizes[i]
            length = max(longest, len(rows[i].ids) + sizes[i])
            tokens = (len(group) + 1) * widest
            scores = tokens * self._heads * length if widest <= FAMILY_COLUMNS else 0
            wanted = max(most, wants.get(i, 1))
            many = wanted > 1 and (len(group) + 1) * wanted * self._outputs > PASS_OUTPUTS
            other = bool(group) and rows[group[0]].family.factors != rows[i].family.factors
            if group and (other or padding + extra > MERGE_PADDING or tokens > PASS_TOKENS or scores > FAMILY_SCORES or many):
                yield group
                group, padding, extra, length, wanted = [], 0, 0, len(rows[i].ids) + sizes[i], wants.get(i, 1)
            group.append(i)
            padding, longest, most = padding + extra, length, wanted
        if group:
            yield group

    @torch.no_grad()
    def _pass(self, rows: Sequence[Row], pieces: Sequence[Sequence[int]], keep: int) -> tuple[Tensor, list[int]]:
        """One forward pass: outputs of the last ``keep`` columns [rows, keep, vocabulary or 1], and whose each row is."""
        self.rows.find_room(rows, pieces)
        order = sorted(range(len(rows)), key=lambda i: (rows[i].slot is None, rows[i].slot or 0, rows[i].family.trunk))
        places = [RowLayout(len(r.ids), len(pieces[i]), r.start, r.family.trunk, r.slot) for i in order for r in (rows[i],)]
        positions, real = positions_of(places)
        width = positions.shape[1]
        ids = torch.tensor([[0] * (width - len(pieces[i])) + list(pieces[i]) for i in order])
        numbers = positions if self.reading.pad is None else _without_padding(ids, real, [rows[i].ids for i in order], self.reading.pad)
        there = ids.to(self.device), numbers.to(self.device)
        by = self._by_families and width <= FAMILY_COLUMNS
        factors = rows[0].family.factors
        with factors_beyond(self._borders[factors - 1] if factors else None, self._rotary):
            try:
                logits = self._forward(*there, places, positions, real, keep, by=by)
            except UnsupportedAttentionError:
                self._by_families = False
                logits = self._forward(*there, places, positions, real, keep, by=False)
        self.rows.have_read(rows, pieces)
        finite = logits[:, -1].amax(-1) < torch.inf  # NaN wins every comparison
        if not bool(finite.all()):
            for k in (~finite).nonzero()[:, 0].tolist():
                row = rows[order[k]]
                row.broken, row.sound = True, len(row.ids) - len(pieces[order[k]])
        self.needed_peak = max(self.needed_peak, self.rows.needed_bytes)
        self.held_peak = max(self.held_peak, self.rows.held_bytes)
        return logits, order

    def _forward(
        self, ids: Tensor, numbers: Tensor, places: Sequence[RowLayout], positions: Tensor, real: Tensor, keep: int, *, by: bool
    ) -> Tensor:
        """Outputs [rows, keep, vocabulary or 1]; ``numbers`` are the tokens' positions as the network counts them."""
        self.cache.plan = make_plan(places, positions, real, self.cache.depth, self._markers, self._windows, self.device, by_families=by)
        masks: dict[str, Tensor] = self._markers if by else self._masks(positions.to(self.device), int(positions.max()) + 1)
        try:
            with by_families(self.config, self.cache) if by else nullcontext():
                logits: Tensor = self.network(
                    input_ids=ids,
                    position_ids=numbers,
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
    return bool(getattr(body_of(network), "_supports_attention_backend", False))


def _without_padding(ids: Tensor, real: Tensor, held: Sequence[Sequence[int]], pad: int) -> Tensor:
    """Positions [R, C] as RoBERTa counts them: from ``pad`` + 1 on, tokens ``pad`` left out; those are at ``pad`` itself."""
    before = torch.tensor([len(tokens) - tokens.count(pad) for tokens in held])
    counted = real & (ids != pad)
    return (counted.cumsum(1) + before[:, None]) * counted + pad
