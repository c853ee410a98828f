"""Logits of given texts, accuracy on pairs, length control: against full passes, hand-computed and simulated values."""

import math

import numpy as np
import pytest
import torch

from ivg.diagnostics import length_bias, pairs, stats, verdict
from ivg.diagnostics.divergence import pair_divergence
from ivg.diagnostics.length_bias import length_control
from ivg.diagnostics.logits import GuidanceLogits, response_beam, response_logits
from ivg.diagnostics.preference_check import CheckSettings, check_preferences
from ivg.diagnostics.sweep import SweepSettings
from ivg.errors import ConfigError
from ivg.model import GuidedModel
from ivg.testing import byte_tokenizer, hypothesis, tiny_lm, tiny_value
from ivg.types import Preference, Prompt
from ivg.values.base import CompositeValue, FunctionValue
from ivg.values.implicit import AutoregressiveReward, ImplicitValue


def implicit(tokenizer=None):
    return ImplicitValue(tiny_lm("tuned", seed=1, tokenizer=tokenizer), tiny_lm("untuned", seed=2, tokenizer=tokenizer))


# Logits


def test_blocks_are_the_logits_of_one_pass():
    reader = tiny_lm()
    beam = hypothesis("a prompt", "a response of some tokens", reader, end=True)
    ids, border = reader.ids(beam)
    with torch.no_grad():
        whole = reader.network(input_ids=torch.tensor([ids])).logits[0, border - 1 : -1]
    for block in (1, 4, 100):
        pieces = list(response_logits(reader, beam, block))
        assert max(map(len, pieces)) <= block
        assert torch.allclose(torch.cat(pieces), whole, atol=1e-4)
    assert reader.model.live_rows == 0


def test_guidance_logits_of_every_value_that_knows_the_vocabulary():
    base = tiny_lm()
    head, arm = tiny_value("vocabulary"), AutoregressiveReward(tiny_lm("arm", seed=5))
    both = CompositeValue([(2.0, head), (-1.0, CompositeValue([(0.5, arm)]))])
    beam = hypothesis("a prompt", "xyz", base)
    for value in (implicit(), head, arm, both):
        ((logits, shift),) = GuidanceLogits.from_value(value, base).blocks(base, beam)
        wanted = value.deltas([hypothesis("a prompt", "xyz"[:n], base) for n in range(3)])
        assert logits.shape == shift.shape == (3, 257)
        constant = (shift - wanted).mean(1, keepdim=True)  # shifts of all tokens alike change nothing
        assert torch.allclose(shift - constant, wanted, atol=1e-4)
    other = byte_tokenizer(permute=True)
    assert GuidanceLogits.from_value(implicit(other), base) is None
    assert GuidanceLogits.from_value(tiny_value("scalar"), base) is None
    assert GuidanceLogits.from_value(FunctionValue(lambda p, y: 0.0), base) is None


def test_agreement_by_hand():
    base, pair = tiny_lm(), implicit()
    beams = [hypothesis("a prompt", "first", base), hypothesis("another", "text", base)]
    got = pair_divergence(base, pair, beams, beta=0.5)
    rows_, outside = [], []
    for beam in beams:
        z, t, u = (torch.cat(list(response_logits(r, beam))).double() for r in (base, pair.tuned, pair.untuned))
        g = (z + 0.5 * (t - u)).softmax(-1)
        kl = lambda p, q: float((p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum())  # noqa: E731
        rows_.append([kl(z, t), kl(z, u), kl(t, u), kl(g.log(), z)])
        likely = z.argsort(-1, descending=True)[:, :20]
        outside.append(float((1 - g.gather(1, likely).sum(1)).sum()))
    n = 9
    assert got.tokens == n
    found = [got.base_tuned, got.base_untuned, got.tuned_untuned, got.guided_base, got.outside]
    assert found == pytest.approx([*(np.sum(rows_, 0) / n), sum(outside) / n], rel=1e-4)
    assert pair_divergence(base, implicit(byte_tokenizer(permute=True)), beams) is None


# Pairs

PAIRS = [
    Preference(Prompt("Say:"), " hello there", " no", 1.0),
    Preference(Prompt("Say:"), " yes", " perhaps not today", 0.5, rejected_ends=False),
    Preference(Prompt("Other"), " é—ü", " x", 2.0),
]


@pytest.mark.parametrize("kind", ["implicit", "vocabulary", "scalar", "other"])
def test_scores_of_prefixes_are_those_of_texts_read_anew(kind):
    base = tiny_lm()
    other = byte_tokenizer([("t", "h"), ("o", "t")])
    make = {"implicit": implicit, "other": lambda: tiny_value("scalar", tokenizer=other)}.get(kind, lambda: tiny_value(kind))
    got, _ = pairs.score_pairs(base, make(), PAIRS, batch=2)
    value = make()
    for i, pair in enumerate(PAIRS):
        for side, (text, ends) in enumerate(((pair.chosen, pair.chosen_ends), (pair.rejected, pair.rejected_ends))):
            raw = text.encode()
            for k, fraction in enumerate((0.25, 0.5, 0.75)):
                cut = raw[: math.ceil(fraction * len(raw))]
                ids = base.tokenizer(text, add_special_tokens=False).input_ids[: len(cut)]
                beam = response_beam(base, pair.prompt, cut.decode(errors="ignore"), ids)
                assert got[i, k, side] == pytest.approx(value.score([beam])[0], abs=1e-3), (pair, fraction)
            assert got[i, 3, side] == pytest.approx(value.score([response_beam(base, pair.prompt, text, ends=ends)])[0], abs=1e-3)


def test_rows_are_freed_and_ends_can_be_left_out():
    base, pair = tiny_lm(), implicit()
    with_ends, _ = pairs.score_pairs(base, pair, PAIRS)
    without, _ = pairs.score_pairs(base, pair, PAIRS, ends=False)
    assert pair.tuned.model.live_rows == pair.untuned.model.live_rows == 0
    assert with_ends[:, :3] == pytest.approx(without[:, :3], abs=1e-3)
    assert (abs(with_ends[:, 3] - without[:, 3]) > 1e-3).tolist() == [[True, True], [True, False], [True, True]]


def test_what_no_context_can_hold_is_left_out():
    base, pair = tiny_lm(), ImplicitValue(tiny_lm("tuned", seed=1, context=40), tiny_lm("untuned", seed=2, context=40))
    long = Preference(Prompt("Say:"), "x" * 60, "y")
    kept, reasons = pairs.readable_pairs(base, {"implicit": pair}, [*PAIRS, long])
    assert kept == PAIRS
    assert reasons == ["prompt and response of 65 tokens > context of tuned (40)"]
    with pytest.raises(ConfigError, match="no pair that all models can read: prompt and response of 65"):
        check_preferences(GuidedModel(base, {"implicit": pair}), [long])


def test_pairs_that_a_value_has_no_number_for_are_left_out_and_named():
    """Of every value, so that all are measured on the same pairs; one bad pair ends no check."""

    def picky(prompt, response):
        if "y" in response:
            raise KeyError("secret")
        return math.nan if "z" in response else float(len(response))

    base, values = tiny_lm(), {"picky": FunctionValue(picky, "picky"), "fine": FunctionValue(lambda p, r: 1.0, "fine")}
    made = [
        Preference(Prompt("a"), "xx", "x"),
        Preference(Prompt("b"), "x", "y"),
        Preference(Prompt("c"), "z", "x"),
        Preference(Prompt("d"), "xxx", "x"),
    ]
    found = check_preferences(GuidedModel(base, values), made, CheckSettings(SweepSettings(batch=4), prompts=0))
    assert found.pairs == 2
    assert [(v.name, v.whole.n, v.whole.rate) for v in found.values[1:]] == [("picky", 2, 1.0), ("fine", 2, 0.5)]
    assert list(found.skipped) == ["the value picky raised KeyError: 'secret'", "the value picky gave NaN: expected a finite number"]
    with pytest.raises(ConfigError, match=r"no pair that all models can read: the value picky raised KeyError: 'secret'"):
        check_preferences(GuidedModel(base, values), made[1:3])


def test_balanced_accuracy_sees_through_length():
    base = tiny_lm()
    made = [Preference(Prompt(f"{i}"), "x" * (9 if i % 4 else 3), "x" * (3 if i % 4 else 9), margin=float(i)) for i in range(100)]
    assert pairs.longer_wins(base, made).mean() == 0.75
    value = FunctionValue(lambda p, y: float(len(y)))
    found = pairs.pair_accuracy("length", pairs.score_pairs(base, value, made)[0], made, pairs.pair_lengths(base, value, made))
    assert found.whole.rate == 0.75
    assert [s.rate for s in (found.length_control.alone, found.length_control.balanced, found.length_control.residual)] == pytest.approx(
        [0.75, 0.5, 0.5]
    )
    assert abs(found.margin_correlation) < 0.2
    assert verdict.classify(found) == "length"


def simulated(preference, value, seed, count=150):
    """Pairs drawn from a population of lengths and qualities: (scores [pairs, 2], lengths, prompts), the chosen response first."""
    rng = np.random.default_rng(seed)
    tokens = np.exp(rng.normal(3.5, 0.6, (count, 2))).clip(2, 400).round()
    quality, noise, prompt = rng.normal(size=(count, 2)), rng.normal(size=(count, 2)), 3 * rng.normal(size=(count, 1))
    gap = np.diff(-preference(tokens, quality, noise), axis=1)[:, 0] + 1e-6 * rng.normal(size=count)
    for table in (tokens, quality):
        table[gap < 0] = table[gap < 0][:, ::-1]
    characters = (4.6 * tokens + 1.5 * np.sqrt(tokens) * rng.normal(size=tokens.shape)).round()
    scores = value(tokens, characters, quality, 0.5 * rng.normal(size=tokens.shape)) + prompt
    return scores, {"tokens": tokens, "characters": characters}, np.arange(count)


ONLY_LENGTH = {
    "tokens": lambda n, c, q, e: n,
    "characters": lambda n, c, q, e: c,
    "logarithm": lambda n, c, q, e: 5 * np.log(n),
    "medium": lambda n, c, q, e: -abs(n - 30.0),
    "threshold": lambda n, c, q, e: 9.0 * (n > 30),
    "noisy": lambda n, c, q, e: n + 10 * e,
}


@pytest.mark.parametrize("value", ONLY_LENGTH.values(), ids=ONLY_LENGTH)
@pytest.mark.parametrize(
    "preference",
    [lambda n, q, e: n, lambda n, q, e: -abs(n - 30), lambda n, q, e: 9.0 * (n > 30), lambda n, q, e: np.log(n) + q + e],
    ids=["longer", "medium", "threshold", "longer and better"],
)
def test_what_only_measures_length_never_passes(preference, value):
    passed = [length_control(*simulated(preference, value, seed)).passed for seed in range(20)]
    assert sum(passed) <= 2  # "noisy" passes by chance: one in forty


@pytest.mark.parametrize(
    "preference",
    [lambda n, q, e: 1.5 * q + e, lambda n, q, e: 2 * np.log(n) + 2 * q + e, lambda n, q, e: -2 * np.log(n) + 2 * q + e],
    ids=["better", "longer and better", "shorter and better"],
)
@pytest.mark.parametrize("value", [lambda n, c, q, e: q + e, lambda n, c, q, e: q + e + n / 30], ids=["quality", "quality and length"])
def test_what_is_right_where_length_is_not_passes(preference, value):
    found = [length_control(*simulated(preference, value, seed)) for seed in range(10)]
    assert sum(c.passed for c in found) >= 9


def test_accuracy_that_length_explains_does_not_pass():
    scores, lengths, groups = simulated(lambda n, q, e: q, lambda n, c, q, e: q, 0)
    chosen_longer = {unit: np.sort(table, axis=1)[:, ::-1] + [1, 0] for unit, table in lengths.items()}
    found = length_control(scores, chosen_longer, groups)
    assert (found.alone.rate, found.balanced, found.passed) == (1.0, None, False)
    chosen_shorter = {unit: np.sort(table, axis=1) + [0, 1] for unit, table in lengths.items()}
    assert length_control(scores, chosen_shorter, groups).rule == "shorter"
    as_long = {unit: table[:, :1].repeat(2, axis=1) for unit, table in lengths.items()}
    assert length_control(scores, as_long, groups).passed  # pairs of equal length are free of it


def test_weights_balance_the_sides():
    assert stats.wilson(np.array([1.0, 0.0, 1.0]), np.arange(3), np.array([1.0, 1.0, 2.0])).rate == 0.75
    equal, weighted = (stats.wilson(np.array([1.0, 0.0] * 10), np.arange(20), w) for w in (None, np.array([1.0, 1.0] * 10)))
    assert equal == weighted
    assert length_bias.balancing_weights(np.array([1.0, 1.0, 0.0, 0.5, 1.0])).tolist() == [1 / 3, 1 / 3, 1, 1, 1 / 3]
    assert length_bias.balancing_weights(np.array([1.0, 0.5])).tolist() == [0, 1]
