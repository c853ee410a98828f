"""Which live requests take part in a round, so that the cheap do not wait for the expensive.

Stride scheduling (Waldspurger and Weihl 1995): every request has a clock, which a round of t tokens moves by t times the request's cost
for each token. Who is behind goes first. A request costs as many hypotheses as it may have in flight; the measure is nominal, so that
requests of one kind stay together and share every round, as if there were no clocks. Knows no engines; changes no result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol, TypeVar

LARGEST_RATIO = 8.0
"""However cheap others are, they get at most so many tokens for each token of this request: passes of few rows are not that much cheaper
than passes of many, and nobody is to starve."""


class _Sized(Protocol):
    @property
    def rows(self) -> int: ...


class Clocked(Protocol):
    """A request as this file sees it."""

    clock: float
    overtaken: int

    @property
    def rule(self) -> _Sized:
        """How many hypotheses it may have in flight."""


C = TypeVar("C", bound=Clocked)


def costs(lives: Sequence[Clocked]) -> list[float]:
    """Cost of one token of each request, in tokens of the cheapest among them."""
    least = min(live.rule.rows for live in lives)
    return [min(live.rule.rows / least, LARGEST_RATIO) for live in lives]


def runnable(lives: Sequence[Clocked]) -> list[int]:
    """Places of those that take part in the next round: who is less than one token's cost ahead of the last. At least one, in order."""
    last = min(live.clock for live in lives)
    return [i for i, (live, cost) in enumerate(zip(lives, costs(lives), strict=True)) if live.clock - last < cost]


def charge(lives: Sequence[Clocked], ran: Sequence[int], tokens: int) -> None:
    """Move the clocks of those that took part in a round of so many tokens."""
    for i, cost in enumerate(costs(lives)):
        if i in ran:
            lives[i].clock += tokens * cost


def newcomer(lives: Sequence[Clocked]) -> float:
    """The clock to begin with among ``lives``: that of the last, so that nobody has claims from before."""
    return min((live.clock for live in lives), default=0.0)


def queue(waiting: deque[C], live: C) -> None:
    """Put ``live`` into the queue: at its end, but before those at the end that cost ``LARGEST_RATIO`` times as much or more.

    Each of them lets as many go before, and no more.
    """
    place = len(waiting)
    while place and waiting[place - 1].rule.rows >= LARGEST_RATIO * live.rule.rows and waiting[place - 1].overtaken < LARGEST_RATIO:
        place -= 1
        waiting[place].overtaken += 1
    waiting.insert(place, live)
