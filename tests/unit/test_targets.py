"""Value targets against numbers worked out by hand."""

import math

import pytest
import torch

from ivg.errors import ConfigError
from ivg.settings.train import ValueSettings
from ivg.training import targets
from ivg.training.value import part_metrics

MASK = torch.tensor([[0.0, 1, 1, 1, 0], [0, 0, 1, 1, 1]])
REWARDS = torch.tensor([2.0, -1.0])


def test_fudge_is_the_reward_at_every_response_token():
    assert targets.fudge(REWARDS, MASK).tolist() == [[0, 2, 2, 2, 0], [0, 0, -1, -1, -1]]


def test_td_lambda_by_hand():
    values = torch.tensor([[9.0, 0, 1, 4, 9], [9.0, 9, 0, 0, 3]])
    found = targets.td_lambda(values, REWARDS, MASK, lam=0.5)
    # row 0: last 2; then ½·4 + ½·2 = 3; then ½·1 + ½·3 = 2.   row 1: last -1; then ½·3 - ½ = 1; then ½·0 + ½·1 = ½
    assert found.tolist() == [[0, 2, 3, 2, 0], [0, 0, 0.5, 1, -1]]


def test_td_of_lambda_one_is_fudge_and_of_zero_is_the_next_value():
    values = torch.randn(2, 5)
    assert torch.allclose(targets.td_lambda(values, REWARDS, MASK, 1.0), targets.fudge(REWARDS, MASK))
    zero = targets.td_lambda(values, REWARDS, MASK, 0.0)
    assert zero[0].tolist() == pytest.approx([0, values[0, 2].item(), values[0, 3].item(), 2, 0])


def test_targets_are_constants():
    values = torch.randn(2, 5, requires_grad=True)
    assert not targets.td_lambda(values, REWARDS, MASK, 0.5).requires_grad
    assert not targets.cd_q(values, REWARDS, MASK).requires_grad


def test_cd_q_averages_over_the_policy_and_ends_in_the_reward():
    next_values = torch.tensor([[1.0, 3.0], [0.0, 8.0]])
    logps = torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log()
    assert targets.expected(next_values, logps).tolist() == pytest.approx([2, 2])
    expected = torch.tensor([[9.0, 5, 6, 7, 9], [9.0, 9, 1, 2, 3]])
    assert targets.cd_q(expected, REWARDS, MASK).tolist() == [[0, 5, 6, 2, 0], [0, 0, 1, 2, -1]]


def test_losses_by_hand():
    values = torch.tensor([[5.0, 1, 2, 3, 5], [5.0, 5, 0, 0, 0]])
    wanted = targets.fudge(REWARDS, MASK)
    assert float(targets.squared_error(values, wanted, MASK)) == pytest.approx(0.5 * (1 + 0 + 1 + 1 + 1 + 1) / 6)
    outcomes = torch.tensor([1.0, 0.0])
    ones = -(math.log(1 / (1 + math.exp(-1))) + math.log(1 / (1 + math.exp(-2))) + math.log(1 / (1 + math.exp(-3))))
    assert float(targets.cross_entropy(values, outcomes, MASK)) == pytest.approx((ones + 3 * math.log(2)) / 6, rel=1e-5)


def test_positions_after_parts_of_the_response():
    assert targets.positions_at(MASK, 0.25).tolist() == [1, 2]
    assert targets.positions_at(MASK, 0.5).tolist() == [2, 3]
    assert targets.positions_at(MASK, 1.0).tolist() == [3, 4]


def test_part_metrics_by_hand():
    parts = torch.tensor([[0.0, 0, 0, 2.0], [0.0, 1, 0, 1.0], [5.0, 5, 5, 0.0]])
    found = part_metrics(parts, torch.tensor([2.0, 1.0, 0.0]), torch.tensor([0, 0, 1]))
    assert found["pair_accuracy_25"] == 0.5  # a tie
    assert found["pair_accuracy_50"] == 0.0
    assert found["pair_accuracy_100"] == 1.0
    assert found["rmse_100"] == 0.0
    assert found["rmse_25"] == pytest.approx(math.sqrt((4 + 1 + 25) / 3))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target": "sarsa"}, "target must be fudge, td, cd-q or binary, got 'sarsa'"),
        ({"head": "two"}, "vocabulary or scalar"),
        ({"lam": 1.5}, "lambda must be in"),
        ({"scale": math.nan}, "scale must be a finite number, got nan"),
        ({"target": "cd-q"}, "a base model"),
        ({"target": "cd-q", "head": "scalar", "base": "x"}, "head=vocabulary"),
    ],
)
def test_settings_that_do_not_go_together(settings, words):
    with pytest.raises(ConfigError, match=words):
        ValueSettings(**settings)
