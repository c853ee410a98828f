"""The state of one request while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from ivg.search.request import Request
from ivg.search.rule import Chunk, Scored, SelectionRule
from ivg.types import Beam, Step, TokenCounter


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

    @property
    def records(self) -> bool:
        """Are guidance shifts and pieces of text recorded for every token?"""
        return self.request.trace or self.request.record
