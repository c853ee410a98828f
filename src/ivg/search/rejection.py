"""CARDS: a response grows by segments, each proposed until one is accepted (Li et al. 2024, arXiv 2406.16306).

A segment ends where the base is uncertain about the next token, so that values score units of meaning. With
t the tokens of the response up to the segment's end and n the most it may have, the segment is accepted with probability

    min(1, exp((V - threshold(t)) / accept_scale)),   threshold(t) = r0 + min(1, t / n) * (r* - r0),   r0 = (1 - a) * V(prompt) + a * r*.

After ``tries`` rejections in one place the best of the rejected segments is taken (the earliest among equals). V(prompt) is
the value of the empty response. A vocabulary head, trained on responses, has it from a position before them, and has none for
a prompt of a single token: such a request ends with an error, unless a = 1 and r* is given, when V(prompt) is not needed.
"""

from __future__ import annotations

import math

from ivg.search.request import Rejection, Request
from ivg.search.rule import Chunk, Scored, Selection, SelectionRule
from ivg.types import Beam, EntropyStop
from ivg.utils.rng import uniform

_ACCEPT = 0xCA2D5


def threshold(settings: Rejection, prompt_value: float, tokens: int, limit: int) -> float:
    """The value that a response of ``tokens`` of at most ``limit`` tokens must have to be accepted for certain."""
    target = settings.target
    if target is None:
        target = prompt_value + settings.accept_scale * math.log(settings.tries)
    start = (1 - settings.threshold_start) * prompt_value + settings.threshold_start * target
    return start + min(1.0, tokens / limit) * (target - start)


def acceptance(settings: Rejection, value: float, threshold: float) -> float:
    """Probability that a segment is accepted."""
    return math.exp(min(0.0, (value - threshold) / settings.accept_scale))


class RejectionRule(SelectionRule):
    """One prefix, which is kept while segments behind it are tried."""

    prompt_advice = "cards starts from the value of the prompt; target=… with threshold_start=1 needs none"

    def __init__(self, request: Request) -> None:
        assert request.search.rejection is not None
        self.request, self.settings = request, request.search.rejection
        self.reads_prompt = self.settings.target is None or self.settings.threshold_start < 1
        self.limit = request.sampling.max_new_tokens
        self.tried = 0
        self.best: Scored | None = None

    @property
    def rows(self) -> int:
        """Prefix, segment, and the best segment so far."""
        return 3

    @property
    def retained(self) -> list[Beam]:
        """The best of the rejected."""
        return [] if self.best is None else [self.best[0]]

    def begin(self, kept: list[Scored]) -> Chunk:
        """One more segment behind the prefix."""
        prefix, _ = kept[0]
        pause = EntropyStop(self.settings.segment_entropy, len(prefix.token_ids) + self.settings.segment_min)
        return Chunk([(prefix, 1)], self.request.search.chunk_length or self.limit, kept, self.tried, keep=True, pause=pause)

    def choose(self, held: list[Scored], grown: list[Scored]) -> Selection:
        """Accept the segment, or try again."""
        (tried,), (prefix,) = grown, held
        length, number = len(prefix[0].token_ids), self.tried
        self.tried += 1
        wanted = threshold(self.settings, self.prompt_value, len(tried[0].token_ids), self.limit)
        if uniform(self.request.draw_seed, length, number, _ACCEPT) < acceptance(self.settings, tried[1], wanted):
            return self._accept(tried, self.retained, [])
        loser = self.best
        if loser is None or tried[1] > loser[1]:
            self.best = tried
        else:
            loser = tried
        released = [] if loser is None else [loser[0]]
        if self.tried == self.settings.tries:
            assert self.best is not None
            return self._accept(self.best, released, [] if self.best is tried else [tried])
        return Selection([prefix], [tried], released)

    def _accept(self, winner: Scored, released: list[Beam], dropped: list[Scored]) -> Selection:
        """``winner`` is the next prefix."""
        self.tried, self.best = 0, None
        return Selection([winner], dropped, released, winner if winner[0].finished else None)
