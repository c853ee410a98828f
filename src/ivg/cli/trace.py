"""``--trace``: the search tree of some completions as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivg.utils.templates import render

if TYPE_CHECKING:
    from ivg.types import Completion, TraceNode


def write_trace(path: Path, answers: Sequence[tuple[str, Completion]], method: str) -> None:
    """Write the page of (prompt, completion) pairs whose requests had ``trace=True``."""
    data = {"method": method, "answers": [_answer(prompt, completion) for prompt, completion in answers]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render("ivg.cli", "trace.html.jinja", data=data), encoding="utf-8")


def _answer(prompt: str, completion: Completion) -> dict[str, Any]:
    rounds = []
    seen: dict[int, int] = {}
    for step in completion.trace:
        rounds.append([trace_node(node, seen) for node in sorted((*step.kept, *step.dropped), key=lambda n: -(n.score or 0.0))])
        seen |= {node.key: len(node.tokens) for node in step.kept}
    return {"prompt": prompt, "text": completion.text, "score": completion.score, "rounds": rounds}


def trace_node(node: TraceNode, seen: dict[int, int]) -> dict[str, Any]:
    """One node with the tokens of its own chunk; the parent's are shown at the parent."""
    parent_end = 0 if node.parent is None else seen.get(node.parent, 0)
    begin = seen.get(node.key, parent_end)
    return {
        "id": node.key,
        "parent": node.parent,
        "score": None if node.score is None else round(node.score, 4),
        "kept": node.kept,
        "finish": node.finish,
        "tokens": [[text, round(shift, 3)] for text, shift in zip(node.tokens[begin:], node.guide_shift[begin:], strict=True)],
    }
