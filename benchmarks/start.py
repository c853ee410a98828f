"""Seconds from the start of `ivg generate` to its text, beside importing torch and transformers. Prints a table, then one JSON line.

    OMP_NUM_THREADS=1 python benchmarks/start.py --rounds 7

Each round runs all commands in turn; answers have one token. Reported: medians of elapsed seconds and of seconds of the processor, to
the text and to the end of the process, and of the ratios within the rounds to the whole of the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from statistics import median
from typing import Any

import psutil

from ivg.utils.environment import machine

IMPORTS = [sys.executable, "-c", "import torch, transformers.models.auto"]
ANSWER = [sys.executable, "-m", "ivg", "generate", "The movie was", "--seed", "1", "--device", "cpu", "--max-new-tokens", "1"]
COMMANDS = {"imports": IMPORTS, "base": [*ANSWER, "--method", "base"], "ivg": [*ANSWER, "--method", "ivg"]}


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    for command in COMMANDS.values():
        measure(command)  # writes bytecode
    rounds = [{name: measure(command) for name, command in COMMANDS.items()} for _ in range(args.rounds)]
    rows = [row(name, rounds) for name in COMMANDS]
    print("command  to the text (s)  of the processor  to the end  of the processor  text : imports  of the processor")
    for r in rows:
        figures = zip(("text", "text_cpu", "end", "end_cpu", "ratio", "ratio_cpu"), (15, 16, 10, 16, 14, 16), strict=True)
        print(f"{r['name']:7s}", *(f"{r[key]:{width}.2f}" for key, width in figures), sep="  ")
    print(json.dumps({"benchmark": "start", "rounds": args.rounds, "rows": rows, "machine": machine()}))


def measure(command: list[str]) -> dict[str, float]:
    """Seconds, elapsed and of the processor, to the first line (of imports: to the end) and to the end."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started, before = time.perf_counter(), os.times()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        out = {"text": time.perf_counter() - started}
        if line:
            used = psutil.Process(process.pid).cpu_times()
            out["text_cpu"] = used.user + used.system
        process.stdout.read()
    after = os.times()
    if process.returncode:
        sys.exit(f"{' '.join(command[1:])} ended with code {process.returncode}")
    out["end"] = time.perf_counter() - started
    out["end_cpu"] = after.children_user + after.children_system - before.children_user - before.children_system
    return out if line else {**out, "text": out["end"], "text_cpu": out["end_cpu"]}


def row(name: str, rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Medians of one command."""
    own = [measured[name] for measured in rounds]
    floor = [measured["imports"] for measured in rounds]

    def ratio(key: str) -> float:
        return median(a[key] / b[key] for a, b in zip(own, floor, strict=True))

    return {"name": name, **{key: median(m[key] for m in own) for key in own[0]}, "ratio": ratio("text"), "ratio_cpu": ratio("text_cpu")}


if __name__ == "__main__":
    main()
