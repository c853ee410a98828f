"""Sentiment: beginnings of film reviews, to be continued with praise (METHOD, section 5; IVG, section 4).

Data: rows with ``prompt`` (the paper's imdb_preference, in file order), or with ``text`` (whole reviews as in IMDb), whose first
4 to 8 words are the prompts, drawn as the embedded models' own prompts are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice

import numpy as np

from ivg.errors import ConfigError
from ivg.evaluation.task import Example, Tables, Task, check_count, text_of
from ivg.jobs.formats import read_rows
from ivg.settings.recipe import EvalConfig
from ivg.types import Prompt

DATA = "ZHZisZZ/imdb_preference"
PROMPTS = 1000
"""The paper's number of test prompts."""
SHORTEST, LONGEST = 4, 8
"""Words of a prompt that is the beginning of a review."""


class Sentiment(Task):
    """Continue the beginning of a review; the gold reward reads prompt and continuation as one text."""

    name = "sentiment"

    def examples(self, config: EvalConfig) -> list[Example]:
        """Prompts as they stand, or beginnings of reviews.

        Raises:
            ConfigError: neither ``prompt`` nor ``text`` among the columns; a row without; fewer usable rows than asked for; options, or
                a shuffle of prompts, which nothing reads.
        """
        if config.options:
            raise ConfigError(f"eval.options of sentiment: there are none, got {', '.join(config.options)}\n  leave them out (--option)")
        source = config.data or DATA
        rows = read_rows(source, config.split or "test", config.format)
        first = next(rows, None)
        if first is None:
            raise ConfigError(f"{source} is empty")
        if "prompt" in first:
            if config.shuffle is not None:
                raise ConfigError(
                    f"{source} has prompts, which are taken in file order\n  leave out shuffle (--shuffle); it draws from reviews"
                )
            column, most = "prompt", config.prompts or PROMPTS
        elif "text" in first:
            column, most = "text", None
        else:
            raise ConfigError(f"{source} has the columns {', '.join(first)}\n  expected prompt, or text (whole reviews)")
        found = [text_of(row, column, f"{source}, row {i}") for i, row in enumerate(islice(chain([first], rows), most), 1)]
        if column == "text":
            found = _openings([clean(text) for text in found], config, source)
        check_count(len(found), config, source)
        return [Example(str(i), Prompt(text)) for i, text in enumerate(found)]

    def defaults(self) -> Tables:
        """50 tokens at temperature 0.7, no end before; W = K = 4, L = 5."""
        return {
            "sampling": {"temperature": 0.7, "max_new_tokens": 50, "ignore_eos": True},
            "search": {"width": 4, "successors": 4, "chunk_length": 5, "beta": 1.0},
        }


def _openings(reviews: Sequence[str], config: EvalConfig, source: str) -> list[str]:
    """As many as are asked for; as the paper has, or as there are, where nobody asks."""
    usable = sum(len(r.split()) > LONGEST for r in reviews)
    check_count(usable, config, source)
    return opening_words(reviews, config.prompts or min(PROMPTS, usable), seed=config.shuffle or 0) if usable else []


def clean(text: str) -> str:
    """One line break where the page had several, no space at the ends."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def opening_words(texts: Sequence[str], count: int, seed: int, shortest: int = SHORTEST, longest: int = LONGEST) -> list[str]:
    """Prompts: the first 4 to 8 words of ``count`` texts, drawn without replacement.

    Raises:
        ValueError: fewer than ``count`` texts are long check_count.
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
