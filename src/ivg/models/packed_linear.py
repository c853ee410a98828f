"""Linear layers in oneDNN's packed (blocked) weight layout: for inference on a CPU in bfloat16 or float32.

oneDNN reorders a bfloat16 matrix into blocks before each product; for few rows that takes as long as the product. Packed once, a
pass of 1 to 16 rows takes half the time, one of 256 a tenth less. In float32 PyTorch's own products are MKL's, which reorders too: packed,
4 to 64 rows take a half to four fifths (dev/LOG.md), unless the matrix is small. A GELU is computed within the product before it. The plain
weights are dropped; they can be read back, exactly, from the packed ones. A head that is tied to the embeddings takes its memory once more
(``LoadOptions.pack``). Handles PyTorch's modules and transformers' ``Conv1D``; must not depend on what they mean.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import Tensor, nn

from ivg.models import kernels

log = logging.getLogger(__name__)

MIN_WEIGHTS = {torch.bfloat16: 0, torch.float32: 1 << 18}
"""Smaller matrices are faster unpacked: a packed product costs about 12 microseconds by itself."""


class PackedLinear(nn.Module):
    """A linear layer for inference: no gradients reach its weights.

    Args:
        weight: [outputs, inputs], bfloat16 or float32, on the CPU.
        bias: [outputs] or None.
        transposed: state dictionaries have it as [inputs, outputs] (``Conv1D``).

    Attributes:
        tied: it was one matrix with the network's embeddings.
        activation: a GELU of the output; in the module around it, it was ``activation_name``. None: none.
        gelu: which one it is, as PyTorch's ``approximate`` has it.
    """

    activation: nn.Module | None

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, *, transposed: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.transposed, self.dtype, self.tied = transposed, weight.dtype, False
        self.activation_name, self.gelu = "", cast("str | None", None)
        self.register_parameter("bias", bias)
        self.register_module("activation", None)
        self._pack(weight)

    def _pack(self, weight: Tensor) -> None:
        """Keeps the plain layout where oneDNN cannot compute the layer: it may come from a pickle of another machine."""
        known = kernels.has_packed_linear(weight.dtype) and (self.gelu is None or kernels.has_packed_gelu(weight.dtype, self.gelu))
        self.packed = kernels.pack_weight(weight) if known else weight.detach().contiguous()

    @property
    def weight(self) -> Tensor:
        """The plain weights, computed at each call, in the layer's own layout."""
        dense: Tensor = self.packed.to_dense()
        return dense.t().contiguous() if self.transposed else dense

    @property
    def num_weights(self) -> int:
        """Number of weights, without bias."""
        return self.in_features * self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """X W^T + b, or the activation of that."""
        if x.dtype == self.dtype and self.packed.layout is not torch.strided:
            return kernels.packed_linear(x, self.packed, cast("Tensor | None", self.bias), self.gelu)
        bias = None if self.bias is None else cast("Tensor", self.bias).to(x.dtype)
        out = nn.functional.linear(x, self.packed.to_dense().to(x.dtype), bias)
        return out if self.activation is None else cast("Tensor", self.activation(out))

    def take_activation(self, module: nn.Module, name: str) -> None:
        """Compute the activation ``name`` of ``module``, a GELU, of this layer's output; ``module`` then has an identity there."""
        self.activation, self.activation_name = getattr(module, name), name
        self.gelu = _gelu_of(cast("nn.Module", self.activation))
        setattr(module, name, nn.Identity())

    def return_activation(self, module: nn.Module) -> None:
        """Undo :meth:`take_activation`."""
        setattr(module, self.activation_name, self.activation)
        self.activation, self.activation_name, self.gelu = None, "", None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], unexpected: list[str], errors: list[str]
    ) -> None:
        name = prefix + "weight"
        weight = state_dict.pop(name, None)
        shape = (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)
        if weight is None:
            missing.append(name)
        elif tuple(weight.shape) != shape:
            errors.append(f"size mismatch for {name}: got {tuple(weight.shape)}, expected {shape}")
        else:
            self._pack((weight.t() if self.transposed else weight).to(self.dtype))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which cannot hold packed tensors."""
        return {**self.__dict__, "packed": self.packed.to_dense()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack(state["packed"])


def can_pack(network: nn.Module) -> bool:
    """Is ``network`` on a CPU, in a dtype in which oneDNN's packed layers work?"""
    first = next(network.parameters(), None)
    return first is not None and first.device.type == "cpu" and kernels.has_packed_linear(first.dtype)


def pack(network: nn.Module) -> nn.Module:
    """Make ``network`` fast for inference, in place: pack its linear layers where :func:`can_pack`, and replace GPT-2's activation.

    That is eight operations in transformers, and one in PyTorch: the same function, on any device. A GELU between two packed layers is
    computed in the first.
    """
    tied = _is_tied(network)
    _replace_children(network, packs=can_pack(network))
    if tied and isinstance(head := cast("Any", network).get_output_embeddings(), PackedLinear):
        head.tied = True
    if packed_layers(network):
        network.requires_grad_(False)  # packed weights cannot be trained, so no other should seem to be
    return network


def _replace_children(module: nn.Module, *, packs: bool) -> None:
    from transformers.activations import NewGELUActivation
    from transformers.pytorch_utils import Conv1D

    for name, child in list(module.named_children()):
        if name.startswith("lora_"):  # small matrices of an adapter, whose weights peft reads
            continue
        if type(child) is NewGELUActivation:
            setattr(module, name, nn.GELU(approximate="tanh"))
        elif packs and type(child) is nn.Linear and _gains(child.weight):
            setattr(module, name, PackedLinear(child.weight, child.bias))
        elif packs and type(child) is Conv1D and _gains((layer := cast("Any", child)).weight):
            setattr(module, name, PackedLinear(layer.weight.t(), layer.bias, transposed=True))
        else:
            _replace_children(child, packs=packs)
    if packs:
        _join_activation(module)


def _join_activation(module: nn.Module) -> None:
    """Where ``module`` is two packed layers with a GELU between them, compute it in the first, if the module then computes the same.

    Whether it does is tried; and that it would not if there were no GELU, else the trial says nothing.
    """
    layers = [m for m in module.children() if isinstance(m, PackedLinear)]
    activations = [(name, gelu) for name, m in module.named_children() if (gelu := _gelu_of(m)) is not None]
    if len(layers) != 2 or len(activations) != 1 or layers[0].out_features != layers[1].in_features:
        return
    (first, _), ((name, gelu),) = layers, activations
    if module.training or not kernels.has_packed_gelu(first.dtype, gelu):
        return
    x = torch.sin(torch.arange(3 * first.in_features, dtype=torch.float32)).view(1, 3, -1).to(first.dtype)
    same = False
    try:
        with torch.no_grad():
            before = cast("Tensor", module(x))
            first.take_activation(module, name)
            joined = cast("Tensor", module(x))
            first.gelu = None
            without = cast("Tensor", module(x))
            first.gelu = gelu
        near = 8 * torch.finfo(first.dtype).eps * float(before.abs().max())
        same = float((joined - before).abs().max()) <= near < 0.25 * float((without - before).abs().max())
    except Exception:  # its code may raise anything where it takes or gives something else
        log.debug("no activation is joined in a %s", type(module).__name__, exc_info=True)
    if first.activation is not None and not same:
        first.return_activation(module)


def _gelu_of(module: nn.Module) -> str | None:
    """Which GELU a module computes, as PyTorch's ``approximate`` has it; None: none, or hooks would miss it."""
    from transformers.activations import GELUActivation, GELUTanh

    if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
        return None
    if type(module) is nn.GELU:
        return module.approximate
    return "tanh" if type(module) is GELUTanh else "none" if type(module) is GELUActivation else None


def _gains(weight: Tensor) -> bool:
    return kernels.has_packed_linear(weight.dtype) and weight.numel() >= MIN_WEIGHTS[weight.dtype]


def unpack(network: nn.Module) -> None:
    """Give every packed layer of ``network`` its plain weights back, in place; a head that is tied to the embeddings is tied again."""
    from transformers import PreTrainedModel

    head = network.get_output_embeddings() if isinstance(network, PreTrainedModel) else None
    _unpack_children(network)
    if isinstance(head, PackedLinear) and head.tied:
        whole = cast("Any", network)
        whole.get_output_embeddings().weight = whole.get_input_embeddings().weight


def _is_tied(network: nn.Module) -> bool:
    """Is the head one matrix with the embeddings? (A checkpoint may have a head of its own, whatever its config says.)"""
    from transformers import PreTrainedModel

    if not isinstance(network, PreTrainedModel):
        return False
    head, embeddings = network.get_output_embeddings(), network.get_input_embeddings()
    return isinstance(head, nn.Linear) and head.weight is getattr(embeddings, "weight", None)


def _unpack_children(network: nn.Module) -> None:
    for name, child in list(network.named_children()):
        if isinstance(child, PackedLinear):
            if child.activation is not None:
                child.return_activation(network)
            plain = nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(child.packed.to_dense(), requires_grad=False)
            plain.register_parameter("bias", cast("nn.Parameter | None", child.bias))
            setattr(network, name, plain)
        else:
            _unpack_children(child)


def packed_layers(network: nn.Module) -> list[PackedLinear]:
    """The layers of ``network`` whose weights are no parameters any more."""
    return [m for m in network.modules() if isinstance(m, PackedLinear)]
