"""Rows of data: JSONL, JSON, CSV, Parquet or text, gzipped or not, from a file, standard input, a folder of splits or the hub.

The one reader of ``generate``, ``eval``, ``rollout``, ``check`` and ``train`` (docs/reference/data.md). Text is UTF-8, with or without a
byte order mark; lines end at a line feed, with a carriage return before it or not. A row that cannot be read comes as a
:class:`SourceRow` with its error, and the others are read. Must not depend on what a column means. pyarrow and datasets are imported
where they are needed.
"""

from __future__ import annotations

import gzip
import io
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast, get_args

from ivg.errors import ConfigError
from ivg.jobs.text import csv_rows, json_rows, jsonl_rows, text_rows
from ivg.settings.rows import Format
from ivg.utils.hub_status import reachable, unreachable_reason

FORMATS: tuple[str, ...] = get_args(Format)
STDIN = "-"
"""As a path: standard input."""
_SUFFIXES: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_TEXTUAL = {"jsonl": jsonl_rows, "json": json_rows, "csv": csv_rows, "text": text_rows}
_MARKS = {b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row of a data set, or why it cannot be read or used.

    Attributes:
        place: for messages: the file and the line (of Parquet and the hub: the row), from 1.
        data: columns by name; None where the row cannot be read.
        error: why it cannot be read; of a row that is readable, why it cannot be used.
        text: the text that is not a row.
    """

    place: str
    data: dict[str, Any] | None
    error: str | None = None
    text: str | None = None


def scan_rows(source: str | Path, split: str = "train", format: str | None = None, *, hub: bool = True) -> Iterator[SourceRow]:
    """All rows, including those that cannot be read.

    Args:
        source: a file; ``-`` for standard input; a folder with files of that split (``split.jsonl``, ``split-00000.parquet`` …); the
            id of a data set on the hub.
        split: of a folder or data set.
        format: one of :data:`FORMATS`; None: by the file's name, else by its content.
        hub: a name that is neither file nor folder may be a data set on the hub.

    Raises:
        ConfigError: no such source, or a file that cannot be read at all (another encoding, damaged Parquet).
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}\n  expected one of: {', '.join(FORMATS)}")
    path = Path(source)
    if str(source) == STDIN:
        yield from _read(STDIN, format)
    elif path.is_dir():
        for file in _split_files(path, split, format):
            yield from _read(file, format)
    elif format is not None or _suffix(path) is not None or path.exists() or not hub:
        yield from _read(path, format)
    elif _HUB_ID.fullmatch(str(source)):
        yield from _read_hub(str(source), split)
    else:
        raise ConfigError(f"no such file or folder: {source}\n  expected {_EXPECTED}, a folder of such files, or the id of a data set")


def read_rows(
    source: str | Path, split: str = "train", format: str | None = None, on_bad: Callable[[SourceRow], None] | None = None
) -> Iterator[dict[str, Any]]:
    """The rows that can be read, as :func:`scan_rows` finds them.

    Args:
        source: see there.
        split: see there.
        format: see there.
        on_bad: called with every row that cannot be read, which is then left out; None: the first one is an error.

    Raises:
        ConfigError: as there; and a row that cannot be read, where ``on_bad`` is None.
    """
    for row in scan_rows(source, split, format):
        if row.data is not None:
            yield row.data
        elif on_bad is None:
            raise ConfigError(f"{row.place}: {row.error}")
        else:
            on_bad(row)


_EXPECTED = f"{', '.join(_SUFFIXES)} (each may end in .gz)"


def _suffix(path: Path) -> Format | None:
    return _SUFFIXES.get(Path(path.name.removesuffix(".gz")).suffix.lower())


def _split_files(folder: Path, split: str, format: str | None) -> list[Path]:
    """The files of a split, all of one format: the same rows may be there in several."""
    for suffix, kind in _SUFFIXES.items():
        for name in (suffix, f"{suffix}.gz"):
            found = [p for p in (folder / f"{split}{name}", *sorted(folder.glob(f"{split}-*{name}"))) if p.is_file()]
            if found and format in (None, kind):
                return found
    have = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise ConfigError(f"{folder} has no split {split!r}\n  expected {split} as {_EXPECTED}; got {have}")


def source_name(source: str | Path) -> str:
    """A source as messages name it."""
    return "standard input" if str(source) == STDIN else str(source)


def _read(path: Path | str, format: str | None) -> Iterator[SourceRow]:
    name = source_name(path)
    with _open(path, name) as file:
        kind = format or (None if isinstance(path, str) else _suffix(path)) or _guess(file, name)
        if _peek(file).startswith(b"PAR1") and kind != "parquet":
            raise ConfigError(f"{name} is Parquet, not {kind}\n  give --format parquet, or a name that ends in .parquet")
        if kind == "parquet":
            yield from _read_parquet(file, name)
            return
        _check_encoding(file, name)
        number = 0
        try:
            for number, data, error, text in _TEXTUAL[kind](file):
                yield SourceRow(f"{name}, line {number}", data, error, text)
        except (EOFError, OSError, zlib.error) as e:  # damaged gzip, a failing disk: the rows before it are read
            yield SourceRow(f"{name}, after line {number}", None, f"cannot be read any further: {e}")
        except ValueError as e:
            raise ConfigError(f"{name}: {e}") from None


def _open(path: Path | str, name: str) -> io.BufferedReader[Any]:
    """The uncompressed bytes. Pipes are read whole, so that their beginning can be peeked at."""
    try:
        if isinstance(path, str):
            stream = getattr(sys.stdin, "buffer", None)
            raw: BinaryIO = io.BytesIO(stream.read() if stream is not None else sys.stdin.read().encode("utf-8", "surrogatepass"))
        elif path.exists() and not path.is_file():
            raw = io.BytesIO(path.read_bytes())
        else:
            raw = path.open("rb", buffering=0)
    except FileNotFoundError:
        raise ConfigError(f"no such file: {name}\n  expected a file: {_EXPECTED}") from None
    except OSError as e:
        raise ConfigError(f"cannot read {name}: {e.strerror}\n  expected a file: {_EXPECTED}") from None
    file = io.BufferedReader(cast("io.RawIOBase", raw))
    if file.peek(2)[:2] == b"\x1f\x8b":
        file = io.BufferedReader(cast("io.RawIOBase", gzip.GzipFile(fileobj=file)))
    elif name.endswith(".gz") and file.peek(1):
        raise ConfigError(f"{name} is not gzip\n  expected gzipped rows; a file that is not gzipped has no .gz in its name")
    return file


def _peek(file: io.BufferedReader[Any]) -> bytes:
    try:
        return file.peek(io.DEFAULT_BUFFER_SIZE)
    except (EOFError, OSError, zlib.error):  # damaged from its first byte on; reported when it is read
        return b""


def _guess(file: io.BufferedReader[Any], name: str) -> str:
    """The format by the content, where it is certain."""
    head = _peek(file)
    if head.startswith(b"PAR1"):
        return "parquet"
    _check_encoding(file, name)
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first in (b"{", b"["):
        return "json"  # its reader tells JSON from JSON lines
    if not first:
        return "jsonl"
    raise ConfigError(f"cannot tell the format of {name}\n  give --format {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")


def _check_encoding(file: io.BufferedReader[Any], name: str) -> None:
    head = _peek(file)[:4]
    found = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
    if found is None and len(head) == 4 and b"\0\0" in (head[::2], head[1::2]) and any(head):
        found = "UTF-16"  # without a mark: every other byte of Latin letters is 0
    if found is not None:
        raise ConfigError(f"{name} is {found}, not UTF-8\n  convert it, e.g. iconv -f {found} -t UTF-8")


def _read_parquet(file: BinaryIO, name: str) -> Iterator[SourceRow]:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError(f"reading {name} needs pyarrow\n  pip install 'ivg[train]'") from None
    number = 0
    try:
        source = file if isinstance(getattr(file, "raw", None), io.FileIO) else io.BytesIO(file.read())
        table = pq.ParquetFile(source)
        _check_names(table.schema_arrow.names, name)
        for batch in table.iter_batches():
            for data, error in _rows_of(batch):
                number += 1
                yield SourceRow(f"{name}, row {number}", data, error)
    except (EOFError, OSError, ValueError, zlib.error) as e:
        raise ConfigError(f"cannot read {name} as Parquet: {e}") from None


def _check_names(names: Sequence[str], source: str) -> None:
    twice = next((n for i, n in enumerate(names) if n in names[:i]), None)
    if twice is not None:
        raise ConfigError(f"{source}: two columns are called {twice!r}\n  give each column a name of its own")


def _rows_of(batch: Any) -> Iterator[tuple[dict[str, Any] | None, str | None]]:
    """(columns, error) of every row. A value that Python cannot hold (a time in nanoseconds) fails its row only."""
    try:
        for data in batch.to_pylist():
            yield data, None
        return
    except (ValueError, OverflowError):
        pass
    for i in range(batch.num_rows):
        try:
            yield batch.slice(i, 1).to_pylist()[0], None
        except (ValueError, OverflowError) as e:
            yield None, " ".join(str(e).split())


@contextmanager
def _no_retries(datasets: Any) -> Iterator[None]:
    """Make no requests to the hub meanwhile: what is in its cache is used at once."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _read_hub(name: str, split: str) -> Iterator[SourceRow]:
    try:
        import datasets
    except ImportError:
        raise ConfigError(f"{name!r} is no file here; loading it from the hub needs datasets\n  pip install 'ivg[train]'") from None
    offline = not reachable()
    try:
        with _no_retries(datasets) if offline else nullcontext():
            rows = datasets.load_dataset(name, split=split)
        for number, data in enumerate(rows, 1):
            yield SourceRow(f"{name}, row {number}", dict(data))
    except Exception as e:  # network, permission, unknown id: the hub's client raises dozens of kinds
        if offline:
            raise ConfigError(
                f"no file or folder {name!r} here, no such data set in the hub's cache, and {unreachable_reason()}\n"
                f"  expected {_EXPECTED}, a folder of such files, or the id of a data set that was downloaded before"
            ) from None
        first = (str(e).strip() or type(e).__name__).split("\n")[0]
        raise ConfigError(f"no file or folder {name!r}, and no such data set on the hub: {first}") from e
