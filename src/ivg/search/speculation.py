"""Guided speculative chunks: a small model drafts K chunks, one of them is judged, and the base writes where it is refused.

With r the value of the response with a chunk and s = ``soft_scale``, each chunk of at most L tokens is made so:

1. The draft model writes K chunks. A draft counts x = r or, with ``tilt``, x = r + s * (log pi_base(chunk) - log pi_draft(chunk)), both
   as they are sampled (temperature and filters). One is drawn with probability proportional to exp(x / s).
2. It is kept with probability w(x - threshold): 1 from the threshold on and else 0, or the softer ``clip`` and ``sigmoid``.
3. Otherwise the base writes K chunks, and one is drawn with probability proportional to exp(r / s).

Reward-guided speculative decoding (RSD: Liao et al. 2025, arXiv 2501.19324) is K = 1 without tilt; its threshold is for rewards in [0, 1]
(0.7 in the authors' code). Guided speculative inference (GSI: Geuter et al. 2025, arXiv 2506.04118) has the tilt, with s = 1 / beta; the
drafts are then importance samples of the target pi_base(chunk) * exp(r / s). RSD never asks the base about a draft, so what is kept has the
draft model's distribution, given its value.

The base's chunks are numbered from 0, the drafts from K: where no draft is kept, K = 1 draws what plain sampling draws, and what the base
writes does not depend on the numbers that wrote the refused drafts.
"""

from __future__ import annotations

import math

from ivg.search import ranking
from ivg.search.request import Request, Speculation
from ivg.search.rule import Chunk, Scored, Selection, SelectionRule
from ivg.utils.rng import uniform

_DRAFT, _ACCEPT, _BASE = 0xD4AF7, 0xD4ACC, 0xD4BA5


def acceptance(settings: Speculation, value: float, threshold: float) -> float:
    """Probability that a draft of this ``value`` is kept."""
    x = (value - threshold) / settings.accept_scale
    if settings.acceptance == "threshold":
        return float(value >= threshold)
    if settings.acceptance == "clip":
        return min(1.0, max(0.0, x))
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


class SpeculationRule(SelectionRule):
    """One prefix, which drafts and, where they are refused, chunks of the base follow."""

    prompt_advice = "the threshold of drafts is the value of the prompt; give accept_threshold=…"

    def __init__(self, request: Request) -> None:
        assert request.search.speculation is not None
        self.request, self.settings = request, request.search.speculation
        self.needs_log_ratio = self.settings.tilt
        self.reads_prompt = self.settings.accept_threshold is None
        self.count = request.search.successors
        self.tokens = request.search.chunk_length or request.sampling.max_new_tokens
        self.drafting = False
        self.start = 0
        """Tokens of the prefix."""

    @property
    def rows(self) -> int:
        """The prefix and what follows it."""
        return self.count + 1

    def begin(self, kept: list[Scored]) -> Chunk:
        """Drafts behind the prefix, or what the base writes in place of refused ones."""
        self.drafting = not self.drafting
        prefix, _ = kept[0]
        self.start = len(prefix.token_ids)
        if self.drafting:
            return Chunk([(prefix, self.count)], self.tokens, kept, self.count, keep=True, drafted=True)
        return Chunk([(prefix, self.count)], self.tokens, keep=True)

    def choose(self, held: list[Scored], grown: list[Scored]) -> Selection:
        """Keep a draft or none; or one of the base's chunks."""
        if not self.drafting:
            return self._keep(grown[self._draw([s for _, s in grown], _BASE)], grown)
        (prefix,) = held
        ratios = [beam.log_ratio - prefix[0].log_ratio if self.settings.tilt else 0.0 for beam, _ in grown]
        values = [score + self.settings.soft_scale * ratio for (_, score), ratio in zip(grown, ratios, strict=True)]
        if max(values) > -math.inf:  # else the base would write none of them
            chosen = self._draw(values, _DRAFT)
            threshold = self.prompt_value if self.settings.accept_threshold is None else self.settings.accept_threshold
            if uniform(self.request.draw_seed, self.start, _ACCEPT) < acceptance(self.settings, values[chosen], threshold):
                self.drafting = False
                self.drafted_tokens += len(grown[chosen][0].token_ids) - self.start
                return self._keep(grown[chosen], grown)
        return Selection([prefix], grown, [beam for beam, _ in grown])

    def _draw(self, values: list[float], purpose: int) -> int:
        """One position, with probability proportional to exp(value / soft_scale)."""
        number = uniform(self.request.draw_seed, self.start, purpose)
        return ranking.soft(values, 1, self.settings.soft_scale, lambda _: number)[0]

    def _keep(self, winner: Scored, grown: list[Scored]) -> Selection:
        """``winner`` is the next prefix."""
        dropped = [pair for pair in grown if pair[0].key != winner[0].key]
        return Selection([winner], dropped, [beam for beam, _ in dropped], winner if winner[0].finished else None)
