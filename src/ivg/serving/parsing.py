"""From the bytes of a request to what it asks for; what is wrong is said in plain words, by its path in the JSON.

What changes no answer is taken away before the schema is asked, unless the server is strict: ids, labels and hints of OpenAI's own
service, fields that are null, tools that may not be called. Names that nobody knows stay and are refused: a misspelt setting that was
ignored would give a wrong answer without a word. Knows no models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from ivg.errors import ConfigError, ServeError
from ivg.serving.protocol import ChatRequest, CompletionRequest, shown
from ivg.serving.served_models import one_line

Body = ChatRequest | CompletionRequest
B = TypeVar("B", ChatRequest, CompletionRequest)

IGNORED = frozenset({
    "metadata", "store", "service_tier", "user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "request_id", "priority", "cache_salt",
})  # fmt: skip
"""Top-level fields that change no answer, whatever they say."""
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
"""Fields of vLLM and its like that nothing here can honour, and the values at which they ask for nothing."""
_MESSAGE_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "refusal": (None,), "tool_calls": (None, []), "function_call": (None,), "audio": (None,), "annotations": (None, []),
}  # fmt: skip
"""Fields of a message besides role, content and name, at the values that a strict server takes."""


def read(raw: bytes, headers: Mapping[str, str], kind: type[B], *, strict: bool = False) -> B:
    """What a body asks for.

    Args:
        raw: the body, at most as long as the server takes.
        headers: of the request, by their names in lower case.
        kind: of request.
        strict: refuse what would be ignored.

    Raises:
        ServeError: 415 for what is no JSON by its headers, else 400; ``param`` is the path of what is wrong.
    """
    check_headers(headers)
    try:
        data = parse(raw)
        if not strict:
            data = without_the_neutral(data)
        elif isinstance(data.get("messages"), list):
            _check_messages(data["messages"])
        return kind.model_validate(data)
    except ValidationError as e:
        raise explain(e.errors(include_url=False), known=kind.model_fields) from None
    except RecursionError:
        raise ServeError("the body is nested deeper than this server reads", 400, "invalid_json") from None


def check_headers(headers: Mapping[str, str]) -> None:
    """Raise unless a body with these headers is JSON in UTF-8, as it is.

    A content type is asked for, although clients leave it out: web pages may send bodies without one to any server, and ask nobody.

    Raises:
        ServeError: 415.
    """
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise ServeError(
            f"the body has Content-Encoding: {coding}; this server reads bodies that are not compressed", 415, "unsupported_encoding"
        )
    given = headers.get("content-type", "")
    kind, _, parameters = given.partition(";")
    kind = kind.strip().lower()
    if kind != "application/json" and not re.fullmatch(r"application/[\w.-]+\+json", kind):
        got = f"has the content type {kind}" if kind else "has no content type"
        raise ServeError(f"the body {got}; send the header Content-Type: application/json", 415, "unsupported_media_type")
    charset = re.search(r"charset\s*=\s*\"?([\w.:-]+)", parameters, re.IGNORECASE)
    if charset and charset[1].lower() not in ("utf-8", "utf8", "us-ascii", "ascii"):
        raise ServeError(f"the body is said to be {charset[1]}; JSON is sent as UTF-8", 415, "unsupported_media_type")


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object that a body is.

    Raises:
        ServeError: 400, with the place where it ends to be one.
    """
    if not raw.strip():
        raise ServeError("the body is empty; expected a JSON object", 400, "invalid_json")
    try:
        data = json.loads(raw.decode("utf-8-sig"), parse_constant=_no_constant)
    except UnicodeDecodeError as e:
        raise ServeError(f"the body is not UTF-8: byte 0x{raw[e.start]:02x} at position {e.start}", 400, "invalid_json") from None
    except json.JSONDecodeError as e:
        raise ServeError(f"the body is not JSON: {e.msg} (line {e.lineno}, column {e.colno})", 400, "invalid_json") from None
    except ValueError as e:  # NaN, or a number of more digits than Python reads
        raise ServeError(f"the body is not JSON: {e}", 400, "invalid_json") from None
    if not isinstance(data, dict):
        raise ServeError(f"the body must be a JSON object, got {shown(data)}", 400, "invalid_value")
    return data


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


# What changes no answer


def without_the_neutral(data: dict[str, Any]) -> dict[str, Any]:
    """The fields that ask for something. ``extra_body``, which some clients send as it is, stands for what it holds.

    Raises:
        ServeError: a field and the same one in ``extra_body`` that differ, or an ``extra_body`` that is no object.
    """
    data = _flat(data)
    for choice, offered in (("tool_choice", ("tools",)), ("function_call", ("functions",))):
        if data.get(choice) == "none":  # nothing may be called, so nothing is told of it
            data = {k: v for k, v in data.items() if k not in (choice, *offered)}
        elif data.get(choice) == "auto" and not any(data.get(name) for name in offered):
            del data[choice]
    return {k: v for k, v in data.items() if v is not None and k not in IGNORED and not (k in NEUTRAL and _among(v, NEUTRAL[k]))}


def _flat(data: dict[str, Any]) -> dict[str, Any]:
    more = data.get("extra_body")
    out = {k: v for k, v in data.items() if k != "extra_body"}
    if more is None:
        return out
    if not isinstance(more, dict):
        raise ServeError(f"extra_body must be an object, got {shown(more)}", 400, "invalid_value", "extra_body")
    for name, value in more.items():
        if out.get(name) is not None and out[name] != value:
            message = f"{name} and extra_body.{name} differ; give one of them"
            raise ServeError(message, 400, "invalid_value", f"extra_body.{name}")
    return out | more


def _among(value: Any, neutral: tuple[Any, ...]) -> bool:
    """0 is not False."""
    return any(value == fine and isinstance(value, bool) == isinstance(fine, bool) for fine in neutral)


def _check_messages(messages: list[Any]) -> None:
    for i, message in enumerate(messages):
        for name, value in message.items() if isinstance(message, dict) else ():
            if name in _MESSAGE_FIELDS and not _among(value, _MESSAGE_FIELDS[name]):
                raise ServeError(f"messages[{i}].{name} is not supported; leave it out", 400, "invalid_value", f"messages[{i}].{name}")
            if name not in ("role", "content", "name", *_MESSAGE_FIELDS):
                raise ServeError(f"unknown field messages[{i}].{name}", 400, "unknown_field", f"messages[{i}].{name}")


# Errors


def explain(errors: Any, known: Mapping[str, Any]) -> ServeError:
    """The first thing that is wrong with a body.

    Args:
        errors: pydantic's.
        known: fields of the body; a message of our own begins with one of them.
    """
    first = errors[0]
    kind, path = first["type"], path_of(first["loc"])
    if kind == "extra_forbidden":
        return ServeError(f"unknown field {path}", 400, "unknown_field", path)
    if kind == "missing":
        return ServeError(f"{path} is missing", 400, "missing_field", path)
    if kind != "value_error":
        return ServeError(f"{path or 'the body'} {_expected(first)}, got {shown(first['input'])}", 400, "invalid_value", path or None)
    message = one_line(first["msg"].removeprefix("Value error, "))
    if isinstance(
        first.get("ctx", {}).get("error"), ConfigError
    ):  # a rule of ``ivg.settings.schema``, which names the last part of the path
        parent = path_of(first["loc"][:-1])
        return ServeError(f"{parent}.{message}" if parent else message, 400, "invalid_value", path)
    named = re.match(r"[A-Za-z_]\w*(?:\.\w+|\[\d+\])*", message)
    if named and re.split(r"[.\[]", named[0])[0] in known:  # ours, which say the whole path
        return ServeError(message, 400, "invalid_value", named[0])
    return ServeError(f"{path} {message}" if path else message, 400, "invalid_value", path or None)


def path_of(where: tuple[int | str, ...]) -> str:
    """``messages[0].content``: the place as JavaScript writes it, without pydantic's names of the kinds that it tried."""
    out = ""
    for part in where:
        if isinstance(part, int):
            out += f"[{part}]"
        elif re.search(r"[\[(]|^(str|int|float|bool)$", part):
            break
        else:
            out += f".{part}" if out else part
    return out


def _expected(error: Any) -> str:
    """What a field must be, of pydantic's kinds of errors."""
    kind, context = error["type"], error.get("ctx", {})
    if any(isinstance(part, str) and ("[" in part or part == "str") for part in error["loc"]):
        return "must be an object with numbers, or text"  # weights: the one field that may be either
    if kind in _KINDS:
        return f"must be {_KINDS[kind]}"
    if kind in _BOUNDS:
        word, name = _BOUNDS[kind]
        return f"must be {word} {context[name]:g}" if isinstance(context[name], float) else f"must be {word} {context[name]}"
    if kind == "literal_error":
        return f"must be one of {context['expected'].replace(' or ', ', ')}"
    return f"is not usable ({error['msg'][:1].lower()}{error['msg'][1:]})"


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
