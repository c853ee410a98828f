"""Rows of one forward pass that read with different LoRA adapters: the network's own weights are read once for all of them.

A guide that is the base with an adapter then costs the adapter's two small matrices for each layer, not a second pass. Here an adapter's
change is added to the rows that read with it, and to no others. What is more than two matrices for each of some linear layers (DoRA, whole
modules, biases …), or is given other than one row of the batch for each text (experts, which get the tokens of all texts), is left to
separate passes (``models.adapters``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from ivg.errors import ModelError
from ivg.models.packed_linear import PackedLinear
from ivg.models.row_weights import RowWeights


class AdapterRows(RowWeights):
    """Adds the changes of peft's LoRA layers row by row, while :meth:`using` is open; otherwise peft's layers do as they always do."""

    def prepare(self, name: str) -> bool:
        """Make the layers of the adapter ``name`` able to read rows apart; False: it is of a kind that cannot be read so."""
        layers = list(self._layers(name))
        if not layers or not all(_is_plain_lora(layer, name) for layer in layers):
            return False
        for layer in layers:
            own = cast("Any", layer)
            if getattr(own.forward, "func", None) != self._forward:  # accelerate may have put its own there since
                own.forward = partial(self._forward, own, own.forward)
        return True

    def _forward(self, layer: Any, own: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The forward method of ``layer``; ``own`` is peft's."""
        if self.parts is None:
            return own(x, *args, **kwargs)
        out: Tensor = layer.base_layer(x, *args, **kwargs)
        rows = self.parts[-1][2]
        for name, first, end in self.parts:
            if name not in layer.lora_A:
                continue
            if x.dim() != 3 or len(x) != rows:
                raise ModelError(
                    f"a layer with the adapter {name} got {list(x.shape)} where the batch has {rows} rows\n"
                    "  expected [rows, positions, size]; merge the adapter into a model of its own"
                )
            down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
            some = x if end - first == rows else x[first:end]
            change = nn.functional.linear(nn.functional.linear(some.to(down.dtype), down), up) * layer.scaling[name]
            if end - first == rows:
                return (out + change).to(out.dtype)
            out[first:end] = out[first:end] + change
        return out

    def _layers(self, name: str) -> Iterator[nn.Module]:
        """All modules of peft that have something of the adapter ``name``."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import AuxiliaryTrainingWrapper

        for module in self.network.modules():
            if isinstance(module, BaseTunerLayer):
                if any(name in getattr(module, kind) for kind in (*module.adapter_layer_names, *module.other_param_names)):
                    yield module
            elif isinstance(module, AuxiliaryTrainingWrapper):
                yield module


def _is_plain_lora(layer: Any, name: str) -> bool:
    """Is that adapter two matrices beside a linear layer here, and nothing else?"""
    from peft.tuners.lora import Linear
    from transformers.pytorch_utils import Conv1D

    return (
        type(layer) is Linear
        and isinstance(layer.base_layer, nn.Linear | PackedLinear | Conv1D)
        and name not in layer.lora_variant
        and not layer.lora_bias.get(name, False)
        and not layer.merged
    )
