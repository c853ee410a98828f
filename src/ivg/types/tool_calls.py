"""Calls of tools in the turns of a chat, as OpenAI's API has them. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ivg.errors import PromptError, show_value

_SHAPE = '{"id": …, "type": "function", "function": {"name": …, "arguments": …}}'


@dataclass(frozen=True, slots=True)
class ToolCall:
    """That a model calls a function.

    Attributes:
        name: of the function.
        arguments: JSON text, as the model wrote it.
        id: what the turn with the result names in its ``tool_call_id``.
    """

    name: str
    arguments: str
    id: str | None = None

    @property
    def plain(self) -> dict[str, Any]:
        """The call as OpenAI's API has it: ``arguments`` is text."""
        own = {} if self.id is None else {"id": self.id}
        return {**own, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}

    @property
    def parsed(self) -> dict[str, Any]:
        """The call as chat templates read it: ``arguments`` is an object."""
        return {**self.plain, "function": {"name": self.name, "arguments": json.loads(self.arguments or "{}")}}

    @property
    def text(self) -> str:
        """The call as one line of JSON, for models without a template for calls."""
        return f'{{"name": {json.dumps(self.name, ensure_ascii=False)}, "arguments": {self.arguments or "{}"}}}'

    @classmethod
    def of(cls, value: Any, where: str = "tool_call") -> ToolCall:
        """Read one call; ``arguments`` may be an object, or an object as JSON text.

        Args:
            value: OpenAI's shape.
            where: its place, for errors.

        Raises:
            PromptError: anything else; names the place.
        """
        if isinstance(value, ToolCall):
            return value
        function = value.get("function") if isinstance(value, Mapping) else None
        if not isinstance(function, Mapping):
            raise PromptError(f"{where} is {show_value(value)}\n  expected {_SHAPE}")
        if (kind := value.get("type") or "function") != "function":
            raise PromptError(f"{where}.type is {show_value(kind)}\n  expected function: other tools are not supported")
        name, identity = function.get("name"), value.get("id")
        if not isinstance(name, str) or not name:
            raise PromptError(f"{where}.function.name is {show_value(name)}\n  expected the name of the function")
        if not isinstance(identity, str | None):
            raise PromptError(f"{where}.id is {show_value(identity)}\n  expected text")
        return cls(name, _arguments(function.get("arguments"), f"{where}.function.arguments"), identity)


def _arguments(value: Any, where: str) -> str:
    """JSON text of an object; nothing at all is no arguments."""
    if value is None or value == "":
        return "{}"
    try:
        if isinstance(value, Mapping):
            return json.dumps(dict(value), ensure_ascii=False, allow_nan=False)
        if isinstance(value, str) and isinstance(json.loads(value), dict):
            return value
    except (TypeError, ValueError, RecursionError):
        pass
    raise PromptError(f"{where} is {show_value(value)}\n  expected a JSON object, or one as text")
