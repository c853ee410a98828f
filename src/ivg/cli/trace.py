"""``--trace``: the tree of beams of some completions as one HTML page that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivg.utils.jsonl import to_json

if TYPE_CHECKING:
    from ivg.types import Completion, TraceNode


def write_trace(path: Path, answers: Sequence[tuple[str, Completion]], method: str) -> None:
    """Write (prompt, completion) pairs; completions must have been asked for with ``trace=True``."""
    page = (Path(__file__).parent / "trace.html").read_text(encoding="utf-8")
    data = {"method": method, "answers": [_answer(prompt, completion) for prompt, completion in answers]}
    safe = to_json(data).replace("</", "<\\/")  # a text must not end the script that carries it
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page.replace("/*DATA*/", safe), encoding="utf-8")


def _answer(prompt: str, completion: Completion) -> dict[str, Any]:
    rounds = []
    seen: dict[int, int] = {}
    for step in completion.trace:
        nodes = []
        for node in sorted((*step.kept, *step.dropped), key=lambda n: -(n.score or 0.0)):
            nodes.append(_node(node, seen))
        for node in step.kept:
            seen[node.key] = len(node.tokens)
        rounds.append(nodes)
    return {"prompt": prompt, "text": completion.text, "score": completion.score, "rounds": rounds}


def _node(node: TraceNode, seen: dict[int, int]) -> dict[str, Any]:
    """Only the chunk's own tokens: what the parent had already is shown there."""
    begin = seen.get(node.key, seen.get(node.parent or -1, 0))
    return {
        "id": node.key,
        "parent": node.parent,
        "score": None if node.score is None else round(node.score, 4),
        "kept": node.kept,
        "finish": node.finish,
        "tokens": [[text, round(shift, 3)] for text, shift in zip(node.tokens[begin:], node.guide_shift[begin:], strict=True)],
    }
