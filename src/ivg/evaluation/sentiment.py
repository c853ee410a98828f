"""The task sentiment: continue film reviews positively (IVG, arXiv 2409.17819, section 4).

Data: rows with ``prompt`` (the paper's imdb_preference, in file order), or with ``text`` (whole reviews as in IMDb), whose first
4 to 8 words are the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice

import numpy as np

from ivg.errors import ConfigError
from ivg.evaluation.task import Example, Tables, Task, check_count, read_data, text_of
from ivg.settings.recipe import EvalConfig
from ivg.types import Prompt

DATA = "ZHZisZZ/imdb_preference"
PROMPTS = 1000
"""The paper's number of test prompts."""
SHORTEST, LONGEST = 4, 8
"""Words of a prompt that is the beginning of a review."""


class Sentiment(Task):
    """Continue the beginning of a review; the gold reward scores prompt and continuation as one text."""

    def examples(self, config: EvalConfig) -> list[Example]:
        """Given prompts, or the first words of reviews.

        Raises:
            ConfigError: no column ``prompt`` or ``text``; a row without it; fewer usable rows than asked for; options, or a shuffle of
                given prompts, which are not used.
        """
        if config.options:
            raise ConfigError(f"the task sentiment has no options, got {', '.join(config.options)}\n  leave them out (--option)")
        source = config.data or DATA
        rows = read_data(config, DATA, "test")
        first = next(rows, None)
        if first is None:
            raise ConfigError(f"{source} is empty")
        if "prompt" in first:
            if config.shuffle is not None:
                raise ConfigError(f"{source} has prompts, which are used in file order\n  leave out shuffle (--shuffle); it is for reviews")
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
        """Exactly 50 tokens at temperature 0.7; W = K = 4, L = 5."""
        return {
            "sampling": {"temperature": 0.7, "max_new_tokens": 50, "ignore_eos": True},
            "search": {"width": 4, "successors": 4, "chunk_length": 5, "beta": 1.0},
        }


def _openings(reviews: Sequence[str], config: EvalConfig, source: str) -> list[str]:
    """``config.prompts`` of them; default: 1000, or as many as there are."""
    usable = sum(len(r.split()) > LONGEST for r in reviews)
    check_count(usable, config, source)
    return opening_words(reviews, config.prompts or min(PROMPTS, usable), seed=config.shuffle or 0) if usable else []


def clean(text: str) -> str:
    """Without blank lines and spaces at the ends of lines."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def opening_words(texts: Sequence[str], count: int, seed: int, shortest: int = SHORTEST, longest: int = LONGEST) -> list[str]:
    """The first 4 to 8 words of ``count`` texts, sampled without replacement.

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
