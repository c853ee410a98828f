"""Log-probabilities of drawn tokens and of their likeliest alternatives, under the guided distribution and under the base alone.

Pure tensor functions; nothing is computed for tokens that do not need it. Both distributions are softmaxes at the request's
temperature (greedy requests: at 1) before repetition penalty, top-k, top-p and min-p (``types.Completion.guide_shift``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ivg.engines.transformers.sampling import row_blocks
from ivg.types import SamplingParams, TokenLogprobs


def token_logprobs(
    tokens: Sequence[int],
    rows: Sequence[int],
    params: Sequence[SamplingParams],
    alternatives: Sequence[int | None],
    base: Tensor,
    guided: Tensor,
) -> list[TokenLogprobs | None]:
    """Log-probabilities, text still empty, for every token that has a number of alternatives.

    Args:
        tokens: ids that were drawn.
        rows: which row of the logits each was drawn from.
        params: of each.
        alternatives: how many likely tokens to report with each; None: nothing.
        base: logits of the base alone, float32 [rows, vocabulary].
        guided: logits with guidance; may be the same tensor.
    """
    out: list[TokenLogprobs | None] = [None] * len(tokens)
    for block in row_blocks([i for i, n in enumerate(alternatives) if n is not None], guided):
        most = max(alternatives[i] or 0 for i in block)
        of_guided = _logprobs(guided, block, tokens, rows, params, most)
        of_base = of_guided if base is guided else _logprobs(base, block, tokens, rows, params, most)
        for k, i in enumerate(block):
            n = alternatives[i] or 0
            tops = (_drawable(of[1][k][:n]) for of in (of_guided, of_base))
            out[i] = TokenLogprobs(tokens[i], "", of_guided[0][k], of_base[0][k], *tops)
    return out


def _logprobs(
    logits: Tensor, block: Sequence[int], tokens: Sequence[int], rows: Sequence[int], params: Sequence[SamplingParams], most: int
) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """(log-probability of each token, its ``most`` likeliest alternatives)."""
    temperatures = torch.tensor([params[i].temperature or 1.0 for i in block], device=logits.device)
    logps = (logits[[rows[i] for i in block]] / temperatures[:, None]).log_softmax(-1)
    picked = torch.tensor([tokens[i] for i in block], device=logits.device)
    values, ids = logps.topk(min(most, logps.shape[1]))
    tops = [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return logps.gather(1, picked[:, None])[:, 0].tolist(), tops


def _drawable(pairs: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Without tokens that cannot be drawn."""
    return tuple((i, p) for i, p in pairs if p > -torch.inf)
