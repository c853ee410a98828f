"""What a drawn token's neighbours were: log-probabilities under the guided distribution and under the base alone.

Pure tensor functions; nothing is computed for rows that do not ask. Both distributions are softmaxes at the request's
temperature (greedy requests: at 1) before repetition penalty, top-k, top-p and min-p (``types.Completion.guide_shift``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ivg.engines.transformers.sampling import blocks
from ivg.types import SamplingParams, TokenLogprobs


def details(
    tokens: Sequence[int],
    rows: Sequence[int],
    params: Sequence[SamplingParams],
    alternatives: Sequence[int | None],
    plain: Tensor,
    mixed: Tensor,
) -> list[TokenLogprobs | None]:
    """A detail, its text still empty, for every token that asks for one.

    Args:
        tokens: ids that were drawn.
        rows: which row of the logits each was drawn from.
        params: of each.
        alternatives: how many likely tokens each wants beside it; None: no detail at all.
        plain: logits of the base alone, float32 [rows, vocabulary].
        mixed: logits with guidance; may be the same tensor.
    """
    out: list[TokenLogprobs | None] = [None] * len(tokens)
    for block in blocks([i for i, n in enumerate(alternatives) if n is not None], mixed):
        most = max(alternatives[i] or 0 for i in block)
        guided = _looked_at(mixed, block, tokens, rows, params, most)
        base = guided if plain is mixed else _looked_at(plain, block, tokens, rows, params, most)
        for k, i in enumerate(block):
            n = alternatives[i] or 0
            out[i] = TokenLogprobs(tokens[i], "", guided[0][k], base[0][k], _finite(guided[1][k], n), _finite(base[1][k], n))
    return out


def _looked_at(
    logits: Tensor, block: Sequence[int], tokens: Sequence[int], rows: Sequence[int], params: Sequence[SamplingParams], most: int
) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """(log-probability of each token, its ``most`` likeliest alternatives)."""
    heat = torch.tensor([params[i].temperature or 1.0 for i in block], device=logits.device)
    logps = (logits[[rows[i] for i in block]] / heat[:, None]).log_softmax(-1)
    picked = torch.tensor([tokens[i] for i in block], device=logits.device)
    values, ids = logps.topk(min(most, logps.shape[1]))
    tops = [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return logps.gather(1, picked[:, None])[:, 0].tolist(), tops


def _finite(pairs: Sequence[tuple[int, float]], count: int) -> tuple[tuple[int, float], ...]:
    """The first ``count``; what cannot be drawn is no alternative."""
    return tuple((i, p) for i, p in pairs[:count] if p > -torch.inf)
