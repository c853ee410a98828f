"""Sentiment: beginnings of film reviews, to be continued with praise (METHOD, section 5; IVG, section 4).

Data: rows with ``prompt`` (the paper's imdb_preference, in file order), or with ``text`` (whole reviews as in IMDb), whose first
4 to 8 words are the prompts, drawn as the embedded models' own prompts are.
"""

from __future__ import annotations

from itertools import islice

from ivg.config import EvalConfig
from ivg.demo.corpus import Review, clean
from ivg.demo.rollouts import opening_words
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
            reviews = [Review(clean(r["text"]), -1) for r in (first, *rows)]
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
