r"""Reward of sweeps at equal KL and at equal compute: interpolation between measured points, with bootstrap intervals over prompts.

Between two neighbouring points of a sweep the reward is linear in sqrt(KL), or in log FLOPs. For the policy pi_beta ~ pi_base exp(beta r)
the reward grows by beta Var(r) and KL is beta^2 Var(r) / 2 to the first order, so that the reward is linear in sqrt(KL) near the base;
Gao et al. 2023 (arXiv 2210.10760) measure it as a function of sqrt(KL) for best-of-N and RL. Compute grows by factors in a sweep of W
and K, and the reward of best-of-N about with log N. Nothing is extrapolated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ivg.evaluation.kl import selection_bound

Floats = NDArray[np.float64]
Scale = Callable[[Floats], Floats]
"""Coordinate in which rewards are interpolated."""
SCALES: dict[str, Scale] = {"kl": np.sqrt, "flops": np.log}
ROUNDS = 2000
SAME_COST = 1.25
"""Where the largest FLOPs of a sweep are less than so many times the smallest, it has no range to interpolate in."""


@dataclass(frozen=True)
class Curve:
    """The points of a sweep, measured on the same prompts.

    Attributes:
        labels: of the points [points].
        kl: mean KL to the base of each prompt's answers, in nats, NaN where none succeeded [points, prompts]; None: unknown.
        bound: the KL is an upper bound.
        flops: mean FLOPs of each prompt's answers [points, prompts].
        rewards: mean reward of each prompt's answers by judge [points, prompts].
        first_by_cost: index of the first point that the sweep has by its cost: 1 where the first is the base, which costs less than
            guidance of any small beta does.
    """

    labels: tuple[str, ...]
    kl: Floats | None
    bound: bool
    flops: Floats
    rewards: Mapping[str, Floats]
    first_by_cost: int = 0

    def along(self, axis: str) -> tuple[Floats, Mapping[str, Floats]] | None:
        """(KL or FLOPs, rewards by judge) of the points that have a range on that axis, ``kl`` or ``flops``; None if they have none."""
        if axis == "kl":
            return None if self.kl is None else (self.kl, self.rewards)
        x = self.flops[self.first_by_cost :]
        means = np.nanmean(x, axis=1)
        rewards = {judge: y[self.first_by_cost :] for judge, y in self.rewards.items()}
        return (x, rewards) if means.max() >= SAME_COST * means.min() else None


def interpolate(x: Floats, y: Floats, at: float | Floats, scale: Scale) -> tuple[Floats, NDArray[np.bool_]]:
    """(reward at ``at``, is ``at`` within the points?) of each row; outside, the reward of the nearest point.

    Args:
        x: KL or FLOPs, in any order [rows, points].
        y: rewards [rows, points].
        at: KL or FLOPs, one for all or one for each row [rows].
        scale: see :data:`SCALES`.
    """
    budget = np.broadcast_to(np.asarray(at, np.float64), len(x))
    order = np.argsort(x, axis=1, kind="stable")
    x, y = np.take_along_axis(x, order, 1), np.take_along_axis(y, order, 1)
    slack = 1e-9 * np.abs(budget)  # a point at the budget itself is within
    inside = (x[:, 0] - slack <= budget) & (budget <= x[:, -1] + slack)
    s, target = scale(np.maximum(x, 0.0)), scale(np.maximum(budget, 0.0))
    rows, last = np.arange(len(x)), x.shape[1] - 1
    upper = np.minimum((s < target[:, None]).sum(1), last)
    lower = np.maximum(upper - 1, 0)
    left, right = s[rows, lower], s[rows, upper]
    width = np.where(right > left, right - left, 1.0)
    share = np.where(right > left, np.clip((target - left) / width, 0.0, 1.0), 1.0)
    return y[rows, lower] + share * (y[rows, upper] - y[rows, lower]), inside


def resampled_means(values: Floats, counts: Floats) -> Floats:
    """Means over prompts for each resample, without those that are NaN [rounds, points].

    Args:
        values: [points, prompts].
        counts: how often each prompt is drawn [rounds, prompts].
    """
    known = ~np.isnan(values)
    total, number = counts @ np.where(known, values, 0.0).T, counts @ known.T.astype(np.float64)
    return np.where(number > 0, total / np.maximum(number, 1.0), np.nan)


def resamples(prompts: int, rounds: int = ROUNDS, seed: int = 0) -> Floats:
    """How often each prompt is drawn; the same for all sweeps, so that they are compared on the same resamples [rounds, prompts]."""
    return np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), rounds).astype(np.float64)


def reward_at(x: Floats, y: Floats, at: float, scale: Scale, counts: Floats) -> dict[str, float] | None:
    """Reward at a budget with its 95 % interval; None outside the measured points.

    Each resample has its own means, between which it interpolates; ``outside`` is the share of resamples whose points did not reach the
    budget and gave the nearest one.

    Args:
        x: KL or FLOPs [points, prompts].
        y: rewards [points, prompts].
        at: the budget.
        scale: see :data:`SCALES`.
        counts: of :func:`resamples`.
    """
    every = np.ones((1, x.shape[1]))
    mean, inside = interpolate(resampled_means(x, every), resampled_means(y, every), at, scale)
    return _estimate(mean, inside, *interpolate(resampled_means(x, counts), resampled_means(y, counts), at, scale))


def mean_difference(a: Floats, b: Floats, counts: Floats) -> dict[str, float] | None:
    """Mean of ``a - b`` over the prompts that have both, with its 95 % interval; None without any.

    Args:
        a: rewards [1, prompts].
        b: rewards on the same prompts [1, prompts].
        counts: of :func:`resamples`.
    """
    if np.isnan(a - b).all():
        return None
    means = resampled_means(a - b, counts)[:, 0]
    numbers = {"mean": np.nanmean(a - b), **dict(zip(("low", "high"), np.nanquantile(means, [0.025, 0.975]), strict=True))}
    return {name: round(float(v), 6) for name, v in numbers.items()}


def difference_at(x: Floats, y: Floats, other: tuple[Floats, Floats], scale: Scale, counts: Floats) -> dict[str, float] | None:
    """Reward at another method's KL or FLOPs minus that method's reward, with its 95 % interval; None outside the measured points.

    Args:
        x: KL or FLOPs [points, prompts].
        y: rewards [points, prompts].
        other: KL or FLOPs and rewards of the other method [1, prompts] each.
        scale: see :data:`SCALES`.
        counts: of :func:`resamples`; each resample has its own budget, too.
    """

    def differences(drawn: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        at, reward = (resampled_means(values, drawn)[:, 0] for values in other)
        found, inside = interpolate(resampled_means(x, drawn), resampled_means(y, drawn), at, scale)
        return found - reward, inside

    mean, inside = differences(np.ones((1, x.shape[1])))
    return _estimate(mean, inside, *differences(counts))


def _estimate(mean: Floats, inside: NDArray[np.bool_], rewards: Floats, within: NDArray[np.bool_]) -> dict[str, float] | None:
    if not inside[0] or not np.isfinite(mean[0]):
        return None
    low, high = np.nanquantile(rewards, [0.025, 0.975])
    numbers = {"mean": mean[0], "low": low, "high": high}
    return {name: round(float(v), 6) for name, v in numbers.items()} | {"outside": round(float(1 - within.mean()), 4)}


def equal_kl(curves: Mapping[str, Curve]) -> dict[str, Any]:
    """Rewards at KLs that some sweep covers: those of best-of-4, 16 and 64, then 5, 10, 20, 50 … nats."""
    named = [(selection_bound([n], best_of_chunks=True), f"best-of-{n}") for n in (4, 16, 64)]
    round_numbers = [(float(m * 10**e), "") for e in range(6) for m in (1, 2, 5) if m * 10**e >= 5]
    return _table(curves, "kl", [*named, *round_numbers])


def equal_compute(curves: Mapping[str, Curve], base: float) -> dict[str, Any]:
    """Rewards at 1, 2, 4, 8 … times the FLOPs of a base answer (``base``), as far as some sweep goes."""
    return _table(curves, "flops", [(base * 2**i, f"{2**i}× base") for i in range(16)])


def _table(curves: Mapping[str, Curve], axis: str, budgets: Sequence[tuple[float, str]]) -> dict[str, Any]:
    """``budgets``, and for each judge and sweep a cell for every budget; those that nothing covers are left out."""
    known = {name: found for name, curve in curves.items() if (found := curve.along(axis)) is not None}
    judges = list(dict.fromkeys(judge for _, rewards in known.values() for judge in rewards))
    cells = {
        judge: {name: _cells(x, rewards[judge], axis, budgets) for name, (x, rewards) in known.items() if judge in rewards}
        for judge in judges
    }
    used = [i for i in range(len(budgets)) if any(row[i] for rows in cells.values() for row in rows.values())]
    return {
        "budgets": [{axis: round(budgets[i][0], 6), "name": budgets[i][1]} for i in used],
        "rewards": {judge: {name: [row[i] for i in used] for name, row in rows.items()} for judge, rows in cells.items()},
        "left_out": [name for name in curves if name not in known],
    }


def _cells(x: Floats, y: Floats, axis: str, budgets: Sequence[tuple[float, str]]) -> list[dict[str, float] | None]:
    counts = resamples(x.shape[1])
    return [reward_at(x, y, at, SCALES[axis], counts) for at, _ in budgets]


def curve_summary(curve: Curve, settings: Sequence[str], reason: str | None) -> dict[str, Any]:
    """What results.json says of a sweep: its points with means, and which settings differ."""
    kl = None if curve.kl is None else np.nanmean(curve.kl, axis=1)
    return {
        "settings": list(settings),
        "points": list(curve.labels),
        "kl": None if kl is None else [round(float(v), 6) for v in kl],
        "bound": curve.bound,
        "kl_note": reason,
        "first_by_cost": curve.first_by_cost,
        "flops": [float(v) for v in np.nanmean(curve.flops, axis=1)],
        "rewards": {judge: [round(float(v), 6) for v in np.nanmean(y, axis=1)] for judge, y in curve.rewards.items()},
    }
