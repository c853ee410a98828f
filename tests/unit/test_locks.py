"""One run writes a file at a time: others are refused at once, what a killed run left is waited for."""

import os
import platform
import subprocess
import sys
import time

import pytest

from ivg.errors import OutputError
from ivg.utils import locks
from ivg.utils.locks import lock_file

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
    with pytest.raises(OutputError) as e, lock_file(path):
        pass
    assert str(e.value).startswith(f"another run is writing {path} (process {process.pid} on ")
    assert str(e.value).endswith("\n  wait until it ends, or write to another path")
    process.communicate("\n")
    with lock_file(path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_killed_run_leaves_no_claim(tmp_path):
    process = holder(tmp_path / "out.jsonl")
    process.kill()
    process.wait()
    with lock_file(tmp_path / "out.jsonl"):
        assert (tmp_path / ".out.jsonl.lock").read_text().startswith(f"{os.getpid()} ")
    assert not list(tmp_path.iterdir())


def test_the_lock_waits_for_child_processes_of_a_killed_run(tmp_path, monkeypatch):
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


def test_runs_of_training_write_one_folder_at_a_time(tmp_path):
    from ivg.training.run_dir import open_run

    with open_run(tmp_path / "run", {}):
        with pytest.raises(OutputError, match=r"another run is writing .*/run "), open_run(tmp_path / "run", {}):
            pass
        with open_run(tmp_path / "other", {}):
            pass
    assert not list(tmp_path.glob(".*"))  # no lock is left


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
