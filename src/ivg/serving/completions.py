"""The endpoints that generate text: submit a request to the worker, wait for its events, respond as JSON or as a stream."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from ivg.errors import ServeError
from ivg.models.token_text import TokenText
from ivg.serving.connections import EVENT_STREAM
from ivg.serving.logs import log_event
from ivg.serving.parsing import parse_body, parse_data
from ivg.serving.protocol import Body, ChatRequest, CompletionRequest
from ivg.serving.requests import Event, Progress, RequestHandle
from ivg.serving.responses import ResponseBuilder
from ivg.serving.responses_api.events import ResponseEncoder
from ivg.serving.responses_api.items import ResponseObjects
from ivg.serving.responses_api.request import ResponsesRequest, renamed
from ivg.serving.served_models import RequestBatch
from ivg.serving.stream import EventEncoder, StreamEncoder
from ivg.serving.worker import Worker
from ivg.types import Completion

LIVENESS_SECONDS = 0.5
"""While a request waits for an event, it checks this often whether the worker is alive."""
T = TypeVar("T")


class CompletionEndpoint:
    """Answers ``/v1/completions``, ``/v1/chat/completions`` and ``/v1/responses``."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._token_text = TokenText(worker.model.engine.vocabulary)

    async def respond(self, request: Request, kind: type[ChatRequest | CompletionRequest]) -> Response:
        """The response to one HTTP request.

        Raises:
            ServeError: a wrong body, a full queue, a failed model.
        """
        body = parse_body(await request.body(), request.headers, kind, strict=self.worker.settings.strict)
        return await self._answer(request, body, lambda builder: _stream_encoder(builder, body), ResponseBuilder.build_response)

    async def respond_to_response(self, request: Request) -> Response:
        """The response to one request of the Responses API.

        Raises:
            ServeError: as :meth:`respond`.
        """
        strict = self.worker.settings.strict
        body = parse_body(await request.body(), request.headers, ResponsesRequest, strict=strict)

        def encoder(builder: ResponseBuilder) -> ResponseEncoder:
            return ResponseEncoder(ResponseObjects(builder, body))

        def build(builder: ResponseBuilder, completions: Sequence[Completion]) -> dict[str, Any]:
            return encoder(builder).whole(completions[0])

        try:
            return await self._answer(request, parse_data(body.chat(), ChatRequest), encoder, build)
        except ServeError as e:
            raise renamed(e) from None

    async def _answer(
        self,
        request: Request,
        body: Body,
        encoder: Callable[[ResponseBuilder], EventEncoder],
        build: Callable[[ResponseBuilder, Sequence[Completion]], dict[str, Any]],
    ) -> Response:
        worker, settings = self.worker, self.worker.settings
        handle = RequestHandle(body, worker.served.count_completions(body), settings.deadline)
        if settings.log_prompts:
            log_event("prompt", request_id=request.state.request_id, body=_loggable(body))
        worker.served.resolve_method(body.model, body.guidance)  # unknown models are refused before they are queued
        if isinstance(body, ChatRequest) and any(message.images for message in body.messages):
            handle.body = await _until_disconnect(request.receive, asyncio.to_thread(worker.served.read_images, body))
        worker.submit(handle)
        try:
            batch = await _until_disconnect(request.receive, _next_event(handle, worker))
            assert isinstance(batch, RequestBatch)
            more: dict[str, Any] = {}
            if isinstance(body, CompletionRequest):
                more = {"echo": bool(body.echo), "prompt_logprobs": body.prompt_logprobs}
            builder = ResponseBuilder(isinstance(body, ChatRequest), body.model, batch, body.n_logprobs, self._token_text, **more)
            if body.stream:
                return EventStream(encoder(builder), handle, worker)
            completions = await _until_disconnect(request.receive, _gather(handle, worker))
            return JSON(build(builder, completions))
        except BaseException:
            worker.cancel(handle)
            raise


def _loggable(body: Body) -> dict[str, Any]:
    """The body for the log, without the content of pictures."""
    out = body.model_dump(exclude_none=True)
    if isinstance(body, ChatRequest):
        turns = [
            {"role": m.role, "content": m.content, "images": [image.shown for image in m.images], **m.tool_fields} for m in body.messages
        ]
        out["messages"] = [{name: value for name, value in turn.items() if value != []} for turn in turns]
    return out


def _stream_encoder(builder: ResponseBuilder, body: Body) -> StreamEncoder:
    options = body.stream_options
    usage = bool(options and options.include_usage)
    continuous = bool(usage and options and options.continuous_usage_stats)
    return StreamEncoder(builder, usage=usage, continuous_usage=continuous, beams=body.include_beams)


async def _next_event(handle: RequestHandle, worker: Worker) -> RequestBatch | Progress:
    """The next event; errors are raised."""
    while True:
        try:
            async with asyncio.timeout(LIVENESS_SECONDS):  # wait_for would lose a cancellation that arrives with an event (Python 3.11)
                event: Event = await handle.events.get()
        except TimeoutError:
            if (worker.thread.is_alive() and worker.seconds_left > 0) or not handle.events.empty():
                continue  # the worker itself sends an error when its time is over, unless it is inside a long step
            raise ServeError("the server is broken or shutting down", 503, "unavailable") from None
        if isinstance(event, ServeError):
            raise event
        return event


async def _progress(handle: RequestHandle, worker: Worker) -> AsyncIterator[Progress]:
    """Until all completions are finished; observes time to first text and total time."""
    left, is_first = handle.count, True
    while left:
        progress = await _next_event(handle, worker)
        assert isinstance(progress, Progress)
        if is_first and (progress.committed or progress.completion):
            is_first = False
            worker.metrics.first_text.observe(time.monotonic() - handle.started)
        left -= progress.completion is not None
        yield progress
    worker.metrics.request_seconds.observe(time.monotonic() - handle.started)


async def _gather(handle: RequestHandle, worker: Worker) -> list[Completion]:
    """All completions, in order."""
    done = {p.index: p.completion async for p in _progress(handle, worker) if p.completion is not None}
    return [done[i] for i in range(handle.count)]


async def _first_done(work: Awaitable[T], receive: Receive) -> asyncio.Future[T]:
    """``work`` as a future, when it is done or the client has disconnected."""

    async def disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task
    except BaseException:
        task.cancel()
        raise
    finally:
        gone.cancel()


async def _until_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """The result of ``work``, unless the client disconnects first."""
    task = await _first_done(work, receive)
    if not task.done():
        task.cancel()
        raise ServeError("the client disconnected", 499, "disconnected")
    return task.result()


class JSON(Response):
    """JSON in UTF-8."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Encode ``content``."""
        return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


class EventStream(Response):
    """Server-sent events. Unlike starlette's, it notices a disconnect also while there is nothing to send."""

    media_type = "text/event-stream"

    def __init__(self, encoder: EventEncoder, handle: RequestHandle, worker: Worker) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.encoder, self.handle, self.worker = encoder, handle, worker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, or until the client disconnects."""
        scope.setdefault("state", {})[EVENT_STREAM] = True
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        sending = asyncio.ensure_future(self._send_events(send))
        try:
            if (await _first_done(sending, receive)).done():
                sending.result()
        finally:
            self.worker.cancel(self.handle)
            sending.cancel()
            with suppress(asyncio.CancelledError, OSError):
                await sending

    async def _send_events(self, send: Send) -> None:
        async def write(chunk: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": chunk, "more_body": more})

        try:
            if chunk := b"".join(self.encoder.start()):
                await write(chunk)
            async for progress in _progress(self.handle, self.worker):
                if chunk := b"".join(self.encoder.update(progress)):
                    await write(chunk)
            await write(b"".join(self.encoder.finish()))
        except ServeError as e:
            await write(b"".join(self.encoder.fail(e)))
        except Exception as e:
            log_event("stream failed", logging.ERROR, error=f"{type(e).__name__}: {e}")
            await write(b"".join(self.encoder.fail(ServeError("internal server error", 500, "server_error"))))
        await write(b"", more=False)
