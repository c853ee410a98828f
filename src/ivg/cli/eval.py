"""``ivg eval``: answers of many methods to a task's prompts, their scores, and a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ivg.cli import options as o
from ivg.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from ivg.evaluation.plan import EvalPlan

HELP = """Compare methods on a task: sentiment, summarization or alpaca.

    ivg eval sentiment --recipe recipes/embedded-sentiment.toml --data imdb --out results

Three stages, each leaving files in --out and going on where it stopped: generate (transcripts/), score (scores/), report
(results.json, report.md, report.html, figures/).

Search options (-W, -K, -L, --beta) are for the nine "combinations"; a named method takes others from its table in a recipe."""

_EVAL = "Evaluation"


def evaluate(
    task: Annotated[str, typer.Argument(help="sentiment, summarization or alpaca.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for all files of this run.")],
    data: Annotated[
        str | None,
        typer.Option("--data", help="Rows (docs/reference/data.md): a file, -, a folder, or the id of a data set.", rich_help_panel=_EVAL),
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Of a folder or data set.", rich_help_panel=_EVAL)] = None,
    format: Annotated[
        str | None,
        typer.Option("--format", help="Of the file: jsonl, json, csv, parquet or text. (default: by its name)", rich_help_panel=_EVAL),
    ] = None,
    prompts: Annotated[int | None, typer.Option("--prompts", help="The first so many.", rich_help_panel=_EVAL)] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Answers to each prompt by each method.", rich_help_panel=_EVAL)] = None,
    shuffle: Annotated[int | None, typer.Option("--shuffle", help="Seed of the order of prompts.", rich_help_panel=_EVAL)] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", help="Comma-separated names instead of the recipe's.", rich_help_panel=_EVAL)
    ] = None,
    gold: Annotated[str | None, typer.Option("--gold", help="Reward model that is reported.", rich_help_panel=_EVAL)] = None,
    judge: Annotated[
        list[str] | None, typer.Option("--judge", help="A further reward: NAME=PATH; may be repeated.", rich_help_panel=_EVAL)
    ] = None,
    base_samples: Annotated[
        int | None,
        typer.Option(
            "--base-samples",
            "--bank",
            help="Base samples for best-of-N at equal compute; 0: none. (--bank: the old name, goes in 0.3)",
            rich_help_panel=_EVAL,
        ),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="Setting of the task: NAME=VALUE; may be repeated.", rich_help_panel=_EVAL)
    ] = None,
    stage: Annotated[
        list[str] | None, typer.Option("--stage", help="generate, score or report; may be repeated. (default: all)", rich_help_panel=_EVAL)
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Processes; each takes one method at a time.", rich_help_panel=_EVAL)] = 1,
    threads: Annotated[
        int | None, typer.Option("--threads", help="Of PyTorch, in each process. (default: its own)", rich_help_panel=_EVAL)
    ] = None,
    docs: Annotated[
        Path | None,
        typer.Option(
            "--docs", help="Copy report.md (without samples: they quote the data), results.json and figures here.", rich_help_panel=_EVAL
        ),
    ] = None,
    recipe: o.RecipeFile = None,
    base: o.Base = None,
    tuned: o.Tuned = None,
    untuned: o.Untuned = None,
    value: o.ValuePath = None,
    reward: o.Reward = None,
    arm: o.Arm = None,
    template: o.Template = None,
    width: o.Width = None,
    successors: o.Successors = None,
    chunk_length: o.ChunkLength = None,
    beta: o.Beta = None,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    max_new_tokens: o.MaxNewTokens = None,
    stop: o.Stop = None,
    ignore_eos: o.IgnoreEos = None,
    generation_config: o.GenerationConfig = None,
    seed: o.Seed = None,
    batch_size: o.BatchSize = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
) -> None:
    """See HELP."""
    from ivg.evaluation.plan import make_plan
    from ivg.evaluation.runner import STAGES
    from ivg.settings.recipe import Recipe, SearchConfig

    given = o.recipe_of(recipe, template, locals())
    if recipe is not None and given.eval.task != task and "task" in Recipe.load(recipe).eval.model_fields_set:
        raise ConfigError(f"the recipe is for the task {given.eval.task!r}, got {task!r}\n  give the task that the recipe is for")
    unknown = sorted(set(stage or ()) - set(STAGES))
    if unknown:
        raise ConfigError(f"unknown stage {', '.join(unknown)}\n  expected some of: {', '.join(STAGES)}")
    if jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, got {jobs}")
    if data == "-" and jobs > 1:
        raise ConfigError("--data - is standard input, which only one process can read\n  give --jobs 1, or a file")
    settings: dict[str, Any] = {
        "task": task, "data": data, "split": split, "format": format,
        "prompts": prompts, "seeds": seeds, "shuffle": shuffle, "gold": gold, "base_samples": base_samples,
        "threads": threads, "methods": [m.strip() for m in methods.split(",")] if methods else None,
    }  # fmt: skip
    if methods is not None and "combinations" not in settings["methods"]:  # the recipe's sizes were for its own methods
        typed = {"width": width, "successors": successors, "chunk_length": chunk_length, "beta": beta}
        given = given.model_copy(update={"search": SearchConfig()}).override(search=typed)
    judges = {k: ref.model_dump(exclude_none=True) for k, ref in given.eval.judges.items()} | _pairs(judge, "--judge")
    settings |= {"judges": judges, "options": {**given.eval.options, **_pairs(option, "--option")}}
    run(make_plan(given.override(eval=settings), out), stage or STAGES, jobs, docs)


def run(plan: EvalPlan, stages: Sequence[str], jobs: int, docs: Path | None) -> None:
    """The stages with a bar for each, and where to look at the end."""
    from importlib.util import find_spec

    from ivg.cli.progress import progress
    from ivg.evaluation import runner
    from ivg.evaluation.worker import Worker

    if "report" in stages and find_spec("matplotlib") is None:  # before hours of answers, not behind them
        raise MissingDependencyError("the report's figures need matplotlib\n  pip install 'ivg[eval]', or --stage generate --stage score")
    worker = Worker(plan)
    for stage in (s for s in runner.STAGES if s in stages):
        total = 0 if stage == "report" else plan.total * len(plan.labels)
        with progress(total, stage) as advance:

            def on_progress(_: str, rows: int, advance: Any = advance) -> None:
                for _row in range(rows):
                    advance()

            runner.run(plan, [stage], jobs, on_progress, worker)
    if "report" in stages:
        if docs is not None:
            from ivg.evaluation.report import publish

            publish(plan, docs)
        typer.echo(table(plan))
        typer.echo(f"{plan.out / 'report.html'}")


def table(plan: EvalPlan) -> str:
    """The report's first table, as text."""
    import json

    from ivg.evaluation.report import tables

    return tables(json.loads((plan.out / "results.json").read_text(encoding="utf-8")))[0].markdown()


def _pairs(given: list[str] | None, option: str) -> dict[str, str]:
    out = {}
    for text in given or ():
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise ConfigError(f"{option} {text!r}\n  expected NAME=VALUE")
        out[name] = value
    return out
