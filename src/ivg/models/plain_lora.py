"""Plain LoRA adapters as PEFT saves them, read without peft: for engines that add an adapter's change themselves.

Whatever is more than two matrices for each of some linear layers is refused, since such an engine would leave it out without a word.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ivg.errors import ModelError, reason
from ivg.models.adapters import INITS_OF_ADAPTERS_ALONE, MERGE_ADVICE
from ivg.models.hub import ADAPTER_CONFIG
from ivg.utils.cache import file_digest

_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_FILES = ("adapter_model.safetensors", "adapter_model.bin")

_OUTPUT_LAYERS = ("lm_head", "embed_out")
"""They share weights with the embedding, or are split by vocabulary."""
_WITHOUT_EFFECT = frozenset((
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "fan_in_fan_out",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying",
    "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
    "runtime_config", "megatron_config", "megatron_core",
))  # fmt: skip
"""Settings that say nothing beyond the saved matrices and their factor. Others must be unset."""

_PLAIN_INITS = frozenset(INITS_OF_ADAPTERS_ALONE) - {"mica"}  # MiCA has a forward pass of its own


@dataclass(frozen=True)
class LoraChange:
    """What an adapter adds to the output of one linear layer: ``(x @ down.T) @ up.T``.

    Attributes:
        down: [rank, inputs].
        up: [outputs, rank], float32, times the adapter's own factor and the user's scale.
    """

    down: Tensor
    up: Tensor


def check_plain_lora(folder: Path, what: str) -> dict[str, Any]:
    """Raise for an adapter that is more than LoRA of linear layers; its settings. Reads the tensors' names, not the tensors.

    Args:
        folder: a directory that peft wrote.
        what: the model's role, for errors.

    Raises:
        ModelError: names what is more, or why it cannot be read.
    """
    title = f"{what}: the adapter {str(folder)!r}"
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ModelError(f"{title} cannot be read: {reason(e)}\n  expected a directory that peft wrote") from e
    _check_settings(config, title)
    for name in _tensor_names(folder, title):
        _module(name, title)
    return dict(config)


def read_plain_lora(folder: Path, what: str, scale: float = 1.0) -> dict[str, LoraChange]:
    """The changes of an adapter by the modules' names in transformers' network, times ``scale``.

    Raises:
        ModelError: as :func:`check_plain_lora`; a matrix without the other, or of another rank than its settings say.
    """
    config, title = check_plain_lora(folder, what), f"{what}: the adapter {str(folder)!r}"
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _tensors(folder, title).items():
        module, side = _module(name, title)
        sides.setdefault(module, {})[side] = tensor
    out: dict[str, LoraChange] = {}
    for module, found in sides.items():
        rank = int(_of_pattern(config.get("rank_pattern"), module, config["r"]))
        if found.keys() != {"A", "B"} or found["A"].shape[0] != rank or found["B"].shape[1] != rank:
            shapes = ", ".join(f"lora_{side} {list(tensor.shape)}" for side, tensor in sorted(found.items()))
            raise ModelError(f"{title} has {shapes} for {module}\n  expected lora_A and lora_B of rank {rank}, as in its settings")
        alpha = float(_of_pattern(config.get("alpha_pattern"), module, config["lora_alpha"]))
        factor = scale * alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        out[module] = LoraChange(found["A"], found["B"].float() * factor)
    return out


def lora_digest(folder: Path) -> str:
    """A hash of the adapter's settings and weights."""
    files = [ADAPTER_CONFIG, *(name for name in _FILES if (folder / name).is_file())][:2]
    return hashlib.sha256("".join(f"{name}\0{file_digest(folder / name)}\0" for name in files).encode()).hexdigest()[:16]


def _check_settings(config: Mapping[str, Any], title: str) -> None:
    kind = config.get("peft_type") if isinstance(config, Mapping) else None
    if kind != "LORA":
        raise _more(title, f"is of the kind {kind}")
    for name in ("r", "lora_alpha"):
        if isinstance(config.get(name), bool) or not isinstance(config.get(name), int | float):
            raise _more(title, f"has {name}={config.get(name)!r}")
    if config.get("bias", "none") not in ("none", None):
        raise _more(title, f"trained biases (bias={config['bias']!r})")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        raise _more(title, f"has init_lora_weights={init!r}")
    for name, value in config.items():
        if name not in _WITHOUT_EFFECT and value not in (None, False, 0, "", [], {}):
            raise _more(title, f"has {name}={value!r}")


def _more(title: str, what: str) -> ModelError:
    return ModelError(f"{title} {what}; here an adapter is plain LoRA of linear layers\n  {MERGE_ADVICE}")


def _module(tensor: str, title: str) -> tuple[str, str]:
    """(module, ``A`` or ``B``) of a tensor's name."""
    found = _TENSOR.fullmatch(tensor)
    if found is None:
        raise _more(title, f"has the tensor {tensor}")
    if found["module"].rpartition(".")[2] in _OUTPUT_LAYERS:
        raise _more(title, f"changes the output layer {found['module']}")
    return found["module"], found["side"]


def _of_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that the end of the module's name matches, as in peft."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _tensor_names(folder: Path, title: str) -> list[str]:
    if (folder / _FILES[0]).is_file():
        with safe_open(str(folder / _FILES[0]), "pt") as file:
            return list(file.keys())
    return list(_tensors(folder, title))


def _tensors(folder: Path, title: str) -> dict[str, Tensor]:
    try:
        if (folder / _FILES[0]).is_file():
            return dict(load_file(folder / _FILES[0]))
        return dict(torch.load(folder / _FILES[1], map_location="cpu", weights_only=True))
    except Exception as e:
        raise ModelError(f"{title} cannot be read: {reason(e)}\n  expected {_FILES[0]} beside {ADAPTER_CONFIG}") from e
