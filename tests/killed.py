"""Run ``ivg`` in a process that kills itself when it opens a file: an interruption at an exact moment, without polling."""

import re
import signal
import subprocess
import sys

CHILD = """
import os, re, runpy, signal, sys

pattern, left = re.compile(sys.argv.pop(1)), [int(sys.argv.pop(1))]

def kill(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, os.PathLike)) and pattern.search(os.fspath(arguments[0])):
        if arguments[2] & (os.O_WRONLY | os.O_RDWR):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
runpy.run_module("ivg", run_name="__main__")
"""


def run_killed(line, environment, pattern, count=1):
    """Run ``ivg LINE``; SIGKILL when it opens the ``count``-th file whose path matches ``pattern`` for writing."""
    command = [sys.executable, "-c", CHILD, re.compile(pattern).pattern, str(count), *line]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, f"ended with {done.returncode}, not killed:\n{done.stderr[-2000:]}"
