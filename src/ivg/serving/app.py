"""The HTTP application: OpenAI's paths, health, metrics, the playground. Thin: bodies in, tickets to the worker, replies out."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, Response
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from ivg.errors import ServeError
from ivg.serving.connections import EVENTS
from ivg.serving.logs import say
from ivg.serving.metrics import CONTENT_TYPE
from ivg.serving.middleware import GuardMiddleware, error_headers
from ivg.serving.parsing import B, Body, read
from ivg.serving.protocol import ChatRequest, CompletionRequest
from ivg.serving.requests import Event, Progress, RequestHandle
from ivg.serving.responses import ResponseBuilder, Texts, error_body, whole
from ivg.serving.served_models import Order, ServedModels
from ivg.serving.stream import Stream
from ivg.serving.worker import Worker
from ivg.types import Completion

PLAYGROUND = Path(__file__).parent / "playground"
PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/ready", "/metrics", "/"})
WATCH_SECONDS = 0.5
"""A client that waits looks this often whether the worker lives."""
ROUND_SECONDS = 5.0
"""The worker's last round is waited for this long when its time is over."""
T = TypeVar("T")


def create_app(worker: Worker, presets: ServedModels) -> FastAPI:
    """The application around a worker, which starts and stops with it.

    Args:
        worker: owns the models.
        presets: the same models, as clients see them.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if not worker.thread.is_alive():
            worker.start()
        yield
        worker.drain()
        while worker.thread.is_alive() and worker.seconds_left > -ROUND_SECONDS:  # a second signal may shorten it meanwhile
            await asyncio.sleep(0.02)

    app = FastAPI(title="ivg", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    app.state.worker, app.state.presets = worker, presets
    app.state.texts = Texts(presets.model.engine.vocabulary)
    _add_errors(app)
    _add_openai(app, worker, presets)
    _add_health(app, worker)
    _add_playground(app)
    app.add_middleware(GuardMiddleware, settings=worker.settings, metrics=worker.metrics, paths=PATHS)
    if worker.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(worker.settings.cors_origins),
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],  # clients send headers of their own (x-stainless-…), and none of them is believed
            expose_headers=["x-request-id", "retry-after"],
        )
    _describe(app, list(presets.names))
    return app


# Paths


def _add_openai(app: FastAPI, worker: Worker, presets: ServedModels) -> None:
    listing = _models(presets)

    async def answer(kind: type[B], request: Request) -> Response:
        body = read(await request.body(), request.headers, kind, strict=worker.settings.strict)
        return await _answer(worker, presets, body, request)

    @app.post("/v1/chat/completions", response_class=JSON, openapi_extra=_takes(ChatRequest))
    async def chat(request: Request) -> Response:
        """Answer a conversation."""
        return await answer(ChatRequest, request)

    @app.post("/v1/completions", response_class=JSON, openapi_extra=_takes(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Continue a text."""
        return await answer(CompletionRequest, request)

    @app.get("/v1/models", response_class=JSON)
    async def models() -> Response:
        """The base under its name, and with every method at hand."""
        return JSON(listing)

    @app.get("/v1/models/{name:path}", response_class=JSON)
    async def model(name: str) -> Response:
        """One of them."""
        found = [entry for entry in listing["data"] if entry["id"] == name]
        if not found:
            raise ServeError(f"the model {name!r} does not exist", 404, "model_not_found", "model")
        return JSON(found[0])


def _add_health(app: FastAPI, worker: Worker) -> None:
    @app.get("/health", response_class=JSON)
    async def health() -> Response:
        """Does the thread that owns the models live?"""
        return JSON({"status": "ok" if worker.alive else "dead"}, 200 if worker.alive else 503)

    @app.get("/ready", response_class=JSON)
    async def ready() -> Response:
        """Are new requests taken?"""
        fine = worker.alive and not worker.draining and not worker.torn
        status = "ready" if fine else "draining" if worker.draining else "restarting" if worker.alive else "dead"
        return JSON({"status": status}, 200 if fine else 503)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(worker.metrics.text(), media_type=CONTENT_TYPE)


def _add_playground(app: FastAPI) -> None:
    """Every file by itself: a mount at / would answer wrong methods elsewhere with 404."""

    def page(file: Path) -> Callable[[], Awaitable[Response]]:
        async def get() -> Response:
            return FileResponse(file, headers={"cache-control": "no-cache"})

        return get

    for file in sorted(f for f in PLAYGROUND.rglob("*") if f.is_file()):
        path = "/" + file.relative_to(PLAYGROUND).as_posix()
        app.add_api_route("/" if path == "/index.html" else path, page(file), methods=["GET", "HEAD"], include_in_schema=False)


def _models(presets: ServedModels) -> dict[str, Any]:
    created = int(time.time())
    data = [{"id": e.pop("id"), "object": "model", "created": created, "owned_by": "ivg", **e} for e in presets.listing()]
    s = presets.settings
    names = ("max_hypotheses", "max_chunk_length", "max_candidates", "max_n", "deadline")
    limits = {n: getattr(s, n) for n in names} | {"max_tokens": presets.max_tokens}
    return {"object": "list", "data": data, "ivg": {"limits": limits, "values": list(presets.model.values), "defaults": presets.defaults}}


# One request


async def _answer(worker: Worker, presets: ServedModels, body: Body, request: Request) -> Response:
    """Submit, wait until it is accepted, then stream or wait for the whole."""
    ticket = RequestHandle(lambda: presets.order(body), presets.size(body), worker.settings.deadline)
    if worker.settings.log_prompts:
        say("prompt", request_id=request.state.request_id, body=body.model_dump(exclude_none=True))
    presets.method(body.model, body.guidance)
    worker.submit(ticket)
    try:
        order = await _unless_gone(request, _next(ticket, worker))
        assert isinstance(order, Order)
        form = ResponseBuilder(isinstance(body, ChatRequest), body.model, order, body.alternatives, request.app.state.texts)
        if body.stream:
            options = body.stream_options
            usage = bool(options and options.include_usage)
            stream = Stream(form, usage=usage, counts=bool(usage and options and options.continuous_usage_stats), beams=body.watched)
            return EventStream(stream, ticket, worker)
        completions = await _unless_gone(request, _gather(ticket, worker, len(order.requests)))
        return JSON(whole(form, completions))
    except BaseException:
        worker.cancel(ticket)
        raise


async def _next(ticket: RequestHandle, worker: Worker) -> Order | Progress:
    """The next event; errors are raised."""
    while True:
        try:
            async with asyncio.timeout(WATCH_SECONDS):  # wait_for would swallow a cancellation that an event comes with (Python 3.11)
                event: Event = await ticket.events.get()
        except TimeoutError:
            if (worker.thread.is_alive() and worker.seconds_left > 0) or not ticket.events.empty():
                continue  # the thread itself tells when time is over, unless it is inside a long round
            raise ServeError("the server is broken or shutting down", 503, "unavailable") from None
        if isinstance(event, ServeError):
            raise event
        return event


async def _gather(ticket: RequestHandle, worker: Worker, count: int) -> list[Completion]:
    """All answers, in order."""
    done: dict[int, Completion] = {}
    first = False
    while len(done) < count:
        progress = await _next(ticket, worker)
        assert isinstance(progress, Progress)
        first = _time_first(first, progress, ticket, worker)
        if progress.completion is not None:
            done[progress.index] = progress.completion
    worker.metrics.total.observe(time.monotonic() - ticket.started)
    return [done[i] for i in range(count)]


def _time_first(known: bool, progress: Progress, ticket: RequestHandle, worker: Worker) -> bool:
    if not known and (progress.committed or progress.completion):
        worker.metrics.first.observe(time.monotonic() - ticket.started)
        return True
    return known


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What ``work`` gives, unless the client goes away first."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ServeError("the client went away", 499, "disconnected")
        return task.result()
    finally:
        for future in (task, gone):
            future.cancel()


async def _disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class JSON(Response):
    """JSON in UTF-8."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Bytes of it."""
        return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


class EventStream(Response):
    """Events as they come; a client that goes away is noticed at once, whether or not there is anything to send."""

    media_type = "text/event-stream"

    def __init__(self, stream: Stream, ticket: RequestHandle, worker: Worker) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.stream, self.ticket, self.worker = stream, ticket, worker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, or until nobody listens."""
        scope.setdefault("state", {})[EVENTS] = True
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        work, gone = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            self.worker.cancel(self.ticket)
            for future in (work, gone):
                future.cancel()
            with suppress(asyncio.CancelledError, OSError):
                await work

    async def _send(self, send: Send) -> None:
        async def out(chunk: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": chunk, "more_body": more})

        try:
            await out(b"".join(self.stream.opening()))
            first = False
            while not self.stream.over:
                progress = await _next(self.ticket, self.worker)
                assert isinstance(progress, Progress)
                first = _time_first(first, progress, self.ticket, self.worker)
                if chunk := b"".join(self.stream.take(progress)):
                    await out(chunk)
            self.worker.metrics.total.observe(time.monotonic() - self.ticket.started)
            await out(b"".join(self.stream.closing()))
        except ServeError as e:
            await out(b"".join(self.stream.failure(e)))
        except Exception as e:
            say("stream failed", logging.ERROR, error=f"{type(e).__name__}: {e}")
            await out(b"".join(self.stream.failure(ServeError("the stream broke", 500, "server_error"))))
        await out(b"", more=False)


# Errors


def _add_errors(app: FastAPI) -> None:
    def reply(error: ServeError) -> Response:
        body = json.dumps(error_body(error))  # ASCII: a client's own words may be no Unicode at all
        return Response(body, error.status, error_headers(error), "application/json")

    @app.exception_handler(ServeError)
    async def ours(_: Request, error: ServeError) -> Response:
        return reply(error)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        return reply(ServeError(str(error.detail), error.status_code, code))

    @app.exception_handler(Exception)
    async def any_other(_: Request, __: Exception) -> Response:
        return reply(ServeError("something went wrong in the server; its log has this request's id", 500, "server_error"))


def _takes(kind: type[Body]) -> dict[str, Any]:
    """A body in the schema; it is read by ``serving.bodies``."""
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}}
    }


def _describe(app: FastAPI, names: list[str]) -> None:
    """In the schema: the models by name; errors are 400 in OpenAI's shape, not FastAPI's 422."""
    made = app.openapi
    shape = {"type": "object", "required": ["error"], "properties": {"error": {"type": "object"}}}
    content = {"application/json": {"schema": shape}}

    def openapi() -> dict[str, Any]:
        schema = made()
        kinds: Any = [(ChatRequest, "validation"), (CompletionRequest, "validation")]
        own = models_json_schema(kinds, ref_template="#/components/schemas/{model}")[1]["$defs"]
        schema.setdefault("components", {}).setdefault("schemas", {}).update(own)
        for kind in (ChatRequest, CompletionRequest):
            schema["components"]["schemas"][kind.__name__]["properties"]["model"]["enum"] = names
        for name, path in schema["paths"].items():
            for operation in path.values():
                if name.endswith("completions"):
                    operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
                operation["responses"].pop("422", None)
                for status in (400, 401, 404, 408, 413, 415, 429, 500, 502, 503, 504):
                    operation["responses"].setdefault(str(status), {"description": "An error in OpenAI's shape.", "content": content})
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
