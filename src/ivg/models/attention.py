"""Attention over rows that share beginnings: each trunk is multiplied with all queries of its family at once.

For rows of one family (the beams of a request) softmax(q K^T) V is computed in two parts, over the trunk that they share and
over what each has of its own, under one softmax. The trunk's keys and values are read once for the family instead of once for
each row, as a product of matrices (cf. Hydragen, Juravsky et al. 2024, arXiv 2402.05099): what a beam adds to the cost of
attention is its own part, whatever the length of the answer.

Registered with transformers as the attention implementation ``ivg``; only a pass of ``models.cached`` selects it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ivg.models import kernels
from ivg.models.kv_cache import AttentionMasks, Branch, ForwardMetadata, KVCache, Pair

NAME = "ivg"
_LOWEST = torch.finfo(torch.float32).min
_FOREIGN = ("s_aux", "sinks", "position_bias", "head_mask", "indices", "block_indices")
_here = threading.local()
_patched: dict[int, list[Any]] = {}  # id of a config -> [the implementation it had, how many passes run]
_lock = threading.Lock()


class UnsupportedAttentionError(Exception):
    """The network wants something of its attention that is not done here; the caller reads the rows in the general way."""


@contextmanager
def by_families(config: Any, store: KVCache) -> Iterator[None]:
    """Within, networks with this ``config`` attend by families over ``store``; in several threads at once, if it must be."""
    with _lock:
        known = _patched.setdefault(id(config), [config._attn_implementation_internal, 0])
        known[1] += 1
        config._attn_implementation_internal = NAME
    stores = _here.__dict__.setdefault("stores", [])
    stores.append(store)
    try:
        yield
    finally:
        stores.pop()
        with _lock:
            known[1] -= 1
            if known[1] == 0:
                config._attn_implementation_internal = known[0]
                del _patched[id(config)]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Attention of ``query`` [rows, heads, columns, size] over everything that its rows hold; [rows, columns, heads, size].

    Keys and values of the new tokens are in the store already. ``attention_mask`` only marks the kind of layer.
    """
    stores: list[KVCache] = getattr(_here, "stores", [])
    if not stores:  # somebody's own pass, while another thread has this network
        if softcap is not None:
            raise UnsupportedAttentionError("another thread is using this network through ivg; its scores cannot be squeezed meanwhile")
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **other)
    store = stores[-1]
    plan, layer = store.plan, int(module.layer_idx)  # type: ignore[arg-type]
    if plan is None or plan.given is None or key is not plan.given[0] or value is not plan.given[1]:
        raise UnsupportedAttentionError  # networks that keep something else than what they attend to
    if plan.touched != layer or attention_mask is None or any(other.get(name) is not None for name in _FOREIGN):
        raise UnsupportedAttentionError
    sight = plan.sights.get(attention_mask.data_ptr())
    if sight is None:
        raise UnsupportedAttentionError
    plan.touched = None
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows, heads, columns, size = query.shape
    groups = key.shape[1]  # heads of keys and values; each serves heads / groups heads of queries
    q = query.reshape(rows, groups, -1, size)
    if q.dtype == torch.float16 and softcap is None:
        q, scaling = q * scaling, 1.0  # its products would overflow
    part = _over_trunks(q, store.trunk[layer], plan, sight, columns, scaling, softcap)
    if plan.slots is not None:
        part = _joined(part, _over_own(q, store.own[layer], plan, sight, scaling, softcap))
    out = part.sums / part.norm
    return out.to(value.dtype).reshape(rows, heads, columns, -1).transpose(1, 2).contiguous(), None


class _Part(NamedTuple):
    """Attention over some of the positions: exp(score - top) V [rows, groups, queries, size], the top score and the norm, [..., 1]."""

    sums: Tensor
    top: Tensor
    norm: Tensor


def _joined(a: _Part, b: _Part) -> _Part:
    """Over the positions of both; what sees nothing in one of them has the lowest top there, and norm 0."""
    top = torch.maximum(a.top, b.top)
    mine, other = (a.top - top).exp(), (b.top - top).exp()
    return _Part(a.sums * mine + b.sums * other, top, a.norm * mine + b.norm * other)


def _mass(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(exp(score - top), top, norm) of ``scores`` [..., positions], float32."""
    top = scores.amax(-1, keepdim=True).clamp_(min=_LOWEST)
    mass = (scores - top).exp_()
    return mass, top, mass.sum(-1, keepdim=True)


def _over_trunks(
    q: Tensor, trunk: Pair, plan: ForwardMetadata, sight: AttentionMasks, columns: int, scaling: float, softcap: float | None
) -> _Part:
    """Over the trunks alone."""
    if not sight.branches:
        sight.branches = [_branch_mask(sight.trunk, b, q.shape[2] // columns) for b in plan.branches]
    groups, queries = q.shape[1:3]
    out: _Part | None = None
    for branch, mask in zip(plan.branches, sight.branches, strict=True):
        families, width = branch.families, branch.width
        chosen = q if branch.rows is None else q.index_select(0, branch.rows)
        together = chosen.view(families, width, groups, queries, -1).transpose(1, 2).reshape(families, groups, width * queries, -1)
        found = _attention(together, _trunks(trunk[0], branch), _trunks(trunk[1], branch), mask, scaling, softcap)
        apart = _Part(*(t.view(families, groups, width, queries, -1).transpose(1, 2).flatten(0, 1) for t in found))
        if branch.rows is None:
            return apart
        if out is None:
            out = _Part(*(t.new_empty(len(q), *t.shape[1:]) for t in apart))
        for all_rows, some in zip(out, apart, strict=True):
            all_rows[branch.members] = some[branch.places]
    assert out is not None
    return out


def _attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> _Part:
    """Queries [families, groups, queries, size] over keys and values [families, groups, length, size].

    On a CPU by PyTorch's flash kernel where that works: it takes keys where they lie and writes no scores (dev/LOG.md). Elsewhere keys
    times queries, not the other way round: so it is the few queries that are turned, not the many keys.
    """
    if softcap is None and q.device.type == "cpu" and q.shape[-1] == values.shape[-1] and kernels.has_flash(q.dtype):
        out, norms = kernels.flash_attention(q, keys, values, mask, scaling)
        if mask is not None:  # what it gives where nothing is seen is not said
            blind = (mask.amax(-1, keepdim=True) == -torch.inf).expand(*norms.shape, 1)
            out, norms = out.masked_fill(blind, 0.0), norms.masked_fill(blind[..., 0], _LOWEST)
        return _Part(out.float(), norms.float()[..., None], torch.ones_like(norms, dtype=torch.float32)[..., None])
    scores = _capped((keys @ q.transpose(-1, -2)).transpose(-1, -2).contiguous(), scaling, softcap)
    mass, top, norm = _mass(scores if mask is None else scores.add_(mask))
    return _Part((mass.to(values.dtype) @ values).float(), top, norm)


def _capped(scores: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """float32, scaled; squeezed where the network does so (Gemma 2)."""
    scores = scores.float().mul_(scaling)
    return scores if softcap is None else (scores / softcap).tanh() * softcap


def _branch_mask(seen: Tensor, branch: Branch, times: int) -> Tensor | None:
    """[families, 1, width * times * columns, length]; None where everything is seen."""
    chosen = seen if branch.rows is None else seen.index_select(0, branch.rows)
    chosen = chosen[..., : branch.length]
    if chosen.device.type == "cpu" and not bool(chosen.any()):
        return None
    columns = chosen.shape[1]
    each = chosen.view(branch.families, branch.width, 1, columns, -1).expand(-1, -1, times, -1, -1)
    return each.reshape(branch.families, 1, branch.width * times * columns, -1)


def _over_own(q: Tensor, own: Pair, plan: ForwardMetadata, sight: AttentionMasks, scaling: float, softcap: float | None) -> _Part:
    """Over the own parts alone, some rows at a time."""
    groups, columns = q.shape[1], sight.own.shape[2]
    parts = []
    for first, end, length in plan.blocks:
        scores = _capped(_own_scores(q[first:end], _own(own[0], plan, first, end, length)), scaling, softcap)
        each = scores.view(end - first, groups, -1, columns, length) + sight.own[first:end, :, None, :, :length]
        mass, top, norm = _mass(each.view(scores.shape))
        sums = mass.to(q.dtype) @ _own(own[1], plan, first, end, length).transpose(1, 2)
        parts.append(_Part(sums.float(), top, norm))
    return parts[0] if len(parts) == 1 else _Part(*(torch.cat(t) for t in zip(*parts, strict=True)))


def _own(store: Tensor, plan: ForwardMetadata, first: int, end: int, length: int) -> Tensor:
    """[rows, length, heads, size] of some rows."""
    seen, slots = store[:, :length], plan.slots
    if isinstance(slots, slice):
        return seen[slots.start + first : slots.start + end]
    assert slots is not None
    return seen.index_select(0, slots[first:end])


def _trunks(store: Tensor, branch: Branch) -> Tensor:
    """[families, heads, length, size]."""
    seen = store[:, :, : branch.length]
    return seen[branch.trunks] if isinstance(branch.trunks, slice) else seen.index_select(0, branch.trunks)


def _own_scores(q: Tensor, keys: Tensor) -> Tensor:
    """Q K^T [rows, groups, queries, length], float32; a single query is cheaper by elements than as a product of matrices."""
    if q.shape[2] == 1:
        return (keys * q.transpose(1, 2)).sum(-1, dtype=torch.float32).transpose(1, 2)[:, :, None]
    return (q @ keys.permute(0, 2, 3, 1)).float()


AttentionInterface.register(NAME, attend)
