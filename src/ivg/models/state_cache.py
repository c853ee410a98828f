"""Rows whose state is transformers' own cache object: for networks that keep more, or other things, than keys and values per token.

Recurrent and hybrid networks, chunked, indexed and compressed attention, ALiBi: whatever a network hands back as its cache is kept, and
given back with the next tokens. Rows of equal length that are read together are one object, a batch, as in ``generate``; without
padding, so that no row depends on others. While the rows of a batch are read together nothing is copied; rows that were forked, or that
others left, are copied into a new batch. A state cannot be cut: a row that is cut goes back to a snapshot, which is taken at its prompt's
end and where it was forked, or to the beginning. A prompt with pictures is read in one pass, alone, beside what its processor made.

Knows transformers' forward signature and nothing of what a cache holds but that the first axis of its tensors is the batch. Must not
know prompts, beams, tokenizers.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from ivg.models.cache import CacheRow, PassLimits, RowCache
from ivg.models.image_prompts import ImageInputs
from ivg.models.image_support import first_pass, position_offset
from ivg.models.placement import input_device
from ivg.models.support import body_of

STATE_NAMES = ("past_key_values", "cache_params", "state")
"""What networks call their cache, as argument and in their output."""
_OTHER_AXES = {"indexer_position_ids": 1}
"""Tensors whose first axis is not the batch, by the name of the attribute, and which axis is (Qwen4)."""
_PROMPTS = 16
"""Prompts whose state is kept for later ones, at most."""


@dataclass(eq=False, slots=True)
class Batch:
    """The state of several rows of the same number of tokens, in one of transformers' cache objects.

    Attributes:
        state: the cache object.
        size: rows in it.
        frozen: several rows or snapshots need it as it is.
        nbytes: of its tensors; None: not counted since the last pass.
    """

    state: Any
    size: int
    frozen: bool = False
    nbytes: int | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Snapshot:
    """A state to which rows, or a later prompt that begins alike, may return: that of ``ids``, at ``index`` of ``batch``."""

    ids: tuple[int, ...]
    rope_range: int
    batch: Batch
    index: int
    digest: str = ""
    offset: int = 0

    @property
    def key(self) -> tuple[int, tuple[int, ...], str]:
        """What tells it from others."""
        return self.rope_range, self.ids, self.digest


@dataclass(eq=False, slots=True)
class StateRow(CacheRow):
    """The state of ``ids`` lies at ``index`` of ``batch``; no batch: nothing was read.

    Attributes:
        mark: a snapshot is taken where the row has so many tokens.
        snapshots: states of its beginning, the shortest first: at the mark, and where it was forked.
        offset: what is added to the number of a token behind pictures to get its position (Qwen-VL).
    """

    batch: Batch | None = None
    index: int = 0
    mark: int = 0
    snapshots: tuple[Snapshot, ...] = ()
    offset: int = 0

    @property
    def digest(self) -> str:
        """Of the pictures; none: empty."""
        return "" if self.images is None else self.images.digest


class StateCache(RowCache):
    """All rows of one network, each with the state that transformers keeps for it.

    Args:
        network: the causal network, or a value model.
        limits: of one pass.
        one_by_one: the network takes one token at a time where it has a state (Mamba and its kin otherwise ignore that state).
        alone: every row has a pass of its own (RWKV mixes up rows that read one token).
    """

    rolls_back = False

    def __init__(self, network: nn.Module, limits: PassLimits, *, one_by_one: bool = False, alone: bool = False) -> None:
        self.network, self.limits, self.one_by_one, self.alone = network, limits, one_by_one, alone
        self.device = input_device(network)
        self._arguments = set(inspect.signature(body_of(network).forward).parameters)
        if body_of(network) is not network:
            self._arguments.add("logits_to_keep")
        self._state_name = next(name for name in STATE_NAMES if name in self._arguments)
        self.clear()

    @staticmethod
    def takes(network: nn.Module) -> bool:
        """Does ``network`` take and return a state?"""
        return not set(STATE_NAMES).isdisjoint(inspect.signature(body_of(network).forward).parameters)

    @override
    def clear(self) -> None:
        self.rows: dict[StateRow, None] = {}
        self.prompts: OrderedDict[tuple[int, tuple[int, ...], str], Snapshot] = OrderedDict()
        """Snapshots at marks, for later prompts. The one that has not been used for longest comes first."""

    # Rows

    @override
    def open(self, ids: Sequence[int], rope_range: int = 0, mark: int = 0, weights: str | None = None) -> StateRow:
        row = StateRow(object(), [], mark=mark)
        self.rows[row] = None
        self._begin(row, ids, rope_range)
        return row

    @override
    def open_with_images(self, ids: Sequence[int], rope_range: int, images: ImageInputs) -> StateRow:
        row = StateRow(object(), [], images=images, mark=images.length)
        self.rows[row] = None
        self._begin(row, ids, rope_range)
        return row

    @override
    def fork(self, row: CacheRow) -> StateRow:
        made = StateRow(row.group, [])
        self.rows[made] = None
        self._become_fork(made, cast("StateRow", row))
        return made

    @override
    def truncate(self, row: CacheRow, length: int) -> None:
        row = cast("StateRow", row)
        if length < len(row.ids):
            row.snapshots = tuple(s for s in row.snapshots if len(s.ids) <= length)
            self._go_to_last_snapshot(row)

    @override
    def reopen(self, row: CacheRow, ids: Sequence[int], rope_range: int) -> None:
        row = cast("StateRow", row)
        row.group, row.nonfinite = object(), False
        self._begin(row, ids, rope_range)

    @override
    def reopen_as_fork(self, row: CacheRow, other: CacheRow) -> None:
        row.group = other.group
        self._become_fork(cast("StateRow", row), cast("StateRow", other))

    @override
    def free(self, row: CacheRow) -> None:
        row = cast("StateRow", row)
        row.batch, row.snapshots = None, ()
        self.rows.pop(row, None)

    @override
    def release_memory(self) -> None:
        self.prompts.clear()

    def _begin(self, row: StateRow, ids: Sequence[int], rope_range: int) -> None:
        """Start ``row`` from the longest snapshot that ``ids`` begin with."""
        row.rope_range = rope_range
        fitting = [s for s in self.prompts.values() if (s.rope_range, s.digest) == (rope_range, row.digest) and len(s.ids) < len(ids)]
        found = max((s for s in fitting if tuple(ids[: len(s.ids)]) == s.ids), key=lambda s: len(s.ids), default=None)
        row.snapshots = ()
        if found is not None:
            self.prompts.move_to_end(found.key)
            row.snapshots = (found,)
        self._go_to_last_snapshot(row)

    @staticmethod
    def _go_to_last_snapshot(row: StateRow) -> None:
        """Go back to the longest snapshot, or to the beginning."""
        if not row.snapshots:
            row.ids, row.batch, row.offset = [], None, 0
            return
        last = row.snapshots[-1]
        row.ids, row.batch, row.index, row.offset = list(last.ids), last.batch, last.index, last.offset

    @staticmethod
    def _become_fork(row: StateRow, other: StateRow) -> None:
        if other.batch is not None:
            other.batch.frozen = True
            if not other.snapshots or len(other.snapshots[-1].ids) < len(other.ids):
                here = Snapshot(tuple(other.ids), other.rope_range, other.batch, other.index, other.digest, other.offset)
                other.snapshots = (*(s for s in other.snapshots if len(s.ids) <= other.mark), here)
        row.ids, row.batch, row.index = list(other.ids), other.batch, other.index
        row.rope_range, row.mark, row.snapshots = other.rope_range, other.mark, other.snapshots
        row.nonfinite, row.finite_length = other.nonfinite, other.finite_length
        row.images, row.offset = other.images, other.offset

    # The pass

    @override
    def prepare(self, rows: Sequence[CacheRow]) -> None:
        for row in rows:
            row.nonfinite = False

    @override
    def batches(self, rows: Sequence[CacheRow], counts: dict[int, int], outputs: dict[int, int], output_size: int) -> Iterator[list[int]]:
        """Rows that hold equally many tokens and read equally many share a pass; one whose pictures are read has its own."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i in counts:
            row = cast("StateRow", rows[i])
            alone = i + 1 if row.unread_images else 0
            key = (counts[i], row.rope_range, len(row.ids), max(0, row.mark - len(row.ids)), row.offset, alone)
            groups.setdefault(key, []).append(i)
        for (count, *_), some in groups.items():
            wanted = max(outputs.get(i, 1) for i in some)
            most = len(some) if wanted <= 1 else self.limits.outputs // (wanted * output_size)
            most = 1 if self.alone else max(1, min(most, self.limits.batch_tokens // count))
            for start in range(0, len(some), most):
                yield some[start : start + most]

    @override
    def forward(self, rows: Sequence[CacheRow], pieces: Sequence[Sequence[int]], keep: int) -> tuple[Tensor, list[int]]:
        states = cast("Sequence[StateRow]", rows)
        batch, order = self._join(states)
        tokens = torch.tensor([list(pieces[i]) for i in order], device=self.device)
        held, count, mark = len(rows[0].ids), tokens.shape[1], states[0].mark
        outputs: list[Tensor] = []
        try:
            for begin, end in self._steps(held, count, mark):
                outputs.append(self._call(batch, tokens[:, begin:end], held + begin, keep, states[0]))
                if held + end == mark:
                    for row, piece in zip(states, pieces, strict=True):
                        self._save(row, [*row.ids, *piece[:end]])
        except BaseException:  # the state may be half that of the new tokens
            for row in states:
                row.snapshots = ()
                self._go_to_last_snapshot(row)
            raise
        for row, piece in zip(states, pieces, strict=True):
            row.ids.extend(piece)
        return torch.cat(outputs, 1)[:, -keep:] if len(outputs) > 1 else outputs[0], order

    def _steps(self, held: int, count: int, mark: int) -> Iterator[tuple[int, int]]:
        """(begin, end) of the tokens that the network reads at once, of ``count`` behind ``held``."""
        begin = 0
        while begin < count:
            end = begin + 1 if self.one_by_one and held + begin else count
            if begin < mark - held < end:
                end = mark - held
            yield begin, end
            begin = end

    def _call(self, batch: Batch, tokens: Tensor, held: int, keep: int, row: StateRow) -> Tensor:
        """Outputs of the last ``keep`` tokens at most; the batch, one of whose rows is ``row``, then holds the tokens, too."""
        count = tokens.shape[1]
        positions = torch.arange(held, held + count, device=self.device)
        inputs = {
            "position_ids": (positions + row.offset).expand(len(tokens), -1),
            "cache_position": positions,
            "logits_to_keep": min(keep, count),
            self._state_name: batch.state,
        }
        if row.images is not None and not held:
            del inputs["position_ids"]  # the network makes those of pictures itself
            with first_pass(self.network):
                out = self._run(tokens, inputs, row.images.for_pass(count, self.device, cast("Any", self.network).dtype))
                row.offset = position_offset(self.network)
        else:
            out = self._run(tokens, inputs, {})
        batch.state, batch.nbytes = getattr(out, self._state_name), None
        return cast("Tensor", out.logits[:, -min(keep, count) :])

    def _run(self, tokens: Tensor, inputs: Mapping[str, Any], pictures: Mapping[str, Tensor]) -> Any:
        given = {name: value for name, value in inputs.items() if name in self._arguments}
        return self.network(input_ids=tokens, use_cache=True, **given, **pictures)

    def _join(self, rows: Sequence[StateRow]) -> tuple[Batch, list[int]]:
        """The rows as one batch that may be written over, and the order in which they lie there, as indices into ``rows``."""
        sources: dict[Batch | None, list[int]] = {}
        for i, row in enumerate(rows):
            sources.setdefault(row.batch, []).append(i)
        order = [i for some in sources.values() for i in some]
        (first, *others) = sources
        if first is not None and not others and not first.frozen and first.size == len(rows):
            return first, sorted(order, key=lambda i: rows[i].index)
        parts = [_select(batch, [rows[i].index for i in some], self.device) for batch, some in sources.items() if batch is not None]
        batch = Batch(_merge(parts, torch.cat) if parts else None, len(rows))
        for index, i in enumerate(order):
            rows[i].batch, rows[i].index = batch, index
        return batch, order

    def _save(self, row: StateRow, ids: Sequence[int]) -> None:
        """Take a snapshot of a row that holds ``ids``, for itself, its forks and later prompts."""
        key = (row.rope_range, tuple(ids), row.digest)
        if key not in self.prompts:
            assert row.batch is not None
            batch = Batch(_select(row.batch, [row.index], self.device), 1, frozen=True)
            self.prompts[key] = Snapshot(tuple(ids), row.rope_range, batch, 0, row.digest, row.offset)
            while len(self.prompts) > _PROMPTS:
                self.prompts.popitem(last=False)
        self.prompts.move_to_end(key)
        row.snapshots = (self.prompts[key],)

    # What it holds

    @property
    @override
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    @override
    def unshared_bytes(self) -> int:
        rows = Counter(row.batch for row in self.rows if row.batch is not None)
        return sum(count * _bytes(batch) // batch.size for batch, count in rows.items())

    @property
    @override
    def used_bytes(self) -> int:
        snapshots = {s.batch for row in self.rows for s in row.snapshots} | {s.batch for s in self.prompts.values()}
        return sum(_bytes(batch) for batch in {row.batch for row in self.rows if row.batch is not None} | snapshots)


def _select(batch: Batch, index: Sequence[int], device: torch.device) -> Any:
    """A copy of these rows of a batch."""
    where = torch.tensor(list(index), device=device)
    return _merge([batch.state], lambda found, axis: found[0].index_select(axis, where.to(found[0].device)))


def _merge(parts: Sequence[Any], join: Callable[[list[Tensor], int], Tensor], name: str = "") -> Any:
    """One structure of several of the same form; what is no tensor is that of the first.

    Args:
        parts: cache objects, or what lies in them.
        join: makes one tensor of several; is told the axis of the batch.
        name: of the attribute that holds them.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        counter = not first.dim() or (first.dim() == 1 and not first.is_floating_point())  # of the whole batch
        return first.clone() if counter else join(list(parts), _OTHER_AXES.get(name, 0))
    if isinstance(first, dict):
        made = copy.copy(first)
        made.update({key: _merge([part[key] for part in parts], join) for key in first})
        return made
    if isinstance(first, list | tuple):
        return type(first)(_merge(some, join) for some in zip(*parts, strict=True))
    if _holds_state(first):
        made = copy.copy(first)
        for attribute in vars(first):
            setattr(made, attribute, _merge([getattr(part, attribute) for part in parts], join, attribute))
        return made
    return first


def _holds_state(thing: Any) -> bool:
    """Is ``thing`` a cache, or a layer of one? Their classes are transformers' own, or lie beside the network that brings them."""
    names = [kind.__name__ for kind in type(thing).__mro__]
    return hasattr(thing, "__dict__") and not isinstance(thing, type) and any("Cache" in name or "Layer" in name for name in names)


def _bytes(batch: Batch) -> int:
    if batch.nbytes is None:
        sizes: list[int] = []
        _merge([batch.state], lambda found, axis: sizes.append(found[0].nbytes) or found[0])  # type: ignore[func-returns-value]
        batch.nbytes = sum(sizes)
    return batch.nbytes
