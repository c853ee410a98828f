"""ASGI middleware for every request: request id, API key, body limits, security headers, access log and metrics.

Plain ASGI rather than ``BaseHTTPMiddleware``, so that streams and disconnects pass unchanged.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ivg.errors import ServeError
from ivg.serving.errors import error_body, error_headers
from ivg.serving.logs import log, log_event
from ivg.serving.metrics import Metrics
from ivg.settings.serve import ServeSettings

PROTECTED = ("/v1/", "/metrics", "/openapi.json")
"""Paths that need an API key, if there are keys."""
BODY_TIMEOUT = 30.0
"""Seconds for a request body to arrive."""
DISCARD_BYTES, DISCARD_TIMEOUT = 64 << 20, 10.0
"""Up to this much of a refused body is read and discarded."""
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}


class RequestMiddleware:
    """Checks every request before the application sees it, logs and counts it.

    Args:
        app: the application.
        settings: API keys and the limit of the body.
        metrics: counts requests by path and status.
        paths: paths that are counted under their own names.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics, paths: frozenset[str]) -> None:
        self.app, self.settings, self.metrics, self.paths = app, settings, metrics, paths
        self._digests = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; a trailing slash is removed, and HEAD is answered as GET without a body."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        method, path = scope["method"], scope["path"].rstrip("/") or "/"
        scope = {**scope, "path": path, "method": "GET" if method == "HEAD" else method}
        given = headers.get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status, started = 499, time.monotonic()  # 499: the client disconnected before a response began

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update({"x-request-id": request_id, **SECURITY_HEADERS})
            elif method == "HEAD" and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._handle(scope, headers, receive, send_with_headers)
        except Exception:
            log.exception("request failed", extra={"fields": {"request_id": request_id}})
            if status == 499:
                await error_response(internal_error())(scope, receive, send_with_headers)
        finally:
            self.metrics.requests.labels(path if path in self.paths else "other", status).inc()
            level = logging.DEBUG if path in ("/health", "/ready", "/metrics") else logging.INFO
            seconds = round(time.monotonic() - started, 4)
            log_event("request", level, request_id=request_id, method=method, path=path, status=status, seconds=seconds)

    async def _handle(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        app: ASGIApp = self.app
        try:
            if "transfer-encoding" in headers and "content-length" in headers:
                error = ServeError("the request has both Content-Length and Transfer-Encoding; send one of them", 400, "invalid_request")
                app = error_response(error, close=True)  # a proxy may read another length than this server (request smuggling)
            else:
                await self._check_key(scope, headers, receive)
                async with asyncio.timeout(BODY_TIMEOUT):
                    receive = _replay(await self._read_body(headers, receive), receive)
        except TimeoutError:
            error = ServeError(f"the body did not arrive within {BODY_TIMEOUT:g} seconds", 408, "timeout")
            app = error_response(error, close=True)
        except ServeError as e:
            app = error_response(e)
        await app(scope, receive, send)

    async def _check_key(self, scope: Scope, headers: Headers, receive: Receive) -> None:
        if not self._digests or not scope["path"].startswith(PROTECTED) or scope["method"] == "OPTIONS":
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
        matches = [hmac.compare_digest(digest, other) for other in self._digests]  # all of them: constant time
        if scheme.lower() != "bearer" or not any(matches):
            await _discard_body(headers, receive)
            raise ServeError("no valid API key; send the header Authorization: Bearer KEY", 401, "invalid_api_key")

    async def _read_body(self, headers: Headers, receive: Receive) -> bytes:
        limit = self.settings.max_body_bytes
        too_large = ServeError(f"the body is larger than the limit of {limit} bytes", 413, "body_too_large")
        if int(headers.get("content-length") or 0) > limit:
            await _discard_body(headers, receive)
            raise too_large
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ServeError("the client disconnected", 499, "disconnected")
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > limit:
                if more:
                    await _discard_body(Headers(), receive)  # 100 Continue was sent already
                raise too_large
            if not more:
                return bytes(body)


async def _discard_body(headers: Headers, receive: Receive) -> None:
    """Read the rest of a refused body.

    nginx and most clients read the response only after sending the whole body, and take a closed connection for a broken server. A client
    that sent ``Expect: 100-continue`` sends no body when it is refused.
    """
    left = 0 if "expect" in headers else DISCARD_BYTES
    with suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_TIMEOUT):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


def _replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body, which was read already, and then the messages of ``receive``."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay


def error_response(error: ServeError, *, close: bool = False) -> Response:
    """An error as a response; with ``close`` the connection is closed afterwards."""
    headers = error_headers(error) | ({"connection": "close"} if close else {})
    body = json.dumps(error_body(error))  # ASCII: text of the client may contain lone surrogates
    return Response(body, error.status, headers, "application/json")


def internal_error() -> ServeError:
    """The error for exceptions that nothing else handles."""
    return ServeError("internal server error; the server's log has details under this request's id", 500, "server_error")
