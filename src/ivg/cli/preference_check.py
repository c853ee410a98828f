"""``ivg check --preferences``: will guidance help? Reads the file, picks the judge, shows tables and the verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ivg.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from ivg.diagnostics.divergence import Disagreement
    from ivg.diagnostics.intervals import Mean, Share
    from ivg.diagnostics.report import GuidanceReport, Judge
    from ivg.diagnostics.sweep import Plan
    from ivg.model import GuidedModel
    from ivg.settings.recipe import Recipe
    from ivg.values.base import FunctionValue
    from ivg.values.reward import RewardModel

MOST_KINDS = 4
"""Reasons told for which pairs were left out."""
BETAS = "0.25,0.5,1,2"


@dataclass(frozen=True)
class Order:
    """The options that only ``--preferences`` reads; None: not given."""

    file: Path
    format: str | None = None
    pairs: int | None = None
    sweep: int | None = None
    samples: int | None = None
    betas: str | None = None
    from_base: bool | None = None
    judge: str | None = None
    json: Path | None = None


def run(out: Console, model: GuidedModel, recipe: Recipe, order: Order) -> int:
    """Measure, print, write; the exit code."""
    from ivg.cli.progress import report
    from ivg.diagnostics.report import foresee
    from ivg.jobs.failures import Failures
    from ivg.training.data import read_preferences
    from ivg.utils.jsonl import write_json

    failures = Failures(report)
    pairs = read_preferences(order.file, 400 if order.pairs is None else order.pairs, format=order.format, on_bad=failures.of_source)
    failures.close()
    plan = _plan(model, recipe, order)
    beta = 1.0 if recipe.search.beta is None else recipe.search.beta
    with out.status("reading", spinner="dots") as status:
        found = foresee(
            model,
            pairs,
            plan,
            prompts=16 if order.sweep is None else order.sweep,
            guide=recipe.search.token,
            judge=pick_judge(model, recipe, order.judge),
            beta=beta,
            told=status.update,
        )
    show(out, found, beta)
    if order.json is not None:
        sampling = {"temperature": plan.sampling.temperature, "max_new_tokens": plan.sampling.max_new_tokens, "seed": plan.seed}
        made_with = {"preferences": str(order.file), "models": _names(recipe), "samples": plan.samples, **sampling}
        write_json(order.json, {"made_with": made_with, **found.to_dict()})
    return found.verdict.exit_code


def _names(recipe: Recipe) -> dict[str, str] | str:
    return {role: ref.path for role, ref in recipe.models.given.items()} or "embedded"


def _plan(model: GuidedModel, recipe: Recipe, order: Order) -> Plan:
    from dataclasses import replace

    from ivg.diagnostics.sweep import Plan

    text = BETAS if order.betas is None else order.betas
    try:
        betas = tuple(float(b) for b in text.split(","))
    except ValueError:
        raise ConfigError(f"--betas {text!r}\n  expected numbers with commas between them, e.g. {BETAS}") from None
    given, known = recipe.sampling.settings(), ("temperature", "max_new_tokens", "ignore_eos")
    sampling = replace(model.sampling, **{k: given[k] for k in known if k in given}, stop=tuple(given.get("stop", model.sampling.stop)))
    draw_at = (0.0,) if order.from_base else None
    return Plan(betas, draw_at, 4 if order.samples is None else order.samples, sampling, recipe.run.seed, 4 * recipe.run.batch_size)


def pick_judge(model: GuidedModel, recipe: Recipe, name: str | None) -> Judge | None:
    """The named value; ``gold`` is the recipe's ``eval.gold``, of the embedded models their own.

    Unless told: gold for the embedded models, else reward, else explicit.

    Raises:
        ConfigError: no such value; gold, but nothing says which.
    """
    from ivg.diagnostics.report import Judge

    if name == "none":
        return None
    if name is None:
        name = "gold" if not recipe.models.given else next((n for n in ("reward", "explicit") if n in model.values), None)
        if name is None:
            return None
    if name in model.values:
        return Judge(name, model.values[name])
    if name == "gold":
        return Judge("gold", _gold(recipe))
    raise ConfigError(f"no value called {name!r} to judge by\n  expected one of: {', '.join([*model.values, 'gold', 'none'])}")


def _gold(recipe: Recipe) -> RewardModel | FunctionValue:
    from dataclasses import replace

    from ivg.factory.recipe import load_options
    from ivg.jobs.provenance import same
    from ivg.settings.recipe import RewardRef
    from ivg.values.reward import load_reward

    base = recipe.models.base
    embedded = base is None or same(base.path, "embedded:base")
    ref = recipe.eval.gold or (RewardRef(path="embedded:gold") if embedded else None)
    if ref is None:
        raise ConfigError("--judge gold, but which? the embedded gold knows film reviews only\n  give it as gold in the recipe's [eval]")
    options = replace(load_options(recipe), revision=None, quantization=None)  # those are the base's
    return load_reward(ref.path, template=ref.template, label=ref.label, options=options, name="gold")


def show(out: Console, found: GuidanceReport, beta: float) -> None:
    """Everything, as text."""
    _pairs(out, found)
    _agreement(out, found, beta)
    _sweep(out, found)
    out.print(f"\nverdict: {found.verdict.outcome}", style="bold")
    for reason in found.verdict.reasons:
        out.print(f"  {reason}", soft_wrap=True, markup=False)


def _pairs(out: Console, found: GuidanceReport) -> None:
    from rich.table import Table

    out.print(f"\nhow often the chosen of {found.pairs} pairs scores higher, at four stages of both responses", soft_wrap=True)
    if found.skipped:
        kinds = Counter(found.skipped).most_common()
        for why, count in kinds[:MOST_KINDS]:
            out.print(f"  {count} more were left out: {why}", soft_wrap=True, markup=False)
        if rest := sum(count for _, count in kinds[MOST_KINDS:]):
            out.print(f"  {rest} more were left out for other reasons", soft_wrap=True)
    if found.ties:
        out.print(f"  {found.ties} more were left out: chosen and rejected are the same text", soft_wrap=True)
    table = Table("value", "25 %", "50 %", "75 %", "whole", "95 % interval", "loss", box=None, pad_edge=False)
    for v in found.values:
        name = f"{v.name} (judge)" if v.name == found.judge else v.name
        table.add_row(name, *(f"{s.rate:.2f}" for s in v.at), _interval(v.whole), f"{v.loss:.3f}")
    longer = found.longer
    table.add_row("longer wins", "", "", "", f"{longer.rate:.2f}", _interval(longer), "")
    out.print(table)
    _trained(out, found)
    margins = [f"{v.name} {v.margin:.2f}" for v in found.values if v.margin is not None]
    if margins:
        out.print(f"rank correlation with the margins: {', '.join(margins)}", soft_wrap=True)
    _length(out, found)


def _interval(s: Share) -> str:
    return f"{s.low:.2f}–{s.high:.2f}"


def _trained(out: Console, found: GuidanceReport) -> None:
    """Which numbers are of training data, and of whom that is not known."""
    for v in found.values:
        if v.on_training_data:
            text = f"{v.name} was trained on {v.seen} of these pairs, too few others are left: its numbers are of its training data"
            out.print(text, soft_wrap=True, markup=False)
        elif v.seen:
            text = f"{v.name} was trained on {v.seen} of these pairs: its numbers are of the {v.whole.n} others"
            out.print(text, soft_wrap=True, markup=False)
    if found.unknown:
        text = f"not known whether these pairs were trained on by: {', '.join(found.unknown)} (no fingerprints beside the weights)"
        out.print(text, soft_wrap=True, markup=False)


def _length(out: Console, found: GuidanceReport) -> None:
    """Accuracies with length taken out."""
    from rich.table import Table

    out.print("\nwhole responses with length taken out, in the unit of length that leaves least")
    table = Table("value", "unit", "length alone", "balanced", "95 % interval", "beyond", "95 % interval", box=None, pad_edge=False)
    for v in found.values:
        if (c := v.length) is not None:
            balanced = ("", "") if c.balanced is None else (f"{c.balanced.rate:.2f}", _interval(c.balanced))
            table.add_row(v.name, c.unit, f"{c.alone.rate:.2f} ({c.rule})", *balanced, f"{c.residual.rate:.2f}", _interval(c.residual))
    out.print(table)


def _agreement(out: Console, found: GuidanceReport, beta: float) -> None:
    from rich.table import Table

    from ivg.diagnostics.divergence import TOP

    if found.chosen is None:
        return
    out.print(f"\npair and base, per token: KL in nats, mass beyond the base's {TOP} likeliest tokens; beta {beta:g}", soft_wrap=True)
    columns = ("on", "tokens", "base‖untuned", "tuned‖untuned", "guided‖base", "top-1 kept", "beyond")
    table = Table(*columns, box=None, pad_edge=False)
    for name, d in (("chosen", found.chosen), ("base's", found.own)):
        if d is not None:
            table.add_row(name, *_cells(d))
    out.print(table)


def _cells(d: Disagreement) -> Sequence[str]:
    kls = (f"{x:.3f}" for x in (d.base_untuned, d.tuned_untuned, d.moved))
    return (str(d.tokens), *kls, f"{d.top1:.0%}", f"{d.base_outside:.0%}→{d.outside:.0%}")


def _sweep(out: Console, found: GuidanceReport) -> None:
    from rich.table import Table

    from ivg.diagnostics.sweep import CHOICES
    from ivg.diagnostics.verdict import EFFECTIVE

    if found.sweep:
        out.print(f"\ntokens guided by {found.guide}" + (f", judged by {found.judge}" if found.judge else ", no judge"))
        table = Table("beta", "gain", "95 % interval", "KL to base", "per token", "tokens", "texts' worth", box=None, pad_edge=False)
        for r in found.sweep:
            worth = f"{r.effective:.0f}" + ("" if r.effective >= EFFECTIVE else " (too few)")
            table.add_row(f"{r.beta:g}", *_gain(r.gain), f"{r.kl.value:.2f}", f"{r.per_token:.3f}", f"{r.length:.0f}", worth)
        out.print(table)
    if found.selection:
        out.print(f"\nbest of {CHOICES} of the base's texts, judged by {found.judge}")
        table = Table("by", "gain", "95 % interval", box=None, pad_edge=False)
        for s in found.selection:
            table.add_row(s.value, *_gain(s.gain))
        out.print(table)


def _gain(gain: Mean | None) -> tuple[str, str]:
    return ("", "") if gain is None else (f"{gain.value:+.2f}", f"{gain.low:+.2f} … {gain.high:+.2f}")
