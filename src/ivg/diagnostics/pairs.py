"""Preference accuracy: how often a value scores the chosen response of a preference pair higher, at several prefixes of both responses.

Token guidance and chunk selection score prefixes, so accuracy on prefixes matters to them more than that on whole responses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ivg.diagnostics.compatibility import models_of
from ivg.diagnostics.length_bias import LengthControl, length_control
from ivg.diagnostics.logits import response_beam
from ivg.diagnostics.stats import Floats, Proportion, bradley_terry_slope, spearman, tie_tolerance, wilson, wins
from ivg.errors import PromptError, ScoreFault
from ivg.models.cached_lm import CachedLM
from ivg.types import Beam, Preference, Prompt, Value, new_key
from ivg.types.scores import score_each

FRACTIONS = (0.25, 0.5, 0.75, 1.0)
"""Prefixes, as fractions of the response's tokens."""
MIN_UNSEEN = 20
"""Pairs outside a value's training data that measuring it needs; with fewer the standard error of an accuracy is above 0.1."""


@dataclass(frozen=True)
class PairAccuracy:
    """How one value ranks the pairs.

    Attributes:
        name: of the value.
        accuracy: at each of :data:`FRACTIONS` of both responses.
        slope: maximum-likelihood s of P(chosen) = sigmoid(s * difference of values); 1 / s is a meaningful difference.
        loss: mean loss of that fit in nats; a random ranking has 0.693.
        margin_correlation: rank correlation of the difference with the pairs' margins, if all have one.
        length_control: accuracy with length controlled; None: not measured.
        trained_pairs: number of pairs that the value was trained on. The numbers above leave them out, unless ``on_training_data``.
        on_training_data: fewer than :data:`MIN_UNSEEN` other pairs were left, so the numbers are of all pairs.
    """

    name: str
    accuracy: tuple[Proportion, ...]
    slope: float
    loss: float
    margin_correlation: float | None
    length_control: LengthControl | None = None
    trained_pairs: int = 0
    on_training_data: bool = False

    @property
    def whole(self) -> Proportion:
        """Accuracy on whole responses."""
        return self.accuracy[-1]


def is_tie(pair: Preference) -> bool:
    """Both responses are the same text."""
    return pair.chosen == pair.rejected and pair.chosen_ends == pair.rejected_ends


def readable_pairs(
    base: CachedLM, values: Mapping[str, Value], pairs: Sequence[Preference], ends: bool = True
) -> tuple[list[Preference], list[str]]:
    """(the pairs that every model can read whole, a reason for each of the others)."""
    kept, reasons = [], []
    for pair in pairs:
        try:
            _check(base, values, pair, ends)
            kept.append(pair)
        except PromptError as e:
            reasons.append(str(e).splitlines()[0])
    return kept, reasons


def _check(base: CachedLM, values: Mapping[str, Value], pair: Preference, ends: bool) -> None:
    for lm in (base, *models_of(values).values()):
        limit = lm.max_positions
        for text in (pair.chosen, pair.rejected):
            length = len(lm.ids(response_beam(base, pair.prompt, text, ends=ends))[0])
            if limit is not None and length > limit:
                raise PromptError(f"prompt and response of {length} tokens > context of {lm.name} ({limit})")
    for value in values.values():
        value.check(pair.prompt, 0)


def prefixes(base: CachedLM, prompt: Prompt, response: str, ends: bool) -> list[Beam]:
    """The response at each of :data:`FRACTIONS`; each is a child of the one before, so that caches read every token once."""
    whole = response_beam(base, prompt, response, ends=ends)
    count = len(whole.token_ids) - ends * bool(base.vocabulary.eos_ids)
    state, part = base.vocabulary.start_decoding(base.prompt_ids(prompt)), ""
    out: list[Beam] = []
    for fraction in FRACTIONS[:-1]:
        ids = whole.token_ids[: math.ceil(fraction * count)]
        new, state = base.vocabulary.continue_text(ids, state)
        part += new
        out.append(_prefix(out, prompt, ids, part, whole))
    return [*out, _prefix(out, prompt, whole.token_ids, response, whole, last=True)]


def _prefix(line: list[Beam], prompt: Prompt, ids: tuple[int, ...], text: str, whole: Beam, last: bool = False) -> Beam:
    parent = line[-1].key if line else None
    finish = whole.finish if last else None
    return Beam(new_key(), parent, prompt, ids, text, finish, whole.token_counter, whole.vocabulary, inherits=bool(line))


def score_pairs(
    base: CachedLM, value: Value, pairs: Sequence[Preference], *, batch: int = 16, ends: bool = True
) -> tuple[Floats, dict[int, ScoreFault]]:
    """Scores of both responses at each of :data:`FRACTIONS`: [pairs, fractions, (chosen, rejected)].

    Pairs that the value fails on hold NaN; the second result has the first error of each, by index.

    Args:
        base: its tokens define the fractions.
        value: any value.
        pairs: that it can read (:func:`readable_pairs`).
        batch: pairs that are scored together.
        ends: append an end-of-sequence token to complete responses.
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


def pair_accuracy(
    name: str, scores: Floats, pairs: Sequence[Preference], lengths: Mapping[str, Floats], trained: NDArray[np.bool_] | None = None
) -> PairAccuracy:
    """Accuracies from scores [pairs, fractions, 2].

    Args:
        name: of the value.
        scores: of :func:`score_pairs`.
        pairs: in the same order.
        lengths: :func:`pair_lengths` of the pairs.
        trained: True for each pair that the value was trained on [pairs]; None: no pair.
    """
    seen = np.zeros(len(pairs), dtype=bool) if trained is None else trained
    count = int(seen.sum())
    on_training_data = count > 0 and len(pairs) - count < MIN_UNSEEN
    kept = np.ones(len(pairs), dtype=bool) if on_training_data else ~seen
    pairs, scores = [p for p, k in zip(pairs, kept, strict=True) if k], scores[kept]
    groups = prompt_groups(pairs)
    tolerance = tie_tolerance(scores[:, -1, 0], scores[:, -1, 1])  # of whole responses: prefixes may all be the same texts
    hits = [wins(scores[:, k, 0], scores[:, k, 1], tolerance) for k in range(scores.shape[1])]
    difference = scores[:, -1, 0] - scores[:, -1, 1]
    slope, loss = bradley_terry_slope(difference)
    margins = [p.margin for p in pairs]
    known = np.array([m for m in margins if m is not None])
    margin = spearman(difference, known) if len(known) == len(pairs) else None
    control = length_control(scores[:, -1], {unit: table[kept] for unit, table in lengths.items()}, groups)
    return PairAccuracy(name, tuple(wilson(h, groups) for h in hits), slope, loss, margin, control, count, on_training_data)


def pair_lengths(base: CachedLM, value: Value | None, pairs: Sequence[Preference]) -> dict[str, Floats]:
    """Lengths of both responses in several units: [pairs, (chosen, rejected)] each.

    ``tokens`` of the base, ``characters``, ``words``, and ``own tokens`` of the value's models with other vocabularies.
    """

    def table(count: Callable[[str], int]) -> Floats:
        return np.array([[float(count(text)) for text in (p.chosen, p.rejected)] for p in pairs])

    def tokens(lm: CachedLM) -> Callable[[str], int]:
        return lambda text: len(lm.tokenizer(text, add_special_tokens=False).input_ids)

    out = {"tokens": table(tokens(base)), "characters": table(len), "words": table(lambda text: len(text.split()))}
    others = [lm for lm in models_of({"": value}).values() if not lm.vocabulary.same_as(base.vocabulary)] if value is not None else []
    return out | {("own tokens" if len(others) == 1 else f"tokens of {lm.name}"): table(tokens(lm)) for lm in others}


def longer_wins(base: CachedLM, pairs: Sequence[Preference]) -> Floats:
    """1 where the chosen response has more base tokens, 0 where fewer, 0.5 where as many [pairs]."""
    table = pair_lengths(base, None, pairs)["tokens"]
    return wins(table[:, 0], table[:, 1])


def prompt_groups(pairs: Sequence[Preference]) -> np.ndarray:
    """A number for each pair, the same for pairs of one prompt [pairs]."""
    seen: dict[Prompt, int] = {}
    return np.array([seen.setdefault(p.prompt, len(seen)) for p in pairs], dtype=np.int64)
