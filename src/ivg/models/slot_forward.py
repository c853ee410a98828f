"""A forward pass of a transformers network over the slots of ``models.kv_cache``.

Attention goes by prefix groups (``models.attention``) where the network looks its attention up by name and nothing else stands against
it; otherwise keys and values are concatenated for each row. Must not depend on how slots are assigned.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ivg.models.attention import UnsupportedAttentionError, grouped_attention, own_implementation
from ivg.models.cache import PassLimits
from ivg.models.forward_metadata import PassLayout, RowLayout, build_metadata
from ivg.models.kv_cache import KVCache, PassMetadata
from ivg.models.placement import compute_dtype, input_device
from ivg.models.support import NetworkSupport, body_of


class SlotForward:
    """Runs passes of one network.

    Args:
        network: takes ``input_ids, position_ids, attention_mask, past_key_values, use_cache, logits_to_keep``.
        support: how it is read.
        limits: of one pass.

    Attributes:
        groups_prefixes: attention goes by prefix groups, where a pass is not wider than ``limits.grouped_columns``.
        heads: of its attention.
    """

    def __init__(self, network: nn.Module, support: NetworkSupport, limits: PassLimits) -> None:
        self.network, self.support, self.limits = network, support, limits
        self.device = input_device(network)
        self.config = cast("Any", network).config.get_text_config()
        self.heads = int(getattr(self.config, "num_attention_heads", 1) or 1)
        self.groups_prefixes = bool(getattr(body_of(network), "_supports_attention_backend", False))
        self._eager = own_implementation(self.config) == "eager"
        self._markers: dict[torch.device, dict[str, Tensor]] = {}

    def run(
        self,
        memory: KVCache,
        rows: Sequence[RowLayout],
        pieces: Sequence[Sequence[int]],
        held: Sequence[Sequence[int]],
        keep: int,
    ) -> Tensor:
        """Outputs of the last ``keep`` columns [rows, keep, vocabulary or 1].

        Args:
            memory: receives keys and values of the new tokens; has room for them.
            rows: where they lie.
            pieces: new tokens of each.
            held: tokens that each holds.
            keep: columns.
        """
        layout, width = PassLayout(rows), max(map(len, pieces))
        ids = torch.tensor([piece if len(piece) == width else [0] * (width - len(piece)) + list(piece) for piece in pieces])
        pad = self.support.pad
        positions = layout.positions if pad is None else _positions_without(pad, ids, layout.is_token, held)
        inputs = {"input_ids": ids.to(self.device), "position_ids": positions.to(self.device), "logits_to_keep": keep}
        if self.groups_prefixes and width <= self.limits.grouped_columns:
            try:
                return self._call(memory, layout, inputs, grouped=True)
            except UnsupportedAttentionError:
                self.groups_prefixes = False
        return self._call(memory, layout, inputs, grouped=False)

    def _call(self, memory: KVCache, layout: PassLayout, inputs: dict[str, Any], *, grouped: bool) -> Tensor:
        memory.metadata = PassMetadata(
            lambda device: build_metadata(layout, memory.suffixes.capacity, self._markers_on(device), self.support.windows, grouped=grouped)
        )
        dense = None if grouped else self._dense_masks(layout.positions.to(self.device), int(layout.positions.max()) + 1)
        masks = self._markers_on(self.device) if dense is None else dense
        try:
            with grouped_attention(self.config, memory) if grouped else nullcontext():
                logits: Tensor = self.network(
                    **inputs,
                    attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
                    past_key_values=memory,
                    use_cache=True,
                ).logits
            if grouped and memory.metadata.attention_pending:
                raise UnsupportedAttentionError  # the network never called it
        finally:
            memory.metadata = None
        return logits

    def _markers_on(self, device: torch.device) -> dict[str, Tensor]:
        """What stands for the mask of each kind of layer on ``device``. accelerate moves arguments to a layer's device by ``to``."""
        if device not in self._markers:
            made = {kind: torch.zeros(1, 1, 1, 1, device=device) for kind in self.support.windows}
            for kind, marker in made.items():
                marker.to = partial(self._marker_to, kind, marker)  # type: ignore[method-assign]
            self._markers[device] = made
        return self._markers[device]

    def _marker_to(self, kind: str, marker: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``marker.to(…)``: on another device the marker there, which is known by its address."""
        moved = Tensor.to(marker, *args, **kwargs)
        same = moved.dtype == marker.dtype
        return self._markers_on(moved.device)[kind] if same and moved.device != marker.device else moved

    def _dense_masks(self, positions: Tensor, length: int) -> dict[str, Tensor]:
        """What every token may see [rows, 1, columns, length]; for each kind of layer.

        Padding is given position 0 and sees the row's first token: nothing of it is stored, and it stays finite.
        """
        keys = torch.arange(length, device=self.device)
        causal = keys <= positions[:, None, :, None]
        masks = {}
        for kind, window in self.support.windows.items():
            seen = causal if window is None else causal & (keys > positions[:, None, :, None] - window)
            if self._eager:
                dtype = compute_dtype(self.network)
                seen = torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill(~seen, torch.finfo(dtype).min)
            masks[kind] = seen
        return masks


def _positions_without(pad: int, ids: Tensor, is_token: Tensor, held: Sequence[Sequence[int]]) -> Tensor:
    """Positions [R, C] as RoBERTa counts them: from ``pad`` + 1 on, tokens ``pad`` left out; those are at ``pad`` itself."""
    before = torch.tensor([len(tokens) - tokens.count(pad) for tokens in held])
    counted = is_token & (ids != pad)
    return (counted.cumsum(1) + before[:, None]) * counted + pad
