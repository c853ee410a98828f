"""What passes between clients and the thread that owns the models: a ticket one way, events the other; and what has become of each.

Knows no models, no HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ivg.errors import ServeError
from ivg.search.request import Request
from ivg.serving.served_models import Order
from ivg.types import Completion, TokenLogprobs, TraceNode


@dataclass(frozen=True, slots=True)
class Progress:
    """What a round brought for one answer; ``index`` counts the answers of the ticket."""

    index: int
    committed: str
    kept: tuple[TraceNode, ...]
    dropped: tuple[TraceNode, ...]
    details: tuple[TokenLogprobs, ...]
    completion: Completion | None = None
    tokens: int = 0
    """That all live hypotheses share."""


Event = Order | Progress | ServeError
"""An order comes first, when it is accepted; an error last, and nothing behind it."""


class RequestHandle:
    """One client's request: what to make of it, and where its events go.

    Args:
        make: gives the order; called where the models are.
        size: answers that it asks for.
        seconds: until it is too late.
    """

    def __init__(self, make: Callable[[], Order], size: int, seconds: float) -> None:
        self.make, self.size = make, size
        self.started = time.monotonic()
        self.deadline = self.started + seconds
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.over = False
        """Nothing will be sent any more."""

    def deliver(self, events: list[Event]) -> None:
        """Called in the client's loop."""
        for event in events:
            self.events.put_nowait(event)


def deliver(parcels: list[tuple[RequestHandle, list[Event]]]) -> None:
    """Hand over events of several tickets; called in their clients' loop."""
    for ticket, events in parcels:
        ticket.deliver(events)


@dataclass(slots=True, eq=False)
class RunningRequest:
    """One answer on its way, and what its client has had of it."""

    ticket: RequestHandle
    index: int
    request: Request
    number: int = -1
    committed: str = ""
    boards: int = 0
    """Rounds with selections that were sent."""
    seen: int = 0
    """… that came since the last start."""
    spared: bool = False
    """It was alone when an engine died, which need not be its fault: once it is tried again."""


@dataclass(slots=True)
class State:
    """All answers on their way."""

    flights: dict[int, RunningRequest] = field(default_factory=dict)
    suspects: deque[list[RunningRequest]] = field(default_factory=deque)
    """To be run again, one group after the other."""
    probing: bool = False
    """Suspects are being run; whoever comes meanwhile waits, else under steady load the searcher would never be free for the next."""
    later: deque[RequestHandle] = field(default_factory=deque)
    """Came while those run."""
