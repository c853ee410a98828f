"""Where rows of answers go: a JSONL file that can be resumed, or a stream.

A row is done when its id, its prompt and its provenance are the same (docs/reference/data.md). A file with rows of other
settings or models is refused, each difference named; rows that answer another prompt under the same id are moved to
``<name>.superseded.jsonl`` and answered again. One run writes a file at a time.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ivg.errors import ConfigError, OutputError
from ivg.jobs.prompts import Job, id_key, prompt_key
from ivg.jobs.provenance import differences
from ivg.utils.jsonl import RowError, append_lines, parse_row, to_json, truncate_lines
from ivg.utils.locks import lock_file

PROVENANCE_COLUMNS = ("method", "seed", "settings", "models", "engine", "endpoint", "values", "provenance")
"""Columns of a row that say what its answer depends on."""
_NOT_JSONL = (".csv", ".parquet", ".gz")


class RowStore(Protocol):
    """Where rows of answers go."""

    def done(self, job: Job, index: int) -> bool:
        """Is this sample of the job there already?"""

    @property
    def repeats(self) -> Mapping[str, Mapping[str, int]]:
        """The column ``repeat`` of the rows that are there, by the prompt's key and the id's."""

    def append(self, row: Mapping[str, Any]) -> None:
        """One more row, whole or not at all."""


@contextmanager
def open_rows(
    path: str | Path, jobs: Iterable[Job], provenance: Mapping[str, Any], on_superseded: Callable[[str], None]
) -> Iterator[RowStore]:
    """The rows that are at ``path``, to add more to them.

    Args:
        path: a JSONL file; ``-``, a pipe or a device: a stream, which cannot be resumed.
        jobs: prompts of this run.
        provenance: what its answers depend on (:data:`PROVENANCE_COLUMNS`).
        on_superseded: called with a message about rows that are answered again because their prompt has changed.

    Raises:
        OutputError: no file can be written there, or another run is writing it.
        ConfigError: rows that ivg did not write, or of other settings or models; names what differs.
    """
    path = Path(path)
    if is_stream(path):
        with _stream(path) as stream:
            yield stream
        return
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder\n  expected a JSONL file")
    if path.name.endswith(_NOT_JSONL):
        raise OutputError(f"cannot write {path}: rows are written as JSONL\n  give a name that ends in .jsonl")
    with lock_file(path):
        rows = ResumableRows(path, provenance)
        rows.supersede(jobs, on_superseded)
        yield rows


class ResumableRows:
    """A JSONL file of answers, each with the id of its job and the number of the sample.

    Args:
        path: the file; half a row at its end, left by a killed run, is removed, and a whole one gets its line break.
        provenance: what the answers of this run depend on.

    Raises:
        ConfigError: as :func:`open_rows`.
        OutputError: the file cannot be written.
    """

    def __init__(self, path: Path, provenance: Mapping[str, Any]) -> None:
        self.path = path
        self._done: dict[tuple[str, int], str] = {}
        self.repeats: dict[str, dict[str, int]] = {}
        append_lines(path, "")  # fails now rather than after hours
        for number, line in enumerate(self._lines(), 1):
            if _is_cut(line):  # the last one; all others are of this run
                truncate_lines(path)
                break
            row = self._parse(number, line)
            self._check(number, row, provenance)
            self._note(row)
            if not line.endswith(b"\n"):
                append_lines(path, "\n")

    def done(self, job: Job, index: int) -> bool:
        """Is this sample of the job there already?"""
        return (job.key, index) in self._done

    def append(self, row: Mapping[str, Any]) -> None:
        """One more row, whole or not at all."""
        append_lines(self.path, to_json(row) + "\n")
        self._note(row)

    def _note(self, row: Mapping[str, Any]) -> None:
        """The row is there."""
        key, prompt = id_key(row["id"]), prompt_key(row["prompt"], row)
        self._done[key, row["index"]] = prompt
        repeat = row.get("repeat", 0)  # rows of version 0.2.0 have none
        self.repeats.setdefault(prompt, {})[key] = repeat if type(repeat) is int and repeat >= 0 else 0

    def supersede(self, jobs: Iterable[Job], on_superseded: Callable[[str], None]) -> None:
        """Move rows that answer another prompt than the job of their id to a file beside this one."""
        prompts = {job.key: job.prompt_key for job in jobs}
        stale = {key for (key, _), prompt in self._done.items() if prompts.get(key, prompt) != prompt}
        if not stale:
            return
        beside = self.path.with_name(f"{self.path.stem}.superseded.jsonl")
        kept: list[bytes] = []
        moved: list[bytes] = []
        for line in self._lines():
            (moved if id_key(parse_row(line)["id"]) in stale else kept).append(line)
        append_lines(beside, b"".join(moved).decode(), sync=True)
        self._replace(b"".join(kept))
        self._done = {k: v for k, v in self._done.items() if k[0] not in stale}
        self.repeats = {prompt: {k: n for k, n in rows.items() if k not in stale} for prompt, rows in self.repeats.items()}
        some = ", ".join(sorted(stale)[:4]) + (" …" if len(stale) > 4 else "")
        on_superseded(f"{len(stale)} prompts have changed under the same id ({some}): answered again, the old rows are in {beside}")

    def _lines(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            yield from (line for line in file if line.strip())

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row = parse_row(line)
        except RowError as e:
            raise self._foreign_row(number, str(e)) from None
        if not {"id", "index", "prompt", "method"} <= set(row) or not isinstance(row["index"], int):
            raise self._foreign_row(number, f"got the columns {', '.join(row)[:80]}")
        return row

    def _foreign_row(self, number: int, why: str) -> ConfigError:
        return ConfigError(f"{self.path} holds rows that ivg did not write (row {number}: {why})\n  use another --output")

    def _check(self, number: int, row: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        if not isinstance(row.get("provenance"), dict):
            raise ConfigError(f"{self.path} was written by an older version of ivg: row {number} has no provenance\n  use another --output")
        found = differences({k: row[k] for k in PROVENANCE_COLUMNS if k in row}, provenance)
        if found:
            raise ConfigError(
                f"{self.path}: settings differ from those of its rows: {'; '.join(found)}\n  use another --output, or remove the file"
            )

    def _replace(self, data: bytes) -> None:
        there = self.path.resolve()  # a link stays a link
        partial = there.with_name(f"{there.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(there)
        except OSError as e:
            partial.unlink(missing_ok=True)
            raise OutputError(f"cannot write {self.path}: {e.strerror}\n  free space, then run the same command again") from None


def _is_cut(line: bytes) -> bool:
    """Is it the beginning of a row, as a killed run leaves it? Nothing else may be removed: the file may be somebody's notes."""
    if line.endswith(b"\n"):
        return False
    try:
        text = line.decode()
    except UnicodeDecodeError as e:
        if e.end < len(line):
            return False  # another encoding; a cut is at the end
        text = line[: e.start].decode()
    decoder, first, second = json.JSONDecoder(), '{"id": ', ', "prompt": '
    if not text.startswith(first):
        return first.startswith(text)
    with suppress(ValueError):
        decoder.decode(text)  # whole, though ivg writes no such rows
        return False
    try:
        _, end = decoder.raw_decode(text, len(first))
    except ValueError:
        return True
    return text.startswith(second, end) or second.startswith(text[end:])


class StreamRows:
    """Rows for another program, through a pipe or standard output; cannot be resumed."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name = file, name
        self.repeats: dict[str, dict[str, int]] = {}

    def done(self, job: Job, index: int) -> bool:
        """Never."""
        return False

    def append(self, row: Mapping[str, Any]) -> None:
        """One more row; a reader that has closed the pipe ends the run (BrokenPipeError)."""
        data = (to_json(row) + "\n").encode()
        try:
            while data:  # a pipe may take a part only
                data = data[self.file.write(data) or 0 :]
            self.file.flush()
        except BrokenPipeError:
            raise
        except OSError as e:
            raise OutputError(f"cannot write {self.name}: {e.strerror}") from None


def is_stream(path: Path) -> bool:
    """Standard output, a pipe or a device, which cannot be resumed?"""
    if str(path) == "-" or str(path).startswith(("/dev/", "/proc/")):
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


@contextmanager
def _stream(path: Path) -> Iterator[StreamRows]:
    if str(path) in ("-", "/dev/stdout"):
        if sys.stdout is None:
            raise OutputError("cannot write standard output: it is closed\n  give a file, or leave standard output open")
        yield StreamRows(sys.stdout.buffer, "standard output")
        return
    with ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("ab", buffering=0))
        except OSError as e:
            raise OutputError(f"cannot write {path}: {e.strerror}") from None
        yield StreamRows(file, str(path))
