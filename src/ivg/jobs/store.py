"""Where answers go: a JSONL file that the same run goes on with, or a stream.

A row is done when its id, its prompt and everything that made its answer are the same (docs/reference/data.md). A file with rows that other
settings or models made is refused, each difference named; rows that answer another prompt under the same id are moved to
``<name>.superseded.jsonl`` and answered again. One run writes a file at a time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ivg.errors import ConfigError, OutputError
from ivg.jobs.prompts import Job, id_key, prompt_key
from ivg.jobs.provenance import differences
from ivg.utils.jsonl import RowError, append_lines, parse_row, to_json
from ivg.utils.locks import lock_file

MADE = ("method", "seed", "settings", "models", "engine", "endpoint", "values", "provenance")
"""Columns of a row that say what made it."""
_NO_ROWS = (".csv", ".parquet", ".gz")


class Rows(Protocol):
    """Where answers go."""

    def done(self, job: Job, index: int) -> bool:
        """Is this sample of the job there already?"""

    def append(self, row: Mapping[str, Any]) -> None:
        """One more row, whole or not at all."""


@contextmanager
def open_rows(path: str | Path, jobs: Iterable[Job], made: Mapping[str, Any], note: Callable[[str], None]) -> Iterator[Rows]:
    """The rows that are at ``path``, to add more to them.

    Args:
        path: a JSONL file; ``-``, a pipe or a device: a stream, with which nothing goes on.
        jobs: what this run answers.
        made: what makes its answers (:data:`MADE`).
        note: told of rows that are answered again.

    Raises:
        OutputError: no file can be written there, or another run writes it.
        ConfigError: rows that ivg did not write, or that other settings or models made; names what differs.
    """
    path = Path(path)
    if is_stream(path):
        with _stream(path) as stream:
            yield stream
        return
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder\n  expected a JSONL file")
    if path.name.endswith(_NO_ROWS):
        raise OutputError(f"cannot write {path}: rows are written as JSONL\n  give a name that ends in .jsonl")
    with lock_file(path):
        rows = ResumableRows(path, made)
        rows.supersede(jobs, note)
        yield rows


class ResumableRows:
    """A JSONL file of answers, each under an id and a number of the sample.

    Args:
        path: the file; half a row at its end, which a kill left behind, is cut off.
        made: what makes the answers of this run.

    Raises:
        ConfigError: as :func:`open_rows`.
        OutputError: the file cannot be written.
    """

    def __init__(self, path: Path, made: Mapping[str, Any]) -> None:
        self.path = path
        self._done: dict[tuple[str, int], str] = {}
        append_lines(path, "")  # before hours of answers: can it be written?
        self._cut()
        for number, row in self._rows():
            self._check(number, row, made)
            self._done[id_key(row["id"]), row["index"]] = prompt_key(row["prompt"])

    def done(self, job: Job, index: int) -> bool:
        """Is this sample of the job there already?"""
        return (job.key, index) in self._done

    def append(self, row: Mapping[str, Any]) -> None:
        """One more row, whole or not at all."""
        append_lines(self.path, to_json(row) + "\n")
        self._done[id_key(row["id"]), row["index"]] = prompt_key(row["prompt"])

    def supersede(self, jobs: Iterable[Job], note: Callable[[str], None]) -> None:
        """Move rows that answer another prompt than the job of their id to a file beside this one."""
        prompts = {job.key: prompt_key(job.prompt) for job in jobs}
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
        some = ", ".join(sorted(stale)[:4]) + (" …" if len(stale) > 4 else "")
        note(f"{len(stale)} prompts have changed under the same id ({some}): answered again, the old rows are in {beside}")

    def _lines(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            yield from (line for line in file if line.strip())

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in enumerate(self._lines(), 1):
            try:
                row = parse_row(line)
            except RowError as e:
                raise self._foreign(number, str(e)) from None
            if not {"id", "index", "prompt", "method"} <= set(row) or not isinstance(row["index"], int):
                raise self._foreign(number, f"got the columns {', '.join(row)[:80]}")
            yield number, row

    def _foreign(self, number: int, why: str) -> ConfigError:
        return ConfigError(f"{self.path} holds rows that ivg did not write (row {number}: {why})\n  give another --output")

    def _check(self, number: int, row: Mapping[str, Any], made: Mapping[str, Any]) -> None:
        if not isinstance(row.get("provenance"), dict):
            raise ConfigError(
                f"{self.path} was begun by an older ivg: row {number} does not say which weights, templates and types of numbers made it"
                "\n  give another --output"
            )
        found = differences({k: row[k] for k in MADE if k in row}, made)
        if found:
            raise ConfigError(f"{self.path} holds answers made otherwise: {'; '.join(found)}\n  give another --output, or remove it")

    def _cut(self) -> None:
        with self.path.open("r+b") as file:
            end = size = file.seek(0, os.SEEK_END)
            while end:
                begin = max(0, end - (1 << 16))
                file.seek(begin)
                found = file.read(end - begin).rfind(b"\n")
                if found >= 0:
                    end = begin + found + 1
                    break
                end = begin
            if end < size:
                file.truncate(end)

    def _replace(self, data: bytes) -> None:
        there = self.path.resolve()  # the name may be a link, which stays one
        partial = there.with_name(f"{there.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(there)
        except OSError as e:
            partial.unlink(missing_ok=True)
            raise OutputError(f"cannot write {self.path}: {e.strerror}\n  free space, and give the same command again") from None


class StreamRows:
    """Rows for another program: nothing is there before, nothing can be gone on with."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name = file, name

    def done(self, job: Job, index: int) -> bool:
        """Nothing is there."""
        return False

    def append(self, row: Mapping[str, Any]) -> None:
        """One more row. A reader that is gone (BrokenPipeError) ends the run."""
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
    """Standard output, a pipe, a device: what can be written to, but not gone on with."""
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
