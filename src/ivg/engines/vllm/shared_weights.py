"""Several submodels of one network, with adapters or without: one set of weights, attention and keys and values of their own.

vLLM finds the keys and values of an attention layer by its name, so a second submodel needs attention layers of its own. All other
modules of it are the first one's. Modules are shared, not parameters: vLLM packs or transposes weights in place, once for each module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import maybe_prefix

from ivg.engines.vllm.adapters import LayerCheck, Target, add_adapter, find_targets, same_module
from ivg.engines.vllm.config import Submodel
from ivg.engines.vllm.submodels import build_submodel
from ivg.errors import ConfigError
from ivg.models.plain_lora import LoraChange, lora_digest, read_plain_lora

_ADVICE = "give the merged model, or use the transformers engine"


class _WithoutWeights(TorchFunctionMode):
    """Tensors that are made without contents, as vLLM makes weights, take no memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"} | {"device": "meta"}
        return func(*args, **kwargs)


class SharedNetwork:
    """The submodels of one network.

    Args:
        parts: they differ in their adapters; the first is the one that loads the weights.
        vllm_config: the engine's.
        prefix: of the composite's layers.

    Raises:
        ConfigError: an adapter or a network that vLLM cannot do this with.
        ModelError: an adapter that cannot be read.

    Attributes:
        modules: vLLM's networks by the submodels' names.
    """

    def __init__(self, parts: Sequence[Submodel], vllm_config: VllmConfig, prefix: str) -> None:
        self.parts, first = list(parts), parts[0]
        self._changes = {part.name: _changes(part) for part in parts if part.adapter is not None}
        owner = build_submodel(first, vllm_config, prefix)
        self.modules = {first.name: owner}
        self._targets: dict[str, Target] = {}
        if self._changes:
            what = next(iter(self._changes))
            if (size := vllm_config.parallel_config.tensor_parallel_size) > 1:
                raise ConfigError(f"{what} has an adapter, and tensor_parallel_size is {size}\n  {_ADVICE}")
            check_can_share(owner, vllm_config, what)
            for name, changes in self._changes.items():
                self._targets |= find_targets(owner, changes, name)
        layers = {target.layer for target in self._targets.values()}
        for part in parts[1:]:
            self.modules[part.name] = build_sharing(lambda part=part: build_submodel(part, vllm_config, prefix), owner, layers)  # type: ignore[misc]
            repoint_layers(vllm_config, maybe_prefix(prefix, first.name), maybe_prefix(prefix, part.name))
        self._check = LayerCheck(self._targets, vllm_config.model_config.dtype)

    def watch(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The weights that the network loads; what adapters need to know of them is noted."""
        return self._check.watch(weights)

    def add_adapters(self) -> set[str]:
        """Once the weights are loaded: names of the adapters' parameters in the composite."""
        added = set()
        if self._changes:
            self._check.require_same(self.modules[self.parts[0].name], self._targets, next(iter(self._changes)))
        for name, changes in self._changes.items():
            added |= {f"{name}.{parameter}" for parameter in add_adapter(self.modules[name], self._targets, changes, name)}
        self._changes = {}
        return added


def by_network(parts: Iterable[Submodel]) -> list[list[Submodel]]:
    """Submodels with one set of weights together."""
    found: dict[tuple[str, ...], list[Submodel]] = {}
    for part in parts:
        found.setdefault(part.network, []).append(part)
    return list(found.values())


def _changes(part: Submodel) -> dict[str, LoraChange]:
    folder = Path(str(part.adapter))
    changes = read_plain_lora(folder, part.name, part.scale)
    if part.adapter_digest and lora_digest(folder) != part.adapter_digest:
        raise ConfigError(f"the adapter of {part.name} in {str(folder)!r} has changed since this composite was exported\n  export it again")
    return changes


def check_can_share(network: nn.Module, vllm_config: VllmConfig, what: str) -> None:
    """Raise for a network that cannot be read with and without an adapter.

    Raises:
        ConfigError: it keeps more than keys and values, or its weights are elsewhere than its modules say.
    """
    for layer in network.modules():
        if isinstance(layer, AttentionLayerBase) and (not isinstance(layer, Attention) or layer.has_sink):
            kind = "attention with sinks" if isinstance(layer, Attention) else type(layer).__name__
            raise ConfigError(f"{what} has an adapter, and its network has {kind}, which submodels cannot share in vLLM\n  {_ADVICE}")
    offload: Any = vllm_config.offload_config
    if offload.uva.cpu_offload_gb or offload.prefetch.offload_group_size:
        raise ConfigError(f"{what} has an adapter, and vLLM is to offload weights to the CPU: not both\n  leave the offloading out")


def build_sharing(build: Callable[[], nn.Module], owner: nn.Module, layers: Iterable[str]) -> nn.Module:
    """A second submodel with the weights of ``owner``; at no time are there two sets.

    Args:
        build: makes it.
        owner: the first submodel of the network, before adapters are added.
        layers: that adapters of any of its submodels change; what contains them is not shared.

    Raises:
        ConfigError: weights that are not part of any module.
    """
    with _WithoutWeights():
        network = build()
    modules = dict(owner.named_modules(remove_duplicate=False))
    apart = {name for layer in layers for place in same_module(modules, layer) for name in _above(place)}
    for name, module in modules.items():
        if isinstance(module, AttentionLayerBase):
            apart |= {*_above(name), name}
    _share(network, owner, apart, "")
    if left := [name for name, tensor in (*network.named_parameters(), *network.named_buffers()) if tensor.is_meta]:
        raise ConfigError(f"two submodels cannot share {left[0]} of {type(network).__name__} in vLLM\n  {_ADVICE}")
    return network


def repoint_layers(vllm_config: VllmConfig, owner: str, other: str) -> None:
    """Layers that vLLM finds by name in a pass, such as experts, and that ``other`` shares with ``owner``: to the one that is there."""
    known: dict[str, Any] = vllm_config.compilation_config.static_forward_context
    for name, layer in list(known.items()):
        if name.startswith(f"{other}.") and not isinstance(layer, AttentionLayerBase):
            known[name] = known[f"{owner}.{name.removeprefix(f'{other}.')}"]


def _share(network: nn.Module, owner: nn.Module, apart: set[str], path: str) -> None:
    """Put the owner's modules and parameters into ``network``, except modules that are kept ``apart``."""
    for name, child in owner._modules.items():
        place = f"{path}.{name}" if path else name
        if child is None or isinstance(child, AttentionLayerBase):
            continue
        if place in apart:
            _share(network.get_submodule(name), child, apart, place)
        else:
            network.register_module(name, child)
    held: Mapping[str, Any] = dict(owner._parameters)
    for name, parameter in held.items():
        network.register_parameter(name, parameter)
    for name, buffer in owner._buffers.items():
        network._buffers[name] = buffer


def _above(name: str) -> list[str]:
    """Names of all modules that contain ``name``."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
