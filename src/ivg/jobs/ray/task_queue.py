"""Which worker has which task, and which tasks are left: every task gets one result, even if workers crash.

A task that several workers crashed with is run alone; if that worker crashes too, the task is quarantined. Imports neither Ray nor models.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ivg.jobs.runner import Task

SUSPECT = 3
"""Workers that crashed with a task before it is run alone."""
SPARE = 4
"""A worker gets one task in so many more than it runs at once, so that it need not wait for the next."""


@dataclass(slots=True)
class QueuedTask:
    """A task, its number in the run, and how many workers crashed while they had it."""

    number: int
    task: Task[Any]
    crashes: int = 0


class TaskQueue:
    """The tasks of one run.

    Args:
        tasks: in order.
        batch_size: tasks that a worker runs at once.
        workers: over which the tasks are shared out.
    """

    def __init__(self, tasks: Sequence[Task[Any]], batch_size: int, workers: int) -> None:
        self._queue = deque(QueuedTask(n, task) for n, task in enumerate(tasks))
        self._suspects: deque[QueuedTask] = deque()
        self._taken: dict[int, dict[int, QueuedTask]] = {}
        self._isolated: set[int] = set()
        self._capacity, self._workers = batch_size + math.ceil(batch_size / SPARE), workers

    @property
    def suspected(self) -> int:
        """Tasks that wait to be run alone."""
        return len(self._suspects)

    def __bool__(self) -> bool:
        return bool(self._queue or self._suspects or any(self._taken.values()))

    def busy(self, worker: int) -> bool:
        """Has this worker tasks?"""
        return bool(self._taken.get(worker))

    def take(self, worker: int) -> list[QueuedTask]:
        """Tasks for this worker, beside those that it has; a suspect goes alone to a worker that has none."""
        taken = self._taken.setdefault(worker, {})
        if worker in self._isolated:
            if taken:
                return []
            self._isolated.discard(worker)
        if self._suspects and not taken and not self._queue:
            new = [self._suspects.popleft()]
            self._isolated.add(worker)
        else:
            left = len(self._queue) + sum(map(len, self._taken.values()))
            share = min(self._capacity, math.ceil(left / self._workers))  # the last tasks do not all end up with one worker
            new = [self._queue.popleft() for _ in range(min(share - len(taken), len(self._queue)))]
        taken.update({item.number: item for item in new})
        return new

    def complete(self, worker: int, number: int) -> QueuedTask | None:
        """The worker is done with a task. None: it is not (or no longer) this worker's, or is done already."""
        return self._taken.get(worker, {}).pop(number, None)

    def requeue(self, worker: int) -> list[QueuedTask]:
        """The worker crashed, and its tasks wait again; those that are quarantined instead are returned."""
        lost, isolated = list(self._taken.pop(worker, {}).values()), worker in self._isolated
        self._isolated.discard(worker)
        for item in reversed(lost):
            item.crashes += 1
            if isolated:
                continue
            if item.crashes >= SUSPECT:
                self._suspects.append(item)
            else:
                self._queue.appendleft(item)
        return lost if isolated else []
