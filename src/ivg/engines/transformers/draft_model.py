"""Chunks that a draft model writes in the base's place, and what the base thinks of them (rule ``speculate``).

The draft model draws as the base does: the request's settings, one number of the counter-based generator for each token. Where the rule
asks for it, the base then reads all new tokens of all drafts in one pass, and ``log_ratio`` grows by log pi_base - log pi_draft, both as
sampled. Otherwise the base reads nothing; what it has read of the prefix follows the drafts, so it reads a kept one when it writes again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from ivg.engines.sequences import TokenSequence, append_token
from ivg.engines.transformers.guidance import no_token_error
from ivg.engines.transformers.processors import contexts_of, forbid_ignored_eos, process_logits
from ivg.engines.transformers.sampling import nonfinite_rows, sample, token_logps
from ivg.engines.transformers.speculation import MAX_ROUND_LOGITS
from ivg.errors import ConfigError
from ivg.models.cached_lm import CachedLM
from ivg.types import Beam, ExpandRequest, Value
from ivg.utils.rng import uniform

Family = tuple[ExpandRequest, Sequence[TokenSequence]]
"""A request and its children."""


class DraftWriter:
    """Extends sequences with draft models.

    Args:
        base: judges the drafts.
    """

    def __init__(self, base: CachedLM) -> None:
        self.base = base
        self.models: dict[CachedLM, None] = {}
        """All that have read anything here, in order."""

    def check(self, drafter: Value) -> None:
        """Raise where ``drafter`` has no model that writes the base's tokens.

        Raises:
            ConfigError: it has none.
            VocabularyError: its tokens are others.
        """
        model = drafter.draft_model()
        if not isinstance(model, CachedLM):
            raise ConfigError(
                f"drafter={drafter.name}: {type(drafter).__name__} has no model that can write drafts\n"
                "  give the name of a pair (implicit) or of an autoregressive reward (arm)"
            )
        self.base.vocabulary.require_same(model.vocabulary, "a draft model writes the base's tokens; give a drafter with its vocabulary")

    def inherit_cache(self, sequences: Sequence[TokenSequence]) -> None:
        """What the draft model of each sequence's request has read of its parent becomes its own."""
        for model, some in self._by_model(sequences).items():
            model.inherit_cache(some)

    def release(self, keys: Sequence[int]) -> None:
        """Free the rows of these hypotheses."""
        for model in self.models:
            model.release(keys)

    def reset_caches(self) -> None:
        """Empty the caches of all draft models."""
        for model in self.models:
            model.reset_cache()
        self.models.clear()

    def extend(self, families: Sequence[Family]) -> None:
        """Every child up to its limit, or its end."""
        parent = {id(s): request.beam for request, some in families for s in some}
        self.base.prefill([request.beam for request, _ in families if request.return_log_ratio])
        for model, sequences in self._by_model([s for _, some in families for s in some]).items():
            self.models[model] = None
            known = [len(s.token_ids) for s in sequences]
            self._write(model, sequences, [parent[id(s)] for s in sequences])
            judged = [
                (s, len(s.token_ids) - n)
                for s, n in zip(sequences, known, strict=True)
                if s.request.return_log_ratio and not s.error and len(s.token_ids) > n
            ]
            for some in self._blocks(judged):
                self._judge(some)

    def _write(self, model: CachedLM, sequences: Sequence[TokenSequence], parents: Sequence[Beam]) -> None:
        """Token after token; siblings share the pass of their parent."""
        nodes: Sequence[Beam | TokenSequence] = list({p.key: p for p in parents}.values())
        places = {node.key: i for i, node in enumerate(nodes)}
        active, row_of = list(sequences), [places[p.key] for p in parents]
        while active:
            owner = dict(zip(row_of, active, strict=True))  # any sequence of a row: they belong to one request
            params = [owner[i].request.sampling for i in range(len(nodes))]
            logits = forbid_ignored_eos(self._base_columns(model, model.outputs(nodes)), params, self.base.vocabulary.eos_ids)
            unusable = set(nonfinite_rows(logits))
            if unusable:
                logits[sorted(unusable)] = 0.0
            final, exhausted = process_logits(logits, params, contexts_of(self.base, nodes), self.base.vocabulary.eos_ids)
            settings = [s.request.sampling for s in active]
            tokens = sample(final, settings, [uniform(s.request.seed, s.rng_path, len(s.token_ids)) for s in active], row_of)
            logps = self._logps(final, row_of, active, tokens)
            for s, row, token, logp in zip(active, row_of, tokens.tolist(), logps, strict=True):
                if row in unusable or row in exhausted:
                    count = len(s.token_ids)
                    s.finish = "error"
                    s.error = no_token_error(count) if row in exhausted else f"the draft model {model.name} gave NaN after {count} tokens"
                else:
                    s.log_ratio -= logp
                    append_token(s, token)
            active = [s for s in active if s.finish is None and not s.paused and len(s.token_ids) < s.limit]
            nodes, row_of = active, list(range(len(active)))

    def _logps(self, final: Tensor, row_of: Sequence[int], sequences: Sequence[TokenSequence], tokens: Tensor) -> list[float]:
        """Log-probability of each token as it was sampled, where the rule compares it with the base's; else 0."""
        out = [0.0] * len(sequences)
        wanted = [k for k, s in enumerate(sequences) if s.request.return_log_ratio]
        if wanted:
            settings = [sequences[k].request.sampling for k in wanted]
            found = token_logps(final[[row_of[k] for k in wanted]], settings, tokens[wanted], filters=True)
            for k, logp in zip(wanted, found.tolist(), strict=True):
                out[k] = logp
        return out

    def _base_columns(self, model: CachedLM, logits: Tensor) -> Tensor:
        """Logits [rows, vocabulary] over the base's columns; a copy. Columns that the draft model lacks are forbidden."""
        columns, width = self.base.model.config.vocab_size, min(logits.shape[1], model.vocabulary.size, self.base.vocabulary.size)
        out = logits.new_full((len(logits), columns), -torch.inf)
        out[:, :width] = logits[:, :width]
        return out.to(self.base.model.device)

    # What the base thinks of drafts

    def _blocks(self, judged: Sequence[tuple[TokenSequence, int]]) -> Iterator[list[tuple[TokenSequence, int]]]:
        """As many at a time as their logits may take memory."""
        block: list[tuple[TokenSequence, int]] = []
        size = 0
        for pair in judged:
            if block and (size + pair[1]) * self.base.vocabulary.size > MAX_ROUND_LOGITS:
                yield block
                block, size = [], 0
            block.append(pair)
            size += pair[1]
        if block:
            yield block

    def _judge(self, drafts: Sequence[tuple[TokenSequence, int]]) -> None:
        """Add the base's log-probability of the new tokens of each to its log-ratio."""
        rows, counts = [s for s, _ in drafts], [count for _, count in drafts]
        logits = torch.cat(self.base.recent_outputs(rows, counts, drop=1))
        owners = [s for s, count in drafts for _ in range(count)]
        lengths = [len(s.token_ids) - count + k for s, count in drafts for k in range(count)]
        params = [s.request.sampling for s in owners]
        logits = forbid_ignored_eos(logits, params, self.base.vocabulary.eos_ids)
        unusable = set(nonfinite_rows(logits))
        if unusable:
            logits[sorted(unusable)] = 0.0
        prompts = self.base.prompt_ids
        final, exhausted = process_logits(
            logits, params, lambda i: (prompts(owners[i].prompt), owners[i].token_ids[: lengths[i]]), self.base.vocabulary.eos_ids
        )
        ids = torch.tensor(list(chain.from_iterable(s.token_ids[len(s.token_ids) - n :] for s, n in drafts)), device=final.device)
        logps = token_logps(final, params, ids, filters=True)
        greedy = torch.tensor([p.temperature == 0 for p in params], device=final.device)
        logps[greedy & (final.argmax(-1) != ids)] = -torch.inf  # the base alone would have written another token
        for i, (s, logp) in enumerate(zip(owners, logps.tolist(), strict=True)):
            if i in unusable or i in exhausted:
                s.finish = "error"
                fault = no_token_error(lengths[i]) if i in exhausted else f"the base model gave NaN after {lengths[i]} tokens"
                s.error = s.error or fault
            else:
                s.log_ratio += logp

    @staticmethod
    def _by_model(sequences: Sequence[TokenSequence]) -> dict[CachedLM, list[TokenSequence]]:
        out: dict[CachedLM, list[TokenSequence]] = {}
        for s in sequences:
            drafter = s.request.drafter
            if drafter is not None:
                out.setdefault(drafter.draft_model(), []).append(s)
        return out
