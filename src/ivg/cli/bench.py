"""``ivg bench``: what a method costs on this machine, beside plain sampling of the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ivg.cli import options as o
from ivg.errors import ConfigError

HELP = """Measure time and memory of a method on random models of a named shape, beside plain sampling.

Baselines, each with W*K samples of the base model for every prompt: transformers (its generate, all prompts in one batch), vllm.

Prints a table, then one JSON line. The columns are explained in docs/reference/benchmarks.md."""

_BENCH = "Benchmark"


def _option(name: str, help: str, **more: Any) -> Any:
    return typer.Option(name, help=help, rich_help_panel=_BENCH, **more)


def bench(
    shape: Annotated[str | None, _option("--shape", "Base: gpt2-small, gpt2-large, gpt2-small-16k, llama-1b, llama-7b, embedded …")] = None,
    guide: Annotated[str | None, _option("--guide", "Shape of guides and value: guide-17m … (default: the usual one for the base)")] = None,
    prompts: Annotated[int | None, _option("--prompts", "Number of prompts. (default: 8)")] = None,
    prompt_tokens: Annotated[int | None, _option("--prompt-tokens", "Tokens of each prompt. (default: 32)")] = None,
    new_tokens: Annotated[int | None, _option("--new-tokens", "Tokens of each answer. (default: 50)")] = None,
    method: o.Method = None,
    width: o.Width = None,
    successors: o.Successors = None,
    chunk_length: o.ChunkLength = None,
    temperature: o.Temperature = None,
    rounds: Annotated[int | None, _option("--rounds", "Measurements of the method and of each baseline. (default: 5)")] = None,
    baselines: Annotated[
        str | None, _option("--baselines", "Comma-separated: transformers, vllm; or none. (default: transformers)")
    ] = None,
    contestants: Annotated[str | None, _option("--contestants", "Deprecated: use --baselines.", hidden=True)] = None,
    max_beams: Annotated[int | None, _option("--max-beams", "Beams of all requests that run at once. (default: 256)")] = None,
    threads: Annotated[int | None, _option("--threads", "PyTorch threads. (default: PyTorch's)")] = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    seed: o.Seed = None,
    out: Annotated[Path | None, _option("--out", "JSONL file for the measurements; the same command again resumes.")] = None,
) -> None:
    """See HELP."""
    given = {k: v for k, v in locals().items() if k not in ("out", "contestants", "baselines")}
    from ivg.bench.settings import from_mapping

    if contestants is not None:
        typer.echo("--contestants is deprecated: use --baselines", err=True)
        baselines = _renamed(contestants)
    settings = from_mapping(given | {"baselines": None if baselines is None else _names(baselines)})

    from ivg.bench import report, runner
    from ivg.utils import environment
    from ivg.utils.jsonl import to_json

    def on_progress(row: runner.Row) -> None:
        typer.echo(f"round {row['round'] + 1}/{settings.rounds}  {row['label']}  {row['seconds']:.2f} s", err=True)

    rows = runner.run(settings, out, on_progress=on_progress)
    found = report.summary(settings, rows, environment.run_metadata())
    title = f"{settings.title} ({found['device']}, {found['dtype']})"
    report.print_table(title, report.COLUMNS, report.cells(found), report.notes(found))
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
