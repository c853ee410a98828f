"""Debian's nginx with the configuration of the page on tones for tenants: keys choose the server, streams are not held back."""

import re
import shutil
import socket
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from ivg.settings.recipe import Recipe
from serving_tools import GOOD, Running, tiny, wait_for

NGINX = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
pytestmark = pytest.mark.skipif(NGINX is None, reason="needs nginx")
PAGE = Path(__file__).parents[2] / "docs" / "tutorials" / "tone-for-one-tenant.md"
KEYS = ("acme-key-1", "other-key-1")
HTTP = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    {block}
}}
"""


@pytest.fixture(scope="module")
def servers():
    with (
        Running(tiny(), Recipe.model_validate({"search": {"method": "base"}}), name="assistant", api_keys=KEYS) as plain,
        Running(tiny(), Recipe.model_validate({"search": {"method": "eft", "beta": 4.0}}), name="assistant", api_keys=KEYS) as guided,
    ):
        yield plain, guided


@contextmanager
def proxied(servers, folder, share):
    """The address of nginx with the page's block, the tenant's requests shared as ``share`` says."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (block,) = re.findall(r"```nginx\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for was, now in {
        "127.0.0.1:8001": servers[0].url.removeprefix("http://"),
        "127.0.0.1:8002": servers[1].url.removeprefix("http://"),
        "listen 8080": f"listen 127.0.0.1:{port}",
        "/var/log/nginx": str(folder),
        "10%": share,
    }.items():
        assert was in block
        block = block.replace(was, now)
    (folder / "nginx.conf").write_text(HTTP.format(folder=folder, block=block))
    command = [NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf")]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: process.poll() is not None or is_up(port))
            assert process.poll() is None, (folder / "error.log").read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def is_up(port):
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def asked(url, key):
    answer = httpx.post(f"{url}/v1/completions", json=ASK, headers={"authorization": f"Bearer {key}"}, timeout=300)
    return answer.headers["x-served-by"], answer


ASK = GOOD | {"model": "assistant", "max_tokens": 8, "ignore_eos": True}


def test_the_tenant_alone_gets_the_tone(servers, tmp_path):
    plain, guided = (server.url.removeprefix("http://") for server in servers)
    with proxied(servers, tmp_path, "100%") as url:
        (first, tone), (second, other) = asked(url, KEYS[0]), asked(url, KEYS[1])
        assert (first, second) == (guided, plain)
        assert [a.json()["ivg"]["method"] for a in (tone, other)] == ["eft", "base"]
        assert tone.json()["choices"][0]["text"] != other.json()["choices"][0]["text"]
        assert tone.json()["model"] == other.json()["model"] == "assistant"
        served, refused = asked(url, "another-key")
        assert served == plain and refused.status_code == 401
        assert tone.headers["x-request-id"] in (tmp_path / "ivg.log").read_text()
    with proxied(servers, tmp_path, "50%") as url:
        assert {asked(url, KEYS[0])[0] for _ in range(40)} == {plain, guided}
        assert {asked(url, KEYS[1])[0] for _ in range(5)} == {plain}


def test_streams_are_not_held_back(servers, tmp_path):
    searcher, go, steps = servers[1].worker.searcher, threading.Event(), []
    real = searcher.step

    def step():
        steps.append(1)
        assert len(steps) < 3 or go.wait(300)
        return real()

    searcher.step = step
    try:
        with (
            proxied(servers, tmp_path, "100%") as url,
            httpx.stream(
                "POST",
                f"{url}/v1/completions",
                json=ASK | {"max_tokens": 200, "stream": True},
                headers={"authorization": f"Bearer {KEYS[0]}"},
                timeout=200,
            ) as response,
        ):
            lines = response.iter_lines()
            assert next(lines).startswith("data: {") and not go.is_set()  # the server waits: nothing more is coming
            go.set()
            assert [line for line in lines if line][-1] == "data: [DONE]"
    finally:
        go.set()
        searcher.step = real
