"""All that is asked of a GPU, in one command and a fixed time: exactness, cost, compiled steps, speculation (``scripts/gpu.sh``).

    scripts/gpu.sh OUT               one card of 80 GB, at most 8 minutes
    scripts/gpu.sh OUT --rehearse    the same stages on this CPU, with tiny models; the figures mean nothing

Each stage is a process with a limit of its own, so that one that fails or hangs takes nothing from the others. ``OUT/results.json`` is
written after each stage, ``OUT/report.md`` at the end, and the output of every stage lies beside them. Exits with 1 if a stage failed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.docs_page import markdown_table
from ivg.utils.environment import commit, machine

ROOT = Path(__file__).parents[1]
EXACTNESS = (
    "tests/integration/test_exactness.py",
    "tests/integration/test_state_cache.py",
    "tests/integration/test_devices.py",
    "tests/integration/test_speculation.py",
    "tests/unit/test_transformers_engine.py",
    "tests/unit/test_slot_cache.py",
    "tests/unit/test_candidates.py",
    "tests/unit/test_sampling_settings.py",
    "tests/unit/test_contrast.py",
    "tests/unit/test_speculative_chunks.py",
    "tests/unit/test_tree_search.py",
    "tests/unit/test_kl_budget.py",
    "tests/unit/test_thinking.py",
)
"""Tests of the numerics, the most important first: both caches, several devices, float32 and bfloat16 against tests/naive.py."""


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        name: in results, and of the file with its output.
        arguments: of ``python -m``.
        limit: seconds after which it is interrupted.
        read: (folder, output) -> what the results hold.
        environment: variables of its own.
    """

    name: str
    arguments: tuple[str, ...]
    limit: int
    read: Callable[[Path, str], dict[str, Any]]
    environment: Mapping[str, str]


def stages(out: Path, device: str, rehearse: bool) -> list[Stage]:
    """In order; together at most 440 seconds on a GPU."""
    small = rehearse
    tests = EXACTNESS[:1] if small else EXACTNESS
    workers = () if small else ("-n", "12", "--dist", "load")
    chosen = ("-k", "gpt2 and not long") if small else ()
    pytest = ("pytest", "-q", "-p", "no:cacheprovider", *workers, "-m", "numerics and not long", *chosen)
    where = ("--device", device)
    cost = "--shape tiny --prompts 2 --prompt-tokens 8 --new-tokens 6 --rounds 1 --dtype float32"
    if not small:
        cost = "--shape llama-7b --guide llama-1b --prompts 16 --prompt-tokens 32 --new-tokens 64 --rounds 2 --dtype bfloat16"
    step = "--shape tiny-llama --rows 1 4 --context 8 --rounds 3 --dtype float32"
    if not small:
        step = "--shape llama-1b --rows 1 16 256 --context 64 --dtype bfloat16"
    draft = "--shape tiny --rounds 1 --new-tokens 16 --prompt-tokens 8 --dtype float32"
    if not small:
        draft = "--shape gpt2-1.4b-16k --rounds 3 --new-tokens 64 --dtype bfloat16"
    return [
        Stage("exactness", (*pytest, f"--junitxml={out / 'exactness.xml'}", *tests), 140, _tests, {"IVG_TEST_DEVICE": device}),
        Stage("cost", ("ivg", "bench", *cost.split(), *where, "--out", str(out / "cost.jsonl")), 100, _last_line, {}),
        Stage("decode step", ("benchmarks.decode_step", *step.split(), *where), 120, _last_line, {}),
        Stage("speculation", ("benchmarks.speculative", "--only", "speed", *draft.split(), *where), 80, _last_line, {}),
    ]


def run(stage: Stage, out: Path, rehearse: bool) -> dict[str, Any]:
    """Run one stage; what it found, or why it did not."""
    start, log = time.monotonic(), out / f"{stage.name.replace(' ', '-')}.log"
    limit = 600 if rehearse else stage.limit  # a busy CPU is no GPU
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", **stage.environment}
    if rehearse:
        environment["OMP_NUM_THREADS"] = "1"  # on busy cores two threads wait for each other
    with log.open("w+", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *stage.arguments],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status: str | int = "timed out"
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest then writes what it has
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        file.seek(0)
        output = file.read()
    row: dict[str, Any] = {"stage": stage.name, "seconds": round(time.monotonic() - start, 1), "status": status}
    try:
        return row | {"found": stage.read(out, output)}
    except (ValueError, OSError, ElementTree.ParseError) as e:
        return row | {"error": f"{type(e).__name__}: {e}", "output": output[-2000:]}


def _last_line(_: Path, output: str) -> dict[str, Any]:
    lines = output.strip().splitlines()
    if not lines or not lines[-1].startswith("{"):
        raise ValueError("the last line of the output is no JSON")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _tests(out: Path, _: str) -> dict[str, Any]:
    cases = ElementTree.parse(out / "exactness.xml").getroot().findall(".//testcase")
    wrong = [f"{c.get('classname')}::{c.get('name')}" for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    return {"passed": len(cases) - len(wrong) - skipped, "skipped": skipped, "failed": wrong}


def report(found: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    by = {row["stage"]: row.get("found") for row in found["stages"]}
    head = ["stage", "seconds", "exit status"]
    lines = [markdown_table(head, [[r["stage"], f"{r['seconds']:g}", str(r["status"])] for r in found["stages"]])]
    if tests := by.get("exactness"):
        lines.append(f"Tests of the numerics: {tests['passed']} passed, {len(tests['failed'])} failed, {tests['skipped']} skipped.")
        lines += [f"- failed: `{name}`" for name in tests["failed"]]
    if cost := by.get("cost"):
        s = cost["settings"]
        lines.append(
            f"`ivg bench`, base {s['shape']}, guides {s['guide'] or 'its own'}, {s['prompts']} prompts x {s['new_tokens']} tokens:"
        )
        lines.append(_cost_table(cost))
    if steps := by.get("decode step"):
        lines.append(f"A decode step of {steps['shape']} behind {steps['context']} tokens, {steps['dtype']}:")
        body = [[str(r["rows"]), *(f"{1000 * r[k]:.2f}" for k in ("eager", "compiled")), f"{r['ratio']:.2f}"] for r in steps["steps"]]
        lines.append(markdown_table(["rows", "eager, ms", "compiled, ms", "times as fast"], body))
    if draft := by.get("speculation"):
        lines.append(f"Speculation, {draft['settings']['shape']}, {draft['dtype']}:")
        body = [[f"{r['pair']}, W·K {r['wk']}", f"{r['over_base']:.2f}", f"{r['over_guided']:.2f}"] for r in draft["speed"]]
        lines.append(markdown_table(["pair", "times as fast as the base", "as guided"], body))
    where = ", ".join(f"{k} {v}" for k, v in found["machine"].items())
    return "\n\n".join([*lines, f"{found['device']}: {where}. Commit {found['commit']}.", f"```text\n{found['command']}\n```"]) + "\n"


def _cost_table(cost: Mapping[str, Any]) -> str:
    body = []
    for name, f in cost["systems"].items():
        memory = "?" if f["peak_bytes"] is None else f"{f['peak_bytes'] / 2**30:.1f}"
        roof = "?" if f["over_roofline"] is None else f"{f['over_roofline']:.2f}"
        body.append([name, f"{f['seconds']:.2f}", f"{f['tokens_per_second']:.0f}", memory, roof])
    return markdown_table(["system", "s", "tokens/s", "peak GiB", "× roofline"], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results.json, report.md and the output of each stage")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny models")
    parser.add_argument("--only", nargs="+", help="these stages alone: exactness, cost, 'decode step', speculation")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = "cpu" if arguments.rehearse else "cuda"
    chosen = [s for s in stages(arguments.out.resolve(), device, arguments.rehearse) if not arguments.only or s.name in arguments.only]
    found: dict[str, Any] = {"device": _device_name(device), "machine": machine(), "commit": commit(), "stages": []}
    found["command"] = "scripts/gpu.sh OUT" + (" --rehearse" if arguments.rehearse else "")
    for stage in chosen:
        row = run(stage, arguments.out.resolve(), arguments.rehearse)
        found["stages"].append(row)
        (arguments.out / "results.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(f"{row['stage']}: {row['seconds']} s, exit status {row['status']}", flush=True)
    text = report(found)
    (arguments.out / "report.md").write_text(text, encoding="utf-8")
    print(text)
    sys.exit(int(any(row["status"] != 0 or "error" in row for row in found["stages"])))


def _device_name(device: str) -> str:
    if device == "cpu":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no GPU here\n  to rehearse on the CPU: scripts/gpu.sh OUT --rehearse")
    return torch.cuda.get_device_name()


if __name__ == "__main__":
    main()
