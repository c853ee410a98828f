"""Which networks can be read row by row, how, and why others cannot.

Rows of different lengths share a pass, each row in pieces and with forks, and every output must be that of a pass over the row's
tokens alone. Most decoders give that. Some need more than positions (:class:`NetworkSupport`); some are exact up to a length;
the others are refused when they are loaded. Every type of transformers was measured (``tests/integration/test_architectures.py``).

Handles transformers' configurations and what its networks do with them. Must not depend on rows or caches.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from ivg.errors import ModelError
from ivg.models.attention import own_implementation
from ivg.models.rotary import rope_limits, rope_types, rotary_modules, yarn_context
from ivg.models.value_head import ValueModel

_RECURRENT = "keep a running state instead of keys and values per token"
_HYBRID = "keep a running state beside keys and values"
_INDEXED = "choose what they attend to by an index of their own, kept beside keys and values"
_COMPRESSED = "keep one key and value for several tokens"
_REASONS = {
    "linear_attention": _RECURRENT,
    "conv": _RECURRENT,
    "hybrid": _HYBRID,
    "hybrid_sliding": _HYBRID,
    "indexed_attention": _INDEXED,
    "minimax_m3_sparse": _INDEXED,
    "compressed_sparse_attention": _COMPRESSED,
    "heavily_compressed_attention": _COMPRESSED,
    "chunked_attention": "attend within chunks, not within a window",
    "reference_sliding_attention": "see all of the prompt but a window of the answer",
    "moe": "hold no attention, so that layers with keys and values are not numbered one after another",
    "mlp": "hold no attention, so that layers with keys and values are not numbered one after another",
}
"""Kinds of layers in transformers' ``layer_types``, and why they cannot be read with this cache."""


@dataclass(frozen=True)
class NetworkSupport:
    """How a network is read.

    Attributes:
        windows: kinds of its attention layers and how far each sees; None: everything.
        max_positions: tokens that a row may have; None: any number.
        limit_reason: why no more, where it is not simply the model's context; for errors.
        rope_limits: lengths beyond which its rotary factors change (LongRoPE), ascending.
        pad: id that has no position of its own: the others count from ``pad`` + 1 on (RoBERTa); None: positions count from 0.
        state_reason: why its rows need transformers' own cache (``models.state_cache``); None: slots do (``models.slot_cache``).
    """

    windows: dict[str, int | None]
    max_positions: int | None = None
    limit_reason: str = ""
    rope_limits: tuple[int, ...] = ()
    pad: int | None = None
    state_reason: str | None = None


def check_support(network: nn.Module, name: str) -> NetworkSupport:
    """How ``network`` is read; ``name`` is for errors.

    Raises:
        ModelError: it cannot be, with the reason.
    """
    config = cast("Any", network).config.get_text_config()
    body = body_of(network)
    state_reason = _state_reason(body, config)
    if reason := _refusal(body, config, tried=state_reason is not None):
        raise ModelError(f"{name}: {type(body).__name__} {reason}\n  expected a decoder that reads its text from left to right")
    limit, why = _max_positions(network, config)
    return NetworkSupport(_windows(config), limit, why, rope_limits(config), _padding_id(network), state_reason)


_CONTEXTS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len")
"""How configurations call the context: the last two are Whisper's and MPT's."""


def context_of(network: nn.Module) -> int | None:
    """Tokens for which ``network`` has positions; None: any number. RoBERTa and its kin count them from behind that of padding.

    YaRN extends them to ``factor`` times the original context (Peng et al. 2023, arXiv 2309.00071), whether ``max_position_embeddings``
    says so (DeepSeek) or is still the original (Qwen).
    """
    config = cast("Any", network).config.get_text_config()
    limit = next((n for name in _CONTEXTS if isinstance(n := getattr(config, name, None), int) and n > 0), None)
    limit = limit if limit is None else max(limit, yarn_context(config))
    tables = (cast("Any", module) for name, module in network.named_modules() if name.rpartition(".")[2] == "position_embeddings")
    offsets = [int(table.padding_idx) + 1 for table in tables if getattr(table, "padding_idx", None) is not None]
    return limit if limit is None else limit - max(offsets, default=0)


def body_of(network: nn.Module) -> nn.Module:
    """The backbone of a value model; any other ``network`` itself (Mamba has a ``backbone`` of its own)."""
    return network.backbone if isinstance(network, ValueModel) else network


def _refusal(body: nn.Module, config: Any, *, tried: bool) -> str | None:
    """Why no cache makes rows exact; None: one may, and whether it does is ``tried`` (``models.choose_cache``), or known."""
    if config.model_type == "blt":
        return "cuts its text into patches by a model of its own, which would cut a row in pieces otherwise"
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return "reads its text in both directions (use_bidirectional_attention)"
    if not tried and any(getattr(m, "is_decoder", None) is False for m in body.modules()):
        return "reads its text in both directions (is_decoder is false in config.json)"
    return None


def _state_reason(body: nn.Module, config: Any) -> str | None:
    """Why slots of keys and values do not do, so that each row has transformers' own cache; None: they do."""
    if (attention := own_implementation(config)) not in (None, "sdpa", "eager"):
        return f"attends by {attention}, which may take no mask of its own for each token"
    if _is_vision_language(body):
        return "is a vision-language network"
    if _has_alibi(config):
        return "takes distances (ALiBi) from columns of the batch, not from positions"
    if unknown := sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}):
        reasons = dict.fromkeys(_REASONS.get(kind, "are not known to ivg") for kind in unknown)
        return f"has layers of kind {', '.join(unknown)}: they {'; they '.join(reasons)}"
    for needed in ("position_ids", "past_key_values"):
        if needed not in inspect.signature(body.forward).parameters:
            return f"takes no {needed}"
    if config.model_type == "minimax":
        return "takes no other cache than its own"
    if config.model_type == "gpt_neo" and "local" in getattr(config, "attention_layers", ()):
        return "cuts its local layers by columns of the batch, not by positions"
    if getattr(config, "attn_temperature_tuning", False) and config.model_type == "llama4_text":
        return "scales its attention by columns of the batch, not by positions"
    return None


def _is_vision_language(body: nn.Module) -> bool:
    """Is there no class for the text alone, so that the slot cache was never measured with it?"""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    name = type(body).__name__
    return name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values() and name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _has_alibi(config: Any) -> bool:
    options = getattr(config, "attn_config", None)  # MPT's
    return bool(
        getattr(config, "alibi", False)
        or getattr(config, "position_embedding_type", None) == "alibi"
        or (config.model_type == "mpt" and getattr(options, "alibi", False))
        or config.model_type == "bloom"
    )


def _max_positions(network: nn.Module, config: Any) -> tuple[int | None, str]:
    """(tokens that a row may have, why no more)."""
    ends = [] if (limit := context_of(network)) is None else [(limit, "")]
    if "dynamic" in rope_types(network):
        ends.append((config.max_position_embeddings, "beyond, dynamic RoPE rotates every token anew with each that is added"))
    if config.model_type == "doge":
        ends.append((config.keep_window_size, "beyond, Doge drops tokens by columns of the batch (keep_window_size)"))
    if config.model_type == "moshi" and config.sliding_window is not None:
        ends.append((config.sliding_window, "beyond, transformers applies its window in some passes only"))
    if (limits := rope_limits(config)) and not rotary_modules(network):
        ends.append((limits[0], "beyond, its LongRoPE factors change, which ivg cannot control in this network"))
    if not ends:
        return None, ""
    least = min(length for length, _ in ends)
    return least, next((why for length, why in ends if length == least and why), "")


def _windows(config: Any) -> dict[str, int | None]:
    """Kinds of attention layers and their windows, as transformers names them."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) is not False else None
    kinds = dict.fromkeys(getattr(config, "layer_types", None) or ())
    if not kinds:
        return {"all": window}
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def _padding_id(network: nn.Module) -> int | None:
    """RoBERTa and its kin make positions themselves, from the ids, unless they are given them."""
    for module in network.modules():
        if hasattr(module, "create_position_ids_from_input_ids") and getattr(module, "padding_idx", None) is not None:
            return int(cast("Any", module).padding_idx)
    return None
