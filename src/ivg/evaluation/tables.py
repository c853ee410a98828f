"""The tables of a report, from ``results.json``: one row for each method, cells as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ivg.evaluation.figures import judge_name, order

Results = Mapping[str, Any]
Column = tuple[str, Callable[[Results], str]]
"""A header, and a method's results as the text of its cell."""


@dataclass(frozen=True)
class Table:
    """A table; the first column is the method's label.

    Attributes:
        title: heading.
        header: of all columns.
        rows: cells.
        note: a line below it.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""

    @classmethod
    def of(cls, title: str, columns: list[Column], results: Results, note: str = "") -> Table:
        """One row for each method, the best first."""
        rows = [[label, *(cell(results["methods"][label]) for _, cell in columns)] for label in order(results)]
        return cls(title, ["method", *(name for name, _ in columns)], rows, note)

    def markdown(self) -> str:
        """The table as a section of a Markdown document."""
        lines = [f"## {self.title}", "", _markdown_row(self.header), "|" + "---|" * len(self.header)]
        lines += [_markdown_row([f"`{label}`", *cells]) for label, *cells in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else [])])


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


def tables(results: Results) -> list[Table]:
    """Rewards, those at equal KL and equal compute where there are sweeps, the task's own metrics, text statistics, costs."""
    own = _task_metrics(results)
    return [_rewards(results), *sweep_tables(results), *([own] if own is not None else []), _texts(results), _costs(results)]


def _rewards(results: Results) -> Table:
    columns: list[Column] = []
    for judge in results["judges"]:
        columns.append((f"{judge_name(judge)} (95 % interval)", _interval_of(judge)))
    if "gold" in results["judges"]:
        columns.append(("wins against base", lambda m: "–" if m["label"] == results["base"] else percent(m["win_rate"])))
    if _has_equal_length(results):
        columns.append(("wins at equal length", lambda m: percent(m["win_rate_at_equal_length"])))
    columns.append(("KL to base, nats", lambda m: divergence(m["kl"])))
    if results["base_samples"]:
        columns.append(("best-of-N at equal compute", lambda m: best_of_n(m["best_of_n"])))
    columns += [
        ("distinct-2", lambda m: number(m["distinct_2"], 3)),
        ("repetition", lambda m: number(m["repetition"], 3)),
        ("words", lambda m: number(m["words"], 1)),
        ("tokens", lambda m: number(m["length"], 1)),
    ]
    return Table.of("Reward", columns, results, _reward_note(results))


def _has_equal_length(results: Results) -> bool:
    return any(m["win_rate_at_equal_length"] for m in results["methods"].values())


def _reward_note(results: Results) -> str:
    methods = results["methods"]
    parts = ["Intervals: bootstrap over prompts, averaged over seeds first."]
    if _has_equal_length(results):
        parts.append(
            "Wins at equal length: predicted by a logistic regression of the wins on the difference of length in characters (as Dubois et "
            "al. 2024, without their term for each instruction); – where an equal length was not measured."
        )
    if any(m["kl"] and m["kl"]["bound"] for m in methods.values()):
        parts.append(
            "KL: an unbiased estimate; with ≤ an upper bound: that of token guidance (measured) plus the most that selection adds."
        )
    reasons: dict[str, list[str]] = {}
    for label, m in methods.items():
        if m.get("kl_note"):
            reasons.setdefault(m["kl_note"], []).append(label)
    parts += [f"No KL: {reason} ({', '.join(labels)})." for reason, labels in reasons.items()]
    if samples := results["base_samples"]:
        parts.append(
            "Best-of-N: the largest N, the same for all prompts, whose mean FLOPs are at most those of the method's answers; selected by "
            f"the {samples['selected_by']} value (+: limited by the {samples['size']} base samples)."
        )
    parts.append(
        "Distinct-2: distinct word pairs divided by all, within the answers of one seed (Li et al. 2016). Repetition: fraction of an "
        "answer's token 4-grams that repeat earlier ones (seq-rep-4, Welleck et al. 2020). A reward that rises while variety or another "
        "judge falls is a sign of over-optimisation."
    )
    return " ".join(parts)


def _task_metrics(results: Results) -> Table | None:
    metrics = [m["task"] for m in results["methods"].values()]
    names = sorted({k for m in metrics for k, v in m.items() if isinstance(v, int | float)})
    columns: list[Column] = [(name.replace("_", " "), _task_metric(name)) for name in names]
    notes = sorted({v for m in metrics for v in m.values() if isinstance(v, str)})
    return Table.of(f"Metrics of the task {results['task']}", columns, results, " ".join(notes)) if names else None


def _texts(results: Results) -> Table:
    columns: list[Column] = [
        ("KL to base, nats", lambda m: divergence(m["kl"])),
        ("KL at least", lambda m: number(m["kl_at_least"], 2)),
        ("surprisal above base", lambda m: "–" if m["surprisal_above_base"] is None else interval(m["surprisal_above_base"])),
        ("surprisal, nats", lambda m: number(m["surprisal"]["mean"], 1)),
        ("perplexity under base", lambda m: number(m["perplexity"], 1)),
        ("distinct-1", lambda m: number(m["distinct_1"], 3)),
    ]
    note = (
        "KL at least: a lower bound for any method, from how often answers pass a threshold of the gold reward, which is chosen on half of "
        "the prompts and measured on the other half; it cannot exceed the logarithm of the number of answers. Surprisal: −log π_base of "
        "an answer at temperature 1. Surprisal above base is no KL but a proxy: KL is what it says plus the entropy that the answers have "
        "lost, so a method whose answers are more alike has a larger KL than this, which may even be negative. Distinct-1: distinct "
        "words divided by all."
    )
    return Table.of("Distance from the base", columns, results, note)


def _costs(results: Results) -> Table:
    def timing(m: Results, name: str) -> Any:
        return results["timings"].get(m["label"], {}).get(name)

    columns: list[Column] = [
        ("tokens read, by model", lambda m: ", ".join(f"{k} {v:,.0f}" for k, v in m["forward_tokens"].items())),
        ("GFLOPs", lambda m: f"{m['flops'] / 1e9:,.2f}"),
        ("seconds", lambda m: number(timing(m, "seconds"), 3)),
        ("peak memory, MiB", lambda m: mebibytes(timing(m, "peak_bytes"))),
        ("failed", lambda m: str(m["errors"] or "–")),
    ]
    note = (
        "FLOPs: 2 · parameters · tokens, summed over models, without input embeddings. Seconds: of a batch of prompts divided by its "
        "answers; other processes of the machine count. Memory: of the process with its weights (of the GPU where there is one)."
    )
    return Table.of("Cost of an answer", columns, results, note)


# Sweeps

_KL_NOTE = (
    "Interpolated between the two nearest measured points of a sweep, linearly in √KL, and never beyond its points (–). √KL, since near "
    "the base the reward of a tilted distribution grows with it. Intervals: bootstrap over prompts, the same resamples for all sweeps, "
    "interpolated anew in each; where its points do not reach the budget, the nearest counts. KL is estimated without bias for token "
    "guidance. ≤: an upper bound, since selection can only be bounded: such a row may have much less KL than its column says, and is "
    "at a disadvantage (for best-of-N the bound is nearly exact, as long as equal samples are rare). Choosing the best column of a row is "
    "a choice made on these prompts."
)
_COMPUTE_NOTE = (
    "FLOPs of an answer, measured, as multiples of plain base sampling. Interpolated between the two nearest measured points of a sweep, "
    "linearly in log FLOPs, and never beyond its points (–). Intervals as above."
)


def sweep_tables(results: Results) -> list[Table]:
    """Rewards at equal KL and at equal compute, for each judge; none without sweeps."""
    found = [*_at_budgets(results, "kl", "at equal KL", _KL_NOTE), *_at_budgets(results, "flops", "at equal compute", _COMPUTE_NOTE)]
    return [*found, _differences(results)] if results["differences"] else found


def _differences(results: Results) -> Table:
    """Differences from the method that the recipe names."""
    found, judges = results["differences"], results["judges"]

    def cells(rewards: Results) -> list[str]:
        return [interval(e) if (e := rewards.get(judge)) is not None else "–" for judge in judges]

    rows = [[label, *cells(m["rewards"]), f"{m['flops']:.2f}"] for label in order(results) if (m := found["methods"].get(label))]
    for name, axes in found["sweeps"].items():
        for axis, text, cost in (("kl", "its KL", "–"), ("flops", "its FLOPs", "1")):
            if any(axes.get(axis, {}).values()):
                rows.append([f"{name} at {text}", *cells(axes[axis]), cost])
    parts = [
        f"Rewards minus those of {found['from']}, on the same prompts; intervals by bootstrap over prompts: one that leaves out 0 is a "
        "difference. FLOPs: as a multiple of that method's. Many rows are many chances of a difference."
    ]
    if len(rows) > len(found["methods"]):
        parts.append("Sweeps at its KL or its FLOPs: interpolated between measured points, linearly in √KL or log FLOPs.")
        if found["bound"] and any("kl" in axes for axes in found["sweeps"].values()):
            parts.append(f"The KL of {found['from']} is an upper bound, so that sweeps of token guidance may have more KL than it has.")
    return Table(f"Differences from {found['from']}", ["method", *map(judge_name, judges), "FLOPs"], rows, " ".join(parts))


def _at_budgets(results: Results, axis: str, title: str, note: str) -> Iterator[Table]:
    found = results["equal_kl" if axis == "kl" else "equal_compute"]
    if found is None or not found["budgets"]:
        return
    sweeps, text = results["sweeps"], " ".join([note, *_sweep_notes(results, found["left_out"], axis)])
    columns = ["sweep", *(["KL"] if axis == "kl" else []), *(_budget(b, axis) for b in found["budgets"])]
    for i, (judge, rows) in enumerate(found["rewards"].items()):
        cells = []
        for name, row in rows.items():
            kind = ["≤" if sweeps[name]["bound"] else "estimated"] if axis == "kl" else []
            cells.append([name, *kind, *("–" if c is None else interval(c) for c in row)])
        yield Table(f"{'Reward' if judge == 'gold' else judge} {title}", columns, cells, text if i == 0 else "")


def _budget(budget: Results, axis: str) -> str:
    if axis == "flops":
        return f"{budget['name']} ({budget['flops'] / 1e9:,.3g} GFLOPs)"
    return f"{budget['kl']:.3g} nats" + (f" ({budget['name']})" if budget["name"] else "")


def _sweep_notes(results: Results, left_out: Sequence[str], axis: str) -> list[str]:
    """Which sweeps begin with the base, and which are missing and why."""
    sweeps = results["sweeps"]
    based = [name for name, s in sweeps.items() if results["base"] in s["points"] and not (axis == "flops" and s["first_by_cost"])]
    notes = [f"The base is the first point of {', '.join(based)}."] if based else []
    if axis == "flops":
        base = results["methods"][results["base"]]["flops"]
        costs = [f"{name} ({sweeps[name]['flops'][-1] / base:.1f}×)" for name in left_out]
        return [*notes, f"Not here, since all their points cost about the same: {', '.join(costs)}."] if costs else notes
    return notes + [f"Not here: {name} ({sweeps[name]['kl_note']})." for name in left_out]


# Cells


def _interval_of(judge: str) -> Callable[[Results], str]:
    return lambda m: interval(m[judge])


def _task_metric(name: str) -> Callable[[Results], str]:
    return lambda m: number(m["task"].get(name), 2)


def number(x: float | None, digits: int) -> str:
    """A number, or a dash."""
    return "–" if x is None or not math.isfinite(x) else f"{x:,.{digits}f}"


def signed(x: float) -> str:
    """A number with its sign; a true minus."""
    return f"{x:+.2f}".replace("-", "−")


def interval(e: Results) -> str:
    """Mean and interval."""
    return f"{signed(e['mean'])} ({signed(e['low'])} … {signed(e['high'])})"


def percent(e: Results | None) -> str:
    """A fraction with its interval, in percent."""
    return "–" if e is None else f"{100 * e['mean']:.1f} % ({100 * e['low']:.1f} … {100 * e['high']:.1f})"


def divergence(kl: Results | None) -> str:
    """An estimate with its interval, or an upper bound."""
    if kl is None:
        return "–"
    mean, low, high = (f"{kl[name]:.1f}".replace("-0.0", "0.0") for name in ("mean", "low", "high"))
    return f"≤ {mean}" if kl["bound"] else f"{mean} ({low} … {high})"


def best_of_n(best: Results | None) -> str:
    """Gold reward of best-of-N, and N."""
    if best is None or best["gold"] is None:
        return "–"
    more = "+" if best["capped"] else ", costs more" if best.get("over_budget") else ""
    return f"{signed(best['gold']['mean'])} (N = {best['n']}{more})"


def mebibytes(n: int | None) -> str:
    """Bytes as MiB."""
    return "–" if n is None else f"{n / 2**20:,.0f}"
