"""Settings of one benchmark. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ivg.search.methods import Method, get_method
from ivg.settings.bench import BASELINES as BASELINES
from ivg.settings.bench import BenchOptions
from ivg.settings.sampling import DEFAULT_SAMPLING

METHOD = "ivg"
"""Label of the method under test, beside the baselines."""


@dataclass(frozen=True, kw_only=True)
class BenchSettings(BenchOptions):
    """One benchmark: what is measured, and by which method; ``width``, ``successors`` and ``chunk_length``: None is the method's."""

    method: str = "ivg"
    width: int | None = None
    successors: int | None = None
    chunk_length: int | None = None
    temperature: float = DEFAULT_SAMPLING.temperature
    dtype: str = "auto"
    device: str | None = None
    seed: int = 0

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
