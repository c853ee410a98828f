"""CARDS, particles, adaptive budgets with a fake engine: formulas by hand, behaviour, distributions by enumeration."""

import itertools
import math
import statistics
from collections import Counter
from dataclasses import replace

import pytest

from ivg import GuidedModel
from ivg.errors import ConfigError, GenerationError, PromptError
from ivg.search import ranking
from ivg.search.methods import get_method
from ivg.search.particles import effective_size, normalised
from ivg.search.rejection import acceptance, threshold
from ivg.search.request import Particles, Rejection
from ivg.search.searcher import Request, Search, Searcher
from ivg.search.selection import budgets
from ivg.testing import FakeEngine, tiny_lm
from ivg.types import Prompt, SamplingParams, TokenGuidance, Value
from ivg.values.base import FunctionValue, combine_values

pytestmark = pytest.mark.numerics

COUNT_A = FunctionValue(lambda p, r: r.count("a"))
GUIDE = TokenGuidance(FunctionValue(lambda p, r: 0.0))


def answers(engine, search, count, **sampling):
    """``count`` completions with different seeds, together."""
    searcher = Searcher(engine)
    settings = SamplingParams(**{"max_new_tokens": 12, "ignore_eos": True, **sampling})
    return [c for _, c in sorted(searcher.run(Request(Prompt("p"), search, settings, seed) for seed in range(count)))]


# Adaptive budgets


@pytest.mark.parametrize(
    "arguments,expected",
    [
        ((4, 4, 1.0, 2), [4, 4, 4, 4]),
        ((3, 7, 0.5, 1), [12, 6, 3]),  # 21 in 4 : 2 : 1
        ((4, 8, 0.5, 2), [17, 9, 4, 2]),  # 32 in 8 : 4 : 2 : 1 is 17.07, 8.53, 4.27, 2.13; the one left over goes to 8.53
        ((4, 4, 0.5, 2), [8, 4, 2, 2]),  # the last, 1.07, is raised to 2; 14 in 4 : 2 : 1
        ((1, 16, 0.1, 4), [16]),
    ],
)
def test_budgets_by_hand(arguments, expected):
    got = budgets(*arguments)
    assert sum(got) == arguments[0] * arguments[1]
    assert got == expected


def test_adaptive_search_draws_what_its_budgets_say():
    """W = 2, K = 4, three chunks: 24 continuations in all, 4 : 2 : 1 of them."""
    search = Search(width=2, successors=4, chunk_length=4, value=COUNT_A, decay=0.5)
    (done,) = [
        c
        for _, c in Searcher(FakeEngine()).run(
            [Request(Prompt("p"), search, SamplingParams(max_new_tokens=12, ignore_eos=True), 1, trace=True)]
        )
    ]
    assert [len(s.kept) + len(s.dropped) for s in done.trace] == budgets(3, 8, 0.5, 2) == [14, 7, 3]
    assert done.usage.forward_tokens["fake"] == 4 * 24


# CARDS


def test_threshold_and_acceptance_by_hand():
    s = Rejection(target=4.0, threshold_start=0.25)
    assert threshold(s, 1.0, 0, 100) == pytest.approx(0.75 * 1 + 0.25 * 4)
    assert threshold(s, 1.0, 50, 100) == pytest.approx((1.75 + 4) / 2)
    assert threshold(s, 1.0, 100, 100) == threshold(s, 1.0, 130, 100) == pytest.approx(4)
    assert acceptance(s, 5.0, 4.0) == 1
    assert acceptance(s, 3.3, 4.0) == pytest.approx(math.exp(-1))
    free = Rejection(tries=7)
    assert threshold(free, -2.0, 10, 10) == pytest.approx(-2 + 0.7 * math.log(7))
    assert acceptance(free, -2.0, threshold(free, -2.0, 10, 10)) == pytest.approx(1 / 7)


def sure_but_after_b(text):
    """No doubt but behind a b, where all is open."""
    return [1] * 9 if text.endswith("b") else [4, 1, 0, 0, 0, 0, 0, 0, 0]


def pieces(completion):
    """Texts of the segments that were accepted."""
    texts = [node.text for step in completion.trace for node in step.kept]
    whole = [t for i, t in enumerate(texts) if t and (i == 0 or t != texts[i - 1])]
    return [b[len(a) :] for a, b in itertools.pairwise(["", *whole])]


def traced(search, seed, engine=None, **sampling):
    settings = SamplingParams(**{"max_new_tokens": 40, "ignore_eos": True, **sampling})
    request = Request(Prompt("p"), search, settings, seed, trace=True)
    return next(c for _, c in Searcher(engine or FakeEngine(weights=sure_but_after_b)).run([request]))


def test_segments_end_in_doubt():
    """Each accepted segment but the last ends behind its first b that leaves it long enough; none outgrows the chunk."""
    easy = Rejection(target=-100.0, segment_entropy=2.0, segment_min=2)
    seen = set()
    for seed in range(6):
        segments = pieces(traced(Search(chunk_length=10, value=COUNT_A, rejection=easy), seed))
        for segment in segments[:-1]:
            assert segment.find("b", 1) in (len(segment) - 1, -1)
            assert len(segment) == 10 if segment[-1] != "b" else 2 <= len(segment) <= 10
            seen.add(len(segment))
    assert len(seen) > 3


def test_rejected_segments_are_tried_anew_and_the_best_is_kept():
    """With a target out of reach every place costs all tries, and the best of them is taken: each is seen in the trace."""
    hard = Rejection(target=1e6, tries=5, segment_entropy=2.0, segment_min=2)
    done = traced(Search(chunk_length=10, value=COUNT_A, rejection=hard), 3)
    tried, best = [], ""
    for step in done.trace:
        tried += list(step.dropped) + [n for n in step.kept if n.text != best and n.key not in {m.key for m in tried}]
        if step.kept[0].text == best:
            continue
        assert len(tried) == 5
        assert step.kept[0].score == max(n.score for n in tried)
        assert len({n.text for n in tried}) > 1
        tried, best = [], step.kept[0].text
    assert done.text == best
    assert done.score == done.text.count("a")


def test_an_easy_target_accepts_every_first_try():
    easy = Rejection(target=-100.0)
    done = traced(Search(chunk_length=8, value=COUNT_A, rejection=easy), 4)
    assert not any(step.dropped for step in done.trace)
    assert done.text == traced(Search(), 4).text  # first children: plain sampling


def test_acceptance_rate_is_the_formula():
    """One segment of one letter: how often each is the answer, given their rewards."""
    settings = Rejection(target=1.0, threshold_start=1.0, accept_scale=1.5, tries=1000, segment_min=1)
    engine = FakeEngine("a", weights=lambda t: [1, 1])  # one letter or the end: reward 1 or 0
    search = Search(chunk_length=1, value=COUNT_A, rejection=settings)
    texts = Counter(c.text for c in answers(engine, search, 4000, max_new_tokens=1, ignore_eos=False))
    p = math.exp(-1 / 1.5)  # an empty text is accepted with this, a letter always
    assert texts["a"] / 4000 == pytest.approx(1 / (1 + p), abs=4 * math.sqrt(0.25 / 4000))


def test_value_of_the_prompt_is_read_only_where_needed():
    class Unreadable(Value):
        name = "picky"

        def score(self, hypotheses):
            if any(not h.text for h in hypotheses):
                raise PromptError("picky: nothing to read")
            return [0.0] * len(hypotheses)

    engine = FakeEngine()
    searches = [Search(value=Unreadable(), rejection=Rejection(target=t, threshold_start=a)) for t, a in ((1.0, 0.5), (1.0, 1.0))]
    searches.append(Search())
    settings = SamplingParams(max_new_tokens=5, ignore_eos=True)
    done = dict(Searcher(engine).run(Request(Prompt("p"), s, settings) for s in searches))
    assert "nothing to read" in done[0].error
    assert "threshold_start=1" in done[0].error
    assert not done[1].error
    assert not done[2].error
    assert engine.held == set()


# Particles


def test_weights_by_hand():
    assert normalised([0.0, math.log(3.0)]) == pytest.approx([0.25, 0.75])
    assert normalised([-1000.0, -1000.0]) == [0.5, 0.5]
    assert normalised([-math.inf, 5.0]) == [0.0, 1.0]
    assert effective_size([0.25] * 4) == pytest.approx(4)
    assert effective_size([0.5, 0.5, 0.0]) == pytest.approx(2)


def test_systematic_by_hand():
    assert ranking.systematic([0.5, 0.25, 0.25], 4, 0.5) == [0, 0, 1, 2]
    assert ranking.systematic([0.1, 0.8, 0.1], 2, 0.3) == [1, 1]  # at 0.15 and 0.65
    assert ranking.systematic([0.0, 1.0, 0.0], 3, 0.99) == [1, 1, 1]


def letters(text):
    """A base with a memory of one letter."""
    return [3, 1, 0.5] if text.endswith("b") else [1, 2, 0.7]


def guided_letters(text):
    return [1, 1, 1] if text.endswith("a") else [2, 1, 0.2]


def reward(text):
    return 1.2 * text.count("ab") - 0.7 * text.count("bb") + 0.1 * len(text)


def target(length, beta):
    """pi_base * exp(beta * r) / Z over all texts of at most ``length`` letters, by enumeration."""
    mass = {}
    for n in range(length + 1):
        for text in map("".join, itertools.product("ab", repeat=n)):
            p = 1.0
            for i, letter in enumerate(text):
                weights = letters(text[:i])
                p *= weights["ab".index(letter)] / sum(weights)
            if n < length:
                p *= letters(text)[2] / sum(letters(text))
            mass[text] = p * math.exp(beta * reward(text))
    return {text: m / sum(mass.values()) for text, m in mass.items()}


@pytest.mark.parametrize("guidance", [None, GUIDE], ids=["unguided", "guided"])
@pytest.mark.parametrize("resample_below", [0.0, 0.5, 1.0])
def test_particles_converge_to_the_target(guidance, resample_below):
    """Answers over many seeds against the enumerated target; the intermediate value is a poor one, which must not matter."""
    engine = FakeEngine("ab", letters, guided_letters)
    value = FunctionValue(lambda p, r: reward(r))
    search = Search(
        width=40, chunk_length=2, guidance=guidance, value=value, particles=Particles(particle_beta=1.5, resample_below=resample_below)
    )
    runs = 800
    counts = Counter(c.text for c in answers(engine, search, runs, max_new_tokens=4, ignore_eos=False))
    expected = target(4, 1.5)
    likely = {t: runs * p for t, p in expected.items() if runs * p > 5}
    chi = sum((counts[t] - e) ** 2 / e for t, e in likely.items())
    rest = runs - sum(likely.values())
    chi += (runs - sum(counts[t] for t in likely) - rest) ** 2 / max(rest, 1.0)
    freedom = len(likely)
    assert chi < freedom + 4 * math.sqrt(2 * freedom)
    assert set(counts) <= set(expected)


def test_unweighted_guided_draws_are_another_distribution():
    """The test above can fail: without the importance weights the guided proposal gives other answers."""
    engine = FakeEngine("ab", letters, guided_letters)
    counts = Counter(c.text for c in answers(engine, Search(guidance=GUIDE), 1500, max_new_tokens=4, ignore_eos=False))
    expected = target(4, 0.0)
    chi = sum((counts[t] - 1500 * p) ** 2 / (1500 * p) for t, p in expected.items() if 1500 * p > 5)
    assert chi > 200


def test_impossible_tokens_only_end_in_an_error_when_all_particles_have_drawn_one():
    base = lambda t: [0, 1, 0]  # noqa: E731
    value = FunctionValue(lambda p, r: 0.0)
    search = Search(width=8, chunk_length=2, guidance=GUIDE, value=value, particles=Particles())
    for below in (0.0, 0.5):
        few = replace(search, particles=Particles(resample_below=below))
        some = answers(FakeEngine("ab", base, lambda t: [1, 3, 0]), few, 30, max_new_tokens=4)
        assert {c.text for c in some if not c.error} == {"bbbb"}
    engine = FakeEngine("ab", base, lambda t: [1, 0, 0])
    (none,) = answers(engine, search, 1, max_new_tokens=4)
    assert "the base alone never draws" in none.error
    assert engine.held == set()


# Settings


@pytest.mark.parametrize("method,bad", [
    ("eft", {"gate": -1.0}), ("ivg", {"decay": 0.0}), ("ivg", {"decay": 1.1}), ("cards", {"tries": 0}), ("cards", {"accept_scale": 0.0}),
    ("cards", {"threshold_start": 2.0}), ("cards", {"segment_entropy": 0.0}), ("cards", {"segment_min": 0}), ("cards", {"segment_min": 65}),
    ("cards", {"target": math.nan}), ("smc", {"resample_below": 1.5}), ("smc", {"particle_beta": math.inf}), ("cards", {"width": 2}),
    ("smc", {"decay": 0.5}), ("smc", {"original": True}), ("cards", {"select": "none"}), ("ivg", {"rule": "best"}),
], ids=lambda x: next(iter(x.items())).__repr__() if isinstance(x, dict) else x)  # fmt: skip
def test_impossible_settings_are_errors(method, bad):
    with pytest.raises(ConfigError, match="select" if bad.get("select") else next(iter(bad))):
        get_method(method, **bad)


@pytest.mark.parametrize("search", [
    {"decay": 2.0}, {"rejection": Rejection(), "particles": Particles(), "value": COUNT_A},
    {"rejection": Rejection()}, {"rejection": Rejection(), "value": COUNT_A, "successors": 2},
    {"particles": Particles(), "value": COUNT_A, "rule": "soft"}, {"width": 2}, {"successors": 4},
    {"rejection": Rejection(segment_min=9), "value": COUNT_A, "chunk_length": 8},
], ids=lambda s: "+".join(s))  # fmt: skip
def test_impossible_searches_are_refused(search):
    with pytest.raises(ConfigError, match=r"must be|one selection rule|needs a value"):
        Searcher(FakeEngine()).add(Request(Prompt("p"), Search(**search)))


@pytest.mark.parametrize("given", ["implicit", "a=1,a=2", "a=x", "=1", "a=nan", {}, "", 3, [("a",)]])
def test_unusable_weights_are_errors(given):
    with pytest.raises(ConfigError, match="select_weights must be names and finite numbers, each name once"):
        get_method("ivg", select_weights=given)
    for text in (" a = 1, b=-0.5", {"a": 1, "b": -0.5}):
        assert get_method("ivg", select_weights=text).select_weights == (("a", 1.0), ("b", -0.5))


def test_weights_need_their_values_and_a_way_to_combine():
    s = get_method("eft", weights="a=1,b=2")
    assert s.needs == {"a", "b"}
    with pytest.raises(ConfigError, match="needs the value b"):
        s.search({"a": COUNT_A})
    with pytest.raises(ConfigError, match="way to combine"):
        s.search({"a": COUNT_A, "b": COUNT_A})
    assert s.search({"a": COUNT_A, "b": COUNT_A}, combine_values).guidance.value.is_sum
    assert hash(s) != hash(get_method("eft"))
    assert get_method("eft", weights="a=1,b=2", beta=0).search({}).guidance is None


@pytest.mark.parametrize(("size", "particle_beta"), [(1e308, 1.0), (1e305, 1000.0), (1e307, 1000.0)])
def test_weights_that_overflow_are_the_error_of_their_request(size, particle_beta):
    """The other requests of the batch are answered."""
    value = FunctionValue(lambda p, r: size if "a" in r else -size)
    search = Search(width=8, chunk_length=1, value=value, particles=Particles(particle_beta=particle_beta, resample_below=0.0))
    sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
    requests = [Request(Prompt("x"), search, sampling, 1), Request(Prompt("x"), Search(), sampling, 1)]
    failed, fine = (c for _, c in sorted(Searcher(FakeEngine()).run(requests)))
    assert "is no finite weight: lower particle_beta, or scale the value" in failed.error
    assert fine.error is None and len(fine.token_ids) == 8


# The posterior of particles


def partition(length, beta):
    """Z = sum over texts of pi_base * exp(beta * r), by enumeration."""
    mass = 0.0
    for n in range(length + 1):
        for text in map("".join, itertools.product("ab", repeat=n)):
            p = math.prod(letters(text[:i])["ab".index(letter)] / sum(letters(text[:i])) for i, letter in enumerate(text))
            p *= letters(text)[2] / sum(letters(text)) if n < length else 1.0
            mass += p * math.exp(beta * reward(text))
    return mass


@pytest.mark.parametrize("guidance", [None, GUIDE], ids=["unguided", "guided"])
@pytest.mark.parametrize("resample_below", [0.0, 0.5, 1.0])
def test_posterior_and_partition_function_against_enumeration(guidance, resample_below):
    """Z is estimated without bias by few particles, and the particles weighted by Z are the target."""
    engine = FakeEngine("ab", letters, guided_letters)
    value = FunctionValue(lambda p, r: reward(r))
    particles = Particles(particle_beta=1.5, resample_below=resample_below)
    search = Search(width=8, chunk_length=2, guidance=guidance, value=value, particles=particles)
    found = [c.posterior for c in answers(engine, search, 1000, max_new_tokens=4, ignore_eos=False)]
    z, expected = [math.exp(p.log_z) for p in found], target(4, 1.5)
    mean, deviation = statistics.mean(z), statistics.stdev(z)
    assert abs(mean - partition(4, 1.5)) < 4 * deviation / math.sqrt(len(z)) < 0.1 * mean
    mixture = Counter()
    for weight, posterior in zip(z, found, strict=True):
        assert sum(posterior.decoded.values()) == pytest.approx(1) and 1 <= posterior.effective_sample_size <= 8 + 1e-9
        for text, p in posterior.decoded.items():
            mixture[text] += weight * p / sum(z)
    assert sum(abs(mixture[text] - p) for text, p in expected.items()) / 2 < 0.06


def test_many_particles_are_the_posterior():
    search = Search(width=3000, chunk_length=2, value=FunctionValue(lambda p, r: reward(r)), particles=Particles(particle_beta=1.5))
    ((_, found),) = Searcher(FakeEngine("ab", letters)).run([Request(Prompt("x"), search, SamplingParams(max_new_tokens=4), 1)])
    expected, posterior = target(4, 1.5), found.posterior
    assert posterior.log_z == pytest.approx(math.log(partition(4, 1.5)), abs=0.05)
    assert sum(abs(posterior.decoded.get(t, 0.0) - p) for t, p in expected.items()) / 2 < 0.05
    mean = sum(p * text.count("a") for text, p in expected.items())
    assert posterior.expectation(lambda text: text.count("a")) == pytest.approx(mean, abs=0.05)
    assert len(posterior.particles) == 3000 and list(posterior.decoded) == sorted(posterior.decoded, key=lambda t: -posterior.decoded[t])
    assert found.text in posterior.decoded and found.to_dict()["log_z"] == round(posterior.log_z, 6)


def test_log_z_by_hand():
    """One letter, value 1 for a: Z = (e + 1) / 2, whatever is drawn, with weights e and 1."""
    engine = FakeEngine("ab", lambda text: [1, 1, 0])
    value = FunctionValue(lambda p, r: float(r == "a"))
    search = Search(width=5, value=value, particles=Particles(resample_below=1.0))
    ((_, found),) = Searcher(engine).run([Request(Prompt("x"), search, SamplingParams(max_new_tokens=1), 1)])
    a = sum(p.text == "a" for p in found.posterior.particles)
    total = a * math.e + 5 - a
    assert found.posterior.log_z == pytest.approx(math.log(total / 5))
    assert found.posterior.decoded == pytest.approx({t: w / total for t, w in (("a", a * math.e), ("b", 5.0 - a)) if w})
    assert found.posterior.effective_sample_size == pytest.approx(total**2 / (a * math.e**2 + 5 - a))


def test_posterior_of_a_model():
    model = GuidedModel(tiny_lm(), {"explicit": FunctionValue(lambda p, r: float(r.count("a")))}, SamplingParams(max_new_tokens=4))
    found = model.posterior("x", width=6, seed=2)
    assert found == model.generate("x", "smc", width=6, seed=2).posterior and len(found.particles) == 6
    with pytest.raises(ConfigError, match="the rule particles"):
        model.posterior("x", "bon")
    assert model.generate("x", "base").posterior is None
    model.add_value("broken", lambda p, r: 1 / 0)
    with pytest.raises(GenerationError, match="broken raised ZeroDivisionError"):
        model.posterior("x", select="broken")
