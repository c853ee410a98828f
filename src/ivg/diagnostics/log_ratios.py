"""Given texts read by several models side by side: logits of a block of response tokens at a time.

Knows: readers, what a value adds to the base's logits. Must not know what is measured on them. Nothing larger than
:data:`BLOCK` x vocabulary exists at a time for each model, whatever the length of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ivg.models.cached_lm import CachedLM
from ivg.types import Beam, Prompt, Value, new_key
from ivg.types.guides import VocabularyValue
from ivg.values.base import CompositeValue
from ivg.values.explicit import ExplicitValue
from ivg.values.implicit import AutoregressiveReward, ImplicitValue

BLOCK = 64
"""Response tokens whose logits exist at the same time."""


def written(base: CachedLM, prompt: Prompt, text: str, token_ids: Sequence[int] | None = None, *, ends: bool = False) -> Beam:
    """A hypothesis of a text that is there already, in the base's tokens.

    Args:
        base: whose tokens.
        prompt: what was answered.
        text: the response.
        token_ids: its tokens where they are known, else the tokenizer's.
        ends: an end-of-sequence token belongs behind it.
    """
    prompt = base.own(prompt)
    ids = tuple(base.vocabulary.response_ids(base.prompt_ids(prompt), text) if token_ids is None else token_ids)
    if ends and base.vocabulary.eos_ids:
        ids += (end_token(base),)
    return Beam(new_key(), None, prompt, ids, text, "stop" if ends else None, vocabulary=base.vocabulary, inherits=False)


def end_token(base: CachedLM) -> int:
    """The id that closes a response: the tokenizer's own where the model has several."""
    own = base.tokenizer.eos_token_id
    return own if own in base.vocabulary.eos_ids else min(base.vocabulary.eos_ids)


def response_logits(reader: CachedLM, beam: Beam, block: int = BLOCK) -> Iterator[Tensor]:
    """Logits that predict each response token, in pieces float32 [<= block, vocabulary], in order."""
    ids, border = reader.ids(beam)
    row = reader.model.open(ids[:border])
    try:
        if unread := ids[len(row.ids) : border - 1]:
            list(reader.model.forward([row], [unread], [0]))
        for start in range(border - 1, len(ids) - 1, block):
            new = ids[start : min(start + block, len(ids) - 1)]
            yield torch.cat([piece for _, piece in reader.model.forward([row], [new], [len(new)])]).float()
    finally:
        reader.model.free(row)


@dataclass(frozen=True)
class Shift:
    """What token guidance by ``value`` adds to the base's logits, as a sum of ``weight * logits`` of readers.

    Shifts that are the same for all tokens are left out: no distribution changes by them.
    """

    parts: tuple[tuple[float, CachedLM], ...]
    width: int

    @classmethod
    def of(cls, value: Value | None, base: CachedLM) -> Shift | None:
        """None where the value cannot shift the base's whole vocabulary, or is of a kind that cannot be taken apart."""
        parts = _parts(value)
        if parts is None or not isinstance(value, VocabularyValue) or any(not r.vocabulary.same_as(base.vocabulary) for _, r in parts):
            return None
        return cls(tuple(parts), value.vocabulary.size)

    def blocks(self, base: CachedLM, beam: Beam) -> Iterator[tuple[Tensor, Tensor]]:
        """(base's logits, shift) of the response's tokens, float32 [<= BLOCK, base's vocabulary] each, on the base's device."""
        readings = [response_logits(reader, beam) for _, reader in self.parts]
        for logits in response_logits(base, beam):
            pieces = [(weight, next(reading).to(logits.device)) for (weight, _), reading in zip(self.parts, readings, strict=True)]
            width = min(self.width, logits.shape[1], *(p.shape[1] for _, p in pieces))
            shift = torch.zeros_like(logits)  # columns beyond the guide's vocabulary keep the base's logits
            for weight, piece in pieces:
                shift[:, :width] += weight * piece[:, :width]
            yield logits, shift


def _parts(value: Value | None) -> list[tuple[float, CachedLM]] | None:
    if isinstance(value, CompositeValue):
        out: list[tuple[float, CachedLM]] = []
        for weight, part in value.parts:
            inner = _parts(part)
            if inner is None:
                return None
            out += [(weight * w, reader) for w, reader in inner]
        return out
    if isinstance(value, ImplicitValue):
        return [(1.0, value.tuned), (-1.0, value.untuned)]
    if isinstance(value, AutoregressiveReward) or (isinstance(value, ExplicitValue) and value.full_vocabulary()):
        return [(1.0, value.model)]
    return None
