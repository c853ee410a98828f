"""Guided speculative chunks (RSD, GSI): by hand with a fake engine, by enumeration, and what they cost with tiny models."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest

from ivg import GuidedModel
from ivg.errors import ConfigError
from ivg.search.methods import get_method
from ivg.search.request import Request, Search, Speculation
from ivg.search.searcher import Searcher
from ivg.search.speculation import acceptance
from ivg.search.unused import unused_settings
from ivg.testing import AsyncFakeEngine, FakeEngine, tiny_lm, tiny_value
from ivg.types import Engine, Prompt, SamplingParams
from ivg.values.base import FunctionValue
from ivg.values.implicit import ImplicitValue

pytestmark = pytest.mark.numerics

DRAFTER = FunctionValue(lambda p, r: 0.0, "drafter")


def run(engine, search, count=1, **sampling):
    settings = SamplingParams(**{"max_new_tokens": 6, "ignore_eos": True, **sampling})
    found = dict(Searcher(engine).run(Request(Prompt("p"), search, settings, seed) for seed in range(count)))
    return [found[i] for i in range(count)]


def speculative(value, **settings):
    shape = {name: settings.pop(name) for name in ("successors", "chunk_length") if name in settings}
    return Search(value=FunctionValue(lambda p, r: value(r)), speculation=Speculation(DRAFTER, **settings), **shape)


def test_acceptance_by_hand():
    step = Speculation(DRAFTER, accept_scale=2.0)
    assert [acceptance(step, v, 0.7) for v in (0.69, 0.7, 5.0, -math.inf)] == [0, 1, 1, 0]
    clip = replace(step, acceptance="clip")
    assert [acceptance(clip, v, 1.0) for v in (0.0, 1.0, 1.5, 3.0, 9.0)] == pytest.approx([0, 0, 0.25, 1, 1])
    sigmoid = replace(step, acceptance="sigmoid")
    assert acceptance(sigmoid, 1.0, 1.0) == pytest.approx(0.5)
    assert acceptance(sigmoid, 3.0, 1.0) == pytest.approx(1 / (1 + math.exp(-1)))
    assert acceptance(sigmoid, -1e9, 0.0) == acceptance(sigmoid, -math.inf, 0.0) == 0


def test_rsd_by_hand():
    """The draft model writes a's and the base b's. aa is worth 1, aaaa too little, aabb + aa too, and the threshold is 0.5."""
    worth = {"aa": 1.0, "aaaa": 0.4, "aabb": -3.0, "aabbaa": 0.5}
    engine = FakeEngine("ab", lambda t: [0, 1, 0], lambda t: [1, 0, 0])
    search = speculative(worth.__getitem__, chunk_length=2, accept_threshold=0.5)
    (done,) = run(engine, search)
    assert (done.text, done.score) == ("aabbaa", 0.5)
    assert done.usage.forward_tokens == {"draft": 6, "fake": 2}  # three drafts, one of them refused, and one chunk of the base
    assert done.usage.drafted_tokens == 4
    assert engine.held == set()


def test_the_threshold_is_the_value_of_the_prompt():
    worth = {"": 2.0, "a": 1.9, "b": -1.0, "ba": 2.0}
    engine = FakeEngine("ab", lambda t: [0, 1, 0], lambda t: [1, 0, 0])
    (done,) = run(engine, speculative(worth.__getitem__, chunk_length=1), max_new_tokens=2)
    assert done.text == "ba"


def test_where_all_drafts_are_refused_the_base_writes_as_ever():
    engine = FakeEngine("abcdef", None, lambda t: [9, 1, 1, 1, 1, 1, 1])
    search = speculative(len, chunk_length=3, accept_threshold=1e6)
    for length, ignore in itertools.product((3, 20), (True, False)):
        plain = run(engine, Search(), 20, max_new_tokens=40, ignore_eos=ignore)
        got = run(engine, replace(search, chunk_length=length), 20, max_new_tokens=40, ignore_eos=ignore)
        assert [c.text for c in got] == [c.text for c in plain]
        assert [c.finish_reason for c in got] == [c.finish_reason for c in plain]
    assert engine.held == set()


def test_refused_drafts_do_not_shape_what_the_base_writes():
    """Drafts that begin with a are refused; were base and draft drawn by the same numbers, the base could not write a then."""
    engine = FakeEngine("ab", lambda t: [1, 1, 0], lambda t: [1, 1, 0])
    search = speculative(lambda r: -1.0 if r == "a" else 1.0, chunk_length=1, accept_threshold=0.0)
    texts = Counter(c.text for c in run(engine, search, 4000, max_new_tokens=1))
    assert texts["a"] / 4000 == pytest.approx(0.25, abs=4 * math.sqrt(0.19 / 4000))


def test_drafts_end_at_steps():
    """Chunks that end at a comma, as the steps of RSD end at a blank line."""
    engine = FakeEngine("a,", lambda t: [0, 1, 0], lambda t: [1, 0, 0] if t[-2:] in ("", ",", "a,") else [0, 1, 0])
    asked = []

    def worth(text):
        asked.append(text)
        return 0.0

    (done,) = run(engine, replace(speculative(worth, chunk_length=5, accept_threshold=0.0), chunk_until=","), max_new_tokens=7)
    assert asked == ["a,", "a,a,", "a,a,a,", "a,a,a,a"]
    assert done.text == "a,a,a,a"


BASE, DRAFT = [3, 1, 0], [1, 1, 0]
WORTH = {"a": 0.2, "b": 0.9}


def tilted(letter, scale):
    """r + scale * (log pi_base - log pi_draft)."""
    place = "ab".index(letter)
    return WORTH[letter] + scale * math.log(BASE[place] / sum(BASE) / (DRAFT[place] / sum(DRAFT)))


def gsi(count, scale, threshold, *, tilt=True):
    """The distribution of one letter: every set of drafts and every set of the base's letters."""

    def drawn(weights, score):
        out = Counter()
        for letters in itertools.product("ab", repeat=count):
            chance = math.prod(weights["ab".index(x)] / sum(weights) for x in letters)
            soft = [math.exp(score(x) / scale) for x in letters]
            for x, w in zip(letters, soft, strict=True):
                out[x] += chance * w / sum(soft)
        return out

    score = (lambda x: tilted(x, scale)) if tilt else WORTH.__getitem__
    drafts, written = drawn(DRAFT, score), drawn(BASE, WORTH.__getitem__)
    kept = {x: p for x, p in drafts.items() if score(x) >= threshold}
    return {x: kept.get(x, 0.0) + (1 - sum(kept.values())) * written[x] for x in "ab"}


@pytest.mark.parametrize(
    "count,scale,threshold,tilt",
    [(1, 0.5, 0.5, True), (3, 0.5, 0.5, True), (2, 1.0, -9.0, True), (4, 0.1, 0.3, True), (2, 0.3, 0.5, False), (1, 1.0, 9.0, True)],
)
def test_gsi_by_enumeration(count, scale, threshold, tilt):
    assert tilted("a", 0.5) == pytest.approx(0.2 + 0.5 * math.log(1.5))
    assert tilted("b", 0.5) == pytest.approx(0.9 + 0.5 * math.log(0.5))
    engine = FakeEngine("ab", lambda t: BASE, lambda t: DRAFT)
    search = speculative(WORTH.__getitem__, successors=count, chunk_length=1, soft_scale=scale, accept_threshold=threshold, tilt=tilt)
    runs = 2000
    texts = Counter(c.text for c in run(engine, search, runs, max_new_tokens=1))
    expected = gsi(count, scale, threshold, tilt=tilt)
    assert sum(expected.values()) == pytest.approx(1)
    assert texts["a"] / runs == pytest.approx(expected["a"], abs=4 * math.sqrt(expected["a"] * expected["b"] / runs))


def test_many_tilted_drafts_are_draws_from_the_target():
    """All drafts kept: the letters of two chunks of two follow pi_base * exp(r / scale), whatever the draft model; untilted ones do not."""
    worth = {"".join(x): 0.3 * i for i, x in enumerate(itertools.product("ab", repeat=2))}
    base, draft = (lambda t: [1, 3, 0] if t.endswith("a") else [2, 1, 0]), lambda t: [1, 1, 0]
    engine, runs = FakeEngine("ab", base, draft), 600
    mass = {t: base("")["ab".index(t[0])] / 3 * base(t[0])["ab".index(t[1])] / sum(base(t[0])) * math.exp(worth[t] / 0.5) for t in worth}
    expected = {t: m / sum(mass.values()) for t, m in mass.items()}

    def chi(*, tilt):
        search = speculative(worth.__getitem__, successors=50, chunk_length=2, soft_scale=0.5, accept_threshold=-1e9, tilt=tilt)
        counts = Counter(c.text for c in run(engine, search, runs, max_new_tokens=2))
        return sum((counts[t] - runs * p) ** 2 / (runs * p) for t, p in expected.items())

    assert chi(tilt=True) < 3 + 4 * math.sqrt(6)
    assert chi(tilt=False) > 100


def test_drafts_that_the_base_never_writes_are_refused():
    engine = FakeEngine("ab", lambda t: [0, 1, 0], lambda t: [1, 0, 0])
    search = speculative(len, successors=3, chunk_length=2, accept_threshold=-1e9, tilt=True)
    (done,) = run(engine, search)
    assert done.text == "bbbbbb"
    assert done.usage.forward_tokens == {"draft": 18, "fake": 18}
    assert done.usage.drafted_tokens == 0


@pytest.mark.parametrize("kind", [FakeEngine, AsyncFakeEngine])
def test_rounds_and_company_change_nothing(monkeypatch, kind):
    from ivg.search import searcher as module

    search = speculative(lambda r: r.count("a"), successors=2, chunk_length=7, acceptance="sigmoid", tilt=True, soft_scale=0.3)
    texts = set()
    for quantum in (1, 3, 16):
        monkeypatch.setattr(module, "QUANTUM", quantum)
        engine = kind("abc", lambda t: [1, 2, 1, 0.2], lambda t: [2, 1, 1, 0.1])
        together = run(engine, search, 6, max_new_tokens=30, ignore_eos=False, stop=("cc",))
        alone = [c.text for c in (run(engine, search, i + 1, max_new_tokens=30, ignore_eos=False, stop=("cc",))[i] for i in range(3))]
        assert alone == [c.text for c in together][:3]
        assert not any("cc" in c.text for c in together)
        texts.add(tuple((c.text, c.finish_reason, c.usage.drafted_tokens) for c in together))
        assert engine.held == set()
    assert len(texts) == 1
    assert len({t for t, _, _ in texts.pop()}) == 6


# Tiny models


@pytest.fixture(scope="module")
def model():
    pair = ImplicitValue(tiny_lm("tuned", seed=2), tiny_lm("untuned", seed=3))
    return GuidedModel(tiny_lm("base", seed=1), {"implicit": pair, "explicit": tiny_value("vocabulary", seed=5)})


PROMPT = "The movie was"
SHORT = {"max_new_tokens": 24, "ignore_eos": True, "chunk_length": 6}


def test_cost_by_hand(model):
    """p prompt tokens, n of response. The base reads nothing where all is kept; else each token once, and a pass of its own for what it
    writes alone."""
    p, n = len(PROMPT), 24
    kept = model.generate(PROMPT, "rsd", accept_threshold=-1e6, **SHORT)
    assert kept.usage.forward_tokens == {"tuned": p + n - 1, "explicit": p + n - 1} and kept.usage.drafted_tokens == n
    refused = model.generate(PROMPT, "rsd", accept_threshold=1e6, **SHORT)
    assert refused.token_ids == model.generate(PROMPT, "base", max_new_tokens=n, ignore_eos=True).token_ids
    # the draft model reads prompt, each kept chunk, and of each of the four drafts all but the last token
    assert refused.usage.forward_tokens["tuned"] == p + 3 * 6 + 4 * 5
    assert refused.usage.forward_tokens["base"] == p + n - 1
    judged = model.generate(PROMPT, "gsi", accept_threshold=-1e6, successors=3, **SHORT)
    assert judged.usage.forward_tokens["base"] == p - 1 + 3 * n
    assert judged.usage.drafted_tokens == n


def test_fewer_passes_of_the_base_than_tokens(model, monkeypatch):
    passes, forward = [], model.reader.model.forward

    def counted(rows, new, keep):
        passes.append([len(piece) for piece in new])
        return forward(rows, new, keep)

    monkeypatch.setattr(model.reader.model, "forward", counted)
    mixed = {"accept_threshold": 2.0, "acceptance": "sigmoid"}
    for seed in range(4):
        passes.clear()
        done = model.generate(PROMPT, "rsd", seed=seed, **mixed, **SHORT)
        written = 24 - done.usage.drafted_tokens
        assert len(passes) <= written
        assert done.usage.forward_tokens.get("base", 0) <= len(PROMPT) + 23
    assert 0 < written < 24


def test_greedy(model):
    """At temperature 0 a tilted draft is kept only where the base writes the same; an untilted one is the draft model's greedy text."""
    greedy = {"temperature": 0, **SHORT}
    plain = model.generate(PROMPT, "base", temperature=0, max_new_tokens=24, ignore_eos=True)
    assert model.generate(PROMPT, "gsi", accept_threshold=-1e6, **greedy).token_ids == plain.token_ids
    own = GuidedModel(model.values["implicit"].tuned.sharing("base"))
    drafted = model.generate(PROMPT, "rsd", accept_threshold=-1e6, **greedy)
    assert drafted.token_ids == own.generate(PROMPT, "base", temperature=0, max_new_tokens=24, ignore_eos=True).token_ids
    assert drafted.token_ids != plain.token_ids


def test_filters_are_part_of_both_distributions(model):
    """The likeliest token of the draft model alone, and of the base alone: no draft of another token than the base's is kept."""
    plain = model.generate(PROMPT, "base", top_k=1, max_new_tokens=24, ignore_eos=True)
    done = model.generate(PROMPT, "gsi", accept_threshold=-1e6, top_k=1, **SHORT)
    assert done.token_ids == plain.token_ids
    free = model.generate(PROMPT, "gsi", accept_threshold=-1e6, suppress_tokens=(plain.token_ids[0],), **SHORT)
    assert plain.token_ids[0] not in free.token_ids and free.usage.drafted_tokens


def test_a_base_of_its_own_drafts_has_no_tilt(model):
    """Draft model and base are one network: every log-ratio is 0, so all chunks are kept from a threshold that all reach."""
    own = GuidedModel(
        model.reader, {"implicit": ImplicitValue(model.reader.sharing("tuned"), model.values["implicit"].untuned), "flat": lambda p, r: 0.0}
    )
    done = own.generate(PROMPT, "gsi", select="flat", accept_threshold=-1e-3, soft_scale=1.0, **SHORT)
    assert done.usage.drafted_tokens == 24
    assert own.generate(PROMPT, "gsi", select="flat", accept_threshold=1e-3, soft_scale=1.0, **SHORT).usage.drafted_tokens == 0


def test_nan_of_the_draft_model_ends_the_request():
    import torch

    broken = tiny_lm("tuned", seed=2)
    with torch.no_grad():
        broken.network.lm_head.weight.fill_(torch.nan)
    model = GuidedModel(tiny_lm("base", seed=1), {"implicit": ImplicitValue(broken, tiny_lm("untuned", seed=3)), "flat": lambda p, r: 0.0})
    done = model.generate(PROMPT, "rsd", select="flat", **SHORT)
    assert done.error == "the draft model tuned gave NaN after 0 tokens"
    assert model.reader.model.live_rows == broken.model.live_rows == 0


# What is refused


@pytest.mark.parametrize(
    "settings,match",
    [
        ({"width": 2}, "width"),
        ({"token": "implicit"}, "token"),
        ({"select": "none"}, "value to select by"),
        ({"decay": 0.5}, "decay"),
        ({"original": True}, "original"),
        ({"guide_after": "x"}, "guide_after"),
        ({"acceptance": "always"}, "acceptance"),
        ({"accept_threshold": math.nan}, "accept_threshold"),
        ({"drafter": ""}, "drafter"),
        ({"soft_scale": 0.0}, "soft_scale"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_impossible_settings_are_errors(settings, match):
    with pytest.raises(ConfigError, match=match):
        get_method("rsd", **settings)


def test_impossible_searches_are_refused(model):
    with pytest.raises(ConfigError, match="has no model that can write drafts"):
        model.generate(PROMPT, "rsd", drafter="explicit")
    with pytest.raises(ConfigError, match="needs the value missing"):
        model.generate(PROMPT, "rsd", drafter="missing")
    with pytest.raises(ConfigError, match="logprobs"):
        model.request(PROMPT, "rsd", alternatives=2)
    with pytest.raises(ConfigError, match="one selection rule"):
        Searcher(FakeEngine()).add(Request(Prompt("p"), replace(speculative(len), rule="soft")))
    with pytest.raises(ConfigError, match="needs a value"):
        Searcher(FakeEngine()).add(Request(Prompt("p"), replace(speculative(len), value=None)))


def test_other_engines_refuse():
    class Plain(FakeEngine):
        check_drafter = Engine.check_drafter

    with pytest.raises(ConfigError, match="the engine fake runs the base alone"):
        Searcher(Plain()).add(Request(Prompt("p"), speculative(len)))


def test_settings_without_effect_are_named():
    assert unused_settings("rsd", {"soft_scale": 2.0, "accept_scale": 2.0, "tilt": True}) == {}
    assert unused_settings("bon", {"drafter": "arm"}) == {"drafter": "it belongs to rule=speculate"}
    assert unused_settings("bon", {"soft_scale": 2.0}) == {"soft_scale": "it belongs to rule=soft or speculate"}
