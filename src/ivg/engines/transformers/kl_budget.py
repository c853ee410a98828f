"""Token guidance within a budget of KL divergence for each answer (``TokenGuidance.kl_budget``).

Each token is drawn from pi_s, the softmax of z_base + s * (z_guided - z_base) at the request's temperature, with 0 <= s <= 1; for guidance
by sums of logits, s * beta is the weight that is left. What a token costs is KL(pi_s || pi_base), whatever token is drawn.

**The bound.** No token costs more than the answer has left. So the costs of any answer sum to at most the budget, and so does their mean
over answers, which is KL(pi || pi_base) of whole answers (chain rule). The divergence grows with s, since its derivative is
s * Var_{pi_s}(z_guided - z_base) / T^2; so where a token would cost too much, s is found by bisection.

**The pace.** Most reward for a mean divergence is had with the same s at all tokens (they share one Lagrange multiplier). For small s a
token costs about c * s^2. So s is chosen so that the tokens that may still follow, each costing what the tokens so far would have cost on
the average at this s, take what is left: s^2 * mean(c) * (tokens left) = budget left. c of a past token is its cost divided by s^2, of the
next one its cost at s = 1. Spending each token's full weight while the budget lasts, or an even share of nats for each token, gave less
reward at equal divergence (dev/LOG.md).
"""

from __future__ import annotations

import math
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
        rate: sum of c of its tokens (see above).
        tokens: of the answer, with the next one.
        remaining: tokens that may still follow, with the next one.
        temperature: of the request; 0, greedy, counts as 1.
    """

    hypothesis: Beam | TokenSequence
    spent: float
    rate: float
    tokens: int
    remaining: int
    temperature: float


def guide_within_budget(
    base: Tensor,
    rows: Sequence[BudgetRow],
    guidance: TokenGuidance,
    entropies: Tensor | None,
    faults: dict[int, ScoreFault],
) -> tuple[Tensor, list[tuple[float, float]]]:
    """(guided logits, what the token of each row adds to ``spent`` and ``rate``).

    Args:
        base: logits of the base alone, float32 [rows, vocabulary].
        rows: what is known of each.
        guidance: with ``kl_budget``.
        entropies: as :func:`~ivg.engines.transformers.guidance.apply_guidance` takes them.
        faults: likewise.
    """
    assert guidance.kl_budget is not None
    guidance.value.inherit_cache([r.hypothesis for r in rows])  # all at once: the last child takes its parent's cache over
    out, costs = base.clone(), [(0.0, 0.0)] * len(rows)
    chosen = [i for i, r in enumerate(rows) if r.spent < guidance.kl_budget]
    if chosen:
        own, some = None if entropies is None else entropies[chosen], [rows[i] for i in chosen]
        left = [guidance.kl_budget - r.spent for r in some]
        guided = apply_guidance(base[chosen], [r.hypothesis for r in some], guidance, own, faults)
        out[chosen], found = _pace(base[chosen], guided, some, left)
        for i, cost in zip(chosen, found, strict=True):
            costs[i] = cost
    return out, costs


def share_of_guidance(left: float, tokens: int, remaining: int, rate: float) -> float:
    """s: the share of the guidance with which ``remaining`` tokens take ``left`` nats.

    Args:
        left: of the budget.
        tokens: over which ``rate`` is summed.
        remaining: tokens that may still follow.
        rate: sum of c over ``tokens`` tokens.
    """
    return 1.0 if rate * remaining <= left * tokens else math.sqrt(left * tokens / (rate * remaining))


def _pace(base: Tensor, guided: Tensor, rows: Sequence[BudgetRow], left: Sequence[float]) -> tuple[Tensor, list[tuple[float, float]]]:
    """(logits with the share of the guidance that each row can afford, what that adds to ``spent`` and ``rate``)."""
    temperatures = [r.temperature or 1.0 for r in rows]
    full = _divergence(base, guided, _column(temperatures, base)).nan_to_num(0.0, 0.0).clamp(min=0.0).tolist()
    shares = [share_of_guidance(n, r.tokens, r.remaining, r.rate + c) for n, r, c in zip(left, rows, full, strict=True)]
    cut = [i for i, share in enumerate(shares) if share < 1]
    if cut:
        weakened = _between(base[cut].double(), guided[cut].double(), _column([shares[i] for i in cut], base))
        guided = guided.index_copy(0, torch.tensor(cut, device=base.device), weakened.to(guided.dtype))
    limited, nats = limit_divergence(base, guided, left, temperatures)
    restricted = (torch.isneginf(guided) & ~torch.isneginf(base)).any(-1).tolist()  # candidates: no share makes them cost nothing
    rates = [c if only or s == 0 else cost / s**2 for c, only, s, cost in zip(full, restricted, shares, nats, strict=True)]
    return limited, list(zip(nats, rates, strict=True))


def _column(numbers: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device=like.device)[:, None]


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
    t, most = _column(temperatures, base), _column(limits, base)
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
