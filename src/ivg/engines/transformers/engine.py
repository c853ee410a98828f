"""The reference engine: causal language models of transformers, all beams of all requests in one batch.

Grows many sequences by one token at a time, each with its own sampling settings, guidance and limits. The first token of all children
of a beam is drawn from one forward pass of their parent. Must not depend on which beams are kept (``search.searcher``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ivg.engines.grammar import GrammarMasks
from ivg.engines.sequences import TokenSequence, append_token, as_beams, fork
from ivg.engines.transformers.draft_model import DraftWriter
from ivg.engines.transformers.guidance import apply_guidance, check_guidance, compares_guidance, nan_error, no_token_error, reads_ahead
from ivg.engines.transformers.kl_budget import BudgetRow, guide_within_budget
from ivg.engines.transformers.logprobs import compare_guidance
from ivg.engines.transformers.processors import contexts_of, forbid_ignored_eos, process_logits
from ivg.engines.transformers.sampling import entropy, nonfinite_rows, sample
from ivg.engines.transformers.speculation import Speculator
from ivg.engines.transformers.teacher_forcing import given_logprobs
from ivg.engines.transformers.thinking import force, forced_token, is_guided, marker_ids
from ivg.errors import ConfigError, ScoreFault
from ivg.models.cached_lm import CachedLM, read_with_guides
from ivg.models.support import body_of
from ivg.types import (
    Beam,
    Engine,
    ExpandRequest,
    Hypothesis,
    LogprobsRequest,
    SamplingParams,
    Thinking,
    TokenGuidance,
    TokenLogprobs,
    Value,
)
from ivg.types.thinking import answer_of
from ivg.utils.rng import uniform


@dataclass(slots=True)
class _Step:
    """What one forward pass of the base is for.

    Attributes:
        sequences: that grow by one token.
        row_of: for each the row that its token is drawn from.
        nodes: for each row what the base reads: a sequence itself, or the parent that several sequences still share.
        requests: that they belong to.
    """

    sequences: list[TokenSequence]
    row_of: list[int]
    nodes: Sequence[Beam | TokenSequence]
    requests: list[ExpandRequest]

    def without(self, rows: set[int]) -> _Step:
        """The same without these rows and the sequences that draw from them."""
        left = [i for i in range(len(self.nodes)) if i not in rows]
        new_row = {row: i for i, row in enumerate(left)}
        return _Step(
            [s for s, row in zip(self.sequences, self.row_of, strict=True) if row in new_row],
            [new_row[row] for row in self.row_of if row in new_row],
            [self.nodes[i] for i in left],
            [self.requests[i] for i in left],
        )


@dataclass(slots=True)
class _Logits:
    """What a step draws from, both [rows, vocabulary]; one tensor where nothing compares the two.

    Attributes:
        base: of the base model alone.
        guided: with token guidance.
        faults: why the guide has no number for a node, by its key.
        costs: what the token of a row adds to ``kl_spent`` and ``kl_rate``, by row.
    """

    base: Tensor
    guided: Tensor
    faults: Mapping[int, ScoreFault]
    costs: Mapping[int, tuple[float, float]]


class TransformersEngine(Engine):
    """Extends beams with a :class:`~ivg.models.cached_lm.CachedLM` of the base model."""

    name = "transformers"

    def __init__(self, base: CachedLM) -> None:
        self.base = base
        base.reads_given_ids = True
        self.vocabulary = base.vocabulary
        self.grammars = GrammarMasks(base.vocabulary)
        self.speculation = Speculator(base, self.grammars)
        self.draft_writer = DraftWriter(base, self.grammars)

    def check(self, guidance: TokenGuidance | None) -> None:
        """Raise where ``guidance`` does not fit the base (see :func:`check_guidance`), or drafts and a model cannot be cut back."""
        if guidance is None:
            return
        check_guidance(guidance, self.vocabulary)
        for model in (self.base, *guidance.value.cached_lms()) if guidance.draft else ():
            if not model.model.cache.rolls_back:
                kind = type(body_of(model.network)).__name__
                raise ConfigError(
                    f"draft={guidance.draft} takes back tokens that were read, but {model.name} ({kind}) keeps a state that cannot be cut\n"
                    "  leave draft out"
                )

    def check_drafter(self, drafter: Value | None, sampling: SamplingParams, *, compared: bool = False) -> None:
        """Raise where ``drafter`` has no model that can write in the base's place (see :meth:`DraftWriter.check`)."""
        if drafter is not None:
            self.draft_writer.check(drafter, sampling, compared=compared)

    def writes_whole_chunks(self, drafter: Value) -> bool:
        """Where the draft model has other tokens than the base."""
        return self.draft_writer.writes_text(drafter)

    def check_sampling(self, sampling: SamplingParams) -> None:
        """Raise where the grammar of structured output cannot be used."""
        self.grammars.check(sampling)

    def check_thinking(self, thinking: Thinking | None) -> None:
        """Raise where the base's tokens do not spell the marker."""
        if thinking is not None:
            marker_ids(self.vocabulary, thinking.guide_after)

    def release(self, keys: Sequence[int]) -> None:
        """Free the base's rows of these beams, and those of draft models."""
        self.base.release(keys)
        self.draft_writer.release(keys)
        self.grammars.release(keys)

    def reset_caches(self) -> None:
        """Empty the base's cache, and those of draft models."""
        self.base.reset_cache()
        self.draft_writer.reset_caches()
        self.grammars.reset()

    def release_memory(self) -> None:
        """Return memory of the base's cache that nothing needs to the operating system."""
        self.base.model.release_memory()

    def logprobs(self, requests: Sequence[LogprobsRequest]) -> list[list[TokenLogprobs]]:
        """Log-probabilities of given tokens (see :func:`~ivg.engines.transformers.teacher_forcing.given_logprobs`)."""
        return given_logprobs(self.base, requests)

    def reads_last_token(self, guidance: TokenGuidance | None) -> bool:
        """No, but for values that score candidates, each behind the tokens before it."""
        return guidance is not None and not reads_ahead(guidance, self.vocabulary)

    def extend(self, requests: Sequence[ExpandRequest]) -> list[list[Beam]]:
        """The children of every request's beam, each ``tokens`` longer, or finished, or paused.

        Children whose model gave NaN end with ``finish="error"``; the others go on.
        """
        children = [fork(request) for request in requests]
        pairs = list(zip(requests, children, strict=True))
        self.draft_writer.extend([pair for pair in pairs if pair[0].drafted])
        written = [pair for pair in pairs if not pair[0].drafted]
        drafting = [self.speculation.can_draft(request) for request, _ in written]
        self.speculation.extend([(r.beam, some) for (r, some), drafts in zip(written, drafting, strict=True) if drafts])
        self._extend([pair for pair, drafts in zip(written, drafting, strict=True) if not drafts])
        self._inherit_caches([s for some in children for s in some if not (s.paused and s.request.pause)])
        return [as_beams(request.beam, some) for request, some in pairs]

    def _inherit_caches(self, sequences: Sequence[TokenSequence]) -> None:
        """Children of one token were never read: they inherit their parents' caches before those are released.

        Those that ended inherit the base's alone, where a value goes on from what the base has read.
        """
        if self.base.states is not None:
            self.base.states.inherit(sequences)
            self.base.inherit_cache(sequences)
        sequences = [s for s in sequences if s.finish is None]
        self.base.inherit_cache(sequences)
        self.draft_writer.inherit_cache(sequences)
        guided: dict[TokenGuidance, list[Hypothesis]] = {}
        for s in sequences:
            if s.request.guidance is not None and s.answer_start is not None:
                guided.setdefault(s.request.guidance, []).append(answer_of(s, s.request.thinking))
        for guidance, some in guided.items():
            guidance.value.inherit_cache(some)

    def _extend(self, pairs: list[tuple[ExpandRequest, list[TokenSequence]]]) -> None:
        """Token after token, all in one batch."""
        if not pairs:
            return
        requests, parents = [request for request, _ in pairs], [request.beam for request, _ in pairs]
        sequences = [s for _, some in pairs for s in some]
        row_of = [i for i, (_, some) in enumerate(pairs) for _ in some]
        self._step(_Step(sequences, row_of, parents, requests))
        if self.base.states is not None and any(s.finish is not None for s in sequences):
            self.base.inherit_cache([s for s in sequences if not s.paused])  # those that ended lose their parent's row to the others else
        while active := [s for s in sequences if s.finish is None and not s.paused and len(s.token_ids) < s.limit]:
            self._step(_Step(active, list(range(len(active))), active, [s.request for s in active]))

    def _step(self, step: _Step) -> None:
        """One token for every sequence that does not pause."""
        logits = read_with_guides(self.base, step.nodes, self._guides_on_base(step))
        entropies = None
        if any(r.pause or (r.guidance is not None and r.guidance.gate > 0) for r in step.requests):
            entropies = entropy(logits)
            if paused := _pausing(entropies, step):
                for s, row in zip(step.sequences, step.row_of, strict=True):
                    s.paused = row in paused
                left = [i for i in range(len(step.nodes)) if i not in paused]
                step, logits, entropies = step.without(paused), logits[left], entropies[left]
        if step.sequences:
            self._draw(step, self._guide(step, logits, entropies))

    def _guides_on_base(self, step: _Step) -> dict[CachedLM, list[Hypothesis]]:
        """Guides on the base's network that are about to read, whatever the base's outputs are, and what each of them reads."""
        found: dict[CachedLM, list[Hypothesis]] = {}
        readers: dict[TokenGuidance, list[CachedLM]] = {}
        if any(request.pause for request in step.requests):
            return found
        for node, request in zip(step.nodes, step.requests, strict=True):
            guidance = request.guidance
            if guidance is None or not is_guided(request, node) or answer_of(node, request.thinking) is not node:
                continue
            if guidance.kl_budget is not None and node.kl_spent >= guidance.kl_budget:
                continue
            if guidance not in readers:
                always = guidance.beta != 0 and guidance.gate == 0 and reads_ahead(guidance, self.vocabulary)
                lms = dict.fromkeys(guidance.value.cached_lms()) if always else {}
                readers[guidance] = [lm for lm in lms if lm is not self.base and lm.model is self.base.model]
            for lm in readers[guidance]:
                found.setdefault(lm, []).append(node)
        return found

    def _guide(self, step: _Step, logits: Tensor, entropies: Tensor | None) -> _Logits:
        """``logits`` [rows, vocabulary], which are written over, with and without guidance; without tokens that are never drawn.

        Rows with the same guidance share one call.
        """
        groups: dict[TokenGuidance, list[int]] = {}
        for i, request in enumerate(step.requests):
            if request.guidance is not None and is_guided(request, step.nodes[i]):
                groups.setdefault(request.guidance, []).append(i)
        params = [request.sampling for request in step.requests]
        forbid_ignored_eos(logits, params, self.vocabulary.eos_ids)
        self.grammars.restrict(logits, step.nodes, params)
        base = logits
        limited = any(guidance.kl_budget is not None for guidance in groups)
        if groups and (limited or any(map(compares_guidance, step.requests)) or nonfinite_rows(logits)):
            base = logits.clone()
        faults: dict[int, ScoreFault] = {}
        costs: dict[int, tuple[float, float]] = {}
        for guidance, rows in groups.items():
            every = len(rows) == len(logits)
            nodes = [answer_of(step.nodes[i], step.requests[i].thinking) for i in rows]
            own = None if entropies is None else entropies[rows]
            if guidance.kl_budget is None:
                guided = apply_guidance(logits if every else logits[rows], nodes, guidance, own, faults)
            else:
                known = [_budget_row(node, step.nodes[i], step.requests[i]) for node, i in zip(nodes, rows, strict=True)]
                guided, found = guide_within_budget(base[rows], known, guidance, own, faults)
                costs |= zip(rows, found, strict=True)
            if every:
                logits = guided
            else:
                logits[rows] = guided
        return _Logits(base, logits, faults, costs)

    def _draw(self, step: _Step, logits: _Logits) -> None:
        """Draw one token for every sequence from its row."""
        sequences, row_of = step.sequences, step.row_of
        _end_nonfinite(step, logits)
        process = partial(self.process_logits, nodes=step.nodes, requests=step.requests)
        final, exhausted = process(logits.guided)
        for s, row in zip(sequences, row_of, strict=True):
            if row in exhausted and s.finish is None:
                s.finish, s.error = "error", no_token_error(len(s.token_ids), s.request.guidance)
        uniforms = [uniform(s.request.seed, s.rng_path, len(s.token_ids)) for s in sequences]
        tokens = sample(final, [s.request.sampling for s in sequences], uniforms, row_of)
        compared = compare_guidance([s.request for s in sequences], row_of, tokens, logits.base, logits.guided, final, process)
        for s, row, token, (shift, ratio, detail) in zip(sequences, row_of, tokens.tolist(), compared, strict=True):
            if s.finish is None:
                s.log_ratio -= ratio
                nats, rate = logits.costs.get(row, (0.0, 0.0))
                s.kl_spent, s.kl_rate = s.kl_spent + nats, s.kl_rate + rate
                append_token(s, token, shift, detail, complete=self.grammars.completes(s, token))

    def process_logits(
        self, logits: Tensor, nodes: Sequence[Hypothesis], requests: Sequence[ExpandRequest]
    ) -> tuple[Tensor, frozenset[int]]:
        """Logits [rows, vocabulary] behind ``nodes`` as the requests' settings change them (see ``processors.process_logits``).

        Where a budget of thinking is spent, only the marker's next token is left.
        """
        final, exhausted = process_logits(logits, [r.sampling for r in requests], contexts_of(self.base, nodes), self.vocabulary)
        forced = [forced_token(self.vocabulary, r.thinking, node) for r, node in zip(requests, nodes, strict=True)]
        return force(final, forced), exhausted - {row for row, token in enumerate(forced) if token is not None}


def _end_nonfinite(step: _Step, logits: _Logits) -> None:
    """End the sequences of rows with NaN or infinity; ``logits.guided`` becomes finite."""
    for i in nonfinite_rows(logits.guided):
        base = logits.base[i].clone()
        logits.guided[i] = 0.0
        for s, row in zip(step.sequences, step.row_of, strict=True):
            if row == i:  # the two are one tensor where nothing guides, or where the base was found to be finite
                finite = logits.base is logits.guided and s.request.guidance is not None and s.request.guidance.beta != 0
                s.finish, s.error = "error", logits.faults.get(step.nodes[i].key) or nan_error(None if finite else base, len(s.token_ids))


def _budget_row(answer: Any, node: Beam | TokenSequence, request: ExpandRequest) -> BudgetRow:
    """What the budget of guidance knows of the row of ``node``, whose answer is ``answer``."""
    before, sampling = len(node.token_ids), request.sampling
    tokens = before - (node.answer_start or 0) + 1
    return BudgetRow(answer, node.kl_spent, node.kl_rate, tokens, sampling.max_new_tokens - before, sampling.temperature)


def _pausing(entropies: Tensor, step: _Step) -> set[int]:
    """Rows whose chunk ends here."""
    rows = enumerate(zip(step.nodes, step.requests, entropies.tolist(), strict=True))
    pauses = ((i, request.pause, len(node.token_ids), nats) for i, (node, request, nats) in rows)
    return {i for i, pause, length, nats in pauses if pause is not None and length >= pause.after and nats >= pause.entropy}
