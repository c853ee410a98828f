"""One search loop in a thread of its own, for callers that must not wait: those of ``asyncio``.

Requests of all callers share its batches, as on a server; a request's draws depend on its seed alone, so nobody's answer depends on who
else is there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from ivg.search.request import Request
from ivg.search.searcher import Searcher
from ivg.types import Step

IDLE_SECONDS = 5.0
"""The thread ends after so long without a request; the next one starts another."""


@dataclass(eq=False)
class Job:
    """One request in the background.

    Attributes:
        request: what is asked for.
        deliver: called in the thread for every step of the request, or once with the error that ended it.
        cancelled: nobody waits for it any more.
    """

    request: Request
    deliver: Callable[[Step | Exception], object]
    cancelled: bool = False

    def cancel(self) -> None:
        """Drop it before the next step; of a finished one: nothing."""
        self.cancelled = True


class BackgroundSearch:
    """A thread that runs requests together while there are any.

    Args:
        make: a new search loop; again after a step has failed.
        idle: seconds without requests after which the thread ends.
    """

    def __init__(self, make: Callable[[], Searcher], idle: float = IDLE_SECONDS) -> None:
        self._make, self._idle = make, idle
        self._changed = threading.Condition()
        self._inbox: list[Job] = []
        self._thread: threading.Thread | None = None
        self._jobs: dict[int, Job] = {}
        """Those that run, by their number in the searcher. Of the thread alone."""

    def submit(self, request: Request, deliver: Callable[[Step | Exception], object]) -> Job:
        """Queue a request; see :class:`Job`."""
        job = Job(request, deliver)
        with self._changed:
            self._inbox.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ivg-async", daemon=True)
                self._thread.start()
            self._changed.notify()
        return job

    def _run(self) -> None:
        searcher = self._make()
        while (new := self._next_jobs()) is not None:
            for number in [number for number, job in self._jobs.items() if job.cancelled]:
                del self._jobs[number]
                searcher.cancel(number)
            for job in new:
                self._add(searcher, job)
            if self._jobs:
                try:
                    self._step(searcher)
                except Exception as error:  # concerns all that ran: whatever a model raises
                    self._fail(searcher, error)
                    searcher = self._make()

    def _next_jobs(self) -> list[Job] | None:
        """New requests; waits for one where nothing runs. None: the thread shall end."""
        with self._changed:
            if not self._jobs and not self._inbox:
                self._changed.wait(self._idle)
                if not self._inbox:
                    self._thread = None
                    return None
            new, self._inbox = self._inbox, []
        return new

    def _add(self, searcher: Searcher, job: Job) -> None:
        if job.cancelled:
            return
        try:
            self._jobs[searcher.add(job.request)] = job
        except Exception as error:  # refused, or the engine does not open it
            self._deliver(job, error)

    def _step(self, searcher: Searcher) -> None:
        for step in searcher.step():
            job = self._jobs.get(step.request)
            if job is not None:
                if step.completion is not None:
                    del self._jobs[step.request]
                self._deliver(job, step)

    def _fail(self, searcher: Searcher, error: Exception) -> None:
        jobs, self._jobs = self._jobs, {}
        for number, job in jobs.items():
            with suppress(Exception):  # the engine may be what failed
                searcher.cancel(number)
            self._deliver(job, error)

    @staticmethod
    def _deliver(job: Job, event: Step | Exception) -> None:
        try:
            job.deliver(event)
        except RuntimeError:  # its event loop is closed
            job.cancel()
