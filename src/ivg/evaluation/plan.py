"""What one evaluation consists of: which rows, which prompts, which file holds what. The same for all stages.

Knows: the recipe, the task, the folder of the run. Must not know models; imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ivg.errors import ConfigError
from ivg.evaluation import methods
from ivg.evaluation.methods import BANK, MethodRow, described
from ivg.evaluation.task import Example, Task, digest, task
from ivg.factory.recipe import default_sampling
from ivg.jobs.provenance import device_kind, fingerprints, of_run, weights
from ivg.settings.recipe import EvalConfig, Recipe, RewardRef
from ivg.types import SamplingParams
from ivg.utils.version import VERSION

GOLD = "gold"


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
    def methods(self) -> tuple[MethodRow, ...]:
        """The rows, the plain base among them.

        Raises:
            ConfigError: see :func:`ivg.evaluation.methods.rows`.
        """
        return methods.rows(self.recipe, self.task.defaults().get("search", {}))

    @property
    def base(self) -> MethodRow:
        """The row that others are compared with."""
        return next(m for m in self.methods if m.plain)

    @property
    def judges(self) -> dict[str, RewardRef]:
        """Where gold and the further judges are, gold first; the package's own gold for the embedded models."""
        gold = self.config.gold
        if gold is None and not self.recipe.models.given:
            gold = RewardRef(path="embedded:gold")
        return ({GOLD: gold} if gold is not None else {}) | self.config.judges

    @property
    def labels(self) -> list[str]:
        """All labels with transcripts: the rows, and the bank where there is one."""
        return [m.label for m in self.methods] + ([BANK] if self.config.bank else [])

    def method(self, label: str) -> MethodRow:
        """The row called ``label``."""
        return next(m for m in self.methods if m.label == label)

    @cached_property
    def sampling(self) -> SamplingParams:
        """How every method draws; what the recipe leaves out is the default of the recipe's model (``GuidedModel.sampling``)."""
        given = self.recipe.sampling.settings()
        return replace(default_sampling(self.recipe), **given)

    @property
    def block(self) -> int:
        """Prompts for each block of a file: what is computed together and written together."""
        return self.recipe.run.batch_size

    def block_of(self, label: str) -> int:
        """Rows of each block of a label's transcripts; a row of the bank holds many samples."""
        return max(1, self.block * 4 // self.config.bank) if label == BANK else self.block

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
        common: dict[str, Any] = {
            "ivg": VERSION,
            "weights": self._weights,
            "task": self.config.task,
            "prompts": len(self.examples),
            "examples": digest(self.examples),
            "models": {role: ref.model_dump(exclude_none=True) for role, ref in self.recipe.models.given.items()} or "embedded",
            "sampling": self.recipe.sampling.settings(),
            "seed": run.seed,
            "device": device_kind(run.device),
            **of_run(self.recipe),
            "threads": self.config.threads,
        }
        values = getattr(self.recipe, "values", None)
        if values:
            common["values"] = {k: v.model_dump(exclude_none=True) for k, v in values.items()}
        if label == BANK:
            return {**common, "bank": self.config.bank}
        return {**common, "label": label, "strategy": described(self.method(label).strategy)}

    @cached_property
    def _weights(self) -> dict[str, str]:
        return weights(self.recipe)

    @cached_property
    def judge_weights(self) -> dict[str, str]:
        """Fingerprints of gold and judges, as far as they lie on this machine."""
        return fingerprints(self.judges)


def plan(recipe: Recipe, out: str | Path) -> Plan:
    """The evaluation that ``recipe`` describes; the task's settings stand where the recipe is silent.

    Raises:
        ConfigError: unknown task or method; a method without its value, or steered by gold; an engine whose base is not here.
    """
    if recipe.run.engine != "transformers":  # answers are scored by the base's own outputs
        raise ConfigError(
            f"an evaluation scores by the base's outputs, got run.engine = {recipe.run.engine!r}\n  leave engine out of [run]"
        )
    found = task(recipe.eval.task)
    sampling = {**found.defaults().get("sampling", {}), **recipe.sampling.settings()}
    made = Plan(recipe.override(sampling=sampling), Path(out))
    methods.keep_from(made.judges.get(GOLD), recipe, made.methods)  # mistakes in methods are told before anything is loaded
    return made
