"""What an answer costs: which models take part, how many parameters each multiplies, forward tokens as FLOPs.

One forward pass of a token costs 2 FLOPs for each parameter that it is multiplied with (Kaplan et al. 2020, section 2.1):
all of them but an input embedding that is no output layer as well, and of experts only those that are active. Attention over
the context is left out, as there. Knows readers and values; must not know files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ivg.model import GuidedModel, cached_lms
from ivg.models.cached_lm import CachedLM
from ivg.models.packed_linear import packed_layers


def readers(model: GuidedModel) -> dict[str, CachedLM]:
    """Every cached model by its name in usage: the base's, and those inside values."""
    found: dict[str, CachedLM] = {}
    for reader in model.readers:
        found.setdefault(reader.name, reader)
    return found


def parameters(model: GuidedModel) -> dict[str, int]:
    """Parameters that a token is multiplied with, by the names in ``Usage.forward_tokens``."""
    out = {name: multiplied(reader.model.network) for name, reader in readers(model).items()}
    for value in model.values.values():
        for classifier in classifiers(value):
            out.setdefault(classifier.name, multiplied(classifier.network))
    return dict(sorted(out.items()))


def flops(forward_tokens: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    """2 x parameters x tokens, summed over models; a value without parameters (a Python function) costs nothing."""
    return float(sum(2 * sizes.get(name, 0) * tokens for name, tokens in forward_tokens.items()))


def multiplied(network: Any) -> int:
    """Parameters of ``network`` that one token is multiplied with."""
    config = network.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    active = (getattr(config, "num_experts_per_tok", None) or experts) / experts if experts else 1.0
    head = network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
    body = getattr(network, "backbone", None) or network
    table = body.get_input_embeddings() if hasattr(body, "get_input_embeddings") else None
    looked_up = getattr(table, "weight", None)
    if head is not None and looked_up is getattr(head, "weight", None):
        looked_up = None
    total = float(sum(layer.elements for layer in packed_layers(network)))
    for name, parameter in network.named_parameters():
        if parameter is not looked_up:
            total += count(parameter) * (active if "experts" in name else 1.0)
    return round(total)


def count(parameter: Any) -> int:
    """Weights in a parameter; bitsandbytes packs two 4-bit ones into each byte of its storage, whatever the storage's type."""
    if type(parameter).__name__ == "Params4bit" and getattr(parameter, "bnb_quantized", True):
        return int(parameter.numel() * parameter.dtype.itemsize * 2)
    return int(parameter.numel())


def classifiers(value: Any) -> Iterator[Any]:
    """The classifiers that a value reads with."""
    for part in getattr(value, "parts", ()):
        yield from classifiers(part[1])
    if hasattr(value, "network") and not any(True for _ in cached_lms(value)):
        yield value
