"""A bank of base samples for every prompt and seed, and what best-of-N would have made of them for the same FLOPs.

For every method the fair rival is plain best-of-N with as much computation: from the bank, the largest N, one for all prompts, that on
average costs no more than the method's answer: N base samples behind one reading of the prompt and, from N = 2 on, N readings by the
value; the best by the explicit value (else the reward model, else the implicit value). The gold reward never selects. Knows the bank's
file; must not know how it is shown.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from ivg.diagnostics.cost import classifiers, flops
from ivg.errors import PromptError, ScoreFault
from ivg.evaluation.methods import BANK, SELECTORS, MethodRow
from ivg.evaluation.plan import Plan
from ivg.evaluation.runner import Report, Worker, note, request, together
from ivg.model import cached_lms
from ivg.types import Beam, Completion, Prompt, TokenCounter, new_key
from ivg.types.scores import Scores, every, score_each
from ivg.utils import environment
from ivg.utils.jsonl import BlockFile

if TYPE_CHECKING:
    from ivg.model import GuidedModel
    from ivg.types import Value

STRIDE = 1 << 32
"""Sample n of a prompt has draw index n * STRIDE + position: sample 0 is the very answer of the base method."""


def fill(worker: Worker, done: Report) -> None:
    """All samples of the bank that are not there yet; one row for each prompt and seed."""
    p, path = worker.plan, worker.plan.transcripts(BANK)
    with environment.alone(path):
        file = BlockFile(path, p.block_of(BANK), p.total, p.provenance(BANK))
        done(BANK, min(file.rows, p.total))
        for positions in file.missing():
            worker.model.reset_caches()
            environment.reset_peak()
            began = time.perf_counter()
            rows = list(_samples(worker.model, p, positions))
            timing = {"label": BANK, "start": positions.start, "rows": len(rows), "seconds": round(time.perf_counter() - began, 4)}
            worker.sign("generate")
            file.append(rows)
            note(p.out / "timings.jsonl", {**timing, "peak_bytes": environment.peak_bytes()})
            done(BANK, len(rows))


def selector(model: GuidedModel) -> tuple[str, Value] | None:
    """The value by which best-of-N selects: explicit, else reward, else implicit."""
    return next(((name, model.values[name]) for name in SELECTORS if name in model.values), None)


def _samples(model: GuidedModel, p: Plan, positions: range) -> Iterator[dict[str, Any]]:
    size, items = p.config.bank, list(p.items(positions))
    chosen = selector(model)
    method = MethodRow(BANK, p.base.strategy)
    refused = [chosen and _too_long(chosen[1], example.prompt, p.sampling.max_new_tokens) for _, _, example in items]
    asked = [item for item, reason in zip(items, refused, strict=True) if not reason]
    requests = [request(model, p, method, seed, position, n * STRIDE) for seed, position, _ in asked for n in range(size)]
    outcomes = iter(together(model, requests))
    for (seed, _, example), reason in zip(items, refused, strict=True):
        group = [] if reason else list(islice(outcomes, size))
        row: dict[str, Any] = {"label": BANK, "seed": seed, "id": example.id, "prompt": example.prompt.plain}
        failed = reason or next((o for o in group if not isinstance(o, Completion)), None)
        if failed:
            yield row | {"samples": [], "error": failed}
            continue
        samples = [c for c in group if isinstance(c, Completion)]
        beams = [_beam(model, example.prompt, c) for c in samples]
        values: Scores = score_each(chosen[1], beams) if chosen else [0.0] * size
        if (fault := next((v for v in values if isinstance(v, ScoreFault)), None)) is not None:
            yield row | {"samples": [], "error": " ".join(fault.split())}
            continue
        shared, own = _reading(model, chosen[1] if chosen else None, beams)
        kept = [
            {"text": c.text, "tokens": len(c.token_ids), "value": round(v, 6), "forward_tokens": n}
            for c, v, n in zip(samples, every(values), own, strict=True)
        ]
        yield row | {"by": chosen[0] if chosen else None, "shared_tokens": shared, "samples": kept}
        if chosen:
            chosen[1].release([b.key for b in beams])


def _too_long(value: Value, prompt: Prompt, new_tokens: int) -> str | None:
    """Why the value cannot read this prompt and an answer to it; None: it can."""
    try:
        value.check(prompt, new_tokens)
    except PromptError as e:
        return " ".join(str(e).split())
    return None


def _beam(model: GuidedModel, prompt: Prompt, c: Completion) -> Beam:
    finish = None if c.finish_reason == "error" else c.finish_reason
    return Beam(new_key(), None, prompt, c.token_ids, c.text, finish, TokenCounter(), model.base.vocabulary, inherits=False)


def _reading(model: GuidedModel, value: Value | None, beams: Sequence[Beam]) -> tuple[dict[str, int], list[dict[str, int]]]:
    """(tokens of the prompt, read once by each model; what each reads of every sample). A classifier reads the whole text anew.

    From the texts rather than from meters, which depend on what else happened to be in the caches.
    """
    shared = {model.base.name: len(model.base.prompt_ids(beams[0].prompt))}
    own = [{model.base.name: max(0, len(b.token_ids) - 1)} for b in beams]
    for reader in cached_lms(value):
        last = 0 if getattr(value, "head", None) == "scalar" else 1  # the others read up to the last token but one
        for beam, counts in zip(beams, own, strict=True):
            ids, border = reader.ids(beam)
            shared[reader.name] = min(border, shared.get(reader.name, border))
            counts[reader.name] = len(ids) - last - border
    for classifier in classifiers(value):
        for beam, counts in zip(beams, own, strict=True):
            counts[classifier.name] = beam.token_counter.forward_tokens[classifier.name]
    return shared, own


# Best-of-N


@dataclass(frozen=True)
class Group:
    """The samples of one prompt and seed.

    Attributes:
        values: by which they are compared, [samples].
        golds: rewards of those that are the best so far; None for the others, which no N selects.
        tokens: of every sample.
        flops: of the best of the first N, [samples]: N samples behind one prompt and, from N = 2 on, their readings.
    """

    id: str
    seed: int
    values: tuple[float, ...]
    golds: tuple[float | None, ...]
    tokens: tuple[int, ...]
    flops: tuple[float, ...]

    @property
    def size(self) -> int:
        """Samples."""
        return len(self.values)

    def best(self, n: int) -> int:
        """Which of the first ``n`` is selected; the first among equals."""
        return max(range(n), key=lambda i: (self.values[i], -i))


def prefix_maxima(values: Sequence[float]) -> list[int]:
    """Places of values that are greater than all before them: best-of-N selects among these for every N."""
    out: list[int] = []
    for i, v in enumerate(values):
        if not out or v > values[out[-1]]:
            out.append(i)
    return out


def group(row: Mapping[str, Any], golds: Mapping[int, float], sizes: Mapping[str, int], prompt_tokens: int | None = None) -> Group:
    """A bank row with the rewards of its :func:`prefix_maxima`, and what each N costs.

    Args:
        row: of the bank.
        golds: by the sample's place.
        sizes: parameters by model.
        prompt_tokens: that the base read of the prompt in the batch of the base method, whose cost is so that of N = 1: what prompts
            of a batch share is read once there, as in every method. None: all of it.
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
    return Group(
        row["id"],
        row["seed"],
        tuple(s["value"] for s in samples),
        tuple(golds.get(i) for i in range(len(samples))),
        tuple(s["tokens"] for s in samples),
        tuple(costs),
    )
