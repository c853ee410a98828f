"""From scored answers to the curves of sweeps (``ivg.evaluation.sweeps``), and what results.json and reports say of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ivg.diagnostics.cost import flops
from ivg.evaluation.base_samples import SampleGroup
from ivg.evaluation.kl import kl_by_answer, selection_bound
from ivg.evaluation.methods import BEST_OF_N, MethodRow, method_settings
from ivg.evaluation.metrics import mean_by_key
from ivg.evaluation.plan import EvalPlan
from ivg.evaluation.sweeps import (
    SCALES,
    Curve,
    Floats,
    curve_summary,
    difference_at,
    equal_compute,
    equal_kl,
    mean_difference,
    resamples,
)
from ivg.search.methods import Method

Row = dict[str, Any]
Scored = Mapping[str, Sequence[tuple[Row, Row]]]
"""Rows of transcripts with their rows of scores, by label."""


def sweep_results(plan: EvalPlan, scored: Scored, sizes: dict[str, int], groups: Sequence[SampleGroup]) -> Row:
    """``sweeps``, ``equal_kl``, ``equal_compute`` and ``differences`` of results.json; empty or None without sweeps, or ``compare_to``.

    Args:
        plan: of the evaluation.
        scored: of every method.
        sizes: parameters by model.
        groups: base samples, which give best-of-N for every N; [] without.
    """
    rows: dict[str, list[MethodRow]] = {}
    for row in plan.method_rows:
        if row.sweep is not None:
            rows.setdefault(row.sweep, []).append(row)
    curves, summaries = {}, {}
    for name, swept in rows.items():
        points = [*swept, *(row for row in plan.method_rows if is_another_point(row, swept))]
        anchored = [plan.base_row, *points] if starts_at_base(points) else points
        curves[name], reason = _curve(plan, anchored, scored, sizes)
        summaries[name] = curve_summary(curves[name], list(swept[0].point), reason)
    judges = [judge for judge in plan.judges if groups and all(g.reward(judge, 1) is not None for g in groups)]
    if judges:
        curves[BEST_OF_N] = best_of_n_curve(groups, [e.id for e in plan.examples], judges)
        summaries[BEST_OF_N] = curve_summary(curves[BEST_OF_N], ["N"], None)
    other = plan.config.compare_to
    found: Row = {"sweeps": {}, "equal_kl": None, "equal_compute": None}
    if rows:
        base = float(np.nanmean(_matrix(plan, [_costs(scored[plan.base_row.label], sizes)])))
        found = {"sweeps": summaries, "equal_kl": equal_kl(curves), "equal_compute": equal_compute(curves, base)}
    return {**found, "differences": None if other is None else _differences(plan, other, curves, scored, sizes)}


def _differences(plan: EvalPlan, label: str, curves: Mapping[str, Curve], scored: Scored, sizes: dict[str, int]) -> Row:
    """Rewards minus those of the method ``label``, on the same prompts: of every method, and of sweeps at that method's KL and FLOPs."""
    other, reason = _curve(plan, [plan.method_row(label)], scored, sizes)
    counts = resamples(len(plan.examples))
    methods = {}
    for row in plan.method_rows:
        if row.label != label:
            one = _curve(plan, [row], scored, sizes)[0]
            found = {judge: mean_difference(one.rewards[judge], other.rewards[judge], counts) for judge in plan.judges}
            methods[row.label] = {"rewards": found, "flops": float(np.nanmean(one.flops) / np.nanmean(other.flops))}
    sweeps: Row = {}
    for name, curve in curves.items():
        if label in curve.labels:
            continue  # at its own KL it is itself
        sweeps[name] = {}
        for axis, budget in (("kl", other.kl), ("flops", other.flops)):
            along = curve.along(axis)
            if along is not None and budget is not None:
                x, rewards = along
                sweeps[name][axis] = {
                    judge: difference_at(x, y, (budget, other.rewards[judge]), SCALES[axis], counts) for judge, y in rewards.items()
                }
    return {"from": label, "bound": other.bound, "kl_note": reason, "methods": methods, "sweeps": sweeps}


def is_another_point(row: MethodRow, points: Sequence[MethodRow]) -> bool:
    """Is ``row`` a point of this sweep, too: of the same method or one of the ``combinations``, and different in nothing but what is swept?

    So ``implicit×none`` of the combinations is the point beta = 1 of a sweep of ``eft``.
    """
    first = points[0].method
    if row.sweep is not None or row.method.name not in (first.name, "custom") or row.is_base:
        return False
    return _unswept(row.method, points) == _unswept(first, points)


def _unswept(method: Method, points: Sequence[MethodRow]) -> Row:
    return {name: value for name, value in method_settings(method).items() if name != "name" and name not in _varying(points)}


def _varying(points: Sequence[MethodRow]) -> set[str]:
    """The settings that do differ between the points."""
    return {name for name in points[0].point if len({getattr(p.method, name) for p in points}) > 1}


def starts_at_base(points: Sequence[MethodRow]) -> bool:
    """Is plain base sampling a point of this sweep: beta = 0 of token guidance alone, or W = K = 1 of selection alone?

    Not where guidance keeps only some tokens (``candidates``, ``plausibility``), which it may do for any beta.
    """
    m, swept = points[0].method, _varying(points)
    if m.rule not in ("top", "soft"):
        return False
    if swept == {"beta"}:
        return not (m.selectors or m.candidates or m.plausibility)
    return bool(swept) and swept <= {"width", "successors"} and not any(p.method.guides for p in points)


def _curve(plan: EvalPlan, rows: Sequence[MethodRow], scored: Scored, sizes: dict[str, int]) -> tuple[Curve, str | None]:
    """A curve, and why it has no KL (None where it has)."""
    good = [[(r, s) for r, s in scored[row.label] if "error" not in r] for row in rows]
    kls: list[list[tuple[str, float]]] = []
    reason = None
    for row, pairs in zip(rows, good, strict=True):
        found, why = kl_by_answer(row.method, plan.sampling, [r for r, _ in pairs])
        reason = reason or why
        kls.append(found or [])
    rewards = {judge: _matrix(plan, [[(r["id"], s[judge]) for r, s in pairs] for pairs in good]) for judge in plan.judges}
    curve = Curve(
        labels=tuple(row.label for row in rows),
        kl=None if reason else _matrix(plan, kls),
        bound=any(row.method.selectors for row in rows),
        flops=_matrix(plan, [_costs(pairs, sizes) for pairs in good]),
        rewards=rewards,
        first_by_cost=int(rows[0].is_base and bool(rows[-1].method.guides)),
    )
    return curve, reason


def best_of_n_curve(groups: Sequence[SampleGroup], ids: Sequence[str], judges: Sequence[str]) -> Curve:
    """Best-of-N for N = 1, 2, 4 … and all base samples; its KL is log N - (N - 1)/N at most.

    Args:
        groups: base samples of each prompt and seed.
        ids: of the prompts, in their order.
        judges: those who scored the samples.
    """
    size = min(g.size for g in groups)
    numbers = [n for n in (2**i for i in range(size.bit_length())) if n < size] + [size]
    costs = _by_id(ids, [[(g.id, g.flops[n - 1]) for g in groups] for n in numbers])
    rewards = {
        judge: _by_id(ids, [[(g.id, found) for g in groups if (found := g.reward(judge, n)) is not None] for n in numbers])
        for judge in judges
    }
    kl = np.array([[selection_bound([n], best_of_chunks=True)] for n in numbers])
    return Curve(tuple(f"N={n}" for n in numbers), np.where(np.isnan(costs), np.nan, kl), True, costs, rewards)


def _costs(pairs: Sequence[tuple[Row, Row]], sizes: dict[str, int]) -> list[tuple[str, float]]:
    return [(r["id"], flops(r["forward_tokens"], sizes)) for r, _ in pairs if "error" not in r]


def _matrix(plan: EvalPlan, points: Sequence[Iterable[tuple[str, float]]]) -> Floats:
    return _by_id([e.id for e in plan.examples], points)


def _by_id(ids: Sequence[str], points: Sequence[Iterable[tuple[str, float]]]) -> Floats:
    """Means over seeds of (id, value) pairs, in the order of the prompts; NaN where there is none [points, prompts]."""
    means = [mean_by_key(pairs) for pairs in points]
    return np.array([[found.get(i, np.nan) for i in ids] for found in means], dtype=np.float64)
