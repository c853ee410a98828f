"""Runs that are killed when they open a file: an interruption at an exact moment, without polling.

A script that imports this module kills its run so where the environment says at which file; child processes of a run kill its main process.
"""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

FILE, COUNT = "IVG_TEST_KILL_FILE", "IVG_TEST_KILL_COUNT"
IVG = ("-c", "import killed, runpy; runpy.run_module('ivg', run_name='__main__')")


def kill_at(pattern, count):
    """SIGKILL to this run when one of its processes opens the ``count``-th file whose path matches ``pattern`` for writing."""
    found, left = re.compile(pattern), [count]

    def kill(event, arguments):
        if event != "open" or not isinstance(arguments[0], str | os.PathLike) or not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        left[0] -= bool(found.search(os.fspath(arguments[0])))
        if left[0] == 0:
            parent = multiprocessing.parent_process()
            os.kill(os.getpid() if parent is None else parent.pid, signal.SIGKILL)

    sys.addaudithook(kill)


if FILE in os.environ:
    kill_at(os.environ[FILE], int(os.environ[COUNT]))


def run_killed(arguments, environment, pattern, count=1):
    """Run Python with ``arguments`` (those of :data:`IVG`, or of a script that imports this module); killed as :func:`kill_at` says."""
    here = os.pathsep.join([str(Path(__file__).parent), environment.get("PYTHONPATH", "")])
    environment = environment | {FILE: pattern, COUNT: str(count), "PYTHONPATH": here}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, f"ended with {done.returncode}, not killed:\n{done.stderr[-2000:]}"
