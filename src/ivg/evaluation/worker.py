"""One process of an evaluation: its models and judges, loaded once, when they are first needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from ivg.evaluation.plan import EvalPlan
from ivg.utils import environment
from ivg.utils.jsonl import append_lines, as_lines, write_json

if TYPE_CHECKING:
    from ivg.model import GuidedModel
    from ivg.types import Reward

OnProgress = Callable[[str, int], None]
"""Called with a label and the number of its rows that were finished."""


class Worker:
    """Models and judges of one process.

    Args:
        plan: of the evaluation.
    """

    def __init__(self, plan: EvalPlan) -> None:
        self.plan = plan
        self._recorded: set[str] = set()
        if plan.config.threads is not None:
            import torch

            torch.set_num_threads(plan.config.threads)

    @cached_property
    def model(self) -> GuidedModel:
        """Base and values; their parameter counts are written to ``models.json``."""
        from ivg.diagnostics.cost import parameters
        from ivg.factory.recipe import load_models

        model = load_models(self.plan.recipe)
        write_json(self.plan.out / "models.json", {"parameters": parameters(model)})
        return model

    @cached_property
    def judges(self) -> dict[str, Reward]:
        """The gold reward and the other judges by name.

        They are loaded in float32 unless the recipe names a dtype. What ``[run]`` says of revision and quantization does not apply to them.

        Raises:
            ModelError: a judge that cannot be loaded.
        """
        from dataclasses import replace

        from ivg.factory.recipe import load_options
        from ivg.factory.values import prompt_template
        from ivg.values.reward import load_reward

        options = load_options(self.plan.recipe)
        options = replace(options, dtype="float32" if options.dtype == "auto" else options.dtype, revision=None, quantization=None)
        return {
            name: load_reward(ref.path, template=prompt_template(ref), label=ref.label, options=options.of(ref), name=name)
            for name, ref in self.plan.judges.items()
        }

    def record_metadata(self, stage: str) -> None:
        """Write commit, command and machine of this process to ``timings.jsonl``, once for each stage."""
        if stage not in self._recorded:
            self._recorded.add(stage)
            append_lines(self.plan.timings, as_lines([{"stage": stage, "made": environment.run_metadata()}]))
