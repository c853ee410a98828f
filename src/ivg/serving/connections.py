"""Connections of strangers: how many, and for how long each may say nothing.

Uvicorn has a limit for the time between two requests; this adds the others: for a head that does not come to its end, for a client that
does not read, for connections at once. Knows HTTP/1.1 and no requests; bodies that do not come are ``serving.gate``'s to end.
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
from ivg.serving.logs import say
from ivg.serving.responses import error_body

EVENTS = "events"
"""In the state of a scope: the response is a stream of events, and may have comments in it."""
SPARE = 32
"""Descriptors that are left for files and for connections of our own."""
ACCEPT_LINE_SECONDS = 60.0
"""That no descriptor was left is logged this often."""


@dataclass(frozen=True)
class Limits:
    """Of connections.

    Attributes:
        most: open at once.
        backlog: that the system accepts before the loop looks at any of them.
        head: seconds from the first byte of a request to the end of its head.
        rest: seconds without a request.
        stall: seconds that a client may leave what was sent unread.
        probe: seconds between two looks whether a client that sends no more still listens.
    """

    most: int
    backlog: int = 128
    head: float = 30.0
    rest: float = 75.0
    stall: float = 60.0
    probe: float = 0.1


def fitting(wanted: int | None, rest: float) -> Limits:
    """Limits that the process's limit of open files has room for.

    All that arrive at once are accepted before the first can be closed, so that their number is kept free, too.
    """
    try:
        import resource

        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except (ImportError, OSError):  # no such limit on this system
        files = 1024
    free = max(8, min(files, 1 << 20) - _open_files() - SPARE)
    backlog = max(2, min(128, free // 4))
    most = max(4, free - backlog)
    return Limits(most if wanted is None else min(wanted, most), backlog, rest=rest)


def _open_files() -> int:
    for place in ("/proc/self/fd", "/dev/fd"):
        with suppress(OSError):
            return len(list(Path(place).iterdir()))
    return 64


class Connection(H11Protocol):
    """Uvicorn's protocol with limits. Whoever comes when there are too many takes the place of the one that rests longest."""

    limits: Limits
    _timer: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _looking: asyncio.TimerHandle | None = None
    _since = 0.0
    _resting = True
    """No byte of the next head has come."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request, if there is room."""
        super().connection_made(transport)
        self._since = self.loop.time()
        if len(self.connections) > self.limits.most and not self._make_room():
            self._refuse(ServeError("this server has as many connections as it takes; try again later", 503, "too_many_connections"))
            return
        self._wait(self.limits.rest)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        for timer in (self._timer, self._stalled, self._looking):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """The head of a request has a time to be whole in, however slowly it drips."""
        first = self._resting and not self.answering
        super().data_received(data)
        if self.answering or self.transport.is_closing():
            self._wait(None)
        elif first:
            self._since, self._resting = self.loop.time(), False
            self._wait(self.limits.head)

    def on_response_complete(self) -> None:
        """Rest until the next request; one that came half meanwhile has its own time."""
        self._since, self._resting = self.loop.time(), True
        super().on_response_complete()
        if self._looking is not None:
            self._looking.cancel()

    @property
    def answering(self) -> bool:
        """Is a request on its way?"""
        return self.cycle is not None and not self.cycle.response_complete

    # Too many

    def _make_room(self) -> bool:
        """Close a connection that nobody waits at: one at rest, else one whose request does not come to its end."""
        others = [c for c in self.connections if isinstance(c, Connection) and c is not self]
        for places in ([c for c in others if not c.answering], [c for c in others if c.answering and c.cycle.more_body]):
            if places:
                oldest = min(places, key=lambda c: c._since)
                self.connections.discard(oldest)
                oldest.transport.abort()
                return True
        return False

    def _refuse(self, error: ServeError) -> None:
        body = json.dumps(error_body(error)).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        if error.status == 503:
            headers.append(("retry-after", "1"))
        with suppress(h11.LocalProtocolError):  # in the middle of an answer there is nothing to say
            for event in (h11.Response(status_code=error.status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, in the shape of all errors."""
        self._refuse(ServeError("the request is no valid HTTP/1.1", 400, "invalid_request"))

    # Too slow

    def _wait(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._end)

    def _end(self) -> None:
        if not self.answering:
            self.transport.close()

    def pause_writing(self) -> None:
        """The client reads more slowly than we write."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self.limits.stall, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads again."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    # Half closed

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """A client that sends no more may still listen (``shutdown(SHUT_WR)``), or be gone: the system says the same of both.

        What is sent to one that is gone comes back as an error. So something is sent that clients skip: an interim response, or a comment
        in a stream of events.
        """
        if not self.answering or self.cycle.more_body:
            return False
        self.cycle.keep_alive = False
        self._probe(0)
        return True

    def _probe(self, looked: int) -> None:
        if self.transport.is_closing() or not self.answering:
            return
        line: Any = self.transport.get_extra_info("socket")
        if line is not None and line.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
            return
        if looked % 50 == 0 and self.scope["http_version"] == "1.1":
            if not self.cycle.response_started:
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            elif self.scope["state"].get(EVENTS):
                with suppress(h11.LocalProtocolError):
                    self.transport.write(self.conn.send(h11.Data(data=b":\n\n")) or b"")
        self._looking = self.loop.call_later(self.limits.probe, self._probe, looked + 1)


def protocol(limits: Limits) -> type[Connection]:
    """The protocol with these limits: uvicorn makes its objects itself."""
    return type("Connection", (Connection,), {"limits": limits})


def quiet_accepts(loop: asyncio.AbstractEventLoop) -> None:
    """Log once a minute that no descriptor is left: asyncio logs it for every connection that waits, with a trace."""
    told = -ACCEPT_LINE_SECONDS

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal told
        if "accept" not in context.get("message", ""):
            loop.default_exception_handler(context)
        elif time.monotonic() - told >= ACCEPT_LINE_SECONDS:
            told = time.monotonic()
            say("no connection can be accepted", logging.ERROR, error=os.strerror(getattr(context.get("exception"), "errno", 0) or 0))

    loop.set_exception_handler(handle)
