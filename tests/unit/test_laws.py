"""The laws of ivg.testing hold for our own values and engines, and fail for those that break them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ivg.engines.transformers.engine import TransformersEngine
from ivg.engines.vllm.value import VLLMGuide
from ivg.errors import ConfigError
from ivg.testing import (
    AsyncFakeEngine,
    FakeEngine,
    byte_tokenizer,
    check_batch_invariance,
    check_cache,
    check_chunks,
    check_drafter,
    check_engine,
    check_engine_batch,
    check_inherit_cache,
    check_linearity,
    check_outputs_are_kept,
    check_token_sum,
    check_unsupported,
    check_value,
    check_value_life_cycle,
    check_vocabulary,
    hypothesis,
    tiny_lm,
    tiny_value,
)
from ivg.types import Prompt, Value
from ivg.values.base import CompositeValue, FunctionValue, WorstCaseValue, as_value
from ivg.values.implicit import AutoregressiveReward, ImplicitValue
from ivg.values.reward import RewardModel

PROMPTS = [Prompt("The movie"), Prompt("What a long prompt that is")]


@pytest.fixture(scope="module")
def chains():
    base, out = tiny_lm("base", seed=1), []
    for prompt, text in (("The movie", " was fine"), ("I", " x, y"), ("What", " a long answer")):
        chain, parent = [], None
        for cut in (2, 4, len(text)):
            parent = hypothesis(prompt, text[:cut], base, parent)
            chain.append(parent)
        out.append(chain)
    return out


def pair(**settings):
    return ImplicitValue(tiny_lm("tuned", seed=2, **settings), tiny_lm("untuned", seed=3, **settings))


def reward_model():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    torch.manual_seed(1)
    config = DistilBertConfig(vocab_size=257, dim=16, hidden_dim=32, n_layers=1, n_heads=2, num_labels=1, max_position_embeddings=128)
    return RewardModel(DistilBertForSequenceClassification(config), byte_tokenizer())


VALUES = {
    "function": lambda: FunctionValue(lambda p, r: len(p) - len(r)),
    "implicit": pair,
    "implicit, other tokens": lambda: pair(tokenizer=byte_tokenizer([("a", "n"), ("Ġ", "b")])),
    "vocabulary head": lambda: tiny_value("vocabulary", seed=4),
    "scalar head": lambda: tiny_value("scalar", seed=5),
    "arm": lambda: AutoregressiveReward(tiny_lm("arm", seed=6)),
    "reward": reward_model,
    "composite": lambda: CompositeValue([(2.0, pair()), (-0.5, tiny_value("vocabulary", seed=4))]),
    "composite, scores only": lambda: CompositeValue([(2.0, pair()), (1.0, FunctionValue(lambda p, r: len(r)))]),
    "worst case": lambda: WorstCaseValue([(2.0, pair()), (-0.5, tiny_value("vocabulary", seed=4))], reference=[0.5, 0.0]),
    "composite of none": lambda: CompositeValue([]),
    "guide inside vLLM": lambda: VLLMGuide("implicit", pair),
}


@pytest.mark.parametrize("name", VALUES)
def test_every_value_obeys_the_laws(name, chains):
    check_value(VALUES[name], chains)


def test_special_laws(chains):
    ends = [chain[-1] for chain in chains]
    check_token_sum(pair(), ends)
    check_linearity(VALUES["composite"](), ends)


@pytest.mark.parametrize("make", [FakeEngine, AsyncFakeEngine, lambda: TransformersEngine(tiny_lm("base"))])
def test_every_engine_obeys_the_laws(make):
    check_chunks(make(), PROMPTS[0])
    check_engine(make(), PROMPTS)


class Faulty(Value):
    """Breaks one promise."""

    name = "faulty"

    def __init__(self, fault):
        self.fault, self.calls, self.inherited = fault, 0, set()

    def score(self, hypotheses):
        self.calls += 1
        bonus = {"batch": len(hypotheses), "calls": self.calls}.get(self.fault, 0)
        stale = {h.key for h in hypotheses if self.fault == "inherit" and h.key in self.inherited}
        return [float(len(h.text) + bonus + (h.key in stale)) for h in hypotheses]

    def inherit_cache(self, hypotheses):
        self.inherited |= {h.key for h in hypotheses}

    def deltas(self, hypotheses):
        return torch.zeros(len(hypotheses), 3) if self.fault == "deltas" else super().deltas(hypotheses)

    def restart(self):
        return self.fault == "restart"


LAWS = {
    "batch": lambda make, chains: check_batch_invariance(make(), [c[-1] for c in chains]),
    "calls": lambda make, chains: check_cache(make, chains),
    "inherit": check_inherit_cache,
    "deltas": lambda make, chains: check_vocabulary(make(), [c[-1] for c in chains]),
    "restart": lambda make, chains: check_value_life_cycle(make(), [c[-1] for c in chains]),
}


@pytest.mark.parametrize("fault", LAWS)
def test_a_value_that_breaks_a_law_is_found(fault, chains):
    LAWS[fault](lambda: Faulty("none"), chains)
    with pytest.raises(AssertionError):
        LAWS[fault](lambda: Faulty(fault), chains)


def test_a_pair_that_does_not_truncate_is_found(chains):
    class Forgetful(ImplicitValue):
        def truncate(self, hypotheses):
            pass

    ends = [chain[-1] for chain in chains]
    with pytest.raises(AssertionError, match="after truncate"):
        check_drafter(Forgetful(tiny_lm("tuned", seed=2), tiny_lm("untuned", seed=3)), ends)


def test_an_extend_that_loses_outputs_of_others_is_found():
    """As VLLMEngine's once did: it collected the outputs of all requests, and returned those of its own."""

    class Losing(AsyncFakeEngine):
        def extend(self, requests):
            self.submit(requests)
            wanted, found = {r.beam.key for r in requests}, {}
            while not wanted <= set(found):
                found |= {output.beam: output.children for output in self.collect() if output.done}
            return [found[r.beam.key] for r in requests]

    for seed in range(5):  # which request ends first is random
        engine = AsyncFakeEngine()
        engine.rounds = seed
        check_outputs_are_kept(engine, PROMPTS)
    with pytest.raises(AssertionError, match="extend lost"):
        for seed in range(5):
            engine = Losing()
            engine.rounds = seed
            check_outputs_are_kept(engine, PROMPTS, limit_seconds=0.5)  # what is lost never comes


def test_engines_that_break_a_law_are_found():
    class Unseeded(FakeEngine):
        def extend(self, requests):
            return super().extend([replace(r, seed=len(self.calls)) for r in requests])

    with pytest.raises(AssertionError, match="alone"):
        check_engine_batch(Unseeded(), PROMPTS)

    class Misspelt(FakeEngine):
        unsupported = {"top_q": "leave it out"}  # noqa: RUF012

    with pytest.raises(AssertionError, match="top_q"):
        check_unsupported(Misspelt(), PROMPTS[0])


def test_defaults_of_the_base_classes():
    """What is optional does nothing, or says what is missing."""

    class Short(Value):
        name = "short"

        def score(self, hypotheses):
            return [-float(len(h.text)) for h in hypotheses]

    value = Short()
    assert value.vocabulary is None and value.drafter(1.0) is None and not value.full_vocabulary() and not value.restart()
    assert value.cached_lms() == value.networks() == []
    with pytest.raises(ConfigError, match="short needs a vocabulary head"):
        value.deltas([])
    with pytest.raises(TypeError, match="abstract"):
        Value()


def test_functions_and_old_objects_become_values():
    class Old:
        def score(self, hypotheses):
            return [1.0] * len(hypotheses)

        def check(self, prompt, new_tokens):
            pass

        def release(self, keys):
            pass

    own = FunctionValue(lambda p, r: 0.0)
    assert as_value(own, "own") is own
    assert as_value(lambda p, r: 0.5, "half").judge([(Prompt("a"), "b")]) == [0.5]
    with pytest.warns(DeprecationWarning, match=r"Old should derive from ivg\.Value"):
        old = as_value(Old(), "old")
    assert (old.name, old.score([1, 2]), old.restart()) == ("old", [1.0, 1.0], False)
    with pytest.raises(ConfigError, match=r"three is a int\n  expected an ivg\.Value"):
        as_value(3, "three")
