"""Rewards at equal KL and equal compute, and the lower bound of the KL, against numbers worked out by hand."""

import math

import numpy as np
import pytest

from ivg.evaluation.base_samples import SampleGroup
from ivg.evaluation.curves import best_of_n_curve, is_another_point, starts_at_base
from ivg.evaluation.kl import kl_from_rewards
from ivg.evaluation.methods import MethodRow, method_rows
from ivg.evaluation.sweeps import (
    SCALES,
    Curve,
    difference_at,
    equal_compute,
    equal_kl,
    interpolate,
    mean_difference,
    resampled_means,
    resamples,
    reward_at,
)
from ivg.search.methods import get_method
from ivg.settings.recipe import Recipe

ROOT, LOG = SCALES["kl"], SCALES["flops"]
NAN = math.nan


def at(x, y, budget, scale):
    (value,), (inside,) = interpolate(np.array([x], float), np.array([y], float), budget, scale)
    return float(value), bool(inside)


def test_linear_in_the_root_of_kl():
    x, y = [1, 4, 9], [0, 1, 4]
    assert at(x, y, 6.25, ROOT) == (pytest.approx(2.5), True)  # √6.25 lies in the middle of √4 and √9
    assert at(x, y, 4, ROOT) == (1, True)
    assert at([9, 1, 4], [4, 0, 1], 6.25, ROOT) == (pytest.approx(2.5), True)  # in any order
    assert at([0, 4], [1, 3], 1, ROOT) == (pytest.approx(2), True)  # from the base on


def test_linear_in_the_logarithm_of_flops():
    assert at([1, 4, 64], [0, 1, 5], 2, LOG) == (pytest.approx(0.5), True)
    assert at([1, 4, 64], [0, 1, 5], 16, LOG) == (pytest.approx(3.0), True)


@pytest.mark.parametrize(("budget", "value", "inside"), [(0.5, 0, False), (1, 0, True), (9, 4, True), (9.1, 4, False)])
def test_nothing_is_extrapolated(budget, value, inside):
    assert at([1, 4, 9], [0, 1, 4], budget, ROOT) == (value, inside)


def test_points_of_equal_kl_and_single_points():
    assert at([4, 4], [1, 3], 4, ROOT)[1]
    assert at([4], [1], 4, ROOT) == (1, True)
    assert at([4], [1], 5, ROOT) == (1, False)
    assert at([-0.1, 4], [0, 2], 1, ROOT) == (pytest.approx(1), True)  # an estimate of a KL may be below 0


def test_the_interval_interpolates_in_each_resample():
    """Two prompts: drawn twice the first (1/4 of the resamples), twice the second (1/4), or both."""
    x, y = np.array([[1.0, 1.0], [4.0, 4.0]]), np.array([[0.0, 2.0], [2.0, 4.0]])
    found = reward_at(x, y, 2.25, ROOT, resamples(2))
    assert found == {"mean": 2.0, "low": 1.0, "high": 3.0, "outside": 0.0}


def test_resamples_that_do_not_reach_the_budget_give_the_nearest_point():
    x, y = np.array([[1.0, 3.0], [4.0, 10.0]]), np.array([[5.0, 5.0], [9.0, 9.0]])
    found = reward_at(x, y, 2.5, ROOT, resamples(2, rounds=4000))
    assert found["outside"] == pytest.approx(0.25, abs=0.03)  # the second prompt twice: from 3 on
    assert found["low"] == 5.0
    assert reward_at(x, y, 1.9, ROOT, resamples(2)) is None  # the mean of the first point is 2
    assert reward_at(x, y, 7.1, ROOT, resamples(2)) is None


def test_a_prompt_without_answer_is_left_out_of_that_point():
    values = np.array([[1.0, NAN, 3.0], [2.0, 4.0, 6.0]])
    assert resampled_means(values, np.array([[1.0, 1, 1], [0, 3, 0], [2, 1, 0]])).tolist()[::2] == [[2.0, 4.0], [1.0, 8 / 3]]
    assert np.isnan(resampled_means(values, np.array([[0.0, 3, 0]]))[0, 0])


def test_differences_on_the_same_prompts():
    """Means 2 and 1: the difference is 1 for both prompts, though the rewards differ between them; the third has no answer of one."""
    counts = resamples(3)
    found = mean_difference(np.array([[1.0, 3.0, 5.0]]), np.array([[0.0, 2.0, NAN]]), counts)
    assert found == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert mean_difference(np.array([[NAN, 1.0]]), np.array([[1.0, NAN]]), resamples(2)) is None


def test_differences_at_another_method_s_kl():
    """A sweep through (1, 0) and (4, 2) against a method of KL 2.25 and reward 0.5: 1 - 0.5."""
    x, y = np.array([[1.0, 1.0], [4.0, 4.0]]), np.array([[0.0, 0.0], [2.0, 2.0]])
    other = (np.array([[2.25, 2.25]]), np.array([[0.5, 0.5]]))
    assert difference_at(x, y, other, ROOT, resamples(2)) == {"mean": 0.5, "low": 0.5, "high": 0.5, "outside": 0.0}
    # KLs of 1 and 3.5: in a resample of one prompt alone the budget is that prompt's, so at most 2 (√3.5 - 1) - 0.5
    found = difference_at(x, y, (np.array([[1.0, 3.5]]), other[1]), ROOT, resamples(2))
    assert (found["mean"], found["low"]) == (0.5, -0.5)
    assert found["high"] == pytest.approx(2 * (math.sqrt(3.5) - 1) - 0.5, abs=1e-6)
    assert difference_at(x, y, (np.array([[5.0, 5.0]]), other[1]), ROOT, resamples(2)) is None


def curve(kl, flops, gold, **more):
    def spread(values):
        return np.array([[v, v] for v in values], float)

    return Curve(tuple(map(str, gold)), None if kl is None else spread(kl), False, spread(flops), {"gold": spread(gold)}, **more)


def test_tables_have_the_budgets_that_some_sweep_covers():
    curves = {
        "a": curve([0, 4], [1, 2], [0, 2]),
        "b": curve([4, 25], [8, 8.1], [1, 4]),
        "unknown": curve(None, [1, 4], [0, 4]),
        "guided": curve([0, 4], [1, 3], [0, 2], first_by_cost=1),
    }
    kl = equal_kl({k: v for k, v in curves.items() if k != "guided"})
    assert [b["name"] or b["kl"] for b in kl["budgets"]] == ["best-of-4", "best-of-16", "best-of-64", 5.0, 10.0, 20.0]
    assert kl["budgets"][0]["kl"] == pytest.approx(math.log(4) - 3 / 4, abs=1e-6)
    assert kl["left_out"] == ["unknown"]
    gold = kl["rewards"]["gold"]
    assert gold["a"][0]["mean"] == pytest.approx(math.sqrt(math.log(4) - 3 / 4), abs=1e-5)
    assert gold["a"][3:] == [None] * 3
    assert gold["b"][:3] == [None] * 3
    assert gold["b"][4]["mean"] == pytest.approx(1 + 3 * (math.sqrt(10) - 2) / 3, abs=1e-5)
    compute = equal_compute(curves, base=1.0)
    assert [b["name"] for b in compute["budgets"]] == ["1× base", "2× base", "4× base"]
    assert compute["left_out"] == ["b", "guided"]  # their points cost the same; without the base, which is no point by its cost
    assert [c and c["mean"] for c in compute["rewards"]["gold"]["unknown"]] == [0.0, 2.0, 4.0]
    assert equal_kl({}) == {"budgets": [], "rewards": {}, "left_out": []}


def test_best_of_n_of_base_samples_is_a_sweep():
    flops = (10.0, 20.0, 30.0)
    groups = [
        SampleGroup("a", 0, (1.0, 2.0, 0.0), (0.5, 3.0, None), (1, 1, 1), flops, {"other": (1.0, 0.0, None)}),
        SampleGroup("a", 1, (1.0, 0.0, 5.0), (1.5, None, 7.0), (1, 1, 1), flops, {"other": (2.0, None, 4.0)}),
    ]
    found = best_of_n_curve(groups, ["a", "b"], ["gold", "other"])
    assert found.labels == ("N=1", "N=2", "N=3")
    assert found.rewards["gold"][:, 0].tolist() == [1.0, 2.25, 5.0]  # means over the two seeds
    assert found.rewards["other"][:, 0].tolist() == [1.5, 1.0, 2.0]  # of the samples that the value selects
    assert np.isnan(found.rewards["gold"][:, 1]).all()  # no samples of b
    assert found.kl[:, 0] == pytest.approx([0.0, math.log(2) - 1 / 2, math.log(3) - 2 / 3])
    assert found.flops[:, 0].tolist() == [10.0, 20.0, 30.0]
    assert found.bound


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"method": "eft", "beta": [0.5, 1]}, True),
        ({"method": "genarm", "beta": [0.5, 1]}, True),
        ({"method": "args", "beta": [0.5, 1]}, False),  # only the likeliest ten tokens, for any beta
        ({"method": "eft", "gate": [1, 2]}, False),
        ({"method": "cbs-explicit", "width": [1, 2], "successors": [2, 2]}, True),
        ({"method": "cbs-explicit", "chunk_length": [1, 2]}, False),
        ({"method": "cbs-explicit", "width": [1, 2], "chunk_length": [5, 5]}, True),  # equal numbers are no difference
        ({"method": "bon", "successors": [2, 4]}, True),
        ({"method": "ivg", "beta": [0.5, 1]}, False),  # without guidance it still selects
        ({"method": "ivg", "successors": [2, 4]}, False),  # without selection it still guides
        ({"method": "smc", "width": [2, 4]}, False),
    ],
)
def test_when_the_base_is_a_point_of_a_sweep(method, expected):
    recipe = Recipe.parse({"eval": {"methods": [method]}, "values": {"arm": {"arm": "embedded:tuned"}}})
    assert starts_at_base([m for m in method_rows(recipe, {}) if m.sweep]) is expected


def test_rows_of_no_sweep_have_no_point():
    assert not starts_at_base([MethodRow("eft", get_method("eft"))])


def test_rows_with_the_settings_of_a_sweep_are_points_of_it():
    methods = [
        "combinations",
        "cd-blockwise",
        {"label": "weak", "method": "eft", "gate": 2.0},
        {"method": "eft", "beta": [0.5, 2]},
        {"method": "cbs-explicit", "width": [1, 2], "successors": [2, 4], "chunk_length": [5, 5]},
        {"label": "long", "method": "cbs-explicit", "width": [1, 2], "chunk_length": 9},
    ]
    rows = method_rows(Recipe.parse({"eval": {"methods": methods}}), {})

    def others(sweep):
        points = [m for m in rows if m.sweep == sweep]
        return [m.label for m in rows if is_another_point(m, points)]

    assert others("eft") == ["implicit×none"]  # beta = 1
    assert others("cbs-explicit") == ["none×explicit"]  # W = K = 4; cd-blockwise is W = 1, K = 16, another method
    assert others("long") == []


# The lower bound of the KL


def test_a_lower_bound_by_hand():
    """All answers of the method above every base answer: log of (number of base answers of half the prompts, plus one)."""
    rewards, base = {"a": [5.0, 6.0], "b": [7.0, 8.0]}, {"a": [0.0, 1.0], "b": [1.0, 0.0]}
    assert kl_from_rewards(rewards, base) == pytest.approx(math.log(3))
    assert kl_from_rewards(base, base) == 0.0
    assert kl_from_rewards(base, rewards) == 0.0  # lower rewards say nothing here
    assert kl_from_rewards({"a": [1.0]}, {"a": [0.0]}) == 0.0  # one prompt has no other half


@pytest.mark.parametrize(("shift", "count"), [(0.0, 100), (0.5, 100), (1.5, 100), (1.5, 1000)])
def test_the_lower_bound_is_below_the_kl_of_two_normals(shift, count):
    """KL of N(shift, 1) from N(0, 1) is shift² / 2; the estimate of a bound stays below it, and within a factor of two for many answers."""
    rng = np.random.default_rng(0)

    def sample(mean):
        return {i: [float(v)] for i, v in enumerate(rng.normal(mean, 1, count))}

    found = [kl_from_rewards(sample(shift), sample(0)) for _ in range(20)]
    assert np.mean(found) <= shift**2 / 2 + 0.02
    if count == 1000:
        assert np.mean(found) >= shift**2 / 4
