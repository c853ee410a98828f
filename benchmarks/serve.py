"""Load on the server, over loopback: 1, 8 and 32 clients at once on the embedded models. A table, then one JSON line.

    python benchmarks/serve.py --method ivg --answers 32

Every client asks one streamed answer after the other. Shown: answers per second, time to first text and to the whole answer (median and
95 %), errors, and how many answers differ from what the library gives for the same prompt and seed, one request at a time (float32;
sums of batched products may round otherwise, and then another token may be drawn: those are counted, not hidden).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
import time

import httpx

from ivg.config import Recipe
from ivg.machine import facts
from ivg.models.loading import LoadOptions
from ivg.serving.presets import Presets
from ivg.serving.run import make_server
from ivg.serving.settings import ServeSettings
from ivg.steered import SteeredModel

PROMPTS = (
    "The movie was",
    "I have to say that",
    "In the end,",
    "What I like most is",
    "This film",
    "The actors",
    "My wife and I",
    "After an hour",
)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="ivg")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--answers", type=int, default=32, help="for each number of clients")
    parser.add_argument("--max-tokens", type=int, default=50)
    parser.add_argument("--no-check", action="store_true", help="do not compare with the library")
    args = parser.parse_args()
    options = LoadOptions(device="cpu", dtype="float32")
    model = SteeredModel.embedded(options)
    server = make_server(Presets(model, Recipe(), ServeSettings(port=0, queue_limit=1024)))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    jobs = [(PROMPTS[i % len(PROMPTS)], i) for i in range(args.answers)]
    asyncio.run(load(url, jobs[: max(args.clients)], max(args.clients), args))  # once, so that caches have their sizes
    runs = {clients: asyncio.run(load(url, jobs, clients, args)) for clients in args.clients}
    server.handle_exit(15, None)
    thread.join()
    want = {} if args.no_check else library(SteeredModel.embedded(options), jobs, args)
    rows = [row(clients, seconds, answers, want) for clients, (seconds, answers) in runs.items()]
    print("clients  answers/s  first text p50  p95 (s)  whole p50  p95 (s)  errors  differ")
    for r in rows:
        times = f"{r['first_p50']:14.3f}  {r['first_p95']:7.3f}  {r['whole_p50']:9.3f}  {r['whole_p95']:7.3f}"
        print(f"{r['clients']:7d}  {r['rate']:9.2f}  {times}  {r['errors']:6d}  {r['differ']:6d}")
    print(json.dumps({"benchmark": "serve", **vars(args), "rows": rows, "machine": facts()}))


async def load(url: str, jobs: list, clients: int, args: argparse.Namespace) -> tuple[float, list]:
    """(seconds in all, (job, first, whole, text or error) of every answer)."""
    todo, done = list(reversed(jobs)), []

    async def client(http: httpx.AsyncClient) -> None:
        while todo:
            job = todo.pop()
            done.append((job, *await ask(http, job, args)))

    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        started = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(clients)))
        return time.perf_counter() - started, done


async def ask(http: httpx.AsyncClient, job: tuple[str, int], args: argparse.Namespace) -> tuple[float, float, str, str | None]:
    """(seconds to first text, to the end, text, error) of one answer."""
    prompt, seed = job
    body = {"model": f"embedded:{args.method}", "prompt": prompt, "seed": seed, "max_tokens": args.max_tokens, "stream": True}
    started, first, text, error = time.perf_counter(), None, "", None
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            return 0.0, 0.0, "", (await response.aread()).decode()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                data = json.loads(line[6:])
                error = json.dumps(data["error"]) if "error" in data else error
                new = "".join(c["text"] for c in data.get("choices", ()))
                first = time.perf_counter() - started if new and first is None else first
                text += new
    whole = time.perf_counter() - started
    return first or whole, whole, text, error


def library(model: SteeredModel, jobs: list, args: argparse.Namespace) -> dict:
    """What the library gives, each alone."""
    return {job: model.generate(job[0], args.method, seed=job[1], max_new_tokens=args.max_tokens).text for job in jobs}


def row(clients: int, seconds: float, answers: list, want: dict) -> dict:
    """The figures of one load."""
    firsts, wholes = sorted(a[1] for a in answers), sorted(a[2] for a in answers)
    return {
        "clients": clients,
        "rate": len(answers) / seconds,
        **{
            f"{name}_p{p}": times[min(len(times) - 1, len(times) * p // 100)]
            for name, times in (("first", firsts), ("whole", wholes))
            for p in (50, 95)
        },
        "errors": sum(a[4] is not None for a in answers),
        "differ": sum(a[0] in want and a[3] != want[a[0]] for a in answers),
    }


if __name__ == "__main__":
    main()
