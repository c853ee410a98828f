"""Stage 1 of an evaluation: every method answers every prompt.

Each label has one :class:`~ivg.jobs.blocks.ResumableJsonl`. A block is computed with empty caches from its own seeds, so a resumed run
writes the same bytes as an uninterrupted one. Seconds and memory go to ``timings.jsonl`` only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ivg.evaluation.methods import MethodRow
from ivg.evaluation.plan import EvalPlan
from ivg.evaluation.worker import OnProgress, Worker
from ivg.jobs.blocks import open_blocks
from ivg.jobs.runner import LocalBackend, Result, Task, TaskSettings
from ivg.types import Completion, Prompt
from ivg.utils import environment
from ivg.utils.jsonl import append_lines, as_lines
from ivg.utils.rounding import keep_digits

if TYPE_CHECKING:
    from ivg.model import GuidedModel

Row = dict[str, Any]
MakeRows = Callable[[Worker, str, range], Iterable[Row]]
"""From a worker, a label and positions to the rows of one block."""


def generate(worker: Worker, label: str, make_rows: MakeRows, on_progress: OnProgress) -> None:
    """Write all rows of one label that are missing."""
    plan = worker.plan
    with open_blocks(plan.transcripts(label), plan.block_size(label), plan.total, plan.provenance(label)) as file:
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
            append_lines(plan.timings, as_lines([{**timing, "peak_bytes": environment.peak_bytes()}]))
            on_progress(label, len(rows))


def answer_rows(worker: Worker, label: str, positions: range) -> Iterator[Row]:
    """One method's answers to the prompts at ``positions``."""
    plan, method = worker.plan, worker.plan.method_row(label)
    items = list(plan.items(positions))
    results = run_batch(worker.model, plan, method, [(example.prompt, seed, position) for seed, position, example in items])
    for (seed, _, example), result in zip(items, results, strict=True):
        row = {"label": label, "seed": seed, "id": example.id, "prompt": example.prompt.plain}
        if result.completion is not None:
            yield row | _completion_row(result.completion)
        else:
            yield row | {"text": "", "token_ids": [], "error": " ".join(str(result.error).split())}


def run_batch(model: GuidedModel, plan: EvalPlan, method: MethodRow, requests: Sequence[tuple[Prompt, int, int]]) -> list[Result[int]]:
    """Answer all (prompt, seed, index) in one batch; gives the results in their order."""
    sampling = {f.name: getattr(plan.sampling, f.name) for f in fields(plan.sampling)}
    backend = LocalBackend(model, TaskSettings(method.method, {"record": True, **sampling}))
    results = backend.run([Task(*request, i) for i, request in enumerate(requests)])
    return sorted(results, key=lambda result: result.task.source)


def _completion_row(completion: Completion) -> Row:
    """The columns of a completion; none of them holds seconds, so that two runs write the same bytes."""
    return {
        "text": completion.answer,
        "token_ids": list(completion.token_ids),
        "score": None if completion.score is None else keep_digits(completion.score, 6),
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.usage.prompt_tokens,
        "forward_tokens": dict(sorted(completion.usage.forward_tokens.items())),
        "shift": round(sum(completion.guide_shift), 6),
        **({"drafted_tokens": completion.usage.drafted_tokens} if completion.usage.drafted_tokens else {}),
        **({"notes": list(completion.notes)} if completion.notes else {}),
    }
