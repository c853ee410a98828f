"""``ivg bench``: what a method costs on this machine, beside plain sampling of the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from ivg.cli.options import Options, command
from ivg.cli.recipe_options import RecipeOptions
from ivg.errors import ConfigError
from ivg.settings.bench import BenchOptions
from ivg.settings.placement import is_spread
from ivg.settings.recipe import Recipe

HELP = """Measure time and memory of a method on random models of a named shape, beside plain sampling.

Baselines, each with W*K samples of the base model for every prompt: transformers (its generate, all prompts in one batch), vllm.

Prints a table, then one JSON line. The columns are explained in docs/reference/benchmarks.md."""

_OFFERED = {
    "search": ("method", "width", "successors", "chunk_length"),
    "sampling": ("temperature",),
    "run": ("device", "dtype", "seed"),
}


@command(given=Options(BenchOptions, "Benchmark", make=dict), recipe=RecipeOptions(only=_OFFERED, bare=True))
def bench(
    out: Annotated[Path | None, typer.Option("--out", help="JSONL file for the measurements; the same command again resumes.")] = None,
    contestants: Annotated[str | None, typer.Option("--contestants", help="Deprecated: use --baselines.", hidden=True)] = None,
    *,
    given: dict[str, Any],
    recipe: Recipe,
) -> None:
    """See HELP."""
    from ivg.bench.settings import BenchSettings

    if contestants is not None:
        typer.echo("--contestants is deprecated: use --baselines", err=True)
        given["baselines"] = _renamed(contestants)
    if "baselines" in given:
        given["baselines"] = _names(given["baselines"])
    search, run = recipe.search, recipe.run
    given |= {**search.settings(), **recipe.sampling.settings(), "method": search.method}
    if is_spread(run.device):
        raise ConfigError(f"ivg bench runs on one device, got {run.device!r}\n  expected e.g. cpu or cuda:0")
    settings = BenchSettings(**given, device=cast("str | None", run.device), dtype=run.dtype, seed=run.seed)

    from ivg.bench import report, runner
    from ivg.utils import environment
    from ivg.utils.jsonl import to_json

    def on_progress(row: runner.Row) -> None:
        typer.echo(f"round {row['round'] + 1}/{settings.rounds}  {row['label']}  {row['seconds']:.2f} s", err=True)

    rows = runner.run(settings, out, on_progress=on_progress)
    found = report.summary(settings, rows, environment.run_metadata())
    title = f"{settings.title} ({found['device']}, {found['dtype']})"
    report.print_results(title, report.COLUMNS, report.cells(found), report.notes(found))
    typer.echo(to_json(found))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in (part.strip() for part in text.split(",")) if name not in ("", "none"))


def _renamed(contestants: str) -> str:
    """``--baselines`` for version 0.1's ``--contestants``.

    Raises:
        ConfigError: ``naive``, which is not part of the package.
    """
    names = _names(contestants)
    if "naive" in names:
        raise ConfigError("the naive implementation is not part of the package\n  from a checkout: python -m benchmarks.compare_naive")
    return ",".join("transformers" if name == "floor" else name for name in names if name != "ours")
