"""What passes between an HTTP request and the worker thread: a :class:`RequestHandle` one way, events the other.

Independent of models and HTTP.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from ivg.errors import ServeError
from ivg.search.request import Request
from ivg.serving.protocol import Body
from ivg.serving.served_models import RequestBatch
from ivg.types import Completion, Step, TokenLogprobs, TraceNode


@dataclass(frozen=True, slots=True)
class Progress:
    """What one step of the search added to one completion.

    Attributes:
        index: which of the request's completions.
        committed: text that all beams of the request share; it only grows.
        kept: beams that a selection kept.
        dropped: beams that it dropped.
        details: log-probabilities of the tokens so far.
        completion: set when it is finished.
        tokens: length of ``committed`` in tokens.
    """

    index: int
    committed: str
    kept: tuple[TraceNode, ...]
    dropped: tuple[TraceNode, ...]
    details: tuple[TokenLogprobs, ...]
    completion: Completion | None = None
    tokens: int = 0


Event = RequestBatch | Progress | ServeError
"""A :class:`RequestBatch` comes first, when the request is accepted; an error comes last."""


class RequestHandle:
    """One HTTP request on its way through the worker, and the queue of its events.

    Args:
        body: the parsed body.
        count: completions that it asks for.
        timeout: seconds until the request fails.
    """

    def __init__(self, body: Body, count: int, timeout: float) -> None:
        self.body, self.count, self.timeout = body, count, timeout
        self.started = time.monotonic()
        self.deadline = self.started + timeout
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.closed = False
        """No more events will be sent."""


class Outbox:
    """Events that wait to be delivered; used by one thread."""

    def __init__(self) -> None:
        self._events: dict[RequestHandle, list[Event]] = {}

    def post(self, handle: RequestHandle, event: Event) -> None:
        """Add an event."""
        self._events.setdefault(handle, []).append(event)

    def send(self) -> list[RequestHandle]:
        """Deliver all events, with one call for each event loop; the requests whose loop is closed."""
        loops: dict[asyncio.AbstractEventLoop, list[tuple[RequestHandle, list[Event]]]] = {}
        for handle, events in self._events.items():
            loops.setdefault(handle.loop, []).append((handle, events))
        self._events, lost = {}, []
        for loop, batches in loops.items():
            try:
                loop.call_soon_threadsafe(deliver_all, batches)
            except RuntimeError:  # the loop is closed
                lost += [handle for handle, _ in batches]
        return lost


def deliver_all(batches: list[tuple[RequestHandle, list[Event]]]) -> None:
    """Queue the events of several requests; called in their event loop."""
    for handle, events in batches:
        for event in events:
            handle.events.put_nowait(event)


@dataclass(slots=True, eq=False)
class RunningRequest:
    """One completion in the search, and what its client has received.

    Attributes:
        handle: the HTTP request it belongs to.
        index: which of that request's completions.
        request: the search request.
        number: its number in the searcher.
        committed: text sent so far.
        selections_sent: steps with a selection that were sent.
        selections_seen: steps with a selection since the last restart; those up to ``selections_sent`` are not sent again.
        retried: it was the only one in a failed step of an engine that died, and has been run again.
    """

    handle: RequestHandle
    index: int
    request: Request
    number: int = -1
    committed: str = ""
    selections_sent: int = 0
    selections_seen: int = 0
    retried: bool = False

    def advance(self, step: Step) -> Progress | None:
        """What ``step`` adds to what the client has received; None: nothing.

        Raises:
            ServeError: the text is another one than before it was run again.
        """
        completion = step.completion
        committed = step.committed if completion is None else completion.text
        if not (committed.startswith(self.committed) or self.committed.startswith(committed)):
            raise ServeError("the completion changed when it was run again after a failure", 500, "server_error")
        selection = bool(step.kept or step.dropped)
        self.selections_seen += selection
        is_new = selection and self.selections_seen > self.selections_sent
        self.selections_sent = max(self.selections_sent, self.selections_seen)
        longer = len(committed) > len(self.committed)
        self.committed = committed if longer else self.committed
        beams = is_new and self.request.record
        if not (longer or beams or completion is not None):
            return None
        kept, dropped = (step.kept, step.dropped) if beams else ((), ())
        details = step.details if completion is None else completion.details
        return Progress(self.index, self.committed, kept, dropped, details, completion, step.tokens)
