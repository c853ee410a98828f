"""Tables on the terminal: each fits the width that is there, and no cell of it is ever left out."""

from __future__ import annotations

import json
import os
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

NO_LIMIT = 100_000
"""Columns of a console that wraps nothing."""
_LONG_WORD = 16
"""Cells. A longer word (a path, a list of numbers) may be broken where the terminal is narrow; a shorter one is not."""


def table_console() -> Console:
    """Standard output for tables: as wide as the terminal (or ``COLUMNS``). A file or a pipe has no width: there each row is one line."""
    found = Console(highlight=False)
    return found if found.is_terminal or os.environ.get("COLUMNS") else Console(highlight=False, width=NO_LIMIT)


def plain_table(*columns: str, **options: Any) -> Table:
    """A table without lines."""
    return Table(*columns, box=None, pad_edge=False, **options)


def cell_text(text: str) -> str:
    """A text as a cell: with a line break or another character that cannot be seen, as JSON has it."""
    return text if text.isprintable() else json.dumps(text, ensure_ascii=False)


def print_table(table: Table, out: Console | None = None) -> None:
    """Print ``table`` on ``out``, or on :func:`table_console`.

    Columns that are too wide wrap between words, the widest first. Where not even that is enough, each row is printed as lines of
    ``column: cell``. Cells are text, never rich's markup: a stop string such as ``[end]`` is printed as it is.
    """
    out = out or table_console()
    for column in table.columns:
        column.overflow = "fold"
    widths = _fitting_widths(table, out)
    if widths is None:
        _print_rows(table, out)
        return
    for column, width in zip(table.columns, widths, strict=True):
        column.width = width
    out.print(table, markup=False)


def _fitting_widths(table: Table, out: Console) -> list[int] | None:
    """The width of each column, in character cells, such that the table fits into ``out``; None where it cannot.

    No column is narrower than its longest word (or :data:`_LONG_WORD`), nor than its widest cell if it must not wrap.
    """
    unlimited = out.options.update(width=NO_LIMIT, markup=False)
    cells = [[Measurement.get(out, unlimited, cell) for cell in (column.header, *column.cells)] for column in table.columns]
    widths = [max(m.maximum for m in found) for found in cells]
    least = [
        width if column.no_wrap else min(width, max(min(m.minimum, _LONG_WORD) for m in found))
        for column, width, found in zip(table.columns, widths, cells, strict=True)
    ]
    room = out.width - _frame(table)
    if sum(least) > room:
        return None
    while (excess := sum(widths) - room) > 0:
        wide = max((i for i, width in enumerate(widths) if width > least[i]), key=widths.__getitem__)
        others = [width for i, width in enumerate(widths) if i != wide and width > least[i]]
        lower = max([least[wide], *(width for width in others if width < widths[wide])])
        widths[wide] -= min(excess, max(1, widths[wide] - lower))
    return widths


def _frame(table: Table) -> int:
    """Character cells beside the columns' contents: padding and lines."""
    count = len(table.columns)
    left, right = table.padding[3], table.padding[1]
    inner = (left + right) * count - (0 if table.pad_edge else left + right)
    return inner + (0 if table.box is None else count + 1)


def _print_rows(table: Table, out: Console) -> None:
    """Each row as a paragraph of ``column: cell``; a cell without a heading stands alone."""
    if table.title:
        out.print(table.title, markup=False)
    columns = [(_text(column.header).plain, [_text(cell) for cell in column.cells]) for column in table.columns]
    for place in range(table.row_count):
        if place:
            out.print()
        for name, cells in columns:
            if cells[place].plain:
                out.print(Text(f"{name}: " if name else "") + cells[place], soft_wrap=True)
    if table.caption:
        out.print(table.caption, markup=False)


def _text(cell: object) -> Text:
    return cell if isinstance(cell, Text) else Text(str(cell))
