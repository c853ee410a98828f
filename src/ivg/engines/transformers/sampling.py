"""From logits to tokens: pure functions on float32 tensors [rows, vocabulary].

Order as in transformers: temperature, top-k, top-p, min-p, one draw. Temperature acts after guidance has been mixed in, and after
what else changes logits (``processors``). Each draw uses one number from a counter-based generator (``ivg.utils.rng``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ivg.types import SamplingParams

_NEVER = float("-inf")
SECTION = 128
"""Tokens whose weights are summed first when one is drawn."""
BLOCK_LOGITS = 1 << 18
"""Logits that are processed at a time on a CPU: one mebibyte, of the two or so of a core's own cache."""
TOP_P_FIRST = 256
"""Tokens that are sorted first for top-p; four times as many while they do not reach it."""


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """All but the ``k`` largest become -inf; ties with the k-th stay."""
    if k >= logits.shape[1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], _NEVER)


def keep_top_p(logits: Tensor, p: float, most: int = 0) -> Tensor:
    """Keep the smallest set of tokens whose probability reaches ``p``; ``most`` > 0 says that no more are finite.

    The vocabulary is sorted only where p takes more than a quarter of it.
    """
    width = logits.shape[1]
    count = most if 0 < most < width else TOP_P_FIRST
    total = logits.logsumexp(-1, keepdim=True)
    while True:
        values, request = logits.topk(count) if 4 * count <= width or count == most else logits.sort(descending=True)
        probabilities = (values - total).exp()
        reached = probabilities.cumsum(-1)
        if values.shape[1] == width or count == most or bool((reached[:, -1] >= p).all()):
            break
        count *= 4
    beyond = reached - probabilities >= p  # what comes before it suffices already
    beyond[:, 0] = False
    kept = torch.full_like(logits, _NEVER)
    return kept.scatter(1, request, values.masked_fill(beyond, _NEVER))


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens at least ``p`` times as likely as the likeliest."""
    floor = logits.max(-1, keepdim=True).values + torch.log(torch.tensor(p))
    return logits.masked_fill(logits < floor, _NEVER)


def nonfinite_rows(logits: Tensor) -> list[int]:
    """Rows with NaN or positive infinity."""
    peaks = logits.amax(-1)  # NaN wins every comparison
    return (~(peaks < torch.inf)).nonzero()[:, 0].tolist()


def entropy(logits: Tensor) -> Tensor:
    """Entropy of each row's softmax in nats, float32 [rows]; NaN where a row is not finite but for -inf."""
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps.clamp(min=torch.finfo(logps.dtype).min)).sum(-1)  # 0 * -inf would be NaN


def filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    """Logits of the distribution that ``params`` draw from (temperature > 0)."""
    logits = logits / params.temperature
    if params.top_k > 0:
        logits = keep_top_k(logits, params.top_k)
    if params.top_p < 1.0:
        logits = keep_top_p(logits, params.top_p)
    if params.min_p > 0.0:
        logits = keep_min_p(logits, params.min_p)
    return logits


def sample_from_logits(logits: Tensor, uniforms: Sequence[float]) -> Tensor:
    """One token for each row of logits by inversion of its distribution; ids [rows]."""
    return sample_from_weights((logits - logits.amax(-1, keepdim=True)).exp_(), uniforms)


def sample_from_weights(weights: Tensor, uniforms: Sequence[float]) -> Tensor:
    """One token for each row with probability in proportion to its ``weights`` [rows, vocabulary]; ids [rows].

    The weights of :data:`SECTION` tokens at a time are summed, then only the section that holds the draw is searched: the
    same token as from a cumulative sum over the vocabulary in float64, for a fifth of its time.
    """
    rows, width = weights.shape
    if width % SECTION:
        weights = torch.nn.functional.pad(weights, (0, SECTION - width % SECTION))
    sections = weights.view(rows, -1, SECTION)
    below = sections.sum(-1, dtype=torch.float64).cumsum(-1)
    threshold = torch.tensor(uniforms, dtype=torch.float64, device=weights.device) * below[:, -1]
    section = torch.searchsorted(below, threshold[:, None], right=True).clamp_(max=below.shape[1] - 1)
    rest = threshold[:, None] - torch.where(section > 0, below.gather(1, (section - 1).clamp(min=0)), 0.0)
    inner = sections[torch.arange(rows, device=weights.device), section[:, 0]].cumsum(-1, dtype=torch.float64)
    pick = torch.searchsorted(inner, rest, right=True)
    last = torch.searchsorted(inner, inner[:, -1:].contiguous())  # rounding never leads to a token without weight
    return (section * SECTION + torch.minimum(pick, last))[:, 0]


def distinct_params(params: Sequence[SamplingParams]) -> list[SamplingParams]:
    """The different settings among ``params``; rows of one request share one object."""
    return list(dict.fromkeys({id(p): p for p in params}.values()))


def by_params(
    logits: Tensor, params: Sequence[SamplingParams], rows: Sequence[int] | None = None
) -> Iterator[tuple[SamplingParams, list[int], Tensor]]:
    """Draws with the same settings together, in blocks: (settings, indices of the draws, their logits).

    Args:
        logits: [rows, vocabulary].
        params: one for each draw.
        rows: which row each draw is from; None: one draw for each row.
    """
    place = range(len(params)) if rows is None else rows
    for setting in distinct_params(params):
        for block in row_blocks([i for i, p in enumerate(params) if p is setting or p == setting], logits):
            chosen = [place[i] for i in block]
            first, end = chosen[0], chosen[0] + len(chosen)
            yield setting, block, logits[first:end] if chosen == list(range(first, end)) else logits[chosen]


def token_logps(logits: Tensor, params: Sequence[SamplingParams], tokens: Tensor, *, filters: bool) -> Tensor:
    """Log-probability of ``tokens`` [rows], in nats; float32 [rows].

    Args:
        logits: [rows, vocabulary]; with ``filters`` as ``processors`` leave them.
        params: one for each row.
        tokens: ids.
        filters: True: of the distribution that ``params`` draw from (at temperature 0 the token is certain); False: of the
            softmax at their temperature alone (at temperature 0: at 1).
    """
    out = torch.zeros(len(logits), device=logits.device)
    for setting, rows, part in by_params(logits, params):
        if not filters or setting.temperature > 0:
            kept = filtered(part, setting) if filters else part / (setting.temperature or 1.0)
            out[rows] = kept.log_softmax(-1).gather(1, tokens[rows, None])[:, 0]
    return out


def log_ratios(
    guided: Tensor,
    base: Tensor,
    rows: Sequence[int],
    params: Sequence[SamplingParams],
    tokens: Tensor,
    wanted: Sequence[bool],
    *,
    filters: bool,
) -> list[float]:
    """Log pi_guided - log pi_base of drawn tokens, in nats; 0 where not ``wanted``, which costs nothing.

    Args:
        guided: logits [rows, vocabulary].
        base: logits of the base alone, the same.
        rows: which row each token was drawn from.
        params: one for each token.
        tokens: ids [tokens].
        wanted: for each token.
        filters: as :func:`token_logps` takes it.
    """
    out = [0.0] * len(params)
    picked = [k for k, want in enumerate(wanted) if want]
    if picked:
        index = torch.tensor([rows[k] for k in picked], device=guided.device)
        settings, ids = [params[k] for k in picked], tokens[torch.tensor(picked, device=tokens.device)]
        of_guided, of_base = (token_logps(z[index], settings, ids, filters=filters) for z in (guided, base))
        for k, ratio in zip(picked, (of_guided - of_base).tolist(), strict=True):
            out[k] = ratio
    return out


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    uniforms: Sequence[float],
    rows: Sequence[int] | None = None,
) -> Tensor:
    """One token for each draw under its own parameters.

    Args:
        logits: float32 [rows, vocabulary], guidance mixed in, as ``processors`` leave them.
        params: one for each draw.
        uniforms: one number in [0, 1) for each draw.
        rows: which row each draw is from; None: one draw for each row.

    Returns:
        Token ids [draws], on the device of ``logits``.
    """
    out = torch.empty(len(params), dtype=torch.long, device=logits.device)
    for setting, draws, part in by_params(logits, params, rows):
        greedy = setting.temperature == 0
        out[draws] = part.argmax(-1) if greedy else sample_from_logits(filtered(part, setting), [uniforms[i] for i in draws])
    return out


def row_blocks(rows: Sequence[int], logits: Tensor) -> Iterator[list[int]]:
    """``rows`` in blocks: on a CPU, so many at a time that their logits stay in its cache."""
    size = max(1, BLOCK_LOGITS // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(rows))
    for start in range(0, len(rows), size):
        yield list(rows[start : start + size])
