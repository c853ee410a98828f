"""``ivg generate``: prompts from the command line or rows of data, answers on the screen or in a JSONL file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ivg.cli import options as o
from ivg.errors import ConfigError

if TYPE_CHECKING:
    from ivg.jobs.prompts import Job
    from ivg.settings.ray import RaySettings
    from ivg.settings.recipe import Recipe
    from ivg.types import Completion

_CLUSTER = "Many machines (docs/how-to/scaling.md)"
Ray = Annotated[
    str | None,
    typer.Option("--ray", help="Share prompts out over Ray: local, auto, HOST:PORT or ray://HOST:PORT.", rich_help_panel=_CLUSTER),
]
Workers = Annotated[
    int | None, typer.Option("--workers", help="Copies of the models. (default: as many as there is room for)", rich_help_panel=_CLUSTER)
]
Gpus = Annotated[
    float | None,
    typer.Option("--gpus-per-worker", help="vllm splits its models over them. (default: 1 if there are any)", rich_help_panel=_CLUSTER),
]
Cpus = Annotated[
    float | None, typer.Option("--cpus-per-worker", help="(default: 1 beside GPUs, else all of a node's)", rich_help_panel=_CLUSTER)
]

HELP = """Answer prompts, steered.

    ivg generate "The movie was"

    ivg generate --input prompts.jsonl --output out.jsonl --method ivg -W 4 -K 4 -L 5

Input rows are {"id", "prompt"} or {"id", "messages"}; other columns are copied to the output (docs/reference/data.md). Output rows are
appended as they are done; the same command again goes on where it stopped."""


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts, each one argument.", metavar="PROMPT...")] = None,
    input: Annotated[
        Path | None,
        typer.Option("--input", "-i", help="Rows with prompts: JSONL, JSON, CSV, Parquet, gzipped or not; - is standard input."),
    ] = None,
    format: o.Format = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSONL file to append answers to; - is standard output.")] = None,
    failed: Annotated[Path | None, typer.Option("--failed", help="JSONL file that takes the rows that failed, each with why.")] = None,
    trace: Annotated[Path | None, typer.Option("--trace", help="Write the search as one HTML page.")] = None,
    recipe: o.RecipeFile = None,
    method: o.Method = None,
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
    token: o.Token = None,
    select: o.Select = None,
    candidates: o.Candidates = None,
    gate: o.GuardMiddleware = None,
    draft: o.Draft = None,
    weights: o.Weights = None,
    select_weights: o.SelectWeights = None,
    decay: o.Decay = None,
    settings: o.Settings = None,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    min_p: o.MinP = None,
    repetition_penalty: o.RepetitionPenalty = None,
    max_new_tokens: o.MaxNewTokens = None,
    stop: o.Stop = None,
    ignore_eos: o.IgnoreEos = None,
    generation_config: o.GenerationConfig = None,
    seed: o.Seed = None,
    n: o.Number = None,
    batch_size: o.BatchSize = None,
    engine: o.Engine = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    ray: Ray = None,
    workers: Workers = None,
    gpus_per_worker: Gpus = None,
    cpus_per_worker: Cpus = None,
) -> None:
    """See HELP."""
    from ivg.settings.ray import RaySettings

    given = o.recipe_of(recipe, template, locals())
    cluster = RaySettings.of(ray, workers, gpus_per_worker, cpus_per_worker)
    if bool(prompts) == bool(input):
        raise ConfigError("give prompts, or --input FILE (exactly one of the two)")
    given, note = o.without_sizes(given)
    if note is not None:
        typer.echo(note, err=True)
    _check_method(given)
    run(given, prompts or [], input, output, trace, cluster, format=format, failed=failed)


def _check_method(recipe: Recipe) -> None:
    """Before any model is loaded: does the method exist, are its settings possible?"""
    from ivg.search.methods import get_method

    get_method(recipe.search.method, **recipe.search.settings())


def run(
    recipe: Recipe,
    prompts: list[str],
    source: Path | None,
    output: Path | None,
    trace: Path | None,
    cluster: RaySettings | None = None,
    *,
    format: str | None = None,
    failed: Path | None = None,
) -> None:
    """Answer every prompt that is not answered yet; what cannot be answered is reported, the others are done."""
    from ivg.cli.printing import show
    from ivg.cli.progress import progress, report
    from ivg.jobs.failures import Failures
    from ivg.jobs.formats import SourceRow, scan_rows
    from ivg.jobs.generate import Callbacks, GenerateRun
    from ivg.jobs.prompts import read_jobs

    _check_files(source, output, failed)
    failures = Failures(report, failed)
    rows = (
        (SourceRow(f"prompt {i}", {"prompt": p}) for i, p in enumerate(prompts))
        if source is None
        else scan_rows(source, format=format, hub=False)
    )
    jobs = list(read_jobs(rows, failures))
    if not jobs and not failures.count:
        raise ConfigError(f"{source} holds no rows\n  expected rows with prompt or messages")
    work = GenerateRun(recipe, jobs, failures, cluster, trace=trace is not None)
    traced: list[tuple[str, Completion]] = []

    def on_answer(job: Job, completion: Completion) -> None:
        if output is None:
            show(_shown(job.prompt), completion, recipe.search.method, many=len(jobs) * recipe.run.n > 1)
        if trace is not None:
            traced.append((_shown(job.prompt), completion))

    callbacks = Callbacks(on_answer, lambda total: progress(total, "answers"), lambda text: typer.echo(text, err=True))
    try:
        work.run(output, callbacks)
    finally:
        if trace is not None and traced:
            from ivg.cli.trace import write_trace

            write_trace(trace, traced, recipe.search.method)
        failures.close()
        if "skipped" in work.counts and (source is not None or output is not None):
            typer.echo(", ".join(f"{name} {work.counts[name]}" for name in ("answered", "skipped", "failed", "already done")), err=True)
    if failures.count:
        raise typer.Exit(1 if work.counts["answered"] or work.counts["already done"] else 2)


def _check_files(source: Path | None, output: Path | None, failed: Path | None) -> None:
    """No file is read and written, or written twice, in one run."""
    from ivg.jobs.store import is_stream

    named = {"--input": source, "--output": output, "--failed": failed}
    places = {option: path.resolve() for option, path in named.items() if path is not None and not is_stream(path)}
    for option, place in places.items():
        same = next((other for other in places if other < option and places[other] == place), None)
        if same is not None:
            raise ConfigError(f"{same} and {option} are the same file, {named[option]}\n  give each a file of its own")
    if failed is not None and is_stream(failed):
        raise ConfigError(f"--failed {failed} is no file\n  expected a JSONL file for the rows that failed")
    if source is not None and source.is_dir():
        raise ConfigError(f"cannot read {source}: it is a folder\n  expected a file of rows")


def _shown(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
