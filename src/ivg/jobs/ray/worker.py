"""One copy of the models on some node, and the search loop over its share of the prompts. Runs inside a Ray actor; knows no Ray.

Nothing is raised: what went wrong is said in the report, so that a worker that answers is told from one that is gone.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ivg.errors import IVGError, ModelError, PromptError

if TYPE_CHECKING:
    from ivg.model import GuidedModel
    from ivg.search.searcher import Searcher
    from ivg.settings.recipe import Recipe
    from ivg.types import Completion

TURN = 1.0
"""Seconds after which a worker reports even where nothing is done."""


@dataclass(frozen=True, slots=True)
class Order:
    """One answer that is wanted of a worker."""

    number: int
    prompt: Any
    index: int


@dataclass(frozen=True, slots=True)
class Report:
    """What a call brought.

    Attributes:
        done: (number of the order, answer, or what is wrong with its prompt).
        error: wrong for all orders and on every worker.
        crash: the worker broke and must be replaced; why.
        where: the worker's host and process.
    """

    done: list[tuple[int, Completion | str]] = field(default_factory=list)
    error: IVGError | None = None
    crash: str | None = None
    where: str = ""


class Worker:
    """Models and a loop; made at once, loaded by :meth:`load`."""

    def __init__(self) -> None:
        self.where = f"{socket.gethostname()} (process {os.getpid()})"
        self._waiting: deque[Order] = deque()
        self._flying: dict[int, int] = {}

    def hello(self) -> tuple[str, str]:
        """Where this is, and which version of ivg."""
        from ivg.utils.version import VERSION

        return self.where, VERSION

    def load(self, recipe: str, trace: bool) -> Report:
        """Load the models of a recipe (JSON)."""
        done: list[tuple[int, Completion | str]] = []
        try:
            self._load(recipe, trace)
        except Exception as e:
            return self._broken(done, e, fatal=isinstance(e, IVGError))
        return Report(where=self.where)

    def advance(self, orders: Sequence[Order], seconds: float = TURN) -> Report:
        """Take more orders, and work until something is done, or for so many seconds."""
        self._waiting.extend(orders)
        done: list[tuple[int, Completion | str]] = []
        until = time.monotonic() + seconds
        try:
            while (self._waiting or self._flying) and not done and time.monotonic() < until:
                self._admit(done)
                self._step(done)
        except Exception as e:  # a model that fails at work has failed here, and others may do what it could not
            return self._broken(done, e, fatal=isinstance(e, IVGError) and not isinstance(e, ModelError))
        return Report(done, where=self.where)

    def _load(self, recipe: str, trace: bool) -> None:
        from ivg.factory.recipe import load_models
        from ivg.settings.recipe import Recipe

        self.recipe: Recipe = Recipe.model_validate_json(recipe)
        self.model: GuidedModel = load_models(self.recipe)
        self.searcher: Searcher = self.model.searcher(max_beams=1 << 30)
        self.settings = {**self.recipe.search.settings(), **self.recipe.sampling.settings(), "trace": trace}

    def _admit(self, done: list[tuple[int, Completion | str]]) -> None:
        run, method = self.recipe.run, self.recipe.search.method
        while self._waiting and len(self._flying) < run.batch_size:
            order = self._waiting.popleft()
            try:
                request = self.model.request(order.prompt, method, seed=run.seed, index=order.index, **self.settings)
                self._flying[self.searcher.add(request)] = order.number
            except PromptError as e:  # what is wrong with the method or the models is wrong for all
                done.append((order.number, str(e)))

    def _step(self, done: list[tuple[int, Completion | str]]) -> None:
        for step in self.searcher.step():
            if step.completion is not None:
                done.append((self._flying.pop(step.request), step.completion.error or step.completion))

    def _broken(self, done: list[tuple[int, Completion | str]], e: Exception, *, fatal: bool) -> Report:
        if fatal and isinstance(e, IVGError):
            return Report(done, error=e, where=self.where)
        return Report(done, crash=f"{type(e).__name__}: {e}", where=self.where)
