"""Stage 3 of an evaluation: results.json, report.md, report.html, samples.md, samples.html and figures/; loads no model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ivg.evaluation.figures import STYLE, Figure, draw, judge_name, order
from ivg.evaluation.plan import EvalPlan
from ivg.evaluation.samples import IN_REPORT, Sample, samples
from ivg.evaluation.summary import run_metadata, summarise
from ivg.evaluation.tables import signed, tables
from ivg.utils import environment
from ivg.utils.jsonl import jsonable, write_json, write_text
from ivg.utils.templates import render

Results = dict[str, Any]
SAMPLES_IN_MARKDOWN = 3


def report(plan: EvalPlan) -> Results:
    """Write the report of a run whose other stages are complete; gives what results.json holds.

    Raises:
        ConfigError: an incomplete stage, or scores of other transcripts.
        MissingDependencyError: matplotlib is not installed.
    """
    results = summarise(plan)
    results["made"] = {
        "recipe": plan.recipe.model_dump(exclude_none=True, exclude_defaults=True, exclude={"eval": {"jobs"}}),
        "by": run_metadata(plan) or [environment.run_metadata()],
    }
    figures, shown = draw(results), samples(plan, order(results))
    write_json(plan.out / "results.json", results)
    for figure in figures:
        write_text(plan.out / "figures" / f"{figure.name}.svg", figure.svg)
        (plan.out / "figures" / f"{figure.name}.png").write_bytes(figure.png)
    write_text(plan.out / "report.md", markdown(results, figures, shown[:SAMPLES_IN_MARKDOWN]))
    write_text(plan.out / "report.html", html(results, figures, shown[:IN_REPORT]))
    for name, text in sample_pages(results, shown).items():
        write_text(plan.out / name, text)
    return results


def read_results(path: Path) -> Results:
    """A results.json, of any version; what an older one lacks is empty or None."""
    results: Results = json.loads(path.read_text(encoding="utf-8"))
    if "bank" in results:
        results = _renamed(results)
    missing: Results = dict.fromkeys(("sweep", "words", "kl_at_least", "surprisal_above_base", "win_rate_at_equal_length")) | {"point": {}}
    results["methods"] = {label: {**missing, **method} for label, method in results["methods"].items()}
    return {"sweeps": {}, "equal_kl": None, "equal_compute": None, "differences": None, **results}


def _renamed(results: Results) -> Results:
    """Results of version 0.1 with today's names."""
    renamed = {"bank": "base_samples", "clock": "timings"}
    out = {renamed.get(k, k): v for k, v in results.items()}
    out["methods"] = {label: {"method" if k == "strategy" else k: v for k, v in m.items()} for label, m in results["methods"].items()}
    if out["base_samples"]:
        out["base_samples"] = {"selected_by" if k == "by" else k: v for k, v in out["base_samples"].items()}
    return out


def publish(plan: EvalPlan, docs: Path) -> None:
    """Copy what documentation may show: report.md without its samples (the prompts belong to the data), results.json, SVG figures."""
    (docs / "figures").mkdir(parents=True, exist_ok=True)
    results = read_results(plan.out / "results.json")
    write_text(docs / "report.md", markdown(results, draw(results), []))
    shutil.copyfile(plan.out / "results.json", docs / "results.json")
    for path in sorted((plan.out / "figures").glob("*.svg")):
        shutil.copyfile(path, docs / "figures" / path.name)


def markdown(results: Results, figures: Sequence[Figure], shown: Sequence[Sample]) -> str:
    """The report as Markdown; its figures are files in ``figures/``."""
    return _render("report.md.jinja", results, figures, shown, flat=_one_line).rstrip() + "\n"


def html(results: Results, figures: Sequence[Figure], shown: Sequence[Sample]) -> str:
    """The report as one self-contained page."""
    recipe = json.dumps(jsonable(results["made"]["recipe"]), indent=2, ensure_ascii=False, allow_nan=False)
    return _render("report.html.jinja", results, figures, shown, style=STYLE, recipe_json=recipe)


def sample_pages(results: Results, shown: Sequence[Sample]) -> dict[str, str]:
    """``samples.md`` and ``samples.html``: the answers of all methods to each prompt, side by side, for people to read."""
    title = f"{results['task'].capitalize()}: answers of {len(results['methods'])} methods to {len(shown)} prompts"
    common = {"title": title, "results": results, "samples": shown, "signed": signed, "judge_name": judge_name, "words": _words}
    return {
        "samples.md": render("ivg.evaluation", "samples.md.jinja", flat=_one_line, quoted=_quoted, **common).rstrip() + "\n",
        "samples.html": render("ivg.evaluation", "samples.html.jinja", style=STYLE, **common),
    }


def _render(template: str, results: Results, figures: Sequence[Figure], shown: Sequence[Sample], **more: Any) -> str:
    seeds = "one seed" if results["seeds"] == 1 else f"{results['seeds']} seeds"
    title = f"{results['task'].capitalize()}: {len(results['methods'])} methods"
    processes = [(by["command"], _facts({"commit": by["commit"], **by["machine"]})) for by in results["made"]["by"]]
    return render(
        "ivg.evaluation",
        template,
        title=title,
        seeds=seeds,
        results=results,
        processes=processes,
        tables=tables(results),
        figures=figures,
        samples=shown,
        signed=signed,
        **more,
    )


def _facts(metadata: Results) -> Results:
    return {name.replace("_", " "): value for name, value in metadata.items() if value is not None}


def _one_line(text: str | None) -> str:
    """Text in one line, escaped for Markdown; ⏎ marks line breaks."""
    return _escaped(" ⏎ ".join(line.strip() for line in (text or "").strip().splitlines()))


def _words(text: str) -> str:
    count = len(text.split())
    return f"{count} word" if count == 1 else f"{count} words"


def _quoted(text: str) -> str:
    """Text as a quotation of Markdown with its lines, each escaped."""
    return "  \n".join(f"> {_escaped(line.strip())}" for line in text.strip().splitlines()) or "> "


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>#])", r"\\\1", text)
