"""Files of answers: gone on with only by the same run, one run at a time, whole when the disk is full."""

import errno
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ivg.errors import ConfigError, OutputError
from ivg.jobs.blocks import ResumableJsonl
from ivg.jobs.failures import MAX_REPORTED, Failures
from ivg.jobs.fingerprints import fingerprint
from ivg.jobs.formats import SourceRow
from ivg.jobs.imports import local_imports
from ivg.jobs.prompts import Job, read_jobs
from ivg.jobs.provenance import answer_provenance, differences
from ivg.jobs.store import open_rows
from ivg.settings.recipe import Recipe
from ivg.utils import jsonl, locks
from ivg.utils.jsonl import append_lines, as_lines, read_jsonl, write_json
from ivg.utils.locks import lock_file

MADE = {
    "method": "ivg",
    "seed": 0,
    "settings": {},
    "models": "embedded",
    "provenance": {"ivg": "1", "device": "cpu", "weights": {"base": "a"}},
}


def answer(store, job, text="t", index=0):
    store.append({"id": job.id, "prompt": job.prompt, "index": index, "text": text, **MADE})


def notes(path, jobs, made=MADE):
    said = []
    with open_rows(path, jobs, made, said.append) as store:
        return [store.done(job, 0) for job in jobs], said


def test_rows_are_done_for_the_same_id_and_prompt_only(tmp_path):
    path, jobs = tmp_path / "deep" / "out.jsonl", [Job(i, f"p{i}") for i in range(3)]
    with open_rows(path, jobs, MADE, print) as store:
        for job in jobs:
            assert not store.done(job, 0)
            answer(store, job)
            assert store.done(job, 0)
            assert not store.done(job, 1)
    assert notes(path, [*jobs, Job("0", "p0")]) == ([True, True, True, False], [])  # 0 and "0" are two ids
    whole = path.read_bytes()
    edited = [jobs[0], Job(1, "another prompt"), jobs[2]]
    done, said = notes(path, edited)
    assert done == [True, False, True]
    assert said == [
        f"1 prompts have changed under the same id (1): answered again, the old rows are in {tmp_path / 'deep' / 'out.superseded.jsonl'}"
    ]
    assert [r["prompt"] for r in read_jsonl(path)] == ["p0", "p2"]
    assert [r["prompt"] for r in read_jsonl(tmp_path / "deep" / "out.superseded.jsonl")] == ["p1"]
    assert notes(path, [jobs[0]]) == ([True], [])  # rows of prompts that are not asked for stay
    assert len(whole.splitlines()) == 3
    assert sorted(p.name for p in path.parent.iterdir()) == ["out.jsonl", "out.superseded.jsonl"]  # no lock, no half a file


def test_half_a_row_is_cut_off_wherever_a_kill_came(tmp_path):
    path, jobs = tmp_path / "out.jsonl", [Job(i, f"p{i}\u2028") for i in range(3)]
    with open_rows(path, jobs, MADE, print) as store:
        for job in jobs:
            answer(store, job, "x" * 70000 if job.id == 1 else "t")
    whole = path.read_bytes()
    for cut in (0, 1, 50, whole.index(b"\n"), whole.index(b"\n") + 1, len(whole) - 60000, len(whole) - 1, len(whole)):
        path.write_bytes(whole[:cut])
        with open_rows(path, jobs, MADE, print) as store:
            assert path.read_bytes() == whole[: whole[:cut].rfind(b"\n") + 1]
            for job in jobs:
                if not store.done(job, 0):
                    answer(store, job, "x" * 70000 if job.id == 1 else "t")
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "eft"}, 'method: "ivg" there, "eft" now'),
        ({"settings": {"beta": 2.0}}, "settings.beta: not given there, 2.0 now"),
        ({"engine": "vllm"}, 'engine: not given there, "vllm" now'),
        ({"provenance": {"ivg": "1", "device": "cuda", "weights": {"base": "a"}}}, 'device: "cpu" there, "cuda" now'),
        (
            {"provenance": {"ivg": "2", "device": None, "weights": {"base": "b"}}, "seed": 1},
            'ivg: "1" there, "2" now; weights.base: "a" there, "b" now; seed: 0 there, 1 now',
        ),
    ],
)
def test_what_made_the_rows_differs_is_named(tmp_path, change, says):
    job = Job(1, "p")
    with open_rows(tmp_path / "out.jsonl", [job], MADE, print) as store:
        answer(store, job)
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(ConfigError) as e:
        notes(tmp_path / "out.jsonl", [Job(1, "edited too")], MADE | change)
    assert str(e.value) == f"{tmp_path / 'out.jsonl'} holds answers of other settings: {says}\n  give another --output, or remove it"
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_a_device_that_is_not_known_differs_from_none():
    assert differences({"device": None, "a": {"b": 1}}, {"device": "cpu", "a": {"b": 1}}) == []


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
        notes(tmp_path / "out.jsonl", [])
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
            notes(tmp_path / name, [])
    real = Path.open

    def read_only(self, mode="r", *arguments, **named):
        if "r" not in mode:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        return real(self, mode, *arguments, **named)

    monkeypatch.setattr(Path, "open", read_only)
    for work in (
        lambda: notes(tmp_path / "x.jsonl", []),
        lambda: append_lines(tmp_path / "x.jsonl", "a\n"),
        lambda: write_json(tmp_path / "x.json", {}),
        lambda: Failures(print, tmp_path / "x.jsonl"),
    ):
        with pytest.raises(OutputError, match=r"cannot write .*/x.json.*: Read-only file system\n"):
            work()


# Full disks


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


# One run at a time


HOLD = """
import sys
from pathlib import Path
from ivg.utils.locks import lock_file
with lock_file(Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.readline()
"""


def holder(path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "mine\n"
    return process


def test_a_second_run_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "LOCK_TIMEOUT", 1e9)  # it is not waited for
    path = tmp_path / "out.jsonl"
    process = holder(path)
    with pytest.raises(OutputError) as e:
        notes(path, [])
    assert str(e.value).startswith(f"another run is writing {path} (process {process.pid} on ")
    assert str(e.value).endswith("\n  wait until it ends, or write to another path")
    process.communicate("\n")
    assert notes(path, []) == ([], [])
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_link_to_a_file_is_the_file(tmp_path):
    path, link, jobs = tmp_path / "deep" / "out.jsonl", tmp_path / "link.jsonl", [Job(1, "a"), Job(2, "b")]
    path.parent.mkdir()
    link.symlink_to(path)
    with open_rows(link, jobs, MADE, print) as store:
        with pytest.raises(OutputError, match="another run is writing"):
            notes(path, jobs)
        for job in jobs:
            answer(store, job)
    assert notes(link, [Job(1, "another"), jobs[1]])[0] == [False, True]
    assert link.is_symlink()
    assert [row["id"] for row in read_jsonl(path)] == [2]


def test_a_killed_run_leaves_no_claim(tmp_path):
    process = holder(tmp_path / "out.jsonl")
    process.kill()
    process.wait()
    assert notes(tmp_path / "out.jsonl", []) == ([], [])


def test_helpers_of_a_killed_run_are_waited_for(tmp_path, monkeypatch):
    """The lock is still held, but its owner is gone."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    waited = []
    path = tmp_path / "out.jsonl"
    with lock_file(path):
        lock = tmp_path / ".out.jsonl.lock"
        lock.write_text(f"{gone.pid} {platform.node()}\n")
        monkeypatch.setattr(time, "sleep", lambda seconds: waited.append(seconds) or (len(waited) == 3 and lock.unlink()))
        with lock_file(path):  # the helper went, and with it the lock
            assert len(waited) == 3
    lock.unlink(missing_ok=True)


def test_processes_of_one_run_may_wait_for_each_other(tmp_path, monkeypatch):
    process, path = holder(tmp_path / "x.json"), tmp_path / "x.json"
    monkeypatch.setattr(time, "sleep", lambda _: process.poll() is None and process.communicate("\n"))
    with lock_file(path, wait=True):
        assert process.poll() == 0


# Failures, and what counts


def test_failures_are_told_once_counted_and_kept(tmp_path):
    said = []
    failures = Failures(said.append, tmp_path / "failed.jsonl")
    for i in range(MAX_REPORTED + 2):
        for _ in range(2):  # two samples of one prompt
            failures(f"line {i}", "too long\n  shorten it", {"id": i, "prompt": "p"})
    failures.close()
    assert failures.count == 2 * (MAX_REPORTED + 2)
    assert said[0] == "line 0: too long\n  shorten it"
    assert said[MAX_REPORTED:] == [f"2 more rows failed; all are in {tmp_path / 'failed.jsonl'}"]
    rows = list(read_jsonl(tmp_path / "failed.jsonl"))
    assert len(rows) == MAX_REPORTED + 2
    assert rows[3] == {"id": 3, "prompt": "p", "error": "too long - shorten it"}
    Failures(said.append, tmp_path / "failed.jsonl")
    assert not (tmp_path / "failed.jsonl").read_text()


def test_everything_that_makes_an_answer_counts_and_nothing_else(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "r.py").write_text("def f(prompt, response):\n    return 1\n")
    data = {"models": {"base": str(tmp_path / "a"), "reward": f"{tmp_path}/r.py:f"}}
    first = answer_provenance(Recipe.parse(data), "cpu")
    assert first == answer_provenance(
        Recipe.parse(data | {"run": {"n": 3, "batch_size": 2}, "eval": {"seeds": 2}, "vllm": {"max_num_seqs": 3}}), "cpu"
    )
    for change, device in (
        ({"run": {"dtype": "float32"}}, "cpu"), ({"run": {"seed": 1}}, "cpu"), ({"run": {"revision": "x"}}, "cpu"), ({}, "cuda"),
        ({"run": {"engine": "vllm"}}, "cpu"), ({"sampling": {"top_k": 3}}, "cpu"), ({"search": {"beta": 2.0}}, "cpu"),
        ({"models": data["models"] | {"base": {"path": str(tmp_path / "a"), "template": "chat"}}}, "cpu"),
        ({"models": data["models"] | {"base": str(tmp_path / "b")}}, "cpu"),
        ({"values": {"more": {"reward": f"{tmp_path}/r.py:f"}}}, "cpu"),
    ):  # fmt: skip
        assert answer_provenance(Recipe.parse(data | change), device) != first
    (tmp_path / "r.py").write_text("def f(prompt, response):\n    return 2\n")
    assert differences(first, answer_provenance(Recipe.parse(data), "cpu"))[0].startswith("weights.reward: ")
    assert json.loads(jsonl.to_json(first)) == first


def test_what_a_function_imports_from_beside_it_counts(tmp_path, monkeypatch):
    """Its own modules and packages, and theirs; a stranger's do not, and what cannot be parsed is nobody's import."""
    kit = tmp_path / "kit"
    (kit / "deep").mkdir(parents=True)
    (tmp_path / "r.py").write_text("import json, torch\nimport words as w\ndef f(p, r):\n    from kit.deep import rules\n    return 1\n")
    (tmp_path / "words.py").write_text("import r\n")  # a circle
    (kit / "__init__.py").write_text("")
    (kit / "deep" / "__init__.py").write_text("")
    (kit / "deep" / "rules.py").write_text("from .. import more\nfrom ...words import x\n")
    (kit / "more.py").write_text("x = = 1\n")
    (tmp_path / "stranger.py").write_text("")
    monkeypatch.chdir("/")
    names = [str(p.relative_to(tmp_path)) for p in local_imports(tmp_path / "r.py")]
    assert names == ["r.py", "kit/__init__.py", "kit/deep/__init__.py", "kit/deep/rules.py", "kit/more.py", "words.py"]
    first = fingerprint(f"{tmp_path}/r.py:f")
    (tmp_path / "stranger.py").write_text("x = 1\n")
    assert fingerprint(f"{tmp_path}/r.py:f") == first
    marks = {first}
    for name in names:
        (tmp_path / name).write_text((tmp_path / name).read_text() + "# edited\n")
        marks.add(fingerprint(f"{tmp_path}/r.py:f"))
    assert len(marks) == 1 + len(names)


def test_runs_of_training_write_one_folder_at_a_time(tmp_path):
    from ivg.training.run_dir import open_run

    with open_run(tmp_path / "run", {}):
        with pytest.raises(OutputError, match=r"another run is writing .*/run "), open_run(tmp_path / "run", {}):
            pass
        with open_run(tmp_path / "other", {}):
            pass
    assert not list(tmp_path.glob(".*"))  # no lock is left


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
        with open_rows(path, jobs, MADE, lambda _: None) as store:
            for job in [job for job in jobs if not store.done(job, 0)][:until]:
                answer(store, job, text=f"answer to {job.prompt}")
        with path.open("ab") as file:
            file.write(b'{"id": 1, "index": 0, "prompt": '[:half])
    path.write_bytes(path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1])
    found = list(read_jsonl(path))
    assert all(row["text"] == f"answer to {row['prompt']}" for row in found)
    answered = {json.dumps(row["id"]): row["prompt"] for row in found}
    assert len(answered) == len(found)  # none twice
    assert all(answered[job.key] == job.prompt for job in jobs)


def test_a_lock_that_its_owner_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """The file was opened while another run had it, which removed it at its end before it could be locked here."""
    import fcntl

    path, real, calls = tmp_path / "out.jsonl", fcntl.flock, []

    def flock(file, how):
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / ".out.jsonl.lock").unlink()
        return real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock_file(path), pytest.raises(OutputError, match="another run is writing"), lock_file(path):
        pass
