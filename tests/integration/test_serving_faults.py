"""What a server must bear: wrong bodies, wrong keys, clients that go away, models that fail, too many at once, the signal to stop."""

import asyncio
import itertools
import json
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
import torch
from test_serving import SAMPLING, Running, expected, numbers, tiny

from ivg.errors import ConfigError, ModelError, ServeError
from ivg.serving.completions import EventStream
from ivg.serving.errors import one_line
from ivg.serving.keys import read_keys
from ivg.serving.metrics import Metrics
from ivg.serving.protocol import CompletionRequest
from ivg.serving.requests import Progress, RequestHandle
from ivg.serving.served_models import ServedModels
from ivg.serving.worker import Worker
from ivg.settings.recipe import Recipe
from ivg.settings.serve import ServeSettings
from ivg.values.base import FunctionValue


class NaNGuide:
    """Guides tokens like another value, but gives NaN where the prompt says so."""

    name = "nan"

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    @property
    def vocabulary(self):
        return self.inner.vocabulary

    def deltas(self, hypotheses):
        out = self.inner.deltas(hypotheses)
        for i, h in enumerate(hypotheses):
            if "poison" in str(h.prompt.content):
                out[i] = float("nan")
        return out

    def score(self, hypotheses):
        return self.inner.score(hypotheses)

    def check(self, prompt, new_tokens):
        self.inner.check(prompt, new_tokens)

    def release(self, keys):
        self.inner.release(keys)


def explode(prompt, response):
    if "dynamite" in prompt and len(response) > 4:
        raise ZeroDivisionError("secret detail")
    return len(response)


class Slow:
    """A value that takes its time, so that there is something to interrupt."""

    name = "slow"

    def __init__(self, seconds=0.03):
        self.seconds, self.calls = seconds, 0

    def score(self, hypotheses):
        self.calls += 1
        time.sleep(self.seconds)
        return [float(len(h.token_ids)) for h in hypotheses]

    def check(self, prompt, new_tokens):
        pass

    def release(self, keys):
        pass


class Endless:
    """A value that computes for ten minutes, inside PyTorch."""

    name = "endless"

    def score(self, hypotheses):
        print('{"event": "inside the endless value", "level": "info"}', file=sys.stderr, flush=True)
        until = time.monotonic() + 600
        while time.monotonic() < until:
            torch.ones(64, 64) @ torch.ones(64, 64)
        return [0.0 for _ in hypotheses]

    def check(self, prompt, new_tokens):
        pass

    def release(self, keys):
        pass


SLOW = {"method": "custom", "select": "slow", "width": 1, "successors": 2, "chunk_length": 1, "ignore_eos": True}


def values():
    return {"nan": NaNGuide(tiny().values["implicit"]), "mine": FunctionValue(explode, "mine"), "slow": Slow(), "endless": Endless()}


@pytest.fixture(scope="module")
def running():
    server = Running(tiny(**values()), max_tokens=2048)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def library():
    return tiny()


def well_formed(response, status, param=None, code=None):
    """An error in OpenAI's shape, with nothing of our insides in it."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert "Traceback" not in response.text and "/src/" not in response.text
    if param is not None:
        assert error["param"] == param, error
    if code is not None:
        assert error["code"] == code, error
    return error


# Bodies


GOOD = {"model": "tiny", "prompt": "Film", "max_tokens": 4}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tempreature": 1}, "tempreature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e-9}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"max_tokens": 255}, "prompt"),
        ({"n": 65}, "n"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"50256": -100}}, "logit_bias"),
        ({"echo": True}, "echo"),
        ({"best_of": 3}, "best_of"),
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
        ({"guidance": {"beta": 1e30}}, "guidance.beta"),
        ({"guidance": {"method": "genarm"}}, "guidance.method"),
        ({"model": "tiny:eft", "guidance": {"method": "ivg"}}, "guidance.method"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [70000]}, "prompt"),
        ({"prompt": []}, None),
        ({"prompt": "\ud800"}, None),
        ({"prompt": ["a", "\ud800"]}, None),
        ({"\ud800": 1}, None),
    ],
)
def test_bad_bodies_name_the_field(running, change, param):
    response = httpx.post(f"{running.url}/v1/completions", content=json.dumps(GOOD | change), headers={"content-type": "application/json"})
    well_formed(response, 400, param)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ],
)
def test_bad_chats_name_the_field(running, change, param):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Film"}], **change}
    well_formed(running.post(body, "/v1/chat/completions"), 400, param)


def test_neutral_fields_are_welcome(running):
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "echo": False, "best_of": 1, "user": "me", "suffix": None}
    assert running.post(GOOD | neutral).status_code == 200
    chat = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False, "service_tier": "auto"}
    messages = [{"role": "user", "content": "Film"}]
    assert running.post({"model": "tiny", "messages": messages, "max_tokens": 3, **chat}, "/v1/chat/completions").status_code == 200


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 5000, b'{"temperature": NaN}', b'{"temperature": 1e999}'])
def test_malformed_bodies(running, raw):
    response = httpx.post(f"{running.url}/v1/completions", content=raw, headers={"content-type": "application/json"})
    well_formed(response, 400)


def test_unknown_things(running):
    well_formed(running.post(GOOD | {"model": "gpt-4"}), 404, "model", "model_not_found")
    well_formed(httpx.get(f"{running.url}/v1/models/gpt-4"), 404, "model")
    message = well_formed(httpx.get(f"{running.url}/v1/nothing"), 404)["message"]
    assert message.startswith("no path '/v1/nothing'; expected one of: /v1/chat/completions, /v1/completions, ")
    well_formed(httpx.get(f"{running.url}/v1/completions"), 405)
    with pytest.raises(openai.NotFoundError):
        running.client().completions.create(model="gpt-4", prompt="x")


def test_lines_of_an_error_become_one():
    assert one_line("empty prompt\n  expected: some text") == "empty prompt; expected: some text"
    assert one_line("they differ:\n  one\n\n  other\n") == "they differ: one; other"


def test_an_empty_prompt_is_told_in_one_line(running):
    error = well_formed(running.post(GOOD | {"prompt": ""}), 400, "prompt", "invalid_prompt")
    assert error["message"].startswith("empty prompt; expected: ")


def test_long_prompts_are_refused_and_not_remembered(running):
    before = running.served.model.base.prompt_ids.cache_info().currsize
    for prompt in ("x" * 1500, "x" * 500_000, [5] * 300):
        well_formed(running.post(GOOD | {"prompt": prompt}), 400, "prompt", "context_length_exceeded")
    assert running.served.model.base.prompt_ids.cache_info().currsize == before


def test_large_bodies(running):
    well_formed(running.post(GOOD | {"prompt": "x" * (1 << 21)}), 413, code="body_too_large")

    def chunks():
        for _ in range(64):
            yield b" " * (1 << 16)

    headers = {"content-type": "application/json"}
    well_formed(httpx.post(f"{running.url}/v1/completions", content=chunks(), headers=headers), 413)


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
@pytest.mark.parametrize(("key", "size", "status"), [("right-key", 8 << 20, 413), ("wrong", 8 << 20, 401), ("wrong", 10, 401)])
def test_a_refused_body_is_read_to_its_end(connection, key, size, status):
    """As proxies send: everything first, then they look for an answer. nginx says close; a connection that is kept serves again."""
    server = Running(tiny(), api_keys=["right-key"])
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: {connection}\r\nauthorization: Bearer {key}\r\n"
    try:
        with socket.create_connection((host, int(port)), timeout=200) as line:
            line.sendall(f"{head}content-length: {size}\r\n\r\n".encode() + b" " * size)
            assert read_head(line).startswith(f"HTTP/1.1 {status} ")
            if connection == "keep-alive":
                line.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
                assert read_head(line).startswith("HTTP/1.1 200 ")
        with socket.create_connection((host, int(port)), timeout=200) as line:  # who asks first is told before sending anything
            line.sendall(f"{head}expect: 100-continue\r\ncontent-length: {size}\r\n\r\n".encode())
            assert read_head(line).startswith(f"HTTP/1.1 {status} ")
    finally:
        server.stop()


def read_head(line):
    """The head of a response; its body is read too."""
    file = line.makefile("rb", buffering=0)
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += file.read(1) or pytest.fail(f"closed after {head!r}")
    length = next(int(h.split(b":")[1]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length"))
    while length:
        length -= len(file.read(length) or pytest.fail("closed within the body"))
    return head.decode()


# Failing models


def test_nan_fails_its_own_request(running, library):
    def ask(prompt):
        return running.post({"model": "tiny", "prompt": prompt, "seed": 3, **SAMPLING, "guidance": {"method": "custom", "token": "nan"}})

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, ["Film", "poison", "Other", "poison 2"]))
    for prompt, answer in zip(["Film", "Other"], answers[::2], strict=True):
        assert answer.json()["choices"][0]["text"] == expected(library, prompt, "custom", 3, token="implicit").text
    for answer in answers[1::2]:
        assert "NaN" in well_formed(answer, 500, code="model_error")["message"]
    assert running.idle() == 0


def test_a_value_that_raises_fails_its_own_request(running, library):
    """Streams of others go on where they were."""
    guidance = {"method": "custom", "token": "implicit", "select": "mine", "successors": 2, "chunk_length": 3}

    def stream(prompt):
        body = {"model": "tiny", "prompt": prompt, "seed": 3, "stream": True, "guidance": guidance, **SAMPLING}
        text, error = "", None
        with httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=300) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    data = json.loads(line[6:])
                    error = data.get("error", error)
                    text += "" if error else data["choices"][0]["text"]
        return text, error

    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(stream, ["Film", "dynamite", "Other", "More", "dynamite too"]))
    settings = {"token": "implicit", "select": "length", "successors": 2, "chunk_length": 3}
    for i, prompt in ((0, "Film"), (2, "Other"), (3, "More")):
        assert answers[i] == (expected(library, prompt, "custom", 3, **settings).text, None)
    for i in (1, 4):
        assert answers[i][1]["code"] == "model_error" and "secret" not in answers[i][1]["message"]
    assert running.idle() == 0
    assert httpx.get(f"{running.url}/health").status_code == 200
    assert numbers(running)["ivg_model_failures_total"] >= 1


# Clients that go away


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_rows(running, stream):
    body = {"model": "tiny", "prompt": "Long", "max_tokens": 200, "stream": stream, "guidance": SLOW}
    raw = json.dumps(body).encode()
    host, port = running.url.removeprefix("http://").split(":")
    before = running.served.model.values["slow"].calls
    with socket.create_connection((host, int(port))) as s:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
        s.sendall(head.encode() + raw)
        until = time.monotonic() + 200
        while running.served.model.values["slow"].calls < before + 3 and time.monotonic() < until:
            time.sleep(0.005)
        assert running.worker.searcher.live_requests == 1
    assert running.idle() == 0
    assert running.worker.searcher.live_requests == 0
    assert running.served.model.values["slow"].calls - before < 200  # rounds of a whole answer


def test_a_long_answer_does_not_starve_short_ones(running):
    long = {"model": "tiny:base", "prompt": "Long", "max_tokens": 240, "guidance": {"ignore_eos": True}}
    with ThreadPoolExecutor(1) as pool:
        started = time.monotonic()
        other = pool.submit(lambda: (running.post(long), time.monotonic())[1])
        while not running.worker.searcher.live_requests:
            time.sleep(0.001)
        for _ in range(3):
            assert running.post({"model": "tiny:base", "prompt": "Short", "max_tokens": 4}).status_code == 200
        short = time.monotonic() - started
        assert not other.done()
        assert short < other.result() - started


# Limits


def test_keys():
    server = Running(tiny(), api_keys=("first-key-1", "second-key-2"))
    try:
        for key in ("first-key-1", "second-key-2"):
            assert server.client(key).completions.create(model="tiny:base", prompt="x", max_tokens=2).choices
        for key in ("wrong", "first-key-11", "first-key"):
            with pytest.raises(openai.AuthenticationError):
                server.client(key).completions.create(model="tiny:base", prompt="x", max_tokens=2)
        for path in ("/v1/models", "/metrics", "/v1/nothing"):
            well_formed(httpx.get(server.url + path), 401, code="invalid_api_key")
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(f"{server.url}/v1/models", headers={"authorization": "Bearer first-key-1"}).status_code == 200
    finally:
        server.stop()


def test_full_queue_deadline_and_drain(caplog):
    server = Running(tiny(**values()), queue_limit=2, max_beams=2, deadline=5.0, drain=200.0)
    ask = {"model": "tiny", "prompt": "Long and private", "max_tokens": 200, "guidance": SLOW}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: server.post(ask), range(6)))
        refused = [a for a in answers if a.status_code == 429]
        late = [a for a in answers if a.status_code == 504]
        assert len(refused) + len(late) == 6 and len(refused) >= 2 and len(late) >= 2
        assert all(a.headers["retry-after"] for a in refused)
        well_formed(refused[0], 429, code="queue_full")
        well_formed(late[0], 504, code="deadline_exceeded")
        assert server.idle() == 0
        quick = {"model": "tiny", "prompt": "x", "max_tokens": 8, "guidance": SLOW}
        finishing = pool.submit(server.post, quick)  # a quarter of a second: may be finished
        while not server.worker.searcher.live_requests and not finishing.done():
            time.sleep(0.005)
        server.stop()
        assert finishing.result().status_code == 200
    assert "private" not in caplog.text
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


def test_what_is_not_finished_in_time_is_told_so():
    server = Running(tiny(**values()), drain=0.3)
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(server.post, {"model": "tiny", "prompt": "Long", "max_tokens": 200, "guidance": SLOW})
        while not server.worker.searcher.live_requests:
            time.sleep(0.005)
        server.stop()
        well_formed(whole.result(), 503, code="unavailable")


def test_a_dead_worker_is_reported(monkeypatch):
    def step():
        raise SystemExit("the thread ends")

    server = Running(tiny())
    monkeypatch.setattr(server.worker.searcher, "step", step)
    try:
        well_formed(server.post({"model": "tiny:base", "prompt": "x", "max_tokens": 2}), 503)
        assert httpx.get(f"{server.url}/health").json() == {"status": "dead"}
        well_formed(server.post({"model": "tiny:base", "prompt": "x", "max_tokens": 2}), 503)
    finally:
        server.stop()


def test_many_at_once_with_all_kinds_of_trouble(running, library):
    """Good answers are the library's, bad ones well-formed, and nothing is left."""
    wanted = {i: expected(library, f"Film {i}", "ivg", i).text for i in range(4)}

    async def one(client, i):
        kind = i % 5
        if kind == 0:
            answer = await client.post("/v1/completions", json={"model": "tiny:ivg", "prompt": f"Film {i % 4}", "seed": i % 4, **SAMPLING})
            assert answer.json()["choices"][0]["text"] == wanted[i % 4]
        elif kind == 1:
            body = {"model": "tiny:eft", "prompt": "x", "stream": True, "max_tokens": 100}
            async with client.stream("POST", "/v1/completions", json=body) as response:
                async for _ in response.aiter_lines():
                    break
        elif kind == 2:
            well_formed(await client.post("/v1/completions", content=b"{" * i, headers={"content-type": "application/json"}), 400)
        elif kind == 3:
            well_formed(await client.post("/v1/completions", json={"model": "none", "prompt": "x"}), 404)
        else:
            body = {"model": "tiny", "prompt": "poison", "guidance": {"method": "custom", "token": "nan"}}
            well_formed(await client.post("/v1/completions", json=body), 500)

    async def all_of_them():
        async with httpx.AsyncClient(base_url=running.url, timeout=300) as client:
            await asyncio.gather(*(one(client, i) for i in range(40)))

    asyncio.run(all_of_them())
    assert running.idle() == 0


@pytest.mark.long
def test_fuzzed_by_its_own_schema(tmp_path):
    """Whatever fits the schema, and what nearly does, never gives 500."""
    server = Running(tiny(), max_tokens=6, deadline=30.0)
    try:
        tool = Path(sys.executable).with_name("schemathesis")
        command = [tool, "run", f"{server.url}/openapi.json", "--max-examples", "20", "--seed", "5"]
        checks = "not_a_server_error,status_code_conformance,content_type_conformance"
        run = subprocess.run(
            [*command, "--phases", "fuzzing", "--checks", checks], capture_output=True, text=True, timeout=1800, cwd=tmp_path
        )
        assert run.returncode == 0, run.stdout
        assert "7 passed" in run.stdout
        assert server.worker.alive and server.idle() == 0
    finally:
        server.stop()


# Settings


def test_settings(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst-key-1\n\nsecond-key-2\n")
    monkeypatch.setenv("IVG_API_KEYS", "third-key-3, second-key-2")
    assert read_keys(file) == ("first-key-1", "second-key-2", "third-key-3")
    monkeypatch.delenv("IVG_API_KEYS")
    assert read_keys(None) is None
    file.write_text("# none\n")
    with pytest.raises(ConfigError, match="no key"):
        read_keys(file)
    assert Recipe.parse({"serve": {"port": 1}}).override(serve={"port": 2, "host": None}).serve == ServeSettings(port=2)
    with pytest.raises(ConfigError, match=r"unknown setting serve\.prot; did you mean port\?"):
        Recipe.parse({"serve": {"prot": 1}})
    with pytest.raises(ConfigError, match=r"serve\.api_keys: an API key has at least 8 ASCII characters") as e:
        Recipe.parse({"serve": {"api_keys": ["short"]}})
    assert "short" not in str(e.value)


def test_models_that_cannot_begin_anew_at_once_are_tried_again(monkeypatch):
    """An engine that died and finds no memory yet: who asks meanwhile is told so at once, however many ask, and the server lives."""

    def bomb(prompt, response):
        if "dynamite" in prompt:
            raise ModelError("the engine died")
        return len(response)

    model = tiny(bomb=FunctionValue(bomb, "bomb"))
    server, again, reset_caches, memory = Running(model), [], model.reset_caches, threading.Event()
    monkeypatch.setattr("ivg.serving.worker.RESTART_SECONDS", 1.0)

    def hard():
        again.append(time.monotonic())
        if not memory.is_set():
            time.sleep(0.3)  # longer than it takes the next to come
            raise ModelError("no memory yet")
        return reset_caches()

    def ask(prompt):
        guidance = {"method": "custom", "select_value": "bomb", "successors": 2, "chunk_length": 8}
        return server.post(GOOD | {"prompt": prompt, "max_tokens": 8, "guidance": guidance})

    monkeypatch.setattr(model, "reset_caches", hard)
    try:
        first = ask("dynamite")
        assert httpx.get(f"{server.url}/ready").json() == {"status": "restarting"}
        with ThreadPoolExecutor(4) as pool:
            told = list(pool.map(ask, ["Film"] * 12))
        while len(again) < 2:
            time.sleep(0.05)
        memory.set()
        while httpx.get(f"{server.url}/ready").status_code != 200:  # by itself: nobody needs to ask
            time.sleep(0.05)
        last = ask("Film")
        assert server.idle() == 0 and server.worker.alive
    finally:
        server.stop()
    well_formed(first, 503, code="unavailable")
    assert {answer.status_code for answer in told} == {503}
    assert last.status_code == 200 and len(again) >= 3
    assert all(b - a >= 1.0 for a, b in itertools.pairwise(again))


def test_a_request_that_is_alone_when_an_engine_dies_is_tried_once_more(monkeypatch):
    """It need not be its fault, unless it is again."""
    tries = []

    def deadly(prompt, response):
        tries.append(prompt)
        if "dynamite" in prompt or len(tries) == 1:
            raise ModelError("the engine died")
        return len(response)

    model = tiny(deadly=FunctionValue(deadly, "deadly"))
    reset_caches = model.reset_caches
    monkeypatch.setattr(model, "reset_caches", lambda: reset_caches() or True)
    server = Running(model)
    guidance = {"method": "custom", "select_value": "deadly", "chunk_length": 4}
    try:
        fine, guilty = (server.post(GOOD | {"prompt": p, "max_tokens": 4, "guidance": guidance}) for p in ("Film", "dynamite"))
        assert server.idle() == 0
    finally:
        server.stop()
    assert fine.status_code == 200 and tries.count("Film") >= 2
    well_formed(guilty, 500, code="model_error")
    assert tries.count("dynamite") == 2


def test_an_engine_that_dies_as_somebody_leaves_takes_nobody_with_it(monkeypatch):
    model = tiny()
    release, dead = model.engine.release, []

    def deadly(keys):
        if not dead and leaving:
            dead.append(keys)
            raise ModelError("the engine died")
        release(keys)

    leaving = []
    monkeypatch.setattr(model.engine, "release", deadly)
    server = Running(model)
    body = GOOD | {"max_tokens": 200, "seed": 3, "guidance": {"method": "base", "ignore_eos": True}}
    try:
        alone = server.post(body | {"prompt": "Other"})
        with ThreadPoolExecutor(1) as pool, httpx.stream("POST", f"{server.url}/v1/completions", json=body | {"stream": True}) as response:
            other = pool.submit(server.post, body | {"prompt": "Other"})
            next(response.iter_bytes())
            leaving.append(True)
            response.close()
            answer = other.result()
        assert server.idle() == 0 and server.worker.alive
    finally:
        server.stop()
    assert dead and answer.status_code == 200
    assert answer.json()["choices"][0]["text"] == alone.json()["choices"][0]["text"]


def test_memory_is_given_back_now_and_then(monkeypatch):
    model = tiny()
    given = []
    monkeypatch.setattr(model, "release_memory", lambda: given.append(len(model.readers)))
    monkeypatch.setattr("ivg.serving.worker.RELEASE_SECONDS", 0.0)
    server = Running(model)
    try:
        assert server.post(GOOD | {"max_tokens": 4}).status_code == 200
        assert server.idle() == 0
    finally:
        server.stop()
    assert given


def test_new_requests_wait_while_a_failed_step_is_bisected():
    """Else, under constant load, the suspects would never run alone."""
    scored, handles = [], {}

    def value(prompt, response):
        if not scored or scored[-1] != prompt:
            scored.append(prompt)
        if prompt == "b" and "failed" not in scored:
            scored.append("failed")
            worker.submit(handles["c"])
            raise ModelError("the engine died")
        if prompt == "b" and "d" in handles:
            worker.submit(handles.pop("d"))
        return len(response)

    served = ServedModels(tiny(mine=FunctionValue(value, "mine")), Recipe(), ServeSettings(name="tiny"))
    worker = Worker(served)

    async def serve():
        guidance = {"method": "custom", "select_value": "mine", "successors": 2, "chunk_length": 4}
        body = {"model": "tiny", "max_tokens": 12, "guidance": guidance, "ignore_eos": True}
        for p in "abcd":
            handles[p] = RequestHandle(CompletionRequest.model_validate(body | {"prompt": p}), 1, 200.0)
        waiting = list(handles.values())
        worker.submit(handles["a"])
        worker.submit(handles["b"])
        worker.start()
        for handle in waiting:
            event = await handle.events.get()
            while not (isinstance(event, Progress) and event.completion):
                assert not isinstance(event, ServeError), event
                event = await handle.events.get()
        worker.drain()
        worker.thread.join(200)

    asyncio.run(serve())
    again = scored[scored.index("failed") + 1 :]
    assert scored[:3] == ["a", "b", "failed"] and again[:2] == ["a", "b"]  # each alone
    assert again[2:] == ["c", "d"] * 3  # then both together, a chunk of 4 tokens at a time


def test_a_client_that_goes_as_its_next_event_comes_is_let_go():
    """Leaving and news in one turn of the loop: whoever writes the stream must not take the news and wait for more, for ever."""

    async def leave():
        handle, left = RequestHandle(None, 1, 60.0), asyncio.Event()
        worker = SimpleNamespace(thread=threading.current_thread(), seconds_left=60.0, metrics=Metrics())
        worker.cancel = lambda handle: handle.deliver([Progress(0, "", (), (), (), None)])  # just before the writer is cancelled
        stream = SimpleNamespace(finished=False, start=list, update=lambda progress: [])

        async def receive():
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        writing = asyncio.ensure_future(EventStream(stream, handle, worker)({}, receive, send))
        await asyncio.sleep(0.05)
        left.set()
        done, _ = await asyncio.wait({writing}, timeout=200)
        writing.cancel()
        return bool(done)

    assert asyncio.run(leave())
