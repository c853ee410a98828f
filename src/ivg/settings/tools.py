"""Tools that a model may call: functions with a JSON schema, as OpenAI's API and chat templates have them. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ivg.errors import ConfigError
from ivg.settings.json_value import JSONValue
from ivg.settings.rules import Rule


class Tools(JSONValue, Sequence[dict[str, Any]]):
    """Definitions of tools, in order. The order of their keys counts: templates write it out."""

    __slots__ = ()

    def __init__(self, tools: Iterable[Mapping[str, Any]] = ()) -> None:
        super().__init__([dict(tool) for tool in tools])

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the functions."""
        return tuple(tool["function"]["name"] for tool in self)


def _tools(value: Any) -> Tools:
    if isinstance(value, Tools):
        return value
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise TypeError
    found = list(value)
    if not all(isinstance(tool, Mapping) for tool in found):
        raise TypeError
    return Tools(found)


def _checked(tools: Tools) -> bool:
    """True; errors say which tool is wrong."""
    seen: set[str] = set()
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        if (kind := tool.get("type", "function")) != "function":
            raise ConfigError(f"{where}.type is {kind!r}\n  expected 'function': other tools are not supported")
        function = tool.get("function")
        if not isinstance(function, Mapping):
            raise ConfigError(f'{where} has no function\n  expected {{"type": "function", "function": {{"name": …, "parameters": …}}}}')
        name = function.get("name")
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f"{where}.function.name is {name!r}\n  expected the name of the function")
        if name in seen:
            raise ConfigError(f"{where}.function.name is {name!r}, as that of another tool\n  give each tool a name of its own")
        seen.add(name)
        for part, kinds, words in (("description", str, "text"), ("parameters", Mapping, "a JSON schema")):
            if not isinstance(function.get(part), kinds | None):
                raise ConfigError(f"{where}.function.{part} is {function[part]!r}\n  expected {words}")
    return True


NO_TOOLS = Tools()
TOOLS = Rule("a list of tools", _tools, '[{"type": "function", "function": {"name": …}}, …]', _checked)
