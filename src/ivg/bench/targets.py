"""``ivg bench --targets``: the table of what this package promises of its speed, measured, and said plainly where it falls short.

Base of 98 M with a vocabulary of 16 384, guides and value of 17 M, W=K=4, L=5. Knows: what each row is measured from. Files lie in one
folder; a run that was interrupted goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ivg.bench import memory, report, runner, slot_utilization
from ivg.bench.runner import Entry
from ivg.bench.settings import Settings
from ivg.errors import ConfigError
from ivg.jobs.blocks import check_provenance
from ivg.utils import environment
from ivg.utils.jsonl import write_json

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """One row: the figure called ``key`` must be at least (``above``) or at most ``target``; ``stretch`` is better still."""

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

    def shown(self, number: float) -> str:
        """With its unit."""
        return f"{number:.1%}" if self.percent else f"{number:.2f}" + ("×" if self.above else "")


TARGETS = (
    Target("over_naive_50", "16 prompts, 50 new tokens: throughput over naive", 2.8, 4.0, above=True),
    Target("over_naive_256", "16 prompts, 256 new tokens: throughput over naive", 5.0, 8.0, above=True),
    Target("over_naive_512", "16 prompts, 512 new tokens: throughput over naive", 9.0, 15.0, above=True),
    Target("over_naive_one", "one prompt, 50 new tokens: throughput over naive", 1.5, 2.0, above=True),
    Target("over_floor_per_flop", "time over the floor, divided by the ratio of forward FLOPs", 1.15, 1.0),
    Target("flat", "time per token at 512 new tokens over that at 64", 1.35, 1.2),
    Target("memory", "peak memory over weights and caches needed", 1.25, 1.1),
    Target("waiting", "tokens lost to waiting, 64 prompts of uneven answers", 0.10, 0.05, percent=True),
)
COLUMNS = ("what", "target", "stretch", "measured", "verdict")


@dataclass(frozen=True)
class Plan:
    """What is run: settings that all groups share, and lengths, which a rehearsal makes small."""

    settings: Settings
    short: int = 50
    middle: int = 256
    long: int = 512
    flat_from: int = 64
    many: int = 16
    few: int = 4
    requests: int = 64
    least: int = 16
    most: int = 128

    def groups(self) -> dict[str, tuple[Settings, list[Entry]]]:
        """Name -> settings and entries that are measured in turn."""
        floor, naive, ours = (
            lambda n, t: Entry("floor", "floor", n, t),
            lambda n, t: Entry("naive", "naive", n, t),
            lambda n, t: Entry("ours", "ours", n, t),
        )
        many, few = self.many, self.few
        flat = [Entry(f"ours-{t}", "ours", few, t) for t in (self.flat_from, self.long)]
        made = {
            "short": (self.short, many, [floor(many, self.short), naive(min(2, many), self.short), ours(many, self.short)]),
            "one": (self.short, 1, [naive(1, self.short), ours(1, self.short)]),
            "flat": (self.long, few, flat),
            "middle": (self.middle, many, [naive(1, self.middle), ours(many, self.middle)]),
            "long": (self.long, many, [naive(1, self.long), ours(many, self.long)]),
        }
        return {name: (replace(self.settings, new_tokens=t, prompts=n), e) for name, (t, n, e) in made.items()}


def plan(settings: Settings, *, quick: bool = False) -> Plan:
    """The full plan on the shapes of the table, or, ``quick``, a rehearsal on tiny models whose figures mean nothing."""
    if not quick:
        return Plan(replace(settings, shape="gpt2-small-16k", guide="guide-17m", prompt_tokens=32))
    tiny = replace(settings, shape="tiny", guide=None, prompt_tokens=8, rounds=1, max_beams=32)
    return Plan(tiny, short=6, middle=8, long=12, flat_from=6, many=2, few=2, requests=6, least=3, most=12)


def run(wanted: Plan, folder: Path, done: Callable[[str, Row], None] = lambda _, __: None) -> dict[str, Any]:
    """Measure what ``folder`` lacks; all figures, and how they came about.

    Args:
        wanted: see :func:`plan`.
        folder: holds one file for each group.
        done: called with the group's name and each new measurement.

    Raises:
        ConfigError: ``folder`` was made with other settings, or on another machine.
    """
    rows = {}
    once = {"memory": _once(folder / "memory.json", wanted, _memory), "waiting": _once(folder / "slot_utilization.json", wanted, _waiting)}
    for name, (settings, entries) in wanted.groups().items():
        rows[name] = runner.run(settings, folder / f"{name}.jsonl", entries, lambda row, name=name: done(name, row))  # type: ignore[misc]
    flat = [row for group in rows.values() for row in group]
    return {
        "benchmark": "targets",
        "settings": wanted.settings.provenance | {"rounds": wanted.settings.rounds},
        **report.how(flat),
        "figures": figures(wanted, rows) | {"memory": once["memory"]["ratio"], "waiting": once["waiting"]["lost"]},
        "memory": once["memory"],
        "waiting": once["waiting"],
        "groups": {name: {label: report.figures(g) for label, g in report.by_label(group).items()} for name, group in rows.items()},
        "made": environment.made(),
    }


def figures(wanted: Plan, rows: Mapping[str, Sequence[Row]]) -> dict[str, float]:
    """The table's figures that come from seconds."""

    def over_naive(name: str) -> float:
        return 1 / report.paired(rows[name], "ours", "naive", report.per_answer)

    def per_token(row: Row) -> float:
        return row["seconds"] / row["tokens"]

    short = rows["short"]
    return {
        "over_naive_50": over_naive("short"),
        "over_naive_256": over_naive("middle"),
        "over_naive_512": over_naive("long"),
        "over_naive_one": over_naive("one"),
        "over_floor_per_flop": report.paired(short, "ours", "floor", report.per_answer) / report.flop_ratio(short),
        "flat": report.paired(rows["flat"], f"ours-{wanted.long}", f"ours-{wanted.flat_from}", per_token),
    }


def cells(found: Mapping[str, float]) -> list[list[str]]:
    """The table's rows, in :data:`COLUMNS`."""
    out = []
    for t in TARGETS:
        sign, measured = "≥ " if t.above else "≤ ", found[t.key]
        out.append([t.what, sign + t.shown(t.target), sign + t.shown(t.stretch), t.shown(measured), t.verdict(measured)])
    return out


def verdicts(found: Mapping[str, float]) -> dict[str, str]:
    """By key, for the JSON line."""
    return {t.key: t.verdict(found[t.key]) for t in TARGETS}


def notes(found: Mapping[str, Any]) -> list[str]:
    """What stands under the table."""
    mib = {k: f"{found['memory'][k] / 2**20:,.0f} MiB" for k in ("peak", "weights", "caches", "held")}
    lost = found["waiting"]
    return [
        f"memory: peak {mib['peak']}, weights {mib['weights']}, caches needed {mib['caches']}; with what rows share counted once "
        f"{mib['held']}, of which with the weights the peak is {found['memory']['ratio_shared']:.2f}",
        f"waiting: {lost['lost']:.1%} while requests wait, {lost['lost_with_end']:.1%} including the end, when nobody is left to let in",
        *report.disturbed(found),
    ]


def _once(path: Path, wanted: Plan, make: Callable[[Plan], dict[str, Any]]) -> dict[str, Any]:
    """The figures in ``path``, made by ``make`` if they are not there; refused if other settings made them."""
    settings = {k: v for k, v in asdict(wanted).items() if k != "settings"} | wanted.settings.provenance
    provenance = json.loads(json.dumps(settings | {"machine": environment.facts()}))
    if not path.exists():
        write_json(path.with_name(path.name + ".meta.json"), provenance)
        write_json(path, make(wanted))
    check_provenance(path, provenance)
    return json.loads(path.read_text(encoding="utf-8"))


def _memory(wanted: Plan) -> dict[str, Any]:
    return memory.measure(replace(wanted.settings, prompts=wanted.many, new_tokens=wanted.short, contestants=("ours",)))


def _waiting(wanted: Plan) -> dict[str, Any]:
    """On tiny models: how many tokens are lost does not depend on the models' size."""
    tiny = replace(wanted.settings, shape="tiny", guide=None)
    return slot_utilization.measure(tiny, wanted.requests, wanted.least, wanted.most)


def check(settings: Settings) -> None:
    """Raise where the table's own settings are asked to be others.

    Raises:
        ConfigError: names them.
    """
    own = ("shape", "guide", "method", "width", "successors", "chunk_length", "prompts", "prompt_tokens", "new_tokens", "contestants")
    default = Settings()
    given = [name for name in (*own, "naive_prompts", "max_beams") if getattr(settings, name) != getattr(default, name)]
    if given:
        raise ConfigError(f"--targets has settings of its own, got {', '.join(given)}\n  leave them out, or measure without --targets")
