"""Idle slots: the share of beam slots that generate no token while requests are waiting.

Each search step extends all running beams by some tokens, in as many forward passes as the longest extension has tokens. A *slot* is one
beam in one pass; there are ``max_beams`` of them. A slot is idle if no token is generated in it: the beam had ended, its request needed
no more, or no request was admitted. Counted from the inputs and outputs of the engine; the sizes of the models do not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ivg.bench.settings import BenchSettings
from ivg.bench.shapes import build_model, make_prompts
from ivg.errors import ConfigError
from ivg.types import Beam, ExpandRequest
from ivg.utils.rng import mix


@dataclass
class SlotCount:
    """Slots in all passes, and the tokens generated in them."""

    slots: int = 0
    tokens: int = 0

    @property
    def idle(self) -> float:
        """Share of the slots in which no token was generated."""
        return 1 - self.tokens / self.slots if self.slots else 0.0


class SlotCounter:
    """Counts the slots of a searcher's engine, in place of whose ``extend`` it puts its own.

    Attributes:
        waiting: steps while requests were in the queue.
        draining: steps after the last request was admitted.
    """

    def __init__(self, searcher: Any, max_beams: int) -> None:
        self.searcher, self.max_beams, self._extend = searcher, max_beams, searcher.engine.extend
        self.waiting, self.draining = SlotCount(), SlotCount()
        searcher.engine.extend = self.extend

    def extend(self, requests: Sequence[ExpandRequest]) -> list[list[Beam]]:
        """Extend beams as the engine does, and count."""
        families = self._extend(requests)
        grown = [len(b.token_ids) - len(r.beam.token_ids) for r, family in zip(requests, families, strict=True) for b in family]
        count = self.waiting if self.searcher.waiting_requests else self.draining
        count.slots += self.max_beams * max(grown, default=0)
        count.tokens += sum(grown)
        return families


def answer_lengths(count: int, least: int, most: int, seed: int) -> list[int]:
    """``count`` lengths from ``least`` to ``most``, evenly spaced, shuffled by ``seed``."""
    even = [least + round(i * (most - least) / max(1, count - 1)) for i in range(count)]
    return [even[i] for i in sorted(range(count), key=lambda i: mix(seed, i))]


def measure(settings: BenchSettings, requests: int = 64, least: int = 16, most: int = 128) -> dict[str, Any]:
    """Idle shares: ``idle`` while requests wait, ``idle_with_end`` over the whole run, and the counts behind them.

    Args:
        settings: method, sizes, ``max_beams``, ``prompt_tokens``; the tiny shape suffices.
        requests: number of requests.
        least: tokens of the shortest answer.
        most: tokens of the longest answer.

    Raises:
        ConfigError: all requests fit at once, so none waits.
    """
    s = settings
    model = build_model(s.shape, s.guide, dtype=s.dtype, device=s.device, seed=s.seed)
    searcher = model.searcher(s.max_beams)
    counter = SlotCounter(searcher, s.max_beams)
    texts = make_prompts(model.base.tokenizer, requests, s.prompt_tokens, s.seed)
    for text, tokens in zip(texts, answer_lengths(requests, least, most, s.seed), strict=True):
        searcher.add(model.request(text, s.resolved_method, temperature=s.temperature, max_new_tokens=tokens, ignore_eos=True))
    while searcher.busy:
        searcher.step()
    waiting, draining = counter.waiting, counter.draining
    if not waiting.slots:
        raise ConfigError(f"{requests} requests fit into {s.max_beams} slots at once: none waits\n  give more requests")
    both = SlotCount(waiting.slots + draining.slots, waiting.tokens + draining.tokens)
    return {
        "idle": waiting.idle,
        "idle_with_end": both.idle,
        "slots": waiting.slots,
        "tokens": waiting.tokens,
        "slots_with_end": both.slots,
        "tokens_with_end": both.tokens,
        "requests": requests,
        "max_beams": s.max_beams,
    }
