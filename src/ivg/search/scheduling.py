"""Fair scheduling: which requests take part in a step, so that cheap requests do not wait for expensive ones.

Stride scheduling (Waldspurger and Weihl 1995): a step of t tokens advances the virtual time of a request by t times the request's cost
per token. Requests that are behind run first. The cost is the maximum number of beams of a request, not the current one, so requests of
the same shape run in every step together. Independent of engines; changes no result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol, TypeVar

from ivg.search.rule import SelectionRule

MAX_COST_RATIO = 8.0
"""Upper limit for the cost of one request relative to the cheapest: small batches are not proportionally cheaper than large ones, and
expensive requests must not starve."""


class Schedulable(Protocol):
    """What the scheduler needs of a request."""

    virtual_time: float
    bypassed: int

    @property
    def rule(self) -> SelectionRule:
        """Its ``rows`` are the request's maximum number of beams."""


S = TypeVar("S", bound=Schedulable)


def costs(requests: Sequence[Schedulable]) -> list[float]:
    """Cost per token of each request, relative to the cheapest."""
    least = min(request.rule.rows for request in requests)
    return [min(request.rule.rows / least, MAX_COST_RATIO) for request in requests]


def select(requests: Sequence[Schedulable]) -> list[int]:
    """Indices of the requests of the next step, at least one: those less than the cost of one token ahead of the last."""
    last = min(request.virtual_time for request in requests)
    return [i for i, (request, cost) in enumerate(zip(requests, costs(requests), strict=True)) if request.virtual_time - last < cost]


def advance(requests: Sequence[Schedulable], selected: Sequence[int], tokens: int) -> None:
    """Advance the virtual time of the selected requests after a step of ``tokens`` tokens."""
    for i, cost in enumerate(costs(requests)):
        if i in selected:
            requests[i].virtual_time += tokens * cost


def initial_virtual_time(requests: Sequence[Schedulable]) -> float:
    """Virtual time of a request that joins ``requests``: that of the last, so it can neither claim nor lose past steps."""
    return min((request.virtual_time for request in requests), default=0.0)


def enqueue(waiting: deque[S], request: S) -> None:
    """Add ``request`` at the end of the queue, but before those at the end that cost at least ``MAX_COST_RATIO`` times as much.

    Each of them is bypassed at most ``MAX_COST_RATIO`` times.
    """
    place = len(waiting)
    while place and waiting[place - 1].rule.rows >= MAX_COST_RATIO * request.rule.rows and waiting[place - 1].bypassed < MAX_COST_RATIO:
        place -= 1
        waiting[place].bypassed += 1
    waiting.insert(place, request)
