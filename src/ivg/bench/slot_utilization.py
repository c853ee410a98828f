"""Tokens lost to waiting: places for hypotheses that stand idle while requests wait for them.

Every round of the loop makes all live hypotheses some tokens longer; the engine's passes of a round are as many as the longest of them
grows. A *place* is one hypothesis in one pass; there are ``max_beams`` of them. It is lost when no hypothesis grows by a token there:
it had ended, its request wanted no more, or nobody was let in. Counted by looking at what the engine is asked for and gives back, so
whatever the engine does inside is taken as it is. Sizes of models play no part. Must not know tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ivg.bench.settings import Settings
from ivg.errors import ConfigError
from ivg.types import Beam, Engine, ExpandRequest, Prompt, SamplingParams, TokenGuidance
from ivg.utils.rng import mix


@dataclass
class Count:
    """Places in all passes and tokens that grew in them."""

    places: int = 0
    tokens: int = 0

    @property
    def lost(self) -> float:
        """Share of the places in which no token grew."""
        return 1 - self.tokens / self.places if self.places else 0.0


class CountingEngine:
    """An engine that counts for each round: ``waiting`` while some request stands in the queue, ``draining`` after that."""

    def __init__(self, engine: Engine, places: int) -> None:
        self.engine, self.places = engine, places
        self.name, self.vocabulary, self.unsupported = engine.name, engine.vocabulary, engine.unsupported
        self.searcher: Any = None
        self.waiting, self.draining = Count(), Count()

    def open(self, prompt: Prompt, sampling: SamplingParams) -> Beam:
        """As the engine does."""
        return self.engine.open(prompt, sampling)

    def prompt_tokens(self, prompt: Prompt) -> int:
        """As the engine does."""
        return self.engine.prompt_tokens(prompt)

    def check(self, guidance: TokenGuidance | None) -> None:
        """As the engine does."""
        self.engine.check(guidance)

    def release(self, keys: Sequence[int]) -> None:
        """As the engine does."""
        self.engine.release(keys)

    def extend(self, orders: Sequence[ExpandRequest]) -> list[list[Beam]]:
        """As the engine does, counted."""
        families = self.engine.extend(orders)
        grown = [len(b.token_ids) - len(o.beam.token_ids) for o, family in zip(orders, families, strict=True) for b in family]
        count = self.waiting if self.searcher.waiting_requests else self.draining
        count.places += self.places * max(grown, default=0)
        count.tokens += sum(grown)
        return families


def lengths(count: int, least: int, most: int, seed: int) -> list[int]:
    """``count`` answer lengths from ``least`` to ``most``, spread evenly, in an order that the seed decides."""
    even = [least + round(i * (most - least) / max(1, count - 1)) for i in range(count)]
    return [even[i] for i in sorted(range(count), key=lambda i: mix(seed, i))]


def measure(settings: Settings, requests: int = 64, least: int = 16, most: int = 128) -> dict[str, Any]:
    """``lost`` while requests wait, ``lost_with_end`` over everything, and what they were counted from.

    Args:
        settings: method, sizes, ``max_beams``, ``prompt_tokens``; of the models the tiny shape would do.
        requests: how many.
        least: tokens of the shortest answer.
        most: tokens of the longest.

    Raises:
        ConfigError: all requests fit in at once, so nobody waits.
    """
    from ivg.bench.shapes import build, prompts
    from ivg.search.searcher import Searcher

    model = build(settings.shape, settings.guide, dtype=settings.dtype, device=settings.device, seed=settings.seed)
    engine = CountingEngine(model.engine, settings.max_beams)
    searcher = engine.searcher = Searcher(engine, settings.max_beams)
    texts = prompts(model.base.tokenizer, requests, settings.prompt_tokens, settings.seed)
    for text, tokens in zip(texts, lengths(requests, least, most, settings.seed), strict=True):
        searcher.add(
            model.request(text, settings.resolved_method, temperature=settings.temperature, max_new_tokens=tokens, ignore_eos=True)
        )
    while searcher.busy:
        searcher.step()
    waiting, draining = engine.waiting, engine.draining
    if not waiting.places:
        raise ConfigError(f"{requests} requests fit into {settings.max_beams} places at once: nobody waits\n  give more requests")
    both = Count(waiting.places + draining.places, waiting.tokens + draining.tokens)
    return {
        "lost": waiting.lost,
        "lost_with_end": both.lost,
        "places": waiting.places,
        "tokens": waiting.tokens,
        "places_with_end": both.places,
        "tokens_with_end": both.tokens,
        "requests": requests,
        "max_beams": settings.max_beams,
    }
