"""Types of the fields ``stop``, ``messages`` and ``prompt`` of request bodies. Errors name the JSON path."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema

from ivg.errors import PromptError
from ivg.types.messages import Message, Prompt, check_text

MAX_MESSAGES = 1024
MAX_STOPS = 16
ROLES = ("system", "developer", "user", "assistant", "tool")
TOOL_CHOICES = ("none", "auto", "required")
ALLOWED_MODES = ("auto", "required")
"""What a response may do with the tools of ``allowed_tools``."""


def _stop(value: Any) -> str | list[str] | None:
    """One text or several, none of them empty; errors name the path."""
    if value is None:
        return None
    if not isinstance(value, str | list):
        raise PromptError(f"stop must be text or a list of texts, got {show_json(value)}")
    if isinstance(value, list) and len(value) > MAX_STOPS:
        raise PromptError(f"stop must have at most {MAX_STOPS} texts, got {len(value)}")
    for where, text in [("stop", value)] if isinstance(value, str) else [(f"stop[{i}]", text) for i, text in enumerate(value)]:
        check_text(text, where)
        if not text:
            raise PromptError(f"{where} must not be empty; leave it out")
    return value


def _messages(value: Any) -> tuple[Message, ...]:
    """The messages of a chat."""
    if not isinstance(value, list):
        raise PromptError(f"messages must be a list of messages, got {show_json(value)}")
    if not 1 <= len(value) <= MAX_MESSAGES:
        raise PromptError(f"messages must have 1 to {MAX_MESSAGES} messages, got {len(value)}")
    turns: Any = Prompt.of(value).content
    for i, turn in enumerate(turns):
        if turn.role not in ROLES:
            raise PromptError(f"messages[{i}].role must be one of {', '.join(ROLES)}, got {turn.role!r}")
    return tuple(turns)


def _tool_choice(value: Any) -> str | dict[str, Any] | None:
    """``none``, ``auto``, ``required``, the name of a function, or ``allowed_tools``, as OpenAI's API has them."""
    if value is None or (isinstance(value, str) and value in TOOL_CHOICES):
        return value
    kind = value.get("type", "function") if isinstance(value, dict) else None
    if kind == "allowed_tools":
        return _check_allowed(value)
    if kind == "function" and _names_function(value):
        return value | {"type": kind}
    got = show_json(value) if kind in (None, "function") else f"type {show_json(kind)}"
    message = f"tool_choice must be {', '.join(TOOL_CHOICES)}, allowed_tools or the name of a function as OpenAI's API has it, got {got}"
    raise PromptError(message)


def _check_allowed(choice: dict[str, Any]) -> dict[str, Any]:
    """``{"type": "allowed_tools", "allowed_tools": {"mode": …, "tools": […]}}``."""
    given = choice.get("allowed_tools")
    mode, tools = (given.get("mode"), given.get("tools")) if isinstance(given, dict) else (None, None)
    if not isinstance(mode, str) or mode not in ALLOWED_MODES:
        got = show_json(mode) if isinstance(given, dict) else f"allowed_tools {show_json(given)}"
        raise PromptError(f"tool_choice of type allowed_tools must have mode {' or '.join(ALLOWED_MODES)}, got {got}")
    if not isinstance(tools, list) or not tools:
        got = "an empty list" if tools == [] else show_json(tools)
        raise PromptError(f"tool_choice of type allowed_tools must have a list of tools, got {got}")
    for i, tool in enumerate(tools):
        if not (isinstance(tool, dict) and tool.get("type") == "function" and _names_function(tool)):
            raise PromptError(f"tool_choice: allowed tool {i} must be a function with a name, got {show_json(tool)}")
    return choice


def _names_function(value: dict[str, Any]) -> bool:
    function = value.get("function")
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _prompt(value: Any) -> str | list[str] | list[int] | list[list[int]]:
    """A text, several texts, token ids, or several lists of token ids; errors name the path."""
    if isinstance(value, str):
        check_text(value, "prompt")
        return value
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else show_json(value)
        raise PromptError(f"prompt must be text, a list of texts, token ids, or a list of lists of token ids; got {got}")
    if _is_token_id(value[0]):
        return _token_ids(value, "prompt")
    if isinstance(value[0], list):
        return [_token_ids(ids, f"prompt[{i}]") for i, ids in enumerate(value)]
    for i, text in enumerate(value):
        check_text(text, f"prompt[{i}]")
    return value


def _token_ids(value: Any, where: str) -> list[int]:
    if not isinstance(value, list) or not value:
        raise PromptError(f"{where} must be a list of token ids, got {'an empty list' if value == [] else show_json(value)}")
    for i, token in enumerate(value):
        if not _is_token_id(token) or token < 0:
            raise PromptError(f"{where}[{i}] must be a token id (an integer of 0 or more), got {show_json(token)}")
    return value


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_one_of(value: Any, choices: tuple[Any, ...]) -> bool:
    """Is a JSON value among ``choices``? Unlike in Python, 0 is not false."""
    return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices)


def show_json(value: Any) -> str:
    """A JSON value in an error message: the value if it is short, else its type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value) if abs(value) < 1e20 else "a very large number"
    if isinstance(value, str):
        return repr(value) if len(value) <= 40 else f"text of {len(value)} characters"
    return "an object" if isinstance(value, dict) else "a list"


_TEXT: dict[str, Any] = {"type": "string"}
_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}


def _list_of(items: dict[str, Any], most: int | None = None) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1} | ({} if most is None else {"maxItems": most})


_TEXT_PART = {"type": "object", "required": ["type", "text"], "properties": {"type": {"const": "text"}, "text": _TEXT}}
_URL = {"type": "object", "required": ["url"], "properties": {"url": _TEXT}}
_IMAGE_PART = {"type": "object", "required": ["type", "image_url"], "properties": {"type": {"const": "image_url"}, "image_url": _URL}}
_PART = {"anyOf": [_TEXT_PART, _IMAGE_PART]}
_FUNCTION = {"type": "object", "required": ["name", "arguments"], "properties": {"name": _TEXT, "arguments": _TEXT}}
_CALL = {
    "type": "object",
    "required": ["id", "type", "function"],
    "properties": {"id": _TEXT, "type": {"const": "function"}, "function": _FUNCTION},
}
_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": list(ROLES)},
        "content": {"anyOf": [_TEXT, _list_of(_PART), {"type": "null"}]},
        "tool_calls": _list_of(_CALL),
        "tool_call_id": _TEXT,
    },
}
_NAMED: dict[str, Any] = {"type": "object", "required": ["name"], "properties": {"name": _TEXT}}
_FUNCTION_CHOICE = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {"type": {"const": "function"}, "function": _NAMED},
}
_FLAT_CHOICE = {"type": "object", "required": ["type", "name"], "properties": {"type": {"const": "function"}, "name": _TEXT}}


def _allowed(tool: dict[str, Any]) -> dict[str, Any]:
    """The fields of ``allowed_tools``, where ``tool`` is the form of a function's name."""
    return {"mode": {"enum": list(ALLOWED_MODES)}, "tools": _list_of(tool)}


_ALLOWED: dict[str, Any] = {"type": {"const": "allowed_tools"}}
_ALLOWED_CHOICE = {
    "type": "object",
    "required": ["type", "allowed_tools"],
    "properties": _ALLOWED | {"allowed_tools": {"type": "object", "required": ["mode", "tools"], "properties": _allowed(_FUNCTION_CHOICE)}},
}
_FLAT_ALLOWED_CHOICE = {"type": "object", "required": ["type", "mode", "tools"], "properties": _ALLOWED | _allowed(_FLAT_CHOICE)}


def tool_choice_schema(*objects: dict[str, Any]) -> WithJsonSchema:
    """What ``tool_choice`` may be: one of the words, or an object of one of these forms."""
    return WithJsonSchema({"anyOf": [{"enum": list(TOOL_CHOICES)}, *objects, {"type": "null"}]})


ToolChoice = Annotated[str | dict[str, Any] | None, PlainValidator(_tool_choice), tool_choice_schema(_FUNCTION_CHOICE, _ALLOWED_CHOICE)]
FlatToolChoice = Annotated[Any, tool_choice_schema(_FLAT_CHOICE, _FLAT_ALLOWED_CHOICE)]
"""That of the Responses API, as it came: it is checked as that of the chat completion."""
Stop = Annotated[
    Any,
    PlainValidator(_stop),
    WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": MAX_STOPS}, {"type": "null"}]}),
]
Messages = Annotated[tuple[Message, ...], PlainValidator(_messages), WithJsonSchema(_list_of(_MESSAGE, MAX_MESSAGES))]
Prompts = Annotated[Any, PlainValidator(_prompt), WithJsonSchema({"anyOf": [_TEXT, _list_of(_TEXT), _IDS, _list_of(_IDS)]})]
