"""The engine gives the tokens of the naive implementation; batches, chunks and caches change nothing."""

import pytest
import torch

import naive
import naive_methods
from ivg.engines.transformers.engine import TransformersEngine
from ivg.search.methods import METHODS, get_method
from ivg.search.searcher import Request, Search, Searcher
from ivg.testing import ARCHITECTURES, byte_tokenizer, tiny_lm, tiny_model, tiny_value
from ivg.types import Prompt, SamplingParams
from ivg.values.base import CompositeValue, combine_values
from ivg.values.implicit import AutoregressiveReward, ImplicitValue

pytestmark = pytest.mark.numerics

PROMPTS = ["The movie was", "I", "What a long prompt this one is", "Two", "It is", "He said: ", "never", "abc abc"]


class Bench:
    """The same tiny models for the engine and for the naive implementation."""

    def __init__(self, architecture):
        self.base = tiny_lm("base", architecture, seed=1)
        pair = tiny_lm("tuned", architecture, seed=2), tiny_lm("untuned", architecture, seed=3)
        arm, q, v = (
            tiny_lm("arm", architecture, seed=4),
            tiny_value("vocabulary", architecture, 5),
            tiny_value("scalar", architecture, 6),
        )
        contrast = ImplicitValue(*pair, "contrast")
        self.values = {"implicit": ImplicitValue(*pair), "contrast": contrast, "explicit": q, "scalar": v, "arm": AutoregressiveReward(arm)}
        self.naive = {
            "implicit": naive.Implicit(*(r.network for r in pair)),
            "contrast": naive.Implicit(*(r.network for r in pair)),
            "explicit": naive.QHead(q.network),
            "scalar": naive.VHead(v.network),
            "arm": naive.LogProb(arm.network),
        }
        self.searcher = Searcher(TransformersEngine(self.base))
        self.readers = [self.base, *pair, arm, q.model, v.model]

    def generate(self, prompts, s, sampling, seed=5):
        requests = [Request(Prompt(p), s.search(self.values, combine_values), sampling, seed) for p in prompts]
        done = dict(self.searcher.run(requests))
        return [done[i] for i in range(len(prompts))]

    def reference(self, prompt, s, sampling, seed=5):
        ids = self.base.tokenizer(prompt).input_ids
        rules = {"reject": naive_methods.cards, "particles": naive_methods.smc, "speculate": naive_methods.speculate}
        rules |= {"tree": naive_methods.tree}
        method = rules.get(s.rule, naive.search)
        return method(self.base.network, self.naive, s, ids, seed, sampling.temperature, sampling.max_new_tokens)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def bench(request):
    return Bench(request.param)


@pytest.fixture(scope="module")
def llama():
    return Bench("llama")


def small(name):
    s = METHODS[name]
    sizes = {"width": 2, "successors": 2, "chunk_length": 3} if s.chunk_length and s.width > 1 else {}
    sizes |= {"successors": 3} if s.width == 1 and s.successors > 1 else {}
    sizes |= {"candidates": 4} if s.candidates else {}
    sizes |= {"segment_min": 2, "segment_entropy": 4.2, "tries": 4} if s.rule == "reject" else {}
    sizes |= {"gate": 4.2} if s.gate else {}
    sizes |= {"chunk_length": 3} if s.rule == "speculate" else {}
    return s.with_settings(**sizes)


FREE = {
    "scalar token, scalar select": {"token": "scalar", "select": "scalar", "candidates": 3},
    "explicit token, implicit select": {"token": "explicit", "select": "implicit"},
    "implicit twice": {"token": "implicit", "select": "implicit", "beta": 0.5},
    "explicit twice": {"token": "explicit", "select": "explicit"},
    "explicit over candidates, and select": {"token": "explicit", "select": "explicit", "candidates": 3},
    "original": {"token": "implicit", "select": "explicit", "original": True},
    "drafted": {"token": "implicit", "select": "explicit", "draft": 3},
    "drafted, beta 0.4": {"token": "implicit", "select": "implicit", "beta": 0.4, "draft": 8},
}


@pytest.mark.parametrize("name", [name for name, m in METHODS.items() if "reward" not in m.needs])  # test_process_rewards.py has those
def test_strategy_equals_naive(bench, name):
    s, sampling = small(name), SamplingParams(temperature=1.3, max_new_tokens=8)
    prompts = (
        PROMPTS[:2] if s.rule not in ("reject", "speculate") else PROMPTS[2:4]
    )  # a vocabulary head has no value of a prompt of one token
    for prompt, got in zip(prompts, bench.generate(prompts, s, sampling), strict=True):
        tokens, score = bench.reference(prompt, s, sampling)
        assert list(got.token_ids) == tokens
        if s.selectors:
            assert got.score == pytest.approx(score, abs=2e-4)
    assert all(r.model.live_rows == 0 for r in bench.readers)


@pytest.mark.parametrize("settings", FREE.values(), ids=FREE.keys())
@pytest.mark.parametrize("length,limit", [(3, 9), (18, 22)], ids=["short chunks", "chunks longer than a round"])
def test_free_combinations_equal_naive(llama, settings, length, limit):
    s = get_method("custom", width=2, successors=2, chunk_length=length, **settings)
    sampling = SamplingParams(temperature=1.0, max_new_tokens=limit)
    for seed in (1, 2):
        (got,) = llama.generate(PROMPTS[:1], s, sampling, seed)
        assert list(got.token_ids) == llama.reference(PROMPTS[0], s, sampling, seed)[0]
    assert all(r.model.live_rows == 0 for r in llama.readers)


SEGMENTS = {"rule": "reject", "chunk_length": 64, "tries": 3, "segment_min": 2}
FILTER = {"rule": "particles", "width": 4, "chunk_length": 3}
DRAFTS = {"rule": "speculate", "chunk_length": 4, "select": "explicit", "accept_threshold": 2.0, "acceptance": "sigmoid"}
GSI = {**DRAFTS, "tilt": True, "successors": 3, "soft_scale": 0.1}
TREE = {"rule": "tree", "width": 3, "successors": 2, "chunk_length": 3, "select": "explicit"}
NEIGHBOURS = {
    "rsd, the drafter judges itself": {**DRAFTS, "select": "implicit", "accept_threshold": 10.0, "acceptance": "threshold"},
    "rsd, clipped": {**DRAFTS, "select": "scalar", "acceptance": "clip", "accept_scale": 3.0, "accept_threshold": -1.0},
    "rsd, several": {**DRAFTS, "successors": 3, "soft_scale": 0.4},
    "rsd, chunks longer than a round": {**DRAFTS, "chunk_length": 20},
    "rsd, whole responses": {**DRAFTS, "chunk_length": None},
    "gsi, one draft": {**GSI, "successors": 1, "soft_scale": 0.5, "accept_threshold": -6.0, "acceptance": "threshold"},
    "gsi, several": GSI,
    "gsi, the drafter judges itself": {**GSI, "select": "implicit", "accept_threshold": 30.0, "soft_scale": 0.3},
    "gsi, chunks longer than a round": {**GSI, "chunk_length": 20, "soft_scale": 0.05},
    "tree": {**TREE},
    "tree, guided": {**TREE, "token": "implicit", "select": "explicit", "exploration": 0.3},
    "tree, best first": {**TREE, "exploration": 0.0, "successors": 3},
    "tree, wide": {**TREE, "exploration": 100.0, "select": "scalar"},
    "tree, drafted": {**TREE, "token": "implicit", "draft": 3},
    "tree, chunks longer than a round": {**TREE, "chunk_length": 20, "exploration": 5.0},
    "tree, one value twice": {**TREE, "token": "implicit", "select": "implicit", "exploration": 4.0},
    "cards, guided": {**SEGMENTS, "token": "implicit", "select": "explicit", "segment_entropy": 4.3},
    "cards, one value twice": {**SEGMENTS, "token": "implicit", "select": "implicit", "segment_entropy": 4.4, "gate": 4.3},
    "cards, segments longer than a round": {**SEGMENTS, "select": "implicit", "segment_entropy": 4.55, "target": 3.0},
    "cards, scalar": {**SEGMENTS, "select": "scalar", "segment_entropy": 4.4, "threshold_start": 0.2, "accept_scale": 2.0},
    "smc, guided": {**FILTER, "token": "implicit", "select": "explicit", "particle_beta": 0.5},
    "smc, guided and drafted": {**FILTER, "token": "implicit", "select": "explicit", "particle_beta": 0.5, "draft": 4},
    "smc, guided over candidates": {**FILTER, "token": "scalar", "select": "implicit", "candidates": 5, "resample_below": 1.0},
    "smc, one value twice": {**FILTER, "token": "implicit", "select": "implicit", "beta": 0.3, "resample_below": 0.8},
    "plausible": {"token": "implicit", "plausibility": 0.3, "beta": 2.0},
    "plausible, drafted": {"token": "implicit", "select": "explicit", "plausibility": 0.3, "draft": 3, "successors": 2, "chunk_length": 4},
    "plausible, drafted, beta": {"token": "implicit", "plausibility": 0.5, "draft": 4, "beta": 0.4},
    "plausible, over candidates": {"token": "scalar", "candidates": 5, "plausibility": 0.4, "gate": 4.3},
    "plausible, log-probabilities": {"token": "arm", "normalise": True, "plausibility": 0.2},
    "only the likeliest is plausible": {"token": "explicit", "plausibility": 1.0, "beta": 5.0},
    "smc, never resampled": {**FILTER, "select": "scalar", "resample_below": 0.0},
    "smc, chunks longer than a round": {**FILTER, "chunk_length": 20, "token": "explicit", "select": "explicit", "beta": 0.1},
    "gated, twice": {"token": "implicit", "select": "implicit", "gate": 4.3, "width": 2, "successors": 2, "chunk_length": 3},
    "gated, long chunks": {"token": "explicit", "select": "implicit", "gate": 4.4, "width": 2, "successors": 2, "chunk_length": 20},
    "gated, over candidates": {"token": "scalar", "candidates": 3, "gate": 4.3},
    "drafted, whole responses": {"token": "implicit", "draft": 4},
    "drafted, adaptive": {"token": "implicit", "select": "explicit", "decay": 0.6, "width": 2, "successors": 3, "draft": 2},
    "gated so that little is left": {"token": "implicit", "gate": 4.55},
    "adaptive, guided": {"token": "implicit", "select": "explicit", "decay": 0.6, "width": 2, "successors": 3, "chunk_length": 4},
    "soft, sharper": {"select": "implicit", "rule": "soft", "soft_scale": 0.2, "successors": 4, "chunk_length": 3},
    "soft, several beams": {"select": "implicit", "rule": "soft", "width": 3, "successors": 2, "chunk_length": 3},
    "worst of three": {
        "select_weights": "implicit=1,explicit=4,scalar=2",
        "select_combine": "min",
        "select_reference": "scalar=-0.1,explicit=0.05",
        "token": "implicit",
        "width": 2,
        "successors": 3,
        "chunk_length": 4,
    },
    "budget of KL": {"token": "implicit", "select": "explicit", "kl_budget": 6.0, "width": 2, "successors": 2, "chunk_length": 4},
    "budget of KL, candidates and a gate": {"token": "scalar", "candidates": 4, "kl_budget": 4.0, "gate": 4.3},
    "budget of KL, one value twice": {"token": "implicit", "select": "implicit", "kl_budget": 3.0, "successors": 2, "chunk_length": 6},
    "adaptive, soft": {"select": "explicit", "rule": "soft", "decay": 0.6, "successors": 3, "chunk_length": 4},
}


@pytest.mark.parametrize("settings", NEIGHBOURS.values(), ids=NEIGHBOURS.keys())
def test_neighbours_equal_naive(llama, settings):
    s = get_method("custom", **settings)
    for seed, limit in ((1, 9), (2, 28)):
        (got,) = llama.generate(PROMPTS[:1], s, SamplingParams(max_new_tokens=limit), seed)
        tokens, _ = llama.reference(PROMPTS[0], s, SamplingParams(max_new_tokens=limit), seed)
        assert list(got.token_ids) == tokens
    assert all(r.model.live_rows == 0 for r in llama.readers)


@pytest.mark.parametrize("name", ["smc, guided", "smc, one value twice", "smc, never resampled"])
def test_posterior_equals_naive(llama, name):
    """Weights of all particles and log Z; what is drawn by weight is compared above."""
    s = get_method("custom", **NEIGHBOURS[name])
    (got,) = llama.generate(PROMPTS[:1], s, SamplingParams(max_new_tokens=9), 1)
    ids = llama.base.tokenizer(PROMPTS[0]).input_ids
    *_, particles, log_z = naive_methods.filter_particles(llama.base.network, llama.naive, s, ids, 1, SamplingParams().temperature, 9)
    assert got.posterior.log_z == pytest.approx(log_z, abs=2e-3)
    found = sorted((list(p.token_ids), p.weight) for p in got.posterior.particles)
    assert found == [(tokens, pytest.approx(weight, abs=2e-3)) for tokens, weight in sorted((t, w) for w, t in particles)]


def test_weighted_values_guide_and_select(llama):
    """Weights name a composite: the same tokens as one built by hand, at both levels."""
    values = {**llama.values, "mixed": CompositeValue([(0.5, llama.values["implicit"]), (-1.0, llama.values["explicit"])])}
    sampling = SamplingParams(max_new_tokens=9)
    weights = {"implicit": 0.5, "explicit": -1.0}
    by_weights = get_method("ivg", weights=weights, select_weights="implicit=0.5, explicit=-1", width=2, successors=2)
    by_hand = get_method("ivg", token="mixed", select="mixed", width=2, successors=2)
    assert by_weights.needs == {"implicit", "explicit"}
    done = [
        dict(llama.searcher.run([Request(Prompt(p), search, sampling, 3) for p in PROMPTS[:3]]))
        for search in (by_weights.search(llama.values, CompositeValue), by_hand.search(values))
    ]
    assert [done[0][i].token_ids for i in range(3)] == [done[1][i].token_ids for i in range(3)]
    assert done[0][0].token_ids != llama.generate(PROMPTS[:1], get_method("ivg", width=2, successors=2), sampling, 3)[0].token_ids


@pytest.fixture(scope="module")
def ending():
    """Models of its own, whose base ends a response about every eighth token."""
    bench = Bench("llama")
    network, ids = bench.base.network, bench.base.tokenizer(PROMPTS[1]).input_ids
    with torch.no_grad():
        hidden = network.model(torch.tensor([ids], device=network.device)).last_hidden_state[0, -1]
        network.lm_head.weight[0] = 5.5 * hidden / hidden.norm() ** 2
    return bench


@pytest.mark.parametrize("method,original", [("ivg", False), ("ivg", True), ("bon", False), ("adaptive", True)])
def test_early_ends_equal_naive(ending, method, original):
    """With a likely end-of-sequence token, finished hypotheses are kept, compete, and win or lose."""
    sizes = {"successors": 4} if method == "bon" else {"width": 2, "successors": 3, "chunk_length": 2}
    s = get_method(method, original=original, **sizes)
    sampling = SamplingParams(max_new_tokens=12)
    ends, overtaken = [], 0
    for seed in range(8):
        searcher, boards = ending.searcher, []
        searcher.add(Request(Prompt(PROMPTS[1]), s.search(ending.values), sampling, seed))
        while searcher.busy:
            boards += searcher.step()
        got = boards[-1].completion
        assert list(got.token_ids) == ending.reference(PROMPTS[1], s, sampling, seed)[0]
        assert got.finish_reason == ("stop" if got.token_ids[-1] == 0 else "length")
        ends.append((got.finish_reason, len(got.token_ids)))
        overtaken += any(node.finish and node.text != got.text for board in boards for node in board.kept)
    assert {reason for reason, _ in ends} == {"stop", "length"}
    assert len({length for reason, length in ends if reason == "stop"}) > 1
    assert overtaken or method == "bon"


def test_greedy_base_equals_transformers(bench):
    sampling = SamplingParams(temperature=0, max_new_tokens=16)
    for prompt, got in zip(PROMPTS, bench.generate(PROMPTS, get_method("base"), sampling), strict=True):
        ids = torch.tensor([bench.base.tokenizer(prompt).input_ids], device=bench.base.network.device)
        expected = bench.base.network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        assert list(got.token_ids) == expected[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    "name", ["base", "eft", "eft-gated", "args", "cbs-explicit", "adaptive", "cards", "smc", "rsd", "gsi", "mcts", "ivg"]
)
def test_batch_of_eight_equals_each_alone(llama, name):
    s, sampling = small(name), SamplingParams(max_new_tokens=12)
    prompts = [p for p in PROMPTS if p != "I"] if name in ("cards", "rsd", "gsi") else PROMPTS
    together = llama.generate(prompts, s, sampling)
    for prompt, got in zip(prompts, together, strict=True):
        assert got.token_ids == llama.generate([prompt], s, sampling)[0].token_ids


def test_mixed_methods_and_late_joiners(llama):
    """Requests with different methods, lengths and sampling share rounds, and join at any time."""
    plans = [
        (p, small(n), SamplingParams(temperature=t, top_k=k, max_new_tokens=m))
        for p, n, t, k, m in zip(
            [*PROMPTS, *PROMPTS[3:7]],
            ["base", "ivg", "eft", "bon", "cbs-implicit", "args", "base", "ivg", "cards", "smc", "adaptive", "eft-gated"],
            [1, 0.7, 0, 2, 1, 1, 0, 1.5, 1, 1, 1, 0.7], [0, 5, 0, 0, 3, 0, 0, 0, 0, 0, 4, 0],
            [5, 9, 17, 4, 20, 3, 33, 12, 25, 18, 9, 20], strict=True,
        )
    ]  # fmt: skip
    requests = [Request(Prompt(p), s.search(llama.values), sampling, 9) for p, s, sampling in plans]
    waiting, done, ids = list(enumerate(requests)), {}, {}
    while waiting or llama.searcher.busy:
        if waiting:
            i, r = waiting.pop(0)
            ids[llama.searcher.add(r)] = i
        done |= {ids[step.request]: step.completion for step in llama.searcher.step() if step.completion}
    for i, (p, s, sampling) in enumerate(plans):
        assert done[i].token_ids == llama.generate([p], s, sampling, 9)[0].token_ids, (p, s.name)


def test_beta_zero_is_base(llama):
    sampling = SamplingParams(max_new_tokens=10)
    plain = llama.generate(PROMPTS[:3], get_method("base"), sampling)
    for name in ("eft", "token-explicit", "vas", "genarm"):
        assert [c.token_ids for c in llama.generate(PROMPTS[:3], get_method(name, beta=0), sampling)] == [c.token_ids for c in plain]


def test_chunks_of_one_beam_are_plain_sampling(llama):
    sampling = SamplingParams(max_new_tokens=23)
    s = get_method("custom", chunk_length=5, select="explicit")
    assert llama.generate(PROMPTS[:3], s, sampling)[1].token_ids == llama.generate(PROMPTS[:3], get_method("base"), sampling)[1].token_ids


def test_wide_search_without_chunks_is_best_of_n(llama):
    """The best of N independent samples by the explicit value, recomputed by hand from the naive pieces."""
    from ivg.utils.rng import child_rng_path, mix

    sampling, prompt = SamplingParams(max_new_tokens=10), llama.base.tokenizer(PROMPTS[0]).input_ids
    samples = [
        naive.grow(llama.base.network, {}, METHODS["base"], prompt, [], child_rng_path(0, 0, k), 10, 1.0, mix(5, 0), 10, 0)[0]
        for k in range(6)
    ]
    best = max(samples, key=lambda y: llama.naive["explicit"].score(prompt, y))
    (bon,) = llama.generate(PROMPTS[:1], get_method("bon", successors=6), sampling)
    (wide,) = llama.generate(PROMPTS[:1], get_method("custom", width=1, successors=6, select="explicit"), sampling)
    assert list(bon.token_ids) == best == list(wide.token_ids)


def test_seeds_and_samples(llama):
    sampling = SamplingParams(max_new_tokens=12, temperature=1.5)
    run = lambda **k: next(c.token_ids for c in dict(llama.searcher.run([Request(Prompt("I"), Search(), sampling, **k)])).values())  # noqa: E731
    assert run(seed=1) == run(seed=1)
    assert len({run(seed=s) for s in range(4)} | {run(seed=0, index=i) for i in range(1, 4)}) == 7


def test_first_token_distribution(llama):
    """Chi-square of 4000 first tokens against the softmax, over the likely tokens."""
    sampling = SamplingParams(max_new_tokens=1, temperature=0.8, ignore_eos=True)
    done = llama.searcher.run([Request(Prompt("I"), Search(), sampling, 3, i) for i in range(4000)])
    counts = torch.zeros(257)
    for _, c in done:
        counts[c.token_ids[0]] += 1
    z = naive.outputs(llama.base.network, llama.base.tokenizer("I").input_ids)[-1]
    z[0] = -torch.inf
    expected = 4000 * (z / 0.8).softmax(-1)
    likely = expected > 5
    chi = (
        (((counts - expected) ** 2 / expected)[likely]).sum()
        + (counts[~likely].sum() - expected[~likely].sum()) ** 2 / expected[~likely].sum()
    )
    freedom = int(likely.sum())
    assert chi < freedom + 4 * (2 * freedom) ** 0.5
    assert counts[0] == 0


def test_bfloat16_engine_runs_and_agrees_on_easy_tokens():
    """In bfloat16 a greedy text agrees with the model's own cache wherever the choice is clear."""
    from ivg.models.cached_lm import CachedLM
    from ivg.models.runner import ModelRunner

    for architecture in ARCHITECTURES:
        network = tiny_model(architecture, 1).bfloat16()
        base = CachedLM(ModelRunner(network, "base"), byte_tokenizer())
        request = Request(Prompt("The movie"), Search(), SamplingParams(temperature=0, max_new_tokens=12))
        got = dict(Searcher(TransformersEngine(base)).run([request]))[0]
        ids = base.tokenizer("The movie").input_ids + list(got.token_ids)
        z = naive.outputs(network, ids)[-13:-1]
        margin = z.max(-1).values - z.gather(1, torch.tensor(got.token_ids)[:, None])[:, 0]
        assert margin.max() < 0.05 * z.abs().max(), architecture
