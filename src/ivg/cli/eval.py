"""``ivg eval``: answers of many methods to a task's prompts, their scores, and a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ivg.cli.options import command, plain_value
from ivg.cli.output import AsJson, Quiet, note_later, print_json, print_notes
from ivg.cli.recipe_options import RecipeOptions, Tables
from ivg.errors import ConfigError, MissingDependencyError
from ivg.settings.eval import STAGES
from ivg.settings.recipe import EvalConfig, Recipe, SearchConfig
from ivg.settings.schema import settings_of

if TYPE_CHECKING:
    from ivg.evaluation.plan import EvalPlan

HELP = """Compare methods on a task: sentiment, summarization or alpaca.

Three stages, each of which writes files in --out and resumes: generate (transcripts/), score (scores/), report
(results.json, report.md, report.html, figures/).

    ivg eval sentiment --recipe recipes/embedded-sentiment.toml --data imdb --out results

Search options (-W, -K, -L, --beta) are for the nine "combinations"; a named method takes others from its table in a recipe.

    ivg eval sentiment --methods bon --sweep eft:beta=0.25,0.5,1 --sweep cbs-explicit:width=1,2,4:successors=2,4,4 ..."""

_OFFERED = {
    "search": ("width", "successors", "chunk_length", "beta", "draft"),
    "run": ("generation_config", "seed", "batch_size", "device", "dtype", "revision", "attention"),
}


def _own_sizes(recipe: Recipe, found: Tables) -> tuple[Recipe, Tables]:
    """The recipe's sizes of the search are for its own methods, not for others that are typed."""
    if "combinations" not in found["eval"].get("methods", ["combinations"]):
        if given := recipe.search.settings():
            listed = ", ".join(f"{name}={value}" for name, value in given.items())
            note_later(f"note: {listed} of the recipe's [search] ignored: they are for 'combinations', and --methods names others")
        recipe = recipe.model_copy(update={"search": SearchConfig()})
    return recipe, found


@command(recipe=RecipeOptions("eval", "models", "search", "sampling", "run", only=_OFFERED, adjust=_own_sizes, one_answer="ivg eval"))
def evaluate(
    task: Annotated[str, typer.Argument(help=settings_of(EvalConfig)["task"].setting.help)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for all files of this run.")],
    stage: Annotated[list[str] | None, typer.Option("--stage", help="generate, score or report; may be repeated. (default: all)")] = None,
    docs: Annotated[
        Path | None, typer.Option("--docs", help="Copy report.md (without samples: they quote the data), results.json and figures here.")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep",
            help="A method with several values of a setting, METHOD:SETTING=V,V,V (lists of several settings, with : between them, go "
            "together), beside --methods; may be repeated. With neither methods nor a recipe's: only these and the base.",
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    *,
    recipe: Recipe,
) -> None:
    """See HELP."""
    from ivg.evaluation.plan import make_plan

    print_notes(quiet)
    if sweep:
        given = recipe.eval.model_dump(exclude_none=True)["methods"] if "methods" in recipe.eval.model_fields_set else []
        recipe = recipe.override(eval={"methods": [*given, *map(_sweep, sweep)]})

    if "task" in recipe.eval.model_fields_set and recipe.eval.task != task:
        raise ConfigError(f"the recipe is for the task {recipe.eval.task!r}, got {task!r}\n  give the task that the recipe is for")
    unknown = sorted(set(stage or ()) - set(STAGES))
    if unknown:
        raise ConfigError(f"unknown stage {', '.join(unknown)}\n  expected some of: {', '.join(STAGES)}")
    if recipe.eval.data == "-" and recipe.eval.jobs > 1:
        raise ConfigError("--data - is standard input, which only one process can read\n  give --jobs 1, or a file")
    if as_json and stage and "report" not in stage:
        raise ConfigError("--json prints results.json, which the stage report makes\n  give --stage report, too")
    plan = make_plan(recipe.override(eval={"task": task}), out)
    run(plan, stage or STAGES, docs, quiet=quiet)
    if not stage or "report" in stage:
        _print_results(plan, as_json, quiet)


def _print_results(plan: EvalPlan, as_json: bool, quiet: bool) -> None:
    from ivg.evaluation.report import read_results

    if as_json:
        print_json(read_results(plan.out / "results.json"))
    else:
        typer.echo(table(plan))
    print_notes(quiet, f"{plan.out / 'report.html'}")


def _sweep(text: str) -> dict[str, Any]:
    """A method of a recipe from METHOD:SETTING=V,V,V:SETTING=V,V,V.

    Raises:
        ConfigError: of another form.
    """
    method, *settings = text.split(":")
    pairs = [part.partition("=") for part in settings]
    if not method or not pairs or not all(name.strip() and sign and values.strip() for name, sign, values in pairs):
        raise ConfigError(f"--sweep {text!r}\n  expected METHOD:SETTING=V,V,V, for example eft:beta=0.25,0.5,1")
    return {"method": method, "sweep": {name.strip(): [plain_value(v.strip()) for v in values.split(",")] for name, _, values in pairs}}


def run(plan: EvalPlan, stages: Sequence[str], docs: Path | None, *, quiet: bool = False) -> None:
    """The stages, with a bar for each unless ``quiet``."""
    from importlib.util import find_spec

    from ivg.cli.progress import progress
    from ivg.evaluation import runner
    from ivg.evaluation.worker import Worker

    if "report" in stages and find_spec("matplotlib") is None:  # before hours of answers, not behind them
        raise MissingDependencyError("the report's figures need matplotlib\n  pip install 'ivg[eval]', or --stage generate --stage score")
    worker = Worker(plan)
    for stage in (s for s in STAGES if s in stages):
        total = 0 if stage == "report" or quiet else plan.total * len(plan.labels)
        with progress(total, stage) as advance:

            def on_progress(_: str, rows: int, advance: Any = advance) -> None:
                for _row in range(rows):
                    advance()

            runner.run(plan, [stage], plan.config.jobs, on_progress, worker)
    if "report" in stages and docs is not None:
        from ivg.evaluation.report import publish

        publish(plan, docs)


def table(plan: EvalPlan) -> str:
    """The report's first table, as text."""
    from ivg.evaluation.report import read_results
    from ivg.evaluation.tables import tables

    return tables(read_results(plan.out / "results.json"))[0].markdown()
