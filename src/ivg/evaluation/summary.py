"""From scored answers to the metrics of every method: the content of results.json. All means are over prompts, averaged over seeds."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from ivg.diagnostics.cost import flops
from ivg.errors import ConfigError
from ivg.evaluation import metrics
from ivg.evaluation.base_samples import SampleGroup, sample_group
from ivg.evaluation.curves import sweep_results
from ivg.evaluation.equal_length import win_rate_at_equal_length
from ivg.evaluation.kl import kl_from_rewards, kl_to_base
from ivg.evaluation.methods import BASE_SAMPLES, MethodRow, method_settings
from ivg.evaluation.metrics import mean_over_prompts
from ivg.evaluation.plan import GOLD, EvalPlan
from ivg.evaluation.score import read_scored, read_task_metrics
from ivg.evaluation.task import Answer, Comparison
from ivg.search.methods import Method
from ivg.utils.jsonl import read_jsonl

Row = dict[str, Any]
ScoredRow = tuple[Row, Row]
"""A row of a transcript, and its row of scores."""
CURVE_ROUNDS = 2000
"""Bootstrap rounds for each N of the best-of-N curve."""


def summarise(plan: EvalPlan) -> Row:
    """All metrics of the run; ``timings`` (seconds, memory) is the only part in which two runs differ.

    Raises:
        ConfigError: a stage that is not complete; a method without any answer.
    """
    sizes = _parameters(plan)
    judges = list(plan.judges)
    scored = {m.label: read_scored(plan, m.label) for m in plan.method_rows}
    base = scored[plan.base_row.label]
    groups = _sample_groups(plan, sizes, base) if plan.config.base_samples else []
    curve = _best_of_n_curve(groups) if groups else []
    methods = [_method(plan, m, scored[m.label], base, sizes, curve) for m in plan.method_rows]
    return {
        "task": plan.config.task,
        "prompts": len(plan.examples),
        "seeds": plan.config.seeds,
        "judges": judges,
        "primary": judges[0] if judges else _add_primary(plan, methods),
        "base": plan.base_row.label,
        "parameters": sizes,
        "methods": {m["label"]: m for m in methods},
        **sweep_results(plan, scored, sizes, groups),
        "base_samples": {"size": plan.config.base_samples, "selected_by": _selected_by(plan), "curve": curve} if groups else None,
        "timings": _timings(plan),
    }


def _parameters(plan: EvalPlan) -> dict[str, int]:
    path = plan.out / "models.json"
    if not path.exists():
        raise ConfigError(f"no such file: {path}\n  run the stage generate first")
    return dict(json.loads(path.read_text(encoding="utf-8"))["parameters"])


def _method(
    plan: EvalPlan, row: MethodRow, pairs: Sequence[ScoredRow], base: Sequence[ScoredRow], sizes: dict[str, int], curve: Sequence[Row]
) -> Row:
    """The metrics of one method; ``curve`` is that of best-of-N."""
    good = [(r, s) for r, s in pairs if "error" not in r]
    if not good:
        raise ConfigError(f"{row.label}: no answer succeeded; the first error: {pairs[0][0]['error']}")
    tokens = {name: n / len(good) for name, n in metrics.sum_counts(r["forward_tokens"] for r, _ in good).items()}
    kl, kl_note = kl_to_base(row.method, plan.sampling, [r for r, _ in good])
    cost = flops(tokens, sizes)
    compared = _comparisons(plan, good, base) if GOLD in plan.judges else []
    own = {} if row is plan.base_row or not compared else plan.task.against_base(plan.config, plan.out, row.label, compared)
    return {
        "label": row.label,
        "family": family(row.method),
        "method": method_settings(row.method),
        "sweep": row.sweep,
        "point": dict(row.point),
        "answers": len(good),
        "errors": len(pairs) - len(good),
        **{judge: mean_over_prompts((r["id"], s[judge]) for r, s in good) for judge in plan.judges},
        "win_rate": _win_rate(compared),
        "win_rate_at_equal_length": _win_rate_at_equal_length(plan, compared) if row is not plan.base_row else None,
        "kl": kl,
        "kl_note": kl_note,
        "kl_at_least": _kl_at_least(good, base) if GOLD in plan.judges else None,
        "surprisal_above_base": _surprisal_above_base(good, base),
        "surprisal": mean_over_prompts((r["id"], -s["base_logp"]) for r, s in good),
        "perplexity": metrics.perplexity([s["base_logp"] for _, s in good], [s["tokens"] for _, s in good]),
        **_text_metrics(good),
        "forward_tokens": {k: round(v, 2) for k, v in tokens.items()},
        "flops": cost,
        "best_of_n": best_of_n_within(cost, curve) if curve else None,
        "task": {**read_task_metrics(plan, row.label, [r for r, _ in pairs]), **own},
    }


def _add_primary(plan: EvalPlan, methods: Sequence[Row]) -> str | None:
    """The task's primary metric, if every method has it; each method gets it with its interval as ``primary``."""
    if plan.task.primary is None:
        return None
    name, error = plan.task.primary
    if not all(isinstance(m["task"].get(name), int | float) for m in methods):
        return None
    for m in methods:
        value, half = m["task"][name], 1.96 * (m["task"].get(error) or 0.0)
        m["primary"] = {"mean": value, "low": value - half, "high": value + half}
    return name


def _comparisons(plan: EvalPlan, pairs: Sequence[ScoredRow], base: Sequence[ScoredRow]) -> list[Comparison]:
    """Each answer beside the base's answer with the same prompt and seed, where both succeeded."""
    usual = {(r["id"], r["seed"]): (r, s) for r, s in base if "error" not in r}
    examples = plan.examples_by_id

    def answer(row: Row) -> Answer:
        return Answer(examples[row["id"]], row["seed"], row["text"])

    out = []
    for r, s in pairs:
        other = usual.get((r["id"], r["seed"]))
        if other is not None:
            won = metrics.win(s[GOLD], other[1][GOLD], same=r["text"] == other[0]["text"])
            out.append(Comparison(answer(r), answer(other[0]), won))
    return out


def _win_rate(compared: Sequence[Comparison]) -> dict[str, float] | None:
    """How often gold prefers the answer to the base's; ties count half."""
    return mean_over_prompts((c.answer.example.id, c.win) for c in compared) if compared else None


def _win_rate_at_equal_length(plan: EvalPlan, compared: Sequence[Comparison]) -> dict[str, float] | None:
    """The same at equal length in characters; None for answers of a fixed number of tokens, or where the fit says nothing."""
    if not compared or plan.sampling.ignore_eos:
        return None
    found = win_rate_at_equal_length(
        [c.answer.example.id for c in compared],
        [c.win for c in compared],
        [len(c.answer.text.strip()) for c in compared],
        [len(c.base.text.strip()) for c in compared],
    )
    return None if found is None else found.to_dict()


def _kl_at_least(pairs: Sequence[ScoredRow], base: Sequence[ScoredRow]) -> float:
    """Lower bound of the KL, from gold rewards."""
    found: list[dict[str, list[float]]] = [{}, {}]
    for rewards, rows in zip(found, (pairs, base), strict=True):
        for r, s in rows:
            if "error" not in r:
                rewards.setdefault(r["id"], []).append(s[GOLD])
    return round(kl_from_rewards(*found), 6)


def _surprisal_above_base(pairs: Sequence[ScoredRow], base: Sequence[ScoredRow]) -> dict[str, float] | None:
    """Mean -log pi_base of the answers minus that of the base's answers to the same prompts, at temperature 1, in nats."""
    usual = metrics.mean_by_key((r["id"], -s["base_logp"]) for r, s in base if "error" not in r)
    gaps = [(r["id"], -s["base_logp"] - usual[r["id"]]) for r, s in pairs if r["id"] in usual]
    return mean_over_prompts(gaps) if gaps else None


def _text_metrics(pairs: Sequence[ScoredRow]) -> Row:
    """Length and diversity; distinct-n is within the answers of one seed, since it falls with their number."""
    by_seed: dict[int, list[str]] = defaultdict(list)
    for r, _ in pairs:
        by_seed[r["seed"]].append(r["text"])
    return {
        "length": sum(s["tokens"] for _, s in pairs) / len(pairs),
        "words": sum(len(r["text"].split()) for r, _ in pairs) / len(pairs),
        **{f"distinct_{n}": sum(metrics.distinct(texts, n) for texts in by_seed.values()) / len(by_seed) for n in (1, 2)},
        "repetition": sum(metrics.repetition(r["token_ids"]) for r, _ in pairs) / len(pairs),
    }


def family(method: Method) -> str:
    """What a method uses: ``base`` (nothing), ``token`` guidance, ``select``ion, ``both``, or an ``other`` rule."""
    if method.rule not in ("top", "soft"):
        return "other"
    guided, selected = bool(method.guides), bool(method.selectors)
    return "both" if guided and selected else "token" if guided else "select" if selected else "base"


# Best-of-N at equal compute


def _sample_groups(plan: EvalPlan, sizes: dict[str, int], base: Sequence[ScoredRow]) -> list[SampleGroup]:
    """The rows of base samples; each prompt costs the base what it cost in the base method's batch."""
    prompt_tokens = {(r["id"], r["seed"]): _prompt_tokens_read(r) for r, _ in base if "error" not in r}
    rows = [(r, s) for r, s in read_scored(plan, BASE_SAMPLES) if "error" not in r]
    if not rows:
        raise ConfigError(f"{BASE_SAMPLES}: no answer succeeded\n  ask for shorter answers, or leave them out (--base-samples 0)")
    out = []
    for r, s in rows:  # rows of scores that were made before other judges scored base samples have gold alone
        rewards = {judge: {int(i): reward for i, reward in s[judge].items()} for judge in (GOLD, *plan.judges) if judge in s}
        others = {judge: found for judge, found in rewards.items() if judge != GOLD}
        out.append(sample_group(r, rewards[GOLD], sizes, prompt_tokens.get((r["id"], r["seed"])), others))
    return out


def _prompt_tokens_read(row: Row) -> int:
    """Prompt tokens that the base read: all tokens but those of the answer, whose last token is not read."""
    return sum(row["forward_tokens"].values()) - max(0, len(row["token_ids"]) - 1)


def _selected_by(plan: EvalPlan) -> str | None:
    return next((r["selected_by"] for r in read_jsonl(plan.transcripts(BASE_SAMPLES)) if "selected_by" in r), None)


def _best_of_n_curve(groups: Sequence[SampleGroup]) -> list[Row]:
    """Rewards and mean FLOPs of best-of-N for every N; ``gold`` is None without a gold reward, ``judges`` has the other judges."""
    others = [judge for judge in groups[0].judged if all(judge in g.judged for g in groups)]
    out = []
    for n in range(1, min(g.size for g in groups) + 1):
        means: dict[str, Any] = {}
        for judge in (GOLD, *others):
            found = [(g.id, reward) for g in groups if (reward := g.reward(judge, n)) is not None]
            means[judge] = mean_over_prompts(found, CURVE_ROUNDS) if found else None
        cost = sum(g.flops[n - 1] for g in groups) / len(groups)
        out.append({"n": n, "gold": means.pop(GOLD), "judges": means, "flops": cost})
    return out


def best_of_n_within(budget: float, curve: Sequence[Row]) -> Row:
    """The largest best-of-N within a budget of FLOPs.

    ``capped``: a larger one would be, but there are no more samples. ``over_budget``: even N = 1 costs more, by a twentieth at least.
    """
    row = next((c for c in reversed(curve) if c["flops"] <= budget), curve[0])
    step = curve[-1]["flops"] - curve[-2]["flops"] if len(curve) > 1 else curve[-1]["flops"]
    return {**row, "capped": row is curve[-1] and curve[-1]["flops"] + step <= budget, "over_budget": row["flops"] > 1.05 * budget}


# Timings and run metadata


def run_metadata(plan: EvalPlan) -> list[Row]:
    """Commit, command and machine of every process that computed transcripts or scores, in order, without duplicates."""
    found = [row["made"] for row in _timing_rows(plan) if "made" in row]
    return [made for i, made in enumerate(found) if made not in found[:i]]


def _timings(plan: EvalPlan) -> dict[str, Row]:
    """Seconds for an answer and peak memory of every label."""
    latest = {(row["label"], row["start"]): row for row in _timing_rows(plan) if "label" in row}  # a block may be computed again
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


def _timing_rows(plan: EvalPlan) -> list[Row]:
    return list(read_jsonl(plan.timings)) if plan.timings.exists() else []
