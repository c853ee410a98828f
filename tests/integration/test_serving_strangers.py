"""The server in front of clients that nobody here wrote: what they send by themselves, what they get wrong, how they hold connections."""

import asyncio
import gzip
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from test_serving import SAMPLING, Running, expected, tiny
from test_serving_faults import SLOW, Slow, read_head, well_formed
from test_serving_process import SCRIPT, Process

from ivg.errors import ConfigError, ModelError, ServeError
from ivg.model import GuidedModel
from ivg.serving import parsing
from ivg.serving.connections import Limits, connection_limits, limited_protocol, throttle_accept_errors
from ivg.serving.errors import client_error, redact
from ivg.serving.lengths import has_chat_template
from ivg.serving.protocol import ChatRequest, CompletionRequest
from ivg.serving.served_models import ServedModels
from ivg.settings.recipe import Recipe
from ivg.settings.serve import ServeSettings
from ivg.testing import byte_tokenizer, tiny_lm, tiny_value
from ivg.values.implicit import ImplicitValue

GOOD = {"model": "tiny:base", "prompt": "Film", "max_tokens": 4, "seed": 1}
CHAT = {"model": "tiny:base", "messages": [{"role": "user", "content": "Film"}], "max_tokens": 4, "seed": 1}
CONTEXT = 256
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def running():
    server = Running(tiny(slow=Slow()))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def library():
    return tiny()


def connect(server, timeout=20):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=timeout)


def raw(body, path="/v1/completions", **headers):
    content = json.dumps(body).encode()
    head = {"host": "x", "content-type": "application/json", "content-length": len(content), **headers}
    return f"POST {path} HTTP/1.1\r\n{''.join(f'{k}: {v}' + chr(13) + chr(10) for k, v in head.items())}\r\n".encode() + content


def wait_for(fact, seconds=30):
    """A guard against hanging, not a measure of speed."""
    until = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < until
        time.sleep(0.01)


# Lengths


def test_without_max_tokens_an_answer_may_fill_the_context(running, library):
    body = {k: v for k, v in GOOD.items() if k != "max_tokens"} | {"ignore_eos": True}
    for prompt, left in (("x" * 200, 56), ("x" * (CONTEXT - 1), 1)):
        answer = running.post(body | {"prompt": prompt}).json()
        assert answer["usage"]["completion_tokens"] == left, prompt[:5]
        assert answer["choices"][0]["finish_reason"] == "length"


def test_the_server_says_how_long_answers_are_whose_client_does_not():
    server = Running(tiny(), Recipe.model_validate({"sampling": {"max_new_tokens": 9}}))
    try:
        body = {k: v for k, v in GOOD.items() if k != "max_tokens"} | {"ignore_eos": True}
        assert server.post(body).json()["usage"]["completion_tokens"] == 9
        assert server.post(body | {"prompt": "x" * 250}).json()["usage"]["completion_tokens"] == 6  # never too long by itself
        assert server.post(body | {"max_tokens": 20}).json()["usage"]["completion_tokens"] == 20
    finally:
        server.stop()


@pytest.mark.parametrize(("path", "body", "param"), [("/v1/completions", GOOD, "prompt"), ("/v1/chat/completions", CHAT, "messages")])
def test_too_long_is_said_as_openai_says_it(running, path, body, param):
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


def test_models_say_their_context(running):
    data = httpx.get(f"{running.url}/v1/models").json()["data"]
    assert {m["max_model_len"] for m in data} == {CONTEXT}


def test_the_context_is_the_shortest_of_all_models():
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


# Templates


def test_a_guide_without_template_beside_a_chat_base_is_found_at_start():
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


def test_no_paths_of_this_machine_in_messages():
    told = client_error(ModelError("/home/me/models/tuned/model.safetensors is broken\n  look at ~/.cache/huggingface/hub/x"))
    assert str(told) == "model.safetensors is broken; look at x"
    assert redact("use /v1/completions, 1/2 or a/b") == "use /v1/completions, 1/2 or a/b"


def test_token_ids_reach_every_model_of_the_vocabulary_as_they_are(running, library):
    """Also where the text that they spell would be tokenised otherwise: here into a token for both letters."""
    tokens = byte_tokenizer(merges=[("F", "i")])
    pair = ImplicitValue(*(tiny_lm(n, seed=s, tokenizer=tokens) for s, n in enumerate(("tuned", "untuned"), 1)))
    served = ServedModels(GuidedModel(tiny_lm(tokenizer=tokens), {"implicit": pair}), Recipe.model_validate({"search": {"method": "eft"}}),
                      ServeSettings(name="tiny"))  # fmt: skip
    ids = tokens.convert_tokens_to_ids(["F", "i", "l"])
    assert tokens("Fil").input_ids != ids
    (one,) = served.prepare(CompletionRequest(model="tiny", prompt=ids, max_tokens=3)).requests
    root = served.model.engine.open(one.prompt, one.sampling)
    assert [list(r.prompt_ids(root.prompt)) for r in served.model.readers] == [ids] * 3
    body = GOOD | {"model": "tiny:ivg", "max_tokens": 6}
    same = [running.post(body | {"prompt": p}).json()["choices"] for p in ("Film", library.base.tokenizer("Film").input_ids)]
    assert same[0] == same[1]


def test_a_template_that_refuses_a_turn_is_the_clients_error():
    """And no 500, which clients try again."""
    chat = byte_tokenizer(chat=True)
    chat.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}{{ messages[0].content }}"
    server = Running(GuidedModel(tiny_lm("base", tokenizer=chat)), Recipe.model_validate({"search": {"method": "base"}}))
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Film"}]
    try:
        error = well_formed(server.post(CHAT | {"messages": turns}, "/v1/chat/completions"), 400, "messages", "invalid_prompt")
        assert "no system turn" in error["message"]
        assert server.post(CHAT, "/v1/chat/completions").status_code == 200
    finally:
        server.stop()


# Bodies in plain words

PLAIN = [
    ({}, b"", "the body is empty; expected a JSON object", None),
    ({}, b"  \n", "the body is empty; expected a JSON object", None),
    ({}, b"[1]", "the body must be a JSON object, got a list", None),
    ({}, b'{"model": "tiny",\n oops}', "the body is not JSON: Expecting property name enclosed in double quotes (line 2, column 2)", None),
    ({}, '{"prompt": "é"}'.encode("latin-1"), "the body is not UTF-8: byte 0xe9 at position 12", None),
    ({}, b'{"temperature": NaN}', "the body is not JSON: NaN is not a JSON number", None),
    ({}, b"[" * 100_000, "the body is nested too deeply", None),
    ({}, b'{"a":' * 100_000, "the body is nested too deeply", None),
    ({"content-type": ""}, b"{}", "the body has no content type; send the header Content-Type: application/json", None),
    ({"content-type": "text/plain"}, b"{}",
     "the body has the content type text/plain; send the header Content-Type: application/json", None),
    ({"content-type": "application/json; charset=latin-1"}, b"{}", "the body has the charset latin-1; send it as UTF-8", None),
    ({"content-encoding": "gzip"}, gzip.compress(b"{}"),
     "the body has Content-Encoding: gzip; send it uncompressed", None),
    ({}, {"model": "tiny"}, "prompt is missing", "prompt"),
    ({}, {"model": 5, "prompt": "x"}, "model must be text, got 5", "model"),
    ({}, {"max_tokens": "many"}, "max_tokens must be a whole number, at least 1, got 'many'", "max_tokens"),
    ({}, {"max_tokens": 2.5}, "max_tokens must be a whole number, at least 1, got 2.5", "max_tokens"),
    ({}, {"temperature": 3000}, "temperature must be at most 1000, got 3000.0", "temperature"),
    ({}, {"top_p": 0}, "top_p must be in (0, 1], got 0.0", "top_p"),
    ({}, {"stream": "yes"}, "stream must be true or false, got 'yes'", "stream"),
    ({}, {"stop": ["a", ""]},
     "stop[1] must not be empty; leave it out", "stop[1]"),
    ({}, {"stop": 5}, "stop must be text or a list of texts, got 5", "stop"),
    ({}, {"stop": [5]}, "stop[0] is 5; expected text", "stop[0]"),
    ({}, {"prompt": ["a", 5]}, "prompt[1] is 5; expected text", "prompt[1]"),
    ({}, {"prompt": [1, "a"]}, "prompt[1] must be a token id (an integer of 0 or more), got 'a'", "prompt[1]"),
    ({}, {"prompt": [[1], [2, -3]]}, "prompt[1][1] must be a token id (an integer of 0 or more), got -3", "prompt[1][1]"),
    ({}, {"prompt": {}}, "prompt must be text, a list of texts, token ids, or a list of lists of token ids; got an object", "prompt"),
    ({}, {"guidance": {"weights": {"implicit": "x"}}},
     "guidance.weights must be names and finite numbers, each name once, e.g. {implicit = 1.0, plain = 0.5} or"
     " \"implicit=1.0,plain=0.5\", got 'x'", "guidance.weights"),
    ({}, {"guidance": {"width": "x"}}, "guidance.width must be a whole number, at least 1, got 'x'", "guidance.width"),
    ({}, {"guidance": {"width": 2, "W": 3}}, "guidance.width and W are the same setting; give one of them", "guidance.width"),
    ({}, {"guidance": {"forced_eos_token_id": "x"}},
     "guidance.forced_eos_token_id must be a token id or a list of them, token ids, 0 or more, got 'x'", "guidance.forced_eos_token_id"),
    ({}, {"top_k": -2}, "top_k must be 0 (off) or more, got -2", "top_k"),
    ({}, {"guidance": 5}, "guidance must be an object, got 5", "guidance"),
    ({}, {"frequency_penalty": 0.5}, "frequency_penalty is not supported; leave it out or give 0", "frequency_penalty"),
    ({}, {"logit_bias": {"1": 5}}, "logit_bias is not supported; leave it out or give {}", "logit_bias"),
    ({}, {"stop_token_ids": [5]}, "unknown field stop_token_ids", "stop_token_ids"),
    ({}, {"temprature": 0}, "unknown field temprature", "temprature"),
    ({}, {"extra_body": 5}, "extra_body must be an object, got 5", "extra_body"),
    ({}, {"seed": 1, "extra_body": {"seed": 2}}, "seed and extra_body.seed differ; give one of them", "extra_body.seed"),
    ({}, {"top_k": 5, "guidance": {"top_k": 6}}, "top_k is 5 and guidance.top_k is 6; give one of them", "top_k"),
]  # fmt: skip


@pytest.mark.parametrize(("headers", "body", "message", "param"), PLAIN, ids=lambda v: str(v)[:30] if isinstance(v, str) else "")
def test_bodies_are_refused_in_plain_words(headers, body, message, param):
    if isinstance(body, dict):
        body = json.dumps(body if "model" in body else {"model": "tiny", "prompt": "x", **body}).encode()
    with pytest.raises(ServeError) as e:
        parsing.parse_body(body, JSON | headers, CompletionRequest)
    assert (str(e.value), e.value.param) == (message, param)
    assert e.value.status == (415 if headers else 400)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
NAMES = sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields, "extra_body", "unheard_of"})


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), ANY_JSON, max_size=4), st.booleans(), st.sampled_from([GOOD, CHAT]))
def test_whatever_a_body_holds_it_is_read_or_refused(change, strict, good):
    """By a message without the names of our insides."""
    kind = CompletionRequest if good is GOOD else ChatRequest
    try:
        body = parsing.parse_body(json.dumps(good | change).encode(), JSON, kind, strict=strict)
    except ServeError as e:
        assert e.status == 400 and not re.search(r"function-|pydantic|\bdict\b|_type\b|Traceback|validat", str(e))
    else:
        assert isinstance(body, kind)


CHATS = [
    ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]},
     "messages[0].content[0]: parts of type 'image_url' are not supported; only text is read; leave the part out",
     "messages[0].content[0]"),
    ({"content": None}, "messages[0].content is null; expected text", "messages[0].content"),
    ({"role": "tool"}, "messages[0].role must be one of system, developer, user, assistant, got 'tool'", "messages[0].role"),
    ({"tool_calls": [{}]}, "messages[0].tool_calls is not supported: only the text of a message is read; leave it out",
     "messages[0].tool_calls"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message", "param"), CHATS)
def test_messages_are_refused_by_their_place(change, message, param):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x", **change}]}
    with pytest.raises(ServeError) as e:
        parsing.parse_body(json.dumps(body).encode(), JSON, ChatRequest)
    assert (str(e.value), e.value.param) == (message, param)


def test_every_refusal_is_an_answer_in_openais_shape(running):
    for headers, content in (({"content-encoding": "gzip"}, gzip.compress(b"{}")), ({"content-type": "text/plain"}, b"{}")):
        answer = httpx.post(f"{running.url}/v1/completions", content=content, headers=JSON | headers)
        well_formed(answer, 415)
    well_formed(httpx.post(f"{running.url}/v1/completions", content=b"[" * 50_000, headers=JSON), 400, code="invalid_json")


# What changes no answer

HARMLESS = {
    "metadata": {"run": "7"}, "store": True, "service_tier": "flex", "user": "me", "safety_identifier": "x", "prompt_cache_key": "k",
    "parallel_tool_calls": True, "extra_body": {}, "response_format": None, "some_new_field": None, "length_penalty": 1.0,
    "stop_token_ids": [], "skip_special_tokens": True,
}  # fmt: skip
TOOLS = {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"}
NEW_MESSAGE = {"messages": [{"role": "user", "content": "Film", "name": "me", "reasoning_content": "hm", "cache_control": {"type": "x"}}]}


@pytest.mark.parametrize("change", [{k: v} for k, v in HARMLESS.items()] + [TOOLS, {"tool_choice": "auto"}, NEW_MESSAGE])
def test_what_changes_no_answer_is_ignored_and_by_strict_servers_refused(change):
    body = json.dumps(CHAT | change).encode()
    assert parsing.parse_body(body, JSON, ChatRequest) == parsing.parse_body(json.dumps(CHAT).encode(), JSON, ChatRequest)
    welcome = set(change) & {"user", "safety_identifier", "prompt_cache_key", "response_format", "parallel_tool_calls"}
    if not welcome:
        with pytest.raises(ServeError):
            parsing.parse_body(body, JSON, ChatRequest, strict=True)


@pytest.mark.parametrize(
    "change", [{"tools": TOOLS["tools"]}, {"response_format": {"type": "json_object"}}, {"logit_bias": {"1": 1}}, {"x": 1}]
)
def test_what_changes_an_answer_is_refused_by_name(change):
    with pytest.raises(ServeError) as e:
        parsing.parse_body(json.dumps(CHAT | change).encode(), JSON, ChatRequest)
    assert e.value.param == next(iter(change))


def test_a_strict_server_is_told_so():
    server = Running(tiny(), strict=True)
    try:
        well_formed(server.post(GOOD | {"store": True}), 400, "store", "unknown_field")
        assert server.post(GOOD).status_code == 200
    finally:
        server.stop()


def test_vllms_names_at_the_top_level_are_ours(running, library):
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


@pytest.mark.parametrize("method", ["base", "ivg"])
def test_usage_so_far_in_every_chunk(running, method):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = GOOD | {"model": f"tiny:{method}", "stream": True, "max_tokens": 12, "ignore_eos": True}
    lines = running.post(body | {"stream_options": options}).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    counts = [c["usage"]["completion_tokens"] for c in chunks]
    assert counts == sorted(counts) and counts[-1] == counts[-2] == 12
    assert {c["usage"]["prompt_tokens"] for c in chunks} == {4}
    if method == "base":
        assert len(set(counts)) > 4
    plain = running.post(body | {"stream_options": {"include_usage": True}}).text
    assert plain.count('"usage":{"prompt_tokens"') == 1


def test_usage_counts_every_prompt_once(running):
    body = GOOD | {"prompt": ["One", "One", "Three"], "n": 2}
    assert running.post(body).json()["usage"]["prompt_tokens"] == 11


# HTTP


def test_openais_javascript_client_passes_the_preflight():
    server = Running(tiny(), cors_origins=["https://app.example"])
    asked = "authorization, content-type, x-stainless-arch, x-stainless-lang, x-stainless-os, x-stainless-retry-count, x-stainless-timeout"
    head = {"origin": "https://app.example", "access-control-request-method": "POST", "access-control-request-headers": asked}
    try:
        answer = httpx.options(f"{server.url}/v1/chat/completions", headers=head)
        allowed = answer.headers["access-control-allow-headers"].lower()
        assert answer.status_code == 200 and all(name in allowed for name in asked.split(", "))
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        stranger = httpx.options(f"{server.url}/v1/chat/completions", headers=head | {"origin": "https://other.example"})
        assert "access-control-allow-origin" not in stranger.headers
        assert server.post(GOOD, headers={"origin": "https://app.example"}).headers["access-control-allow-origin"] == "https://app.example"
    finally:
        server.stop()


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models", "/v1/models/tiny", "/openapi.json", "/"])
def test_head_and_trailing_slashes(running, path):
    whole = httpx.get(running.url + path)
    head = httpx.head(running.url + path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]
    assert httpx.get(running.url + path.rstrip("/") + "/").status_code == 200
    assert httpx.head(f"{running.url}/v1/completions").status_code == 405


def test_posts_with_a_trailing_slash(running):
    assert running.post(GOOD, "/v1/completions/").json()["choices"] == running.post(GOOD).json()["choices"]


def test_keys_guard_the_schema_too():
    server = Running(tiny(), api_keys=["right-key-1"])
    try:
        for path in ("/openapi.json", "/openapi.json/", "/v1/models", "/metrics/"):
            well_formed(httpx.get(server.url + path), 401, code="invalid_api_key")
            assert httpx.get(server.url + path, headers={"authorization": "Bearer right-key-1"}).status_code == 200
    finally:
        server.stop()


def test_two_lengths_of_one_body_are_refused(running):
    with connect(running) as line:
        line.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n")
        line.sendall(b"0\r\n\r\nGET / HTTP/1.1\r\n\r\n")
        head = read_head(line)
        assert head.startswith("HTTP/1.1 400 ") and "connection: close" in head.lower()
        assert line.recv(100) == b""  # what came behind it is not answered


def test_what_is_no_http_is_refused_in_the_same_shape(running):
    with connect(running) as line:
        line.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        answer = b"".join(iter(lambda: line.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"] == "the request is not valid HTTP/1.1"


# Connections


def test_connections_rest_longer_than_a_load_balancer_keeps_them(running):
    assert running.server.config.timeout_keep_alive > 60
    assert ServeSettings(keep_alive=5).keep_alive == 5


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_half_closed_clients_are_answered(running, stream, version):
    with connect(running) as line:
        request = raw(GOOD | {"max_tokens": 30, "ignore_eos": True, "stream": stream})
        line.sendall(request.replace(b"HTTP/1.1", f"HTTP/{version}".encode()))
        line.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: line.recv(4096), b""))
    final = answer.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
    assert final.startswith(b"HTTP/1.1 200 ") and (b"data: [DONE]" if stream else b'"completion_tokens":30') in final


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_is_gone_is_told_from_one_that_is_half_closed(running, stream):
    """Nothing is written of a hypothesis among several, so that only the probe can tell."""
    body = GOOD | {"max_tokens": 250, "stream": stream, "model": "tiny", "guidance": {**SLOW, "successors": 4, "chunk_length": 250}}
    with connect(running) as line:
        line.sendall(raw(body))
        wait_for(lambda: running.worker.searcher.live_requests)
    wait_for(lambda: not running.worker.searcher.live_requests)
    assert running.idle() == 0


def limited(monkeypatch, **limits):
    chosen = Limits(**{"max_connections": 8, "header_timeout": 20.0, "idle_timeout": 20.0, "write_timeout": 20.0, **limits})
    monkeypatch.setattr("ivg.serving.server.connection_limits", lambda max_connections, idle_timeout: chosen)
    return Running(tiny(slow=Slow()))


def test_idle_and_half_sent_connections_end(monkeypatch):
    monkeypatch.setattr("ivg.serving.middleware.BODY_TIMEOUT", 0.4)
    server = limited(monkeypatch, header_timeout=0.4, idle_timeout=0.6)
    try:
        silent, dripping, half = (connect(server) for _ in range(3))
        dripping.sendall(b"GET /health HT")
        half.sendall(raw(GOOD)[:-10])
        for line in (silent, dripping):
            assert line.recv(100) == b""
        assert b" 408 " in half.recv(100)
        for line in (silent, dripping, half):
            line.close()
        wait_for(lambda: not server.server.server_state.connections)
    finally:
        server.stop()


def test_a_head_that_drips_does_not_last(monkeypatch):
    server = limited(monkeypatch, header_timeout=0.5, idle_timeout=600.0)
    try:
        with connect(server) as line:
            line.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n")
            with pytest.raises(OSError):
                for i in range(500):
                    line.sendall(f"x-{i}: y\r\n".encode())
                    time.sleep(0.02)
    finally:
        server.stop()


def test_who_comes_takes_the_place_of_who_rests(monkeypatch):
    server = limited(monkeypatch, max_connections=6)
    try:
        lines = [connect(server) for _ in range(20)]
        lines[-1].sendall(b"GET /hea")
        for _ in range(3):
            assert server.post(GOOD).status_code == 200
        assert len(server.server.server_state.connections) <= 6
        assert lines[0].recv(10) == b""  # the oldest
        for line in lines:
            line.close()
    finally:
        server.stop()


def test_connections_that_are_answered_are_not_closed_for_others(monkeypatch):
    server = limited(monkeypatch, max_connections=3)
    body = GOOD | {"model": "tiny", "max_tokens": 40, "guidance": SLOW}
    try:
        lines = [connect(server) for _ in range(3)]
        for line in lines:
            line.sendall(raw(body))
        wait_for(lambda: server.worker.searcher.live_requests == 3)
        with connect(server) as other:
            head = read_head(other)
            assert head.startswith("HTTP/1.1 503 ") and "retry-after" in head.lower()
        for line in lines:
            assert read_head(line).startswith("HTTP/1.1 200 ")
            line.close()
    finally:
        server.stop()


def test_a_client_that_does_not_read_is_cut_off():
    ended = []

    async def endless(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not ended:
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            if not server.server_state.connections:
                ended.append(scope["path"])

    server = uvicorn.Server(
        uvicorn.Config(
            endless, port=0, http=limited_protocol(Limits(max_connections=4, write_timeout=0.2)), lifespan="off", log_config=None
        )
    )

    async def serve():
        task = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        _, writer = await asyncio.open_connection(*server.servers[0].sockets[0].getsockname()[:2], limit=1024)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await asyncio.wait_for(_until(lambda: ended), 30)
        server.should_exit = True
        await task

    async def _until(fact):
        while not fact():
            await asyncio.sleep(0.01)

    asyncio.run(serve())
    assert ended == ["/"]


def test_limits_leave_room_for_files(monkeypatch):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 256))
    limits = connection_limits(None, 75.0)
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    assert limits.max_connections + limits.backlog + open_files < 256 and limits.max_connections >= 4
    assert connection_limits(5, 75.0).max_connections == 5


def test_a_full_table_of_descriptors_is_one_line(caplog):
    loop = asyncio.new_event_loop()
    throttle_accept_errors(loop)
    error = OSError(24, "Too many open files")
    with caplog.at_level(logging.ERROR):
        for _ in range(1000):
            loop.call_exception_handler({"message": "socket.accept() out of system resource", "exception": error})
        assert len(caplog.records) == 1 and caplog.records[0].fields == {"error": "Too many open files"}
        loop.call_exception_handler({"message": "something else"})
        assert len(caplog.records) == 2
    loop.close()


# Stopping


def test_a_server_that_stops_says_so_while_it_finishes():
    server = Running(tiny(slow=Slow()))
    ask = GOOD | {"model": "tiny", "max_tokens": 60, "guidance": SLOW}
    with ThreadPoolExecutor(1) as pool:
        finishing = pool.submit(server.post, ask)
        wait_for(lambda: server.worker.searcher.live_requests)
        server.server.handle_exit(15, None)
        ready = httpx.get(f"{server.url}/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
        assert httpx.get(f"{server.url}/health").status_code == 200
        late = server.post(GOOD)
        well_formed(late, 503, code="unavailable")
        assert late.headers["retry-after"]
        assert finishing.result().status_code == 200
        server.thread.join(20)
    assert not server.thread.is_alive()


# Logs


def test_warnings_are_lines_of_json():
    code = (
        "import logging, warnings; from ivg.serving.logs import configure_logging, log_event; configure_logging();"
        "warnings.warn('old\\nthing'); logging.getLogger('transformers.x').warning('hm'); logging.getLogger('other').error('oh');"
        "import transformers.utils.logging as t; t.get_logger('transformers.models').warning('really'); log_event('done')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = [json.loads(line) for line in run.stderr.splitlines()]
    assert [line["level"] for line in lines] == ["warning", "warning", "error", "warning", "info"]
    assert "old\nthing" in lines[0]["event"] and run.stdout == ""


# In a process of its own


@pytest.mark.long
def test_three_hundred_idle_connections_and_256_descriptors():
    """Others are served, nothing grows, and every line of the log is JSON."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))"
    served = {"port": 0, "name": "tiny"}
    with Process("-c", f"{limit}\n{SCRIPT}", str(Path(__file__).parents[1]), json.dumps(served)) as server:
        idle = []
        for number in range(300):
            line = server.connect()
            idle.append(line)
            if number % 2:
                line.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n")
        for _ in range(5):
            answer = httpx.post(f"{server.url}/v1/completions", json=GOOD, timeout=300)
            assert answer.status_code == 200
        for line in idle:
            line.close()
        assert httpx.get(f"{server.url}/health", timeout=300).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        code, log = server.end()
    assert code == 0 and len(log) < 40
    assert not [entry for entry in log if entry["level"] == "error"]
