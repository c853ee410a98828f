"""Server-sent events. Text is sent as soon as all beams of the request share it, and never taken back.

Committed text only grows (``search.searcher``), which also holds back partial stop strings and partial characters. Independent of HTTP.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ivg.errors import ServeError
from ivg.serving.errors import error_body
from ivg.serving.requests import Progress
from ivg.serving.responses import ChoiceState, Delta, ResponseBuilder, clamp, finite_or_none
from ivg.types import TraceNode

DONE = b"data: [DONE]\n\n"


class EventEncoder(ABC):
    """Encodes a response as server-sent events."""

    def start(self) -> Iterator[bytes]:
        """As soon as the request is accepted; default: nothing."""
        return iter(())

    @abstractmethod
    def update(self, progress: Progress) -> Iterator[bytes]:
        """The events for ``progress``."""

    @abstractmethod
    def finish(self) -> Iterator[bytes]:
        """After the last choice."""

    @abstractmethod
    def fail(self, error: ServeError) -> Iterator[bytes]:
        """An error in the middle of the stream, and its end."""


class StreamEncoder(EventEncoder):
    """Encodes one response as server-sent events.

    Args:
        builder: builds the JSON objects.
        usage: end with a chunk of usage.
        beams: send the events ``ivg.beams`` and ``ivg.tokens``.
        continuous_usage: add the usage so far to every chunk.
    """

    def __init__(self, builder: ResponseBuilder, *, usage: bool, beams: bool, continuous_usage: bool = False) -> None:
        self.builder, self.with_usage, self.beams, self.continuous_usage = builder, usage, beams, continuous_usage
        self.choices = [ChoiceState(i) for i in range(len(builder.batch.requests))]
        self._opening = list(self._begin())
        """Events that wait for the first text."""

    def _begin(self) -> Iterator[bytes]:
        """Before the first text: the role, for chats; the prompts, where they are echoed.

        Not earlier: clients that measure (vLLM's benchmark, say) take the first chunk for the first token.
        """
        if self.builder.chat:
            for c in self.choices:
                choice = {"index": c.index, "finish_reason": None, "logprobs": None, "delta": {"role": "assistant", "content": ""}}
                yield encode_event(self._chunk([choice]))
        for c in self.choices:
            if (prompt := self.builder.echo_delta(c.index)) is not None:
                c.echoed = len(prompt["text"])
                yield encode_event(self._chunk([prompt]))

    def update(self, progress: Progress) -> Iterator[bytes]:
        """The events for ``progress``."""
        if events := list(self._update(progress)):
            yield from self._opening
            self._opening = []
        yield from events

    def _update(self, progress: Progress) -> Iterator[bytes]:
        state, completion, builder = self.choices[progress.index], progress.completion, self.builder
        if self.beams and (progress.kept or progress.dropped):
            yield encode_event(self._beams(state, progress), "ivg.beams")
        text = progress.committed
        assert text.startswith(state.text), "committed text was taken back"
        offset = state.echoed + state.characters
        state.length = progress.tokens if completion is None else completion.usage.completion_tokens
        tokens = state.take_tokens(progress.details, len(text), final=completion is not None)
        state.text = text
        new = builder.take_delta(state, final=completion is not None)
        if self.beams and tokens:
            yield encode_event({"index": state.index, "tokens": builder.guided_tokens(tokens)}, "ivg.tokens")
        if new.content or new.thinking or (tokens and builder.top_logprobs is not None):
            yield encode_event(self._chunk([builder.delta(state.index, replace(new, calls=()), tokens, offset)]))
        for call in new.calls:  # one in each chunk, as OpenAI sends them
            yield encode_event(self._chunk([builder.delta(state.index, Delta(calls=(call,)))]))
        if completion is not None:
            state.completion = completion
            last = builder.delta(state.index, Delta(), finish=builder.finish_reason(completion, state.parts))
            if not state.tokens and builder.echoed(state.index) is None:
                last["logprobs"] = builder.logprobs([], 0)  # of an answer without tokens, as of a whole one
            yield encode_event(self._chunk([last]) | {"ivg": builder.ivg_object([completion]) | {"index": state.index}})

    def finish(self) -> Iterator[bytes]:
        """After the last choice."""
        if self.with_usage:
            usage = self.builder.usage([c.completion for c in self.choices if c.completion is not None])
            yield encode_event(self.builder.envelope([], stream=True) | {"usage": usage})
        yield DONE

    def fail(self, error: ServeError) -> Iterator[bytes]:
        """An error in the middle of the stream, and its end."""
        yield encode_event(error_body(error))
        yield DONE

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": self.builder.usage_so_far(sum(c.length for c in self.choices))} if self.continuous_usage else {}
        return self.builder.envelope(choices, stream=True) | usage

    @staticmethod
    def _beams(state: ChoiceState, progress: Progress) -> dict[str, Any]:
        step = state.selections
        state.selections += 1
        kept, dropped = ([_beam(state, n) for n in nodes] for nodes in (progress.kept, progress.dropped))
        return {"index": state.index, "step": step, "committed": progress.committed, "kept": kept, "dropped": dropped}


def _beam(state: ChoiceState, node: TraceNode) -> dict[str, Any]:
    """``parent`` is None where it is the prompt."""
    return {
        "key": state.beam_numbers.setdefault(node.key, len(state.beam_numbers)),
        "parent": None if node.parent is None else state.beam_numbers.get(node.parent),
        "text": node.text,
        "tokens": list(node.tokens),
        "shift": [clamp(s) for s in node.guide_shift],
        "score": finite_or_none(node.score),
        "finish": node.finish,
    }


def encode_event(data: dict[str, Any], name: str | None = None) -> bytes:
    """One server-sent event."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()
