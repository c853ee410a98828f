"""From scored answers to the figures of every method: what results.json holds, report and figures show.

Knows the files of a run through ``score.scored``; must not know how anything is drawn. All means are over prompts, seeds averaged.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ivg.diagnostics.cost import flops
from ivg.errors import ConfigError
from ivg.evaluation import metrics
from ivg.evaluation.base_samples import SampleGroup, sample_group
from ivg.evaluation.methods import BASE_SAMPLES, MethodRow, method_settings
from ivg.evaluation.plan import GOLD, EvalPlan
from ivg.evaluation.score import read_scored, read_task_metrics
from ivg.search.methods import Method
from ivg.search.selection import budgets
from ivg.settings.sampling import PLAIN_SAMPLING
from ivg.types import SamplingParams
from ivg.utils.jsonl import read_jsonl

Row = dict[str, Any]
Pair = tuple[Row, Row]
Figures = dict[str, Any]


def summarise(p: EvalPlan) -> Figures:
    """All figures of the run; ``timings`` (seconds, memory) is the only part in which two runs differ.

    Raises:
        ConfigError: a stage that is not finished; a method without any answer.
    """
    sizes = _sizes(p)
    judges = list(p.judges)
    base = read_scored(p, p.base_row.label)
    groups = _sample_groups(p, sizes, base) if p.config.base_samples else []
    curve = _best_of_n_curve(groups) if groups else []
    methods = [_method(p, m, base, judges, sizes, curve) for m in p.method_rows]
    return {
        "task": p.config.task,
        "prompts": len(p.examples),
        "seeds": p.config.seeds,
        "judges": judges,
        "primary": judges[0] if judges else _primary(p, methods),
        "base": p.base_row.label,
        "parameters": sizes,
        "methods": {m["label"]: m for m in methods},
        "base_samples": {"size": p.config.base_samples, "selected_by": _selected_by(p), "curve": curve} if groups else None,
        "timings": _timings(p),
    }


def _sizes(p: EvalPlan) -> dict[str, int]:
    path = p.out / "models.json"
    if not path.exists():
        raise ConfigError(f"{path} is not there\n  run the stage generate first")
    return dict(json.loads(path.read_text(encoding="utf-8"))["parameters"])


def _method(
    p: EvalPlan, method: MethodRow, base: Sequence[Pair], judges: Sequence[str], sizes: dict[str, int], curve: Sequence[Row]
) -> Figures:
    pairs = read_scored(p, method.label)
    good = [(r, s) for r, s in pairs if "error" not in r]
    if not good:
        raise ConfigError(f"{method.label}: no answer succeeded; the first error: {pairs[0][0]['error']}")
    tokens = metrics.total(r["forward_tokens"] for r, _ in good)
    read = {name: n / len(good) for name, n in tokens.items()}
    out: Figures = {
        "label": method.label,
        "family": family(method.method),
        "method": method_settings(method.method),
        "answers": len(good),
        "errors": len(pairs) - len(good),
    }
    out |= {judge: _over_prompts(good, partial(_said_by, judge)) for judge in judges}
    out["win_rate"] = _wins(good, base) if GOLD in judges else None
    out["kl"], out["kl_note"] = _kl(p, method.method, good)
    out["surprisal"] = _over_prompts(good, lambda r, s: -s["base_logp"])
    out["perplexity"] = metrics.perplexity([s["base_logp"] for _, s in good], [s["tokens"] for _, s in good])
    out |= _texts(good)
    out |= {"forward_tokens": {k: round(v, 2) for k, v in read.items()}, "flops": flops(read, sizes)}
    out["best_of_n"] = best_of_n_within(out["flops"], curve) if curve else None
    out["task"] = read_task_metrics(p, method.label, [r for r, _ in pairs])
    return out


def _primary(p: EvalPlan, methods: Sequence[Figures]) -> str | None:
    """Without judges: the task's own first figure, if every method has it; ``primary`` of each method then holds it."""
    if p.task.primary is None:
        return None
    name, spread = p.task.primary
    if not all(isinstance(m["task"].get(name), int | float) for m in methods):
        return None
    for m in methods:
        value, half = m["task"][name], 1.96 * (m["task"].get(spread) or 0.0)
        m["primary"] = {"mean": value, "low": value - half, "high": value + half}
    return name


def _said_by(judge: str, _: Row, judged: Row) -> float:
    return float(judged[judge])


def _over_prompts(pairs: Sequence[Pair], number: Callable[[Row, Row], float]) -> dict[str, float]:
    return metrics.interval(list(metrics.by_key((r["id"], number(r, s)) for r, s in pairs).values())).to_dict()


def _wins(ours: Sequence[Pair], base: Sequence[Pair]) -> dict[str, float] | None:
    """Share of prompts and seeds on which gold prefers this answer to the base's; ties count half."""
    theirs = {(r["id"], r["seed"]): s[GOLD] for r, s in base if "error" not in r}
    both = [(r["id"], metrics.win(s[GOLD], theirs[r["id"], r["seed"]])) for r, s in ours if (r["id"], r["seed"]) in theirs]
    return metrics.interval(list(metrics.by_key(both).values())).to_dict() if both else None


def _texts(pairs: Sequence[Pair]) -> Figures:
    """Length and variety. Distinct-n within one seed's answers: more seeds would not make a method poorer."""
    by_seed: dict[int, list[str]] = defaultdict(list)
    for r, _ in pairs:
        by_seed[r["seed"]].append(r["text"])
    variety = {f"distinct_{n}": sum(metrics.distinct(t, n) for t in by_seed.values()) / len(by_seed) for n in (1, 2)}
    repeated = sum(metrics.repetition(r["token_ids"]) for r, _ in pairs) / len(pairs)
    return {"length": sum(s["tokens"] for _, s in pairs) / len(pairs), **variety, "repetition": repeated}


def family(method: Method) -> str:
    """What steers: ``base`` (nothing), ``token`` guidance, ``select``ion, ``both``, or ``other`` rules."""
    if method.rule not in ("top", "soft"):
        return "other"
    guided, selected = bool(method.guides), bool(method.selectors)
    return "both" if guided and selected else "token" if guided else "select" if selected else "base"


# Divergence


def draws(method: Method, tokens: int, limit: int) -> list[int] | None:
    """How many continuations of the answer's prefix each chunk drew, at most; None where the method's rule has no such bound."""
    if method.rule not in ("top", "soft"):
        return None
    chunks = metrics.chunks_of(tokens, method.chunk_length)
    decay, w, k = method.decay, method.width, method.successors
    if decay < 1.0:
        length = method.chunk_length or limit
        plan = budgets(-(-limit // length), w * k, decay, w)[:chunks]
        return [n if i == 0 else -(-n // w) for i, n in enumerate(plan)]
    return [w * k if i == 0 else k for i in range(chunks)]


def _kl(p: EvalPlan, method: Method, pairs: Sequence[Pair]) -> tuple[dict[str, Any] | None, str | None]:
    """(KL(method || base) of an answer in nats, None); an upper bound where hypotheses are selected among. Or (None, why there is none)."""
    selects, limit = bool(method.selectors), p.sampling.max_new_tokens
    cut = truncated(p.sampling)
    if method.guides and cut:
        return None, f"guidance is measured before {cut}, which {'changes' if ',' not in cut else 'change'} what is drawn"
    one_chunk = method.chunk_length is None or method.chunk_length >= limit
    amounts = []
    for r, _ in pairs:
        added = 0.0
        if selects:
            drawn = draws(method, len(r["token_ids"]), limit)
            if drawn is None:
                return None, "no useful bound is known for the method"
            added = metrics.selection_bound(drawn, alone=method.width == 1 or one_chunk, soft=method.rule == "soft")
        amounts.append((r["id"], r["shift"] + added))
    return {**metrics.interval(list(metrics.by_key(amounts).values())).to_dict(), "bound": selects}, None


def truncated(s: SamplingParams) -> str | None:
    """What changes the distribution after guidance is measured, in words; None: nothing does."""
    cuts = {
        "greedy choice": s.temperature == 0,
        "top-k": s.top_k > 0,
        "top-p": s.top_p < 1,
        "min-p": s.min_p > 0,
    } | {name.replace("_", " "): True for name in s.changed if name in PLAIN_SAMPLING and name not in ("top_k", "top_p", "min_p")}
    return ", ".join(name for name, on in cuts.items() if on) or None


# Best-of-N at equal compute


def _sample_groups(p: EvalPlan, sizes: dict[str, int], base: Sequence[Pair]) -> list[SampleGroup]:
    """The rows of base samples; each prompt costs the base what it cost in the base method's batch."""
    read = {(r["id"], r["seed"]): _prompt_read(r) for r, _ in base if "error" not in r}
    rows = [(r, s) for r, s in read_scored(p, BASE_SAMPLES) if "error" not in r]
    if not rows:
        raise ConfigError(f"{BASE_SAMPLES}: no answer succeeded\n  ask for shorter answers, or leave them out (--base-samples 0)")
    return [sample_group(r, {int(i): g for i, g in s[GOLD].items()}, sizes, read.get((r["id"], r["seed"]))) for r, s in rows]


def _prompt_read(row: Row) -> int:
    """Tokens of the prompt that the plain base read: all that it read but its own answer (whose last token nobody reads)."""
    return sum(row["forward_tokens"].values()) - max(0, len(row["token_ids"]) - 1)


def _selected_by(p: EvalPlan) -> str | None:
    return next((r["selected_by"] for r in read_jsonl(p.transcripts(BASE_SAMPLES)) if "selected_by" in r), None)


def _best_of_n_curve(groups: Sequence[SampleGroup]) -> list[Row]:
    """Gold and mean FLOPs of best-of-N for every N; gold is None without a gold reward."""
    out = []
    for n in range(1, min(g.size for g in groups) + 1):
        golds = [(g.id, g.golds[g.best(n)]) for g in groups]
        known = [(i, x) for i, x in golds if x is not None]
        gold = metrics.interval(list(metrics.by_key(known).values()), 2000).to_dict() if known else None
        out.append({"n": n, "gold": gold, "flops": sum(g.flops[n - 1] for g in groups) / len(groups)})
    return out


def best_of_n_within(budget: float, curve: Sequence[Row]) -> Row:
    """The largest best-of-N that costs no more; ``capped``: more samples would have been within the budget."""
    row = next((c for c in reversed(curve) if c["flops"] <= budget), curve[0])
    step = curve[-1]["flops"] - curve[-2]["flops"] if len(curve) > 1 else curve[-1]["flops"]
    return {**row, "capped": row is curve[-1] and curve[-1]["flops"] + step <= budget}


# Clock, and who computed


def run_metadata(p: EvalPlan) -> list[Row]:
    """Who made transcripts and scores: commit, command and machine of every process that computed some, each once, in order."""
    path = Path(p.out / "timings.jsonl")
    found = [row["made"] for row in read_jsonl(path) if "made" in row] if path.exists() else []
    return [made for i, made in enumerate(found) if made not in found[:i]]


def _timings(p: EvalPlan) -> dict[str, Row]:
    """Seconds for an answer and peak memory of every method, as far as they were noted."""
    path = Path(p.out / "timings.jsonl")
    latest: dict[tuple[str, int], Row] = {}
    for row in read_jsonl(path) if path.exists() else ():
        if "label" in row:
            latest[row["label"], row["start"]] = row
    by_label: dict[str, list[Row]] = defaultdict(list)
    for row in latest.values():
        by_label[row["label"]].append(row)
    return {
        label: {
            "seconds": round(sum(r["seconds"] for r in rows) / sum(r["rows"] for r in rows), 4),
            "peak_bytes": max((r["peak_bytes"] for r in rows if r["peak_bytes"]), default=None),
        }
        for label, rows in sorted(by_label.items())
    }
