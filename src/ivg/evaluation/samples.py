"""What a reader compares: the same prompts answered by all methods, side by side. Knows scored files; not figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ivg.evaluation.plan import GOLD, EvalPlan
from ivg.evaluation.score import read_scored
from ivg.models.chat_template import prompt_text

SHOWN = 8
"""Prompts in the report: the first ones, so that nothing is picked."""


@dataclass(frozen=True)
class Cell:
    """One method's answer: text, gold reward where there is one, or why there is no answer."""

    label: str
    text: str
    gold: float | None
    error: str | None


@dataclass(frozen=True)
class Sample:
    """One prompt with a human's (or another model's) answer, and those of all methods."""

    id: str
    prompt: str
    reference: str | None
    cells: tuple[Cell, ...]

    def markdown(self) -> str:
        """As a list; line breaks within texts are shown as such."""
        lines = [f"**{_flat(self.prompt)}**", ""]
        lines += [f"- reference: {_flat(self.reference)}"] if self.reference is not None else []
        for c in self.cells:
            score = f" ({c.gold:+.2f})".replace("-", "−") if c.gold is not None else ""
            lines.append(f"- `{c.label}`{score}: " + (f"*{_flat(c.error)}*" if c.error else _flat(c.text)))
        return "\n".join(lines)


def samples(p: EvalPlan, labels: Sequence[str]) -> list[Sample]:
    """The first :data:`SHOWN` prompts, answered by every method with the first seed."""
    first = p.recipe.run.seed
    found: dict[str, list[Cell]] = {}
    gold = GOLD in p.judges
    for label in labels:
        for row, judged in read_scored(p, label)[:SHOWN]:
            if row["seed"] == first:
                score = judged.get(GOLD) if gold else None
                found.setdefault(row["id"], []).append(Cell(label, row["text"], score, row.get("error")))
    return [Sample(e.id, prompt_text(e.prompt), e.reference, tuple(found[e.id])) for e in p.examples[:SHOWN] if e.id in found]


def _flat(text: str | None) -> str:
    """One line, safe in Markdown."""
    flat = " ⏎ ".join(line.strip() for line in (text or "").strip().splitlines())
    for sign in "\\`*_[]<>":
        flat = flat.replace(sign, "\\" + sign)
    return flat
