"""The speed targets of this package, measured: ``make bench-targets``.

    .venv/bin/python -m benchmarks.targets --out build/bench-targets --docs docs/reference/benchmarks.md
    .venv/bin/python -m benchmarks.targets --quick

Base of 98 M parameters with a vocabulary of 16 384, guides and value of 17 M, W=K=4, L=5. One file for each group of measurements in the
folder ``--out``; a second run resumes. ``--quick`` runs everything on tiny models in seconds; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import peak_memory, slot_utilization
from benchmarks.compare_naive import ALL_SYSTEMS, NAIVE, add_options, print_progress, throughput_over_naive
from benchmarks.docs_page import markdown_table, section, update_page
from ivg.bench import report, runner
from ivg.bench.runner import Case
from ivg.bench.settings import METHOD, BenchSettings
from ivg.jobs.blocks import check_provenance
from ivg.utils import environment
from ivg.utils.jsonl import to_json, write_json

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """One row: the figure ``key`` should be at least (``above``) or at most ``target``, better still ``stretch``."""

    key: str
    what: str
    target: float
    stretch: float
    above: bool = False
    percent: bool = False

    def verdict(self, measured: float) -> str:
        """``stretch``, ``pass`` or ``falls short``."""
        if self._reaches(measured, self.stretch):
            return "stretch"
        return "pass" if self._reaches(measured, self.target) else "falls short"

    def _reaches(self, measured: float, goal: float) -> bool:
        return measured >= goal if self.above else measured <= goal  # nan reaches nothing

    def formatted(self, number: float) -> str:
        """``number`` with its unit."""
        return f"{number:.1%}" if self.percent else f"{number:.2f}" + ("×" if self.above else "")


TARGETS = (
    Target("over_naive_50", "16 prompts, 50 new tokens: throughput over naive", 2.8, 4.0, above=True),
    Target("over_naive_256", "16 prompts, 256 new tokens: throughput over naive", 5.0, 8.0, above=True),
    Target("over_naive_512", "16 prompts, 512 new tokens: throughput over naive", 9.0, 15.0, above=True),
    Target("over_naive_one", "one prompt, 50 new tokens: throughput over naive", 1.5, 2.0, above=True),
    Target("over_transformers_per_flop", "time over transformers' generate, divided by the ratio of forward FLOPs", 1.15, 1.0),
    Target("flat", "time per token at 512 new tokens over that at 64", 1.35, 1.2),
    Target("memory", "peak memory over weights and caches needed", 1.25, 1.1),
    Target("idle_slots", "idle slots while requests wait, 64 prompts with answers of 16 to 128 tokens", 0.10, 0.05, percent=True),
)
COLUMNS = ("what", "target", "stretch", "measured", "verdict")


@dataclass(frozen=True)
class Plan:
    """Settings that all groups share, and the lengths, which ``--quick`` makes small."""

    settings: BenchSettings
    short: int = 50
    middle: int = 256
    long: int = 512
    flat_from: int = 64
    many: int = 16
    few: int = 4
    requests: int = 64
    least: int = 16
    most: int = 128

    def groups(self) -> dict[str, tuple[BenchSettings, list[Case]]]:
        """Name -> settings, and the cases that are measured in turn."""
        many, few = self.many, self.few

        def plain(prompts: int, tokens: int) -> Case:
            return Case("transformers", "transformers", prompts, tokens)

        def naive(prompts: int, tokens: int) -> Case:
            return Case(NAIVE, NAIVE, prompts, tokens)

        def method(prompts: int, tokens: int) -> Case:
            return Case(METHOD, METHOD, prompts, tokens)

        flat = [Case(f"{METHOD}-{t}", METHOD, few, t) for t in (self.flat_from, self.long)]
        made = {
            "short": (self.short, many, [plain(many, self.short), naive(min(2, many), self.short), method(many, self.short)]),
            "one": (self.short, 1, [naive(1, self.short), method(1, self.short)]),
            "flat": (self.long, few, flat),
            "middle": (self.middle, many, [naive(1, self.middle), method(many, self.middle)]),
            "long": (self.long, many, [naive(1, self.long), method(many, self.long)]),
        }
        return {name: (replace(self.settings, new_tokens=t, prompts=n), c) for name, (t, n, c) in made.items()}


def make_plan(settings: BenchSettings, *, quick: bool = False) -> Plan:
    """The plan on the shapes of the table; ``quick``: on tiny models."""
    if not quick:
        return Plan(replace(settings, shape="gpt2-small-16k", guide="guide-17m", prompt_tokens=32))
    tiny = replace(settings, shape="tiny", guide=None, prompt_tokens=8, rounds=1, max_beams=32)
    return Plan(tiny, short=6, middle=8, long=12, flat_from=6, many=2, few=2, requests=6, least=3, most=12)


def run(plan: Plan, folder: Path, on_progress: Callable[[str, Row], None] = lambda _, __: None) -> dict[str, Any]:
    """Measure what ``folder`` lacks; return all figures and the conditions.

    Args:
        plan: see :func:`make_plan`.
        folder: holds one file for each group.
        on_progress: called with the group's name and each new measurement.

    Raises:
        ConfigError: ``folder`` was made with other settings, or on another machine.
    """
    memory = _measure_once(folder / "memory.json", plan, _memory)
    idle = _measure_once(folder / "slot_utilization.json", plan, _idle_slots)
    rows = {}
    for name, (settings, cases) in plan.groups().items():
        rows[name] = runner.run(
            settings,
            folder / f"{name}.jsonl",
            cases,
            systems=ALL_SYSTEMS,
            on_progress=lambda row, name=name: on_progress(name, row),  # type: ignore[misc]
        )
    all_rows = [row for group in rows.values() for row in group]
    return {
        "benchmark": "targets",
        "settings": plan.settings.provenance | {"rounds": plan.settings.rounds},
        **report.conditions(all_rows),
        "figures": figures(plan, rows) | {"memory": memory["ratio"], "idle_slots": idle["idle"]},
        "memory": memory,
        "slots": idle,
        "groups": {name: {label: report.figures(g) for label, g in report.by_label(group).items()} for name, group in rows.items()},
        "made": environment.run_metadata(),
    }


def figures(plan: Plan, rows: Mapping[str, Sequence[Row]]) -> dict[str, float]:
    """The figures that come from seconds."""

    def per_token(row: Row) -> float:
        return row["seconds"] / row["tokens"]

    short = rows["short"]
    over_transformers = report.paired_ratio(short, METHOD, "transformers", report.seconds_per_answer)
    return {
        "over_naive_50": throughput_over_naive(short),
        "over_naive_256": throughput_over_naive(rows["middle"]),
        "over_naive_512": throughput_over_naive(rows["long"]),
        "over_naive_one": throughput_over_naive(rows["one"]),
        "over_transformers_per_flop": over_transformers / report.flop_ratio(short),
        "flat": report.paired_ratio(rows["flat"], f"{METHOD}-{plan.long}", f"{METHOD}-{plan.flat_from}", per_token),
    }


def cells(found: Mapping[str, float]) -> list[list[str]]:
    """The table's rows, in :data:`COLUMNS`."""
    out = []
    for t in TARGETS:
        sign, measured = "≥ " if t.above else "≤ ", found[t.key]
        out.append([t.what, sign + t.formatted(t.target), sign + t.formatted(t.stretch), t.formatted(measured), t.verdict(measured)])
    return out


def verdicts(found: Mapping[str, float]) -> dict[str, str]:
    """By key, for the JSON line."""
    return {t.key: t.verdict(found[t.key]) for t in TARGETS}


def notes(found: Mapping[str, Any]) -> list[str]:
    """Lines under the table."""
    mib = {k: f"{found['memory'][k] / 2**20:,.0f} MiB" for k in ("peak", "weights", "caches", "held")}
    slots = found["slots"]
    return [
        f"memory: peak {mib['peak']}, weights {mib['weights']}, caches needed {mib['caches']}; with shared parts counted once "
        f"{mib['held']}, and the peak is {found['memory']['ratio_shared']:.2f} times that and the weights",
        f"idle slots: {slots['idle']:.1%} while requests wait, {slots['idle_with_end']:.1%} over the whole run",
        *report.contention_warning(found),
    ]


def _measure_once(path: Path, plan: Plan, measure: Callable[[Plan], dict[str, Any]]) -> dict[str, Any]:
    """The figures in ``path``, measured now if they are not there; refused if they were made with other settings."""
    settings = {k: v for k, v in asdict(plan).items() if k != "settings"} | plan.settings.provenance
    provenance = json.loads(json.dumps(settings | {"machine": environment.machine()}))
    if not path.exists():
        write_json(path.with_name(path.name + ".meta.json"), provenance)
        write_json(path, measure(plan))
    check_provenance(path, provenance)
    return json.loads(path.read_text(encoding="utf-8"))


def _memory(plan: Plan) -> dict[str, Any]:
    return peak_memory.measure(replace(plan.settings, prompts=plan.many, new_tokens=plan.short))


def _idle_slots(plan: Plan) -> dict[str, Any]:
    """On tiny models: the number of idle slots does not depend on the models' size."""
    return slot_utilization.measure(replace(plan.settings, shape="tiny", guide=None), plan.requests, plan.least, plan.most)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, ("dtype", "device", "threads", "rounds", "temperature", "seed"))
    parser.add_argument("--quick", action="store_true", help="tiny models; the figures mean nothing")
    parser.add_argument("--out", type=Path, default=Path("build/bench-targets"), help="folder for the measurements (default: %(default)s)")
    parser.add_argument("--docs", type=Path, help="page to write the table into")
    options = vars(parser.parse_args(arguments))
    quick, folder, docs = options.pop("quick"), options.pop("out"), options.pop("docs")
    plan = make_plan(BenchSettings(**options), quick=quick)
    found = run(plan, folder, lambda name, row: print_progress(row, plan.settings.rounds, f"{name}: "))
    found |= {"verdicts": verdicts(found["figures"]), "quick": quick}
    body, lines = cells(found["figures"]), notes(found)
    if quick:
        lines.append("tiny models: these figures mean nothing")
    title = f"Targets on {found['device']}"
    if docs is not None and not quick:
        update_page(docs, f"targets, {found['device']}", section(title, markdown_table(COLUMNS, body), lines, found))
    report.print_results(f"{title}, {found['dtype']}, {found['threads']} threads", COLUMNS, body, lines)
    print(to_json(found))


if __name__ == "__main__":
    main()
