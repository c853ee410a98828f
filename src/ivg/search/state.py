"""The state of one request while it runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from ivg.errors import ScoreFault
from ivg.search.request import QUANTUM, Request
from ivg.search.rule import Chunk, Scored, SelectionRule
from ivg.types import Beam, ExpandRequest, Hypothesis, Step, TokenCounter
from ivg.types.scores import Scores
from ivg.types.thinking import answer_of


@dataclass(slots=True)
class RequestState:
    """One request while it runs: ``kept`` were selected (at first the empty response), ``growing`` belong to the current chunk."""

    id: int
    request: Request
    rule: SelectionRule
    started: float
    kept: list[Scored]
    token_counter: TokenCounter
    prompt_tokens: int
    growing: list[Beam] = field(default_factory=list)
    chunk: Chunk | None = None
    left: int = 0
    """Tokens that the current chunk may still grow."""
    inside: bool = False
    """The current chunk has had a round already."""
    round: int = 0
    """Tokens of the current round."""
    virtual_time: float = 0.0
    """Cost of its rounds so far (:mod:`ivg.search.scheduling`)."""
    bypassed: int = 0
    """Later requests that were admitted before it."""
    pending: set[int] = field(default_factory=set)
    """Keys of beams that an :class:`~ivg.types.AsyncEngine` is extending."""
    families: dict[int, list[Beam]] = field(default_factory=dict)
    """Children by the key of their parent, complete or as far as they have come."""
    trace: list[Step] = field(default_factory=list)

    answer_tokens: int | None = None
    """Tokens of answer in the current chunk, where its beams began it thinking; None: it has a length in all."""
    marker: str | None = None
    """What ends the thinking that the response begins with; None: it begins with its answer."""

    @property
    def records(self) -> bool:
        """Are guidance shifts and pieces of text recorded for every token?"""
        return self.request.trace or self.request.record

    def grows(self, beam: Beam) -> bool:
        """Does ``beam`` grow in the rest of this chunk?"""
        if beam.finished or beam.paused:
            return False
        limit, start = self.answer_tokens, beam.answer_start
        return limit is None or start is None or len(beam.token_ids) - start < limit

    def begin_chunk(self) -> None:
        """Let the rule choose what grows next."""
        chunk = self.rule.begin(self.kept)
        self.chunk, self.kept, self.left, self.inside = chunk, chunk.held, chunk.tokens, False
        self.growing = [replace(b, paused=False) if b.paused else b for b, _ in chunk.expansions]
        self.answer_tokens = None
        if any(b.answer_start is None for b in self.growing):  # thinking has no chunks: the first one is complete with its answer's tokens
            self.answer_tokens, self.left = chunk.tokens, self.request.sampling.max_new_tokens

    def expand_requests(self) -> Iterator[ExpandRequest]:
        """What each growing beam gets this round: several children at the start of a chunk, one within it."""
        r, chunk = self.request, self.chunk
        assert chunk is not None
        counts = {} if self.inside else {b.key: n for b, n in chunk.expansions}
        return_log_ratio = self.rule.needs_log_ratio and (r.search.guidance is not None or chunk.drafted)
        for beam in self.growing:
            if self.grows(beam):
                yield ExpandRequest(
                    beam,
                    counts.get(beam.key, 1),
                    self._tokens(beam),
                    r.sampling,
                    r.search.guidance,
                    r.draw_seed,
                    record=self.records,
                    return_log_ratio=return_log_ratio,
                    first=0 if self.inside else chunk.first,
                    keep=chunk.keep and not self.inside,
                    pause=chunk.pause,
                    until=r.search.chunk_until,
                    alternatives=r.alternatives,
                    thinking=r.search.thinking,
                    answer_tokens=self.answer_tokens,
                    stream=r.stride < QUANTUM,
                    drafter=None if r.search.speculation is None else r.search.speculation.value,
                    drafted=chunk.drafted,
                )

    def _tokens(self, beam: Beam) -> int:
        """How long ``beam`` may grow this round."""
        if self.answer_tokens is None or beam.answer_start is None:
            return self.round
        return min(self.round, self.answer_tokens - (len(beam.token_ids) - beam.answer_start))

    @property
    def answers(self) -> list[Hypothesis]:
        """What values read of the growing beams whose answer has begun."""
        return [answer_of(b, self.request.search.thinking) for b in self.growing if b.answer_start is not None]

    def scores(self, known: Mapping[int, float | ScoreFault]) -> Scores:
        """The scores of the growing beams, from those of :attr:`answers` by key; without an answer a beam is worse than all with one."""
        none = -math.inf if self.request.search.value is not None and any(b.answer_start is not None for b in self.growing) else 0.0
        return [known.get(b.key, 0.0) if b.answer_start is not None else none for b in self.growing]
