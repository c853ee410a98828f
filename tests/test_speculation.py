"""Speculative guidance is exact: the distribution is the guided one, and how far ahead is drafted changes no token."""

from functools import cache

import pytest
import torch

from ivg.decoding.search import Request, Searcher
from ivg.decoding.strategies import strategy
from ivg.draws import uniform
from ivg.engine.coupling import accepts, coupled, propose, replacement
from ivg.engine.sampling import filtered
from ivg.engine.transformers import TransformersEngine
from ivg.testing import ARCHITECTURES, tiny_reader, tiny_value
from ivg.types import Prompt, SamplingParams
from ivg.values.implicit import ImplicitValue


def chi_square(counts, expected):
    """(statistic, bound that a right sampler exceeds once in some 30 000 runs); rare outcomes together."""
    likely = expected > 5
    pairs = [*zip(counts[likely].tolist(), expected[likely].tolist(), strict=True)]
    if float(expected[~likely].sum()) > 1:
        pairs.append((float(counts[~likely].sum()), float(expected[~likely].sum())))
    freedom = max(1, len(pairs) - 1)
    return sum((c - e) ** 2 / e for c, e in pairs), freedom + 4 * (2 * freedom) ** 0.5 + 4


@cache
def numbers(rows, seed=0):
    return [tuple(uniform(seed, i, k) for k in range(3)) for i in range(rows)]


def softmax(z, params, seen=()):
    return filtered(z[None], params, [list(seen)])[0].softmax(-1)


FILTERS = {
    "plain": {},
    "warm": {"temperature": 1.7},
    "cold": {"temperature": 0.5},
    "top-k": {"top_k": 3},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.2},
    "all": {"top_k": 5, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.5, "temperature": 0.8},
}


@pytest.mark.parametrize("settings", FILTERS.values(), ids=FILTERS.keys())
@pytest.mark.parametrize("apart", [0.0, 0.5, 3.0])
def test_coupled_draws_have_the_target_distribution(settings, apart):
    torch.manual_seed(0)
    rows, params = 20_000, SamplingParams(**settings)
    p = torch.randn(8) * 1.5
    q = p + apart * torch.randn(8)
    seen = [[1, 2, 2]] * rows
    tokens, kept = coupled(p.expand(rows, -1), q.expand(rows, -1), [params] * rows, seen, numbers(rows))
    target, proposed = softmax(p, params, seen[0]), softmax(q, params, seen[0])
    counts = torch.bincount(tokens, minlength=8)
    assert (counts[target == 0] == 0).all()
    statistic, bound = chi_square(counts, rows * target)
    assert statistic < bound
    expected = float(torch.minimum(target, proposed).sum())  # what rejection sampling accepts: one minus the total variation
    assert kept.float().mean() == pytest.approx(expected, abs=0.015)
    proposals, _ = propose(q.expand(rows, -1), [params] * rows, seen, [u for u, _, _ in numbers(rows)])
    wrong, bound = chi_square(torch.bincount(proposals, minlength=8), rows * target.clamp(min=1e-9))
    assert apart == 0 or wrong > bound, "the test would not see a sampler that draws from q"


def test_distributions_without_common_tokens():
    """Every proposal is rejected, and the replacement is a draw from p."""
    never = -torch.inf
    p, q = torch.tensor([never, never, 1.0, 0.0]), torch.tensor([0.3, 0.0, never, never])
    rows = 5000
    tokens, kept = coupled(p.expand(rows, -1), q.expand(rows, -1), [SamplingParams()] * rows, [[]] * rows, numbers(rows))
    assert not kept.any()
    statistic, bound = chi_square(torch.bincount(tokens, minlength=4), rows * p.softmax(-1))
    assert statistic < bound


def test_equal_distributions_are_always_accepted():
    p = torch.randn(3000, 50)
    _, kept = coupled(p, p.clone(), [SamplingParams(top_p=0.8)] * 3000, [[]] * 3000, numbers(3000))
    assert kept.all()


def test_the_highest_numbers_draw_possible_tokens():
    """Uniforms next to 1 and to 0 pick no token of probability zero, nor one outside the vocabulary."""
    p = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf]]).expand(4, -1)
    q = torch.tensor([[1.0, 0.0, 0.0, -torch.inf]]).expand(4, -1)
    edge = 1 - 2**-53
    tokens, _ = coupled(p, q, [SamplingParams()] * 4, [[]] * 4, [(edge,) * 3, (0.0,) * 3, (0.0, edge, 0.0), (edge, 0.0, edge)])
    assert set(tokens.tolist()) <= {0, 2}


def test_greedy_takes_the_target_s_likeliest():
    p = torch.tensor([[0.0, 2.0, 1.0], [0.0, 2.0, 1.0], [0.0, 2.0, 1.9]])
    q = torch.tensor([[0.0, 5.0, 1.0], [9.0, 2.0, 1.0], [0.0, 2.0, 1.0]])
    params = [SamplingParams(temperature=0)] * 2 + [SamplingParams(temperature=0, repetition_penalty=1.5)]
    tokens, kept = coupled(p, q, params, [[], [], [1]], numbers(3))
    assert tokens.tolist() == [1, 1, 2]
    assert kept.tolist() == [True, False, False]


def test_rows_with_different_settings_do_not_touch():
    torch.manual_seed(1)
    p, q = torch.randn(6, 20), torch.randn(6, 20)
    params = [SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_k=2)] * 2
    together = coupled(p, q, params, [[]] * 6, numbers(6))[0].tolist()
    alone = [int(coupled(p[i : i + 1], q[i : i + 1], [params[i]], [[]], [numbers(6)[i]])[0]) for i in range(6)]
    assert together == alone
    tokens, logps = propose(q, params, [[]] * 6, [u for u, _, _ in numbers(6)])
    kept = accepts(p, params, [[]] * 6, tokens, logps, [u for _, u, _ in numbers(6)])
    other = replacement(p, q, params, [[]] * 6, [u for _, _, u in numbers(6)])
    assert torch.where(kept, tokens, other).tolist() == together


# The engine


class Bench:
    """Tiny models of one architecture; the same request with any number of tokens drafted ahead."""

    def __init__(self, architecture="llama", seeds=(1, 2, 3), tokenizer=None, near=None, **settings):
        self.base, tuned, untuned = (
            tiny_reader(name, architecture, seed, tokenizer, **settings)
            for name, seed in zip(("base", "tuned", "untuned"), seeds, strict=True)
        )
        if near is not None:  # guides that agree with the base more often than random ones
            for reader, amount in ((tuned, near), (untuned, 2 * near)):
                for mine, theirs in zip(reader.model.network.parameters(), self.base.model.network.parameters(), strict=True):
                    mine.data.mul_(amount).add_((1 - amount) * theirs.data)
        self.values = {"implicit": ImplicitValue(tuned, untuned), "explicit": tiny_value("vocabulary", architecture, 5, tokenizer)}
        self.engine = TransformersEngine(self.base)
        self.searcher = Searcher(self.engine)
        self.readers = [self.base, tuned, untuned, self.values["explicit"].model]

    def requests(self, prompts, s, sampling, seed=5, **settings):
        return [Request(Prompt(p), s.search(self.values), sampling, seed, **settings) for p in prompts]

    def run(self, requests, ahead=None):
        self.engine.speculation.ahead = ahead
        self.engine.speculation.reset()
        done = dict(self.searcher.run(requests))
        assert [r.model.live_rows for r in self.readers] == [0] * len(self.readers)
        return [done[i] for i in range(len(done))]


@pytest.fixture(scope="module")
def llama():
    return Bench(near=0.2)


PROMPTS = ["The movie was", "I", "What a long prompt this one is", "Two"]
SHAPES = {
    "eft": strategy("eft", draft=8, beta=1),
    "eft, beta 0.5": strategy("eft", draft=8, beta=0.5),
    "ivg, L 3": strategy("ivg", draft=8, width=2, successors=2, chunk_length=3),
    "ivg, L 5": strategy("ivg", draft=8, width=2, successors=2, chunk_length=5, beta=1.5),
    "ivg, L 20": strategy("ivg", draft=8, width=2, successors=2, chunk_length=20),
    "implicit twice": strategy("cbs-implicit", draft=8, token="implicit", width=2, successors=2, chunk_length=4),
}


def same_tokens(bench, s, sampling, ahead, prompts=PROMPTS, **settings):
    """Completions without drafts ahead, after seeing that any number of them gives the same; and the counts of each run."""
    requests = bench.requests(prompts, s, sampling, **settings)
    expected, stats = bench.run(requests, 0), [bench.engine.speculation.stats()]
    assert (stats[0]["drafted"], stats[0]["passes_per_token"]) == (0, 1)
    for n in ahead:
        got = bench.run(requests, n)
        stats.append(bench.engine.speculation.stats())
        for mine, theirs in zip(got, expected, strict=True):
            assert (mine.token_ids, mine.text, mine.finish_reason) == (theirs.token_ids, theirs.text, theirs.finish_reason), n
            assert (mine.score or 0) == pytest.approx(theirs.score or 0, abs=2e-4)
            assert mine.guide_shift == pytest.approx(theirs.guide_shift, abs=2e-4)
        assert stats[-1]["tokens"] == stats[0]["tokens"]
        assert stats[-1]["acceptance"] == stats[0]["acceptance"]  # of the same proposals
    return expected, stats


@pytest.mark.parametrize("s", SHAPES.values(), ids=SHAPES.keys())
def test_the_number_drafted_changes_no_token(llama, s):
    _, stats = same_tokens(llama, s, SamplingParams(max_new_tokens=24), (1, 2, 3, 5, None))
    assert 0.2 < stats[0]["acceptance"] < 0.95, "a pair that always or never agrees tests little"
    passes = [c["passes_per_token"] for c in stats[:4]]
    assert passes == sorted(passes, reverse=True)
    assert passes[3] < 0.8


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "llama"])
def test_every_architecture_can_be_taken_back(architecture):
    bench = Bench(architecture, near=0.2)
    for name in ("eft", "ivg, L 5"):
        same_tokens(bench, SHAPES[name], SamplingParams(max_new_tokens=16), (1, 4), PROMPTS[:2])
