"""From logits to tokens: pure functions on float32 tensors [rows, vocabulary].

Order as in transformers: repetition penalty, temperature, top-k, top-p, min-p, one draw. Temperature acts after guidance
has been mixed in. Each draw uses one number from a counter-based generator (``ivg.draws``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ivg.types import SamplingParams

_NEVER = float("-inf")


def penalise_repetition(logits: Tensor, seen: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of seen tokens by ``penalty`` (Keskar et al. 2019)."""
    out = logits.clone()
    for row, ids in enumerate(seen):
        if ids:
            index = torch.tensor(sorted(set(ids)), device=logits.device)
            picked = out[row, index]
            out[row, index] = torch.where(picked > 0, picked / penalty, picked * penalty)
    return out


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """All but the ``k`` largest become -inf; ties with the k-th stay."""
    if k >= logits.shape[1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], _NEVER)


def keep_top_p(logits: Tensor, p: float, most: int = 0) -> Tensor:
    """Keep the smallest set of tokens whose probability reaches ``p``; ``most`` > 0 says that no more are finite."""
    values, order = logits.topk(most) if 0 < most < logits.shape[1] else logits.sort(descending=True)
    probabilities = values.softmax(-1)
    beyond = probabilities.cumsum(-1) - probabilities >= p  # what comes before it suffices already
    beyond[:, 0] = False
    kept = torch.full_like(logits, _NEVER)
    return kept.scatter(1, order, values.masked_fill(beyond, _NEVER))


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens at least ``p`` times as likely as the likeliest."""
    floor = logits.max(-1, keepdim=True).values + torch.log(torch.tensor(p))
    return logits.masked_fill(logits < floor, _NEVER)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of each row's softmax in nats, float32 [rows]; NaN where a row is not finite but for -inf."""
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps.clamp(min=torch.finfo(logps.dtype).min)).sum(-1)  # 0 * -inf would be NaN


def filtered(logits: Tensor, params: SamplingParams, seen: Sequence[Sequence[int]]) -> Tensor:
    """Logits of the distribution that ``params`` draw from (temperature > 0)."""
    if params.repetition_penalty != 1.0:
        logits = penalise_repetition(logits, seen, params.repetition_penalty)
    logits = logits / params.temperature
    if params.top_k > 0:
        logits = keep_top_k(logits, params.top_k)
    if params.top_p < 1.0:
        logits = keep_top_p(logits, params.top_p)
    if params.min_p > 0.0:
        logits = keep_min_p(logits, params.min_p)
    return logits


def draw(logits: Tensor, uniforms: Sequence[float]) -> Tensor:
    """One token for each row by inversion of its distribution; [rows] of ids."""
    mass = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    threshold = torch.tensor(uniforms, dtype=torch.float64, device=logits.device) * mass[:, -1]
    picks = torch.searchsorted(mass, threshold[:, None], right=True)[:, 0]
    return picks.clamp(max=logits.shape[1] - 1)


def drawn_logps(
    logits: Tensor, params: Sequence[SamplingParams], seen: Sequence[Sequence[int]], tokens: Tensor, *, filters: bool
) -> Tensor:
    """Log-probability of ``tokens`` [rows], in nats; float32 [rows].

    Args:
        logits: [rows, vocabulary].
        params: one for each row.
        seen: the row's response before the token.
        tokens: ids.
        filters: True: of the distribution that ``params`` draw from (at temperature 0 the token is certain); False: of the
            softmax at their temperature alone (at temperature 0: at 1).
    """
    out = torch.zeros(len(logits), device=logits.device)
    for setting in dict.fromkeys(params):
        rows = [i for i, p in enumerate(params) if p is setting or p == setting]
        if filters and setting.temperature == 0:
            continue
        part = filtered(logits[rows], setting, [seen[i] for i in rows]) if filters else logits[rows] / (setting.temperature or 1.0)
        out[rows] = part.log_softmax(-1).gather(1, tokens[rows, None])[:, 0]
    return out


def sample(logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float], seen: Sequence[Sequence[int]]) -> Tensor:
    """One token for each row under its own parameters.

    Args:
        logits: float32 [rows, vocabulary], guidance mixed in.
        params: one for each row.
        uniforms: one number in [0, 1) for each row.
        seen: the row's response so far, for the repetition penalty.

    Returns:
        Token ids [rows], on the device of ``logits``.
    """
    out = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    for setting in dict.fromkeys(params):
        rows = [i for i, p in enumerate(params) if p is setting or p == setting]
        part = logits if len(rows) == len(logits) else logits[rows]
        history = [seen[i] for i in rows]
        if setting.temperature == 0:
            if setting.repetition_penalty != 1.0:
                part = penalise_repetition(part, history, setting.repetition_penalty)
            out[rows] = part.argmax(-1)
        else:
            out[rows] = draw(filtered(part, setting, history), [uniforms[i] for i in rows])
    return out
