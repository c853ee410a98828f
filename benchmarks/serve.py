"""Load test of the server, over loopback, with the embedded models. Prints a table, then one JSON line.

    python benchmarks/serve.py --method ivg --answers 64       # 1, 8 and 32 clients at once
    python benchmarks/serve.py --soak 600                      # mixed traffic for ten minutes; the server's resident memory

Load: every client sends one streaming request after the other. Reported: completions per second, time to first text and total time
(median and 95th percentile), seconds of the processor that the server takes for a completion (on a machine that others keep busy, they tell
more than elapsed ones), errors, and how many completions differ from the library's for the same prompt and seed, run alone (float32;
rounding of batched products may change a token: such cases are counted).

Soak: 8 clients send requests with new prompts and various methods, streaming or not; some disconnect, some send invalid requests.
Reported: resident memory over time, its slope after the first quarter, and what is left in the caches at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean, linear_regression
from typing import Any

import httpx
import psutil

from ivg.utils.environment import machine

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
WORDS = " ".join(PROMPTS).split()
SOAK_METHODS = ("base", "eft", "ivg", "bon", "cbs-implicit", "cbs-explicit", "smc", "token-explicit", "adaptive")
MAX_GROWTH = 0.01
"""Memory counts as flat if its mean in the last quarter exceeds that of the second quarter by at most this share."""
TIMEOUT = 120.0
"""Seconds without data after which a request of the soak fails (ReadTimeout)."""
SAMPLE_SECONDS = 2.0
"""Longest time between two measurements of the memory."""


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="ivg")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--answers", type=int, default=64, help="completions for each number of clients")
    parser.add_argument("--max-tokens", type=int, default=50)
    parser.add_argument("--no-check", action="store_true", help="do not compare completions with the library's")
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="mixed traffic instead, by 8 clients")
    parser.add_argument("--seed", type=int, default=1, help="seed of the mixed traffic")
    args = parser.parse_args()
    (load if args.soak is None else soak)(args)


@contextmanager
def served() -> Iterator[tuple[str, int]]:
    """Run `ivg serve`; (URL, process id). Its log is discarded."""
    command = [sys.executable, "-m", "ivg", "serve", "--port", "0", "--device", "cpu", "--dtype", "float32"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        url = next((json.loads(line)["url"] for line in process.stderr if '"event": "serving"' in line), None)
        if url is None:
            sys.exit("the server did not start; try: " + " ".join(command[1:]))
        threading.Thread(target=lambda: [None for _ in process.stderr or ()], daemon=True).start()
        while not ready(url):
            time.sleep(0.05)
        yield url, process.pid
        process.terminate()
        if (code := process.wait(60)) != 0:
            sys.exit(f"the server ended with code {code}")
    finally:
        process.kill()


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False


# Load


def load(args: argparse.Namespace) -> None:
    """Run the load test for each number of clients."""
    jobs = [(PROMPTS[i % len(PROMPTS)], i) for i in range(args.answers)]
    with served() as (url, process):
        asyncio.run(run(url, jobs[: max(args.clients)], max(args.clients), args))  # warm-up
        runs = {}
        for clients in args.clients:
            before = processor_seconds(process)
            runs[clients] = (*asyncio.run(run(url, jobs, clients, args)), processor_seconds(process) - before)
    want = {} if args.no_check else library(jobs, args)
    rows = [row(clients, seconds, answers, want) | {"processor": used / len(jobs)} for clients, (seconds, answers, used) in runs.items()]
    print("clients  answers/s  first text p50  p95 (s)  whole p50  p95 (s)  processor (s)  errors  equal  differ")
    for r in rows:
        times = f"{r['first_p50']:14.3f}  {r['first_p95']:7.3f}  {r['whole_p50']:9.3f}  {r['whole_p95']:7.3f}  {r['processor']:13.3f}"
        print(f"{r['clients']:7d}  {r['rate']:9.2f}  {times}  {r['errors']:6d}  {r['equal']:5d}  {r['differ']:6d}")
    ratios = [relative(r, rows[0]) for r in rows[1:]]
    for r in ratios:
        rates = f"{r['throughput']:.2f} in throughput, {r['processor']:.2f} in answers for each second of the processor"
        print(f"{r['clients']} clients : {r['to']} = {rates}; first text : whole answer = {r['first_to_whole']:.2f}")
    for message, count in Counter(a[4] for _, answers, _ in runs.values() for a in answers if a[4]).items():
        print(f"error, {count} times: {message}")
    settings = {k: v for k, v in vars(args).items() if k not in ("soak", "seed")}
    print(json.dumps({"benchmark": "serve", **settings, "rows": rows, "ratios": ratios, "machine": machine()}))


def processor_seconds(process: int) -> float:
    """What a process has used so far."""
    used = psutil.Process(process).cpu_times()
    return used.user + used.system


def relative(more: dict, fewer: dict) -> dict:
    """One load against another."""
    return {
        "clients": more["clients"],
        "to": fewer["clients"],
        "throughput": more["rate"] / fewer["rate"] if fewer["rate"] else 0.0,
        "processor": fewer["processor"] / more["processor"],
        "first_to_whole": more["first_p50"] / more["whole_p50"] if more["whole_p50"] else 0.0,
    }


async def run(url: str, jobs: list, clients: int, args: argparse.Namespace) -> tuple[float, list]:
    """(total seconds, (job, first, whole, text, error) of every completion)."""
    todo, done = list(reversed(jobs)), []

    async def client(http: httpx.AsyncClient) -> None:
        while todo:
            job = todo.pop()
            try:
                done.append((job, *await ask(http, job, args)))
            except httpx.HTTPError as e:
                done.append((job, 0.0, 0.0, "", f"{type(e).__name__}: {e}"))

    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        started = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(clients)))
        return time.perf_counter() - started, done


async def ask(http: httpx.AsyncClient, job: tuple[str, int], args: argparse.Namespace) -> tuple[float, float, str, str | None]:
    """(seconds to first text, total seconds, text, error) of one completion."""
    prompt, seed = job
    body = {"model": f"embedded:{args.method}", "prompt": prompt, "seed": seed, "max_tokens": args.max_tokens, "stream": True}
    started, first, text, error, ended = time.perf_counter(), None, "", None, False
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            return 0.0, 0.0, "", (await response.aread()).decode()
        async for line in response.aiter_lines():
            ended = ended or line == "data: [DONE]"
            if line.startswith("data: {"):
                data = json.loads(line[6:])
                error = json.dumps(data["error"]) if "error" in data else error
                new = "".join(c["text"] for c in data.get("choices", ()))
                first = time.perf_counter() - started if new and first is None else first
                text += new
    whole = time.perf_counter() - started
    return first or whole, whole, text, error or (None if ended else "the stream ended without [DONE]")


def library(jobs: list, args: argparse.Namespace) -> dict:
    """The library's completions, each run alone."""
    from ivg.model import GuidedModel
    from ivg.models.loading import LoadOptions  # imported here to keep this process small while the server is measured

    model = GuidedModel.embedded(LoadOptions(device="cpu", dtype="float32"))
    return {job: model.generate(job[0], args.method, seed=job[1], max_new_tokens=args.max_tokens).text for job in jobs}


def row(clients: int, seconds: float, answers: list, want: dict) -> dict:
    """Results of one load; times are those of completions without error."""
    fine = [a for a in answers if a[4] is None]
    firsts, wholes = sorted(a[1] for a in fine) or [0.0], sorted(a[2] for a in fine) or [0.0]
    compared = [a for a in fine if a[0] in want]
    equal = sum(a[3] == want[a[0]] for a in compared)
    return {
        "clients": clients,
        "answers": len(answers),
        "rate": len(fine) / seconds,
        **{
            f"{name}_p{p}": times[min(len(times) - 1, len(times) * p // 100)]
            for name, times in (("first", firsts), ("whole", wholes))
            for p in (50, 95)
        },
        "errors": len(answers) - len(fine),
        "equal": equal,
        "differ": len(compared) - equal,
    }


# Soak


def soak(args: argparse.Namespace) -> None:
    """Run the soak test."""
    with served() as (url, process):
        counts, memory = asyncio.run(traffic(url, process, args))
        left = asyncio.run(busy_gauges(url))
    quarter = max(1, len(memory) // 4)
    second, last = (fmean(m for _, m in part) for part in (memory[quarter : 2 * quarter] or memory, memory[-quarter:]))
    slope = linear_regression(*zip(*memory[quarter:], strict=True)).slope * 60 if len(memory) > quarter + 1 else 0.0
    growth = last / second - 1
    print("seconds  resident memory (MiB)")
    for seconds, mib in memory[:: max(1, len(memory) // 20)]:
        print(f"{seconds:7.0f}  {mib:21.1f}")
    print(f"slope after the first quarter {slope:+.2f} MiB a minute ({slope * 240:+.0f} MiB in four hours)")
    print(f"last quarter relative to the second {growth:+.2%}")
    print(f"flat: {'yes' if growth <= MAX_GROWTH else 'no'} (at most {MAX_GROWTH:+.0%})")
    print(f"cache rows, queue and failures at the end: {left or 'none'}")
    print("requests: " + ", ".join(f"{kind} {n}" for kind, n in sorted(counts.items())))
    figures: dict[str, Any] = {
        "slope_mib_per_minute": slope,
        "growth": growth,
        "flat": growth <= MAX_GROWTH,
        "first_mib": memory[0][1],
        "last_mib": memory[-1][1],
    }
    figures |= {"left": left, "requests": dict(counts), "memory": [[round(s, 1), round(m, 1)] for s, m in memory]}
    print(json.dumps({"benchmark": "serve-soak", "seconds": args.soak, "seed": args.seed, **figures, "machine": machine()}))


async def traffic(url: str, process: int, args: argparse.Namespace) -> tuple[Counter, list[tuple[float, float]]]:
    """(requests by kind and status, (seconds, MiB) of the server)."""
    counts, memory, draw, seconds = Counter[str](), list[tuple[float, float]](), random.Random(args.seed), args.soak
    server = psutil.Process(process)
    started = time.monotonic()

    async def watch() -> None:
        while (now := time.monotonic() - started) < seconds:
            memory.append((now, server.memory_info().rss / 2**20))
            await asyncio.sleep(min(SAMPLE_SECONDS, seconds / 20))

    async def client(http: httpx.AsyncClient) -> None:
        while time.monotonic() - started < seconds:
            counts[await one(http, draw, args.max_tokens)] += 1

    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT) as http:
        await asyncio.gather(watch(), *(client(http) for _ in range(8)))
    return counts, memory


async def one(http: httpx.AsyncClient, draw: random.Random, max_tokens: int) -> str:
    """Send one random request; its status, or the name of its error."""
    prompt = " ".join(draw.choices(WORDS, k=draw.randint(2, 40)))
    body = {"model": f"embedded:{draw.choice(SOAK_METHODS)}", "prompt": prompt, "max_tokens": draw.randint(4, max_tokens)}
    body |= {"n": draw.choice((1, 1, 1, 2)), "stream": draw.random() < 0.5}
    kind = draw.random()
    if kind < 0.1:
        body |= draw.choice(({"model": "gpt-4"}, {"tempo": 1}, {"prompt": "word " * 5000}, {"guidance": {"beta": "x"}}))
    try:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            if kind > 0.9 and body["stream"]:
                await anext(response.aiter_bytes(), b"")
                return "disconnected"
            async for _ in response.aiter_bytes():
                pass
            return str(response.status_code)
    except httpx.HTTPError as e:
        return type(e).__name__


async def busy_gauges(url: str) -> dict[str, float]:
    """Gauges that are not zero after the last request, and the number of failures; waits up to ten seconds."""
    async with httpx.AsyncClient(base_url=url) as http:
        for _ in range(50):
            text = (await http.get("/metrics")).text
            found = re.findall(r"^(ivg_(?:cache_rows|queue_length|live_\w+|model_failures_total)\S*) (\S+)$", text, re.MULTILINE)
            left = {name: float(number) for name, number in found if float(number)}
            if not left:
                break
            await asyncio.sleep(0.2)
    return left


if __name__ == "__main__":
    main()
