"""The selection rule of chunk-level beam search. Your own rules derive from :class:`SelectionRule` (``Search.make_rule``)."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

from ivg.search import ranking
from ivg.search.request import Request
from ivg.search.rule import Chunk, Scored, Selection, SelectionRule
from ivg.settings.search import SelectionFunction
from ivg.types.scores import exception_fault
from ivg.utils.rng import uniform

__all__ = ["BeamRule", "Chunk", "FunctionRule", "Scored", "Selection", "SelectionRule", "budgets", "unique"]


class BeamRule(SelectionRule):
    """CBS(W, K, L): the best W of all, or W drawn softly; with adaptive budgets where ``decay`` < 1."""

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

    def begin(self, kept: list[Scored]) -> Chunk:
        """At first all continuations of the prompt; then those of every kept beam, the best having the odd ones."""
        budget = self.budgets[min(self.chunks, len(self.budgets) - 1)]
        self.chunks += 1
        if self.chunks == 1:
            return Chunk([(kept[0][0], budget)], self.tokens)
        each, odd = divmod(budget, self.search.width)
        counts: dict[int, int] = {}
        for place, (b, _) in enumerate(kept):
            counts[b.key] = counts.get(b.key, 0) + each + (place < odd)
        growing = {b.key: b for b, _ in kept if not b.finished}
        expansions = [(b, counts[key]) for key, b in growing.items()]
        return Chunk(expansions, self.tokens, [(b, s) for b, s in kept if b.finished])

    def choose(self, held: list[Scored], grown: list[Scored]) -> Selection:
        """Keep W of the finished hypotheses kept before and the new ones."""
        search = self.search
        pool = [pair for pair in held for _ in range(search.successors if search.original else 1)] + grown
        if not search.original and search.rule == "top":
            pool = unique(pool)
        scores = [s for _, s in pool]
        if search.rule == "soft":
            seed, chunk = self.request.draw_seed, self.chunks
            chosen = ranking.soft(scores, search.width, search.soft_scale, lambda i: uniform(seed, chunk, i, 0x50F7))
        else:
            chosen = ranking.top(scores, search.width)
        kept = [pool[i] for i in chosen]
        keys = {b.key for b, _ in kept}
        dropped = [(b, s) for b, s in grown if b.key not in keys]
        answer = None
        if all(b.finished for b, _ in kept):
            answer = max(kept, key=lambda pair: pair[1]) if search.rule == "top" else kept[0]
        return Selection(kept, dropped, [b for b, _ in dropped], answer)


class FunctionRule(BeamRule):
    """A function of (beams, scores) selects: it gives the positions of those that are kept, the best first.

    The beams are those that were finished and kept before, then the children of this chunk; the scores are those of the selecting value, 0
    where there is none. A beam that is kept several times has as many times the children. When all that is kept is finished, the first is
    the answer.

    Args:
        function: see above. What it raises, and what it gives besides 1 to W positions, is the error of the request.
        request: what is answered.
    """

    def __init__(self, function: SelectionFunction, request: Request) -> None:
        super().__init__(request)
        self.function = function
        self.name = f"the rule {getattr(function, '__name__', type(function).__name__)}"

    def choose(self, held: list[Scored], grown: list[Scored]) -> Selection:
        """Keep what the function chooses."""
        pool, width = held + grown, self.search.width
        try:
            found = self.function([b for b, _ in pool], [s for _, s in pool])
            chosen = [operator.index(i) for i in found]
        except Exception as e:  # whatever a user's function raises, or gives
            return Selection(pool, [], [], error=exception_fault(self.name, e))
        if not 1 <= len(chosen) <= width or not all(0 <= i < len(pool) for i in chosen):
            return Selection(pool, [], [], error=f"{self.name} gave {chosen}: expected 1 to {width} positions among {len(pool)} beams")
        kept = [pool[i] for i in chosen]
        keys = {b.key for b, _ in kept}
        dropped = [(b, s) for b, s in grown if b.key not in keys]
        return Selection(kept, dropped, [b for b, _ in dropped], kept[0] if all(b.finished for b, _ in kept) else None)


def unique(pool: Sequence[Scored]) -> list[Scored]:
    """The first of each: identical hypotheses would otherwise fill several places."""
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
