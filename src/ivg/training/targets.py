"""Training targets of a value at every prefix of a sampled response: pure functions on tensors.

Position t of a row is the prefix that ends in response token t; ``mask`` [rows, positions] is 1 on response tokens, which are contiguous.
The only reward comes at the end of the response. No gradient flows through targets.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fudge(rewards: Tensor, mask: Tensor) -> Tensor:
    """Monte Carlo: the final reward at every prefix (FUDGE, Yang & Klein 2021; the explicit value of IVG, Liu et al. 2024).

    Args:
        rewards: [rows].
        mask: [rows, positions].

    Returns:
        [rows, positions]; 0 outside the response.
    """
    return rewards[:, None] * mask


def td_lambda(values: Tensor, rewards: Tensor, mask: Tensor, lam: float) -> Tensor:
    """TD(λ): G_t = (1 - λ)·V_{t+1} + λ·G_{t+1}, the reward after the last token (Sutton & Barto 2018, section 12.1; VAS, Han et al. 2024).

    λ = 1 is :func:`fudge`, λ = 0 is TD(0).

    Args:
        values: the network's own V at every prefix, [rows, positions].
        rewards: [rows].
        mask: [rows, positions].
        lam: λ in [0, 1].
    """
    values = values.detach()
    out = torch.zeros_like(values)
    next_return, next_value = rewards.clone(), rewards.clone()  # after the last token both are the reward
    for t in range(values.shape[1] - 1, -1, -1):
        in_response = mask[:, t] > 0
        out[:, t] = torch.where(in_response, (1 - lam) * next_value + lam * next_return, out[:, t])
        next_return = torch.where(in_response, out[:, t], next_return)
        next_value = torch.where(in_response, values[:, t], next_value)
    return out


def cd_q(expected_next: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """CD-Q: the base policy's expectation of the next value, the reward at the last token (Mudgal et al. 2024, eq. 6).

    Args:
        expected_next: E over v ~ pi_base(. | s_{t+1}) of Q(s_{t+1}, v) (see :func:`expected`), [rows, positions].
        rewards: [rows].
        mask: [rows, positions].
    """
    return torch.where(last_positions(mask), rewards[:, None], expected_next.detach()) * mask


def expected(values: Tensor, logps: Tensor) -> Tensor:
    """sum_v pi(v)·Q(v) of each row, [rows], from Q and log pi [rows, vocabulary]."""
    return (logps.exp() * values).sum(-1)


def last_positions(mask: Tensor) -> Tensor:
    """True at the last response token of every row, [rows, positions]."""
    following = torch.nn.functional.pad(mask[:, 1:], (0, 1))
    return (mask > 0) & (following == 0)


def squared_error(values: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """½ mean (V - target)² over response tokens; a scalar."""
    return 0.5 * (((values - targets) ** 2) * mask).sum() / mask.sum().clamp(min=1)


def cross_entropy(values: Tensor, outcomes: Tensor, mask: Tensor) -> Tensor:
    """Mean binary cross-entropy of sigmoid(V) against outcomes in [0, 1], shape [rows]: V is the log-odds that the response succeeds."""
    labels = outcomes[:, None].expand_as(values)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(values, labels, reduction="none")
    return (losses * mask).sum() / mask.sum().clamp(min=1)


def positions_at(mask: Tensor, share: float) -> Tensor:
    """Index of the token that completes ``share`` of each response, [rows]: the ceil(share·length)-th response token."""
    first, length = mask.argmax(1), mask.sum(1)
    return first + ((share * length).ceil().long() - 1).clamp(min=0)
