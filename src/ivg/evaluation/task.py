"""Evaluation tasks: prompts, default settings, what the judges read. A task is a subclass of :class:`Task`.

Other packages add tasks by the entry point ``ivg.tasks``; its name is the task's name, its object the class.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from ivg.errors import ConfigError
from ivg.jobs.formats import read_rows
from ivg.jobs.prompts import CHAT_COLUMNS
from ivg.settings.recipe import EvalConfig
from ivg.types import Prompt
from ivg.utils.plugins import Plugins

Tables = Mapping[str, Mapping[str, Any]]

TASKS = {
    "sentiment": "ivg.evaluation.sentiment:Sentiment",
    "summarization": "ivg.evaluation.summarization:Summarization",
    "alpaca": "ivg.evaluation.alpaca:Alpaca",
}
"""The tasks of this package: module and class, imported on use."""


@dataclass(frozen=True)
class Example:
    """One prompt of a task.

    Attributes:
        id: unique within the task.
        prompt: that every method answers.
        reference: a human's or another model's answer, for the report; no method sees it.
        extra: further columns for the task itself.
    """

    id: str
    prompt: Prompt
    reference: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """One method's response to one example with one seed; ``error`` is the reason if there is none."""

    example: Example
    seed: int
    text: str
    error: str | None = None


@dataclass(frozen=True)
class Comparison:
    """An answer and the base's answer to the same example with the same seed; 1 where gold prefers the answer, 0.5 for a tie, else 0."""

    answer: Answer
    base: Answer
    win: float


class Task(ABC):
    """An evaluation task. Only :meth:`examples` has no default."""

    primary: tuple[str, str] | None = None
    """Names of two metrics of :meth:`measure`: the one that orders and plots the methods if there is no judge, and its standard error."""

    @abstractmethod
    def examples(self, config: EvalConfig) -> list[Example]:
        """The prompts, in an order that depends on ``config`` alone; their ids are unique.

        Raises:
            ConfigError: no data, or unusable columns.
        """

    def defaults(self) -> Tables:
        """Default settings by table (``sampling``, ``search``); those of the recipe come first."""
        return {}

    def judged(self, example: Example, response: str) -> tuple[Prompt, str]:
        """The (prompt, response) that reward models score; their own template joins the two."""
        return example.prompt, response

    def export(self, out: Path, label: str, answers: Sequence[Answer]) -> None:  # noqa: B027 - optional
        """Write files of the task's own under ``out``; called when a method's answers are complete."""

    def settings(self, config: EvalConfig) -> Mapping[str, Any]:
        """Plain values that :meth:`measure` depends on besides answers and references; other values make its metrics stale."""
        return dict(config.options)

    def measure(self, config: EvalConfig, out: Path, label: str, answers: Sequence[Answer]) -> Mapping[str, Any]:
        """The task's own metrics of one method, for example a judge's win rates; called once for each method by the score stage.

        Args:
            config: the ``eval`` table.
            out: folder of the run; the task may write and resume files there.
            label: of the method.
            answers: of all seeds.

        Returns:
            Numbers, which become columns of the report, and texts, which become notes below its table.
        """
        return {}

    def against_base(self, config: EvalConfig, out: Path, label: str, comparisons: Sequence[Comparison]) -> Mapping[str, Any]:
        """Further metrics of one method from comparisons with the base by the gold reward; called by the report, which loads no model."""
        return {}


TASK_PLUGINS = Plugins("ivg.tasks", type, frozenset(TASKS))
"""Tasks of other packages: entry points that name a subclass of :class:`Task` (docs/how-to/plugins.md)."""


def load_task(name: str) -> Task:
    """The task called ``name``, of this package or a plugin.

    Raises:
        ConfigError: no such task, or a plugin's object that is no subclass of :class:`Task`.
    """
    if name in TASKS:
        module, kind = TASKS[name].split(":")
        return getattr(import_module(module), kind)()
    found = TASK_PLUGINS.get(name)
    if found is None:
        raise ConfigError(f"unknown task {name!r}\n  expected one of: {', '.join([*TASKS, *TASK_PLUGINS.names])}")
    if not issubclass(found, Task):
        raise ConfigError(f"the task {name} is the class {found.__name__}\n  expected a subclass of ivg.evaluation.task.Task")
    return found()


# Helpers of tasks


def read_data(config: EvalConfig, published: str, split: str) -> Iterator[dict[str, Any]]:
    """The rows of ``config.data``; default: those of the data set ``published`` on the hub.

    Raises:
        ConfigError: they cannot be read.
    """
    try:
        yield from read_rows(config.data or published, config.split or split, config.format)
    except ConfigError as e:
        if config.data not in (None, published):
            raise
        raise ConfigError(f"{str(e).splitlines()[0]}\n  give the prompts as --data FILE (docs/how-to/evaluation.md)") from e


def digest(examples: Sequence[Example]) -> str:
    """A fingerprint of ids and prompts."""

    def content(prompt: Prompt) -> Any:
        if isinstance(prompt.content, str):
            return prompt.content
        return [[m.role, m.text, *(image.source for image in m.images)] for m in prompt.content]

    shown = [[e.id, content(e.prompt)] for e in examples]
    return hashlib.sha256(json.dumps(shown, ensure_ascii=False).encode()).hexdigest()[:16]


def check_no_chat_columns(row: Mapping[str, Any], where: str) -> None:
    """Raise for a row with tools or variables of chat templates of its own, which tasks do not read.

    Raises:
        ConfigError: names the row ``where``.
    """
    for name in CHAT_COLUMNS:
        if row.get(name):
            raise ConfigError(f"{where}: {name} are not read for each row\n  remove the column; variables may be set for each model")


def text_of(row: Mapping[str, Any], column: str, where: str) -> str:
    """The text in a column; ``where`` names the row in errors.

    Raises:
        ConfigError: no text, or something else such as messages.
    """
    found = row.get(column)
    check_no_chat_columns(row, where)
    if not isinstance(found, str):
        got = "nothing" if found is None else "messages" if isinstance(found, list) else repr(found)[:40]
        raise ConfigError(f"{where}: expected a text in {column}, got {got}\n  remove the row, or give its text")
    return found


def check_count(found: int, config: EvalConfig, source: str) -> None:
    """Check that there are as many prompts as ``config.prompts`` asks for.

    Raises:
        ConfigError: fewer.
    """
    if config.prompts is not None and found < config.prompts:
        raise ConfigError(f"{source}: has {found} prompts, expected {config.prompts}\n  ask for fewer (--prompts)")
