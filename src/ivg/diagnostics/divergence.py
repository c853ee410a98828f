"""Do guide and base speak one language, and how far would guidance move the base? Numbers per token, on given texts.

Knows: the pair's and the base's distributions along texts. Must not know preferences, nor how results are shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ivg.diagnostics.log_ratios import response_logits, written
from ivg.model import GuidedModel
from ivg.models.cached_lm import CachedLM
from ivg.types import Beam, Prompt, Value
from ivg.values.implicit import ImplicitValue

TOP = 20
"""Tokens of the base that count as likely; as many as guidance by candidates re-scores (``engine.guidance``)."""
SILENT = 0.005
"""Nats per token of KL(tuned || untuned) below which a pair says nothing: less than a nat in a response of 200 tokens."""
FAR = 3.0
"""Nats per token of KL(base || untuned) beyond which the pair is no model of the base's texts: what the base expects
has on average a twentieth of its probability there."""
STRONG = 1.5
"""Nats per token of KL(guided || base) that move the base strongly: a guided token is on average 4.5 times less likely to it."""
OUTSIDE = 0.2
"""More of the guided mass outside the base's likeliest tokens than the base has there itself: one token in five is one that
the base would hardly write. The logits of a small pair are noise there, and guidance multiplies it."""


@dataclass(frozen=True)
class Disagreement:
    """How a guide pair and the base disagree along texts, per token.

    Attributes:
        tokens: positions that were compared.
        base_tuned: KL(base || tuned) in nats.
        base_untuned: KL(base || untuned) in nats; large: the pair talks another language than the base.
        tuned_untuned: KL(tuned || untuned) in nats; near 0: the pair says nothing.
        moved: KL(guided || base) in nats at temperature 1.
        top1: share of positions where guidance leaves the likeliest token what it was.
        outside: guided mass outside the base's :data:`TOP` likeliest tokens.
        base_outside: the base's own mass there.
    """

    tokens: int
    base_tuned: float
    base_untuned: float
    tuned_untuned: float
    moved: float
    top1: float
    outside: float
    base_outside: float

    @property
    def far(self) -> bool:
        """The pair's language is not the base's, or guidance throws mass where the base has none."""
        return self.base_untuned > FAR or self.outside - self.base_outside > OUTSIDE


def disagreement(model: GuidedModel, prompts: Sequence[Prompt | str], tokens: int = 40, beta: float = 1.0) -> Disagreement | None:
    """Sample from the base at temperature 1, then read each text with all three models; None without a fitting pair."""
    if fitting_pair(model.reader, model.values.get("implicit")) is None:
        return None
    done = model.generate(list(prompts), "base", temperature=1.0, max_new_tokens=tokens, ignore_eos=True)
    beams = [written(model.reader, Prompt.of(p), c.text, c.token_ids) for p, c in zip(prompts, done, strict=True)]
    return agreement(model.reader, model.values["implicit"], beams, beta)


def fitting_pair(base: CachedLM, value: Value | None) -> ImplicitValue | None:
    """``value`` when it is a pair that shares the base's vocabulary."""
    return value if isinstance(value, ImplicitValue) and value.vocabulary.same_as(base.vocabulary) else None


def agreement(base: CachedLM, value: Value | None, beams: Iterable[Beam], beta: float = 1.0) -> Disagreement | None:
    """Read given texts with base, tuned and untuned; None without a fitting pair or without a token."""
    pair = fitting_pair(base, value)
    if pair is None:
        return None
    sums, count = torch.zeros(7, dtype=torch.float64), 0
    for beam in beams:
        readings = (response_logits(reader, beam) for reader in (base, pair.tuned, pair.untuned))
        for b, t, u in zip(*readings, strict=True):
            width = min(b.shape[1], t.shape[1], u.shape[1], pair.vocabulary.size)
            sums += _sums(b[:, :width], t[:, :width].to(b.device), u[:, :width].to(b.device), beta)
            count += len(b)
    return Disagreement(count, *(sums / count).tolist()) if count else None


def _sums(base: Tensor, tuned: Tensor, untuned: Tensor, beta: float) -> Tensor:
    """Each number of :class:`Disagreement`, summed over rows of logits [tokens, vocabulary]; float64 [7], on the CPU."""
    guided = base + beta * (tuned - untuned)
    likely = base.topk(min(TOP, base.shape[1])).indices
    rows = (
        _kl(base, tuned),
        _kl(base, untuned),
        _kl(tuned, untuned),
        _kl(guided, base),
        (guided.argmax(-1) == base.argmax(-1)).double(),
        1 - guided.softmax(-1).gather(1, likely).sum(1),
        1 - base.softmax(-1).gather(1, likely).sum(1),
    )
    return torch.stack([row.double().sum() for row in rows]).cpu()


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of each row of logits."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def in_words(d: Disagreement) -> str:
    """What the numbers mean."""
    if d.tuned_untuned < SILENT:
        return "tuned and untuned hardly differ: guidance by this pair will do next to nothing"
    if d.base_untuned > FAR:
        return "the pair speaks a language far from the base's: expect guidance to disturb it; prefer chunk-level selection"
    if d.outside - d.base_outside > OUTSIDE:
        return "guidance moves much probability to tokens that the base hardly writes: prefer few candidates or chunk-level selection"
    if d.moved > STRONG:
        return "guidance moves the base strongly: try a smaller beta if the text suffers"
    return "the pair fits the base: guidance moves it moderately"
