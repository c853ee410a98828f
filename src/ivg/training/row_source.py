"""The rows of a source with the names of :mod:`ivg.training.data`: column names, formats of texts, and what becomes of unusable rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from ivg.errors import ConfigError, PromptError
from ivg.jobs.formats import SourceRow, scan_rows, source_name
from ivg.training.columns import Row, ends_with_answer, list_of
from ivg.utils.jsonl import RowError

Item = TypeVar("Item")


@dataclass(frozen=True)
class ColumnMapping:
    """Names of columns, and formats of texts.

    Attributes:
        columns: name above -> column of the file, e.g. ``{"prompt": "email", "response": "subject"}``.
        prompt: format of prompts that are texts, with ``{prompt}``; None: unchanged.
        response: format of responses, with ``{response}``; None: unchanged.
    """

    columns: Mapping[str, str] | None = None
    prompt: str | None = None
    response: str | None = None

    def apply(self, row: Row) -> dict[str, Any]:
        """The row with the names above, and with the formats applied.

        Raises:
            ConfigError: a column that the row lacks.
        """
        out = dict(row)
        for name, column in (self.columns or {}).items():
            if column not in row:
                raise ConfigError(f"no column {column!r} (for {name})\n  got {', '.join(row)}")
            out[name] = row[column]
        if self.prompt is not None and isinstance(out.get("prompt"), str):
            out["prompt"] = self.prompt.replace("{prompt}", out["prompt"])
        if self.response is not None:
            for name in ("response", "completion", "chosen", "rejected"):
                if isinstance(out.get(name), str):
                    out[name] = self.response.replace("{response}", out[name])
            if out.get("responses") is not None:
                with suppress(RowError):  # whoever reads the column says that it is no list
                    found = list_of(out, "responses")
                    out["responses"] = [self.response.replace("{response}", r) if isinstance(r, str) else r for r in found]
        return out


@dataclass(frozen=True)
class ReadOptions:
    """How the rows of a source are read.

    Attributes:
        split: of a folder or data set.
        mapping: the column names of the file and the formats of prompts and responses.
        format: of the file (:mod:`ivg.jobs.formats`); None: by its name.
        on_bad: called with each row that cannot be used, which is then left out; None: the first one is an error.
    """

    split: str = "train"
    mapping: ColumnMapping = ColumnMapping()
    format: str | None = None
    on_bad: Callable[[SourceRow], None] | None = None


class Rows:
    """The rows of a source after the column mapping; the first readable one decides the form of the source.

    Raises:
        ConfigError: there is none.
    """

    def __init__(self, source: str | Path, options: ReadOptions | None) -> None:
        self.source, self.options = source, options or ReadOptions()
        self._skipped: list[str] = []
        self._rest = self._readable()
        first = next(self._rest, None)
        if first is None:
            raise ConfigError(self._nothing_usable())
        self._first = first

    def have(self, *columns: str) -> bool:
        """Has the first row all these columns?"""
        return all(name in self._first[1] for name in columns)

    @property
    def response(self) -> str | None:
        """The column of the response that SFT learns; ``text`` beside a prompt is one, as ``ivg generate`` writes it."""
        found = next((name for name in ("response", "completion", "chosen") if self.have(name)), None)
        answered = found is None and self.have("prompt", "text") and not self.have("messages")
        return "text" if answered else found

    @property
    def ends_with_answer(self) -> bool:
        """Is the last of the first row's ``messages`` the assistant's?"""
        return ends_with_answer(self._first[1])

    def each(self, parse: Callable[[dict[str, Any]], Iterable[Item]]) -> list[Item]:
        """The items that ``parse`` makes of every row.

        Raises:
            ConfigError: a row that cannot be used, if there is no ``on_bad``.
        """
        out: list[Item] = []
        for source, row in chain([self._first], self._rest):
            try:
                out += parse(row)
            except (PromptError, RowError) as e:
                self._bad(replace(source, error=str(e)))
        return out

    def wrong_columns(self, what: str, *forms: Sequence[str]) -> ConfigError:
        """``what`` cannot be read from these columns; it needs those of one of the ``forms``."""
        wanted = "; or ".join(", ".join(s) for s in forms)
        return ConfigError(
            f"{source_name(self.source)} has the columns {', '.join(self._first[1])}\n  {what} need {wanted}\n"
            "  for other names: --columns NAME=COLUMN,… (in Python: ColumnMapping({NAME: COLUMN}))"
        )

    def _readable(self) -> Iterator[tuple[SourceRow, dict[str, Any]]]:
        mapped = False
        for source in scan_rows(self.source, self.options.split, self.options.format):
            if source.data is None:
                self._bad(source)
            elif error := source.data.get("error"):  # of a rollout that failed
                self._skipped.append(f"{source.place}: {error}")
            else:
                try:
                    row = self.options.mapping.apply(source.data)
                except ConfigError as e:
                    if not mapped:  # in the first row: the name is wrong for all
                        raise
                    self._bad(replace(source, error=str(e)))
                    continue
                mapped = True
                yield source, row

    def _nothing_usable(self) -> str:
        why = f"has no row that can be used\n  the first of {len(self._skipped)}: {self._skipped[0]}" if self._skipped else "is empty"
        return f"{source_name(self.source)} {why}"

    def _bad(self, row: SourceRow) -> None:
        self._skipped.append(f"{row.place}: {row.error}")
        if self.options.on_bad is None:
            raise ConfigError(self._skipped[-1])
        self.options.on_bad(row)
