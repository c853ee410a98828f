"""JSONL files that grow by blocks of rows, each computed from its own seeds: the bytes do not depend on interruptions.

What the rows depend on lies in ``<name>.meta.json`` beside the file. Must not know what a row means.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ivg.errors import ConfigError
from ivg.jobs.provenance import differences
from ivg.utils.jsonl import append_lines, as_lines, to_json, write_json
from ivg.utils.locks import lock_file


@contextmanager
def open_blocks(path: str | Path, block: int, total: int, provenance: Mapping[str, Any]) -> Iterator[ResumableJsonl]:
    """A :class:`ResumableJsonl` that no other run writes meanwhile.

    Raises:
        OutputError: another run is writing it.
        ConfigError: it was made with another ``provenance``.
    """
    with lock_file(Path(path)):
        yield ResumableJsonl(path, block, total, provenance)


class ResumableJsonl:
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
        self._claim({**json.loads(to_json(provenance)), "block": block})
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
        append_lines(self.path, as_lines(rows), sync=True)
        self.rows += len(rows)

    def _claim(self, provenance: dict[str, Any]) -> None:
        if not _meta(self.path).exists() and not (self.path.exists() and self.path.stat().st_size):
            write_json(_meta(self.path), provenance)
        check_provenance(self.path, provenance)

    def _cut(self) -> int:
        """Rows of whole blocks; what an interrupted run left behind them is cut off."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as lines:
            whole = [line for line in lines if line.endswith(b"\n")]
        keep = len(whole) if len(whole) >= self.total else len(whole) // self.block * self.block
        with self.path.open("r+b") as file:
            file.truncate(sum(map(len, whole[:keep])))
        return keep


def check_provenance(path: str | Path, provenance: Mapping[str, Any]) -> None:
    """Check, and change nothing, that the rows of a :class:`ResumableJsonl` were made with ``provenance`` (``block`` is part of it).

    Raises:
        ConfigError: they were made with another, which is named where it differs; nothing says what made them.
    """
    path, beside = Path(path), _meta(path)
    if not beside.exists():
        raise ConfigError(f"{path} is there, but not what made it ({beside.name})\n  give another place for the results")
    found, wanted = json.loads(beside.read_text(encoding="utf-8")), json.loads(to_json(provenance))
    different = differences(found, wanted)
    if different:
        raise ConfigError(
            f"{path} was made with other settings: {'; '.join(different)}\n  give another place for the results, or remove it"
        )


def _meta(path: str | Path) -> Path:
    return Path(path).with_name(f"{Path(path).name}.meta.json")
