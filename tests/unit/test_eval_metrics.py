"""Figures of merit, held against numbers worked out by hand or by enumeration."""

import itertools
import math

import numpy as np
import pytest

from ivg.diagnostics.cost import active_parameters, flops
from ivg.evaluation import kl, metrics, tables
from ivg.evaluation.base_samples import SampleGroup, prefix_maxima, sample_group
from ivg.evaluation.label_placement import best_place, overlap
from ivg.evaluation.summary import best_of_n_within, family
from ivg.search.methods import get_method
from ivg.testing import tiny_model, tiny_value
from ivg.types import SamplingParams


def test_seeds_are_averaged_first():
    assert metrics.mean_by_key([("a", 1.0), ("b", 5.0), ("a", 3.0)]) == {"a": 2.0, "b": 5.0}


def test_ties_are_half_a_win():
    assert [metrics.win(*pair) for pair in ((1, 0), (0, 1), (1, 1))] == [1.0, 0.0, 0.5]
    assert metrics.win(1.0, 1.000001, same=True) == 0.5


def test_perplexity_by_hand():
    """Three tokens of probability 1/2 each, in two answers: 2."""
    assert metrics.perplexity([-2 * math.log(2), -math.log(2)], [2, 1]) == pytest.approx(2.0)
    assert math.isnan(metrics.perplexity([], []))


def test_distinct_by_hand():
    texts = ["the cat the cat", "The cat"]
    assert metrics.distinct(texts, 1) == pytest.approx(2 / 6)
    assert metrics.distinct(texts, 2) == pytest.approx(2 / 4)
    assert metrics.distinct([""], 2) == 0.0


def test_repetition_by_hand():
    """1 2 3 4 1 2 3 4: five 4-grams, the last repeats the first."""
    assert metrics.repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert metrics.repetition([1, 2, 3]) == 0.0


def test_pareto_front():
    assert metrics.pareto([(0, 3), (1, 2), (0.5, 1), (2, 0), (1, 2.0)]) == [0, 1, 3]


# Divergence


def test_bounds_by_hand():
    assert kl.selection_bound([1], best_of_chunks=True) == 0.0
    assert kl.selection_bound([16], best_of_chunks=True) == pytest.approx(math.log(16) - 15 / 16)
    assert kl.selection_bound([16, 4, 4], best_of_chunks=False) == pytest.approx(math.log(16 * 4 * 4))
    assert kl.selection_bound([4, 4], best_of_chunks=True) == pytest.approx(2 * (math.log(4) - 3 / 4))
    assert kl.selection_bound([4], best_of_chunks=True, soft=True) == pytest.approx(math.log(4))
    assert kl.selection_bound([16], best_of_chunks=False) == pytest.approx(math.log(16))  # an answer that ended early among several beams
    assert kl.selection_bound([], best_of_chunks=False) == 0.0


def test_chunks():
    assert [kl.num_chunks(n, 5) for n in (0, 1, 5, 6)] == [0, 1, 1, 2]
    assert kl.num_chunks(50, None) == 1


def test_draws_of_methods():
    assert kl.draws_per_chunk(get_method("ivg"), 12, 50) == [16, 4, 4]
    assert kl.draws_per_chunk(get_method("bon"), 50, 50) == [16]
    assert kl.draws_per_chunk(get_method("cards"), 50, 50) is None
    adaptive = kl.draws_per_chunk(get_method("adaptive"), 50, 50)
    assert len(adaptive) == 10
    assert adaptive[0] > 16
    assert sorted(adaptive, reverse=True) == adaptive


def test_chunks_that_end_at_a_text():
    """A chunk ends with a step, or after L tokens: at most one more than the steps that ended, and those of L tokens."""
    steps = "One.\nTwo.\n\nThree"
    assert kl.draws_per_chunk(get_method("prm"), 12, 50, steps) == [16, 4, 4]
    assert kl.draws_per_chunk(get_method("prm", chunk_length=5), 12, 50, steps) == [16, 4, 4, 4, 4]
    assert kl.draws_per_chunk(get_method("prm"), 0, 50, "") == []
    assert kl.draws_per_chunk(get_method("prm", decay=0.5), 12, 50, steps) is None
    row = {"id": "a", "token_ids": [1] * 12, "text": steps, "shift": 0.0}
    found, _ = kl.kl_to_base(get_method("prm"), SamplingParams(max_new_tokens=50), [row])
    assert found["mean"] == pytest.approx(math.log(16 * 4 * 4), abs=1e-6)  # not the bound of the best of 16
    found, _ = kl.kl_to_base(get_method("prm", width=1, successors=3), SamplingParams(max_new_tokens=50), [row])
    assert found["mean"] == pytest.approx(3 * (math.log(3) - 2 / 3), abs=1e-6)


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


@pytest.mark.parametrize("width", [1, 2])
def test_the_bound_holds_by_enumeration(width):
    """CBS(W, 2, 1) over two letters, two chunks, every possible draw enumerated: KL of what comes out is below the bound."""
    letters, likely, count = (0, 1), (0.7, 0.3), 2
    score = {(0,): 0.1, (1,): 0.5, (0, 0): 0.0, (0, 1): 2.0, (1, 0): 1.0, (1, 1): 1.5}
    texts = list(itertools.product(letters, repeat=2))
    out = dict.fromkeys(texts, 0.0)
    for first in itertools.product(letters, repeat=width * count):
        kept = sorted({(a,) for a in first}, key=lambda y: -score[y])[:width]
        weight = math.prod(likely[a] for a in first)
        for second in itertools.product(letters, repeat=count * len(kept)):
            pool = [kept[i // count] + (b,) for i, b in enumerate(second)]
            out[max(pool, key=score.get)] += weight * math.prod(likely[b] for b in second)
    base = [likely[a] * likely[b] for a, b in texts]
    found = divergence([out[y] for y in texts], base)
    bound = kl.selection_bound([width * count, count], best_of_chunks=width == 1)
    assert sum(out.values()) == pytest.approx(1.0)
    assert 0.0 < found <= bound


def test_families():
    expected = {"base": "base", "eft": "token", "bon": "select", "ivg": "both", "smc": "other", "cards": "other", "soft-bon": "select"}
    assert {name: family(get_method(name)) for name in expected} == expected


# Cost


def test_flops_by_hand():
    assert flops({"base": 10, "tuned": 5, "function": 100}, {"base": 100, "tuned": 10}) == 2 * (1000 + 50)


def test_parameters_that_are_multiplied():
    network = tiny_model("llama")
    whole = sum(p.numel() for p in network.parameters())
    assert active_parameters(network) == whole - 257 * 32  # the input embedding is looked up
    tied = tiny_model("gpt2")  # its table is the output layer as well; positions are looked up, and too few to matter
    assert active_parameters(tied) == sum(p.numel() for p in tied.parameters())
    value = tiny_value("vocabulary").network
    assert active_parameters(value) == sum(p.numel() for p in value.parameters()) - 257 * 32


def test_packed_weights_are_counted_as_they_were():
    """bitsandbytes keeps two 4-bit weights in a byte, and may call eight bytes one number."""
    import torch

    from ivg.diagnostics.cost import num_weights

    class Params4bit(torch.nn.Parameter):
        bnb_quantized = True

    assert num_weights(Params4bit(torch.zeros(50, 1, dtype=torch.uint8), requires_grad=False)) == 100
    assert num_weights(Params4bit(torch.zeros(25, 1, dtype=torch.bfloat16), requires_grad=False)) == 100
    assert num_weights(torch.nn.Parameter(torch.zeros(10, 10))) == 100


def test_of_experts_the_active_count():
    network = tiny_model("mixtral")
    experts = sum(p.numel() for n, p in network.named_parameters() if "experts" in n)
    rest = sum(p.numel() for n, p in network.named_parameters() if "experts" not in n and "embed_tokens" not in n)
    assert active_parameters(network) == rest + experts * 2 / 4


# Best-of-N at equal compute


ROW = {
    "id": "a",
    "seed": 0,
    "shared_tokens": {"base": 10, "explicit": 10},
    "samples": [{"value": v, "tokens": 5, "forward_tokens": {"base": 4, "explicit": 5}} for v in (1.0, 0.5, 2.0, 2.0)],
}
SIZES = {"base": 10, "explicit": 1}


def test_a_group_by_hand():
    g = sample_group(ROW, {0: -1.0, 2: 3.0}, SIZES)
    assert g.flops == (2 * 10 * 14, 220 + 180, 220 + 270, 220 + 360)  # one sample needs no value
    assert [g.best(n) for n in (1, 2, 3, 4)] == [0, 0, 2, 2]
    assert g.golds == (-1.0, None, 3.0, None)
    read = sample_group(ROW, {}, SIZES, prompt_tokens=7)  # three tokens of the prompt were another's in the same batch
    assert read.flops == (2 * 10 * 11, 160 + 180, 160 + 270, 160 + 360)


def test_only_prefix_maxima_are_ever_selected():
    values = np.random.default_rng(0).normal(size=40).round(1).tolist()
    g = SampleGroup("a", 0, tuple(values), (), (), ())
    assert {g.best(n) for n in range(1, 41)} == set(prefix_maxima(values))


def test_best_of_n_costs_no_more():
    curve = [{"n": n, "gold": None, "flops": 100.0 * n} for n in (1, 2, 3)]
    assert [best_of_n_within(b, curve)["n"] for b in (50, 100, 299, 300, 399, 400)] == [1, 1, 2, 3, 3, 3]
    assert [best_of_n_within(b, curve)["capped"] for b in (300, 399, 400)] == [False, False, True]
    assert [best_of_n_within(b, curve)["over_budget"] for b in (50, 98, 100, 400)] == [True, False, False, False]
    gold = {"gold": {"mean": 1.0}}
    assert tables.best_of_n(best_of_n_within(50, curve) | gold) == "+1.00 (N = 1, costs more)"
    assert tables.best_of_n(best_of_n_within(100, curve) | gold) == "+1.00 (N = 1)"


def test_a_divergence_of_nothing_has_no_sign():
    assert tables.divergence({"mean": -0.01, "low": -0.04, "high": 0.0, "bound": False}) == "0.0 (0.0 … 0.0)"
    assert tables.divergence({"mean": -0.26, "low": -1.04, "high": 0.2, "bound": False}) == "-0.3 (-1.0 … 0.2)"


# Names of points


def test_names_do_not_hide_each_other():
    taken = [(0.0, 0.0, 10.0, 10.0)]
    for _ in range(6):
        left, bottom, _far = best_place(5, 5, 40, 10, taken, (-200, -200, 200, 200))
        box = (left, bottom, left + 40, bottom + 10)
        assert not any(overlap(box, other) for other in taken)
        taken.append(box)
