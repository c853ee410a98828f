"""The worker thread: owns the models and runs ``Searcher.step()`` for all requests together.

New requests join and cancelled ones leave between two steps. When a model or a value raises, the step fails for every request in it;
they are then run again from the beginning (``serving.isolation``) until the request that causes the error is found. Random draws depend
on seed and position only, so a request that is run again gives the same text, and its client receives only what is new.

Handles requests, deadlines and the search; must not depend on HTTP.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator

from ivg.errors import IVGError, PromptError, ServeError
from ivg.serving.echo import no_completion
from ivg.serving.errors import client_error, completion_error, model_error, unavailable
from ivg.serving.isolation import FailureIsolation
from ivg.serving.metrics import Metrics
from ivg.serving.requests import Outbox, Progress, RequestHandle, RunningRequest
from ivg.serving.served_models import RequestBatch, ServedModels
from ivg.types import Step

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
        self.searcher = self.model.searcher(self.settings.max_beams)
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
        self._echoes: deque[tuple[RequestHandle, RequestBatch]] = deque()
        """Requests whose prompts are to be read for their log-probabilities before any text is generated."""
        self._outbox = Outbox()
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
        deferred += [handle for handle, _ in list(self._echoes)]
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
                if self._echoes and not self._isolation.active:
                    self._read_prompts()
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
        return self.searcher.busy or self._isolation.busy or bool(self._echoes)

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
        try:
            batch = self.served.prepare(handle.body)
        except Exception as e:
            self._refuse(handle, e)
            return
        if batch.echo is not None:
            self._echoes.append((handle, batch))
        else:
            self._start(handle, batch)

    def _read_prompts(self) -> None:
        """Some of the prompts of the first request that waits for their log-probabilities; when it has all, it starts."""
        handle, batch = self._echoes[0]
        assert batch.echo is not None
        if self.restarting:
            self._fail(handle, unavailable())
            return
        try:
            batch.echo.step()
        except PromptError as e:
            self._refuse(handle, e)
        except Exception as e:
            self._recover(e, handle)
        else:
            if batch.echo.done:
                self._echoes.popleft()
                self.metrics.count_tokens_read(batch.echo.forward_tokens)
                self._start(handle, batch)

    def _start(self, handle: RequestHandle, batch: RequestBatch) -> None:
        """Add the completions of a request to the search; where no text is wanted, they are done."""
        if not batch.generate:
            self._outbox.post(handle, batch)
            for i, request in enumerate(batch.requests):
                self._outbox.post(handle, Progress(i, "", (), (), (), no_completion(self.model.engine.prompt_tokens(request.prompt))))
            return
        added: list[RunningRequest] = []
        try:
            for i, request in enumerate(batch.requests):
                added.append(RunningRequest(handle, i, request, self.searcher.add(request)))
        except Exception as e:
            for running in added:
                self.searcher.cancel(running.number)
            self._refuse(handle, e)
            return
        self._running |= {r.number: r for r in added}
        self._outbox.post(handle, batch)

    def _refuse(self, handle: RequestHandle, e: Exception) -> None:
        """Fail a request that could not be prepared."""
        if isinstance(e, IVGError):
            self._fail(handle, client_error(e, given=handle.body.model_fields_set))
        else:
            log.exception("a request could not be prepared", exc_info=e)
            self._fail(handle, ServeError("internal server error", 500, "server_error"))

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
                del self._running[running.number]
                self.metrics.count_completion(step.completion)
            if step.completion is not None and step.completion.error is not None:
                self._fail(running.handle, completion_error(step.completion.error, running.handle.body.structure_field))
            else:
                self._report(running, step)

    def _report(self, running: RunningRequest, step: Step) -> None:
        """Send what the client has not received yet."""
        try:
            progress = running.advance(step)
        except ServeError as e:
            self._fail(running.handle, e)
            return
        if progress is not None:
            self._outbox.post(running.handle, progress)

    # Failures

    def _recover(self, error: Exception, cause: RequestHandle | None = None) -> None:
        """A step failed: restart the models, then find the request that causes the error, unless ``cause`` is known to."""
        self.metrics.failures.inc()
        suspects = list(self._running.values())
        log.error("a step of %d completions failed: %s", len(suspects) + (cause is not None), type(error).__name__, exc_info=error)
        self._running.clear()
        self.searcher = self.model.searcher(self.settings.max_beams)
        if cause is not None:
            self._fail(cause, model_error(error))
        if not self._restart_models():
            for running in suspects:
                self._fail(running.handle, unavailable())
        elif cause is not None:
            self._isolation.run_again(suspects)
        elif failed := self._isolation.split(suspects, self._engine_died):
            self._fail(failed.handle, model_error(error))

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
        yield from (handle for handle, _ in self._echoes)

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
            self._outbox.post(handle, error)
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
        self._echoes = deque(waiting for waiting in self._echoes if waiting[0] is not handle)
        self._gauged_at = 0.0
        if failure is not None:
            self._recover(failure)

    # Output

    def _send(self) -> None:
        """Deliver all events."""
        for handle in self._outbox.send():
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
