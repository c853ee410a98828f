"""Who has which task, and what is left: every task is settled once, whatever happens to workers.

A task whose workers keep dying is suspected, then run alone; if that worker dies too, it is given up. Knows neither Ray nor models.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

SUSPECT = 3
"""Workers that died with a task before it is run alone."""
SPARE = 4
"""A worker gets one task in so many more than it runs at once, so that it need not wait for the next."""


class Asked(Protocol):
    """Something with a prompt."""

    @property
    def prompt(self) -> Any:
        """Text, or messages."""

    @property
    def place(self) -> str:
        """Where it came from, for error messages."""


J = TypeVar("J", bound=Asked)


@dataclass(slots=True)
class Task(Generic[J]):
    """One answer that is wanted; ``deaths`` counts workers that died while they had it."""

    number: int
    job: J
    index: int
    deaths: int = 0


class TaskQueue(Generic[J]):
    """The tasks of one run.

    Args:
        todo: (job, number of the sample), in order.
        batch_size: tasks that a worker runs at once.
        workers: over which the tasks are shared out.
    """

    def __init__(self, todo: Sequence[tuple[J, int]], batch_size: int, workers: int) -> None:
        self._queue = deque(Task(n, job, index) for n, (job, index) in enumerate(todo))
        self._suspects: deque[Task[J]] = deque()
        self._out: dict[int, dict[int, Task[J]]] = {}
        self._alone: set[int] = set()
        self._capacity, self._workers = batch_size + math.ceil(batch_size / SPARE), workers

    @property
    def suspected(self) -> int:
        """Tasks that wait to be run alone."""
        return len(self._suspects)

    def __bool__(self) -> bool:
        return bool(self._queue or self._suspects or any(self._out.values()))

    def busy(self, worker: int) -> bool:
        """Has this worker tasks?"""
        return bool(self._out.get(worker))

    def hand(self, worker: int) -> list[Task[J]]:
        """What this worker gets now, beside what it has; suspects go alone to one that has nothing."""
        out = self._out.setdefault(worker, {})
        if worker in self._alone:
            if out:
                return []
            self._alone.discard(worker)
        if self._suspects and not out and not self._queue:
            new = [self._suspects.popleft()]
            self._alone.add(worker)
        else:
            left = len(self._queue) + sum(map(len, self._out.values()))
            share = min(self._capacity, math.ceil(left / self._workers))  # the last tasks do not all end up with one
            new = [self._queue.popleft() for _ in range(min(share - len(out), len(self._queue)))]
        out.update({task.number: task for task in new})
        return new

    def settle(self, worker: int, number: int) -> Task[J] | None:
        """The worker is done with a task. None: it is not this worker's, which was given up for dead, or has answered already."""
        return self._out.get(worker, {}).pop(number, None)

    def bury(self, worker: int) -> list[Task[J]]:
        """The worker is gone, and its tasks wait again; but for those that are given up, which come back."""
        lost, alone = list(self._out.pop(worker, {}).values()), worker in self._alone
        self._alone.discard(worker)
        for task in reversed(lost):
            task.deaths += 1
            if alone:
                continue
            if task.deaths >= SUSPECT:
                self._suspects.append(task)
            else:
                self._queue.appendleft(task)
        return lost if alone else []
