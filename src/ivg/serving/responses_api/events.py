"""The events of a response, in the order in which OpenAI sends them: each item of the output begins, grows and is done.

A response that is not streamed is what the last event holds. Independent of HTTP and threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ivg.errors import ServeError
from ivg.serving.errors import error_body
from ivg.serving.requests import Progress
from ivg.serving.responses import ChoiceState
from ivg.serving.responses_api.items import ResponseObjects, output_text
from ivg.serving.stream import EventEncoder, encode_event
from ivg.types import Completion

_Event = tuple[str, dict[str, Any]]


class ResponseEncoder(EventEncoder):
    """Encodes one response as server-sent events.

    Args:
        objects: builds the objects.
    """

    def __init__(self, objects: ResponseObjects) -> None:
        self.objects = objects
        self.output: list[dict[str, Any]] = []
        """Items that are done."""
        self.response: dict[str, Any] | None = None
        """The whole response, when it is done."""
        self._state, self._number = ChoiceState(0), 0
        self._kind, self._text, self._call = "", "", {"name": "", "id": ""}
        """Of the item that grows: ``reasoning``, ``message``, ``call`` or nothing; its text; its call."""
        self._logprobs: list[dict[str, Any]] = []
        self._sequence = 0

    def start(self) -> Iterator[bytes]:
        """The response begins."""
        for kind in ("created", "in_progress"):
            yield self._encode((f"response.{kind}", {"response": self.objects.response([], None)}))

    def update(self, progress: Progress) -> Iterator[bytes]:
        """The events for ``progress``."""
        yield from map(self._encode, self._update(progress.committed, progress.completion))

    def finish(self) -> Iterator[bytes]:
        """There is no event after that of the whole response."""
        return iter(())

    def fail(self, error: ServeError) -> Iterator[bytes]:
        """An error in the middle of the stream."""
        found = error_body(error)["error"]
        failed = self.objects.response(self.output, None, "failed")
        failed["error"] = {"code": "server_error" if error.status >= 500 else "invalid_prompt", "message": found["message"]}
        yield self._encode(("error", {name: found[name] for name in ("code", "message", "param")}))
        yield self._encode(("response.failed", {"response": failed}))

    def whole(self, completion: Completion) -> dict[str, Any]:
        """The response to a request that is not streamed."""
        for _ in self._update(completion.text, completion):
            pass
        assert self.response is not None
        return self.response

    def _update(self, text: str, completion: Completion | None) -> Iterator[_Event]:
        self._state.text = text
        if completion is not None:
            self._logprobs = self.objects.logprobs(completion)
        delta = self.objects.builder.take_delta(self._state, final=completion is not None)
        ends = next((i for i, call in enumerate(delta.calls) if "id" in call), len(delta.calls))
        for call in delta.calls[:ends]:  # of the call that grows; text may follow it
            yield from self._grow("call", call["function"]["arguments"])
        if delta.thinking:
            yield from self._grow("reasoning", delta.thinking)
        if delta.content:
            yield from self._grow("message", delta.content)
        for call in delta.calls[ends:]:
            if "id" in call:
                yield from self._end()
                self._call = {"name": call["function"]["name"], "id": call["id"]}
                yield from self._begin("call")
            if call["function"]["arguments"]:
                yield from self._grow("call", call["function"]["arguments"])
        if completion is not None:
            cut = completion.finish_reason == "length"
            if not self._kind and not self.output:  # an empty answer is a message without text
                yield from self._begin("message")
            yield from self._end("incomplete" if cut else "completed")
            self.response = self.objects.response(self.output, completion)
            yield f"response.{self.response['status']}", {"response": self.response}

    def _grow(self, kind: str, piece: str) -> Iterator[_Event]:
        if self._kind != kind:
            yield from self._end()
            yield from self._begin(kind)
        self._text += piece
        name = {"reasoning": "reasoning_text", "message": "output_text", "call": "function_call_arguments"}[kind]
        more: dict[str, Any] = {} if kind == "call" else {"content_index": 0}
        more |= {"logprobs": []} if kind == "message" else {}
        yield f"response.{name}.delta", {**self._place, **more, "delta": piece}

    def _begin(self, kind: str) -> Iterator[_Event]:
        self._kind, self._text = kind, ""
        yield "response.output_item.added", {"output_index": self._number, "item": self._item(None, "in_progress")}
        if kind == "message":
            yield "response.content_part.added", {**self._place, "content_index": 0, "part": output_text("")}

    def _end(self, status: str = "completed") -> Iterator[_Event]:
        """The item that grows, if any, is done."""
        if not self._kind:
            return
        text, place = self._text, self._place
        if self._kind == "reasoning":
            yield "response.reasoning_text.done", {**place, "content_index": 0, "text": text}
        elif self._kind == "message":
            yield "response.output_text.done", {**place, "content_index": 0, "text": text, "logprobs": self._logprobs}
            yield "response.content_part.done", {**place, "content_index": 0, "part": output_text(text, self._logprobs)}
        else:
            yield "response.function_call_arguments.done", {**place, "name": self._call["name"], "arguments": text}
        item = self._item(text, status)
        yield "response.output_item.done", {"output_index": self._number, "item": item}
        self.output.append(item)
        self._kind = ""
        self._number += 1

    def _item(self, text: str | None, status: str) -> dict[str, Any]:
        objects, number = self.objects, self._number
        if self._kind == "reasoning":
            return objects.reasoning(text, number, status)
        if self._kind == "message":
            return objects.message(text, number, status, self._logprobs)
        return objects.call(self._call["name"], text or "", self._call["id"], number, status)

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item(None, "")["id"], "output_index": self._number}

    def _encode(self, event: _Event) -> bytes:
        name, data = event
        out = encode_event({"type": name, "sequence_number": self._sequence, **data}, name)
        self._sequence += 1
        return out
