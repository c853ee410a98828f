"""Chunks that a draft model writes in the base's place, and what the base thinks of them (rule ``speculate``).

The draft model draws as the base does: the request's settings, one number of the counter-based generator for each token. Where the rule
asks for it, the base then reads all new tokens of all drafts in one pass, and ``log_ratio`` grows by log pi_base - log pi_draft, both as
sampled. Otherwise the base reads nothing; what it has read of the prefix follows the drafts, so it reads a kept one when it writes again.
A draft model with another vocabulary than the base's writes text (``draft_text``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from ivg.engines.grammar import GrammarMasks
from ivg.engines.sequences import TokenSequence, append_token
from ivg.engines.transformers.draft_text import MORE_TOKENS, has_text, in_own_tokens, reader_of, take_over
from ivg.engines.transformers.guidance import no_token_error
from ivg.engines.transformers.processors import changing_settings, contexts_of, forbid_ignored_eos, process_logits
from ivg.engines.transformers.sampling import nonfinite_rows, sample, token_logps
from ivg.engines.transformers.speculation import MAX_ROUND_LOGITS
from ivg.errors import ConfigError
from ivg.models.cached_lm import CachedLM
from ivg.types import Beam, ExpandRequest, SamplingParams, Value
from ivg.utils.rng import uniform

Family = tuple[ExpandRequest, Sequence[TokenSequence]]
"""A request and its children."""


class DraftWriter:
    """Extends sequences with draft models.

    Args:
        base: judges the drafts.
        grammars: of structured output, in the base's tokens.
    """

    def __init__(self, base: CachedLM, grammars: GrammarMasks) -> None:
        self.base, self.grammars = base, grammars
        self.readers: dict[CachedLM, CachedLM] = {}
        """By draft model what reads with it: itself, or a reader with rows of its own."""

    def check(self, drafter: Value, sampling: SamplingParams, *, compared: bool) -> None:
        """Raise where ``drafter`` has no model that can write in the base's place.

        Args:
            drafter: a value.
            sampling: of the request.
            compared: its drafts are compared with the base token by token.

        Raises:
            ConfigError: it has none; or one with other tokens than the base's, and settings that name the base's tokens.
            VocabularyError: one with other tokens, and they are to be compared.
        """
        model = drafter.draft_model()
        if not isinstance(model, CachedLM):
            raise ConfigError(
                f"drafter={drafter.name}: {type(drafter).__name__} has no model that can write drafts\n"
                "  give the name of a pair (implicit) or of an autoregressive reward (arm)"
            )
        if not self.writes_text(drafter):
            return
        if compared:
            self.base.vocabulary.require_same(model.vocabulary, "tilt (gsi) compares tokens; leave it out (rsd), or give another drafter")
        if changes := [*changing_settings(sampling), *(["stop_token_ids"] if sampling.stop_token_ids else [])]:
            raise ConfigError(
                f"{', '.join(changes)}: about the base's tokens, and {model.name}, which drafts, has others\n"
                "  leave them out (where the checkpoint sets them: --generation-config ignore), or give another drafter"
            )

    def writes_text(self, drafter: Value) -> bool:
        """Has the model of ``drafter`` other tokens than the base?"""
        return not self.base.vocabulary.same_as(drafter.draft_model().vocabulary)

    def inherit_cache(self, sequences: Sequence[TokenSequence]) -> None:
        """What the draft model of each sequence's request has read of its parent becomes its own."""
        for model, some in self._by_model(sequences).items():
            if model in self.readers:
                self.readers[model].inherit_cache(some)

    def release(self, keys: Sequence[int]) -> None:
        """Free the rows of these hypotheses."""
        for reader in self.readers.values():
            reader.release(keys)

    def reset_caches(self) -> None:
        """Empty the caches of all draft models."""
        for reader in self.readers.values():
            reader.reset_cache()
        self.readers.clear()

    def extend(self, families: Sequence[Family]) -> None:
        """Every child up to its limit, or its end."""
        parent = {id(s): request.beam for request, some in families for s in some}
        self.base.prefill([request.beam for request, _ in families if request.return_log_ratio])
        for model, sequences in self._by_model([s for _, some in families for s in some]).items():
            if not self.base.vocabulary.same_as(model.vocabulary):
                self._write_text(self.readers.setdefault(model, reader_of(model)), sequences)
                continue
            self.readers[model] = model
            known = [len(s.token_ids) for s in sequences]
            self._write(model, self.base, sequences, [parent[id(s)] for s in sequences])
            judged = [
                (s, len(s.token_ids) - n)
                for s, n in zip(sequences, known, strict=True)
                if s.request.return_log_ratio and not s.error and len(s.token_ids) > n
            ]
            for some in self._blocks(judged):
                self._judge(some)

    def _write_text(self, reader: CachedLM, sequences: Sequence[TokenSequence]) -> None:
        """Whole chunks in other tokens than the base's, which become the base's."""
        families: dict[int, list[TokenSequence]] = {}
        for s in sequences:
            families.setdefault(s.parent, []).append(s)
        own, parents = list[TokenSequence](), list[Beam | TokenSequence]()
        for some in families.values():
            beam, written = in_own_tokens(reader, some[0].request, some)
            own, parents = [*own, *written], [*parents, *([beam] * len(written))]
        reader.keep_common(list({p.key: p for p in parents}.values()))
        self._write(reader, reader, own, parents)
        children = [s for some in families.values() for s in some]
        for _ in range(MORE_TOKENS):
            going = [w for w, s in zip(own, children, strict=True) if not has_text(w, s.text)]
            for w in going:
                w.limit += 1
            self._write(reader, reader, going, going)
        for s, w in zip(children, own, strict=True):
            take_over(self.base, s, w)

    def _write(
        self, model: CachedLM, target: CachedLM, sequences: Sequence[TokenSequence], parents: Sequence[Beam | TokenSequence]
    ) -> None:
        """Token after token, in the vocabulary of ``target``; siblings share the pass of their parent."""
        eos = target.vocabulary.eos_ids
        nodes: Sequence[Beam | TokenSequence] = list({p.key: p for p in parents}.values())
        places = {node.key: i for i, node in enumerate(nodes)}
        active, row_of = list(sequences), [places[p.key] for p in parents]
        while active:
            owner = dict(zip(row_of, active, strict=True))  # any sequence of a row: they belong to one request
            params = [owner[i].request.sampling for i in range(len(nodes))]
            logits = forbid_ignored_eos(_columns(model, target, model.outputs(nodes)), params, eos)
            self.grammars.restrict(logits, nodes, params)
            unusable = set(nonfinite_rows(logits))
            if unusable:
                logits[sorted(unusable)] = 0.0
            final, exhausted = process_logits(logits, params, contexts_of(target, nodes), target.vocabulary)
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
                    append_token(s, token, complete=self.grammars.completes(s, token))
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
        self.grammars.restrict(logits, owners, params, lengths)
        unusable = set(nonfinite_rows(logits))
        if unusable:
            logits[sorted(unusable)] = 0.0
        prompts = self.base.prompt_ids
        final, exhausted = process_logits(
            logits, params, lambda i: (prompts(owners[i].prompt), owners[i].token_ids[: lengths[i]]), self.base.vocabulary
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


def _columns(model: CachedLM, target: CachedLM, logits: Tensor) -> Tensor:
    """Logits [rows, vocabulary] of ``model`` over the columns of ``target``; a copy.

    Columns that the model lacks are forbidden, and where it is the target itself special tokens, which have no text.
    """
    columns, width = target.model.config.vocab_size, min(logits.shape[1], model.vocabulary.size, target.vocabulary.size)
    out = logits.new_full((len(logits), columns), -torch.inf)
    out[:, :width] = logits[:, :width]
    if model is target:
        out[:, sorted(i for i in model.vocabulary.special - model.vocabulary.eos_ids if i < columns)] = -torch.inf
    return out.to(target.model.device)
