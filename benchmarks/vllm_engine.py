"""The transformers engine and the vLLM engine on the same search, networks and dtype.

    OMP_NUM_THREADS=1 .venv-vllm/bin/python -m benchmarks.vllm_engine --docs docs/reference/benchmarks.md

Needs vLLM (make test-vllm sets up .venv-vllm with its CPU build). Both engines run in this process, in turn in each round; all
answers have the same length. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.docs_page import markdown_table, update_page
from ivg.bench.shapes import build_model, make_prompts, networks
from ivg.embedded import path
from ivg.factory.recipe import load_models
from ivg.settings.recipe import Recipe
from ivg.utils import environment

PROMPT_TOKENS = 32


def save_models(shape: str, folder: Path) -> dict[str, str]:
    """Save the shape's networks; their directories by role."""
    if shape == "embedded":
        return {role: str(path(role)) for role in ("base", "tuned", "untuned", "value")}
    model = build_model(shape, dtype="float32", packed=False)
    for role, network in networks(model).items():
        network.save_pretrained(folder / role)
        model.base.tokenizer.save_pretrained(folder / role)
    return {role: str(folder / role) for role in ("base", "tuned", "untuned", "value")}


def measure(model: Any, texts: list[Any], new_tokens: int, seed: int) -> dict[str, Any]:
    """Seconds for all answers, and to the first final text of a prompt, the median over prompts."""
    model.reset_caches()
    begin, clock, tokens = time.perf_counter(), environment.cpu_clock(), 0
    first: dict[int, float] = {}
    searcher = model.searcher()
    for text in texts:
        searcher.add(model.request(text, "ivg", seed=seed, max_new_tokens=new_tokens, ignore_eos=True))
    while searcher.busy:
        for step in searcher.step():
            if step.committed or step.completion:
                first.setdefault(step.request, time.perf_counter() - begin)
            if step.completion:
                tokens += len(step.completion.token_ids)
    assert tokens == len(texts) * new_tokens, f"{tokens} tokens"
    return {"seconds": time.perf_counter() - begin, "first": median(first.values()), "others": environment.cpu_contention(clock)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shape", default="embedded", help="embedded, gpt2-small-16k … (ivg bench)")
    options.add_argument("--prompts", default="16,64")
    options.add_argument("--new-tokens", type=int, default=50)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--docs", type=Path, help="also write the table into this page")
    o = options.parse_args()
    counts = [int(n) for n in o.prompts.split(",")]
    with TemporaryDirectory() as folder:
        models = save_models(o.shape, Path(folder))
        run = {"dtype": o.dtype, "device": "cpu"}
        engines: dict[str, Any] = {
            "transformers": load_models(Recipe.parse({"models": models, "run": run})),
            "vllm": load_models(
                Recipe.parse({"models": models, "run": run | {"engine": "vllm"}, "vllm": {"max_num_seqs": 256, "enforce_eager": True}})
            ),
        }
        texts = make_prompts(engines["transformers"].base.tokenizer, max(counts), PROMPT_TOKENS)
        for model in engines.values():
            measure(model, texts[:4], 6, 0)
        rows = [
            {"engine": name, "prompts": count, "round": number, **measure(engines[name], texts[:count], o.new_tokens, number)}
            for number in range(o.rounds)
            for count in counts
            for name in engines
        ]
        hit_rate = engines["vllm"].engine.prefix.hit_rate
        engines["vllm"].close()
    report(o, counts, rows, hit_rate)


def report(o: argparse.Namespace, counts: list[int], rows: list[dict[str, Any]], hit_rate: float) -> None:
    """Table and JSON line."""
    table, ratios = [], {}
    for count in counts:
        seconds = {}
        for name in ("transformers", "vllm"):
            own = [r for r in rows if r["engine"] == name and r["prompts"] == count]
            seconds[name] = [r["seconds"] for r in own]
            rate = count / median(seconds[name])
            first = median(r["first"] for r in own)
            figures = (f"{median(seconds[name]):.2f}", f"{rate:.2f}", f"{rate * o.new_tokens:.0f}", f"{first:.2f}")
            table.append([str(count), name, *figures])
        ratios[count] = median(v / t for v, t in zip(seconds["vllm"], seconds["transformers"], strict=True))
        table[-1].append(f"{ratios[count]:.2f}")
        table[-2].append("1")
    head = ["prompts", "engine", "seconds", "answers/s", "tokens/s", "first text (s)", "time over transformers"]
    text = markdown_table(head, table)
    made = environment.run_metadata()
    others = max((r["others"] or 0.0) for r in rows)
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    notes = (
        f"{o.shape}, ivg W=4 K=4 L=5, {PROMPT_TOKENS} + {o.new_tokens} tokens, {o.dtype}, {threads} thread(s) each, "
        f"median of {o.rounds} rounds in turn; prefix cache {hit_rate:.0%} of the submitted tokens; "
        f"other processes took at most {others:.0%} of the processors. Made with `{made['command']}` at {made['commit']}, "
        f"torch {made['machine']['torch']}."
    )
    print(text + "\n\n" + notes)
    if o.docs:
        update_page(o.docs, f"vllm-{o.shape}", f"{text}\n\n{notes}\n")
    settings = {k: str(v) for k, v in vars(o).items()}
    print(json.dumps({"benchmark": "vllm-engine", "settings": settings, "ratios": ratios, "rows": rows, "made": made}))


if __name__ == "__main__":
    main()
