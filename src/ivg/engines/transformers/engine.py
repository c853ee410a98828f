"""The reference engine: any transformers causal language model, all beams of all requests in one batch.

Knows: one token at a time for many beams, each with its own sampling, guidance and limits. Must not know which beams
are worth keeping (``search.searcher``). What the base's prompt is read once for, its children share: the first token of
all children of a beam is drawn from one pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ivg.engines.sequences import TokenSequence, append_token, as_beams, decoded, fork
from ivg.engines.transformers.guidance import check_guidance, guided, nan_error, nothing_left
from ivg.engines.transformers.logprobs import details
from ivg.engines.transformers.processors import exhausted_rows, processed
from ivg.engines.transformers.sampling import broken_rows, drawn_logps, entropy, sample
from ivg.engines.transformers.speculation import Speculator
from ivg.errors import ScoreFault
from ivg.models.cached_lm import CachedLM
from ivg.types import Beam, DecodeState, Engine, EntropyStop, ExpandRequest, Prompt, SamplingParams, TokenGuidance
from ivg.utils.rng import uniform


class TransformersEngine(Engine):
    """Extends beams with a :class:`~ivg.models.cached_lm.CachedLM` of the base model."""

    name = "transformers"

    def __init__(self, base: CachedLM) -> None:
        self.base = base
        base.reads_given_ids = True
        self.vocabulary = base.vocabulary
        self.speculation = Speculator(base, append_token)

    def open(self, prompt: Prompt, sampling: SamplingParams) -> Beam:
        """The empty response to ``prompt``.

        Raises:
            PromptError: empty, or too long together with ``sampling.max_new_tokens``.
        """
        return self.base.root(prompt, sampling.max_new_tokens)

    def prompt_tokens(self, prompt: Prompt) -> int:
        """Length of the prompt in base tokens."""
        return len(self.base.prompt_ids(prompt))

    def check(self, guidance: TokenGuidance | None) -> None:
        """Raise where ``guidance`` does not fit the base (see ``engine.guidance``)."""
        if guidance is not None:
            check_guidance(guidance, self.vocabulary)

    def release(self, keys: Sequence[int]) -> None:
        """Free the base's rows of these beams."""
        self.base.release(keys)

    def reset_caches(self) -> None:
        """Empty the base's cache."""
        self.base.reset_cache()

    def release_memory(self) -> None:
        """Give memory of the base's cache that holds nothing back to the system."""
        self.base.model.release_memory()

    def extend(self, requests: Sequence[ExpandRequest]) -> list[list[Beam]]:
        """The children of every request's beam, each ``tokens`` longer, or finished, or paused.

        Children whose model gave NaN end with ``finish="error"``; the others go on.
        """
        families = [fork(request) for request in requests]
        ahead = [self.speculation.takes(request) for request in requests]
        self.speculation.grow([(o.beam, family) for o, family, drafted in zip(requests, families, ahead, strict=True) if drafted])
        self._grow([(o, family) for o, family, drafted in zip(requests, families, ahead, strict=True) if not drafted])
        self._hand_on([d for family in families for d in family if d.finish is None and not d.paused])
        return [as_beams(request.beam, family) for request, family in zip(requests, families, strict=True)]

    def _hand_on(self, drafts: Sequence[TokenSequence]) -> None:
        """Children that grew by one token have asked for nothing yet: they take their parents' caches before those are released."""
        self.base.inherit_cache(drafts)
        guided: dict[TokenGuidance, list[TokenSequence]] = {}
        for d in drafts:
            if d.request.guidance is not None:
                guided.setdefault(d.request.guidance, []).append(d)
        for guidance, some in guided.items():
            guidance.value.inherit_cache(some)

    def _grow(self, families: list[tuple[ExpandRequest, list[TokenSequence]]]) -> None:
        """Token after token, all in one batch."""
        if not families:
            return
        drafts = [d for _, family in families for d in family]
        requests = [request for request, _ in families]
        parents = [request.beam for request in requests]
        row_of = [i for i, (_, family) in enumerate(families) for _ in family]
        self._step(drafts, parents, [p.decoded for p in parents], requests, row_of)
        while active := [d for d in drafts if d.finish is None and not d.paused and len(d.token_ids) < d.limit]:
            self._step(active, active, [decoded(d) for d in active], [d.request for d in active], list(range(len(active))))

    def _step(
        self,
        drafts: list[TokenSequence],
        nodes: Sequence[Beam | TokenSequence],
        places: list[DecodeState],
        requests: list[ExpandRequest],
        row_of: list[int],
    ) -> None:
        """One token for every draft that does not pause; ``row_of[i]`` is the node whose distribution draft i draws from."""
        raw = self.base.outputs(nodes)
        entropies = entropy(raw) if any(o.pause or (o.guidance is not None and o.guidance.gate > 0) for o in requests) else None
        if entropies is not None and (paused := _pausing(entropies, nodes, requests)):
            for d, row in zip(drafts, row_of, strict=True):
                d.paused = row in paused
            rows = [i for i in range(len(nodes)) if i not in paused]
            new_place = {row: i for i, row in enumerate(rows)}
            row_of = [new_place[row] for row in row_of if row in new_place]
            drafts = [d for d in drafts if not d.paused]
            raw, entropies = raw[rows], entropies[rows]
            nodes, places, requests = [nodes[i] for i in rows], [places[i] for i in rows], [requests[i] for i in rows]
        if drafts:
            self._draw(drafts, row_of, nodes, requests, *self._mix(raw, entropies, nodes, places, requests))

    def _draw(
        self,
        drafts: list[TokenSequence],
        row_of: list[int],
        nodes: Sequence[Beam | TokenSequence],
        requests: Sequence[ExpandRequest],
        plain: Tensor,
        mixed: Tensor,
        faults: Mapping[int, ScoreFault],
    ) -> None:
        """Draw one token for every draft from its row of ``mixed``; ``plain`` is the base alone, both [rows, vocabulary].

        ``faults``: why the guide has no number for a row.
        """
        for i in broken_rows(mixed):
            base = plain[i].clone()
            mixed[i] = 0.0
            for d, row in zip(drafts, row_of, strict=True):
                if row == i:  # the two are one tensor where nothing guides, or where the base was seen to be sound
                    sound = plain is mixed and d.request.guidance is not None and d.request.guidance.beta != 0
                    d.finish, d.error = "error", faults.get(i) or nan_error(None if sound else base, len(d.token_ids))
        draws = [uniform(d.request.seed, d.rng_path, len(d.token_ids)) for d in drafts]
        final = self._processed(mixed, nodes, requests)
        if final is not mixed and (left := set(exhausted_rows(final))):
            for d, row in zip(drafts, row_of, strict=True):
                if row in left and d.finish is None:
                    d.finish, d.error = "error", nothing_left(len(d.token_ids))
            final[sorted(left)] = 0.0
        tokens = sample(final, [d.request.sampling for d in drafts], draws, row_of)
        index = torch.tensor(row_of, device=mixed.device)
        shifts = _moved_by(drafts, index, tokens, plain, mixed, [d.request.record for d in drafts], filters=False)
        weighed = [d.request.return_log_ratio for d in drafts]
        alone = plain if final is mixed or not any(weighed) else self._processed(plain, nodes, requests)
        ratios = _moved_by(drafts, index, tokens, alone, final, weighed, filters=True)
        ids, params = tokens.tolist(), [d.request.sampling for d in drafts]
        looks = details(ids, row_of, params, [d.request.alternatives for d in drafts], plain, mixed)
        for d, token, shift, ratio, look in zip(drafts, ids, shifts, ratios, looks, strict=True):
            if d.finish is None:
                d.log_ratio -= ratio
                append_token(d, token, shift, look)

    def _processed(self, logits: Tensor, nodes: Sequence[Beam | TokenSequence], requests: Sequence[ExpandRequest]) -> Tensor:
        """Logits [rows, vocabulary] of ``nodes`` as their requests' settings change them (``engine.processors``)."""

        def context(row: int) -> tuple[Sequence[int], Sequence[int]]:
            return self.base.prompt_ids(nodes[row].prompt), nodes[row].token_ids

        return processed(logits, [request.sampling for request in requests], context, self.vocabulary.eos_ids)

    def _mix(
        self,
        raw: Tensor,
        entropies: Tensor | None,
        nodes: Sequence[Beam | TokenSequence],
        places: list[DecodeState],
        requests: list[ExpandRequest],
    ) -> tuple[Tensor, Tensor, dict[int, ScoreFault]]:
        """(base alone, with guidance, rows that the guide has no number for), forbidden end-of-sequence tokens out of both.

        Nodes with the same guidance share one call.
        ``raw`` is written over. The two are one tensor where nothing asks what guidance moved.
        """
        groups: dict[TokenGuidance, list[int]] = {}
        for i, request in enumerate(requests):
            if request.guidance is not None and request.guidance.beta != 0:
                groups.setdefault(request.guidance, []).append(i)
        silent = [i for i, request in enumerate(requests) if request.sampling.ignore_eos]
        if silent and self.vocabulary.eos_ids:
            raw[torch.tensor(silent)[:, None], torch.tensor(sorted(self.vocabulary.eos_ids))] = -torch.inf
        compared = any(o.record or o.return_log_ratio or o.alternatives is not None for o in requests) or bool(broken_rows(raw))
        plain = raw.clone() if groups and compared else raw
        faults: dict[int, ScoreFault] = {}
        for guidance, rows in groups.items():
            broken: dict[int, ScoreFault] = {}
            known = None if entropies is None else entropies[rows]
            every = len(rows) == len(raw)
            part = raw if every else raw[rows]
            moved = guided(part, [nodes[i] for i in rows], [places[i] for i in rows], guidance, known, in_place=True, faults=broken)
            faults |= {rows[k]: fault for k, fault in broken.items()}
            if every:
                raw = moved
            else:
                raw[rows] = moved
        return plain, raw, faults


def _pausing(entropies: Tensor, nodes: Sequence[Beam | TokenSequence], requests: Sequence[ExpandRequest]) -> set[int]:
    """Rows whose chunk ends here."""

    def stops(pause: EntropyStop | None, length: int, nats: float) -> bool:
        return pause is not None and length >= pause.after and nats >= pause.entropy

    known = entropies.tolist()
    return {i for i, (node, request) in enumerate(zip(nodes, requests, strict=True)) if stops(request.pause, len(node.token_ids), known[i])}


def _moved_by(
    drafts: Sequence[TokenSequence], index: Tensor, tokens: Tensor, plain: Tensor, mixed: Tensor, wanted: Sequence[bool], *, filters: bool
) -> list[float]:
    """Log pi_guided - log pi_base of the drawn tokens, for those that want it; 0 where nothing guides, at no cost."""
    out = [0.0] * len(drafts)
    rows = [k for k, d in enumerate(drafts) if wanted[k] and d.request.guidance is not None]
    if rows:
        params = [drafts[k].request.sampling for k in rows]
        guided_logps, base_logps = (drawn_logps(z[index[rows]], params, tokens[rows], filters=filters) for z in (mixed, plain))
        for k, shift in zip(rows, (guided_logps - base_logps).tolist(), strict=True):
            out[k] = shift
    return out
