"""Rows that could not be answered: told, counted, and kept in a file where that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ivg.jobs.formats import SourceRow
from ivg.utils.jsonl import append_lines, to_json, write_text

MOST = 20
"""Failures that are told one by one; the others are counted."""


class Failures:
    """What failed in one run.

    Args:
        report: prints one error.
        path: file of the failed rows (JSONL): each as it was, with ``error``; made anew. None: none.

    Raises:
        OutputError: the file cannot be written.
    """

    def __init__(self, report: Callable[[str], None], path: Path | None = None) -> None:
        self.report, self.path, self.count = report, path, 0
        self._told: set[str] = set()
        if path is not None:
            write_text(path, "")

    def __call__(self, place: str, why: str, row: Mapping[str, Any]) -> None:
        """One row, or one sample of it, failed; what is told of a row is told once."""
        self.count += 1
        message = f"{place}: {why}"
        if message in self._told:
            return
        self._told.add(message)
        if len(self._told) <= MOST:
            self.report(message)
        if self.path is not None:
            append_lines(self.path, to_json({**row, "error": " - ".join(why.split("\n  "))}) + "\n")

    def of_source(self, row: SourceRow) -> None:
        """A row that could not be read."""
        self(row.where, row.error or "", {"place": row.where, "text": row.text})

    def close(self) -> None:
        """Say how many were not told."""
        more = len(self._told) - MOST
        if more > 0:
            self.report(f"{more} more rows failed" + (f"; all are in {self.path}" if self.path else "; --failed FILE takes them all"))
