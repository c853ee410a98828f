"""Request bodies over HTTP: errors name the field; limits of bodies."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest

from serving_tools import GOOD, JSON, Running, connect, read_head, tiny, well_formed

ASK = {"model": "tiny", "prompt": "Film", "max_tokens": 4}


@pytest.fixture(scope="module")
def running():
    with Running(tiny(), max_tokens=2048) as server:
        yield server


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tempreature": 1}, "tempreature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"max_tokens": 255}, "prompt"),
        ({"n": 65}, "n"),
        ({"presence_penalty": -2.5}, "presence_penalty"),
        ({"logit_bias": {"50256": -100}}, "logit_bias"),
        ({"stop_token_ids": [257]}, "stop_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"echo": "yes"}, "echo"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"best_of": 65}, "best_of"),
        ({"suffix": "!"}, "suffix"),
        ({"stop": ""}, "stop"),
        ({"seed": 1 << 70}, "seed"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_beam": True}}, "stream_options.include_beam"),
        ({"guidance": {"betta": 1}}, "guidance.betta"),
        ({"guidance": {"method": "magic"}}, "guidance.method"),
        ({"guidance": {"width": 0}}, "guidance.width"),
        ({"guidance": {"width": 100, "successors": 100}}, "guidance.successors"),
        ({"guidance": {"chunk_length": 100000}}, "guidance.chunk_length"),
        ({"guidance": {"method": "mcts", "chunk_length": 1}, "max_tokens": 100}, "guidance.chunk_length"),
        ({"guidance": {"method": "mcts", "exploration": -1}}, "guidance.exploration"),
        ({"guidance": {"method": "rsd", "drafter": "explicit"}}, "guidance"),
        ({"guidance": {"method": "rsd", "acceptance": "always"}}, "guidance.acceptance"),
        ({"guidance": {"beta": 1e30}}, "guidance.beta"),
        ({"guidance": {"method": "genarm"}}, "guidance.method"),
        ({"model": "tiny:eft", "guidance": {"method": "ivg"}}, "guidance.method"),
        ({"guidance": {"forced_eos_token_id": 9999}}, "guidance.forced_eos_token_id"),
        ({"guidance": {"forced_eos_token_id": -1}}, "guidance.forced_eos_token_id"),
        ({"guidance": {"forced_bos_token_id": 257}}, "guidance.forced_bos_token_id"),
        ({"guidance": {"suppress_tokens": [1, 257]}}, "guidance.suppress_tokens"),
        ({"guidance": {"bad_words_ids": [[257]]}}, "guidance.bad_words_ids"),
        ({"guidance": {"sequence_bias": [[[1, 257], 2.0]]}}, "guidance.sequence_bias"),
        ({"guidance": {"suppress_tokens": list(range(257))}}, "guidance"),  # all of them: no token may be drawn
        ({"prompt": ""}, "prompt"),
        ({"prompt": [70000]}, "prompt"),
        ({"prompt": []}, None),
        ({"prompt": "\ud800"}, None),
        ({"prompt": ["a", "\ud800"]}, None),
        ({"\ud800": 1}, None),
    ],
)
def test_bad_bodies_name_the_field(running, change, param):
    response = httpx.post(f"{running.url}/v1/completions", content=json.dumps(ASK | change), headers={"content-type": "application/json"})
    well_formed(response, 400, param)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages[0].role"),
    ],
)
def test_bad_chats_name_the_field(running, change, param):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Film"}], **change}
    well_formed(running.post(body, "/v1/chat/completions"), 400, param)


def test_a_like_name_is_suggested(running):
    message = well_formed(running.post(ASK | {"tempreature": 1}), 400, "tempreature")["message"]
    assert message == "unknown field tempreature; did you mean temperature?"
    message = well_formed(running.post(ASK | {"guidance": {"methd": "ivg"}}), 400, "guidance.methd")["message"]
    assert message == "unknown field guidance.methd; did you mean method?"


def test_neutral_values_are_accepted(running):
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "echo": False, "best_of": 1, "user": "me", "suffix": None}
    assert running.post(ASK | neutral).status_code == 200
    chat = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False, "service_tier": "auto"} | {
        "verbosity": "medium"
    }
    messages = [{"role": "user", "content": "Film"}]
    assert running.post({"model": "tiny", "messages": messages, "max_tokens": 3, **chat}, "/v1/chat/completions").status_code == 200


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 5000, b'{"temperature": NaN}', b'{"temperature": 1e999}'])
def test_malformed_bodies(running, raw):
    response = httpx.post(f"{running.url}/v1/completions", content=raw, headers={"content-type": "application/json"})
    well_formed(response, 400)


def test_not_found(running):
    well_formed(running.post(ASK | {"model": "gpt-4"}), 404, "model", "model_not_found")
    well_formed(httpx.get(f"{running.url}/v1/models/gpt-4"), 404, "model")
    message = well_formed(httpx.get(f"{running.url}/v1/nothing"), 404)["message"]
    assert message.startswith("no path '/v1/nothing'; expected one of: /v1/chat/completions, /v1/completions, ")
    well_formed(httpx.get(f"{running.url}/v1/completions"), 405)
    with pytest.raises(openai.NotFoundError):
        running.client().completions.create(model="gpt-4", prompt="x")


def test_empty_prompt(running):
    error = well_formed(running.post(ASK | {"prompt": ""}), 400, "prompt", "invalid_prompt")
    assert error["message"].startswith("empty prompt; expected: ")
    for prompt in ("\n", " "):  # white space is text
        ids = running.served.model.base.tokenizer(prompt).input_ids
        as_text, as_ids = (running.post(ASK | {"prompt": p, "seed": 1}).json()["choices"][0]["text"] for p in (prompt, ids))
        assert as_text == as_ids


def test_long_prompts_are_refused_and_not_cached(running):
    before = running.served.model.base.prompt_ids.cache_info().currsize
    for prompt in ("x" * 1500, "x" * 500_000, [5] * 300):
        well_formed(running.post(ASK | {"prompt": prompt}), 400, "prompt", "context_length_exceeded")
    assert running.served.model.base.prompt_ids.cache_info().currsize == before


def test_large_bodies(running):
    well_formed(running.post(ASK | {"prompt": "x" * (1 << 21)}), 413, code="body_too_large")

    def chunks():
        for _ in range(64):
            yield b" " * (1 << 16)

    headers = {"content-type": "application/json"}
    well_formed(httpx.post(f"{running.url}/v1/completions", content=chunks(), headers=headers), 413)


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
@pytest.mark.parametrize(("key", "size", "status"), [("right-key", 8 << 20, 413), ("wrong", 8 << 20, 401), ("wrong", 10, 401)])
def test_a_refused_body_is_read_to_its_end(connection, key, size, status):
    """Proxies read the response after sending the whole body. nginx closes its connections; a kept connection can be used again."""
    server = Running(tiny(), api_keys=["right-key"])
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: {connection}\r\nauthorization: Bearer {key}\r\n"
    with server:
        with connect(server) as line:
            line.sendall(f"{head}content-length: {size}\r\n\r\n".encode() + b" " * size)
            assert read_head(line).startswith(f"HTTP/1.1 {status} ")
            if connection == "keep-alive":
                line.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
                assert read_head(line).startswith("HTTP/1.1 200 ")
        with connect(server) as line:  # with Expect, the refusal comes before the body
            line.sendall(f"{head}expect: 100-continue\r\ncontent-length: {size}\r\n\r\n".encode())
            assert read_head(line).startswith(f"HTTP/1.1 {status} ")


def test_keys():
    with Running(tiny(), api_keys=("first-key-1", "second-key-2")) as server:
        for key in ("first-key-1", "second-key-2"):
            assert server.client(key).completions.create(model="tiny:base", prompt="x", max_tokens=2).choices
        for key in ("wrong", "first-key-11", "first-key"):
            with pytest.raises(openai.AuthenticationError):
                server.client(key).completions.create(model="tiny:base", prompt="x", max_tokens=2)
        for path in ("/v1/models", "/metrics", "/v1/nothing"):
            well_formed(httpx.get(server.url + path), 401, code="invalid_api_key")
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(f"{server.url}/v1/models", headers={"authorization": "Bearer first-key-1"}).status_code == 200


@pytest.mark.long
def test_fuzzed_by_its_own_schema(tmp_path):
    """Bodies that fit the schema, or nearly do, never give 500."""
    with Running(tiny(), max_tokens=6, deadline=30.0) as server:
        tool = Path(sys.executable).with_name("schemathesis")
        command = [tool, "run", f"{server.url}/openapi.json", "--max-examples", "20", "--seed", "5"]
        checks = "not_a_server_error,status_code_conformance,content_type_conformance"
        run = subprocess.run(
            [*command, "--phases", "fuzzing", "--checks", checks], capture_output=True, text=True, timeout=1800, cwd=tmp_path
        )
        assert run.returncode == 0, run.stdout
        assert "8 passed" in run.stdout  # one for each operation
        server.wait_until_idle()
        assert server.worker.alive


def test_refusals_are_openai_errors(running):
    for headers, content in (({"content-encoding": "gzip"}, gzip.compress(b"{}")), ({"content-type": "text/plain"}, b"{}")):
        answer = httpx.post(f"{running.url}/v1/completions", content=content, headers=JSON | headers)
        well_formed(answer, 415)
    well_formed(httpx.post(f"{running.url}/v1/completions", content=b"[" * 50_000, headers=JSON), 400, code="invalid_json")


def test_strict_server():
    with Running(tiny(), strict=True) as server:
        well_formed(server.post(GOOD | {"store": True}), 400, "store", "invalid_value")
        assert server.post(GOOD).status_code == 200


def test_two_lengths_of_one_body_are_refused(running):
    with connect(running) as line:
        line.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n"
            b"0\r\n\r\nGET / HTTP/1.1\r\n\r\n"
        )
        head = read_head(line)
        assert head.startswith("HTTP/1.1 400 ") and "connection: close" in head.lower()
        assert line.recv(100) == b""  # the second request is not answered


def test_keys_protect_the_schema():
    with Running(tiny(), api_keys=["right-key-1"]) as server:
        for path in ("/openapi.json", "/openapi.json/", "/v1/models", "/metrics/"):
            well_formed(httpx.get(server.url + path), 401, code="invalid_api_key")
            assert httpx.get(server.url + path, headers={"authorization": "Bearer right-key-1"}).status_code == 200
