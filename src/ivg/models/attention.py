"""Attention over rows that share prefixes: each prefix is multiplied with all queries of its group at once.

For rows of one prefix group (the beams of a request) softmax(q K^T) V is computed in two parts, over the prefix that they share and
over each row's suffix, under one softmax. The prefix's keys and values are read once for the group instead of once for each row, as a
product of matrices (cf. Hydragen, Juravsky et al. 2024, arXiv 2402.05099; cascade attention in vLLM): what a beam adds to the cost of
attention is its suffix, whatever the length of the answer.

Registered with transformers as the attention implementation ``ivg``; only a pass of ``models.slot_cache`` selects it.
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
from ivg.models.forward_metadata import AttentionMasks, BatchMask, ForwardMetadata, Pair, PrefixBatch
from ivg.models.kv_cache import KVCache

NAME = "ivg"
_LOWEST, _TINY = torch.finfo(torch.float32).min, torch.finfo(torch.float32).tiny
_UNSUPPORTED = ("s_aux", "sinks", "position_bias", "head_mask", "indices", "block_indices")
_thread = threading.local()
_patched: dict[int, list[Any]] = {}  # id of a config -> [the implementation it had, how many passes run]
_lock = threading.Lock()


class UnsupportedAttentionError(Exception):
    """The network needs something of its attention that is not done here; the caller concatenates keys and values instead."""


@contextmanager
def grouped_attention(config: Any, cache: KVCache) -> Iterator[None]:
    """Within, networks with this ``config`` attend by prefix groups over ``cache``; several threads may do so at once."""
    with _lock:
        known = _patched.setdefault(id(config), [config._attn_implementation_internal, 0])
        known[1] += 1
        config._attn_implementation_internal = NAME
    caches = _thread.__dict__.setdefault("caches", [])
    caches.append(cache)
    try:
        yield
    finally:
        caches.pop()
        with _lock:
            known[1] -= 1
            if known[1] == 0:
                config._attn_implementation_internal = known[0]
                del _patched[id(config)]


def own_implementation(config: Any) -> str | None:
    """The attention implementation of networks with this ``config``, also while a pass of :func:`grouped_attention` runs elsewhere."""
    with _lock:
        known = _patched.get(id(config))
        return getattr(config, "_attn_implementation", None) if known is None else known[0]


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

    Keys and values of the new tokens are in the cache already. ``attention_mask`` only marks the kind of layer.
    """
    caches: list[KVCache] = getattr(_thread, "caches", [])
    if not caches:  # a pass of the user's own, while another thread uses this network
        if softcap is not None:
            raise UnsupportedAttentionError("another thread is using this network through ivg; soft-capped attention must wait for it")
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **other)
    cache = caches[-1]
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    metadata, masks = _checked(
        None if cache.metadata is None else cache.metadata.on(query.device), layer, key, value, attention_mask, other
    )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows, heads, columns, size = query.shape
    kv_heads = key.shape[1]  # each serves heads / kv_heads heads of queries
    q = query.reshape(rows, kv_heads, -1, size)
    if q.dtype == torch.float16 and softcap is None:
        q, scaling = q * scaling, 1.0  # its products would overflow
    part = _prefix_attention(q, cache.prefixes[layer], metadata, masks, columns, scaling, softcap)
    out = part.out
    if metadata.suffix_slots is not None:
        out = _merge(part, _suffix_attention(q, cache.suffixes[layer], metadata, masks, columns, scaling, softcap))
    return out.to(value.dtype).reshape(rows, heads, columns, -1).transpose(1, 2).contiguous(), None


def _checked(
    metadata: ForwardMetadata | None, layer: int, key: Tensor, value: Tensor, marker: Tensor | None, other: dict[str, Any]
) -> tuple[ForwardMetadata, AttentionMasks]:
    """The metadata of the pass and the masks of this kind of layer.

    Raises:
        UnsupportedAttentionError: attention is called otherwise than after the cache with the same tensors, or with more arguments.
    """
    if metadata is None or metadata.new is None or key is not metadata.new[0] or value is not metadata.new[1]:
        raise UnsupportedAttentionError  # networks that cache something else than what they attend to
    if metadata.pending_layer != layer or marker is None or any(other.get(name) is not None for name in _UNSUPPORTED):
        raise UnsupportedAttentionError
    masks = metadata.masks.get(marker.data_ptr())
    if masks is None:
        raise UnsupportedAttentionError
    metadata.pending_layer = None
    return metadata, masks


class _PartialAttention(NamedTuple):
    """Attention over some of the positions, float32.

    Attributes:
        out: softmax(scores) V [rows, kv_heads, queries, size]; 0 where a query sees nothing.
        lse: log-sum-exp of the scores [..., 1]; the lowest number where a query sees nothing.
    """

    out: Tensor
    lse: Tensor


def _merge(a: _PartialAttention, b: _PartialAttention) -> Tensor:
    """Softmax over the positions of both."""
    return torch.lerp(b.out, a.out, (a.lse - b.lse).sigmoid())


def _of_scores(scores: Tensor, values: Tensor, dtype: torch.dtype) -> _PartialAttention:
    """``scores`` [..., queries, positions], float32, which are overwritten, and values [..., positions, size] of ``dtype``."""
    peak = scores.amax(-1, keepdim=True).clamp_(min=_LOWEST)
    weights = scores.sub_(peak).exp_()
    normaliser = weights.sum(-1, keepdim=True).clamp_(min=_TINY)
    return _PartialAttention((weights.to(dtype) @ values).float().div_(normaliser), peak.add_(normaliser.log()))


def _prefix_attention(
    q: Tensor, prefixes: Pair, metadata: ForwardMetadata, masks: AttentionMasks, columns: int, scaling: float, softcap: float | None
) -> _PartialAttention:
    if not masks.batches:
        masks.batches = [_prefix_mask(masks.prefix, b, q.shape[2] // columns) for b in metadata.prefix_batches]
    kv_heads, queries = q.shape[1:3]
    out: _PartialAttention | None = None
    for batch, mask in zip(metadata.prefix_batches, masks.batches, strict=True):
        groups, width = batch.groups, batch.width
        if width == 1 and batch.rows is None:
            return _attention(q, _batch_prefixes(prefixes[0], batch), _batch_prefixes(prefixes[1], batch), mask, scaling, softcap)
        chosen = q if batch.rows is None else q.index_select(0, batch.rows)
        together = chosen.view(groups, width, kv_heads, queries, -1).transpose(1, 2).reshape(groups, kv_heads, width * queries, -1)
        keys, values = (_batch_prefixes(t, batch) for t in prefixes)
        found = _attention(together, keys, values, mask, scaling, softcap)
        apart = _PartialAttention(*(t.view(groups, kv_heads, width, queries, -1).transpose(1, 2).flatten(0, 1) for t in found))
        if batch.rows is None:
            return apart
        if out is None:
            out = _PartialAttention(*(t.new_empty(len(q), *t.shape[1:]) for t in apart))
        for all_rows, some in zip(out, apart, strict=True):
            all_rows[batch.members] = some[batch.places]
    assert out is not None
    return out


def _attention(q: Tensor, keys: Tensor, values: Tensor, mask: BatchMask, scaling: float, softcap: float | None) -> _PartialAttention:
    """Queries [groups, kv_heads, queries, size] over keys and values [groups, kv_heads, length, size].

    On a CPU by PyTorch's flash kernel where that works: it reads keys where they lie and writes no scores (dev/LOG.md). Elsewhere
    keys times queries, not the other way round: so it is the few queries that are transposed, not the many keys.
    """
    if _has_flash(q, values, softcap):
        out, lse = kernels.flash_attention(q, keys, values, mask.bias, scaling)
        if mask.fully_masked is not None:  # what the kernel returns there is undefined
            out, lse = out.masked_fill(mask.fully_masked, 0.0), lse.masked_fill(mask.fully_masked[..., 0], _LOWEST)
        return _PartialAttention(out.float(), lse.float()[..., None])
    scores = _scaled((keys @ q.transpose(-1, -2)).transpose(-1, -2).contiguous(), scaling, softcap)
    return _of_scores(scores if mask.bias is None else scores.add_(mask.bias), values, values.dtype)


def _has_flash(q: Tensor, values: Tensor, softcap: float | None) -> bool:
    return softcap is None and q.device.type == "cpu" and q.shape[-1] == values.shape[-1] and kernels.has_flash_attention(q.dtype)


def _scaled(scores: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """float32, scaled; soft-capped where the network does so (Gemma 2)."""
    scores = scores.float().mul_(scaling)
    return scores if softcap is None else (scores / softcap).tanh() * softcap


def _prefix_mask(mask: Tensor, batch: PrefixBatch, times: int) -> BatchMask:
    """Of the ``width`` rows of each group, each with ``times`` queries a column."""
    chosen = mask if batch.rows is None else mask.index_select(0, batch.rows)
    return _batch_mask(chosen[..., : batch.length], batch.groups, batch.width, times)


def _batch_mask(mask: Tensor, groups: int, width: int, times: int) -> BatchMask:
    """``mask`` [groups * width, columns, length], for each of the ``times`` queries that a column has."""
    if mask.device.type == "cpu" and not bool(mask.any()):
        return BatchMask()
    columns = mask.shape[1]
    each = mask.view(groups, width, 1, columns, -1).expand(-1, -1, times, -1, -1)
    bias = each.reshape(groups, 1, width * times * columns, -1)
    fully_masked = bias.amax(-1, keepdim=True) == -torch.inf
    return BatchMask(bias, None if mask.device.type == "cpu" and not bool(fully_masked.any()) else fully_masked)


def _batch_prefixes(prefixes: Tensor, batch: PrefixBatch) -> Tensor:
    """[groups, kv_heads, length, size]."""
    seen = prefixes[:, :, : batch.length]
    return seen[batch.slots] if isinstance(batch.slots, slice) else seen.index_select(0, batch.slots)


def _suffix_attention(
    q: Tensor, suffixes: Pair, metadata: ForwardMetadata, masks: AttentionMasks, columns: int, scaling: float, softcap: float | None
) -> _PartialAttention:
    """Some rows at a time."""
    blocks = metadata.suffix_blocks
    if not masks.blocks:
        masks.blocks = [_batch_mask(masks.suffix[i:end, :, :length], end - i, 1, q.shape[2] // columns) for i, end, length in blocks]
    parts = []
    for (first, end, length), mask in zip(blocks, masks.blocks, strict=True):
        some = q[first:end]
        keys, values = (_block_suffixes(t, metadata.suffix_slots, first, end, length) for t in suffixes)
        if q.dtype == torch.float32 and _has_flash(q, values, softcap):  # with bfloat16 instructions it is the slower one
            parts.append(_attention(some, keys.transpose(1, 2), values.transpose(1, 2), mask, scaling, softcap))
            continue
        scores = _scaled(_suffix_scores(some, keys), scaling, softcap)
        parts.append(_of_scores(scores if mask.bias is None else scores.add_(mask.bias), values.transpose(1, 2), q.dtype))
    return parts[0] if len(parts) == 1 else _PartialAttention(*(torch.cat(t) for t in zip(*parts, strict=True)))


def _block_suffixes(suffixes: Tensor, slots: slice | Tensor | None, first: int, end: int, length: int) -> Tensor:
    """[rows, length, kv_heads, size] of some rows."""
    seen = suffixes[:, :length]
    if isinstance(slots, slice):
        return seen[slots.start + first : slots.start + end]
    assert slots is not None
    return seen.index_select(0, slots[first:end])


def _suffix_scores(q: Tensor, keys: Tensor) -> Tensor:
    """Q K^T [rows, kv_heads, queries, length], float32; a single query is cheaper elementwise than as a product of matrices."""
    if q.shape[2] == 1:
        return (keys * q.transpose(1, 2)).sum(-1, dtype=torch.float32).transpose(1, 2)[:, :, None]
    return (q @ keys.permute(0, 2, 3, 1)).float()


AttentionInterface.register(NAME, attend)
