"""Sampling settings in a checkpoint's ``generation_config.json``, as defaults of our settings.

Honoured as transformers' ``generate`` and vLLM's server honour it: below what a request or a recipe sets, above our own defaults. What
changes the text of ``generate`` and is not supported here is refused by name; what only sets how ``generate`` searches or stores is
ignored, and listed. Handles names of settings; must not depend on models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ivg.errors import ConfigError
from ivg.settings.rules import choice
from ivg.settings.sampling import STRUCTURES, SamplingParams
from ivg.settings.schema import check

if TYPE_CHECKING:
    from transformers import GenerationConfig

GenerationConfigMode = Literal["auto", "ignore"]
"""``auto``: the checkpoint's settings are defaults; ``ignore``: they are not. Its end-of-sequence tokens are always used."""

_NOT_IN_FILES = frozenset(
    {
        "stop",
        "end_at_sentence",
        "ignore_eos",
        "frequency_penalty",
        "presence_penalty",
        "logit_bias",
        "stop_token_ids",
        "bad_words",
        *STRUCTURES,
    }
)
_OWN_NAMES = {f.name: f.name for f in fields(SamplingParams) if f.name not in _NOT_IN_FILES} | {"stop_strings": "stop"}
"""transformers' names -> those of :class:`SamplingParams`."""

SERVED_BY_VLLM = frozenset({"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens"})
"""The settings that vLLM's own server reads from the file (``ModelConfig.get_diff_sampling_param``)."""

_REFUSED: Mapping[str, Any] = {
    "guidance_scale": 1,
    "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
    "watermarking_config": None,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "top_h": None,
    "token_healing": False,
}
"""What changes the text and is not supported, each with the value that switches it off."""

_IGNORED: Mapping[str, tuple[Any, str]] = {
    "do_sample": (None, "temperature decides: 0 is greedy"),
    "max_length": (20, "max_new_tokens decides"),
    "num_beams": (1, "the method decides how to search"),
    "num_beam_groups": (1, "the method decides how to search"),
    "diversity_penalty": (0, "the method decides how to search"),
    "length_penalty": (1, "the method decides how to search"),
    "early_stopping": (False, "the method decides how to search"),
    "penalty_alpha": (None, "the method decides how to search"),
    "dola_layers": (None, "the method decides how to search"),
    "constraints": (None, "the method decides how to search"),
    "force_words_ids": (None, "the method decides how to search"),
    "num_return_sequences": (1, "n decides"),
    "max_time": (None, "answers have no time limit"),
    "remove_invalid_values": (False, "NaN and infinity end an answer with an error"),
    "presence_penalty": (0, "transformers has no such setting; vLLM's own server applies it"),
    "frequency_penalty": (0, "transformers has no such setting; vLLM's own server applies it"),
}
"""What does not apply here, each with the value that switches it off and the reason."""


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling settings of a checkpoint.

    Attributes:
        settings: fields of :class:`~ivg.types.SamplingParams` that the file sets.
        left_out: other settings of the file that do not apply here, each with the reason.
        refused: settings that change the text and are not supported, with their values.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, Any] = field(default_factory=dict)

    def check(self, name: str) -> None:
        """Raise for unsupported settings; ``name`` is the model's.

        Raises:
            ConfigError: names the settings and what to do.
        """
        if self.refused:
            listed = ", ".join(f"{key}={value!r}" for key, value in self.refused.items())
            raise ConfigError(
                f"generation_config.json of {name} sets {listed}, which ivg cannot do\n"
                '  leave out what the checkpoint sets: --generation-config ignore (generation_config = "ignore" in the table run)'
            )


def read_generation_config(model: str | Path, **hub: Any) -> GenerationConfig | None:
    """A checkpoint's ``generation_config.json``; None where it has none. ``hub``: arguments of ``from_pretrained``."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(model, **hub)
    except OSError:
        return None


def defaults_of(config: Any, name: str, mode: str) -> GenerationDefaults:
    """The settings that apply of a checkpoint's ``config`` in ``mode`` (:data:`GenerationConfigMode`); ``name`` is the model's.

    Raises:
        ConfigError: it sets something unsupported, or ``mode`` is unknown.
    """
    choice("auto", "ignore").checked("generation_config", mode)
    if mode == "ignore":
        return GenerationDefaults()
    found = generation_defaults(config, name)
    found.check(name)
    return found


def generation_defaults(config: Any, name: str = "base") -> GenerationDefaults:
    """From a transformers ``GenerationConfig`` (or None, or a mapping).

    Raises:
        ConfigError: a setting of the wrong type or out of range; names the file of ``name``.
    """
    found = _as_mapping(config)
    settings: dict[str, Any] = {}
    for hf_name, own_name in _OWN_NAMES.items():
        value = _usable(hf_name, found.get(hf_name))
        if value is None:
            continue
        try:
            settings[own_name] = check(SamplingParams, own_name, value)
        except ConfigError as e:
            raise ConfigError(
                f"generation_config.json of {name}: {e}\n  correct the file, or ignore it: --generation-config ignore"
            ) from None
    if found.get("min_new_tokens") is not None:  # takes precedence, as in `generate`
        settings.pop("min_length", None)
    left_out = {key: why for key, (off, why) in _IGNORED.items() if found.get(key) is not None and found[key] != off}
    refused = {key: found[key] for key, off in _REFUSED.items() if found.get(key) is not None and found[key] != off}
    return GenerationDefaults(settings, left_out, refused)


def _as_mapping(config: Any) -> Mapping[str, Any]:
    if config is None:
        return {}
    return config if isinstance(config, Mapping) else dict(config.to_dict())


def _usable(name: str, value: Any) -> Any:
    """``value`` in our notation; None where it switches the setting off."""
    if value is None:
        return None
    if name == "top_k" and value == -1:  # vLLM's "off"
        return 0
    if name in ("suppress_tokens", "begin_suppress_tokens"):
        return [i for i in value if i >= 0] or None  # -1 stands for none in Whisper's files
    if name == "stop_strings":
        return [value] if isinstance(value, str) else list(value) or None
    if name in ("bad_words_ids", "sequence_bias") and not value:
        return None
    return value
