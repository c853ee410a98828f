"""Sentiment: beginnings of film reviews, to be continued with praise (METHOD, section 5; IVG, section 4).

Data: rows with ``prompt`` (the paper's imdb_preference, in file order), or with ``text`` (whole reviews as in IMDb), whose first
4 to 8 words are the prompts, drawn as the embedded models' own prompts are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np

from ivg.config import EvalConfig
from ivg.errors import ConfigError
from ivg.evaluation.task import Example, Tables, Task
from ivg.tables import read_rows
from ivg.types import Prompt

DATA = "ZHZisZZ/imdb_preference"
PROMPTS = 1000
"""The paper's number of test prompts."""


class Sentiment(Task):
    """Continue the beginning of a review; the gold reward reads prompt and continuation as one text."""

    name = "sentiment"

    def examples(self, config: EvalConfig) -> list[Example]:
        """Prompts as they stand, or beginnings of reviews.

        Raises:
            ConfigError: neither ``prompt`` nor ``text`` among the columns; fewer usable rows than asked for.
        """
        source, split = config.data or DATA, config.split or "test"
        rows = read_rows(source, split)
        first = next(rows, None)
        if first is None:
            raise ConfigError(f"{source} is empty")
        if "prompt" in first:
            found = [first["prompt"], *(r["prompt"] for r in islice(rows, (config.prompts or PROMPTS) - 1))]
        elif "text" in first:
            reviews = [clean(r["text"]) for r in (first, *rows)]
            try:
                found = opening_words(reviews, config.prompts or PROMPTS, seed=config.shuffle or 0)
            except ValueError as e:
                raise ConfigError(f"{source}: {e}\n  ask for fewer (--prompts)") from None
        else:
            raise ConfigError(f"{source} has the columns {', '.join(first)}\n  expected prompt, or text (whole reviews)")
        return [Example(str(i), Prompt(text)) for i, text in enumerate(found)]

    def defaults(self) -> Tables:
        """50 tokens at temperature 0.7, no end before; W = K = 4, L = 5."""
        return {
            "sampling": {"temperature": 0.7, "max_new_tokens": 50, "ignore_eos": True},
            "search": {"width": 4, "successors": 4, "chunk_length": 5, "beta": 1.0},
        }


def clean(text: str) -> str:
    """One line break where the page had several, no space at the ends."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def opening_words(texts: Sequence[str], count: int, seed: int, shortest: int = 4, longest: int = 8) -> list[str]:
    """Prompts: the first 4 to 8 words of ``count`` texts, drawn without replacement.

    Raises:
        ValueError: fewer than ``count`` texts are long enough.
    """
    rng = np.random.default_rng(seed)
    out = []
    for i in rng.permutation(len(texts)):
        words = texts[i].split()
        if len(words) > longest:
            out.append(" ".join(words[: int(rng.integers(shortest, longest + 1))]))
        if len(out) == count:
            return out
    raise ValueError(f"only {len(out)} of {count} prompts: the texts are too few or too short")
