"""Rows that could not be answered: reported, counted, and written to a file if one is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ivg.jobs.formats import SourceRow
from ivg.utils.jsonl import append_lines, to_json, write_text

MAX_REPORTED = 20
"""Failures that are reported one by one; the others are counted."""


class Failures:
    """What failed in one run.

    Args:
        report: prints one error.
        path: JSONL file of the failed rows, each as it was, with ``error``. None: none is written.
    """

    def __init__(self, report: Callable[[str], None], path: Path | None = None) -> None:
        self.report, self.path, self.count = report, path, 0
        self._reported: set[str] = set()
        self._before_open: list[str] | None = []

    def open(self) -> None:
        """Write the file, in place of an old one, from now on: the run may write its results, so no other run writes this file.

        Raises:
            OutputError: it cannot be written.
        """
        if self.path is not None and self._before_open is not None:
            write_text(self.path, "".join(self._before_open))
        self._before_open = None

    def __call__(self, place: str, why: str, row: Mapping[str, Any]) -> None:
        """A row, or one sample of it, failed; the same message is reported once."""
        self.count += 1
        message = f"{place}: {why}"
        if message in self._reported:
            return
        self._reported.add(message)
        if len(self._reported) <= MAX_REPORTED:
            self.report(message)
        if self.path is not None:
            line = to_json({**row, "error": " - ".join(why.split("\n  "))}) + "\n"
            if self._before_open is None:
                append_lines(self.path, line)
            else:
                self._before_open.append(line)

    def add_unusable(self, row: SourceRow) -> None:
        """A row that could not be read (its text is written), or not be used (it is written as it was)."""
        self(row.place, row.error or "", {"place": row.place, "text": row.text} if row.data is None else row.data)

    def close(self) -> None:
        """Report how many were only counted."""
        more = len(self._reported) - MAX_REPORTED
        if more > 0:
            written = f"; all are in {self.path}" if self._before_open is None else ""
            self.report(f"{more} more rows failed" + ("; --failed FILE takes them all" if self.path is None else written))
