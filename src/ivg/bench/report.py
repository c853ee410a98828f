"""From measurements to figures and tables. Definitions: docs/reference/benchmarks.md.

Seconds are medians over rounds. Ratios are medians of the ratios within each round, so that a machine that is slow for a while slows
both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from ivg.bench.settings import BASELINES, METHOD, BenchSettings

Row = Mapping[str, Any]
COLUMNS = ("system", "prompts", "s", "answers/s", "tokens/s", "first s", "peak MiB", "+MiB", "TFLOP", "× roofline")
CONTENTION = 0.05
"""Share of the processors that other processes may take before the report warns."""


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Figures of one case: medians over its rounds; what was read is the same in all."""
    seconds = [r["seconds"] for r in rows]
    typical, answers = median(seconds), rows[0]["answers"]
    roofs = [r["roofline"] for r in rows if r["roofline"] is not None]
    above = [r["peak"] - r["before"] for r in rows if r["peak"] is not None and r["before"] is not None]
    return {
        "prompts": answers,
        "new_tokens": rows[0]["new_tokens"],
        "seconds": typical,
        "seconds_of_rounds": [round(s, 4) for s in seconds],
        "seconds_per_answer": typical / answers,
        "answers_per_second": answers / typical,
        "tokens_per_second": rows[0]["tokens"] / typical,
        "first_text_seconds": median(r["first_text_seconds"] for r in rows),
        "peak_bytes": max((r["peak"] for r in rows if r["peak"] is not None), default=None),
        "peak_above_bytes": max(above, default=None),
        "forward_tokens": dict(rows[0]["forward_tokens"]),
        "flops": rows[0]["flops"],
        "roofline_seconds": median(roofs) if roofs else None,
        "over_roofline": median(r["seconds"] / r["roofline"] for r in rows) if roofs else None,
    }


def by_label(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Measurements of each case, in order of rounds."""
    out: dict[str, list[Row]] = {}
    for row in rows:
        out.setdefault(row["label"], []).append(row)
    return out


def paired_ratio(rows: Sequence[Row], one: str, other: str, what: Callable[[Row], float]) -> float:
    """Median over rounds of ``what(one) / what(other)``, both of the same round."""
    groups = by_label(rows)
    return median(what(a) / what(b) for a, b in zip(groups[one], groups[other], strict=False))


def seconds_per_answer(row: Row) -> float:
    """Seconds for each answer."""
    return row["seconds"] / row["answers"]


def flop_ratio(rows: Sequence[Row]) -> float:
    """FLOPs of a token read by every model that the method used, over those of the base model alone."""
    first = by_label(rows)[METHOD][0]
    return sum(first["sizes"].get(name, 0) for name in first["forward_tokens"]) / first["sizes"]["base"]


def ratios(rows: Sequence[Row]) -> dict[str, float]:
    """The method compared with each baseline that was measured."""
    out = {"flop_ratio": flop_ratio(rows)}
    for baseline in (b for b in BASELINES if b in by_label(rows)):
        time = paired_ratio(rows, METHOD, baseline, seconds_per_answer)
        out[f"time_over_{baseline}"] = time
        out[f"time_over_{baseline}_per_flop"] = time / out["flop_ratio"]
    return out


RATIOS = {
    "flop_ratio": "forward FLOPs for each token, all models over the base alone",
    "time_over_transformers": "time over that of transformers' generate",
    "time_over_transformers_per_flop": "the same, divided by the ratio of FLOPs",
    "time_over_vllm": "time over that of vLLM's plain sampling",
    "time_over_vllm_per_flop": "the same, divided by the ratio of FLOPs",
}
"""Descriptions of the ratios."""


def summary(settings: BenchSettings, rows: Sequence[Row], made: Mapping[str, Any]) -> dict[str, Any]:
    """All figures, the settings and the machine, for the JSON line."""
    return {
        "benchmark": settings.title,
        "settings": settings.provenance | {"rounds": settings.rounds},
        **conditions(rows),
        "systems": {label: figures(group) for label, group in by_label(rows).items()},
        "ratios": ratios(rows),
        "made": dict(made),
    }


def conditions(rows: Sequence[Row]) -> dict[str, Any]:
    """Dtype, device, threads, the commits that measured, and the largest share that other processes took."""
    first = rows[0]
    return {
        "dtype": first["dtype"],
        "device": first["device"],
        "threads": first["threads"],
        "commits": list(dict.fromkeys(r["commit"] for r in rows)),
        "others": max((r["others"] for r in rows if r["others"] is not None), default=None),
    }


def cells(found: Mapping[str, Any]) -> list[list[str]]:
    """The table's rows, in :data:`COLUMNS`."""
    return [_cells(label, f) for label, f in found["systems"].items()]


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
        "?" if f["over_roofline"] is None else f"{f['over_roofline']:.2f}",
    ]


def notes(found: Mapping[str, Any]) -> list[str]:
    """Lines under the table: ratios, tokens read, a warning where other processes were busy."""
    out = [f"{RATIOS[name]}: {number:.2f}" for name, number in found["ratios"].items()]
    for label, f in found["systems"].items():
        read = ", ".join(f"{model} {n / f['prompts']:,.0f}" for model, n in f["forward_tokens"].items())
        out.append(f"tokens read for each answer by {label}: {read}")
    return out + contention_warning(found)


def contention_warning(found: Mapping[str, Any]) -> list[str]:
    """A warning where other processes were busy during a measurement."""
    if (found["others"] or 0.0) <= CONTENTION:
        return []
    return [f"other processes took up to {found['others']:.0%} of the processors; measure again on an idle machine"]


def print_results(title: str, head: Sequence[str], body: Sequence[Sequence[str]], lines: Sequence[str]) -> None:
    """Print a table and the lines under it on standard output."""
    from rich.table import Table

    from ivg.utils.console import print_table, table_console

    out = table_console()
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left")
    for row in body:
        table.add_row(*row)
    print_table(table, out)
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)
