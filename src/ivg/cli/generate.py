"""``ivg generate``: prompts from the command line or rows of data, answers on the screen or in a JSONL file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ivg.cli.options import Options, command
from ivg.cli.recipe_options import RecipeOptions
from ivg.errors import ConfigError
from ivg.settings.ray import RaySettings
from ivg.settings.recipe import Recipe
from ivg.settings.train import parse_columns

if TYPE_CHECKING:
    from ivg.jobs.formats import SourceRow
    from ivg.jobs.prompts import Job
    from ivg.types import Completion

HELP = """Answer prompts by a frozen model with value guidance.

    ivg generate "The movie was"

    ivg generate --input prompts.jsonl --output out.jsonl --method ivg -W 4 -K 4 -L 5

Input rows are {"id", "prompt"} or {"id", "messages"}; other columns are copied to the output (docs/reference/data.md). Output rows are
appended as they are done; the same command again goes on where it stopped."""


@command(
    recipe=RecipeOptions("models", "search", "sampling", "run", check_method=True),
    cluster=Options(RaySettings, "Many machines (docs/how-to/scaling.md)", make=RaySettings.of),
)
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts, each one argument.", metavar="PROMPT...")] = None,
    input: Annotated[
        Path | None,
        typer.Option("--input", "-i", help="Rows with prompts: JSONL, JSON, CSV, Parquet, gzipped or not; - is standard input."),
    ] = None,
    format: Annotated[
        str | None, typer.Option("--format", help="jsonl, json, csv, parquet or text. (default: by the file's name or content)")
    ] = None,
    columns: Annotated[
        str | None, typer.Option("--columns", help="Columns with other names: NAME=COLUMN, comma-separated, e.g. prompt=question.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSONL file to append answers to; - is standard output.")] = None,
    failed: Annotated[Path | None, typer.Option("--failed", help="JSONL file for the rows that failed, each with the reason.")] = None,
    trace: Annotated[Path | None, typer.Option("--trace", help="Write the search as one HTML page.")] = None,
    *,
    recipe: Recipe,
    cluster: RaySettings | None,
) -> None:
    """See HELP."""
    if bool(prompts) == bool(input):
        raise ConfigError("give prompts, or --input FILE (exactly one of the two)")
    _check_files(input, output, failed)
    rows = _rows(prompts or [], input, format, parse_columns(columns))
    run(recipe, rows, input, Outputs(output, failed, trace), cluster)


@dataclass(frozen=True)
class Outputs:
    """Files that a run writes."""

    answers: Path | None = None
    failed: Path | None = None
    trace: Path | None = None


def _rows(prompts: list[str], source: Path | None, format: str | None, columns: Mapping[str, str]) -> Iterator[SourceRow]:
    from ivg.jobs.formats import SourceRow, scan_rows

    if source is None:
        yield from (SourceRow(f"prompt {i}", {"prompt": p}) for i, p in enumerate(prompts))
        return
    for row in scan_rows(source, format=format, hub=False):
        if row.data is not None and (missing := [theirs for theirs in columns.values() if theirs not in row.data]):
            raise ConfigError(f"{source}: no column {', '.join(missing)}\n  got {', '.join(row.data)}")
        yield row if row.data is None else replace(row, data={**row.data, **{ours: row.data[theirs] for ours, theirs in columns.items()}})


def run(recipe: Recipe, rows: Iterable[SourceRow], source: Path | None, outputs: Outputs, cluster: RaySettings | None = None) -> None:
    """Answer every prompt that is not answered yet; what cannot be answered is reported, the others are done."""
    from ivg.cli.printing import show
    from ivg.cli.progress import print_error, progress
    from ivg.jobs.failures import Failures
    from ivg.jobs.generate import Callbacks, GenerateRun
    from ivg.jobs.prompts import read_jobs

    failures = Failures(print_error, outputs.failed)
    jobs = list(read_jobs(rows, failures))
    if not jobs and not failures.count:
        raise ConfigError(f"{source} holds no rows\n  expected rows with prompt or messages")
    work = GenerateRun(recipe, jobs, failures, cluster, trace=outputs.trace is not None)
    traced: list[tuple[str, Completion]] = []

    def on_answer(job: Job, completion: Completion) -> None:
        if outputs.answers is None:
            show(_shown(job.prompt), completion, recipe.search.method, many=len(jobs) * recipe.run.n > 1)
        if outputs.trace is not None:
            traced.append((_shown(job.prompt), completion))

    callbacks = Callbacks(on_answer, lambda total: progress(total, "answers"), lambda text: typer.echo(text, err=True))
    try:
        work.run(outputs.answers, callbacks)
    finally:
        if outputs.trace is not None and traced:
            from ivg.cli.trace import write_trace

            write_trace(outputs.trace, traced, recipe.search.method)
        failures.close()
        if "skipped" in work.counts and (source is not None or outputs.answers is not None):
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
