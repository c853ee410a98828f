"""Runs that end with an adapter, or a head alone, in place of a whole model (``--keep-adapter``): a few megabytes, in float16.

What is stored is what was evaluated: trained weights are rounded before the last evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ivg.embedded import PREFIX
from ivg.errors import ConfigError, ModelError
from ivg.models.adapter_directory import HEAD_WEIGHTS
from ivg.models.hub import ADAPTER_CONFIG, BASE, HEAD_CONFIG, adapter_at
from ivg.models.prompt_template import PromptTemplate

_WEIGHTS = "adapter_model.safetensors"


def check_start(model: str | Path) -> None:
    """Raise where an adapter of ``model`` could not be loaded again.

    Raises:
        ConfigError: ``model`` is an adapter, whose weights are merged before training.
    """
    if adapter_at(model) is not None:
        raise ConfigError(
            f"{model} is an adapter, which training merges into its network: another adapter has no network to be kept for\n"
            "  leave --keep-adapter out, or start from the network"
        )


@torch.no_grad()
def round_to_half(parameters: Iterable[Tensor]) -> None:
    """Round weights to float16, in place.

    Raises:
        ModelError: a weight that float16 does not hold.
    """
    for parameter in parameters:
        rounded = parameter.half()
        if not rounded.isfinite().all():
            raise ModelError("training ended with weights of an adapter beyond 65504, or not finite\n  lower the learning rate")
        parameter.copy_(rounded)


def save_adapter(network: Any, folder: Path, base: str | Path, head_config: Mapping[str, Any], head: Mapping[str, Tensor]) -> None:
    """Write what :mod:`ivg.models.adapter_directory` reads.

    Args:
        network: with one adapter, as PEFT made it.
        folder: of the run.
        base: the network that training started from, as it was named.
        head_config: settings that a whole model has in config.json.
        head: tensors of a value's head.
    """
    from safetensors.torch import load_file, save_file

    network.save_pretrained(folder, save_embedding_layers=False)
    weights = {name: tensor.half().contiguous() for name, tensor in load_file(folder / _WEIGHTS).items()}
    save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
    if head:
        _save_head(folder, head)
    if head_config:
        _write(folder / HEAD_CONFIG, head_config)
    _write(folder / ADAPTER_CONFIG, json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")) | {BASE: base_name(base)})


def save_head(folder: Path, base: str | Path, head_config: Mapping[str, Any], head: Mapping[str, Tensor]) -> None:
    """As :func:`save_adapter`, of a value whose body is the network as it is."""
    _save_head(folder, head)
    _write(folder / HEAD_CONFIG, {**head_config, BASE: base_name(base)})


def _save_head(folder: Path, head: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().half().cpu().contiguous() for name, tensor in head.items()}
    save_file(tensors, folder / HEAD_WEIGHTS, metadata={"format": "pt"})


def _write(file: Path, config: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def keep_tokenizer(tokenizer: Any, template: str | None, folder: Path) -> None:
    """Write the tokenizer beside the adapter, where its chat template is that of the file ``template`` and not the network's."""
    if PromptTemplate(template).resolved[1]:
        tokenizer.save_pretrained(folder)


def base_name(base: str | Path) -> str:
    """How an adapter names its network: files and folders by their whole path, embedded and added models and hub ids as they are."""
    place = Path(base).expanduser()
    return str(place.resolve()) if place.exists() and not str(base).startswith(PREFIX) else str(base)
