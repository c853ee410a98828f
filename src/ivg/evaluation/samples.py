"""Answers of all methods side by side: the first prompts of a run in the report, more of them in ``samples.md`` and ``samples.html``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ivg.evaluation.plan import GOLD, EvalPlan
from ivg.evaluation.score import read_scored
from ivg.models.chat_template import prompt_text

IN_REPORT = 8
MAX_SAMPLES = 50


@dataclass(frozen=True)
class SampleAnswer:
    """One method's answer.

    Attributes:
        label: of the method.
        text: of the answer.
        gold: gold reward; None without one.
        error: why there is no answer; None if there is one.
        scores: rewards by judge, gold among them.
    """

    label: str
    text: str
    gold: float | None
    error: str | None
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One prompt with its reference answer (None without one) and the answers of all methods."""

    id: str
    prompt: str
    reference: str | None
    answers: tuple[SampleAnswer, ...]


def samples(plan: EvalPlan, labels: Sequence[str], count: int = MAX_SAMPLES) -> list[Sample]:
    """The first ``count`` prompts, answered by every method with the first seed: the base first, then in the order of ``labels``."""
    base = plan.base_row.label
    answers: dict[str, list[SampleAnswer]] = {}
    for label in (base, *(label for label in labels if label != base)):
        for row, found in read_scored(plan, label)[:count]:
            if row["seed"] == plan.recipe.run.seed:
                scores = {judge: found[judge] for judge in plan.judges if judge in found}
                answer = SampleAnswer(label, row["text"], scores.get(GOLD), row.get("error"), scores)
                answers.setdefault(row["id"], []).append(answer)
    return [Sample(e.id, prompt_text(e.prompt), e.reference, tuple(answers[e.id])) for e in plan.examples[:count] if e.id in answers]
