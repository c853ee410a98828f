"""The HTTP application: OpenAI's endpoints, health, metrics, the playground."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from ivg.errors import ServeError
from ivg.serving.completions import JSON, CompletionEndpoint
from ivg.serving.documentation import documentation
from ivg.serving.metrics import CONTENT_TYPE
from ivg.serving.middleware import RequestMiddleware, error_response, internal_error
from ivg.serving.openapi import describe, request_body
from ivg.serving.protocol import ChatRequest, CompletionRequest
from ivg.serving.responses_api.request import ResponsesRequest
from ivg.serving.served_models import ServedModels
from ivg.serving.worker import Worker

PLAYGROUND = Path(__file__).parent / "playground"
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health", "/ready", "/metrics", "/openapi.json", "/")
LAST_STEP_SECONDS = 5.0
"""When the time to drain is over, the worker's current step gets this long to end."""


def create_app(worker: Worker) -> FastAPI:
    """The ASGI application around a worker; it starts the worker, and drains it at shutdown."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if not worker.thread.is_alive():
            worker.start()
        yield
        worker.drain()
        while worker.thread.is_alive() and worker.seconds_left > -LAST_STEP_SECONDS:  # a second signal may shorten it meanwhile
            await asyncio.sleep(0.02)

    app = FastAPI(title="ivg", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    _add_error_handlers(app)
    _add_openai(app, worker)
    _add_health(app, worker)
    _add_playground(app, worker.served)
    app.add_middleware(RequestMiddleware, settings=worker.settings, metrics=worker.metrics, paths=frozenset(PATHS))
    if worker.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(worker.settings.cors_origins),
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],  # OpenAI's clients send x-stainless-… headers
            expose_headers=["x-request-id", "retry-after"],
        )
    describe(app, list(worker.served.names))
    return app


def _add_openai(app: FastAPI, worker: Worker) -> None:
    endpoint, listing = CompletionEndpoint(worker), _model_list(worker.served)

    @app.post("/v1/chat/completions", response_class=JSON, openapi_extra=request_body(ChatRequest))
    async def chat(request: Request) -> Response:
        """Answer a chat."""
        return await endpoint.respond(request, ChatRequest)

    @app.post("/v1/completions", response_class=JSON, openapi_extra=request_body(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Continue a text."""
        return await endpoint.respond(request, CompletionRequest)

    @app.post("/v1/responses", response_class=JSON, openapi_extra=request_body(ResponsesRequest))
    async def responses(request: Request) -> Response:
        """Answer a chat, in the form of OpenAI's Responses API; nothing is stored."""
        return await endpoint.respond_to_response(request)

    @app.get("/v1/models", response_class=JSON)
    async def models() -> Response:
        """List the models: the base, and the base with every available method."""
        return JSON(listing)

    @app.get("/v1/models/{name:path}", response_class=JSON)
    async def model(name: str) -> Response:
        """Retrieve one model."""
        found = [entry for entry in listing["data"] if entry["id"] == name]
        if not found:
            raise ServeError(f"the model {name!r} does not exist", 404, "model_not_found", "model")
        return JSON(found[0])


def _model_list(served: ServedModels) -> dict[str, Any]:
    created = int(time.time())
    data = [{"id": e.pop("id"), "object": "model", "created": created, "owned_by": "ivg", **e} for e in served.listing()]
    return {"object": "list", "data": data, "ivg": served.describe()}


def _add_health(app: FastAPI, worker: Worker) -> None:
    @app.get("/health", response_class=JSON)
    async def health() -> Response:
        """Is the worker thread alive?"""
        return JSON({"status": "ok" if worker.alive else "dead"}, 200 if worker.alive else 503)

    @app.get("/ready", response_class=JSON)
    async def ready() -> Response:
        """Are new requests accepted?"""
        ok = worker.alive and not worker.draining and not worker.restarting
        status = "ready" if ok else "draining" if worker.draining else "restarting" if worker.alive else "dead"
        return JSON({"status": status}, 200 if ok else 503)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(worker.metrics.text(), media_type=CONTENT_TYPE)


def _add_playground(app: FastAPI, served: ServedModels) -> None:
    """One route for each file: a mount at / would answer wrong methods on other paths with 404."""
    api = {r.path: (r.endpoint.__doc__ or "").partition("\n")[0] for r in app.routes if isinstance(r, APIRoute)}
    reference = HTMLResponse(documentation(served, api), headers={"cache-control": "no-cache"})

    async def get_reference() -> Response:
        return reference

    app.add_api_route("/reference", get_reference, methods=["GET", "HEAD"], include_in_schema=False)

    def page(file: Path) -> Callable[[], Awaitable[Response]]:
        async def get() -> Response:
            return FileResponse(file, headers={"cache-control": "no-cache"})

        return get

    for file in sorted(f for f in PLAYGROUND.rglob("*") if f.is_file()):
        path = "/" + file.relative_to(PLAYGROUND).as_posix()
        app.add_api_route("/" if path == "/index.html" else path, page(file), methods=["GET", "HEAD"], include_in_schema=False)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ServeError)
    async def serve_error(_: Request, error: ServeError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        message = str(error.detail)
        if error.status_code == 404:
            message = f"no path {request.url.path!r}; expected one of: {', '.join(PATHS)}"
        return error_response(ServeError(message, error.status_code, code))

    @app.exception_handler(Exception)
    async def other_error(_: Request, __: Exception) -> Response:
        return error_response(internal_error())
