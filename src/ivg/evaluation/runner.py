"""The stages of an evaluation (generate, score, report), in one process or several.

With several processes each takes one label at a time. Which process takes which, and in which order, changes no result.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ivg.evaluation.base_samples import sample_rows
from ivg.evaluation.generate import answer_rows, generate
from ivg.evaluation.methods import BASE_SAMPLES
from ivg.evaluation.plan import EvalPlan
from ivg.evaluation.report import report
from ivg.evaluation.score import score
from ivg.evaluation.transcripts import read_answers
from ivg.evaluation.worker import OnProgress, Worker
from ivg.settings.eval import STAGES
from ivg.settings.recipe import Recipe


def run(
    plan: EvalPlan,
    stages: Sequence[str] = STAGES,
    jobs: int = 1,
    on_progress: OnProgress = lambda label, rows: None,
    worker: Worker | None = None,
) -> None:
    """Run stages in their order; rows that exist are kept.

    Args:
        plan: the evaluation.
        stages: some of :data:`~ivg.settings.eval.STAGES`.
        jobs: number of processes; 1 runs everything in this one.
        on_progress: called after every finished block.
        worker: one whose models may be loaded already.

    Raises:
        ConfigError: files of another run in the folder, or the input of a stage is missing; and whatever models and data raise.
    """
    worker = worker or Worker(plan)
    for stage in (s for s in STAGES if s in stages):
        if stage == "report":
            report(plan)
        elif jobs == 1:
            for label in plan.labels:
                run_stage(worker, stage, label, on_progress)
        else:
            _run_in_processes(plan, stage, jobs, on_progress)


def run_stage(worker: Worker, stage: str, label: str, on_progress: OnProgress) -> None:
    """One stage for one label."""
    if stage == "score":
        score(worker, label, on_progress)
    elif label == BASE_SAMPLES:
        generate(worker, label, sample_rows, on_progress)
    else:
        generate(worker, label, answer_rows, on_progress)
        worker.plan.task.export(worker.plan.out, label, read_answers(worker.plan, label))


# Several processes


def _run_in_processes(plan: EvalPlan, stage: str, jobs: int, on_progress: OnProgress) -> None:
    """The most expensive labels first, so that the processes end at about the same time."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed

    labels = sorted(plan.labels, key=lambda label: -_relative_cost(plan, label))
    context = multiprocessing.get_context("spawn")
    arguments = (plan.recipe.model_dump(exclude_none=True), str(plan.out))
    with ProcessPoolExecutor(jobs, context, initializer=_initialize, initargs=arguments) as pool:
        futures = {pool.submit(_run_in_process, stage, label): label for label in labels}
        for future in as_completed(futures):
            try:
                future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            on_progress(futures[future], plan.total)


def _relative_cost(plan: EvalPlan, label: str) -> float:
    if label == BASE_SAMPLES:
        return float(plan.config.base_samples)
    m = plan.method_row(label).method
    return float(m.width * m.successors * (3 if m.guides else 1) + m.candidates)


_workers: list[Worker] = []
"""The worker of this process, where it was started by :func:`_run_in_processes`."""


def _initialize(recipe: dict[str, Any], out: str) -> None:
    """Set up a child process; it ends at once when its parent does."""
    import multiprocessing
    from multiprocessing.connection import wait

    parent = multiprocessing.parent_process()

    def exit_with_parent() -> None:
        assert parent is not None
        wait([parent.sentinel])
        os._exit(1)

    if parent is not None:
        threading.Thread(target=exit_with_parent, daemon=True).start()
    _workers.append(Worker(EvalPlan(Recipe.parse(recipe), Path(out))))


def _run_in_process(stage: str, label: str) -> None:
    run_stage(_workers[0], stage, label, lambda label, rows: None)
