"""The one reader of rows: what is written in any format is read back; what cannot be read fails alone, by its line and why."""

import datetime
import gzip
import io
import json
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ivg.errors import ConfigError
from ivg.jobs import prompts
from ivg.jobs.formats import read_rows, scan_rows
from ivg.jobs.prompts import read_jobs
from ivg.utils.jsonl import as_lines, jsonable, parse_row, read_jsonl, to_json

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

texts = st.text() | st.sampled_from(["\u2028", "\x85\u2029", "a\rb", "\r\n", '"', "a,b", "\ud800", "🎬🎞️", "", " ", "\ufeff", "\0", "é"])
scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6)
rows_of_json = st.lists(st.dictionaries(texts, values, max_size=4), max_size=5)
plain = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["\u2028", "a\rb", "\r\n", '"', "a,b", "🎬", "", " "])


def read(path, **more):
    return list(read_rows(path, **more))


def wrapped(data, path, gz):
    path.write_bytes(gzip.compress(data) if gz else data)
    return path


@FUZZ
@given(rows=rows_of_json, bom=st.booleans(), gz=st.booleans(), end=st.sampled_from(["\n", "\r\n", "\n\n"]), ascii=st.booleans())
def test_jsonl_is_read_as_it_was_written(tmp_path, rows, bom, gz, end, ascii):
    lines = [json.dumps(r) if ascii else to_json(r) for r in rows]
    data = b"\xef\xbb\xbf" * bom + "".join(line + end for line in lines).encode()
    assert read(wrapped(data, tmp_path / "x.jsonl", gz)) == rows
    assert read(wrapped(data[: -len(end)] if rows else data, tmp_path / "x.jsonl", gz)) == rows  # no end of the last line


@FUZZ
@given(
    rows=rows_of_json, gz=st.booleans(), indent=st.none() | st.integers(0, 2), around=st.none() | st.dictionaries(texts, values, max_size=2)
)
def test_json_is_read_as_it_was_written(tmp_path, rows, gz, indent, around):
    data = rows if around is None else {**{k: v for k, v in around.items() if k != "data"}, "data": rows}
    assert read(wrapped(json.dumps(data, indent=indent).encode(), tmp_path / "x.json", gz)) == rows


def quoted(cell, always):
    return '"' + cell.replace('"', '""') + '"' if always or not cell or set(cell) & set(',"\r\n') else cell


@FUZZ
@given(
    names=st.lists(plain.filter(lambda name: "\0" not in name), min_size=1, max_size=3, unique=True),
    cells=st.lists(st.lists(plain, min_size=3, max_size=3), max_size=5),
    end=st.sampled_from(["\n", "\r\n"]),
    always=st.booleans(),
    bom=st.booleans(),
)
def test_csv_is_read_as_it_was_written(tmp_path, names, cells, end, always, bom):
    rows = [row[: len(names)] for row in cells]
    text = "".join(",".join(quoted(cell, always) for cell in row) + end for row in [names, *rows])
    path = wrapped(b"\xef\xbb\xbf" * bom + text.encode(), tmp_path / "x.csv", False)
    assert read(path) == [dict(zip(names, row, strict=True)) for row in rows]


@FUZZ
@given(lines=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\0")).filter(lambda s: s.strip()), max_size=5))
def test_text_is_a_prompt_a_line(tmp_path, lines):
    lines = [line.removesuffix("\r").removeprefix("\ufeff") or "x" for line in lines]
    path = wrapped("".join(f"{line}\n" for line in lines).encode(), tmp_path / "x.txt", False)
    wanted = [{"prompt": line} for line in lines if line.encode().strip()]
    assert read(path, format="text") == wanted


@FUZZ
@given(
    data=st.binary(max_size=200),
    format=st.sampled_from(["jsonl", "json", "csv", "text"]),
    head=st.sampled_from([b"", b"[", b"{", b'{"a":1}\n']),
)
def test_any_bytes_are_rows_or_reasons(tmp_path, data, format, head):
    path = wrapped(head + data, tmp_path / "x", False)
    try:
        found = list(scan_rows(path, format=format))
    except ConfigError as e:
        assert str(path) in str(e)
        return
    for row in found:
        assert (row.data is None) == (row.error is not None)
        assert row.place.startswith(f"{path}, ")
        if row.data is not None:
            parse_row(to_json(row.data).encode())  # and can be written
        else:
            assert "\n" not in row.error


def test_parquet_with_messages_and_types_of_tables(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    messages = [{"role": "user", "content": "Hi\u2028"}]
    rows = [
        {
            "messages": messages,
            "price": Decimal("1.10"),
            "at": datetime.datetime(2024, 2, 3, 4, 5),
            "raw": b"ab",
            "x": float("nan"),
            "v": [1.5],
        },
        {"messages": messages, "price": None, "at": None, "raw": b"\xff", "x": 1.0, "v": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    found = read(tmp_path / "x.parquet")
    assert [r["messages"] for r in found] == [messages] * 2
    assert [json.loads(to_json(r)) for r in found] == [
        {"messages": messages, "price": 1.1, "at": "2024-02-03T04:05:00", "raw": "ab", "x": None, "v": [1.5]},
        {"messages": messages, "price": None, "at": None, "raw": "\\xff", "x": 1.0, "v": None},
    ]
    (tmp_path / "x.parquet.gz").write_bytes(gzip.compress((tmp_path / "x.parquet").read_bytes()))
    assert len(read(tmp_path / "x.parquet.gz")) == 2
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ConfigError, match=r"cannot read .*bad.parquet as Parquet: "):
        read(tmp_path / "bad.parquet")
    (tmp_path / "x.parquet").rename(tmp_path / "x.jsonl")
    with pytest.raises(ConfigError, match=r"x.jsonl is Parquet, not jsonl\n  give --format parquet"):
        read(tmp_path / "x.jsonl")


def test_what_is_written_is_valid_json_whatever_tables_hold():
    value = {
        "a": np.float32(0.5), "b": np.array([[1, 2]]), "c": np.int64(3), "d": float("inf"), "e": Decimal("3"),
        "f": Decimal("1e-400"),
        "g": datetime.timedelta(seconds=2.5), "h": datetime.date(2024, 1, 2), "i": {1: (2,)},
        "j": np.datetime64("2024-01-02"), "k": "\ud800",
    }  # fmt: skip
    assert parse_row(to_json(value).encode()) == {
        "a": 0.5, "b": [[1, 2]], "c": 3, "d": None, "e": 3, "f": "1E-400", "g": 2.5, "h": "2024-01-02", "i": {"1": [2]},
        "j": "2024-01-02", "k": "\ud800",
    }  # fmt: skip
    assert jsonable(Decimal("NaN")) is None


LONG = '{"prompt": "' + "x" * 200_000 + '"}\n'
GOOD = b'{"prompt": "good"}\n'


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"hello", "expected a JSON object, got hello (expecting value at character 1)"),
        (b"[1]", "expected a JSON object, got [1]"),
        (b'{"prompt": "caf\xe9"}', "not UTF-8 at byte 16 (0xe9); convert the file, e.g. iconv -f LATIN1 -t UTF-8"),
        (b'{"a": NaN}', "NaN is not JSON; write null"),
        (b'{"a": -Infinity}', "-Infinity is not JSON; write null"),
        (b'{"a": 1e999}', "the number 1e999 is too large"),
        (b'{"a": 1, "a": 2}', "the key 'a' appears twice"),
        (b"[" * 5000, None),
        (b'{"a": 1} {"a": 2}', 'expected a JSON object, got {"a": 1} {"a": 2} (extra data at character 10)'),
    ],
    ids=lambda x: x[:20].decode("latin-1") if isinstance(x, bytes) else "",
)
def test_a_row_that_cannot_be_read_fails_alone(tmp_path, line, why):
    path = wrapped(LONG.encode() + line + b"\n" + GOOD, tmp_path / "x.jsonl", False)
    first, bad, good = scan_rows(path)
    assert (len(first.data["prompt"]), good.data) == (200_000, {"prompt": "good"})
    assert (bad.place, bad.data) == (f"{path}, line 2", None)
    assert bad.text.encode("latin-1", "replace")[:3] == line[:3]
    if why:
        assert bad.error == why
    with pytest.raises(ConfigError, match=r"x\.jsonl, line 2: "):
        read(path)
    reported = []
    assert len(read(path, on_bad=reported.append)) == 2
    assert reported == [bad]


def test_rows_of_a_json_list_fail_alone(tmp_path):
    path = wrapped(b'[{"a": 1},\n {"a": NaN},\n 3,\n {"b": "\xff"},\n {"a": 2}]', tmp_path / "x.json", False)
    found = list(scan_rows(path))
    assert [r.data for r in found] == [{"a": 1}, None, None, None, {"a": 2}]
    assert [r.place for r in found] == [f"{path}, line {n}" for n in range(1, 6)]
    assert [r.error for r in found[1:4]] == [
        "NaN is not JSON; write null", "expected a JSON object, got 3", "not UTF-8; convert the file, e.g. iconv -f LATIN1 -t UTF-8",
    ]  # fmt: skip
    for text, count, why in (
        ('[{"a": 1}, {"a": 2', 1, "the rest of the file cannot be read"),
        ('[{"a": 1} {"a": 2}]', 1, "expected a comma or the end of the list"),
        ('[{"a": 1}', 1, "expected a comma or the end of the list"),
        ('[{"a": 1}] x', 1, "there is text after the list"),
        ('{"a": 1', 0, "expected a JSON object"),
    ):
        *good, bad = scan_rows(wrapped(text.encode(), path, False))
        assert [len(good), why in bad.error] == [count, True]


def test_json_is_a_list_a_table_a_row_or_lines(tmp_path):
    for text, rows in (
        ('{"version": {"x": [1]}, "data": [{"a": 1}]}', [{"a": 1}]),
        ('{\n "a": 1\n}', [{"a": 1}]),
        ('{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        ("[]", []),
        ("", []),
    ):
        assert read(wrapped(text.encode(), tmp_path / "x.json", False)) == rows
        assert read(wrapped(text.encode(), tmp_path / "without-a-name", False)) == rows


def test_rows_of_csv_fail_alone(tmp_path):
    long = "y" * 200_000
    path = wrapped(
        f'id,prompt\n1,"a\nb"\n2\n3,x\xe9\n4,"a"b\n5,c\rd\n\n6,{long}\n7,"never\nends\n'.encode("latin-1"), tmp_path / "x.csv", False
    )
    found = list(scan_rows(path))
    assert [r.data for r in found if r.data] == [{"id": "1", "prompt": "a\nb"}, {"id": "6", "prompt": long}]
    assert [(r.place.rpartition(" ")[2], r.error) for r in found if r.error] == [
        ("4", "expected 2 fields, got 1"),
        ("5", "not UTF-8 (byte 0xe9); convert the file, e.g. iconv -f LATIN1 -t UTF-8"),
        ("6", "not CSV: ',' expected after '\"'"),
        ("7", "a carriage return in an unquoted field"),
        ("10", "a quoted field that begins here is not closed"),
    ]
    assert [r.text for r in found if r.error][1:] == ["3,x\\xe9", '4,"a"b', "5,c\rd", '7,"never\nends']
    for head, why in ((b"a,a\n", "two columns are called 'a'"), (b"caf\xe9\n", "the column names are not UTF-8"), (b'a"b\n"', None)):
        if why:
            with pytest.raises(ConfigError, match=why):
                read(wrapped(head, path, False))


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("x.jsonl", '{"a": 1}\n'.encode("utf-16"), "x.jsonl is UTF-16, not UTF-8\n  convert it, e.g. iconv -f UTF-16 -t UTF-8"),
        ("x.jsonl", '{"a": 1}\n'.encode("utf-16-le"), "x.jsonl is UTF-16, not UTF-8"),
        ("x.csv", "a\n1\n".encode("utf-32"), "x.csv is UTF-32, not UTF-8"),
        ("x.txt", b"hello\n", "cannot tell the format of {}\n  give --format jsonl, json, csv, parquet or text"),
        ("x.jsonl.gz", b'{"a": 1}\n', "x.jsonl.gz is not gzip"),
        ("x.parquet", None, "no such file: {}"),
        ("none/x.jsonl", None, "no such file: {}"),
        ("no such thing", None, "no such file or folder: {}"),
    ],
    ids=lambda x: x if isinstance(x, str) and len(x) < 20 else "",
)
def test_what_cannot_be_read_at_all(tmp_path, name, data, says):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError) as e:
        read(tmp_path / name)
    assert says.format(tmp_path / name) in str(e.value)
    assert str(e.value).count("\n") <= 1


def test_a_format_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown format 'xml'\n  expected one of: jsonl, json, csv, parquet, text"):
        read(tmp_path / "x.xml", format="xml")


def test_damaged_gzip_keeps_what_came_before(tmp_path):
    data = gzip.compress(b"".join(b'{"a": "%d"}\n' % i for i in range(20000)))
    *good, bad = scan_rows(wrapped(data[: len(data) // 2], tmp_path / "x.jsonl", False))
    assert len(good) > 100
    assert all(row.data for row in good)
    assert "cannot be read any further: Compressed file ended" in bad.error


def test_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"reading .*x.parquet needs pyarrow\n  pip install 'ivg\[train\]'"):
        read(tmp_path / "x.parquet")


def test_standard_input(tmp_path, monkeypatch):
    for data, format, rows in (
        (b'{"a": 1}\n{"a": 2}\n', None, [{"a": 1}, {"a": 2}]),
        (gzip.compress(b'[{"a": 1}]'), None, [{"a": 1}]),
        (b"a\n1\n", "csv", [{"a": "1"}]),
        ("Hé\n\nHo".encode(), "text", [{"prompt": "Hé"}, {"prompt": "Ho"}]),
        (b"", None, []),
    ):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert read("-", format=format) == rows
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"oh\n")))
    with pytest.raises(ConfigError, match="cannot tell the format of standard input"):
        read("-")


def test_folders_take_a_split_in_one_format(tmp_path):
    for name in ("test.jsonl", "train-00000.jsonl.gz", "train-00001.jsonl.gz", "train.csv"):
        data = b"a\n3\n" if name.endswith("csv") else b'{"a": 1}\n'
        wrapped(data, tmp_path / name, name.endswith(".gz"))
    assert read(tmp_path) == [{"a": 1}] * 2
    assert read(tmp_path, format="csv") == [{"a": "3"}]
    with pytest.raises(ConfigError, match=r"has no split 'dev'\n  expected dev as .jsonl, .*; got test.jsonl"):
        read(tmp_path, split="dev")


def jobs(rows, tmp_path):
    failed = []
    path = tmp_path / "in.jsonl"
    path.write_text(as_lines(rows))
    return list(read_jobs(scan_rows(path), lambda place, why, row: failed.append((place.rpartition(" ")[2], why, row)))), failed


def test_jobs_have_ids_that_do_not_depend_on_their_place(tmp_path):
    rows = [
        {"prompt": "a"},
        {"prompt": "b"},
        {"prompt": "a"},
        {"id": None, "messages": [{"role": "user", "content": "a"}]},
        {"id": 1, "prompt": "a"},
    ]
    found, failed = jobs(rows, tmp_path)
    assert not failed
    ids = [job.id for job in found]
    assert len(set(ids)) == 5
    assert ids[2] == f"{ids[0]}-2"
    assert ids[4] == 1
    assert [job.id for job in jobs([{"prompt": "new"}, *rows], tmp_path)[0][1:]] == ids


def test_ids_of_many_equal_prompts_take_no_search_each(tmp_path, monkeypatch):
    looked: list[str] = []
    monkeypatch.setattr(prompts, "id_key", lambda identity: looked.append(identity) or json.dumps(identity))
    found, _ = jobs([{"prompt": "a"}] * 200, tmp_path)
    taken = found[0].id
    assert [job.id for job in found[1:]] == [f"{taken}-{n}" for n in range(2, 201)]
    assert len(looked) < 1000
    found, _ = jobs([{"prompt": "a"}, {"id": f"{taken}-2", "prompt": "b"}, {"prompt": "a"}], tmp_path)
    assert [job.id for job in found] == [taken, f"{taken}-2", f"{taken}-3"]


def test_rows_that_are_no_jobs(tmp_path):
    rows = [
        {"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}, {"id": "1", "prompt": "c"}, {"id": 3, "text": "x", "prompt": None},
        {"prompt": 5},
        {"prompt": "\ud800"}, {"messages": "[1"}, {"messages": '[{"role": "user", "content": "from CSV"}]', "prompt": None},
    ]  # fmt: skip
    found, failed = jobs(rows, tmp_path)
    assert [job.prompt for job in found] == ["a", "c", [{"role": "user", "content": "from CSV"}]]
    assert [line for line, _, _ in failed] == ["2", "4", "5", "6", "7"]
    assert failed[0][1] == f"the id 1 is also that of {tmp_path / 'in.jsonl'}, line 1\n  give each row an id of its own, or none"
    assert failed[1][1:] == ("expected a prompt or messages, got id, text", rows[3])
    assert "surrogate" in failed[3][1]


def test_empty_cells_of_csv_are_none(tmp_path):
    chat = [{"role": "user", "content": "b"}]
    rows = [{"id": "", "prompt": "a", "messages": ""}, {"id": "", "prompt": "", "messages": json.dumps(chat)}, {"id": "", "prompt": ""}]
    found, failed = jobs(rows, tmp_path)
    assert [job.prompt for job in found] == ["a", chat, ""]  # no prompt is empty: whoever answers says so
    assert not failed


def test_unknown_columns_travel_and_overwrite_nothing(tmp_path):
    (job,), _ = jobs([{"id": 1, "prompt": "a", "topic": "x", "score": 3, "input_columns": 4, "usage": None}], tmp_path)
    assert job.extra_columns({"text": "", "new": 1}) == {"topic": "x", "input_columns": {"score": 3, "input_columns": 4, "usage": None}}


def test_our_own_files_are_cut_at_line_feeds_only(tmp_path):
    rows = [{"a": "x\u2028y\x85\x0c\x1c"}, {"a": "\r"}]
    (tmp_path / "x.jsonl").write_bytes(as_lines(rows).encode())
    assert list(read_jsonl(tmp_path / "x.jsonl")) == rows


cells = st.fixed_dictionaries({
    "text": st.none() | plain, "number": st.none() | st.integers(-(2**62), 2**62), "real": st.none() | st.floats(allow_nan=False),
    "flag": st.none() | st.booleans(), "list": st.none() | st.lists(plain, max_size=2),
})  # fmt: skip


@settings(FUZZ, max_examples=25)
@given(rows=st.lists(cells, max_size=4))
def test_parquet_is_read_as_it_was_written(tmp_path, rows):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    types = {"text": pa.string(), "number": pa.int64(), "real": pa.float64(), "flag": pa.bool_(), "list": pa.list_(pa.string())}
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(types)), tmp_path / "x.parquet", row_group_size=2)
    assert read(tmp_path / "x.parquet") == rows


def test_a_row_of_parquet_fails_alone(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    far = pa.array([0, 2**55, 1], pa.timestamp("ms"))  # no year of Python's
    pq.write_table(pa.table({"prompt": ["a", "b", "c"], "at": far}), tmp_path / "x.parquet")
    found = list(scan_rows(tmp_path / "x.parquet"))
    assert [row.data and row.data["prompt"] for row in found] == ["a", None, "c"]
    assert found[1].place.endswith("x.parquet, row 2")
    assert found[1].error
    with pytest.raises(ConfigError, match="two columns are called 'a'"):
        pq.write_table(pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]), tmp_path / "y.parquet")
        read(tmp_path / "y.parquet")


def test_tasks_of_an_evaluation_read_every_format(tmp_path, monkeypatch):
    from ivg.evaluation.sentiment import Sentiment
    from ivg.evaluation.summarization import Summarization
    from ivg.settings.recipe import EvalConfig

    lines = b'{"prompt": "One\\u2028"}\n{"prompt": "Two"}\n'
    wrapped(lines, tmp_path / "x.jsonl.gz", True)
    wrapped("prompt\nOne\u2028\nTwo\n".encode(), tmp_path / "x.csv", False)
    wrapped("One\u2028\nTwo\n".encode(), tmp_path / "x.txt", False)
    for task in (Sentiment(), Summarization()):
        found = []
        for name, format in (("x.jsonl.gz", None), ("x.csv", None), ("x.txt", "text"), ("-", None)):
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
            data = name if name == "-" else str(tmp_path / name)
            found.append(sorted(e.prompt.content for e in task.examples(EvalConfig(data=data, format=format))))
        assert found == [found[0]] * 4
        assert len(found[0]) == 2
