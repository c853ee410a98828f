"""One copy of the models on some node, and the run loop over its share of the tasks. Runs inside a Ray actor, but independent of Ray.

Nothing is raised: errors are part of the report, so that Ray's own errors always mean a lost worker.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ivg.errors import IVGError, ModelError
from ivg.jobs.runner import LocalBackend, Task, TaskSettings

if TYPE_CHECKING:
    from ivg.types import Completion

REPORT_SECONDS = 1.0
"""A worker reports after so long even where nothing is done."""


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a call brought.

    Attributes:
        done: (number of the task, its completion or why there is none).
        error: concerns all tasks, on every worker.
        crash: why the worker is broken and must be replaced.
    """

    done: list[tuple[int, Completion | str]] = field(default_factory=list)
    error: IVGError | None = None
    crash: str | None = None


class Worker:
    """Models and a run loop; nothing is loaded before :meth:`load`."""

    def __init__(self) -> None:
        self.where = f"{socket.gethostname()} (process {os.getpid()})"

    def hello(self) -> tuple[str, str]:
        """Where this is, and which version of ivg."""
        from ivg.utils.version import VERSION

        return self.where, VERSION

    def load(self, recipe: str, trace: bool) -> WorkerReport:
        """Load the models of a recipe (JSON)."""
        from ivg.factory.recipe import load_models
        from ivg.settings.recipe import Recipe

        try:
            parsed = Recipe.model_validate_json(recipe)
            self.backend = LocalBackend(load_models(parsed), TaskSettings.from_recipe(parsed, trace=trace))
        except IVGError as e:
            return WorkerReport(error=e)
        except Exception as e:
            return WorkerReport(crash=f"{type(e).__name__}: {e}")
        return WorkerReport()

    def advance(self, tasks: Sequence[Task[int]], seconds: float = REPORT_SECONDS) -> WorkerReport:
        """Take more tasks, and work until something is done, or for so many seconds."""
        self.backend.submit(tasks)
        done: list[tuple[int, Completion | str]] = []
        until = time.monotonic() + seconds
        try:
            while self.backend.busy and not done and time.monotonic() < until:
                done += [(r.task.source, r.completion if r.completion is not None else str(r.error)) for r in self.backend.step()]
        except ModelError as e:  # a model that failed here at work may do elsewhere what it could not
            return WorkerReport(crash=f"{type(e).__name__}: {e}")
        except IVGError as e:
            return WorkerReport(error=e)
        except Exception as e:
            return WorkerReport(crash=f"{type(e).__name__}: {e}")
        return WorkerReport(done)
