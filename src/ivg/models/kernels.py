"""Which of PyTorch's private CPU kernels work here. Each is tried once per process, on small tensors, against a plain product.

They are private: another PyTorch may lack them or change their signature, and a processor may not have their instructions (a CPU with
AVX2 alone packs no weights in bfloat16). A kernel that fails, or computes something else, is not used; callers then use public
operations. Must not depend on networks.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

PACKED_ROWS = 256
"""The number of rows that oneDNN optimises the packed layout for; measured to be as good as any for 1 to 256."""
PACKED_DTYPES = (torch.bfloat16, torch.float32)
CPU_INFO = Path("/proc/cpuinfo")
_EMULATED = ("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni")
"""Values of ``ONEDNN_MAX_CPU_ISA`` under which oneDNN has no bfloat16 products, or emulates them."""


@cache
def has_packed_linear(dtype: torch.dtype) -> bool:
    """Do oneDNN's packed linear layers in ``dtype`` compute the right products, and return their weights unchanged?"""
    try:
        return dtype in PACKED_DTYPES and _packed_products_agree(dtype)
    except Exception:  # a kernel that is not there may raise anything
        return False


@cache
def has_packed_gelu(dtype: torch.dtype, gelu: str) -> bool:
    """Does a packed product in ``dtype`` give the right GELU of its output? ``gelu``: as :func:`packed_linear` takes it."""
    try:
        return has_packed_linear(dtype) and _packed_gelu_agrees(dtype, gelu)
    except Exception:  # as above
        return False


@cache
def has_flash_attention(dtype: torch.dtype) -> bool:
    """Does PyTorch's flash attention for CPUs compute the right attention in ``dtype``, with and without a mask?"""
    try:
        return _flash_agrees(dtype)
    except Exception:  # as above
        return False


@cache
def has_native_bfloat16() -> bool:
    """Does the CPU have instructions for bfloat16 products, and does oneDNN use them?

    oneDNN's own check also says yes where it emulates them, 8 times slower than float32.
    """
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "default"
    if limit.lower() in _EMULATED:
        return False
    try:
        return onednn_has_bfloat16() and _cpu_has_bfloat16()
    except Exception:  # as above
        return False


def pack_weight(weight: Tensor) -> Tensor:
    """``weight`` [outputs, inputs], of :data:`PACKED_DTYPES` on the CPU, in oneDNN's packed layout."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), PACKED_ROWS)
    return packed


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None = None) -> Tensor:
    """X W^T + b, with weights of :func:`pack_weight`; ``gelu``: its GELU, ``none`` or ``tanh`` as PyTorch's ``approximate`` has it."""
    operation, algorithm = ("none", "") if gelu is None else ("gelu", gelu)
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x.contiguous(), weight, bias, operation, [], algorithm)
    return out


def flash_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    """(softmax(scaling q K^T + mask) V, log-sum-exp of the scores [groups, heads, queries]); undefined where a query sees nothing."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, norms = flash(q, keys, values, 0.0, False, attn_mask=None if mask is None else mask.to(q.dtype), scale=scaling)
    return out, norms


def _packed_products_agree(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    weight, bias = _test_values(24, 40).to(dtype), _test_values(24).to(dtype)
    packed = pack_weight(weight)
    if not torch.equal(packed.to_dense(), weight):
        return False
    for x in (_test_values(1, 40), _test_values(2, 3, 40)):
        for b in (None, bias):
            plain = x.to(dtype).double() @ weight.double().t() + (0.0 if b is None else b.double())
            if not _close(packed_linear(x.to(dtype), packed, b), plain, dtype):
                return False
    return True


def _packed_gelu_agrees(dtype: torch.dtype, gelu: str) -> bool:
    weight, bias, x = (t.to(dtype) for t in (4 * _test_values(24, 40), _test_values(24), _test_values(2, 3, 40)))
    plain = torch.nn.functional.gelu(x.double() @ weight.double().t() + bias.double(), approximate=gelu)
    return _close(packed_linear(x, pack_weight(weight), bias, gelu), plain, dtype)


def _flash_agrees(dtype: torch.dtype) -> bool:
    q, keys, values = (_test_values(2, 2, n, 8, shift=n).to(dtype) for n in (3, 5, 5))
    mask = torch.zeros_like(_test_values(2, 1, 3, 5)).masked_fill(_test_values(2, 1, 3, 5) > 0.5, float("-inf"))
    for seen in (None, mask):
        scores = (q.double() @ keys.double().transpose(-1, -2)) * 0.5 + (0.0 if seen is None else seen)
        out, norms = flash_attention(q, keys, values, seen, 0.5)
        if not _close(out, scores.softmax(-1) @ values.double(), dtype) or not _close(norms, scores.logsumexp(-1), dtype):
            return False
    return True


def _test_values(*shape: int, shift: int = 0) -> Tensor:
    """Numbers between -1 and 1 that leave PyTorch's random state as it is."""
    count = int(torch.Size(shape).numel())
    return torch.sin(torch.arange(shift, count + shift, dtype=torch.float32, device="cpu") * 7.3).view(shape)


def _close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    near = 4 * torch.finfo(dtype).eps * max(1.0, float(expected.abs().max()))
    return got.shape == expected.shape and bool(((got.double() - expected).abs() <= near).all())


def onednn_has_bfloat16() -> bool:
    """What oneDNN says, emulation included."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _cpu_has_bfloat16() -> bool:
    try:
        flags = CPU_INFO.read_text()
    except OSError:
        return False
    return any(flag in flags.split() for flag in ("avx512_bf16", "amx_bf16", "bf16"))  # bf16: ARM
