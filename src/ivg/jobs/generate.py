"""Prompts in, rows of answers out: ``ivg generate`` without its screen."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivg.jobs.backends import run_tasks
from ivg.jobs.failures import Failures
from ivg.jobs.prompts import Job
from ivg.jobs.provenance import answer_provenance, device_kind
from ivg.jobs.runner import Task
from ivg.jobs.store import open_rows
from ivg.settings.ray import RaySettings
from ivg.settings.recipe import Recipe
from ivg.types import Completion


@dataclass(frozen=True)
class Callbacks:
    """What a run tells its caller.

    Attributes:
        on_answer: called with every answer, once its row is written.
        progress: makes, for a number of answers, a context manager around a function that is called after each of them.
        on_superseded: called with a message about rows that are answered again because their prompt has changed.
    """

    on_answer: Callable[[Job, Completion], None]
    progress: Callable[[int], AbstractContextManager[Callable[[], None]]]
    on_superseded: Callable[[str], None]


class GenerateRun:
    """Answers ``recipe.run.n`` samples of every job that are not in the output yet.

    Args:
        recipe: models, method, batch size, seed.
        jobs: the prompts.
        failures: called for those that cannot be answered.
        cluster: run on this Ray cluster; None: in this process.
        trace: completions keep the tree of beams.

    Attributes:
        counts: answers by ``answered``, ``skipped`` (not tried yet), ``failed``, ``already done``; valid at any time.
    """

    def __init__(
        self, recipe: Recipe, jobs: Sequence[Job], failures: Failures, cluster: RaySettings | None = None, *, trace: bool = False
    ) -> None:
        self.recipe, self.jobs, self.failures, self.cluster, self.trace = recipe, jobs, failures, cluster, trace
        self.counts: Counter[str] = Counter(failed=failures.count)

    def run(self, output: Path | None, callbacks: Callbacks) -> None:
        """Append a row to ``output`` for every answer (None: write none).

        Raises:
            OutputError, ConfigError: see :func:`~ivg.jobs.store.open_rows`; and whatever the models raise.
        """
        provenance = {} if output is None else self._provenance()
        with ExitStack() as stack:
            rows = None if output is None else stack.enter_context(open_rows(output, self.jobs, provenance, callbacks.on_superseded))
            wanted = [Task(job.request_prompt, self.recipe.run.seed, k, job) for job in self.jobs for k in range(self.recipe.run.n)]
            tasks = [task for task in wanted if rows is None or not rows.done(task.source, task.index)]
            self.counts.update({"already done": len(wanted) - len(tasks), "skipped": len(tasks)})
            advance = stack.enter_context(callbacks.progress(len(tasks)))
            for result in run_tasks(self.recipe, tasks, self.cluster, trace=self.trace):
                job, completion, error = result.task.source, result.completion, result.error
                if completion is not None and completion.score is not None and not math.isfinite(completion.score):
                    error = f"its score is {completion.score}"
                if completion is None or error is not None:
                    self.failures(job.place, error or "", job.row)
                    self.counts.update({"failed": 1, "skipped": -1})
                    continue
                if rows is not None:
                    rows.append(answer_row(job, result.task.index, completion, provenance))
                callbacks.on_answer(job, completion)
                self.counts.update({"answered": 1, "skipped": -1})
                advance()

    def _provenance(self) -> dict[str, Any]:
        known = self.cluster is None or self.recipe.devices.get("base", self.recipe.run.device) is not None
        return answer_provenance(self.recipe, device_kind(self.recipe) if known else None)


def answer_row(job: Job, index: int, completion: Completion, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the output (docs/reference/data.md): the answer, its provenance, and the further columns of the input."""
    row = {"id": job.id, "prompt": job.prompt, "index": index, **completion.to_dict(), **provenance}
    return row | job.extra_columns(row)
