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
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ivg.models.store import Branch, KVStore, Pair, Plan, Sight

NAME = "ivg"
_FOREIGN = ("s_aux", "sinks", "position_bias", "head_mask")
_here = threading.local()
_patched: dict[int, list[Any]] = {}  # id of a config -> [the implementation it had, how many passes run]
_lock = threading.Lock()


class UnsupportedAttentionError(Exception):
    """The network wants something of its attention that is not done here; the caller reads the rows in the general way."""


@contextmanager
def by_families(config: Any, store: KVStore) -> Iterator[None]:
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
    stores: list[KVStore] = getattr(_here, "stores", [])
    if not stores:  # somebody's own pass, while another thread has this network
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
    out, norm = _over_trunks(q, store.trunk[layer], plan, sight, columns, scaling, softcap)
    if plan.slots is not None:
        out = _with_own(out, norm, q, store.own[layer], plan, sight, scaling, softcap)
    return out.to(value.dtype).reshape(rows, heads, columns, -1).transpose(1, 2), None


def _over_trunks(
    q: Tensor, trunk: Pair, plan: Plan, sight: Sight, columns: int, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention over the trunks alone [rows, groups, queries, size], and the logarithm of its norm [rows, groups, queries]."""
    if not sight.branches:
        sight.branches = [_branch_mask(sight.trunk, b, q.shape[2] // columns, q.dtype) for b in plan.branches]
    groups, queries = q.shape[1:3]
    out: Tensor | None = None
    for branch, mask in zip(plan.branches, sight.branches, strict=True):
        families, width = branch.families, branch.width
        chosen = q if branch.rows is None else q.index_select(0, branch.rows)
        together = chosen.view(families, width, groups, queries, -1).transpose(1, 2).reshape(families, groups, width * queries, -1)
        sums, norms = _attention(together, _trunks(trunk[0], branch), _trunks(trunk[1], branch), mask, scaling, softcap)
        apart = sums.view(families, groups, width, queries, -1).transpose(1, 2).flatten(0, 1)
        norms = norms.view(families, groups, width, queries).transpose(1, 2).flatten(0, 1)
        if branch.rows is None:
            out, norm = apart, norms
            break
        if out is None:
            out, norm = apart.new_empty(len(q), *apart.shape[1:]), norms.new_empty(len(q), *norms.shape[1:])
        out[branch.members], norm[branch.members] = apart[branch.places], norms[branch.places]
    assert out is not None
    if sight.blind is not None:
        blind = sight.blind[:, None, None].expand(-1, groups, queries // columns, -1).reshape(norm.shape)
        out, norm = out.masked_fill(blind[..., None], 0.0), norm.masked_fill(blind, -torch.inf)
    return out, norm


def _attention(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """softmax(q K^T + mask) V, and the logarithm of the softmax's norm, float32."""
    if q.device.type == "cpu" and softcap is None and q.dtype in (torch.float32, torch.bfloat16) and q.shape[-1] == values.shape[-1]:
        done = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, keys, values, 0.0, False, attn_mask=mask, scale=scaling)
        return done[0], done[1].float()
    scores = _capped((q @ keys.transpose(-1, -2)).float(), scaling, softcap)
    scores = scores if mask is None else scores + mask
    norms = scores.logsumexp(-1)
    return (scores - norms[..., None]).exp().to(values.dtype) @ values, norms


def _capped(scores: Tensor, scaling: float, softcap: float | None) -> Tensor:
    return scores * scaling if softcap is None else (scores * (scaling / softcap)).tanh() * softcap


def _branch_mask(seen: Tensor, branch: Branch, times: int, dtype: torch.dtype) -> Tensor | None:
    """[families, 1, width * times * columns, length]; None where everything is seen."""
    chosen = seen if branch.rows is None else seen.index_select(0, branch.rows)
    chosen = chosen[..., : branch.length]
    if chosen.device.type == "cpu" and not bool(chosen.any()):
        return None
    columns = chosen.shape[1]
    each = chosen.view(branch.families, branch.width, 1, columns, -1).expand(-1, -1, times, -1, -1)
    return each.reshape(branch.families, 1, branch.width * times * columns, -1).to(dtype)


def _with_own(out: Tensor, norm: Tensor, q: Tensor, own: Pair, plan: Plan, sight: Sight, scaling: float, softcap: float | None) -> Tensor:
    """Attention over trunks and own parts under one softmax, from that over the trunks and its norm; float32."""
    if q.dtype == torch.float16 and softcap is None:
        q, scaling = q * scaling, 1.0  # its products would overflow
    groups = q.shape[1]
    columns = sight.own.shape[2]
    sums, tops, norms = [], [], []
    for first, end, length in plan.blocks:
        part = q[first:end]
        scores = _capped(_own_scores(part, _own(own[0], plan, first, end, length)), scaling, softcap)
        each = scores.view(end - first, groups, -1, columns, length) + sight.own[first:end, :, None, :, :length]
        scores = each.view(scores.shape)
        top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
        mass = (scores - top).exp_()
        sums.append(mass.to(q.dtype) @ _own(own[1], plan, first, end, length).transpose(1, 2))
        tops.append(top)
        norms.append(mass.sum(-1, keepdim=True))
    top, norm = torch.cat(tops), norm[..., None]
    whole = torch.logaddexp(norm, top + torch.cat(norms).log())
    return out * (norm - whole).exp() + torch.cat(sums) * (top - whole).exp()


def _own(store: Tensor, plan: Plan, first: int, end: int, length: int) -> Tensor:
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
