"""How tokens are drawn and when a response ends. Standard library only; ``ivg.types`` has it too."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ivg.settings.rules import settle

OF_TRANSFORMERS = (
    "no_repeat_ngram_size",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "sequence_bias",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
)
"""Settings of ``generate`` that neither vLLM nor endpoints have a field for."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn and when a response ends. Names and meanings are those of transformers' ``GenerationConfig``.

    What changes logits acts in this order, after guidance has been mixed in: ``sequence_bias``, ``repetition_penalty``,
    ``no_repeat_ngram_size``, ``bad_words_ids``, ``min_length``, ``min_new_tokens``, ``forced_bos_token_id``, ``forced_eos_token_id``,
    ``exponential_decay_length_penalty``, ``suppress_tokens``, ``begin_suppress_tokens``; then temperature, top-k, top-p, min-p.
    Where they look back, they look at prompt and response.

    Attributes:
        temperature: acts after guidance has been mixed in (METHOD, section 2); 0 is greedy.
        top_k: keep the k likeliest tokens; 0 is off.
        top_p: keep the smallest set of tokens whose probability reaches p; 1 is off.
        min_p: keep tokens at least ``min_p`` times as likely as the likeliest; 0 is off.
        repetition_penalty: of tokens that prompt or response have already (Keskar et al. 2019); 1 is off.
        max_new_tokens: response length at most, in base tokens.
        stop: strings that end the response; not part of the text.
        ignore_eos: never end at an end-of-sequence token, never draw one.
        min_new_tokens: no end-of-sequence token before the response has so many tokens; 0 is off.
        min_length: no end-of-sequence token before prompt and response have so many tokens; 0 is off.
        no_repeat_ngram_size: no sequence of so many tokens twice; 0 is off.
        suppress_tokens: ids that are never drawn.
        begin_suppress_tokens: ids that are not drawn first.
        bad_words_ids: sequences of ids that are never completed.
        sequence_bias: (sequence of ids, number that is added to the logit of its last token where the others stand before it).
        forced_bos_token_id: drawn first where the prompt has one token.
        forced_eos_token_id: drawn as the last of ``max_new_tokens``.
        exponential_decay_length_penalty: (start, factor): raises the logits of end-of-sequence tokens beyond ``start`` new tokens.

    Raises:
        ConfigError: a field of the wrong type or out of range (``ivg.settings.rules``).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 50
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_new_tokens: int = 0
    min_length: int = 0
    no_repeat_ngram_size: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    exponential_decay_length_penalty: tuple[int, float] | None = None

    def __post_init__(self) -> None:
        settle(self)

    @property
    def changed(self) -> dict[str, Any]:
        """The fields that are not at their defaults."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}


UNPROCESSED: dict[str, Any] = {
    f.name: f.default for f in fields(SamplingParams) if f.name not in ("temperature", "max_new_tokens", "stop", "ignore_eos")
}
"""Settings with which tokens are drawn from the softmax at the request's temperature and from nothing else."""
