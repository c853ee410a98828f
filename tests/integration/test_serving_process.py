"""The server in a process of its own: many clients at once, signals, and the command that starts it."""

import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
from collections import Counter

import httpx
import openai
import pytest

from ivg.errors import ConfigError
from ivg.settings.recipe import Recipe
from serving_tools import SLOW, Process, connect, expected, numbers, raw, tiny, wait_for, well_formed

KEY = {"authorization": "Bearer right-key-1"}


KINDS = ("whole", "whole", "stream", "stream", "gone", "gone", "half", "nan", "nan stream", "raises")


KINDS += ("malformed", "long", "large", "key", "model")


PREFIX = "Film"


METHODS = ("base", "eft", "ivg", "bon", "cbs-explicit", "smc")


LENGTH = 10


class MixedClients:
    """Clients of all kinds, and counts of their results."""

    def __init__(self, server, wanted):
        self.server, self.wanted = server, wanted
        self.counts = Counter()
        self.signalled = False

    async def all(self, numbers, at_once, signal_after=None):
        """Run clients, ``at_once`` at a time; send SIGTERM after ``signal_after`` completions."""
        room = asyncio.Semaphore(at_once)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        done = 0

        async def one(http, i):
            nonlocal done
            async with room:
                kind = KINDS[i % len(KINDS)]
                try:
                    await self.client(http, kind, i)
                except (httpx.TransportError, ConnectionError):
                    assert self.signalled, f"{kind} broke off before the signal"
                    kind = "refused"
                self.counts[kind] += 1
                done += kind in ("whole", "stream")
                if done == signal_after and not self.signalled:
                    self.signalled = True
                    self.server.process.send_signal(signal.SIGTERM)

        async with httpx.AsyncClient(base_url=self.server.url, headers=KEY, timeout=400, limits=limits) as http:
            await asyncio.wait_for(asyncio.gather(*(one(http, i) for i in numbers)), 900)

    async def client(self, http, kind, i):
        case = list(self.wanted)[i % len(self.wanted)]
        method, prompt, seed = case
        good = {"model": f"tiny:{method}", "prompt": prompt, "seed": seed, "temperature": 0.9, "max_tokens": LENGTH}
        bad = {"model": "tiny", "seed": seed, "max_tokens": LENGTH}
        if kind == "whole":
            answer = await self.post(http, good)
            assert answer is None or answer.json()["choices"][0]["text"] == self.wanted[case], case
        elif kind == "stream":
            self.check(await self.stream(http, good), (self.wanted[case], None))
        elif kind == "nan":
            await self.post(http, bad | {"prompt": f"poison {i}", "guidance": {"method": "custom", "token": "nan"}}, 500, "model_error")
        elif kind == "nan stream":
            text, error = await self.stream(http, bad | {"prompt": f"poison {i}", "guidance": {"method": "custom", "token": "nan"}})
            self.check((text, error), ("", "model_error"))
        elif kind == "raises":
            guidance = {"method": "custom", "select": "mine", "successors": 2, "chunk_length": 5}
            await self.post(http, bad | {"prompt": f"dynamite {i}", "guidance": guidance}, 500, "model_error")
        elif kind == "malformed":
            await self.post(http, (b"{" * i, b"\xff", b"[1, 2]", b'{"model": "tiny", "prompt": 5}')[i % 4], 400)
        elif kind == "long":
            await self.post(http, bad | {"prompt": "x" * (300 + 1000 * i)}, 400, "context_length_exceeded")
        elif kind == "large":
            await self.post(http, bad | {"prompt": "x" * (1 << 21)}, 413, "body_too_large")
        elif kind == "key":
            await self.post(http, good, 401, "invalid_api_key", headers={"authorization": "Bearer wrong-key-1"})
        elif kind == "model":
            await self.post(http, good | {"model": "gpt-4"}, 404, "model_not_found")
        else:
            await asyncio.to_thread(self.go_away, kind, i)

    async def post(self, http, body, status=200, code=None, **more):
        """The response, if it is as expected; None if the server is stopping."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await http.post("/v1/completions", content=content, headers={"content-type": "application/json"} | more.get("headers", {}))
        if answer.status_code == 503 and self.signalled:
            well_formed(answer, 503, code="unavailable")
            return None
        if status == 200:
            assert answer.status_code == 200, answer.text
        else:
            well_formed(answer, status, code=code)
        return answer

    async def stream(self, http, body):
        """(text, code of the error or None) of a stream."""
        text, error, ended = "", None, False
        async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            if response.status_code != 200:
                await response.aread()
                return "", well_formed(response, response.status_code)["code"]
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line.startswith("data: "):
                    data = json.loads(line[6:])
                    if "error" in data:
                        assert set(data["error"]) == {"message", "type", "param", "code"}
                        error = data["error"]["code"]
                    else:
                        text += data["choices"][0]["text"]
        assert ended
        return text, error

    def check(self, got, want):
        assert got == want or (self.signalled and got[1] == "unavailable" and want[0].startswith(got[0]))

    def go_away(self, kind, i):
        """Disconnect before the end of the body, after it, or in the middle of a stream."""
        body = {"model": "tiny:eft", "prompt": PREFIX, "stream": True, "max_tokens": 200, "guidance": {"ignore_eos": True}}
        with connect(self.server) as s:
            s.sendall(raw(body, sent=0.5 if kind == "half" else 1.0, **KEY))
            if kind == "gone" and i % 2:
                assert s.recv(4096)


def gauges(server):
    names = ("ivg_cache_rows", "ivg_queue_length", "ivg_live")
    return {k: v for k, v in numbers(server, headers=KEY).items() if k.startswith(names)}


@pytest.mark.long
def test_two_hundred_mixed_requests_and_sigterm():
    """Completions equal the library's, errors are well-formed, and no row is left."""
    library = tiny()
    cases = [(method, f"{PREFIX} {i}", i) for i, method in enumerate(METHODS * 2)]
    wanted = {(m, p, s): expected(library, p, m, s, max_new_tokens=LENGTH).text for m, p, s in cases}
    order = list(range(200))
    random.Random(5).shuffle(order)
    with Process.tiny(api_keys=["right-key-1"], max_beams=64, queue_limit=512, drain=20) as server:
        clients = MixedClients(server, wanted)
        asyncio.run(clients.all(order[:150], at_once=16))
        assert clients.counts["whole"] + clients.counts["stream"] > 30 and set(clients.counts) == set(KINDS)
        wait_for(lambda: not any(gauges(server).values()))
        assert len(gauges(server)) >= 6
        asyncio.run(clients.all(order[150:], at_once=50, signal_after=3))
        code, log = server.end()
    assert code == 0 and clients.counts.total() == 200
    assert log[-1]["event"] == "stopped" and log[-1]["cache_rows"] == 0
    known = ("a step of", "the value mine raised ZeroDivisionError")
    broken = [e for e in log if e["level"] in ("error", "critical") and not e["event"].startswith(known)]
    assert not broken, broken
    assert not [e for e in log if e["event"] == "request" and e["status"] == 500 and e["path"] != "/v1/completions"]


@pytest.mark.long
def test_second_signal():
    """Waiting clients receive an error, silent ones are disconnected; the exit code is 128 + signal."""
    with Process.tiny(drain=60) as server, connect(server) as idle:
        idle.sendall(raw({"model": "tiny", "prompt": "half"}, sent=0.5))
        body = {"model": "tiny", "prompt": "Long", "max_tokens": 200, "stream": True, "guidance": SLOW}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=300) as response:
            lines = response.iter_lines()
            first = next(lines)
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: not server.is_ready())  # it drains
            assert server.process.poll() is None
            server.process.send_signal(signal.SIGINT)
            lines_left = [line for line in (first, *lines) if line]
        code, log = server.end()
    assert code == 128 + signal.SIGINT
    assert json.loads(lines_left[-2].removeprefix("data: "))["error"]["code"] == "unavailable" and lines_left[-1] == "data: [DONE]"
    assert log[-1]["event"] == "stopped" and log[-1]["signal"] == signal.SIGINT and log[-1]["cache_rows"] == 0
    assert not [e for e in log if "trace" in e or e["level"] == "error"]


@pytest.mark.long
def test_an_endless_step_is_abandoned():
    """Its clients receive an error, and the process exits without an abort from C++."""
    with Process.tiny(drain=60) as server:
        guidance = {"method": "custom", "select": "endless", "successors": 2, "chunk_length": 1}
        body = {"model": "tiny", "prompt": "Long", "stream": True, "guidance": guidance}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=300) as response:
            server.wait_for_line("inside the endless value")
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: not server.is_ready())  # it drains
            server.process.send_signal(signal.SIGTERM)
            lines_left = [line for line in response.iter_lines() if line]
        code = server.process.wait(300)
        server.reader.join(60)
    assert json.loads(lines_left[-2].removeprefix("data: "))["error"]["code"] == "unavailable" and lines_left[-1] == "data: [DONE]"
    assert code == 128 + signal.SIGTERM
    assert json.loads(server.lines[-1])["inside_a_step"] is True


def test_the_command_serves_and_drains():
    with Process("-m", "ivg", "serve", "--port", "0", "--device", "cpu") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
        ask = [{"role": "user", "content": "The movie was"}]
        assert client.chat.completions.create(model="embedded", messages=ask, max_tokens=8).choices[0].message.content
        stream = client.completions.create(model="embedded:eft", prompt="A secret movie", max_tokens=60, seed=1, stream=True)
        first = next(iter(stream))
        server.process.send_signal(signal.SIGTERM)
        text = first.choices[0].text + "".join(c.choices[0].text for c in stream)
        code, logged = server.end()
    assert code == 0 and len(text) > 40
    assert [entry["event"] for entry in logged][:1] == ["serving"] and logged[-1]["event"] == "stopped"
    (entry,) = [e for e in logged if e["event"] == "request" and e["path"] == "/v1/completions"]
    assert entry["status"] == 200 and entry["request_id"]
    assert "secret" not in "".join(server.lines)


def run(*arguments):
    """Run the command."""
    code = f"import sys; sys.argv = ['ivg', *{list(arguments)!r}]; from ivg.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_missing_extra():
    code = "import sys; sys.modules['uvicorn'] = None; sys.argv = ['ivg', 'serve']; from ivg.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "ivg[serve]" in done.stderr


@pytest.mark.long
def test_address_in_use():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        done = run("serve", "--port", str(s.getsockname()[1]))
    assert done.returncode == 2 and "cannot listen" in done.stderr


@pytest.mark.parametrize(
    "table, message",
    [
        ("[serve]\nprot = 1", "unknown setting serve.prot; did you mean port"),
        ("[serve]\nport = 'x'", "port: "),
        ("[serv]\nport = 1", "unknown setting serv"),
    ],
)
def test_unknown_setting_in_the_recipe(tmp_path, table, message):
    (tmp_path / "recipe.toml").write_text(table)
    done = run("serve", "--recipe", str(tmp_path / "recipe.toml"))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("port", ["99999", "-1"])
def test_a_wrong_port_is_one_clear_line(port):
    done = run("serve", "--port", port)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "serve.port must be in [0, 65535]" in done.stderr and f"got {port}" in done.stderr and "max_body_bytes" not in done.stderr


def test_every_verb_checks_the_serve_table(tmp_path):
    (tmp_path / "recipe.toml").write_text("[search]\nmethod = 'eft'\n[serve]\nprot = 1")
    with pytest.raises(ConfigError, match=r"unknown setting serve\.prot; did you mean port\?"):
        Recipe.load(tmp_path / "recipe.toml")
