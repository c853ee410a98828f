"""``ivg bench``: what a method costs, beside plain sampling and beside the way released codes work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ivg.cli import options as o
from ivg.errors import ConfigError
from ivg.utils.jsonl import to_json

if TYPE_CHECKING:
    from ivg.bench.settings import Settings

HELP = """Measure time and memory of a method on random models of a named shape, against two rivals, in turn.

floor: transformers' generate, W*K plain samples of the base for every prompt, all prompts in one batch; no choice among them.

naive: benchmarks/naive.py, the way released codes work: one prompt at a time, the prompt read W*K times, the value re-reading the whole
text after each chunk, whole caches copied.

ours: this package.

Prints a table, then one JSON line. What the columns mean: docs/reference/benchmarks.md. --targets measures what this package promises of
its speed and says which promises it keeps."""

_BENCH = "Benchmark"


def _option(name: str, help: str) -> Any:
    return typer.Option(name, help=help, rich_help_panel=_BENCH)


def bench(
    shape: Annotated[str | None, _option("--shape", "Base: gpt2-small, gpt2-large, gpt2-small-16k, llama-1b, llama-7b, embedded …")] = None,
    guide: Annotated[str | None, _option("--guide", "Shape of guides and value: guide-17m … (default: the usual one for the base)")] = None,
    prompts: Annotated[int | None, _option("--prompts", "How many. (default: 8)")] = None,
    prompt_tokens: Annotated[int | None, _option("--prompt-tokens", "Length of each prompt. (default: 32)")] = None,
    new_tokens: Annotated[int | None, _option("--new-tokens", "Length of each answer. (default: 50)")] = None,
    method: o.Method = None,
    width: o.Width = None,
    successors: o.Successors = None,
    chunk_length: o.ChunkLength = None,
    temperature: o.Temperature = None,
    rounds: Annotated[int | None, _option("--rounds", "Measurements of each contestant. (default: 5)")] = None,
    contestants: Annotated[
        str | None, _option("--contestants", "Comma-separated: floor, naive, ours, vllm. (default: the first three; vllm where installed)")
    ] = None,
    naive_prompts: Annotated[
        int | None, _option("--naive-prompts", "Prompts for naive, which takes one at a time. (default: at most 2)")
    ] = None,
    max_beams: Annotated[int | None, _option("--max-beams", "Hypotheses in flight at most, for ours. (default: 256)")] = None,
    threads: Annotated[int | None, _option("--threads", "Of PyTorch. (default: its own number)")] = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    seed: o.Seed = None,
    targets: Annotated[bool, _option("--targets", "Measure the table of targets instead (hours; goes on where it stopped).")] = False,
    quick: Annotated[bool, _option("--quick", "With --targets: a rehearsal on tiny models; its figures mean nothing.")] = False,
    out: Annotated[
        Path | None,
        _option("--out", "JSONL file for the measurements, to go on where it stopped; with --targets a folder (default: bench-targets)."),
    ] = None,
    docs: Annotated[Path | None, _option("--docs", "Also write the table into this page, in place of the same benchmark's last.")] = None,
) -> None:
    """See HELP."""
    from ivg.bench.settings import from_mapping

    given = {k: v for k, v in locals().items() if k not in ("out", "docs", "targets", "quick", "from_mapping")}
    given["contestants"] = _names(contestants) if contestants else None if targets else _usual()
    settings = from_mapping(given)
    if quick and not targets:
        raise ConfigError("--quick is for --targets\n  for one benchmark give --shape tiny --rounds 1")
    if targets:
        _targets(settings, quick, out or Path("bench-targets"), docs)
    else:
        _one(settings, out, docs)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _usual() -> list[str]:
    from importlib.util import find_spec

    return ["floor", "naive", "ours", *(["vllm"] if find_spec("vllm") else [])]


def _one(settings: Settings, out: Path | None, docs: Path | None) -> None:
    """One benchmark: table, notes, JSON."""
    from ivg.bench import report, runner
    from ivg.utils import environment

    rows = runner.run(settings, out, done=lambda row: tell(row, settings.rounds))
    found = report.summary(settings, rows, environment.made())
    body, notes = report.cells(found), report.lines(found)
    if docs is not None:
        table = report.markdown(report.COLUMNS, body)
        report.publish(docs, f"{settings.title}, {found['device']}", report.section(settings.title, table, notes, found))
    show(f"{settings.title} ({found['device']}, {found['dtype']})", report.COLUMNS, body, notes)
    typer.echo(to_json(found))


def _targets(settings: Settings, quick: bool, folder: Path, docs: Path | None) -> None:
    """The table of targets: verdicts, notes, JSON."""
    from ivg.bench import report, targets

    targets.check(settings)
    plan = targets.plan(settings, quick=quick)
    found = targets.run(plan, folder, lambda name, row: tell(row, plan.settings.rounds, f"{name}: "))
    found |= {"verdicts": targets.verdicts(found["figures"]), "rehearsal": quick}
    body, notes = targets.cells(found["figures"]), targets.notes(found)
    if quick:
        notes.append("a rehearsal on tiny models: these figures mean nothing")
    title = f"Targets on {found['device']}"
    if docs is not None and not quick:
        table = report.markdown(targets.COLUMNS, body)
        report.publish(docs, f"targets, {found['device']}", report.section(title, table, notes, found))
    show(f"{title}, {found['dtype']}, {found['threads']} threads", targets.COLUMNS, body, notes)
    typer.echo(to_json(found))


def tell(row: Mapping[str, Any], rounds: int, group: str = "") -> None:
    """One measurement, as it is made, on standard error."""
    typer.echo(f"{group}round {row['round'] + 1}/{rounds}  {row['label']}  {row['seconds']:.2f} s", err=True)


def show(title: str, head: Sequence[str], body: Sequence[Sequence[str]], notes: Sequence[str]) -> None:
    """A table on standard output, notes under it."""
    from rich.console import Console
    from rich.table import Table

    out = Console(highlight=False)
    if not out.is_terminal:
        out.width = 120
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in body:
        table.add_row(*row)
    out.print(table)
    for note in notes:
        out.print(note, markup=False)
