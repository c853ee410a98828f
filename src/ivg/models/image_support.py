"""What a network must give so that rows with pictures are exact: positions behind them, and a trial of the first prompt that has any.

Which tensors a network takes, and how it numbers positions behind pictures, is its own affair: ``generate``'s first pass is followed,
and what comes out is compared with a pass without cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ivg.models.placement import input_device

if TYPE_CHECKING:
    from ivg.models.image_prompts import ImageInputs

_OFFSETS = "rope_deltas"
"""Where networks of the Qwen-VL kind keep how far the positions behind pictures differ from the numbers of the tokens."""


@contextmanager
def first_pass(network: nn.Module) -> Iterator[None]:
    """Within, ``network`` makes positions anew; afterwards it keeps none of them."""
    holders = _holders(network)
    for holder in holders:
        setattr(holder, _OFFSETS, None)
    try:
        yield
    finally:
        for holder in holders:
            setattr(holder, _OFFSETS, None)


def position_offset(network: nn.Module) -> int:
    """Position less number of a token behind the pictures that ``network`` has just read; 0 for most networks."""
    found = {int(getattr(holder, _OFFSETS)) for holder in _holders(network) if isinstance(getattr(holder, _OFFSETS), Tensor)}
    if len(found) > 1:
        raise ValueError(f"several offsets of positions: {sorted(found)}")
    return found.pop() if found else 0


def _holders(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if hasattr(module, _OFFSETS)]


def untaken(network: nn.Module, images: ImageInputs) -> list[str]:
    """Names of tensors that the processor gives and ``network`` does not take."""
    known = inspect.signature(network.forward).parameters
    return [name for name in (*images.aligned, *images.tensors) if name not in known]


@torch.no_grad()
def plain_output(network: nn.Module, ids: list[int], images: ImageInputs) -> Tensor:
    """The output behind ``ids``, which begin with the prompt of ``images``, in one pass without cache [vocabulary]."""
    device = input_device(network)
    tokens = torch.tensor([ids], device=device)
    with first_pass(network):
        given = images.for_pass(len(ids), device, cast("Any", network).dtype)
        out: Tensor = network(input_ids=tokens, use_cache=False, **given).logits[0, -1]
    return out
