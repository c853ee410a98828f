"""JSONL files that grow by blocks of rows: where each block is computed from its own seeds, a resumed run writes the same bytes.

The provenance of the rows is in ``<name>.meta.json`` beside the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ivg.errors import ConfigError
from ivg.jobs.provenance import differences
from ivg.utils.jsonl import append_lines, as_lines, to_json, truncate_lines, write_json
from ivg.utils.locks import lock_file


@contextmanager
def open_blocks(path: str | Path, block: int, total: int, provenance: Mapping[str, Any]) -> Iterator[ResumableJsonl]:
    """A :class:`ResumableJsonl` that only this run writes.

    Raises:
        OutputError: another run is writing it.
        ConfigError: its rows have another ``provenance``.
    """
    with lock_file(Path(path)):
        yield ResumableJsonl(path, block, total, provenance)


class ResumableJsonl:
    """A JSONL file that grows by whole blocks of rows.

    Args:
        path: the file; ``<path>.meta.json`` beside it holds what its rows depend on.
        block: rows of each block; the last may be shorter.
        total: rows of the complete file; a file with more (of a longer run) is left as it is.
        provenance: what every row depends on (models, method, seeds …).

    Raises:
        ConfigError: the rows of the file have another ``provenance``; names what differs.
    """

    def __init__(self, path: str | Path, block: int, total: int, provenance: Mapping[str, Any]) -> None:
        self.path, self.block, self.total = Path(path), block, total
        self._write_or_check_provenance({**json.loads(to_json(provenance)), "block": block})
        self.rows = self._remove_incomplete_block()

    @property
    def complete(self) -> bool:
        """Are all rows there?"""
        return self.rows >= self.total

    def missing(self) -> Iterator[range]:
        """Positions of the rows of every missing block, in order."""
        for start in range(self.rows, self.total, self.block):
            yield range(start, min(start + self.block, self.total))

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append one block; it is on the disk when this returns."""
        append_lines(self.path, as_lines(rows), sync=True)
        self.rows += len(rows)

    def _write_or_check_provenance(self, provenance: dict[str, Any]) -> None:
        if not _meta(self.path).exists() and not (self.path.exists() and self.path.stat().st_size):
            write_json(_meta(self.path), provenance)
        check_provenance(self.path, provenance)

    def _remove_incomplete_block(self) -> int:
        """Remove an incomplete block at the end; the number of rows left."""
        if not self.path.exists():
            return 0
        return truncate_lines(self.path, lambda rows: rows if rows >= self.total else rows // self.block * self.block)


def check_provenance(path: str | Path, provenance: Mapping[str, Any]) -> None:
    """Check the provenance of the rows of a :class:`ResumableJsonl` (``block`` is part of it).

    Raises:
        ConfigError: another provenance (names what differs), or none.
    """
    path, beside = Path(path), _meta(path)
    if not beside.exists():
        raise ConfigError(f"{path} has no provenance: {beside.name} is missing\n  use another --out")
    found, wanted = json.loads(beside.read_text(encoding="utf-8")), json.loads(to_json(provenance))
    different = differences(found, wanted)
    if different:
        raise ConfigError(
            f"{path}: settings differ from those of its rows: {'; '.join(different)}\n  use another --out, or remove the file"
        )


def _meta(path: str | Path) -> Path:
    return Path(path).with_name(f"{Path(path).name}.meta.json")
