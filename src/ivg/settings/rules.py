"""What every setting may be: one table of types and ranges for the library, recipes, the command line and the server.

Knows names, types and ranges of single settings. Must not know which settings go together (``decoding``). Standard library only.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ivg.errors import ConfigError

MOST_TOKENS = 1 << 40
"""No count of tokens is larger."""
MOST_HYPOTHESES = 1 << 16
"""Of W and of K, each."""
COOLEST = 1e-3
"""Lower temperatures than this, but 0, would divide logits beyond float32."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What one setting may be.

    Attributes:
        kind: in words, for a value of the wrong type.
        convert: the value in the type that is kept; raises TypeError, ValueError or OverflowError for another type.
        expected: in words, for a value of the right type that is out of range.
        fine: is a converted value in range?
        optional: None is a value, too.
        label: how errors call the setting; default: its name.
        most: larger numbers are named so in the error.
    """

    kind: str
    convert: Callable[[Any], Any]
    expected: str = ""
    fine: Callable[[Any], bool] = lambda _: True
    optional: bool = False
    label: str = ""
    most: float = math.inf

    def checked(self, name: str, value: Any) -> Any:
        """``value`` in the type that is kept.

        Raises:
            ConfigError: names the setting, what it may be and what it got.
        """
        label = self.label or name
        if value is None and self.optional:
            return None
        try:
            got = self.convert(value)
        except (TypeError, ValueError, OverflowError):
            kind = f"{self.kind}, {self.expected}" if self.expected else self.kind
            raise ConfigError(f"{label} must be {kind}, got {value!r}") from None
        if isinstance(got, int | float) and got > self.most:
            raise ConfigError(f"{label} must be at most {self.most:g}, got {got!r}")
        if not self.fine(got):
            raise ConfigError(f"{label} must be {self.expected}, got {got!r}")
        return got


def check(name: str, value: Any) -> Any:
    """``value`` of the setting ``name`` in the type that is kept; settings that are not in :data:`RULES` pass as they are.

    Raises:
        ConfigError: names the setting, what it may be and what it got.
    """
    rule = RULES.get(name)
    return value if rule is None else rule.checked(name, value)


def settle(instance: Any) -> None:
    """Check every field of a frozen dataclass that has a rule, and keep what :func:`check` gives (``__post_init__``).

    Raises:
        ConfigError: as :func:`check`.
    """
    for f in fields(instance):
        if f.name in RULES:
            value = getattr(instance, f.name)
            kept = check(f.name, value)
            if kept is not value:
                object.__setattr__(instance, f.name, kept)


def whole(value: Any) -> int:
    """An integer of Python or numpy; a truth value is none, nor is 2.0."""
    if isinstance(value, bool):
        raise TypeError
    return value if type(value) is int else operator.index(value)


def real(value: Any) -> float:
    """A finite number of Python or numpy."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return int(value) if isinstance(value, int) else number


def _truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if type(value).__module__ == "numpy" and type(value).__name__.startswith("bool"):
        return bool(value)
    raise TypeError


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError
    return value if type(value) is tuple and all(isinstance(v, str) for v in value) else tuple(_text(v) for v in value)


def _items(value: Any) -> list[Any]:
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise TypeError
    return list(value)


def _ids(value: Any) -> tuple[int, ...]:
    return tuple(whole(v) for v in _items(value))


def _one_or_more_ids(value: Any) -> tuple[int, ...]:
    return (whole(value),) if not hasattr(value, "__iter__") else _ids(value)


def _sequences(value: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(_ids(v) for v in _items(value))


def _biases(value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    out = []
    for pair in value.items() if isinstance(value, Mapping) else _items(value):
        ids, bias = pair
        number = float(bias)
        if isinstance(bias, bool | str) or math.isnan(number):
            raise ValueError
        out.append((_ids(ids), number))
    return tuple(out)


def _decay(value: Any) -> tuple[int, float]:
    start, factor = _items(value)
    return whole(start), float(real(factor))


def _weights(value: Any) -> tuple[tuple[str, float], ...]:
    out = []
    for pair in _items(value):
        name, weight = pair
        out.append((_text(name), real(weight)))
    return tuple(out)


def _not_negative(ids: Sequence[int]) -> bool:
    return all(i >= 0 for i in ids)


def _count(expected: str, least: int, most: int = MOST_TOKENS, *, optional: bool = False, label: str = "") -> Rule:
    return Rule("a whole number", whole, expected, lambda v: v >= least, optional, label, most)


def _number(expected: str, fine: Callable[[Any], bool], most: float = math.inf, *, optional: bool = False) -> Rule:
    return Rule("a finite number", real, expected, fine, optional, most=most)


def _choice(*names: str, optional: bool = False) -> Rule:
    listed = ", ".join(names[:-1]) + f" or {names[-1]}"
    return Rule("a name", _text, listed, lambda v: v in names, optional)


_FLAG = Rule("true or false", _truth)
_NAME = Rule("a text", _text)
_IDS = "token ids, 0 or more"

RULES: dict[str, Rule] = {
    # How tokens are drawn and when a response ends (types.SamplingParams)
    "temperature": _number(f"0 (greedy), or {COOLEST:g} or more", lambda v: v == 0 or v >= COOLEST, 1000),
    "top_k": _count("0 (off) or more", 0),
    "top_p": _number("in (0, 1]", lambda v: 0 < v <= 1),
    "min_p": _number("in [0, 1)", lambda v: 0 <= v < 1),
    "repetition_penalty": _number("positive", lambda v: v > 0, 1000),
    "max_new_tokens": _count("at least 1", 1),
    "stop": Rule("a list of texts", _texts, "texts that are not empty", lambda v: all(v)),
    "ignore_eos": _FLAG,
    "min_new_tokens": _count("0 (off) or more", 0),
    "min_length": _count("0 (off) or more", 0),
    "no_repeat_ngram_size": _count("0 (off) or more", 0),
    "suppress_tokens": Rule("a list of token ids", _ids, _IDS, _not_negative),
    "begin_suppress_tokens": Rule("a list of token ids", _ids, _IDS, _not_negative),
    "bad_words_ids": Rule("a list of lists of token ids", _sequences, _IDS, lambda v: all(s and _not_negative(s) for s in v)),
    "sequence_bias": Rule("a list of (token ids, bias)", _biases, _IDS, lambda v: all(s and _not_negative(s) for s, _ in v)),
    "forced_bos_token_id": _count("a token id, 0 or more", 0, optional=True),
    "forced_eos_token_id": Rule("a token id or a list of them", _one_or_more_ids, _IDS, _not_negative),
    "exponential_decay_length_penalty": Rule(
        "a pair (start, factor)", _decay, "a start of 0 or more and a positive factor", lambda v: v[0] >= 0 and v[1] > 0, optional=True
    ),
    # The search and its rules (search.methods.Method and what it becomes)
    "name": _NAME,
    "summary": _NAME,
    "width": _count("at least 1", 1, MOST_HYPOTHESES, label="width (W)"),
    "successors": _count("at least 1", 1, MOST_HYPOTHESES, label="successors (K)"),
    "chunk_length": _count("at least 1", 1, optional=True, label="chunk_length (L)"),
    "token": Rule("the name of a value", _text, "no empty text", bool, optional=True),
    "select": Rule("the name of a value", _text, "no empty text", bool, optional=True),
    "weights": Rule("names and finite numbers", _weights),
    "select_weights": Rule("names and finite numbers", _weights),
    "beta": _number("within 1000 of 0", lambda v: -1000 <= v <= 1000),
    "candidates": _count("0 (whole vocabulary) or more", 0),
    "transform": _choice("identity", "log-sigmoid", "centered"),
    "normalise": _FLAG,
    "gate": _number("0 (guide everywhere) or more nats", lambda v: v >= 0),
    "draft": _count("0 (off) or more tokens", 0, MOST_HYPOTHESES),
    "rule": _choice("top", "soft", "reject", "particles"),
    "soft_scale": _number("positive", lambda v: v > 0),
    "decay": _number("in (0, 1]", lambda v: 0 < v <= 1),
    "original": _FLAG,
    "target": _number("a finite reward, within 1e9 of 0", lambda v: abs(v) <= 1e9, optional=True),
    "accept_scale": _number("positive", lambda v: v > 0),
    "threshold_start": _number("in [0, 1]", lambda v: 0 <= v <= 1),
    "tries": _count("at least 1", 1),
    "segment_entropy": _number("positive (nats)", lambda v: v > 0),
    "segment_min": _count("at least 1 token", 1),
    "particle_beta": _number("within 1000 of 0", lambda v: -1000 <= v <= 1000),
    "resample_below": _number("in [0, 1]", lambda v: 0 <= v <= 1),
    # How a model is set up (steered.GuidedModel)
    "generation_config": _choice("auto", "ignore"),
    # A request (search.request.Request)
    "seed": Rule("a whole number", whole, "in [-2**63, 2**63 - 1]", lambda v: -(1 << 63) <= v < 1 << 63),
    "index": _count("0 or more", 0, 1 << 62),
    "trace": _FLAG,
    "record": _FLAG,
    "alternatives": _count("0 or more tokens", 0, optional=True),
    "stride": _count("at least 1 token", 1),
}
"""By name. A name means the same setting wherever it stands."""
