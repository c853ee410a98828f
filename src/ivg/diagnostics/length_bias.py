"""Does a value know more than the length of a response? Two tests on whole responses, each in several units of length.

*Balanced*: pairs are weighted so that the longer and the shorter response are chosen equally often; the rule "the longer one" then has
accuracy 0.5. If one side never wins, only pairs of equal length are left.

*Residual*: the part of a value's difference that no function of length predicts. The function is piecewise linear with knots at quantiles
(so it also catches "about twenty words"), fitted by least squares, and each pair is predicted without itself. A residual below
:data:`MIN_RESIDUAL` counts as a tie, so a value that depends on length alone has accuracy 0.5.

A value passes if both intervals are above 0.5 in every unit. Sources: Singhal et al. 2023, "A Long Way to Go" (arXiv 2310.03716); Dubois
et al. 2024, length-controlled AlpacaEval (arXiv 2404.04475).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ivg.diagnostics.stats import Floats, Proportion, wilson, wins

MIN_RESIDUAL = 0.1
"""Fraction of the root mean square of a value's differences that the fit may leave of a value that measures length alone."""
PAIRS_PER_KNOT = 8
MAX_KNOTS = 100


@dataclass(frozen=True)
class LengthControl:
    """A value's accuracy on whole responses with length controlled, in the unit where it is lowest.

    Attributes:
        unit: of length: ``tokens`` of the base, ``characters``, ``words``, or the value's ``own tokens``.
        rule: ``longer`` or ``shorter``, whichever is the more accurate rule.
        alone: accuracy of that rule; equal lengths count half.
        balanced: accuracy on pairs weighted so that the rule has 0.5; None if no pair separates value and rule.
        residual: accuracy of what length does not predict of the value.
    """

    unit: str
    rule: str
    alone: Proportion
    balanced: Proportion | None
    residual: Proportion

    @property
    def passed(self) -> bool:
        """The value is accurate beyond length, by more than sampling error."""
        return self.balanced is not None and min(self.balanced.low, self.residual.low) > 0.5


def length_control(scores: Floats, lengths: Mapping[str, Floats], groups: NDArray[np.int64]) -> LengthControl:
    """The control in the unit where the value's accuracy is lowest.

    Args:
        scores: of whole responses [pairs, (chosen, rejected)].
        lengths: in each unit [pairs, (chosen, rejected)].
        groups: number of each pair's prompt [pairs].
    """
    hits = wins(scores[:, 0], scores[:, 1])
    controls = [_in_unit(unit, hits, scores[:, 0] - scores[:, 1], table, groups) for unit, table in lengths.items()]
    return min(controls, key=lambda c: -1.0 if c.balanced is None else min(c.balanced.low, c.residual.low))


def _in_unit(unit: str, hits: Floats, differences: Floats, lengths: Floats, groups: NDArray[np.int64]) -> LengthControl:
    longer = wins(lengths[:, 0], lengths[:, 1])
    rule, rule_hits = ("longer", longer) if longer.mean() >= 0.5 else ("shorter", 1 - longer)
    weights = balancing_weights(longer)
    used = weights > 0
    balanced = wilson(hits[used], np.unique(groups[used], return_inverse=True)[1], weights[used]) if used.any() else None
    residuals = length_residuals(differences, lengths)
    tolerance = MIN_RESIDUAL * float(np.sqrt((differences**2).mean()))
    residual = wilson(wins(residuals, np.zeros_like(residuals), tolerance), groups)
    return LengthControl(unit, rule, wilson(rule_hits, groups), balanced, residual)


def balancing_weights(longer: Floats) -> Floats:
    """Weights under which longer (1) and shorter (0) responses win equally often; 1 for equal lengths (0.5) [pairs]."""
    sides = [longer == 1.0, longer == 0.0]
    fewest = min(int(side.sum()) for side in sides)
    out = np.ones_like(longer)
    for side in sides:
        out[side] = fewest / max(1, int(side.sum()))
    return out


def length_residuals(differences: Floats, lengths: Floats) -> Floats:
    """Each difference of values minus its prediction from both lengths by a function fitted to all other pairs [pairs].

    Args:
        differences: value of the chosen minus that of the rejected response [pairs].
        lengths: [pairs, (chosen, rejected)].
    """
    knots = np.unique(np.quantile(lengths, np.linspace(0, 1, 1 + min(MAX_KNOTS, max(2, len(lengths) // PAIRS_PER_KNOT)))))
    hats = np.stack([np.interp(lengths, knots, column) for column in np.eye(len(knots))], axis=-1)  # [pairs, 2, knots]
    design = hats[:, 0] - hats[:, 1]
    inverse = np.linalg.pinv(design, rcond=1e-8)
    free = 1 - np.einsum("ij,ji->i", design, inverse)  # 1 - leverage; 0 where this pair alone determines the function
    residuals = differences - design @ (inverse @ differences)
    return np.where(free > 1e-6, residuals / np.maximum(free, 1e-6), 0.0)
