"""Progress and errors on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 2.0
"""Seconds before a bar appears."""


def report(message: str) -> None:
    """One error in one line."""
    import typer

    typer.echo("error: " + " - ".join(line.strip() for line in message.splitlines() if line.strip()), err=True)


@contextmanager
def progress(total: int, unit: str) -> Iterator[Callable[[], None]]:
    """A function to call after each of ``total`` things; a bar shows what is left once two seconds have passed."""
    if total < 2 or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(unit), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task, began, shown = bar.add_task(unit, total=total), time.monotonic(), False

    def advance() -> None:
        nonlocal shown
        bar.advance(task)
        if not shown and time.monotonic() - began > PATIENCE:
            bar.start()
            shown = True

    try:
        yield advance
    finally:
        if shown:
            bar.stop()
