"""Whether a chat template writes tools, their calls and results into the prompt, and in which form it reads arguments.

Templates differ, and many leave out what they do not know, without a word: a rendered text is compared with one of messages without it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ivg.errors import PromptError

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[Messages, Mapping[str, Any]], str | None]
"""Messages and more settings of ``apply_chat_template`` -> the text; None: the template fails."""
_OTHER_RESULT = "another result"
_ADVICE = 'give this model a chat template that reads tools, or one such as "{prompt}", which reads calls and results as text'


def with_readable_arguments(messages: Messages, render: Render) -> Messages:
    """``messages`` with the arguments of calls in the form that the template reads: objects, as transformers and vLLM give them.

    They are JSON text where the template fails on objects or prints them as Python does.
    """
    if not any(m.get("tool_calls") for m in messages):
        return messages
    text = render(messages, {})
    if text is not None and not any(repr(arguments) in text for arguments in _arguments(messages) if arguments):
        return messages
    as_text = [_with_text_arguments(m) for m in messages]
    return messages if render(as_text, {}) is None else as_text


def check_tools_shown(text: str, messages: Messages, tools: Sequence[Any], name: str, render: Render) -> None:
    """Raise where ``text``, rendered from ``messages``, is the same without the tools, the calls or the results.

    Raises:
        PromptError: names the model and what it leaves out.
    """
    if tools and render(messages, {"tools": None}) == text:
        raise PromptError(f"the chat template of {name} leaves tools out\n  {_ADVICE}")
    calls = [m for m in messages if m.get("tool_calls")]
    if calls and render([{k: v for k, v in m.items() if k != "tool_calls"} for m in messages], {}) == text:
        raise PromptError(f"the chat template of {name} leaves the calls of tools out\n  {_ADVICE}")
    results = [m for m in messages if m["role"] == "tool" and m["content"]]
    others = [{**m, "content": _OTHER_RESULT} if m["role"] == "tool" else m for m in messages]
    if results and others != list(messages) and render(others, {}) == text:
        raise PromptError(f"the chat template of {name} leaves the results of tools out\n  {_ADVICE}")


def _arguments(messages: Messages) -> list[Any]:
    return [call["function"]["arguments"] for m in messages for call in m.get("tool_calls", ())]


def _with_text_arguments(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = [{**call, "function": {**call["function"], "arguments": _as_json(call)}} for call in message["tool_calls"]]
    return {**message, "tool_calls": calls}


def _as_json(call: Mapping[str, Any]) -> str:
    return json.dumps(call["function"]["arguments"], ensure_ascii=False)
