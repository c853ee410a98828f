"""The server over a real socket, with OpenAI's own client: what it answers is what the library answers, whatever happens around it."""

import asyncio
import threading
import time

import httpx
import openai
import pytest

from ivg.config import Recipe
from ivg.serving.presets import Presets
from ivg.serving.run import make_server
from ivg.serving.settings import ServeSettings
from ivg.steered import SteeredModel
from ivg.testing import tiny_reader, tiny_value
from ivg.types import SamplingParams
from ivg.values.base import FunctionValue
from ivg.values.implicit import ImplicitValue

SAMPLING = {"temperature": 0.9, "max_tokens": 16}


def tiny(**more):
    """A small model with every kind of value; ``more`` are further values."""
    tokens = tiny_reader("base").tokenizer
    pair = ImplicitValue(tiny_reader("tuned", seed=1, tokenizer=tokens), tiny_reader("untuned", seed=2, tokenizer=tokens))
    values = {"implicit": pair, "explicit": tiny_value(seed=3, tokenizer=tokens), "length": FunctionValue(lambda p, r: len(r), "length")}
    return SteeredModel(tiny_reader("base", tokenizer=tokens), values | more, SamplingParams(temperature=0.9, max_new_tokens=16))


class Running:
    """A server in a thread."""

    def __init__(self, model, **settings):
        settings = ServeSettings(**{"port": 0, "name": "tiny", "drain": 5.0, **settings})
        self.presets = Presets(model, Recipe(), settings)
        self.server = make_server(self.presets)
        self.worker = self.server.worker
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def client(self, key="none", **settings):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **settings)

    def post(self, body, path="/v1/completions", **settings):
        return httpx.post(self.url + path, json=body, timeout=60, **settings)

    def idle(self, seconds=5.0):
        """Wait until nothing runs; rows in use then."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and (self.worker.searcher.busy or self.worker.waiting):
            time.sleep(0.01)
        time.sleep(0.05)
        return sum(r.model.live_rows for r in readers(self.presets.model))

    def stop(self):
        self.server.handle_exit(15, None)
        self.thread.join(20)
        assert not self.thread.is_alive()


def readers(model):
    from ivg.steered import readers_in

    return [model.base, *(r for v in model.values.values() for r in readers_in(v))]


@pytest.fixture(scope="module")
def running():
    server = Running(tiny())
    yield server
    server.stop()


@pytest.fixture(scope="module")
def library():
    return tiny()


def expected(library, prompt, method, seed, index=0, **settings):
    settings = {"temperature": 0.9, "max_new_tokens": 16, **settings}
    return next(library.run([library.request(prompt, method, seed=seed, index=index, **settings)]))[1]


# What is answered


@pytest.mark.parametrize("method", ["base", "eft", "ivg", "bon", "cbs-implicit", "smc", "token-explicit"])
def test_completion_is_the_librarys(running, library, method):
    got = running.client().completions.create(model=f"tiny:{method}", prompt="The movie", seed=7, **SAMPLING)
    want = expected(library, "The movie", method, 7)
    assert got.choices[0].text == want.text
    assert got.choices[0].finish_reason == want.finish_reason
    assert got.usage.prompt_tokens == want.usage.prompt_tokens
    assert got.usage.completion_tokens == len(want.token_ids)
    assert got.ivg["method"] == method
    assert got.ivg["usage"] == dict(want.usage.forward_tokens)
    assert got.ivg["tokens_read"] == want.usage.total_forward_tokens
    assert got.ivg["score"] == (None if want.score is None else pytest.approx(want.score, abs=1e-4))


@pytest.mark.parametrize("method", ["base", "eft", "ivg", "bon"])
def test_streams_add_up(running, library, method):
    chunks = list(running.client().completions.create(
        model=f"tiny:{method}", prompt="The movie", seed=3, stream=True, stream_options={"include_usage": True}, **SAMPLING
    ))  # fmt: skip
    want = expected(library, "The movie", method, 3)
    texts = [c.choices[0].text for c in chunks if c.choices]
    assert "".join(texts) == want.text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == want.finish_reason
    assert chunks[-1].usage.completion_tokens == len(want.token_ids)
    assert chunks[-2].ivg["tokens_read"] == want.usage.total_forward_tokens
    if method in ("base", "eft"):
        assert len([t for t in texts if t]) > 4


def test_chat(running, library):
    client = running.client()
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": [{"type": "text", "text": "The movie"}]}]
    got = client.chat.completions.create(model="tiny", messages=messages, seed=1, temperature=0.9, max_completion_tokens=12)
    want = expected(library, "Be kind.\nThe movie", "ivg", 1, max_new_tokens=12)
    assert got.choices[0].message.content == want.text
    assert got.choices[0].message.role == "assistant"
    streamed = client.chat.completions.create(
        model="tiny", messages=messages, seed=1, temperature=0.9, max_completion_tokens=12, stream=True
    )
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == want.text


def test_async_client_and_mixed_settings_share_rounds(running, library):
    async def ask():
        client = openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0)
        methods = ["base", "eft", "ivg", "bon", "cbs-explicit", "smc"] * 2
        asked = [client.completions.create(model=f"tiny:{m}", prompt=f"Film {i}", seed=i, **SAMPLING) for i, m in enumerate(methods)]
        return methods, await asyncio.gather(*asked)

    methods, answers = asyncio.run(ask())
    for i, (method, answer) in enumerate(zip(methods, answers, strict=True)):
        assert answer.choices[0].text == expected(library, f"Film {i}", method, i).text, method


def test_n_prompts_and_token_ids(running, library):
    client = running.client()
    got = client.completions.create(model="tiny:base", prompt=["One", "Two"], n=2, seed=5, **SAMPLING)
    texts = [c.text for c in sorted(got.choices, key=lambda c: c.index)]
    assert texts == [expected(library, p, "base", 5, i).text for p in ("One", "Two") for i in (0, 1)]
    assert len(set(texts)) > 1
    ids = library.base.tokenizer("One").input_ids
    assert client.completions.create(model="tiny:base", prompt=ids, seed=5, **SAMPLING).choices[0].text == texts[0]
    assert got.usage.prompt_tokens == 6


def test_guidance_of_one_request(running, library):
    guidance = {"method": "custom", "token_value": "implicit", "select_value": "explicit", "beta": 0.5, "w": 2, "k": 3, "l": 4}
    body = {"guidance": {**guidance, "top_k": 20}}
    got = running.client().completions.create(model="tiny", prompt="Film", seed=2, extra_body=body, **SAMPLING)
    settings = {"token": "implicit", "select": "explicit", "beta": 0.5, "width": 2, "successors": 3, "chunk_length": 4, "top_k": 20}
    assert got.choices[0].text == expected(library, "Film", "custom", 2, **settings).text
    body = {"guidance": {"method": "eft", "weights": {"implicit": 1.0, "explicit": 0.3}}}
    got = running.client().completions.create(model="tiny", prompt="Film", seed=2, extra_body=body, **SAMPLING)
    assert got.choices[0].text == expected(library, "Film", "eft", 2, weights={"implicit": 1.0, "explicit": 0.3}).text


def test_stop_strings_never_leak(running, library):
    plain = expected(library, "Film", "base", 4, max_new_tokens=40).text
    stop = plain[20:23]
    cut = plain[: plain.index(stop)]
    got = running.client().completions.create(
        model="tiny:base", prompt="Film", seed=4, temperature=0.9, max_tokens=40, stop=[stop], stream=True
    )
    shown = ""
    for chunk in got:
        shown += chunk.choices[0].text
        assert cut.startswith(shown)
    assert shown == cut
