"""One token from two distributions: proposed by q, accepted or replaced so that it is a draw from p. Pure tensor functions.

Rejection with residual resampling (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318): x is drawn
from q and kept with probability min(1, p(x) / q(x)); else the token is drawn from (p - q)+, normalised. Whatever q is, the
token has the distribution p. Both are softmaxes of logits [rows, vocabulary], as ``processors`` leave them, after the
row's temperature and filters (``sampling``); at temperature 0 both are deterministic: x is q's likeliest token, kept where it is
p's.

Every token is drawn so, whether it was proposed ahead of time or not, each from three uniform numbers of its own (see
``speculation``). The token is then a function of prefix, seed, random path and position alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ivg.engines.transformers.sampling import by_params, filtered, sample_from_logits, sample_from_weights
from ivg.types import SamplingParams


def propose(q: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> tuple[Tensor, Tensor]:
    """One token for each row of ``q`` [rows, vocabulary]; (ids [rows], their log-probability in nats, float32 [rows])."""
    tokens = torch.zeros(len(q), dtype=torch.long, device=q.device)
    logps = torch.zeros(len(q), device=q.device)
    for setting, rows, logits in by_params(q, params):
        if setting.temperature == 0:
            tokens[rows] = logits.argmax(-1)
        else:
            kept = filtered(logits, setting)
            picked = sample_from_logits(kept, [uniforms[i] for i in rows])
            tokens[rows], logps[rows] = picked, _logps(kept, picked)
    return tokens, logps


def accept(p: Tensor, params: Sequence[SamplingParams], tokens: Tensor, logps: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Which proposals are accepted under p; bool [rows].

    Args:
        p: logits [rows, vocabulary].
        params: one for each row.
        tokens: what :func:`propose` gave, [rows].
        logps: their log-probability under q, [rows].
        uniforms: one number in [0, 1) for each row.
    """
    out = torch.zeros(len(p), dtype=torch.bool, device=p.device)
    for setting, rows, logits in by_params(p, params):
        if setting.temperature == 0:
            out[rows] = logits.argmax(-1) == tokens[rows]
        else:
            target = _logps(filtered(logits, setting), tokens[rows])
            chance = torch.tensor([uniforms[i] for i in rows], dtype=torch.float64, device=p.device)
            out[rows] = chance < (target - logps[rows]).double().exp()
    return out


def resample(p: Tensor, q: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """A token from (p - q)+ for each row whose proposal was rejected; ids [rows]. ``p``, ``q``: logits [rows, vocabulary]."""
    out = torch.zeros(len(p), dtype=torch.long, device=p.device)
    for setting, rows, logits in by_params(p, params):
        if setting.temperature == 0:
            out[rows] = logits.argmax(-1)
            continue
        target = filtered(logits, setting).softmax(-1)
        excess = filtered(q[rows], setting).softmax(-1).neg_().add_(target).clamp_(min=0)
        nothing = excess.amax(-1) <= 0  # where something was rejected, only rounding can do that
        excess[nothing] = target[nothing]
        out[rows] = sample_from_weights(excess, [uniforms[i] for i in rows])
    return out


def _logps(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of one token of each row."""
    return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
