"""Win rates from judgements in alpaca_eval's format, computed as its ``get_winrate`` does, without alpaca_eval, pandas or scikit-learn.

Rows have ``instruction``, ``output_1`` (the reference), ``output_2`` (the model), and ``preference`` from 1 (the reference is better) to
2 (the model is better). For length control see ``ivg.evaluation.length_control``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ivg.errors import ConfigError
from ivg.jobs.formats import STDIN, read_rows, source_name

Row = Mapping[str, Any]
COLUMNS = ("instruction", "output_1", "output_2", "preference")


@dataclass(frozen=True)
class WinRate:
    """How often a model beats the reference; rates and standard errors in percent, lengths in characters.

    Attributes:
        win_rate: mean of preference - 1.
        standard_error: of ``win_rate`` over instructions; NaN for fewer than two.
        discrete_win_rate: wins plus half of the draws, with each preference rounded to 1 or 2.
        n_wins: preferences above 1.5.
        n_wins_base: preferences below 1.5.
        n_draws: preferences of exactly 1.5.
        n_total: judgements with a preference.
        n_missing: judgements without one, which are not in ``n_total`` (as in alpaca_eval).
        avg_length: of the model's answers.
        reference_length: of the reference's.
    """

    win_rate: float
    standard_error: float
    discrete_win_rate: float
    n_wins: int
    n_wins_base: int
    n_draws: int
    n_total: int
    n_missing: int
    avg_length: float
    reference_length: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN becomes None."""
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(self).items()}


def preference_of(row: Row) -> float | None:
    """The row's preference in [1, 2]; 0 is alpaca_eval's older code for a draw; None if the judge gave none.

    Raises:
        ConfigError: any other number, or no number.
    """
    given = row["preference"]
    if given is None or given != given:
        return None
    value = given if isinstance(given, int | float) and not isinstance(given, bool) else math.nan
    value = 1.5 if value == 0 else float(value)
    if not 1 <= value <= 2:
        raise ConfigError(f"preference {given!r}\n  expected a number from 1 (reference is better) to 2 (model is better)")
    return value


def win_rate(rows: Sequence[Row]) -> WinRate:
    """The plain win rate of judgements of one model.

    Raises:
        ConfigError: no judgement has a preference, or one is out of range.
    """
    given = [preference_of(row) for row in rows]
    won = [p - 1 for p in given if p is not None]
    if not won:
        raise ConfigError(f"none of {len(rows)} judgements has a preference\n  expected numbers in the column preference")
    wins, draws, n = sum(p > 0.5 for p in won), sum(p == 0.5 for p in won), len(won)
    return WinRate(
        win_rate=100 * fmean(won),
        standard_error=100 * stdev(won) / math.sqrt(n) if n > 1 else math.nan,
        discrete_win_rate=100 * (wins + draws / 2) / n,
        n_wins=wins,
        n_wins_base=n - wins - draws,
        n_draws=draws,
        n_total=n,
        n_missing=len(rows) - n,
        avg_length=fmean(len(row["output_2"]) for row in rows),
        reference_length=fmean(len(row["output_1"]) for row in rows),
    )


def by_seed(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """Rows by seed; rows without one (alpaca_eval's own files) have seed 0."""
    out: dict[int, list[Row]] = {}
    for row in rows:
        out.setdefault(int(row.get("seed", 0)), []).append(row)
    return out


def average_over_seeds(rows: Sequence[Row]) -> list[Row]:
    """One row for each instruction, with preferences averaged over seeds and the texts of the first seed."""
    groups = by_seed(rows)
    if len(groups) < 2:
        return list(rows)
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(row.get("id", row["instruction"]), []).append(row)
    out: list[Row] = []
    for same in found.values():
        known = [p for p in map(preference_of, same) if p is not None]
        out.append({**same[0], "preference": fmean(known) if known else None})
    return out


def read_judgements(path: str | Path) -> list[Row]:
    """Judgements of one model against one reference from JSON or JSONL (also ``.gz``); ``-`` is standard input.

    Raises:
        ConfigError: no such file, no rows, missing columns, an invalid text or preference, more than one model or reference.
    """
    if str(path) != STDIN and not Path(path).is_file():
        raise ConfigError(f"no such file: {path}\n  expected judgements (annotations.json of alpaca_eval, or OUT/judgements/LABEL.jsonl)")
    rows: list[Row] = list(read_rows(path))
    name = source_name(path)
    if not rows:
        raise ConfigError(f"{name} has no judgements")
    for number, row in enumerate(rows, 1):
        missing = [c for c in COLUMNS if c not in row]
        if missing:
            raise ConfigError(f"{name}, judgement {number}: no {', '.join(missing)}\n  got {', '.join(row)}; expected {', '.join(COLUMNS)}")
        wrong = [c for c in COLUMNS[:3] if not isinstance(row[c], str)]
        if wrong:
            raise ConfigError(f"{name}, judgement {number}: {wrong[0]} is {row[wrong[0]]!r}\n  expected a text")
        try:
            preference_of(row)
        except ConfigError as e:
            raise ConfigError(f"{name}, judgement {number}: {e}") from None
    for column in ("generator_1", "generator_2"):
        names = sorted({str(row.get(column)) for row in rows})
        if len(names) > 1:
            raise ConfigError(f"{name}: {column} is {', '.join(names[:4])}\n  expected judgements of one model against one reference")
    return rows
