"""``ivg generate``: prompts from the command line or rows of data, answers on the screen or in a JSONL file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ivg.cli.options import Options, command
from ivg.cli.quick_import import import_transformers
from ivg.cli.recipe_options import RecipeOptions
from ivg.cli.standard_input import DASH, texts_of
from ivg.errors import ConfigError
from ivg.settings.generate import GenerateSettings
from ivg.settings.ray import RaySettings
from ivg.settings.recipe import Recipe
from ivg.types.messages import Prompt

if TYPE_CHECKING:
    from ivg.jobs.formats import SourceRow
    from ivg.jobs.prompts import Job
    from ivg.types import Completion

HELP = """Answer prompts by a frozen model with value guidance.

Input rows are {"id", "prompt"} or {"id", "messages"}; other columns are copied to the output (docs/reference/data.md). Output rows are
appended as they are done; the same command again resumes.

    ivg generate "The movie was"

    ivg generate --image cat.png "What is it?" --base path/to/llava

    echo "The movie was" | ivg generate --json

    ivg generate --input prompts.jsonl --output out.jsonl --method ivg -W 4 -K 4 -L 5"""


_IMAGES = {"images": ("enabled", "allowed_media_domains")}


@command(
    files=Options(GenerateSettings, "Files"),
    recipe=RecipeOptions("models", "search", "sampling", "run", only=_IMAGES, check_method=True),
    cluster=Options(RaySettings, "Many machines (docs/how-to/scaling.md)", make=RaySettings.of),
)
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts, each one argument; - is standard input.", metavar="PROMPT...")
    ] = None,
    *,
    files: GenerateSettings,
    recipe: Recipe,
    cluster: RaySettings | None,
) -> None:
    """See HELP."""
    if files.input is None:
        prompts = texts_of(prompts)
    if bool(prompts) == (files.input is not None):
        raise ConfigError("give prompts, or --input FILE (exactly one of the two)")
    if files.json:
        files = _as_rows(files)
    if files.image and files.input is not None:
        raise ConfigError("--image goes with prompts of the command line\n  rows of --input name their pictures in their messages")
    _check_files(files)
    run(recipe, _rows(prompts or [], files), files, cluster)


def _as_rows(files: GenerateSettings) -> GenerateSettings:
    """``files`` with rows on standard output."""
    if files.output is not None and str(files.output) != DASH:
        raise ConfigError(f"got --json and --output {files.output}\n  rows go to the file as JSON; leave --json out")
    return replace(files, output=Path(DASH))


def _rows(prompts: list[str], files: GenerateSettings) -> Iterator[SourceRow]:
    from ivg.jobs.formats import SourceRow, scan_rows

    if files.input is None:
        for i, prompt in enumerate(prompts):
            yield SourceRow(f"prompt {i}", {"messages": _with_images(prompt, files.image)} if files.image else {"prompt": prompt})
        return
    names = files.column_names
    for row in scan_rows(files.input, format=files.format, hub=False):
        if row.data is not None:
            if missing := [column for column in names.values() if column not in row.data]:
                raise ConfigError(f"{files.input}: no column {', '.join(missing)}\n  got {', '.join(row.data)}")
            row = replace(row, data={**row.data, **{name: row.data[column] for name, column in names.items()}})
        yield row


def _with_images(prompt: str, images: Iterable[str]) -> list[dict[str, object]]:
    """One user message: the pictures, and the text behind them."""
    parts: list[dict[str, str]] = [{"type": "image", "url" if "://" in image else "path": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]


def run(recipe: Recipe, rows: Iterable[SourceRow], files: GenerateSettings, cluster: RaySettings | None = None) -> None:
    """Answer every prompt that is not answered yet; what cannot be answered is reported, the others are done."""
    if cluster is None:
        import_transformers(recipe)
    from ivg.cli.printing import prompt_line, show
    from ivg.cli.progress import print_error, progress
    from ivg.jobs.failures import Failures
    from ivg.jobs.generate import Callbacks, GenerateRun
    from ivg.jobs.prompts import read_jobs

    failures = Failures(print_error, files.failed)
    jobs = list(read_jobs(rows, failures))
    if not jobs and not failures.count:
        raise ConfigError(f"{files.input} holds no rows\n  expected rows with prompt or messages")
    if any(Prompt.of(job.prompt).images for job in jobs if not isinstance(job.prompt, str)):
        recipe = recipe.override(images={"enabled": True})
    work = GenerateRun(recipe, jobs, failures, cluster, trace=files.trace is not None)
    traced: list[tuple[str, Completion]] = []
    template = None if recipe.models.base is None else recipe.models.base.template

    def on_answer(job: Job, completion: Completion) -> None:
        if files.output is None:
            show(job.prompt, template, completion, recipe.search.method, many=len(jobs) * recipe.run.n > 1, quiet=files.quiet)
        if files.trace is not None:
            traced.append((prompt_line(job.prompt), completion))

    callbacks = Callbacks(
        on_answer, lambda total: progress(total, "answers"), lambda text: None if files.quiet else typer.echo(text, err=True)
    )
    try:
        work.run(files.output, callbacks)
    finally:
        if files.trace is not None and traced:
            from ivg.cli.trace import write_trace

            write_trace(files.trace, traced, recipe.search.method)
        failures.close()
        if (lost := work.counts["failed samples"]) and not files.quiet:
            typer.echo(f"note: {lost} sample{'s' * (lost > 1)} failed; best_of chose among the others of the same prompt", err=True)
        if "skipped" in work.counts and not files.quiet and (files.input is not None or files.output is not None):
            typer.echo(", ".join(f"{name} {work.counts[name]}" for name in ("answered", "skipped", "failed", "already done")), err=True)
    if failures.count:
        raise typer.Exit(1 if work.counts["answered"] or work.counts["already done"] else 2)


def _check_files(files: GenerateSettings) -> None:
    from ivg.cli.files import check_files
    from ivg.jobs.store import is_stream

    source, failed = files.input, files.failed
    check_files([("--input", source)], [("--output", files.output), ("--failed", failed), ("--trace", files.trace)])
    if failed is not None and is_stream(failed):
        raise ConfigError(f"--failed {failed} is no file\n  expected a JSONL file for the rows that failed")
    if source is not None and source.is_dir():
        raise ConfigError(f"cannot read {source}: it is a folder\n  expected a file of rows")
