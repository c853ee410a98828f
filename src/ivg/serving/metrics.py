"""Prometheus metrics, in a registry of their own."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ivg.errors import ScoreFault, UpstreamError
from ivg.model import GuidedModel
from ivg.models.cached_lm import runners_of
from ivg.search.searcher import Searcher
from ivg.types import Completion

log = logging.getLogger("ivg.serve")

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_REQUEST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """All metrics of one server."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.requests = Counter("ivg_requests", "HTTP requests", ["endpoint", "status"], registry=r)
        self.queue_length = Gauge("ivg_queue_length", "Completions waiting to be scheduled", registry=r)
        self.live_requests = Gauge("ivg_live_requests", "Completions being generated", registry=r)
        self.live_beams = Gauge("ivg_live_beams", "Maximum number of beams of the completions being generated", registry=r)
        self.tokens_read = Counter("ivg_tokens_read", "Tokens read by each model (prompt and completion)", ["model"], registry=r)
        self.tokens_written = Counter("ivg_tokens_written", "Tokens of finished completions", registry=r)
        self.step_seconds = Histogram("ivg_step_seconds", "Duration of one step of the search", buckets=_STEP_BUCKETS, registry=r)
        self.first_text = Histogram("ivg_first_text_seconds", "Time to first text", buckets=_REQUEST_BUCKETS, registry=r)
        self.request_seconds = Histogram("ivg_request_seconds", "Time from request to last token", buckets=_REQUEST_BUCKETS, registry=r)
        self.cache_rows = Gauge("ivg_cache_rows", "Rows of the key-value cache in use", ["model"], registry=r)
        self.cache_bytes = Gauge("ivg_cache_bytes", "Bytes of keys and values in use", ["model"], registry=r)
        self.failures = Counter("ivg_model_failures", "Errors raised by a model or a value", registry=r)

    def count_tokens_read(self, tokens: Mapping[str, int]) -> None:
        """Add tokens read, by model."""
        for model, count in tokens.items():
            self.tokens_read.labels(model).inc(count)

    def count_completion(self, completion: Completion) -> None:
        """Add the tokens of a finished completion; a failure of a model is counted and logged."""
        self.count_tokens_read(completion.usage.forward_tokens)
        self.tokens_written.inc(completion.usage.completion_tokens)
        error = completion.error
        if isinstance(error, UpstreamError):
            log.error("upstream: %s", error)
        if isinstance(error, ScoreFault) and not error.prompt:
            self.failures.inc()
            log.error("%s", error)

    def set_gauges(self, model: GuidedModel, searcher: Searcher, waiting: int) -> None:
        """Set every gauge to its value now."""
        self.queue_length.set(waiting)
        self.live_requests.set(searcher.live_requests)
        self.live_beams.set(searcher.live_beams)
        for name, runner in runners_of(model.readers).items():
            self.cache_rows.labels(name).set(runner.live_rows)
            self.cache_bytes.labels(name).set(runner.cache.used_bytes)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
