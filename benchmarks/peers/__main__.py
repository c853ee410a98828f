"""What a user would take instead of ivg, on the same models and prompts: time, the value of the answers, equal greedy tokens.

    scripts/peers.sh                                         # environments of the peers, into build/peers
    python -m benchmarks.peers --docs docs/reference/benchmarks.md

Every program is a process with an environment of its own, loaded once. In each round peer and ivg answer the same prompts in turn. A
program without an environment is left out, and named. Processor seconds are those of the program's process, and of the server that
it asks. AISteer360 has no program here: it is on no package index.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import psutil

from benchmarks.docs_page import markdown_table, update_page
from benchmarks.peers.protocol import REPLIES
from benchmarks.peers.value import Value
from benchmarks.serve import PROMPTS, served
from ivg.embedded import path
from ivg.utils import environment

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = Path("build/peers")
MODEL = "embedded"
"""Name of the embedded models in ``ivg serve``."""


@dataclass(frozen=True)
class Comparison:
    """A peer and ivg on one task.

    Attributes:
        task: what both do.
        peer: name of the peer, and of its environment.
        program: the peer's module beside this one, with the embedded models that it reads.
        ours: arguments of ``ours``.
        http: do both ask a server?
        exact: are the answers equal, since nothing is drawn?
    """

    task: str
    peer: str
    program: tuple[str, ...]
    ours: tuple[str, ...]
    http: bool = False
    exact: bool = False


BEST = "best of 16 by the value"
BON = ("bon", "base", "value=value")
COMPARISONS = (
    Comparison(BEST, "transformers", ("hf_best_of_n", "base", "value"), BON),
    Comparison(BEST, "vllm", ("vllm_best_of_n", "base", "value"), BON),
    Comparison(f"{BEST}, over HTTP", "its_hub", ("its_best_of_n", "value"), (), http=True),
    Comparison("one of 16 particles", "genlm-control", ("genlm_smc", "base", "value"), ("smc", "base", "value=value")),
    Comparison(
        "greedy proxy tuning",
        "genlm-control",
        ("genlm_smc", "base", "tuned", "untuned"),
        ("eft", "base", "tuned=tuned", "untuned=untuned"),
        exact=True,
    ),
)


class Program:
    """A running program (:mod:`benchmarks.peers.protocol`)."""

    def __init__(self, python: str, words: Sequence[str], server: int | None = None) -> None:
        command = [python, "-m", f"benchmarks.peers.{words[0]}", *words[1:]]
        read, write = os.pipe()
        found = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])), REPLIES: str(write)}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=2, text=True, env=found, pass_fds=[write])
        os.close(write)
        self.replies = os.fdopen(read)
        self.server = psutil.Process(server) if server else None
        self.versions: dict[str, str] = self._read(command)["ready"]

    def _read(self, command: Sequence[str] = ()) -> Any:
        line = self.replies.readline()
        if not line:
            raise RuntimeError(f"a program ended with {self.process.wait()}\n  see its messages above; {shlex.join(command)}")
        return json.loads(line)

    def _cpu(self) -> float:
        """Processor seconds of its processes and of the server so far."""
        own = psutil.Process(self.process.pid)
        return sum(sum(p.cpu_times()[:2]) for p in (own, *own.children(recursive=True), *([self.server] if self.server else [])))

    def answer(self, prompts: Sequence[str], seed: int, tokens: int) -> dict[str, Any]:
        """Texts, elapsed and processor seconds."""
        assert self.process.stdin is not None
        before = self._cpu()
        print(json.dumps({"prompts": list(prompts), "seed": seed, "tokens": tokens}), file=self.process.stdin, flush=True)
        found = self._read()
        return {"answers": found["answers"], "seconds": found["seconds"], "cpu": self._cpu() - before}

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.replies.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            for process in (*psutil.Process(self.process.pid).children(recursive=True), self.process):
                process.kill()


def pythons(folder: Path) -> dict[str, str]:
    """The Python of each peer that has an environment; transformers is in our own."""
    found = {name: folder / name / "bin" / "python" for name in ("genlm-control", "its_hub")}
    found |= {"vllm": Path(".venv-vllm/bin/python"), "transformers": Path(sys.executable)}
    return {name: str(program) for name, program in found.items() if program.exists()}


@contextmanager
def both_programs(comparison: Comparison, python: str) -> Iterator[dict[str, Program]]:
    """Both, ready."""
    with ExitStack() as stack:
        file, *models = comparison.program
        roles = [str(path(model)) for model in models]
        program, ours, server = [file, *roles], [*comparison.ours], None
        if comparison.http:
            url, server = stack.enter_context(served())
            program, ours = [file, url, f"{MODEL}:base", *roles], [url, MODEL]
        else:
            method, base, *named = comparison.ours
            ours = [method, str(path(base)), *(f"{role}={path(model)}" for role, model in (n.split("=") for n in named))]
        both = {"peer": Program(python, program, server)}
        stack.callback(both["peer"].close)
        both["ivg"] = Program(sys.executable, ["ours", *ours], server)
        stack.callback(both["ivg"].close)
        yield both


def measure(comparison: Comparison, python: str, prompts: Sequence[str], tokens: int, rounds: int) -> dict[str, Any]:
    """All rounds of a comparison: medians, medians of the ratios within rounds, mean values of the answers, and whether all are equal."""
    judge = Value(str(path("value")))
    found: list[dict[str, dict[str, Any]]] = []
    with both_programs(comparison, python) as both:
        for number in range(rounds + 1):
            row = {name: one.answer(prompts, number, tokens) for name, one in both.items()}
            if number:  # the first one warms up
                found.append(row)
        versions = {name: one.versions for name, one in both.items()}
    names = ("peer", "ivg")
    return {
        "task": comparison.task,
        "peer": comparison.peer,
        "prompts": len(prompts),
        "seconds": {name: median(row[name]["seconds"] for row in found) for name in names},
        "ratio": median(row["peer"]["seconds"] / row["ivg"]["seconds"] for row in found),
        "cpu_ratio": median(row["peer"]["cpu"] / row["ivg"]["cpu"] for row in found),
        "value": {name: fmean(mean_value(judge, prompts, row[name]["answers"]) for row in found) for name in names},
        "equal": all(row["peer"]["answers"] == row["ivg"]["answers"] for row in found) if comparison.exact else None,
        "versions": versions,
    }


def mean_value(judge: Value, prompts: Sequence[str], answers: Sequence[str]) -> float:
    """Of the answers that are not empty."""
    return fmean(judge.of_texts(prompt, [text])[0] for prompt, text in zip(prompts, answers, strict=True) if text)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """As Markdown."""
    head = ["task", "peer", "prompts", "seconds", "ivg's", "peer ÷ ivg", "of the processor", "value of its answers", "of ivg's"]
    body = []
    for row in rows:
        equal = {None: "", True: "; equal texts", False: "; **other texts**"}[row["equal"]]
        cells = [row["task"] + equal, row["peer"], str(row["prompts"]), *(f"{row['seconds'][name]:.2f}" for name in ("peer", "ivg"))]
        body.append(
            [*cells, *(f"{row[ratio]:.2f}" for ratio in ("ratio", "cpu_ratio")), *(f"{row['value'][n]:+.2f}" for n in ("peer", "ivg"))]
        )
    return markdown_table(head, body)


def main() -> None:
    """Run the comparisons."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", nargs="+", default=sorted({c.peer for c in COMPARISONS}), help="only these")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS, help="folder of scripts/peers.sh")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 8], help="numbers of prompts at once")
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--docs", type=Path, help="page that gets the table")
    args = parser.parse_args()
    ready, rows = pythons(args.environments), []
    for name in sorted({*args.peers} - {*ready}):
        print(
            f"{name}: no environment; scripts/peers.sh makes those of genlm-control and its_hub, make test-vllm that of vllm",
            file=sys.stderr,
        )
    for comparison in COMPARISONS:
        for count in args.prompts if comparison.peer in args.peers and comparison.peer in ready else []:
            rows.append(measure(comparison, ready[comparison.peer], PROMPTS[:count], args.tokens, args.rounds))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    text = table(rows)
    print(text)
    known = {k: v for row in rows for side in row["versions"].values() for k, v in side.items()}
    machine = ", ".join(f"{k} {v}" for k, v in environment.machine().items() if k not in known)
    made = ", ".join(f"{k} {v}" for k, v in sorted(known.items()))
    note = (
        f"Embedded models, {args.tokens} tokens, T = 0.7, float32, {args.rounds} rounds. {made}. {machine}. Commit {environment.commit()}."
    )
    threads = f"OMP_NUM_THREADS={given} " if (given := os.environ.get("OMP_NUM_THREADS")) else ""
    command = "scripts/peers.sh\n" + threads + shlex.join(["python", "-m", "benchmarks.peers", *sys.argv[1:]])
    if args.docs:
        update_page(args.docs, "peers", f"{text}\n\n{note}\n\n```text\n{command}\n```")


if __name__ == "__main__":
    main()
