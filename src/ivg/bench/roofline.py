"""The roofline of a run: the time that its matrix products alone need on this machine (Williams et al. 2009, DOI 10.1145/1498765.1498785).

The products of linear layers are counted in a run of its own, so that counting slows no measurement. Each size is then timed with random
matrices, in the fastest of the forms that PyTorch has for it. Attention, activations, norms, sampling and all bookkeeping are left out:
a run at its roofline does nothing but read weights and multiply.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ivg.models import kernels
from ivg.models.packed_linear import PackedLinear

_CACHE = 64 * 2**20
"""Bytes of weights that a timing goes through, so that they come from memory, as those of a network's layers do."""
_REPETITIONS = 3
_SIZES = 6
"""Numbers of rows that are timed for each matrix; the time of others is interpolated."""
_TIMED_CALLS = 16
"""Products in one timing, at most."""


_Multiply = Callable[[Tensor, Tensor], Tensor]


class Product(NamedTuple):
    """``rows`` vectors through a matrix of ``inputs`` x ``outputs``."""

    rows: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.inputs * self.outputs


@contextmanager
def count_products(networks: Iterable[nn.Module]) -> Iterator[Counter[Product]]:
    """Count the products of all linear layers of ``networks`` while the context is open.

    A layer that does the rows of several networks (:mod:`ivg.models.stacked`) calls those of the others: the outer one alone counts.
    """
    from transformers.pytorch_utils import Conv1D

    found: Counter[Product] = Counter()
    running: list[Any] = []

    def begin(layer: Any, given: tuple[Any, ...]) -> None:
        running.append(layer)

    def count(layer: Any, given: tuple[Any, ...], out: Tensor | None) -> None:
        running.pop()
        if not running and out is not None:  # None: it raised an error
            found[Product(out.numel() // out.shape[-1], given[0].shape[-1], out.shape[-1])] += 1

    layers = {id(m): m for network in networks for m in network.modules() if isinstance(m, nn.Linear | PackedLinear | Conv1D)}
    handles = [layer.register_forward_pre_hook(begin) for layer in layers.values()]
    handles += [layer.register_forward_hook(count, always_call=True) for layer in layers.values()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def seconds(products: Mapping[Product, int], dtype: torch.dtype, device: torch.device) -> float:
    """Seconds that ``products`` (how often each occurs) take here and now, one after the other."""
    by_matrix: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)
    for product, times in products.items():
        by_matrix[product.inputs, product.outputs][product.rows] = times
    total = 0.0
    for (inputs, outputs), rows in by_matrix.items():
        timed = _spread(sorted(rows))
        each = _time_matrix(inputs, outputs, timed, dtype, device)
        total += sum(times * float(np.interp(n, timed, each)) for n, times in rows.items())
    return total


def _spread(sizes: list[int]) -> list[int]:
    """At most :data:`_SIZES` of the sorted ``sizes``, the first and the last among them."""
    places = np.linspace(0, len(sizes) - 1, min(_SIZES, len(sizes)))
    return [sizes[round(i)] for i in places]


def _time_matrix(inputs: int, outputs: int, rows: list[int], dtype: torch.dtype, device: torch.device) -> list[float]:
    """Seconds of a product with each number of rows, in the fastest form."""
    copies = max(2, min(_TIMED_CALLS, _CACHE // (inputs * outputs * dtype.itemsize)))
    weights = [torch.randn(outputs, inputs, device=device).to(dtype) for _ in range(copies)]
    best = [float("inf")] * len(rows)
    for multiply, stored in _forms(weights, dtype, device):
        for i, n in enumerate(rows):
            best[i] = min(best[i], _time(multiply, torch.randn(n, inputs, device=device).to(dtype), stored))
    return best


def _forms(weights: list[Tensor], dtype: torch.dtype, device: torch.device) -> Iterator[tuple[_Multiply, list[Tensor]]]:
    yield nn.functional.linear, weights
    if device.type == "cpu" and kernels.has_packed_linear(dtype):
        yield _packed, [kernels.pack_weight(w) for w in weights]


def _packed(x: Tensor, weight: Tensor) -> Tensor:
    return kernels.packed_linear(x, weight, None)


def _time(multiply: _Multiply, x: Tensor, weights: list[Tensor]) -> float:
    """Seconds of one product: the fastest of a few passes through all weights."""
    found = []
    for _ in range(_REPETITIONS + 1):  # the first warms up
        _wait(x)
        start = time.perf_counter()
        for weight in weights:
            multiply(x, weight)
        _wait(x)
        found.append((time.perf_counter() - start) / len(weights))
    return min(found[1:])


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
