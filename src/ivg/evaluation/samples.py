"""The first prompts of a run answered by all methods, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ivg.evaluation.plan import GOLD, EvalPlan
from ivg.evaluation.score import read_scored
from ivg.models.chat_template import prompt_text

MAX_SAMPLES = 8


@dataclass(frozen=True)
class SampleAnswer:
    """One method's answer: text, gold reward (None without one), error (None if there is an answer)."""

    label: str
    text: str
    gold: float | None
    error: str | None


@dataclass(frozen=True)
class Sample:
    """One prompt with its reference answer (None without one) and the answers of all methods."""

    id: str
    prompt: str
    reference: str | None
    answers: tuple[SampleAnswer, ...]


def samples(plan: EvalPlan, labels: Sequence[str]) -> list[Sample]:
    """The first :data:`MAX_SAMPLES` prompts, answered by every method with the first seed."""
    answers: dict[str, list[SampleAnswer]] = {}
    for label in labels:
        for row, scores in read_scored(plan, label)[:MAX_SAMPLES]:
            if row["seed"] == plan.recipe.run.seed:
                gold = scores.get(GOLD) if GOLD in plan.judges else None
                answers.setdefault(row["id"], []).append(SampleAnswer(label, row["text"], gold, row.get("error")))
    return [Sample(e.id, prompt_text(e.prompt), e.reference, tuple(answers[e.id])) for e in plan.examples[:MAX_SAMPLES] if e.id in answers]
