"""Context lengths, chat templates, token ids, sampling settings and usage."""

import json

import httpx
import pytest
from transformers import AutoTokenizer

from ivg.errors import ConfigError, ServeError
from ivg.model import GuidedModel
from ivg.models.prompt_encoder import has_chat_template
from ivg.models.token_text import TokenText
from ivg.serving.protocol import ChatRequest, CompletionRequest
from ivg.serving.requests import Progress
from ivg.serving.responses import ResponseBuilder
from ivg.serving.served_models import ServedModels
from ivg.serving.stream import StreamEncoder
from ivg.settings.recipe import Recipe
from ivg.settings.serve import ServeSettings
from ivg.testing import byte_tokenizer, tiny_lm, tiny_value
from ivg.values.implicit import ImplicitValue
from serving_tools import CHAT, GOOD, SAMPLING, Running, Slow, chunks, expected, tiny, well_formed


@pytest.fixture(scope="module")
def running():
    with Running(tiny(slow=Slow())) as server:
        yield server


CONTEXT = 256
READERS = ("base", "contrast.tuned", "contrast.untuned")
"""What a base gives by itself."""


def test_default_max_tokens_fills_the_context(running, library):
    body = {k: v for k, v in GOOD.items() if k != "max_tokens"} | {"ignore_eos": True}
    for prompt, left in (("x" * 200, 56), ("x" * (CONTEXT - 1), 1)):
        answer = running.post(body | {"prompt": prompt}).json()
        assert answer["usage"]["completion_tokens"] == left, prompt[:5]
        assert answer["choices"][0]["finish_reason"] == "length"


def test_default_max_tokens_of_the_recipe():
    with Running(tiny(), Recipe.model_validate({"sampling": {"max_new_tokens": 9}})) as server:
        body = {k: v for k, v in GOOD.items() if k != "max_tokens"} | {"ignore_eos": True}
        assert server.post(body).json()["usage"]["completion_tokens"] == 9
        assert server.post(body | {"prompt": "x" * 250}).json()["usage"]["completion_tokens"] == 6  # never too long by itself
        assert server.post(body | {"max_tokens": 20}).json()["usage"]["completion_tokens"] == 20


@pytest.mark.parametrize(("path", "body", "param"), [("/v1/completions", GOOD, "prompt"), ("/v1/chat/completions", CHAT, "messages")])
def test_context_length_error(running, path, body, param):
    error = well_formed(running.post(body | {"max_tokens": 253}, path), 400, param, "context_length_exceeded")
    assert error["type"] == "invalid_request_error"
    assert "maximum context length is 256 tokens" in error["message"] and f"4 in the {param}, 253 in the completion" in error["message"]
    long = {"prompt": "x" * 300} if param == "prompt" else {"messages": [{"role": "user", "content": "x" * 300}]}
    error = well_formed(running.post(body | long | {"max_tokens": 8}, path), 400, param, "context_length_exceeded")
    assert f"you requested 308 tokens (300 in the {param}, 8 in the completion)" in error["message"]
    without = {k: v for k, v in body.items() if k != "max_tokens"} | long
    error = well_formed(running.post(without, path), 400, param, "context_length_exceeded")
    assert f"your {param} resulted in 300 tokens" in error["message"]
    kind = CompletionRequest if param == "prompt" else ChatRequest
    for limit, got in ((252, 252), (None, 252)):
        batch = running.served.prepare(kind.model_validate(body | {"max_tokens": limit}))
        assert batch.requests[0].sampling.max_new_tokens == got


def test_models_list_their_context_length(running):
    data = httpx.get(f"{running.url}/v1/models").json()["data"]
    assert {m["max_model_len"] for m in data} == {CONTEXT}


def test_models_say_where_their_tokenizer_is(running, tmp_path):
    data = httpx.get(f"{running.url}/v1/models").json()["data"]
    assert {m["id"]: (m["root"], m["parent"]) for m in data} == {
        name: ("tiny", "tiny" if ":" in name else None) for name in running.served.names
    }
    byte_tokenizer().save_pretrained(tmp_path)
    base = tiny_lm(tokenizer=AutoTokenizer.from_pretrained(tmp_path))
    listed = ServedModels(GuidedModel(base), Recipe(search={"method": "base"}), ServeSettings(name="x")).listing()
    assert {m["root"] for m in listed} == {str(tmp_path)}


def test_each_request_has_its_own_instruction(running, library):
    asked = [{"contrast": "Be kind."}, {"contrast": "Be rude.", "negative": "Be kind."}, {"negative": "Be rude.", "beta": 0.5}]
    for guidance in asked:
        got = running.post(GOOD | {"model": "tiny:contrast", "guidance": guidance}).json()["choices"][0]["text"]
        same = library.generate(GOOD["prompt"], "contrast", seed=GOOD["seed"], max_new_tokens=GOOD["max_tokens"], **guidance)
        assert got == same.text
    long = {"contrast": "x" * 250}
    error = well_formed(running.post(GOOD | {"model": "tiny:contrast", "guidance": long}), 400, "prompt", "context_length_exceeded")
    assert "The context is that of contrast.tuned." in error["message"]
    error = running.post(GOOD | {"model": "tiny:contrast"})
    assert error.status_code == 400
    assert "the value contrast needs an instruction" in error.json()["error"]["message"]
    error = running.post(GOOD | {"model": "tiny:base", "guidance": {"contrast": "Be kind."}})
    assert error.status_code == 400
    assert "an instruction for the value contrast, which this method does not use" in error.json()["error"]["message"]


def test_context_length_is_the_smallest_of_all_models():
    tokens = byte_tokenizer()
    pair = ImplicitValue(*(tiny_lm(n, seed=c, tokenizer=tokens, context=c) for n, c in (("tuned", 64), ("untuned", 96))))
    served = ServedModels(GuidedModel(tiny_lm(tokenizer=tokens), {"implicit": pair}), Recipe.model_validate({"search": {"method": "eft"}}),
                      ServeSettings(name="tiny"))  # fmt: skip
    assert {e["id"]: e["max_model_len"] for e in served.listing()}["tiny:eft"] == 64
    assert {e["id"]: e["max_model_len"] for e in served.listing()}["tiny:base"] == CONTEXT
    batch = served.prepare(CompletionRequest(model="tiny", prompt="x" * 60))
    assert batch.requests[0].sampling.max_new_tokens == 4
    with pytest.raises(ServeError, match=r"maximum context length is 64 .* that of tuned") as e:
        served.prepare(CompletionRequest(model="tiny", prompt="x" * 60, max_tokens=5))
    assert e.value.code == "context_length_exceeded"


def test_a_missing_chat_template_is_found_at_start():
    chat, plain = byte_tokenizer(chat=True), byte_tokenizer()
    base = tiny_lm("base", tokenizer=chat)
    pair = ImplicitValue(tiny_lm("tuned", seed=1, tokenizer=chat), tiny_lm("untuned", seed=2, tokenizer=plain))
    assert has_chat_template(base)
    with pytest.raises(ConfigError, match=r"untuned has no chat template[\s\S]*--template 'untuned=\{prompt\}'"):
        ServedModels(GuidedModel(base, {"implicit": pair}), Recipe(), ServeSettings(name="tiny"))
    pair.untuned.template = "{prompt}"
    pair.untuned.prompt_ids.cache_clear()
    with pytest.raises(ConfigError, match="explicit has no chat template"):
        ServedModels(GuidedModel(base, {"implicit": pair, "explicit": tiny_value(tokenizer=plain)}), Recipe(), ServeSettings(name="tiny"))
    served = ServedModels(
        GuidedModel(base, {"implicit": pair}), Recipe.model_validate({"search": {"method": "eft"}}), ServeSettings(name="tiny")
    )
    assert served.prepare(ChatRequest(model="tiny", messages=[{"role": "user", "content": "x"}])).requests


def test_token_ids_reach_every_model_of_the_vocabulary_as_they_are(running, library):
    """Even where the text would be tokenized differently: here into one token for two letters."""
    tokens = byte_tokenizer(merges=[("F", "i")])
    pair = ImplicitValue(*(tiny_lm(n, seed=s, tokenizer=tokens) for s, n in enumerate(("tuned", "untuned"), 1)))
    served = ServedModels(GuidedModel(tiny_lm(tokenizer=tokens), {"implicit": pair}), Recipe.model_validate({"search": {"method": "eft"}}),
                      ServeSettings(name="tiny"))  # fmt: skip
    ids = tokens.convert_tokens_to_ids(["F", "i", "l"])
    assert tokens("Fil").input_ids != ids
    (one,) = served.prepare(CompletionRequest(model="tiny", prompt=ids, max_tokens=3)).requests
    root = served.model.engine.open(one.prompt, one.sampling)
    assert {r.name: list(r.prompt_ids(root.prompt)) for r in served.model.readers} == dict.fromkeys((*READERS, "tuned", "untuned"), ids)
    body = GOOD | {"model": "tiny:ivg", "max_tokens": 6}
    same = [running.post(body | {"prompt": p}).json()["choices"] for p in ("Film", library.base.tokenizer("Film").input_ids)]
    assert same[0] == same[1]


def test_error_raised_by_a_chat_template():
    """Not 500, which clients retry."""
    chat = byte_tokenizer(chat=True)
    chat.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}{{ messages[0].content }}"
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Film"}]
    with Running(GuidedModel(tiny_lm("base", tokenizer=chat)), Recipe.model_validate({"search": {"method": "base"}})) as server:
        error = well_formed(server.post(CHAT | {"messages": turns}, "/v1/chat/completions"), 400, "messages", "invalid_prompt")
        assert "no system turn" in error["message"]
        assert server.post(CHAT, "/v1/chat/completions").status_code == 200


def test_vllm_names_at_the_top_level(running, library):
    more = {"top_k": 3, "min_p": 0.05, "repetition_penalty": 1.3, "ignore_eos": True}
    body = {"model": "tiny:eft", "prompt": "Film", "seed": 4, **SAMPLING}
    want = expected(library, "Film", "eft", 4, **more).text
    assert want != expected(library, "Film", "eft", 4).text
    for change in (more, {"guidance": more}, {"extra_body": more}, {"extra_body": {"guidance": more}}):
        assert running.post(body | change).json()["choices"][0]["text"] == want
    for change in ({"min_tokens": 5}, {"min_new_tokens": 5}, {"guidance": {"min_new_tokens": 5}}):
        (one,) = running.served.prepare(CompletionRequest.model_validate(body | change)).requests
        assert one.sampling.min_new_tokens == 5
    assert running.post(body | {"top_k": -1}).json()["choices"][0]["text"] == expected(library, "Film", "eft", 4).text


def test_openai_s_penalties_and_biases(running, library):
    """By OpenAI's own client, on the guided logits; vLLM's fields as ``extra_body``."""
    openai_s = {"frequency_penalty": 0.7, "presence_penalty": 0.4, "logit_bias": {"60": 2.5}}
    vllm_s = {"stop_token_ids": [101, 102], "bad_words": ["e"]}
    want = expected(library, "Film", "eft", 4, **openai_s, **vllm_s)
    assert want.token_ids != expected(library, "Film", "eft", 4).token_ids
    got = running.client().completions.create(model="tiny:eft", prompt="Film", seed=4, **SAMPLING, **openai_s, extra_body=vllm_s)
    assert got.choices[0].text == want.text


def test_best_of_returns_the_likeliest(running, library):
    every = [expected(library, "Film", "eft", 4, index=i, alternatives=0) for i in range(10)]  # the prompt comes twice
    ranked = [sorted(some, key=lambda c: -sum(d.logprob for d in c.details) / len(c.details)) for some in (every[:5], every[5:])]
    body = {"model": "tiny:eft", "prompt": ["Film", "Film"], "seed": 4, **SAMPLING}
    got = running.post(body | {"best_of": 5, "n": 2}).json()
    assert [c["text"] for c in got["choices"]] == [c.text for some in ranked for c in some[:2]]
    assert [c["index"] for c in got["choices"]] == [0, 1, 2, 3] and got["choices"][0]["logprobs"] is None
    assert got["usage"]["completion_tokens"] == sum(len(c.token_ids) for c in every)


def test_the_score_is_that_of_the_first_choice(running, library):
    settings = {"select": "implicit", "successors": 2, "chunk_length": 4}
    every = [expected(library, "Film", "custom", 5, index=i, alternatives=0, **settings) for i in range(5)]
    best = max(every, key=lambda c: c.mean_logprob)
    assert abs(best.score - every[0].score) > 1e-2
    body = {"model": "tiny", "prompt": "Film", "seed": 5, "guidance": {"method": "custom", **settings}, **SAMPLING}
    assert running.post(body | {"best_of": 5}).json()["ivg"]["score"] == pytest.approx(best.score, abs=1e-4)


@pytest.mark.parametrize("method", ["base", "ivg"])
def test_continuous_usage_stats(running, method):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = GOOD | {"model": f"tiny:{method}", "stream": True, "max_tokens": 12, "ignore_eos": True}
    usage = [chunk["usage"] for chunk in chunks(running.post(body | {"stream_options": options}))]
    counts = [u["completion_tokens"] for u in usage]
    assert counts == sorted(counts) and counts[-1] == counts[-2] == 12
    assert {u["prompt_tokens"] for u in usage} == {4}
    if method == "base":
        assert len(set(counts)) > 4
    plain = running.post(body | {"stream_options": {"include_usage": True}}).text
    assert plain.count('"usage":{"prompt_tokens"') == 1


def test_nothing_is_sent_before_the_first_text(running):
    for kind, body, opening in (
        (ChatRequest, CHAT, [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}]),
        (CompletionRequest, GOOD | {"echo": True}, ["Film", "a", "b"]),
    ):
        batch = running.served.prepare(kind.model_validate(body))
        if batch.echo is not None:
            batch.echo.step()
        builder = ResponseBuilder(kind is ChatRequest, "tiny", batch, None, TokenText(tiny().engine.vocabulary), echo="echo" in body)
        encoder = StreamEncoder(builder, usage=True, beams=False, continuous_usage=True)
        assert not [
            *encoder.start(),
            *encoder.update(Progress(0, "", (), (), ())),
        ]  # clients that measure take the first chunk for the first token
        sent = [json.loads(event[6:]) for text in ("a", "ab") for event in encoder.update(Progress(0, text, (), (), (), tokens=len(text)))]
        assert [c["choices"][0].get("delta", c["choices"][0].get("text")) for c in sent] == opening
        assert [c["usage"]["completion_tokens"] for c in sent] == [0, 1, 2]


def test_usage_counts_every_prompt_once(running):
    body = GOOD | {"prompt": ["One", "One", "Three"], "n": 2}
    assert running.post(body).json()["usage"]["prompt_tokens"] == 11


def test_several_names(library):
    with Running(tiny(), name=("small", "gpt-4o")) as running:
        listed = [m.id for m in running.client().models.list()]
        assert listed[:2] == ["small", "gpt-4o"] and {"small:eft", "gpt-4o:eft"} < set(listed) and len(set(listed)) == len(listed)
        answers = [running.post({**GOOD, "model": name}).json() for name in ("small:base", "gpt-4o:base")]
        assert [a["model"] for a in answers] == ["small:base", "gpt-4o:base"]
        assert answers[0]["choices"] == answers[1]["choices"]
        both = running.post({**GOOD, "model": "gpt-4o", "guidance": {"method": "eft"}}).json()
        assert both["ivg"]["method"] == "eft"
        well_formed(running.post({**GOOD, "model": "tiny"}), 404, "model")
    assert ServeSettings(name="a").name == ("a",) and ServeSettings(name=None).name == ()
    for names in (["a", "a"], ["a:b"], [""]):
        with pytest.raises(ConfigError, match=r"serve\.name"):
            Recipe.parse({"serve": {"name": names}})
