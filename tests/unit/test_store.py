"""Files of answers: resumed only by the same run, rows whole wherever a kill came; rows that failed."""

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ivg.errors import ConfigError, OutputError
from ivg.jobs.failures import MAX_REPORTED, Failures
from ivg.jobs.formats import SourceRow
from ivg.jobs.prompts import Job, read_jobs
from ivg.jobs.store import open_rows
from ivg.utils.jsonl import append_lines, read_jsonl, write_json

PROVENANCE = {
    "method": "ivg",
    "seed": 0,
    "settings": {},
    "models": "embedded",
    "provenance": {"ivg": "1", "device": "cpu", "weights": {"base": "a"}},
}


def answer(store, job, text="t", index=0):
    store.append({"id": job.id, "prompt": job.prompt, "index": index, "text": text, **PROVENANCE})


def reopen(path, jobs, provenance=PROVENANCE):
    said = []
    with open_rows(path, jobs, provenance, said.append) as store:
        return [store.done(job, 0) for job in jobs], said


def test_rows_are_done_for_the_same_id_and_prompt_only(tmp_path):
    path, jobs = tmp_path / "deep" / "out.jsonl", [Job(i, f"p{i}") for i in range(3)]
    with open_rows(path, jobs, PROVENANCE, print) as store:
        for job in jobs:
            assert not store.done(job, 0)
            answer(store, job)
            assert store.done(job, 0)
            assert not store.done(job, 1)
    assert reopen(path, [*jobs, Job("0", "p0")]) == ([True, True, True, False], [])  # 0 and "0" are two ids
    whole = path.read_bytes()
    edited = [jobs[0], Job(1, "another prompt"), jobs[2]]
    done, said = reopen(path, edited)
    assert done == [True, False, True]
    assert said == [
        f"1 prompts have changed under the same id (1): answered again, the old rows are in {tmp_path / 'deep' / 'out.superseded.jsonl'}"
    ]
    assert [r["prompt"] for r in read_jsonl(path)] == ["p0", "p2"]
    assert [r["prompt"] for r in read_jsonl(tmp_path / "deep" / "out.superseded.jsonl")] == ["p1"]
    assert reopen(path, [jobs[0]]) == ([True], [])  # rows of prompts that are not asked for stay
    assert len(whole.splitlines()) == 3
    assert sorted(p.name for p in path.parent.iterdir()) == ["out.jsonl", "out.superseded.jsonl"]  # no lock, no half a file


def test_half_a_row_is_cut_off_wherever_a_kill_came(tmp_path):
    path, jobs = tmp_path / "out.jsonl", [Job(i, f"p{i}\u2028") for i in range(3)]
    with open_rows(path, jobs, PROVENANCE, print) as store:
        for job in jobs:
            answer(store, job, "x" * 70000 if job.id == 1 else "t")
    whole = path.read_bytes()
    for cut in (0, 1, 50, whole.index(b"\n"), whole.index(b"\n") + 1, len(whole) - 60000, len(whole) - 1, len(whole)):
        path.write_bytes(whole[:cut])
        with open_rows(path, jobs, PROVENANCE, print) as store:
            rows = whole[: cut + 1] if whole[cut : cut + 1] == b"\n" else whole[: whole[:cut].rfind(b"\n") + 1]
            assert path.read_bytes() == rows  # a whole row that lacks its line break stays
            for job in jobs:
                if not store.done(job, 0):
                    answer(store, job, "x" * 70000 if job.id == 1 else "t")
        assert path.read_bytes() == whole


CUT = ("{", '{"id": "a", "prompt": "o', '{"id": ', '{"id": [1, "a', '{"id": 12, "pro', '{"id": 1, "prompt": "é')


@pytest.mark.parametrize("text", [
    *CUT, "my notes", '{"a": 1}', '{"id": 1}', '[\n  {"id": 1,', "\ufeff{", '{"identity": ', '{"id": 1, "name": NaN}',
    '{"id": 1, "prompt": NaN}', '{"id": 1, "id": 2}', '{"id": 1, "question": "o',
])  # fmt: skip
def test_what_ivg_did_not_write_stays(tmp_path, text):
    """Also a last line without a line break, alone or behind rows of ivg's."""
    path, jobs = tmp_path / "out.jsonl", [Job(1, "p")]
    with open_rows(path, jobs, PROVENANCE, print) as store:
        answer(store, jobs[0])
    for before in (b"", path.read_bytes()):
        path.write_bytes(before + text.encode())
        if text in CUT:  # as a killed run leaves it
            assert reopen(path, jobs)[0] == [bool(before)] and path.read_bytes() == before
            continue
        with pytest.raises(ConfigError, match="holds rows that ivg did not write"):
            reopen(path, jobs)
        assert path.read_bytes() == before + text.encode()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "eft"}, 'method is "eft", was "ivg"'),
        ({"settings": {"beta": 2.0}}, "beta is 2.0, was not set"),
        ({"engine": "vllm"}, 'engine is "vllm", was not set'),
        ({"provenance": {"ivg": "1", "device": "cuda", "weights": {"base": "a"}}}, 'device is "cuda", was "cpu"'),
        (
            {"provenance": {"ivg": "2", "device": None, "weights": {"base": "b"}}, "seed": 1},
            'ivg is "2", was "1"; weights.base is "b", was "a"; seed is 1, was 0',
        ),
    ],
)
def test_changed_settings_are_named(tmp_path, change, says):
    job = Job(1, "p")
    with open_rows(tmp_path / "out.jsonl", [job], PROVENANCE, print) as store:
        answer(store, job)
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(ConfigError) as e:
        reopen(tmp_path / "out.jsonl", [Job(1, "edited too")], PROVENANCE | change)
    assert (
        str(e.value)
        == f"{tmp_path / 'out.jsonl'}: settings differ from those of its rows: {says}\n  use another --output, or remove the file"
    )
    assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"x": 1}\n', "holds rows that ivg did not write (row 1: got the columns x)"),
        ("hello\n", "holds rows that ivg did not write (row 1: expected a JSON object, got hello"),
        ('{"id": 1, "index": 0, "prompt": "p", "method": "ivg"}\n', "was written by an older version of ivg: row 1 has no provenance"),
    ],
)
def test_files_of_others_stay_as_they_are(tmp_path, text, says):
    (tmp_path / "out.jsonl").write_text(text)
    with pytest.raises(ConfigError) as e:
        reopen(tmp_path / "out.jsonl", [])
    assert says in str(e.value)
    assert (tmp_path / "out.jsonl").read_text() == text


def test_places_where_no_rows_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for name, says in (
        (".", "it is a folder\n  expected a JSONL file"),
        ("x.csv", "rows are written as JSONL\n  give a name that ends in .jsonl"),
        ("x.jsonl.gz", "rows are written as JSONL"),
        ("file/x.jsonl", "cannot write"),
    ):
        with pytest.raises(OutputError, match=says):
            reopen(tmp_path / name, [])
    real = Path.open

    def read_only(self, mode="r", *arguments, **named):
        if "r" not in mode:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        return real(self, mode, *arguments, **named)

    monkeypatch.setattr(Path, "open", read_only)
    for work in (
        lambda: reopen(tmp_path / "x.jsonl", []),
        lambda: append_lines(tmp_path / "x.jsonl", "a\n"),
        lambda: write_json(tmp_path / "x.json", {}),
        lambda: Failures(print, tmp_path / "x.jsonl").open(),
    ):
        with pytest.raises(OutputError, match=r"cannot write .*/x.json.*: Read-only file system\n"):
            work()


prompts = st.sampled_from(["a", "b", "c"])


inputs = st.lists(st.tuples(st.none() | st.integers(0, 2), prompts), max_size=4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(runs=st.lists(st.tuples(inputs, st.integers(0, 4), st.integers(0, 30)), min_size=1, max_size=4))
def test_whatever_is_edited_and_killed_every_answer_is_of_its_prompt(tmp_path, runs):
    """Each run: rows (id, prompt), how many are answered before a kill, bytes of half a row that it leaves."""
    path = tmp_path / "out.jsonl"
    for file in tmp_path.iterdir():
        file.unlink()
    for rows, until, half in [*runs, (runs[-1][0], 99, 0)]:
        source = [SourceRow(f"row {i}", {"id": i_, "prompt": p}) for i, (i_, p) in enumerate(rows)]
        jobs = list(read_jobs(source, lambda *_: None))
        assert len(jobs) == len({job.key for job in jobs})
        with open_rows(path, jobs, PROVENANCE, lambda _: None) as store:
            for job in [job for job in jobs if not store.done(job, 0)][:until]:
                answer(store, job, text=f"answer to {job.prompt}")
        with path.open("ab") as file:
            file.write(b'{"id": 1, "prompt": "a", "index": '[:half])
    path.write_bytes(path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1])
    found = list(read_jsonl(path))
    assert all(row["text"] == f"answer to {row['prompt']}" for row in found)
    answered = {json.dumps(row["id"]): row["prompt"] for row in found}
    assert len(answered) == len(found)  # none twice
    assert all(answered[job.key] == job.prompt for job in jobs)


def test_a_link_to_a_file_is_the_file(tmp_path):
    path, link, jobs = tmp_path / "deep" / "out.jsonl", tmp_path / "link.jsonl", [Job(1, "a"), Job(2, "b")]
    path.parent.mkdir()
    link.symlink_to(path)
    with open_rows(link, jobs, PROVENANCE, print) as store:
        with pytest.raises(OutputError, match="another run is writing"):
            reopen(path, jobs)
        for job in jobs:
            answer(store, job)
    assert reopen(link, [Job(1, "another"), jobs[1]])[0] == [False, True]
    assert link.is_symlink()
    assert [row["id"] for row in read_jsonl(path)] == [2]


def test_cuts_in_the_middle_of_a_character_and_other_encodings(tmp_path):
    path, jobs = tmp_path / "out.jsonl", [Job(1, "p")]
    path.write_bytes('{"id": 1, "prompt": "é'.encode()[:-1])
    assert reopen(path, jobs)[0] == [False] and not path.read_bytes()
    path.write_bytes('{"id": 1, "prompt": "é und'.encode("latin-1"))
    with pytest.raises(ConfigError, match="holds rows that ivg did not write"):
        reopen(path, jobs)


def test_a_refused_run_does_not_say_that_rows_are_in_its_file(tmp_path):
    said = []
    failures = Failures(said.append, tmp_path / "failed.jsonl")
    for i in range(MAX_REPORTED + 5):
        failures(f"line {i}", "too long", {"id": i})
    failures.close()
    assert said[MAX_REPORTED:] == ["5 more rows failed"] and not (tmp_path / "failed.jsonl").exists()


def test_failures_are_reported_once_counted_and_kept(tmp_path):
    said = []
    (tmp_path / "failed.jsonl").write_text("of the last run\n")
    failures = Failures(said.append, tmp_path / "failed.jsonl")
    for i in range(MAX_REPORTED + 2):
        if i == 2:
            assert (tmp_path / "failed.jsonl").read_text() == "of the last run\n", "another run may write it"
            failures.open()
        for _ in range(2):  # two samples of one prompt
            failures(f"line {i}", "too long\n  shorten it", {"id": i, "prompt": "p"})
    failures.close()
    assert failures.count == 2 * (MAX_REPORTED + 2)
    assert said[0] == "line 0: too long\n  shorten it"
    assert said[MAX_REPORTED:] == [f"2 more rows failed; all are in {tmp_path / 'failed.jsonl'}"]
    rows = list(read_jsonl(tmp_path / "failed.jsonl"))
    assert len(rows) == MAX_REPORTED + 2
    assert rows[3] == {"id": 3, "prompt": "p", "error": "too long - shorten it"}
    Failures(said.append, tmp_path / "failed.jsonl").open()
    assert not (tmp_path / "failed.jsonl").read_text()
