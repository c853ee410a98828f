"""The one run loop: tasks in, results out as they are done, in this process or over Ray.

A task's seed and index decide all draws, so that neither the backend nor the order of the tasks changes an answer. What is wrong with one
prompt is that task's result; what is wrong with the method or the models is raised.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from ivg.errors import PromptError

if TYPE_CHECKING:
    from ivg.model import GuidedModel
    from ivg.search.methods import Method
    from ivg.settings.recipe import Recipe
    from ivg.types import Completion, Step

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Task(Generic[T]):
    """One answer that is wanted.

    Attributes:
        prompt: text, messages, or a :class:`~ivg.types.Prompt`.
        seed: random seed of the request.
        index: number of the sample; with ``seed`` it decides all draws.
        source: what the caller knows the task by; never looked at.
    """

    prompt: Any
    seed: int
    index: int
    source: T


@dataclass(frozen=True, slots=True)
class Result(Generic[T]):
    """The completion of a task, or in ``error`` why there is none."""

    task: Task[T]
    completion: Completion | None = None
    error: str | None = None


class Backend(Protocol):
    """Runs tasks."""

    def run(self, tasks: Sequence[Task[T]]) -> Iterator[Result[T]]:
        """One result for every task, in the order in which they are done."""
        ...


@dataclass(frozen=True)
class TaskSettings:
    """What all tasks of a run share.

    Attributes:
        method: its name, or the method itself.
        settings: further arguments of ``GuidedModel.request``.
        batch_size: requests at the same time; None: all of them.
        max_beams: hypotheses at the same time; None: the model's default.
    """

    method: str | Method
    settings: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int | None = None
    max_beams: int | None = None

    @classmethod
    def from_recipe(cls, recipe: Recipe, *, trace: bool = False) -> TaskSettings:
        """Those of a recipe; ``trace``: completions keep the tree of beams."""
        settings = {**recipe.search.settings(), **recipe.sampling.settings(), "trace": trace}
        if recipe.run.best_of is not None:
            settings["alternatives"] = 0  # it selects by log-probabilities
        return cls(recipe.search.method, settings, recipe.run.batch_size, max_beams=1 << 30)


class LocalBackend:
    """Runs tasks on the models of this process; new ones join as others are done.

    Args:
        model: base and values.
        settings: of all tasks.
        on_step: called with every step of every task's search.
    """

    def __init__(self, model: GuidedModel, settings: TaskSettings, on_step: Callable[[Task[Any], Step], None] | None = None) -> None:
        self.model, self.settings, self.on_step = model, settings, on_step
        self.searcher = model.searcher(settings.max_beams)
        self._waiting: deque[Task[Any]] = deque()
        self._running: dict[int, Task[Any]] = {}

    @property
    def busy(self) -> bool:
        """Is there anything left to do?"""
        return bool(self._waiting or self._running)

    def submit(self, tasks: Iterable[Task[Any]]) -> None:
        """Queue tasks."""
        self._waiting.extend(tasks)

    def step(self) -> list[Result[Any]]:
        """Fill up to ``batch_size``, then one step of the search; what is done by it.

        Raises:
            IVGError: the method does not fit the models; a model that failed.
        """
        out = list(self._admit())
        for step in self.searcher.step():
            if self.on_step is not None:
                self.on_step(self._running[step.request], step)
            if step.completion is not None:
                error = step.completion.error
                out.append(Result(self._running.pop(step.request), None if error else step.completion, error))
        return out

    def run(self, tasks: Sequence[Task[T]]) -> Iterator[Result[T]]:
        """See :class:`Backend`."""
        self.submit(tasks)
        while self.busy:
            yield from self.step()

    def _admit(self) -> Iterator[Result[Any]]:
        """Results of those that are refused."""
        s = self.settings
        while self._waiting and (s.batch_size is None or len(self._running) < s.batch_size):
            task = self._waiting.popleft()
            try:
                request = self.model.request(task.prompt, s.method, seed=task.seed, index=task.index, **s.settings)
                self._running[self.searcher.add(request)] = task
            except PromptError as e:  # any other error concerns the method or the models, hence all tasks
                yield Result(task, error=str(e))
