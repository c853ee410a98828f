"""Where a network lies and in which dtype it computes; networks that accelerate spread over several devices, too.

Must not depend on what a network computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast, get_args

import torch
from torch import nn

from ivg.errors import ConfigError
from ivg.models import kernels
from ivg.settings.placement import Dtype, is_spread

DTYPES: tuple[str, ...] = get_args(Dtype)


def pick_device(name: str | Mapping[str, Any] | None) -> torch.device:
    """The named device; None, or where modules are spread over several: CUDA if there is one, else the CPU.

    Raises:
        ConfigError: no such device here.
    """
    if name is None or isinstance(name, Mapping) or is_spread(name):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ConfigError(f"device {name!r} is not usable here: {str(e).splitlines()[0]}\n  expected e.g. cpu or cuda") from e
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The named dtype; ``auto`` is bfloat16 where the device multiplies in it natively, else float32.

    Raises:
        ConfigError: unknown name.
    """
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}\n  expected one of {', '.join(DTYPES)}")
    if name != "auto":
        return cast("torch.dtype", getattr(torch, name))
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and kernels.has_native_bfloat16()
    return torch.bfloat16 if native else torch.float32


def check_device_map(network: nn.Module, devices: Mapping[str, Any], name: str) -> None:
    """Raise for a table of modules and devices that does not fit: transformers would leave what it does not name on the CPU.

    Raises:
        ConfigError: a module that ``network`` does not have, or weights for which no device is named.
    """
    modules = [part for part, _ in network.named_modules() if part]
    advice = f"expected names such as {', '.join(modules[:3])}; the empty name is for all others"
    if unknown := [part for part in devices if part and part not in modules and part not in dict(network.named_parameters())]:
        raise ConfigError(f"{name}: its table of devices names {unknown[0]}, which is no module of it\n  {advice}")
    found = (key for key, _ in network.named_parameters() if not any(f"{key}.".startswith(f"{part}.") for part in devices if part))
    if "" not in devices and (missing := next(found, None)) is not None:
        raise ConfigError(f"{name}: its table of devices names none for {missing}\n  {advice}")


def input_device(network: nn.Module) -> torch.device:
    """Where a network takes token ids and returns outputs: where its embedding computes.

    Its weights may lie elsewhere: accelerate fetches those that are offloaded for each pass, and leaves none on a device meanwhile.
    """
    for module in (_embedding(network), network):
        if (device := _execution_device(module)) is not None:
            return device
    table = _embedding(network)
    weights = [*(() if table is None else table.parameters()), *network.parameters()]
    return next((w.device for w in weights if w.device.type != "meta"), weights[0].device)


def compute_dtype(network: nn.Module) -> torch.dtype:
    """Dtype of hidden states: of the first weights that are floats. Those of a quantised layer may be whole numbers."""
    return next(w.dtype for w in network.parameters() if w.is_floating_point())


def _embedding(network: nn.Module) -> nn.Module | None:
    try:
        return cast("nn.Module | None", cast("Any", network).get_input_embeddings())
    except (AttributeError, NotImplementedError):  # a value network asks its backbone; code of a checkpoint may have none
        backbone = getattr(network, "backbone", None)
        return None if backbone is None else _embedding(backbone)


def _execution_device(module: nn.Module | None) -> torch.device | None:
    """Where accelerate runs ``module``; None: it has not placed it."""
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.empty(0, device=device).device  # with its number
    return None
