"""How well the judges of sentiment know the labels of reviews that they were not trained on, and how calibrated their log-odds are."""

import importlib.util
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ivg.types import Prompt
from ivg.utils.jsonl import read_jsonl, write_json
from ivg.values.reward import load_reward

JUDGES = Path(__file__).parents[2] / "recipes" / "smollm2" / "judges.py"
COUNT = 1000
BINS = 10


def calibration(log_odds: Sequence[float], labels: Sequence[int]) -> dict[str, float]:
    """Accuracy, expected calibration error (10 bins of equal width), mean log loss, and the range of the log-odds."""
    bins: list[list[tuple[float, int]]] = [[] for _ in range(BINS)]
    for score, label in zip(log_odds, labels, strict=True):
        p = 1 / (1 + math.exp(-score))
        bins[min(BINS - 1, int(p * BINS))].append((p, label))
    gaps = [len(b) * abs(fmean(p for p, _ in b) - fmean(y for _, y in b)) for b in bins if b]
    return {
        "texts": len(labels),
        "accuracy": fmean((s > 0) == (y == 1) for s, y in zip(log_odds, labels, strict=True)),
        "calibration_error": sum(gaps) / len(labels),
        "log_loss": fmean(math.log1p(math.exp(-s if y else s)) for s, y in zip(log_odds, labels, strict=True)),
        "lowest": min(log_odds),
        "highest": max(log_odds),
    }


def report(work: Path, count: int = COUNT) -> None:
    """Write sentiment/calibration.json: each judge on labelled texts of the other's half, and how far they agree."""
    spec = importlib.util.spec_from_file_location("judges", JUDGES)
    assert spec is not None and spec.loader is not None
    judges: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(judges)
    judges.WORK = work
    found: dict[str, Any] = {}
    gold = load_reward(work / "sentiment" / "gold")
    scores: dict[str, list[float]] = {}
    for name, file in (("gold", "imdb-labels-2.jsonl"), ("bag_of_words", "imdb-labels.jsonl")):
        rows = list(itertools.islice(read_jsonl(work / file), count))
        texts = [(Prompt(r["prompt"]), r["response"]) for r in rows]
        scores[name] = gold.judge(texts) if name == "gold" else [judges.bag_of_words(str(p.content), r) for p, r in texts]
        found[name] = calibration(scores[name], [r["score"] for r in rows])
    write_json(work / "sentiment" / "calibration.json", found)
    print(found)
