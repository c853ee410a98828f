"""Log-probabilities of given tokens under the guided distribution, by teacher forcing.

At each position the distribution is that from which the next token would be drawn: the base's logits behind prompt and response so far,
changed by token guidance, then by the request's processors, temperature and filters. Every model reads prompt and response once, all
responses of a batch together, so many positions at a time that their logits stay small. A value that has no deltas of many positions at
once (text candidates, another vocabulary, log-sigmoid) is asked for one prefix after the other, as in generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from ivg.engines.sequences import TokenSequence, fork
from ivg.engines.transformers.guidance import apply_deltas, apply_guidance, nan_error, no_token_error, reads_ahead
from ivg.engines.transformers.logprobs import token_logprobs
from ivg.engines.transformers.processors import forbid_ignored_eos, process_logits
from ivg.engines.transformers.sampling import by_params, filtered, nonfinite_rows
from ivg.errors import ModelError
from ivg.models.cached_lm import CachedLM
from ivg.types import ExpandRequest, LogprobsRequest, SamplingParams, TokenGuidance, TokenLogprobs

BLOCK_LOGITS = 1 << 24
"""Logits of one model that are held at a time: 64 MiB."""
_PLAIN = SamplingParams()


@dataclass(slots=True)
class _Row:
    """One response.

    Attributes:
        request: what is asked for.
        read: what the models read of it; grows.
        prefix: what a value reads that is asked for one prefix after the other; grows.
        found: one entry for each token so far, without text.
    """

    request: LogprobsRequest
    read: TokenSequence
    prefix: TokenSequence
    found: list[TokenLogprobs] = field(default_factory=list)

    @classmethod
    def of(cls, request: LogprobsRequest) -> _Row:
        expand = ExpandRequest(request.beam, 2, len(request.token_ids), request.sampling, request.guidance, 0, keep=True)
        read, prefix = fork(expand)
        return cls(request, read, prefix)

    def grow(self, sequence: TokenSequence, length: int) -> TokenSequence:
        """``sequence`` with the first ``length`` tokens of the response."""
        sequence.token_ids.extend(self.request.token_ids[len(sequence.token_ids) : length])
        return sequence

    def with_text(self) -> list[TokenLogprobs]:
        """What was found, with the text that each token adds."""
        state, vocabulary = self.request.beam.decoded, self.request.beam.vocabulary
        out, ids = [], self.request.token_ids
        for i, entry in enumerate(self.found, 1):
            text, state = vocabulary.continue_text(ids[:i], state, final=i == len(ids))
            out.append(replace(entry, text=text))
        return out


@dataclass(slots=True)
class _Block:
    """Positions of some responses that are read together: the tokens from ``start`` on of each.

    Attributes:
        rows: the responses.
        start: tokens before the first of the block.
        counts: tokens of each in the block.
    """

    rows: Sequence[_Row]
    start: int
    counts: list[int]

    @property
    def places(self) -> list[tuple[_Row, int]]:
        """For each position its response, and the number of tokens before it."""
        return [(row, self.start + k) for row, count in zip(self.rows, self.counts, strict=True) for k in range(count)]


def given_logprobs(base: CachedLM, requests: Sequence[LogprobsRequest]) -> list[list[TokenLogprobs]]:
    """Log-probabilities of every token of every request, in order.

    Args:
        base: the base model.
        requests: responses of any lengths, each with its own settings and guidance.

    Raises:
        ModelError: a model gave NaN or infinity, or the settings forbid every token.
        ScoreError: a value has no number for a candidate.
    """
    rows = [_Row.of(request) for request in requests]
    groups: dict[TokenGuidance | None, list[_Row]] = {}
    for row in rows:
        guidance = row.request.guidance
        groups.setdefault(None if guidance is None or guidance.beta == 0 else guidance, []).append(row)
    for guidance, some in groups.items():
        keys = [sequence.key for row in some for sequence in (row.read, row.prefix)]
        try:
            _read(base, some, guidance)
        finally:
            base.release(keys)
            if guidance is not None:
                guidance.value.release(keys)
    return [row.with_text() for row in rows]


def _read(base: CachedLM, rows: Sequence[_Row], guidance: TokenGuidance | None) -> None:
    """Fill ``found`` of rows with one guidance."""
    step = max(1, BLOCK_LOGITS // (len(rows) * base.model.config.vocab_size))
    for start in range(0, max(len(row.request.token_ids) for row in rows), step):
        active = [row for row in rows if len(row.request.token_ids) > start]
        counts = [min(step, len(row.request.token_ids) - start) for row in active]
        block = _Block(active, start, counts)
        sequences = [row.grow(row.read, start + count) for row, count in zip(active, counts, strict=True)]
        logits = torch.cat(base.recent_outputs(sequences, counts, drop=1))
        params = [row.request.sampling for row, _ in block.places]
        logits = forbid_ignored_eos(logits, params, base.vocabulary.eos_ids)
        guided = logits if guidance is None else _guide(logits, block, guidance)
        _check_finite(logits, guided, block)
        final = _final(base, guided, block, params)
        alone = final if guided is logits else _final(base, logits, block, params)
        tokens = [row.request.token_ids[before] for row, before in block.places]
        alternatives = [max(1, row.request.alternatives) for row, _ in block.places]
        found = token_logprobs(tokens, range(len(tokens)), [_PLAIN] * len(tokens), alternatives, alone, final)
        own = final.gather(1, torch.tensor(tokens, device=final.device)[:, None])
        for (row, _), entry, rank in zip(block.places, found, (final >= own).sum(-1).tolist(), strict=True):
            assert entry is not None
            row.found.append(replace(entry, rank=rank))


def _guide(logits: Tensor, block: _Block, guidance: TokenGuidance) -> Tensor:
    """The base's logits [positions, vocabulary] of ``block`` with ``guidance``, as a new tensor."""
    value = guidance.value
    vocabulary = block.rows[0].read.vocabulary
    if reads_ahead(guidance, vocabulary):
        deltas = value.recent_deltas([row.read for row in block.rows], block.counts)
        if deltas is not None:
            return apply_deltas(logits.clone(), torch.cat(deltas), guidance, vocabulary)
    out, first = torch.empty_like(logits), [0, *accumulate(block.counts)]
    for k in range(max(block.counts)):
        some = [i for i, count in enumerate(block.counts) if k < count]
        prefixes = [block.rows[i].grow(block.rows[i].prefix, block.start + k) for i in some]
        places = [first[i] + k for i in some]
        out[places] = apply_guidance(logits[places], prefixes, guidance)
    return out


def _final(base: CachedLM, logits: Tensor, block: _Block, params: Sequence[SamplingParams]) -> Tensor:
    """``logits`` [positions, vocabulary] as the requests' processors, temperature and filters leave them."""
    places = block.places

    def contexts(position: int) -> tuple[Sequence[int], Sequence[int]]:
        row, before = places[position]
        return base.prompt_ids(row.request.beam.prompt), row.request.token_ids[:before]

    logits, exhausted = process_logits(logits, params, contexts, base.vocabulary)
    if exhausted:
        raise ModelError(no_token_error(places[min(exhausted)][1]))
    if all(p.temperature == 1 and p.top_k == 0 and p.top_p == 1 and p.min_p == 0 for p in params):
        return logits
    out = torch.empty_like(logits)
    for setting, rows, part in by_params(logits, params):
        out[rows] = filtered(part, setting)
    return out


def _check_finite(logits: Tensor, guided: Tensor, block: _Block) -> None:
    """Raise ModelError where a position has NaN or infinity."""
    if wrong := nonfinite_rows(guided):
        raise ModelError(nan_error(logits[wrong[0]], block.places[wrong[0]][1]))
