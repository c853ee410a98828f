"""How tokens are drawn and when a response ends. Standard library only; ``ivg.types`` has the class too."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Annotated, Any

from ivg.errors import ConfigError
from ivg.settings import rules as r
from ivg.settings.schema import Setting, validate

ONLY_TRANSFORMERS = (
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

_OFF = r.count(0, "0 (off) or more")
_TEMPERATURE = replace(
    r.number(f"0 (greedy), or {r.MIN_TEMPERATURE:g} or more", 0, most=1000), fine=lambda v: v == 0 or v >= r.MIN_TEMPERATURE
)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn and when a response ends. Names and meanings are those of transformers' ``GenerationConfig``.

    Token guidance acts on the logits first. Then, in this order: ``sequence_bias``, ``repetition_penalty``, ``no_repeat_ngram_size``,
    ``bad_words_ids``, ``min_length``, ``min_new_tokens``, ``forced_bos_token_id``, ``forced_eos_token_id``,
    ``exponential_decay_length_penalty``, ``suppress_tokens``, ``begin_suppress_tokens``; then temperature, top-k, top-p, min-p.
    Settings that look back look at the prompt and the response. docs/reference/settings.md describes each.

    Raises:
        ConfigError: a field of the wrong type or out of range.
    """

    temperature: Annotated[
        float,
        Setting(
            "Sampling temperature, applied after guidance; 0 is greedy.",
            _TEMPERATURE,
            flags=("--temperature", "-t"),
        ),
    ] = 1.0
    top_k: Annotated[int, Setting("Keep the k likeliest tokens; 0 is off.", _OFF, flags=("--top-k",))] = 0
    top_p: Annotated[
        float,
        Setting(
            "Keep the smallest set of tokens whose probability reaches p; 1 is off.",
            r.number("in (0, 1]", 0, 1, open_low=True),
            flags=("--top-p",),
        ),
    ] = 1.0
    min_p: Annotated[
        float,
        Setting(
            "Keep tokens at least this many times as likely as the likeliest; 0 is off.",
            r.number("in [0, 1)", 0, 1, open_high=True),
            flags=("--min-p",),
        ),
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        Setting(
            "Penalty on tokens that the prompt or the response has already (Keskar et al. 2019); 1 is off.",
            r.number("positive", 0, open_low=True, most=1000),
            flags=("--repetition-penalty",),
        ),
    ] = 1.0
    max_new_tokens: Annotated[
        int,
        Setting("Largest number of tokens in a response.", r.count(1), aliases=("max_tokens",), flags=("--max-new-tokens",)),
    ] = 50
    stop: Annotated[
        tuple[str, ...],
        Setting(
            "Text that ends the response and is not part of it (\\n: a line break); may be repeated.",
            r.STOPS,
            flags=("--stop",),
            accepts=list[str],
            escapes=True,
        ),
    ] = ()
    ignore_eos: Annotated[bool, Setting("Never draw an end-of-sequence token.", r.FLAG, flags=("--ignore-eos",))] = False
    min_new_tokens: Annotated[
        int, Setting("No end-of-sequence token before the response has this many tokens; 0 is off.", _OFF, flags=("--min-new-tokens",))
    ] = 0
    min_length: Annotated[int, Setting("The same for prompt and response together; 0 is off.", _OFF)] = 0
    no_repeat_ngram_size: Annotated[int, Setting("Draw no sequence of this many tokens twice; 0 is off.", _OFF)] = 0
    suppress_tokens: Annotated[tuple[int, ...], Setting("Token ids that are never drawn.", r.TOKEN_IDS, accepts=list[int])] = ()
    begin_suppress_tokens: Annotated[tuple[int, ...], Setting("Token ids that are not drawn first.", r.TOKEN_IDS, accepts=list[int])] = ()
    bad_words_ids: Annotated[
        tuple[tuple[int, ...], ...],
        Setting("Sequences of token ids that are never completed.", r.ID_SEQUENCES, accepts=list[list[int]]),
    ] = ()
    sequence_bias: Annotated[
        tuple[tuple[tuple[int, ...], float], ...],
        Setting(
            "Pairs of a sequence of token ids and a number, which is added to the logit of its last token after the others.",
            r.BIASES,
            accepts=list[Any],
        ),
    ] = ()
    forced_bos_token_id: Annotated[
        int | None, Setting("Token id that is drawn first where the prompt has one token.", r.TOKEN_ID, unset="off")
    ] = None
    forced_eos_token_id: Annotated[
        tuple[int, ...],
        Setting("Token ids that are drawn as the last of max_new_tokens.", r.ONE_OR_MORE_IDS, accepts=int | list[int]),
    ] = ()
    exponential_decay_length_penalty: Annotated[
        tuple[int, float] | None,
        Setting(
            "Pair (start, factor): raises the logits of end-of-sequence tokens beyond start new tokens.",
            r.LENGTH_DECAY,
            accepts=list[Any],
            unset="off",
        ),
    ] = None

    def __post_init__(self) -> None:
        validate(self)

    def check_token_ids(self, size: int, without: Collection[str] = ()) -> None:
        """Raise for token ids outside a vocabulary of ``size`` tokens; fields ``without`` are not looked at.

        Raises:
            ConfigError: names the field and the id.
        """
        for name in sorted(_TOKEN_IDS.keys() - set(without)):
            wrong = next((i for i in _TOKEN_IDS[name](getattr(self, name)) if i >= size), None)
            if wrong is not None:
                raise ConfigError(f"{name} has the token id {wrong}, outside the base's vocabulary\n  expected ids from 0 to {size - 1}")

    @property
    def changed(self) -> dict[str, Any]:
        """The fields that are not at their defaults."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}


_TOKEN_IDS: Mapping[str, Callable[[Any], Iterable[int]]] = {
    "suppress_tokens": tuple,
    "begin_suppress_tokens": tuple,
    "forced_eos_token_id": tuple,
    "forced_bos_token_id": lambda value: () if value is None else (value,),
    "bad_words_ids": chain.from_iterable,
    "sequence_bias": lambda value: chain.from_iterable(ids for ids, _ in value),
}
"""The token ids in each field that has some."""

DEFAULT_SAMPLING = SamplingParams(temperature=0.7, max_new_tokens=50)
"""Where nothing is said: as for sentiment in Liu et al. 2024 (arXiv 2409.17819)."""

PLAIN_SAMPLING: dict[str, Any] = {
    f.name: f.default for f in fields(SamplingParams) if f.name not in ("temperature", "max_new_tokens", "stop", "ignore_eos")
}
"""Settings with which tokens are drawn from the softmax at the request's temperature and from nothing else."""
