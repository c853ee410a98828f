"""The worker thread: owns the models and runs ``Searcher.step()`` for all requests together.

New requests join and cancelled ones leave between two steps. When a model or a value raises, the step fails for every request in it;
they are then run again from the beginning (``serving.isolation``) until the request that causes the error is found. Random draws depend
on seed and position only, so a request that is run again gives the same text, and its client receives only what is new.

Handles requests, deadlines and the search; must not depend on HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import Iterator

from ivg.errors import IVGError, ScoreFault, ServeError, UpstreamError
from ivg.search.searcher import Searcher
from ivg.serving.errors import client_error, completion_error, unavailable
from ivg.serving.isolation import FailureIsolation
from ivg.serving.metrics import Metrics
from ivg.serving.requests import Event, Progress, RequestHandle, RunningRequest, deliver_all
from ivg.serving.served_models import ServedModels
from ivg.types import Completion, Step

log = logging.getLogger("ivg.serve")
GAUGE_SECONDS = 0.25
"""Gauges are updated this often while requests run."""
RELEASE_SECONDS = 30.0
"""Unused memory is returned to the system this often."""
RESTART_SECONDS = 5.0
"""Time between attempts to restart models that failed; requests are refused meanwhile."""


class Worker:
    """The worker thread and its queue.

    Args:
        served: the models and the server's settings; nothing else may use the models while the thread runs.
        metrics: counts requests, tokens and failures.

    Attributes:
        restarting: a model failed and could not be restarted yet.
        failure: the error that ended the thread, if any.
    """

    def __init__(self, served: ServedModels, metrics: Metrics | None = None) -> None:
        self.served, self.model, self.settings = served, served.model, served.settings
        self.metrics = metrics or Metrics()
        self.searcher = self._new_searcher()
        self.restarting = False
        self.failure: str | None = None
        self.thread = threading.Thread(target=self._run, name="ivg-worker", daemon=True)
        self._inbox: queue.SimpleQueue[tuple[str, RequestHandle | None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._submitted = 0
        """Completions in the inbox."""
        self._running: dict[int, RunningRequest] = {}
        """By their number in the searcher."""
        self._isolation = FailureIsolation()
        self._outbox: dict[RequestHandle, list[Event]] = {}
        self._stop_at = math.inf
        self._gauged_at = 0.0
        self._released_at = time.monotonic()
        self._restart_at = 0.0
        self._engine_died = False
        """At the last restart an engine had died: the failure need not be the request's fault."""

    # Called from other threads

    def start(self) -> Worker:
        """Start the thread; returns itself."""
        self.thread.start()
        return self

    @property
    def alive(self) -> bool:
        """Has the thread neither failed nor ended?"""
        return self.failure is None and (self.thread.ident is None or self.thread.is_alive())

    @property
    def draining(self) -> bool:
        """Is the worker stopping?"""
        return self._stop_at < math.inf

    @property
    def seconds_left(self) -> float:
        """Seconds until running requests are aborted; negative afterwards."""
        return self._stop_at - time.monotonic()

    @property
    def waiting(self) -> int:
        """Completions that are not being generated yet."""
        deferred = list(self._isolation.deferred)  # one operation: the worker may change it
        return self._submitted + self.searcher.waiting_requests + sum(handle.count for handle in deferred)

    def submit(self, handle: RequestHandle) -> None:
        """Queue a request.

        Raises:
            ServeError: 429 when the queue is full, 503 when the server is stopping or broken.
        """
        if self.draining or not self.alive:
            raise ServeError("the server is shutting down" if self.draining else "the server is broken; see its log", 503, "unavailable")
        with self._lock:
            waiting = self.waiting
            if waiting and waiting + handle.count > self.settings.queue_limit:
                raise ServeError(f"the queue is full ({waiting} completions are waiting); try again later", 429, "queue_full")
            self._submitted += handle.count
        self._inbox.put(("add", handle))

    def cancel(self, handle: RequestHandle) -> None:
        """Drop a request before the next step."""
        self._inbox.put(("cancel", handle))

    def drain(self, seconds: float | None = None) -> None:
        """Accept no new requests, finish running ones within ``seconds`` (default: the settings'), then stop.

        A second call may shorten the time, and never extends it.
        """
        self._stop_at = min(self._stop_at, time.monotonic() + (self.settings.drain if seconds is None else seconds))
        self._inbox.put(("wake", None))

    # The thread

    def _run(self) -> None:
        try:
            while not (self.draining and not self._busy and self._inbox.empty()):
                self._read_inbox()
                if self.restarting:
                    self._restart_models()
                self._expire()
                self._continue_isolation()
                self._send()  # before the step, so that clients learn at once whether they were accepted
                if self.searcher.busy:
                    self._step()
                self._housekeeping()
                self._send()
        except BaseException as e:
            self.failure = f"{type(e).__name__}: {e}"
            log.exception("the worker thread failed")
        finally:
            message = "the server is shutting down" if self.failure is None else "the server is broken"
            self._abort_all(ServeError(message, 503, "unavailable"))
            if self.failure is None:
                self._update_gauges()
            self._send()

    @property
    def _busy(self) -> bool:
        return self.searcher.busy or self._isolation.busy

    def _new_searcher(self) -> Searcher:
        return self.model.searcher(self.settings.max_beams)

    def _read_inbox(self) -> None:
        """Handle the messages in the inbox; wait for one if there is nothing else to do."""
        block = not self._busy and not self.draining
        for _ in range(max(1, self._inbox.qsize())):  # no more: a stream of new requests must not delay the step
            try:
                action, handle = self._inbox.get(block=block, timeout=RESTART_SECONDS if self.restarting else None)
            except queue.Empty:
                return
            block = False
            if handle is None:
                continue
            if action == "cancel":
                self._drop(handle)
                continue
            with self._lock:
                self._submitted -= handle.count
                if self._isolation.active:
                    self._isolation.deferred.append(handle)
            if not self._isolation.active:
                self._admit(handle)

    def _admit(self, handle: RequestHandle) -> None:
        """Add a request to the search; errors in it are sent to its client."""
        if handle.closed:
            return
        if self.restarting:
            self._fail(handle, unavailable())
            return
        added: list[RunningRequest] = []
        try:
            batch = self.served.prepare(handle.body)
            for i, request in enumerate(batch.requests):
                added.append(RunningRequest(handle, i, request))
                added[-1].number = self.searcher.add(request)
        except Exception as e:
            if not isinstance(e, IVGError):
                log.exception("a request could not be prepared")
            for running in added:
                self.searcher.cancel(running.number)
            known, given = isinstance(e, IVGError), handle.body.model_fields_set
            error = client_error(e, given=given) if known else ServeError("internal server error", 500, "server_error")
            self._fail(handle, error)
            return
        self._running |= {r.number: r for r in added}
        self._post(handle, batch)

    def _step(self) -> None:
        """One step of the search for all requests."""
        started = time.perf_counter()
        try:
            steps = self.searcher.step()
        except Exception as e:
            self._recover(e)
            return
        self.metrics.step_seconds.observe(time.perf_counter() - started)
        for step in steps:
            running = self._running.get(step.request)
            if running is None:
                continue
            if step.completion is not None:
                self._count_completion(running, step.completion)
            if step.completion is not None and step.completion.error is not None:
                self._fail(running.handle, completion_error(step.completion.error))
            else:
                self._report(running, step)

    def _count_completion(self, running: RunningRequest, completion: Completion) -> None:
        """Forget a finished completion; count its tokens, log its error."""
        del self._running[running.number]
        self.metrics.count_tokens_read(completion.usage.forward_tokens)
        self.metrics.tokens_written.inc(completion.usage.completion_tokens)
        error = completion.error
        if isinstance(error, UpstreamError):
            log.error("upstream: %s", error)
        if isinstance(error, ScoreFault) and not error.prompt:
            self.metrics.failures.inc()
            log.error("%s", error)

    def _report(self, running: RunningRequest, step: Step) -> None:
        """Send what the client has not received yet."""
        completion = step.completion
        committed = step.committed if completion is None else completion.text
        if not (committed.startswith(running.committed) or running.committed.startswith(committed)):
            error = ServeError("the completion changed when it was run again after a failure", 500, "server_error")
            self._fail(running.handle, error)
            return
        selection = bool(step.kept or step.dropped)
        running.selections_seen += selection
        is_new = selection and running.selections_seen > running.selections_sent
        running.selections_sent = max(running.selections_sent, running.selections_seen)
        longer = len(committed) > len(running.committed)
        running.committed = committed if longer else running.committed
        beams = is_new and running.request.record
        if longer or beams or completion is not None:
            kept, dropped = (step.kept, step.dropped) if beams else ((), ())
            details = step.details if completion is None else completion.details
            self._post(running.handle, Progress(running.index, running.committed, kept, dropped, details, completion, step.tokens))

    # Failures

    def _recover(self, error: Exception) -> None:
        """A step failed: restart the models, then find the request that causes the error."""
        self.metrics.failures.inc()
        suspects = list(self._running.values())
        log.error("a step of %d completions failed: %s", len(suspects), type(error).__name__, exc_info=error)
        self._running.clear()
        self.searcher = self._new_searcher()
        if not self._restart_models():
            for running in suspects:
                self._fail(running.handle, unavailable())
        elif failed := self._isolation.split(suspects, self._engine_died):
            message = "a model failed on this request"
            self._fail(failed.handle, client_error(error) if isinstance(error, IVGError) else ServeError(message, 500, "model_error"))

    def _restart_models(self) -> bool:
        """Restart all models; False where that failed (no free memory, say): then it is tried again later."""
        if time.monotonic() < self._restart_at:
            return False
        try:
            self._engine_died = self.model.reset_caches()
        except Exception:
            log.exception("a model could not be restarted; next attempt in %g seconds", RESTART_SECONDS)
            self._restart_at = time.monotonic() + RESTART_SECONDS
            self.restarting = True
        else:
            self.restarting = False
        return not self.restarting

    def _continue_isolation(self) -> None:
        """Run the next group of suspects; when none is left, admit the requests that arrived meanwhile."""
        while not self.searcher.busy and (group := self._isolation.next_group()):
            for running in group:
                self._run_again(running)
        if not self.searcher.busy:
            for handle in self._isolation.end():
                self._admit(handle)

    def _run_again(self, running: RunningRequest) -> None:
        if running.handle.closed:
            return
        if self.restarting:
            self._fail(running.handle, unavailable())
            return
        running.selections_seen = 0
        try:
            running.number = self.searcher.add(running.request)
        except IVGError as e:
            self._fail(running.handle, client_error(e))
        else:
            self._running[running.number] = running

    # Ends of requests

    def _expire(self) -> None:
        """Fail requests past their deadline, and all when the time to drain is over."""
        now = time.monotonic()
        if now > self._stop_at:
            self._abort_all(ServeError("the server is shutting down", 503, "unavailable"))
        for handle in {h for h in self._handles() if h.deadline < now}:
            self._fail(handle, ServeError(f"no response within the deadline of {handle.timeout:g} seconds", 504, "deadline_exceeded"))

    def _handles(self) -> Iterator[RequestHandle]:
        yield from (r.handle for r in self._running.values())
        yield from self._isolation.handles()

    def _abort_all(self, error: ServeError) -> None:
        """Fail every request with ``error``."""
        while not self._inbox.empty():
            action, handle = self._inbox.get()
            if action == "add" and handle is not None:
                self._fail(handle, error)
        for handle in set(self._handles()):
            self._fail(handle, error)

    def _fail(self, handle: RequestHandle, error: ServeError) -> None:
        if not handle.closed:
            self._post(handle, error)
        self._drop(handle)

    def _drop(self, handle: RequestHandle) -> None:
        """Forget a request and free its cache rows."""
        handle.closed = True
        failure = None
        for running in [r for r in self._running.values() if r.handle is handle]:
            del self._running[running.number]
            try:
                self.metrics.count_tokens_read(self.searcher.cancel(running.number))
            except Exception as e:  # an engine that died while no step ran
                failure = e
        self._isolation.drop(handle)
        self._gauged_at = 0.0
        if failure is not None:
            self._recover(failure)

    # Output

    def _post(self, handle: RequestHandle, event: Event) -> None:
        self._outbox.setdefault(handle, []).append(event)

    def _send(self) -> None:
        """Deliver all events, with one call for each event loop."""
        loops: dict[asyncio.AbstractEventLoop, list[tuple[RequestHandle, list[Event]]]] = {}
        for handle, events in self._outbox.items():
            loops.setdefault(handle.loop, []).append((handle, events))
        self._outbox = {}
        for loop, batches in loops.items():
            try:
                loop.call_soon_threadsafe(deliver_all, batches)
            except RuntimeError:  # the loop is closed
                for handle, _ in batches:
                    self._drop(handle)

    def _housekeeping(self) -> None:
        """Update gauges and return unused memory, each now and then."""
        now = time.monotonic()
        if self._busy and now - self._gauged_at < GAUGE_SECONDS:
            return
        self._gauged_at = now
        if now - self._released_at > RELEASE_SECONDS:
            self._released_at = now
            try:
                self.model.release_memory()
            except Exception:  # may itself fail for lack of memory
                log.exception("unused memory could not be returned")
        self._update_gauges()

    def _update_gauges(self) -> None:
        self.metrics.set_gauges(self.model, self.searcher, self.waiting)
