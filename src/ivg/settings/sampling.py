"""How tokens are drawn and when a response ends. Standard library only; ``ivg.types`` has the class too."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
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

STRUCTURES = ("json_schema", "regex", "choice", "grammar")
"""Settings of structured output; a response follows one of them."""
LOOK_BACK = frozenset({"frequency_penalty", "presence_penalty", "bad_words", *STRUCTURES})
"""Settings that look at the whole response and no further: a server that is asked for a part of it sees that part alone."""
IN_CHUNKS = " in chunks"
STOPS_BESIDE_EOS = "stop_token_ids beside ignore_eos"
COMBINATIONS = frozenset({STOPS_BESIDE_EOS, *(f"{name}{IN_CHUNKS}" for name in LOOK_BACK)})
"""Features that are no setting by themselves (:meth:`SamplingParams.features`)."""

_OFF = r.count(0, "0 (off) or more")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn and when a response ends. Names and meanings are those of transformers' ``GenerationConfig``.

    Structured output (``json_schema``, ``regex``, ``choice``, ``grammar``) forbids tokens of the base first. Token guidance acts on what
    is left. Then, in this order: ``sequence_bias``, ``logit_bias``, ``repetition_penalty``,
    ``frequency_penalty``, ``presence_penalty``, ``no_repeat_ngram_size``, ``bad_words_ids``, ``bad_words``, ``min_length``,
    ``min_new_tokens``, ``forced_bos_token_id``, ``forced_eos_token_id``,
    ``exponential_decay_length_penalty``, ``suppress_tokens``, ``begin_suppress_tokens``; then temperature, top-k, top-p, min-p.
    What transformers lacks has vLLM's names and meanings: those settings look back at the response alone, the others at prompt and
    response. docs/reference/settings.md describes each.

    Raises:
        ConfigError: a field of the wrong type or out of range.
    """

    temperature: Annotated[
        float,
        Setting(
            f"Sampling temperature, applied after guidance; 0, or less than {r.MIN_TEMPERATURE:g}, is greedy.",
            r.TEMPERATURE,
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
    frequency_penalty: Annotated[
        float,
        Setting(
            "Subtracted from the logit of a token for each time that the response has it already; 0 is off.",
            r.PENALTY,
            flags=("--frequency-penalty",),
        ),
    ] = 0.0
    presence_penalty: Annotated[
        float,
        Setting(
            "Subtracted from the logits of all tokens that the response has already; 0 is off.",
            r.PENALTY,
            flags=("--presence-penalty",),
        ),
    ] = 0.0
    logit_bias: Annotated[
        tuple[tuple[int, float], ...],
        Setting(
            "Number in [-100, 100] that is added to the logit of a token: ID=NUMBER; may be repeated.",
            r.LOGIT_BIAS,
            flags=("--logit-bias",),
            accepts=dict[str, float],
        ),
    ] = ()
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
    stop_token_ids: Annotated[
        tuple[int, ...],
        Setting(
            "Token ids that end the response, besides the base's end-of-sequence tokens; their text is not part of it.",
            r.TOKEN_IDS,
            flags=("--stop-token-ids",),
            accepts=list[int],
        ),
    ] = ()
    end_at_sentence: Annotated[
        int,
        Setting(
            "After this many tokens the response ends with its sentence, or its line, if that ends within max_new_tokens; 0 is off.",
            _OFF,
            flags=("--end-at-sentence",),
        ),
    ] = 0
    ignore_eos: Annotated[bool, Setting("Never draw an end-of-sequence token.", r.FLAG, flags=("--ignore-eos",))] = False
    min_new_tokens: Annotated[
        int,
        Setting(
            "No token that ends the response before it has this many tokens; 0 is off.",
            _OFF,
            aliases=("min_tokens",),
            flags=("--min-new-tokens",),
        ),
    ] = 0
    min_length: Annotated[int, Setting("The same for prompt and response together; 0 is off.", _OFF)] = 0
    no_repeat_ngram_size: Annotated[int, Setting("Draw no sequence of this many tokens twice; 0 is off.", _OFF)] = 0
    suppress_tokens: Annotated[tuple[int, ...], Setting("Token ids that are never drawn.", r.TOKEN_IDS, accepts=list[int])] = ()
    begin_suppress_tokens: Annotated[tuple[int, ...], Setting("Token ids that are not drawn first.", r.TOKEN_IDS, accepts=list[int])] = ()
    bad_words_ids: Annotated[
        tuple[tuple[int, ...], ...],
        Setting("Sequences of token ids that are never completed.", r.ID_SEQUENCES, accepts=list[list[int]]),
    ] = ()
    bad_words: Annotated[
        tuple[str, ...],
        Setting(
            "Text that is never completed, as the base's tokens spell it at the beginning of a text and behind a space; may be repeated.",
            r.WORDS,
            flags=("--bad-words",),
            accepts=list[str],
        ),
    ] = ()
    json_schema: Annotated[
        str | None,
        Setting(
            "JSON schema that the response follows: a file (.json), or the schema itself.",
            r.JSON_SCHEMA,
            aliases=("guided_json",),
            flags=("--schema",),
            accepts=dict[str, Any] | str,
            files=(".json",),
            unset="none",
        ),
    ] = None
    regex: Annotated[
        str | None,
        Setting("Regular expression that the response matches.", r.GRAMMAR, aliases=("guided_regex",), flags=("--regex",), unset="none"),
    ] = None
    choice: Annotated[
        tuple[str, ...] | None,
        Setting(
            "Text that the response may be, and no other; may be repeated.",
            r.CHOICES,
            aliases=("guided_choice",),
            flags=("--choice",),
            accepts=list[str],
            unset="none",
        ),
    ] = None
    grammar: Annotated[
        str | None,
        Setting(
            "Grammar that the response follows, in Lark's or llama.cpp's notation (GBNF): a file (.lark, .gbnf), or the grammar itself.",
            r.GRAMMAR,
            aliases=("guided_grammar",),
            flags=("--grammar",),
            files=(".lark", ".gbnf", ".ebnf"),
            unset="none",
        ),
    ] = None
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
        if len(given := [name for name in STRUCTURES if getattr(self, name)]) > 1:
            raise ConfigError(f"{' and '.join(given)}: a response follows one of them\n  leave the others out")
        if given and self.end_at_sentence:
            raise ConfigError(f"end_at_sentence would end {given[0]} in its middle, at a full stop\n  set end_at_sentence to 0")

    @property
    def structure(self) -> tuple[str, str] | None:
        """(name, text) of the setting of structured output, choices as JSON; None: there is none."""
        for name in STRUCTURES:
            if value := getattr(self, name):
                return name, value if isinstance(value, str) else json.dumps(value)
        return None

    def check_token_ids(self, size: int, without: Collection[str] = ()) -> None:
        """Raise for token ids outside a vocabulary of ``size`` tokens; fields ``without`` are not looked at.

        Raises:
            ConfigError: names the field and the id.
        """
        for name in sorted(_TOKEN_IDS.keys() - set(without)):
            wrong = next((i for i in _TOKEN_IDS[name](getattr(self, name)) if i >= size), None)
            if wrong is not None:
                raise ConfigError(f"{name} has the token id {wrong}, outside the base's vocabulary\n  expected ids from 0 to {size - 1}")

    def features(self, *, chunked: bool) -> set[str]:
        """What an engine must be able to do: the names of :attr:`changed` settings, and of some combinations.

        Args:
            chunked: the response is generated in several requests.
        """
        names = set(self.changed)
        if self.ignore_eos and self.stop_token_ids:
            names.add(STOPS_BESIDE_EOS)
        return names | ({f"{name}{IN_CHUNKS}" for name in LOOK_BACK & names} if chunked else set())

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
    "stop_token_ids": tuple,
    "logit_bias": lambda value: (i for i, _ in value),
    "sequence_bias": lambda value: chain.from_iterable(ids for ids, _ in value),
}
"""The token ids in each field that has some."""

DEFAULT_SAMPLING = SamplingParams(temperature=0.7, max_new_tokens=50)
"""Where nothing is said: as for sentiment in Liu et al. 2024 (arXiv 2409.17819)."""

PLAIN_SAMPLING: dict[str, Any] = {
    f.name: f.default
    for f in fields(SamplingParams)
    if f.name not in ("temperature", "max_new_tokens", "stop", "stop_token_ids", "ignore_eos")
}
"""Settings with which tokens are drawn from the softmax at the request's temperature and from nothing else."""
