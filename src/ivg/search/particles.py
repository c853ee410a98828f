"""A particle filter: draws from pi_base * exp(beta * V) / Z by weighted hypotheses (Zhao et al. 2024, arXiv 2404.17546).

N particles grow by chunks. With V_t the value after a chunk, a particle's weight is multiplied by

    exp(beta * (V_t - V_(t-1))) * product over the chunk's tokens of pi_base / pi_proposal,

both distributions as they are sampled from, temperature and filters included; so a guided proposal changes how well the
filter works and not what it converges to, as long as the proposal reaches every token that the base may draw (top-k, top-p,
min-p or candidates may take some away). V before the first chunk is 0: as a constant of the prompt it cancels. When the
effective sample size falls below a share of N, particles are resampled systematically and weights are equal again. A finished
particle stays as it is, its weight too. The answer is one particle drawn by weight: with N it converges to a draw from
the target, which the best particle does not. At temperature 0 all particles are the same. Z, the sum of the target's numerator over all
responses, is estimated by the product of the mean weights before each resampling and at the end, without bias (Del Moral 2004).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from ivg.search import ranking
from ivg.search.request import Request
from ivg.search.rule import Chunk, Scored, Selection, SelectionRule
from ivg.types import Particle, Posterior
from ivg.utils.rng import uniform

_RESAMPLE, _ANSWER = 0x5E5A, 0xA25


def normalised(log_weights: Sequence[float]) -> list[float]:
    """Weights that sum to 1; at least one must not be -inf."""
    top = max(log_weights)
    weights = [math.exp(w - top) for w in log_weights]
    total = sum(weights)
    return [w / total for w in weights]


def log_mean(log_weights: Sequence[float]) -> float:
    """The logarithm of the mean weight; at least one must not be -inf."""
    top = max(log_weights)
    return top + math.log(sum(math.exp(w - top) for w in log_weights) / len(log_weights))


def effective_size(weights: Sequence[float]) -> float:
    """(sum w)^2 / sum w^2, between 1 and their number (Kong 1992)."""
    return sum(weights) ** 2 / sum(w * w for w in weights)


class ParticleRule(SelectionRule):
    """N = W * K particles of one request."""

    needs_log_ratio = True

    def __init__(self, request: Request) -> None:
        assert request.search.particles is not None
        self.request, self.settings = request, request.search.particles
        self.count = request.search.width * request.search.successors
        self.chunks = 0
        self.log_z = 0.0
        """Log of the product of mean weights before each resampling."""
        self.log_weights: dict[int, list[float]] = {}
        """By key of the kept beams: one for each time that it is kept."""
        self._before: list[tuple[float, float, float]] = []
        """Log weight, value and log ratio before the chunk, of every particle that grows."""

    @property
    def rows(self) -> int:
        """All particles."""
        return self.count

    def begin(self, kept: list[Scored]) -> Chunk:
        """One child for each particle; particles that share a beam are siblings."""
        self.chunks += 1
        tokens = self.request.search.chunk_length or self.request.sampling.max_new_tokens
        if self.chunks == 1:
            self._before = [(0.0, 0.0, 0.0)] * self.count
            return Chunk([(kept[0][0], self.count)], tokens)
        growing = {b.key: (b, s) for b, s in kept if not b.finished}
        times = Counter(b.key for b, _ in kept)
        self._before = [(w, s, b.log_ratio) for key, (b, s) in growing.items() for w in self.log_weights[key]]
        return Chunk([(b, times[key]) for key, (b, _) in growing.items()], tokens, [(b, s) for b, s in kept if b.finished])

    def choose(self, held: list[Scored], grown: list[Scored]) -> Selection:
        """Update the weights, and resample when few particles have most of the weight."""
        taken = {key: iter(weights) for key, weights in self.log_weights.items()}
        log_weights = [next(taken[b.key]) for b, _ in held]
        for (beam, value), (weight, before, ratio) in zip(grown, self._before, strict=True):
            if weight > -math.inf:  # what has no weight never has any again
                weight += self.settings.particle_beta * (value - before) + beam.log_ratio - ratio
                if math.isnan(weight) or (math.isinf(weight) and math.isfinite(value) and math.isfinite(beam.log_ratio)):
                    told = f"particle_beta={self.settings.particle_beta:g} times values of {before:g} and {value:g} is no finite weight"
                    return Selection(held + grown, [], [], error=f"{told}: lower particle_beta, or scale the value")
            log_weights.append(weight)
        particles = held + grown
        if max(log_weights) == -math.inf:
            advice = "switch top_k, top_p and min_p off, or lower beta"
            return Selection(particles, [], [], error=f"every particle drew a token that the base alone never draws: {advice}")
        weights = normalised(log_weights)
        seed = self.request.draw_seed
        chosen = list(range(self.count))
        unfinished = not all(b.finished for b, _ in particles)
        if unfinished and effective_size(weights) < self.settings.resample_below * self.count:
            chosen = ranking.systematic(weights, self.count, uniform(seed, self.chunks, _RESAMPLE))
            self.log_z += log_mean(log_weights)
            log_weights, weights = [0.0] * self.count, [1 / self.count] * self.count
        kept = [particles[i] for i in chosen]
        answer = None
        if all(b.finished for b, _ in kept):  # without resampling just now, kept are the particles, in their order
            answer = kept[ranking.systematic(weights, 1, uniform(seed, self.chunks, _ANSWER))[0]]
            found = [Particle(b.text, b.token_ids, s, w, b.finish or "length") for (b, s), w in zip(kept, weights, strict=True)]
            self.posterior = Posterior(tuple(found), self.log_z + log_mean(log_weights))
        self.log_weights = {}
        for i in chosen:
            self.log_weights.setdefault(particles[i][0].key, []).append(log_weights[i])
        dropped = [(b, s) for b, s in grown if b.key not in self.log_weights]
        return Selection(kept, dropped, [b for b, _ in dropped], answer)
