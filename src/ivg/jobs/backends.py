"""Where tasks run: in this process, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ivg.jobs.runner import Backend, LocalBackend, Result, T, Task, TaskSettings

if TYPE_CHECKING:
    from ivg.settings.ray import RaySettings
    from ivg.settings.recipe import Recipe


def run_tasks(recipe: Recipe, tasks: Sequence[Task[T]], cluster: RaySettings | None = None, *, trace: bool = False) -> Iterator[Result[T]]:
    """Run tasks on a recipe's models; loads nothing where there are no tasks.

    Args:
        recipe: models, method, batch size.
        tasks: what is wanted.
        cluster: run on this Ray cluster; None: in this process.
        trace: completions keep the tree of beams.
    """
    if not tasks:
        return
    backend: Backend
    if cluster is not None:
        from ivg.jobs.ray.driver import RayBackend

        backend = RayBackend(recipe, cluster, trace=trace)
    else:
        from ivg.factory.recipe import load_models

        backend = LocalBackend(load_models(recipe), TaskSettings.from_recipe(recipe, trace=trace))
    yield from backend.run(tasks)
