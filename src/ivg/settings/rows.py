"""How rows of data are read: format and columns. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ivg.errors import ConfigError
from ivg.settings.schema import Setting

Format = Literal["jsonl", "json", "csv", "parquet", "text"]
_COLUMNS = "NAME=COLUMN, comma-separated, e.g. prompt=email,response=subject"
RowFormat = Annotated[
    Format | None, Setting("jsonl, json, csv, parquet or text.", flags=("--format",), unset="by the file's name or content")
]
"""The setting ``format`` of all that reads rows."""


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """Format and columns of rows (docs/reference/data.md)."""

    format: RowFormat = None
    columns: Annotated[
        str | None,
        Setting(
            f"Columns with other names: {_COLUMNS}.",
            flags=("--columns",),
            unset="the same names",
        ),
    ] = None

    @property
    def column_names(self) -> dict[str, str]:
        """The names in docs/reference/data.md -> the columns of the data.

        Raises:
            ConfigError: ``columns`` of another form.
        """
        out = {}
        for part in self.columns.split(",") if self.columns else ():
            name, sign, column = part.strip().partition("=")
            if not sign:
                raise ConfigError(f"--columns {self.columns!r}\n  expected {_COLUMNS}")
            out[name] = column
        return out
