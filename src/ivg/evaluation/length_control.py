"""Length-controlled win rate, by alpaca_eval's own function (Dubois et al. 2024, arXiv 2404.04475; extra ``alpaca``).

Knows: what that function needs, and where to get it. Must not know who judged. Its logistic model is fitted, for each model, to

    P(the model wins on i) = sigmoid(a * tanh(length difference of i, standardised) + b * difficulty of i + c)

and the answer is the mean prediction with the length difference set to 0. ``b`` wants a difficulty for each instruction, which
alpaca_eval's authors fitted once to their whole leaderboard. They, and judgements of two baselines that were told to be terse or
verbose (which pull a, b, c towards no effect), are in ``df_gamed.csv`` of the data set ``tatsu-lab/alpaca_eval`` on the hub; the
function fetches that file each time. Here the path may be given instead. The fitted weights of the baseline
(``instruction_difficulty.csv`` and the weights that alpaca_eval keeps) are needed only to turn one baseline into another.
"""

from __future__ import annotations

import csv
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ivg.errors import ConfigError
from ivg.evaluation.winrate import Row, by_seed, preference_of

ENVIRONMENT = "IVG_ALPACA_DIFFICULTY"
"""Environment variable with the path of the difficulty file."""
HUB = "tatsu-lab/alpaca_eval"
FILE = "df_gamed.csv"
GLM_COLUMNS = ("index", "instruction_difficulty", "preference", "std_delta_len", "not_gamed_baseline", "model")
GLM = "length_controlled_v1"
"""alpaca_eval's name of the model that its leaderboard uses."""
FOLDS = 5
"""Of alpaca_eval's cross-validation."""


@dataclass(frozen=True)
class LengthControlled:
    """The length-controlled win rate, in percent; or the reason why there is none."""

    win_rate: float | None = None
    standard_error: float | None = None
    reason: str = ""


def difficulty_file(given: str | Path | None = None) -> Path | None:
    """Where the difficulties are: ``given`` (the file or its folder), else the environment's; None: alpaca_eval asks the hub.

    Raises:
        ConfigError: no such file, or one that is not ``df_gamed.csv``.
    """
    name = given or os.environ.get(ENVIRONMENT)
    if not name:
        return None
    path = Path(name)
    path = path / FILE if path.is_dir() else path
    try:
        with path.open(newline="", encoding="utf-8") as file:
            columns = next(csv.reader(file), [])
    except OSError as e:
        raise ConfigError(f"cannot read the difficulty file {path}: {e.strerror}\n  {needed()}") from None
    missing = [c for c in GLM_COLUMNS if c not in columns]
    if missing:
        raise ConfigError(f"{path} has no column {', '.join(missing)}; got {', '.join(columns[:8])}\n  {needed()}")
    return path


def needed() -> str:
    """What length control needs and where it comes from."""
    return (
        f"length control needs {FILE} (columns {', '.join(GLM_COLUMNS)}), which alpaca_eval takes from the hub data set {HUB} "
        f"(https://huggingface.co/datasets/{HUB}/resolve/main/{FILE}); instruction_difficulty.csv beside it is not enough\n"
        f"  download it and name it by --difficulty FILE or {ENVIRONMENT}=FILE; the plain win rate needs nothing"
    )


def length_controlled(rows: Sequence[Row], difficulty: str | Path | None = None) -> LengthControlled:
    """alpaca_eval's length-controlled win rate of judgements of one model; the mean of those of each seed.

    Args:
        rows: judgements. Which instruction of AlpacaEval one is about says its ``index``; without that column its place in the
            file, which must then have all of them.
        difficulty: see :func:`difficulty_file`.

    Raises:
        ConfigError: the difficulty file was given and cannot be used.
    """
    path = difficulty_file(difficulty)
    try:
        with _alpaca_eval(path) as (function, difficulties):
            found = [_one(same, function, difficulties) for same in by_seed(rows).values()]
    except _NoLengthControlError as e:
        return LengthControlled(reason=str(e))
    return LengthControlled(fmean(r for r, _ in found), fmean(e for _, e in found))


class _NoLengthControlError(Exception):
    """Why there is none."""


def _one(rows: Sequence[Row], function: Any, difficulties: dict[int, float]) -> tuple[float, float]:
    """(rate, standard error) of one seed."""
    import pandas as pd

    index = _indices(rows, difficulties)
    lengths = {len(row["output_1"]) - len(row["output_2"]) for row in rows}
    judged = sum(preference_of(row) is not None for row in rows)
    if judged < FOLDS or len(lengths) < 2:
        raise _NoLengthControlError(f"length control fits a curve to lengths; {judged} judgements, all of one length difference or too few")
    keep = ("instruction", "output_1", "output_2")
    names = {"generator_1": "reference", "generator_2": "model"}
    table = pd.DataFrame(
        [{**{k: row[k] for k in keep}, **names, "preference": preference_of(row)} for row in rows],
        index=pd.Index(index, name="index"),
    )
    found = function(table, glm_name=GLM, save_weights_dir=None, is_warn_extreme_changes=False)
    rate, error = float(found["length_controlled_winrate"]), float(found["lc_standard_error"])
    if not math.isfinite(rate):
        raise _NoLengthControlError("alpaca_eval's fit gave no number")
    return rate, error


def _indices(rows: Sequence[Row], difficulties: dict[int, float]) -> list[int]:
    """The place among AlpacaEval's instructions of every row."""
    if all("index" in row for row in rows):
        index = [int(row["index"]) for row in rows]
    elif len(rows) == len(difficulties):
        index = list(range(len(rows)))
    else:
        raise _NoLengthControlError(
            f"{len(rows)} judgements, {len(difficulties)} difficulties, and no column index that says which belong together\n"
            "  give all judgements in AlpacaEval's order, or add index (0 is its first instruction)"
        )
    unknown = [i for i in index if i not in difficulties]
    if unknown:
        raise _NoLengthControlError(
            f"no difficulty for instruction {unknown[0]} ({len(unknown)} such): length control knows AlpacaEval's {len(difficulties)} alone"
        )
    return index


@contextmanager
def quietly() -> Iterator[None]:
    """alpaca_eval at work: its warnings and its log are not for our users, and its global settings do not outlive it."""
    root, level, disabled = logging.getLogger(), logging.getLogger().level, logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pandas, scikit-learn and pkg_resources, about how alpaca_eval calls them
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(disabled)
            root.setLevel(level)  # importing alpaca_eval makes everything talk


@contextmanager
def _alpaca_eval(path: Path | None) -> Iterator[tuple[Any, dict[int, float]]]:
    """Its function, reading ``path`` for what it would fetch, and the difficulties."""
    with quietly():
        try:
            from alpaca_eval.metrics import glm_winrate
            from sklearn import config_context
        except ImportError as e:
            raise _NoLengthControlError(f"length control is alpaca_eval's: pip install 'ivg[alpaca]' ({e})") from None
        fetch = glm_winrate.hf_hub_download
        path = path or _from_hub(fetch)
        glm_winrate.hf_hub_download = lambda **_: str(path)
        try:
            with config_context():  # the function changes scikit-learn's settings
                yield glm_winrate.get_length_controlled_winrate, _difficulties(path)
        finally:
            glm_winrate.hf_hub_download = fetch


def _from_hub(fetch: Any) -> Path:
    if HUB not in _unreachable:
        try:
            return Path(fetch(repo_id=HUB, filename=FILE, repo_type="dataset"))
        except Exception as e:  # offline, no network, hub down: its client raises dozens of kinds
            _unreachable[HUB] = (str(e).strip() or type(e).__name__).split(". ")[0].splitlines()[0][:160]
    raise _NoLengthControlError(f"no difficulty file was given, and none came from the hub ({_unreachable[HUB]})\n  {needed()}")


_unreachable: dict[str, str] = {}
"""Why the hub could not be reached; one table of results asks it once, for it tries for half a minute."""


def _difficulties(path: Path) -> dict[int, float]:
    """Difficulty by instruction; alpaca_eval reads the one in line i for instruction i, so they must stand there.

    Raises:
        ConfigError: they do not.
    """
    out: dict[int, float] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for line, row in enumerate(csv.DictReader(file)):
            try:
                index, value = int(float(row["index"])), float(row["instruction_difficulty"])
            except (TypeError, ValueError):
                raise ConfigError(f"{path}, line {line + 2}: index and instruction_difficulty must be numbers") from None
            if index not in out:
                if index != line:
                    raise ConfigError(f"{path}, line {line + 2}: index {index}\n  expected the instructions in order, from 0 on: {line}")
                out[index] = value
    return out
