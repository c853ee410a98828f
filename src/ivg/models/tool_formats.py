"""Calls of tools in the text of a response, in the format that the model was trained on. No torch.

===============  =============================================================================================
``hermes``       ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``: Hermes, Qwen 2.5, Qwen 3, SmolLM
``llama3_json``  ``{"name": …, "parameters": {…}}``, several with ``;`` between them: Llama 3.1, 3.2, 3.3
``mistral``      ``[TOOL_CALLS] [{"name": …, "arguments": {…}}, …]`` or ``[TOOL_CALLS]name[ARGS]{…}``: Mistral
===============  =============================================================================================

The names are those of vLLM's ``--tool-call-parser``. A format reads all of the text so far, so it does not matter in which pieces it came.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ivg.models.tool_reader import CallText, ToolReader

_OPENING, _CLOSING = "<tool_call>", "</tool_call>"
_LLAMA_TAG = "<|python_tag|>"
_SEPARATOR = re.compile(r"\s*;?\s*")
_MISTRAL = "[TOOL_CALLS]"
_NAMED = re.compile(r"\s*([\w./-]+)(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*(?=\{)")
_NAME_ENDED = re.compile(r"\s*([\w./-]+)\[")
_NAME_BEGUN = re.compile(r"\s*[\w./-]+(?:\[CALL_ID\][^\[{]*)?(?:\[[A-Z_]*\]?)?\s*")


@dataclass(frozen=True, slots=True)
class ParsedResponse:
    """A response, or its beginning.

    Attributes:
        content: text outside of calls.
        calls: in order. The last one may grow.
    """

    content: str
    calls: tuple[CallText, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models writes calls.

    Attributes:
        name: as vLLM has it.
        read: fills a reader.
        tokens: special tokens that must be part of the text.
        short_ids: ids of calls are 9 letters and digits, as templates of the family demand; else OpenAI's.
        several: does the chat template read several calls of one turn? Llama's 3.1 refuses them.
    """

    name: str
    read: Callable[[ToolReader], None]
    tokens: tuple[str, ...] = ()
    short_ids: bool = False
    several: bool = True

    def parse(self, text: str, names: Collection[str], *, final: bool = True) -> ParsedResponse:
        """Text and calls of a response.

        Args:
            text: so far.
            names: of the functions that may be called. Where there is no marker, JSON with another name is text.
            final: nothing follows. Otherwise what may become a call waits, and so does white space at the end.
        """
        reader = ToolReader(text, frozenset(names), final=final)
        self.read(reader)
        return ParsedResponse(reader.content, tuple(reader.calls))


def _read_hermes(reader: ToolReader) -> None:
    search, text = 0, reader.text
    while (start := text.find(_OPENING, search)) >= 0:
        found = reader.try_calls(start, start + len(_OPENING))
        if found is None or (found and _skip_closing(reader)):
            return
        search = max(reader.at, start + len(_OPENING))
    reader.add_rest(_OPENING)


def _skip_closing(reader: ToolReader) -> bool:
    """Go behind the closing tag; True: the text ends before it, or within it. Small models write a bracket too many before it."""
    begin = reader.at
    while begin < len(reader.text) and (reader.text[begin].isspace() or reader.text[begin] in "}]"):
        begin += 1
    if reader.text.startswith(_CLOSING, begin):
        reader.at = begin + len(_CLOSING)
        return False
    return _CLOSING.startswith(reader.text[begin:])


def _read_llama(reader: ToolReader) -> None:
    text = reader.text
    begin = len(text) - len(text.lstrip())
    if not reader.final and _LLAMA_TAG.startswith(text[begin:]):
        return
    begin += len(_LLAMA_TAG) if text.startswith(_LLAMA_TAG, begin) else 0
    while begin < len(text) and (text[begin] == "{" or text[begin].isspace()):
        found = reader.try_calls(reader.at, begin, known=True)
        if found is None:
            return
        if not found:
            break
        separator = _SEPARATOR.match(text, reader.at)
        begin = reader.at = reader.at if separator is None else separator.end()
    reader.add_rest("")


def _read_mistral(reader: ToolReader) -> None:
    search, text = 0, reader.text
    if text.lstrip().startswith("["):  # where the marker is no part of the text
        found = reader.try_calls(0, 0, known=True)
        if found is None:
            return
        search = reader.at
    while (start := text.find(_MISTRAL, search)) >= 0:
        begin = start + len(_MISTRAL)
        named = _NAMED.match(text, begin)
        if named is not None:
            found = reader.try_arguments(start, named[1], named.end())
        elif (begun := _NAME_BEGUN.fullmatch(text, begin)) and not reader.final:
            reader.add_text(start, call_follows=True)
            return
        elif begun and (ended := _NAME_ENDED.match(text, begin)):
            reader.add_cut_call(start, ended[1])
            return
        else:
            found = reader.try_calls(start, begin)
        if found is None:
            return
        search = max(reader.at, begin)
    reader.add_rest(_MISTRAL)


_ALL = (
    ToolFormat("hermes", _read_hermes, (_OPENING, _CLOSING)),
    ToolFormat("llama3_json", _read_llama),
    ToolFormat("mistral", _read_mistral, (_MISTRAL, "[ARGS]", "[CALL_ID]"), short_ids=True),
)
FORMATS: Mapping[str, ToolFormat] = MappingProxyType({f.name: f for f in _ALL})
"""The formats by name."""


def format_of_turn(text: str, call: CallText) -> ToolFormat | None:
    """The format of the text of a turn, which is known to hold ``call`` alone; None: none, or several."""
    wanted = json.loads(call.arguments)
    found = []
    for one in FORMATS.values():
        calls = one.parse(text, (call.name,)).calls
        if len(calls) == 1 and calls[0].name == call.name and _json(calls[0].arguments) == wanted:
            found.append(one)
    return found[0] if len(found) == 1 else None


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None
