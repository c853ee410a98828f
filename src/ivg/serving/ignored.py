"""Fields of request bodies that are not part of the schema: those that are ignored, and those that are not supported."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from ivg.errors import ServeError
from ivg.serving.fields import is_one_of, show_json

LABELS = frozenset({"user", "safety_identifier", "prompt_cache_key"})
"""Ids for OpenAI's service; always ignored."""
NO_EFFECT = frozenset({
    "metadata", "store", "service_tier", "parallel_tool_calls", "prompt_cache_retention", "request_id", "priority", "cache_salt",
    "guided_decoding_backend",
})  # fmt: skip
"""Fields that never change the response; ignored, unless the server is strict."""
OPENAI: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "echo": (False,),
    "prompt_logprobs": (),
    "suffix": ("",),
    "parallel_tool_calls": (False, True),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": ({},),
}
"""Unsupported fields of OpenAI's API, with their neutral values."""
RESPONSES: Mapping[str, tuple[Any, ...]] = {
    "previous_response_id": (None,),
    "conversation": (None,),
    "background": (False,),
    "truncation": ("disabled",),
    "reasoning": ({}, {"effort": None}, {"effort": "none"}, {"effort": None, "summary": None}),
    "max_tool_calls": (),
    "prompt": (),
}
"""The same of its Responses API; responses are not stored."""
VLLM: Mapping[str, tuple[Any, ...]] = {
    "length_penalty": (1,),
    "use_beam_search": (False,),
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
"""Unsupported fields of vLLM and similar servers, with their neutral values; unknown fields to a strict server."""
MESSAGE: Mapping[str, tuple[Any, ...]] = {
    "refusal": (None,), "function_call": (None,), "audio": (None,), "annotations": (None, []),
}  # fmt: skip
"""Fields of a message that are not read, with the values that a strict server accepts."""

READ = ("role", "content", "name", "tool_calls", "tool_call_id")
"""Fields of a message that are read."""


def remove_ignored(data: dict[str, Any], known: Collection[str] = (), *, strict: bool) -> dict[str, Any]:
    """The fields that the schema knows, or that are unknown.

    Args:
        data: a request body.
        known: fields of the schema that other bodies lack.
        strict: keep fields that would be ignored, so that the schema refuses them.

    Raises:
        ServeError: an unsupported field that is not neutral.
    """
    if strict:
        _check_messages(data.get("messages"))
    else:
        data = _move_extra_body(data)
        data = _remove_tools(data, known)
    unsupported = {**OPENAI, **({} if strict else VLLM), **(RESPONSES if "input" in known else {})}
    out = {}
    for name, value in data.items():
        if (name in LABELS and name not in known) or (not strict and (value is None or (name in NO_EFFECT and name not in known))):
            continue
        neutral = None if name in known else unsupported.get(name)
        if neutral is None:
            out[name] = value
        elif value is not None and not is_one_of(value, neutral):
            hint = f" or give {json.dumps(neutral[0])}" if neutral else ""
            hint += "; responses are not stored: send the conversation as input" if name in ("previous_response_id", "conversation") else ""
            raise ServeError(f"{name} is not supported; leave it out{hint}", 400, "invalid_value", name)
    return out


def _remove_tools(data: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Without tools that the model must not call."""
    for choice, offered in (("tool_choice", "tools"), ("function_call", "functions")):
        if offered in known:
            continue
        if data.get(choice) == "none":
            data = {k: v for k, v in data.items() if k not in (choice, offered)}
        elif data.get(choice) == "auto" and not data.get(offered):
            data = {k: v for k, v in data.items() if k != choice}
    return data


def _move_extra_body(data: dict[str, Any]) -> dict[str, Any]:
    """The content of ``extra_body``, which some clients send literally, at the top level."""
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


def _check_messages(messages: Any) -> None:
    for i, message in enumerate(messages if isinstance(messages, list) else ()):
        for name, value in message.items() if isinstance(message, dict) else ():
            path = f"messages[{i}].{name}"
            if name in MESSAGE and not is_one_of(value, MESSAGE[name]):
                raise ServeError(f"{path} is not supported; leave it out", 400, "invalid_value", path)
            if name not in (*READ, *MESSAGE):
                raise ServeError(f"unknown field {path}", 400, "unknown_field", path)
