"""Length-controlled win rate by alpaca_eval's own function (Dubois et al. 2024, arXiv 2404.04475; extra ``alpaca``).

The function fits for each model

    P(the model wins on i) = sigmoid(a * tanh(length difference of i, standardised) + b * difficulty of i + c)

and returns the mean prediction with the length difference set to 0. The difficulties, which alpaca_eval's authors fitted to their
leaderboard, and judgements of a terse and a verbose baseline, which regularise the fit, are in ``df_gamed.csv`` of the data set
``tatsu-lab/alpaca_eval``. alpaca_eval downloads that file each time; here its path may be given instead.
"""

from __future__ import annotations

import csv
import functools
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
"""Folds of alpaca_eval's cross-validation, which need as many judgements."""


@dataclass(frozen=True)
class LengthControlled:
    """The length-controlled win rate in percent, or the ``reason`` why there is none."""

    win_rate: float | None = None
    standard_error: float | None = None
    reason: str = ""


def difficulty_file(given: str | Path | None = None) -> Path | None:
    """Path of the difficulty file: ``given`` (the file or its folder), else that of :data:`ENVIRONMENT`; None: download it.

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
        raise ConfigError(f"cannot read the difficulty file {path}: {e.strerror}\n  {_requirements()}") from None
    missing = [c for c in GLM_COLUMNS if c not in columns]
    if missing:
        raise ConfigError(f"{path} has no column {', '.join(missing)}; got {', '.join(columns[:8])}\n  {_requirements()}")
    return path


def _requirements() -> str:
    return (
        f"length control needs {FILE} (columns {', '.join(GLM_COLUMNS)}), which alpaca_eval takes from the hub data set {HUB} "
        f"(https://huggingface.co/datasets/{HUB}/resolve/main/{FILE}); instruction_difficulty.csv beside it is not enough\n"
        f"  download it and give it by --difficulty FILE or {ENVIRONMENT}=FILE; the plain win rate needs no file"
    )


def length_controlled(rows: Sequence[Row], difficulty: str | Path | None = None) -> LengthControlled:
    """alpaca_eval's length-controlled win rate of judgements of one model; the mean over seeds.

    Args:
        rows: judgements. ``index`` is the position of the instruction in AlpacaEval; without that column the rows must be all
            instructions in order.
        difficulty: see :func:`difficulty_file`.

    Raises:
        ConfigError: the given difficulty file cannot be used.
    """
    path = difficulty_file(difficulty)
    try:
        with _alpaca_eval(path) as (function, difficulties):
            found = [_one(same, function, difficulties) for same in by_seed(rows).values()]
    except _NoLengthControlError as e:
        return LengthControlled(reason=str(e))
    return LengthControlled(fmean(r for r, _ in found), fmean(e for _, e in found))


class _NoLengthControlError(Exception):
    """The reason why there is no rate."""


def _one(rows: Sequence[Row], function: Any, difficulties: dict[int, float]) -> tuple[float, float]:
    """(rate, standard error) of one seed."""
    import pandas as pd

    index = _indices(rows, difficulties)
    lengths = {len(row["output_1"]) - len(row["output_2"]) for row in rows}
    judged = sum(preference_of(row) is not None for row in rows)
    if judged < FOLDS or len(lengths) < 2:
        raise _NoLengthControlError(f"length control needs {FOLDS} or more judgements with different lengths, got {judged}")
    keep = ("instruction", "output_1", "output_2")
    names = {"generator_1": "reference", "generator_2": "model"}
    table = pd.DataFrame(
        [{**{k: row[k] for k in keep}, **names, "preference": preference_of(row)} for row in rows],
        index=pd.Index(index, name="index"),
    )
    found = function(table, glm_name=GLM, save_weights_dir=None, is_warn_extreme_changes=False)
    rate, error = float(found["length_controlled_winrate"]), float(found["lc_standard_error"])
    if not math.isfinite(rate):
        raise _NoLengthControlError("alpaca_eval's fit gave no finite number")
    return rate, error


def _indices(rows: Sequence[Row], difficulties: dict[int, float]) -> list[int]:
    """The position in AlpacaEval of the instruction of every row."""
    if all("index" in row for row in rows):
        index = [int(row["index"]) for row in rows]
    elif len(rows) == len(difficulties):
        index = list(range(len(rows)))
    else:
        raise _NoLengthControlError(
            f"{len(rows)} judgements and {len(difficulties)} difficulties, but no column index\n"
            "  give all judgements in AlpacaEval's order, or add index (0 is its first instruction)"
        )
    unknown = [i for i in index if i not in difficulties]
    if unknown:
        raise _NoLengthControlError(
            f"no difficulty for instruction {unknown[0]} ({len(unknown)} such): only AlpacaEval's {len(difficulties)} instructions have one"
        )
    return index


@contextmanager
def suppress_logs() -> Iterator[None]:
    """Suppress the warnings and logs of alpaca_eval, and restore the log level that it changes."""
    root, level, disabled = logging.getLogger(), logging.getLogger().level, logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pandas, scikit-learn and pkg_resources
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(disabled)
            root.setLevel(level)  # importing alpaca_eval changes it


@contextmanager
def _alpaca_eval(path: Path | None) -> Iterator[tuple[Any, dict[int, float]]]:
    """alpaca_eval's function, which reads ``path`` instead of downloading, and the difficulties by instruction."""
    with suppress_logs():
        try:
            from alpaca_eval.metrics import glm_winrate
            from sklearn import config_context
        except ImportError as e:
            raise _NoLengthControlError(f"length control needs alpaca_eval: pip install 'ivg[alpaca]' ({e})") from None
        fetch = glm_winrate.hf_hub_download
        path = path or _from_hub(fetch)
        glm_winrate.hf_hub_download = lambda **_: str(path)
        try:
            with config_context():  # the function changes scikit-learn's settings
                yield glm_winrate.get_length_controlled_winrate, _difficulties(path)
        finally:
            glm_winrate.hf_hub_download = fetch


def _from_hub(fetch: Any) -> Path:
    found = _download(fetch)
    if isinstance(found, Path):
        return found
    raise _NoLengthControlError(f"no difficulty file was given, and the download from the hub failed ({found})\n  {_requirements()}")


@functools.cache
def _download(fetch: Any) -> Path | str:
    """The hub's file, or why it cannot be had; cached, since the hub's client retries for half a minute."""
    try:
        return Path(fetch(repo_id=HUB, filename=FILE, repo_type="dataset"))
    except Exception as e:  # offline, no network, hub down: its client raises dozens of kinds
        return (str(e).strip() or type(e).__name__).split(". ")[0].splitlines()[0][:160]


def _difficulties(path: Path) -> dict[int, float]:
    """Difficulty by instruction; alpaca_eval takes line i for instruction i, so they must be in order.

    Raises:
        ConfigError: they are not.
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
