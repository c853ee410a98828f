"""Do these models fit together, and how far would guidance move the base? Numbers for ``ivg check``.

Knows: readers, vocabularies, a few teacher-forced passes. Must not know how results are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ivg.models.reader import Reader
from ivg.models.vocab import Vocabulary
from ivg.steered import SteeredModel
from ivg.types import Beam, Prompt
from ivg.values.implicit import ImplicitValue


@dataclass(frozen=True)
class Fit:
    """How one model's vocabulary relates to the base's: ``same``, or the number of ids that differ and the first of them."""

    name: str
    tokens: int
    context: int | None
    chat_template: bool
    same: bool
    different: int
    first: tuple[tuple[int, str | None, str | None], ...]


@dataclass(frozen=True)
class Disagreement:
    """How a guide pair and the base disagree along the base's own texts, per token.

    Attributes:
        tokens: positions that were compared.
        base_tuned: KL(base || tuned) in nats.
        base_untuned: KL(base || untuned) in nats; large: the pair talks another language than the base.
        tuned_untuned: KL(tuned || untuned) in nats; near 0: the pair says nothing.
        moved: KL(guided || base) in nats at beta 1 and temperature 1.
        top1: share of positions where guidance leaves the likeliest token what it was.
    """

    tokens: int
    base_tuned: float
    base_untuned: float
    tuned_untuned: float
    moved: float
    top1: float


def fit(base: Reader, other: Reader) -> Fit:
    """Compare vocabularies, contexts and templates."""
    differences = [] if other.vocabulary.same_as(base.vocabulary) else list(base.vocabulary.differences(other.vocabulary))
    return Fit(
        name=other.name,
        tokens=len(other.vocabulary.pieces),
        context=other.model.max_positions,
        chat_template=bool(getattr(other.tokenizer, "chat_template", None)),
        same=not differences,
        different=len(differences),
        first=tuple(differences[:5]),
    )


def readers(model: SteeredModel) -> dict[str, Reader]:
    """Every reader behind the values, by its name."""
    found: dict[str, Reader] = {}
    for value in model.values.values():
        for attribute in ("tuned", "untuned", "model"):
            reader = getattr(value, attribute, None)
            if isinstance(reader, Reader):
                found[reader.name] = reader
    return found


def disagreement(model: SteeredModel, prompts: Sequence[Prompt | str], tokens: int = 40, beta: float = 1.0) -> Disagreement | None:
    """Sample from the base at temperature 1, then read each text with all three models; None without a fitting pair."""
    value = model.values.get("implicit")
    if not isinstance(value, ImplicitValue) or not value.vocabulary.same_as(model.base.vocabulary):
        return None
    done = model.generate(list(prompts), "base", temperature=1.0, max_new_tokens=tokens, ignore_eos=True)
    sums, count = torch.zeros(5, dtype=torch.float64), 0
    for prompt, completion in zip(prompts, done, strict=True):
        beams = [Beam(-1, None, Prompt.of(prompt), completion.token_ids, completion.text, vocabulary=model.base.vocabulary)]
        base, tuned, untuned = (_response_logits(r, beams[0]) for r in (model.base, value.tuned, value.untuned))
        width = min(base.shape[1], tuned.shape[1], untuned.shape[1], value.vocabulary.size)
        base, tuned, untuned = base[:, :width], tuned[:, :width], untuned[:, :width]
        guided = base + beta * (tuned - untuned)
        rows = (
            _kl(base, tuned),
            _kl(base, untuned),
            _kl(tuned, untuned),
            _kl(guided, base),
            (guided.argmax(-1) == base.argmax(-1)).double(),
        )
        sums += torch.stack([r.sum().double() for r in rows])
        count += len(base)
    return Disagreement(count, *(sums / count).tolist())


@torch.no_grad()
def _response_logits(reader: Reader, beam: Beam) -> Tensor:
    """Logits that predict each response token, float32 [tokens, vocabulary], without any cache."""
    ids, border = reader.ids(beam)
    out = reader.model.network(input_ids=torch.tensor([ids], device=reader.model.device)).logits[0]
    return out[border - 1 : -1].float().cpu()


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of each row of logits."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def verdict(d: Disagreement) -> str:
    """What the numbers mean, in words."""
    if d.tuned_untuned < 0.005:
        return "tuned and untuned hardly differ: guidance by this pair will do next to nothing"
    if d.base_untuned > 3.0:
        return "the pair speaks a language far from the base's: expect guidance to disturb it; prefer chunk-level selection"
    if d.moved > 1.5:
        return "guidance at beta 1 moves the base strongly: try a smaller beta if the text suffers"
    return "the pair fits the base: guidance moves it moderately"


def vocabulary_lines(base: Vocabulary, f: Fit) -> list[str]:
    """The first mismatches, readable."""
    return [f"id {i}: {a!r} in {base.owner}, {b!r} in {f.name}" for i, a, b in f.first]
