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
from ivg.diagnostics import intervals, length, pairs, report, verdict
from ivg.diagnostics.divergence import Disagreement, agreement
from ivg.diagnostics.intervals import Mean, Share
from ivg.diagnostics.length import LengthControl, length_control
from ivg.diagnostics.log_ratios import Shift, response_logits, written
from ivg.diagnostics.pairs import OnPairs
from ivg.diagnostics.report import Judge, foresee
from ivg.diagnostics.sweep import Plan, Row, Selection, Texts, draw, follow, rows, sweep
from ivg.errors import ConfigError
from ivg.model import GuidedModel
from ivg.models.training_rows import write_training_rows
from ivg.testing import byte_tokenizer, hypothesis, tiny_lm, tiny_value
from ivg.types import Prompt, SamplingParams
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
    s = intervals.share(hits, np.arange(10))
    assert (s.n, s.rate) == (10, 0.8)
    assert (s.low, s.high) == (pytest.approx(0.4902, abs=1e-3), pytest.approx(0.9433, abs=1e-3))


def test_pairs_of_one_prompt_are_no_independent_witnesses():
    hits = np.repeat([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], 10)  # ten pairs of each of six prompts agree with each other
    alone = intervals.share(hits, np.arange(60))
    together = intervals.share(hits, np.repeat(np.arange(6), 10))
    assert together.rate == alone.rate
    assert together.high - together.low > 2.4 * (alone.high - alone.low)
    assert intervals.share(np.ones(60), np.repeat(np.arange(6), 10)).low < 0.65  # six witnesses, not sixty


def test_ties_count_half():
    assert intervals.wins(np.array([1.0, 0.0, 2.0]), np.array([0.0, 1.0, 2.0 + 1e-6])).tolist() == [1, 0, 0.5]


def test_slope_finds_bradley_terry():
    rng = np.random.default_rng(0)
    x = rng.normal(size=20000)
    chosen_first = rng.random(20000) < 1 / (1 + np.exp(-0.7 * x))
    s, loss = intervals.slope(np.where(chosen_first, x, -x))
    assert s == pytest.approx(0.7, abs=0.05)
    p = 1 / (1 + np.exp(-0.7 * x))
    assert loss == pytest.approx(float(-(p * np.log(p) + (1 - p) * np.log(1 - p)).mean()), abs=0.01)
    assert intervals.slope(np.zeros(3)) == (0.0, math.log(2))
    assert intervals.slope(np.array([1.0, 2.0]))[1] < 0.01  # separable: finite, and sure


def test_rank_correlation():
    assert intervals.rank_correlation(np.array([1.0, 2.0, 9.0]), np.array([0.1, 0.2, 0.3])) == pytest.approx(1.0)
    assert intervals.rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([1.0, 1.0, 1.0])) is None


def test_best_of_n_is_the_mean_over_all_choices():
    by, judged = np.array([0.3, -1.0, 2.0, 0.5, 0.1]), np.array([5.0, 1.0, 2.0, 8.0, 3.0])
    chosen = [judged[max(c, key=lambda i: by[i])] for c in itertools.combinations(range(5), 3)]
    assert intervals.best_of(3, by, judged) == pytest.approx(np.mean(chosen))


def test_weights_from_the_base_alone_are_plain_importance_weights():
    logps = np.log(np.array([[0.5, 0.2], [0.3, 0.3], [0.2, 0.5]]))
    w = intervals.mixture_weights(logps, np.zeros(3, dtype=int))
    assert w[:, 1] / w[:, 1].sum() == pytest.approx(np.array([0.4, 1.0, 2.5]) / 3.9)
    assert w[:, 0].tolist() == [1, 1, 1]
    assert intervals.effective_size(w)[1] == pytest.approx(3.9**2 / (0.16 + 1 + 6.25))


def test_weights_of_policies_that_share_nothing_are_zero_and_one():
    logps = np.array([[-1.0, -900.0], [-2.0, -900.0], [-900.0, -3.0]])
    w = intervals.mixture_weights(logps, np.array([0, 0, 1]))
    assert w == pytest.approx(np.array([[1, 0], [1, 0], [0, 1]]))


def test_baselines_leave_a_text_out_of_its_own():
    scores, prompts = np.array([1.0, 3.0, 5.0, 10.0, 20.0]), np.array([0, 0, 0, 1, 1])
    own = np.array([True, True, False, True, True])
    assert intervals.baselines(scores, prompts, own).tolist() == [3.0, 1.0, 2.0, 20.0, 10.0]


# A vocabulary so small that all texts can be listed

WORDS = ["<eos>", "good", "bad", "so", "not"]
LIMIT = 3
PLAN = Plan((0.0, 0.5, 1.5), samples=300, sampling=SamplingParams(temperature=0.8, max_new_tokens=LIMIT), batch=600)
PROMPTS = [Prompt("so good"), Prompt("not")]


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<eos>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<eos>", pad_token="<eos>")


class Words:
    """A judge that reads tokens, so that no text hides from it."""

    name = "words"
    worth = (0.5, 2.0, -1.0, 0.2, -0.3)

    def score(self, hypotheses):
        return [sum(self.worth[t] for t in h.token_ids) * (1 + 0.3 * len(h.token_ids)) for h in hypotheses]

    def check(self, prompt, new_tokens):
        pass

    def release(self, keys):
        pass


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
    exact = [np.array([[slow_logp(small, p, y, b, 0.8) for b in PLAN.betas] for y in ys]) for p in PROMPTS]
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


def test_one_reading_gives_every_policy_exactly(small, listed):
    ys, exact = listed
    shift = Shift.of(small.values["implicit"], small.base)
    for p, e in zip(PROMPTS, exact, strict=True):
        read = [follow(small, shift, written(small.base, p, "", y), PLAN) for y in ys]
        logps, kls = np.stack([r[0] for r in read]), np.stack([r[1] for r in read])
        assert logps == pytest.approx(e, abs=1e-4)
        assert np.exp(logps).sum(0) == pytest.approx(np.ones(3), abs=1e-4)
        # the mean of summed exact KLs is the KL of whole texts
        assert (np.exp(e) * kls).sum(0) == pytest.approx((np.exp(e) * (e - e[:, :1])).sum(0), abs=1e-4)
        assert kls[:, 0] == pytest.approx(np.zeros(len(ys)), abs=1e-6)
        assert kls[:, 2].max() > 0.5


@pytest.mark.parametrize("drawn_at", [(0,), (0, 1, 2)], ids=["from the base", "from every beta"])
def test_estimates_converge_to_enumeration(small, listed, drawn_at):
    """Texts drawn from the listed distributions: the error shrinks as their number grows."""
    ys, exact = listed
    gain, kl = exact_numbers(listed)
    shift = Shift.of(small.values["implicit"], small.base)
    kls = [np.stack([follow(small, shift, written(small.base, p, "", y), PLAN)[1] for y in ys]) for p in PROMPTS]
    scores = worth(ys)
    beams = [written(small.base, PROMPTS[0], "", y) for y in ys]

    def errors(n):
        rng = np.random.default_rng(n)
        chances = [np.exp(e) / np.exp(e).sum(0) for e in exact]
        jobs = [(p, k, i) for p in range(2) for k in drawn_at for i in rng.choice(len(ys), n, p=chances[p][:, k])]
        texts = Texts([beams[i] for _, _, i in jobs], np.array([p for p, _, _ in jobs]), np.array([k for _, k, _ in jobs]))
        logps, summed = np.stack([exact[p][i] for p, _, i in jobs]), np.stack([kls[p][i] for p, _, i in jobs])
        got = rows(PLAN.betas, texts, logps, summed, np.array([scores[i] for _, _, i in jobs]))
        return [abs(r.gain.value - g) + abs(r.kl.value - k) for r, g, k in zip(got, gain, kl, strict=True)][1:]

    assert max(errors(20000)) < 0.06
    assert np.mean(errors(20000)) < 0.5 * np.mean([errors(n) for n in range(60, 70)])
    assert abs(gain[2]) > 0.3  # there is something to find


def test_drawn_sweep_agrees_with_enumeration(small, listed):
    gain, kl = exact_numbers(listed)
    texts = draw(small, "implicit", PROMPTS, PLAN)
    assert len(texts.beams) == 2 * 300 * 3
    assert np.bincount(texts.drawn).tolist() == [600] * 3
    scores = np.array(Words().score(texts.beams))
    got = sweep(small, "implicit", texts, scores, PLAN)
    for r, g, k in zip(got, gain, kl, strict=True):
        assert r.gain.value == pytest.approx(g, abs=0.2)
        assert r.kl.value == pytest.approx(k, rel=0.1, abs=1e-6)
        assert r.effective >= 590
    assert small.base.model.live_rows == 0


def test_effective_size_warns_where_the_base_alone_says_nothing(small):
    far = Plan((0.0, 8.0), (0.0,), samples=50, sampling=PLAN.sampling)
    texts = draw(small, "implicit", PROMPTS, far)
    assert set(texts.drawn) == {0}
    got = sweep(small, "implicit", texts, None, far)
    assert got[0].effective == pytest.approx(100)
    assert got[1].effective < 40
    assert got[1].gain is None


def test_plans_that_cannot_be():
    with pytest.raises(ConfigError, match="0 among them"):
        Plan((0.0, 1.0), (1.0,))
    with pytest.raises(ConfigError, match="2 or more samples"):
        Plan(samples=1)
    with pytest.raises(ConfigError, match="temperature"):
        Plan(sampling=SamplingParams(temperature=0))
    assert Plan((2, 0.5)).betas == (0.0, 0.5, 2.0)


# Readings


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


def test_shift_of_every_value_that_knows_the_vocabulary():
    base = tiny_lm()
    head, arm = tiny_value("vocabulary"), AutoregressiveReward(tiny_lm("arm", seed=5))
    both = CompositeValue([(2.0, head), (-1.0, CompositeValue([(0.5, arm)]))])
    beam = hypothesis("a prompt", "xyz", base)
    for value in (implicit(), head, arm, both):
        ((logits, shift),) = Shift.of(value, base).blocks(base, beam)
        wanted = value.deltas([hypothesis("a prompt", "xyz"[:n], base) for n in range(3)])
        assert logits.shape == shift.shape == (3, 257)
        constant = (shift - wanted).mean(1, keepdim=True)  # shifts of all tokens alike change nothing
        assert torch.allclose(shift - constant, wanted, atol=1e-4)
    other = byte_tokenizer(permute=True)
    assert Shift.of(implicit(other), base) is None
    assert Shift.of(tiny_value("scalar"), base) is None
    assert Shift.of(FunctionValue(lambda p, y: 0.0), base) is None


def test_agreement_by_hand():
    base, pair = tiny_lm(), implicit()
    beams = [hypothesis("a prompt", "first", base), hypothesis("another", "text", base)]
    got = agreement(base, pair, beams, beta=0.5)
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
    found = [got.base_tuned, got.base_untuned, got.tuned_untuned, got.moved, got.outside]
    assert found == pytest.approx([*(np.sum(rows_, 0) / n), sum(outside) / n], rel=1e-4)
    assert agreement(base, implicit(byte_tokenizer(permute=True)), beams) is None


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
                beam = written(base, pair.prompt, cut.decode(errors="ignore"), ids)
                assert got[i, k, side] == pytest.approx(value.score([beam])[0], abs=1e-3), (pair, fraction)
            assert got[i, 3, side] == pytest.approx(value.score([written(base, pair.prompt, text, ends=ends)])[0], abs=1e-3)


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
    kept, reasons = pairs.fitting(base, {"implicit": pair}, [*PAIRS, long])
    assert kept == PAIRS
    assert reasons == ["prompt and response of 65 tokens > context of tuned (40)"]
    with pytest.raises(ConfigError, match="no pair that all models can read: prompt and response of 65"):
        foresee(GuidedModel(base, {"implicit": pair}), [long])


def test_pairs_that_a_value_has_no_number_for_are_left_out_and_named():
    """Of every value, so that all are measured on the same pairs; one bad pair ends no check."""

    def picky(prompt, response):
        if "y" in response:
            raise KeyError("secret")
        return math.nan if "z" in response else float(len(response))

    base, values = tiny_lm(), {"picky": FunctionValue(picky, "picky"), "fine": FunctionValue(lambda p, r: 1.0, "fine")}
    made = [Pair(Prompt("a"), "xx", "x"), Pair(Prompt("b"), "x", "y"), Pair(Prompt("c"), "z", "x"), Pair(Prompt("d"), "xxx", "x")]
    kept, tables, why = report._scored(base, values, made, Plan(batch=4), True)
    assert kept == [made[0], made[3]]
    assert tables["picky"][:, 3].tolist() == [[2, 1], [3, 1]] and tables["fine"].shape == (2, 4, 2)
    assert why == ["the value picky raised KeyError: 'secret'", "the value picky gave NaN: expected a finite number"]
    with pytest.raises(ConfigError, match=r"no pair that all models can read: the value picky raised KeyError: 'secret'"):
        foresee(GuidedModel(base, values), made[1:3])


def test_balanced_accuracy_sees_through_length():
    base = tiny_lm()
    made = [Pair(Prompt(f"{i}"), "x" * (9 if i % 4 else 3), "x" * (3 if i % 4 else 9), margin=float(i)) for i in range(100)]
    assert pairs.longer_wins(base, made).mean() == 0.75
    value = FunctionValue(lambda p, y: float(len(y)))
    found = pairs.summary("length", pairs.score_pairs(base, value, made)[0], made, pairs.pair_lengths(base, value, made))
    assert found.whole.rate == 0.75
    assert [s.rate for s in (found.length.alone, found.length.balanced, found.length.residual)] == pytest.approx([0.75, 0.5, 0.5])
    assert abs(found.margin) < 0.2
    assert verdict.standing(found) == "length"


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
    assert intervals.share(np.array([1.0, 0.0, 1.0]), np.arange(3), np.array([1.0, 1.0, 2.0])).rate == 0.75
    equal, weighted = (intervals.share(np.array([1.0, 0.0] * 10), np.arange(20), w) for w in (None, np.array([1.0, 1.0] * 10)))
    assert equal == weighted
    assert length.balancing_weights(np.array([1.0, 1.0, 0.0, 0.5, 1.0])).tolist() == [1 / 3, 1 / 3, 1, 1, 1 / 3]
    assert length.balancing_weights(np.array([1.0, 0.5])).tolist() == [0, 1]


# Verdicts


def on_pairs(rate, half=0.04, name="implicit", balanced=None, n=400, residual=0.7, seen=0):
    def around(x):
        return Share(n, x, x - half, x + half)

    control = LengthControl("tokens", "longer", around(0.7), None if balanced is None else around(balanced), around(residual))
    plain = OnPairs(name, (around(rate),) * 4, 1.0, 0.6, None, seen=seen, on_training_data=bool(seen))
    return plain if balanced is None and residual == 0.7 else replace(plain, length=control)


def own(base_untuned=0.4, outside=0.3, tuned_untuned=0.3):
    return Disagreement(100, 0.5, base_untuned, tuned_untuned, 0.3, 0.6, outside, 0.28)


def row(beta, gain, kl, effective=64.0, half=0.2, length=50):
    return Row(beta, None if gain is None else Mean(gain, gain - half, gain + half), Mean(kl, kl, kl), length, effective)


GOLD = on_pairs(0.8, name="gold")
GOOD = (row(0, 0, 0), row(0.25, 1.5, 1.8), row(0.5, 2.5, 6.6), row(1, 3.6, 23), row(2, 3.8, 75))


def decide(values, guide="implicit", fits=True, **rest):
    return verdict.decide(verdict.Evidence({v.name: v for v in values}, guide, fits, **rest))


@pytest.mark.parametrize(
    ("value", "standing", "words"),
    [
        (on_pairs(0.52, 0.05), "chance", "no better than chance (0.52, interval 0.47–0.57): guidance by it will not help"),
        (on_pairs(0.31), "opposed", "prefers what you reject"),
        (on_pairs(0.52, 0.01), "weak", "hardly better than chance"),
        (on_pairs(0.6, 0.2, n=20), "unclear", "cannot be told from chance by 20 pairs"),
        (
            on_pairs(0.7, balanced=0.51),
            "length",
            "(0.70, interval 0.66–0.74), but length explains it: the longer response (tokens) is chosen as often (0.70, interval "
            "0.66–0.74); accuracy where longer and shorter are chosen alike 0.51, interval 0.47–0.55",
        ),
        (on_pairs(0.7, balanced=0.7, residual=0.52), "length", "by what length does not predict 0.52, interval 0.48–0.56"),
        (
            on_pairs(0.9, 0.12, balanced=0.9, residual=0.6, n=60),
            "unclear",
            "60 pairs of so few different lengths (tokens) cannot tell it from",
        ),
        (on_pairs(0.9, residual=0.8), "length", "and in no pair the shorter one; give pairs that length does not decide"),
        (on_pairs(0.9, seen=380), "trained", "was trained on 380 of these pairs, and too few others are left"),
    ],
)
def test_a_pair_that_will_not_help(value, standing, words):
    assert verdict.standing(value) == standing
    v = decide([value], own=own(), rows=GOOD, judge=GOLD)
    assert v.outcome == ("unclear" if standing in ("unclear", "trained") else "no")
    assert v.exit_code == 1
    assert (v.beta, v.token, v.select) == (None, None, ())
    assert words in v.reasons[0]
    # another value may help all the same
    v = decide([value, on_pairs(0.8, name="explicit")])
    assert (v.outcome, v.exit_code, v.select) == ("mixed", 0, ("explicit",))
    assert words in v.reasons[0]


def test_a_pair_that_is_right_beyond_length_helps():
    assert decide([on_pairs(0.74, balanced=0.7)], own=own(), rows=GOOD, judge=GOLD).outcome == "helps"


def test_a_judge_that_only_counts_or_was_trained_on_the_pairs_is_not_heard():
    for judge in (on_pairs(0.8, name="gold", balanced=0.5), on_pairs(0.9, name="gold", seen=400)):
        v = decide([on_pairs(0.74)], own=own(), rows=(row(0, 0, 0), row(0.5, -1, 4)), judge=judge)
        assert v.outcome == "helps"
        assert any("the judge (gold)" in r and "left out" in r for r in v.reasons)


def test_a_good_pair_with_a_judge():
    v = decide([on_pairs(0.74)], own=own(), rows=GOOD, judge=GOLD)
    assert (v.outcome, v.exit_code, v.beta, v.token) == ("helps", 0, 0.5, "implicit")
    assert "suggested beta 0.5: +2.50 by the judge at 6.6 nats from the base; beyond it KL grows faster than reward" in v.reasons[0]
    v = decide([on_pairs(0.74)], own=own(), rows=GOOD[:3], judge=GOLD)
    assert v.beta == 0.5
    assert "larger ones may buy more" in v.reasons[0]


def test_frontier_of_rows_on_the_law():
    """gain = d (2 - 0.1 d): three quarters of the slope are left at d = 0.25 * 2 / 0.1."""
    on_law = [row(b, d * (2 - 0.1 * d), d * d, half=0.1 * b) for b, d in ((0.5, 1.0), (1, 4.0), (2, 7.0))]
    assert verdict.frontier(on_law) == pytest.approx(5.0)
    assert verdict.frontier([row(b, 2.0 * d, d * d) for b, d in ((0.5, 1.0), (1, 4.0))]) == pytest.approx(math.inf)


def test_a_right_pair_that_makes_the_base_worse():
    """The field's best-known complaint: the pair knows what is good, but guided by it the base writes worse."""
    bad = (row(0, 0, 0), row(0.5, -0.4, 4), row(1, -1.5, 20))
    v = decide([on_pairs(0.74)], own=own(base_untuned=4.2), rows=bad, judge=GOLD)
    assert (v.outcome, v.token, v.select) == ("mixed", None, ("implicit",))
    assert "far from the base, but guided by it the judge sees worse texts" in v.reasons[0]
    assert "select chunks rather than to guide tokens" in v.reasons[1]
    lost = Selection("implicit", Mean(-0.5, -0.9, -0.1))
    v = decide([on_pairs(0.74)], own=own(), rows=bad, judge=GOLD, selection=(lost,))
    assert (v.outcome, v.exit_code, v.select) == ("no", 1, ())
    assert any("worse than a random one" in r for r in v.reasons)


def test_without_a_judge_agreement_decides():
    plain = tuple(row(r.beta, None, r.kl.value) for r in GOOD)
    v = decide([on_pairs(0.74)], own=own(), rows=plain)
    assert (v.outcome, v.beta) == ("helps", 1)  # 0.46 nats per token; 2 has 1.5
    assert "no judge" in v.reasons[0]
    v = decide([on_pairs(0.74)], own=own(), rows=plain[-1:])
    assert (v.outcome, v.beta) == ("helps", None)
    assert "start with a smaller one" in v.reasons[0]
    v = decide([on_pairs(0.74)], own=own(), rows=(row(0.5, None, 4, effective=3.0),))
    assert "not from the base alone" in v.reasons[0]
    for far in (own(base_untuned=4.2), own(outside=0.7)):
        v = decide([on_pairs(0.74)], own=far, rows=plain)
        assert (v.outcome, v.token, v.select) == ("mixed", None, ("implicit",))
        assert "(0.74, interval 0.70–0.78) but far from the base" in v.reasons[0]
    assert decide([on_pairs(0.74)], own=own(tuned_untuned=0.001)).outcome == "mixed"


def test_a_judge_that_disagrees_with_the_preferences_is_not_heard():
    v = decide([on_pairs(0.74)], own=own(), rows=(row(0, 0, 0), row(0.5, -1, 4)), judge=on_pairs(0.5, name="gold"))
    assert v.outcome == "helps"
    assert any("the judge (gold)" in r and "left out" in r for r in v.reasons)


def test_estimates_that_rest_on_few_texts_are_not_heard():
    thin = (row(0, 0, 0), row(0.5, 3, 4, effective=3.0))
    v = decide([on_pairs(0.74)], own=own(), rows=thin, judge=GOLD)
    assert (v.outcome, v.beta) == ("mixed", None)
    assert "too small" in v.reasons[0]


def test_other_tokens_leave_text():
    v = decide([on_pairs(0.74)], fits=False)
    assert (v.outcome, v.exit_code, v.token, v.select) == ("mixed", 0, None, ("implicit",))
    assert "other tokens than the base" in v.reasons[0]


# The whole


def test_pair_without_the_base_vocabulary_is_measured_by_text():
    model = GuidedModel(tiny_lm(), {"implicit": implicit(byte_tokenizer([("t", "h")]))})
    found = foresee(
        model, PAIRS * 8, Plan(samples=4, sampling=SamplingParams(max_new_tokens=5)), judge=Judge("words", FunctionValue(characters))
    )
    assert found.chosen is None
    assert found.sweep == ()
    assert [s.value for s in found.selection] == ["implicit"]
    assert [v.name for v in found.values] == ["base", "implicit", "words"]
    assert found.pairs == 24


def characters(prompt, text):
    return float(len(text))


def test_a_guide_is_not_its_own_judge(small):
    found = foresee(small, PAIRS, Plan(samples=2, sampling=PLAN.sampling), judge=Judge("implicit", small.values["implicit"]))
    assert found.judge is None
    assert all(r.gain is None for r in found.sweep)
    with pytest.raises(ConfigError, match="no value called 'nothing'"):
        foresee(small, PAIRS, guide="nothing")


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
    found = foresee(base, word_pairs(60, longer=True), prompts=0)
    assert found.longer.rate == 1.0
    assert found.values[1].whole.rate == 1.0
    assert (found.verdict.outcome, found.verdict.exit_code) == ("no", 1)
    assert "but length explains it: the longer response" in found.verdict.reasons[0]
    base.add_value("mine", vowels)
    assert foresee(base, word_pairs(60), prompts=0).verdict.outcome == "mixed"  # it can select
    assert foresee(base, word_pairs(60), prompts=0).verdict.select == ("mine",)


def test_a_value_is_not_measured_on_its_training_data(tmp_path):
    made = word_pairs(60)
    value = tiny_value("scalar")
    value.score = lambda beams: [vowels("", b.text) for b in beams]  # right about all of them
    value.network.config._name_or_path = str(tmp_path)
    model = GuidedModel(tiny_lm(), {"mine": value})
    found = foresee(model, made, prompts=0)
    assert (found.unknown, found.values[1].seen) == (("explicit",), 0)
    write_training_rows(tmp_path, [(p.prompt, p.chosen) for p in made[:30]])
    found = foresee(model, made, prompts=0)
    assert (found.unknown, found.verdict.outcome) == ((), "mixed")
    assert (found.values[0].whole.n, found.values[1].whole.n, found.values[1].seen) == (60, 30, 30)
    write_training_rows(tmp_path, [(p.prompt, p.rejected) for p in made[:50]])
    found = foresee(model, made, prompts=0)
    assert (found.values[1].on_training_data, found.values[1].seen) == (True, 50)
    assert (found.verdict.outcome, found.verdict.exit_code, found.verdict.select) == ("unclear", 1, ())
    assert "was trained on 50 of these pairs, and too few others are left" in found.verdict.reasons[0]


def test_pairs_of_one_text_are_counted_and_left_out():
    ties = [Pair(Prompt("p"), "same", "same"), Pair(Prompt("q"), "", "")]
    ends = Pair(Prompt("p"), "same", "same", rejected_ends=False)  # one was cut: the end is the difference
    base = GuidedModel(tiny_lm(), {"mine": FunctionValue(vowels)})
    found = foresee(base, [*ties, *word_pairs(30), ends], prompts=0)
    assert (found.pairs, found.ties) == (31, 2)
    with pytest.raises(ConfigError, match="in all 2 pairs chosen and rejected are the same text"):
        foresee(base, ties, prompts=0)


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
    assert "not known whether these pairs were trained on by: tuned, untuned, explicit, explicit-other, gold" in out
    assert "with length taken out" in out
    assert "accuracy is good" in out
    assert "judged by gold" in out
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["verdict"]["outcome"] == "helps"
    assert data["verdict"]["beta"] in (0.5, 1)
    assert [r["beta"] for r in data["sweep"]] == [0, 0.5, 1]
    assert data["sweep"][0]["kl"]["value"] == 0
    assert 0 < data["sweep"][1]["kl"]["value"] < data["sweep"][2]["kl"]["value"]
    assert data["sweep"][2]["gain"]["low"] > 0
    assert {v["name"] for v in data["values"]} == {"base", "implicit", "explicit", "explicit-other", "gold"}
    assert all(len(v["at"]) == 4 for v in data["values"])
    assert data["chosen"]["tokens"] > 0
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
    assert "but length explains it: the longer response (characters) is chosen as often (1.00" in out


def test_opposed_pair_is_caught(check, preferences):
    from ivg.embedded import path

    models = ["--base", path("base"), "--tuned", path("untuned"), "--untuned", path("tuned")]
    code, out, _ = check("--preferences", preferences / "good.jsonl", *models, "--sweep", 3, "--samples", 2, "--betas", "1")
    assert code == 1
    assert "verdict: no" in out
    assert "prefers what you reject" in out
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
    assert "--json is about preferences" in err
    code, _, err = check("A prompt", "--preferences", preferences / "good.jsonl")
    assert code
    assert "leave the others out" in err
    code, _, err = check("--preferences", preferences / "good.jsonl", "--betas", "some")
    assert code
    assert "--betas 'some'" in err
    code, _, err = check("--preferences", preferences / "good.jsonl", "--judge", "nobody")
    assert code
    assert "no value called 'nobody'" in err
