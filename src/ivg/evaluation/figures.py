"""The figures of a report, drawn with matplotlib (extra ``eval``): SVG for light and dark pages, and PNG.

Colour and marker show the family of a method (Okabe and Ito's colour-blind safe palette). Upper bounds are hollow, with an arrow.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from ivg.errors import MissingDependencyError
from ivg.evaluation.kl import selection_bound
from ivg.evaluation.label_placement import LabeledPoint, place_labels
from ivg.evaluation.metrics import pareto

Results = dict[str, Any]
FAMILIES = {
    "base": ("base", "o"),
    "token": ("token guidance", "^"),
    "select": ("selection", "s"),
    "both": ("token guidance and selection", "D"),
    "other": ("rejection, particles, drafts, trees", "P"),
}
_LIGHT = {
    "paper": "#fefdfb", "ink": "#1c1b19", "muted": "#6c6a63", "grid": "#e4e2db",
    "base": "#55534d", "token": "#0072b2", "select": "#c8540a", "both": "#007d5a", "other": "#9b4f96",
}  # fmt: skip
_DARK = {
    "paper": "#171614", "ink": "#ecebe5", "muted": "#a6a49b", "grid": "#37352f",
    "base": "#b9b7ae", "token": "#69b7ee", "select": "#f09a52", "both": "#46c79b", "other": "#d79ad2",
}  # fmt: skip
_SCREEN = "".join(f"--{k}:{v};" for k, v in _LIGHT.items())
_NIGHT = "".join(f"--{k}:{v};" for k, v in _DARK.items())
STYLE = f":root{{{_SCREEN}}}@media (prefers-color-scheme:dark){{:root{{{_NIGHT}}}}}@media print{{:root{{{_SCREEN}}}}}"
"""CSS variables of the colours, for pages and figures."""


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: file name without extension.
        title: heading.
        alt: its content as text.
        svg: a document that stands alone.
        png: the same as pixels.
    """

    name: str
    title: str
    alt: str
    svg: str
    png: bytes

    def inline_svg(self) -> str:
        """The SVG for a page with several figures: unique ids, and the page's own colours."""
        svg = re.sub(r'\bid="([^"]+)"', rf'id="{self.name}-\1"', self.svg)
        svg = re.sub(r'href="#([^"]+)"', rf'href="#{self.name}-\1"', svg)
        svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{self.name}-\1)", svg)
        return re.sub(r"<style>:root.*?</style>", "", svg)


def draw(results: Results) -> list[Figure]:
    """All figures that the results have data for.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise MissingDependencyError("figures need matplotlib\n  pip install 'ivg[eval]'") from None
    judges, first = results["judges"], leading_metric(results)
    with mpl.rc_context(_STYLE | {"svg.fonttype": "none", "svg.hashsalt": "ivg"}):
        out = []
        shown = [(judge, judge_name(judge)) for judge in judges] or ([first] if first is not None else [])
        for judge, name in shown:
            out += [_divergence(results, judge, name), _compute(results, judge, name)]
        if len(judges) > 1:
            out += [_pareto(results, judges[0], other) for other in judges[1:]]
    return out


# One figure each


def _divergence(results: Results, judge: str, name: str) -> Figure:
    known = {k: m for k, m in results["methods"].items() if m["kl"] is not None}
    fig, ax = _axes(f"{name} against divergence from the base", "KL(method ‖ base) of an answer, nats", f"{name}, mean over prompts")
    if results["sweeps"]:  # on this scale rewards are interpolated
        ax.set_xscale("function", functions=(_root, _square))
        ax.set_xlabel("KL(method ‖ base) of an answer, nats (√ scale)")
        most = max((m["kl"].get("high", m["kl"]["mean"]) for m in known.values()), default=1.0)
        ax.set_xticks([t for t in (0, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if t <= 1.2 * most])
    curve = _best_of_n(results, judge)
    _draw_best_of_n(ax, [selection_bound([c["n"]], best_of_chunks=True) for c in curve], curve)
    points = [_point(ax, _short_label(results, k, "kl"), m["family"], m["kl"], m[judge], bound=m["kl"]["bound"]) for k, m in known.items()]
    notes = ["hollow with an arrow: an upper bound, since the KL of selection can only be bounded"] if any(p.arrow for p in points) else []
    notes += [f"grey line: best-of-N by {results['base_samples']['selected_by']}, an upper bound as well"] if curve else []
    notes += _draw_sweeps(ax, results, known, judge, "kl")
    missing = [k for k in results["methods"] if k not in known]
    notes += [f"not shown, since no KL is known: {', '.join(missing)}"] if missing else []
    _legend(fig, ax, known, "; ".join(notes))
    place_labels(ax, points)
    listed = "; ".join(
        f"{k}: {m['kl']['mean']:.1f} nats{' at most' if m['kl']['bound'] else ''}, {m[judge]['mean']:+.2f}" for k, m in known.items()
    )
    return _figure(fig, _file_name("reward-kl", results, judge), f"{name} against KL to the base", listed)


def _compute(results: Results, judge: str, name: str) -> Figure:
    methods = {k: m for k, m in results["methods"].items() if m["flops"]}
    fig, ax = _axes(f"{name} against computation", "FLOPs of an answer", f"{name}, mean over prompts")
    ax.set_xscale("log")
    curve = _best_of_n(results, judge)
    _draw_best_of_n(ax, [c["flops"] for c in curve], curve)
    points = [_point(ax, _short_label(results, k, "flops"), m["family"], {"mean": m["flops"]}, m[judge]) for k, m in methods.items()]
    notes = [f"grey line: best-of-N by {results['base_samples']['selected_by']}, with 95 % interval"] if curve else []
    notes += _draw_sweeps(ax, results, methods, judge, "flops")
    _legend(fig, ax, methods, "; ".join(notes))
    place_labels(ax, points)
    listed = "; ".join(f"{k}: {m['flops']:.3g} FLOPs, {m[judge]['mean']:+.2f}" for k, m in results["methods"].items())
    title = f"{name} against computation{', best-of-N beside' if curve else ''}"
    return _figure(fig, _file_name("reward-compute", results, judge), title, listed)


def _pareto(results: Results, first: str, second: str) -> Figure:
    methods = results["methods"]
    x, y = judge_name(first), judge_name(second)
    fig, ax = _axes(f"{y} against {x}", f"{x}, mean over prompts", f"{y}, mean over prompts")
    both = [(m[first]["mean"], m[second]["mean"]) for m in methods.values()]
    front = pareto(both)
    ax.plot([both[i][0] for i in front], [both[i][1] for i in front], color=_LIGHT["muted"], lw=1.2, ls=(0, (4, 3)), zorder=1.5)
    points = [_point(ax, k, m["family"], m[first], m[second]) for k, m in methods.items()]
    _legend(fig, ax, methods, "dashed: Pareto front")
    place_labels(ax, points)
    names = list(methods)
    listed = "Pareto front: " + ", ".join(names[i] for i in front)
    return _figure(fig, f"pareto-{first}-{second}", f"{y} against {x}", listed)


# Best-of-N and sweeps


def _best_of_n(results: Results, judge: str) -> list[Results]:
    """The curve of best-of-N: ``n``, ``flops`` and the judge's ``reward``, for those N where it is known."""
    samples = results["base_samples"]
    found = [{**c, "reward": c["gold"] if judge == "gold" else c.get("judges", {}).get(judge)} for c in samples["curve"]] if samples else []
    return [c for c in found if c["reward"]]


def _draw_best_of_n(ax: Any, x: Sequence[float], curve: Sequence[Results]) -> None:
    """A grey line with its interval, and a tick at every power of 2."""
    if not curve:
        return
    rewards = [c["reward"] for c in curve]
    ax.plot(x, [e["mean"] for e in rewards], color=_LIGHT["muted"], lw=1.6, zorder=1.5)
    ax.fill_between(x, [e["low"] for e in rewards], [e["high"] for e in rewards], color=_LIGHT["grid"], lw=0, zorder=1)
    for at, c in ((at, c) for at, c in zip(x, curve, strict=True) if c["n"] & (c["n"] - 1) == 0):
        ax.plot(at, c["reward"]["mean"], "|", color=_LIGHT["muted"], ms=7, zorder=1.6)
        below = {"textcoords": "offset points", "ha": "center", "color": _LIGHT["muted"], "fontsize": 7.5}
        ax.annotate(f"N={c['n']}", (at, c["reward"]["mean"]), (0, -15), **below)


def _draw_sweeps(ax: Any, results: Results, known: Results, judge: str, axis: str) -> list[str]:
    """A line through the points of each sweep that are known; gives the note that says so."""
    drawn: dict[str, int] = {}
    for sweep in results["sweeps"].values():
        labels = [k for k in sweep["points"][sweep["first_by_cost"] if axis == "flops" else 0 :] if k in known]
        points = sorted((known[k]["kl"]["mean"] if axis == "kl" else known[k]["flops"], known[k][judge]["mean"]) for k in labels)
        if len(points) < 2:
            continue
        family = known[labels[-1]]["family"]  # the first may be the base
        style = _LINES[drawn.setdefault(family, 0) % len(_LINES)]
        drawn[family] += 1
        ax.plot([x for x, _ in points], [y for _, y in points], color=_LIGHT[family], lw=1.3, ls=style, zorder=2)
    return ["lines join the points of a sweep"] if drawn else []


def _short_label(results: Results, label: str, axis: str) -> str:
    """A point of a sweep has its numbers alone, but for the last one, which has the sweep's name as well."""
    m = results["methods"][label]
    if m["sweep"] is None:
        return label
    same = [k for k, other in results["methods"].items() if other["sweep"] == m["sweep"] and (axis == "flops" or other["kl"] is not None)]
    last = max(same, key=lambda k: results["methods"][k]["kl"]["mean"] if axis == "kl" else results["methods"][k]["flops"])
    return label if label == last else label.removeprefix(f"{m['sweep']}-")


def _root(x: Any) -> Any:
    """√x; below 0, where the interval of an estimate may reach, −√−x."""
    return np.sign(x) * np.sqrt(np.abs(x))


def _square(x: Any) -> Any:
    return x * np.abs(x)


def _file_name(name: str, results: Results, judge: str) -> str:
    """The figure of the first judge has the plain name."""
    return name if judge in ("primary", *results["judges"][:1]) else f"{name}-{judge}"


# Shared parts

_LINES: Any = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)))

_STYLE: Any = {
    "font.family": "sans-serif", "font.size": 9.5, "axes.edgecolor": _LIGHT["muted"], "axes.labelcolor": _LIGHT["ink"],
    "axes.facecolor": _LIGHT["paper"], "figure.facecolor": _LIGHT["paper"], "savefig.facecolor": _LIGHT["paper"],
    "text.color": _LIGHT["ink"], "xtick.color": _LIGHT["muted"], "ytick.color": _LIGHT["muted"], "xtick.labelcolor": _LIGHT["ink"],
    "ytick.labelcolor": _LIGHT["ink"], "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": _LIGHT["grid"], "grid.linewidth": 0.8, "axes.axisbelow": True, "axes.linewidth": 0.8,
}  # fmt: skip


def _axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure as Canvas

    fig = Canvas(figsize=(7.4, 5.0), layout="constrained")
    ax = fig.add_subplot()
    ax.set_title(title[0].upper() + title[1:], loc="left", fontsize=11.5, fontweight="bold", pad=10)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.margins(0.08, 0.1)
    return fig, ax


def _point(ax: Any, label: str, kind: str, x: Results, y: Results, *, bound: bool = False) -> LabeledPoint:
    """Draw one method: mean with intervals in both directions; an upper bound is hollow and has an arrow to the left."""
    colour = _LIGHT[kind]

    def limits(e: dict[str, float]) -> tuple[float, float]:
        return min(e.get("low", e["mean"]), e["mean"]), max(e.get("high", e["mean"]), e["mean"])

    (left, right), (low, high) = limits(x), limits(y)
    ax.errorbar(
        x["mean"], y["mean"], xerr=[[x["mean"] - left], [right - x["mean"]]], yerr=[[y["mean"] - low], [high - y["mean"]]],
        fmt=FAMILIES[kind][1], color=colour, ms=7, mew=1.5, elinewidth=1.1, mfc=_LIGHT["paper"] if bound else colour, mec=colour, zorder=3,
    )  # fmt: skip
    if bound:
        arrow = {"arrowstyle": "<-", "color": colour, "lw": 1.0, "shrinkA": 0, "shrinkB": 5}
        ax.annotate("", (x["mean"], y["mean"]), (-14, 0), textcoords="offset points", arrowprops=arrow)
    return LabeledPoint(label, x["mean"], y["mean"], colour, (left, low, right, high), bound)


def _legend(fig: Any, ax: Any, methods: dict[str, Any], note: str) -> None:
    from matplotlib.lines import Line2D

    present = dict.fromkeys(m["family"] for m in methods.values())
    handles = [
        Line2D([], [], color=_LIGHT[k], marker=mark, ls="", ms=6.5, label=text) for k, (text, mark) in FAMILIES.items() if k in present
    ]
    fig.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=8.5, handletextpad=0.3, columnspacing=1.4)
    if note:
        lines = textwrap.wrap(note, 100)
        small = {"fontsize": 8, "color": _LIGHT["muted"], "va": "bottom"}
        text = ax.annotate("\n".join(lines), (0, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", **small)
        text.set_in_layout(False)  # a long line must not narrow the axes
        ax.set_title(ax.get_title(loc="left"), loc="left", fontsize=11.5, fontweight="bold", pad=8 + 12 * len(lines))


def _figure(fig: Any, name: str, title: str, listed: str) -> Figure:
    raster, vector = io.BytesIO(), io.StringIO()
    fig.savefig(raster, format="png", dpi=160, metadata={"Software": None})
    fig.savefig(vector, format="svg", metadata={"Date": None, "Creator": None})
    alt = f"{title}. {listed}."
    return Figure(name, title, alt, _adaptive(vector.getvalue(), alt), raster.getvalue())


def _adaptive(svg: str, alt: str) -> str:
    """Make an SVG accessible: colours as variables for light and dark, the reader's own font, a text alternative."""
    svg = svg[svg.index("<svg") :]
    for name, colour in _LIGHT.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 system-ui, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)
    end = svg.index(">") + 1
    return f"{svg[:end]}\n <title>{escape(alt)}</title>\n <style>{STYLE}</style>{svg[end:]}"


def judge_name(judge: str) -> str:
    """A judge's name in texts."""
    return "gold reward" if judge == "gold" else judge


def leading_metric(results: Mapping[str, Any]) -> tuple[str, str] | None:
    """(key in a method's results, name) of the metric that orders the methods and is drawn: the first judge, else the task's own."""
    if results["judges"]:
        return results["judges"][0], judge_name(results["judges"][0])
    return ("primary", results["primary"].replace("_", " ")) if results.get("primary") else None


def order(results: Mapping[str, Any]) -> Sequence[str]:
    """Labels by that metric, the best first; without one in the order of the recipe."""
    methods, first = results["methods"], leading_metric(results)
    return sorted(methods, key=lambda k: -methods[k][first[0]]["mean"]) if first is not None else list(methods)
