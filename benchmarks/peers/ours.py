"""ivg's side: METHOD BASE NAME=MODEL … answers in this process, URL MODEL asks a server for its method."""

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from benchmarks.peers.protocol import SAMPLES, TEMPERATURE, Answer, serve, versions

SIZES: dict[str, dict[str, Any]] = {"smc": {"width": SAMPLES}, "bon": {"successors": SAMPLES}, "eft": {"temperature": 0}}
"""Settings of the methods; greedy proxy tuning is `eft` at temperature 0."""


def over_http(url: str, model: str) -> Answer:
    """The server's best-of-N, all prompts at once, as chats."""

    def one(prompt: str, seed: int, tokens: int) -> str:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
            "temperature": TEMPERATURE,
            "seed": seed,
        }
        guided = {"guidance": {"method": "bon", **SIZES["bon"]}}
        reply = httpx.post(f"{url}/v1/chat/completions", json=body | guided, timeout=600)
        reply.raise_for_status()
        return str(reply.json()["choices"][0]["message"]["content"])

    def answer(prompts: list[str], seed: int, tokens: int) -> list[str]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: one(prompt, seed, tokens), prompts))

    return answer


def in_process(method: str, base: str, roles: dict[str, Any]) -> Answer:
    """The method of the library."""
    from ivg import GuidedModel, LoadOptions

    model = GuidedModel.from_pretrained(base, **roles, options=LoadOptions(dtype="float32", device="cpu"))

    def answer(prompts: list[str], seed: int, tokens: int) -> list[str]:
        model.reset_caches()
        settings = {"temperature": TEMPERATURE, "max_new_tokens": tokens, **SIZES[method]}
        return [done.text for done in model.generate(prompts, method, seed=seed, **settings)]

    return answer


def main() -> None:
    """Choose by the first argument."""
    first, second, *more = sys.argv[1:]
    found = over_http(first, second) if first.startswith("http") else in_process(first, second, dict(role.split("=", 1) for role in more))
    serve(versions("ivg", "torch", "transformers"), found)


if __name__ == "__main__":
    main()
