"""What one evaluation consists of: methods, prompts, judges, files. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ivg.errors import ConfigError
from ivg.evaluation import methods
from ivg.evaluation.methods import BASE_SAMPLES, MethodRow, method_settings
from ivg.evaluation.task import Example, Task, digest, load_task
from ivg.factory.recipe import default_sampling
from ivg.jobs.fingerprints import fingerprints, weight_fingerprints
from ivg.jobs.provenance import device_kind, model_settings, run_provenance
from ivg.settings.eval import EMBEDDED_GOLD
from ivg.settings.recipe import EvalConfig, Recipe, RewardRef
from ivg.types import SamplingParams
from ivg.utils.version import VERSION

GOLD = "gold"


@dataclass(frozen=True)
class EvalPlan:
    """One evaluation.

    Args:
        recipe: with the task's defaults filled in (:func:`make_plan`).
        out: folder of all its files.
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
        return load_task(self.config.task)

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
    def examples_by_id(self) -> dict[str, Example]:
        """The prompts by id."""
        return {e.id: e for e in self.examples}

    @cached_property
    def method_rows(self) -> tuple[MethodRow, ...]:
        """The methods that are compared, plain base sampling among them.

        Raises:
            ConfigError: see :func:`ivg.evaluation.methods.method_rows`.
        """
        return methods.method_rows(self.recipe, self.task.defaults().get("search", {}))

    @property
    def base_row(self) -> MethodRow:
        """Plain base sampling, which the others are compared with."""
        return next(m for m in self.method_rows if m.is_base)

    @property
    def judges(self) -> dict[str, RewardRef]:
        """The gold reward and the further judges, gold first; the embedded models have an embedded gold reward."""
        gold = self.config.gold
        if gold is None and not self.recipe.models.given:
            gold = RewardRef(path=EMBEDDED_GOLD)
        return ({GOLD: gold} if gold is not None else {}) | self.config.judges

    @property
    def labels(self) -> list[str]:
        """All labels with transcripts: the methods, and the base samples where the recipe asks for some."""
        return [m.label for m in self.method_rows] + ([BASE_SAMPLES] if self.config.base_samples else [])

    def method_row(self, label: str) -> MethodRow:
        """The method called ``label``."""
        return next(m for m in self.method_rows if m.label == label)

    @cached_property
    def sampling(self) -> SamplingParams:
        """Sampling settings of every method: the recipe's, else the defaults of the recipe's model."""
        return replace(default_sampling(self.recipe), **self.recipe.sampling.settings())

    def block_size(self, label: str) -> int:
        """Rows of each block of a label's transcripts; they are computed and written together."""
        batch = self.recipe.run.batch_size
        return max(1, batch * 4 // self.config.base_samples) if label == BASE_SAMPLES else batch

    @property
    def total(self) -> int:
        """Answers of each method."""
        return self.config.seeds * len(self.examples)

    def items(self, positions: range) -> Iterator[tuple[int, int, Example]]:
        """(seed, position of the example, example) of these rows: all prompts with the first seed, then with the next."""
        for i in positions:
            seed, position = divmod(i, len(self.examples))
            yield self.recipe.run.seed + seed, position, self.examples[position]

    def transcripts(self, label: str) -> Path:
        """The file of a method's answers."""
        return self.out / "transcripts" / f"{label}.jsonl"

    def scores(self, label: str) -> Path:
        """The file of the scores of a method's answers."""
        return self.out / "scores" / f"{label}.jsonl"

    @property
    def timings(self) -> Path:
        """The log of seconds, memory and run metadata."""
        return self.out / "timings.jsonl"

    def provenance(self, label: str) -> dict[str, Any]:
        """Everything that a method's answers depend on. The number of seeds is left out, so seeds can be added to a run."""
        run = self.recipe.run
        common: dict[str, Any] = {
            "ivg": VERSION,
            "weights": self._model_fingerprints,
            "task": self.config.task,
            "prompts": len(self.examples),
            "examples": digest(self.examples),
            "models": {role: {"path": ref.path, **model_settings(ref)} for role, ref in self.recipe.models.given.items()} or "embedded",
            "sampling": self.recipe.sampling.settings(),
            "seed": run.seed,
            "device": device_kind(self.recipe),
            **run_provenance(self.recipe),
            "threads": self.config.threads,
        }
        if self.recipe.values:
            common["values"] = {
                name: {role: {"path": ref.path, **model_settings(ref)} for role, ref in value.given.items()}
                for name, value in self.recipe.values.items()
            }
        if label == BASE_SAMPLES:
            return {**common, "base_samples": self.config.base_samples}
        return {**common, "label": label, "method": method_settings(self.method_row(label).method)}

    @cached_property
    def _model_fingerprints(self) -> dict[str, str]:
        return weight_fingerprints(self.recipe)

    @cached_property
    def judged_prompts(self) -> str | None:
        """Fingerprint of what judges read of the prompts; None: the prompts themselves."""
        judged = [replace(e, prompt=self.task.judged(e, "")[0]) for e in self.examples]
        mark = digest(judged)
        return None if mark == digest(self.examples) else mark

    @cached_property
    def judge_fingerprints(self) -> dict[str, str]:
        """Fingerprints of those judges that are on this machine."""
        return fingerprints(self.judges)


def make_plan(recipe: Recipe, out: str | Path) -> EvalPlan:
    """The evaluation that ``recipe`` describes, with the task's defaults where the recipe has none.

    Raises:
        ConfigError: unknown task or method; a method whose value is missing or is the gold reward; an engine other than transformers.
    """
    if recipe.run.engine != "transformers":  # the score stage needs the base's own log-probabilities
        raise ConfigError(f"ivg eval needs the engine transformers, got run.engine = {recipe.run.engine!r}\n  leave engine out of [run]")
    sampling = {**load_task(recipe.eval.task).defaults().get("sampling", {}), **recipe.sampling.settings()}
    plan = EvalPlan(recipe.override(sampling=sampling), Path(out))
    labels = [m.label for m in plan.method_rows]
    if recipe.eval.compare_to not in (None, *labels):
        raise ConfigError(f"eval.compare_to is {recipe.eval.compare_to!r}\n  expected one of: {', '.join(labels)}")
    methods.check_no_leakage(plan.judges.get(GOLD), recipe, plan.method_rows)  # before any model is loaded
    return plan
