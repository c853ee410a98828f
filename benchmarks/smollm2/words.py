"""Judges of another kind than the reward models: linear in the words of a response. They score no training data and guide nothing.

Of sentiment: logistic regression on words and pairs of words, trained on the half of IMDb's labelled reviews that the reward model did not
see. Of answers to instructions: ridge regression on shares of words, of the judgements that the reward model is trained on.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.reward_baselines import fit_word_shares, tokens
from ivg.training.data import RatedResponse

FEATURES = 20_000
FEW_WORDS = 10
"""A score over shares of words counts by w / (w + this), for an answer of w words and marks: a few words say little."""
STEPS = 400
PENALTY = 5e-4
"""Of the squared weights, for a mean loss."""


def features(text: str) -> set[str]:
    """Words, and pairs of neighbours, in lower case."""
    words = re.findall(r"[a-z']+", text.lower())
    return {*words, *map(" ".join, pairwise(words))}


def fit_words(reviews: Sequence[tuple[str, int]], words: int = 56) -> dict[str, float]:
    """Feature -> weight of the log-odds that a text of about ``words`` words is positive; the intercept is under the empty text."""
    texts = [features(" ".join(text.split()[:words])) for text, _ in reviews]
    labels = np.array([label for _, label in reviews], dtype=np.float64)
    names = [name for name, _ in Counter(name for text in texts for name in text).most_common(FEATURES)]
    index = {name: i for i, name in enumerate(names)}
    columns = [[index[name] for name in text if name in index] for text in texts]
    rows = np.repeat(np.arange(len(columns)), [len(c) for c in columns])
    flat = np.concatenate([np.array(c, dtype=np.int64) for c in columns])
    weights, intercept = np.zeros(len(names)), 0.0
    momentum, second = np.zeros(len(names) + 1), np.zeros(len(names) + 1)
    for step in range(1, STEPS + 1):  # Adam on the whole data: no package beyond numpy
        logits = intercept + np.bincount(rows, weights[flat], minlength=len(labels))
        error = (1 / (1 + np.exp(-logits)) - labels) / len(labels)
        gradient = np.append(np.bincount(flat, error[rows], minlength=len(names)) + PENALTY * weights, error.sum())
        momentum = 0.9 * momentum + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        change = 0.03 * (momentum / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        weights -= change[:-1]
        intercept -= float(change[-1])
    return {"": round(intercept, 4)} | {name: round(float(w), 4) for name, w in zip(names, weights, strict=True)}


def fit_judgements(rows: Sequence[RatedResponse], words: int = 2000) -> dict[str, Any]:
    """A linear judge of answers to instructions.

    Returns:
        ``weights``: of log(1 + percent of the answer's words and marks), by word; ``intercept``: with it the mean of ``rows``
        is 0 where few words count like many; ``few_words``: :data:`FEW_WORDS`; ``lowest``: score of ``rows``, for answers without a word.
    """
    features, weights, _ = fit_word_shares(rows, words)
    found = features.plain(rows) @ weights
    totals = np.array([len(tokens(row.response)) for row in rows])
    scores = (found - found.mean()) * totals / (totals + FEW_WORDS)
    return {
        "intercept": round(-float(found.mean()), 4),
        "few_words": FEW_WORDS,
        "lowest": round(float(scores.min()), 4),
        "weights": {word: round(float(weights[column]), 4) for word, column in features.columns.items()},
    }


def log_odds(weights: dict[str, float], text: str) -> float:
    """Unbounded log-odds that ``text`` is positive."""
    return math.fsum([weights[""], *(weights.get(name, 0.0) for name in features(text))])
