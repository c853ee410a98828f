"""The one loop: beams in, longer beams, numbers, fewer beams (DESIGN, section 3; METHOD, sections 3 and 4).

Knows: requests, rounds, who is finished, which caches are still needed. Must not know: tensors, models, how a request
chooses (``search.selection``); it sees an Engine and Values through their protocols. Requests with different methods and
settings share each round; new ones join between rounds.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from ivg.errors import ConfigError, ScoreFault
from ivg.search import ranking, scheduling
from ivg.search.particles import ParticleRule
from ivg.search.rejection import RejectionRule
from ivg.search.request import (
    QUANTUM,
    Particles,
    Rejection,
    Request,
    RequestState,
    Scored,
    Search,
    check_search,
    required_features,
)
from ivg.search.selection import BeamRule, Selection, SelectionRule
from ivg.types import AsyncEngine, Beam, Completion, Engine, ExpandRequest, Step, TraceNode, Usage, Value
from ivg.types.scores import Scores, every, score_each
from ivg.utils.locks import FairLock

__all__ = ["QUANTUM", "Particles", "Rejection", "Request", "Search", "Searcher"]


def _rule(request: Request) -> SelectionRule:
    search = request.search
    return (search.make_rule or (RejectionRule if search.rejection else ParticleRule if search.particles else BeamRule))(request)


def check_engine(engine: Engine, request: Request) -> None:
    """Raise for what ``engine`` cannot do.

    Raises:
        ConfigError, VocabularyError: names it, and what to do instead.
    """
    for name in sorted(required_features(request) & set(engine.unsupported)):
        raise ConfigError(f"{name}: the engine {engine.name} cannot do that\n  {engine.unsupported[name]}")
    engine.check(request.search.guidance)


class Searcher:
    """Runs many requests, each at its own pace, over one engine.

    Args:
        engine: makes beams longer.
        max_beams: hypotheses in flight at most (at least one request always runs); others wait.
        lock: shared by the loops over one engine, in any thread; each call here is a turn. Default: its own.
    """

    def __init__(self, engine: Engine, max_beams: int = 256, lock: FairLock | None = None) -> None:
        self.engine, self.max_beams, self.lock = engine, max_beams, lock or FairLock()
        self._waiting: deque[RequestState] = deque()
        self._live: dict[int, RequestState] = {}
        self._ids = itertools.count()

    # Requests

    def add(self, request: Request) -> int:
        """Queue a request; its number.

        Raises:
            PromptError: a prompt that the base cannot read (empty, too long).
            ConfigError, VocabularyError: a method that does not fit the models.
        """
        with self.lock:
            return self._add(request)

    def _add(self, request: Request) -> int:
        check_search(request.search)
        search, length = request.search, request.sampling.max_new_tokens
        check_engine(self.engine, request)
        root = self.engine.open(request.prompt, request.sampling)
        for value in (search.guidance.value if search.guidance else None, search.value):
            if value is not None:
                value.check(root.prompt, length)
        prompt_tokens = self.engine.prompt_tokens(request.prompt)
        live = RequestState(next(self._ids), request, _rule(request), time.perf_counter(), [(root, 0.0)], root.token_counter, prompt_tokens)
        scheduling.enqueue(self._waiting, live)
        return live.id

    def cancel(self, request_id: int) -> dict[str, int]:
        """Forget a request and free what is kept for it; unknown numbers are ignored. Tokens that each model had read for it."""
        with self.lock:
            live = self._live.pop(request_id, None)
            if live is not None:
                self._release_all(live)
            self._waiting = deque(w for w in self._waiting if w.id != request_id)
            return {} if live is None else dict(live.token_counter.forward_tokens)

    @property
    def busy(self) -> bool:
        """Is there anything left to do?"""
        return bool(self._waiting or self._live)

    @property
    def live_requests(self) -> int:
        """Requests in flight."""
        return len(self._live)

    @property
    def live_beams(self) -> int:
        """Hypotheses of the requests in flight, at most."""
        return sum(live.rule.rows for live in self._live.values())

    @property
    def waiting_requests(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        """Run requests to their ends; yields (position in ``requests``, completion) as each is done.

        Those that are not done when the loop is left, or when one of ``requests`` is refused, are cancelled.
        """
        position: dict[int, int] = {}
        try:
            for i, request in enumerate(requests):
                position[self.add(request)] = i
            while position and self.busy:
                for step in self.step():
                    if step.completion is not None and step.request in position:
                        yield position.pop(step.request), step.completion
        finally:
            for number in position:
                self.lock.later(partial(self.cancel, number))

    # The loop

    def step(self) -> list[Step]:
        """One round: extend, and where a chunk is complete, score and select. Who takes part: ``search.scheduling``."""
        with self.lock:
            return self._step()

    def _step(self) -> list[Step]:
        steps = self._admit()
        lives = list(self._live.values())
        if not lives:
            return steps
        done, shown = self._pace(self.engine, lives) if isinstance(self.engine, AsyncEngine) else (self._together(lives), [])
        for live in done:
            self._grow(live, live.families)
            live.left, live.inside, live.families = live.left - live.round, True, {}
        ready = [live for live in done if live.left <= 0 or not any(_grows(b) for b in live.growing)]
        scores = self._score(ready)
        steps += [self._select(live, scores[live.id]) for live in ready]
        steps += [self._step_of(live, [], []) for live in [*done, *shown] if live.id not in scores]  # some text may be common to all
        return steps

    def _together(self, everybody: Sequence[RequestState]) -> Sequence[RequestState]:
        """One round of equal length, in one call, for all whose turn it is; those whose orders are done: the same."""
        turns = scheduling.select(everybody)
        lives = [everybody[i] for i in turns]
        self._begin(lives)
        quantum = min(QUANTUM, *(min(live.left, live.request.stride) for live in lives))
        orders: list[ExpandRequest] = []
        for live in lives:
            live.round = quantum
            orders += self._orders(live)
        found = {order.beam.key: family for order, family in zip(orders, self.engine.extend(orders), strict=True)}
        for live in lives:
            live.families = found
        scheduling.advance(everybody, turns, quantum)
        return lives

    def _pace(self, engine: AsyncEngine, lives: Sequence[RequestState]) -> tuple[list[RequestState], list[RequestState]]:
        """Whole chunks, each request at its own pace: (those whose orders are done, others of which there is news)."""
        free = [live for live in lives if not live.pending]
        self._begin(free)
        for live in free:
            live.round = live.left
            orders = list(self._orders(live))
            live.pending = {o.beam.key for o in orders}
            engine.submit(orders)
        owner = {key: live for live in lives for key in live.pending}
        news: dict[int, RequestState] = {}
        for growth in engine.collect(owner):
            live = owner[growth.beam]
            live.families[growth.beam] = growth.children
            live.pending -= {growth.beam} if growth.done else set()
            news[live.id] = live
        done = [live for live in lives if not live.pending]
        return done, [live for live in news.values() if live.pending]

    def _begin(self, lives: Sequence[RequestState]) -> None:
        for live in lives:
            if live.left <= 0:
                self._begin_chunk(live)

    def _admit(self) -> list[Step]:
        """Let waiting requests in where there is room; those whose prompt the value cannot read end at once."""
        rows = self.live_beams
        failed: list[Step] = []
        while self._waiting:
            rows += self._waiting[0].rule.rows
            if self._live and rows > self.max_beams:
                break
            live = self._waiting.popleft()
            live.virtual_time = scheduling.initial_virtual_time([*self._live.values()])
            self._live[live.id] = live
            if live.rule.reads_prompt and (error := self._read_prompt(live)) is not None:
                failed.append(self._end(live, live.kept[0][0], None, error))
        return failed

    @staticmethod
    def _read_prompt(live: RequestState) -> str | None:
        """Give the rule the value of the empty response; what went wrong, or None. Each alone: one may be unreadable."""
        value = live.request.search.value
        assert value is not None
        (found,) = score_each(value, [live.kept[0][0]])
        if not isinstance(found, ScoreFault):
            live.rule.prompt_value = found
            return None
        advice = "cards starts from the value of the prompt; target=… with threshold_start=1 does without"
        return ScoreFault(f"{found}\n  {advice}", said=f"{found.said}\n  {advice}", prompt=found.prompt)

    @staticmethod
    def _begin_chunk(live: RequestState) -> None:
        chunk = live.rule.begin(live.kept)
        live.chunk, live.kept, live.left, live.inside = chunk, chunk.held, chunk.tokens, False
        live.growing = [replace(b, paused=False) if b.paused else b for b, _ in chunk.orders]

    @staticmethod
    def _orders(live: RequestState) -> Iterator[ExpandRequest]:
        """Children that each growing beam gets this round: several at the start of a chunk, one within it."""
        r, chunk = live.request, live.chunk
        assert chunk is not None
        counts = {} if live.inside else {b.key: n for b, n in chunk.orders}
        return_log_ratio = live.rule.needs_log_ratio and r.search.guidance is not None
        for beam in live.growing:
            if _grows(beam):
                yield ExpandRequest(
                    beam,
                    counts.get(beam.key, 1),
                    live.round,
                    r.sampling,
                    r.search.guidance,
                    r.draw_seed,
                    record=live.records,
                    return_log_ratio=return_log_ratio,
                    first=0 if live.inside else chunk.first,
                    keep=chunk.keep and not live.inside,
                    pause=chunk.pause,
                    alternatives=r.alternatives,
                    stream=r.stride < QUANTUM,
                )

    def _grow(self, live: RequestState, families: dict[int, list[Beam]]) -> None:
        """Put children in their parents' places, so that no order depends on how chunks were cut into rounds."""
        keep = live.chunk is not None and live.chunk.keep
        grown: list[Beam] = []
        for beam in live.growing:
            family = families.get(beam.key)
            if family is None:
                grown.append(beam)
                continue
            if family[0].key == beam.key:  # paused before its first token
                grown += family
                continue
            if keep:  # values fork from the hypothesis that the chunk began with
                family = [replace(b, inherits=False) for b in family]
            if live.inside:  # values last saw the hypothesis that the chunk began with
                family = [replace(b, ancestor_key=beam.ancestor_key or beam.parent) for b in family]
            grown += family
            if live.inside or not keep:
                self._pass_on(live, beam)
        live.growing = grown

    def _score(self, ready: Sequence[RequestState]) -> dict[int, Scores]:
        """Values of all hypotheses that completed a chunk, or why there is none; one call for each value, over all requests."""
        groups: dict[int, tuple[Value, list[Beam]]] = {}
        for live in ready:
            value = live.request.search.value
            if value is not None and not any(b.error for b in live.growing):
                groups.setdefault(id(value), (value, []))[1].extend(live.growing)
        known: dict[int, float | ScoreFault] = {}
        for value, beams in groups.values():
            known |= {b.key: s for b, s in zip(beams, score_each(value, beams), strict=True)}
        return {live.id: [known.get(b.key, 0.0) for b in live.growing] for live in ready}

    def _select(self, live: RequestState, found: Scores) -> Step:
        """Let the rule choose, free what it leaves; end the request when nothing can grow."""
        search = live.request.search
        error = next((b.error for b in live.growing if b.error), None) or next((s for s in found if isinstance(s, ScoreFault)), None)
        if error is not None:
            return self._end(live, live.growing[0], None, error)
        scores = every(found)
        choice = live.rule.choose(live.kept, list(zip(live.growing, scores, strict=True)))
        if choice.error is not None:
            return self._end(live, live.growing[0], None, choice.error)
        self._let_go(live, choice)
        live.kept, live.growing, live.left = choice.kept, [], 0
        step = self._step_of(live, choice.kept, choice.dropped)
        if choice.answer is not None:
            best, score = choice.answer
            return self._end(live, best, score if search.value is not None else None, None, step)
        return step

    def _let_go(self, live: RequestState, choice: Selection) -> None:
        """Free what nothing will grow from: what the rule released, the finished, and ancestors whose children were read."""
        kept = {b.key for b, _ in choice.kept}
        ancestors = {a for b in live.growing for a in (b.parent, b.ancestor_key) if a is not None}
        gone = (ancestors | {b.key for b, _ in live.kept}) - kept
        finished = [b.key for b, _ in choice.kept if b.finished]
        self._release(live, [*(b.key for b in choice.released), *finished, *gone])

    def _step_of(self, live: RequestState, kept: Sequence[Scored], dropped: Sequence[Scored]) -> Step:
        scored = live.request.search.value is not None
        nodes = [
            tuple({b.key: _node(b, s if scored else None, kept=mark) for b, s in pairs}.values())
            for pairs, mark in ((kept, True), (dropped, False))
        ]
        growing = [b for beam in live.growing for b in live.families.get(beam.key, [beam])]
        beams = list({b.key: b for b in (*(b for b, _ in live.kept), *growing)}.values())
        ended = all(b.finished for b, _ in live.kept) and not live.growing
        committed = ranking.common_prefix([b.text for b in beams])
        shown = committed if ended else _hold_back(committed, live.request.sampling.stop)
        details = beams[0].details if len(beams) == 1 else ()
        step = Step(live.id, nodes[0], nodes[1], shown, details=details, tokens=ranking.common_length([b.token_ids for b in beams]))
        if live.request.trace and (kept or dropped):
            live.trace.append(step)
        return step

    def _end(self, live: RequestState, best: Beam, score: float | None, error: str | None, step: Step | None = None) -> Step:
        """The completion; everything that is kept for the request is freed."""
        seconds = time.perf_counter() - live.started
        read, cached = dict(live.token_counter.forward_tokens), dict(live.token_counter.cached_tokens)
        usage = Usage(read, live.prompt_tokens, len(best.token_ids), seconds, cached)
        completion = Completion(
            text=best.text,
            token_ids=best.token_ids,
            score=score,
            finish_reason="error" if error else best.finish or "length",
            usage=usage,
            error=error,
            trace=tuple(live.trace),
            guide_shift=best.guide_shift,
            details=best.details,
            notes=tuple(live.token_counter.notes),
            sampling=live.request.sampling,
            generation_config=live.request.from_checkpoint,
        )
        self._release_all(live)
        del self._live[live.id]
        return replace(step or Step(live.id, (), (), ""), completion=completion)

    # Caches

    def _release_all(self, live: RequestState) -> None:
        """Also what values still hold for the hypotheses that a chunk in the middle of its growth began with."""
        beams = [*(b for b, _ in live.kept), *live.growing, *live.rule.spare, *(b for family in live.families.values() for b in family)]
        self._release(live, list(dict.fromkeys(k for b in beams for k in (b.key, b.parent, b.ancestor_key) if k is not None)))

    def _release(self, live: RequestState, keys: Sequence[int]) -> None:
        """Nobody needs these hypotheses any more."""
        self.engine.release(keys)
        search = live.request.search
        if search.value is not None:
            search.value.release(keys)
        if search.guidance is not None:
            search.guidance.value.release(keys)

    def _pass_on(self, live: RequestState, parent: Beam) -> None:
        """The parent's children have its rows; what is left of it goes, except where a value is still to read on from it."""
        self.engine.release([parent.key])
        search = live.request.search
        if search.guidance is not None and search.value is None:
            search.guidance.value.release([parent.key])


def _grows(beam: Beam) -> bool:
    return not beam.finished and not beam.paused


def _hold_back(text: str, stops: Sequence[str]) -> str:
    """``text`` without an ending that might become a stop string."""
    longest = max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    return text[: len(text) - longest]


def _node(beam: Beam, score: float | None, *, kept: bool) -> TraceNode:
    return TraceNode(beam.key, beam.ancestor_key or beam.parent, beam.text, beam.pieces, beam.guide_shift, score, kept, beam.finish)
