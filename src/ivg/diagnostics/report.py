"""Will guidance help? All measurements of ``ivg check --preferences`` in one call, and as plain values for JSON.

Knows: the order of things. Must not know files, nor how results are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ivg.diagnostics import sweep as sweeping
from ivg.diagnostics.divergence import Disagreement, agreement
from ivg.diagnostics.intervals import Numbers, Share, share
from ivg.diagnostics.log_ratios import Shift, written
from ivg.diagnostics.pairs import OnPairs, Pair, fitting, is_tie, longer_wins, pair_lengths, prompt_groups, score_pairs, summary
from ivg.diagnostics.sweep import Plan, Row, Selection
from ivg.diagnostics.training_overlap import TrainedOn, trained_on
from ivg.diagnostics.verdict import Evidence, Verdict, decide
from ivg.errors import ConfigError, PromptError
from ivg.model import GuidedModel
from ivg.models.cached_lm import CachedLM
from ivg.types import Prompt, Value
from ivg.values.implicit import AutoregressiveReward

BASELINE = "base"
"""Name of the base's own log-probability among the values on pairs: what no guide is needed for."""
GUIDES = ("implicit", "arm", "explicit")
"""Who guides tokens unless told, the first at hand (METHOD, section 4: implicit is the better one at token level)."""


@dataclass(frozen=True)
class Judge:
    """Who says how good a drawn text is. Guides are never judged by themselves."""

    name: str
    value: Value


@dataclass(frozen=True)
class GuidanceReport:
    """Everything that was measured.

    Attributes:
        pairs: that were scored.
        skipped: reasons of those that some model cannot read.
        ties: pairs whose two responses are the same text; left out.
        unknown: networks of the values and the judge whose training data are not known (no fingerprints beside them).
        longer: accuracy of "the longer one is better".
        values: each value, the judge and the base's own likelihood on the pairs.
        chosen: agreement of pair and base on the chosen responses; None without a pair that fits.
        own: the same on the base's own texts.
        guide: value that the sweep is about.
        judge: name of the judge.
        sweep: one row for each beta.
        selection: best-of-n by each value.
        verdict: in words.
    """

    pairs: int
    skipped: tuple[str, ...]
    ties: int
    unknown: tuple[str, ...]
    longer: Share
    values: tuple[OnPairs, ...]
    chosen: Disagreement | None
    own: Disagreement | None
    guide: str | None
    judge: str | None
    sweep: tuple[Row, ...]
    selection: tuple[Selection, ...]
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        out = asdict(self)
        out["verdict"]["exit_code"] = self.verdict.exit_code
        for row, plain in zip(self.sweep, out["sweep"], strict=True):
            plain["kl_per_token"] = row.per_token
        return out


def foresee(
    model: GuidedModel,
    pairs: Sequence[Pair],
    plan: Plan | None = None,
    *,
    prompts: int = 16,
    guide: str | None = None,
    judge: Judge | None = None,
    beta: float = 1.0,
    told: Callable[[str], None] = lambda _: None,
) -> GuidanceReport:
    """Measure everything.

    Args:
        model: base and values.
        pairs: preferences.
        plan: of the sweep.
        prompts: different prompts of the pairs that are swept; 0: no texts are drawn.
        guide: name of the value that would guide tokens; None: the first of :data:`GUIDES` at hand; ``"none"``: no value would.
        judge: scores the drawn texts; a judge that guides is left out of the sweep.
        beta: at which the agreement is measured.
        told: hears what is being done.

    Raises:
        ConfigError: no pair that all models can read, or no value of that name.
    """
    plan = plan or Plan()
    guide = _guide(model, guide)
    ends = not plan.sampling.ignore_eos
    judge = judge if judge is not None and judge.name != guide else None
    values: dict[str, Value] = {BASELINE: AutoregressiveReward(model.reader, BASELINE), **model.values}
    if judge is not None:
        values[judge.name] = judge.value
    different = [p for p in pairs if not is_tie(p)]
    ties = len(pairs) - len(different)
    kept, skipped = fitting(model.reader, values, different, ends)
    told(f"scoring {len(kept)} pairs")
    kept, tables, unscored = _scored(model.reader, values, kept, plan, ends)
    skipped += unscored
    if not kept:
        if ties and not skipped:
            raise ConfigError(f"in all {ties} pairs chosen and rejected are the same text\n  expected two different responses to a prompt")
        reason = skipped[0] if skipped else "the file holds none"
        raise ConfigError(f"no pair that all models can read: {reason}")
    trained = {name: trained_on(value, kept) for name, value in values.items() if name != BASELINE}
    measured = _on_pairs(model.reader, values, kept, tables, trained)
    longer = longer_wins(model.reader, kept)
    chosen_texts = [written(model.reader, p.prompt, p.chosen, ends=ends and p.chosen_ends) for p in _first_of_each(kept)[: max(prompts, 1)]]
    chosen = agreement(model.reader, model.values.get("implicit"), chosen_texts, beta)
    told("drawing texts")
    fits = guide is not None and Shift.of(model.values[guide], model.reader) is not None
    fresh = _unseen(kept, [trained[n] for n in (guide, judge.name if judge is not None else None) if n is not None])
    drawn = _drawn(model, fresh, plan, prompts, guide if fits else None, judge, beta, told)
    candidates = {n: v for n, v in measured.items() if n in model.values and (judge is None or n != judge.name)}
    judged = measured[judge.name] if judge is not None else None
    evidence = Evidence(candidates, guide, fits, drawn.own, drawn.rows, drawn.selection, judged)
    return GuidanceReport(
        pairs=len(kept),
        skipped=tuple(skipped),
        ties=ties,
        unknown=tuple(dict.fromkeys(name for t in trained.values() for name in t.unknown)),
        longer=share(longer, prompt_groups(kept)),
        values=tuple(measured.values()),
        chosen=chosen,
        own=drawn.own,
        guide=guide,
        judge=judge.name if judge is not None else None,
        sweep=drawn.rows,
        selection=drawn.selection,
        verdict=decide(evidence),
    )


def _guide(model: GuidedModel, name: str | None) -> str | None:
    if name is None:
        return next((n for n in GUIDES if n in model.values), None)
    if name == "none":
        return None
    if name not in model.values:
        raise ConfigError(f"no value called {name!r}\n  expected one of: {', '.join(model.values) or 'none'}")
    return name


def _on_pairs(
    base: CachedLM, values: Mapping[str, Value], pairs: Sequence[Pair], tables: Mapping[str, Numbers], trained: Mapping[str, TrainedOn]
) -> dict[str, OnPairs]:
    return {
        name: summary(name, tables[name], pairs, pair_lengths(base, value, pairs), trained[name].seen if name in trained else None)
        for name, value in values.items()
    }


def _scored(
    base: CachedLM, values: Mapping[str, Value], pairs: Sequence[Pair], plan: Plan, ends: bool
) -> tuple[list[Pair], dict[str, Numbers], list[str]]:
    """(the pairs that every value has numbers for, these [pairs, fractions, 2] by value, why the others are left out)."""
    found = {name: score_pairs(base, value, pairs, batch=max(1, plan.batch // 2), ends=ends) for name, value in values.items()}
    faults: dict[int, str] = {}
    for _, of_value in found.values():
        for i, fault in of_value.items():
            faults.setdefault(i, " ".join(fault.split()))
    kept = [i for i in range(len(pairs)) if i not in faults]
    return [pairs[i] for i in kept], {name: table[kept] for name, (table, _) in found.items()}, [faults[i] for i in sorted(faults)]


def _unseen(pairs: Sequence[Pair], trained: Sequence[TrainedOn]) -> list[Pair]:
    """The pairs that none of these was trained on; all where none is left."""
    fresh = [p for i, p in enumerate(pairs) if not any(t.seen[i] for t in trained)]
    return fresh or list(pairs)


def _first_of_each(pairs: Sequence[Pair]) -> list[Pair]:
    """One pair for each prompt, in order of appearance."""
    seen: dict[Prompt, Pair] = {}
    for pair in pairs:
        seen.setdefault(pair.prompt, pair)
    return list(seen.values())


@dataclass(frozen=True)
class _Drawn:
    own: Disagreement | None = None
    rows: tuple[Row, ...] = ()
    selection: tuple[Selection, ...] = ()


def _drawn(
    model: GuidedModel,
    pairs: Sequence[Pair],
    plan: Plan,
    count: int,
    guide: str | None,
    judge: Judge | None,
    beta: float,
    told: Callable[[str], None],
) -> _Drawn:
    """What needs texts: agreement on the base's own, the sweep, selection."""
    prompts = [p.prompt for p in _first_of_each(pairs) if _room(model, p.prompt, plan)][:count]
    if not prompts:
        return _Drawn()
    plan = plan if guide is not None else Plan((0.0,), None, plan.samples, plan.sampling, plan.seed, plan.batch)
    texts = sweeping.draw(model, guide, prompts, plan)
    told(f"reading {len(texts.beams)} texts")
    own = [b for b, k in zip(texts.beams, texts.drawn, strict=True) if k == 0]
    found = agreement(model.reader, model.values.get("implicit"), own, beta)
    scores = sweeping.judged(judge.value, texts.beams, plan.batch) if judge is not None else None
    rows = sweeping.sweep(model, guide, texts, scores, plan) if guide is not None else ()
    others = {n: v for n, v in model.values.items() if judge is not None and n != judge.name}
    return _Drawn(found, rows, sweeping.selections(others, texts, scores, plan) if scores is not None else ())


def _room(model: GuidedModel, prompt: Prompt, plan: Plan) -> bool:
    """Can every model read the prompt and an answer?"""
    try:
        model.reader.check_length(prompt, plan.sampling.max_new_tokens)
        for value in model.values.values():
            value.check(prompt, plan.sampling.max_new_tokens)
    except PromptError:
        return False
    return True
