"""Numbers for Prometheus, in a registry of their own. Knows their names and units; who counts is ``worker`` and ``app``."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """Everything that is counted."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.requests = Counter("ivg_requests", "Requests answered", ["endpoint", "status"], registry=r)
        self.queue = Gauge("ivg_queue_length", "Answers that wait for their turn", registry=r)
        self.live = Gauge("ivg_live_requests", "Answers being written", registry=r)
        self.beams = Gauge("ivg_live_beams", "Hypotheses of the answers being written, at most", registry=r)
        self.read = Counter("ivg_tokens_read", "Tokens that a model read", ["model"], registry=r)
        self.written = Counter("ivg_tokens_written", "Tokens of finished answers", registry=r)
        self.step = Histogram("ivg_step_seconds", "One round of the search", buckets=_SHORT, registry=r)
        self.first = Histogram("ivg_first_text_seconds", "From request to its first text", buckets=_LONG, registry=r)
        self.total = Histogram("ivg_request_seconds", "From request to the end of its answer", buckets=_LONG, registry=r)
        self.rows = Gauge("ivg_cache_rows", "Cache rows in use", ["model"], registry=r)
        self.bytes = Gauge("ivg_cache_bytes", "Keys and values in use", ["model"], registry=r)
        self.failures = Counter("ivg_model_failures", "Rounds that a model or value broke off", registry=r)

    def spent(self, tokens: Mapping[str, int]) -> None:
        """Models have read so many tokens."""
        for model, count in tokens.items():
            self.read.labels(model).inc(count)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)
