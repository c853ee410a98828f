"""What transformers' GGUF reader leaves out of a configuration: rotary scaling, head sizes, windows, the tokens that end an answer.

A setting of the file that neither it nor this module reads is refused: without it outputs would be wrong, and nothing would say so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ivg.errors import ModelError

_ATTRIBUTES = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""Keys of the file (behind its architecture) and the attributes of transformers' configurations."""
_READ_ELSEWHERE = frozenset({"vocab_size", "rope.dimension_count", "attention.value_length", "use_parallel_residual", "tensor_data_layout"})
"""Keys that are checked below, or that say what the tensors say."""
_SCALING = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of every Llama 3.1 and later; only the factor differs."""

_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|end_of_turn|>", "<|eot|>")
"""Tokens by which chat templates end a turn. llama.cpp ends answers at them, whatever the file calls its end of sequence."""
_ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
"""Attributes of configurations and keys of the file; where there is no key, transformers keeps a default of its own."""
_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty"}
_BLOCKS_OF_27B = {"gemma2": 46, "gemma3_text": 62}
"""Gemma scales attention by the size of a head, but in the models of these depths; files do not say so, llama.cpp knows."""


def complete_config(config: Any, metadata: Mapping[str, Any], rope: Mapping[str, Tensor], title: str) -> None:
    """Set in ``config``, as transformers read it from the file, what it did not read.

    Args:
        config: a transformers configuration; changed in place.
        metadata: of the file.
        rope: the tensors of the file that change its rotary frequencies.
        title: begins errors.

    Raises:
        ModelError: a setting that cannot be honoured; names it.
    """
    architecture = str(metadata["general.architecture"])
    own = {key.partition(".")[2]: value for key, value in metadata.items() if key.startswith(f"{architecture}.")}
    known = _keys_read(architecture)
    unread = {} if known is None else {key: value for key, value in own.items() if key not in known and value not in (0, None, False)}
    scaling = {"rope_type": str(own.get("rope.scaling.type", "none")), **{_SCALING[key]: own[key] for key in _SCALING if key in own}}
    for key, value in unread.items():
        if (name := _ATTRIBUTES.get(key)) is not None and hasattr(config, name):
            setattr(config, name, value)
        elif key == "rope.freq_base" and _rope(config) is not None:
            _rope(config)["rope_theta"] = value
        elif key not in (*_READ_ELSEWHERE, *_SCALING, "rope.scaling.type") and getattr(config, key.rpartition(".")[2], None) != value:
            raise _unread(title, f"{architecture}.{key} = {value!r}")
    if known is not None and scaling["rope_type"] != "none":
        if scaling["rope_type"] not in ("linear", "yarn") or "factor" not in scaling or _rope(config) is None:
            raise _unread(title, f"rotary scaling {scaling}")
        _rope(config).update(scaling)
    for name, key in _IDS.items():
        if f"tokenizer.ggml.{key}" not in metadata:
            setattr(config, name, None)
    if config.model_type == "mistral" and "attention.sliding_window" not in own:  # llama.cpp reads no window there, either
        config.sliding_window = None
    if config.model_type in _BLOCKS_OF_27B:
        large = config.num_hidden_layers == _BLOCKS_OF_27B[config.model_type]
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if large else config.head_dim
    _check_heads(config, own, title)
    if rope:
        _set_frequencies(config, rope, title)
    vars(config).pop("_model_name_or_path", None)


def generation_settings(network: Any, tokenizer: Any, metadata: Mapping[str, Any], folder: Path) -> None:
    """Give ``network`` the tokens that end an answer, and the sampling settings that the file recommends.

    Where ``folder`` has a ``generation_config.json``, that one decides.
    """
    if (folder / "generation_config.json").is_file():
        network.generation_config = type(network.generation_config).from_pretrained(folder)
        return
    own = network.config.eos_token_id
    ends = [own] if isinstance(own, int) else list(own or ())
    ends += [int(metadata[key]) for key in _ENDS if key in metadata]
    vocabulary, template = tokenizer.get_vocab(), tokenizer.chat_template or ""
    harmony = "<|return|>" in vocabulary  # there, <|end|> ends a part of an answer
    ends += [vocabulary[text] for text in _TURN_ENDS if text in vocabulary and text in template and not (harmony and text == "<|end|>")]
    ends = list(dict.fromkeys(ends))
    found = {name: metadata[f"general.sampling.{key}"] for key, name in _SAMPLING.items() if f"general.sampling.{key}" in metadata}
    settings: dict[str, Any] = {name: int(value) if name == "top_k" else round(float(value), 6) for name, value in found.items()}
    before = network.generation_config
    network.generation_config = type(before)(
        bos_token_id=before.bos_token_id,
        pad_token_id=before.pad_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        **(settings and {"do_sample": True, **settings}),
    )


def _keys_read(architecture: str) -> frozenset[str] | None:
    """The keys that transformers reads for all models of an architecture; None: each has a reader of its own, which is trusted."""
    from transformers.integrations import GGUF_CONFIG_MAPPING

    try:
        from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    except ImportError:  # an older transformers
        GGUF_CONFIG_ARCHS = {}
    name = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}.get(architecture, architecture.replace("-", "_"))
    if architecture in GGUF_CONFIG_ARCHS or name not in GGUF_CONFIG_MAPPING:
        return None
    return frozenset(key for key, target in GGUF_CONFIG_MAPPING[name].items() if target not in (None, -1))


def _rope(config: Any) -> Any:
    """The rotary settings of the layers that attend to everything; None: it has none."""
    found = getattr(config, "rope_parameters", None)
    return found.get("full_attention", found) if found else None


def _check_heads(config: Any, own: Mapping[str, Any], title: str) -> None:
    """Raise for values of another size than keys, and for a part of each head rotated other than the configuration says."""
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
    values, rotated = own.get("attention.value_length"), own.get("rope.dimension_count")
    if values is not None and values not in (width, getattr(config, "global_head_dim", None)):
        raise _unread(title, f"attention.value_length = {values} where keys have {width}")
    if rotated is None or width is None or _rope(config) is None or rotated == getattr(config, "global_head_dim", None):
        return
    share = _rope(config).get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    if int(width * share) != rotated and getattr(config, "rotary_dim", None) != rotated:
        if share == 1.0 and config.model_type != "phi3":
            raise _unread(title, f"rope.dimension_count = {rotated} of {width}")
        _rope(config)["partial_rotary_factor"] = rotated / width


def _set_frequencies(config: Any, rope: Mapping[str, Tensor], title: str) -> None:
    """The rotary scaling that the factors of a Llama 3.1 file stand for.

    Raises:
        ModelError: other factors.
    """
    factors, settings = rope.get("rope_freqs.weight"), _rope(config)
    if set(rope) != {"rope_freqs.weight"} or factors is None or settings is None:
        raise _unread(title, f"tensors {', '.join(sorted(rope))}")
    if torch.equal(factors, torch.ones_like(factors)):
        return
    factor = round(float(factors.max()), 3)
    if torch.allclose(factors, llama3_factors(settings["rope_theta"], 2 * len(factors), factor), rtol=1e-3):
        settings.update(rope_type="llama3", factor=factor, **_LLAMA3)
        return
    raise _unread(title, "rotary factors (rope_freqs.weight) other than Llama 3's")


def llama3_factors(theta: float, width: int, factor: float) -> Tensor:
    """What each rotary frequency is divided by (as llama.cpp's converter writes it): float32 [width / 2]."""
    length = 2 * math.pi * theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    low, high, context = (_LLAMA3[name] for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
    smooth = (context / length - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    out = torch.where(length < context / high, 1.0, torch.where(length > context / low, factor, between))
    return out.float()


def _unread(title: str, what: str) -> ModelError:
    return ModelError(
        f"{title}: the file has {what}, which transformers' GGUF reader leaves out\n  give the original model (config.json and safetensors)"
    )
