"""Bodies of ``POST /v1/responses``, and the chat that each asks for. Independent of models and HTTP."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from ivg.errors import ServeError
from ivg.models.chat_template import SYSTEM_ROLES, join_instruction
from ivg.serving.fields import FlatToolChoice, show_json
from ivg.serving.protocol import Guidance
from ivg.settings.per_request import RequestSettings
from ivg.settings.sampling import SamplingParams
from ivg.settings.tables import Table, table_of

_LOGPROBS = "message.output_text.logprobs"
_UNREAD_INCLUDES = ("reasoning.encrypted_content",)
"""What ``include`` may ask for besides, and no response has."""
_PATHS = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
}
"""Fields of chat completions by which errors name those of a response."""
_FUNCTION = re.compile(r"(tools\[\d+\])\.function\b")
"""A tool of chat completions, whose function is an object of its own."""
_Input = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}, "minItems": 1}]})]
_Objects = list[dict[str, Any]]


class TextOptions(Table):
    """``text``: the format of the response.

    Attributes:
        format: text, or a JSON schema.
        verbosity: only ``medium``, which changes nothing.
    """

    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None


class ResponseStreamOptions(Table):
    """``stream_options``; there is nothing to choose."""

    include_obfuscation: Literal[False] | None = None


@table_of(SamplingParams, only=("temperature", "top_p"))
@table_of(RequestSettings, only=("seed",))
class ResponsesRequest(Table):
    """POST /v1/responses: OpenAI's Responses API for text, non-stored; ``seed``, ``guidance`` and ``chat_template_kwargs`` are ivg's."""

    model: str
    input: _Input
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    tools: _Objects | None = None
    tool_choice: FlatToolChoice = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    guidance: Guidance | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    if TYPE_CHECKING:
        seed: int | None = None
        temperature: float | None = None
        top_p: float | None = None

    @property
    def wants_logprobs(self) -> bool:
        """Does the text have log-probabilities?"""
        return _LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    def chat(self) -> dict[str, Any]:
        """The body of the chat completion that answers.

        Raises:
            ServeError: an item of the input, a tool or an option that is not supported; names the field.
        """
        for name in self.include or ():
            if name not in (_LOGPROBS, *_UNREAD_INCLUDES):
                raise ServeError(f"include {name!r} is not supported; expected {_LOGPROBS!r}", 400, "invalid_value", "include")
        same = ("model", "parallel_tool_calls", "stream", "seed", "temperature", "top_p", "chat_template_kwargs")
        out: dict[str, Any] = {name: value for name in same if (value := getattr(self, name)) is not None}
        out["messages"] = _with_instructions(self.instructions, _messages(self.input))
        if self.guidance is not None:
            out["guidance"] = self.guidance.model_dump(exclude_none=True)
        if self.max_output_tokens is not None:
            out["max_tokens"] = self.max_output_tokens
        if self.wants_logprobs:
            out |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        if self.tool_choice is not None:
            out["tool_choice"] = _tool_choice(self.tool_choice)
        if self.tools:
            out["tools"] = [_tool(tool, i) for i, tool in enumerate(self.tools)]
        if (wanted := self.text.format if self.text else None) and wanted.get("type") != "text":
            schema = {name: value for name, value in wanted.items() if name != "type"}
            out["response_format"] = {"type": wanted.get("type")} | ({"json_schema": schema} if schema else {})
        return out


def renamed(error: ServeError) -> ServeError:
    """An error about the chat completion as one about the response. Turns are not counted as items are: ``input`` stands for all."""
    if error.param is not None and _FUNCTION.match(error.param):
        return ServeError(_FUNCTION.sub(r"\1", str(error)), error.status, error.code, _FUNCTION.sub(r"\1", error.param))
    for name, own in _PATHS.items():
        if error.param is not None and re.fullmatch(rf"{re.escape(name)}(\[.*|\..*)?", error.param):
            message = re.sub(rf"{re.escape(name)}(\[\d+\])?", own, str(error))
            return ServeError(message, error.status, error.code, own if name == "messages" else own + error.param[len(name) :])
    return error


def _with_instructions(instructions: str | None, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The instructions come first, before those of the first turn if it has some: many templates read one system turn."""
    if not instructions:
        return messages
    first = messages[0]
    if first["role"] in SYSTEM_ROLES and isinstance(first["content"], str):
        return [{**first, "content": join_instruction(instructions, first["content"])}, *messages[1:]]
    return [{"role": "system", "content": instructions}, *messages]


def _messages(given: Any) -> list[dict[str, Any]]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise ServeError(f"input must be text or a list of items, got {show_json(given)}", 400, "invalid_value", "input")
    out: list[dict[str, Any]] = []
    for i, item in enumerate(given):
        where = f"input[{i}]"
        if not isinstance(item, Mapping):
            raise ServeError(f"{where} must be an object, got {show_json(item)}", 400, "invalid_value", where)
        turn = _turn(item, where)
        if turn is None:
            continue
        if out and out[-1]["role"] == "assistant" and "tool_calls" in turn:  # text and calls of one response
            out[-1]["tool_calls"] = [*out[-1].get("tool_calls", ()), *turn["tool_calls"]]
        else:
            out.append(turn)
    if not out:
        raise ServeError("input has no message", 400, "invalid_value", "input")
    return out


def _turn(item: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """The message that an item stands for; None: none."""
    kind = item.get("type", "message")
    if kind == "message":
        if missing := next((name for name in ("role", "content") if name not in item), None):
            raise ServeError(f"{where}.{missing} is missing", 400, "missing_field", f"{where}.{missing}")
        return {"role": item["role"], "content": _content(item["content"])}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        return {"role": "assistant", "content": None, "tool_calls": [{"id": item.get("call_id"), "type": "function", "function": function}]}
    if kind == "function_call_output":
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": _content(item.get("output"))}
    if kind == "reasoning":  # templates leave out what was thought in earlier turns
        return None
    message = f"{where}: items of type {show_json(kind)} are not supported"
    if kind == "item_reference":
        message += "; responses are not stored: send the items themselves (the AI SDK does with store: false)"
    raise ServeError(message, 400, "invalid_value", f"{where}.type")


def _content(content: Any) -> Any:
    """The content of a message as chat completions have it: pictures in an object of their own."""
    if not isinstance(content, list):
        return content
    return [_part(part) if isinstance(part, Mapping) else part for part in content]


def _part(part: Mapping[str, Any]) -> Any:
    if part.get("type") == "input_image" and isinstance(part.get("image_url"), str):
        return {"type": "image_url", "image_url": {"url": part["image_url"]}}
    return part


def _tool_choice(choice: Any) -> Any:
    """As chat completions have it: names of functions, and what is allowed, in objects of their own."""
    if not isinstance(choice, Mapping):
        return choice
    if choice.get("type") == "allowed_tools":
        tools = choice.get("tools")
        named = [_tool_choice(tool) for tool in tools] if isinstance(tools, list) else tools
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": named}}
    if choice.get("type") == "function" and "name" in choice:
        return {"type": "function", "function": {"name": choice["name"]}}
    return choice


def _tool(tool: Mapping[str, Any], index: int) -> dict[str, Any]:
    kind = tool.get("type")
    if kind != "function":
        message = f"tools[{index}].type must be 'function', got {show_json(kind)}; other tools are not supported"
        raise ServeError(message, 400, "invalid_value", f"tools[{index}].type")
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in names if tool.get(name) is not None}}
