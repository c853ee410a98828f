"""Prompts in responses of /v1/completions: echo, log-probabilities of prompts, max_tokens 0."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from ivg.models.prompt_template import PromptTemplate
from ivg.settings.recipe import Recipe
from ivg.testing import tiny_lm
from ivg.types import ResponseLogprobs
from ivg.values.base import CompositeValue
from ivg.values.implicit import ImplicitValue
from serving_tools import Running, chunks, tiny, wait_for, well_formed
from serving_tools import expected as expected_answer

TEXT = "Film é nice"


@pytest.fixture(scope="module")
def running():
    with Running(tiny()) as server:
        yield server


@pytest.fixture(scope="module")
def client(running):
    return running.client()


def expected(library, text, method, alternatives=3, **settings):
    """Log-probabilities of the tokens behind the first, from the library: its prompt is the first token."""
    return library.logprobs(text[0], text[1:], method, alternatives=alternatives, **settings)


@pytest.mark.parametrize("method", ["base", "eft", "token-explicit"])
def test_prompt_logprobs_as_openai_returns_them(client, library, method):
    out = client.completions.create(model=f"tiny:{method}", prompt=TEXT, echo=True, max_tokens=0, logprobs=3)
    (choice,), found = out.choices, expected(library, TEXT, method)
    logprobs = choice.logprobs
    assert choice.text == TEXT == "".join(logprobs.tokens)
    assert choice.finish_reason == "length" and out.usage.completion_tokens == 0 and out.usage.prompt_tokens == len(logprobs.tokens)
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    assert logprobs.token_logprobs[1:] == pytest.approx([t.logprob for t in found.tokens], abs=1e-4)
    assert [max(top.values()) for top in logprobs.top_logprobs[1:]] == pytest.approx([t.top[0][1] for t in found.tokens], abs=1e-4)
    assert all(p in top.values() for p, top in list(zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True))[1:])
    assert [TEXT[:i] for i in logprobs.text_offset] == ["".join(logprobs.tokens[:i]) for i in range(len(logprobs.tokens))]
    names = {"base"} | ({"tuned", "untuned"} if method == "eft" else {"explicit"} if method == "token-explicit" else set())
    assert set(out.model_extra["ivg"]["usage"]) == names


def test_as_lm_eval_asks(client, library):
    """Token ids, one more token, greedy; the sum leaves out the last."""
    ids = list(library.base.tokenizer(TEXT).input_ids)
    out = client.completions.create(model="tiny:eft", prompt=[ids, ids[:5]], temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True)
    found = expected(library, TEXT, "eft")
    for choice, length in zip(out.choices, (len(ids), 5), strict=True):
        assert len(choice.logprobs.tokens) == length + 1 == len(choice.logprobs.top_logprobs)
        assert choice.logprobs.token_logprobs[2:-1] == pytest.approx([t.logprob for t in found.tokens[1 : length - 1]], abs=1e-4)
        pairs = zip(choice.logprobs.token_logprobs[1:], choice.logprobs.top_logprobs[1:], strict=True)
        likeliest = [p == max(top.values()) for p, top in pairs]
        assert likeliest[:-1] == [ResponseLogprobs((t,)).is_greedy for t in found.tokens[: length - 1]]
        assert likeliest[-1]


def test_temperature_and_filters_of_the_answer_do_not_touch_the_prompt(client):
    settings = {"model": "tiny:eft", "prompt": TEXT, "echo": True, "logprobs": 0, "max_tokens": 0}
    plain, hot = (client.completions.create(**settings, **more).choices[0].logprobs for more in ({}, {"temperature": 1.9, "top_p": 0.2}))
    assert plain.token_logprobs == hot.token_logprobs and all(len(top) == 1 for top in hot.top_logprobs[1:])


def test_vllm_prompt_logprobs(client, library):
    out = client.completions.create(model="tiny:eft", prompt=TEXT, max_tokens=2, extra_body={"prompt_logprobs": 2})
    (choice,), found = out.choices, expected(library, TEXT, "eft")
    first, *rest = choice.model_extra["prompt_logprobs"]
    assert first is None and len(rest) == len(found.tokens) and choice.logprobs is None and not choice.text.startswith(TEXT)
    for entry, token in zip(rest, found.tokens, strict=True):
        assert entry[str(token.token)]["logprob"] == pytest.approx(token.logprob, abs=1e-4)
        assert {int(i) for i in entry} == {token.token, *(i for i, _ in token.top[:2])}
        assert entry[str(token.top[0][0])]["rank"] == 1
        ranks = {int(i): e["rank"] for i, e in entry.items()}
        assert ranks[token.token] == token.rank and (ranks[token.token] > 2) == (token.token not in [i for i, _ in token.top[:2]])


def test_echo_of_text_alone_with_every_method(client):
    plain = client.completions.create(model="tiny", prompt=TEXT, max_tokens=4, seed=1).choices[0].text
    out = client.completions.create(model="tiny", prompt=TEXT, max_tokens=4, seed=1, echo=True)
    assert out.choices[0].text == TEXT + plain and out.choices[0].logprobs is None
    assert client.completions.create(model="tiny", prompt="Film", max_tokens=0, echo=True).choices[0].text == "Film"


def test_choices_of_one_prompt_and_their_offsets(client):
    out = client.completions.create(model="tiny:eft", prompt=[TEXT, "Go"], n=2, max_tokens=3, echo=True, logprobs=1, seed=1)
    assert [c.text.startswith(p) for c, p in zip(out.choices, [TEXT, TEXT, "Go", "Go"], strict=True)] == [True] * 4
    assert out.choices[0].logprobs.token_logprobs[: len(TEXT)] == out.choices[1].logprobs.token_logprobs[: len(TEXT)]
    for choice in out.choices:
        assert "".join(choice.logprobs.tokens) == choice.text
        assert len(choice.logprobs.text_offset) == len(choice.logprobs.tokens)
        shown = [choice.text[i : i + len(t)] for i, t in zip(choice.logprobs.text_offset, choice.logprobs.tokens, strict=True)]
        assert shown == choice.logprobs.tokens


def test_stream(running):
    body = {"model": "tiny:eft", "prompt": TEXT, "max_tokens": 3, "echo": True, "logprobs": 1, "seed": 1}
    whole = running.post(body).json()["choices"][0]
    pieces = [c["choices"][0] for c in chunks(running.post(body | {"stream": True}))]
    assert pieces[0]["text"] == TEXT and "".join(p["text"] for p in pieces) == whole["text"]
    merged = {name: [x for p in pieces if p["logprobs"] for x in p["logprobs"][name]] for name in whole["logprobs"]}
    assert merged["tokens"] == whole["logprobs"]["tokens"] and merged["text_offset"] == whole["logprobs"]["text_offset"]
    assert merged["token_logprobs"][1:] == pytest.approx(whole["logprobs"]["token_logprobs"][1:], abs=1e-4)
    only = chunks(running.post(body | {"stream": True, "max_tokens": 0}))
    assert "".join(c["choices"][0]["text"] for c in only) == TEXT and only[-1]["choices"][0]["finish_reason"] == "length"


REFUSED = [
    ({"model": "tiny"}, "logprobs", "selects among 16 beams"),
    ({"model": "tiny:args"}, None, None),
    ({"guidance": {"method": "custom", "token": "length"}}, "prompt", "length scores a response to a prompt, and this is a prompt alone"),
    ({"max_tokens": 0, "echo": False}, "max_tokens", "0 needs echo=true or prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "needs stream=false"),
    ({"prompt_logprobs": 50}, "prompt_logprobs", "at most 20"),
    ({"model": "tiny:eft", "prompt": "x" * 300}, "prompt", "context"),
]


@pytest.mark.parametrize("method", ["base", "eft"])
def test_a_prompt_that_fills_the_context(running, client, library, method):
    """Nothing is generated, so no token needs room behind it."""
    limit = library.base.max_positions
    text = "Film" * (limit // 4)
    out = client.completions.create(model=f"tiny:{method}", prompt=text, echo=True, max_tokens=0, logprobs=1)
    assert len(out.choices[0].logprobs.tokens) == limit and None not in out.choices[0].logprobs.token_logprobs[1:]
    for prompt in (text + "!", [5] * (limit + 1)):
        response = running.post({"model": f"tiny:{method}", "prompt": prompt, "echo": True, "max_tokens": 0, "logprobs": 1})
        message = well_formed(response, 400, "prompt", "context_length_exceeded")["message"]
        assert f"you requested {limit + 1} tokens ({limit + 1} in the prompt, 0 in the completion)" in message


@pytest.mark.parametrize(("change", "param", "message"), REFUSED, ids=str)
def test_what_has_no_such_log_probabilities(running, change, param, message):
    body = {"model": "tiny", "prompt": TEXT, "max_tokens": 1, "echo": True, "logprobs": 1, **change}
    response = running.post(body)
    if param is None:
        assert response.status_code == 200, response.text
        return
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param) and message in error["message"]


def test_models_behind_a_template_are_named():
    model = tiny()
    tuned = tiny_lm("tuned", seed=1, tokenizer=model.base.tokenizer)
    pair = ImplicitValue(tuned.sharing("tuned", PromptTemplate("Q: {prompt} A:")), tuned.sharing("untuned"))
    model.add_value("implicit", pair, replace=True)
    with Running(model, Recipe()) as server:
        response = server.post({"model": "tiny:eft", "prompt": TEXT, "max_tokens": 0, "echo": True, "logprobs": 1})
        assert response.status_code == 400 and "tuned reads it as other tokens than the base" in response.json()["error"]["message"]
        assert server.post({"model": "tiny:base", "prompt": TEXT, "max_tokens": 0, "echo": True, "logprobs": 1}).status_code == 200
        server.wait_until_idle()


def test_many_long_prompts_beside_other_requests(running, client):
    prompts = ["The movie was " + "very " * 40] * 30
    out = client.completions.create(model="tiny:eft", prompt=prompts, max_tokens=0, echo=True, logprobs=1)
    assert len(out.choices) == 30 and len({tuple(c.logprobs.token_logprobs) for c in out.choices}) == 1
    assert client.completions.create(model="tiny", prompt="Film", max_tokens=2).choices[0].text is not None
    running.wait_until_idle()


class Mortal(CompositeValue):
    """Guides like another value; is dead from a poisoned prompt on, until it is started again."""

    def __init__(self, inner):
        super().__init__([(1.0, inner)], "mortal")
        self.dead = False

    def deltas(self, hypotheses):
        self.dead |= any(h.prompt.content == "@" for h in hypotheses)
        if self.dead:
            raise ZeroDivisionError("secret")
        return super().deltas(hypotheses)

    def restart(self):
        died, self.dead = self.dead, False
        return died


def test_a_model_that_fails_on_a_prompt_is_started_again(library):
    model = tiny()
    model.add_value("mortal", Mortal(model.values["implicit"]))
    guidance = {"method": "custom", "token": "mortal"}
    prompt = {"model": "tiny", "prompt": "Film", "max_tokens": 0, "echo": True, "logprobs": 1, "guidance": guidance}
    with Running(model) as server, ThreadPoolExecutor(1) as pool:
        good = server.post(prompt).json()["choices"][0]["logprobs"]
        long = {"model": "tiny", "prompt": "Film", "seed": 3, "stream": True, "guidance": guidance, "temperature": 0.9, "max_tokens": 200}
        other = pool.submit(server.post, long | {"ignore_eos": True})
        wait_for(lambda: server.worker.searcher.live_requests)
        error = well_formed(server.post(prompt | {"prompt": "@poison"}), 500, code="model_error")
        assert "secret" not in error["message"] and not model.values["mortal"].dead
        assert server.post(prompt).json()["choices"][0]["logprobs"] == good
        text = "".join(c["choices"][0]["text"] for c in chunks(other.result()))
        want = expected_answer(library, "Film", "custom", 3, token="implicit", max_new_tokens=200, ignore_eos=True)
        assert text == want.text
        server.wait_until_idle()


def test_a_client_that_leaves_and_chats(running, client):
    with pytest.raises(openai.BadRequestError, match="echo is not supported"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], extra_body={"echo": True})
    with pytest.raises(httpx.ReadTimeout):
        body = {"model": "tiny:eft", "prompt": ["x" * 240] * 64, "max_tokens": 0, "echo": True, "logprobs": 1}
        httpx.post(f"{running.url}/v1/completions", content=json.dumps(body), headers={"content-type": "application/json"}, timeout=0.02)
    running.wait_until_idle()
