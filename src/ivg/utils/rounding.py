"""Rounding of numbers for files. Standard library only."""

from __future__ import annotations

import math

SIGNIFICANT = 6


def keep_digits(number: float, decimals: int) -> float:
    """``number`` with so many decimals, or six significant digits where that is finer, so that small scores stay apart."""
    if number == 0 or not math.isfinite(number):
        return number
    return round(number, max(decimals, SIGNIFICANT - 1 - math.floor(math.log10(abs(number)))))
