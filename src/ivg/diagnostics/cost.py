"""The cost of an answer: active parameters of the models, and forward tokens as FLOPs.

The forward pass of a token costs 2 FLOPs for each active parameter (Kaplan et al. 2020, section 2.1): all but the input embedding
(unless it is tied to the output layer) and inactive experts. Attention over the context is left out, as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ivg.model import GuidedModel
from ivg.models.adapters import of_other_adapter
from ivg.models.cached_lm import CachedLM
from ivg.models.packed_linear import packed_layers
from ivg.types import Value
from ivg.types.beam import HEAD_SUFFIX


def language_models(model: GuidedModel) -> dict[str, CachedLM]:
    """The base and the language models of its values, by their names in ``Usage.forward_tokens``."""
    found: dict[str, CachedLM] = {}
    for lm in model.readers:
        found.setdefault(lm.name, lm)
    return found


def parameters(model: GuidedModel) -> dict[str, int]:
    """Active parameters by the names in ``Usage.forward_tokens``."""
    out = {name: active_parameters(lm.network, lm.weights) for name, lm in language_models(model).items()}
    heads = {f"{name}{HEAD_SUFFIX}": lm.head for name, lm in language_models(model).items() if lm.head is not None}
    out |= {name: sum(map(num_weights, head.parameters())) for name, head in heads.items()}
    for value in model.values.values():
        for name, network in value.networks():
            if name not in out:
                out[name] = active_parameters(network)
    return dict(sorted(out.items()))


def flops(forward_tokens: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    """2 x active parameters x tokens, summed over models; a value without parameters (a Python function) costs nothing."""
    return float(sum(2 * sizes.get(name, 0) * tokens for name, tokens in forward_tokens.items()))


def active_parameters(network: Any, adapter: str | None = None) -> int:
    """Parameters of ``network`` that take part in the forward pass of one token; of its adapters, those of ``adapter`` (None: none)."""
    config = network.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    active = (getattr(config, "num_experts_per_tok", None) or experts) / experts if experts else 1.0
    head = network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
    body = getattr(network, "backbone", None) or network
    table = body.get_input_embeddings() if hasattr(body, "get_input_embeddings") else None
    lookup = getattr(table, "weight", None)
    if head is not None and lookup is getattr(head, "weight", None):
        lookup = None
    total = float(sum(layer.num_weights for layer in packed_layers(network)))
    for name, parameter in network.named_parameters():
        if parameter is not lookup and not of_other_adapter(name, adapter):
            total += num_weights(parameter) * (active if "experts" in name else 1.0)
    return round(total)


def num_weights(parameter: Any) -> int:
    """Weights in a parameter; bitsandbytes packs two 4-bit weights into each byte of storage, whatever the storage's dtype."""
    if type(parameter).__name__ == "Params4bit" and getattr(parameter, "bnb_quantized", True):
        return int(parameter.numel() * parameter.dtype.itemsize * 2)
    return int(parameter.numel())


def classifier_names(value: Value) -> list[str]:
    """Names in usage of the classifiers that a value reads with, which have no cache."""
    cached = {model.name for model in value.cached_lms()}
    return [name for name, _ in value.networks() if name not in cached]
