"""Parses and validates request bodies. Errors name the field by its JSON path, what was got and what is expected.

Fields that do not change the response are removed before validation, unless the server is strict: ids and labels of OpenAI's service,
fields that are null, tools with ``tool_choice="none"``. Unknown fields are refused: a misspelt setting must not be ignored silently.
Knows no models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from ivg.errors import ConfigError, ServeError
from ivg.serving.errors import one_line
from ivg.serving.fields import is_one_of, show_json
from ivg.serving.protocol import Body, ChatRequest, CompletionRequest, Guidance
from ivg.settings.schema import rules_of

B = TypeVar("B", ChatRequest, CompletionRequest)

IGNORED = frozenset({
    "metadata", "store", "service_tier", "user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "request_id", "priority", "cache_salt",
})  # fmt: skip
"""Top-level fields that never change the response."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
    "logits_processors": ([],),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "typical_p": (1,),
}
"""Unsupported fields of vLLM and similar servers, with their neutral values."""
_MESSAGE_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "refusal": (None,), "tool_calls": (None, []), "function_call": (None,), "audio": (None,), "annotations": (None, []),
}  # fmt: skip
"""Fields of a message besides role, content and name, with the values that a strict server accepts."""


def parse_body(raw: bytes, headers: Mapping[str, str], kind: type[B], *, strict: bool = False) -> B:
    """Parse and validate a request body.

    Args:
        raw: the body.
        headers: of the request, with lower-case names.
        kind: the model of the body.
        strict: refuse fields that would be ignored.

    Raises:
        ServeError: 415 where the headers do not announce JSON, else 400; ``param`` is the JSON path of the error.
    """
    check_headers(headers)
    try:
        data = parse_json(raw)
        if not strict:
            data = drop_ignored(data)
        elif isinstance(data.get("messages"), list):
            _check_messages(data["messages"])
        return kind.model_validate(data)
    except ValidationError as e:
        raise validation_error(e.errors(include_url=False), kind) from None
    except RecursionError:
        raise ServeError("the body is nested too deeply", 400, "invalid_json") from None


def check_headers(headers: Mapping[str, str]) -> None:
    """Raise unless the headers announce uncompressed JSON in UTF-8.

    A content type is required: without it any web page could send requests to a local server, past CORS.

    Raises:
        ServeError: 415.
    """
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise ServeError(f"the body has Content-Encoding: {coding}; send it uncompressed", 415, "unsupported_encoding")
    given = headers.get("content-type", "")
    kind, _, parameters = given.partition(";")
    kind = kind.strip().lower()
    if kind != "application/json" and not re.fullmatch(r"application/[\w.-]+\+json", kind):
        got = f"has the content type {kind}" if kind else "has no content type"
        raise ServeError(f"the body {got}; send the header Content-Type: application/json", 415, "unsupported_media_type")
    charset = re.search(r"charset\s*=\s*\"?([\w.:-]+)", parameters, re.IGNORECASE)
    if charset and charset[1].lower() not in ("utf-8", "utf8", "us-ascii", "ascii"):
        raise ServeError(f"the body has the charset {charset[1]}; send it as UTF-8", 415, "unsupported_media_type")


def parse_json(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ServeError: 400, with line and column.
    """
    if not raw.strip():
        raise ServeError("the body is empty; expected a JSON object", 400, "invalid_json")
    try:
        data = json.loads(raw.decode("utf-8-sig"), parse_constant=_no_constant)
    except UnicodeDecodeError as e:
        raise ServeError(f"the body is not UTF-8: byte 0x{raw[e.start]:02x} at position {e.start}", 400, "invalid_json") from None
    except json.JSONDecodeError as e:
        raise ServeError(f"the body is not JSON: {e.msg} (line {e.lineno}, column {e.colno})", 400, "invalid_json") from None
    except ValueError as e:  # NaN, or an integer of more digits than Python parses
        raise ServeError(f"the body is not JSON: {e}", 400, "invalid_json") from None
    if not isinstance(data, dict):
        raise ServeError(f"the body must be a JSON object, got {show_json(data)}", 400, "invalid_value")
    return data


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


# Ignored fields


def drop_ignored(data: dict[str, Any]) -> dict[str, Any]:
    """The fields that can change the response. The content of ``extra_body``, which some clients send literally, is moved to the top.

    Raises:
        ServeError: a field that differs from the same one in ``extra_body``, or an ``extra_body`` that is not an object.
    """
    data = _move_extra_body(data)
    for choice, offered in (("tool_choice", ("tools",)), ("function_call", ("functions",))):
        if data.get(choice) == "none":  # the model must not call any
            data = {k: v for k, v in data.items() if k not in (choice, *offered)}
        elif data.get(choice) == "auto" and not any(data.get(name) for name in offered):
            del data[choice]
    return {k: v for k, v in data.items() if v is not None and k not in IGNORED and not (k in NEUTRAL and is_one_of(v, NEUTRAL[k]))}


def _move_extra_body(data: dict[str, Any]) -> dict[str, Any]:
    more = data.get("extra_body")
    out = {k: v for k, v in data.items() if k != "extra_body"}
    if more is None:
        return out
    if not isinstance(more, dict):
        raise ServeError(f"extra_body must be an object, got {show_json(more)}", 400, "invalid_value", "extra_body")
    for name, value in more.items():
        if out.get(name) is not None and out[name] != value:
            message = f"{name} and extra_body.{name} differ; give one of them"
            raise ServeError(message, 400, "invalid_value", f"extra_body.{name}")
    return out | more


def _check_messages(messages: list[Any]) -> None:
    for i, message in enumerate(messages):
        for name, value in message.items() if isinstance(message, dict) else ():
            if name in _MESSAGE_FIELDS and not is_one_of(value, _MESSAGE_FIELDS[name]):
                raise ServeError(f"messages[{i}].{name} is not supported; leave it out", 400, "invalid_value", f"messages[{i}].{name}")
            if name not in ("role", "content", "name", *_MESSAGE_FIELDS):
                raise ServeError(f"unknown field messages[{i}].{name}", 400, "unknown_field", f"messages[{i}].{name}")


# Errors


def validation_error(errors: Any, body: type[Body]) -> ServeError:
    """The HTTP error for the first of pydantic's errors in a body."""
    first = errors[0]
    kind, path = first["type"], json_path(first["loc"])
    if kind == "extra_forbidden":
        return ServeError(f"unknown field {path}", 400, "unknown_field", path)
    if kind == "missing":
        return ServeError(f"{path} is missing", 400, "missing_field", path)
    if kind != "value_error":
        return ServeError(
            f"{path or 'the body'} {_expected(first, body)}, got {show_json(first['input'])}", 400, "invalid_value", path or None
        )
    message = one_line(first["msg"].removeprefix("Value error, "))
    if isinstance(first.get("ctx", {}).get("error"), ConfigError):  # of ``ivg.settings``, which names the last part of the path
        parent = json_path(first["loc"][:-1])
        return ServeError(f"{parent}.{message}" if parent else message, 400, "invalid_value", path)
    named = re.match(r"[A-Za-z_]\w*(?:\.\w+|\[\d+\])*", message)
    if path == "guidance" and named and named[0] in Guidance.model_fields:
        return ServeError(f"guidance.{message}", 400, "invalid_value", f"guidance.{named[0]}")
    if named and re.split(r"[.\[]", named[0])[0] in body.model_fields:  # ours, with the whole path
        return ServeError(message, 400, "invalid_value", named[0])
    return ServeError(f"{path} {message}" if path else message, 400, "invalid_value", path or None)


def json_path(where: tuple[int | str, ...]) -> str:
    """``messages[0].content``: a location as JavaScript writes it, without pydantic's names of union members."""
    out = ""
    for part in where:
        if isinstance(part, int):
            out += f"[{part}]"
        elif re.search(r"[\[(]|^(str|int|float|bool)$", part):
            break
        else:
            out += f".{part}" if out else part
    return out


def _expected(error: Any, body: type[Body]) -> str:
    """What a field must be: by its rule in ``ivg.settings``, else by the type of pydantic's error."""
    kind, context, location = error["type"], error.get("ctx", {}), error["loc"]
    table: Any = body
    if location[:1] == ("guidance",) and len(location) > 1:
        table, location = Guidance, location[1:]
    rule = rules_of(table).get(str(location[0])) if location else None
    if rule is not None and not any(isinstance(part, int) for part in location):
        return f"must be {rule.kind}, {rule.expected}" if rule.expected else f"must be {rule.kind}"
    if kind in _KINDS:
        return f"must be {_KINDS[kind]}"
    if kind in _BOUNDS:
        word, name = _BOUNDS[kind]
        return f"must be {word} {context[name]:g}" if isinstance(context[name], float) else f"must be {word} {context[name]}"
    if kind == "literal_error":
        return f"must be one of {context['expected'].replace(' or ', ', ')}"
    return f"is invalid ({error['msg'][:1].lower()}{error['msg'][1:]})"


_KINDS = {
    "string_type": "text",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "int_parsing_size": "an integer of at most 64 bits",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "list_type": "a list",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "less_than_equal": ("at most", "le"),
    "greater_than": ("more than", "gt"),
    "less_than": ("less than", "lt"),
}
