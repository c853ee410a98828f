"""From rows and the tokens that they are to read to the plan of one forward pass (``models.store.ForwardMetadata``).

Knows: where trunks and own parts lie, windows. Must not know families' bookkeeping, nor the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ivg.models.kv_cache import AttentionMasks, Branch, ForwardMetadata

OWN_ROWS = 32
"""Rows whose own parts are read together: what is made of them stays in a core's cache."""
_BLOCKED = float("-inf")


@dataclass(frozen=True, slots=True)
class RowLayout:
    """A row for one pass.

    Attributes:
        length: tokens that it holds before the pass.
        new: tokens that it reads.
        start: so many of them lie in the trunk.
        trunk: which trunk.
        slot: own slot; None: the row writes to its trunk.
    """

    length: int
    new: int
    start: int
    trunk: int
    slot: int | None


@dataclass(slots=True)
class _Numbers:
    """The rows' numbers as tensors [R] on the CPU."""

    lengths: Tensor
    counts: Tensor
    starts: Tensor
    trunks: Tensor
    slots: Tensor
    on_trunk: Tensor


def positions_of(places: Sequence[RowLayout]) -> tuple[Tensor, Tensor]:
    """(positions, is it a token) [R, C]; pieces are aligned at their ends; padding has position 0."""
    counts = torch.tensor([p.new for p in places])
    width = int(counts.max())
    column = torch.arange(width)[None] - (width - counts)[:, None]
    real = column >= 0
    return (torch.tensor([p.length for p in places])[:, None] + column) * real, real


def make_plan(
    places: Sequence[RowLayout],
    positions: Tensor,
    real: Tensor,
    depth: int,
    markers: Mapping[str, Tensor],
    windows: Mapping[str, int | None],
    device: torch.device,
    *,
    by_families: bool,
) -> ForwardMetadata:
    """The plan of one pass.

    Args:
        places: the rows.
        positions: as :func:`positions_of` gives them.
        real: the same.
        depth: positions of one own slot.
        markers: for each kind of layer the tensor that stands for its mask.
        windows: for each kind of layer how far it sees; None: everything.
        device: of the store.
        by_families: attention goes by families; otherwise keys and values are put together for each row.
    """
    numbers = _Numbers(
        torch.tensor([p.length for p in places]),
        torch.tensor([p.new for p in places]),
        torch.tensor([p.start for p in places]),
        torch.tensor([p.trunk for p in places]),
        torch.tensor([-1 if p.slot is None else p.slot for p in places]),
        torch.tensor([p.slot is None for p in places]),
    )
    after = numbers.lengths + numbers.counts
    limits = torch.where(numbers.on_trunk, after, numbers.starts)
    own = torch.where(numbers.on_trunk, torch.zeros_like(after), after - numbers.starts)
    plan = ForwardMetadata(
        rows=len(places),
        trunk_length=max(1, int(limits.max())),
        own_length=int(own.max()),
        to_trunk=None,
        to_own=None,
        slots=None if bool(numbers.on_trunk.all()) else _run(numbers.slots.clamp(min=0), device),
    )
    _writes(plan, numbers, positions, real, depth, device)
    if by_families:
        plan.branches = _branches([p.trunk for p in places], limits.tolist(), device)
        for kind, marker in markers.items():
            plan.sights[marker.data_ptr()] = _sight(plan, numbers, limits, positions, windows[kind], device)
        plan.blocks = _blocks(own.tolist())
    else:
        plan.gather = _gather(numbers, own, depth, device)
    return plan


def _run(indices: Tensor, device: torch.device) -> slice | Tensor:
    """Consecutive indices as a slice: no gather is needed."""
    first, count = int(indices[0]), len(indices)
    return slice(first, first + count) if bool((indices == torch.arange(first, first + count)).all()) else indices.to(device)


def _writes(plan: ForwardMetadata, n: _Numbers, positions: Tensor, real: Tensor, depth: int, device: torch.device) -> None:
    own, trunk = real & ~n.on_trunk[:, None], real & n.on_trunk[:, None]
    if bool(own.any()):
        place = n.slots[:, None] * depth + positions - n.starts[:, None]
        everything = bool(own.all())
        token = None if everything else own.flatten().nonzero()[:, 0].to(device)
        plan.to_own = (token, place.flatten().to(device) if everything else place[own].to(device))
    if bool(trunk.any()):
        row, column = trunk.nonzero(as_tuple=True)
        plan.to_trunk = (row.to(device), column.to(device), n.trunks[row].to(device), positions[row, column].to(device))


def _sight(
    plan: ForwardMetadata, n: _Numbers, limits: Tensor, positions: Tensor, window: int | None, device: torch.device
) -> AttentionMasks:
    """What every token sees. Padding has position 0 and sees the row's first token: nothing of it is stored, and it stays finite."""
    here = positions[:, :, None]
    shared = torch.arange(plan.trunk_length)[None, None]
    behind = n.starts[:, None, None] + torch.arange(plan.own_length)[None, None]
    trunk = (shared <= here) & (shared < limits[:, None, None])
    own = (behind <= here) & ~n.on_trunk[:, None, None]
    if window is not None:
        trunk &= shared > here - window
        own &= behind > here - window
    trunk_mask, own_mask = (torch.zeros(seen.shape).masked_fill_(~seen, _BLOCKED).to(device) for seen in (trunk, own))
    return AttentionMasks(trunk_mask, own_mask[:, None])


def _blocks(own: Sequence[int]) -> list[tuple[int, int, int]]:
    """Rows side by side have the same family and like lengths; a block is as long as its longest."""
    size = OWN_ROWS if len(own) > 2 * OWN_ROWS else len(own)
    cuts = [(first, min(first + size, len(own))) for first in range(0, len(own), size)]
    return [(first, end, max(1, *own[first:end], 1)) for first, end in cuts]


def _gather(n: _Numbers, own: Tensor, depth: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row = torch.arange(len(own)).repeat_interleave(own)
    behind = torch.arange(len(row)) - (own.cumsum(0) - own).repeat_interleave(own)
    place = n.slots[row] * depth + behind
    return n.trunks.to(device), row.to(device), (n.starts[row] + behind).to(device), place.to(device)


def _branches(trunks: Sequence[int], limits: Sequence[int], device: torch.device) -> list[Branch]:
    """Families of like size and length together."""
    families: dict[int, list[int]] = {}
    for row, trunk in enumerate(trunks):
        families.setdefault(trunk, []).append(row)
    lengths = {trunk: max(1, *(limits[r] for r in rows)) for trunk, rows in families.items()}
    buckets: dict[tuple[int, int], list[int]] = {}
    for trunk, rows in families.items():
        buckets.setdefault(((len(rows) - 1).bit_length(), max(5, (lengths[trunk] - 1).bit_length())), []).append(trunk)
    out = []
    for bucket in _merged(buckets, families, lengths):
        width = max(len(families[t]) for t in bucket)
        flat = [row for t in bucket for row in families[t] + families[t][:1] * (width - len(families[t]))]
        places = [k * width + i for k, t in enumerate(bucket) for i in range(len(families[t]))]
        same = flat == list(range(len(trunks)))
        index = torch.tensor(flat, device=device)
        members = torch.tensor([flat[p] for p in places], device=device)
        out.append(
            Branch(
                trunks=_run(torch.tensor(bucket), device),
                families=len(bucket),
                width=width,
                length=max(lengths[t] for t in bucket),
                rows=None if same else index,
                members=members,
                places=torch.tensor(places, device=device),
            )
        )
    return out


def _merged(buckets: Mapping[tuple[int, int], list[int]], families: Mapping[int, list[int]], lengths: Mapping[int, int]) -> list[list[int]]:
    """All in one product where that wastes less than half of it; a product costs something by itself."""
    every = list(families)
    wanted = sum(len(families[t]) * lengths[t] for t in every)
    if len(every) * max(map(len, families.values())) * max(lengths.values()) <= 2 * wanted or len(buckets) == 1:
        return [every]
    return list(buckets.values())
