"""The one loop: beams in, longer beams, numbers, fewer beams (DESIGN, section 3; METHOD, sections 3 and 4).

Knows: requests, rounds, selection, who is finished. Must not know: tensors, models, caches; it sees an Engine and Values
through their protocols. Requests with different methods and settings share each round; new ones join between rounds.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from ivg.decoding import select
from ivg.draws import mix, uniform
from ivg.errors import ConfigError
from ivg.types import (
    Beam,
    Completion,
    Engine,
    Extension,
    Meter,
    Prompt,
    SamplingParams,
    Step,
    TokenGuidance,
    TraceNode,
    Usage,
    Value,
)

QUANTUM = 16
"""Tokens for each round at most, so that long chunks do not keep others waiting. Changes no result."""


@dataclass(frozen=True, slots=True)
class Search:
    """CBS(W, K, L), its token guidance and its selection; see ``decoding.strategies`` for the named ones."""

    width: int = 1
    successors: int = 1
    chunk_length: int | None = None
    guidance: TokenGuidance | None = None
    value: Value | None = None
    rule: Literal["top", "soft"] = "top"
    soft_scale: float = 1.0
    original: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One response that is wanted.

    Attributes:
        prompt: what to answer.
        search: how to search.
        sampling: how to draw, when to stop.
        seed: with ``index`` (number of the sample for this prompt) decides every draw.
        trace: keep the tree of beams in the completion.
    """

    prompt: Prompt
    search: Search = field(default_factory=Search)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    index: int = 0
    trace: bool = False

    @property
    def draw_seed(self) -> int:
        """Seed of this request's draws."""
        return mix(self.seed, self.index)


@dataclass(slots=True)
class _Live:
    """A request on its way: ``kept`` were selected, ``growing`` are the hypotheses of the current chunk."""

    id: int
    request: Request
    started: float
    kept: list[tuple[Beam, float]]
    growing: list[Beam]
    left: int
    meter: Meter
    prompt_tokens: int
    trace: list[Step] = field(default_factory=list)

    @property
    def chunk(self) -> int:
        """Tokens between selections."""
        return self.request.search.chunk_length or self.request.sampling.max_new_tokens


class Searcher:
    """Runs many requests, each at its own pace, over one engine.

    Args:
        engine: makes beams longer.
        max_beams: hypotheses in flight at most (at least one request always runs); others wait.
    """

    def __init__(self, engine: Engine, max_beams: int = 256) -> None:
        self.engine, self.max_beams = engine, max_beams
        self._waiting: deque[_Live] = deque()
        self._live: dict[int, _Live] = {}
        self._ids = itertools.count()

    # Requests

    def add(self, request: Request) -> int:
        """Queue a request; its number.

        Raises:
            PromptError: a prompt that the base cannot read (empty, too long).
            ConfigError, VocabularyError: a method that does not fit the models.
        """
        _check(request.sampling)
        check_sizes(request.search)
        search, length = request.search, request.sampling.max_new_tokens
        self.engine.check(search.guidance)
        root = self.engine.open(request.prompt, request.sampling)
        for value in (search.guidance.value if search.guidance else None, search.value):
            if value is not None:
                value.check(request.prompt, length)
        prompt_tokens = self.engine.prompt_tokens(request.prompt)
        live = _Live(next(self._ids), request, time.perf_counter(), [], [root], 0, root.meter, prompt_tokens)
        self._waiting.append(live)
        return live.id

    def cancel(self, request_id: int) -> None:
        """Forget a request and free what is kept for it; unknown numbers are ignored."""
        live = self._live.pop(request_id, None)
        if live is not None:
            self._release(live, [b for b, _ in live.kept] + live.growing)
        self._waiting = deque(w for w in self._waiting if w.id != request_id)

    @property
    def busy(self) -> bool:
        """Is there anything left to do?"""
        return bool(self._waiting or self._live)

    @property
    def live_requests(self) -> int:
        """Requests in flight."""
        return len(self._live)

    @property
    def waiting_requests(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        """Run requests to their ends; yields (position in ``requests``, completion) as each is done."""
        position = {self.add(r): i for i, r in enumerate(requests)}
        while self.busy:
            for step in self.step():
                if step.completion is not None and step.request in position:
                    yield position[step.request], step.completion

    # The loop

    def step(self) -> list[Step]:
        """One round for all live requests: extend, and where a chunk is complete, score and select."""
        self._admit()
        lives = list(self._live.values())
        if not lives:
            return []
        successors = [self._begin_chunk(live) for live in lives]
        quantum = min([QUANTUM, *(live.left for live in lives)])
        orders = []
        for live, count in zip(lives, successors, strict=True):
            r = live.request
            orders += [
                Extension(beam, count, quantum, r.sampling, r.search.guidance, r.draw_seed, r.trace)
                for beam in live.growing
                if not beam.finished
            ]
        families = {order.beam.key: family for order, family in zip(orders, self.engine.extend(orders), strict=True)}
        for live in lives:
            self._grow(live, families, inside=live.left < live.chunk)
            live.left -= quantum
        ready = [live for live in lives if live.left <= 0 or all(b.finished for b in live.growing)]
        scores = self._score(ready)
        steps = [self._select(live, scores[live.id]) for live in ready]
        steps += [self._progress(live) for live in lives if live.id not in scores]
        return steps

    def _admit(self) -> None:
        rows = sum(max(1, live.request.search.width * live.request.search.successors) for live in self._live.values())
        while self._waiting:
            search = self._waiting[0].request.search
            rows += search.width * search.successors
            if self._live and rows > self.max_beams:
                return
            live = self._waiting.popleft()
            self._live[live.id] = live

    def _begin_chunk(self, live: _Live) -> int:
        """Children that each growing beam gets this round: several at the start of a chunk, one within it."""
        if live.left > 0:
            return 1
        search, live.left = live.request.search, live.chunk
        if live.kept:
            live.growing = [b for b, _ in live.kept if not b.finished]
            live.kept = [(b, s) for b, s in live.kept if b.finished]
            return search.successors
        return search.width * search.successors

    def _grow(self, live: _Live, families: dict[int, list[Beam]], *, inside: bool) -> None:
        """Put children in their parents' places, so that no order depends on how chunks were cut into rounds."""
        grown: list[Beam] = []
        for beam in live.growing:
            family = families.get(beam.key)
            if family is None:
                grown.append(beam)
                continue
            if inside:  # values last saw the hypothesis that the chunk began with
                family = [replace(b, origin=beam.origin or beam.parent) for b in family]
            grown += family
            self._pass_on(live, beam)
        live.growing = grown

    def _score(self, ready: Sequence[_Live]) -> dict[int, list[float]]:
        """Values of all hypotheses that completed a chunk; one call for each value, over all requests."""
        groups: dict[int, tuple[Value, list[Beam]]] = {}
        for live in ready:
            value = live.request.search.value
            if value is not None and not any(b.error for b in live.growing):
                groups.setdefault(id(value), (value, []))[1].extend(live.growing)
        known: dict[int, float] = {}
        for value, beams in groups.values():
            known |= {b.key: s for b, s in zip(beams, value.score(beams), strict=True)}
        return {live.id: [known.get(b.key, 0.0) for b in live.growing] for live in ready}

    def _select(self, live: _Live, scores: list[float]) -> Step:
        """Keep W of the finished hypotheses kept before and the new ones; end the request when nothing can grow."""
        search = live.request.search
        error = next((b.error for b in live.growing if b.error), None)
        if error is None and any(s != s for s in scores):
            error = f"the value {search.value.name if search.value else ''} gave NaN"
        if error is not None:
            return self._end(live, live.growing[0], None, error)
        copies = search.successors if search.original else 1
        pool = [pair for pair in live.kept for _ in range(copies)] + list(zip(live.growing, scores, strict=True))
        if not search.original and search.rule == "top":
            pool = _merged(pool)
        if search.rule == "soft":
            seed, position = live.request.draw_seed, max(len(b.token_ids) for b, _ in pool)
            chosen = select.soft([s for _, s in pool], search.width, search.soft_scale, lambda i: uniform(seed, position, i, 0x50F7))
        else:
            chosen = select.top([s for _, s in pool], search.width)
        before = {b.key for b, _ in live.kept}
        live.kept = [pool[i] for i in chosen]
        held = {b.key for b, _ in live.kept}
        dropped = [(b, s) for b, s in zip(live.growing, scores, strict=True) if b.key not in held]
        ancestors = {a for b in live.growing for a in (b.parent, b.origin) if a is not None}
        self._release(live, [b for b, _ in dropped] + [b for b, _ in live.kept if b.finished])
        self._forget(live, [*ancestors, *(before - held)])
        live.growing, live.left = [], 0
        step = self._step_of(live, live.kept, dropped)
        if all(b.finished for b, _ in live.kept):
            best, score = max(live.kept, key=lambda pair: pair[1]) if search.rule == "top" else live.kept[0]
            return self._end(live, best, score if search.value is not None else None, None, step)
        return step

    def _progress(self, live: _Live) -> Step:
        """What a round within a chunk shows: nothing is selected yet, but text may be common to all."""
        return self._step_of(live, [], [])

    def _step_of(self, live: _Live, kept: Sequence[tuple[Beam, float]], dropped: Sequence[tuple[Beam, float]]) -> Step:
        scored = live.request.search.value is not None
        nodes = [tuple(_node(b, s if scored else None, kept=mark) for b, s in pairs) for pairs, mark in ((kept, True), (dropped, False))]
        texts = [b.text for b, _ in live.kept] + [b.text for b in live.growing]
        ended = all(b.finished for b, _ in live.kept) and not live.growing
        committed = select.common_prefix(texts)
        step = Step(live.id, nodes[0], nodes[1], committed if ended else _hold_back(committed, live.request.sampling.stop))
        if live.request.trace and (kept or dropped):
            live.trace.append(step)
        return step

    def _end(self, live: _Live, best: Beam, score: float | None, error: str | None, step: Step | None = None) -> Step:
        """The completion; everything that is kept for the request is freed."""
        seconds = time.perf_counter() - live.started
        usage = Usage(dict(live.meter.forward_tokens), live.prompt_tokens, len(best.token_ids), seconds)
        completion = Completion(
            text=best.text,
            token_ids=best.token_ids,
            score=score,
            finish_reason="error" if error else best.finish or "length",
            usage=usage,
            error=error,
            trace=tuple(live.trace),
            guide_shift=best.guide_shift,
        )
        self._release(live, [b for b, _ in live.kept] + live.growing)
        del self._live[live.id]
        return replace(step or Step(live.id, (), (), ""), completion=completion)

    # Caches

    def _release(self, live: _Live, beams: Sequence[Beam]) -> None:
        """Nobody needs these hypotheses any more."""
        keys = [b.key for b in beams]
        self.engine.release(keys)
        self._forget(live, keys)

    def _pass_on(self, live: _Live, parent: Beam) -> None:
        """The parent's children have its rows; what is left of it goes, except where a value is still to read on from it."""
        self.engine.release([parent.key])
        search = live.request.search
        if search.guidance is not None and search.value is None:
            search.guidance.value.release([parent.key])

    @staticmethod
    def _forget(live: _Live, keys: Sequence[int]) -> None:
        search = live.request.search
        if search.value is not None:
            search.value.release(keys)
        if search.guidance is not None:
            search.guidance.value.release(keys)


def _merged(pool: Sequence[tuple[Beam, float]]) -> list[tuple[Beam, float]]:
    """One of each: identical hypotheses would otherwise fill several places."""
    seen: dict[tuple[int, ...], tuple[Beam, float]] = {}
    for beam, score in pool:
        seen.setdefault(beam.token_ids, (beam, score))
    return list(seen.values())


def _hold_back(text: str, stops: Sequence[str]) -> str:
    """``text`` without an ending that might become a stop string."""
    longest = max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    return text[: len(text) - longest]


def _node(beam: Beam, score: float | None, *, kept: bool) -> TraceNode:
    return TraceNode(beam.key, beam.parent, beam.text, beam.pieces, beam.guide_shift, score, kept, beam.finish)


class _Sizes(Protocol):
    @property
    def width(self) -> int: ...
    @property
    def successors(self) -> int: ...
    @property
    def chunk_length(self) -> int | None: ...


def check_sizes(search: _Sizes) -> None:
    """Raise for W, K or L below one.

    Raises:
        ConfigError: names the setting and what it got.
    """
    for letter, name in (("W", "width"), ("K", "successors"), ("L", "chunk_length")):
        number = getattr(search, name)
        if number is not None and number < 1:
            raise ConfigError(f"{name} ({letter}) must be at least 1, got {number}")


def _check(sampling: SamplingParams) -> None:
    """Raise for sampling parameters that cannot be.

    Raises:
        ConfigError: names the parameter, what it got and what it may be.
    """
    rules = (
        ("temperature", sampling.temperature >= 0, "0 (greedy) or more"),
        ("top_k", sampling.top_k >= 0, "0 (off) or more"),
        ("top_p", 0 < sampling.top_p <= 1, "in (0, 1]"),
        ("min_p", 0 <= sampling.min_p < 1, "in [0, 1)"),
        ("repetition_penalty", sampling.repetition_penalty > 0, "positive"),
        ("max_new_tokens", sampling.max_new_tokens >= 1, "at least 1"),
    )
    for name, fine, expected in rules:
        if not fine:
            raise ConfigError(f"{name} must be {expected}, got {getattr(sampling, name)}")
