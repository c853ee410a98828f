"""Answers from a cluster, as they are done: the same as those of one machine, each once.

Requests are numbered by (seed, index), which decide all draws; so it does not matter which worker answers, nor how often a lost
task is begun again. The driver alone hears answers, and takes each from the worker that has the task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ivg.jobs.ray.actor_pool import Actor, ActorFailure, ActorPool, connected, nodes
from ivg.jobs.ray.settings import RaySettings, fitted, portable, size
from ivg.jobs.ray.task_queue import J, Task, TaskQueue
from ivg.jobs.ray.worker import Order, Report
from ivg.settings.recipe import Recipe
from ivg.types import Completion


def answers(
    recipe: Recipe, todo: Sequence[tuple[J, int]], fail: Callable[[J, str], None], settings: RaySettings, *, trace: bool = False
) -> Iterator[tuple[J, int, Completion]]:
    """(job, sample number, completion) as each is done, by the workers of a cluster.

    Args:
        recipe: models and method; paths must be there on every node.
        todo: (job, sample number).
        fail: told of jobs whose prompt cannot be answered, and why.
        settings: which cluster, what workers take of it.
        trace: completions have the tree of beams.

    Raises:
        RayError: no cluster, no room, other versions, workers that die again and again.
        ConfigError, VocabularyError: a method that does not fit the models; GPUs of a worker that its engine cannot use.
    """
    if not todo:
        return
    recipe, settings = fitted(recipe, settings)
    with connected(settings) as ray:
        plan = size(settings, nodes(ray), len(todo), recipe.run.device)
        ledger = TaskQueue(todo, recipe.run.batch_size, plan.workers)
        crew = ActorPool(ray, plan, portable(recipe).model_dump_json(), trace=trace)
        try:
            while ledger:
                news = crew.news()
                done = [answer for member, event in news for answer in _settle(crew, ledger, member, event, fail)]
                _share_out(crew, ledger)  # before answers are written: workers need not wait for that
                yield from done
                _raise_errors(news)
        finally:
            crew.dismiss()


def _settle(
    crew: ActorPool, ledger: TaskQueue[J], member: Actor, event: Report | ActorFailure, fail: Callable[[J, str], None]
) -> list[tuple[J, int, Completion]]:
    """Answers of one worker; its place is filled if it is lost, and its tasks wait again."""
    out: list[tuple[J, int, Completion]] = []
    report = event.report if isinstance(event, ActorFailure) else event
    for number, result in report.done if report is not None else ():
        task = ledger.settle(member.number, number)
        if task is None:
            continue
        crew.answered()
        if isinstance(result, str):
            fail(task.job, result)
        else:
            out.append((task.job, task.index, result))
    if isinstance(event, ActorFailure):
        before = ledger.suspected
        given_up = ledger.bury(member.number)
        for task in given_up:
            fail(task.job, _given_up(task, event.why))
        if given_up or ledger.suspected > before:
            crew.set_aside()
        crew.replace(member, event.why)
    return out


def _given_up(task: Task[J], why: str) -> str:
    return f"given up, since {task.deaths} workers died with it, the last while it had nothing else ({why})"


def _share_out(crew: ActorPool, ledger: TaskQueue[J]) -> None:
    for member in crew.idle:
        orders = [Order(task.number, task.job.prompt, task.index) for task in ledger.hand(member.number)]
        if orders or ledger.busy(member.number):
            crew.send(member, orders)


def _raise_errors(news: Sequence[tuple[Actor, Report | ActorFailure]]) -> None:
    """What is wrong for all orders ends the run, once the answers that came with it are out."""
    for _, event in news:
        if isinstance(event, Report) and event.error is not None:
            raise event.error
