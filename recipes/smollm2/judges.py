"""Judges that are Python functions, of another kind than the trained rewards: they guide nothing and score no training data.

They read files of the folder that ``python -m benchmarks.smollm2`` works in (``IVG_SMOLLM2``; default: build/smollm2).
"""

import json
import math
import os
import re
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

WORK = Path(os.environ.get("IVG_SMOLLM2", "build/smollm2"))


def bag_of_words(prompt: str, response: str) -> float:
    """Sentiment: log-odds of a logistic regression on words and pairs of words (``benchmarks/smollm2/words.py``)."""
    found = re.findall(r"[a-z']+", f"{prompt}{response}".lower())
    names = {*found, *map(" ".join, pairwise(found))}
    weights = _word_weights()
    return math.fsum([weights[""], *(weights.get(name, 0.0) for name in names)])


def agreement(prompt: str, response: str) -> float:
    """Summarization: F1 of the words of a subject and of the human subjects of the same e-mail, the best of them; in [0, 1]."""
    mine = Counter(_tokens(response))
    return max((_f1(mine, Counter(_tokens(text))) for text in _references().get(prompt.strip(), ())), default=0.0)


def retrieval(prompt: str, response: str) -> float:
    """Summarization: share of the other test e-mails that fit the subject less than its own, by tf-idf cosine; in [0, 1]."""
    mails, frequency = _mails()
    subject = _weights(_tokens(response), frequency)
    own = _cosine(subject, mails[prompt.strip()])
    others = [_cosine(subject, mail) for text, mail in mails.items() if text != prompt.strip()]
    return sum((other < own) + (other == own) / 2 for other in others) / len(others)


def word_shares(prompt: str, response: str) -> float:
    """Instructions: what shares of words say of GPT-4's judgement, with length regressed out; about 0 for the average judged answer.

    Ridge regression (``benchmarks/smollm2/words.py``) on answers to other instructions. Few words say little: they get a score near 0.
    No word at all: the lowest score of the judged answers.
    """
    judge, found = _judge_of_words(), Counter(re.findall(r"\w+|[^\w\s]", response.lower()))
    if not found:
        return float(judge["lowest"])
    weights, total = judge["weights"], found.total()
    shares = (weights[word] * math.log1p(100 * count / total) for word, count in found.items() if word in weights)
    return math.fsum([judge["intercept"], *shares]) * total / (total + judge["few_words"])


def _tokens(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _f1(mine: Counter[str], other: Counter[str]) -> float:
    both = (mine & other).total()
    return 2 * both / (mine.total() + other.total()) if both else 0.0


@cache
def _word_weights() -> dict[str, float]:
    return json.loads((WORK / "words.json").read_text())  # type: ignore[no-any-return]


@cache
def _judge_of_words() -> dict[str, Any]:
    return json.loads((WORK / "judgement-words.json").read_text())  # type: ignore[no-any-return]


@cache
def _references() -> dict[str, list[str]]:
    rows = [json.loads(line) for split in ("dev", "test") for line in (WORK / f"aeslc-{split}.jsonl").read_text().splitlines()]
    return {row["prompt"].strip(): row["references"] for row in rows}


@cache
def _mails() -> tuple[dict[str, dict[str, float]], Counter[str]]:
    texts = list(_references())
    frequency = Counter(word for text in texts for word in set(_tokens(text)))
    frequency[""] = len(texts)
    return {text: _weights(_tokens(text), frequency) for text in texts}, frequency


def _weights(tokens: list[str], frequency: Counter[str]) -> dict[str, float]:
    """tf-idf of a text, of length 1; words that no e-mail has count nothing."""
    counts = Counter(word for word in tokens if frequency[word])
    found = {word: count * math.log(frequency[""] / frequency[word]) for word, count in counts.items()}
    norm = math.sqrt(sum(w * w for w in found.values()))
    return {word: w / norm for word, w in found.items()} if norm else {}


def _cosine(a: dict[str, float], b: dict[str, float]) -> float:
    return sum(w * b.get(word, 0.0) for word, w in a.items())
