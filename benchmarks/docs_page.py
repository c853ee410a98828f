"""Result tables in Markdown pages, between markers that name the benchmark."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ivg.errors import ConfigError
from ivg.utils.jsonl import write_text


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table whose columns are numbers, except the first."""
    rule = "|---|" + "---:|" * (len(head) - 1)
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in body)])


def section(title: str, table: str, notes: Sequence[str], found: Mapping[str, Any]) -> str:
    """A section of the page: title, table, notes, and the conditions of the measurement."""
    made = found["made"]
    machine = ", ".join(f"{k} {v}" for k, v in made["machine"].items())
    where = f"{found['device']}, {found['dtype']}, {found['threads']} threads, {found['settings']['rounds']} rounds"
    commits = ", ".join(str(c) for c in found["commits"])
    listed = "\n".join(f"- {note}" for note in notes)
    return f"### {title}\n\n{table}\n\n{listed}\n\n{where}. {machine}. Commit {commits}.\n\n```text\n{made['command']}\n```"


def update_page(page: Path, key: str, text: str) -> None:
    """Put ``text`` between the markers of ``key`` in ``page``; append both if the page has no such markers.

    Raises:
        ConfigError: no such page, or a marker without an end.
    """
    if not page.exists():
        raise ConfigError(f"no page {page}\n  expected a Markdown file, e.g. docs/reference/benchmarks.md")
    old = page.read_text(encoding="utf-8")
    begin, end = f"<!-- bench: {key} -->", "<!-- /bench -->"
    block = f"{begin}\n{text}\n{end}"
    if begin not in old:
        write_text(page, f"{old.rstrip()}\n\n{block}\n")
        return
    new, count = re.subn(re.escape(begin) + ".*?" + re.escape(end), lambda _: block, old, count=1, flags=re.DOTALL)
    if not count:
        raise ConfigError(f"{page}: {begin} has no {end} after it\n  add it")
    write_text(page, new)
