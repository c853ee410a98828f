"""Devices that this machine does not have: tensors that say they lie on one, compute on the CPU, and refuse to meet those of another.

Within :func:`fake_devices`, ``.to("fake:0")``, ``torch.zeros(…, device="fake:1")`` and the like make such tensors. As on a GPU, an
operation on tensors of two devices raises, but for a number (a CPU tensor without axes) and indices that lie on the CPU; a copy is counted.
The device type stays known to PyTorch for the rest of the process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

TYPE = "fake"
"""The type of these devices."""
_aten = torch.ops.aten
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
_COPIES = {_aten._to_copy.default, _aten.copy_.default}


class Placed(torch.Tensor):
    """``inner``, said to lie on ``where``."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls: Any, inner: torch.Tensor, where: torch.device) -> Any:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=where
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Placed({self.inner}, {self.device})"

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, Counter())


class _Mode(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.copies: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.copies)


def _run(func: Any, args: Any, kwargs: dict[str, Any], copies: Counter[str]) -> Any:
    asked = kwargs.get("device")
    asked = None if asked is None else _canonical(torch.device(asked))
    flat, spec = tree_flatten((args, kwargs))
    tensors = [t for t in flat if isinstance(t, torch.Tensor)]
    where = {t.device for t in tensors if t.dim() or isinstance(t, Placed)}
    if func in _INDEXED:
        values = [v for v in args[2:3] if isinstance(v, torch.Tensor) and v.dim()]
        where = {args[0].device} | {t.device for t in tensors[1:] if isinstance(t, Placed)} | {v.device for v in values}
    if func in _COPIES:
        source = tensors[-1].device
        target = tensors[0].device if func is _aten.copy_.default else (asked or source)
        if source != target:
            copies[f"{source} -> {target}"] += 1
        where = {target}
    elif len(where) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {sorted(map(str, where))} in {func}")
    device = asked or next(iter(where), torch.device("cpu"))
    if asked is not None and asked.type == TYPE:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        flat, spec = tree_flatten((args, kwargs))
    plain_args, plain_kwargs = tree_unflatten([t.inner if isinstance(t, Placed) else t for t in flat], spec)
    written = {id(t.inner): t for t in tensors if isinstance(t, Placed)}

    def wrap(t: Any) -> Any:
        if not isinstance(t, torch.Tensor) or isinstance(t, Placed):
            return t
        if id(t) in written:
            return written[id(t)]
        return Placed(t, device) if device.type == TYPE else t

    if func is _aten.histc.default and not plain_args[0].is_floating_point():  # experts are counted so; a CPU cannot
        return wrap(func(plain_args[0].float(), *plain_args[1:], **plain_kwargs).to(plain_args[0].dtype))
    with torch._C.DisableTorchFunctionSubclass():
        out = func(*plain_args, **plain_kwargs)
    return tree_map(wrap, out)


def _canonical(device: torch.device) -> torch.device:
    return torch.device(TYPE, 0) if device.type == TYPE and device.index is None else device


@contextmanager
def fake_devices() -> Iterator[Counter[str]]:
    """Within, devices ``fake:N`` can be used; yields how often tensors were copied from one device to another."""
    if not hasattr(torch, TYPE):
        _setup_privateuseone_for_python_backend(TYPE)
    mode, before = _Mode(), torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]  # torch.tensor(…, device=…): on the CPU, then a copy
    try:
        with mode:
            yield mode.copies
    finally:
        torch._C._set_only_lift_cpu_tensors(before)  # type: ignore[attr-defined]
