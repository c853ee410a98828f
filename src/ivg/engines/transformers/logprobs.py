"""What requests report of drawn tokens: log-probabilities under the guided distribution and under the base alone, and likely alternatives.

Nothing is computed for tokens that do not need it. Both distributions are softmaxes at the request's
temperature (greedy requests: at 1) before repetition penalty, top-k, top-p and min-p (``types.Completion.guide_shift``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ivg.engines.transformers.sampling import log_ratios, row_blocks
from ivg.types import ExpandRequest, SamplingParams, TokenLogprobs


def compare_guidance(
    requests: Sequence[ExpandRequest],
    rows: Sequence[int],
    tokens: Tensor,
    base: Tensor,
    guided: Tensor,
    final: Tensor,
    process: Callable[[Tensor], tuple[Tensor, frozenset[int]]],
) -> Iterator[tuple[float, float, TokenLogprobs | None]]:
    """(shift, log-ratio, log-probabilities) of each token, as far as its request wants them; zeros and None otherwise.

    Shift and log-ratio are log pi_guided - log pi_base in nats: at the temperature alone, and with all filters and processors.

    Args:
        requests: of each token.
        rows: which row of the logits each was drawn from.
        tokens: ids.
        base: logits of the base alone, float32 [rows, vocabulary].
        guided: logits with guidance; may be the same tensor.
        final: ``guided`` after ``process``.
        process: :func:`~ivg.engines.transformers.processors.process_logits` of these rows.
    """
    params = [r.sampling for r in requests]
    recorded = [r.record and r.guidance is not None for r in requests]
    weighted = [r.return_log_ratio and r.guidance is not None for r in requests]
    shifts = log_ratios(guided, base, rows, params, tokens, recorded, filters=False)
    details = token_logprobs(tokens.tolist(), rows, params, [r.alternatives for r in requests], base, guided)
    if final is not guided and any(weighted):
        base, _ = process(base)
    ratios = log_ratios(final, base, rows, params, tokens, weighted, filters=True)
    return zip(shifts, ratios, details, strict=True)


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
            top, top_base = (_drawable(of[1][k][:n]) for of in (of_guided, of_base))
            out[i] = TokenLogprobs(tokens[i], "", of_guided[0][k], of_base[0][k], top, top_base)
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
