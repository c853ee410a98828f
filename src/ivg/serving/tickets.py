"""What passes between clients and the thread that owns the models: a ticket one way, events the other. Knows no models, no HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from ivg.errors import ServeError
from ivg.serving.presets import Order
from ivg.types import Completion, TokenDetail, TraceNode


@dataclass(frozen=True, slots=True)
class Progress:
    """What a round brought for one answer; ``index`` counts the answers of the ticket."""

    index: int
    committed: str
    kept: tuple[TraceNode, ...]
    dropped: tuple[TraceNode, ...]
    details: tuple[TokenDetail, ...]
    completion: Completion | None = None


Event = Order | Progress | ServeError
"""An order comes first, when it is accepted; an error last, and nothing behind it."""


class Ticket:
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


def deliver(parcels: list[tuple[Ticket, list[Event]]]) -> None:
    """Hand over events of several tickets; called in their clients' loop."""
    for ticket, events in parcels:
        ticket.deliver(events)
