"""Which beams grow next, and which of the grown are kept: the rule of a request, and the rule of beam search.

A rule sees hypotheses and their scores, never engines, values or other requests. One object serves one request, from its
first chunk to its last, and may remember what it likes between chunks; it draws from counters, so that nothing depends on
how chunks are cut into rounds (METHOD, sections 3, 4 and 6).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ivg.search import ranking
from ivg.search.request import Request, Scored
from ivg.types import Beam, EntropyStop
from ivg.utils.rng import uniform


@dataclass(frozen=True, slots=True)
class Chunk:
    """What grows next.

    Attributes:
        orders: beams and how many children each gets.
        tokens: length of the chunk at most.
        held: hypotheses that stay kept while others grow.
        first: number of the first child of each beam (``draws.child_rng_path``).
        keep: the beams will be extended again.
        pause: where the chunk ends early.
    """

    orders: list[tuple[Beam, int]]
    tokens: int
    held: list[Scored] = field(default_factory=list)
    first: int = 0
    keep: bool = False
    pause: EntropyStop | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """What a rule made of a grown chunk.

    Attributes:
        kept: the next ``kept``; may name a hypothesis several times.
        dropped: hypotheses that lost, to be shown.
        released: hypotheses that nobody needs any more.
        answer: the response, when nothing is left to grow.
        error: why there can be none.
    """

    kept: list[Scored]
    dropped: list[Scored]
    released: list[Beam]
    answer: Scored | None = None
    error: str | None = None


class SelectionRule(Protocol):
    """How one request chooses."""

    reads_prompt: bool
    """Wants :attr:`prompt_value`, the value of the empty response, before its first chunk."""
    needs_log_ratio: bool
    """Wants ``Beam.log_ratio`` where the proposal is guided."""
    prompt_value: float

    @property
    def rows(self) -> int:
        """Hypotheses in flight at most."""

    @property
    def spare(self) -> list[Beam]:
        """Hypotheses that the rule keeps besides ``kept``."""

    def begin(self, kept: list[Scored]) -> Chunk:
        """The next chunk; ``kept`` has at least one beam that is not finished."""

    def choose(self, held: list[Scored], grown: list[Scored]) -> Selection:
        """Among the hypotheses that were ``held`` and those that have ``grown``, in the order of the chunk's orders."""


class BeamRule:
    """CBS(W, K, L): the best W of all, or W drawn softly; with adaptive budgets where ``decay`` < 1."""

    reads_prompt = needs_log_ratio = False
    prompt_value = 0.0

    def __init__(self, request: Request) -> None:
        self.request, self.search = request, request.search
        limit = request.sampling.max_new_tokens
        self.tokens = self.search.chunk_length or limit
        chunks = math.ceil(limit / self.tokens)
        self.budgets = budgets(chunks, self.search.width * self.search.successors, self.search.decay, self.search.width)
        self.chunks = 0

    @property
    def rows(self) -> int:
        """Those of the largest budget, which is the first."""
        return self.budgets[0]

    @property
    def spare(self) -> list[Beam]:
        """None."""
        return []

    def begin(self, kept: list[Scored]) -> Chunk:
        """At first all continuations of the prompt; then those of every kept beam, the best having the odd ones."""
        budget = self.budgets[min(self.chunks, len(self.budgets) - 1)]
        self.chunks += 1
        if self.chunks == 1:
            return Chunk([(kept[0][0], budget)], self.tokens)
        each, odd = divmod(budget, self.search.width)
        orders = [(b, each + (place < odd)) for place, (b, _) in enumerate(kept) if not b.finished]
        return Chunk(orders, self.tokens, [(b, s) for b, s in kept if b.finished])

    def choose(self, held: list[Scored], grown: list[Scored]) -> Selection:
        """Keep W of the finished hypotheses kept before and the new ones."""
        search = self.search
        pool = [pair for pair in held for _ in range(search.successors if search.original else 1)] + grown
        if not search.original and search.rule == "top":
            pool = _merged(pool)
        scores = [s for _, s in pool]
        if search.rule == "soft":
            seed, position = self.request.draw_seed, max(len(b.token_ids) for b, _ in pool)
            chosen = ranking.soft(scores, search.width, search.soft_scale, lambda i: uniform(seed, position, i, 0x50F7))
        else:
            chosen = ranking.top(scores, search.width)
        kept = [pool[i] for i in chosen]
        keys = {b.key for b, _ in kept}
        dropped = [(b, s) for b, s in grown if b.key not in keys]
        answer = None
        if all(b.finished for b, _ in kept):
            answer = max(kept, key=lambda pair: pair[1]) if search.rule == "top" else kept[0]
        return Selection(kept, dropped, [b for b, _ in dropped], answer)


def _merged(pool: Sequence[Scored]) -> list[Scored]:
    """One of each: identical hypotheses would otherwise fill several places."""
    seen: dict[tuple[int, ...], Scored] = {}
    for beam, score in pool:
        seen.setdefault(beam.token_ids, (beam, score))
    return list(seen.values())


def budgets(chunks: int, each: int, decay: float, least: int = 1) -> list[int]:
    """How many continuations each chunk gets: geometric, whole numbers, ``chunks * each`` in all (AdaSearch, arXiv 2510.23334).

    Chunk i gets a share proportional to ``decay ** i``; where that falls below ``least``, ``least``, at the expense of
    the chunks before it. Fractions go to the chunks that lose most by rounding down, the earlier ones first.

    Args:
        chunks: how many there are.
        each: continuations for each chunk on the average.
        decay: in (0, 1]; 1 gives every chunk ``each``.
        least: for every chunk, at most ``each``.
    """
    shares = [decay**i for i in range(chunks)]
    free = chunks  # chunks from this one on get the least
    while free > 1 and shares[free - 1] * (chunks * each - least * (chunks - free)) < least * sum(shares[:free]):
        free -= 1
    total = chunks * each - least * (chunks - free)
    ideal = [total * share / sum(shares[:free]) for share in shares[:free]]
    out = [math.floor(x + 1e-9) for x in ideal]
    for i in sorted(range(free), key=lambda i: (out[i] - ideal[i], i))[: total - sum(out)]:
        out[i] += 1
    return out + [least] * (chunks - free)
