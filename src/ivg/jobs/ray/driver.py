"""The Ray backend: the results of a run on one machine, each once.

Seed and index decide all draws; so it does not matter which worker answers, nor how often a lost task is run again. Only the driver
takes results, each from the worker that has the task.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ivg.jobs.ray.actor_pool import Actor, ActorFailure, ActorPool, connected, nodes
from ivg.jobs.ray.resources import plan_workers, reconcile_gpus, with_absolute_paths
from ivg.jobs.ray.task_queue import QueuedTask, TaskQueue
from ivg.jobs.ray.worker import WorkerReport
from ivg.jobs.runner import Result, T, Task
from ivg.settings.ray import RaySettings
from ivg.settings.recipe import Recipe


class RayBackend:
    """Runs tasks on the workers of a cluster.

    Args:
        recipe: models and method; paths must be there on every node.
        settings: which cluster, what workers take of it.
        trace: completions keep the tree of beams.

    Raises:
        ConfigError: GPUs of a worker that its engine cannot use.
    """

    def __init__(self, recipe: Recipe, settings: RaySettings, *, trace: bool = False) -> None:
        self.recipe, self.settings = reconcile_gpus(recipe, settings)
        self.trace = trace

    def run(self, tasks: Sequence[Task[T]]) -> Iterator[Result[T]]:
        """See :class:`~ivg.jobs.runner.Backend`.

        Raises:
            RayError: no cluster, no room, other versions, workers that crash again and again.
            ConfigError, VocabularyError: a method that does not fit the models.
        """
        with connected(self.settings) as ray:
            plan = plan_workers(self.settings, nodes(ray), len(tasks), tuple(self.recipe.devices.values()))
            queue = TaskQueue(tasks, self.recipe.run.batch_size, plan.workers)
            pool = ActorPool(ray, plan, with_absolute_paths(self.recipe).model_dump_json(), trace=self.trace)
            try:
                while queue:
                    events = pool.poll()
                    done = [result for actor, event in events for result in _results(pool, queue, actor, event)]
                    _assign(pool, queue)  # before the caller handles the results: workers need not wait for that
                    yield from done
                    _raise_errors(events)
            finally:
                pool.kill()


def _results(pool: ActorPool, queue: TaskQueue, actor: Actor, event: WorkerReport | ActorFailure) -> list[Result[Any]]:
    """Results of one worker; if it failed, another takes its place and its tasks are queued again."""
    out: list[Result[Any]] = []
    report = event.report if isinstance(event, ActorFailure) else event
    for number, answer in report.done if report is not None else ():
        item = queue.complete(actor.number, number)
        if item is None:
            continue
        pool.reset_crashes()
        out.append(Result(item.task, error=answer) if isinstance(answer, str) else Result(item.task, answer))
    if isinstance(event, ActorFailure):
        before = queue.suspected
        quarantined = queue.requeue(actor.number)
        out += [Result(item.task, error=_quarantined(item, event.why)) for item in quarantined]
        if quarantined or queue.suspected > before:
            pool.excuse_crash()
        pool.replace(actor, event.why)
    return out


def _quarantined(item: QueuedTask, why: str) -> str:
    return f"quarantined: {item.crashes} workers crashed while running it, the last one while running nothing else ({why})"


def _assign(pool: ActorPool, queue: TaskQueue) -> None:
    for actor in pool.idle:
        tasks = [replace(item.task, source=item.number) for item in queue.take(actor.number)]
        if tasks or queue.busy(actor.number):
            pool.send(actor, tasks)


def _raise_errors(events: Sequence[tuple[Actor, WorkerReport | ActorFailure]]) -> None:
    """An error that concerns all tasks ends the run, once the results that came with it are out."""
    for _, event in events:
        if isinstance(event, WorkerReport) and event.error is not None:
            raise event.error
