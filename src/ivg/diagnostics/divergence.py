"""How far a guide pair and the base diverge, and how far guidance would move the base, per token of given texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ivg.diagnostics.logits import kl, response_beam, response_logits
from ivg.model import GuidedModel
from ivg.models.cached_lm import CachedLM
from ivg.types import Beam, Prompt, Value
from ivg.values.implicit import ImplicitValue

TOP_TOKENS = 20
"""The base's likeliest tokens; as many as guidance by candidates re-scores by default."""
MIN_PAIR_KL = 0.005
"""KL(tuned || untuned) per token below which a pair has no effect: less than 1 nat in a response of 200 tokens."""
MAX_BASE_KL = 3.0
"""KL(base || untuned) per token above which the pair does not model the base's texts: it gives the base's tokens on average 1/20 of
their probability."""
STRONG_KL = 1.5
"""KL(guided || base) per token that moves the base strongly: a guided token is on average 4.5 times less likely under the base."""
MAX_OUTSIDE = 0.2
"""Increase of the probability outside the base's likeliest tokens that is too much: one token in five is one that the base would
hardly write. A small pair's logits are noise there, and guidance amplifies it."""


@dataclass(frozen=True)
class PairDivergence:
    """Divergence of a guide pair from the base, per token, in nats where it is a KL.

    Attributes:
        tokens: number of positions.
        base_tuned: KL(base || tuned).
        base_untuned: KL(base || untuned); large if the pair models other text than the base.
        tuned_untuned: KL(tuned || untuned); near 0 if the pair has no effect.
        guided_base: KL(guided || base) at temperature 1.
        top1_kept: fraction of positions where guidance keeps the likeliest token.
        outside: guided probability outside the base's :data:`TOP_TOKENS` likeliest tokens.
        base_outside: the base's own probability there.
    """

    tokens: int
    base_tuned: float
    base_untuned: float
    tuned_untuned: float
    guided_base: float
    top1_kept: float
    outside: float
    base_outside: float

    @property
    def too_far(self) -> bool:
        """The pair does not model the base's texts, or guidance moves probability to tokens that the base does not write."""
        return self.base_untuned > MAX_BASE_KL or self.outside - self.base_outside > MAX_OUTSIDE

    def describe(self) -> str:
        """What the numbers mean, in one line."""
        if self.tuned_untuned < MIN_PAIR_KL:
            return "tuned and untuned hardly differ: guidance by this pair has almost no effect"
        if self.base_untuned > MAX_BASE_KL:
            return "the pair is far from the base: token guidance may damage the text; prefer chunk-level selection"
        if self.outside - self.base_outside > MAX_OUTSIDE:
            return "guidance moves much probability to tokens that the base hardly writes: prefer few candidates or chunk-level selection"
        if self.guided_base > STRONG_KL:
            return "guidance moves the base strongly: try a smaller beta if the text suffers"
        return "the pair is close to the base: guidance moves it moderately"


def divergence_on_samples(
    model: GuidedModel, prompts: Sequence[Prompt | str], tokens: int = 40, beta: float = 1.0
) -> PairDivergence | None:
    """Sample from the base at temperature 1 and measure on these texts; None without a pair with the base's vocabulary."""
    if not _shares_vocabulary(model.reader, model.values.get("implicit")):
        return None
    completions = model.generate(list(prompts), "base", temperature=1.0, max_new_tokens=tokens, ignore_eos=True)
    beams = [response_beam(model.reader, Prompt.of(p), c.text, c.token_ids) for p, c in zip(prompts, completions, strict=True)]
    return pair_divergence(model.reader, model.values["implicit"], beams, beta)


def pair_divergence(base: CachedLM, value: Value | None, beams: Iterable[Beam], beta: float = 1.0) -> PairDivergence | None:
    """Read given texts with base, tuned and untuned; None without a pair with the base's vocabulary, or without a token."""
    if not isinstance(value, ImplicitValue) or not _shares_vocabulary(base, value):
        return None
    sums, count = torch.zeros(7, dtype=torch.float64), 0
    for beam in beams:
        streams = (response_logits(lm, beam) for lm in (base, value.tuned, value.untuned))
        for b, t, u in zip(*streams, strict=True):
            width = min(b.shape[1], t.shape[1], u.shape[1], value.vocabulary.size)
            sums += _sums(b[:, :width], t[:, :width].to(b.device), u[:, :width].to(b.device), beta)
            count += len(b)
    return PairDivergence(count, *(sums / count).tolist()) if count else None


def _shares_vocabulary(base: CachedLM, value: Value | None) -> bool:
    return isinstance(value, ImplicitValue) and value.vocabulary.same_as(base.vocabulary)


def _sums(base: Tensor, tuned: Tensor, untuned: Tensor, beta: float) -> Tensor:
    """Each number of :class:`PairDivergence`, summed over rows of logits [tokens, vocabulary]; float64 [7], on the CPU."""
    guided = base + beta * (tuned - untuned)
    top = base.topk(min(TOP_TOKENS, base.shape[1])).indices
    rows = (
        *(kl(p.log_softmax(-1), q.log_softmax(-1)) for p, q in ((base, tuned), (base, untuned), (tuned, untuned), (guided, base))),
        (guided.argmax(-1) == base.argmax(-1)).double(),
        1 - guided.softmax(-1).gather(1, top).sum(1),
        1 - base.softmax(-1).gather(1, top).sum(1),
    )
    return torch.stack([row.double().sum() for row in rows]).cpu()
