"""Summarization: posts to one-sentence summaries (TL;DR), or e-mails to subject lines (METHOD, section 5; IVG, section 4).

Data, told apart by columns:

* ``prompt`` (openai_summarize_comparisons and its relabelled kin): the post; a ``TL;DR:`` at its end is taken off, since every model
  has a template of its own that adds it. Rows without such a cue (anything made by users) stay as they are.
* ``email`` (AESLC): the first words of the e-mail and the cue ``Subject:``, which all models share.

References (``annotated_subjects``, ``references``, ``subject``, ``response``, ``label``) are kept for the report.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ivg.errors import ConfigError
from ivg.evaluation.task import Example, Tables, Task, check_count, text_of
from ivg.jobs.formats import read_rows
from ivg.settings.recipe import EvalConfig
from ivg.types import Prompt

DATA = "CarperAI/openai_summarize_comparisons"
PROMPTS = 1000
SHUFFLE = 42
"""The paper: shuffled with seed 42, the first 1000."""
WORDS = 80
CUE = "TL;DR:"
_REFERENCES = ("references", "annotated_subjects", "subject", "response", "label")


class Summarization(Task):
    """Summarise a text in one line; the gold reward reads text and summary through its own template."""

    name = "summarization"

    def examples(self, config: EvalConfig) -> list[Example]:
        """Each text once, in the order that ``datasets.Dataset.shuffle`` gives.

        Raises:
            ConfigError: neither ``prompt`` nor ``email`` among the columns; a row without; fewer texts than asked for; an unknown option.
        """
        words = _words(config)
        source = config.data or DATA
        rows = list(read_rows(source, config.split or "test", config.format))
        if not rows:
            raise ConfigError(f"{source} is empty")
        if "prompt" not in rows[0] and "email" not in rows[0]:
            raise ConfigError(f"{source} has the columns {', '.join(rows[0])}\n  expected prompt (a post), or email")
        column = "prompt" if "prompt" in rows[0] else "email"
        seed = SHUFFLE if config.shuffle is None else config.shuffle
        found: dict[str, Example] = {}
        for i in np.random.default_rng(seed).permutation(len(rows)).tolist():
            row, where = rows[i], f"{source}, row {i + 1}"
            text = _post(text_of(row, "prompt", where)) if column == "prompt" else _mail(text_of(row, "email", where), words)
            if text.strip() and text not in found:  # comparisons have several rows for one post
                all_references = list(_references(row))
                first = all_references[0] if all_references else None
                found[text] = Example(str(row.get("id", i)), Prompt(text), first, {"references": all_references})
            if len(found) == (config.prompts or PROMPTS):
                break
        check_count(len(found), config, source)
        return _unique(found.values())

    def defaults(self) -> Tables:
        """One line of 128 tokens at most, at temperature 0.7; W = K = 4, L = 5."""
        return {
            "sampling": {"temperature": 0.7, "max_new_tokens": 128, "stop": ["\n"]},
            "search": {"width": 4, "successors": 4, "chunk_length": 5, "beta": 1.0},
        }

    def judged(self, example: Example, response: str) -> tuple[Prompt, str]:
        """The summary as it was written, without blanks behind it."""
        return example.prompt, response.rstrip()


def _words(config: EvalConfig) -> int:
    unknown = set(config.options) - {"words"}
    try:
        words = int(config.options.get("words", WORDS))
    except (TypeError, ValueError):
        words = 0
    if unknown or words < 1:
        raise ConfigError(f"eval.options of summarization: expected words (of an e-mail, at least 1), got {dict(config.options)}")
    return words


def _post(text: str) -> str:
    """A post without the cue at its end."""
    stripped = text.rstrip()
    return stripped[: -len(CUE)].rstrip() + "\n" if stripped.endswith(CUE) else text


def _mail(text: str, words: int) -> str:
    """The first words of an e-mail, and the cue for its subject."""
    return " ".join(text.split()[:words]) + "\n\nSubject:" if text.strip() else ""


def _references(row: Mapping[str, Any]) -> Iterable[str]:
    """All human summaries of a row; lists may be written as text."""
    for name in _REFERENCES:
        value = row.get(name)
        if isinstance(value, str) and name == "annotated_subjects" and value.startswith("["):
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                value = [value]
        for text in [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else []:
            if isinstance(text, str) and text.strip():
                yield text.strip()


def _unique(examples: Iterable[Example]) -> list[Example]:
    """Examples whose ids the data did not keep apart are told apart by their places."""
    out: list[Example] = []
    seen: set[str] = set()
    for place, e in enumerate(examples):
        name = e.id if e.id not in seen else f"{e.id}-{place}"
        seen.add(name)
        out.append(Example(name, e.prompt, e.reference, e.extra))
    return out
