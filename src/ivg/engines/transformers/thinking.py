"""Thinking in the transformers engine: which rows are guided, what their guides read, and which tokens are forced."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ivg.errors import ConfigError
from ivg.models.vocabulary import Vocabulary
from ivg.types import ExpandRequest, Thinking


def marker_ids(vocabulary: Vocabulary, marker: str) -> list[int]:
    """The tokens that write ``marker``.

    Raises:
        ConfigError: none do: it has special tokens, which responses do not show, or the tokenizer changes it.
    """
    ids = vocabulary.response_ids((), marker)
    if set(ids) & vocabulary.special:
        raise ConfigError(
            f"guide_after {marker!r} has special tokens, which the text of a response leaves out\n  expected a text that responses show"
        )
    if not ids or marker not in vocabulary.decode(ids):
        raise ConfigError(f"guide_after {marker!r} cannot be written by the base's tokenizer\n  expected a text that its tokens spell")
    return ids


def is_guided(request: ExpandRequest, node: Any) -> bool:
    """Is the next token behind ``node`` guided?"""
    return request.guidance is not None and request.guidance.beta != 0 and node.answer_start is not None


def forced_token(vocabulary: Vocabulary, thinking: Thinking | None, node: Any) -> int | None:
    """The next token behind ``node``, where its budget of thinking is spent: the marker's, one after the other; None: any."""
    if thinking is None or thinking.thinking_budget is None or node.answer_start is not None:
        return None
    place = len(node.token_ids) - thinking.thinking_budget
    ids = marker_ids(vocabulary, thinking.guide_after) if place >= 0 else []
    return ids[place] if 0 <= place < len(ids) else None


def force(logits: Tensor, forced: Sequence[int | None]) -> Tensor:
    """A copy of ``logits`` [rows, vocabulary] in which only the forced tokens can be drawn; itself where there are none."""
    rows = [(row, token) for row, token in enumerate(forced) if token is not None]
    if not rows:
        return logits
    out = logits.clone()
    for row, token in rows:
        out[row] = -math.inf
        out[row, token] = 0.0
    return out
