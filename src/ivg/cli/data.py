"""``ivg data check``: what is in a file of rows, before anything is trained or loaded."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ivg.cli.options import Options, command
from ivg.cli.output import AsJson, print_json
from ivg.cli.printing import say
from ivg.errors import ConfigError
from ivg.settings.rows import RowSettings
from ivg.utils.console import plain_table, print_table, table_console

if TYPE_CHECKING:
    from ivg.training.data_check import DataReport

HELP = """Say what a file of prompts or training data holds: form, lengths, ties, duplicates, rows that cannot be used.

With --max-length also rows that are too long. No model is loaded. Exit code 1 where a row cannot be used, has no response, or is too long.

    ivg data check pairs.jsonl --tokenizer path/to/base --max-length 1024"""

SHOWN = 5
"""Rows that cannot be used of which so many are listed."""

app = typer.Typer(name="data", help="Check data before anything is trained or loaded.", add_completion=False, no_args_is_help=True)


@app.callback()
def data() -> None:
    """Check data before anything is trained or loaded."""


@app.command(help=HELP)
@command(rows=Options(RowSettings, "Rows"))
def check(
    source: Annotated[str, typer.Argument(help="File, folder, id of a data set, or - for standard input.", metavar="FILE")],
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Directory or hub id: count in its tokens. (default: characters)")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=1, help="Count rows whose prompt and response are longer. (default: no limit)")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Split of a folder or data set.")] = "train",
    as_json: AsJson = False,
    *,
    rows: RowSettings,
) -> None:
    """See HELP."""
    from ivg.jobs.formats import source_name
    from ivg.training.data import ColumnMapping, ReadOptions
    from ivg.training.data_check import check_data

    if max_length is not None and tokenizer is None:
        raise ConfigError("--max-length counts tokens\n  give --tokenizer, the model that will read the rows")
    reads = None
    if tokenizer is not None:
        from ivg.models.loading import LoadOptions, load_tokenizer

        reads = load_tokenizer(tokenizer, LoadOptions(), "tokenizer")
    options = ReadOptions(split, ColumnMapping(rows.column_names or None), rows.format)
    report = check_data(source, options, reads, max_length)
    if as_json:
        print_json({**asdict(report), "fine": report.fine})
    else:
        _print(report, source_name(source))
    if not report.fine:
        raise typer.Exit(1)


def _print(report: DataReport, source: str) -> None:
    out = table_console()
    say(out, f"{source}: {report.items} {report.form} to {report.prompts} different prompts ({report.chats} of them chats)")
    table = plain_table(f"length in {report.unit}", "min", "median", "p95", "max", "empty")
    for name, found in report.lengths.items():
        table.add_row(name, str(found.min), f"{found.median:g}", str(found.p95), str(found.max), str(found.empty))
    print_table(table, out)
    for text, share in report.shares.items():
        say(out, f"{text}: {share:.0%}")
    for text, count in report.counts.items():
        say(out, f"{text}: {count or 'none'}")
    say(out, f"rows that cannot be used: {len(report.unusable) or 'none'}")
    for place, why in report.unusable[:SHOWN]:
        say(out, f"  {place}: {' - '.join(line.strip() for line in why.splitlines())}")
    if len(report.unusable) > SHOWN:
        say(out, f"  … and {len(report.unusable) - SHOWN} more")
