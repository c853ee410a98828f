"""The report as one HTML page that needs nothing else: tables, inline SVG, samples side by side, how it was made.

Knows HTML. All texts of models and people are escaped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from ivg.evaluation.figures import STYLE, Figure
from ivg.evaluation.samples import Sample
from ivg.utils.jsonl import jsonable

if TYPE_CHECKING:
    from ivg.evaluation.report import Table

Results = dict[str, Any]

_CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,'Segoe UI','Helvetica Neue',Arial,sans-serif}
main{max-width:1180px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:26px;line-height:1.25;margin:0 0 4px}
h2{font-size:18px;margin:40px 0 10px}
.lead,.note{color:var(--muted)} .note{font-size:13px;max-width:90ch}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:6px 12px 6px 0;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid)}
th{font-weight:600;color:var(--muted);vertical-align:bottom;white-space:normal}
th:first-child,td:first-child{text-align:left;font-weight:600}
tr.base td{background:color-mix(in srgb,var(--grid) 45%,transparent)}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(640px,100%),1fr));gap:24px}
figure{margin:0;max-width:820px} figure svg{width:100%;height:auto;display:block}
details{border-top:1px solid var(--grid);padding:10px 0} summary{cursor:pointer;font-weight:600}
summary:focus-visible{outline:2px solid var(--token);outline-offset:3px}
.answers{display:grid;grid-template-columns:repeat(auto-fill,minmax(270px,1fr));gap:12px;margin-top:12px}
.answer{border:1px solid var(--grid);border-radius:6px;padding:10px 12px;font-size:13.5px;overflow-wrap:anywhere}
.answer b{display:flex;justify-content:space-between;gap:8px;font-size:12.5px;margin-bottom:4px}
.answer b span{font-weight:400;color:var(--muted)} .answer p{margin:0;white-space:pre-wrap} .prompt{white-space:pre-wrap}
pre{overflow-x:auto;background:color-mix(in srgb,var(--grid) 45%,transparent);border-radius:6px;padding:12px;font-size:12.5px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;font-size:13.5px} dt{color:var(--muted)} dd{margin:0}
@media print{main{max-width:none;padding:0} details{break-inside:avoid} figure{break-inside:avoid}}
"""


def page(results: Results, figures: Sequence[Figure], samples: Sequence[Sample], tables: Sequence[Table]) -> str:
    """The whole page."""
    title = f"{results['task'].capitalize()}: {len(results['methods'])} methods"
    seeds = "one seed" if results["seeds"] == 1 else f"{results['seeds']} seeds"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{results["prompts"]} prompts, {seeds}; the base is <code>{escape(results["base"])}</code>.</p>',
        _table(tables[0], results["base"]),
        _figures(figures),
        *(_table(t, results["base"]) for t in tables[1:]),
        _samples(samples),
        _made(results["made"]),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<style>{STYLE}{_CSS}</style></head>\n<body><main>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )


def _table(table: Table, base: str) -> str:
    head = "".join(f'<th scope="col">{escape(c)}</th>' for c in table.header)
    rows = []
    for row in table.rows:
        mark = ' class="base"' if row[0] == base else ""
        rows.append(f"<tr{mark}>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>")
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<h2>{escape(table.title)}</h2><div class="wide" tabindex="0"><table>{body}</table></div>{note}'


def _figures(figures: Sequence[Figure]) -> str:
    if not figures:
        return ""
    return '<h2>Figures</h2><div class="figures">' + "".join(f"<figure>{_own_ids(f)}</figure>" for f in figures) + "</div>"


def _own_ids(figure: Figure) -> str:
    """The SVG with ids of its own: several on one page must not share them."""
    from re import sub

    svg = sub(r'\bid="([^"]+)"', rf'id="{figure.name}-\1"', figure.svg)
    svg = sub(r'href="#([^"]+)"', rf'href="#{figure.name}-\1"', svg)
    svg = sub(r"url\(#([^)]+)\)", rf"url(#{figure.name}-\1)", svg)
    return sub(r"<style>:root.*?</style>", "", svg)


def _samples(samples: Sequence[Sample]) -> str:
    parts = []
    for i, s in enumerate(samples):
        cells = [_cell("reference", s.reference, None)] if s.reference is not None else []
        cells += [_cell(c.label, f"failed: {c.error}" if c.error else c.text, c.gold) for c in s.cells]
        short = s.prompt if len(s.prompt) <= 90 else s.prompt[:88].rstrip() + " …"
        whole = f'<p class="prompt">{escape(s.prompt)}</p>' if short != s.prompt else ""
        parts.append(
            f"<details{' open' if i == 0 else ''}><summary>{escape(short)}</summary>{whole}"
            f'<div class="answers">{"".join(cells)}</div></details>'
        )
    return "<h2>Side by side</h2>" + "".join(parts) if parts else ""


def _cell(label: str, text: str | None, gold: float | None) -> str:
    score = f"<span>{gold:+.2f}</span>".replace("-", "−") if gold is not None else ""
    return f'<div class="answer"><b>{escape(label)}{score}</b><p>{escape((text or "").strip())}</p></div>'


def _made(made: Results) -> str:
    parts = []
    for by in made["by"]:
        facts = {"commit": by["commit"], **by["machine"]}
        listed = "".join(f"<dt>{escape(k.replace('_', ' '))}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items() if v is not None)
        parts.append(f"<pre>{escape(by['command'])}</pre><dl>{listed}</dl>")
    recipe = escape(json.dumps(jsonable(made["recipe"]), indent=2, ensure_ascii=False, allow_nan=False))
    return f"<h2>How it was made</h2>{''.join(parts)}<details><summary>Recipe, with all settings</summary><pre>{recipe}</pre></details>"
