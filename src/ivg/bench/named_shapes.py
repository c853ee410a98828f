"""Sizes of models by name. Imports no torch: Tab completes the names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ivg.errors import ConfigError

EMBEDDED = "embedded"
"""Name for the trained models that come with the package, in their own sizes."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; ``guide`` is the default shape of its guides and value, ``more`` what its configuration needs besides."""

    architecture: Literal["gpt2", "llama", "lfm2", "qwen3_5_text"]
    vocabulary: int
    layers: int
    hidden: int
    heads: int
    context: int
    guide: str
    kv_heads: int = 0
    inner: int = 0
    more: Mapping[str, Any] = field(default_factory=dict)


_CONV = {"layer_types": ["conv", "conv", "full_attention", "conv"] * 3}
_LINEAR = {
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 3,
    "head_dim": 64,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
SHAPES = {
    "gpt2-small": Shape("gpt2", 50257, 12, 768, 12, 1024, "guide-17m"),
    "gpt2-large": Shape("gpt2", 50257, 36, 1280, 20, 1024, "gpt2-small"),
    "gpt2-small-16k": Shape("gpt2", 16384, 12, 768, 12, 1024, "guide-17m"),
    "gpt2-1.4b-16k": Shape("gpt2", 16384, 48, 1536, 24, 1024, "guide-17m"),
    "guide-17m": Shape("gpt2", 16384, 6, 384, 6, 1024, "guide-17m"),
    "llama-160m": Shape("llama", 32000, 12, 768, 12, 2048, "llama-160m", 12, 3072),
    "llama-1b": Shape("llama", 32000, 22, 2048, 32, 2048, "llama-160m", 4, 5632),
    "llama-7b": Shape("llama", 32000, 32, 4096, 32, 4096, "llama-1b", 32, 11008),
    "lfm2-120m": Shape("lfm2", 32000, 12, 768, 12, 2048, "guide-17m", 4, 2304, _CONV),
    "qwen3.5-120m": Shape("qwen3_5_text", 32000, 12, 768, 12, 2048, "guide-17m", 4, 2304, _LINEAR),
    "tiny": Shape("gpt2", 400, 2, 32, 4, 256, "tiny"),
    "tiny-llama": Shape("llama", 400, 2, 32, 4, 256, "tiny-llama", 2, 64),
}
"""By name: GPT-2 (Radford et al. 2019), Llama-2-7B, TinyLlama-1.1B, JackFram/llama-160m; a base of 98 M with guides of 17 M; two
hybrids, with convolutions (LFM2) and with linear attention (Qwen 3.5) beside attention; for tests."""


def shape(name: str) -> Shape:
    """The shape called ``name``.

    Raises:
        ConfigError: no such shape.
    """
    if name not in SHAPES:
        raise ConfigError(f"unknown shape {name!r}\n  expected one of: {', '.join([*SHAPES, EMBEDDED])}")
    return SHAPES[name]
