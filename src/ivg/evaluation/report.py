"""The third stage: results.json, report.md, report.html and figures/ from transcripts and scores alone; loads no model.

Knows how figures become tables. Numbers come from ``summary``, pictures from ``figures``, the page from ``page``.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ivg.evaluation.figures import Figure, draw, order
from ivg.evaluation.html import page
from ivg.evaluation.plan import EvalPlan
from ivg.evaluation.samples import Sample, samples
from ivg.evaluation.summary import run_metadata, summarise
from ivg.utils import environment
from ivg.utils.jsonl import write_json, write_text

Results = dict[str, Any]
Cell = Callable[[Results, Results], str]


def report(p: EvalPlan) -> Results:
    """Write the report of a run whose other stages are finished; gives back what results.json holds.

    Raises:
        ConfigError: a stage that is not finished, scores that belong to other transcripts.
        MissingDependencyError: no matplotlib.
    """
    results = summarise(p)
    results["made"] = {
        "recipe": p.recipe.model_dump(exclude_none=True, exclude_defaults=True),
        "by": run_metadata(p) or [environment.run_metadata()],
    }
    drawn = draw(results)
    shown = samples(p, order(results))
    write_json(p.out / "results.json", results)
    folder = p.out / "figures"
    for figure in drawn:
        write_text(folder / f"{figure.name}.svg", figure.svg)
        (folder / f"{figure.name}.png").write_bytes(figure.png)
    write_text(p.out / "report.md", markdown(results, drawn, shown))
    write_text(p.out / "report.html", page(results, drawn, shown, tables(results)))
    return results


def publish(p: EvalPlan, docs: Path) -> None:
    """Copy what documentation may show: report.md without its samples (the prompts are the data's), results.json, SVG figures."""
    (docs / "figures").mkdir(parents=True, exist_ok=True)
    text = (p.out / "report.md").read_text(encoding="utf-8")
    before, _, samples_and_rest = text.partition(f"## {SAMPLES}\n")
    _, heading, rest = samples_and_rest.partition("\n## ")
    write_text(docs / "report.md", before + heading.lstrip() + rest)
    shutil.copyfile(p.out / "results.json", docs / "results.json")
    for path in sorted((p.out / "figures").glob("*.svg")):
        shutil.copyfile(path, docs / "figures" / path.name)


SAMPLES = "Samples"


# Tables


class Table:
    """Rows of texts under named columns; the first column names the row."""

    def __init__(self, title: str, columns: Sequence[tuple[str, Cell]], results: Results, note: str = "") -> None:
        self.title, self.note = title, note
        self.header = ["method", *(name for name, _ in columns)]
        self.rows = [[label, *(cell(results["methods"][label], results) for _, cell in columns)] for label in order(results)]

    def markdown(self) -> str:
        """As Markdown."""
        lines = [f"## {self.title}", "", _line(self.header), "|" + "---|" * len(self.header)]
        lines += [_line([f"`{row[0]}`", *row[1:]]) for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else [])])


def tables(results: Results) -> list[Table]:
    """Rewards, texts, costs, and the task's own figures where there are some."""
    judges, named = results["judges"], {"gold": "gold reward"}
    rewards: list[tuple[str, Cell]] = [(f"{named.get(j, j)} (95 % interval)", _spread_of(j)) for j in judges]
    if "gold" in judges:
        rewards.append(("wins against base", lambda m, r: "–" if m["label"] == r["base"] else percent(m["win_rate"])))
    rewards.append(("KL to base, nats", lambda m, r: divergence(m["kl"])))
    if results["base_samples"]:
        rewards.append(("best-of-N at equal compute", lambda m, r: rival(m["best_of_n"])))
    texts: list[tuple[str, Cell]] = [
        ("perplexity under base", lambda m, r: number(m["perplexity"], 1)),
        ("surprisal, nats", lambda m, r: number(m["surprisal"]["mean"], 1)),
        ("tokens", lambda m, r: number(m["length"], 1)),
        ("distinct-1", lambda m, r: number(m["distinct_1"], 3)),
        ("distinct-2", lambda m, r: number(m["distinct_2"], 3)),
        ("repetition", lambda m, r: number(m["repetition"], 3)),
    ]
    costs: list[tuple[str, Cell]] = [
        ("tokens read, by model", lambda m, r: ", ".join(f"{k} {v:,.0f}" for k, v in m["forward_tokens"].items())),
        ("GFLOPs", lambda m, r: f"{m['flops'] / 1e9:,.2f}"),
        ("seconds", lambda m, r: number(r["timings"].get(m["label"], {}).get("seconds"), 3)),
        ("peak memory, MiB", lambda m, r: mebibytes(r["timings"].get(m["label"], {}).get("peak_bytes"))),
        ("failed", lambda m, r: str(m["errors"] or "–")),
    ]
    out = [
        Table("Reward", rewards, results, _reward_note(results)),
        Table("Texts", texts, results, _TEXTS),
        Table("Costs of an answer", costs, results, _COSTS),
    ]
    own = sorted({k for m in results["methods"].values() for k, v in m["task"].items() if isinstance(v, int | float)})
    if own:
        columns: list[tuple[str, Cell]] = [(k.replace("_", " "), _own_figure(k)) for k in own]
        notes = sorted({str(v) for m in results["methods"].values() for v in m["task"].values() if isinstance(v, str)})
        out.insert(1, Table(f"The task's own figures ({results['task']})", columns, results, " ".join(notes)))
    return out


_TEXTS = (
    "Perplexity and surprisal (−log π_base of an answer): at temperature 1. Distinct-n: distinct word n-grams over all, within one seed's "
    "answers (Li et al. 2016). Repetition: share of an answer's token 4-grams that repeat earlier ones (seq-rep-4, Welleck et al. 2020)."
)
_COSTS = (
    "FLOPs: 2 · parameters · tokens, over all models, input embeddings left out. Seconds: of a block of prompts that share the batch, "
    "divided by its answers, beside whatever else the machine did. Memory: of the process with its weights (of the GPU where there is one)."
)


def _reward_note(results: Results) -> str:
    parts = ["Intervals: bootstrap over prompts, seeds averaged first."]
    if any(m["kl"] and m["kl"]["bound"] for m in results["methods"].values()):
        parts.append("KL with ≤: what token guidance moved (measured) plus the most that selection can add; without: an unbiased estimate.")
    reasons: dict[str, list[str]] = {}
    for label, m in results["methods"].items():
        if m.get("kl_note"):
            reasons.setdefault(m["kl_note"], []).append(label)
    parts += [f"KL –: {reason} ({', '.join(labels)})." for reason, labels in reasons.items()]
    if results["base_samples"]:
        parts.append(
            "Best-of-N: as many base samples, the same number for all prompts, as on average cost no more FLOPs than the method's answer, "
            f"the best by the {results['base_samples']['selected_by']} value"
            f" (+: limited by the {results['base_samples']['size']} base samples)."
        )
    return " ".join(parts)


def markdown(results: Results, drawn: Sequence[Figure], shown: Sequence[Sample]) -> str:
    """The report as Markdown; figures beside it in ``figures/``."""
    made = results["made"]
    parts = [f"# {results['task'].capitalize()}: {len(results['methods'])} methods, {results['prompts']} prompts, {_seeds(results)}"]
    parts += [t.markdown() for t in tables(results)]
    if drawn:
        parts += ["## Figures", *(f"![{f.alt}](figures/{f.name}.svg)" for f in drawn)]
    parts += [f"## {SAMPLES}", *(s.markdown() for s in shown[:3])]
    parts.append("## How it was made")
    for by in made["by"]:
        facts = [f"- {k.replace('_', ' ')}: {v}" for k, v in {"commit": by["commit"], **by["machine"]}.items() if v is not None]
        parts += [f"```\n{by['command']}\n```", "\n".join(facts)]
    return "\n\n".join(parts) + "\n"


def _seeds(results: Results) -> str:
    return "one seed" if results["seeds"] == 1 else f"{results['seeds']} seeds"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


# Cells


def _spread_of(judge: str) -> Cell:
    return lambda m, r: spread(m[judge])


def _own_figure(name: str) -> Cell:
    return lambda m, r: number(m["task"].get(name), 2)


def number(x: float | None, digits: int) -> str:
    """A number, a dash where there is none."""
    return "–" if x is None or not math.isfinite(x) else f"{x:,.{digits}f}"


def signed(x: float) -> str:
    """With its sign; a true minus."""
    return f"{x:+.2f}".replace("-", "−")


def spread(e: Results) -> str:
    """Mean and interval."""
    return f"{signed(e['mean'])} ({signed(e['low'])} … {signed(e['high'])})"


def percent(e: Results | None) -> str:
    """A share with its interval."""
    return "–" if e is None else f"{100 * e['mean']:.1f} % ({100 * e['low']:.1f} … {100 * e['high']:.1f})"


def divergence(kl: Results | None) -> str:
    """An estimate with its interval, or an upper bound."""
    if kl is None:
        return "–"
    return f"≤ {kl['mean']:.1f}" if kl["bound"] else f"{kl['mean']:.1f} ({kl['low']:.1f} … {kl['high']:.1f})"


def rival(best: Results | None) -> str:
    """Gold of best-of-N and its N."""
    if best is None or best["gold"] is None:
        return "–"
    return f"{signed(best['gold']['mean'])} (N = {best['n']}{'+' if best['capped'] else ''})"


def mebibytes(n: int | None) -> str:
    """Bytes as MiB."""
    return "–" if n is None else f"{n / 2**20:,.0f}"
