"""Builds the submodels of a composite from vLLM's own networks: each has its own configuration inside the engine's."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.utils import maybe_prefix

from ivg.engines.vllm.config import Submodel
from ivg.errors import ConfigError

HEADS = ("score_head.", "score.", "v_head.")
"""Prefixes of the names of value heads in checkpoints (:mod:`ivg.models.value_head`), without what wraps the backbone."""

_WRAPPERS = ("pretrained_model.", "backbone.")


def build_submodel(part: Submodel, vllm_config: VllmConfig, prefix: str) -> nn.Module:
    """The network of ``part``, without weights.

    Raises:
        ConfigError: heads that the tensor parallel size does not divide, or a context shorter than the engine's.
    """
    config = part.network_config()
    _check(part, config, vllm_config)
    own = vllm_config.with_hf_config(config, architectures=config.architectures)
    # Attention layers fall back on the engine's window, which is the base's: a guide without one would silently get it.
    own.cache_config = copy.copy(vllm_config.cache_config)
    own.cache_config.sliding_window = _window(config)
    network = initialize_model(vllm_config=own, prefix=maybe_prefix(prefix, part.name))
    processor = getattr(network, "logits_processor", None)
    if part.head != "language" and processor is not None:  # a value head is linear: caps and scales are the language model's
        processor.soft_cap, processor.scale = None, 1.0
    return network


def source_of(part: Submodel) -> DefaultModelLoader.Source:
    """Where vLLM's loader finds the weights; their names begin with the submodel's."""
    return DefaultModelLoader.Source(model_or_path=part.weights, revision=part.revision, prefix=f"{part.name}.")


def renamed(part: Submodel, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The weights under the names of a causal language model: a vocabulary head in place of the language model's, others left out.

    A vocabulary head's bias is ``lm_head.bias``: few of vLLM's networks have one, so the composite keeps it.
    """
    for name, tensor in weights:
        for wrapper in _WRAPPERS:
            name = name.removeprefix(wrapper)
        if part.head == "vocabulary" and name.startswith("score_head."):
            yield name.replace("score_head.", "lm_head.", 1), tensor
        elif part.head != "language" and (name.startswith((*HEADS, "lm_head."))):
            continue
        else:
            yield name, tensor


def _check(part: Submodel, config: Any, vllm_config: VllmConfig) -> None:
    text, size = config.get_text_config(), vllm_config.parallel_config.tensor_parallel_size
    heads = getattr(text, "num_attention_heads", None)
    if heads is not None and heads % size:
        raise ConfigError(
            f"{part.name} has {heads} attention heads, which tensor_parallel_size={size} does not divide\n"
            "  choose a size that divides the heads of base and all guides"
        )
    longest = getattr(text, "max_position_embeddings", None)
    if longest is not None and longest < vllm_config.model_config.max_model_len:
        raise ConfigError(
            f"{part.name} reads {longest} tokens at most, the engine is set to {vllm_config.model_config.max_model_len}\n"
            f"  set max_model_len to {longest} or less"
        )


def _window(config: Any) -> int | None:
    """The sliding window of a network all of whose layers have it; others set it layer by layer."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    if kinds and kinds != {"sliding_attention"}:
        return None
    used = getattr(text, "use_sliding_window", True)
    return getattr(text, "sliding_window", None) if used else None
