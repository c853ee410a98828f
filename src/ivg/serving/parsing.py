"""Parses and validates request bodies. Errors name the field by its JSON path, what was got and what is expected.

Independent of models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ivg.errors import ConfigError, ServeError
from ivg.serving.errors import one_line
from ivg.serving.fields import show_json
from ivg.serving.ignored import remove_ignored
from ivg.serving.protocol import Guidance
from ivg.settings.messages import hint
from ivg.settings.schema import rules_of

B = TypeVar("B", bound=BaseModel)


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
    return parse_data(parse_json(raw), kind, strict=strict)


def parse_data(data: dict[str, Any], kind: type[B], *, strict: bool = False) -> B:
    """Validate a request body that was parsed from JSON; as :func:`parse_body`.

    Raises:
        ServeError: 400; ``param`` is the JSON path of the error.
    """
    try:
        return kind.model_validate(remove_ignored(data, kind.model_fields, strict=strict))
    except ValidationError as e:
        raise validation_error(e.errors(include_url=False), kind) from None
    except RecursionError:
        raise _too_deep() from None


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
    except RecursionError:
        raise _too_deep() from None
    except ValueError as e:  # NaN, or an integer of more digits than Python parses
        raise ServeError(f"the body is not JSON: {e}", 400, "invalid_json") from None
    if not isinstance(data, dict):
        raise ServeError(f"the body must be a JSON object, got {show_json(data)}", 400, "invalid_value")
    return data


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


# Errors


def _too_deep() -> ServeError:
    return ServeError("the body is nested too deeply", 400, "invalid_json")


def validation_error(errors: Any, body: type[BaseModel]) -> ServeError:
    """The HTTP error for the first of pydantic's errors in a body."""
    first = errors[0]
    kind, path = first["type"], json_path(first["loc"])
    if kind == "extra_forbidden":
        return ServeError(f"unknown field {path}{hint(body, first['loc'])}", 400, "unknown_field", path)
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


def _expected(error: Any, body: type[BaseModel]) -> str:
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
        return f"must be {word} {context[name]}"
    if kind == "literal_error":
        return f"must be one of {context['expected'].replace(' or ', ', ')}"
    return f"is invalid ({error['msg'][:1].lower()}{error['msg'][1:]})"


_KINDS = {
    "string_type": "text",
    "int_type": "an integer",
    "int_parsing_size": "an integer of at most 64 bits",
    "bool_type": "true or false",
    "list_type": "a list",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
_BOUNDS = {"greater_than_equal": ("at least", "ge"), "less_than_equal": ("at most", "le")}
