"""The settings of ``ivg bench`` besides those of search, sampling and run. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ivg.errors import ConfigError
from ivg.settings import rules as r
from ivg.settings.schema import Setting, validate
from ivg.settings.search import MAX_BEAMS

BASELINES = ("transformers", "vllm")
"""Plain sampling of the base model by transformers' ``generate``, and by vLLM where it is installed."""

_COUNT = r.count(1)


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is measured.

    Raises:
        ConfigError: a value out of range, an unknown baseline.
    """

    shape: Annotated[
        str,
        Setting(
            "Shape of the base model: gpt2-small, gpt2-large, gpt2-small-16k, llama-1b, llama-7b, lfm2-120m, qwen3.5-120m, embedded …",
            flags=("--shape",),
        ),
    ] = "gpt2-small-16k"
    guide: Annotated[
        str | None, Setting("Shape of guides and value: guide-17m …", flags=("--guide",), unset="the usual one for the base")
    ] = None
    prompts: Annotated[int, Setting("Number of prompts.", _COUNT, flags=("--prompts",))] = 8
    prompt_tokens: Annotated[int, Setting("Tokens of each prompt.", _COUNT, flags=("--prompt-tokens",))] = 32
    new_tokens: Annotated[int, Setting("Tokens of each answer; none ends earlier.", _COUNT, flags=("--new-tokens",))] = 50
    threads: Annotated[
        int | None, Setting("PyTorch threads.", r.count(1, optional=True), flags=("--threads",), unset="PyTorch's default")
    ] = None
    rounds: Annotated[int, Setting("Measurements of the method and of each baseline.", _COUNT, flags=("--rounds",))] = 5
    baselines: Annotated[
        tuple[str, ...],
        Setting(
            "Plain sampling to compare with: transformers, vllm, with commas between them; or none.",
            flags=("--baselines",),
            accepts=str,
            unset="transformers",
        ),
    ] = ("transformers",)
    max_beams: Annotated[int, Setting("Beams (W*K of each) of all requests that run at once.", _COUNT, flags=("--max-beams",))] = MAX_BEAMS

    def __post_init__(self) -> None:
        validate(self)
        if set(self.baselines) - set(BASELINES) or len(set(self.baselines)) < len(self.baselines):
            raise ConfigError(f"baselines {', '.join(self.baselines)}\n  expected some of {', '.join(BASELINES)}, each once")
