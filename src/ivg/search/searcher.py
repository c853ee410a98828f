"""The loop: beams in, longer beams, scores, fewer beams (docs/explanation/concepts.md).

Handles requests, rounds, and which caches are still needed; not tensors, models, or how a request selects
(:mod:`ivg.search.selection`). Requests with different methods and settings share each round; new ones join between rounds.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from ivg.errors import ConfigError, ModelError, ScoreFault
from ivg.search import ranking, scheduling
from ivg.search.logprobs_after_generation import answer_details
from ivg.search.particles import ParticleRule
from ivg.search.rejection import RejectionRule
from ivg.search.request import QUANTUM, Particles, Rejection, Request, Search, check_search, required_features
from ivg.search.rule import Scored, Selection, SelectionRule
from ivg.search.selection import BeamRule
from ivg.search.speculation import SpeculationRule
from ivg.search.state import RequestState
from ivg.search.tree import TreeRule
from ivg.settings.search import MAX_BEAMS
from ivg.types import AsyncEngine, Beam, Completion, Engine, ExpandRequest, Hypothesis, Step, TraceNode, Usage, Value
from ivg.types.scores import Scores, require_scores, score_each
from ivg.utils.locks import FairLock

__all__ = ["QUANTUM", "Particles", "Rejection", "Request", "Search", "Searcher"]


def _rule(request: Request) -> SelectionRule:
    search = request.search
    named: list[tuple[object, Callable[[Request], SelectionRule]]] = [
        (search.rejection, RejectionRule),
        (search.particles, ParticleRule),
        (search.speculation, SpeculationRule),
        (search.tree, TreeRule),
    ]
    return (search.make_rule or next((make for settings, make in named if settings), BeamRule))(request)


def check_engine(engine: Engine, request: Request) -> None:
    """Raise where ``request`` needs what ``engine`` cannot do.

    Raises:
        ConfigError, VocabularyError: names it, and what to do instead.
    """
    features = required_features(request)
    if engine.logprobs_after_generation and request.alternatives is not None:
        features.discard("alternatives")
        engine.check_logprobs(request.sampling)
    engine.check_features(features)
    engine.check_sampling(request.sampling)
    engine.check(request.search.guidance)
    if (speculation := request.search.speculation) is not None:
        engine.check_drafter(speculation.value, request.sampling, compared=speculation.tilt)
    engine.check_thinking(request.search.thinking)


class Searcher:
    """Runs many requests over one engine.

    Args:
        engine: makes beams longer.
        max_beams: hypotheses in flight at most (at least one request always runs); other requests wait.
        lock: shared by all loops over one engine, in any thread, and held for one call at a time. Default: its own.
    """

    def __init__(self, engine: Engine, max_beams: int = MAX_BEAMS, lock: FairLock | None = None) -> None:
        self.engine, self.max_beams, self.lock = engine, max_beams, lock or FairLock()
        self._waiting: deque[RequestState] = deque()
        self._running: dict[int, RequestState] = {}
        self._ids = itertools.count()

    def add(self, request: Request) -> int:
        """Queue a request; returns its number.

        Raises:
            PromptError: a prompt that the base cannot read (empty, too long).
            ConfigError, VocabularyError: a method that does not fit the engine or the models.
        """
        search, sampling = request.search, request.sampling
        check_search(search)
        with self.lock:
            check_engine(self.engine, request)
            root = replace(self.engine.open(request.prompt, sampling), stop_token_ids=sampling.stop_token_ids)
            if search.thinking is not None and not self.engine.answers_at_once(request.prompt, search.thinking.guide_after):
                root = replace(root, answer_start=None)
            for value in search.values:
                value.check(root.prompt, sampling.max_new_tokens)
            tokens = self.engine.prompt_tokens(request.prompt)
            kept: list[Scored] = [(root, 0.0)]
            state = RequestState(next(self._ids), request, _rule(request), time.perf_counter(), kept, root.token_counter, tokens)
            state.marker = search.thinking.guide_after if search.thinking is not None and root.answer_start is None else None
            scheduling.enqueue(self._waiting, state)
        return state.id

    def cancel(self, request_id: int) -> dict[str, int]:
        """Drop a request and free what is kept for it; returns the tokens that each model has read for it. Unknown numbers are ignored."""
        with self.lock:
            state = self._running.pop(request_id, None)
            if state is not None:
                self._release_all(state)
            self._waiting = deque(w for w in self._waiting if w.id != request_id)
            return {} if state is None else dict(state.token_counter.forward_tokens)

    @property
    def busy(self) -> bool:
        """Are there requests that are not done?"""
        return bool(self._waiting or self._running)

    @property
    def live_requests(self) -> int:
        """Requests in flight."""
        return len(self._running)

    @property
    def live_beams(self) -> int:
        """Hypotheses of the requests in flight, at most."""
        return sum(state.rule.rows for state in self._running.values())

    @property
    def full(self) -> bool:
        """Would another request have to wait for the running ones, or for those in the queue?"""
        return self.live_beams + sum(state.rule.rows for state in self._waiting) >= self.max_beams

    @property
    def waiting_requests(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        """Run requests to completion; yields (position in ``requests``, completion) as each is done.

        When the iteration is abandoned, or one of ``requests`` is refused, the rest are cancelled.
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

    def step(self) -> list[Step]:
        """One round: extend, and where a chunk is complete, score and select; :mod:`ivg.search.scheduling` says who takes part."""
        with self.lock:
            return self._step()

    def _step(self) -> list[Step]:
        steps = self._admit()
        states = list(self._running.values())
        if not states:
            return steps
        if isinstance(self.engine, AsyncEngine):
            done, streamed = self._collect(self.engine, states)
        else:
            done, streamed = list(self._extend(states)), []
        for state in done:
            self._grow(state, state.families)
            state.left, state.inside, state.families = state.left - state.round, True, {}
        ready = [state for state in done if state.left <= 0 or not any(state.grows(b) for b in state.growing)]
        scores = self._score(ready)
        steps += [self._select(state, scores[state.id]) for state in ready]
        steps += [self._step_of(state, [], []) for state in [*done, *streamed] if state.id not in scores]  # beams may share new text
        return steps

    def _extend(self, running: Sequence[RequestState]) -> Sequence[RequestState]:
        """One round of equal length, in one call, for all requests whose turn it is; returns these."""
        turns = scheduling.select(running)
        states = [running[i] for i in turns]
        self._begin(states)
        quantum = min(QUANTUM, *(min(state.left, state.request.stride) for state in states))
        requests: list[ExpandRequest] = []
        for state in states:
            state.round = state.left if self._is_whole(state) else quantum
            requests += state.expand_requests()
        found = {r.beam.key: family for r, family in zip(requests, self.engine.extend(requests), strict=True)}
        for state in states:
            state.families = found
        scheduling.advance(running, turns, quantum)
        return states

    def _is_whole(self, state: RequestState) -> bool:
        """Must the engine be asked for the whole chunk at once?"""
        speculation, chunk = state.request.search.speculation, state.chunk
        drafted = chunk is not None and chunk.drafted
        return drafted and speculation is not None and self.engine.writes_whole_chunks(speculation.value)

    def _collect(self, engine: AsyncEngine, states: Sequence[RequestState]) -> tuple[list[RequestState], list[RequestState]]:
        """Submit whole chunks and collect outputs: (requests whose chunk is complete, others with new text to stream)."""
        free = [state for state in states if not state.pending]
        self._begin(free)
        for state in free:
            state.round = state.left
            requests = list(state.expand_requests())
            state.pending = {r.beam.key for r in requests}
            engine.submit(requests)
        owner = {key: state for state in states for key in state.pending}
        changed: dict[int, RequestState] = {}
        outputs = engine.collect(owner)
        if owner and not outputs and not engine.running:
            raise ModelError(f"{len(owner)} requests to the engine {engine.name} were aborted while they ran\n  send them again")
        for output in outputs:
            state = owner[output.beam]
            state.families[output.beam] = output.children
            state.pending -= {output.beam} if output.done else set()
            changed[state.id] = state
        done = [state for state in states if not state.pending]
        return done, [state for state in changed.values() if state.pending]

    def _begin(self, states: Sequence[RequestState]) -> None:
        for state in states:
            if state.left <= 0:
                state.begin_chunk()

    def _admit(self) -> list[Step]:
        """Start waiting requests where there is room; those whose prompt the value cannot read end at once."""
        rows = self.live_beams
        failed: list[Step] = []
        while self._waiting:
            rows += self._waiting[0].rule.rows
            if self._running and rows > self.max_beams:
                break
            state = self._waiting.popleft()
            state.virtual_time = scheduling.initial_virtual_time([*self._running.values()])
            self._running[state.id] = state
            if state.rule.reads_prompt and (error := self._read_prompt(state)) is not None:
                failed.append(self._end(state, state.kept[0][0], None, error))
        return failed

    @staticmethod
    def _read_prompt(state: RequestState) -> str | None:
        """Give the rule the value of the empty response; returns the error, if any. One call each: a prompt may be unreadable."""
        value = state.request.search.value
        assert value is not None
        (found,) = score_each(value, [state.kept[0][0]])
        if not isinstance(found, ScoreFault):
            state.rule.prompt_value = found
            return None
        advice = state.rule.prompt_advice
        return ScoreFault(f"{found}\n  {advice}", said=f"{found.said}\n  {advice}", prompt=found.prompt)

    def _grow(self, state: RequestState, families: dict[int, list[Beam]]) -> None:
        """Put children in their parents' places, so that their order does not depend on how chunks were cut into rounds."""
        keep = state.chunk is not None and state.chunk.keep
        grown: list[Beam] = []
        for beam in state.growing:
            family = families.get(beam.key)
            if family is None:
                grown.append(beam)
                continue
            if family[0].key == beam.key:  # paused before its first token
                grown += family
                continue
            if keep:  # values fork from the hypothesis at the start of the chunk
                family = [replace(b, inherits=False) for b in family]
            if state.inside:  # values last scored the hypothesis at the start of the chunk
                family = [replace(b, ancestor_key=beam.ancestor_key or beam.parent) for b in family]
            grown += family
            if state.inside or not keep:
                self._release_parent(state, beam)
        state.growing = grown

    def _score(self, ready: Sequence[RequestState]) -> dict[int, Scores]:
        """Scores of all hypotheses that completed a chunk, or faults; one call for each value, over all requests."""
        groups: dict[int, tuple[Value, list[Hypothesis]]] = {}
        for state in ready:
            value = state.request.search.value
            if value is not None and not any(b.error for b in state.growing):
                groups.setdefault(id(value), (value, []))[1].extend(state.answers)
        known: dict[int, float | ScoreFault] = {}
        for value, beams in groups.values():
            known |= {b.key: s for b, s in zip(beams, score_each(value, beams), strict=True)}
        return {state.id: state.scores(known) for state in ready}

    def _select(self, state: RequestState, found: Scores) -> Step:
        """Let the rule select, free the rest; end the request when nothing can grow."""
        search = state.request.search
        error = next((b.error for b in state.growing if b.error), None) or next((s for s in found if isinstance(s, ScoreFault)), None)
        if error is not None:
            return self._end(state, state.growing[0], None, error)
        scores = require_scores(found)
        selection = state.rule.choose(state.kept, list(zip(state.growing, scores, strict=True)))
        if selection.error is not None:
            return self._end(state, state.growing[0], None, selection.error)
        self._release_unselected(state, selection)
        state.kept, state.growing, state.left = selection.kept, [], 0
        step = self._step_of(state, selection.kept, selection.dropped)
        if selection.answer is not None:
            best, score = selection.answer
            return self._end(state, best, None if search.value is None or best.answer_start is None else score, None, step)
        return step

    def _release_unselected(self, state: RequestState, selection: Selection) -> None:
        """Free what nothing grows from: what the rule released, finished beams, and ancestors whose children were scored."""
        kept = {b.key for b, _ in selection.kept}
        ancestors = {a for b in state.growing for a in (b.parent, b.ancestor_key) if a is not None}
        gone = (ancestors | {b.key for b, _ in state.kept}) - kept
        finished = [b.key for b, _ in selection.kept if b.finished]
        self._release(state, [*(b.key for b in selection.released), *finished, *gone])

    def _step_of(self, state: RequestState, kept: Sequence[Scored], dropped: Sequence[Scored]) -> Step:
        scored = state.request.search.value is not None
        nodes = [
            tuple({b.key: _node(b, s if scored and b.answer_start is not None else None, kept=mark) for b, s in pairs}.values())
            for pairs, mark in ((kept, True), (dropped, False))
        ]
        growing = [b for beam in state.growing for b in state.families.get(beam.key, [beam])]
        beams = list({b.key: b for b in (*(b for b, _ in state.kept), *growing)}.values())
        ended = all(b.finished for b, _ in state.kept) and not state.growing
        committed = ranking.common_prefix([b.text for b in beams])
        shown = committed if ended else _hold_back(committed, state.request.sampling.stop)
        details = beams[0].details if len(beams) == 1 else ()
        step = Step(state.id, nodes[0], nodes[1], shown, details=details, tokens=ranking.common_length([b.token_ids for b in beams]))
        if state.request.trace and (kept or dropped):
            state.trace.append(step)
        return step

    def _end(self, state: RequestState, best: Beam, score: float | None, error: str | None, step: Step | None = None) -> Step:
        """The step with the completion; frees everything that is kept for the request."""
        details, guidance = best.details, state.request.search.guidance
        try:
            details = details if error else answer_details(self.engine, state.request, best, state.token_counter)
        except ConfigError as e:  # the request must end all the same
            error = str(e)
        seconds = time.perf_counter() - state.started
        read, cached = dict(state.token_counter.forward_tokens), dict(state.token_counter.cached_tokens)
        usage = Usage(read, state.prompt_tokens, len(best.token_ids), seconds, cached, state.rule.drafted_tokens)
        unfinished = [] if error or best.answer_start is not None else [f"no answer: {state.marker!r} (guide_after) has not come"]
        completion = Completion(
            text=best.text,
            token_ids=best.token_ids,
            score=score,
            finish_reason="error" if error else best.finish or "length",
            usage=usage,
            error=error,
            trace=tuple(state.trace),
            guide_shift=best.guide_shift,
            details=details,
            notes=(*state.token_counter.notes, *unfinished),
            sampling=state.request.sampling,
            generation_config=state.request.from_checkpoint,
            guide_after=state.marker,
            kl_spent=best.kl_spent if guidance is not None and guidance.kl_budget is not None else None,
            answer_start=best.answer_start,
            posterior=None if error else state.rule.posterior,
        )
        self._release_all(state)
        del self._running[state.id]
        return replace(step or Step(state.id, (), (), ""), completion=completion)

    def _release_all(self, state: RequestState) -> None:
        """Free all beams of a request, and what values still hold for those at the start of an unfinished chunk."""
        beams = [
            *(b for b, _ in state.kept),
            *state.growing,
            *state.rule.retained,
            *(b for family in state.families.values() for b in family),
        ]
        self._release(state, list(dict.fromkeys(k for b in beams for k in (b.key, b.parent, b.ancestor_key) if k is not None)))

    def _release(self, state: RequestState, keys: Sequence[int]) -> None:
        """Free these hypotheses in the engine and in all values."""
        self.engine.release(keys)
        search = state.request.search
        if search.value is not None:
            search.value.release(keys)
        if search.guidance is not None:
            search.guidance.value.release(keys)

    def _release_parent(self, state: RequestState, parent: Beam) -> None:
        """Free a parent whose children have inherited its cache, except where a value will read on from it."""
        self.engine.release([parent.key])
        search = state.request.search
        if search.guidance is not None and search.value is None:
            search.guidance.value.release([parent.key])


def _hold_back(text: str, stops: Sequence[str]) -> str:
    """``text`` without an ending that might become a stop string."""
    longest = max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    return text[: len(text) - longest]


def _node(beam: Beam, score: float | None, *, kept: bool) -> TraceNode:
    return TraceNode(beam.key, beam.ancestor_key or beam.parent, beam.text, beam.pieces, beam.guide_shift, score, kept, beam.finish)
