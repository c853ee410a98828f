"""The result of a verb is on standard output, as text or with ``--json`` as JSON; the rest on standard error, or nowhere (``--quiet``)."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
"""The option ``--json`` of every verb."""
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the result alone: no notes, no progress.")]
"""The option ``--quiet`` of every verb."""

_waiting: list[str] = []


def print_json(data: Any) -> None:
    """Print the result as indented JSON; NaN and infinity are null."""
    from ivg.utils.jsonl import jsonable

    typer.echo(json.dumps(jsonable(data), indent=2, ensure_ascii=False, allow_nan=False, default=str))


def note_later(text: str) -> None:
    """Keep a note about options until it is known whether notes are wanted (:func:`print_notes`)."""
    _waiting.append(text)


def print_notes(quiet: bool, *more: str) -> None:
    """Print the notes that wait, and ``more``, on standard error, unless ``quiet``."""
    notes = [*_waiting, *more]
    _waiting.clear()
    for note in () if quiet else notes:
        typer.echo(note, err=True)
