"""What the engine over vLLM does with its requests, over a client without vLLM that answers one token a step."""

import json
import sys
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch

from ivg.engines.token_penalties import TokenPenalties
from ivg.engines.transformers.processors import process_logits
from ivg.engines.vllm.client import EngineOutput
from ivg.engines.vllm.engine import VLLMEngine
from ivg.engines.vllm.value import VLLMGuide
from ivg.errors import ConfigError
from ivg.models.prompt_encoder import PromptEncoder
from ivg.search.request import Request, Search
from ivg.search.searcher import Searcher
from ivg.testing import byte_tokenizer, check_children, check_outputs_are_kept
from ivg.types import ExpandRequest, LogprobsRequest, Prompt, SamplingParams, TokenGuidance

PROMPTS = [Prompt("The movie was"), Prompt("A long film")]


@dataclass
class OneTokenAStep:
    """Of an :class:`~ivg.engines.vllm.client.EngineClient`."""

    requests: dict[str, list] = field(default_factory=dict)
    added: int = 0
    looks_back: bool = True
    seen: list = field(default_factory=list)
    """Prompt and parameters of every request."""

    def add(self, token_ids, params):
        self.added += 1
        self.seen.append((token_ids, params))
        self.requests[str(self.added)] = [params, 0]
        return str(self.added)

    def step(self):
        found = []
        for number, request in list(self.requests.items()):
            params, drawn = request[0], request[1] + 1
            request[1] = drawn
            children, done = getattr(params, "n", 1), drawn == params.max_tokens
            if getattr(params, "allowed_token_ids", None):
                (token,), weight = params.allowed_token_ids, (params.extra_args or {}).get("ivg_beta.pair", 0.0)
                known = {token: -1.0 - weight, **{90 + i: -0.1 * i for i in range(params.logprobs)}}
                logprobs = [{i: SimpleNamespace(logprob=p) for i, p in known.items()}]
                output = SimpleNamespace(index=0, token_ids=[token], finish_reason="length", logprobs=logprobs)
                found.append(EngineOutput(SimpleNamespace(request_id=number, outputs=[output], finished=True), (3,)))
                del self.requests[number]
                continue
            outputs = [
                SimpleNamespace(index=i, token_ids=[65 + i] * drawn, finish_reason="length" if done else None) for i in range(children)
            ]
            found.append(EngineOutput(SimpleNamespace(request_id=number, outputs=outputs, finished=done), (0,) * children if done else ()))
            if done:
                del self.requests[number]
        return found

    def abort(self, numbers):
        for number in numbers:
            self.requests.pop(number, None)


@pytest.fixture
def engine(monkeypatch):
    return make_engine(monkeypatch)


def make_engine(monkeypatch, **client):
    tokenizer = byte_tokenizer()
    base = PromptEncoder("base", tokenizer, vocab_size=len(tokenizer))
    settings = SimpleNamespace(RequestOutputKind=SimpleNamespace(CUMULATIVE=0, FINAL_ONLY=2))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", settings)
    return VLLMEngine(OneTokenAStep(**client), base, ["base"], {})


def test_laws_of_engines(engine):
    check_children(engine, PROMPTS)
    check_outputs_are_kept(engine, PROMPTS)
    assert not engine.running and not engine.client.requests


LOOKING_BACK = {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.25, "bad_words": ["he film", "b"]}


def chunked(engine, length=4, **settings):
    """What vLLM was asked for to write 12 tokens in chunks: (prompt, parameters) of each."""
    request = Request(PROMPTS[0], Search(chunk_length=length), SamplingParams(max_new_tokens=12, **settings))
    assert dict(Searcher(engine).run([request]))[0].error is None
    return engine.client.seen


def test_requests_say_which_tokens_are_the_response(engine):
    """Where a chunk goes on, vLLM's own penalties are off: it would count from there."""
    prompt, asked = engine.base.prompt_ids(PROMPTS[0]), chunked(engine, **LOOKING_BACK)
    assert [len(ids) - len(prompt) for ids, _ in asked] == [p.extra_args["ivg_response"]["tokens"] for _, p in asked] == [0, 4, 8]
    for _, params in asked:
        assert (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) == (1.0, 0.0, 0.0)
        sent = json.loads(json.dumps(params.extra_args["ivg_response"]))  # it goes to another process
        assert TokenPenalties.read(sent) == TokenPenalties.of(SamplingParams(**LOOKING_BACK), engine.vocabulary)


def test_vllm_s_own_penalties_where_they_mean_the_same(engine):
    asked = chunked(engine, frequency_penalty=0.5, repetition_penalty=1.3)
    assert [(p.frequency_penalty, p.repetition_penalty) for _, p in asked] == [(0.5, 1.3), (0.0, 1.0), (0.0, 1.0)]
    assert [bool(p.extra_args) for _, p in asked] == [False, True, True]
    engine.client.seen.clear()
    assert {(p.repetition_penalty, p.extra_args) for _, p in chunked(engine, repetition_penalty=1.3)} == {(1.3, None)}  # of the whole text


def test_speculative_decoding_in_vllm_cannot_look_back(monkeypatch):
    engine = make_engine(monkeypatch, looks_back=False)
    for name, value in [(n, LOOKING_BACK[n]) for n in ("frequency_penalty", "bad_words")] + [("min_p", 0.1), ("logit_bias", {65: 1.0})]:
        with pytest.raises(ConfigError, match=rf"{name}.*\n.*leave num_speculative_tokens \(speculative_config\) out of \[vllm\]"):
            chunked(engine, **{name: value})
    chunked(engine, length=None, frequency_penalty=0.5)


def test_log_probabilities_of_the_answer_alone(engine):
    """Of a search with beams the one that is answered is scored, one request for each token and kind."""
    request = Request(PROMPTS[0], Search(chunk_length=4), SamplingParams(max_new_tokens=6, presence_penalty=1.0), alternatives=2)
    done = dict(Searcher(engine).run([request]))[0]
    assert [d.token for d in done.details] == list(done.token_ids) and "".join(d.text for d in done.details) == done.text
    top = ((90, 0.0), (91, -0.1))
    assert {(d.logprob, d.base_logprob, d.top, d.top_base) for d in done.details} == {(-1.0, -1.0, top, top)}
    prompt = engine.base.prompt_ids(PROMPTS[0])
    scoring = [(ids, params) for ids, params in engine.client.seen if getattr(params, "allowed_token_ids", None)]
    assert [ids for ids, _ in scoring] == [[*prompt, *done.token_ids[:i]] for i in range(6)]
    assert [p.allowed_token_ids for _, p in scoring] == [[token] for token in done.token_ids] and {p.logprobs for _, p in scoring} == {2}
    read = done.usage.forward_tokens["base"]
    engine.client.seen.clear()
    plain = dict(Searcher(engine).run([replace(request, alternatives=None)]))[0]
    assert plain.details == () and plain.token_ids == done.token_ids and len(engine.client.seen) == 2
    assert read - plain.usage.forward_tokens["base"] == sum(len(ids) - 3 for ids, _ in scoring)


def test_scores_under_guidance_and_of_the_base(engine):
    """The weights of the composite differ, and its temperature is the request's; other requests' outputs are kept."""
    pair = VLLMGuide("pair", lambda: None)
    engine.guides = {"pair": pair}
    other = ExpandRequest(engine.open(PROMPTS[1], SamplingParams()), 1, 4, SamplingParams(), None, 1)
    engine.submit([other])
    root = engine.open(PROMPTS[0], SamplingParams())
    asked = LogprobsRequest(root, (70, 71), SamplingParams(temperature=0.5), TokenGuidance(pair, 2.0), 1)
    (found,) = engine.logprobs([asked])
    assert [(d.token, d.text, d.logprob, d.base_logprob) for d in found] == [(70, "f", -3.0, -1.0), (71, "g", -3.0, -1.0)]
    sent = [params.extra_args for _, params in engine.client.seen[1:]]
    assert sent == [{"ivg_beta.pair": weight, "ivg_temperature": 0.5} for _ in found for weight in (2.0, 0.0)]
    while not (done := engine.collect([other.beam.key])):
        pass
    assert len(done[0].children) == 1 and done[0].children[0].token_ids


def test_a_chunk_is_processed_as_the_whole_response_is():
    """However the response is cut, also within a bad word."""
    random = torch.Generator().manual_seed(3)
    vocabulary = SimpleNamespace(eos_ids=(), word_ids=lambda words: ((3, 4), (5,), (6, 7, 8)))
    prompt, response = [1, 2, 3, 3, 6, 7], [5, 4, 4, 9, 6, 7]
    settings = SamplingParams(**LOOKING_BACK)
    logits = torch.randn(1, 12, generator=random)
    expected, _ = process_logits(logits, [settings], lambda _: (prompt, response), vocabulary)
    assert expected[0, 8] == expected[0, 5] == -torch.inf and expected[0, 4] != -torch.inf
    look_back = TokenPenalties.read(TokenPenalties.of(settings, vocabulary).to_dict())
    for cut in range(len(response) + 1):
        z = logits[0].clone()
        look_back.apply_to_chunk(z, prompt + response[:cut], response[cut:], cut)
        assert torch.equal(z, expected[0])
    with pytest.raises(ConfigError, match="cannot be read"):
        TokenPenalties.read({"bad_words": [["x"]]})
