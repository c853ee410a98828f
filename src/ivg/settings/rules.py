"""Types and ranges of single settings, with the errors that name them. Standard library only.

A :class:`Rule` converts and checks one value. The functions at the end of this file make the usual rules; :mod:`ivg.settings.schema`
attaches a rule to a setting.
"""

from __future__ import annotations

import json
import math
import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ivg.errors import ConfigError

MOST_TOKENS = 1 << 40
"""Largest number of tokens."""
MOST_BEAMS = 1 << 16
"""Largest width, and largest number of successors."""
MIN_TEMPERATURE = 1e-3
"""The lowest temperature: logits divided by less leave the range of float32, so less is 0."""
TEMPLATE_FILES = (".jinja", ".jinja2", ".j2")
"""Files with a chat template."""
TEXT_FILES = (".txt",)
"""Files with a text that has ``{prompt}``."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Type and range of one setting.

    Attributes:
        kind: the type in words.
        convert: the value in the type that is kept; raises TypeError, ValueError or OverflowError for another type.
        expected: the range in words.
        fine: is a converted value in range?
        optional: is None allowed?
        label: the setting's name in errors; default: its name.
        most: upper bound of a number.
        bounds: the range in words of JSON Schema.
    """

    kind: str
    convert: Callable[[Any], Any]
    expected: str = ""
    fine: Callable[[Any], bool] = lambda _: True
    optional: bool = False
    label: str = ""
    most: float = math.inf
    bounds: Mapping[str, float] = field(default_factory=dict)

    def checked(self, name: str, value: Any) -> Any:
        """``value`` in the type that is kept.

        Raises:
            ConfigError: another type, or out of range; says what was expected and what was given.
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


def _json_schema(value: Any) -> str:
    """The schema as JSON; a text must be JSON already."""
    found = json.loads(value) if isinstance(value, str) else value
    if not isinstance(found, Mapping):
        raise TypeError
    return json.dumps(found, ensure_ascii=False, allow_nan=False)


def _logit_biases(value: Any) -> tuple[tuple[int, float], ...]:
    pairs = list(value.items()) if isinstance(value, Mapping) else _items(value)
    found = {int(i) if isinstance(i, str) and i.isdecimal() else whole(i): float(real(bias)) for i, bias in pairs}
    if len(found) < len(pairs):
        raise ValueError
    return tuple(sorted(found.items()))


def _temperature(value: Any) -> float:
    """Less than the lowest temperature is 0: the limit, greedy."""
    got = real(value)
    return 0.0 if 0 < got < MIN_TEMPERATURE else got


def _decay(value: Any) -> tuple[int, float]:
    start, factor = _items(value)
    return whole(start), float(real(factor))


def _weights(value: Any) -> tuple[tuple[str, float], ...]:
    if value in ("", {}, []):
        raise ValueError
    if isinstance(value, str):
        pairs = [(name.strip(), float(weight)) for name, weight in (part.split("=") for part in value.split(","))]
    else:
        pairs = [(name, weight) for name, weight in (value.items() if isinstance(value, Mapping) else _items(value))]
    if not all(name for name, _ in pairs) or len(dict(pairs)) < len(pairs):
        raise ValueError
    return tuple((_text(name), float(real(weight))) for name, weight in pairs)


def _not_negative(ids: Sequence[int]) -> bool:
    return all(i >= 0 for i in ids)


def count(least: int, note: str = "", *, most: int = MOST_TOKENS, optional: bool = False, label: str = "") -> Rule:
    """A whole number of ``least`` or more; ``note``: the range in other words."""
    expected = note or (f"at least {least}" if least else "0 or more")
    return Rule("a whole number", whole, expected, lambda v: v >= least, optional, label, most, {"minimum": least, "maximum": most})


def number(
    expected: str,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
    most: float = math.inf,
    optional: bool = False,
    label: str = "",
) -> Rule:
    """A finite number between ``low`` and ``high``; a number beyond ``most`` gets an error of its own.

    Args:
        expected: the range in words.
        low: smallest number.
        high: largest number.
        open_low: ``low`` itself is out of range.
        open_high: ``high`` itself is out of range.
        most: largest number, said as "at most".
        optional: is None allowed?
        label: the setting's name in errors.
    """
    bounds = {"exclusiveMinimum" if open_low else "minimum": low, "exclusiveMaximum" if open_high else "maximum": min(high, most)}

    def fine(value: float) -> bool:
        return (low < value if open_low else low <= value) and (value < high if open_high else value <= high)

    known = {name: bound for name, bound in bounds.items() if math.isfinite(bound)}
    return Rule("a finite number", real, expected, fine, optional, label, most, known)


def choice(*names: str, optional: bool = False) -> Rule:
    """One of some names."""
    listed = ", ".join(names[:-1]) + f" or {names[-1]}"
    return Rule("a name", _text, listed, lambda v: v in names, optional)


def choice_or_function(*names: str) -> Rule:
    """One of some names, or a function, which only Python can give."""
    named = choice(*names)
    return Rule("a name", lambda v: v if callable(v) else _text(v), named.expected, lambda v: callable(v) or named.fine(v))


def is_template_file(template: str) -> bool:
    """Is ``template`` the name of a file rather than a template?"""
    return template.endswith((*TEMPLATE_FILES, *TEXT_FILES)) and "{" not in template and "\n" not in template


FLAG = Rule("true or false", _truth)
TEXT = Rule("a text", _text)
INSTRUCTION = Rule("a text", _text, "some text", lambda v: bool(v.strip()), optional=True)
VALUE_NAME = Rule("the name of a value", _text, "no empty text", bool, optional=True)
WRITER_NAME = Rule("the name of a value", _text, "no empty text", bool)
WEIGHTS = Rule('names and finite numbers, each name once, e.g. {implicit = 1.0, plain = 0.5} or "implicit=1.0,plain=0.5"', _weights)
LEVELS = Rule(
    'names and finite numbers, each name once, e.g. {explicit = 0.5} or "explicit=0.5"',
    _weights,
    "within 1e9 of 0",
    lambda v: all(abs(number) <= 1e9 for _, number in v),
)
MARKER = Rule("a text", _text, "no empty text", bool, optional=True)
TEMPERATURE = replace(number("0 (greedy) or more", 0, most=1000), convert=_temperature)
PENALTY = number("in [-2, 2]", -2, 2)
POSITIVE = number("positive", 0, open_low=True)
SHARE = number("in [0, 1]", 0, 1)
TEMPLATE = Rule(
    "a text",
    _text,
    '"chat", "raw", "last_turn", a text with {prompt} where the prompt goes, or a file (.jinja, .txt)',
    lambda v: v in ("chat", "raw", "last_turn") or "{prompt}" in v or is_template_file(v),
    optional=True,
)
STOPS = Rule("a list of texts", _texts, "texts that are not empty", lambda v: all(v))
CHOICES = Rule("a list of texts", _texts, "one text or more, none of them empty", lambda v: bool(v) and all(v), optional=True)
WORDS = Rule("a list of texts", _texts, "texts that are not blank", lambda v: all(word.strip() for word in v))
_IDS = "token ids, 0 or more"
TOKEN_ID = count(0, "a token id, 0 or more", optional=True)
TOKEN_IDS = Rule("a list of token ids", _ids, _IDS, _not_negative)
ONE_OR_MORE_IDS = Rule("a token id or a list of them", _one_or_more_ids, _IDS, _not_negative)
ID_SEQUENCES = Rule("a list of lists of token ids", _sequences, _IDS, lambda v: all(s and _not_negative(s) for s in v))
BIASES = Rule("a list of (token ids, bias)", _biases, _IDS, lambda v: all(s and _not_negative(s) for s, _ in v))
JSON_SCHEMA = Rule("a JSON schema (an object, or its JSON)", _json_schema, optional=True)
GRAMMAR = Rule("a text", _text, "no empty text", lambda v: bool(v.strip()), optional=True)
LOGIT_BIAS = Rule(
    "token ids, each once and with a finite number",
    _logit_biases,
    "token ids of 0 or more, and numbers in [-100, 100]",
    lambda v: all(i >= 0 and abs(bias) <= 100 for i, bias in v),
)
LENGTH_DECAY = Rule(
    "a pair (start, factor)", _decay, "a start of 0 or more and a positive factor", lambda v: v[0] >= 0 and v[1] > 0, optional=True
)
SEED = Rule("a whole number", whole, "in [-2**63, 2**63 - 1]", lambda v: -(1 << 63) <= v < 1 << 63)
