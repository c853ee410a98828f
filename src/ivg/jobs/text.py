"""Rows of JSONL, JSON, CSV and plain text from bytes.

Lines end at a line feed, with a carriage return before it or not. Each row is decoded and parsed alone, so that one that cannot be
read does not affect the others. A ``ValueError`` means that the file cannot be read at all. Standard library only.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from ivg.utils.jsonl import BOM, CONVERT, RowError, parse_object, parse_row


class ParsedRow(NamedTuple):
    """Line number from 1, columns (None: not a row), why it is not a row, and its text then."""

    line: int
    data: dict[str, Any] | None
    error: str | None = None
    text: str | None = None


_SPACE = re.compile(r"[ \t\r\n]*")
_ENDS = json.JSONDecoder(parse_int=str, parse_float=str)
"""Finds the end of a value; numbers are not converted."""
_UNDECODED = re.compile("[\udc80-\udcff]")
"""Bytes that are not UTF-8, as ``surrogateescape`` decodes them."""
_FIELD = 2**31 - 1
"""Largest CSV field in characters; the csv module's default is 128 KiB."""


def jsonl_rows(file: BinaryIO) -> Iterator[ParsedRow]:
    """One JSON object a line; blank lines are skipped."""
    for number, line in enumerate(file, 1):
        if not line.removeprefix(BOM).strip():
            continue
        try:
            yield ParsedRow(number, parse_row(line))
        except RowError as e:
            yield ParsedRow(number, None, str(e), escaped(line))


def text_rows(file: BinaryIO) -> Iterator[ParsedRow]:
    """One prompt a line, as the column ``prompt``; blank lines are skipped."""
    for number, line in enumerate(file, 1):
        if not line.removeprefix(BOM).strip():
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as e:
            yield ParsedRow(number, None, str(RowError.of(e)), escaped(line))
            continue
        yield ParsedRow(number, {"prompt": text.removesuffix("\n").removesuffix("\r")})


def csv_rows(file: BinaryIO) -> Iterator[ParsedRow]:
    """Comma-separated values (RFC 4180) behind a line of column names; every value is a text. A row's number is that of its first line."""
    csv.field_size_limit(max(csv.field_size_limit(), _FIELD))
    seen: list[str] = []
    reader = csv.reader(_decoded(file, seen), strict=True)
    try:
        names = next(reader, None)
    except csv.Error as e:
        raise ValueError(f"no column names in line 1: {_csv_error(e)}") from None
    if names is None:
        return
    if _UNDECODED.search("".join(names)):
        raise ValueError(f"the column names are not UTF-8\n  {CONVERT}")
    twice = next((n for i, n in enumerate(names) if n in names[:i]), None)
    if twice is not None:
        raise ValueError(f"two columns are called {twice!r}\n  give each column a name of its own")
    while True:
        number = reader.line_num + 1
        seen.clear()
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            yield ParsedRow(number, None, _csv_error(e), _whole("".join(seen)))
            continue
        if not row:
            continue
        if found := _UNDECODED.search("".join(row)):
            yield ParsedRow(number, None, f"not UTF-8 (byte 0x{ord(found[0]) - 0xDC00:02x}); {CONVERT}", _whole("".join(seen)))
        elif len(row) != len(names):
            yield ParsedRow(number, None, f"expected {len(names)} fields, got {len(row)}", _whole("".join(seen)))
        else:
            yield ParsedRow(number, dict(zip(names, row, strict=True)))


def _decoded(file: BinaryIO, seen: list[str]) -> Iterator[str]:
    """Lines as text, each appended to ``seen``."""
    for number, line in enumerate(file):
        seen.append(line.removeprefix(b"" if number else BOM).decode("utf-8", "surrogateescape"))
        yield seen[-1]


def _csv_error(e: csv.Error) -> str:
    said = str(e)
    if "unexpected end of data" in said:
        return "a quoted field that begins here is not closed"
    if "new-line character" in said:
        return "a carriage return in an unquoted field"
    return f"not CSV: {said}"


def json_rows(file: BinaryIO) -> Iterator[ParsedRow]:
    """A list of objects; an object with such a list as ``data``; one object, which is one row; or JSON lines."""
    raw = file.read()
    text = raw.decode("utf-8-sig", "surrogateescape")
    start = _skip(text, 0)
    if start == len(text):
        return
    rows = start if text[start] == "[" else _data_list(text, start) if text[start] == "{" else None
    if rows is not None:
        yield from _elements(text, rows, whole=text[start] == "[")
    elif text[start] == "{" and _is_row(raw[: raw.find(b"\n") + 1]):
        yield from jsonl_rows(io.BytesIO(raw))
    else:
        try:
            yield ParsedRow(_line(text, start), parse_row(raw))
        except RowError as e:
            yield ParsedRow(_line(text, start), None, str(e), escaped(raw))


def _elements(text: str, start: int, *, whole: bool) -> Iterator[ParsedRow]:
    """The values of the list that begins at ``start``; ``whole``: nothing may follow it."""
    i, line, counted = _skip(text, start + 1), 1, 0
    while i < len(text) and text[i] != "]":
        line, counted = line + text.count("\n", counted, i), i
        try:
            _, end = _ENDS.raw_decode(text, i)
        except (ValueError, RecursionError) as e:
            yield ParsedRow(line, None, f"{RowError.of(e, text[i:])}; the rest of the file cannot be read", _whole(text[i:]))
            return
        piece = text[i:end]
        try:
            if _UNDECODED.search(piece):
                raise RowError(f"not UTF-8; {CONVERT}")
            yield ParsedRow(line, parse_object(piece))
        except RowError as e:
            yield ParsedRow(line, None, str(e), _whole(piece))
        i = _skip(text, end)
        if i < len(text) and text[i] == ",":
            i = _skip(text, i + 1)
            ended = i < len(text) and text[i] != "]"
        else:
            ended = i < len(text) and text[i] == "]"
        if not ended:
            error = "not JSON: expected a comma or the end of the list; the rest of the file cannot be read"
            yield ParsedRow(_line(text, i), None, error, _whole(text[i:]))
            return
    if whole and (i := _skip(text, i + 1)) < len(text):
        yield ParsedRow(_line(text, i), None, "not JSON: there is text after the list", _whole(text[i:]))


def _data_list(text: str, start: int) -> int | None:
    """Start of the list ``data`` in the object that begins at ``start``; None: it has none."""
    i = _skip(text, start + 1)
    try:
        while text[i : i + 1] == '"':
            key, i = _ENDS.raw_decode(text, i)
            i = _skip(text, i)
            if text[i : i + 1] != ":":
                return None
            i = _skip(text, i + 1)
            if key == "data" and text[i : i + 1] == "[":
                return i
            _, i = _ENDS.raw_decode(text, i)
            i = _skip(text, i)
            i = _skip(text, i + 1) if text[i : i + 1] == "," else len(text)
    except (ValueError, RecursionError):
        return None
    return None


def _is_row(line: bytes) -> bool:
    try:
        return bool(line) and isinstance(json.loads(line.decode("utf-8-sig", "surrogateescape")), dict)
    except (ValueError, RecursionError):
        return False


def _line(text: str, i: int) -> int:
    return 1 + text.count("\n", 0, i)


def _skip(text: str, i: int) -> int:
    found = _SPACE.match(text, i)
    return found.end() if found else i


def _whole(text: str) -> str:
    return escaped(text.encode("utf-8", "surrogateescape"))


def escaped(raw: bytes) -> str:
    """The text; bytes that are not UTF-8 are escaped."""
    return raw.decode("utf-8", "backslashreplace").strip("\r\n")
