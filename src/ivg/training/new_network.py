"""A new network of a model's architecture, smaller or larger, with random weights and the model's tokenizer (as ``--config_overrides`` of
transformers' ``run_clm.py``).
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from ivg.errors import ConfigError, reason
from ivg.models.generation_config import read_generation_config
from ivg.models.hub import find_model
from ivg.models.loading import LoadOptions, load_config
from ivg.training.trainer import tokenizer_for_training

_SHARED = ("tie_word_embeddings",)
"""Settings of every architecture that can be changed, too."""


def new_network(name: str | Path, overrides: str, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """(network with random weights in float32 on the CPU, tokenizer of ``name``); the weights of ``name`` are not read.

    Args:
        name: model whose configuration and tokenizer are taken.
        overrides: what is changed, ``hidden_size=96,num_hidden_layers=4``; values are JSON. A head's size, key-value heads and settings of
            single layers follow where they are not given.
        trust_remote_code: run code from the model's repository.

    Raises:
        ConfigError: unknown settings, or settings that do not go together.
        ModelError: no model at ``name``.
    """
    options = LoadOptions(device="cpu", trust_remote_code=trust_remote_code)
    old = load_config(name, options, "model").get_text_config()
    tokenizer = tokenizer_for_training(name, trust_remote_code)
    changed = parse_overrides(overrides)
    try:
        config = changed_config(old, changed)
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        with torch.no_grad():
            network.eval()(input_ids=torch.tensor([[0, 1]]))
    except ConfigError:
        raise
    except Exception as e:  # whatever transformers raises for sizes that do not go together
        raise ConfigError(f"no network can be made with {overrides}: {reason(e)}\n  change the sizes that belong together, too") from e
    if (size := network.get_input_embeddings().num_embeddings) < len(tokenizer):
        raise ConfigError(f"vocab_size={size}, and the tokenizer has {len(tokenizer)} tokens\n  leave vocab_size out")
    _keep_special_tokens(network, tokenizer, find_model(name, "model", options.hub(), weights=False))
    return network, tokenizer


def parse_overrides(text: str) -> dict[str, Any]:
    """``hidden_size=96,hidden_act=gelu`` as a dictionary; values are JSON, or else text.

    Raises:
        ConfigError: not of that form, or a name given twice.
    """
    out: dict[str, Any] = {}
    for part in re.split(r",(?=\s*\w+\s*=)", text):
        name, sign, value = (piece.strip() for piece in part.partition("="))
        if not sign or not name or not value or name in out:
            raise ConfigError(f"config overrides {text!r}: got {part.strip()!r}\n  expected NAME=VALUE,NAME=VALUE with each name once")
        try:
            out[name] = json.loads(value)
        except ValueError:
            out[name] = value
    return out


def changed_config(old: Any, changed: dict[str, Any]) -> Any:
    """A copy of a configuration with ``changed`` settings, and with what follows from them.

    Raises:
        ConfigError: unknown settings, values of another type, sizes that do not divide each other.
    """
    config = copy.deepcopy(old)
    known = {*_own_names(config), *_SHARED}
    if unknown := sorted(set(changed) - known - set(config.attribute_map)):
        raise ConfigError(f"{config.model_type} has no setting {', '.join(unknown)}\n  expected some of {', '.join(sorted(known))}")
    for name, value in changed.items():
        _check_type(name, getattr(config, name), value)
        setattr(config, name, value)
    given = {config.attribute_map.get(name, name) for name in changed}
    _follow_heads(config, old, given)
    _follow_layers(config, old, given)
    if "quantization_config" in vars(config):
        del config.quantization_config  # of the weights that are not read
    config.name_or_path = ""
    return config


def _own_names(config: Any) -> set[str]:
    """Names of the settings that the architecture has beside those of every configuration."""
    return {name for name in set(config.to_dict()) - set(PretrainedConfig().to_dict()) if not name.startswith("_")}


def _check_type(name: str, old: Any, new: Any) -> None:
    kinds: tuple[type, ...] = (float, int) if isinstance(old, float) else (type(old),)
    if old is None or new is None:
        return
    if not isinstance(new, kinds) or (isinstance(new, bool) and not isinstance(old, bool)):
        raise ConfigError(f"config overrides: {name}={new!r}\n  expected a value like {json.dumps(old, default=str)}")
    if isinstance(old, int) and isinstance(new, int) and new < 0 <= old:
        raise ConfigError(f"config overrides: {name}={new!r}\n  expected 0 or more")


def _follow_heads(config: Any, old: Any, given: set[str]) -> None:
    """Sizes of attention heads, where ``given`` does not have them: as in ``old``, head size = hidden size / heads."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    sized, grouped = "head_dim" in vars(config), "num_key_value_heads" in vars(config)
    follows = not sized or old.head_dim in (None, old.hidden_size // old.num_attention_heads)
    if follows and "head_dim" not in given:
        if not heads or hidden % heads:
            raise ConfigError(f"hidden_size={hidden} is no multiple of num_attention_heads={heads}\n  change one of them")
        if sized and old.head_dim is not None:
            config.head_dim = hidden // heads
    if grouped and "num_key_value_heads" not in given and old.num_key_value_heads == old.num_attention_heads:
        config.num_key_value_heads = heads
    if grouped and config.num_key_value_heads and heads % config.num_key_value_heads:
        raise ConfigError(
            f"num_attention_heads={heads} is no multiple of num_key_value_heads={config.num_key_value_heads}\n  change one of them"
        )


def _follow_layers(config: Any, old: Any, given: set[str]) -> None:
    """Settings of single layers: those of the first ones."""
    before, now = old.num_hidden_layers, config.num_hidden_layers
    if before == now:
        return
    for name in _own_names(old) - given:
        value = getattr(old, name, None)
        if isinstance(value, list) and len(value) == before:
            if now > before:
                raise ConfigError(f"num_hidden_layers={now}, and {name} is for {before} layers\n  give {name}, too")
            setattr(config, name, value[:now])


def _keep_special_tokens(network: Any, tokenizer: Any, place: str | Path) -> None:
    """The tokens that begin, end and pad: those of the model."""
    found = read_generation_config(place)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(found, name, None)
        ids = getattr(network.config, name, None) if ids is None else ids
        setattr(network.generation_config, name, getattr(tokenizer, name) if ids is None else ids)
    if network.config.pad_token_id is None:
        network.config.pad_token_id = tokenizer.pad_token_id
