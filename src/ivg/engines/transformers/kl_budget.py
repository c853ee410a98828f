"""Token guidance within a budget of KL divergence for each answer (``TokenGuidance.kl_budget``).

Each token is drawn from pi_s, the softmax of z_base + s * (z_guided - z_base) at the request's temperature, with the largest s in [0, 1]
for which KL(pi_s || pi_base) fits in what the answer has left. With delta = z_guided - z_base the divergence grows with s, since its
derivative is s * Var_{pi_s}(delta) / T^2, so s is found by bisection; for guidance by sums of logits s * beta is the weight that is left.
What a token costs is its whole divergence, not the log-ratio of the token that was drawn: so the sum over the tokens of any answer is at
most the budget, and so is its mean over answers, which is KL(pi || pi_base) of whole answers (chain rule). Guidance is full as long as the
budget lasts, and stops behind it: the guide reads no more.

An even share of the budget for each token that may follow was left out: its size would depend on ``max_new_tokens``, and most tokens cost
next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ivg.engines.sequences import TokenSequence
from ivg.engines.transformers.guidance import apply_guidance
from ivg.errors import ScoreFault
from ivg.types import Beam, TokenGuidance

_HALVINGS = 40
"""Steps of the bisection: s is known to 1e-12."""


@dataclass(frozen=True, slots=True)
class BudgetRow:
    """One row of logits.

    Attributes:
        hypothesis: that the guide reads.
        spent: nats of the budget that its tokens have cost.
        temperature: of the request; 0, greedy, counts as 1.
    """

    hypothesis: Beam | TokenSequence
    spent: float
    temperature: float


def guide_within_budget(
    base: Tensor,
    rows: Sequence[BudgetRow],
    guidance: TokenGuidance,
    entropies: Tensor | None,
    faults: dict[int, ScoreFault],
) -> tuple[Tensor, list[float]]:
    """(guided logits, nats that the token of each row costs).

    Args:
        base: logits of the base alone, float32 [rows, vocabulary].
        rows: what is known of each.
        guidance: with ``kl_budget``.
        entropies: as :func:`~ivg.engines.transformers.guidance.apply_guidance` takes them.
        faults: likewise.
    """
    assert guidance.kl_budget is not None
    guidance.value.inherit_cache([r.hypothesis for r in rows])  # all at once: the last child takes its parent's cache over
    out, costs = base.clone(), [0.0] * len(rows)
    left = [guidance.kl_budget - r.spent for r in rows]
    chosen = [i for i, nats in enumerate(left) if nats > 0]
    if chosen:
        own = None if entropies is None else entropies[chosen]
        guided = apply_guidance(base[chosen], [rows[i].hypothesis for i in chosen], guidance, own, faults)
        temperatures = [rows[i].temperature or 1.0 for i in chosen]
        out[chosen], found = limit_divergence(base[chosen], guided, [left[i] for i in chosen], temperatures)
        for i, nats in zip(chosen, found, strict=True):
            costs[i] = nats
    return out, costs


def limit_divergence(base: Tensor, guided: Tensor, limits: Sequence[float], temperatures: Sequence[float]) -> tuple[Tensor, list[float]]:
    """(logits between ``base`` and ``guided`` whose divergence from the base is within ``limits``, what of the limits each takes).

    A row that is cut takes its whole limit, so that rounding cannot leave a rest. A row where guidance alone exceeds the limit however weak
    it is (candidates that have little of the base's probability) is the base's. Rows with NaN or infinity stay, and take nothing.

    Args:
        base: float32 [rows, vocabulary]; -inf: never drawn.
        guided: the same.
        limits: nats, for each row.
        temperatures: for each row, above 0.
    """
    t, most = (torch.tensor(x, dtype=torch.float64, device=base.device)[:, None] for x in (temperatures, limits))
    nats = _divergence(base, guided, t)
    over = (nats > most[:, 0]).nonzero()[:, 0]
    costs = nats.nan_to_num(0.0, 0.0).clamp(min=0.0)
    if len(over):
        costs[over] = most[over, 0]
        z, to = base[over].double(), guided[over].double()
        low, high = torch.zeros_like(t[over]), torch.ones_like(t[over])
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            fits = _divergence(z, _between(z, to, middle), t[over])[:, None] <= most[over]
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        limited = torch.where(low > 0, _between(z, to, low), z).to(guided.dtype)
        guided = guided.index_copy(0, over, limited)
    return guided, costs.tolist()


def _between(base: Tensor, guided: Tensor, share: Tensor) -> Tensor:
    """``base`` + share * (guided - base) [rows, vocabulary]; -inf stays."""
    moved = base + share * (guided - base)
    return moved.masked_fill(torch.isneginf(base) | torch.isneginf(guided), -torch.inf)


def _divergence(base: Tensor, guided: Tensor, temperatures: Tensor) -> Tensor:
    """KL(softmax(guided / T) || softmax(base / T)) of each row in nats, float64 [rows]; NaN where a row is not finite but for -inf."""
    p, q = ((x.double() / temperatures).log_softmax(-1) for x in (guided, base))
    return torch.where(torch.isneginf(p), 0.0, p.exp() * (p - q)).sum(-1)
