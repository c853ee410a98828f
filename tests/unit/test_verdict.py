"""Verdicts of ``ivg check --preferences`` from given measurements."""

import math
from dataclasses import replace

import pytest

from ivg.diagnostics import verdict
from ivg.diagnostics.divergence import PairDivergence
from ivg.diagnostics.length_bias import LengthControl
from ivg.diagnostics.pairs import PairAccuracy
from ivg.diagnostics.stats import Estimate, Proportion
from ivg.diagnostics.sweep import BestOfGain, SweepRow


def on_pairs(rate, half=0.04, name="implicit", balanced=None, n=400, residual=0.7, seen=0):
    def around(x):
        return Proportion(n, x, x - half, x + half)

    control = LengthControl("tokens", "longer", around(0.7), None if balanced is None else around(balanced), around(residual))
    plain = PairAccuracy(name, (around(rate),) * 4, 1.0, 0.6, None, trained_pairs=seen, on_training_data=bool(seen))
    return plain if balanced is None and residual == 0.7 else replace(plain, length_control=control)


def divergence(base_untuned=0.4, outside=0.3, tuned_untuned=0.3):
    return PairDivergence(100, 0.5, base_untuned, tuned_untuned, 0.3, 0.6, outside, 0.28)


def row(beta, gain, kl, effective_size=64.0, half=0.2, length=50):
    return SweepRow(beta, None if gain is None else Estimate(gain, gain - half, gain + half), Estimate(kl, kl, kl), length, effective_size)


GOLD = on_pairs(0.8, name="gold")
GOOD = (row(0, 0, 0), row(0.25, 1.5, 1.8), row(0.5, 2.5, 6.6), row(1, 3.6, 23), row(2, 3.8, 75))


def decide(values, guide="implicit", shares_vocabulary=True, **rest):
    return verdict.decide(verdict.Evidence({v.name: v for v in values}, guide, shares_vocabulary, **rest))


@pytest.mark.parametrize(
    ("value", "ranking", "words"),
    [
        (on_pairs(0.52, 0.05), "chance", "no better than chance (0.52, interval 0.47–0.57): guidance by it will not help"),
        (on_pairs(0.31), "opposed", "prefers the rejected responses"),
        (on_pairs(0.52, 0.01), "weak", "hardly better than chance"),
        (on_pairs(0.6, 0.2, n=20), "inconclusive", "cannot be told from chance with 20 pairs"),
        (
            on_pairs(0.7, balanced=0.51),
            "length",
            "(0.70, interval 0.66–0.74), but length explains it: choosing the longer response (tokens) is as accurate (0.70, interval "
            "0.66–0.74); accuracy with longer and shorter balanced 0.51, interval 0.47–0.55",
        ),
        (on_pairs(0.7, balanced=0.7, residual=0.52), "length", "of what length does not predict 0.52, interval 0.48–0.56"),
        (
            on_pairs(0.9, 0.12, balanced=0.9, residual=0.6, n=60),
            "inconclusive",
            "60 pairs with so few different lengths (tokens) cannot rule out",
        ),
        (on_pairs(0.9, residual=0.8), "length", "and no pair has the shorter one chosen; give pairs where length does not decide"),
        (on_pairs(0.9, seen=380), "trained", "was trained on 380 of these pairs, and too few others are left"),
    ],
)
def test_a_pair_that_will_not_help(value, ranking, words):
    assert verdict.classify(value) == ranking
    v = decide([value], divergence=divergence(), sweep=GOOD, judge=GOLD)
    assert v.outcome == ("unclear" if ranking in ("inconclusive", "trained") else "no")
    assert v.exit_code == 1
    assert (v.beta, v.token, v.select) == (None, None, ())
    assert words in v.reasons[0]
    # another value may help all the same
    v = decide([value, on_pairs(0.8, name="explicit")])
    assert (v.outcome, v.exit_code, v.select) == ("mixed", 0, ("explicit",))
    assert words in v.reasons[0]


def test_a_pair_that_is_right_beyond_length_helps():
    assert decide([on_pairs(0.74, balanced=0.7)], divergence=divergence(), sweep=GOOD, judge=GOLD).outcome == "helps"


def test_a_judge_that_measures_length_or_was_trained_on_the_pairs_is_not_used():
    for judge in (on_pairs(0.8, name="gold", balanced=0.5), on_pairs(0.9, name="gold", seen=400)):
        v = decide([on_pairs(0.74)], divergence=divergence(), sweep=(row(0, 0, 0), row(0.5, -1, 4)), judge=judge)
        assert v.outcome == "helps"
        assert any("the judge (gold)" in r and "are not used" in r for r in v.reasons)


def test_a_good_pair_with_a_judge():
    v = decide([on_pairs(0.74)], divergence=divergence(), sweep=GOOD, judge=GOLD)
    assert (v.outcome, v.exit_code, v.beta, v.token) == ("helps", 0, 0.5, "implicit")
    assert "suggested beta 0.5: +2.50 by the judge at 6.6 nats from the base; beyond it KL grows faster than reward" in v.reasons[0]
    v = decide([on_pairs(0.74)], divergence=divergence(), sweep=GOOD[:3], judge=GOLD)
    assert v.beta == 0.5
    assert "a larger one may gain more" in v.reasons[0]


def test_frontier_of_rows_on_the_law():
    """gain = d (2 - 0.1 d): three quarters of the slope are left at d = 0.25 * 2 / 0.1."""
    on_law = [row(b, d * (2 - 0.1 * d), d * d, half=0.1 * b) for b, d in ((0.5, 1.0), (1, 4.0), (2, 7.0))]
    assert verdict.max_efficient_distance(on_law) == pytest.approx(5.0)
    assert verdict.max_efficient_distance([row(b, 2.0 * d, d * d) for b, d in ((0.5, 1.0), (1, 4.0))]) == pytest.approx(math.inf)


def test_a_right_pair_that_makes_the_base_worse():
    """The field's best-known complaint: the pair knows what is good, but guided by it the base writes worse."""
    bad = (row(0, 0, 0), row(0.5, -0.4, 4), row(1, -1.5, 20))
    v = decide([on_pairs(0.74)], divergence=divergence(base_untuned=4.2), sweep=bad, judge=GOLD)
    assert (v.outcome, v.token, v.select) == ("mixed", None, ("implicit",))
    assert "far from the base, but the judge scores the guided texts lower" in v.reasons[0]
    assert "chunk selection rather than token guidance" in v.reasons[1]
    lost = BestOfGain("implicit", Estimate(-0.5, -0.9, -0.1))
    v = decide([on_pairs(0.74)], divergence=divergence(), sweep=bad, judge=GOLD, best_of=(lost,))
    assert (v.outcome, v.exit_code, v.select) == ("no", 1, ())
    assert any("below a random one" in r for r in v.reasons)


def test_without_a_judge_agreement_decides():
    plain = tuple(row(r.beta, None, r.kl.mean) for r in GOOD)
    v = decide([on_pairs(0.74)], divergence=divergence(), sweep=plain)
    assert (v.outcome, v.beta) == ("helps", 1)  # 0.46 nats per token; 2 has 1.5
    assert "no judge" in v.reasons[0]
    v = decide([on_pairs(0.74)], divergence=divergence(), sweep=plain[-1:])
    assert (v.outcome, v.beta) == ("helps", None)
    assert "start with a smaller one" in v.reasons[0]
    v = decide([on_pairs(0.74)], divergence=divergence(), sweep=(row(0.5, None, 4, effective_size=3.0),))
    assert "not from the base alone" in v.reasons[0]
    for far in (divergence(base_untuned=4.2), divergence(outside=0.7)):
        v = decide([on_pairs(0.74)], divergence=far, sweep=plain)
        assert (v.outcome, v.token, v.select) == ("mixed", None, ("implicit",))
        assert "(0.74, interval 0.70–0.78) but far from the base" in v.reasons[0]
    assert decide([on_pairs(0.74)], divergence=divergence(tuned_untuned=0.001)).outcome == "mixed"


def test_a_judge_that_disagrees_with_the_preferences_is_not_used():
    v = decide([on_pairs(0.74)], divergence=divergence(), sweep=(row(0, 0, 0), row(0.5, -1, 4)), judge=on_pairs(0.5, name="gold"))
    assert v.outcome == "helps"
    assert any("the judge (gold)" in r and "are not used" in r for r in v.reasons)


def test_estimates_from_few_texts_are_not_used():
    thin = (row(0, 0, 0), row(0.5, 3, 4, effective_size=3.0))
    v = decide([on_pairs(0.74)], divergence=divergence(), sweep=thin, judge=GOLD)
    assert (v.outcome, v.beta) == ("mixed", None)
    assert "too small" in v.reasons[0]


def test_other_tokens_leave_text():
    v = decide([on_pairs(0.74)], shares_vocabulary=False)
    assert (v.outcome, v.exit_code, v.token, v.select) == ("mixed", 0, None, ("implicit",))
    assert "other tokens than the base" in v.reasons[0]
