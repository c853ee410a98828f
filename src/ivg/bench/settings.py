"""Settings of one benchmark. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ivg.errors import ConfigError
from ivg.search.methods import Method, get_method

BASELINES = ("transformers", "vllm")
"""Plain sampling of the base model by transformers' ``generate``, and by vLLM where it is installed."""

METHOD = "ivg"
"""Label of the method under test, beside the baselines."""


@dataclass(frozen=True)
class BenchSettings:
    """One benchmark.

    Attributes:
        shape: shape of the base model (:data:`ivg.bench.shapes.SHAPES`).
        guide: shape of guides and value; None: the usual one for the base.
        method: name of the method to measure.
        width: beams W; None: the method's default.
        successors: successors of each beam K; None: the method's default.
        chunk_length: tokens between selections L; None: the method's default.
        prompts: number of prompts.
        prompt_tokens: tokens of each prompt.
        new_tokens: tokens of each answer; none ends earlier.
        temperature: of the method and the baselines.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        device: None: the best available.
        threads: PyTorch threads; None: PyTorch's default.
        rounds: measurements of the method and of each baseline.
        baselines: some of :data:`BASELINES`, in the order in which each round runs them.
        max_beams: beams of all requests that run at once.
        seed: random seed of weights, prompts and sampling.

    Raises:
        ConfigError: a value out of range, an unknown baseline.
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
    baselines: tuple[str, ...] = ("transformers",)
    max_beams: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompts", "prompt_tokens", "new_tokens", "rounds", "max_beams", "threads"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ConfigError(f"{name} must be at least 1, got {number}")
        if set(self.baselines) - set(BASELINES) or len(set(self.baselines)) < len(self.baselines):
            raise ConfigError(f"baselines {', '.join(self.baselines)}\n  expected some of {', '.join(BASELINES)}, each once")

    @property
    def resolved_method(self) -> Method:
        """The method with its sizes.

        Raises:
            ConfigError: unknown method, or sizes that it does not take.
        """
        return get_method(self.method, width=self.width, successors=self.successors, chunk_length=self.chunk_length)

    @property
    def samples(self) -> int:
        """W·K: the beams that the method expands for each prompt, and the samples that each baseline draws for it."""
        return self.resolved_method.width * self.resolved_method.successors

    @property
    def provenance(self) -> dict[str, Any]:
        """All settings that a measurement depends on; the number of rounds is none of them."""
        return {k: v for k, v in asdict(self).items() if k != "rounds"}

    @property
    def title(self) -> str:
        """Heading of the result table."""
        m = self.resolved_method
        sizes = f"W={m.width} K={m.successors} L={m.chunk_length or 'all'}"
        return f"{self.shape}, {self.method} {sizes}, {self.prompts} prompts × {self.new_tokens} new tokens"


def from_mapping(given: Mapping[str, Any]) -> BenchSettings:
    """Settings from options; those that are None keep their default.

    Raises:
        ConfigError: see :class:`BenchSettings`.
    """
    return BenchSettings(**{k: v for k, v in given.items() if v is not None})
