"""Tensors whose untouched pages take no memory, and whose pages can be returned to the operating system (CPUs, Linux).

Must not depend on what the tensors hold.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

MAPPED_BYTES = 1 << 16
"""Tensors of at least this size are mapped."""
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None  # MADV_DONTNEED is a mere hint elsewhere


def zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """Zeros with the dtype and device of ``like``. On a CPU, pages that are not touched take no memory.

    Mapped directly: PyTorch's allocator would hand out memory that was freed before, and would have to clear it.
    """
    size = math.prod(shape) * like.element_size()
    with torch.inference_mode(False):  # else it could not be written outside of that mode
        if like.device.type != "cpu" or size < MAPPED_BYTES:
            return torch.zeros(*shape, dtype=like.dtype, device=like.device)
        return torch.frombuffer(_mapped(size), dtype=like.dtype).view(*shape)


def return_pages(tensor: Tensor, spans: Sequence[tuple[int, int]], unit: int) -> None:
    """Return the whole pages within ``spans`` of a tensor that :func:`zeros` made; they read as zeros from then on.

    Args:
        tensor: nothing happens where it is not mapped.
        spans: (first, end), in order, in units of ``unit`` bytes.
        unit: bytes.
    """
    if tensor.device.type != "cpu" or tensor.nbytes < MAPPED_BYTES or _madvise is None:
        return
    merged: list[list[int]] = []
    for first, end in spans:
        if merged and merged[-1][1] == first:
            merged[-1][1] = end
        else:
            merged.append([first, end])
    start = tensor.data_ptr()
    for first, end in merged:
        low, high = -(-first * unit // mmap.PAGESIZE) * mmap.PAGESIZE, end * unit // mmap.PAGESIZE * mmap.PAGESIZE
        if low < high:
            _madvise(ctypes.c_void_p(start + low), ctypes.c_size_t(high - low), mmap.MADV_DONTNEED)


def _mapped(size: int) -> mmap.mmap:
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    return mmap.mmap(-1, size, **flags)
