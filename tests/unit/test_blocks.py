"""Files of blocks, and all files on a full disk."""

import errno
import json
import os
from pathlib import Path

import pytest

from ivg.errors import ConfigError, OutputError
from ivg.jobs.blocks import ResumableJsonl
from ivg.utils.jsonl import append_lines, as_lines, read_jsonl, write_json


class Full:
    """A file on a disk that takes so many bytes more."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        taken = data[: self.room]
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(taken)
        return self.file.write(taken)


def full(monkeypatch, room):
    """Files that are appended to lie on a disk with so much room."""
    real = Path.open

    def opened(self, mode="r", *arguments, **named):
        file = real(self, mode, *arguments, **named)
        return Full(file, room) if "a" in mode else file

    monkeypatch.setattr(Path, "open", opened)


@pytest.mark.parametrize("room", [0, 1, 20, 100])
def test_a_full_disk_leaves_whole_rows_and_the_run_goes_on(tmp_path, monkeypatch, room):
    path = tmp_path / "x.jsonl"
    append_lines(path, as_lines([{"i": 0}]))
    with monkeypatch.context() as m:
        full(m, room)
        with pytest.raises(OutputError) as e:
            append_lines(path, as_lines([{"i": 1, "text": "x" * 200}]))
    assert str(e.value) == f"cannot write {path}: No space left on device\n  its rows are complete; run the same command again to resume"
    assert list(read_jsonl(path)) == [{"i": 0}]
    append_lines(path, as_lines([{"i": 1}]))
    assert [r["i"] for r in read_jsonl(path)] == [0, 1]


def test_blocks_go_on_behind_a_full_disk(tmp_path, monkeypatch):
    file = ResumableJsonl(tmp_path / "r.jsonl", 2, 4, {"seed": 1})
    file.append([{"i": 0}, {"i": 1}])
    with monkeypatch.context() as m:
        full(m, 5)
        with pytest.raises(OutputError, match="No space left"):
            file.append([{"i": 2}, {"i": 3}])
    again = ResumableJsonl(tmp_path / "r.jsonl", 2, 4, {"seed": 1})
    assert [list(s) for s in again.missing()] == [[2, 3]]


def test_files_written_whole_are_there_or_not(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", {"a": float("nan")})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None}

    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match="No space left on device\n  free space, or write to another path"):
        write_json(tmp_path / "x.json", {"a": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_block_files_drop_half_blocks_and_refuse_other_settings(tmp_path):
    file = ResumableJsonl(tmp_path / "r.jsonl", 2, 5, {"seed": 1})
    for span in file.missing():
        file.append([{"i": i} for i in span])
    assert file.complete
    whole = file.path.read_bytes()
    for cut in range(len(whole)):
        file.path.write_bytes(whole[:cut])
        again = ResumableJsonl(file.path, 2, 5, {"seed": 1})
        assert again.rows % 2 == 0
        for span in again.missing():
            again.append([{"i": i} for i in span])
        assert file.path.read_bytes() == whole
    with pytest.raises(ConfigError, match="seed is 2, was 1"):
        ResumableJsonl(file.path, 2, 5, {"seed": 2})
    longer = ResumableJsonl(file.path, 2, 7, {"seed": 1})
    assert [list(s) for s in longer.missing()] == [[4, 5], [6]]
