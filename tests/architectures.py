"""Tiny random models of every causal language model of transformers, and variants: windows, ways to turn positions, ALiBi …

Settings that a configuration knows get small values from "small"; what one type needs besides is in "special" (architectures.json).
"""

import json
import math
from functools import cache
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ivg.testing.models import DEVICE

REMOVE = "DEL"  # a setting that is not given
LAYERS = 4
_TABLES = json.loads(Path(__file__).with_suffix(".json").read_text())
SMALL, VISION, SPECIAL, VARIANTS = (_TABLES[name] for name in ("small", "vision", "special", "variants"))
NAMES = (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS)


@cache
def defaults(kind):
    return json.loads(json.dumps(AutoConfig.for_model(kind).to_dict(), default=str))


def small(default, table=SMALL):
    optional = ("sliding_window", "n_inner", "forced_eos_token_id", "num_kv_heads", "expert_ffn_hidden_size")
    known = {k: v for k, v in table.items() if k in default and v is not None}
    return {k: v for k, v in known.items() if not (default[k] is None and k in optional)}


def settings_for(default):
    """All its kinds of layers one after another."""
    settings = small(default)
    if kinds := list(dict.fromkeys(default.get("layer_types") or ())):
        settings["layer_types"] = [kinds[i % len(kinds)] for i in range(LAYERS)]
    if kinds := list(dict.fromkeys(default.get("mlp_layer_types") or ())):
        settings["mlp_layer_types"] = [kinds[0]] + [kinds[-1]] * (LAYERS - 1)
    return settings


def given(settings):
    return {k: v for k, v in settings.items() if v != REMOVE}


def tiny_config(name, **more):
    """The configuration of a type of transformers, or of one of :data:`VARIANTS`."""
    kind, extra = VARIANTS.get(name, (name, {}))
    default, own = defaults(kind), {**SPECIAL.get(kind, {}), **extra, **more}
    text = default.get("text_config")
    if not isinstance(text, dict) or kind == "git":
        return AutoConfig.for_model(kind, **given(settings_for(default) | own))
    inner = text.get("model_type")
    top = {
        "text_config": given(
            {**settings_for(text), **SPECIAL.get(inner, {}), **own.pop("text", {}), **({"model_type": inner} if inner else {})}
        )
    }
    for key, part in default.items():
        if key.endswith("_config") and key != "text_config" and isinstance(part, dict):
            top[key] = small(part, VISION) | ({"model_type": part["model_type"]} if "model_type" in part else {})
    return AutoConfig.for_model(kind, **{**top, **given(own)})


def randomise(model, seed):
    """Weights under which outputs are far from flat and depend on every position."""
    g = torch.Generator().manual_seed(seed)
    out, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = out is None or getattr(out, "weight", None) is getattr(embedding, "weight", 0)
    for name, p in sorted(model.named_parameters()):
        fixed = name.endswith("scale") or any(part in name for part in ("A_log", "dt_bias", "time_decay", "time_first", ".D"))
        if not p.is_floating_point() or (fixed and (p.dim() < 2 or "A_log" in name)):
            continue
        with torch.no_grad():
            if p.dim() < 2:
                p.add_(torch.randn(p.shape, generator=g) * (0.1 if "norm" in name or "ln" in name else 0.3))
                continue
            std = 1.6 / math.sqrt(p.shape[-1])
            if any(part in name for part in ("embed", "wte", "wpe")) or name.endswith("embeddings.weight"):
                std = 0.1 if tied else 0.6
            p.copy_(torch.randn(p.shape, generator=g) * (0.5 if "conv" in name else std))


def tiny(name, seed=1, **more):
    """A network in float32 on the device of the tests; its end-of-sequence token is 0."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **more)).float().eval()
    randomise(model, seed)
    model.to(DEVICE).tie_weights()
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = 0
    return model
