"""The task summarization: posts to one-line summaries (TL;DR), or e-mails to subject lines (IVG, arXiv 2409.17819, section 4).

The column of the data decides:

* ``prompt`` (such as openai_summarize_comparisons): a post. ``TL;DR:`` at its end is removed, since each model's template adds it.
* ``email`` (AESLC): the first words of the e-mail and ``Subject:``; judges read the whole e-mail.

References (``annotated_subjects``, ``references``, ``subject``, ``response``, ``label``) are for the report.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ivg.errors import ConfigError
from ivg.evaluation.task import Example, Tables, Task, check_count, read_data, text_of
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
    """Summarise a text in one line; the gold reward scores text and summary."""

    def examples(self, config: EvalConfig) -> list[Example]:
        """Each text once, in the order that ``datasets.Dataset.shuffle`` gives.

        Raises:
            ConfigError: no column ``prompt`` or ``email``; a row without it; fewer texts than asked for; an unknown option.
        """
        words, judge_words = _words(config)
        source = config.data or DATA
        rows = list(read_data(config, DATA, "test"))
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
                judged = _mail(row["email"], judge_words) if column == "email" else text
                found[text] = Example(str(row.get("id", i)), Prompt(text), first, {"references": all_references, "judged": judged})
            if len(found) == (config.prompts or PROMPTS):
                break
        check_count(len(found), config, source)
        return _unique(found.values())

    def defaults(self) -> Tables:
        """One line of at most 128 tokens at temperature 0.7; W = K = 4, L = 5."""
        return {
            "sampling": {"temperature": 0.7, "max_new_tokens": 128, "stop": ["\n"]},
            "search": {"width": 4, "successors": 4, "chunk_length": 5, "beta": 1.0},
        }

    def judged(self, example: Example, response: str) -> tuple[Prompt, str]:
        """The text, of an e-mail the whole of it (or ``judge_words``), and the summary without trailing white space."""
        return Prompt(example.extra.get("judged", example.prompt.content)), response.rstrip()


def _words(config: EvalConfig) -> tuple[int, int | None]:
    """(words of an e-mail that are answered, words that judges read; None: all)."""
    unknown = set(config.options) - {"words", "judge_words"}
    try:
        words, judged = (int(config.options.get(name, default)) for name, default in (("words", WORDS), ("judge_words", 0)))
    except (TypeError, ValueError):
        words, judged = 0, 0
    if unknown or words < 1 or judged < 0:
        raise ConfigError(
            f"options of the task summarization: got {dict(config.options)}\n"
            "  expected words = 1 or more (of an e-mail), judge_words = 1 or more (0: all)"
        )
    return words, judged or None


def _post(text: str) -> str:
    """A post without ``TL;DR:`` at its end."""
    stripped = text.rstrip()
    return stripped[: -len(CUE)].rstrip() + "\n" if stripped.endswith(CUE) else text


def _mail(text: str, words: int | None) -> str:
    """The first words of an e-mail (None: all) and ``Subject:``."""
    return " ".join(text.split()[:words]) + "\n\nSubject:" if text.strip() else ""


def _references(row: Mapping[str, Any]) -> Iterable[str]:
    """All references of a row; a list may be given as text."""
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
    """Examples with unique ids; duplicates get their position appended."""
    out: list[Example] = []
    seen: set[str] = set()
    for place, e in enumerate(examples):
        name = e.id if e.id not in seen else f"{e.id}-{place}"
        seen.add(name)
        out.append(replace(e, id=name))
    return out
