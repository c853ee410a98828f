"""JSON lines: strict parsing, values that are always valid JSON, files that are written whole or not at all. Standard library only."""

from __future__ import annotations

import datetime
import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

from ivg.errors import ConfigError, OutputError

BOM = b"\xef\xbb\xbf"
CONVERT = "convert the file, e.g. iconv -f LATIN1 -t UTF-8"


class RowError(ValueError):
    """Why a line or value is not a row, in one line."""

    @classmethod
    def of(cls, e: Exception, text: str = "") -> RowError:
        """From an exception that parsing ``text`` raised."""
        if isinstance(e, cls):
            return e
        if isinstance(e, UnicodeDecodeError):
            return cls(f"not UTF-8 at byte {e.start + 1} (0x{e.object[e.start]:02x}); {CONVERT}")
        if isinstance(e, RecursionError):
            return cls("nested too deeply")
        if isinstance(e, json.JSONDecodeError):
            return cls(f"expected a JSON object, got {_beginning(text or e.doc)} ({e.msg.lower()} at character {e.pos + 1})")
        return cls(" - ".join(str(e).split("\n")))


def parse_row(line: bytes) -> dict[str, Any]:
    """One JSON object from UTF-8; a byte order mark before it is left out.

    Raises:
        RowError: not UTF-8, not strict JSON (no NaN, no duplicate keys), not an object.
    """
    try:
        return parse_object(line.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise RowError.of(e) from None


def parse_object(text: str) -> dict[str, Any]:
    """One JSON object.

    Raises:
        RowError: not strict JSON (no NaN, no duplicate keys), not an object.
    """
    try:
        row = _decoder.decode(text)
    except (ValueError, RecursionError) as e:
        raise RowError.of(e, text) from None
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object, got {_beginning(text)}")
    return row


def _beginning(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:59] + "…"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [k for k, _ in pairs]
        raise RowError(f"the key {next(k for i, k in enumerate(names) if k in names[:i])!r} appears twice")
    return out


def _no_number(name: str) -> NoReturn:
    raise RowError(f"{name} is not JSON; write null")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise RowError(f"the number {digits[:40]} is too large")
    return number


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite)


def to_json(value: Any) -> str:
    """``value`` in one line of valid JSON; values that JSON has no type for are converted by :func:`jsonable`."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        value = jsonable(value)
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write as an escape only
        text = json.dumps(value, allow_nan=False)
    return text


def jsonable(value: Any) -> Any:
    """``value`` in JSON's types: dates by ISO 8601, durations in seconds, bytes as text, NaN and infinity as null, arrays as lists."""
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(v) for v in value]
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).decode("utf-8", "backslashreplace")
    if isinstance(value, Decimal):
        return _decimal(value)
    plain = getattr(value, "tolist", None)  # arrays and scalars of NumPy, tensors
    return jsonable(plain()) if plain is not None else str(value)


def _decimal(value: Decimal) -> int | float | str | None:
    """The number if a float holds it exactly, else its digits as text."""
    if not value.is_finite():
        return None
    if value == value.to_integral_value():
        return int(value)
    return float(value) if Decimal(repr(float(value))) == value else str(value)


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file, in order; lines end at a line feed, with a carriage return before it or not.

    Raises:
        ConfigError: no such file, or a line that is not a JSON object (named by its number).
    """
    try:
        file = Path(path).open("rb")  # noqa: SIM115
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}\n  expected a JSONL file") from None
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield parse_row(line)
            except RowError as e:
                raise ConfigError(f"{path}, line {number}: {e}") from None


def write_json(path: str | Path, data: Any) -> None:
    """Write ``data`` as indented JSON, atomically."""
    write_text(path, json.dumps(jsonable(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` atomically: the file is whole or absent."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        partial.replace(path)
    except OSError as e:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        space = "free space, or " if e.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise OutputError(f"cannot write {path}: {e.strerror}\n  {space}write to another path") from None


def append_lines(path: Path, text: str, *, sync: bool = False) -> None:
    """Append all lines, or none if the disk is full.

    Args:
        path: of the file; folders are created.
        text: lines.
        sync: wait until they are on the disk.

    Raises:
        OutputError: full disk, read-only folder.
    """
    data = memoryview(text.encode("utf-8"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            begin = file.seek(0, os.SEEK_END)
            try:
                while data:
                    data = data[file.write(data) :]
                if sync:
                    os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(begin)
                raise
    except OSError as e:
        raise OutputError(f"cannot write {path}: {e.strerror}\n  its rows are complete; run the same command again to resume") from None


def truncate_lines(path: Path, keep: Callable[[int], int] = lambda lines: lines) -> int:
    """Remove an incomplete line at the end of a file, and all behind the first ``keep(number of lines)``; how many are left."""
    with path.open("r+b") as file:
        lengths = [len(line) for line in file if line.endswith(b"\n")]
        lines = keep(len(lengths))
        file.truncate(sum(lengths[:lines]))
    return lines


def as_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """``rows`` as JSONL."""
    return "".join(to_json(row) + "\n" for row in rows)
