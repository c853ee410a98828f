"""Arguments of transformers' ``model.generate`` in a search: supported, without effect, or refused by name.

Every field of ``GenerationConfig``, every logits processor, stopping criterion and model input is in one of the tables below; others are
refused. A test checks that the tables cover all fields of the installed transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as lp
from transformers.generation import stopping_criteria as sc

from ivg.errors import ConfigError
from ivg.types import SamplingParams


def _names(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


SUPPORTED = _names(
    # by the search itself (stop_strings as a StopStringCriteria: transformers passes no tokenizer on to a callable)
    "max_length max_new_tokens do_sample temperature top_k top_p min_p num_return_sequences return_dict_in_generate pad_token_id",
    "eos_token_id stop_strings token_healing",
    # by transformers' processors, on the guided logits
    "min_length min_new_tokens repetition_penalty no_repeat_ngram_size bad_words_ids sequence_bias suppress_tokens",
    "begin_suppress_tokens forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty remove_invalid_values",
    "renormalize_logits",
)
"""Fields of ``GenerationConfig`` that act as in ``generate``."""

NO_EFFECT = _names(
    # how it is computed, not what
    "use_cache use_mtp cache_implementation cache_config max_cache_len is_assistant num_assistant_tokens num_assistant_tokens_schedule",
    "assistant_confidence_threshold prompt_lookup_num_tokens max_matching_ngram_size assistant_early_exit assistant_lookbehind",
    "target_lookbehind assistant_ensemble_weight speculation_type compile_config disable_compile continuous_batching_config low_memory",
    "prefill_chunk_size",
    # of beams, which are refused, or of encoders, which causal models lack
    "early_stopping length_penalty bos_token_id decoder_start_token_id",
    # about the file
    "_from_model_config transformers_version",
)
"""Fields that change no token of a search."""

UNSUPPORTED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((1,), "the search has its own beams: GuidedGenerate(…, width=…, successors=…)"),
    "num_beam_groups": ((1,), "leave it out"),
    "diversity_penalty": ((0.0,), "leave it out"),
    "max_time": ((), "leave it out: answers would depend on the speed of the machine"),
    "top_h": ((), "use top_p or min_p"),
    "typical_p": ((1.0,), "use top_p or min_p"),
    "epsilon_cutoff": ((0.0,), "use top_p or min_p"),
    "eta_cutoff": ((0.0,), "use top_p or min_p"),
    "encoder_repetition_penalty": ((1.0,), "leave it out"),
    "encoder_no_repeat_ngram_size": ((0,), "leave it out"),
    "guidance_scale": ((1.0,), "classifier-free guidance reads a second prompt; leave it out"),
    "watermarking_config": ((), "leave it out"),
    "penalty_alpha": ((0.0,), "leave it out"),
    "dola_layers": ((), "leave it out"),
    "constraints": ((), "leave it out"),
    "force_words_ids": ((), "leave it out"),
    "output_scores": ((False,), "GuidedModel.generate(…, record=True, alternatives=…) gives log-probabilities"),
    "output_logits": ((False,), "GuidedModel.generate(…, record=True, alternatives=…) gives log-probabilities"),
    "output_attentions": ((False,), "leave it out"),
    "output_hidden_states": ((False,), "leave it out"),
}
"""Fields that a search does not support: (neutral values, what to do instead)."""
NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    **{name: values for name, (values, _) in UNSUPPORTED.items()},
    "num_return_sequences": (1,),
    "return_dict_in_generate": (False,),
    "token_healing": (False,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False, True),
}
"""Values with which a field changes no token, for those that have such; None is one for every field."""

SAMPLING_WARPERS: Mapping[type, str] = {
    lp.TemperatureLogitsWarper: "temperature",
    lp.TopKLogitsWarper: "top_k",
    lp.TopPLogitsWarper: "top_p",
    lp.MinPLogitsWarper: "min_p",
}
"""Processors that the search applies itself, each with the field of ``GenerationConfig`` that sets it."""
NEUTRAL = (lp.LogitNormalization, lp.InfNanRemoveLogitsProcessor)
"""Processors that need not be applied: renormalising changes no sample; invalid logits are replaced before guidance."""
STATELESS = (
    lp.MinLengthLogitsProcessor,
    lp.MinNewTokensLengthLogitsProcessor,
    lp.RepetitionPenaltyLogitsProcessor,
    lp.NoRepeatNGramLogitsProcessor,
    lp.SequenceBiasLogitsProcessor,
    lp.NoBadWordsLogitsProcessor,
    lp.SuppressTokensLogitsProcessor,
    lp.SuppressTokensAtBeginLogitsProcessor,
    lp.ForcedBOSTokenLogitsProcessor,
    lp.ForcedEOSTokenLogitsProcessor,
    lp.ExponentialDecayLengthPenalty,
)
"""Processors that are functions of (input_ids, scores), hence apply to any row of a search."""

MODEL_KWARGS = frozenset(
    {"attention_mask", "position_ids", "past_key_values", "use_cache", "cache_position", "logits_to_keep", "output_router_logits"}
)
"""Model inputs that ``generate`` adds by itself."""


def is_neutral(name: str, value: Any) -> bool:
    """Does ``generate`` with this argument give what a search gives without it?"""
    return name in NO_EFFECT or value is None or value in NEUTRAL_VALUES.get(name, ())


def check_config(config: Any) -> None:
    """Raise for fields that a search does not support.

    Raises:
        ConfigError: names the field, its value and what to do instead.
    """
    for name, value in vars(config).items():
        if name in SUPPORTED or is_neutral(name, value) or (name.startswith("_") and name != "_from_model_config"):
            continue
        _, advice = UNSUPPORTED.get(name, ((), "unknown to this version of ivg; leave it out"))
        raise ConfigError(f"{name}={value!r} is not supported by GuidedGenerate\n  {advice}")


def check_model_kwargs(given: Mapping[str, Any]) -> Tensor | None:
    """The attention mask; other model inputs are refused.

    Raises:
        ConfigError: embeddings, images, token types, a cache that is not empty …; names it.
    """
    for name, value in given.items():
        if name not in MODEL_KWARGS and value is not None:
            raise ConfigError(f"{name}: GuidedGenerate reads input_ids and attention_mask only\n  leave {name} out")
    cache = given.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ConfigError("past_key_values: GuidedGenerate has its own cache\n  leave past_key_values out")
    mask: Tensor | None = given.get("attention_mask")
    positions: Tensor | None = given.get("position_ids")
    if positions is not None and positions.dim() == 2 and not _counts_tokens(positions, mask):
        raise ConfigError("position_ids: GuidedGenerate counts the tokens of each row itself\n  leave position_ids out")
    return mask


def _counts_tokens(positions: Tensor, mask: Tensor | None) -> bool:
    """Are these the positions that ``generate`` makes: 0, 1, 2 … over the tokens of each row [rows, tokens] that are no padding?"""
    seen = torch.ones_like(positions) if mask is None else mask
    counted = seen.long().cumsum(-1) - 1
    return positions.shape == counted.shape and bool(((positions == counted) | (seen == 0)).all())


def read_processors(processors: Iterable[Any], config: Any) -> list[Any]:
    """The processors to apply to the guided logits.

    Raises:
        ConfigError: a processor that may keep state, or that contradicts ``config``; names it.
    """
    out = []
    for processor in processors:
        kind, name = type(processor), type(processor).__name__
        if kind in SAMPLING_WARPERS:
            if config.do_sample:  # greedy, none of them matters
                _check_same(
                    f"logits_processor {name}",
                    SAMPLING_WARPERS[kind],
                    getattr(processor, SAMPLING_WARPERS[kind]),
                    getattr(config, SAMPLING_WARPERS[kind]),
                )
        elif kind in STATELESS:
            out.append(processor)
        elif kind not in NEUTRAL:
            raise ConfigError(
                f"logits_processor {name}: a search passes rows in any order and number, and {name} may keep state\n"
                "  leave it out; for a function of (input_ids, scores): GuidedGenerate(…, processors=[…])"
            )
    return out


def removes_invalid_logits(processors: Iterable[Any]) -> bool:
    """Are NaN and infinite logits of the base replaced by finite ones?"""
    return any(isinstance(processor, lp.InfNanRemoveLogitsProcessor) for processor in processors)


def read_stops(criteria: Iterable[Any], config: Any) -> tuple[str, ...]:
    """The stop strings; maximum length and end-of-sequence tokens must agree with ``config``.

    Raises:
        ConfigError: another stopping criterion, or one that contradicts ``config``; names it.
    """
    stops: list[str] = []
    for criterion in criteria:
        name = f"stopping_criteria {type(criterion).__name__}"
        if isinstance(criterion, sc.StopStringCriteria):
            stops += criterion.stop_strings
        elif type(criterion) is sc.MaxLengthCriteria:
            _check_same(name, "max_length", criterion.max_length, config.max_length)
        elif type(criterion) is sc.EosTokenCriteria:
            _check_same(name, "eos_token_id", sorted(criterion.eos_token_id.tolist()), sorted(set(end_ids(config))))
        else:
            raise ConfigError(
                f"{name} is not supported by GuidedGenerate\n"
                "  leave it out; max_new_tokens, eos_token_id and StopStringCriteria end responses"
            )
    return tuple(stops)


def _check_same(who: str, field: str, got: Any, expected: Any) -> None:
    if got != expected:
        raise ConfigError(f"{who} has {field}={got!r}, but the call has {field}={expected!r}\n  give {field} to generate instead")


def sampling_params(config: Any, prompt_length: int, stop: tuple[str, ...]) -> SamplingParams:
    """The sampling settings of the call; penalties are left to transformers' processors."""
    limit = config.max_new_tokens if config.max_new_tokens is not None else config.max_length - prompt_length
    sampled = bool(config.do_sample)
    return SamplingParams(
        temperature=(1.0 if config.temperature is None else config.temperature) if sampled else 0.0,
        top_k=(config.top_k or 0) if sampled else 0,
        top_p=(1.0 if config.top_p is None else config.top_p) if sampled else 1.0,
        min_p=(config.min_p or 0.0) if sampled else 0.0,
        max_new_tokens=limit,
        stop=stop,
    )


def end_ids(config: Any) -> list[int]:
    """End-of-sequence token ids of the call."""
    found = config.eos_token_id
    return [] if found is None else [int(i) for i in (found if isinstance(found, list | tuple) else [found])]


def padding_id(config: Any, tokenizer: Any) -> int:
    """The padding token after shorter responses, as in ``generate``: an end-of-sequence token where there is no other."""
    prepared = getattr(config, "_pad_token_tensor", None)
    known = (config.pad_token_id, None if prepared is None else int(prepared), tokenizer.pad_token_id, *end_ids(config), 0)
    return int(next(i for i in known if i is not None))
