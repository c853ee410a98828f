"""Start the OpenAI-compatible server and call it with OpenAI's own client, guidance chosen for each request.

    pip install 'ivg[serve]' openai
    python examples/serve_and_call.py

A real server runs by itself (`ivg serve --recipe recipe.toml --port 8000`); then `main` is all that your program needs.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.request

import openai


def main(url: str) -> None:
    """Ask the server at `url` three things."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused")  # servers with --api-key-file want a real key

    # "embedded" is the name of the served base; "embedded:eft", "embedded:ivg" … are the base with one of its methods.
    print([m.id for m in client.models.list()][:4], "…")
    answer = client.completions.create(model="embedded:base", prompt="The movie was", seed=1, max_tokens=20)
    print("base:", answer.choices[0].text)

    # Everything else that ivg can do goes into `guidance`: the names are those of `model.generate` and of `ivg models`.
    guidance = {"method": "ivg", "beta": 1.0, "width": 2, "successors": 4}
    stream = client.completions.create(
        model="embedded", prompt="The movie was", seed=1, max_tokens=20, stream=True, extra_body={"guidance": guidance}
    )
    print("ivg:", end="", flush=True)
    for chunk in stream:  # text comes once all live beams agree on it, so nothing that was sent is ever taken back
        print(chunk.choices[0].text, end="", flush=True)
    print()


def wait_until_ready(url: str, server: subprocess.Popen) -> None:
    """The models are loaded when /ready answers."""
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/ready")
            return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the server has exited")


if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    with subprocess.Popen([sys.executable, "-m", "ivg", "serve", "--port", port], env=os.environ) as server:
        try:
            wait_until_ready(f"http://127.0.0.1:{port}", server)
            main(f"http://127.0.0.1:{port}")
        finally:
            server.terminate()
