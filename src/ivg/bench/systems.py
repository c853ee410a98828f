"""The systems under test, each given the same prompts: the method in this package, and plain sampling as the baseline.

An answer is what a user gets for one prompt: the best of W·K beams from a method; from the baselines, which do not select, all W·K
samples together.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ivg.bench.settings import METHOD, BenchSettings
from ivg.bench.shapes import networks
from ivg.errors import MissingDependencyError, ModelError
from ivg.jobs.runner import LocalBackend, Task, TaskSettings
from ivg.model import GuidedModel
from ivg.types import Prompt, Step


@dataclass(frozen=True)
class RunOutput:
    """One run of a system.

    Attributes:
        answers: number of prompts answered.
        tokens: tokens of the answers; beams that were not selected do not count.
        first_text_seconds: time to the first text that is final, the median over prompts.
        forward_tokens: tokens read by each model.
    """

    answers: int
    tokens: int
    first_text_seconds: float
    forward_tokens: Mapping[str, int]


class System(Protocol):
    """Answers prompts; keeps nothing between calls but its models."""

    @property
    def networks(self) -> Sequence[nn.Module]:
        """Networks of this process, whose products are counted; empty where they run in another."""

    def run(self, prompts: Sequence[Prompt], new_tokens: int, seed: int) -> RunOutput:
        """Answer ``prompts`` with exactly ``new_tokens`` tokens each."""


class GuidedSearch:
    """The method under test, by :class:`~ivg.GuidedModel`."""

    def __init__(self, settings: BenchSettings, model: GuidedModel) -> None:
        self.settings, self.model, self.networks = settings, model, [*networks(model).values()]

    def run(self, prompts: Sequence[Prompt], new_tokens: int, seed: int) -> RunOutput:
        """See :class:`System`. The first final text of a prompt is what all its beams have in common."""
        start, s = time.perf_counter(), self.settings
        first: dict[int, float] = {}

        def on_step(task: Task[int], step: Step) -> None:
            if step.committed or step.completion:
                first.setdefault(task.source, time.perf_counter() - start)

        sampling = {"temperature": s.temperature, "max_new_tokens": new_tokens, "ignore_eos": True}
        backend = LocalBackend(self.model, TaskSettings(s.resolved_method, sampling, max_beams=s.max_beams), on_step)
        read: Counter[str] = Counter()
        tokens = 0
        for result in backend.run([Task(prompt, seed, 0, i) for i, prompt in enumerate(prompts)]):
            if result.completion is None:
                raise ModelError(f"{s.method} failed: {result.error}")
            read.update(result.completion.usage.forward_tokens)
            tokens += len(result.completion.token_ids)
        return RunOutput(len(prompts), tokens, statistics.median(first.values()), dict(read))


class HFSampling:
    """transformers' ``generate``: W·K samples of the base model for each prompt, all prompts in one batch."""

    def __init__(self, settings: BenchSettings, model: GuidedModel) -> None:
        self.settings, self.network = settings, networks(model)["base"]
        self.networks = [self.network]

    def run(self, prompts: Sequence[Prompt], new_tokens: int, seed: int) -> RunOutput:
        """See :class:`System`. No text is final before the end."""
        start, n = time.perf_counter(), self.settings.samples
        torch.manual_seed(seed)
        ids = torch.tensor([p.token_ids for p in prompts], device=next(self.network.parameters()).device)
        out = self.network.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=self.settings.temperature,
            top_k=0,
            top_p=1.0,
            num_return_sequences=n,
            max_new_tokens=new_tokens,
        )
        rows, length = n * len(prompts), ids.shape[1] + new_tokens
        if out.shape != (rows, length):
            raise ModelError(f"transformers' generate returned {tuple(out.shape)} tokens\n  expected {rows} rows of {length}")
        out.tolist()  # waits for the device
        return RunOutput(len(prompts), len(prompts) * new_tokens, time.perf_counter() - start, {"base": rows * (length - 1)})


class VLLMSampling:
    """vLLM: W·K samples of the base model for each prompt.

    Raises:
        MissingDependencyError: vLLM is not installed.
    """

    def __init__(self, settings: BenchSettings, model: GuidedModel) -> None:
        try:
            import vllm
        except ImportError:
            raise MissingDependencyError("the baseline vllm needs vLLM\n  pip install 'ivg[vllm]', or leave it out") from None
        self.settings, self.vllm = settings, vllm
        self.networks: list[nn.Module] = []  # they run in a process of vLLM's
        self.folder = tempfile.TemporaryDirectory()
        network: Any = networks(model)["base"]
        network.save_pretrained(self.folder.name)
        model.base.tokenizer.save_pretrained(self.folder.name)
        dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
        self.llm = vllm.LLM(self.folder.name, dtype=dtype, gpu_memory_utilization=0.4, seed=settings.seed)

    def run(self, prompts: Sequence[Prompt], new_tokens: int, seed: int) -> RunOutput:
        """See :class:`System`. No text is final before the end."""
        start, n = time.perf_counter(), self.settings.samples
        params = self.vllm.SamplingParams(n=n, temperature=self.settings.temperature, max_tokens=new_tokens, ignore_eos=True, seed=seed)
        self.llm.generate([{"prompt_token_ids": list(p.token_ids or ())} for p in prompts], params, use_tqdm=False)
        length = len(prompts[0].token_ids or ())
        read = len(prompts) * (length + n * (new_tokens - 1))  # a prompt is read once for all its samples
        return RunOutput(len(prompts), len(prompts) * new_tokens, time.perf_counter() - start, {"base": read})


Systems = Mapping[str, Callable[[BenchSettings, GuidedModel], System]]
SYSTEMS: Systems = {"transformers": HFSampling, "vllm": VLLMSampling, METHOD: GuidedSearch}
"""Name -> constructor over settings and models."""
