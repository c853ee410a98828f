"""Networks of one shape read in one forward pass: each row with the weights of its network.

A tuned guide and its untuned start are small networks of the same class and sizes that read the same text at every token. For few rows
most of such a pass is not products but Python and small operations. Here one pass holds the rows of both: what has no weights (attention,
rotary factors, activations, masks, the cache) is done once for all of them, what has weights is done for the rows of each network by that
network's own modules. No weight is held twice; small matrices are moved side by side.

Which networks agree: :func:`find_difference`; whether it works is tried (``models.shared_passes``). Must not depend on caches or rows.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from ivg.errors import ModelError
from ivg.models.attention import own_implementation
from ivg.models.packed_linear import PackedLinear
from ivg.models.row_weights import RowWeights
from ivg.models.support import body_of

MAX_BATCHED_WEIGHTS = 1 << 18
"""Plain matrices up to this size are multiplied in one batched product where all networks have equally many rows: half the time."""
MAX_TOKENS = 64
"""Of a pass. Beyond, most of the time is products, which gain nothing, and joining the outputs costs more than is saved (dev/LOG.md)."""
_WITHOUT_EFFECT = frozenset((
    "_name_or_path", "name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "return_dict",
    "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop",
    "attn_pdrop", "pretraining_tp", "task_specific_params", "ivg_tokenizer",
))  # fmt: skip
"""Settings that do not change what a network computes from given ids and positions in inference; all others must be equal."""


class StackedNetworks(RowWeights):
    """Other networks whose rows share the passes of ``network``, while :meth:`using` is open. Those that are in it must not be changed.

    Args:
        network: plain, of transformers.
    """

    max_tokens = MAX_TOKENS

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self._networks: dict[str | None, nn.Module] = {None: network}
        self._modules = {name: _of_kind(self, module) for name, module in _with_weights(network)}

    def add(self, network: nn.Module) -> str:
        """Let rows read with ``network``, which agrees (:func:`find_difference`), under the name that is returned."""
        name = f"network{len(self._networks):03}"  # in the order of ``row_order``
        self._networks[name] = network
        for place, module in _with_weights(network):
            self._modules[place].add(name, module)
        return name

    def remove(self, name: str) -> None:
        """Rows do not read with the network of that name any more; it was added last. Without another the modules are as they were."""
        del self._networks[name]
        for module in self._modules.values():
            module.remove(name)
            if len(self._networks) == 1:
                del module.own.forward

    @property
    def modules(self) -> list[nn.Module]:
        """Those of ``network`` that read each row with the weights of its network."""
        return [stacked.own for stacked in self._modules.values()]

    @contextmanager
    @override
    def using(self, weights: Sequence[str | None]) -> Iterator[None]:
        with super().using(weights):
            parts = self.parts or ()
            self._thread.even = len(parts) == len(self._networks) and len({end - first for _, first, end in parts}) == 1
            yield

    @property
    def even(self) -> bool:
        """Has the pass that this thread runs rows of all networks, equally many of each?"""
        return bool(self._thread.even)

    @override
    def network_of(self, weights: str | None) -> nn.Module:
        return self._networks[weights]


class _StackedModule:
    """A module of the first network whose forward method does the rows of each network by that network's module.

    Args:
        stack: says which rows are whose.
        module: of the first network, changed in place.
    """

    def __init__(self, stack: StackedNetworks, module: nn.Module) -> None:
        self.stack, self.own, self._plain = stack, module, cast("Callable[..., Tensor]", module.forward)
        self.of: dict[str | None, Callable[..., Tensor]] = {None: self._plain}
        module.forward = self.forward

    def add(self, name: str, module: nn.Module) -> None:
        """Do the rows of the network ``name`` by ``module``."""
        self.of[name] = module

    def remove(self, name: str) -> None:
        """Undo :meth:`add`."""
        del self.of[name]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The output of all rows."""
        parts = self.stack.parts
        if parts is None:
            return self._plain(*args, **kwargs)
        (x,) = args
        if len(parts) == 1:
            return self.of[parts[0].weights](x)
        if x.shape[0] != parts[-1].end:
            raise ModelError(
                f"a {type(self.own).__name__} got {list(x.shape)} where the batch has {parts[-1].end} rows\n"
                "  expected [rows, …]; load the models so that their networks differ in shape"
            )
        return self.together(x)

    def together(self, x: Tensor) -> Tensor:
        """The output of rows of several networks."""
        return torch.cat([self.of[name](x[first:end]) for name, first, end in self.stack.parts or ()])


class _StackedLinear(_StackedModule):
    """Small plain matrices lie side by side, so that rows of all networks, equally many of each, are one batched product."""

    def __init__(self, stack: StackedNetworks, module: nn.Module) -> None:
        super().__init__(stack, module)
        self._layers = [module]
        self._weights = torch.empty(0)
        """[networks, inputs, outputs]."""
        self._biases: Tensor | None = None
        """[networks, 1, outputs]."""
        self._transposed = type(module) is nn.Linear

    @override
    def add(self, name: str, module: nn.Module) -> None:
        super().add(name, module)
        self._layers.append(module)
        self._stack()

    @override
    def remove(self, name: str) -> None:
        super().remove(name)
        layer: Any = self._layers.pop()
        layer.weight.data = layer.weight.data.clone()  # else it holds the memory of all
        self._stack()

    def _stack(self) -> None:
        layers = cast("Any", self._layers)
        weights = torch.stack([layer.weight.data for layer in layers])
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.data = weight
        self._weights = weights.transpose(1, 2) if self._transposed else weights
        if layers[0].bias is not None:
            self._biases = torch.stack([layer.bias.data for layer in layers])[:, None]

    @override
    def together(self, x: Tensor) -> Tensor:
        if not self.stack.even:
            return super().together(x)
        *where, size = x.shape
        flat = x.reshape(len(self._layers), -1, size)
        out = torch.bmm(flat, self._weights) if self._biases is None else torch.baddbmm(self._biases, flat, self._weights)
        return out.view(*where, -1)


class _StackedNorm(_StackedModule):
    """A norm whose last step multiplies by its weights, number by number: done once for all rows, each with its network's weights."""

    def __init__(self, stack: StackedNetworks, module: nn.Module) -> None:
        super().__init__(stack, module)
        self._norms: dict[str | None, nn.Module] = {None: module}
        self._rowwise = copy.copy(module)
        self._rowwise._parameters = {}
        self._rowwise.__dict__.pop("forward", None)
        self._forward = type(module).forward
        self._known: tuple[Any, int] | None = None
        """Of which rows, and of how many dimensions, the weights of ``_rowwise`` are."""

    @override
    def add(self, name: str, module: nn.Module) -> None:
        super().add(name, module)
        self._norms[name] = module

    @override
    def remove(self, name: str) -> None:
        super().remove(name)
        del self._norms[name]
        self._known = None

    @override
    def together(self, x: Tensor) -> Tensor:
        if self._known != (self.stack.parts, x.dim()):
            self._known = self.stack.parts, x.dim()
            shape = [1] * (x.dim() - 1)
            weights = [
                cast("Tensor", self._norms[name].weight).view(*shape, -1).expand(end - first, *shape[1:], -1)
                for name, first, end in self.stack.parts or ()
            ]
            self._rowwise.__dict__["weight"] = torch.cat(weights)
        return cast("Tensor", self._forward(self._rowwise, x))


def _of_kind(stack: StackedNetworks, module: nn.Module) -> _StackedModule:
    from transformers.pytorch_utils import Conv1D

    if type(module) in (nn.Linear, Conv1D) and cast("Tensor", module.weight).numel() <= MAX_BATCHED_WEIGHTS:
        return _StackedLinear(stack, module)
    return _StackedNorm(stack, module) if _is_scale(module) else _StackedModule(stack, module)


def _with_weights(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that have weights themselves, by their places."""
    for name, module in network.named_modules():
        if isinstance(module, PackedLinear) or next(module.parameters(recurse=False), None) is not None:
            yield name, module


def _reads_rows(module: nn.Module) -> bool:
    """Does it read each row of its one input by itself, by what its type says?"""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Embedding):  # OPT's table of positions is one, too, and takes more
        return len(inspect.signature(type(module).forward).parameters) == 2  # self and the ids
    return type(module) in (nn.Linear, PackedLinear, Conv1D, nn.LayerNorm) or _has_only_scale(module)


def _has_only_scale(module: nn.Module) -> bool:
    """Is it one of transformers' norms, with one weight for each number?"""
    weights = [(name, parameter.dim()) for name, parameter in module.named_parameters()]
    return type(module).__name__.endswith("RMSNorm") and weights == [("weight", 1)] and not any(module.children())


@torch.no_grad()
def _is_scale(module: nn.Module) -> bool:
    """Does it give the same numbers when the weights of each row are given by themselves? It is tried."""
    if not _has_only_scale(module):
        return False
    weight = cast("Tensor", module.weight)
    x = torch.sin(torch.arange(6 * len(weight), dtype=torch.float32, device=weight.device)).view(3, 2, -1).to(weight.dtype)
    rowwise = copy.copy(module)
    rowwise._parameters = {}
    rowwise.__dict__["weight"] = torch.stack([weight, 2 * weight, weight])[:, None]
    try:
        got, plain = type(module).forward(rowwise, x), module(x)
        other = copy.copy(module)
        other._parameters = {"weight": nn.Parameter(2 * weight, requires_grad=False)}
        return torch.equal(got[::2], plain[::2]) and torch.equal(got[1], other(x[1:2])[0])
    except Exception:  # its code may raise anything where the weights have another shape
        return False


def find_difference(first: nn.Module, second: nn.Module) -> str | None:
    """Why rows of the two networks cannot share a pass, as far as their settings and modules tell; None: nothing stands against it.

    Two that agree are of one class of transformers and equal in every setting that counts, every module and every tensor's shape, dtype
    and device, and each module with weights is of a type that reads row by row.
    """
    if first is second:
        return "they are one network"
    if type(first) is not type(second) or not type(body_of(first)).__module__.startswith("transformers."):
        return "they are not of one class of transformers"
    configs = [cast("Any", network).config for network in (first, second)]
    settings = [config.to_dict() for config in configs]
    for name in sorted(settings[0].keys() | settings[1].keys()):
        if name not in _WITHOUT_EFFECT and settings[0].get(name) != settings[1].get(name):
            return f"{name} is {settings[0].get(name)!r} in one, {settings[1].get(name)!r} in the other"
    if own_implementation(configs[0].get_text_config()) != own_implementation(configs[1].get_text_config()):
        return "they compute attention otherwise"
    modules = [list(network.named_modules()) for network in (first, second)]
    if [(name, type(module)) for name, module in modules[0]] != [(name, type(module)) for name, module in modules[1]]:
        return "their modules differ"
    if any(hasattr(module, "_hf_hook") for _, module in (*modules[0], *modules[1])):
        return "accelerate moves their inputs"
    return _tensor_difference(first, second) or _module_difference(modules)


def _tensor_difference(first: nn.Module, second: nn.Module) -> str | None:
    tensors = [dict(network.named_parameters(remove_duplicate=False)) for network in (first, second)]
    places = {(t.device, t.dtype) for t in (*tensors[0].values(), *tensors[1].values())}
    if len(places) > 1 or [(n, t.shape) for n, t in tensors[0].items()] != [(n, t.shape) for n, t in tensors[1].items()]:
        return "their weights differ in shape, dtype or device"
    buffers = [dict(network.named_buffers()) for network in (first, second)]
    same = buffers[0].keys() == buffers[1].keys() and all(
        t.layout is torch.strided and t.shape == (other := buffers[1][n]).shape and torch.equal(t, other) for n, t in buffers[0].items()
    )
    return None if same else "their constants differ"


def _module_difference(modules: Sequence[Sequence[tuple[str, nn.Module]]]) -> str | None:
    for (_, module), (_, other) in zip(*modules, strict=True):
        if isinstance(module, PackedLinear):
            one, two = ((m.in_features, m.out_features, m.dtype, m.bias is None) for m in cast("Any", (module, other)))
            if one != two:
                return "their weights differ in shape or dtype"
        elif next(module.parameters(recurse=False), None) is not None and not _reads_rows(module):
            return f"a {type(module).__name__} may not read row by row"
        if "forward" in other.__dict__ or not isinstance(getattr(module.forward, "__self__", None), (type(module), _StackedModule)):
            return f"a {type(module).__name__} was given another forward method"
    return None
