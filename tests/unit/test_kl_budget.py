"""A budget of KL divergence for token guidance: formulas by hand, the bound for every answer, the pace."""

import math

import pytest
import torch

from ivg.engines.transformers.engine import TransformersEngine
from ivg.engines.transformers.kl_budget import BudgetRow, guide_within_budget, limit_divergence, share_of_guidance
from ivg.errors import ConfigError
from ivg.integrations.transformers import GuidanceLogitsProcessor
from ivg.model import GuidedModel
from ivg.search.searcher import Request, Search, Searcher
from ivg.testing import byte_tokenizer, hypothesis, tiny_lm, tiny_value
from ivg.types import Prompt, SamplingParams, TokenGuidance, Value
from ivg.values.base import FunctionValue
from ivg.values.implicit import ImplicitValue

pytestmark = pytest.mark.numerics
LN3 = math.log(3.0)
FULL = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
"""KL of (3/4, 1/4) from (1/2, 1/2): guidance adds ln 3 to the first of two equal logits."""
_P = math.sqrt(3) / (1 + math.sqrt(3))
HALF = _P * math.log(2 * _P) + (1 - _P) * math.log(2 * (1 - _P))
"""The same with half of the guidance: p = sqrt(3) / (1 + sqrt(3))."""


@pytest.mark.parametrize("limit,temperature,share,cost", [
    (1.0, 1.0, 1.0, FULL), (FULL + 1e-9, 1.0, 1.0, FULL), (HALF, 1.0, 0.5, HALF), (0.0, 1.0, 0.0, 0.0),
    (FULL, 0.5, 0.5, FULL),  # at temperature 1/2 logits count twice
])  # fmt: skip
def test_two_tokens_by_hand(limit, temperature, share, cost):
    base, guided = torch.zeros(1, 2), torch.tensor([[LN3, 0.0]])
    limited, costs = limit_divergence(base, guided, [limit], [temperature])
    assert limited[0].tolist() == pytest.approx([share * LN3, 0.0], abs=1e-5)
    assert costs == [pytest.approx(cost, abs=1e-8)]


def test_forbidden_tokens_and_rows_that_are_not_finite():
    """Only the last of three equal tokens may be drawn: log 3 nats, however weak; it is all or nothing. NaN is left to be reported."""
    base = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, -math.inf], [0.0, 0.0, 0.0]])
    guided = torch.tensor([[-math.inf, -math.inf, 5.0], [-math.inf, -math.inf, 5.0], [LN3, 0.0, -math.inf], [math.nan, 0.0, 0.0]])
    limited, costs = limit_divergence(base, guided, [1.0, 1.1, HALF, 1.0], [1.0] * 4)
    assert limited[0].tolist() == [0.0, 0.0, 0.0]
    assert limited[1].tolist() == guided[1].tolist()
    assert limited[2].tolist() == [pytest.approx(LN3 / 2, abs=1e-5), 0.0, -math.inf]
    assert limited[3].isnan().any()
    assert costs == [1.0, pytest.approx(LN3), pytest.approx(HALF), 0.0]


@pytest.fixture(scope="module")
def models():
    return tiny_lm("base"), ImplicitValue(tiny_lm("tuned", seed=2), tiny_lm("untuned", seed=3)), tiny_value("scalar", seed=5)


def answers(models, guidance, runs, value=None, **settings):
    sampling = SamplingParams(**{"max_new_tokens": 12, **settings})
    search = Search(guidance=guidance, value=value, **({} if value is None else {"width": 2, "successors": 2, "chunk_length": 5}))
    requests = [Request(Prompt("I am"), search, sampling, seed, record=True, alternatives=257) for seed in range(runs)]
    return [c for _, c in sorted(Searcher(TransformersEngine(models[0])).run(requests))]


def divergence(detail):
    """KL of the guided distribution of a token from the base's, from the reported probabilities of all tokens."""
    base = dict(detail.top_base)
    return sum(math.exp(p) * (p - base[token]) for token, p in detail.top)


@pytest.mark.parametrize("settings", [
    {}, {"temperature": 0.7}, {"temperature": 0.0}, {"ignore_eos": True, "max_new_tokens": 20},
    {"value": FunctionValue(lambda p, r: len(r))},
], ids=["plain", "temperature", "greedy", "long", "search"])  # fmt: skip
@pytest.mark.parametrize("kind", ["implicit", "candidates", "plausibility"])
@pytest.mark.parametrize("budget", [0.3, 5.0])
def test_no_answer_exceeds_its_budget(models, settings, kind, budget):
    """The divergences of all tokens of an answer sum to at most the budget; to what is reported, where guidance is a sum of logits."""
    guidance = {
        "implicit": TokenGuidance(models[1], kl_budget=budget),
        "candidates": TokenGuidance(models[2], 3.0, candidates=6, kl_budget=budget),
        "plausibility": TokenGuidance(models[1], 0.5, plausibility=0.2, kl_budget=budget),
    }[kind]
    without = TokenGuidance(guidance.value, guidance.beta, guidance.candidates, plausibility=guidance.plausibility)
    for got in answers(models, guidance, 4, **settings):
        nats = [divergence(d) for d in got.details]
        assert sum(nats) <= budget + 1e-4
        assert sum(nats) <= got.kl_spent + 1e-4 <= budget + 2e-4
        assert kind != "implicit" or sum(nats) == pytest.approx(got.kl_spent, abs=1e-3)  # candidates are all or nothing
    unlimited = answers(models, without, 4, **settings)
    assert all(free.kl_spent is None for free in unlimited)
    assert budget > 1 or any(sum(map(divergence, free.details)) > budget for free in unlimited)  # it does cut


def test_the_share_by_hand():
    """c = 0.25 on the average, 16 tokens left: s = 1 takes 4 nats, s = 1/2 one nat. Four nats or more leave guidance as it is."""
    assert share_of_guidance(4.0, 8, 16, 2.0) == 1.0
    assert share_of_guidance(1.0, 8, 16, 2.0) == pytest.approx(0.5)
    assert share_of_guidance(100.0, 8, 16, 2.0) == share_of_guidance(1.0, 1, 50, 0.0) == 1.0
    assert share_of_guidance(0.25, 8, 16, 2.0) == pytest.approx(0.25)


def test_the_pace_by_hand():
    """Two equal tokens, guidance of ln 3 on one. First token of 50, one nat: c = FULL, s = sqrt(1 / (50 * FULL)), then c = cost / s^2."""
    base, value = torch.zeros(1, 3), Constant([LN3, 0.0, -math.inf])
    base[0, 2] = -math.inf
    share = math.sqrt(1 / (50 * FULL))
    first = 1 / (1 + 3**-share)
    cost = first * math.log(2 * first) + (1 - first) * math.log(2 * (1 - first))
    beam = hypothesis("x", "", tiny_lm("base"))
    row = BudgetRow(beam, spent=0.0, rate=0.0, tokens=1, remaining=50, temperature=1.0)
    guidance = TokenGuidance(value, kl_budget=1.0)
    logits, costs = guide_within_budget(base, [row], guidance, None, {})
    assert logits[0].tolist() == [pytest.approx(share * LN3, abs=1e-5), 0.0, -math.inf]
    assert costs == [(pytest.approx(cost, abs=1e-6), pytest.approx(cost / share**2, abs=1e-4))]
    last = BudgetRow(beam, spent=1 - HALF, rate=0.0, tokens=50, remaining=1, temperature=0.0)  # what is left is for one token
    logits, costs = guide_within_budget(base, [last], guidance, None, {})
    assert costs[0][0] == pytest.approx(HALF)
    assert logits[0, 0] == pytest.approx(LN3 / 2, abs=1e-5)
    spent = BudgetRow(beam, spent=1.0, rate=3.0, tokens=9, remaining=9, temperature=1.0)
    logits, costs = guide_within_budget(base, [spent], guidance, None, {})
    assert (logits.tolist(), costs) == (base.tolist(), [(0.0, 0.0)])


class Constant(Value):
    """Adds the same to the logits of every row."""

    def __init__(self, shift):
        self.shift, self.vocabulary_ = torch.tensor([shift]), tiny_lm("base").vocabulary

    def score(self, hypotheses):
        return [0.0] * len(hypotheses)

    def full_vocabulary(self):
        return True

    @property
    def vocabulary(self):
        return self.vocabulary_

    def deltas(self, hypotheses):
        return self.shift.expand(len(hypotheses), -1).nan_to_num(0.0, neginf=0.0)


def test_a_large_budget_changes_nothing_and_a_small_one_is_taken_to_the_end(models):
    """Guidance that would cost more is spread over the whole answer: nearly all of the budget is used, at the last token too."""
    settings = {"ignore_eos": True, "max_new_tokens": 40}
    free, wide, tight = (answers(models, TokenGuidance(models[1], kl_budget=b), 6, **settings) for b in (None, 1e6, 8.0))
    assert [c.token_ids for c in wide] == [c.token_ids for c in free]
    for c, unlimited in zip(tight, free, strict=True):
        assert sum(map(divergence, unlimited.details)) > 16
        nats = [divergence(d) for d in c.details]
        assert 0.85 * 8 < sum(nats) <= 8 + 1e-4
        assert 0.25 * 8 < sum(nats[:20]) < 0.75 * 8


def test_the_mean_of_the_shifts_is_the_mean_of_what_was_spent(models):
    """Both estimate KL(pi || pi_base) of whole answers."""
    done = answers(models, TokenGuidance(models[1], 0.7, kl_budget=4.0), 300)
    shifts, spent = (torch.tensor(x) for x in ([sum(c.guide_shift) for c in done], [c.kl_spent for c in done]))
    error = float((shifts - spent).std()) / math.sqrt(len(done))
    assert abs(float((shifts - spent).mean())) < 4 * error
    assert 1.0 < float(spent.mean()) <= 4.0


def test_no_budget_needs_no_guide(models):
    base, value, _ = models
    model = GuidedModel(base, {"implicit": value})
    plain, none = (model.generate("I am", m, seed=1, max_new_tokens=30, **s) for m, s in (("base", {}), ("eft", {"kl_budget": 0})))
    assert none.token_ids == plain.token_ids
    assert (none.kl_spent, none.usage.forward_tokens.get("tuned", 0)) == (0.0, 0)
    some = model.generate("I am", "eft", seed=1, max_new_tokens=30, kl_budget=2.0)
    assert some.to_dict()["kl_spent"] == pytest.approx(some.kl_spent, abs=1e-6)
    assert 0 < some.kl_spent <= 2
    assert "kl_spent" not in plain.to_dict()
    assert model.get_method("eft-kl").kl_budget == 10.0


@pytest.mark.parametrize("bad", [-1.0, math.nan, "x", True])
def test_impossible_budgets_are_errors(models, bad):
    with pytest.raises(ConfigError, match="kl_budget must be"):
        TokenGuidance(models[1], kl_budget=bad)


def test_who_cannot_says_so(models):
    guidance = TokenGuidance(models[1], kl_budget=0.0)
    with pytest.raises(ConfigError, match="GuidedGenerate"):
        GuidanceLogitsProcessor(guidance, byte_tokenizer())
    with pytest.raises(ConfigError, match="kl_budget=1"):
        TransformersEngine(models[0]).check(TokenGuidance(models[1], draft=3, kl_budget=1.0))
