"""LoRA adapters of submodels: what an adapter changes is added behind vLLM's own linear layers, whose weights stay as they are.

vLLM fuses layers (``qkv_proj`` of ``q_proj``, ``k_proj``, ``v_proj``), and some networks store their rows in another order than
transformers does. So each layer is compared with the checkpoint's before an adapter is added to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

from ivg.errors import ConfigError
from ivg.models.plain_lora import LoraChange

_ROWS = 256
_ADVICE = "give the merged model, or use the transformers engine"


class Target(NamedTuple):
    """Where the change of one of transformers' layers belongs: in ``layer`` of vLLM's network, to the outputs ``first`` to ``last``."""

    layer: str
    first: int
    last: int


class AdaptedLinear(nn.Module):
    """``base(x)``, plus the changes of an adapter. Shows no weight of its own: a network that asks for one would pass the adapter by.

    Args:
        base: vLLM's layer; others may use it, too.
        changes: (target, change) of each layer that is fused in it.
    """

    requires_unquantized_input = True  # vLLM: no fused quantization of the input

    def __init__(self, base: LinearBase, changes: Iterable[tuple[Target, LoraChange]]) -> None:
        super().__init__()
        changes = sorted(changes, key=lambda change: change[0])
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.base = base
        self.down = nn.Parameter(torch.cat([change.down for _, change in changes]).to(**like), requires_grad=False)
        self.ups = nn.ParameterList([nn.Parameter(change.up.to(**like), requires_grad=False) for _, change in changes])
        self.columns = [(target.first, target.last) for target, _ in changes]
        self.ranks = [len(change.down) for _, change in changes]

    def forward(self, x: Tensor) -> Any:
        """As the base's: outputs, or (outputs, bias that is to be added later)."""
        found = self.base(x)
        out = found[0] if isinstance(found, tuple) else found
        for (first, last), low, up in zip(self.columns, F.linear(x, self.down).split(self.ranks, -1), self.ups, strict=True):
            out[..., first:last] += F.linear(low, up)
        return (out, *found[1:]) if isinstance(found, tuple) else out


def find_targets(network: nn.Module, modules: Iterable[str], what: str) -> dict[str, Target]:
    """Where each of transformers' layers is in vLLM's ``network``.

    Args:
        network: of vLLM.
        modules: names in transformers' network.
        what: the submodel, for errors.

    Raises:
        ConfigError: a layer that is not there, or no plain linear layer.
    """
    composite: Any = network
    mapper = composite.hf_to_vllm_mapper if hasattr(network, "hf_to_vllm_mapper") else None
    renames = mapper.get_rename_mapper() if mapper is not None else None
    fused = {part: (whole, i) for whole, parts in _packed(network).items() for i, part in enumerate(parts) if len(parts) > 1}
    layers: dict[str, Any] = dict(network.named_modules(remove_duplicate=False))
    out = {}
    for module in modules:
        place = (renames.map_name(f"{module}.weight") or "").removesuffix(".weight") if renames is not None else module
        parent, _, own = place.rpartition(".")
        index: int | None = None
        if place not in layers and own in fused:
            own, index = fused[own]
            place = f"{parent}.{own}"
        layer = layers.get(place)
        if not isinstance(layer, LinearBase) or not isinstance(layer.quant_method, UnquantizedLinearMethod):
            got = "no layer of that name" if layer is None else f"a {type(layer).__name__}"
            raise ConfigError(f"the adapter of {what} changes {module}; vLLM has {got} there, not a plain linear layer\n  {_ADVICE}")
        sizes = [int(layer.output_size)] if index is None else [int(size) for size in layer.output_sizes]  # type: ignore[attr-defined]
        first = sum(sizes[: index or 0])
        out[module] = Target(place, first, first + sizes[index or 0])
    return out


def add_adapter(network: nn.Module, targets: Mapping[str, Target], changes: Mapping[str, LoraChange], what: str) -> set[str]:
    """Replace the layers that an adapter changes; names of the adapter's parameters. Containers of these layers must be the network's own.

    Raises:
        ConfigError: a matrix that does not fit its layer.
    """
    by_layer: dict[str, list[tuple[Target, LoraChange]]] = {}
    layers: dict[str, Any] = dict(network.named_modules(remove_duplicate=False))
    for module, change in changes.items():
        target = targets[module]
        shape = [target.last - target.first, layers[target.layer].input_size]
        if (got := [len(change.up), change.down.shape[1]]) != shape:
            raise ConfigError(
                f"the adapter of {what} changes {module} as one of {got[0]} x {got[1]}, in vLLM it has {shape[0]} x {shape[1]}\n  {_ADVICE}"
            )
        by_layer.setdefault(target.layer, []).append((target, change))
    added = set()
    for name, found in by_layer.items():
        adapted = AdaptedLinear(layers[name], found)
        for place in same_module(layers, name):
            parent, _, own = place.rpartition(".")
            layers[parent].register_module(own, adapted)
            added |= {f"{place}.{parameter}" for parameter, _ in adapted.named_parameters() if not parameter.startswith("base.")}
    return added


def same_module(layers: Mapping[str, nn.Module], name: str) -> list[str]:
    """All names of the module that is called ``name``."""
    return [other for other, layer in layers.items() if layer is layers[name]]


class LayerCheck:
    """Compares loaded layers with the checkpoint's, by products with one random vector: row for row and column for column.

    Args:
        modules: names in transformers' network.
        dtype: in which vLLM keeps the weights.
    """

    def __init__(self, modules: Iterable[str], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._expected: dict[str, list[Tensor]] = {module: [] for module in modules}

    def watch(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """``weights``, of which those of the modules are noted; checkpoints may name them with a shorter or longer path."""
        for name, tensor in weights:
            own = name.removesuffix(".weight")
            for module, products in self._expected.items():
                if own != name and (own == module or module.endswith(f".{own}") or own.endswith(f".{module}")) and tensor.ndim == 2:
                    products += _products(tensor, self.dtype)  # some networks store the transpose
            yield name, tensor

    def require_same(self, network: nn.Module, targets: Mapping[str, Target], what: str) -> None:
        """Raise where a layer's rows are not those of the checkpoint.

        Raises:
            ConfigError: names the layer.
        """
        for module, (layer, first, last) in targets.items():
            weight: Any = network.get_submodule(layer).weight
            got, _ = _products(weight[first:last].detach(), self.dtype)
            if not any(_close(got, expected) for expected in self._expected[module]):
                raise ConfigError(
                    f"the adapter of {what} changes {module}, whose weights vLLM keeps in another order than the checkpoint\n  {_ADVICE}"
                )


def _products(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(matrix @ v, matrix.T @ v), read in ``dtype``; a few rows at a time, since copies of whole layers would stay in the process."""
    rows, columns = (_vector(size) for size in matrix.shape)
    straight, transposed = [], torch.zeros_like(columns)
    for block, part in zip(matrix.split(_ROWS), rows.split(_ROWS), strict=True):
        few = block.to(dtype).float().cpu()
        straight.append(few @ columns)
        transposed += part @ few
    return torch.cat(straight), transposed


def _close(got: Tensor, expected: Tensor) -> bool:
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def _vector(size: int) -> Tensor:
    with torch.device("cpu"):
        return torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float32)


def _packed(network: nn.Module) -> Mapping[str, list[str]]:
    """The fused layers of vLLM's network, each with the names of its parts."""
    composite: Any = network
    return dict(composite.packed_modules_mapping) if hasattr(network, "packed_modules_mapping") else {}
