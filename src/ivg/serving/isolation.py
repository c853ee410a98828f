"""Finds the request that makes a step of the search fail, by bisection.

All requests of a failed step are suspects. They run again in two halves, one after the other; a half that fails is split again, until a
single request fails. New requests wait meanwhile: under constant load the suspects would otherwise never run alone.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator

from ivg.serving.requests import RequestHandle, RunningRequest


class FailureIsolation:
    """The state of the bisection.

    Attributes:
        active: suspects are waiting or running.
        deferred: requests that arrived since then.
    """

    def __init__(self) -> None:
        self.active = False
        self.deferred: deque[RequestHandle] = deque()
        self._groups: deque[list[RunningRequest]] = deque()

    @property
    def busy(self) -> bool:
        """Is anything waiting here?"""
        return bool(self._groups or self.deferred)

    def split(self, suspects: list[RunningRequest], engine_died: bool) -> RunningRequest | None:
        """Plan to run the requests of a failed step again.

        Args:
            suspects: the requests.
            engine_died: an engine process died, which need not be a request's fault: a single suspect is tried once more.

        Returns:
            The request that causes the failure, if it is known.
        """
        if len(suspects) == 1:
            (only,) = suspects
            if only.retried or not engine_died:
                return only
            only.retried = True
        half = len(suspects) // 2
        self._groups.extendleft(group for group in (suspects[half:], suspects[:half]) if group)
        self.active = True
        return None

    def run_again(self, group: list[RunningRequest]) -> None:
        """Plan to run requests again of which none is a suspect."""
        if group:
            self._groups.appendleft(group)
            self.active = True

    def next_group(self) -> list[RunningRequest] | None:
        """The next requests to run together."""
        return self._groups.popleft() if self._groups else None

    def end(self) -> Iterator[RequestHandle]:
        """If no suspects are left: end the bisection, and give the deferred requests."""
        if self._groups:
            return
        self.active = False
        while self.deferred:
            yield self.deferred.popleft()

    def handles(self) -> Iterator[RequestHandle]:
        """Of everything that waits here."""
        yield from (running.handle for running in itertools.chain(*self._groups))
        yield from self.deferred

    def drop(self, handle: RequestHandle) -> None:
        """Forget a request."""
        self._groups = deque(left for group in self._groups if (left := [r for r in group if r.handle is not handle]))
        self.deferred = deque(h for h in self.deferred if h is not handle)
