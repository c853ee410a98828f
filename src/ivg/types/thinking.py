"""Responses that begin with thinking: where their answer begins, and the answer as a hypothesis of its own. Standard library only.

Reasoning models write their thoughts, a marker such as ``</think>``, and the answer. Guidance and values begin behind the marker
(docs/how-to/chats.md). The answer's tokens begin with the one after the token that completes the marker.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from ivg.settings.schema import validate
from ivg.settings.search import SearchSettings
from ivg.types.beam import DecodeState, FinishReason, TokenCounter
from ivg.types.messages import Prompt


@dataclass(frozen=True, slots=True)
class Thinking:
    """That responses begin with thinking.

    Attributes:
        guide_after: the marker, which is text: behind its first place in the response the answer begins.
        thinking_budget: after so many tokens without the marker its tokens are forced; None: never.
        values_read: ``answer``: guides and values read the prompt and the answer, as if nothing had been thought; ``all``: the whole
            response. Either way they do so only once the answer has begun.
    """

    guide_after: str
    thinking_budget: int | None = SearchSettings.thinking_budget
    values_read: Literal["answer", "all"] = SearchSettings.values_read

    def __post_init__(self) -> None:
        validate(self, SearchSettings)


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of a hypothesis as a hypothesis: without the tokens and the text before it."""

    key: int
    parent: int | None
    ancestor_key: int | None
    prompt: Prompt
    token_ids: tuple[int, ...]
    text: str
    finish: FinishReason | None
    token_counter: TokenCounter
    vocabulary: Any
    inherits: bool
    decoded: DecodeState
    stop_token_ids: tuple[int, ...]


def answer_of(h: Any, thinking: Thinking | None) -> Any:
    """What values read of ``h``, a beam or a sequence whose answer has begun."""
    start = h.answer_start
    if thinking is None or thinking.values_read == "all" or not start:
        return h
    text = h.text[h.answer_text :]  # first: it decodes
    decoded = replace(h.decoded, tokens=h.decoded.tokens - start)
    return Answer(
        h.key,
        h.parent,
        h.ancestor_key,
        h.prompt,
        tuple(h.token_ids[start:]),
        text,
        h.finish,
        h.token_counter,
        h.vocabulary,
        h.inherits,
        decoded,
        h.stop_token_ids,
    )


def split_reasoning(text: str, marker: str, *, final: bool = True) -> tuple[str, str | None]:
    """(the thinking, the answer) of a response that begins with thinking; the answer is None where it has not begun.

    A tag at the beginning that the marker closes (``<think>`` of ``</think>``) is left out, as vLLM's reasoning parsers do.

    Args:
        text: of the response so far.
        marker: between the two.
        final: nothing follows. Otherwise an ending that might become the marker, and a beginning that might become the tag, are held back.
    """
    thinking, found, answer = text.partition(marker)
    if not found and not final:
        held = max((n for n in range(1, len(marker)) if thinking.endswith(marker[:n])), default=0)
        thinking = thinking[: len(thinking) - held]
    closing = marker.strip()
    opening = f"<{closing[2:]}" if closing.startswith("</") and closing.endswith(">") else ""
    if opening:
        begun = thinking.lstrip()
        if begun.startswith(opening):
            thinking = begun.removeprefix(opening)
        elif not found and not final and opening.startswith(begun):
            thinking = ""
    return thinking, answer if found else None
