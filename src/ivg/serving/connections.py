"""Limits for connections: how many, and how long each may stay idle.

uvicorn has a timeout between two requests. This adds timeouts for request headers that do not arrive and for clients that do not read,
and a maximum number of connections. Bodies that do not arrive are handled by ``serving.middleware``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ivg.errors import ServeError
from ivg.serving.errors import error_body, error_headers
from ivg.serving.logs import log_event

EVENT_STREAM = "event_stream"
"""Key in the state of an ASGI scope: the response consists of server-sent events, so comments may be inserted."""
RESERVED_FILES = 32
"""File descriptors kept free for files and for outgoing connections."""
ACCEPT_LOG_SECONDS = 60.0
"""Failures to accept a connection are logged this often."""


@dataclass(frozen=True)
class Limits:
    """Limits for connections.

    Attributes:
        max_connections: open at once.
        backlog: connections that the system accepts before the event loop sees them.
        header_timeout: seconds from the first byte of a request to the end of its headers.
        idle_timeout: seconds without a request.
        write_timeout: seconds that a client may leave sent data unread.
        probe_interval: seconds between checks of a half-closed connection.
    """

    max_connections: int
    backlog: int = 128
    header_timeout: float = 30.0
    idle_timeout: float = 75.0
    write_timeout: float = 60.0
    probe_interval: float = 0.1


def connection_limits(max_connections: int | None, idle_timeout: float) -> Limits:
    """Limits that fit into the process's limit of open files.

    Three times the backlog is subtracted: asyncio accepts a whole backlog in one iteration of its loop, and a connection that is too many
    is closed in the third iteration after it was accepted.
    """
    try:
        import resource

        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except (ImportError, OSError):  # no such limit on this system
        files = 1024
    free = max(8, min(files, 1 << 20) - _open_files() - RESERVED_FILES)
    backlog = max(2, min(128, free // 8))
    most = max(4, free - 3 * backlog)
    return Limits(most if max_connections is None else min(max_connections, most), backlog, idle_timeout=idle_timeout)


def _open_files() -> int:
    for folder in ("/proc/self/fd", "/dev/fd"):
        with suppress(OSError):
            return len(list(Path(folder).iterdir()))
    return 64


class LimitedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with :class:`Limits`. With too many connections a new one replaces the one idle for longest."""

    limits: Limits
    _timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _probe_timer: asyncio.TimerHandle | None = None
    _since = 0.0
    _idle = True
    """No byte of the next request has arrived."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request, or refuse the connection."""
        super().connection_made(transport)
        self._since = self.loop.time()
        if len(self.connections) > self.limits.max_connections and not self._close_idle():
            self._refuse(ServeError("too many open connections; try again later", 503, "too_many_connections"))
            return
        self._close_after(self.limits.idle_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel all timers."""
        for timer in (self._timer, self._write_timer, self._probe_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Start the header timeout with the first byte of a request; later bytes do not extend it."""
        first = self._idle and not self.answering
        super().data_received(data)
        if self.answering or self.transport.is_closing():
            self._close_after(None)
        elif first:
            self._since, self._idle = self.loop.time(), False
            self._close_after(self.limits.header_timeout)

    def on_response_complete(self) -> None:
        """Wait for the next request; pipelined requests restart the timers themselves."""
        self._since, self._idle = self.loop.time(), True
        super().on_response_complete()
        if self._probe_timer is not None:
            self._probe_timer.cancel()

    @property
    def answering(self) -> bool:
        """Is a request being answered?"""
        return self.cycle is not None and not self.cycle.response_complete

    # Number of connections

    def _close_idle(self) -> bool:
        """Close the oldest idle connection, else the oldest whose request body has not arrived."""
        others = [c for c in self.connections if isinstance(c, LimitedProtocol) and c is not self]
        for group in ([c for c in others if not c.answering], [c for c in others if c.answering and c.cycle.more_body]):
            if group:
                oldest = min(group, key=lambda c: c._since)
                self.connections.discard(oldest)
                oldest.transport.abort()
                return True
        return False

    def _refuse(self, error: ServeError) -> None:
        body = json.dumps(error_body(error)).encode()
        own = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        headers = [*own.items(), *error_headers(error).items()]
        with suppress(h11.LocalProtocolError):  # in the middle of a response
            for event in (h11.Response(status_code=error.status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """OpenAI's error object for what is not HTTP."""
        self._refuse(ServeError("the request is not valid HTTP/1.1", 400, "invalid_request"))

    # Timeouts

    def _close_after(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._on_timeout)

    def _on_timeout(self) -> None:
        if not self.answering:
            self.transport.close()

    def pause_writing(self) -> None:
        """The client reads more slowly than the server writes: start the write timeout."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.limits.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again: stop the write timeout."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()

    # Half-closed connections

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """A client that closed its sending side may still read (``shutdown(SHUT_WR)``), or be gone; the system reports the same for both.

        Writing to a client that is gone causes a socket error. So send something that clients ignore: an interim response (100), or
        a comment between server-sent events.
        """
        if not self.answering or self.cycle.more_body:
            return False
        self.cycle.keep_alive = False
        self._probe(0)
        return True

    def _probe(self, count: int) -> None:
        if self.transport.is_closing() or not self.answering:
            return
        sock: Any = self.transport.get_extra_info("socket")
        if sock is not None and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
            return
        if count % 50 == 0 and self.scope["http_version"] == "1.1":
            if not self.cycle.response_started:
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            elif self.scope["state"].get(EVENT_STREAM):
                with suppress(h11.LocalProtocolError):
                    self.transport.write(self.conn.send(h11.Data(data=b":\n\n")) or b"")
        self._probe_timer = self.loop.call_later(self.limits.probe_interval, self._probe, count + 1)


def limited_protocol(limits: Limits) -> type[LimitedProtocol]:
    """The protocol class with these limits; uvicorn creates its instances."""
    return type("LimitedProtocol", (LimitedProtocol,), {"limits": limits})


def throttle_accept_errors(loop: asyncio.AbstractEventLoop) -> None:
    """Log once a minute that no file descriptor is free; asyncio logs a traceback for every waiting connection."""
    last = -ACCEPT_LOG_SECONDS

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal last
        if "accept" not in context.get("message", ""):
            loop.default_exception_handler(context)
        elif time.monotonic() - last >= ACCEPT_LOG_SECONDS:
            last = time.monotonic()
            error = os.strerror(getattr(context.get("exception"), "errno", 0) or 0)
            log_event("cannot accept connections", logging.ERROR, error=error)

    loop.set_exception_handler(handle)
