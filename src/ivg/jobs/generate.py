"""Prompts in, rows of answers out: ``ivg generate`` without its screen."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import count, filterfalse
from pathlib import Path
from typing import Any

from ivg.jobs.backends import run_tasks
from ivg.jobs.failures import Failures
from ivg.jobs.prompts import Job
from ivg.jobs.provenance import answer_provenance, device_kind
from ivg.jobs.runner import Result, Task
from ivg.jobs.store import open_rows
from ivg.settings.ray import RaySettings
from ivg.settings.recipe import Recipe
from ivg.types import Completion, by_likelihood, note_failed
from ivg.utils.rng import as_seed, mix


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
        counts: answers by ``answered``, ``skipped`` (not tried yet), ``failed``, ``already done``, and ``failed samples`` that ``best_of``
            left out; valid at any time.
    """

    def __init__(
        self, recipe: Recipe, jobs: Sequence[Job], failures: Failures, cluster: RaySettings | None = None, *, trace: bool = False
    ) -> None:
        self.recipe, self.jobs, self.failures, self.cluster, self.trace = recipe, jobs, failures, cluster, trace
        self.counts: Counter[str] = Counter(failed=failures.count)
        self._repeats: dict[str, int] = {}

    def run(self, output: Path | None, callbacks: Callbacks) -> None:
        """Append a row to ``output`` for every answer (None: write none).

        Raises:
            OutputError, ConfigError: see :func:`~ivg.jobs.store.open_rows`; and whatever the models raise.
        """
        provenance = {} if output is None else self._provenance()
        with ExitStack() as stack:
            rows = None if output is None else stack.enter_context(open_rows(output, self.jobs, provenance, callbacks.on_superseded))
            self.failures.open()
            self._repeats = _repeats(self.jobs, {} if rows is None else rows.repeats)
            wanted = [(job, index) for job in self.jobs for index in range(self.recipe.run.n)]
            missing = {(job.key, index): job for job, index in wanted if rows is None or not rows.done(job, index)}
            self.counts.update({"already done": len(wanted) - len(missing), "skipped": len(missing)})
            advance = stack.enter_context(callbacks.progress(len(missing)))
            for job, index, answer in self._answers(run_tasks(self.recipe, self._tasks(missing), self.cluster, trace=self.trace)):
                if (job.key, index) not in missing:
                    continue
                if isinstance(answer, str):
                    self.failures(job.place, answer, job.row)
                    self.counts.update({"failed": 1, "skipped": -1})
                    continue
                if rows is not None:
                    rows.append(answer_row(job, index, answer, provenance, self._repeats[job.key]))
                callbacks.on_answer(job, answer)
                self.counts.update({"answered": 1, "skipped": -1})
                advance()

    def _tasks(self, missing: Mapping[tuple[str, int], Job]) -> list[Task[Job]]:
        """The samples to draw for the answers that are missing, by id and number; with ``best_of`` all those of their prompts."""
        run, seeds = self.recipe.run, {key: _seed(self.recipe.run.seed, repeat) for key, repeat in self._repeats.items()}
        if run.best_of is None:
            return [Task(job.request_prompt, seeds[job.key], index, job) for (_, index), job in missing.items()]
        jobs = {job.key: job for job in missing.values()}.values()
        return [Task(job.request_prompt, seeds[job.key], index, job) for job in jobs for index in range(run.best_of)]

    def _answers(self, results: Iterable[Result[Job]]) -> Iterator[tuple[Job, int, Completion | str]]:
        """(job, number, answer or why there is none); with ``best_of`` the n likeliest samples of each job, once all are drawn."""
        run, drawn = self.recipe.run, dict[str, list[Result[Job]]]()
        for result in results:
            job = result.task.source
            if run.best_of is None:
                yield job, result.task.index, _answer(result)
                continue
            drawn.setdefault(job.key, []).append(result)
            if len(drawn[job.key]) == run.best_of:
                samples = [_answer(r) for r in sorted(drawn.pop(job.key), key=lambda r: r.task.index)]
                failed = [s for s in samples if isinstance(s, str)]
                best = note_failed(by_likelihood([s for s in samples if not isinstance(s, str)]), failed, run.best_of)
                ranked: list[Completion | str] = [*best, *failed]
                if best:
                    self.counts.update({"failed samples": len(failed) - max(0, run.n - len(best))})
                yield from ((job, index, answer) for index, answer in enumerate(ranked[: run.n]))

    def _provenance(self) -> dict[str, Any]:
        known = self.cluster is None or self.recipe.devices.get("base", self.recipe.run.device) is not None
        out, best_of = answer_provenance(self.recipe, device_kind(self.recipe) if known else None), self.recipe.run.best_of
        return out if best_of is None else out | {"settings": {**out["settings"], "best_of": best_of}}


def _repeats(jobs: Iterable[Job], known: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """A number for each job, by id: the lowest that no other with its prompt has; ``known``: by prompt and id, those of rows there."""
    out: dict[str, int] = {}
    free: dict[str, Iterator[int]] = {}
    for job in jobs:
        rows = known.get(job.prompt_key, {})
        if job.prompt_key not in free:
            free[job.prompt_key] = filterfalse(set(rows.values()).__contains__, count())
        out[job.key] = rows[job.key] if job.key in rows else next(free[job.prompt_key])
    return out


def _seed(seed: int, repeat: int) -> int:
    """Of the draws of a prompt: the run's; for rows that repeat the prompt others."""
    return as_seed(mix(seed, repeat)) if repeat else seed


def _answer(result: Result[Job]) -> Completion | str:
    """The completion, or why it cannot be used."""
    completion = result.completion
    if completion is None or result.error is not None:
        return result.error or ""
    if completion.score is not None and not math.isfinite(completion.score):
        return f"its score is {completion.score}"
    return completion


def answer_row(job: Job, index: int, completion: Completion, provenance: Mapping[str, Any], repeat: int) -> dict[str, Any]:
    """A row of the output (docs/reference/data.md): the answer, its provenance, and the further columns of the input."""
    row = {"id": job.id, "prompt": job.prompt, "index": index, "repeat": repeat, **completion.to_dict(), **provenance}
    return row | job.extra_columns(row)
