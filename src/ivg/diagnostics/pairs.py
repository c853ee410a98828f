"""Which of two responses is the better one? How often each value says what people said, at each stage of the response.

Knows: values and preference pairs (any objects with the fields of :class:`Pair`). Must not know files, nor how results are
shown. A guide sees prefixes, so accuracy on prefixes matters more to it than that on whole responses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ivg.diagnostics.compatibility import readers
from ivg.diagnostics.intervals import Numbers, Share, rank_correlation, share, slope, wins
from ivg.diagnostics.length import LengthControl, length_control
from ivg.diagnostics.log_ratios import written
from ivg.errors import PromptError, ScoreFault
from ivg.models.cached_lm import CachedLM
from ivg.types import Beam, Prompt, Value, new_key
from ivg.types.scores import score_each

FRACTIONS = (0.25, 0.5, 0.75, 1.0)
"""Of the response's tokens."""
ENOUGH = 20
"""Pairs that a value was not trained on, to measure it on them: with fewer the standard error of an accuracy is beyond 0.1."""


class Pair(Protocol):
    """Two responses to one prompt, the better one first (``training.data.Preference`` is one)."""

    @property
    def prompt(self) -> Prompt:
        """What was answered."""

    @property
    def chosen(self) -> str:
        """The better response."""

    @property
    def rejected(self) -> str:
        """The worse one."""

    @property
    def margin(self) -> float | None:
        """By how much, where that is known."""

    @property
    def chosen_ends(self) -> bool:
        """The better response is whole: an end-of-sequence token belongs behind it."""

    @property
    def rejected_ends(self) -> bool:
        """The worse one is whole."""


@dataclass(frozen=True)
class OnPairs:
    """How one value ranks the pairs.

    Attributes:
        name: of the value.
        at: accuracy at each of :data:`FRACTIONS` of both responses.
        slope: s of P(chosen) = sigmoid(s * difference of values), fitted here; 1 / s is the difference that means something.
        loss: mean loss of that, in nats; a coin has 0.693.
        margin: rank correlation of the difference with the pairs' margins, where they have some.
        length: the same with length taken out; None where it was not measured.
        seen: pairs of the file that the value was trained on; they are left out of all numbers above, unless ``on_training_data``.
        on_training_data: fewer than :data:`ENOUGH` others were left, so the numbers are of all pairs and say little.
    """

    name: str
    at: tuple[Share, ...]
    slope: float
    loss: float
    margin: float | None
    length: LengthControl | None = None
    seen: int = 0
    on_training_data: bool = False

    @property
    def whole(self) -> Share:
        """Accuracy on whole responses."""
        return self.at[-1]


def is_tie(pair: Pair) -> bool:
    """Both responses are the same text, so neither is the better one."""
    return pair.chosen == pair.rejected and pair.chosen_ends == pair.rejected_ends


def fitting(base: CachedLM, values: Mapping[str, Value], pairs: Sequence[Pair], ends: bool = True) -> tuple[list[Pair], list[str]]:
    """(the pairs that every model can read whole, why the others cannot be read)."""
    kept, reasons = [], []
    for pair in pairs:
        try:
            _check(base, values, pair, ends)
            kept.append(pair)
        except PromptError as e:
            reasons.append(str(e).splitlines()[0])
    return kept, reasons


def _check(base: CachedLM, values: Mapping[str, Value], pair: Pair, ends: bool) -> None:
    for reader in (base, *readers(values).values()):
        limit = reader.max_positions
        for text in (pair.chosen, pair.rejected):
            length = len(reader.ids(written(base, pair.prompt, text, ends=ends))[0])
            if limit is not None and length > limit:
                raise PromptError(f"prompt and response of {length} tokens > context of {reader.name} ({limit})")
    for value in values.values():
        value.check(pair.prompt, 0)


def prefixes(base: CachedLM, prompt: Prompt, response: str, ends: bool) -> list[Beam]:
    """The response at each of :data:`FRACTIONS`, each the child of the one before, so that caches read every token once."""
    whole = written(base, prompt, response, ends=ends)
    count = len(whole.token_ids) - ends * bool(base.vocabulary.eos_ids)
    state, part = base.vocabulary.begin(base.prompt_ids(prompt)), ""
    out: list[Beam] = []
    for fraction in FRACTIONS[:-1]:
        ids = whole.token_ids[: math.ceil(fraction * count)]
        new, state = base.vocabulary.continue_text(ids, state)
        part += new
        out.append(_child(out, prompt, ids, part, whole))
    return [*out, _child(out, prompt, whole.token_ids, response, whole, last=True)]


def _child(line: list[Beam], prompt: Prompt, ids: tuple[int, ...], text: str, whole: Beam, last: bool = False) -> Beam:
    parent = line[-1].key if line else None
    finish = whole.finish if last else None
    return Beam(new_key(), parent, prompt, ids, text, finish, whole.token_counter, whole.vocabulary, inherits=bool(line))


def score_pairs(
    base: CachedLM, value: Value, pairs: Sequence[Pair], *, batch: int = 16, ends: bool = True
) -> tuple[Numbers, dict[int, ScoreFault]]:
    """What ``value`` says of both responses at each of :data:`FRACTIONS`: [pairs, fractions, (chosen, rejected)].

    Pairs that it has no number for hold NaN there, and stand in the second result, by place, with the first reason.

    Args:
        base: whose tokens are counted.
        value: any.
        pairs: that it can read (:func:`fitting`).
        batch: pairs in flight.
        ends: whole responses that end get an end-of-sequence token.
    """
    out, faults = np.zeros((len(pairs), len(FRACTIONS), 2)), dict[int, ScoreFault]()
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        lines = [prefixes(base, p.prompt, p.chosen, ends and p.chosen_ends) for p in part]
        lines += [prefixes(base, p.prompt, p.rejected, ends and p.rejected_ends) for p in part]
        for k in range(len(FRACTIONS)):
            scores = score_each(value, [line[k] for line in lines])
            for i, score in enumerate(scores):
                if isinstance(score, ScoreFault):
                    faults.setdefault(start + i % len(part), score)
            numbers = [math.nan if isinstance(score, ScoreFault) else score for score in scores]
            out[start : start + len(part), k] = np.array(numbers).reshape(2, len(part)).T
        value.release([beam.key for line in lines for beam in line])
    return out, faults


def summary(
    name: str, scores: Numbers, pairs: Sequence[Pair], lengths: Mapping[str, Numbers], trained: NDArray[np.bool_] | None = None
) -> OnPairs:
    """Accuracies from scores [pairs, fractions, 2].

    Args:
        name: of the value.
        scores: as :func:`score_pairs` gives them.
        pairs: in the same order.
        lengths: :func:`pair_lengths` of the pairs.
        trained: True for each pair that the value was trained on [pairs]; None: for none.
    """
    seen = np.zeros(len(pairs), dtype=bool) if trained is None else trained
    count = int(seen.sum())
    on_training_data = count > 0 and len(pairs) - count < ENOUGH
    kept = np.ones(len(pairs), dtype=bool) if on_training_data else ~seen
    pairs, scores = [p for p, k in zip(pairs, kept, strict=True) if k], scores[kept]
    groups = prompt_groups(pairs)
    hits = [wins(scores[:, k, 0], scores[:, k, 1]) for k in range(scores.shape[1])]
    difference = scores[:, -1, 0] - scores[:, -1, 1]
    s, loss = slope(difference)
    margins = [p.margin for p in pairs]
    known = np.array([m for m in margins if m is not None])
    margin = rank_correlation(difference, known) if len(known) == len(pairs) else None
    control = length_control(scores[:, -1], {unit: table[kept] for unit, table in lengths.items()}, groups)
    return OnPairs(name, tuple(share(h, groups) for h in hits), s, loss, margin, control, count, on_training_data)


def pair_lengths(base: CachedLM, value: Value | None, pairs: Sequence[Pair]) -> dict[str, Numbers]:
    """Lengths of both responses in every unit that a value may count in: [pairs, (chosen, rejected)] each.

    ``tokens`` of the base, ``characters``, ``words``, and ``own tokens`` of the value's readers with other vocabularies.
    """

    def table(count: Callable[[str], int]) -> Numbers:
        return np.array([[float(count(text)) for text in (p.chosen, p.rejected)] for p in pairs])

    def tokens(reader: CachedLM) -> Callable[[str], int]:
        return lambda text: len(reader.tokenizer(text, add_special_tokens=False).input_ids)

    out = {"tokens": table(tokens(base)), "characters": table(len), "words": table(lambda text: len(text.split()))}
    others = [r for r in readers({"": value}).values() if not r.vocabulary.same_as(base.vocabulary)] if value is not None else []
    return out | {("own tokens" if len(others) == 1 else f"tokens of {r.name}"): table(tokens(r)) for r in others}


def longer_wins(base: CachedLM, pairs: Sequence[Pair]) -> Numbers:
    """1 where the chosen response has more base tokens, 0 where fewer, 0.5 where as many [pairs]."""
    table = pair_lengths(base, None, pairs)["tokens"]
    return wins(table[:, 0], table[:, 1])


def prompt_groups(pairs: Sequence[Pair]) -> np.ndarray:
    """A number for each pair, the same for pairs of one prompt [pairs]."""
    seen: dict[Prompt, int] = {}
    return np.array([seen.setdefault(p.prompt, len(seen)) for p in pairs], dtype=np.int64)
