"""What one evaluation consists of: which rows, which prompts, which file holds what. The same for all stages.

Knows: the recipe, the task, the folder of the run. Must not know models; imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ivg.config import EvalConfig, MethodConfig, Recipe
from ivg.decoding.strategies import Strategy, strategy
from ivg.errors import ConfigError
from ivg.evaluation.task import Example, Task, digest, task
from ivg.types import SamplingParams

COMBINATIONS = "combinations"
"""Among methods: token guidance in {none, implicit, explicit} x selection in {none, implicit, explicit} (METHOD, section 4)."""
BASE = "base"
BANK = "bank"
"""Label of the base samples that best-of-N chooses from; no method may have it."""
_VALUES = ("none", "implicit", "explicit")
_SIZES = ("width", "successors", "chunk_length", "original")
_GUIDING = ("beta", "candidates", "transform", "gate")


@dataclass(frozen=True)
class Method:
    """One row of the evaluation: its label, and the strategy with all settings."""

    label: str
    strategy: Strategy

    @property
    def plain(self) -> bool:
        """Nothing steers: the base itself."""
        s = self.strategy
        return s.name in (BASE, "custom") and not (s.needs or s.width * s.successors > 1)


@dataclass(frozen=True)
class Plan:
    """One evaluation.

    Args:
        recipe: with the task's defaults filled in (:func:`plan`).
        out: the folder of the run.
    """

    recipe: Recipe
    out: Path

    @property
    def config(self) -> EvalConfig:
        """The ``eval`` table."""
        return self.recipe.eval

    @cached_property
    def task(self) -> Task:
        """The task."""
        return task(self.config.task)

    @cached_property
    def examples(self) -> list[Example]:
        """The prompts."""
        found = self.task.examples(self.config)
        if not found:
            raise ConfigError(f"{self.config.task}: no prompts in {self.config.data}")
        if len({e.id for e in found}) < len(found):
            raise ConfigError(f"{self.config.task}: two prompts have the same id")
        return found

    @cached_property
    def methods(self) -> tuple[Method, ...]:
        """The rows, the plain base among them.

        Raises:
            ConfigError: unknown method, unusable settings, two rows with one label.
        """
        rows = [m for given in self.config.methods for m in _expanded(given, self.recipe)]
        if not any(m.plain for m in rows):
            rows.insert(0, Method(BASE, strategy(BASE)))
        labels = [m.label for m in rows]
        twice = sorted({x for x in labels if labels.count(x) > 1 or x == BANK})
        if twice:
            raise ConfigError(f"methods: the label {', '.join(twice)} is taken\n  give each row a label of its own")
        return tuple(rows)

    @property
    def base(self) -> Method:
        """The row that others are compared with."""
        return next(m for m in self.methods if m.plain)

    @property
    def labels(self) -> list[str]:
        """All labels with transcripts: the rows, and the bank where there is one."""
        return [m.label for m in self.methods] + ([BANK] if self.config.bank else [])

    def method(self, label: str) -> Method:
        """The row called ``label``."""
        return next(m for m in self.methods if m.label == label)

    @cached_property
    def sampling(self) -> SamplingParams:
        """How every method draws; what the recipe leaves out is the default of ``SteeredModel``."""
        given = self.recipe.sampling.settings()
        if "stop" in given:
            given["stop"] = tuple(given["stop"])
        return SamplingParams(**{"temperature": 0.7, "max_new_tokens": 50, **given})

    @property
    def block(self) -> int:
        """Prompts for each block of a file: what is computed together and written together."""
        return self.recipe.run.batch_size

    @property
    def total(self) -> int:
        """Answers of each method."""
        return self.config.seeds * len(self.examples)

    def items(self, positions: range) -> Iterator[tuple[int, int, Example]]:
        """(seed, position of the example, example) of these rows: seed by seed, prompt by prompt."""
        for i in positions:
            seed, position = divmod(i, len(self.examples))
            yield self.recipe.run.seed + seed, position, self.examples[position]

    def transcripts(self, label: str) -> Path:
        """File of a method's answers."""
        return self.out / "transcripts" / f"{label}.jsonl"

    def scores(self, label: str) -> Path:
        """File of the judgements of a method's answers."""
        return self.out / "scores" / f"{label}.jsonl"

    def provenance(self, label: str) -> dict[str, Any]:
        """Everything that a method's answers depend on; the number of seeds does not count, so that seeds can be added."""
        run = self.recipe.run
        common = {
            "task": self.config.task,
            "prompts": len(self.examples),
            "examples": digest(self.examples),
            "models": {role: ref.model_dump(exclude_none=True) for role, ref in self.recipe.models.given.items()} or "embedded",
            "sampling": self.recipe.sampling.settings(),
            "seed": run.seed,
            "dtype": run.dtype,
            "revision": run.revision,
            "quantization": run.quantization,
            "threads": self.config.threads,
        }
        values = getattr(self.recipe, "values", None)
        if values:
            common["values"] = {k: v.model_dump(exclude_none=True) for k, v in values.items()}
        if label == BANK:
            return {**common, "bank": self.config.bank}
        return {**common, "label": label, "strategy": described(self.method(label).strategy)}


def plan(recipe: Recipe, out: str | Path) -> Plan:
    """The evaluation that ``recipe`` describes; the task's settings stand where the recipe is silent.

    Raises:
        ConfigError: unknown task or method.
    """
    defaults = task(recipe.eval.task).defaults()
    given: Mapping[str, Mapping[str, Any]] = {
        "sampling": recipe.sampling.settings(),
        "search": recipe.search.settings(),
    }
    filled = {table: {**defaults.get(table, {}), **settings} for table, settings in given.items()}
    made = Plan(recipe.override(**filled), Path(out))
    made.methods  # noqa: B018  (mistakes in methods are told before anything is loaded)
    return made


def described(s: Strategy) -> dict[str, Any]:
    """A strategy's settings, without its one-line summary."""
    from dataclasses import asdict

    return {k: v for k, v in asdict(s).items() if k != "summary"}


def _expanded(given: MethodConfig, recipe: Recipe) -> list[Method]:
    if given.method != COMBINATIONS:
        return [Method(given.label, strategy(given.method, **given.settings()))]
    settings = {**recipe.search.settings(), **given.settings()}
    sizes = {"width": 4, "successors": 4, "chunk_length": 5} | {k: settings[k] for k in _SIZES if k in settings}
    guiding = {k: settings[k] for k in _GUIDING if k in settings}
    rows = []
    for token in _VALUES:
        for select in _VALUES:
            chosen: dict[str, Any] = {"token": token, "select": select}
            chosen |= guiding if token != "none" else {}
            chosen |= sizes if select != "none" else {}
            rows.append(Method(f"{token}×{select}", strategy("custom", **chosen)))
    return rows
