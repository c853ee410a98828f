"""Penalties, biases, forbidden words and further ends, against transformers' processors and ``generate``, alone and under guidance."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

import architectures
from ivg.engines.transformers.processors import process_logits
from ivg.errors import ConfigError
from ivg.model import GuidedModel
from ivg.models.cached_lm import CachedLM
from ivg.models.runner import ModelRunner
from ivg.settings.recipe import Recipe
from ivg.testing import byte_tokenizer, tiny_lm, tiny_value
from ivg.types import SamplingParams
from ivg.types.completion import Completion, likeliest
from ivg.values.implicit import ImplicitValue

pytestmark = pytest.mark.numerics

PROMPT, LENGTH = "abc abc", 24
GREEDY = {"temperature": 0, "max_new_tokens": LENGTH}


class Counts(LogitsProcessor):
    """OpenAI's formula: z - count * frequency - (count > 0) * presence, over the response."""

    def __init__(self, prompt, frequency, presence):
        self.prompt, self.frequency, self.presence = prompt, frequency, presence

    def __call__(self, input_ids, scores):
        counts = torch.stack([torch.bincount(row[self.prompt :], minlength=scores.shape[1]) for row in input_ids])
        return scores - counts * self.frequency - (counts > 0) * self.presence


class Behind(LogitsProcessor):
    """A processor that sees the response alone."""

    def __init__(self, inner, prompt):
        self.inner, self.prompt = inner, prompt

    def __call__(self, input_ids, scores):
        return self.inner(input_ids[:, self.prompt :], scores)


@pytest.fixture(scope="module")
def model():
    tokens = byte_tokenizer([("a", "n"), ("t", "h"), ("Ġ", "a"), ("e", "r")])
    pair = ImplicitValue(tiny_lm("tuned", seed=1, tokenizer=tokens), tiny_lm("untuned", seed=2, tokenizer=tokens))
    base = tiny_lm("base", tokenizer=tokens)
    return GuidedModel(base, {"implicit": pair, "explicit": tiny_value(seed=3, tokenizer=tokens)}, SamplingParams(max_new_tokens=LENGTH))


def recurrent():
    """A base with transformers' own cache for each row."""
    network, tokens = architectures.tiny("mamba").eval(), byte_tokenizer()
    return GuidedModel(CachedLM(ModelRunner(network, "base"), tokens))


def by_generate(network, ids, processors, eos, **more):
    found = network.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=LENGTH,
        eos_token_id=eos,
        pad_token_id=0,
        logits_processor=LogitsProcessorList(processors),
        **more,
    )
    return found[0, len(ids) :].tolist()


def cases(model, ids):
    """By name: our settings, transformers' processors for the same, and what ends the response."""
    (done,) = model.generate([PROMPT], "base", **GREEDY)
    plain = list(done.token_ids)
    often, words = plain[len(plain) // 2], ["the", "an", *{c for c in done.text if c.isascii() and c.isprintable()} - {" "}]
    spelled = [list(s) for s in model.base.vocabulary.word_ids(words)]
    bias = {plain[0]: -7.0, plain[1]: 3.5, 5: 40.0}
    return {
        "frequency": ({"frequency_penalty": 1.7}, [Counts(len(ids), 1.7, 0)], [0]),
        "reward of frequency": ({"frequency_penalty": -0.9}, [Counts(len(ids), -0.9, 0)], [0]),
        "presence": ({"presence_penalty": 2}, [Counts(len(ids), 0, 2)], [0]),
        "bias": ({"logit_bias": bias}, [SequenceBiasLogitsProcessor([[[t], b] for t, b in bias.items()])], [0]),
        "all": (
            {"logit_bias": bias, "repetition_penalty": 1.2, "frequency_penalty": 0.4, "presence_penalty": 0.6},
            [
                SequenceBiasLogitsProcessor([[[t], b] for t, b in bias.items()]),
                RepetitionPenaltyLogitsProcessor(1.2),
                Counts(len(ids), 0.4, 0.6),
            ],
            [0],
        ),
        "bad words": ({"bad_words": words}, [Behind(NoBadWordsLogitsProcessor(spelled), len(ids))], [0]),
        "further end": ({"stop_token_ids": [often]}, [], [0, often]),
        "not before": (
            {"stop_token_ids": [plain[3]], "min_tokens": 9},
            [MinNewTokensLengthLogitsProcessor(len(ids), 9, [0, plain[3]])],
            [0, plain[3]],
        ),
    }


NAMES = ["frequency", "reward of frequency", "presence", "bias", "all", "bad words", "further end", "not before"]


def ours(settings):
    return {**GREEDY, **{"min_new_tokens" if name == "min_tokens" else name: value for name, value in settings.items()}}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cache", ["slots", "states"])
def test_greedy_base_is_generate_with_transformers_processors(model, cache, name):
    model = model if cache == "slots" else recurrent()
    ids = model.base.tokenizer(PROMPT).input_ids
    settings, processors, eos = cases(model, ids)[name]
    (got,) = model.generate([PROMPT], "base", **ours(settings))
    assert list(got.token_ids) == by_generate(model.base.network, ids, processors, eos)
    (plain,) = model.generate([PROMPT], "base", **GREEDY)
    assert got.token_ids != plain.token_ids, "the setting changes nothing here"


@pytest.mark.parametrize("name", NAMES)
def test_under_guidance_they_act_on_the_mixed_logits(model, name):
    """Also for drafts, which must give the same greedy tokens, and across the borders of chunks."""
    pair = model.values["implicit"]
    networks = [m.network for m in (model.base, pair.tuned, pair.untuned)]
    ids = model.base.tokenizer(PROMPT).input_ids
    settings, processors, eos = cases(model, ids)[name]
    y = []
    with torch.no_grad():
        while len(y) < LENGTH and (not y or y[-1] not in eos):
            seen = torch.tensor([ids + y])
            z, t, u = (network(seen).logits[:, -1].float() for network in networks)
            y.append(int(LogitsProcessorList(processors)(seen, z + 1.5 * (t - u)).argmax()))
    sampling = ours(settings)
    assert list(model.generate(PROMPT, "eft", beta=1.5, **sampling).token_ids) == y
    assert list(model.generate(PROMPT, "eft", beta=1.5, draft=3, **sampling).token_ids) == y
    chunks = model.generate(PROMPT, "custom", token="implicit", select="explicit", beta=1.5, chunk_length=3, **sampling)
    assert list(chunks.token_ids) == y


def test_candidates_are_penalised_after_they_are_scored(model):
    """ARGS-like guidance: the penalty moves candidates among themselves, others stay forbidden."""
    value, base = model.values["explicit"], model.base
    ids = base.tokenizer(PROMPT).input_ids
    got = model.generate(PROMPT, "custom", token="explicit", candidates=5, beta=1.0, frequency_penalty=2.0, **GREEDY)
    y = []
    with torch.no_grad():
        while len(y) < len(got.token_ids):
            seen = torch.tensor([ids + y])
            z, v = base.network(seen).logits[0, -1].float(), value.network(seen).logits[0, -1].float()
            top = z.topk(5).indices
            mixed = torch.full_like(z, -torch.inf)
            mixed[top] = z[top] + v[top]
            y.append(int(Counts(len(ids), 2.0, 0)(seen, mixed[None]).argmax()))
    assert list(got.token_ids) == y


# Ends


def test_a_stop_token_is_no_text(model):
    plain = model.generate(PROMPT, "base", **GREEDY)
    stop = plain.token_ids[5]
    first = plain.token_ids.index(stop)
    got = model.generate(PROMPT, "base", stop_token_ids=[stop], alternatives=0, **GREEDY)
    assert (got.token_ids, got.finish_reason) == (plain.token_ids[: first + 1], "stop")
    assert got.text == model.base.vocabulary.response_text(model.base.tokenizer(PROMPT).input_ids, got.token_ids[:-1])
    assert got.details[-1].text == "" and got.details[-1].token == stop
    kept = model.generate(PROMPT, "base", stop_token_ids=[stop], ignore_eos=True, **GREEDY)
    assert kept.token_ids == got.token_ids


def test_a_value_that_reads_text_sees_no_stop_token(model):
    """A candidate that ends the response is scored as the response that it would end."""
    stop = model.base.tokenizer("an").input_ids[0]
    seen = set()
    model.add_value("text", lambda prompt, response: seen.add(response) or 0.0, replace=True)
    only = dict.fromkeys(model.base.tokenizer("anb").input_ids, 100.0)
    model.generate("x", "custom", token="text", candidates=257, logit_bias=only, stop_token_ids=[stop], max_new_tokens=1, temperature=0)
    assert "" in seen and "b" in seen and "an" not in seen


# Words


def test_words_are_spelled_alone_and_behind_a_space(model):
    vocabulary = model.base.vocabulary
    ids = model.base.tokenizer
    assert vocabulary.word_ids([" an", "an"]) == (tuple(ids("an").input_ids), tuple(ids(" an").input_ids))
    assert len(ids(" an").input_ids) > 1, "one of them is a sequence"
    got = model.generate(PROMPT, "base", n=20, seed=1, bad_words=["a"], temperature=1.5)
    assert not any("a" in [model.base.vocabulary.decode([t]) for t in c.token_ids] for c in got)


# Temperature, several answers


def test_a_temperature_near_zero_is_greedy(model):
    assert SamplingParams(temperature=1e-6).temperature == 0
    assert SamplingParams(temperature=0.01).temperature == 0.01
    found = [model.generate(PROMPT, "eft", max_new_tokens=LENGTH, temperature=t, seed=s).token_ids for t, s in ((0, 0), (1e-7, 1))]
    assert found[0] == found[1]


def test_best_of_returns_the_likeliest(model):
    every = model.generate(PROMPT, "eft", n=6, alternatives=0, seed=3, temperature=1.2)
    ranked = sorted(every, key=lambda c: -sum(d.logprob for d in c.details) / len(c.details))
    best = model.generate(PROMPT, "eft", n=2, best_of=6, seed=3, temperature=1.2)
    assert [c.token_ids for c in best] == [c.token_ids for c in ranked[:2]] != [c.token_ids for c in every[:2]]
    assert model.generate(PROMPT, "eft", best_of=6, seed=3, temperature=1.2).token_ids == ranked[0].token_ids
    lists = model.generate([PROMPT, "x"], "eft", n=1, best_of=6, seed=3, temperature=1.2)
    assert [len(some) for some in lists] == [1, 1] and lists[0][0].token_ids == ranked[0].token_ids
    with pytest.raises(ConfigError, match="best_of must be at least n"):
        model.generate(PROMPT, "eft", n=3, best_of=2)


def test_failed_samples_are_never_the_best():
    def done(logprob, error=None):
        detail = SimpleNamespace(logprob=logprob)
        return Completion("", (), None, "stop", SimpleNamespace(), error, details=(detail,))

    some = [done(-0.1, "broken"), done(-2.0), done(-1.0)]
    best, everything = likeliest(some, 1), likeliest(some, 3)
    assert [dataclasses.replace(c, notes=()) for c in best] == [some[2]] and [dataclasses.replace(c, notes=()) for c in everything] == some
    assert best[0].notes == ("best_of: 1 of 3 samples failed: broken",)


# Declared once


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"frequency_penalty": 2.1}, r"frequency_penalty must be in \[-2, 2\], got 2.1"),
        ({"presence_penalty": "much"}, "presence_penalty must be a finite number"),
        ({"logit_bias": {"x": 1}}, "logit_bias must be token ids"),
        ({"logit_bias": {3: 101}}, "logit_bias must be token ids"),
        ({"logit_bias": [(3, 1), (3, 2)]}, "logit_bias must be token ids, each once"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must be token ids, 0 or more"),
        ({"bad_words": [" "]}, "bad_words must be texts that are not blank"),
        ({"bad_words": "word"}, "bad_words must be a list of texts"),
    ],
)
def test_errors_name_the_setting(bad, message):
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**bad)


def test_ids_outside_the_vocabulary_are_refused(model):
    for settings in ({"stop_token_ids": [9999]}, {"logit_bias": {9999: 1}}):
        with pytest.raises(ConfigError, match="token id 9999, outside the base's vocabulary"):
            model.request(PROMPT, "base", **settings)


def test_a_recipe_has_them_by_openai_s_and_vllm_s_names():
    table = {"min_tokens": 4, "logit_bias": {"5": 1, "7": -2.5}, "stop_token_ids": [3], "bad_words": ["x y"], "presence_penalty": 1}
    made = SamplingParams(**Recipe(sampling=table).sampling.settings())
    assert made.changed == {
        "min_new_tokens": 4,
        "logit_bias": ((5, 1.0), (7, -2.5)),
        "stop_token_ids": (3,),
        "bad_words": ("x y",),
        "presence_penalty": 1,
    }


def test_what_looks_back_is_a_feature_of_its_own_in_chunks():
    """Engines that see one chunk at a time refuse it."""
    params = SamplingParams(frequency_penalty=1, bad_words=("x",), logit_bias={1: 1})
    assert params.features(chunked=False) == {"frequency_penalty", "bad_words", "logit_bias"}
    assert params.features(chunked=True) - params.features(chunked=False) == {"frequency_penalty in chunks", "bad_words in chunks"}


def test_rows_without_such_settings_are_not_copied(model):
    logits = torch.randn(2, 8)
    same, _ = process_logits(logits, [SamplingParams(), SamplingParams(stop_token_ids=[1])], lambda _: ((1,), ()), model.base.vocabulary)
    assert same is logits
