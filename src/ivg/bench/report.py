"""From measurements to figures, tables and a page. Pure: no torch, no clocks.

Seconds are medians over rounds. Ratios are medians of each round's own ratio, so that a machine that slows down for a while slows both
sides. Definitions: docs/reference/benchmarks.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ivg.bench.settings import Settings
from ivg.errors import ConfigError
from ivg.utils.jsonl import write_text

Row = Mapping[str, Any]
COLUMNS = ("contestant", "prompts", "s", "answers/s", "tokens/s", "first s", "peak MiB", "+MiB", "TFLOP")
QUIET = 0.05
"""Share of the processors that other processes may take before a measurement is called disturbed."""


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """One entry's figures: medians over its rounds; what was read is the same in all."""
    seconds = [r["seconds"] for r in rows]
    typical, answers = median(seconds), rows[0]["answers"]
    above = [r["peak"] - r["before"] for r in rows if r["peak"] is not None and r["before"] is not None]
    return {
        "prompts": answers,
        "new_tokens": rows[0]["new_tokens"],
        "seconds": typical,
        "seconds_of_rounds": [round(s, 4) for s in seconds],
        "seconds_per_answer": typical / answers,
        "answers_per_second": answers / typical,
        "tokens_per_second": rows[0]["tokens"] / typical,
        "first_text_seconds": median(r["first"] for r in rows),
        "peak_bytes": max((r["peak"] for r in rows if r["peak"] is not None), default=None),
        "peak_above_bytes": max(above, default=None),
        "forward_tokens": dict(rows[0]["forward_tokens"]),
        "flops": rows[0]["flops"],
    }


def by_label(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Measurements of each entry, in order of rounds."""
    out: dict[str, list[Row]] = {}
    for row in rows:
        out.setdefault(row["label"], []).append(row)
    return out


def paired(rows: Sequence[Row], one: str, other: str, what: Callable[[Row], float]) -> float:
    """Median over rounds of ``what(one) / what(other)``, both of the same round."""
    groups = by_label(rows)
    return median(what(a) / what(b) for a, b in zip(groups[one], groups[other], strict=False))


def per_answer(row: Row) -> float:
    """Seconds for each answer."""
    return row["seconds"] / row["answers"]


def flop_ratio(rows: Sequence[Row]) -> float:
    """FLOPs of a token read by every model that ours used, over those of the base alone."""
    ours = by_label(rows)["ours"][0]
    return sum(ours["sizes"].get(name, 0) for name in ours["forward_tokens"]) / ours["sizes"]["base"]


def ratios(rows: Sequence[Row]) -> dict[str, float]:
    """What ours is to the others, as far as they were measured."""
    there, out = by_label(rows), {}
    if "ours" not in there:
        return {}
    if "naive" in there:
        out["throughput_over_naive"] = 1 / paired(rows, "ours", "naive", per_answer)
    out["flop_ratio"] = flop_ratio(rows)
    for floor in (f for f in ("floor", "vllm") if f in there):
        time = paired(rows, "ours", floor, per_answer)
        out[f"time_over_{floor}"] = time
        out[f"time_over_{floor}_per_flop"] = time / out["flop_ratio"]
    return out


RATIOS = {
    "throughput_over_naive": "answers/s of ours over naive",
    "flop_ratio": "forward FLOPs for each token, all models over the base alone",
    "time_over_floor": "time of ours over the floor",
    "time_over_floor_per_flop": "the same, divided by the ratio of FLOPs",
    "time_over_vllm": "time of ours over vLLM's plain sampling",
    "time_over_vllm_per_flop": "the same, divided by the ratio of FLOPs",
}
"""What the names in the JSON mean."""


def summary(settings: Settings, rows: Sequence[Row], made: Mapping[str, Any]) -> dict[str, Any]:
    """All that is known, for the JSON line."""
    return {
        "benchmark": settings.title,
        "settings": settings.provenance | {"rounds": settings.rounds},
        **how(rows),
        "contestants": {label: figures(group) for label, group in by_label(rows).items()},
        "ratios": ratios(rows),
        "made": dict(made),
    }


def how(rows: Sequence[Row]) -> dict[str, Any]:
    """Type of numbers, device, threads, the commits that measured, and the largest share that other processes took."""
    first = rows[0]
    commits = list(dict.fromkeys(r["commit"] for r in rows))
    out = {"dtype": first["dtype"], "device": first["device"], "threads": first["threads"], "commits": commits}
    return out | {"others": max((r["others"] for r in rows if r["others"] is not None), default=None)}


def cells(found: Mapping[str, Any]) -> list[list[str]]:
    """The table's rows, in :data:`COLUMNS`."""
    return [_cells(label, f) for label, f in found["contestants"].items()]


def _cells(label: str, f: Mapping[str, Any]) -> list[str]:
    def mib(number: int | None) -> str:
        return "?" if number is None else f"{number / 2**20:,.0f}"

    numbers = (f["seconds"], f["answers_per_second"], f["tokens_per_second"], f["first_text_seconds"])
    return [
        label,
        str(f["prompts"]),
        *(f"{n:.3g}" for n in numbers),
        mib(f["peak_bytes"]),
        mib(f["peak_above_bytes"]),
        f"{f['flops'] / 1e12:.3g}",
    ]


def lines(found: Mapping[str, Any]) -> list[str]:
    """Ratios and forward tokens in words."""
    out = [f"{RATIOS[name]}: {number:.2f}" for name, number in found["ratios"].items()]
    for label, f in found["contestants"].items():
        read = ", ".join(f"{model} {n / f['prompts']:,.0f}" for model, n in f["forward_tokens"].items())
        out.append(f"tokens read for each answer by {label}: {read}")
    if "naive" in found["contestants"] and found["contestants"]["naive"]["prompts"] != found["settings"]["prompts"]:
        out.append(f"naive takes one prompt at a time; its rate was measured on {found['contestants']['naive']['prompts']}")
    return out + disturbed(found)


def disturbed(found: Mapping[str, Any]) -> list[str]:
    """A warning where other processes were busy while seconds were counted."""
    if (found["others"] or 0.0) <= QUIET:
        return []
    return [f"disturbed: other processes took up to {found['others']:.0%} of the processors; measure again when the machine is quiet"]


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table whose columns but the first are numbers."""
    rule = "|---|" + "---:|" * (len(head) - 1)
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in body)])


def section(title: str, table: str, notes: Sequence[str], found: Mapping[str, Any]) -> str:
    """A part of docs/reference/benchmarks.md: title, table, notes, and what measured it."""
    made = found["made"]
    facts = ", ".join(f"{k} {v}" for k, v in made["machine"].items())
    where = f"{found['device']}, {found['dtype']}, {found['threads']} threads, {found['settings']['rounds']} rounds"
    commits = ", ".join(str(c) for c in found["commits"])
    listed = "\n".join(f"- {note}" for note in notes)
    return f"### {title}\n\n{table}\n\n{listed}\n\n{where}. {facts}. Commit {commits}.\n\n```text\n{made['command']}\n```"


def publish(page: Path, key: str, text: str) -> None:
    """Put ``text`` between the markers of ``key`` in ``page``, or at its end where it has none.

    Raises:
        ConfigError: no such page, or a marker that does not end.
    """
    if not page.exists():
        raise ConfigError(f"no page {page}\n  expected a Markdown file, e.g. docs/reference/benchmarks.md")
    old = page.read_text(encoding="utf-8")
    begin, end = f"<!-- bench: {key} -->", "<!-- /bench -->"
    block = f"{begin}\n{text}\n{end}"
    if begin not in old:
        write_text(page, f"{old.rstrip()}\n\n{block}\n")
        return
    new, count = re.subn(re.escape(begin) + ".*?" + re.escape(end), lambda _: block, old, count=1, flags=re.DOTALL)
    if not count:
        raise ConfigError(f"{page}: {begin} has no {end} behind it\n  add it")
    write_text(page, new)
