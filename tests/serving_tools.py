"""A server in a thread or in a process, clients, and values that fail: for the tests of the server."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
import torch

from ivg.model import GuidedModel
from ivg.serving.served_models import ServedModels
from ivg.serving.server import make_server
from ivg.settings.recipe import Recipe
from ivg.settings.serve import ServeSettings
from ivg.testing import tiny_lm, tiny_value
from ivg.types import SamplingParams, Value
from ivg.values.base import CompositeValue, FunctionValue
from ivg.values.implicit import ImplicitValue

SAMPLING = {"temperature": 0.9, "max_tokens": 16}


GOOD = {"model": "tiny:base", "prompt": "Film", "max_tokens": 4, "seed": 1}


CHAT = {"model": "tiny:base", "messages": [{"role": "user", "content": "Film"}], "max_tokens": 4, "seed": 1}


JSON = {"content-type": "application/json"}


SLOW = {"method": "custom", "select": "slow", "width": 1, "successors": 2, "chunk_length": 1, "ignore_eos": True}


def tiny(**more):
    """A small model with every kind of value; ``more`` are further values."""
    tokens = tiny_lm("base").tokenizer
    pair = ImplicitValue(tiny_lm("tuned", seed=1, tokenizer=tokens), tiny_lm("untuned", seed=2, tokenizer=tokens))
    values = {"implicit": pair, "explicit": tiny_value(seed=3, tokenizer=tokens), "length": FunctionValue(lambda p, r: len(r), "length")}
    return GuidedModel(tiny_lm("base", tokenizer=tokens), values | more, SamplingParams(temperature=0.9, max_new_tokens=16))


class Running:
    """A server in a thread."""

    def __init__(self, model, recipe=None, **settings):
        settings = ServeSettings(**{"port": 0, "name": "tiny", "drain": 5.0, **settings})
        self.served = ServedModels(model, recipe or Recipe(), settings)
        self.server = make_server(self.served)
        self.worker = self.server.worker
        listener = socket.create_server(("127.0.0.1", 0))  # whoever comes before the server is up waits
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def client(self, key="none", **settings):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **settings)

    def post(self, body, path="/v1/completions", **settings):
        return httpx.post(self.url + path, json=body, timeout=300, **settings)

    def wait_until_idle(self):
        """Until nothing runs, and no row is in use."""
        wait_for(lambda: not (self.worker.searcher.busy or self.worker.waiting or self.rows), 200)

    @property
    def rows(self):
        """Rows of all caches in use."""
        return sum(reader.model.live_rows for reader in self.served.model.readers)

    def stop(self):
        self.server.handle_exit(15, None)
        self.thread.join(200)
        assert not self.thread.is_alive()


def expected(library, prompt, method, seed, index=0, **settings):
    settings = {"temperature": 0.9, "max_new_tokens": 16, **settings}
    return next(library.run([library.request(prompt, method, seed=seed, index=index, **settings)]))[1]


def events(running, **body):
    """(name, data) of every event; [DONE] is the last."""
    out, name = [], None
    with httpx.stream("POST", f"{running.url}/v1/completions", json={"stream": True, **body}, timeout=60) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                data = line.removeprefix("data: ")
                out.append((name, data if data == "[DONE]" else json.loads(data)))
                name = None
    assert out.pop() == (None, "[DONE]")
    return out


def chunks(response):
    """Data of the server-sent events of a whole response."""
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]


def numbers(running, **settings):
    """The metrics."""
    text = httpx.get(f"{running.url}/metrics", **settings).text
    return {k: float(v) for k, v in (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))}


class NaNGuide(CompositeValue):
    """Guides like another value, but gives NaN for some prompts."""

    def __init__(self, inner):
        super().__init__([(1.0, inner)], "nan")

    def deltas(self, hypotheses):
        out = super().deltas(hypotheses)
        for i, h in enumerate(hypotheses):
            if "poison" in str(h.prompt.content):
                out[i] = float("nan")
        return out


def explode(prompt, response):
    if "dynamite" in prompt and len(response) > 4:
        raise ZeroDivisionError("secret detail")
    return len(response)


class Slow(Value):
    """A slow value, so that requests can be interrupted."""

    name = "slow"

    def __init__(self, seconds=0.03):
        self.seconds, self.calls = seconds, 0

    def score(self, hypotheses):
        self.calls += 1
        time.sleep(self.seconds)
        return [float(len(h.token_ids)) for h in hypotheses]


class Endless(Value):
    """A value that computes for ten minutes, inside PyTorch."""

    name = "endless"

    def score(self, hypotheses):
        print('{"event": "inside the endless value", "level": "info"}', file=sys.stderr, flush=True)
        until = time.monotonic() + 600
        while time.monotonic() < until:
            torch.ones(64, 64) @ torch.ones(64, 64)
        return [0.0 for _ in hypotheses]


def values():
    return {"nan": NaNGuide(tiny().values["implicit"]), "mine": FunctionValue(explode, "mine"), "slow": Slow(), "endless": Endless()}


def well_formed(response, status, param=None, code=None):
    """An OpenAI error without internal details."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert "Traceback" not in response.text and "/src/" not in response.text
    if param is not None:
        assert error["param"] == param, error
    if code is not None:
        assert error["code"] == code, error
    return error


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


def connect(server):
    """A raw connection."""
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=200)


def raw(body, sent=1.0, **headers):
    """The bytes of a request, or their first part."""
    content = json.dumps(body).encode()
    head = {"host": "x", "content-type": "application/json", "content-length": len(content), **headers}
    lines = "".join(f"{k}: {v}\r\n" for k, v in head.items())
    return f"POST /v1/completions HTTP/1.1\r\n{lines}\r\n".encode() + content[: int(len(content) * sent)]


def wait_for(fact, seconds=200):
    """What ``fact()`` gives when it is true; the limit is a guard against hanging, not a measure of speed."""
    until = time.monotonic() + seconds
    while not (found := fact()):
        assert time.monotonic() < until, "timed out"
        time.sleep(0.01)
    return found


SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from ivg.settings.recipe import Recipe
from ivg.serving.server import serve
from ivg.settings.serve import ServeSettings
from serving_tools import tiny, values

torch.set_num_threads(1)
serve(Recipe(), ServeSettings(**json.loads(sys.argv[2])), load=lambda recipe: tiny(**values()))
"""


class Process:
    """A server in a process, and its log."""

    def __init__(self, *command):
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True, env=env)
        self.lines = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True)
        self.reader.start()
        self.url = json.loads(self.wait_for_line('"event": "serving"'))["url"]
        wait_for(self.is_ready, 200)

    def wait_for_line(self, text):
        """The first line of the log that holds ``text``."""
        wait_for(lambda: any(text in line for line in self.lines) or not self.reader.is_alive(), 900)
        return next((line for line in self.lines if text in line), None) or pytest.fail("".join(self.lines))

    def is_ready(self):
        """Are new requests accepted?"""
        try:
            return httpx.get(f"{self.url}/ready", timeout=200).status_code == 200
        except httpx.TransportError:  # does not listen yet
            return False

    @classmethod
    def tiny(cls, **settings):
        """The tiny model with the values of ``serving_tools``, by the function that the command calls."""
        settings = {"port": 0, "name": "tiny", **settings}
        return cls("-c", SCRIPT, str(Path(__file__).parent), json.dumps(settings))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def end(self, seconds=300):
        """Wait for the end; (exit code, log)."""
        code = self.process.wait(seconds)
        self.reader.join(60)
        return code, [json.loads(line) for line in self.lines]
