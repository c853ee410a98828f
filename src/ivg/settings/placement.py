"""Where and how one model is loaded: settings of every model of a recipe, with defaults for all of them in ``[run]``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from ivg.settings.schema import Setting

Device: TypeAlias = str | dict[str, str | int]
"""``cpu``, ``cuda:1``; or, over several devices, what transformers' ``device_map`` takes."""

Dtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]

SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
"""Devices that stand for all devices of this machine, as in transformers' ``device_map``."""

OF_RUN = "that of [run]"
"""What the setting of one model is where it is left out, in words."""

DEVICE = Setting(
    "cpu, cuda, cuda:1 …; auto: layer by layer over all GPUs, then CPU and disk (package accelerate). In recipes also a table of modules "
    "and devices (transformers' device_map).",
    aliases=("device_map",),
    flags=("--device",),
    unset="the best available",
)
DTYPE = Setting("auto, float32, bfloat16 or float16.", flags=("--dtype",))
REVISION = Setting("Branch, tag or commit of models on the hub.", flags=("--revision",), unset="main")
ATTENTION = Setting(
    "Attention implementation of transformers (attn_implementation). sdpa, eager: passes of few tokens still use ivg's own; another, "
    "such as flash_attention_2: rows have transformers' own cache.",
    flags=("--attention",),
    unset="transformers' choice",
)
QUANTIZATION = Setting("transformers' quantization_config, e.g. { load_in_4bit = true } (package bitsandbytes).", unset="none")


def is_spread(device: str | Mapping[str, Any] | None) -> bool:
    """Does ``device`` leave it to accelerate where each module lies?"""
    return isinstance(device, Mapping) or device in SPREAD
