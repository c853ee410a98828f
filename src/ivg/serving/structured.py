"""Structured output in request bodies: OpenAI's ``response_format`` and vLLM's ``structured_outputs``, as settings of sampling.

vLLM's older names (``guided_json``, ``guided_regex`` …) are other names of the settings themselves.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema

from ivg.errors import ConfigError, PromptError
from ivg.serving.fields import is_one_of, show_json
from ivg.settings.sampling import SamplingParams
from ivg.settings.schema import check

_ANY_OBJECT = {"type": "object"}
_SETTINGS = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}
_UNSET = (None, False)


def _response_format(value: Any) -> dict[str, Any]:
    """``{"type": "text"}``, ``{"type": "json_object"}``, or ``{"type": "json_schema", "json_schema": {"schema": …}}``."""
    if value is None:
        return {}
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return {}
    if kind == "json_object":  # llama.cpp's and others' has a schema beside it
        schema = value.get("schema")
        return {"json_schema": _ANY_OBJECT if schema in (None, {}) else _schema(schema, "response_format.schema")}
    if kind != "json_schema":
        got = show_json(value) if kind is None else f"type {show_json(kind)}"
        raise PromptError(f"response_format must have the type text, json_object or json_schema, got {got}")
    inner = value.get("json_schema")
    if not isinstance(inner, dict) or inner.get("schema") is None:
        raise PromptError("response_format.json_schema.schema is missing")
    return {"json_schema": _schema(inner["schema"], "response_format.json_schema.schema")}


def _structured_outputs(value: Any) -> dict[str, Any]:
    """VLLM's object: one of json, regex, choice, grammar and json_object."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise PromptError(f"structured_outputs must be an object, got {show_json(value)}")
    out: dict[str, Any] = {}
    for name, given in value.items():
        if is_one_of(given, _UNSET):
            continue
        if name == "json_object":
            out["json_schema"] = _ANY_OBJECT
        elif name == "json":
            out["json_schema"] = given if isinstance(given, str) else _schema(given, "structured_outputs.json")
        elif name in _SETTINGS:
            out[_SETTINGS[name]] = given
        else:
            raise PromptError(f"structured_outputs.{name} is not supported; expected json, regex, choice, grammar or json_object")
    if sum(not is_one_of(given, _UNSET) for given in value.values()) > 1:
        raise PromptError(f"structured_outputs must have one of {', '.join(value)}")
    for name, given in out.items():
        try:
            check(SamplingParams, name, given)
        except ConfigError as e:
            raise PromptError(f"structured_outputs.{str(e).replace('json_schema', 'json', 1)}") from None
    return out


def _schema(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PromptError(f"{path} must be an object, got {show_json(value)}")
    return value


_OBJECT: dict[str, Any] = {"type": "object"}
_FORMAT = {
    "type": "object",
    "required": ["type"],
    "properties": {
        "type": {"enum": ["text", "json_object", "json_schema"]},
        "json_schema": {"type": "object", "required": ["schema"], "properties": {"schema": _OBJECT}},
    },
}
_OUTPUTS = {
    "type": "object",
    "properties": {
        "json": {"anyOf": [_OBJECT, {"type": "string"}]},
        "regex": {"type": "string"},
        "choice": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        "grammar": {"type": "string"},
        "json_object": {"type": "boolean"},
    },
}
ResponseFormat = Annotated[Any, PlainValidator(_response_format), WithJsonSchema({"anyOf": [_FORMAT, {"type": "null"}]})]
StructuredOutputs = Annotated[Any, PlainValidator(_structured_outputs), WithJsonSchema({"anyOf": [_OUTPUTS, {"type": "null"}]})]
