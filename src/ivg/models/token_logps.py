"""Log-probabilities of given tokens from outputs of a network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ivg.models.candidates import CandidateOutputs

CACHED_NUMBERS = 1 << 18
"""float32 numbers that stay in a core's cache: 1 MiB."""


def pass_logps(outputs: Tensor, places: Sequence[int], targets: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probabilities of ``targets[i]``, of which ``outputs[places[i]]`` [positions, vocabulary] ends with the distributions.

    On a CPU a few rows at a time: their float32 copy stays in a core's cache. Elsewhere the whole pass, and one wait for the device.
    """
    longest = max(map(len, targets), default=1)
    block = max(1, CACHED_NUMBERS // (longest * outputs.shape[-1])) if outputs.device.type == "cpu" else max(1, len(places))
    return [
        logps
        for first in range(0, len(places), block)
        for logps in _block_logps(outputs, places[first : first + block], targets[first : first + block])
    ]


def _block_logps(outputs: Tensor, places: Sequence[int], targets: Sequence[Sequence[int]]) -> list[list[float]]:
    longest = max(map(len, targets))
    padded = torch.tensor([[0] * (longest - len(some)) + list(some) for some in targets], device=outputs.device)
    chosen = outputs[places[0]][None] if len(places) == 1 else outputs[torch.tensor(places, device=outputs.device)]
    chosen = chosen[:, -longest:].float()
    logps = chosen.gather(2, padded[..., None])[..., 0] - chosen.logsumexp(2)
    return [row[longest - len(some) :] for row, some in zip(logps.tolist(), targets, strict=True)]


def target_logps(read: CandidateOutputs, targets: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probabilities of ``targets``, the tokens behind the places of each text."""
    flat = [pair for places, tokens in zip(read.places, targets, strict=True) for pair in zip(places, tokens, strict=True)]
    if not flat:
        return [[] for _ in targets]
    rows, tokens = torch.tensor(flat, device=read.outputs.device).T
    outputs = read.outputs.float()
    logps = iter((outputs[rows, tokens] - outputs.logsumexp(1)[rows]).tolist())
    return [[next(logps) for _ in some] for some in targets]
