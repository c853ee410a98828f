"""The objects of a response: items of its output, usage, and the response itself. Independent of HTTP and threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ivg.serving.responses import ChoiceState, ResponseBuilder
from ivg.serving.responses_api.request import ResponsesRequest
from ivg.types import Completion


class ResponseObjects:
    """Builds the objects of one response.

    Args:
        builder: of the chat completion.
        body: what was asked for.
    """

    def __init__(self, builder: ResponseBuilder, body: ResponsesRequest) -> None:
        self.builder, self.body = builder, body
        self.key = builder.id.partition("-")[2]

    def reasoning(self, text: str | None, number: int, status: str = "completed") -> dict[str, Any]:
        """An item with thinking; without ``text`` one that begins."""
        content = [] if text is None else [{"type": "reasoning_text", "text": text}]
        return {"type": "reasoning", "id": f"rs_{self.key}{number}", "status": status, "summary": [], "content": content}

    def message(self, text: str | None, number: int, status: str = "completed", logprobs: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """An item with text; without ``text`` one that begins."""
        content = [] if text is None else [output_text(text, logprobs)]
        return {"type": "message", "id": f"msg_{self.key}{number}", "status": status, "role": "assistant", "content": content}

    def call(self, name: str, arguments: str, call_id: str, number: int, status: str = "completed") -> dict[str, Any]:
        """An item with a call of a function."""
        own = {"type": "function_call", "id": f"fc_{self.key}{number}", "status": status}
        return {**own, "call_id": call_id, "name": name, "arguments": arguments}

    def logprobs(self, completion: Completion) -> list[dict[str, Any]]:
        """Log-probabilities of all tokens of the text, where they were asked for."""
        tokens = ChoiceState(0).take_tokens(completion.details, len(completion.text), final=True)
        found = self.builder.logprobs(tokens, 0) if self.body.wants_logprobs else None
        return (
            [{**_with_bytes(t), "top_logprobs": [_with_bytes(other) for other in t["top_logprobs"]]} for t in found["content"]]
            if found
            else []
        )

    def response(self, output: Sequence[dict[str, Any]], completion: Completion | None, status: str = "in_progress") -> dict[str, Any]:
        """The response; without ``completion`` one that goes on."""
        body, batch = self.body, self.builder.batch
        sampling = batch.requests[0].sampling
        cut = completion is not None and completion.finish_reason == "length"
        return {
            "id": f"resp_{self.key}",
            "object": "response",
            "created_at": self.builder.created,
            "status": status if completion is None else "incomplete" if cut else "completed",
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": list(output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": (body.text.format if body.text else None) or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [{"strict": False, "parameters": None, **tool} for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None if completion is None else self.usage(completion),
            "user": body.user,
            **({} if completion is None else {"ivg": self.builder.ivg_object([completion])}),
        }

    def usage(self, completion: Completion) -> dict[str, Any]:
        """Tokens of prompt and response; those of the thinking are ``reasoning_tokens``."""
        usage = self.builder.usage([completion])
        thinking = completion.usage.completion_tokens if completion.answer_start is None else completion.answer_start
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": usage["prompt_tokens_details"]["cached_tokens"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": thinking},
            "total_tokens": usage["total_tokens"],
        }


def _with_bytes(token: dict[str, Any]) -> dict[str, Any]:
    """A token whose bytes are a list, as this API has it: an empty one where they are a part of a character."""
    return {**token, "bytes": token["bytes"] or []}


def output_text(text: str, logprobs: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """The part of a message that holds its text."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}
