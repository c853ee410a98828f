"""Laws of values: functions that raise AssertionError where a value breaks its promises.

:func:`check_value` runs all that hold for any value; the others are for special kinds. Every law leaves the value without hypotheses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ivg.errors import ConfigError
from ivg.types import Beam, FinishReason, Hypothesis, Prompt, TokenCounter, Value, new_key

if TYPE_CHECKING:
    from ivg.values.base import CompositeValue
    from ivg.values.implicit import ImplicitValue


def check_value(make: Callable[[], Value], chains: Sequence[Sequence[Beam]], tolerance: float = 1e-4) -> None:
    """All laws that hold for any value.

    Args:
        make: gives an equal value each time, whose caches are empty.
        chains: of beams, each of which extends the one before it (:func:`~ivg.testing.hypothesis` makes them); all of one length.
        tolerance: how far two scores of the same text may differ.
    """
    ends = [chain[-1] for chain in chains]
    value = make()
    for prompt in {h.prompt for h in ends}:
        value.check(prompt, 1)
    check_batch_invariance(value, ends, tolerance)
    check_cache(make, chains, tolerance)
    check_inherit_cache(make, chains, tolerance)
    check_candidates(make, chains, tolerance)
    check_vocabulary(value, ends)
    check_recent_deltas(value, ends, tolerance)
    check_drafter(value, ends)
    check_value_life_cycle(value, ends)


def check_batch_invariance(value: Value, hypotheses: Sequence[Hypothesis], tolerance: float = 1e-4) -> None:
    """Scores are finite numbers that do not depend on the rest of the batch."""
    together = value.score(hypotheses)
    value.release([h.key for h in hypotheses])
    assert value.score([]) == [], "a value has no scores for no hypotheses"
    for h, expected in zip(hypotheses, together, strict=True):
        (alone,) = value.score([h])
        value.release([h.key])
        assert math.isfinite(alone), f"{h.text!r}: {alone}"
        assert abs(alone - expected) <= tolerance, f"{h.text!r}: {alone} alone, {expected} in a batch of {len(hypotheses)}"


def check_cache(make: Callable[[], Value], chains: Sequence[Sequence[Hypothesis]], tolerance: float = 1e-4) -> None:
    """The cache is only an optimisation: scoring prefix after prefix gives what a fresh value gives for each."""
    kept = make()
    for generation in zip(*chains, strict=True):
        scores = kept.score(generation)
        for h, score in zip(generation, scores, strict=True):
            (fresh,) = make().score([h])
            assert abs(score - fresh) <= tolerance, f"{h.text!r}: {score} with the cache, {fresh} without"
    kept.release([h.key for chain in chains for h in chain])


def check_inherit_cache(make: Callable[[], Value], chains: Sequence[Sequence[Hypothesis]], tolerance: float = 1e-4) -> None:
    """Children that inherit their parents' cache score the same after the parents are released, and a value may ignore the call."""
    value = make()
    for parent, child in ((chain[0], chain[1]) for chain in chains if len(chain) > 1):
        value.score([parent])
        value.inherit_cache([child])
        value.release([parent.key])
        (score,) = value.score([child])
        value.release([child.key])
        (fresh,) = make().score([child])
        assert abs(score - fresh) <= tolerance, f"{child.text!r}: {score} with an inherited cache, {fresh} without"


def check_candidates(make: Callable[[], Value], chains: Sequence[Sequence[Hypothesis]], tolerance: float = 1e-4) -> None:
    """Candidates score as any hypotheses, whatever was read of their parents, and the parents as before."""
    value, pairs = make(), [(chain[0], chain[1]) for chain in chains if len(chain) > 1]
    parents, children = [parent for parent, _ in pairs], [child for _, child in pairs]
    for _ in range(2):
        for h, score in zip(children, value.score_candidates(parents, children), strict=True):
            (fresh,) = make().score([h])
            assert abs(score - fresh) <= tolerance, f"{h.text!r}: {score} as a candidate, {fresh} otherwise"
        for h, score in zip(parents, value.score(parents), strict=True):
            (fresh,) = make().score([h])
            assert abs(score - fresh) <= tolerance, f"{h.text!r}: {score} behind its candidates, {fresh} without"
    value.release([h.key for h in parents])


def check_vocabulary(value: Value, hypotheses: Sequence[Hypothesis]) -> None:
    """A value has either finite float32 deltas [hypotheses, vocabulary] and says what their columns mean, or an error for them."""
    if not value.full_vocabulary():
        try:
            value.deltas(hypotheses)
        except ConfigError as e:
            assert value.name in str(e), f"the error of deltas should name the value {value.name}: {e}"
            return
        raise AssertionError(f"{value.name} has deltas, but full_vocabulary() is False")
    deltas = value.deltas(hypotheses)
    value.release([h.key for h in hypotheses])
    assert value.vocabulary is not None, f"{value.name} has deltas and no vocabulary"
    assert len(deltas) == len(hypotheses) and deltas.shape[1] >= value.vocabulary.size, f"deltas of shape {tuple(deltas.shape)}"
    assert str(deltas.dtype) == "torch.float32" and bool(deltas.isfinite().all()), f"deltas of {deltas.dtype}, not all finite"


def check_recent_deltas(value: Value, hypotheses: Sequence[Hypothesis], tolerance: float = 1e-4) -> None:
    """Deltas of many positions at once, where there are any, are those of one prefix after the other; in the value's own vocabulary."""
    counts = [min(3, len(h.token_ids)) for h in hypotheses]
    own = value.full_vocabulary() and all(value.vocabulary.same_as(h.vocabulary) for h in hypotheses)
    found = value.recent_deltas(hypotheses, counts) if own and all(counts) else None
    value.release([h.key for h in hypotheses])
    if found is None:
        return
    for h, count, got in zip(hypotheses, counts, found, strict=True):
        ends = range(len(h.token_ids) - count, len(h.token_ids))
        prefixes = [_Growing(h.prompt, list(h.token_ids[:end]), h.vocabulary, new_key()) for end in ends]
        difference = float((got - _fresh_deltas(value, prefixes)).abs().max())
        assert difference <= tolerance, f"{h.text!r}: recent_deltas differ by {difference} from deltas"


@dataclass
class _Growing:
    """A hypothesis whose last token may be replaced."""

    prompt: Prompt
    token_ids: list[int]
    vocabulary: Any
    key: int
    text: str = ""
    finish: FinishReason | None = None
    parent: int | None = None
    ancestor_key: int | None = None
    inherits: bool = False

    def __post_init__(self) -> None:
        self.token_counter = TokenCounter()


def check_drafter(value: Value, hypotheses: Sequence[Hypothesis], tolerance: float = 1e-4) -> None:
    """A drafter's deltas are the value's own, and after ``truncate`` replaced tokens are read again; in the value's own vocabulary."""
    if value.drafter(1.0) is None or not all(value.vocabulary.same_as(h.vocabulary) for h in hypotheses):
        return
    for beta in (1.0, 0.5):
        drafter = value.drafter(beta)
        assert drafter is not None, f"{value.name} drafts with beta 1 and not with beta {beta}"
        rows = [_Growing(h.prompt, list(h.token_ids), h.vocabulary, new_key()) for h in hypotheses]
        expected = []
        for draft in range(3):
            drafter.logits(rows)
            expected.append(_fresh_deltas(value, rows))
            if draft < 2:
                for row in rows:
                    row.token_ids.append(draft + 1)
        got = drafter.deltas(rows)
        wanted = [deltas[i] for i in range(len(rows)) for deltas in expected]
        assert len(got) == len(wanted), f"{len(got)} deltas for {len(wanted)} positions"
        for g, w in zip(got, wanted, strict=True):
            assert float((g - w).abs().max()) <= tolerance, "deltas of a drafter differ from those of the value"
        for row in rows:
            del row.token_ids[-1]
            row.token_ids[-1] = 5
        value.truncate(rows)
        for row in rows:
            row.token_ids.append(6)
        difference = float((value.deltas(rows) - _fresh_deltas(value, rows)).abs().max())
        value.release([row.key for row in rows])
        assert difference <= tolerance, f"deltas differ by {difference} after truncate"


def _fresh_deltas(value: Value, rows: Sequence[_Growing]) -> Any:
    """Deltas of the same texts as hypotheses that the value does not know."""
    copies = [replace(row, key=new_key(), token_ids=list(row.token_ids)) for row in rows]
    deltas = value.deltas(copies).clone()
    value.release([copy.key for copy in copies])
    return deltas


def check_value_life_cycle(value: Value, hypotheses: Sequence[Hypothesis]) -> None:
    """Resetting caches gives the same scores to the last bit; releasing, restarting and closing need no special state."""
    keys = [h.key for h in hypotheses]
    value.reset_caches()
    first = value.score(hypotheses)
    value.release([*keys, *keys, new_key()])  # twice, and one that it does not know
    value.release_memory()
    value.reset_caches()
    assert value.restart() is False, f"{value.name} reports a restart, but nothing had stopped"
    again = value.score(hypotheses)
    assert again == first, f"{again} after reset_caches, {first} before"
    value.reset_caches()  # while it holds hypotheses
    value.release(keys)
    names = [name for name, _ in value.networks()]
    assert all(model.name in names for model in value.cached_lms()), f"networks {names} lack some of the cached models"
    value.close()
    value.close()


def check_token_sum(value: ImplicitValue, hypotheses: Sequence[Hypothesis], tolerance: float = 1e-4) -> None:
    """An implicit score is the sum of its token scores, one for each token."""
    parts, totals = value.token_scores(hypotheses), value.score(hypotheses)
    value.release([h.key for h in hypotheses])
    for h, scores, total in zip(hypotheses, parts, totals, strict=True):
        assert len(scores) == len(h.token_ids), f"{len(scores)} token scores for {len(h.token_ids)} tokens"
        assert abs(sum(scores) - total) <= tolerance, f"{h.text!r}: token scores sum to {sum(scores)}, the score is {total}"


def check_linearity(composite: CompositeValue, hypotheses: Sequence[Hypothesis], tolerance: float = 1e-4) -> None:
    """A composite is the weighted sum of its parts."""
    expected = [0.0] * len(hypotheses)
    for weight, part in composite.parts:
        expected = [e + weight * s for e, s in zip(expected, part.score(hypotheses), strict=True)]
        part.release([h.key for h in hypotheses])
    got = composite.score(hypotheses)
    composite.release([h.key for h in hypotheses])
    for g, e in zip(got, expected, strict=True):
        assert abs(g - e) <= tolerance, f"composite {g}, weighted sum of parts {e}"
