"""Speculative guidance: a value drafts some tokens, one pass of the base reads them all, and every token is a draw from p.

p is the exact guided distribution, [pi_base * (pi_tuned / pi_untuned)^beta]^(1/T) after all filters; q is the draft's, after
the same. Every token is drawn by the rule of ``engine.coupling`` from three numbers of the counter-based generator at its
place, whether or not it was drafted. So it depends on prefix, seed and rng_path alone: how many tokens are drafted ahead
changes only the speed. That is why timings may choose the number (``engine.pace``).

The guide pair must read every token anyway. At beta = 1 the draft is the tuned model's, and untuned model and base read the
drafted stretch in one pass each. Rows go on by different numbers of tokens; what was read in vain is forgotten.

Must not know what ends a response (the engine's ``push``), nor how values draft.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from ivg.engines.transformers.draft_length import DraftLength
from ivg.engines.transformers.guidance import add_deltas, nan_error, nothing_left
from ivg.engines.transformers.logprobs import details
from ivg.engines.transformers.processors import Contexts, exhausted_rows, processed, processes
from ivg.engines.transformers.rejection_sampling import accepts, propose, replacement
from ivg.engines.transformers.sampling import broken_rows, distinct, drawn_logps
from ivg.errors import ConfigError
from ivg.models.cached_lm import CachedLM
from ivg.types import Beam, Drafter, ExpandRequest, FinishReason, Hypothesis, SamplingParams, TokenGuidance, TokenLogprobs, Value
from ivg.utils.rng import uniform

NUMBERS = 1 << 24
"""Rows x places x vocabulary of one round at most, so that its tensors stay small: 64 MiB each in float32."""
_TAG = 0x5BEC
_PROPOSE, _ACCEPT, _REPLACE = 0, 1, 2
_PACES = 64


class Growing(Hypothesis, Protocol):
    """A child while it grows: ``engine.transformers`` has them."""

    request: ExpandRequest
    rng_path: int
    limit: int
    token_ids: list[int]  # type: ignore[assignment]
    finish: FinishReason | None  # type: ignore[assignment]
    error: str | None
    log_ratio: float


Push = Callable[[Any, int, float, TokenLogprobs | None], None]
"""Appends a token, its recorded shift and its detail to a child, and sees whether that ends it."""


@dataclass(slots=True)
class Counts:
    """What was done so far. A pass of the base counts once for each row that takes part."""

    rounds: int = 0
    passes: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    agreed: int = 0


@dataclass(slots=True)
class _Batch:
    """Who takes part in a round. ``nodes`` are the rows themselves, or the parents that they still share; ``node_of`` each row's."""

    guidance: TokenGuidance
    rows: Sequence[Growing]
    nodes: Sequence[Hypothesis]
    node_of: list[int]

    @property
    def shared(self) -> bool:
        """Do rows draw from one pass of their parent?"""
        return len(self.nodes) < len(self.rows)

    @property
    def value(self) -> Value:
        """What drafts."""
        return self.guidance.value

    def spread(self, of_nodes: Tensor) -> Tensor:
        """What belongs to nodes, for every row."""
        return of_nodes[torch.tensor(self.node_of, device=of_nodes.device)] if self.shared else of_nodes


@dataclass(slots=True)
class _Places:
    """All places of a round, one row's after the other's, and what was proposed at each.

    Those of row r are ``start[r]`` … ``start[r + 1]`` - 1; ``position`` counts tokens of the response before the place.
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
    """Grows hypotheses whose guidance drafts.

    Args:
        base: reads the drafts.
        push: the engine's way to append a token.

    Attributes:
        ahead: draft always so many tokens, where there is room; None: as ``DraftLength`` finds best.
    """

    def __init__(self, base: CachedLM, append_token: Push) -> None:
        self.base, self.append_token = base, append_token
        self.ahead: int | None = None
        self.counts = Counts()
        self._paces: dict[TokenGuidance, DraftLength] = {}

    @staticmethod
    def takes(request: ExpandRequest) -> bool:
        """Is this request's guidance one that drafts?

        Raises:
            ConfigError: it is, but chunks shall end where the base is in doubt.
        """
        guidance = request.guidance
        if guidance is None or guidance.draft == 0 or guidance.beta == 0:
            return False
        if request.pause is not None:
            raise ConfigError(f"draft={guidance.draft} cannot stop at a token of high entropy (rule=reject)\n  leave draft out")
        return True

    def stats(self) -> dict[str, float]:
        """Sums since :meth:`reset`, and what follows from them.

        ``rounds``; ``passes``: of the base, counted for each row; ``tokens`` grown; ``drafted`` ahead and of these
        ``accepted``; ``agreed``: tokens that are what the pair proposed there, drafted ahead or not; ``acceptance``:
        their share of all; ``passes_per_token``: 1 without drafts.
        """
        c = self.counts
        rates = {"acceptance": c.agreed / max(1, c.tokens), "passes_per_token": c.passes / max(1, c.tokens)}
        return {**asdict(c), **rates}

    def reset(self) -> None:
        """Count from zero; what was learnt about speed stays."""
        self.counts = Counts()

    def grow(self, families: Sequence[tuple[Beam, Sequence[Growing]]]) -> None:
        """Every child up to its limit, or its end."""
        groups: dict[TokenGuidance, list[tuple[Beam, Sequence[Growing]]]] = {}
        for beam, family in families:
            guidance = family[0].request.guidance
            assert guidance is not None
            groups.setdefault(guidance, []).append((beam, family))
        for guidance, group in groups.items():
            self._grow(guidance, group)

    def _grow(self, guidance: TokenGuidance, group: Sequence[tuple[Beam, Sequence[Growing]]]) -> None:
        rows = [d for _, family in group for d in family]
        pace = self._pace(guidance)
        if len(rows) > len(group) and self._choose(pace, rows) == 0:  # sisters share the pass of their parent
            parents = [i for i, (_, family) in enumerate(group) for _ in family]
            self._round(_Batch(guidance, rows, [beam for beam, _ in group], parents), pace, 0)
        while active := [d for d in rows if d.finish is None and len(d.token_ids) < d.limit]:
            fresh = any(not d.token_ids for d in active)
            ahead, started = self._choose(pace, active), time.perf_counter()
            done = self._round(_Batch(guidance, active, active, list(range(len(active)))), pace, ahead)
            if done == ahead and not fresh:  # not where a prompt was read as well
                pace.took(len(active), ahead, time.perf_counter() - started)

    def _pace(self, guidance: TokenGuidance) -> DraftLength:
        if guidance not in self._paces and len(self._paces) >= _PACES:
            del self._paces[next(iter(self._paces))]
        return self._paces.setdefault(guidance, DraftLength(guidance.draft))

    def _choose(self, pace: DraftLength, rows: Sequence[Growing]) -> int:
        rooms = [d.limit - len(d.token_ids) for d in rows]
        fits = NUMBERS // (len(rows) * self.base.vocabulary.size) - 1
        rooms = [max(1, min(room, fits + 1)) for room in rooms]
        return pace.choose(rooms) if self.ahead is None else min(self.ahead, max(rooms) - 1)

    # One round

    def _round(self, batch: _Batch, pace: DraftLength, ahead: int) -> int:
        """One pass of the base; every row grows by 1 to ``ahead`` + 1 tokens. How many tokens were drafted ahead at most."""
        rows, drafter = batch.rows, batch.value.drafter(batch.guidance.beta)
        assert drafter is not None  # check_draft refused other values
        before = [len(d.token_ids) for d in rows]
        places = self._propose(batch, drafter, ahead)
        plain, mixed = self._targets(batch, drafter, places)
        if broken := set(broken_rows(mixed)):
            mixed[sorted(broken)] = 0.0
        final = self._processed(mixed, places.params, places.contexts.__getitem__)
        if final is not mixed and (left := set(exhausted_rows(final))):
            final[sorted(left)] = 0.0
        else:
            left = set()
        stops, tokens = _verify(rows, places, final, broken | left)
        alone = plain if final is mixed else self._processed(plain, places.params, places.contexts.__getitem__)
        shifts, ratios = _moved_by(rows, places, tokens, (plain, mixed), (alone, final))
        looks = details(tokens, range(len(tokens)), places.params, [rows[r].request.alternatives for r in places.row], plain, mixed)
        for row, d in enumerate(rows):
            del d.token_ids[before[row] :]
            for k in range(places.start[row], stops[row]):
                if d.finish is None:
                    d.log_ratio -= ratios[k]
                    self.append_token(d, tokens[k], shifts[k], looks[k])
            if d.finish is None and (stop := stops[row]) < places.start[row + 1] and stop in broken | left:
                source = None if plain is mixed else plain[stop]
                d.finish = "error"
                d.error = nothing_left(len(d.token_ids)) if stop in left else nan_error(source, len(d.token_ids))
            stops[row] = places.start[row] + len(d.token_ids) - before[row]
        if ahead:
            self.base.truncate(rows)
            batch.value.truncate(rows)
        return self._count(pace, places, stops, tokens)

    def _count(self, pace: DraftLength, places: _Places, stops: list[int], tokens: list[int]) -> int:
        """Add the round to the counts; the longest draft."""
        c, proposed = self.counts, places.tokens.tolist()
        tested = agreed = longest = 0
        for first, end, stop in zip(places.start, places.start[1:], stops, strict=False):
            stood = sum(tokens[k] == proposed[k] for k in range(first, stop))
            tested, agreed, longest = tested + stop - first, agreed + stood, max(longest, end - first - 1)
            c.drafted, c.accepted = c.drafted + end - first - 1, c.accepted + min(stood, end - first - 1)
        c.rounds, c.passes = c.rounds + 1, c.passes + len(stops)
        c.tokens, c.agreed = c.tokens + tested, c.agreed + agreed
        pace.saw(tested, agreed)
        return longest

    def _propose(self, batch: _Batch, drafter: Drafter, ahead: int) -> _Places:
        """Draw from the draft distribution, token after token; each row has all its proposals but the last appended."""
        rows, eos = batch.rows, self.base.vocabulary.eos_ids
        before = [len(d.token_ids) for d in rows]
        stretch: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in rows]  # (token, its log-probability, logits)
        active = list(range(len(rows)))
        for step in range(ahead + 1):
            now = [rows[i] for i in active]
            logits = drafter.logits(now) if step else batch.spread(drafter.logits(batch.nodes))
            q = self._as_drawn(logits, batch.value.vocabulary.size, now)
            if lost := broken_rows(q):  # p is broken there as well: `_verify` ends the row
                q = q.clone()
                q[lost] = 0.0
            params = [d.request.sampling for d in now]
            q = self._processed(q, params, partial(self._context, now))
            if any(map(processes, distinct(params))) and (left := exhausted_rows(q)):
                q[left] = 0.0  # so is p: `_round` ends the row
            uniforms = [_number(d, len(d.token_ids), _PROPOSE) for d in now]
            tokens, logps = propose(q, params, uniforms)
            going = []
            for k, (i, token) in enumerate(zip(active, tokens.tolist(), strict=True)):
                d = rows[i]
                stretch[i].append((token, logps[k], q[k]))
                ends = k in lost or (token in eos and not d.request.sampling.ignore_eos)
                if step < ahead and not ends and len(d.token_ids) + 1 < d.limit:
                    d.token_ids.append(token)
                    going.append(i)
            active = going
            if not active:
                break
        return _places(rows, before, stretch, self.base)

    def _context(self, rows: Sequence[Growing], row: int) -> tuple[Sequence[int], Sequence[int]]:
        return self.base.prompt_ids(rows[row].prompt), rows[row].token_ids

    def _processed(self, logits: Tensor, params: Sequence[SamplingParams], contexts: Contexts) -> Tensor:
        return processed(logits, params, contexts, self.base.vocabulary.eos_ids)

    def _as_drawn(self, logits: Tensor, size: int, rows: Sequence[Growing]) -> Tensor:
        """Draft logits over the base's columns; those that the draft lacks, and forbidden ends, are out."""
        columns = self.base.model.config.vocab_size
        width = min(columns, logits.shape[1], size)
        q = logits
        if width < max(columns, logits.shape[1]):
            q = logits.new_full((len(logits), columns), -torch.inf)
            q[:, :width] = logits[:, :width]
        return self._silenced(q, [d.request.sampling for d in rows]).to(self.base.model.device)

    def _silenced(self, logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
        """Without end-of-sequence tokens where the request ignores them."""
        silent, eos = [i for i, p in enumerate(params) if p.ignore_eos], sorted(self.base.vocabulary.eos_ids)
        if silent and eos:
            logits = logits.clone()
            logits[torch.tensor(silent)[:, None], torch.tensor(eos)] = -torch.inf
        return logits

    def _targets(self, batch: _Batch, drafter: Drafter, places: _Places) -> tuple[Tensor, Tensor]:
        """(the base alone, with guidance), logits at every place [places, vocabulary]; one tensor where nothing compares them."""
        counts = [end - first for first, end in zip(places.start, places.start[1:], strict=False)]
        if max(counts) == 1:
            plain = batch.spread(self.base.outputs(batch.nodes))
        else:
            plain = torch.cat(self.base.recent_outputs(batch.rows, counts))
        deltas = batch.spread(drafter.deltas(batch.nodes))
        plain = self._silenced(plain, places.params)
        kept = any(d.request.record or d.request.return_log_ratio or d.request.alternatives is not None for d in batch.rows) or bool(
            broken_rows(plain)
        )
        moved = add_deltas(plain.clone() if kept else plain, deltas, batch.guidance.beta, batch.value.vocabulary.size, in_place=True)
        return plain if kept else moved, moved


def _places(rows: Sequence[Growing], before: list[int], stretch: list[list[tuple[int, Tensor, Tensor]]], base: CachedLM) -> _Places:
    """The places of all rows, one after the other."""
    start = [0, *accumulate(map(len, stretch))]
    row = [i for i, places in enumerate(stretch) for _ in places]
    position = [before[i] + k for i, places in enumerate(stretch) for k in range(len(places))]
    params = [rows[i].request.sampling for i in row]
    wanted = {id(p): processes(p) for p in params}
    nothing: tuple[Sequence[int], Sequence[int]] = ((), ())
    contexts = [
        (base.prompt_ids(rows[i].prompt), rows[i].token_ids[:n]) if wanted[id(p)] else nothing
        for i, n, p in zip(row, position, params, strict=True)
    ]
    flat = [place for places in stretch for place in places]
    logps = torch.stack([logp for _, logp, _ in flat])
    tokens = torch.tensor([token for token, _, _ in flat], device=logps.device)
    return _Places(start, row, position, params, contexts, tokens, logps, [q for _, _, q in flat])


def _verify(rows: Sequence[Growing], places: _Places, mixed: Tensor, broken: set[int]) -> tuple[list[int], list[int]]:
    """(where each row's new tokens end, a token for every place); nothing is drawn at ``broken`` places."""
    uniforms = [_number(rows[r], n, _ACCEPT) for r, n in zip(places.row, places.position, strict=True)]
    kept = accepts(mixed, places.params, places.tokens, places.logps, uniforms).tolist()
    tokens, stops, again = places.tokens.tolist(), [], []
    for first, end in zip(places.start, places.start[1:], strict=False):
        k = next((k for k in range(first, end) if k in broken or not kept[k]), end)
        if k < end and k not in broken:
            again.append(k)
            k += 1
        stops.append(k)
    if again:
        numbers = [_number(rows[places.row[k]], places.position[k], _REPLACE) for k in again]
        params = [places.params[k] for k in again]
        other = replacement(mixed[again], torch.stack([places.q[k] for k in again]), params, numbers)
        for k, token in zip(again, other.tolist(), strict=True):
            tokens[k] = token
    return stops, tokens


def _number(d: Growing, position: int, purpose: int) -> float:
    """The random number of a place for one purpose."""
    return uniform(d.request.seed, d.rng_path, position, _TAG, purpose)


def _moved_by(
    rows: Sequence[Growing], places: _Places, tokens: list[int], raw: tuple[Tensor, Tensor], final: tuple[Tensor, Tensor]
) -> tuple[list[float], list[float]]:
    """Log pi_guided - log pi_base of every place's token: (at temperature alone, with all that is done to logits), 0 where not wanted.

    ``raw`` and ``final`` are the base's logits and the guided ones, before and after ``engine.processors``.
    """
    out = []
    for filters, (plain, mixed) in ((False, raw), (True, final)):
        moved = [0.0] * len(tokens)
        wanted = [k for k, r in enumerate(places.row) if (rows[r].request.return_log_ratio if filters else rows[r].request.record)]
        if wanted:
            params = [places.params[k] for k in wanted]
            picked = torch.tensor([tokens[k] for k in wanted], device=mixed.device)
            guided, alone = (drawn_logps(z[wanted], params, picked, filters=filters) for z in (mixed, plain))
            for k, shift in zip(wanted, (guided - alone).tolist(), strict=True):
                moved[k] = shift
        out.append(moved)
    return out[0], out[1]
