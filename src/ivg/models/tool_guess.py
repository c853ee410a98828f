"""The format of the calls of tools that a chat template writes: a call is rendered, and the format that reads it back is the one."""

from __future__ import annotations

import json

from ivg.errors import PromptError
from ivg.models.cache import common_length
from ivg.models.chat_template import is_chat, render
from ivg.models.prompt_encoder import PromptEncoder
from ivg.models.tool_formats import ToolFormat, format_of_turn
from ivg.models.tool_reader import CallText
from ivg.settings.chat import ChatSettings
from ivg.settings.tools import Tools
from ivg.types import Message, Prompt, ToolCall

_NAME, _WORD, _SECOND_WORD = "look_up", "marzipan", "hammer"  # words that no template has
_ARGUMENTS, _SECOND = json.dumps({"word": _WORD}), json.dumps({"word": _SECOND_WORD})
_PARAMETERS = {"type": "object", "properties": {"word": {"type": "string", "description": "A word."}}, "required": ["word"]}
_TOOL = {"type": "function", "function": {"name": _NAME, "description": "Look a word up.", "parameters": _PARAMETERS}}
_ASKED = Message("user", "What is it?")
_CALLED = Message("assistant", "", tool_calls=(ToolCall(_NAME, _ARGUMENTS, "call12345"),))
_CALLED_TWICE = Message("assistant", "", tool_calls=(*_CALLED.tool_calls, ToolCall(_NAME, _SECOND, "call12346")))


def format_of_template(base: PromptEncoder) -> ToolFormat | None:
    """The format of the calls that the chat template of ``base`` writes; None: it writes none, or in no known format."""
    turn = _turn(base, _CALLED)
    return None if turn is None else format_of_turn(turn, CallText(_NAME, _ARGUMENTS))


def reads_several(base: PromptEncoder) -> bool:
    """May a response have several calls? No where the chat template of ``base`` reads one call of a turn but not two: such a response could
    not be sent back. Yes where it reads no calls at all, or there is none: then it says nothing about their number.
    """
    return _reads(base, _CALLED, (_WORD,)) <= _reads(base, _CALLED_TWICE, (_WORD, _SECOND_WORD))


def _reads(base: PromptEncoder, called: Message, words: tuple[str, ...]) -> bool:
    turn = _turn(base, called)
    return turn is not None and all(word in turn for word in words)


def _turn(base: PromptEncoder, called: Message) -> str | None:
    """What the chat template makes of a turn that calls a function; None: nothing."""
    if not is_chat(Prompt((_ASKED,)), base.template):
        return None
    chat = ChatSettings(tools=Tools([_TOOL]))
    try:
        before, behind = (
            render(Prompt(turns, chat=chat), base.tokenizer, base.template, base.name, base.chat_settings)
            for turns in ((_ASKED,), (_ASKED, called))
        )
    except PromptError:
        return None
    return behind[common_length(before, behind) :]
