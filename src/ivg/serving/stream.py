"""Server-sent events: text as soon as all live beams share it, never taken back; beams and tokens for whoever watches.

What is committed only grows (``search.searcher``); stop strings and halves of characters are held back there. Knows the wire, not
HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ivg.errors import ServeError
from ivg.serving.requests import Progress
from ivg.serving.responses import Answer, ResponseBuilder, error_body, finite, known
from ivg.types import TraceNode

DONE = b"data: [DONE]\n\n"


class Stream:
    """The events of one response.

    Args:
        form: how its objects look.
        usage: end with a chunk of usage.
        counts: usage so far in every chunk.
        beams: send ``ivg.beams`` and ``ivg.tokens`` too.
    """

    def __init__(self, form: ResponseBuilder, *, usage: bool, beams: bool, counts: bool = False) -> None:
        self.form, self.with_usage, self.beams, self.counts = form, usage, beams, counts
        self.answers = [Answer(i) for i in range(len(form.order.requests))]
        self._steps = [0] * len(self.answers)
        self._tokens = [0] * len(self.answers)

    @property
    def over(self) -> bool:
        """Has every answer ended?"""
        return all(a.completion is not None for a in self.answers)

    def opening(self) -> Iterator[bytes]:
        """Before any text: in a chat, who speaks."""
        if self.form.chat:
            for a in self.answers:
                choice = {"index": a.index, "finish_reason": None, "logprobs": None, "delta": {"role": "assistant", "content": ""}}
                yield event(self._chunk([choice]))

    def take(self, progress: Progress) -> Iterator[bytes]:
        """The events that ``progress`` makes."""
        answer, completion = self.answers[progress.index], progress.completion
        if self.beams and (progress.kept or progress.dropped):
            yield event(self._board(answer, progress), "ivg.beams")
        text = progress.committed
        assert text.startswith(answer.text), "committed text was taken back"
        new, offset = text[len(answer.text) :], answer.covered
        self._tokens[progress.index] = progress.tokens if completion is None else completion.usage.completion_tokens
        tokens = answer.take(progress.details, len(text), final=completion is not None)
        answer.text = text
        if self.beams and tokens:
            yield event({"index": answer.index, "tokens": self.form.looks(tokens)}, "ivg.tokens")
        if new or (tokens and self.form.alternatives is not None):
            yield event(self._chunk([self.form.delta(answer.index, new, tokens, offset)]))
        if completion is not None:
            answer.completion = completion
            last = self.form.delta(answer.index, "", (), offset, completion.finish_reason)
            yield event(self._chunk([last]) | {"ivg": self.form.ours([completion]) | {"index": answer.index}})

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": self.form.counts(sum(self._tokens))} if self.counts else {}
        return self.form.envelope(choices, stream=True) | usage

    def closing(self) -> Iterator[bytes]:
        """Behind the last answer."""
        if self.with_usage:
            usage = self.form.usage([a.completion for a in self.answers if a.completion is not None])
            yield event(self.form.envelope([], stream=True) | {"usage": usage})
        yield DONE

    @staticmethod
    def failure(error: ServeError) -> Iterator[bytes]:
        """An error in the middle: its object, and the end."""
        yield event(error_body(error))
        yield DONE

    def _board(self, answer: Answer, progress: Progress) -> dict[str, Any]:
        step = self._steps[answer.index]
        self._steps[answer.index] += 1
        kept, dropped = ([self._node(answer, n) for n in nodes] for nodes in (progress.kept, progress.dropped))
        return {"index": answer.index, "step": step, "committed": progress.committed, "kept": kept, "dropped": dropped}

    @staticmethod
    def _node(answer: Answer, node: TraceNode) -> dict[str, Any]:
        """Beams are numbered as they appear; one whose parent is the prompt has none."""
        return {
            "key": answer.numbers.setdefault(node.key, len(answer.numbers)),
            "parent": None if node.parent is None else answer.numbers.get(node.parent),
            "text": node.text,
            "tokens": list(node.tokens),
            "shift": [finite(s) for s in node.guide_shift],
            "score": known(node.score),
            "finish": node.finish,
        }


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """One server-sent event."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()
