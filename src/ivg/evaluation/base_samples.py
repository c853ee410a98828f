"""Base samples for every prompt and seed, and the best-of-N that they allow at the computation of each method.

Each method is compared with plain best-of-N at equal compute: the largest N, one for all prompts, whose mean FLOPs are at most the
method's. Its cost is N base samples after one reading of the prompt and, from N = 2, N readings by the value that selects: the
explicit value, else the reward model, else the implicit value. The gold reward never selects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from ivg.diagnostics.cost import classifier_names, flops
from ivg.errors import PromptError, ScoreFault
from ivg.evaluation.generate import run_batch
from ivg.evaluation.methods import SELECTION_VALUES
from ivg.evaluation.plan import GOLD
from ivg.evaluation.worker import Worker
from ivg.jobs.runner import Result
from ivg.models.head_reader import HeadReader
from ivg.types import Beam, Completion, Prompt, TokenCounter, new_key
from ivg.types.scores import Scores, require_scores, score_each
from ivg.utils.rounding import keep_digits
from ivg.values.explicit import ExplicitValue

if TYPE_CHECKING:
    from ivg.model import GuidedModel
    from ivg.types import Value

INDEX_STRIDE = 1 << 32
"""Sample n of a prompt has request index n * INDEX_STRIDE + position, so sample 0 is the answer of the base method."""


def selection_value(model: GuidedModel) -> tuple[str, Value] | None:
    """Name and value that best-of-N selects by."""
    return next(((name, model.values[name]) for name in SELECTION_VALUES if name in model.values), None)


def sample_rows(worker: Worker, label: str, positions: range) -> Iterator[dict[str, Any]]:
    """One row for each prompt and seed at ``positions``: all its base samples, with values and tokens read."""
    plan, model = worker.plan, worker.model
    size, items = plan.config.base_samples, list(plan.items(positions))
    selected_by = selection_value(model)
    max_new_tokens = plan.sampling.max_new_tokens
    errors = [_length_error(selected_by[1], e.prompt, max_new_tokens) if selected_by else None for _, _, e in items]
    valid = [item for item, error in zip(items, errors, strict=True) if error is None]
    requests = [(e.prompt, seed, position + n * INDEX_STRIDE) for seed, position, e in valid for n in range(size)]
    results = iter(run_batch(model, plan, plan.base_row, requests))
    for (seed, _, example), error in zip(items, errors, strict=True):
        row: dict[str, Any] = {"label": label, "seed": seed, "id": example.id, "prompt": example.prompt.plain}
        yield row | (_samples(model, selected_by, example.prompt, list(islice(results, size))) if error is None else _failed(error))


def _failed(error: str) -> dict[str, Any]:
    return {"samples": [], "error": " ".join(error.split())}


def _length_error(value: Value, prompt: Prompt, max_new_tokens: int) -> str | None:
    """Why the value cannot read this prompt with an answer; None if it can."""
    try:
        value.check(prompt, max_new_tokens)
    except PromptError as e:
        return str(e)
    return None


def _samples(model: GuidedModel, selected_by: tuple[str, Value] | None, prompt: Prompt, results: Sequence[Result[int]]) -> dict[str, Any]:
    """The columns of one prompt's samples; of the first error where one failed."""
    completions = [r.completion for r in results if r.completion is not None]
    if len(completions) < len(results):
        return _failed(next(r.error or "" for r in results if r.completion is None))
    name, value = selected_by if selected_by is not None else (None, None)
    beams = [_beam(model, prompt, c) for c in completions]
    scores: Scores = score_each(value, beams) if value is not None else [0.0] * len(beams)
    fault = next((s for s in scores if isinstance(s, ScoreFault)), None)
    if fault is not None:
        return _failed(fault)
    shared, own = sample_tokens(model, value, beams)
    if value is not None:
        value.release([b.key for b in beams])
    samples = [
        {"text": c.text, "tokens": len(c.token_ids), "value": keep_digits(score, 6), "forward_tokens": read}
        for c, score, read in zip(completions, require_scores(scores), own, strict=True)
    ]
    return {"selected_by": name, "shared_tokens": shared, "samples": samples}


def _beam(model: GuidedModel, prompt: Prompt, c: Completion) -> Beam:
    finish = None if c.finish_reason == "error" else c.finish_reason
    return Beam(new_key(), None, prompt, c.token_ids, c.text, finish, TokenCounter(), model.base.vocabulary, inherits=False)


def sample_tokens(model: GuidedModel, value: Value | None, beams: Sequence[Beam]) -> tuple[dict[str, int], list[dict[str, int]]]:
    """(prompt tokens, read once by each model; tokens that each model reads of every sample).

    Classifiers read the whole text for each sample. Computed from the texts: token counters also depend on what the caches held.
    """
    shared = {model.base.name: len(model.base.prompt_ids(beams[0].prompt))}
    own = [{model.base.name: max(0, len(b.token_ids) - 1)} for b in beams]
    if value is None:
        return shared, own
    for reader in value.cached_lms():
        scalar = isinstance(value, ExplicitValue) and value.head == "scalar"
        if isinstance(reader, HeadReader) and not scalar and reader.reads_as_source(beams[0].prompt, beams[0].prompt):
            continue  # the base has read what it needs
        last = 0 if scalar else 1  # the others read up to the last token but one
        for beam, counts in zip(beams, own, strict=True):
            ids, border = reader.ids(beam)
            shared[reader.name] = min(border, shared.get(reader.name, border))
            counts[reader.name] = len(ids) - last - border
    for name in classifier_names(value):
        for beam, counts in zip(beams, own, strict=True):
            counts[name] = beam.token_counter.forward_tokens[name]
    return shared, own


# Best-of-N


@dataclass(frozen=True)
class SampleGroup:
    """The samples of one prompt and seed.

    Attributes:
        values: what best-of-N selects by [samples].
        golds: gold rewards of the samples that some N selects; None for the others [samples].
        tokens: length of every sample [samples].
        flops: cost of best-of-N for N = 1, 2, … [samples].
        judged: as ``golds``, of the other judges.
    """

    id: str
    seed: int
    values: tuple[float, ...]
    golds: tuple[float | None, ...]
    tokens: tuple[int, ...]
    flops: tuple[float, ...]
    judged: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(self.values)

    def best(self, n: int) -> int:
        """Index of the sample that best-of-``n`` selects; the first among equals."""
        return max(range(n), key=lambda i: (self.values[i], -i))

    def reward(self, judge: str, n: int) -> float | None:
        """The judge's reward of best-of-``n``; None where it is not known."""
        rewards = self.golds if judge == GOLD else self.judged.get(judge)
        return rewards[self.best(n)] if rewards else None


def prefix_maxima(values: Sequence[float]) -> list[int]:
    """Indices of values that are greater than all before them; best-of-N selects one of these for every N."""
    out: list[int] = []
    for i, v in enumerate(values):
        if not out or v > values[out[-1]]:
            out.append(i)
    return out


def sample_group(
    row: Mapping[str, Any],
    golds: Mapping[int, float],
    sizes: Mapping[str, int],
    prompt_tokens: int | None = None,
    judged: Mapping[str, Mapping[int, float]] | None = None,
) -> SampleGroup:
    """A row of base samples with the rewards of its :func:`prefix_maxima`, and the cost of each N.

    Args:
        row: of the file of base samples.
        golds: gold rewards by index of the sample.
        sizes: parameters by model.
        prompt_tokens: prompt tokens that the base read for the base method, which shares the start of prompts within a batch; with it
            N = 1 costs exactly what the base method does. None: the whole prompt.
        judged: rewards of other judges, by judge and index of the sample.
    """
    samples = row["samples"]
    base = next(iter(row["shared_tokens"]))  # the value's readers follow it
    shared = row["shared_tokens"] if prompt_tokens is None else {**row["shared_tokens"], base: prompt_tokens}
    total, costs = flops(shared, sizes), []
    for sample in samples:
        total += flops(sample["forward_tokens"], sizes)
        costs.append(total)
    if samples:  # one sample needs no value
        costs[0] = flops({base: shared[base] + samples[0]["forward_tokens"][base]}, sizes)
    return SampleGroup(
        row["id"],
        row["seed"],
        tuple(s["value"] for s in samples),
        tuple(golds.get(i) for i in range(len(samples))),
        tuple(s["tokens"] for s in samples),
        tuple(costs),
        {judge: tuple(rewards.get(i) for i in range(len(samples))) for judge, rewards in (judged or {}).items()},
    )
