"""Does a value know more than how long a response is? Two tests, both of whole responses, each in several units of length.

Knows: scores and lengths of pairs. Must not know models, nor how results are shown. Pure.

*Balanced*: pairs are weighted so that the longer and the shorter response are chosen alike, which leaves the rule "the longer one" (or
"the shorter one") at exactly 0.5. Where one side never wins, only pairs of equal length are left.

*Beyond length*: the part of a value's difference that no function of length predicts. The function is piecewise linear with knots at
quantiles, so that "about twenty words" is caught as well as "long"; it is fitted by least squares to the differences, and each pair is
predicted without itself. A remainder below :data:`SMALL` counts as a tie, so a value that is a function of length alone has 0.5.

A value passes where both intervals are above 0.5 in every unit. Length as a rival explanation of preferences: Singhal et al. 2023, "A
Long Way to Go"; Dubois et al. 2024, length-controlled AlpacaEval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ivg.diagnostics.intervals import Numbers, Share, share, wins

SMALL = 0.1
"""Of the root mean square of a value's differences: what the fitted function may miss of a value that only measures length."""
PAIRS_PER_KNOT = 8
MOST_KNOTS = 100


@dataclass(frozen=True)
class LengthControl:
    """A value's accuracy on whole responses with length taken out, in the unit where least is left of it.

    Attributes:
        unit: of length: ``tokens`` of the base, ``characters``, ``words``, or the value's ``own tokens``.
        rule: ``longer`` or ``shorter``: the rule by length that is right more often.
        alone: accuracy of that rule; equal lengths count half.
        balanced: accuracy where that rule has 0.5 (pairs weighted); None where no pair tells value and rule apart.
        residual: accuracy of what length does not predict of the value.
    """

    unit: str
    rule: str
    alone: Share
    balanced: Share | None
    residual: Share

    @property
    def passed(self) -> bool:
        """The value is right beyond length, by more than sampling error."""
        return self.balanced is not None and min(self.balanced.low, self.residual.low) > 0.5


def length_control(scores: Numbers, lengths: Mapping[str, Numbers], groups: NDArray[np.int64]) -> LengthControl:
    """The control in the unit that leaves least of the value.

    Args:
        scores: of whole responses [pairs, (chosen, rejected)].
        lengths: in each unit [pairs, (chosen, rejected)].
        groups: number of each pair's prompt [pairs].
    """
    hits = wins(scores[:, 0], scores[:, 1])
    found = [_in_unit(unit, hits, scores[:, 0] - scores[:, 1], table, groups) for unit, table in lengths.items()]
    return min(found, key=lambda c: -1.0 if c.balanced is None else min(c.balanced.low, c.residual.low))


def _in_unit(unit: str, hits: Numbers, differences: Numbers, lengths: Numbers, groups: NDArray[np.int64]) -> LengthControl:
    longer = wins(lengths[:, 0], lengths[:, 1])
    rule, right = ("longer", longer) if longer.mean() >= 0.5 else ("shorter", 1 - longer)
    weights = balancing_weights(longer)
    used = weights > 0
    balanced = share(hits[used], _renumbered(groups[used]), weights[used]) if used.any() else None
    left = unexplained(differences, lengths)
    tolerance = SMALL * float(np.sqrt((differences**2).mean()))
    return LengthControl(unit, rule, share(right, groups), balanced, share(wins(left, np.zeros_like(left), tolerance), groups))


def balancing_weights(longer: Numbers) -> Numbers:
    """Weights that give the side of the longer responses (1) and that of the shorter (0) the same sum; 1 for equal lengths (0.5)."""
    sides = [longer == 1.0, longer == 0.0]
    fewest = min(int(side.sum()) for side in sides)
    out = np.ones_like(longer)
    for side in sides:
        out[side] = fewest / max(1, int(side.sum()))
    return out


def unexplained(differences: Numbers, lengths: Numbers) -> Numbers:
    """What remains of each difference of values after its prediction from both lengths by a function fitted to all other pairs [pairs].

    Args:
        differences: value of the chosen minus that of the rejected response [pairs].
        lengths: [pairs, (chosen, rejected)].
    """
    knots = np.unique(np.quantile(lengths, np.linspace(0, 1, 1 + min(MOST_KNOTS, max(2, len(lengths) // PAIRS_PER_KNOT)))))
    hats = np.stack([np.interp(lengths, knots, column) for column in np.eye(len(knots))], axis=-1)  # [pairs, 2, knots]
    design = hats[:, 0] - hats[:, 1]
    inverse = np.linalg.pinv(design, rcond=1e-8)
    free = 1 - np.einsum("ij,ji->i", design, inverse)  # 1 - leverage: 0 where the function goes through this pair whatever it is
    left = differences - design @ (inverse @ differences)
    return np.where(free > 1e-6, left / np.maximum(free, 1e-6), 0.0)


def _renumbered(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.unique(groups, return_inverse=True)[1].astype(np.int64)
