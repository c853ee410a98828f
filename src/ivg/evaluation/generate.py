"""Stage 1 of an evaluation: every method answers every prompt.

Each label has one :class:`~ivg.utils.jsonl.BlockFile`. A block is computed with empty caches from its own seeds, so a resumed run
writes the same bytes as an uninterrupted one. Seconds and memory go to ``timings.jsonl`` only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ivg.errors import PromptError
from ivg.evaluation.methods import MethodRow
from ivg.evaluation.plan import EvalPlan
from ivg.evaluation.worker import OnProgress, Worker, append_log
from ivg.types import Completion
from ivg.utils import environment
from ivg.utils.jsonl import BlockFile

if TYPE_CHECKING:
    from ivg.model import GuidedModel
    from ivg.search.searcher import Request

Row = dict[str, Any]
MakeRows = Callable[[Worker, str, range], Iterable[Row]]
"""From a worker, a label and positions to the rows of one block."""


def generate(worker: Worker, label: str, make_rows: MakeRows, on_progress: OnProgress) -> None:
    """Write all rows of one label that are missing."""
    plan, path = worker.plan, worker.plan.transcripts(label)
    with environment.alone(path):
        file = BlockFile(path, plan.block_size(label), plan.total, plan.provenance(label))
        on_progress(label, min(file.rows, plan.total))
        for positions in file.missing():
            worker.model.reset_caches()
            environment.reset_peak()
            start = time.perf_counter()
            rows = list(make_rows(worker, label, positions))
            seconds = time.perf_counter() - start
            worker.record_metadata("generate")
            file.append(rows)
            timing = {"label": label, "start": positions.start, "rows": len(rows), "seconds": round(seconds, 4)}
            append_log(plan.timings, {**timing, "peak_bytes": environment.peak_bytes()})
            on_progress(label, len(rows))


def answer_rows(worker: Worker, label: str, positions: range) -> Iterator[Row]:
    """One method's answers to the prompts at ``positions``."""
    plan, model, method = worker.plan, worker.model, worker.plan.method_row(label)
    items = list(plan.items(positions))
    requests = [make_request(model, plan, method, seed, position) for seed, position, _ in items]
    for (seed, _, example), outcome in zip(items, run_batch(model, requests), strict=True):
        row = {"label": label, "seed": seed, "id": example.id, "prompt": example.prompt.plain}
        yield row | (_completion_row(outcome) if isinstance(outcome, Completion) else {"text": "", "token_ids": [], "error": outcome})


def make_request(model: GuidedModel, plan: EvalPlan, method: MethodRow, seed: int, position: int, offset: int = 0) -> Request:
    """The request for one example; its random numbers depend on the seed, the example's position and ``offset`` alone."""
    sampling = {f.name: getattr(plan.sampling, f.name) for f in fields(plan.sampling)}
    return model.request(plan.examples[position].prompt, method.method, seed=seed, index=position + offset, record=True, **sampling)


def run_batch(model: GuidedModel, requests: Sequence[Request]) -> list[Completion | str]:
    """Run requests in one batch; gives each one's completion, or its error message."""
    searcher = model.searcher()
    out: list[Completion | str] = [""] * len(requests)
    index_of = {}
    for i, request in enumerate(requests):
        try:
            index_of[searcher.add(request)] = i
        except PromptError as e:  # other errors concern the method, so all its requests, and are raised
            out[i] = " ".join(str(e).split())
    while searcher.busy:
        for step in searcher.step():
            if step.completion is not None:
                out[index_of[step.request]] = step.completion if step.completion.error is None else step.completion.error
    return out


def _completion_row(completion: Completion) -> Row:
    """The columns of a completion; none of them holds seconds, so that two runs write the same bytes."""
    return {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "score": None if completion.score is None else round(completion.score, 6),
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.usage.prompt_tokens,
        "forward_tokens": dict(sorted(completion.usage.forward_tokens.items())),
        "shift": round(sum(completion.guide_shift), 6),
    } | ({"notes": list(completion.notes)} if completion.notes else {})
