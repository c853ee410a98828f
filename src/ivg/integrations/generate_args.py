"""What ``model.generate`` can be asked for, and what becomes of it in a search: done, of no effect, or refused by name.

Knows transformers' ``GenerationConfig``, logits processors and stopping criteria. Nothing falls through: a field, a processor or an
argument that stands in no table here is refused (a test goes through all fields of the installed transformers).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers.generation import logits_process as lp
from transformers.generation import stopping_criteria as sc

from ivg.errors import ConfigError
from ivg.types import SamplingParams


def _names(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


DONE = _names(
    # by the search itself
    "max_length max_new_tokens do_sample temperature top_k top_p min_p num_return_sequences return_dict_in_generate pad_token_id",
    "eos_token_id stop_strings token_healing",
    # by transformers' processors, on the guided logits
    "min_length min_new_tokens repetition_penalty no_repeat_ngram_size bad_words_ids sequence_bias suppress_tokens",
    "begin_suppress_tokens forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty remove_invalid_values",
    "renormalize_logits",
)
"""Fields of GenerationConfig that are honoured."""

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
"""Fields that change no token here."""

REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((1,), "the search has its own beams: GuidedGenerate(…, width=…, successors=…)"),
    "num_beam_groups": ((1,), "leave it out"),
    "diversity_penalty": ((0.0,), "leave it out"),
    "max_time": ((), "leave it out: answers would depend on the machine"),
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
    "output_scores": ((False,), "GuidedModel.generate(…, record=True, alternatives=…) tells log-probabilities"),
    "output_logits": ((False,), "GuidedModel.generate(…, record=True, alternatives=…) tells log-probabilities"),
    "output_attentions": ((False,), "leave it out"),
    "output_hidden_states": ((False,), "leave it out"),
}
"""Fields that a search cannot do: (values that ask for nothing, what to do instead)."""

CUTS: Mapping[type, str] = {
    lp.TemperatureLogitsWarper: "temperature",
    lp.TopKLogitsWarper: "top_k",
    lp.TopPLogitsWarper: "top_p",
    lp.MinPLogitsWarper: "min_p",
}
"""Processors that the search does itself, and the field of GenerationConfig that each has its number from."""
NATIVE = (lp.LogitNormalization, lp.InfNanRemoveLogitsProcessor)
"""Others that need not be applied: renormalising changes no draw; invalid logits of the base are mended before guidance."""
APPLIED = (
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
"""Processors that are functions of (input_ids, scores), so that rows of a search tree can go through them."""

MODEL_KWARGS = frozenset(
    {"attention_mask", "position_ids", "past_key_values", "use_cache", "cache_position", "logits_to_keep", "output_router_logits"}
)
"""What ``generate`` passes on by itself."""


def check_config(config: Any) -> None:
    """Raise for what a search cannot do.

    Raises:
        ConfigError: names the field, what it is and what to do instead.
    """
    for name, value in vars(config).items():
        if name in DONE or name in NO_EFFECT or value is None or (name.startswith("_") and name != "_from_model_config"):
            continue
        neutral, advice = REFUSED.get(name, ((), "it is not known to this version of ivg; leave it out"))
        if value not in neutral:
            raise ConfigError(f"{name}={value!r} cannot be done by GuidedGenerate\n  {advice}")


def check_model_kwargs(given: Mapping[str, Any]) -> Tensor | None:
    """The attention mask; all other inputs of the network are refused.

    Raises:
        ConfigError: embeddings, images, token types, a cache that holds something …; names it.
    """
    for name, value in given.items():
        if name not in MODEL_KWARGS and value is not None:
            raise ConfigError(f"{name}: GuidedGenerate reads input_ids and attention_mask alone\n  leave {name} out")
    cache = given.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ConfigError("past_key_values: GuidedGenerate keeps its own cache\n  leave past_key_values out")
    mask: Tensor | None = given.get("attention_mask")
    return mask


def read_processors(processors: Iterable[Any], config: Any) -> list[Any]:
    """Those that are to be applied to the guided logits.

    Raises:
        ConfigError: one that may not be a function of its arguments alone, or that says otherwise than ``config``; names it.
    """
    out = []
    for processor in processors:
        kind, name = type(processor), type(processor).__name__
        if kind in CUTS:
            if config.do_sample:  # greedy, none of them matters
                _agrees(f"logits_processor {name}", CUTS[kind], getattr(processor, CUTS[kind]), getattr(config, CUTS[kind]))
        elif kind in APPLIED:
            out.append(processor)
        elif kind not in NATIVE:
            raise ConfigError(
                f"logits_processor {name}: a search gives rows in any order and number, and {name} may keep what it saw\n"
                "  leave it out; one that is a function of (input_ids, scores) alone: GuidedGenerate(…, processors=[…])"
            )
    return out


def mends_logits(processors: Iterable[Any]) -> bool:
    """Are NaN and infinite logits of the base to be made finite?"""
    return any(isinstance(processor, lp.InfNanRemoveLogitsProcessor) for processor in processors)


def read_stops(criteria: Iterable[Any], config: Any) -> tuple[str, ...]:
    """Stop strings; lengths and ends are the search's own.

    Raises:
        ConfigError: another stopping criterion, or one that says otherwise than ``config``; names it.
    """
    stops: list[str] = []
    for criterion in criteria:
        name = f"stopping_criteria {type(criterion).__name__}"
        if isinstance(criterion, sc.StopStringCriteria):
            stops += criterion.stop_strings
        elif type(criterion) is sc.MaxLengthCriteria:
            _agrees(name, "max_length", criterion.max_length, config.max_length)
        elif type(criterion) is sc.EosTokenCriteria:
            _agrees(name, "eos_token_id", sorted(criterion.eos_token_id.tolist()), sorted(set(end_ids(config))))
        else:
            raise ConfigError(
                f"{name} cannot be asked by GuidedGenerate\n"
                "  leave it out; max_new_tokens, eos_token_id and StopStringCriteria end responses"
            )
    return tuple(stops)


def _agrees(who: str, field: str, got: Any, expected: Any) -> None:
    if got != expected:
        raise ConfigError(f"{who} has {field}={got!r}, and the call {field}={expected!r}\n  give {field} to generate instead")


def sampling_of(config: Any, prompt_length: int, stop: tuple[str, ...]) -> SamplingParams:
    """How to draw, and when to stop; penalties are left to transformers' processors."""
    limit = config.max_new_tokens if config.max_new_tokens is not None else config.max_length - prompt_length
    drawn = bool(config.do_sample)
    return SamplingParams(
        temperature=(1.0 if config.temperature is None else config.temperature) if drawn else 0.0,
        top_k=(config.top_k or 0) if drawn else 0,
        top_p=(1.0 if config.top_p is None else config.top_p) if drawn else 1.0,
        min_p=(config.min_p or 0.0) if drawn else 0.0,
        max_new_tokens=limit,
        stop=stop,
    )


def end_ids(config: Any) -> list[int]:
    """Ids that end a response; none where the call has none."""
    found = config.eos_token_id
    return [] if found is None else [int(i) for i in (found if isinstance(found, list | tuple) else [found])]


def padding_id(config: Any, tokenizer: Any) -> int:
    """What stands behind shorter responses: as ``generate`` has it, which takes an end for want of padding."""
    prepared = getattr(config, "_pad_token_tensor", None)
    known = (config.pad_token_id, None if prepared is None else int(prepared), tokenizer.pad_token_id, *end_ids(config), 0)
    return int(next(i for i in known if i is not None))
