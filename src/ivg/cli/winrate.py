"""``ivg winrate``: win rates from files of judgements."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ivg.cli.output import AsJson, Quiet, print_json, print_notes
from ivg.cli.standard_input import DASH
from ivg.errors import ConfigError
from ivg.utils.console import plain_table, print_table

if TYPE_CHECKING:
    from ivg.evaluation.winrate import Row, WinRate

HELP = """Win rates from judgements: alpaca_eval's annotations.json, or what `ivg eval alpaca` leaves in judgements/.

Plain, discrete and length-controlled, in percent. Length control needs the extra `alpaca` and alpaca_eval's df_gamed.csv; without
them only the plain rates are printed.

    ivg winrate judgements.jsonl --difficulty df_gamed.csv"""


def winrate(
    judgements: Annotated[
        list[Path], typer.Argument(help="JSON or JSONL (.json.gz too), one model in each; - is standard input.", metavar="FILE...")
    ],
    difficulty: Annotated[
        str | None, typer.Option("--difficulty", help="df_gamed.csv or its folder. (default: IVG_ALPACA_DIFFICULTY, else the hub)")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="No length control.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write all numbers to this file, as JSON.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """See HELP."""
    from ivg.cli.files import check_files
    from ivg.evaluation.length_control import difficulty_file, length_controlled
    from ivg.evaluation.winrate import average_over_seeds, read_judgements, win_rate

    if [str(file) for file in judgements].count(DASH) > 1:
        raise ConfigError("got - twice, and there is one standard input\n  give it once")
    check_files([*(("judgements", file) for file in judgements), ("--difficulty", difficulty)], [("--output", output)])
    path = None if plain else difficulty_file(difficulty)
    results: list[dict[str, Any]] = []
    table = plain_table()
    table.add_column("model")
    for name in ("win rate", "±", "discrete", "LC win rate", "±", "characters", "judged"):
        table.add_column(name, no_wrap=True, justify="right")
    reasons: dict[str, None] = {}
    for file in judgements:
        rows = read_judgements(file)
        rate, controlled = win_rate(average_over_seeds(rows)), None
        if not plain:
            found = length_controlled(rows, path)
            controlled = None if found.win_rate is None else (found.win_rate, found.standard_error or 0.0)
            reasons |= {found.reason: None} if found.reason else {}
        results.append(_result(file, rows, rate, controlled))
        table.add_row(*_cells(results[-1], rate, controlled))
    if as_json:
        print_json(results)
    else:
        print_table(table)
    print_notes(quiet, *(f"no length-controlled win rate: {reason}" for reason in reasons))
    if output is not None:
        from ivg.utils.jsonl import write_json

        write_json(output, results)


def _result(file: Path, rows: list[Row], rate: WinRate, controlled: tuple[float, float] | None) -> dict[str, Any]:
    names = {"file": str(file), "model": rows[0].get("generator_2") or file.name.split(".")[0], "reference": rows[0].get("generator_1")}
    lc, error = controlled if controlled is not None else (None, None)
    return {**names, **rate.to_dict(), "length_controlled_winrate": lc, "lc_standard_error": error}


def _cells(result: dict[str, Any], rate: WinRate, controlled: tuple[float, float] | None) -> tuple[str, ...]:
    error = "-" if math.isnan(rate.standard_error) else f"{rate.standard_error:.2f}"
    length = ("-", "-") if controlled is None else (f"{controlled[0]:.2f}", f"{controlled[1]:.2f}")
    judged = f"{rate.n_total}" + (f" of {rate.n_total + rate.n_missing}" if rate.n_missing else "")
    return (
        str(result["model"]),
        f"{rate.win_rate:.2f}",
        error,
        f"{rate.discrete_win_rate:.2f}",
        *length,
        f"{rate.avg_length:.0f}",
        judged,
    )
