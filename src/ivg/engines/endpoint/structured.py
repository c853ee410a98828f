"""Structured output of an endpoint: the field of the request in the server's dialect, and whether its answer follows the grammar.

Servers ignore fields that they do not know, and would then answer with any text. So every answer is read here by the grammar that the
other engines draw by (:mod:`ivg.engines.grammar`), byte by byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Literal

from ivg.engines.grammar import Grammars
from ivg.errors import ConfigError, shortened
from ivg.types import SamplingParams

Dialect = Literal["vllm", "openai"]
_VLLM = {"json_schema": "json", "regex": "regex", "choice": "choice", "grammar": "grammar"}
"""Names in vLLM's ``structured_outputs``."""
_OURS = "%llguidance"
"""Begins a grammar that may have token ids, which a text has not: that of required calls of tools."""
_STRING_OR_SPACE = re.compile(r'("(?:[^"\\]|\\.)*(?:"|\\?\Z))|[ \t\r\n]+', re.DOTALL)
_LONGEST_ESCAPE = len("\\u0000")
_HALF_AT_END = re.compile("[\ud800-\udbff]\\Z")


def _vllm(sampling: SamplingParams) -> dict[str, Any]:
    name, _ = sampling.structure or ("", "")
    value: Any = getattr(sampling, name)
    value = json.loads(value) if name == "json_schema" else list(value) if name == "choice" else value
    return {"structured_outputs": {_VLLM[name]: value}}


def _openai(sampling: SamplingParams) -> dict[str, Any]:
    if sampling.json_schema is None:
        name, _ = sampling.structure or ("", "")
        raise ConfigError(
            f"{name}: response_format of OpenAI's API has JSON schemas alone\n"
            '  use json_schema, or structured_output = "vllm" in [endpoint] where the server has structured_outputs'
        )
    form = {"name": "response", "schema": json.loads(sampling.json_schema), "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": form}}


_FIELDS: Mapping[Dialect, Callable[[SamplingParams], dict[str, Any]]] = {"vllm": _vllm, "openai": _openai}


class EndpointGrammars:
    """Structured output of one endpoint.

    Args:
        dialect: ``vllm``: the field ``structured_outputs``; ``openai``: ``response_format``.

    Raises:
        ConfigError: another dialect.
    """

    def __init__(self, dialect: Dialect) -> None:
        if dialect not in _FIELDS:
            raise ConfigError(f"structured_output of an endpoint must be {' or '.join(_FIELDS)}, got {dialect!r}")
        self.dialect, self.grammars = dialect, Grammars(None, ())

    def fields(self, sampling: SamplingParams) -> dict[str, Any]:
        """Of the request; none without structured output.

        Raises:
            ConfigError: the dialect has no field for it.
        """
        return {} if sampling.structure is None else _FIELDS[self.dialect](sampling)

    def check(self, sampling: SamplingParams) -> None:
        """Raise where structured output cannot be asked for, or no answer could be checked.

        Raises:
            ConfigError: the dialect has no field for it, or the grammar cannot be read here.
            MissingDependencyError: no llguidance.
        """
        if sampling.structure is None:
            return
        if sampling.structure[1].lstrip().startswith(_OURS):
            message = "grammar is in llguidance's own notation, as that of required calls, which may have token ids: an endpoint takes text"
            raise ConfigError(f"{message}\n  use the engine transformers or vllm")
        self.fields(sampling)
        self.grammars.matcher(sampling.structure)

    def error(self, sampling: SamplingParams, text: str, *, complete: bool) -> str | None:
        """What is wrong with an answer; None: it follows the grammar, or there is none.

        Args:
            sampling: with the grammar.
            text: of the answer.
            complete: False: it was cut, and may be the beginning of a text of the grammar.
        """
        if sampling.structure is None or self._follows(sampling, text, complete=complete):
            return None
        (field,) = self.fields(sampling)
        return (
            f"the endpoint's answer does not follow {sampling.structure[0]}: {shortened(text, 80)!r}\n"
            f"  it may not know the field {field}: see structured_output in the table [endpoint]"
        )

    def _follows(self, sampling: SamplingParams, text: str, *, complete: bool) -> bool:
        if self._matches(sampling, text, complete=complete):
            return True
        if sampling.json_schema is None or (complete and not _is_json(text)):
            return False
        compact = _STRING_OR_SPACE.sub(lambda found: _plain_string(found[1]), text)  # other servers allow other white space and escapes
        return self._matches(sampling, compact, complete=complete)

    def _matches(self, sampling: SamplingParams, text: str, *, complete: bool) -> bool:
        assert sampling.structure is not None
        matcher = self.grammars.matcher(sampling.structure)
        try:
            read = text.encode()
        except UnicodeEncodeError:  # half of a character, escaped in the server's reply
            return False
        return bool(matcher.consume_tokens(list(read)) and (not complete or matcher.is_accepting()))


def _plain_string(text: str | None) -> str:
    """A JSON string, finished or not, with no more escapes than it needs; the empty text where there is none."""
    if not text:
        return ""
    with suppress(ValueError):
        return json.dumps(json.loads(text), ensure_ascii=False)
    for cut in range(_LONGEST_ESCAPE):  # the end may be part of an escape
        with suppress(ValueError):
            known = json.loads(text[: len(text) - cut] + '"')
            return json.dumps(_HALF_AT_END.sub("", known), ensure_ascii=False)[:-1]
    return text


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
