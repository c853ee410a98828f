"""Who is measured, each given the same prompts: the floor, the naive way, ours; vLLM's own sampling where it is installed.

Knows: how each is called and what it read. Must not know clocks of rounds, files, tables. An *answer* is what a user gets for one prompt:
the best of W·K hypotheses from naive and ours; from the floor and vLLM, which do not choose, all W·K samples together.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch

from ivg.bench.settings import Settings
from ivg.bench.shapes import networks
from ivg.errors import ConfigError, MissingDependencyError, ModelError
from ivg.model import GuidedModel
from ivg.types import Prompt

NAIVE = "naive.py"
"""Lies in benchmarks/ of a checkout, beside this file in an installed package."""


@dataclass(frozen=True)
class Outcome:
    """What a contestant delivered: answers, their tokens, seconds to the first text that stays, tokens that each model read."""

    answers: int
    tokens: int
    first: float
    forward_tokens: Mapping[str, int]


class Baseline(Protocol):
    """Answers prompts; keeps nothing between calls but its models."""

    def run(self, prompts: Sequence[Prompt], new_tokens: int, seed: int) -> Outcome:
        """Answers of exactly ``new_tokens`` tokens each."""


class Floor:
    """``generate`` of transformers: W·K plain samples of the base for each prompt, all in one batch.

    Nothing can be shown before the end, so the first text comes with the last.
    """

    def __init__(self, settings: Settings, model: GuidedModel) -> None:
        self.settings, self.network = settings, networks(model)["base"]

    def run(self, prompts: Sequence[Prompt], new_tokens: int, seed: int) -> Outcome:
        """See :class:`Baseline`."""
        begin, n = time.perf_counter(), self.settings.hypotheses
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
        if out.shape != (n * len(prompts), ids.shape[1] + new_tokens):
            raise ModelError(f"the floor made {tuple(out.shape)} tokens\n  expected {n * len(prompts)} rows of {ids.shape[1] + new_tokens}")
        out.tolist()  # waits for the device
        seconds = time.perf_counter() - begin
        return Outcome(len(prompts), len(prompts) * new_tokens, seconds, {"base": n * len(prompts) * (ids.shape[1] + new_tokens - 1)})


class Naive:
    """``benchmarks/naive.py``. Its first text is the first answer: nothing is shown before; each prompt's wait begins with its turn."""

    def __init__(self, settings: Settings, model: GuidedModel) -> None:
        self.settings, self.code = settings, naive_module()
        nets, s = networks(model), settings.resolved_method
        guides = (nets["tuned"], nets["untuned"]) if s.token else (None, None)
        self.models = self.code.Models(nets["base"], *guides, nets["value"] if s.select else None)

    def run(self, prompts: Sequence[Prompt], new_tokens: int, seed: int) -> Outcome:
        """See :class:`Baseline`."""
        torch.manual_seed(seed)
        s, temperature = self.settings.resolved_method, self.settings.temperature
        sizes = {"width": s.width, "successors": s.successors, "chunk": s.chunk_length, "beta": s.beta, "temperature": temperature}
        answers = [self.code.answer(self.models, p.token_ids, new_tokens=new_tokens, **sizes) for p in prompts]
        read: Counter[str] = sum((a.forward_tokens for a in answers), Counter())
        if "value" in read:
            read["explicit"] = read.pop("value")  # as ours calls it
        tokens = sum(len(a.token_ids) for a in answers)
        return Outcome(len(prompts), tokens, statistics.median(a.seconds for a in answers), dict(read))


class Ours:
    """``GuidedModel``, any method. First text: what all live hypotheses of a prompt share, the median over prompts."""

    def __init__(self, settings: Settings, model: GuidedModel) -> None:
        self.settings, self.model = settings, model

    def run(self, prompts: Sequence[Prompt], new_tokens: int, seed: int) -> Outcome:
        """See :class:`Baseline`."""
        begin, s = time.perf_counter(), self.settings
        sampling: dict[str, Any] = {"temperature": s.temperature, "max_new_tokens": new_tokens, "ignore_eos": True}
        searcher = self.model.searcher(s.max_beams)
        for prompt in prompts:
            searcher.add(self.model.request(prompt, s.resolved_method, seed=seed, **sampling))
        first: dict[int, float] = {}
        read: Counter[str] = Counter()
        tokens = 0
        while searcher.busy:
            for step in searcher.step():
                if step.committed or step.completion:
                    first.setdefault(step.request, time.perf_counter() - begin)
                if step.completion is not None:
                    if step.completion.error:
                        raise ModelError(f"ours failed: {step.completion.error}")
                    read.update(step.completion.usage.forward_tokens)
                    tokens += len(step.completion.token_ids)
        return Outcome(len(prompts), tokens, statistics.median(first.values()), dict(read))


class VLLM:
    """vLLM's plain sampling of the base, W·K samples for each prompt: the floor of a server. Needs vLLM."""

    def __init__(self, settings: Settings, model: GuidedModel) -> None:
        try:
            import vllm
        except ImportError:
            raise MissingDependencyError("the contestant vllm needs vLLM\n  pip install vllm, or --contestants floor,naive,ours") from None
        self.settings, self.vllm = settings, vllm
        self.folder = tempfile.TemporaryDirectory()
        network: Any = networks(model)["base"]
        network.save_pretrained(self.folder.name)
        model.base.tokenizer.save_pretrained(self.folder.name)
        dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
        self.llm = vllm.LLM(self.folder.name, dtype=dtype, gpu_memory_utilization=0.4, seed=settings.seed)

    def run(self, prompts: Sequence[Prompt], new_tokens: int, seed: int) -> Outcome:
        """See :class:`Baseline`."""
        begin, n = time.perf_counter(), self.settings.hypotheses
        params = self.vllm.SamplingParams(n=n, temperature=self.settings.temperature, max_tokens=new_tokens, ignore_eos=True, seed=seed)
        self.llm.generate([{"prompt_token_ids": list(p.token_ids or ())} for p in prompts], params, use_tqdm=False)
        length = len(prompts[0].token_ids or ())
        read = len(prompts) * (length + n * (new_tokens - 1))  # a prompt is read once, its samples share it
        return Outcome(len(prompts), len(prompts) * new_tokens, time.perf_counter() - begin, {"base": read})


def contestant(name: str, settings: Settings, model: GuidedModel) -> Baseline:
    """The contestant called ``name`` over the networks of ``model``."""
    kinds: dict[str, Any] = {"floor": Floor, "naive": Naive, "ours": Ours, "vllm": VLLM}
    return kinds[name](settings, model)


def naive_module(places: Sequence[Path] | None = None) -> ModuleType:
    """The code of ``benchmarks/naive.py``.

    Raises:
        ConfigError: it lies neither in a checkout around this file nor in the installed package.
    """
    here = Path(__file__).parent
    places = [here.parents[2] / "benchmarks" / NAIVE, here / NAIVE] if places is None else places
    found = next((p for p in places if p.exists()), None)
    if found is None:
        raise ConfigError(
            f"no {NAIVE} at {' or '.join(map(str, places))}\n  run from a checkout, reinstall the package, or --contestants floor,ours"
        )
    spec = importlib.util.spec_from_file_location("ivg_naive", found)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ivg_naive"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module
