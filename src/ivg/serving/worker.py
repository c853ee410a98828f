"""One thread owns the models and runs the one loop, ``Searcher.step()``, fed from a queue.

Requests with any settings share each round; new ones join, and cancelled ones free their rows, between two rounds. A model or
value that raises breaks off a round of everybody: the requests in it then run again from their beginnings, one half after the
other, halves that break in halves again, so that only the guilty one fails. Draws are counted, not remembered, so that they repeat
themselves: clients are sent what is new.

Knows tickets, deadlines and the search. Must not know HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator

from ivg.errors import IVGError, ScoreFault, ServeError, UpstreamError
from ivg.model import GuidedModel
from ivg.search.searcher import Searcher
from ivg.serving.metrics import Metrics
from ivg.serving.requests import Event, Progress, RequestHandle, RunningRequest, State, deliver
from ivg.serving.served_models import failed, fault, torn
from ivg.serving.settings import ServeSettings
from ivg.types import Step

log = logging.getLogger("ivg.serve")
GAUGE_SECONDS = 0.25
"""Gauges of the caches are set this often while something runs."""
TRIM_SECONDS = 30.0
"""Memory that nothing needs is given back this often; else the process keeps whatever its busiest moments touched."""

MEND_SECONDS = 5.0
"""Models that could not begin anew are tried again this often; who asks meanwhile is told so at once."""


class Worker:
    """The thread and its queue.

    Args:
        model: base and values; nobody else may use them while the thread runs.
        settings: limits.
        metrics: counts.
    """

    def __init__(self, model: GuidedModel, settings: ServeSettings, metrics: Metrics | None = None) -> None:
        self.model, self.settings, self.metrics = model, settings, metrics or Metrics()
        self._inbox: queue.SimpleQueue[tuple[str, RequestHandle | None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._submitted = 0
        self._state = State()
        self._outbox: dict[RequestHandle, list[Event]] = {}
        self._stop_at: float | None = None
        self._gauged = 0.0
        self._trimmed = time.monotonic()
        self.torn = False
        """Models could not begin anew, and nothing can be asked of them before they have."""
        self._died = False  # one had died when they last began anew
        self._mend_at = 0.0
        self.searcher = self._fresh()
        self.failure: str | None = None
        self.thread = threading.Thread(target=self._run, name="ivg-worker", daemon=True)

    # From other threads

    def start(self) -> Worker:
        """Begin; returns itself."""
        self.thread.start()
        return self

    @property
    def alive(self) -> bool:
        """Is the thread running, and has nothing broken it?"""
        return self.thread.is_alive() and self.failure is None

    @property
    def draining(self) -> bool:
        """Is it to stop?"""
        return self._stop_at is not None

    @property
    def seconds_left(self) -> float:
        """Until what runs is broken off; below 0: since."""
        return math.inf if self._stop_at is None else self._stop_at - time.monotonic()

    @property
    def waiting(self) -> int:
        """Answers that were submitted and are not being written yet."""
        later = list(self._state.later)  # in one go: the thread may change it
        return self._submitted + self.searcher.waiting_requests + sum(t.size for t in later)

    def submit(self, ticket: RequestHandle) -> None:
        """Queue it.

        Raises:
            ServeError: 429 when too many wait, 503 when the server stops or is broken.
        """
        if self.draining or not self.alive:
            raise ServeError("the server is shutting down" if self.draining else "the server is broken; see its log", 503, "unavailable")
        with self._lock:
            waiting = self.waiting
            if waiting and waiting + ticket.size > self.settings.queue_limit:
                raise ServeError(f"{waiting} answers are waiting already; try again later", 429, "queue_full")
            self._submitted += ticket.size
        self._inbox.put(("add", ticket))

    def cancel(self, ticket: RequestHandle) -> None:
        """Nobody wants it any more; what is kept for it is freed before the next round."""
        self._inbox.put(("cancel", ticket))

    def drain(self, seconds: float | None = None) -> None:
        """Take nothing new; finish what is there within ``seconds`` (None: the settings'), then stop. Again: no later than before."""
        stop = time.monotonic() + (self.settings.drain if seconds is None else seconds)
        self._stop_at = stop if self._stop_at is None else min(stop, self._stop_at)
        self._inbox.put(("wake", None))

    def join(self, seconds: float | None = None) -> None:
        """Wait for the thread's end."""
        self.thread.join(seconds)

    # The thread

    def _run(self) -> None:
        try:
            while not (self.draining and not self._busy and self._inbox.empty()):
                self._take()
                if self.torn:
                    self._mend()
                self._expire()
                self._next_suspects()
                self._send()  # before the round: what was accepted or refused is known now
                if self.searcher.busy:
                    self._round()
                self._gauge()
                self._send()
        except BaseException as e:
            self.failure = f"{type(e).__name__}: {e}"
            log.exception("worker died")
        finally:
            gone = ServeError("the server is shutting down" if self.failure is None else "the server is broken", 503, "unavailable")
            self._abandon(gone)
            self._gauge(force=True)
            self._send()

    @property
    def _busy(self) -> bool:
        return self.searcher.busy or bool(self._state.suspects or self._state.later)

    def _fresh(self) -> Searcher:
        return self.model.searcher(self.settings.max_beams)

    def _take(self) -> None:
        """Whatever lies in the inbox; waits where there is nothing to do."""
        block = not self._busy and not self.draining
        for _ in range(max(1, self._inbox.qsize())):  # no more than that: answers are not kept back by who keeps coming
            try:
                word, ticket = self._inbox.get(block=block, timeout=MEND_SECONDS if self.torn else None)
            except queue.Empty:
                return
            block = False
            if ticket is None:
                continue
            if word == "cancel":
                self._drop(ticket)
                continue
            with self._lock:
                self._submitted -= ticket.size
                if self._state.probing:
                    self._state.later.append(ticket)
            if not self._state.probing:
                self._admit(ticket)

    def _admit(self, ticket: RequestHandle) -> None:
        """Make its requests and add them; what is wrong with them is the client's to know."""
        if ticket.over:
            return
        if self.torn:
            self._fail(ticket, torn())
            return
        flights: list[RunningRequest] = []
        try:
            order = ticket.make()
            for i, request in enumerate(order.requests):
                flights.append(RunningRequest(ticket, i, request))
                flights[-1].number = self.searcher.add(request)
        except Exception as e:
            if not isinstance(e, IVGError):
                log.exception("a request could not be made")
            for flight in flights:
                self.searcher.cancel(flight.number)
            self._fail(ticket, fault(e) if isinstance(e, IVGError) else ServeError("the request could not be made", 500, "server_error"))
            return
        self._state.flights |= {f.number: f for f in flights}
        self._post(ticket, order)

    def _round(self) -> None:
        """One step for all; a broken one is looked into."""
        started = time.perf_counter()
        try:
            steps = self.searcher.step()
        except Exception as e:
            self._recover(e)
            return
        self.metrics.step.observe(time.perf_counter() - started)
        for step in steps:
            flight = self._state.flights.get(step.request)
            if flight is not None:
                self._report(flight, step)

    def _report(self, flight: RunningRequest, step: Step) -> None:
        """Send what the client has not had yet."""
        completion = step.completion
        if completion is not None:
            del self._state.flights[step.request]
            self.metrics.spent(completion.usage.forward_tokens)
            self.metrics.written.inc(completion.usage.completion_tokens)
            if completion.error is not None:
                if isinstance(completion.error, UpstreamError):
                    log.error("upstream: %s", completion.error)
                if isinstance(completion.error, ScoreFault) and not completion.error.prompt:
                    self.metrics.failures.inc()
                    log.error("%s", completion.error)
                self._fail(flight.ticket, failed(completion.error))
                return
        committed = step.committed if completion is None else completion.text
        if not (committed.startswith(flight.committed) or flight.committed.startswith(committed)):
            self._fail(flight.ticket, ServeError("the answer could not be repeated after a failure of another", 500, "server_error"))
            return
        board = bool(step.kept or step.dropped)
        flight.seen += board
        again = board and flight.seen <= flight.boards
        flight.boards = max(flight.boards, flight.seen)
        new = len(committed) > len(flight.committed)
        flight.committed = committed if new else flight.committed
        shown = board and not again and flight.request.record
        if new or shown or completion is not None:
            kept, dropped = (step.kept, step.dropped) if shown else ((), ())
            details = step.details if completion is None else completion.details
            self._post(flight.ticket, Progress(flight.index, flight.committed, kept, dropped, details, completion, step.tokens))

    def _recover(self, error: Exception) -> None:
        """A round was broken off: begin afresh, and find out with whom it breaks."""
        self.metrics.failures.inc()
        suspects = list(self._state.flights.values())
        log.error("a round of %d answers failed: %s", len(suspects), type(error).__name__, exc_info=error)
        self._state.flights.clear()
        self.searcher = self._fresh()
        if not self._mend():
            for flight in suspects:
                self._fail(flight.ticket, torn())
            return
        if len(suspects) == 1:
            (only,) = suspects
            if only.spared or not self._died:
                told = fault(error) if isinstance(error, IVGError) else ServeError("a model failed on this request", 500, "model_error")
                self._fail(only.ticket, told)
                return
            only.spared = True
        half = len(suspects) // 2
        self._state.suspects.extendleft((suspects[half:], suspects[:half]))
        self._state.probing = True

    def _mend(self) -> bool:
        """Let all models begin anew; where one cannot (memory that is not free yet, say), wait before the next try."""
        if time.monotonic() < self._mend_at:
            return False
        try:
            self._died = self.model.reset_caches()
        except Exception:
            log.exception("a model could not begin anew; tried again every %g seconds", MEND_SECONDS)
            self._mend_at = time.monotonic() + MEND_SECONDS
            self.torn = True
        else:
            self.torn = False
        return not self.torn

    def _next_suspects(self) -> None:
        """Run the next group by itself; when there is none left, let in who came meanwhile."""
        state = self._state
        while state.suspects and not self.searcher.busy:
            for flight in state.suspects.popleft():
                self._restart(flight)
        if not state.suspects and not self.searcher.busy:
            state.probing = False
            while state.later:
                self._admit(state.later.popleft())

    def _restart(self, flight: RunningRequest) -> None:
        if flight.ticket.over:
            return
        if self.torn:
            self._fail(flight.ticket, torn())
            return
        flight.seen = 0
        try:
            flight.number = self.searcher.add(flight.request)
        except IVGError as e:
            self._fail(flight.ticket, fault(e))
        else:
            self._state.flights[flight.number] = flight

    # Ends

    def _expire(self) -> None:
        """Those whose time is over, and all when the server's is."""
        now = time.monotonic()
        if self._stop_at is not None and now > self._stop_at:
            self._abandon(ServeError("the server is shutting down", 503, "unavailable"))
        for ticket in {t for t in self._tickets() if t.deadline < now}:
            self._fail(ticket, ServeError(f"no answer within {ticket.deadline - ticket.started:g} seconds", 504, "deadline_exceeded"))

    def _tickets(self) -> Iterator[RequestHandle]:
        state = self._state
        yield from (f.ticket for f in (*state.flights.values(), *itertools.chain(*state.suspects)))
        yield from state.later

    def _abandon(self, error: ServeError) -> None:
        """Everybody is told ``error``."""
        while not self._inbox.empty():
            word, ticket = self._inbox.get()
            if word == "add" and ticket is not None:
                self._fail(ticket, error)
        for ticket in set(self._tickets()):
            self._fail(ticket, error)

    def _fail(self, ticket: RequestHandle, error: ServeError) -> None:
        if not ticket.over:
            self._post(ticket, error)
        self._drop(ticket)

    def _drop(self, ticket: RequestHandle) -> None:
        """Free what is kept for it, and forget it."""
        ticket.over = True
        state, broken = self._state, None
        for flight in [f for f in state.flights.values() if f.ticket is ticket]:
            del state.flights[flight.number]
            try:
                self.metrics.spent(self.searcher.cancel(flight.number))
            except Exception as e:  # an engine that died before anybody asked it for more
                broken = e
        state.suspects = deque(left for group in state.suspects if (left := [f for f in group if f.ticket is not ticket]))
        state.later = deque(t for t in state.later if t is not ticket)
        self._gauged = 0.0
        if broken is not None:
            self._recover(broken)

    # Out

    def _post(self, ticket: RequestHandle, event: Event) -> None:
        self._outbox.setdefault(ticket, []).append(event)

    def _send(self) -> None:
        """Hand over what the round brought, with one call for each loop."""
        loops: dict[asyncio.AbstractEventLoop, list[tuple[RequestHandle, list[Event]]]] = {}
        for ticket, events in self._outbox.items():
            loops.setdefault(ticket.loop, []).append((ticket, events))
        self._outbox = {}
        for loop, parcels in loops.items():
            try:
                loop.call_soon_threadsafe(deliver, parcels)
            except RuntimeError:  # the loop is closed: nobody listens
                for ticket, _ in parcels:
                    self._drop(ticket)

    def _gauge(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if self._busy and now - self._gauged < GAUGE_SECONDS and not force:
            return
        self._gauged = now
        if now - self._trimmed > TRIM_SECONDS and not force:
            self._trimmed = now
            try:
                self.model.release_memory()
            except Exception:  # when memory is short even that may fail
                log.exception("memory could not be given back")
        metrics, searcher = self.metrics, self.searcher
        metrics.queue.set(self.waiting)
        metrics.live.set(searcher.live_requests)
        metrics.beams.set(searcher.live_beams)
        for reader in self.model.readers:
            metrics.rows.labels(reader.name).set(reader.model.live_rows)
            metrics.bytes.labels(reader.name).set(reader.model.rows.held_bytes)
