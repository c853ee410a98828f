"""Will guidance help? From numbers to a sentence that names its reason. Thresholds are here, each with why.

Knows: the numbers of a :class:`Evidence`. Must not know models, nor how results are shown. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ivg.diagnostics.divergence import SILENT, Disagreement
from ivg.diagnostics.intervals import Share
from ivg.diagnostics.length import LengthControl
from ivg.diagnostics.pairs import OnPairs
from ivg.diagnostics.sweep import CHOICES, Row, Selection

USEFUL = 0.55
"""Pair accuracy that is worth its compute. Choosing the better of two responses with probability a yields 2a - 1 of what a
perfect judge's choice yields: at 0.55 a tenth."""
UNDECIDED = 0.1
"""Half-width of an interval that says too little: it leaves room from 'useless' to 'useful' on both sides."""
EFFECTIVE = 20.0
"""Effective sample size that an estimate needs; a mean of 20 texts has an error of about a quarter of their spread."""
EFFICIENCY = 0.75
"""Of the first gain per square root of KL, what the suggested beta must keep. With reward = d (a - b d), d = sqrt(KL) (Gao,
Schulman, Hilton 2023), three quarters of the first slope a are left where three quarters of the largest reward are reached at
a quarter of its KL; beyond, KL grows faster than reward."""
GENTLE = 0.5
"""Without a judge: nats per token that guidance may move the base. Guided tokens are then on average 1.6 times less likely to
the base, about what a base of half the size would lose."""

Outcome = Literal["helps", "mixed", "unclear", "no"]
Standing = Literal["right", "weak", "length", "chance", "opposed", "unclear", "trained"]


@dataclass(frozen=True)
class Evidence:
    """What the verdict rests on.

    Attributes:
        values: each guide candidate on the pairs; no baselines, no judge.
        guide: value that would guide tokens, or None.
        fits: it can shift the base's whole vocabulary.
        own: disagreement of pair and base on the base's own texts.
        rows: of the sweep.
        selection: best-of-n by each value.
        judge: the judge on the pairs, or None without one.
    """

    values: Mapping[str, OnPairs]
    guide: str | None
    fits: bool
    own: Disagreement | None = None
    rows: tuple[Row, ...] = ()
    selection: tuple[Selection, ...] = ()
    judge: OnPairs | None = None


@dataclass(frozen=True)
class Verdict:
    """The answer.

    Attributes:
        outcome: ``helps``; ``mixed``: some use of these values helps; ``unclear``: too few pairs, or the values' own training data;
            ``no``.
        beta: suggested weight of token guidance, where that helps.
        token: name of the value to guide tokens by, or None.
        select: names of the values that are good enough to select by, best first.
        reasons: sentences, the most important first.
    """

    outcome: Outcome
    beta: float | None
    token: str | None
    select: tuple[str, ...]
    reasons: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0: helps or mixed. 1: it will not, or nothing shows that it will."""
        return 0 if self.outcome in ("helps", "mixed") else 1


def standing(v: OnPairs) -> Standing:
    """What a value's accuracy on whole responses says about it."""
    if v.on_training_data:
        return "trained"
    whole = v.whole
    if whole.high < 0.5:
        return "opposed"
    if whole.low <= 0.5:
        return "unclear" if whole.high - whole.low > 2 * UNDECIDED else "chance"
    if whole.rate < USEFUL:
        return "weak"
    if v.length is None or _beyond(v.length):
        return "right"
    return "unclear" if _undecided(v.length) else "length"


def _undecided(c: LengthControl) -> bool:
    """Right where longer and shorter are chosen alike, but too few different lengths to tell it from another function of length."""
    passed = c.balanced is not None and c.balanced.low > 0.5 and c.balanced.rate >= USEFUL
    return passed and c.residual.low <= 0.5 <= USEFUL < c.residual.high and c.residual.high - c.residual.low > 2 * UNDECIDED


def _beyond(c: LengthControl) -> bool:
    """More than length is left, by more than sampling error, and enough of it to be useful."""
    return c.passed and c.balanced is not None and min(c.balanced.rate, c.residual.rate) >= USEFUL


def _explained(c: LengthControl, whole: Share) -> str:
    """Length as the reason of an accuracy, with the numbers."""
    other = "shorter" if c.rule == "longer" else "longer"
    first = f"is right ({whole}), but length explains it: the {c.rule} response ({c.unit}) is chosen as often ({c.alone})"
    if c.balanced is None:
        return f"{first}, and in no pair the {other} one; give pairs that length does not decide"
    return (
        f"{first}; accuracy where {c.rule} and {other} are chosen alike {c.balanced}, by what length does not predict {c.residual}; "
        "guidance by it would make texts longer or shorter rather than better, or the pairs are too few to tell"
    )


def _too_few(v: OnPairs) -> str:
    whole, c = v.whole, v.length
    if whole.low <= 0.5 or c is None:
        return f"cannot be told from chance by {whole.n} pairs ({whole}): give more pairs"
    return (
        f"is right ({whole}), but {whole.n} pairs of so few different lengths ({c.unit}) cannot tell it from a function of length: "
        f"accuracy by what length does not predict {c.residual}; give more pairs, of more lengths"
    )


def about(v: OnPairs, subject: str) -> str:
    """One sentence on a value's accuracy; ``subject`` is what to call it."""
    found, whole = standing(v), v.whole
    words = {
        "opposed": f"{subject} prefers what you reject ({whole}): guidance by it makes things worse; are tuned and untuned (or chosen "
        "and rejected) exchanged, or was it trained for something else?",
        "chance": f"{subject} ranks your preferences no better than chance ({whole}): guidance by it will not help",
        "unclear": f"{subject} {_too_few(v)}",
        "weak": f"{subject} ranks your preferences hardly better than chance ({whole}): guidance by it is not worth its compute",
        "length": f"{subject} {_explained(v.length, whole) if v.length else ''}",
        "trained": f"{subject} was trained on {v.seen} of these pairs, and too few others are left: give pairs that it has not seen",
        "right": f"{subject} ranks your preferences well ({whole})",
    }
    return words[found]


def decide(e: Evidence) -> Verdict:
    """The verdict and its reasons."""
    good = {n: v for n, v in e.values.items() if standing(v) == "right"}
    trusted = e.judge is not None and standing(e.judge) in ("right", "weak")
    losing = {s.value for s in e.selection if trusted and s.gain.high < 0}
    select = tuple(sorted((n for n in good if n not in losing), key=lambda n: -good[n].whole.rate))
    notes = []
    if e.judge is not None and not trusted:
        notes.append(about(e.judge, f"the judge ({e.judge.name})") + "; its scores are left out of this verdict")
    notes += [f"by the judge, the best of {CHOICES} by {n} is worse than a random one: do not select by it" for n in good if n in losing]
    if e.guide is None or e.guide not in good:
        return _without_guide(e, select, notes)
    outcome, beta, reason = _token_level(e, good[e.guide], trusted)
    if outcome == "helps":
        rest = [f"select by {_listed(select, e)}"] if select else []
    elif select:
        rest = [f"use it to select chunks rather than to guide tokens: select by {_listed(select, e)}"]
    else:
        outcome, rest = "no", []
    return Verdict(outcome, beta, e.guide if outcome == "helps" else None, select, (reason, *rest, *notes))


def _without_guide(e: Evidence, select: tuple[str, ...], notes: list[str]) -> Verdict:
    """The guide is none or no good: what is left is selection."""
    bad = [about(v, _called(n)) for n, v in e.values.items() if n not in select and standing(v) != "right"]
    if select:
        first = f"select chunks or whole responses by {_listed(select, e)}"
        return Verdict("mixed", None, None, select, (*bad, first, *notes))
    unclear = any(standing(v) in ("unclear", "trained") for v in e.values.values())
    return Verdict("unclear" if unclear else "no", None, None, (), (*(bad or ["no value is at hand that could guide"]), *notes))


def _token_level(e: Evidence, guide: OnPairs, trusted: bool) -> tuple[Outcome, float | None, str]:
    """Of a guide that ranks well: may it move tokens, and how strongly?"""
    called, whole = _called(guide.name), guide.whole
    if not e.fits:
        return (
            "mixed",
            None,
            (
                f"{called} is right ({whole}) but has other tokens than the base: it can compare texts (selection, or candidates by "
                "--guide-candidates), not shift the vocabulary"
            ),
        )
    if e.own is not None and e.own.tuned_untuned < SILENT:
        return "mixed", None, f"{called} is right ({whole}) but tuned and untuned hardly differ: it does next to nothing at token level"
    far = e.own is not None and e.own.far
    if trusted and e.rows:
        return _by_judge(e, guide, far)
    if far and e.own is not None:
        return (
            "mixed",
            None,
            (
                f"{called} is right ({whole}) but far from the base (KL(base‖untuned) {e.own.base_untuned:.2f} nats per token, "
                f"{e.own.outside:.0%} of the guided mass outside the base's likeliest tokens)"
            ),
        )
    beta, words = _gentle(e.rows)
    return "helps", beta, f"accuracy is good ({whole}); {words}"


def _gentle(rows: Sequence[Row]) -> tuple[float | None, str]:
    """The largest weight that leaves the base its language, and what to say of it."""
    known = [r for r in rows if r.beta > 0 and r.effective >= EFFECTIVE]
    beta = max((r.beta for r in known if r.per_token <= GENTLE), default=None)
    if beta is not None:
        return beta, f"suggested beta {beta:g}: the largest within {GENTLE} nats per token of the base (no judge says what it buys)"
    if known:
        return None, f"every beta of the sweep moves the base more than {GENTLE} nats per token: start with a smaller one"
    return None, "too few texts say anything about any beta: draw more, and not from the base alone" if rows else "no beta was tried"


def _by_judge(e: Evidence, guide: OnPairs, far: bool) -> tuple[Outcome, float | None, str]:
    """A judge saw the texts of every weight."""
    called, whole = _called(guide.name), guide.whole
    shown = [r for r in e.rows if r.beta > 0 and r.effective >= EFFECTIVE and r.gain is not None]
    gaining = [r for r in shown if r.gain is not None and r.gain.low > 0]
    if not shown:
        return (
            "mixed",
            None,
            f"{called} is right ({whole}) but the sweep is too small to tell a beta: more prompts or samples",
        )
    if not gaining:
        worst = any(r.gain is not None and r.gain.high < 0 for r in shown)
        why = " and far from the base" if far else ""
        found = "the judge sees worse texts" if worst else "the judge sees no better texts at any beta of the sweep"
        return "mixed", None, f"{called} is right ({whole}){why}, but guided by it {found}"
    limit = frontier(shown)
    chosen = max((r for r in gaining if r.kl.value**0.5 <= limit), key=lambda r: r.beta, default=gaining[0])
    gain = chosen.gain.value if chosen.gain else 0.0
    beyond = any(r.beta > chosen.beta for r in e.rows)
    tail = "beyond it KL grows faster than reward" if beyond else "the largest that was tried; larger ones may buy more"
    warning = " (although its language is far from the base's: read some texts)" if far else ""
    return (
        "helps",
        chosen.beta,
        (
            f"accuracy is good ({whole}), suggested beta {chosen.beta:g}: {gain:+.2f} by the judge at {chosen.kl.value:.1f} nats from the "
            f"base; {tail}{warning}"
        ),
    )


def frontier(rows: Sequence[Row]) -> float:
    """The distance sqrt(KL) up to which :data:`EFFICIENCY` of the first slope is left; infinite where gains do not flatten.

    Gain / d = a - b d is fitted to all rows, each weighted by the inverse variance of its gain / d: single rows are too noisy
    to be compared with each other.
    """
    points = []
    for r in rows:
        if r.gain is not None and r.kl.value > 0:
            d = r.kl.value**0.5
            error = max((r.gain.high - r.gain.low) / 3.92, 1e-6) / d
            points.append((d, r.gain.value / d, error**-2))
    total = sum(w for _, _, w in points)
    mean_d, mean_y = (sum(w * p[i] for p in points for w in p[2:]) / total for i in (0, 1))
    spread = sum(w * (d - mean_d) ** 2 for d, _, w in points)
    b = -sum(w * (d - mean_d) * (y - mean_y) for d, y, w in points) / spread if spread else 0.0
    return (1 - EFFICIENCY) * (mean_y + b * mean_d) / b if b > 0 else math.inf


def _listed(names: tuple[str, ...], e: Evidence) -> str:
    gains = {s.value: s.gain.value for s in e.selection} if e.judge is not None else {}
    return ", ".join(
        f"{n} ({e.values[n].whole.rate:.2f}" + (f"; best of {CHOICES}: {gains[n]:+.2f} by the judge)" if n in gains else ")") for n in names
    )


def _called(name: str) -> str:
    return "the pair" if name == "implicit" else f"the value {name}"
