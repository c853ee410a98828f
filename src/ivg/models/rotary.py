"""Rotary factors that depend on how long the text is (LongRoPE, Ding et al. 2024, arXiv 2402.13753), chosen for each row.

LongRoPE has two sets of factors: one for texts of up to ``original_max_position_embeddings`` tokens, one for longer ones. transformers
chooses by the largest position in a pass: a short row beside a long one, or the first block of a long text, would be rotated by the
wrong set. Here every output is that of a pass over the tokens before it alone. This is also what Phi-3's own ``generate`` gives, which
reads the text anew where it passes the limit.

Must not depend on rows or caches.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def rotary_modules(network: nn.Module) -> list[nn.Module]:
    """The modules that make rotary factors from positions."""
    return [m for m in network.modules() if "Rotary" in type(m).__name__ and "position_ids" in inspect.signature(m.forward).parameters]


def rope_types(network: nn.Module) -> set[str]:
    """Their RoPE types, whatever the configuration says (Hunyuan's ``dynamic`` with ``alpha`` does not change with the length)."""
    types: set[str] = set()
    for module in rotary_modules(network):
        found = getattr(module, "rope_type", None)
        types |= set(found.values()) if isinstance(found, dict) else {str(found)}
    return types


def rope_limits(config: Any) -> tuple[int, ...]:
    """Lengths beyond which the factors change, ascending; empty where they never do."""
    found = set()
    for rope in _rope_settings(config):
        if (rope.get("rope_type") or rope.get("type")) in ("longrope", "su"):
            found.add(int(rope.get("original_max_position_embeddings") or config.original_max_position_embeddings))
    return tuple(sorted(found))


def yarn_context(config: Any) -> int:
    """Tokens that YaRN extends the context to; 0: there is none."""
    found = [0]
    for rope in _rope_settings(config):
        original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        if (rope.get("rope_type") or rope.get("type")) == "yarn" and original and rope.get("factor"):
            found.append(int(original * rope["factor"]))
    return max(found)


def _rope_settings(config: Any) -> Iterator[dict[str, Any]]:
    """One dictionary, or one for each kind of layer."""
    for rope in (getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)):
        if isinstance(rope, dict):
            yield rope
            yield from (part for part in rope.values() if isinstance(part, dict))


def length_batches(lengths: Sequence[int], size: int, limits: Sequence[int]) -> Iterator[list[int]]:
    """Texts of like length together, at most ``size``, as indices; none shares a batch with one on the other side of a limit.

    Args:
        lengths: tokens of each text.
        size: texts at most.
        limits: as :func:`rope_limits` gives them.
    """
    batch: list[int] = []
    kind = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        here = sum(lengths[i] > limit for limit in limits)
        if batch and (len(batch) == size or here != kind):
            yield batch
            batch = []
        batch.append(i)
        kind = here
    if batch:
        yield batch


@contextmanager
def rotary_factors_beyond(limit: int | None, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within, ``modules`` make the factors of a text longer than ``limit`` tokens, also of its first positions; None: no change.

    They are given one more position, just beyond the limit, and what they make of it is dropped.
    """
    if limit is None:
        yield
        return

    def lengthen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        positions = bound.arguments["position_ids"]
        bound.arguments["position_ids"] = torch.cat([positions, positions.new_full((*positions.shape[:-1], 1), limit)], -1)
        return bound.args, bound.kwargs

    def shorten(_module: nn.Module, _args: Any, made: Any) -> Any:
        return tuple(t[..., :-1, :] for t in made) if isinstance(made, tuple) else made[..., :-1, :]

    hooks = [m.register_forward_pre_hook(lengthen, with_kwargs=True) for m in modules] + [m.register_forward_hook(shorten) for m in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
