"""Logits of given texts under several models side by side, a block of response tokens at a time.

At most :data:`BLOCK` x vocabulary logits exist at a time for each model, whatever the length of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ivg.models.added_tokens import add_known, added_tokens
from ivg.models.cached_lm import CachedLM
from ivg.models.vocabulary import Vocabulary
from ivg.types import Beam, Prompt, Value, new_key
from ivg.values.base import CompositeValue
from ivg.values.explicit import ExplicitValue
from ivg.values.implicit import AutoregressiveReward, ImplicitValue

BLOCK = 64
"""Response tokens whose logits exist at the same time."""


def response_beam(base: CachedLM, prompt: Prompt, text: str, token_ids: Sequence[int] | None = None, *, ends: bool = False) -> Beam:
    """A given response as a hypothesis in the base's tokens.

    Args:
        base: its tokenizer is used.
        prompt: that is answered.
        text: the response.
        token_ids: of the response, if known.
        ends: append the end-of-sequence token.
    """
    prompt = base.own(prompt)
    ids = base.response_ids(base.prompt_ids(prompt), text) if token_ids is None else tuple(token_ids)
    if ends and (end := base.vocabulary.eos_id) is not None:
        ids += (end,)
    return Beam(new_key(), None, prompt, ids, text, "stop" if ends else None, vocabulary=base.vocabulary, inherits=False)


def response_logits(lm: CachedLM, beam: Beam, block: int = BLOCK) -> Iterator[Tensor]:
    """Logits that predict each response token, in order, in pieces float32 [<= block, vocabulary]."""
    ids, border = lm.ids(beam)
    row = lm.open_row(ids[:border])
    try:
        if unread := ids[len(row.ids) : border - 1]:
            list(lm.model.forward([row], [unread], [0]))
        for start in range(border - 1, len(ids) - 1, block):
            new = ids[start : min(start + block, len(ids) - 1)]
            yield torch.cat([piece for _, piece in lm.model.forward([row], [new], [len(new)], lm.head)]).float()
    finally:
        lm.model.free(row)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row, from log-probabilities [..., vocabulary]; tokens with probability 0 under both add nothing."""
    return (log_p.exp() * (log_p - log_q).masked_fill(log_q == -torch.inf, 0.0)).sum(-1)


@dataclass(frozen=True)
class GuidanceLogits:
    """What token guidance by a value adds to the base's logits: a sum of ``weight * logits`` of models.

    Amounts that are equal for all tokens are left out, since they change no distribution.
    """

    parts: tuple[tuple[float, CachedLM], ...]
    width: int
    guide: Vocabulary

    @classmethod
    def from_value(cls, value: Value | None, base: CachedLM) -> GuidanceLogits | None:
        """None if the value cannot guide over the base's whole vocabulary, or is of an unknown class."""
        parts = _parts(value)
        if value is None or parts is None or not value.full_vocabulary():
            return None
        if any(not lm.vocabulary.same_as(base.vocabulary) for _, lm in parts):
            return None
        least = min((lm.vocabulary for _, lm in parts), key=lambda known: known.size)
        return cls(tuple(parts), least.size, least)

    def blocks(self, base: CachedLM, beam: Beam) -> Iterator[tuple[Tensor, Tensor]]:
        """(base's logits, what guidance adds at weight 1), float32 [<= BLOCK, base's vocabulary] each, on the base's device."""
        streams = [response_logits(lm, beam) for _, lm in self.parts]
        for logits in response_logits(base, beam):
            pieces = [(weight, next(stream).to(logits.device)) for (weight, _), stream in zip(self.parts, streams, strict=True)]
            width = min(self.width, logits.shape[1], *(p.shape[1] for _, p in pieces))
            delta = torch.zeros_like(logits)
            for weight, piece in pieces:
                delta[:, :width] += weight * piece[:, :width]
            added = added_tokens(base.vocabulary, self.guide, width, logits.shape[1])
            if added is not None:  # of other tokens than ends it is exact at weight 1
                delta[:, width:] = (add_known(logits.clone(), delta, 1.0, width, added) - logits)[:, width:]
            yield logits, delta


def _parts(value: Value | None) -> list[tuple[float, CachedLM]] | None:
    if isinstance(value, CompositeValue):
        out: list[tuple[float, CachedLM]] = []
        for weight, part in value.parts:
            inner = _parts(part)
            if inner is None:
                return None
            out += [(weight * w, lm) for w, lm in inner]
        return out
    if isinstance(value, ImplicitValue):
        return [(1.0, value.tuned), (-1.0, value.untuned)]
    if isinstance(value, AutoregressiveReward) or (isinstance(value, ExplicitValue) and value.full_vocabulary()):
        return [(1.0, value.model)]
    return None
