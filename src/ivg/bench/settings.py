"""What is measured: one benchmark's settings, checked. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ivg.errors import ConfigError
from ivg.search.methods import Method, get_method

CONTESTANTS = ("floor", "naive", "ours", "vllm")
"""Who can be measured; ``vllm`` only where it is installed."""


@dataclass(frozen=True)
class Settings:
    """One benchmark.

    Attributes:
        shape: of the base (``bench.shapes``).
        guide: shape of guides and value; None: the usual one for the base.
        method: a named method, for ``ours``; the floor samples as many sequences as it has hypotheses.
        width: W; None: the method's.
        successors: K; None: the method's.
        chunk_length: L; None: the method's.
        prompts: how many.
        prompt_tokens: length of each.
        new_tokens: length of each answer; none ends earlier.
        temperature: of all contestants.
        dtype: ``auto``, ``float32``, ``bfloat16``, ``float16``.
        device: None: the best at hand.
        threads: of PyTorch; None: its own number.
        rounds: how often each contestant is measured.
        contestants: in the order of each round.
        naive_prompts: prompts for ``naive``, which takes one at a time; None: two at most.
        max_beams: hypotheses in flight at most, for ``ours``.
        seed: of weights, prompts and draws.
    """

    shape: str = "gpt2-small-16k"
    guide: str | None = None
    method: str = "ivg"
    width: int | None = None
    successors: int | None = None
    chunk_length: int | None = None
    prompts: int = 8
    prompt_tokens: int = 32
    new_tokens: int = 50
    temperature: float = 0.7
    dtype: str = "auto"
    device: str | None = None
    threads: int | None = None
    rounds: int = 5
    contestants: tuple[str, ...] = ("floor", "naive", "ours")
    naive_prompts: int | None = None
    max_beams: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompts", "prompt_tokens", "new_tokens", "rounds", "max_beams", "threads", "naive_prompts"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ConfigError(f"{name} must be at least 1, got {number}")
        unknown = [c for c in self.contestants if c not in CONTESTANTS]
        if unknown or not self.contestants or len(set(self.contestants)) < len(self.contestants):
            raise ConfigError(
                f"contestants {', '.join(self.contestants) or 'none'}\n  expected some of {', '.join(CONTESTANTS)}, each once"
            )
        if "naive" in self.contestants:
            self._check_naive()

    @property
    def resolved_method(self) -> Method:
        """The method with its sizes."""
        return get_method(self.method, width=self.width, successors=self.successors, chunk_length=self.chunk_length)

    @property
    def hypotheses(self) -> int:
        """W * K: what the floor samples for each prompt."""
        return self.resolved_method.width * self.resolved_method.successors

    @property
    def for_naive(self) -> int:
        """Prompts for ``naive``."""
        return min(self.prompts, self.naive_prompts or 2)

    @property
    def provenance(self) -> dict[str, Any]:
        """All that a measurement depends on; the number of rounds is none of it."""
        return {k: v for k, v in asdict(self).items() if k != "rounds"}

    @property
    def title(self) -> str:
        """In a few words."""
        s = self.resolved_method
        sizes = f"W={s.width} K={s.successors} L={s.chunk_length or 'all'}"
        return f"{self.shape}, {self.method} {sizes}, {self.prompts} prompts × {self.new_tokens} new tokens"

    def _check_naive(self) -> None:
        """Raise where the naive rival knows no such method."""
        s = self.resolved_method
        plain = Method(
            s.name,
            s.summary,
            width=s.width,
            successors=s.successors,
            chunk_length=s.chunk_length,
            token=s.token,
            select=s.select,
            beta=s.beta,
        )
        if s != plain or s.token not in (None, "implicit") or s.select not in (None, "explicit"):
            left = ",".join(c for c in self.contestants if c != "naive") or "ours"
            raise ConfigError(
                f"the naive rival guides tokens by the implicit value and selects by the explicit one, or leaves either out; got "
                f"{s.name}\n  measure without it: --contestants {left}"
            )


def from_mapping(given: Mapping[str, Any]) -> Settings:
    """Settings from options; those that are None keep their default."""
    known = {k: v for k, v in given.items() if v is not None}
    if "contestants" in known:
        known["contestants"] = tuple(known["contestants"])
    return Settings(**known)
