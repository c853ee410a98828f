"""Speculative guidance is exact: the distribution is the guided one, and how far ahead is drafted changes no token."""

from functools import cache

import pytest
import torch

from ivg.draws import uniform
from ivg.engine.coupling import accepts, coupled, propose, replacement
from ivg.engine.sampling import filtered
from ivg.types import SamplingParams


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
