"""HTTP and connections: paths, CORS, timeouts, half-closed and idle connections, logs."""

import asyncio
import json
import logging
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import uvicorn

from ivg.serving.connections import Limits, connection_limits, limited_protocol, throttle_accept_errors
from ivg.settings.serve import ServeSettings
from serving_tools import GOOD, SCRIPT, SLOW, Process, Running, Slow, connect, raw, read_head, tiny, wait_for


@pytest.fixture(scope="module")
def running():
    with Running(tiny(slow=Slow())) as server:
        yield server


def test_openais_javascript_client_passes_the_preflight():
    asked = "authorization, content-type, x-stainless-arch, x-stainless-lang, x-stainless-os, x-stainless-retry-count, x-stainless-timeout"
    head = {"origin": "https://app.example", "access-control-request-method": "POST", "access-control-request-headers": asked}
    with Running(tiny(), cors_origins=["https://app.example"]) as server:
        answer = httpx.options(f"{server.url}/v1/chat/completions", headers=head)
        allowed = answer.headers["access-control-allow-headers"].lower()
        assert answer.status_code == 200 and all(name in allowed for name in asked.split(", "))
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        stranger = httpx.options(f"{server.url}/v1/chat/completions", headers=head | {"origin": "https://other.example"})
        assert "access-control-allow-origin" not in stranger.headers
        assert server.post(GOOD, headers={"origin": "https://app.example"}).headers["access-control-allow-origin"] == "https://app.example"


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


def test_invalid_http(running):
    with connect(running) as line:
        line.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        answer = b"".join(iter(lambda: line.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"] == "the request is not valid HTTP/1.1"


def test_keep_alive_exceeds_that_of_load_balancers(running):
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
def test_a_closed_connection_is_detected(running, stream):
    """With several beams no text is sent meanwhile, so only the probe can detect it."""
    body = GOOD | {"max_tokens": 250, "stream": stream, "model": "tiny", "guidance": {**SLOW, "successors": 4, "chunk_length": 250}}
    with connect(running) as line:
        line.sendall(raw(body))
        wait_for(lambda: running.worker.searcher.live_requests)
    wait_for(lambda: not running.worker.searcher.live_requests)
    running.wait_until_idle()


def limited(monkeypatch, **limits):
    chosen = Limits(**{"max_connections": 8, "header_timeout": 20.0, "idle_timeout": 20.0, "write_timeout": 20.0, **limits})
    monkeypatch.setattr("ivg.serving.server.connection_limits", lambda max_connections, idle_timeout: chosen)
    return Running(tiny(slow=Slow()))


def test_idle_connections_and_partial_requests_time_out(monkeypatch):
    monkeypatch.setattr("ivg.serving.middleware.BODY_TIMEOUT", 0.4)
    with limited(monkeypatch, header_timeout=0.4, idle_timeout=0.6) as server:
        silent, dripping, half = (connect(server) for _ in range(3))
        dripping.sendall(b"GET /health HT")
        half.sendall(raw(GOOD)[:-10])
        for line in (silent, dripping):
            assert line.recv(100) == b""
        assert b" 408 " in half.recv(100)
        for line in (silent, dripping, half):
            line.close()
        wait_for(lambda: not server.server.server_state.connections)


def test_slow_headers_time_out(monkeypatch):
    with limited(monkeypatch, header_timeout=0.5, idle_timeout=600.0) as server, connect(server) as line:
        line.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n")
        with pytest.raises(OSError):
            for i in range(500):
                line.sendall(f"x-{i}: y\r\n".encode())
                time.sleep(0.02)


def test_a_new_connection_replaces_an_idle_one(monkeypatch):
    with limited(monkeypatch, max_connections=6) as server:
        lines = [connect(server) for _ in range(20)]
        lines[-1].sendall(b"GET /hea")
        for _ in range(3):
            assert server.post(GOOD).status_code == 200
        assert len(server.server.server_state.connections) <= 6
        assert lines[0].recv(10) == b""  # the oldest
        for line in lines:
            line.close()


def test_busy_connections_are_not_replaced(monkeypatch):
    body = GOOD | {"model": "tiny", "max_tokens": 40, "guidance": SLOW}
    with limited(monkeypatch, max_connections=3) as server:
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


def test_a_client_that_does_not_read_is_disconnected():
    ended = asyncio.Event()

    async def endless(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not ended.is_set():
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            if not server.server_state.connections:
                ended.set()

    server = uvicorn.Server(
        uvicorn.Config(
            endless, port=0, http=limited_protocol(Limits(max_connections=4, write_timeout=0.2)), lifespan="off", log_config=None
        )
    )

    async def serve():
        listener = socket.create_server(("127.0.0.1", 0))
        task = asyncio.ensure_future(server.serve(sockets=[listener]))
        _, writer = await asyncio.open_connection(*listener.getsockname(), limit=1024)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await asyncio.wait_for(ended.wait(), 200)
        server.should_exit = True
        await task

    asyncio.run(serve())


def test_limits_leave_room_for_files(monkeypatch):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 256))
    limits = connection_limits(None, 75.0)
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    assert limits.max_connections + 3 * limits.backlog + open_files < 256 and limits.max_connections >= 4
    assert connection_limits(5, 75.0).max_connections == 5


def test_accept_errors_are_logged_once(caplog):
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


def test_warnings_are_logged_as_json():
    code = (
        "import logging, warnings; from ivg.serving.logs import configure_logging, log_event; configure_logging();"
        "warnings.warn('old\\nthing'); logging.getLogger('transformers.x').warning('hm'); logging.getLogger('other').error('oh');"
        "import transformers.utils.logging as t; t.get_logger('transformers.models').warning('really'); log_event('done')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = [json.loads(line) for line in run.stderr.splitlines()]
    assert [line["level"] for line in lines] == ["warning", "warning", "error", "warning", "info"]
    assert "old\nthing" in lines[0]["event"] and run.stdout == ""


@pytest.mark.long
def test_three_hundred_idle_connections_and_256_descriptors():
    """Other clients are served, and every line of the log is JSON."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))"
    served = {"port": 0, "name": "tiny"}
    with Process("-c", f"{limit}\n{SCRIPT}", str(Path(__file__).parents[1]), json.dumps(served)) as server:
        idle = []
        for number in range(300):
            line = connect(server)
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
