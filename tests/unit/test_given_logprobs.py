"""Log-probabilities of given responses, against logits computed without any cache and against enumeration."""

import math
from dataclasses import replace

import pytest
import torch

import naive
from architectures import tiny
from ivg import GuidedModel
from ivg.engines.transformers import teacher_forcing
from ivg.errors import ConfigError, ModelError, PromptError
from ivg.models.cached_lm import CachedLM
from ivg.models.runner import ModelRunner
from ivg.search.given import NEUTRAL, check_distribution, given_logprobs
from ivg.search.methods import get_method
from ivg.search.request import Search
from ivg.testing import FakeEngine, byte_tokenizer, tiny_lm, tiny_value
from ivg.types import Prompt, SamplingParams
from ivg.values.base import CompositeValue, FunctionValue
from ivg.values.implicit import AutoregressiveReward, ImplicitValue

pytestmark = pytest.mark.numerics
PROMPTS = ["Film", "The movie was", "Film"]
RESPONSES = [" was good", "bad", " é!"]
FOREIGN = byte_tokenizer(permute=True)


def make(kind="llama"):
    """A model with every kind of value."""
    tokens = byte_tokenizer()

    def lm(name, seed):
        if kind == "llama":
            return tiny_lm(name, seed=seed, tokenizer=tokens)
        return CachedLM(ModelRunner(tiny(kind, seed), name), tokens)

    pair = ImplicitValue(lm("tuned", 1), lm("untuned", 2))
    explicit = tiny_value(seed=3, tokenizer=tokens)
    values = {
        "implicit": pair,
        "explicit": explicit,
        "arm": AutoregressiveReward(lm("arm", 4)),
        "length": FunctionValue(lambda prompt, response: 0.3 * len(response) - response.count("e"), "length"),
        "scalar": tiny_value("scalar", seed=5, tokenizer=tokens, name="scalar"),
        "foreign": ImplicitValue(tiny_lm("t", seed=6, tokenizer=FOREIGN), tiny_lm("u", seed=7, tokenizer=FOREIGN), "foreign"),
        "sum": CompositeValue([(0.7, pair), (-0.4, explicit)], "sum"),
    }
    return GuidedModel(lm("base", 0), values)


@pytest.fixture(scope="module")
def model():
    return make()


class OfText(naive.VHead):
    """A value of the text of prompt and response."""

    def __init__(self, vocabulary, function):
        self.vocabulary, self.function = vocabulary, function

    def score(self, prompt, y):
        state = self.vocabulary.start_decoding(prompt)
        return self.function(self.vocabulary.decode(prompt), self.vocabulary.continue_text(y, state)[0])


class Foreign(naive.Implicit):
    """A pair with another vocabulary, which reads the text."""

    deltas = None

    def __init__(self, pair, vocabulary):
        super().__init__(pair.tuned.network, pair.untuned.network)
        self.text = OfText(vocabulary, self.of_text)

    def of_text(self, prompt, response):
        return super().score(*(list(FOREIGN(text, add_special_tokens=False).input_ids) for text in (prompt, response)))

    def score(self, prompt, y):
        return self.text.score(prompt, y)


class Sum:
    def __init__(self, *parts):
        self.parts = parts

    def deltas(self, prompt, y):
        return sum(weight * part.deltas(prompt, y) for weight, part in self.parts)


def naive_values(model):
    values, vocabulary = model.values, model.base.vocabulary
    pair = naive.Implicit(values["implicit"].tuned.network, values["implicit"].untuned.network)
    head = naive.QHead(values["explicit"].network)
    return {
        "implicit": pair,
        "explicit": head,
        "arm": naive.LogProb(values["arm"].model.network),
        "length": OfText(vocabulary, values["length"].function),
        "scalar": naive.VHead(values["scalar"].network),
        "foreign": Foreign(values["foreign"], vocabulary),
        "sum": Sum((0.7, pair), (-0.4, head)),
        "contrast": naive.Contrast(model.base.network, list(byte_tokenizer()("Be kind.\n\n").input_ids), []),
    }


def distribution(model, s, prompt, y, temperature=1.0):
    """(with guidance, without) behind ``y``: all log-probabilities."""
    z = naive.outputs(model.base.network, prompt + y)[-1]
    moved = naive.guided(z, s, naive_values(model)[s.token], prompt, y) if s.token and s.beta else z
    return (moved / temperature).log_softmax(-1), (z / temperature).log_softmax(-1)


METHODS = {
    "base": ("base", {}),
    "implicit": ("eft", {"beta": 0.5}),
    "no weight": ("eft", {"beta": 0.0}),
    "explicit": ("token-explicit", {"beta": 2.0}),
    "normalised": ("genarm", {}),
    "sum": ("custom", {"token": "sum"}),
    "plausible": ("contrastive-decoding", {}),
    "gated": ("eft", {"gate": 4.3}),
    "drafted": ("eft", {"draft": 3}),
    "contrast": ("contrast", {"contrast": "Be kind."}),
    "candidates": ("args", {"token": "implicit"}),
    "gated candidates": ("args", {"token": "explicit", "gate": 4.3}),
    "centred": ("vas", {}),
    "log-sigmoid": ("fudge", {}),
    "scalar": ("args", {"token": "scalar"}),
    "function": ("args", {"token": "length"}),
    "another vocabulary": ("custom", {"token": "foreign", "candidates": 6}),
}


def check(model, method, settings, temperature=1.0, tolerance=3e-4):
    more = {} if temperature == 1 else {"temperature": temperature}
    found = model.logprobs(PROMPTS, RESPONSES, method, alternatives=3, **settings, **more)
    s = get_method(method, **settings)
    for text, response, result in zip(PROMPTS, RESPONSES, found, strict=True):
        prompt, y = list(model.base.prompt_ids(Prompt(text))), list(result.token_ids)
        assert "".join(t.text for t in result.tokens) == response
        for i, token in enumerate(result.tokens):
            guided, base = distribution(model, s, prompt, y[:i], temperature)
            assert token.logprob == pytest.approx(float(guided[token.token]), abs=tolerance)
            assert token.base_logprob == pytest.approx(float(base[token.token]), abs=tolerance)
            own = guided[token.token]
            assert int((guided > own + tolerance).sum()) < token.rank <= int((guided >= own - tolerance).sum())
            assert [p for _, p in token.top] == pytest.approx([p for p in guided.topk(3).values.tolist() if p > -math.inf], abs=tolerance)
        assert result.logprob == sum(t.logprob for t in result.tokens)
    assert all(reader.model.live_rows == 0 for reader in model.readers)
    return found


@pytest.mark.parametrize(("method", "settings"), METHODS.values(), ids=METHODS)
def test_every_method_as_without_cache(model, method, settings):
    check(model, method, settings)


@pytest.mark.parametrize("kind", ["mamba", "qwen3_next"])
def test_networks_with_a_state(kind):
    check(make(kind), "eft", {})


def test_blocks_of_positions_change_nothing(model, monkeypatch):
    whole = model.logprobs(PROMPTS, RESPONSES, "eft")
    monkeypatch.setattr(teacher_forcing, "BLOCK_LOGITS", 257 * 3 * 4)
    for a, b in zip(whole, check(model, "eft", {}), strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    check(model, "fudge", {})


ENUMERATED = [{}, {"beta": 3.0}, {"candidates": 7}, {"temperature": 0.6}, {"top_k": 9, "top_p": 0.8}, {"min_p": 0.01}]


@pytest.mark.parametrize("settings", ENUMERATED, ids=str)
def test_by_enumeration(model, settings):
    """The probabilities of all responses of one token sum to 1; of two tokens to that of the first one."""
    tokens = range(257)
    first = model.logprobs(["Film"] * 257, [[i] for i in tokens], "eft", **settings)
    assert sum(math.exp(r.logprob) for r in first) == pytest.approx(1, abs=1e-4)
    best = max(tokens, key=lambda i: first[i].logprob)
    mixed = {k: v for k, v in settings.items() if k in ("beta", "candidates")}
    greedy = model.generate("Film", "eft", max_new_tokens=1, temperature=0.0, **mixed)
    assert [i for i in tokens if first[i].is_greedy] == [best] == list(greedy.token_ids)
    if settings:
        return
    pairs = model.logprobs(["Film"] * 257, [[best, i] for i in tokens], "eft", **settings)
    assert sum(math.exp(r.logprob) for r in pairs) == pytest.approx(math.exp(first[best].logprob), rel=1e-4)


def test_as_the_completion_that_was_drawn(model):
    drawn = model.generate(PROMPTS, "eft", alternatives=2, max_new_tokens=20, seed=3, temperature=1.0)
    found = model.logprobs(PROMPTS, [c.token_ids for c in drawn], "eft", alternatives=2)
    for completion, result in zip(drawn, found, strict=True):
        assert [t.token for t in completion.details] == list(result.token_ids)
        assert [t.text for t in completion.details] == [t.text for t in result.tokens]
        assert [t.logprob for t in completion.details] == pytest.approx([t.logprob for t in result.tokens], abs=1e-4)
        assert [t.base_logprob for t in completion.details] == pytest.approx([t.base_logprob for t in result.tokens], abs=1e-4)


def test_defaults_of_sampling_do_not_count_and_settings_do():
    model = make()
    model.sampling = SamplingParams(
        temperature=0.3, top_k=2, exponential_decay_length_penalty=(0, 1.5), forced_bos_token_id=5, forced_eos_token_id=(7,), regex="[ab]+"
    )
    check(model, "eft", {})
    assert model.logprobs("F", "é", "base", temperature=None).logprob > -math.inf
    check(model, "eft", {}, temperature=0.7)
    plain, top = (model.logprobs("Film", "abc", "base", **s) for s in ({}, {"top_k": 2}))
    assert plain.logprob > -math.inf == top.logprob
    biased = model.logprobs("Film", [5], "base", sequence_bias=((((5,)), 2.0),), suppress_tokens=(6,))
    z = naive.outputs(model.base.network, list(model.base.prompt_ids(Prompt("Film"))))[-1]
    z[5], z[6] = z[5] + 2, -math.inf
    assert biased.logprob == pytest.approx(float(z.log_softmax(-1)[5]), abs=1e-4)


def test_every_model_reads_once(model):
    model.reset_caches()
    passes, runners = [], {reader.model: reader.model.name for reader in model.readers}
    for runner, name in runners.items():
        runner.before_pass = lambda name=name: passes.append(name)
    model.logprobs("The movie was", "x" * 40, "eft")
    for runner in runners:
        runner.before_pass = None
    assert sorted(passes) == ["base", "tuned", "untuned"]


def test_many_responses_to_one_prompt(model):
    responses = [chr(97 + i % 26) * (1 + i % 5) for i in range(70)]
    together = model.logprobs(["The movie was"] * 70, responses, "eft")
    for i in (0, 33, 69):
        alone = model.logprobs("The movie was", responses[i], "eft")
        assert together[i].logprob == pytest.approx(alone.logprob, abs=1e-4)


def test_tokens_that_are_given_with_the_end(model):
    text = model.logprobs("Film", "ab", "eft")
    ended = model.logprobs("Film", [*text.token_ids, 0], "eft")
    assert ended.token_ids == (*text.token_ids, 0)
    assert ended.tokens[2].text == ""
    assert ended.logprob == pytest.approx(text.logprob + ended.tokens[2].logprob, abs=1e-4)
    assert model.logprobs("Film", "", "eft").logprob == 0 == len(model.logprobs("Film", [], "eft").tokens)


def test_conversations():
    chat = GuidedModel(tiny_lm("base", tokenizer=byte_tokenizer(chat=True)))
    turns = [{"role": "user", "content": "Hi"}]
    found = chat.logprobs([turns, turns], ["a", "b"], "base")
    prompt = list(chat.base.prompt_ids(Prompt.of(turns)))
    logps = naive.outputs(chat.base.network, prompt)[-1].log_softmax(-1)
    assert [r.logprob for r in found] == pytest.approx([float(logps[r.token_ids[0]]) for r in found], abs=1e-4)
    alone = chat.logprobs(turns, "a", "base")
    assert alone.token_ids == found[0].token_ids and alone.logprob == pytest.approx(found[0].logprob, abs=1e-4)


REFUSED = [
    ("ivg", {}, "selects among 16 beams.*\n.*eft"),
    ("bon", {"select": "length"}, "selects among 16 beams"),
    ("cards", {}, "rule=reject selects chunks"),
    ("rsd", {}, "rule=speculate selects chunks"),
    ("eft-kl", {}, "kl_budget"),
    ("eft", {"temperature": 0.0}, "temperature above 0, got 0"),
    ("eft", {"stop": ["."]}, "stop is about where an answer ends"),
    ("eft", {"guide_after": "</think>"}, "leave guide_after out"),
    ("custom", {"token": "foreign"}, "another vocabulary can compare candidates as text"),
]


@pytest.mark.parametrize(("method", "settings", "message"), REFUSED, ids=str)
def test_refusals(model, method, settings, message):
    with pytest.raises(ValueError, match=message):
        model.logprobs("Film", "abc", method, **settings)


def test_texts_that_cannot_be_read(model):
    with pytest.raises(PromptError, match="2 prompts and 1 responses"):
        model.logprobs(["a", "b"], ["c"], "eft")
    with pytest.raises(PromptError, match="response token 999 is outside"):
        model.logprobs("a", [999], "eft")
    with pytest.raises(PromptError, match="expected text, or a list of token ids"):
        model.logprobs("a", [1.5], "eft")
    with pytest.raises(PromptError, match=r"300 given tokens, the last unread, .*\n.* at most 256 tokens"):
        model.logprobs("a", "x" * 300, "eft")


def test_nan_is_an_error():
    model = make()
    with torch.no_grad():
        model.values["explicit"].network.head.weight[5] = math.nan
    with pytest.raises(ModelError, match="token guidance gave NaN"):
        model.logprobs("a", "bc", "token-explicit")
    assert all(reader.model.live_rows == 0 for reader in model.readers)


def test_a_value_that_changes_deltas_alone_is_asked_for_them():
    class Doubled(ImplicitValue):
        def deltas(self, hypotheses):
            return 2 * super().deltas(hypotheses)

    model = make()
    pair = model.values["implicit"]
    model.add_value("double", Doubled(pair.tuned, pair.untuned))
    found, expected = (model.logprobs("Film", "abc", "custom", **s) for s in ({"token": "double"}, {"token": "implicit", "beta": 2.0}))
    assert found.logprob == pytest.approx(expected.logprob, abs=1e-4)


def test_engines_without_logits_refuse():
    model = GuidedModel(tiny_lm("base"), engine=FakeEngine())
    with pytest.raises(ConfigError, match="gives no log-probabilities of given texts"):
        model.logprobs("a", "b", "base")


def test_a_rule_of_ones_own_is_refused(model):
    request = replace(model.request("x", "base", temperature=1.0), search=Search(make_rule=lambda request: None))
    with pytest.raises(ConfigError, match="make_rule selects chunks"):
        check_distribution(request)


@pytest.mark.parametrize("alternatives", [-1, 1.5])
def test_alternatives_are_a_number_of_tokens(model, alternatives):
    with pytest.raises(ConfigError, match="alternatives"):
        model.logprobs("a", "b", "base", alternatives=alternatives)


def test_every_request_is_checked(model):
    greedy = model.request("x", "base", temperature=0.0)
    for requests in ([greedy, replace(greedy, sampling=NEUTRAL)], [replace(greedy, sampling=NEUTRAL), greedy]):
        with pytest.raises(ConfigError, match="temperature above 0"):
            given_logprobs(model.engine, model.lock, requests, [(5,), (5,)])
