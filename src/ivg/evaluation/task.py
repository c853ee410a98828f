"""What an evaluation task is: which prompts, which settings, what the judges read. One task per file beside this one.

Knows: the shape of a task and the table of their names. Must not know methods, models or files of a run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ivg.errors import ConfigError
from ivg.settings.recipe import EvalConfig
from ivg.types import Prompt

Tables = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Example:
    """One prompt of a task.

    Attributes:
        id: unique within the task.
        prompt: what is answered.
        reference: a human's (or another model's) answer, for the report; never seen by a method.
        extra: whatever the task's own files need.
    """

    id: str
    prompt: Prompt
    reference: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """One method's response to one example, as tasks see it; ``error``: why there is none."""

    example: Example
    seed: int
    text: str
    error: str | None = None


class Task(Protocol):
    """A task: subclass it, give ``name`` and :meth:`examples`, override what differs."""

    name: str
    primary: tuple[str, str] | None = None
    """Which number of :meth:`measure` orders the methods and is drawn where nothing else judges, and which is its standard error."""

    def examples(self, config: EvalConfig) -> list[Example]:
        """The prompts, in an order that depends on ``config`` alone; ids are unique.

        Raises:
            ConfigError: no data, or columns that cannot be used.
        """
        ...

    def defaults(self) -> Tables:
        """The paper's settings by recipe table (``sampling``, ``search``); whatever the recipe says goes before them."""
        return {}

    def judged(self, example: Example, response: str) -> tuple[Prompt, str]:
        """(prompt, response) as reward models get them; the reward's own template puts the two together."""
        return example.prompt, response

    def export(self, out: Path, label: str, answers: Sequence[Answer]) -> None:
        """Files of the task's own (``model_outputs/<label>.json``), written whenever a method's transcripts are complete."""

    def settings(self, config: EvalConfig) -> Mapping[str, Any]:
        """What :meth:`measure` depends on besides answers and references, as JSON has it; figures of other settings are not reported."""
        return dict(config.options)

    def measure(self, config: EvalConfig, out: Path, label: str, answers: Sequence[Answer]) -> Mapping[str, Any]:
        """Figures of the task's own for one method (win rates of a judge), called by the score stage, once for each method.

        May write and resume files under ``out``. Numbers appear as columns of the report, texts as notes below it. The answers
        are those of all seeds, in transcript order.
        """
        return {}


def load_task(name: str) -> Task:
    """The task called ``name``.

    Raises:
        ConfigError: no such task.
    """
    from importlib import import_module

    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r}\n  expected one of: {', '.join(TASKS)}")
    module, kind = TASKS[name].split(":")
    return getattr(import_module(module), kind)()


TASKS = {
    "sentiment": "ivg.evaluation.sentiment:Sentiment",
    "summarization": "ivg.evaluation.summarization:Summarization",
    "alpaca": "ivg.evaluation.alpaca:Alpaca",
}
"""Every task: module and class, imported when it is asked for."""


def digest(examples: Sequence[Example]) -> str:
    """A fingerprint of ids and prompts, so that answers to other prompts are never mixed in."""
    shown = [
        [e.id, e.prompt.content if isinstance(e.prompt.content, str) else [[m.role, m.content] for m in e.prompt.content]] for e in examples
    ]
    return hashlib.sha256(json.dumps(shown, ensure_ascii=False).encode()).hexdigest()[:16]


def text_of(row: Mapping[str, Any], column: str, where: str) -> str:
    """The text in a column; ``where`` names the row in errors.

    Raises:
        ConfigError: there is none, or something else, such as the messages of a conversation.
    """
    found = row.get(column)
    if not isinstance(found, str):
        got = "nothing" if found is None else "messages" if isinstance(found, list) else repr(found)[:40]
        raise ConfigError(f"{where}: expected a text in {column}, got {got}\n  leave such rows out, or write their text out")
    return found


def check_count(found: int, config: EvalConfig, source: str) -> None:
    """Check that there are as many prompts as ``config.prompts`` asks for.

    Raises:
        ConfigError: fewer.
    """
    if config.prompts is not None and found < config.prompts:
        raise ConfigError(f"{source}: has {found} prompts, expected {config.prompts}\n  ask for fewer (--prompts)")
