"""Calls of tools as structured output: a grammar whose texts are calls in one format, with arguments that follow the functions' schemas.

The grammar is llguidance's (Lark's notation, with ``%json`` for a schema and ``<[7]>`` for a special token). No torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ivg.errors import ConfigError
from ivg.models.json_grammar import llguidance_schema
from ivg.models.tool_formats import ToolFormat

SpecialId = Callable[[str], int | None]
"""The id of a special token of this name; None: there is none, and the name is text."""
_NAME, _ID, _SPACE = "\0name", "\0id", "\0space"
"""Parts of a form that are no text: the name of the function, an id that may be there, a space that may be there."""
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_COMPOSED = frozenset({"$ref", "allOf", "anyOf", "oneOf", "not", "if", "patternProperties", "unevaluatedProperties", "dependentSchemas"})
"""Keywords that may name further arguments, besides ``properties``."""
_VALUES = frozenset({"const", "enum", "default", "examples"})
"""Keywords whose values are no schemas."""
_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Keywords whose values are schemas by name; a name may be that of a keyword."""
_PLAIN_NAME = re.compile(r"[\w./-]+")


@dataclass(frozen=True, slots=True)
class _Form:
    """How calls are written: ``first``, calls with ``between`` them, ``last``; a call is its ``head``, arguments, and ``tail``.

    Without a head the whole call is JSON by a schema: text of ours that begins as other JSON does would hide that from the lexer.
    """

    head: tuple[str, ...]
    tail: str = "}"
    first: tuple[str, ...] = ()
    between: str = ""
    last: str = ""


_FORMS = {
    "hermes": _Form(("<tool_call>", '\n{"name": ', _NAME, ', "arguments": '), "}\n</tool_call>", between="\n"),
    "llama3_json": _Form((), "", between="; "),
    "mistral": _Form(('{"name": ', _NAME, ', "arguments": '), first=("[TOOL_CALLS]", _SPACE, "["), between=", ", last="]"),
}
_NAMED = _Form(("[TOOL_CALLS]", _NAME, _ID, "[ARGS]"), "")
"""Mistral's newer form, of models whose tokenizer has ``[ARGS]``."""


def call_grammar(
    written: ToolFormat,
    tools: Sequence[Mapping[str, Any]],
    special: SpecialId,
    *,
    several: bool,
    only: Collection[str] | None = None,
    instead: Mapping[str, Any] | None = None,
) -> str:
    """A grammar of calls of ``tools``: of one, or with ``several`` of one or more.

    Args:
        written: the format of the calls.
        tools: definitions of the functions, at least one, as OpenAI's API has them.
        special: ids of special tokens of the base.
        several: may there be more than one call?
        only: names of the functions that may be called; None: any.
        instead: schema of JSON that may be written in place of calls.

    Raises:
        ConfigError: a function's ``parameters`` are no schema of an object.
    """
    names = (tool["function"]["name"] for tool in tools)
    functions = {i: name for i, name in enumerate(names) if only is None or name in only}
    is_named = written.name == "mistral" and special("[ARGS]") is not None and all(map(_PLAIN_NAME.fullmatch, functions.values()))
    form = _NAMED if is_named else _FORMS[written.name]
    literal = _Literals(written, special)
    more = f"({literal(form.between)} call)*" if several else ""
    calls = " ".join(filter(None, (*map(literal, form.first), "call", more, literal(form.last))))
    lines = ["%llguidance {}"]  # which tells vLLM whose notation it is
    if instead is None:
        lines.append(f"start: {calls}")
    else:
        lines += ["start: calls | answer", f"calls: {calls}", f"answer: %json {llguidance_schema(instead)}"]
    lines.append("call: " + " | ".join(f"call_{i}" for i in functions))
    for i, name in functions.items():
        arguments = _arguments(tools[i]["function"], i)
        if not form.head:
            lines.append(f"call_{i}: %json {llguidance_schema(_call_schema(name, arguments))}")
            continue
        own = _quoted(name if is_named else json.dumps(name, ensure_ascii=False))
        head = " ".join(own if part == _NAME else literal(part) for part in form.head)
        lines.append(f"call_{i}: {head} arguments_{i} {literal(form.tail)}")
        lines.append(f"arguments_{i}: %json {llguidance_schema(arguments)}")
    return "\n".join(lines).replace("::=", "::\\u003d") + "\n"  # which would make it look like the notation GBNF


def _arguments(function: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    """The schema of a function's arguments: an object, without arguments that the function does not have unless the schema allows some."""
    schema = function.get("parameters")
    if schema is None:
        return _NO_ARGUMENTS
    kind = schema.get("type", "object")
    if "object" not in (kind if isinstance(kind, list) else [kind]):
        raise ConfigError(f"tools[{index}].function.parameters is a schema of {kind!r}\n  expected one of an object")
    known = schema.get("properties")
    closed = known is not None and not _COMPOSED & set(schema) and set(schema.get("required", ())) <= set(known)
    return ({"additionalProperties": False} if closed else {}) | {**schema, "type": "object"}


def _call_schema(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of ``{"name": …, "parameters": …}``."""
    options = {key: value for key, value in arguments.items() if key == "x-guidance"}
    inner = {key: value for key, value in arguments.items() if key != "x-guidance"}
    properties = {"name": {"const": name}, "parameters": _moved(inner, "/properties/parameters")}
    return {**options, "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _moved(schema: Any, path: str) -> Any:
    """A schema that is to stand at ``path`` of another: its references begin at that other's root."""
    if isinstance(schema, Mapping):
        return {key: _moved_keyword(key, value, path) for key, value in schema.items()}
    return [_moved(part, path) for part in schema] if isinstance(schema, list) else schema


def _moved_keyword(key: str, value: Any, path: str) -> Any:
    if key in _VALUES:
        return value
    if key in _BY_NAME and isinstance(value, Mapping):
        return {name: _moved(schema, path) for name, schema in value.items()}
    if key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
        return f"#{path}{value[1:]}"
    return _moved(value, path)


class _Literals:
    """Parts of a form as symbols of the grammar: special tokens by id, other text as text."""

    def __init__(self, written: ToolFormat, special: SpecialId) -> None:
        self._ids = {token: found for token in written.tokens if (found := special(token)) is not None}
        self._tokens = re.compile("|".join(map(re.escape, self._ids)) or "(?!)")

    def __call__(self, part: str) -> str:
        if part == _SPACE:
            return '" "?'
        if part == _ID:
            return f"(<[{self._ids['[CALL_ID]']}]> /[a-zA-Z0-9]{{9}}/)?" if "[CALL_ID]" in self._ids else ""
        out, at = [], 0
        for found in self._tokens.finditer(part):
            out += [_quoted(part[at : found.start()]), f"<[{self._ids[found[0]]}]>"]
            at = found.end()
        return " ".join(filter(None, (*out, _quoted(part[at:]))))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""
