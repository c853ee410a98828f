"""Speculative guidance: a value drafts some tokens, one forward pass of the base verifies them, and every token is a draw from p.

p is the exact guided distribution, [pi_base * (pi_tuned / pi_untuned)^beta]^(1/T) after all filters; q is the draft's, after
the same. Every token is drawn by ``rejection_sampling`` from three numbers of the counter-based generator at its position, whether or
not it was drafted. So it depends on prefix, seed and random path alone: how many tokens are drafted ahead changes only the speed. That
is why timings may choose the number (``draft_length``).

The pair of guides must read every token anyway. At beta = 1 the draft is the tuned model's, and untuned model and base read the
drafted tokens in one pass each. Rows advance by different numbers of tokens; what was read in vain is cut from the caches.
Explained in docs/explanation/speculation.md. Must not depend on how values draft.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ivg.engines.grammar import GrammarMasks
from ivg.engines.sequences import TokenSequence, append_token
from ivg.engines.transformers.draft_length import DraftLength
from ivg.engines.transformers.guidance import (
    add_deltas,
    compares_guidance,
    forbid,
    implausible_tokens,
    nan_error,
    no_token_error,
)
from ivg.engines.transformers.logprobs import compare_guidance
from ivg.engines.transformers.processors import changes_logits, contexts_of, forbid_ignored_eos, process_logits
from ivg.engines.transformers.rejection_sampling import accept, propose, resample
from ivg.engines.transformers.sampling import nonfinite_rows
from ivg.errors import ConfigError
from ivg.models.cached_lm import CachedLM
from ivg.types import Beam, Drafter, ExpandRequest, Hypothesis, SamplingParams, TokenGuidance
from ivg.utils.rng import uniform

MAX_ROUND_LOGITS = 1 << 24
"""Rows x positions x vocabulary of one round at most: 64 MiB for each tensor in float32."""
_STREAM = 0x5BEC
_PROPOSE, _ACCEPT, _RESAMPLE = 0, 1, 2


@dataclass(slots=True)
class SpeculationStats:
    """Sums over all rounds.

    Attributes:
        rounds: of drafting and verification.
        passes: forward passes of the base, counted once for each row.
        tokens: generated.
        drafted: tokens drafted ahead.
        accepted: of these.
        agreed: generated tokens that equal what was proposed at their position, drafted ahead or not.
    """

    rounds: int = 0
    passes: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    agreed: int = 0


@dataclass(slots=True)
class _Batch:
    """The rows of a round.

    Attributes:
        guidance: of all rows.
        rows: sequences that grow.
        nodes: what is read: the rows themselves, or the parents that several rows still share.
        node_of: the node of each row.
        drafter: of the guidance's value, for this round.
    """

    guidance: TokenGuidance
    rows: Sequence[TokenSequence]
    nodes: Sequence[Hypothesis]
    node_of: list[int]
    drafter: Drafter

    def to_rows(self, of_nodes: Tensor) -> Tensor:
        """For each row what belongs to its node."""
        if len(self.nodes) == len(self.rows):
            return of_nodes
        return of_nodes[torch.tensor(self.node_of, device=of_nodes.device)]


@dataclass(slots=True)
class _Proposals:
    """What was proposed in a round at all positions, one row's after the other's.

    Those of row r are ``start[r]`` … ``start[r + 1]`` - 1.

    Attributes:
        start: as above.
        row: of each proposal.
        position: tokens of the response before each.
        params: sampling settings of each.
        contexts: of each (see ``processors.Contexts``).
        tokens: ids.
        logps: their log-probabilities under q.
        q: logits that each was drawn from.
    """

    start: list[int]
    row: list[int]
    position: list[int]
    params: list[SamplingParams]
    contexts: list[tuple[Sequence[int], Sequence[int]]]
    tokens: Tensor
    logps: Tensor
    q: list[Tensor]


class Speculator:
    """Extends sequences whose guidance drafts.

    Args:
        base: verifies the drafts.
        grammars: of structured output.

    Attributes:
        draft_length: draft always so many tokens ahead, where there is room; None: as :class:`DraftLength` chooses.
    """

    def __init__(self, base: CachedLM, grammars: GrammarMasks) -> None:
        self.base, self.grammars = base, grammars
        self.draft_length: int | None = None
        self.reset_stats()
        self._controller = lru_cache(maxsize=64)(lambda guidance: DraftLength(guidance.draft))

    @staticmethod
    def can_draft(request: ExpandRequest) -> bool:
        """Does this request's guidance draft?

        Raises:
            ConfigError: it does, but chunks are to end at tokens of high entropy.
        """
        guidance = request.guidance
        if guidance is None or guidance.draft == 0 or guidance.beta == 0:
            return False
        if request.pause is not None:
            raise ConfigError(f"draft={guidance.draft} cannot stop at a token of high entropy (rule=reject)\n  leave draft out")
        return True

    def stats(self) -> dict[str, float]:
        """:class:`SpeculationStats` since :meth:`reset_stats`, with ``acceptance`` (agreed by tokens) and ``passes_per_token``."""
        sums = self._stats
        rates = {"acceptance": sums.agreed / max(1, sums.tokens), "passes_per_token": sums.passes / max(1, sums.tokens)}
        return {**asdict(sums), **rates}

    def reset_stats(self) -> None:
        """Count from zero; measured times are kept."""
        self._stats = SpeculationStats()

    def extend(self, children: Sequence[tuple[Beam, Sequence[TokenSequence]]]) -> None:
        """Every child of every beam up to its limit, or its end."""
        groups: dict[TokenGuidance, list[tuple[Beam, Sequence[TokenSequence]]]] = {}
        for beam, some in children:
            guidance = some[0].request.guidance
            assert guidance is not None
            groups.setdefault(guidance, []).append((beam, some))
        for guidance, group in groups.items():
            self._extend(guidance, group)

    def _extend(self, guidance: TokenGuidance, group: Sequence[tuple[Beam, Sequence[TokenSequence]]]) -> None:
        rows = [s for _, some in group for s in some]
        controller = self._controller(guidance)
        if len(rows) > len(group) and self._choose(controller, rows) == 0:  # siblings share the pass of their parent
            parents = [i for i, (_, some) in enumerate(group) for _ in some]
            self._round(_batch(guidance, rows, [beam for beam, _ in group], parents), controller, 0)
        while active := [s for s in rows if s.finish is None and not s.paused and len(s.token_ids) < s.limit]:
            reads_prompts = any(not s.token_ids for s in active)
            ahead, started = self._choose(controller, active), time.perf_counter()
            longest = self._round(_batch(guidance, active, active, list(range(len(active)))), controller, ahead)
            if not reads_prompts:
                controller.record_time(len(active), longest, time.perf_counter() - started)

    def _choose(self, controller: DraftLength, rows: Sequence[TokenSequence]) -> int:
        fits = MAX_ROUND_LOGITS // (len(rows) * self.base.vocabulary.size) - 1
        remaining = [max(1, min(s.limit - len(s.token_ids), fits + 1)) for s in rows]
        return controller.choose(remaining) if self.draft_length is None else min(self.draft_length, max(remaining) - 1)

    # One round

    def _round(self, batch: _Batch, controller: DraftLength, ahead: int) -> int:
        """One pass of the base; every row grows by 1 to ``ahead`` + 1 tokens. Returns the longest draft."""
        rows = batch.rows
        before = [(len(s.token_ids), s.written, s.decoded) for s in rows]
        proposals = self._propose(batch, ahead)
        base, guided = self._targets(batch, proposals)
        if nonfinite := set(nonfinite_rows(guided)):
            guided[sorted(nonfinite)] = 0.0
        process = partial(process_logits, params=proposals.params, contexts=proposals.contexts.__getitem__, vocabulary=self.base.vocabulary)
        final, exhausted = process(guided)
        stops, tokens = _verify(rows, proposals, final, nonfinite | exhausted)
        requests, ids = [rows[r].request for r in proposals.row], torch.tensor(tokens, device=guided.device)
        compared = list(compare_guidance(requests, range(len(tokens)), ids, base, guided, final, process))
        for row, s in enumerate(rows):
            count, s.written, s.decoded = before[row]  # a value may have read the text of the draft
            del s.token_ids[count:]
            for k in range(proposals.start[row], stops[row]):
                if s.finish is None and not s.paused:
                    shift, ratio, detail = compared[k]
                    s.log_ratio -= ratio
                    append_token(s, tokens[k], shift, detail, complete=self.grammars.completes(s, tokens[k]))
            if s.finish is None and not s.paused and (stop := stops[row]) < proposals.start[row + 1] and stop in nonfinite | exhausted:
                place = len(s.token_ids)
                s.finish = "error"
                s.error = no_token_error(place) if stop in exhausted else nan_error(None if base is guided else base[stop], place)
            stops[row] = proposals.start[row] + len(s.token_ids) - count
        if ahead:
            self.base.truncate(rows)
            batch.guidance.value.truncate(rows)
        return self._record(controller, proposals, stops, tokens)

    def _record(self, controller: DraftLength, proposals: _Proposals, stops: list[int], tokens: list[int]) -> int:
        """Add the round to the statistics; the longest draft."""
        sums, proposed = self._stats, proposals.tokens.tolist()
        tested = agreed = longest = 0
        for (first, end), stop in zip(pairwise(proposals.start), stops, strict=True):
            same = sum(tokens[k] == proposed[k] for k in range(first, stop))
            tested, agreed, longest = tested + stop - first, agreed + same, max(longest, end - first - 1)
            sums.drafted, sums.accepted = sums.drafted + end - first - 1, sums.accepted + min(same, end - first - 1)
        sums.rounds, sums.passes = sums.rounds + 1, sums.passes + len(stops)
        sums.tokens, sums.agreed = sums.tokens + tested, sums.agreed + agreed
        controller.record_acceptance(tested, agreed)
        return longest

    def _propose(self, batch: _Batch, ahead: int) -> _Proposals:
        """Draw from the draft distribution, token after token; each row has all its proposals but the last appended."""
        rows = batch.rows
        before = [len(s.token_ids) for s in rows]
        drafts: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in rows]  # (token, its log-probability, logits)
        active = list(range(len(rows)))
        for step in range(ahead + 1):
            now = [rows[i] for i in active]
            logits = batch.drafter.logits(now) if step else batch.to_rows(batch.drafter.logits(batch.nodes))
            q, nonfinite = self._draft_logits(logits, batch.guidance.value.vocabulary.size, now)
            uniforms = [_uniform(s, len(s.token_ids), _PROPOSE) for s in now]
            tokens, logps = propose(q, [s.request.sampling for s in now], uniforms)
            going = []
            for k, (i, token) in enumerate(zip(active, tokens.tolist(), strict=True)):
                s = rows[i]
                drafts[i].append((token, logps[k], q[k]))
                if step < ahead and k not in nonfinite and not s.ends_at(token) and len(s.token_ids) + 1 < s.limit:
                    s.token_ids.append(token)
                    going.append(i)
            active = going
            if not active:
                break
        return _proposals(rows, before, drafts, self.base)

    def _draft_logits(self, logits: Tensor, size: int, rows: Sequence[TokenSequence]) -> tuple[Tensor, list[int]]:
        """(draft logits over the base's columns as they are sampled from, rows that were not finite).

        Columns that the draft lacks are forbidden. Rows without a finite or an allowed token become uniform: so they are in p, where
        ``_round`` ends them.
        """
        columns, params = self.base.model.config.vocab_size, [s.request.sampling for s in rows]
        width = min(columns, logits.shape[1], size)
        q = logits
        if width < max(columns, logits.shape[1]):
            q = logits.new_full((len(logits), columns), -torch.inf)
            q[:, :width] = logits[:, :width]
        q = forbid_ignored_eos(q, params, self.base.vocabulary.eos_ids, in_place=False).to(self.base.model.device)
        q = self.grammars.restrict(q, rows, params, in_place=False)
        if nonfinite := nonfinite_rows(q):
            q = q.clone()
            q[nonfinite] = 0.0
        q, _ = process_logits(q, params, contexts_of(self.base, rows), self.base.vocabulary)
        return q, nonfinite

    def _targets(self, batch: _Batch, proposals: _Proposals) -> tuple[Tensor, Tensor]:
        """Logits of (the base alone, with guidance) at every proposal [proposals, vocabulary]; one tensor where nothing compares them."""
        counts = [end - first for first, end in pairwise(proposals.start)]
        if max(counts) == 1:
            base = batch.to_rows(self.base.outputs(batch.nodes))
        else:
            base = torch.cat(self.base.recent_outputs(batch.rows, counts))
        deltas = batch.to_rows(batch.drafter.deltas(batch.nodes))
        base = forbid_ignored_eos(base, proposals.params, self.base.vocabulary.eos_ids, in_place=False)
        nodes = [batch.rows[i] for i in proposals.row]
        base = self.grammars.restrict(base, nodes, proposals.params, proposals.position, in_place=False)
        kept = any(compares_guidance(s.request) for s in batch.rows) or bool(nonfinite_rows(base))
        guidance = batch.guidance
        implausible = implausible_tokens(base, guidance)  # before the logits are written over
        guided = add_deltas(base.clone() if kept else base, deltas, guidance, self.base.vocabulary)
        guided = forbid(guided, implausible)
        return base if kept else guided, guided


def _batch(guidance: TokenGuidance, rows: Sequence[TokenSequence], nodes: Sequence[Hypothesis], node_of: list[int]) -> _Batch:
    drafter = guidance.value.drafter(guidance.beta)
    assert drafter is not None  # check_draft refused other values
    return _Batch(guidance, rows, nodes, node_of, drafter)


def _proposals(
    rows: Sequence[TokenSequence], before: list[int], drafts: list[list[tuple[int, Tensor, Tensor]]], base: CachedLM
) -> _Proposals:
    """The drafts of all rows, one after the other."""
    start = [0, *accumulate(map(len, drafts))]
    row = [i for i, draft in enumerate(drafts) for _ in draft]
    position = [before[i] + k for i, draft in enumerate(drafts) for k in range(len(draft))]
    params = [rows[i].request.sampling for i in row]
    changed = {id(p): changes_logits(p) for p in params}
    nothing: tuple[Sequence[int], Sequence[int]] = ((), ())
    contexts = [
        (base.prompt_ids(rows[i].prompt), rows[i].token_ids[:n]) if changed[id(p)] else nothing
        for i, n, p in zip(row, position, params, strict=True)
    ]
    flat = [proposal for draft in drafts for proposal in draft]
    logps = torch.stack([logp for _, logp, _ in flat])
    tokens = torch.tensor([token for token, _, _ in flat], device=logps.device)
    return _Proposals(start, row, position, params, contexts, tokens, logps, [q for _, _, q in flat])


def _verify(rows: Sequence[TokenSequence], proposals: _Proposals, p: Tensor, unusable: set[int]) -> tuple[list[int], list[int]]:
    """(where each row's new tokens end, a token for every proposal); nothing is drawn at ``unusable`` ones."""
    uniforms = [_uniform(rows[r], n, _ACCEPT) for r, n in zip(proposals.row, proposals.position, strict=True)]
    accepted = accept(p, proposals.params, proposals.tokens, proposals.logps, uniforms).tolist()
    tokens, stops, rejected = proposals.tokens.tolist(), [], []
    for first, end in pairwise(proposals.start):
        k = next((k for k in range(first, end) if k in unusable or not accepted[k]), end)
        if k < end and k not in unusable:
            rejected.append(k)
            k += 1
        stops.append(k)
    if rejected:
        uniforms = [_uniform(rows[proposals.row[k]], proposals.position[k], _RESAMPLE) for k in rejected]
        params = [proposals.params[k] for k in rejected]
        others = resample(p[rejected], torch.stack([proposals.q[k] for k in rejected]), params, uniforms)
        for k, token in zip(rejected, others.tolist(), strict=True):
            tokens[k] = token
    return stops, tokens


def _uniform(s: TokenSequence, position: int, purpose: int) -> float:
    """The random number of a position for one purpose."""
    return uniform(s.request.seed, s.rng_path, position, _STREAM, purpose)
