"""Speculative guidance is exact: the distribution is the guided one, and how far ahead is drafted changes no token."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch

import naive
from ivg.engines.transformers.draft_length import DraftLength, rounds_needed
from ivg.engines.transformers.engine import TransformersEngine
from ivg.engines.transformers.processors import process_logits
from ivg.engines.transformers.rejection_sampling import accept, propose, resample
from ivg.engines.transformers.sampling import filtered
from ivg.errors import ConfigError
from ivg.search.methods import get_method
from ivg.search.searcher import Request, Searcher
from ivg.settings.recipe import Recipe
from ivg.testing import ARCHITECTURES, EOS, tiny_lm, tiny_value
from ivg.types import EntropyStop, ExpandRequest, Prompt, SamplingParams, TokenGuidance
from ivg.utils.rng import uniform
from ivg.values.base import CompositeValue
from ivg.values.implicit import ImplicitValue

pytestmark = pytest.mark.numerics

NO_ENDS = SimpleNamespace(eos_ids=())


def coupled(p, q, params, seen, uniforms):
    """The whole rule for every row, from its three numbers: (ids, whether each is q's proposal)."""
    p, q = (process_logits(z, params, lambda i: ((), seen[i]), NO_ENDS)[0] for z in (p, q))
    tokens, logps = propose(q, params, [u for u, _, _ in uniforms])
    kept = accept(p, params, tokens, logps, [u for _, u, _ in uniforms])
    rows = (~kept).nonzero()[:, 0].tolist()
    if rows:
        last = [uniforms[i][2] for i in rows]
        tokens[rows] = resample(p[rows], q[rows], [params[i] for i in rows], last)
    return tokens, kept


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


def softmax(z, params, text=()):
    z = z.clone()
    for i in set(text):
        z[i] = z[i] / params.repetition_penalty if z[i] > 0 else z[i] * params.repetition_penalty
    return filtered(z[None], params)[0].softmax(-1)


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
    p, q = (process_logits(z[None], [params], lambda _: ((1,), (2, 2)), NO_ENDS)[0][0] for z in (p, q))
    params = replace(params, repetition_penalty=1.0)  # it has acted, once for all rows
    tokens, kept = coupled(p.expand(rows, -1), q.expand(rows, -1), [params] * rows, [[]] * rows, numbers(rows))
    target, proposed = softmax(p, params), softmax(q, params)
    counts = torch.bincount(tokens, minlength=8)
    assert (counts[target == 0] == 0).all()
    statistic, bound = chi_square(counts, rows * target)
    assert statistic < bound
    expected = float(torch.minimum(target, proposed).sum())  # what rejection sampling accepts: one minus the total variation
    assert kept.float().mean() == pytest.approx(expected, abs=0.015)
    proposals, _ = propose(q.expand(rows, -1), [params] * rows, [u for u, _, _ in numbers(rows)])
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
    tokens, logps = propose(q, params, [u for u, _, _ in numbers(6)])
    kept = accept(p, params, tokens, logps, [u for _, u, _ in numbers(6)])
    other = resample(p, q, params, [u for _, _, u in numbers(6)])
    assert torch.where(kept, tokens, other).tolist() == together


# The engine


class Bench:
    """Tiny models of one architecture; the same request with any number of tokens drafted ahead."""

    def __init__(self, architecture="llama", seeds=(1, 2, 3), tokenizer=None, near=None, **settings):
        self.base, tuned, untuned = (
            tiny_lm(name, architecture, seed, tokenizer, **settings) for name, seed in zip(("base", "tuned", "untuned"), seeds, strict=True)
        )
        if near is not None:  # guides that agree with the base more often than random ones
            for reader, amount in ((tuned, near), (untuned, 2 * near)):
                for weight, base_weight in zip(reader.network.parameters(), self.base.network.parameters(), strict=True):
                    weight.data.mul_(amount).add_((1 - amount) * base_weight.data)
        self.values = {"implicit": ImplicitValue(tuned, untuned), "explicit": tiny_value("vocabulary", architecture, 5, tokenizer)}
        self.readers = [self.base, tuned, untuned, self.values["explicit"].model]
        self.start()

    def start(self):
        self.engine = TransformersEngine(self.base)
        self.searcher = Searcher(self.engine)

    def requests(self, prompts, s, sampling, seed=5, **settings):
        return [Request(Prompt(p), s.search(self.values), sampling, seed, **settings) for p in prompts]

    def run(self, requests, ahead=None):
        self.engine.speculation.draft_length = ahead
        self.engine.speculation.reset_stats()
        done = dict(self.searcher.run(requests))
        assert [r.model.live_rows for r in self.readers] == [0] * len(self.readers)
        return [done[i] for i in range(len(done))]


@pytest.fixture(scope="module")
def llama():
    return Bench(near=0.2)


PROMPTS = ["The movie was", "I", "What a long prompt this one is", "Two"]
SHAPES = {
    "eft": get_method("eft", draft=8, beta=1),
    "eft, beta 0.5": get_method("eft", draft=8, beta=0.5),
    "ivg, L 3": get_method("ivg", draft=8, width=2, successors=2, chunk_length=3),
    "ivg, L 5": get_method("ivg", draft=8, width=2, successors=2, chunk_length=5, beta=1.5),
    "ivg, L 20": get_method("ivg", draft=8, width=2, successors=2, chunk_length=20),
    "implicit twice": get_method("cbs-implicit", draft=8, token="implicit", width=2, successors=2, chunk_length=4),
}


def same_tokens(bench, s, sampling, ahead, prompts=PROMPTS, **settings):
    """Completions without drafts ahead, after seeing that any number of them gives the same; and the counts of each run."""
    requests = bench.requests(prompts, s, sampling, **settings)
    expected, stats = bench.run(requests, 0), [bench.engine.speculation.stats()]
    assert (stats[0]["drafted"], stats[0]["passes_per_token"]) == (0, 1)
    for n in ahead:
        got = bench.run(requests, n)
        stats.append(bench.engine.speculation.stats())
        for found, wanted in zip(got, expected, strict=True):
            assert (found.token_ids, found.text, found.finish_reason) == (wanted.token_ids, wanted.text, wanted.finish_reason), n
            assert (found.score or 0) == pytest.approx(wanted.score or 0, abs=2e-4)
            assert found.guide_shift == pytest.approx(wanted.guide_shift, abs=2e-4)
        assert stats[-1]["tokens"] == stats[0]["tokens"]
        assert stats[-1]["acceptance"] == stats[0]["acceptance"]  # of the same proposals
    return expected, stats


def test_a_guide_may_read_the_text_of_a_draft(llama, monkeypatch):
    """Text is decoded on access, so that of tokens which are taken back is taken back, too."""
    tuned, read = llama.values["implicit"].tuned, []
    logits = tuned.logits

    def reading(hypotheses):
        read.extend(h.text for h in hypotheses)
        return logits(hypotheses)

    monkeypatch.setattr(tuned, "logits", reading)
    same_tokens(llama, get_method("eft", draft=4), SamplingParams(max_new_tokens=16), (1, 3))
    assert read


@pytest.mark.parametrize(
    "s", [pytest.param(s, id=name, marks=() if name in ("eft", "ivg, L 5") else pytest.mark.long) for name, s in SHAPES.items()]
)
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


def letters():
    """A tokenizer of four letters and an end."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE({EOS: 0, "a": 1, "b": 2, "c": 3, "d": 4}, []))
    tok.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module")
def small():
    return Bench(tokenizer=letters(), near=0.4)


def enumerated(bench, prompt, beta, sampling, length):
    """{tokens: probability} of all responses of up to ``length`` tokens, by the formulas with full forward passes."""
    networks = [bench.base.network, *(getattr(bench.values["implicit"], n).network for n in ("tuned", "untuned"))]
    found, open_ = {}, {(): 1.0}
    for _ in range(length):
        grown = {}
        for y, mass in open_.items():
            z, tuned, untuned = (naive.outputs(n, prompt + list(y))[-1] for n in networks)
            chances = softmax(z + beta * (tuned - untuned), sampling, prompt + list(y))
            for token, chance in enumerate(chances.tolist()):
                (found if token == 0 else grown)[*y, token] = mass * chance
        open_ = grown
    return found | open_


TOP_K = {"top_k": 3, "temperature": 1.5}


MORE = [(1, 1.0, {}), (3, 1.0, {}), (1, 0.5, {}), (2, 0.5, {}), (3, 0.5, {}), (2, 1.0, TOP_K)]


@pytest.mark.parametrize(
    "ahead,beta,settings",
    [(2, 1.0, {}), (3, 0.5, TOP_K), *(pytest.param(*more, marks=pytest.mark.long) for more in MORE)],
)
def test_all_strings_have_their_probability(small, ahead, beta, settings):
    """Chi-square of 20 000 responses of three tokens against the enumerated guided distribution."""
    sampling, rows, each = SamplingParams(max_new_tokens=4, **settings), 20_000, 2500
    guidance = TokenGuidance(small.values["implicit"], beta, draft=3)
    expected = enumerated(small, small.base.tokenizer("abcd").input_ids, beta, sampling, 3)
    assert sum(expected.values()) == pytest.approx(1)
    place = {y: i for i, y in enumerate(expected)}
    counts = torch.zeros(len(place))
    small.engine.speculation.draft_length = ahead
    small.engine.speculation.reset_stats()
    for seed in range(rows // each):
        root = small.engine.open(Prompt("abcd"), sampling)
        small.base.outputs([root]), guidance.value.deltas([root])  # so that children fork; thousands of new rows take long
        (family,) = small.engine.extend([ExpandRequest(root, each, 3, sampling, guidance, seed)])
        for beam in family:
            counts[place[beam.token_ids]] += 1
        keys = [root.key, *(beam.key for beam in family)]
        small.engine.release(keys), guidance.value.release(keys)
    probabilities = torch.tensor([*expected.values()])
    assert counts[probabilities == 0].sum() == 0
    statistic, bound = chi_square(counts, rows * probabilities)
    assert statistic < bound
    stats = small.engine.speculation.stats()
    assert 0.2 < stats["acceptance"] < 0.95
    assert stats["passes_per_token"] < 1


def test_guidance_and_drafts_matter(small):
    """The chi-square above tells the guided distribution from the base's and from the draft's."""
    ids, sampling = small.base.tokenizer("abcd").input_ids, SamplingParams()
    guided, base = (torch.tensor([*enumerated(small, ids, beta, sampling, 3).values()]) for beta in (1.0, 0.0))
    statistic, bound = chi_square(20_000 * base, 20_000 * guided)
    assert statistic > 3 * bound


# What ends a response, and who shares the batch


def test_greedy_is_plain_greedy_guidance(llama):
    for sampling in (SamplingParams(temperature=0, max_new_tokens=30), SamplingParams(temperature=0, repetition_penalty=1.3)):
        plain = llama.run(llama.requests(PROMPTS, get_method("eft"), sampling))
        got, stats = same_tokens(llama, get_method("eft", draft=6), sampling, (1, 2, 5, None))
        assert [c.token_ids for c in got] == [c.token_ids for c in plain]
        assert stats[3]["accepted"] > 0


@pytest.mark.parametrize("limit", [1, 2, 7, 16, 17, 33])
def test_limits_are_kept(llama, limit):
    got, _ = same_tokens(llama, SHAPES["eft"], SamplingParams(max_new_tokens=limit, ignore_eos=True), (3, None))
    assert {len(c.token_ids) for c in got} == {limit}
    assert {c.finish_reason for c in got} == {"length"}


def test_ends_of_sequence_and_stop_strings(small):
    s = get_method("eft", draft=8)
    sampling = SamplingParams(max_new_tokens=40)
    prompts = ["abcd", "ab", "ddd", "ca"] * 4
    got, _ = same_tokens(small, s, sampling, (1, 3, 8, None), prompts)
    assert {c.finish_reason for c in got} >= {"stop"}
    assert len({len(c.token_ids) for c in got}) > 2
    free, _ = same_tokens(small, s, replace(sampling, ignore_eos=True), (3,), prompts)
    stopped, _ = same_tokens(small, s, replace(sampling, ignore_eos=True, stop=("ab", "cc")), (1, 3, 8, None), prompts)
    for a, b in zip(free, stopped, strict=True):
        cut = min((a.text.find(x) for x in ("ab", "cc") if x in a.text), default=len(a.text))
        assert b.text == a.text[:cut]
        assert b.token_ids == a.token_ids[: len(b.token_ids)]
        assert len(b.token_ids) <= cut + 2


@pytest.mark.parametrize(
    "settings", [{"top_k": 9}, {"top_p": 0.8}, {"min_p": 0.1, "temperature": 0.7}, {"repetition_penalty": 1.4, "top_k": 20}]
)
def test_filters(llama, settings):
    for beta in (1.0, 2.0):
        same_tokens(llama, get_method("eft", draft=5, beta=beta), SamplingParams(max_new_tokens=20, **settings), (2, 5), PROMPTS[:2])


class ReadsText(ImplicitValue):
    """A pair whose drafter looks at texts, which decodes them."""

    def drafter(self, beta):
        made = super().drafter(beta)
        logits = made.logits
        made.logits = lambda hypotheses: logits([h for h in hypotheses if h.text is not None])
        return made


def test_the_text_of_drafts_is_taken_back_with_their_tokens():
    bench = Bench()
    bench.values["implicit"] = ReadsText(*bench.values["implicit"].cached_lms())
    expected, _ = same_tokens(bench, get_method("eft", draft=4, beta=1), SamplingParams(max_new_tokens=9), [1, 4], PROMPTS[:2])
    assert [done.text for done in expected] == [bench.base.vocabulary.decode(done.token_ids) for done in expected]


def test_recorded_shifts_are_those_of_the_tokens(llama):
    s, sampling = SHAPES["ivg, L 5"], SamplingParams(max_new_tokens=15, temperature=0.8)
    got, _ = same_tokens(llama, s, sampling, (2, None), PROMPTS[:2], record=True, trace=True)
    pair = [getattr(llama.values["implicit"], n).network for n in ("tuned", "untuned")]
    for prompt, c in zip(PROMPTS, got, strict=False):
        ids = llama.base.tokenizer(prompt).input_ids
        assert len(c.guide_shift) == len(c.token_ids)
        for i, token in enumerate(c.token_ids):
            z, tuned, untuned = (naive.outputs(n, ids + list(c.token_ids[:i]))[-1] for n in (llama.base.network, *pair))
            guided = ((z + s.beta * (tuned - untuned)) / 0.8).log_softmax(-1)
            assert c.guide_shift[i] == pytest.approx(float(guided[token] - (z / 0.8).log_softmax(-1)[token]), abs=2e-3)


def test_weighted_particles_do_not_depend_on_drafts(llama):
    s = get_method("smc", token="implicit", draft=6, width=6, chunk_length=4)
    same_tokens(llama, s, SamplingParams(max_new_tokens=16, top_k=30), (1, 3, None))


def test_mixed_batches_and_late_joiners(llama):
    """Requests that draft and others that do not share the loop, and join at any time."""
    methods = [
        *[get_method("eft", draft=4), get_method("base"), get_method("ivg", draft=3, width=2, successors=2), get_method("eft")],
        *[get_method("eft", draft=2, beta=0.7), get_method("ivg", draft=3, width=2, successors=2), get_method("cbs-explicit", width=2)],
    ]
    plans = [
        (s, Prompt(PROMPTS[i % 4]), SamplingParams(temperature=t, max_new_tokens=m))
        for i, (s, t, m) in enumerate(zip(methods, [1, 1, 0.7, 0, 0, 1, 1], [9, 17, 20, 33, 5, 12, 11], strict=True))
    ]
    requests = [Request(p, s.search(llama.values), sampling, 9) for s, p, sampling in plans]
    alone = [llama.run([r], 0)[0].token_ids for r in requests]
    for ahead in (0, 2, None):
        llama.engine.speculation.draft_length = ahead
        waiting, done, ids = list(enumerate(requests)), {}, {}
        while waiting or llama.searcher.busy:
            if waiting:
                i, r = waiting.pop(0)
                ids[llama.searcher.add(r)] = i
            done |= {ids[step.request]: step.completion.token_ids for step in llama.searcher.step() if step.completion}
        assert [done[i] for i in range(len(alone))] == alone
    assert all(r.model.live_rows == 0 for r in llama.readers)


def test_tokens_read_are_counted_even_in_vain(llama):
    requests = llama.requests(PROMPTS[:1], SHAPES["eft"], SamplingParams(max_new_tokens=16, ignore_eos=True))
    plain, drafted = llama.run(requests, 0)[0].usage.forward_tokens, llama.run(requests, 4)[0].usage.forward_tokens
    counts = llama.engine.speculation.stats()
    assert drafted["base"] - plain["base"] == counts["drafted"] - counts["accepted"] > 0
    assert counts["passes"] < counts["tokens"] == 16


def test_models_that_give_nan_end_only_their_rows():
    bench = Bench(near=0.2)
    requests = bench.requests(PROMPTS, get_method("eft", draft=4), SamplingParams(max_new_tokens=12, ignore_eos=True))
    fine = bench.run(requests, 3)
    last = fine[0].token_ids[6]
    for reader, blamed in ((bench.base, "base model"), (bench.values["implicit"].tuned, "token guidance")):
        body = reader.network.get_input_embeddings().weight
        old = body.data[last].clone()
        body.data[last] = torch.nan
        for ahead in (0, 3):
            for each in bench.readers:  # keys and values of a broken row stay in its slot
                each.reset_cache()
            for got, before in zip(bench.run(requests, ahead), fine, strict=True):
                first = before.token_ids.index(last) + 1 if last in before.token_ids[:-1] else None
                if first is None:
                    assert got.token_ids == before.token_ids
                else:
                    assert got.finish_reason == "error"
                    assert f"{blamed} gave NaN or infinity after {first} tokens" in got.error
                    assert got.token_ids == before.token_ids[:first]
        body.data[last] = old


def test_models_with_wider_or_narrower_heads():
    """Rows that only pad the matrices are never drawn where the base lacks them, and drawn from the base where the guides do."""
    sampling = SamplingParams(max_new_tokens=12, temperature=1.5)
    for wide in (("base",), ("tuned", "untuned"), ("tuned",)):
        bench = Bench(near=0.2)
        for reader in (bench.base, bench.values["implicit"].tuned, bench.values["implicit"].untuned):
            if reader.name in wide:
                network = reader.network
                network.resize_token_embeddings(264, mean_resizing=False)
                reader.__init__(type(reader.model)(network, reader.name), reader.tokenizer)
        bench.start()
        same_tokens(bench, get_method("eft", draft=4), sampling, (1, 4))
        same_tokens(bench, get_method("eft", draft=4, beta=0.6), sampling, (3,))


# Errors


@pytest.mark.parametrize(
    "name,settings,message",
    [
        ("eft", {"draft": -1}, "draft must be 0"),
        ("base", {"draft": 2}, "no value that guides"),
        ("cards", {"draft": 2, "token": "implicit"}, "base is uncertain"),
        ("eft", {"draft": 2, "candidates": 5}, "candidates=5"),
        ("eft", {"draft": 2, "normalise": True}, "normalise=True"),
        ("eft-gated", {"draft": 2}, "gate=3.0"),
        ("token-explicit", {"draft": 2}, "a value that can draft"),
        ("eft", {"draft": 2, "weights": {"implicit": 1.0, "explicit": 0.5}}, "a value that can draft"),
    ],
)
def test_what_cannot_draft_is_refused(llama, name, settings, message):
    with pytest.raises(ConfigError, match=message):
        s = get_method(name, **settings)
        llama.searcher.add(Request(Prompt("I"), s.search(llama.values, CompositeValue)))


def test_the_engine_itself_refuses_pauses(llama):
    sampling, guidance = SamplingParams(), TokenGuidance(llama.values["implicit"], draft=2)
    root = llama.engine.open(Prompt("I"), sampling)
    with pytest.raises(ConfigError, match="high entropy"):
        llama.engine.extend([ExpandRequest(root, 1, 4, sampling, guidance, 0, pause=EntropyStop(3.0, 1))])


def test_no_weight_no_drafts(llama):
    sampling = SamplingParams(max_new_tokens=10)
    plain = llama.run(llama.requests(PROMPTS, get_method("base"), sampling))
    drafted = llama.run(llama.requests(PROMPTS, get_method("eft", draft=4, beta=0), sampling))
    assert [c.token_ids for c in drafted] == [c.token_ids for c in plain]
    assert llama.engine.speculation.stats()["rounds"] == 0


def test_command_line_recipe_and_server_have_the_setting():
    from ivg.cli.compare import settings_for
    from ivg.evaluation.methods import method_rows
    from ivg.settings.recipe import MethodConfig

    recipe = Recipe.parse({"search": {"method": "eft", "num_speculative_tokens": 4}})
    assert recipe.search.settings() == {"draft": 4}
    drafting = {
        name for name in ("base", "eft", "token-explicit", "cbs-explicit", "ivg", "eft-gated") if "draft" in settings_for(recipe, name)
    }
    assert drafting == {"eft", "ivg"}
    assert {m.label for m in method_rows(recipe, {}) if m.method.draft == 4} == {f"implicit×{s}" for s in ("none", "implicit", "explicit")}
    assert MethodConfig(method="ivg", draft=2).settings() == {"draft": 2}


# The length of drafts


def simulated(pace, seconds, acceptance, rounds=200, rows=1, room=100):
    """What ``pace`` chooses where a round with n tokens ahead takes ``seconds(n)``."""
    chosen = []
    for _ in range(rounds):
        n = pace.choose([room] * rows)
        chosen.append(n)
        pace.record_time(rows, n, seconds(n))
        pace.record_acceptance(100, round(100 * acceptance))
    return chosen


def test_pace_drafts_far_where_guides_are_cheap_and_right():
    chosen = simulated(DraftLength(8), lambda n: 1 + 0.05 * (n + 1), 0.95)
    assert max(set(chosen[50:]), key=chosen[50:].count) == 8


def test_the_slow_first_round_of_a_length_is_not_believed():
    """In the first pass of a shape kernels are prepared."""
    rounds = iter([4.0])
    chosen = simulated(DraftLength(8), lambda n: (1 + 0.05 * (n + 1)) * (next(rounds, 1.0) if n == 8 else 1.0), 0.95)
    assert max(set(chosen[20:]), key=chosen[20:].count) == 8


def test_drafts_that_end_sooner_than_asked_for_are_measured():
    """Of short answers: no round ever drafts four tokens."""
    pace = DraftLength(8)
    for _ in range(12):
        asked = pace.choose([100])
        pace.record_time(1, min(asked, 2), 1.0 + min(asked, 2))
        pace.record_acceptance(10, 1)
    assert asked == 0


def test_drafts_are_switched_off_where_they_do_not_pay():
    chosen = simulated(DraftLength(8), lambda n: 1 + 0.5 * n, 0.2)
    assert chosen[20:].count(0) > 0.95 * len(chosen[20:])


def test_draft_length_minimises_a_convex_cost():
    best = max((0, 1, 2, 3, 4, 6, 8), key=lambda n: sum(0.8**i for i in range(n + 1)) / (1 + 0.2 * n))
    chosen = simulated(DraftLength(8), lambda n: 1 + 0.2 * n, 0.8)
    assert max(set(chosen[50:]), key=chosen[50:].count) == best


def test_rounds_needed_are_those_of_a_simulation():
    torch.manual_seed(0)
    for ahead, room, rate in ((0, 5, 0.5), (2, 5, 0.7), (4, 9, 0.85), (8, 3, 0.3)):
        needed = torch.zeros(4000)
        for i in range(len(needed)):
            left = room
            while left > 0:
                left -= min([n for n in range(1, ahead + 1) if torch.rand(()) > rate] + [ahead + 1])
                needed[i] += 1
        seen = [float((needed <= n).float().mean()) for n in range(room + 1)]
        assert rounds_needed(ahead, room, rate) == pytest.approx(seen, abs=0.03)


def test_drafts_are_shorter_for_larger_batches():
    """At the same price: one unlucky row of 64 keeps all others waiting."""
    cost = lambda n: 1 + 0.25 * n  # noqa: E731
    alone, many = (simulated(DraftLength(8), cost, 0.7, rows=rows, room=6)[-2] for rows in (1, 64))
    assert many < alone


def test_draft_length_respects_room_and_limit():
    assert max(simulated(DraftLength(8), lambda n: 1.0, 1.0, room=3)) == 2
    assert max(simulated(DraftLength(3), lambda n: 1.0, 1.0)) == 3
    assert set(simulated(DraftLength(8), lambda n: 1.0, 1.0, room=1)) == {0}


def test_draft_length_adapts_to_batch_size_and_changed_times():
    pace = DraftLength(8)
    assert simulated(pace, lambda n: 1 + 0.01 * n, 0.9)[-2] == 8
    assert simulated(pace, lambda n: 1 + 1.0 * n, 0.9, rows=16)[-2] == 0
    assert simulated(pace, lambda n: 1 + 0.01 * n, 0.9)[-2] == 8
    assert simulated(pace, lambda n: 1 + 0.01 * n, 0.0, rounds=400)[-2] == 0
