"""What every HTTP request passes through: its id, its key, the size of its body, one line in the log, one more in the counts.

Plain ASGI, so that streams and disconnects pass unchanged. Knows no bodies.
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
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ivg.errors import ServeError
from ivg.serving.logs import log, say
from ivg.serving.metrics import Metrics
from ivg.serving.responses import error_body
from ivg.serving.settings import ServeSettings

GUARDED = ("/v1/", "/metrics", "/openapi.json")
"""Where a key is asked for, if there are keys."""
BODY_SECONDS = 30.0
"""A body that takes longer than this to arrive is not waited for."""
SKIPPED_BYTES, SKIP_SECONDS = 64 << 20, 10.0
"""Of a body that is refused, so much is read and thrown away."""
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'",
    ),
)


class GuardMiddleware:
    """ASGI middleware.

    Args:
        app: what is behind it.
        settings: keys and the body's limit.
        metrics: counts requests by path and status.
        paths: that are counted under their own names.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics, paths: frozenset[str]) -> None:
        self.app, self.settings, self.metrics, self.paths = app, settings, metrics, paths
        self._digests = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or whatever else ASGI has."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {k.lower(): v for k, v in scope["headers"]}
        method, path = scope["method"], scope["path"]
        scope = {**scope, "path": path.rstrip("/") or "/", "method": "GET" if method == "HEAD" else method}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        identity = given if re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = identity
        pipe = _Pipe(send, identity, body=method != "HEAD")
        started = time.monotonic()
        try:
            await self._pass(scope, headers, receive, pipe)
        except asyncio.CancelledError:
            pipe.status = pipe.status or 499
            raise
        except Exception:
            log.exception("request failed", extra={"fields": {"request_id": identity}})
            if not pipe.status:
                await refuse(pipe, ServeError("something went wrong in the server; its log has this request's id", 500, "server_error"))
        finally:
            path = scope["path"]
            self.metrics.requests.labels(path if path in self.paths else "other", pipe.status or 499).inc()
            level = logging.DEBUG if path in ("/health", "/ready", "/metrics") else logging.INFO
            seconds = round(time.monotonic() - started, 4)
            say("request", level, request_id=identity, method=method, path=path, status=pipe.status or 499, seconds=seconds)

    async def _pass(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        if b"transfer-encoding" in headers and b"content-length" in headers:  # whoever stands between may take the other one for true
            message = "the request has both Content-Length and Transfer-Encoding; send one of them"
            await refuse(send, ServeError(message, 400, "invalid_request"), close=True)
            return
        try:
            try:
                self._admit(scope, headers)
            except ServeError:
                await _skip(headers, receive)
                raise
            async with asyncio.timeout(BODY_SECONDS):
                body = await self._body(headers, receive)
        except TimeoutError:
            await refuse(send, ServeError(f"no whole body within {BODY_SECONDS:g} seconds", 408, "timeout"), close=True)
        except ServeError as e:
            await refuse(send, e)
        else:
            await self.app(scope, _Again(body, receive), send)

    def _admit(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Raise unless the request has a key, where one is needed."""
        if not self._digests or not scope["path"].startswith(GUARDED) or scope["method"] == "OPTIONS":
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        known = [hmac.compare_digest(digest, other) for other in self._digests]  # all of them: time says nothing
        if scheme.lower() != b"bearer" or not any(known):
            raise ServeError("no valid API key; send the header Authorization: Bearer KEY", 401, "invalid_api_key")

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        limit = self.settings.max_body_bytes
        too_large = ServeError(f"the body is larger than the {limit} bytes that this server takes", 413, "body_too_large")
        if int(headers.get(b"content-length", b"0") or 0) > limit:
            await _skip(headers, receive)
            raise too_large
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ServeError("the client went away", 499, "disconnected")
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > limit:
                if more:
                    await _skip({}, receive)  # it was told to go on already
                raise too_large
            if not more:
                return bytes(body)


async def _skip(headers: dict[bytes, bytes], receive: Receive) -> None:
    """Read what is still to come of a body that nobody wants.

    Whoever is sending it (nginx, most clients) reads no answer before the end, and takes a closed connection for a broken server.
    A client that asked first (``Expect: 100-continue``) sends nothing more when it is refused.
    """
    left = 0 if b"expect" in headers else SKIPPED_BYTES
    with suppress(TimeoutError):
        async with asyncio.timeout(SKIP_SECONDS):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


class _Again:
    """Gives the body that was read already, then whatever comes."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self.body: bytes | None = body
        self.receive = receive

    async def __call__(self) -> Message:
        if self.body is None:
            return await self.receive()
        body, self.body = self.body, None
        return {"type": "http.request", "body": body, "more_body": False}


class _Pipe:
    """Sends, adds headers, and remembers the status; without bodies, where only the head was asked for."""

    def __init__(self, send: Send, identity: str, *, body: bool = True) -> None:
        self.send, self.status, self.body = send, 0, body
        self.headers = [(b"x-request-id", identity.encode()), *HEADERS]

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *self.headers]}
        elif not self.body and message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await self.send(message)


async def refuse(send: Send, error: ServeError, *, close: bool = False) -> None:
    """An error as a whole response; with ``close`` nothing more is read from this client."""
    body, headers = json.dumps(error_body(error)).encode(), error_headers(error)
    if close:
        headers |= {"connection": "close"}
    raw = [(k.encode(), v.encode()) for k, v in headers.items()]
    start: dict[str, Any] = {"type": "http.response.start", "status": error.status}
    await send({**start, "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *raw]})
    await send({"type": "http.response.body", "body": body})


def error_headers(error: ServeError) -> dict[str, str]:
    """When to try again; and not at all where it would be the same again."""
    if error.status == 429 or error.code in ("unavailable", "upstream_unavailable"):
        return {"retry-after": "1"}
    if error.status == 401:
        return {"www-authenticate": "Bearer"}
    return {"x-should-retry": "false"} if error.code in ("model_error", "deadline_exceeded", "upstream_refused") else {}
