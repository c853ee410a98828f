"""The verdict of ``ivg check --preferences``: from numbers to an outcome and its reasons. Every threshold is here, with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ivg.diagnostics.divergence import MIN_PAIR_KL, PairDivergence
from ivg.diagnostics.length_bias import LengthControl
from ivg.diagnostics.pairs import PairAccuracy
from ivg.diagnostics.sweep import BEST_OF, BestOfGain, SweepRow

USEFUL_ACCURACY = 0.55
"""Pair accuracy that is worth its compute. Choosing the better of two responses with probability a gains 2a - 1 of what a perfect
choice gains: a tenth at 0.55."""
MAX_HALF_WIDTH = 0.1
"""Half-width above which an interval around 0.5 is inconclusive: it includes useless and useful accuracies."""
MIN_EFFECTIVE_SIZE = 20.0
"""Effective sample size that an estimate needs; the standard error of a mean of 20 texts is about a quarter of their deviation."""
MIN_EFFICIENCY = 0.75
"""Fraction of the initial gain per sqrt(KL) that the suggested beta must keep. With reward = d (a - b d) and d = sqrt(KL) (Gao et al.
2023, arXiv 2210.10760), gain / d is three quarters of a where three quarters of the largest reward are reached at a quarter of its KL;
beyond, KL grows faster than reward."""
MAX_KL_WITHOUT_JUDGE = 0.5
"""Nats per token that guidance may move the base if no judge scores the texts. Guided tokens are then on average 1.6 times less likely
under the base, about the loss of a base of half the size."""

Outcome = Literal["helps", "mixed", "unclear", "no"]
Ranking = Literal["good", "weak", "length", "chance", "opposed", "inconclusive", "trained"]


@dataclass(frozen=True)
class Evidence:
    """The measurements that the verdict uses.

    Attributes:
        values: each value on the pairs, without baselines and judge.
        guide: name of the value that would guide tokens, or None.
        shares_vocabulary: the guide works over the base's whole vocabulary.
        divergence: of pair and base on the base's own texts.
        sweep: gain and KL at each beta.
        best_of: gain of best-of-N by each value.
        judge: the judge on the pairs, or None.
    """

    values: Mapping[str, PairAccuracy]
    guide: str | None
    shares_vocabulary: bool
    divergence: PairDivergence | None = None
    sweep: tuple[SweepRow, ...] = ()
    best_of: tuple[BestOfGain, ...] = ()
    judge: PairAccuracy | None = None


@dataclass(frozen=True)
class Verdict:
    """The answer.

    Attributes:
        outcome: ``helps``: token guidance helps; ``mixed``: some other use of the values helps; ``unclear``: too few pairs, or only pairs
            of the values' training data; ``no``.
        beta: suggested weight of token guidance, where it helps.
        token: name of the value to guide tokens with, or None.
        select: names of the values that are good enough to select with, best first.
        reasons: sentences, the most important first.
    """

    outcome: Outcome
    beta: float | None
    token: str | None
    select: tuple[str, ...]
    reasons: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0 for ``helps`` and ``mixed``, else 1."""
        return 0 if self.outcome in ("helps", "mixed") else 1


def classify(value: PairAccuracy) -> Ranking:
    """What a value's accuracy on whole responses says about it."""
    if value.on_training_data:
        return "trained"
    whole, control = value.whole, value.length_control
    if whole.high < 0.5:
        return "opposed"
    if whole.low <= 0.5:
        return "inconclusive" if whole.high - whole.low > 2 * MAX_HALF_WIDTH else "chance"
    if whole.rate < USEFUL_ACCURACY:
        return "weak"
    if control is None or _useful_beyond_length(control):
        return "good"
    return "inconclusive" if _length_inconclusive(control) else "length"


def _useful_beyond_length(c: LengthControl) -> bool:
    return c.passed and c.balanced is not None and min(c.balanced.rate, c.residual.rate) >= USEFUL_ACCURACY


def _length_inconclusive(c: LengthControl) -> bool:
    """Accurate with both sides balanced, but too few different lengths to rule out another function of length."""
    balanced = c.balanced is not None and c.balanced.low > 0.5 and c.balanced.rate >= USEFUL_ACCURACY
    wide = c.residual.high - c.residual.low > 2 * MAX_HALF_WIDTH
    return balanced and wide and c.residual.low <= 0.5 <= USEFUL_ACCURACY < c.residual.high


def describe(value: PairAccuracy, subject: str) -> str:
    """One sentence on a value's accuracy; ``subject`` is how to call it."""
    whole = value.whole
    match classify(value):
        case "opposed":
            swapped = "are tuned and untuned, or chosen and rejected, swapped?"
            return f"{subject} prefers the rejected responses ({whole}): guidance by it makes texts worse; {swapped}"
        case "chance":
            return f"{subject} ranks the pairs no better than chance ({whole}): guidance by it will not help"
        case "weak":
            return f"{subject} ranks the pairs hardly better than chance ({whole}): guidance by it is not worth its compute"
        case "trained":
            return f"{subject} was trained on {value.trained_pairs} of these pairs, and too few others are left: give unseen pairs"
        case "length":
            return f"{subject} {_explained_by_length(value)}"
        case "inconclusive":
            return f"{subject} {_too_few_pairs(value)}"
    return f"{subject} ranks the pairs well ({whole})"


def _explained_by_length(value: PairAccuracy) -> str:
    whole, c = value.whole, value.length_control
    assert c is not None
    other = "shorter" if c.rule == "longer" else "longer"
    first = f"is accurate ({whole}), but length explains it: choosing the {c.rule} response ({c.unit}) is as accurate ({c.alone})"
    if c.balanced is None:
        return f"{first}, and no pair has the {other} one chosen; give pairs where length does not decide"
    return (
        f"{first}; accuracy with {c.rule} and {other} balanced {c.balanced}, of what length does not predict {c.residual}; guidance by it "
        "would change the length of texts rather than their quality, or the pairs are too few to tell"
    )


def _too_few_pairs(value: PairAccuracy) -> str:
    whole, c = value.whole, value.length_control
    if whole.low <= 0.5 or c is None:
        return f"cannot be told from chance with {whole.n} pairs ({whole}): give more pairs"
    return (
        f"is accurate ({whole}), but {whole.n} pairs with so few different lengths ({c.unit}) cannot rule out a function of length: "
        f"accuracy of what length does not predict {c.residual}; give more pairs, with more lengths"
    )


def decide(e: Evidence) -> Verdict:
    """The verdict and its reasons."""
    good = {name: value for name, value in e.values.items() if classify(value) == "good"}
    trusted = e.judge is not None and classify(e.judge) in ("good", "weak")
    harmful = {s.value for s in e.best_of if trusted and s.gain.high < 0}
    select = tuple(sorted((name for name in good if name not in harmful), key=lambda name: -good[name].whole.rate))
    notes = []
    if e.judge is not None and not trusted:
        notes.append(f"{describe(e.judge, f'the judge ({e.judge.name})')}; its scores are not used in this verdict")
    notes += [
        f"the judge scores the best of {BEST_OF} by {name} below a random one: do not select by it" for name in good if name in harmful
    ]
    if e.guide is None or e.guide not in good:
        return _without_guide(e, select, notes)
    outcome, beta, reason = _token_level(e, good[e.guide], trusted)
    if outcome == "helps":
        rest = [f"select by {_listed(select, e)}"] if select else []
    elif select:
        rest = [f"use it for chunk selection rather than token guidance: select by {_listed(select, e)}"]
    else:
        outcome, rest = "no", []
    return Verdict(outcome, beta, e.guide if outcome == "helps" else None, select, (reason, *rest, *notes))


def _without_guide(e: Evidence, select: tuple[str, ...], notes: list[str]) -> Verdict:
    """No value can guide tokens; selection remains."""
    bad = [describe(v, _called(name)) for name, v in e.values.items() if name not in select and classify(v) != "good"]
    if select:
        return Verdict("mixed", None, None, select, (*bad, f"select chunks or whole responses by {_listed(select, e)}", *notes))
    unclear = any(classify(v) in ("inconclusive", "trained") for v in e.values.values())
    return Verdict("unclear" if unclear else "no", None, None, (), (*(bad or ["the models provide no value that could guide"]), *notes))


def _token_level(e: Evidence, guide: PairAccuracy, trusted: bool) -> tuple[Outcome, float | None, str]:
    """Should a value that ranks well guide tokens, and at which beta?"""
    accurate, d = f"{_called(guide.name)} is accurate ({guide.whole})", e.divergence
    if not e.shares_vocabulary:
        hint = "it can score texts (selection, or candidates by --guide-candidates), not guide over the vocabulary"
        return "mixed", None, f"{accurate} but has other tokens than the base: {hint}"
    if d is not None and d.tuned_untuned < MIN_PAIR_KL:
        return "mixed", None, f"{accurate} but tuned and untuned hardly differ: token guidance has almost no effect"
    if trusted and e.sweep:
        return _beta_by_judge(e, guide)
    if d is not None and d.too_far:
        numbers = (
            f"KL(base‖untuned) {d.base_untuned:.2f} nats per token, {d.outside:.0%} of the guided mass outside the base's likeliest tokens"
        )
        return "mixed", None, f"{accurate} but far from the base ({numbers})"
    beta, reason = _beta_without_judge(e.sweep)
    return "helps", beta, f"accuracy is good ({guide.whole}); {reason}"


def _beta_without_judge(sweep: Sequence[SweepRow]) -> tuple[float | None, str]:
    """The largest beta that stays close to the base, and the reason."""
    known = [r for r in sweep if r.beta > 0 and r.effective_size >= MIN_EFFECTIVE_SIZE]
    limit = MAX_KL_WITHOUT_JUDGE
    beta = max((r.beta for r in known if r.kl_per_token <= limit), default=None)
    if beta is not None:
        return beta, f"suggested beta {beta:g}: the largest within {limit} nats per token of the base (no judge measures its gain)"
    if known:
        return None, f"every beta of the sweep moves the base more than {limit} nats per token: start with a smaller one"
    return None, "too few effective texts at every beta: sample more, and not from the base alone" if sweep else "no beta was tried"


def _beta_by_judge(e: Evidence, guide: PairAccuracy) -> tuple[Outcome, float | None, str]:
    """The judge scored the texts of every beta."""
    accurate, far = f"{_called(guide.name)} is accurate ({guide.whole})", e.divergence is not None and e.divergence.too_far
    known = [(r, r.gain) for r in e.sweep if r.beta > 0 and r.effective_size >= MIN_EFFECTIVE_SIZE and r.gain is not None]
    gaining = [r for r, gain in known if gain.low > 0]
    if not known:
        return "mixed", None, f"{accurate} but the sweep is too small to choose a beta: more prompts or samples"
    if not gaining:
        worse = any(gain.high < 0 for _, gain in known)
        found = "the judge scores the guided texts lower" if worse else "the judge scores no beta of the sweep higher than the base"
        return "mixed", None, f"{accurate}{' and far from the base' if far else ''}, but {found}"
    limit = max_efficient_distance([r for r, _ in known])
    chosen = max((r for r in gaining if r.kl.mean**0.5 <= limit), key=lambda r: r.beta, default=gaining[0])
    gain = chosen.gain.mean if chosen.gain else 0.0
    larger = any(r.beta > chosen.beta for r in e.sweep)
    tail = "beyond it KL grows faster than reward" if larger else "the largest that was tried; a larger one may gain more"
    warning = " (the pair is far from the base: read some texts)" if far else ""
    numbers = f"{gain:+.2f} by the judge at {chosen.kl.mean:.1f} nats from the base"
    return "helps", chosen.beta, f"accuracy is good ({guide.whole}), suggested beta {chosen.beta:g}: {numbers}; {tail}{warning}"


def max_efficient_distance(rows: Sequence[SweepRow]) -> float:
    """The distance d = sqrt(KL) up to which gain / d keeps :data:`MIN_EFFICIENCY` of its initial value; infinite if it does not fall.

    gain / d = a - b d is fitted to all rows, weighted by inverse variance, since single rows are too noisy to compare.
    """
    points = []
    for r in rows:
        if r.gain is not None and r.kl.mean > 0:
            d = r.kl.mean**0.5
            error = max((r.gain.high - r.gain.low) / 3.92, 1e-6) / d
            points.append((d, r.gain.mean / d, error**-2))
    total = sum(w for _, _, w in points)
    mean_d, mean_y = (sum(w * p[i] for p in points for w in p[2:]) / total for i in (0, 1))
    variance = sum(w * (d - mean_d) ** 2 for d, _, w in points)
    b = -sum(w * (d - mean_d) * (y - mean_y) for d, y, w in points) / variance if variance else 0.0
    return (1 - MIN_EFFICIENCY) * (mean_y + b * mean_d) / b if b > 0 else math.inf


def _listed(names: tuple[str, ...], e: Evidence) -> str:
    gains = {s.value: s.gain.mean for s in e.best_of} if e.judge is not None else {}
    judged = {n: f"; best of {BEST_OF}: {gains[n]:+.2f} by the judge" if n in gains else "" for n in names}
    return ", ".join(f"{n} ({e.values[n].whole.rate:.2f}{judged[n]})" for n in names)


def _called(name: str) -> str:
    return "the pair" if name == "implicit" else f"the value {name}"
