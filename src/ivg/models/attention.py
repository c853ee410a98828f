"""Attention over rows that share beginnings: each trunk is multiplied with all queries of its family at once.

For rows of one family (the beams of a request) softmax(q K^T) V is computed in two parts, over the trunk that they share and
over what each has of its own, under one softmax. The trunk's keys and values are read once for the family instead of once for
each row, as a product of matrices (cf. Hydragen, Juravsky et al. 2024, arXiv 2402.05099): what a beam adds to the cost of
attention is its own part, whatever the length of the answer.

Registered with transformers as the attention implementation ``ivg``; only a pass of ``models.cached`` selects it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ivg.models.store import Branch, KVStore, Plan

NAME = "ivg"
_FOREIGN = ("s_aux", "sinks", "position_bias", "head_mask")
_active: list[KVStore] = []


class UnsupportedAttentionError(Exception):
    """The network wants something of its attention that is not done here; the caller reads the rows in the general way."""


@contextmanager
def by_families(config: Any, store: KVStore) -> Iterator[None]:
    """Within, networks with this ``config`` attend by families over ``store``."""
    before = config._attn_implementation_internal
    config._attn_implementation_internal = NAME
    _active.append(store)
    try:
        yield
    finally:
        _active.pop()
        config._attn_implementation_internal = before


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
    store = _active[-1]
    plan, layer = store.plan, int(module.layer_idx)  # type: ignore[arg-type]
    if plan is None or plan.touched != layer or attention_mask is None or any(other.get(name) is not None for name in _FOREIGN):
        raise UnsupportedAttentionError
    mask = plan.masks.get(attention_mask.data_ptr())
    if mask is None:
        raise UnsupportedAttentionError
    plan.touched = None
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows, heads, columns, size = query.shape
    groups = key.shape[1]  # heads of keys and values; each serves heads / groups heads of queries
    q = query.reshape(rows, groups, -1, size)
    trunk, own = store.trunk[layer], store.own[layer]
    edge = plan.trunk_length
    new = q.new_empty if plan.branches[0].rows is None else q.new_zeros  # shorter trunks leave gaps, which must be finite
    scores = new(rows, groups, q.shape[2], edge + plan.own_length, dtype=torch.float32)
    for branch in plan.branches:
        _trunk_scores(scores, q, trunk[0], branch)
    if plan.slots is not None:
        scores[..., edge:] = _own_scores(q, _own(own[0], plan))
    each = scores.view(rows, groups, -1, columns, scores.shape[-1])
    if softcap is not None:
        each, scaling = (each * (scaling / softcap)).tanh(), softcap
    weights = torch.add(mask[:, :, None], each, alpha=scaling).softmax(-1).to(value.dtype).view(scores.shape)
    out = _trunk_sums(weights, trunk[1], plan, value.shape[-1])
    if plan.slots is not None:
        out = out + weights[..., edge:] @ _own(own[1], plan).transpose(1, 2)
    return out.reshape(rows, heads, columns, -1).transpose(1, 2), None


def _own(store: Tensor, plan: Plan) -> Tensor:
    """[rows, own_length, heads, size]."""
    seen = store[:, : plan.own_length]
    assert plan.slots is not None
    return seen[plan.slots] if isinstance(plan.slots, slice) else seen.index_select(0, plan.slots)


def _trunks(store: Tensor, branch: Branch) -> Tensor:
    """[families, heads, length, size]."""
    seen = store[:, :, : branch.length]
    return seen[branch.trunks] if isinstance(branch.trunks, slice) else seen.index_select(0, branch.trunks)


def _own_scores(q: Tensor, keys: Tensor) -> Tensor:
    """Q K^T [rows, groups, queries, own_length], float32; a single query is cheaper by elements than as a product of matrices."""
    if q.shape[2] == 1:
        return (keys * q.transpose(1, 2)).sum(-1, dtype=torch.float32).transpose(1, 2)[:, :, None]
    return (q @ keys.permute(0, 2, 3, 1)).float()


def _trunk_scores(scores: Tensor, q: Tensor, keys: Tensor, branch: Branch) -> None:
    """Write q K^T over the trunks into ``scores`` [rows, groups, queries, …]."""
    rows = q if branch.rows is None else q.index_select(0, branch.rows)
    families, width, (groups, queries, size) = branch.families, branch.width, q.shape[1:]
    together = rows.view(families, width, groups, queries, size).transpose(1, 2).reshape(families, groups, width * queries, size)
    product = together @ _trunks(keys, branch).transpose(-1, -2)
    apart = product.view(families, groups, width, queries, branch.length).transpose(1, 2)
    if branch.rows is None:
        scores.view(families, width, groups, queries, -1)[..., : branch.length] = apart
    else:
        scores[branch.members, :, :, : branch.length] = apart.flatten(0, 1)[branch.places].float()


def _trunk_sums(weights: Tensor, values: Tensor, plan: Plan, size: int) -> Tensor:
    """Weighted sums over the trunks' values [rows, groups, queries, size]."""
    out: Tensor | None = None
    groups, queries = weights.shape[1:3]
    for branch in plan.branches:
        seen = weights[..., : branch.length]
        seen = seen if branch.rows is None else seen.index_select(0, branch.rows)
        together = seen.view(branch.families, branch.width, groups, queries, -1).transpose(1, 2).flatten(2, 3)
        product = together @ _trunks(values, branch)
        apart = product.view(branch.families, groups, branch.width, queries, size).transpose(1, 2).flatten(0, 1)
        if branch.rows is None:
            return apart
        out = weights.new_empty(*weights.shape[:3], size) if out is None else out
        out[branch.members] = apart[branch.places]
    assert out is not None
    return out


AttentionInterface.register(NAME, attend)
