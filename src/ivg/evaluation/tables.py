"""The tables of a report, from ``results.json``: one row for each method, cells as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ivg.evaluation.figures import order

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
    """Rewards, the task's own metrics where it has some, text statistics, costs."""
    found = [_rewards(results), _texts(results), _costs(results)]
    own = _task_metrics(results)
    return found if own is None else [found[0], own, *found[1:]]


def _rewards(results: Results) -> Table:
    columns: list[Column] = []
    for judge in results["judges"]:
        columns.append((f"{'gold reward' if judge == 'gold' else judge} (95 % interval)", _interval_of(judge)))
    if "gold" in results["judges"]:
        columns.append(("wins against base", lambda m: "–" if m["label"] == results["base"] else percent(m["win_rate"])))
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


def _reward_note(results: Results) -> str:
    methods = results["methods"]
    parts = ["Intervals: bootstrap over prompts, averaged over seeds first."]
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
        ("perplexity under base", lambda m: number(m["perplexity"], 1)),
        ("surprisal, nats", lambda m: number(m["surprisal"]["mean"], 1)),
        ("distinct-1", lambda m: number(m["distinct_1"], 3)),
    ]
    note = "Perplexity and surprisal (−log π_base of an answer) at temperature 1. Distinct-1: distinct words divided by all."
    return Table.of("Texts under the base", columns, results, note)


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
    return f"≤ {kl['mean']:.1f}" if kl["bound"] else f"{kl['mean']:.1f} ({kl['low']:.1f} … {kl['high']:.1f})"


def best_of_n(best: Results | None) -> str:
    """Gold reward of best-of-N, and N."""
    if best is None or best["gold"] is None:
        return "–"
    return f"{signed(best['gold']['mean'])} (N = {best['n']}{'+' if best['capped'] else ''})"


def mebibytes(n: int | None) -> str:
    """Bytes as MiB."""
    return "–" if n is None else f"{n / 2**20:,.0f}"
