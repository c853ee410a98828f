"""Rows in JSONL files that survive a kill: written in whole blocks, cut back to whole blocks, never mixed with another run's.

Knows: files. Must not know what a row means. Whoever makes rows in fixed blocks, each from its own seed, and resumes with
:class:`BlockFile`, gets the same bytes whether or not the run was interrupted. Standard library only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ivg.errors import ConfigError


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file, in order.

    Raises:
        ConfigError: no such file, or a line that is not a JSON object (named by its number).
    """
    try:
        file = Path(path).open(encoding="utf-8")  # noqa: SIM115
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}\n  expected a JSONL file") from None
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, UnicodeDecodeError):
                row = None
            if not isinstance(row, dict):
                raise ConfigError(f"{path}, line {number}: expected a JSON object, got {line.strip()[:60]}")
            yield row


def write_json(path: str | Path, data: Any) -> None:
    """``data`` as indented JSON; the file is whole or not there."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """``text``; the file is whole or not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


class BlockFile:
    """A JSONL file that grows by whole blocks of rows.

    Args:
        path: the file; ``<path>.meta.json`` beside it holds what its rows depend on.
        block: rows of each block; the last may be shorter.
        total: rows when it is finished; a file with more (of a longer run) is left as it is.
        provenance: what every row depends on (models, method, seeds …); a file made with another is refused.

    Raises:
        ConfigError: the file was made with another ``provenance``; names what differs.
    """

    def __init__(self, path: str | Path, block: int, total: int, provenance: Mapping[str, Any]) -> None:
        self.path, self.block, self.total = Path(path), block, total
        self._claim({**json.loads(json.dumps(provenance)), "block": block})
        self.rows = self._cut()

    @property
    def complete(self) -> bool:
        """Nothing is left to do."""
        return self.rows >= self.total

    def missing(self) -> Iterator[range]:
        """Positions of the rows of every block that is to be made, in order."""
        for start in range(self.rows, self.total, self.block):
            yield range(start, min(start + self.block, self.total))

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """One block, on the disk when this returns."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.rows += len(rows)

    def _claim(self, provenance: dict[str, Any]) -> None:
        if not _meta(self.path).exists() and not (self.path.exists() and self.path.stat().st_size):
            write_json(_meta(self.path), provenance)
        demand_provenance(self.path, provenance)

    def _cut(self) -> int:
        """Rows of whole blocks; what an interrupted run left behind them is cut off."""
        if not self.path.exists():
            return 0
        whole = [line for line in self.path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        keep = len(whole) if len(whole) >= self.total else len(whole) // self.block * self.block
        with self.path.open("r+b") as file:
            file.truncate(sum(map(len, whole[:keep])))
        return keep


def demand_provenance(path: str | Path, provenance: Mapping[str, Any]) -> None:
    """Check, and change nothing, that the rows of a :class:`BlockFile` were made with ``provenance`` (``block`` is part of it).

    Raises:
        ConfigError: they were made with another, which is named where it differs; nothing says what made them.
    """
    path, beside = Path(path), _meta(path)
    if not beside.exists():
        raise ConfigError(f"{path} is there, but not what made it ({beside.name})\n  give another place for the results")
    found, wanted = json.loads(beside.read_text(encoding="utf-8")), json.loads(json.dumps(provenance))
    different = [k for k in sorted({*found, *wanted}) if found.get(k) != wanted.get(k)]
    if different:
        lines = "; ".join(f"{k}: {found.get(k)!r} there, {wanted.get(k)!r} now" for k in different)
        raise ConfigError(f"{path} was made with other settings: {lines}\n  give another place for the results, or remove it")


def _meta(path: str | Path) -> Path:
    return Path(path).with_name(f"{Path(path).name}.meta.json")


def as_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """``rows`` as JSONL."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
