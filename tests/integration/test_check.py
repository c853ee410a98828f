"""Will guidance help: statistics against hand-computed and enumerated values, readings against full passes, verdicts, the command."""

import functools
import itertools
import json
import math
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ivg.cli import main
from ivg.diagnostics import length_bias, pairs, stats, verdict
from ivg.diagnostics.divergence import PairDivergence, pair_divergence
from ivg.diagnostics.length_bias import LengthControl, length_control
from ivg.diagnostics.logits import GuidanceLogits, response_beam, response_logits
from ivg.diagnostics.pairs import PairAccuracy
from ivg.diagnostics.preference_check import CheckSettings, Judge, check_preferences
from ivg.diagnostics.stats import Estimate, Proportion
from ivg.diagnostics.sweep import BestOfGain, SampledTexts, SweepRow, SweepSettings, sample_texts, sweep, sweep_rows, text_logps_and_kls
from ivg.errors import ConfigError
from ivg.model import GuidedModel
from ivg.models.training_rows import write_training_rows
from ivg.testing import byte_tokenizer, hypothesis, tiny_lm, tiny_value
from ivg.types import Prompt, SamplingParams, Value
from ivg.values.base import CompositeValue, FunctionValue
from ivg.values.implicit import AutoregressiveReward, ImplicitValue


@dataclass(frozen=True)
class Pair:
    prompt: Prompt
    chosen: str
    rejected: str
    margin: float | None = None
    chosen_ends: bool = True
    rejected_ends: bool = True


def implicit(tokenizer=None):
    return ImplicitValue(tiny_lm("tuned", seed=1, tokenizer=tokenizer), tiny_lm("untuned", seed=2, tokenizer=tokenizer))


# Statistics


def test_wilson_interval():
    hits = np.array([1.0] * 8 + [0.0] * 2)
    s = stats.wilson(hits, np.arange(10))
    assert (s.n, s.rate) == (10, 0.8)
    assert (s.low, s.high) == (pytest.approx(0.4902, abs=1e-3), pytest.approx(0.9433, abs=1e-3))


def test_pairs_of_one_prompt_are_not_independent():
    hits = np.repeat([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], 10)  # ten pairs of each of six prompts agree with each other
    alone = stats.wilson(hits, np.arange(60))
    together = stats.wilson(hits, np.repeat(np.arange(6), 10))
    assert together.rate == alone.rate
    assert together.high - together.low > 2.4 * (alone.high - alone.low)
    assert stats.wilson(np.ones(60), np.repeat(np.arange(6), 10)).low < 0.65  # six observations, not sixty


def test_ties_count_half():
    assert stats.wins(np.array([1.0, 0.0, 2.0]), np.array([0.0, 1.0, 2.0 + 1e-6])).tolist() == [1, 0, 0.5]


def test_slope_finds_bradley_terry():
    rng = np.random.default_rng(0)
    x = rng.normal(size=20000)
    chosen_first = rng.random(20000) < 1 / (1 + np.exp(-0.7 * x))
    s, loss = stats.bradley_terry_slope(np.where(chosen_first, x, -x))
    assert s == pytest.approx(0.7, abs=0.05)
    p = 1 / (1 + np.exp(-0.7 * x))
    assert loss == pytest.approx(float(-(p * np.log(p) + (1 - p) * np.log(1 - p)).mean()), abs=0.01)
    assert stats.bradley_terry_slope(np.zeros(3)) == (0.0, math.log(2))
    assert stats.bradley_terry_slope(np.array([1.0, 2.0]))[1] < 0.01  # separable: finite, and sure


def test_rank_correlation():
    assert stats.spearman(np.array([1.0, 2.0, 9.0]), np.array([0.1, 0.2, 0.3])) == pytest.approx(1.0)
    assert stats.spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 1.0, 1.0])) is None


def test_best_of_n_is_the_mean_over_all_choices():
    by, judged = np.array([0.3, -1.0, 2.0, 0.5, 0.1]), np.array([5.0, 1.0, 2.0, 8.0, 3.0])
    chosen = [judged[max(c, key=lambda i: by[i])] for c in itertools.combinations(range(5), 3)]
    assert stats.expected_best_of(3, by, judged) == pytest.approx(np.mean(chosen))


def test_weights_from_the_base_alone_are_plain_importance_weights():
    logps = np.log(np.array([[0.5, 0.2], [0.3, 0.3], [0.2, 0.5]]))
    w = stats.mixture_weights(logps, np.zeros(3, dtype=int))
    assert w[:, 1] / w[:, 1].sum() == pytest.approx(np.array([0.4, 1.0, 2.5]) / 3.9)
    assert w[:, 0].tolist() == [1, 1, 1]
    assert stats.effective_size(w)[1] == pytest.approx(3.9**2 / (0.16 + 1 + 6.25))


def test_weights_of_policies_that_share_nothing_are_zero_and_one():
    logps = np.array([[-1.0, -900.0], [-2.0, -900.0], [-900.0, -3.0]])
    w = stats.mixture_weights(logps, np.array([0, 0, 1]))
    assert w == pytest.approx(np.array([[1, 0], [1, 0], [0, 1]]))


def test_baselines_leave_a_text_out_of_its_own():
    scores, prompts = np.array([1.0, 3.0, 5.0, 10.0, 20.0]), np.array([0, 0, 0, 1, 1])
    own = np.array([True, True, False, True, True])
    assert stats.leave_one_out_baselines(scores, prompts, own).tolist() == [3.0, 1.0, 2.0, 20.0, 10.0]


# A vocabulary so small that all texts can be listed

WORDS = ["<eos>", "good", "bad", "so", "not"]
LIMIT = 3
SETTINGS = SweepSettings((0.0, 0.5, 1.5), samples=300, sampling=SamplingParams(temperature=0.8, max_new_tokens=LIMIT), batch=600)
PROMPTS = [Prompt("so good"), Prompt("not")]


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<eos>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<eos>", pad_token="<eos>")


class Words(Value):
    """A judge that reads tokens, so that no text hides from it."""

    name = "words"
    worth = (0.5, 2.0, -1.0, 0.2, -0.3)

    def score(self, hypotheses):
        return [sum(self.worth[t] for t in h.token_ids) * (1 + 0.3 * len(h.token_ids)) for h in hypotheses]


def all_texts():
    out, open_ = [], [()]
    for n in range(1, LIMIT + 1):
        longer = [(*y, t) for y in open_ for t in range(len(WORDS))]
        out += [y for y in longer if y[-1] == 0 or n == LIMIT]
        open_ = [y for y in longer if y[-1] != 0]
    return out


@pytest.fixture(scope="module")
def small():
    tok = word_tokenizer()
    return GuidedModel(tiny_lm("base", seed=0, tokenizer=tok), {"implicit": implicit(tok)})


@functools.cache
def slow_logits(model, prompt, y):
    """(base's logits, shift) behind a text, one full pass of every network."""
    pair, ids = model.values["implicit"], torch.tensor([[*model.base.prompt_ids(prompt), *y]])
    with torch.no_grad():
        z, t, u = (r.model.network(input_ids=ids).logits[0, -1] for r in (model.base, pair.tuned, pair.untuned))
    return z, t - u


def slow_logp(model, prompt, y, beta, temperature):
    """log pi_beta(y), token by token."""
    total = 0.0
    for n, token in enumerate(y):
        z, shift = slow_logits(model, prompt, y[:n])
        total += float(((z + beta * shift) / temperature).log_softmax(-1)[token])
    return total


@pytest.fixture(scope="module")
def listed(small):
    """Every text of every prompt: (texts, exact log pi [texts, betas] per prompt)."""
    ys = all_texts()
    exact = [np.array([[slow_logp(small, p, y, b, 0.8) for b in SETTINGS.betas] for y in ys]) for p in PROMPTS]
    return ys, exact


def worth(ys):
    """The judge's scores of listed texts."""
    return np.array(Words().score([SimpleNamespace(token_ids=y) for y in ys]))


def exact_numbers(listed):
    """(gain, KL) of every beta, by enumeration."""
    ys, exact = listed
    scores = worth(ys)
    reward = np.mean([np.exp(e).T @ scores for e in exact], axis=0)
    kl = np.mean([(np.exp(e) * (e - e[:, :1])).sum(0) for e in exact], axis=0)
    return reward - reward[0], kl


def test_one_pass_gives_every_policy_exactly(small, listed):
    ys, exact = listed
    shift = GuidanceLogits.from_value(small.values["implicit"], small.base)
    for p, e in zip(PROMPTS, exact, strict=True):
        read = [text_logps_and_kls(small, shift, response_beam(small.base, p, "", y), SETTINGS) for y in ys]
        logps, kls = np.stack([r[0] for r in read]), np.stack([r[1] for r in read])
        assert logps == pytest.approx(e, abs=1e-4)
        assert np.exp(logps).sum(0) == pytest.approx(np.ones(3), abs=1e-4)
        # the mean of summed exact KLs is the KL of whole texts
        assert (np.exp(e) * kls).sum(0) == pytest.approx((np.exp(e) * (e - e[:, :1])).sum(0), abs=1e-4)
        assert kls[:, 0] == pytest.approx(np.zeros(len(ys)), abs=1e-6)
        assert kls[:, 2].max() > 0.5


@pytest.mark.parametrize("sampled_at", [(0,), (0, 1, 2)], ids=["from the base", "from every beta"])
def test_estimates_converge_to_enumeration(small, listed, sampled_at):
    """Texts drawn from the listed distributions: the error shrinks as their number grows."""
    ys, exact = listed
    gain, kl = exact_numbers(listed)
    shift = GuidanceLogits.from_value(small.values["implicit"], small.base)
    kls = [np.stack([text_logps_and_kls(small, shift, response_beam(small.base, p, "", y), SETTINGS)[1] for y in ys]) for p in PROMPTS]
    scores = worth(ys)
    beams = [response_beam(small.base, PROMPTS[0], "", y) for y in ys]

    def errors(n):
        rng = np.random.default_rng(n)
        chances = [np.exp(e) / np.exp(e).sum(0) for e in exact]
        jobs = [(p, k, i) for p in range(2) for k in sampled_at for i in rng.choice(len(ys), n, p=chances[p][:, k])]
        texts = SampledTexts([beams[i] for _, _, i in jobs], np.array([p for p, _, _ in jobs]), np.array([k for _, k, _ in jobs]))
        logps, summed = np.stack([exact[p][i] for p, _, i in jobs]), np.stack([kls[p][i] for p, _, i in jobs])
        got = sweep_rows(SETTINGS.betas, texts, logps, summed, np.array([scores[i] for _, _, i in jobs]))
        return [abs(r.gain.mean - g) + abs(r.kl.mean - k) for r, g, k in zip(got, gain, kl, strict=True)][1:]

    assert max(errors(20000)) < 0.06
    assert np.mean(errors(20000)) < 0.5 * np.mean([errors(n) for n in range(60, 70)])
    assert abs(gain[2]) > 0.3  # there is something to find


def test_drawn_sweep_agrees_with_enumeration(small, listed):
    gain, kl = exact_numbers(listed)
    texts = sample_texts(small, "implicit", PROMPTS, SETTINGS)
    assert len(texts.beams) == 2 * 300 * 3
    assert np.bincount(texts.sampled_at).tolist() == [600] * 3
    scores = np.array(Words().score(texts.beams))
    got = sweep(small, "implicit", texts, scores, SETTINGS)
    for r, g, k in zip(got, gain, kl, strict=True):
        assert r.gain.mean == pytest.approx(g, abs=0.2)
        assert r.kl.mean == pytest.approx(k, rel=0.1, abs=1e-6)
        assert r.effective_size >= 590
    assert small.base.model.live_rows == 0


def test_effective_size_warns_where_the_base_alone_says_nothing(small):
    far = SweepSettings((0.0, 8.0), (0.0,), samples=50, sampling=SETTINGS.sampling)
    texts = sample_texts(small, "implicit", PROMPTS, far)
    assert set(texts.sampled_at) == {0}
    got = sweep(small, "implicit", texts, None, far)
    assert got[0].effective_size == pytest.approx(100)
    assert got[1].effective_size < 40
    assert got[1].gain is None


def test_invalid_sweep_settings():
    with pytest.raises(ConfigError, match="0 among them"):
        SweepSettings((0.0, 1.0), (1.0,))
    with pytest.raises(ConfigError, match="at least 2 samples"):
        SweepSettings(samples=1)
    with pytest.raises(ConfigError, match="temperature"):
        SweepSettings(sampling=SamplingParams(temperature=0))
    assert SweepSettings((2, 0.5)).betas == (0.0, 0.5, 2.0)


# Logits


def test_blocks_are_the_logits_of_one_pass():
    reader = tiny_lm()
    beam = hypothesis("a prompt", "a response of some tokens", reader, end=True)
    ids, border = reader.ids(beam)
    with torch.no_grad():
        whole = reader.model.network(input_ids=torch.tensor([ids])).logits[0, border - 1 : -1]
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
    Pair(Prompt("Say:"), " hello there", " no", 1.0),
    Pair(Prompt("Say:"), " yes", " perhaps not today", 0.5, rejected_ends=False),
    Pair(Prompt("Other"), " é—ü", " x", 2.0),
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
    long = Pair(Prompt("Say:"), "x" * 60, "y")
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
    made = [Pair(Prompt("a"), "xx", "x"), Pair(Prompt("b"), "x", "y"), Pair(Prompt("c"), "z", "x"), Pair(Prompt("d"), "xxx", "x")]
    found = check_preferences(GuidedModel(base, values), made, CheckSettings(SweepSettings(batch=4), prompts=0))
    assert found.pairs == 2
    assert [(v.name, v.whole.n, v.whole.rate) for v in found.values[1:]] == [("picky", 2, 1.0), ("fine", 2, 0.5)]
    assert list(found.skipped) == ["the value picky raised KeyError: 'secret'", "the value picky gave NaN: expected a finite number"]
    with pytest.raises(ConfigError, match=r"no pair that all models can read: the value picky raised KeyError: 'secret'"):
        check_preferences(GuidedModel(base, values), made[1:3])


def test_balanced_accuracy_sees_through_length():
    base = tiny_lm()
    made = [Pair(Prompt(f"{i}"), "x" * (9 if i % 4 else 3), "x" * (3 if i % 4 else 9), margin=float(i)) for i in range(100)]
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


def test_a_quality_that_no_pair_tells_from_length_does_not_pass():
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


# Verdicts


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


def test_a_judge_that_only_counts_or_was_trained_on_the_pairs_is_not_heard():
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


def test_a_judge_that_disagrees_with_the_preferences_is_not_heard():
    v = decide([on_pairs(0.74)], divergence=divergence(), sweep=(row(0, 0, 0), row(0.5, -1, 4)), judge=on_pairs(0.5, name="gold"))
    assert v.outcome == "helps"
    assert any("the judge (gold)" in r and "are not used" in r for r in v.reasons)


def test_estimates_that_rest_on_few_texts_are_not_heard():
    thin = (row(0, 0, 0), row(0.5, 3, 4, effective_size=3.0))
    v = decide([on_pairs(0.74)], divergence=divergence(), sweep=thin, judge=GOLD)
    assert (v.outcome, v.beta) == ("mixed", None)
    assert "too small" in v.reasons[0]


def test_other_tokens_leave_text():
    v = decide([on_pairs(0.74)], shares_vocabulary=False)
    assert (v.outcome, v.exit_code, v.token, v.select) == ("mixed", 0, None, ("implicit",))
    assert "other tokens than the base" in v.reasons[0]


# The whole


def test_pair_without_the_base_vocabulary_is_measured_by_text():
    model = GuidedModel(tiny_lm(), {"implicit": implicit(byte_tokenizer([("t", "h")]))})
    found = check_preferences(
        model,
        PAIRS * 8,
        CheckSettings(SweepSettings(sampling=SamplingParams(max_new_tokens=5)), judge=Judge("words", FunctionValue(characters))),
    )
    assert found.divergence_on_chosen is None
    assert found.sweep == ()
    assert [s.value for s in found.best_of] == ["implicit"]
    assert [v.name for v in found.values] == ["base", "implicit", "words"]
    assert found.pairs == 24


def characters(prompt, text):
    return float(len(text))


def test_a_guide_is_not_its_own_judge(small):
    settings = CheckSettings(SweepSettings(samples=2, sampling=SETTINGS.sampling), judge=Judge("implicit", small.values["implicit"]))
    found = check_preferences(small, PAIRS, settings)
    assert found.judge is None
    assert all(r.gain is None for r in found.sweep)
    with pytest.raises(ConfigError, match="no value called 'nothing'"):
        check_preferences(small, PAIRS, CheckSettings(guide="nothing"))


def vowels(prompt, text):
    return float(sum(c in "aeiou" for c in text) / max(1, len(text)))


def word_pairs(count, longer=False):
    """Pairs whose chosen response has more vowels; with ``longer`` it is the longer one as well, whatever its letters."""
    rng = np.random.default_rng(4)
    made = []
    for i in range(count):
        both = ["".join(rng.choice(list("aeioubcdfgkl"), rng.integers(4, 20))) for _ in range(2)]
        both.sort(key=lambda text: (len(text) if longer else 0, vowels("", text)))
        made.append(Pair(Prompt(f"Say {i}:"), both[1] + "x" * longer, both[0]))
    return made


def test_a_value_that_is_right_only_where_length_is_does_not_help():
    base = GuidedModel(tiny_lm(), {"mine": FunctionValue(characters)})
    found = check_preferences(base, word_pairs(60, longer=True), CheckSettings(prompts=0))
    assert found.longer_wins.rate == 1.0
    assert found.values[1].whole.rate == 1.0
    assert (found.verdict.outcome, found.verdict.exit_code) == ("no", 1)
    assert "but length explains it: choosing the longer response" in found.verdict.reasons[0]
    base.add_value("mine", vowels)
    assert check_preferences(base, word_pairs(60), CheckSettings(prompts=0)).verdict.outcome == "mixed"  # it can select
    assert check_preferences(base, word_pairs(60), CheckSettings(prompts=0)).verdict.select == ("mine",)


def test_a_value_is_not_measured_on_its_training_data(tmp_path):
    made = word_pairs(60)
    value = tiny_value("scalar")
    value.score = lambda beams: [vowels("", b.text) for b in beams]  # right about all of them
    value.network.config._name_or_path = str(tmp_path)
    model = GuidedModel(tiny_lm(), {"mine": value})
    found = check_preferences(model, made, CheckSettings(prompts=0))
    assert (found.unknown_training_data, found.values[1].trained_pairs) == (("explicit",), 0)
    write_training_rows(tmp_path, [(p.prompt, p.chosen) for p in made[:30]])
    found = check_preferences(model, made, CheckSettings(prompts=0))
    assert (found.unknown_training_data, found.verdict.outcome) == ((), "mixed")
    assert (found.values[0].whole.n, found.values[1].whole.n, found.values[1].trained_pairs) == (60, 30, 30)
    write_training_rows(tmp_path, [(p.prompt, p.rejected) for p in made[:50]])
    found = check_preferences(model, made, CheckSettings(prompts=0))
    assert (found.values[1].on_training_data, found.values[1].trained_pairs) == (True, 50)
    assert (found.verdict.outcome, found.verdict.exit_code, found.verdict.select) == ("unclear", 1, ())
    assert "was trained on 50 of these pairs, and too few others are left" in found.verdict.reasons[0]


def test_pairs_of_one_text_are_counted_and_left_out():
    ties = [Pair(Prompt("p"), "same", "same"), Pair(Prompt("q"), "", "")]
    ends = Pair(Prompt("p"), "same", "same", rejected_ends=False)  # one was cut: the end is the difference
    base = GuidedModel(tiny_lm(), {"mine": FunctionValue(vowels)})
    found = check_preferences(base, [*ties, *word_pairs(30), ends], CheckSettings(prompts=0))
    assert (found.pairs, found.ties) == (31, 2)
    with pytest.raises(ConfigError, match="in all 2 pairs chosen and rejected are the same text"):
        check_preferences(base, ties, CheckSettings(prompts=0))


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    """Pairs of the embedded base's own texts that the embedded judge tells apart clearly; and the same with labels at random."""
    from ivg.embedded import path
    from ivg.models.loading import LoadOptions
    from ivg.values.reward import RewardModel

    options = LoadOptions(device="cpu", dtype="float32")
    model, gold = GuidedModel.embedded(options), RewardModel.from_pretrained(path("gold"), options=options)
    openings = ["The movie was", "This film", "I thought the story", "My friends and I", "After ten minutes", "The acting of"]
    jobs = [p for p in openings for _ in range(32)]
    requests = [model.request(p, "base", seed=9, index=i, temperature=1.0, max_new_tokens=24, ignore_eos=True) for i, p in enumerate(jobs)]
    done = dict(model.run(requests))
    scores, _ = gold.rewards([p + done[i].text for i, p in enumerate(jobs)])
    made = []
    for i in range(0, len(jobs), 2):
        best, worst = sorted((i, i + 1), key=lambda k: -scores[k])
        if scores[best] - scores[worst] > 1.5:
            made.append({"prompt": jobs[i], "chosen": done[best].text, "rejected": done[worst].text})
    folder = tmp_path_factory.mktemp("preferences")
    swapped = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} if i % 2 else r for i, r in enumerate(made)]
    for name, rows_ in (("good", made), ("random", swapped)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows_))
    assert len(made) > 40
    return folder


@pytest.fixture
def check(monkeypatch, capsys):
    def run(*arguments):
        common = ["--ignore-eos", "--max-new-tokens", "24", "--dtype", "float32", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["ivg", "check", *map(str, arguments), *common])
        monkeypatch.setenv("COLUMNS", "160")
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out = capsys.readouterr()
        return end.value.code or 0, out.out, out.err

    return run


def test_good_pair_helps(check, preferences, tmp_path):
    code, out, _ = check("--preferences", preferences / "good.jsonl", "--sweep", 5, "--betas", "0.5,1", "--json", tmp_path / "out.json")
    assert code == 0, out
    assert "verdict: helps" in out
    assert "unknown training data (no fingerprints beside the weights): tuned, untuned, explicit, explicit-other, gold" in out
    assert "with length controlled" in out
    assert "accuracy is good" in out
    assert "judged by gold" in out
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["verdict"]["outcome"] == "helps"
    assert data["verdict"]["beta"] in (0.5, 1)
    assert [r["beta"] for r in data["sweep"]] == [0, 0.5, 1]
    assert data["sweep"][0]["kl"]["mean"] == 0
    assert 0 < data["sweep"][1]["kl"]["mean"] < data["sweep"][2]["kl"]["mean"]
    assert data["sweep"][2]["gain"]["low"] > 0
    assert {v["name"] for v in data["values"]} == {"base", "implicit", "explicit", "explicit-other", "gold"}
    assert all(len(v["accuracy"]) == 4 for v in data["values"])
    assert data["divergence_on_chosen"]["tokens"] > 0
    assert data["chosen"] == data["divergence_on_chosen"]  # the name of 0.1
    assert data["made_with"]["models"] == "embedded"


@pytest.mark.long
def test_where_the_longer_response_always_wins_nothing_helps(check, preferences, tmp_path):
    rows_ = [json.loads(line) for line in (preferences / "good.jsonl").read_text().splitlines()]
    for r in rows_:
        while len(r["chosen"]) <= len(r["rejected"]) or len(r["chosen"].split()) <= len(r["rejected"].split()):
            r["chosen"] += " It is the best."  # longer, and better to the embedded pair
    same = {**rows_[0], "chosen": rows_[0]["rejected"]}
    (tmp_path / "longer.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [same, *rows_]))
    code, out, err = check("--preferences", tmp_path / "longer.jsonl", "--sweep", 0)
    assert code == 1
    assert "longer.jsonl, line 1: chosen and rejected are the same text" in err
    assert "verdict: no" in out
    assert "but length explains it: choosing the longer response (characters) is as accurate (1.00" in out


def test_opposed_pair_is_caught(check, preferences):
    from ivg.embedded import path

    models = ["--base", path("base"), "--tuned", path("untuned"), "--untuned", path("tuned")]
    code, out, _ = check("--preferences", preferences / "good.jsonl", *models, "--sweep", 3, "--samples", 2, "--betas", "1")
    assert code == 1
    assert "verdict: no" in out
    assert "prefers the rejected responses" in out
    assert "no judge" in out


def test_pair_that_says_nothing_about_these_preferences_is_caught(check, preferences):
    code, out, _ = check("--preferences", preferences / "random.jsonl", "--sweep", 0)
    assert code == 1
    assert "verdict: no" in out or "verdict: unclear" in out
    assert "chance" in out.splitlines()[-1]


def test_value_with_other_tokens_selects(check, preferences):
    from ivg.embedded import path

    models = ["--base", path("base"), "--value", path("value-other"), "--judge", "gold"]
    code, out, _ = check("--preferences", preferences / "good.jsonl", *models, "--sweep", 4)
    assert code == 0
    assert "verdict: mixed" in out
    assert "has other tokens than the base" in out
    assert "select by explicit" in out
    assert "KL to base" not in out


def test_options_that_do_not_belong_together(check, preferences):
    code, _, err = check("--json", "x.json")
    assert code
    assert "--json needs preferences" in err
    code, _, err = check("A prompt", "--preferences", preferences / "good.jsonl")
    assert code
    assert "leave the others out" in err
    code, _, err = check("--preferences", preferences / "good.jsonl", "--betas", "some")
    assert code
    assert "--betas 'some'" in err
    code, _, err = check("--preferences", preferences / "good.jsonl", "--judge", "nobody")
    assert code
    assert "no value called 'nobody'" in err
