"""Every method on the same prompts, judged by `gold`: the README's table. Resumable; the last line is JSON.

    make table
    .venv/bin/python benchmarks/methods.py --data ../shared/data/imdb --out build/methods

Prompts: the first 4 to 8 words of reviews of IMDb's test split, which no embedded model was trained on. Answers are
appended to OUT/answers.jsonl, seed by seed. Intervals: 95 % bootstrap over prompts, whose seeds are averaged first.
"""

import argparse
import json
import platform
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from ivg.demo.corpus import read_reviews
from ivg.demo.rollouts import opening_words
from ivg.embedded import path
from ivg.models.loading import LoadOptions
from ivg.steered import SteeredModel
from ivg.types import Beam, Meter, Prompt, new_key
from ivg.values.reward import RewardModel

METHODS = ("base", "bon", "eft", "token-explicit", "cbs-implicit", "cbs-explicit", "ivg")


def distinct(texts, n=2):
    """Distinct word n-grams over all word n-grams of ``texts``."""
    grams = Counter()
    for text in texts:
        words = text.lower().split()
        grams.update(zip(*(words[i:] for i in range(n)), strict=False))
    return len(grams) / max(1, grams.total())


def interval(rows, rounds=10_000):
    """Mean of per-prompt means [prompts] and its 95 % bootstrap interval."""
    rows = np.asarray(rows)
    rng = np.random.default_rng(0)
    means = rows[rng.integers(len(rows), size=(rounds, len(rows)))].mean(1)
    return float(rows.mean()), *np.quantile(means, [0.025, 0.975]).tolist()


def base_logps(model, rows):
    """Sum of log-probabilities of every response under the plain base, in nats."""
    out = []
    for start in range(0, len(rows), 200):
        beams = [
            Beam(new_key(), None, Prompt(r["prompt"]), tuple(r["token_ids"]), r["text"], meter=Meter(), vocabulary=model.base.vocabulary)
            for r in rows[start : start + 200]
        ]
        out += [sum(logps) for logps in model.base.token_logps(beams)]
        model.base.release([b.key for b in beams])
    return out


def generate(model, prompts, args, file):
    """Answer what is not answered yet, method by method and seed by seed."""
    done = {(r["method"], r["seed"]) for r in read(file)}
    for method in args.methods:
        for seed in range(args.seeds):
            if (method, seed) in done:
                continue
            settings = {"temperature": 0.7, "max_new_tokens": 50, "ignore_eos": True, "beta": args.beta}
            requests = [model.request(p, method, seed=seed, index=i, **settings) for i, p in enumerate(prompts)]
            began = time.perf_counter()
            answers = dict(model.run(requests, max_beams=512))
            seconds = time.perf_counter() - began
            with file.open("a") as f:
                for i, prompt in enumerate(prompts):
                    row = {
                        "method": method,
                        "seed": seed,
                        "id": i,
                        "prompt": prompt,
                        **answers[i].to_dict(),
                    }
                    f.write(json.dumps(row, ensure_ascii=False) + "\n")
            print(f"{method}, seed {seed}: {seconds:.0f} s", flush=True)


def read(file):
    """Rows of a JSONL file, none where there is no file."""
    return [json.loads(line) for line in file.open()] if file.exists() else []


def summary(rows):
    """One method's figures from its scored rows."""
    by_prompt, by_seed = defaultdict(list), defaultdict(list)
    for r in rows:
        by_prompt[r["id"]].append(r["gold"])
        by_seed[r["seed"]].append(r["text"])
    mean, low, high = interval([np.mean(v) for v in by_prompt.values()])
    tokens = sum(len(r["token_ids"]) for r in rows)
    read_tokens = Counter()
    for r in rows:
        read_tokens.update(r["usage"]["forward_tokens"])
    return {
        "gold": mean,
        "low": low,
        "high": high,
        "distinct_2": float(np.mean([distinct(t) for t in by_seed.values()])),
        "perplexity": float(np.exp(-sum(r["base_logp"] for r in rows) / tokens)),
        "tokens_read": read_tokens.total() / len(rows),
        "read_by_model": {k: round(v / len(rows), 1) for k, v in read_tokens.items()},
    }


def table(figures):
    """Markdown."""
    lines = [
        "| method | gold reward (95 % interval) | distinct-2 | perplexity under base | tokens read |",
        "|---|---|---|---|---|",
    ]
    for name, f in figures.items():
        lines.append(
            f"| `{name}` | {f['gold']:+.2f} ({f['low']:+.2f} … {f['high']:+.2f}) | {f['distinct_2']:.3f} | {f['perplexity']:.1f} "
            f"| {f['tokens_read']:,.0f} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with IMDb's test.parquet")
    parser.add_argument("--out", type=Path, default=Path("build/methods"))
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--beta", type=float, help="token guidance weight (default: the method's)")
    parser.add_argument("--models", type=Path, help="folder with base, tuned, untuned, value, gold (default: the embedded ones)")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    where = (lambda name: args.models / name) if args.models else path
    options = LoadOptions(device="cpu", dtype=args.dtype)
    model = SteeredModel.from_pretrained(
        where("base"), tuned=where("tuned"), untuned=where("untuned"), value=where("value"), options=options
    )
    gold = RewardModel.from_pretrained(where("gold"), options=LoadOptions(device="cpu", dtype="float32"), name="gold")
    prompts = opening_words(read_reviews(args.data, "test"), args.prompts, seed=0)
    args.out.mkdir(parents=True, exist_ok=True)
    generate(model, prompts, args, args.out / "answers.jsonl")
    figures = {}
    for method in args.methods:
        rows = [r for r in read(args.out / "answers.jsonl") if r["method"] == method and r["seed"] < args.seeds]
        scores, _ = gold.rewards([r["prompt"] + r["text"] for r in rows])
        for r, score, logp in zip(rows, scores, base_logps(model, rows), strict=True):
            r |= {"gold": score, "base_logp": logp}
        figures[method] = summary(rows)
    (args.out / "table.md").write_text(table(figures) + "\n")
    print(table(figures))
    print(json.dumps({"machine": platform.processor() or platform.machine(), "dtype": args.dtype, "prompts": args.prompts,
                      "seeds": args.seeds, "methods": figures}))  # fmt: skip


if __name__ == "__main__":
    main()
