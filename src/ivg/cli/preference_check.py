"""``ivg check --preferences``: read the pairs, pick the judge, print tables and the verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console

from ivg.cli.model_table import describe_models, show_models
from ivg.cli.output import print_json
from ivg.cli.printing import say
from ivg.cli.progress import print_error
from ivg.errors import ConfigError
from ivg.utils.console import plain_table, print_table, table_console

if TYPE_CHECKING:
    from ivg.diagnostics.divergence import PairDivergence
    from ivg.diagnostics.preference_check import GuidanceReport, Judge
    from ivg.diagnostics.stats import Estimate, Proportion
    from ivg.diagnostics.sweep import SweepSettings
    from ivg.model import GuidedModel
    from ivg.settings.check import PreferenceSettings
    from ivg.settings.recipe import Recipe
    from ivg.types import Preference, Reward

MAX_REASONS = 4
"""Printed reasons for pairs that were left out."""


def run(recipe: Recipe, options: PreferenceSettings, *, as_json: bool = False, quiet: bool = False) -> int:
    """Read the pairs, load the models, measure, print, write; the exit code.

    Args:
        recipe: models, search and sampling.
        options: what is measured.
        as_json: print all numbers as one JSON object.
        quiet: print the verdict alone.
    """
    from ivg.cli.files import check_files
    from ivg.diagnostics.preference_check import CheckSettings, check_preferences
    from ivg.factory.recipe import load_models
    from ivg.utils.jsonl import write_json

    check_files([("--preferences", options.preferences)], [("--output", options.output)])
    pairs, betas = _read(options, quiet), options.weights_of(options.betas)
    model = load_models(recipe)
    out, err = table_console(), Console(stderr=True, highlight=False, quiet=quiet)
    if not (as_json or quiet):
        show_models(out, describe_models(model))
    sweep = _sweep_settings(model, recipe, options, betas)
    settings = CheckSettings(
        sweep,
        prompts=options.sweep,
        guide=recipe.search.token,
        judge=pick_judge(model, recipe, options.judge),
        beta=1.0 if recipe.search.beta is None else recipe.search.beta,
    )
    with err.status("reading", spinner="dots") as status:
        report = check_preferences(model, pairs, settings, on_progress=status.update)
    sampling = {"temperature": sweep.sampling.temperature, "max_new_tokens": sweep.sampling.max_new_tokens, "seed": sweep.seed}
    made_with = {"preferences": str(options.preferences), "models": _names(recipe), "samples": sweep.samples, **sampling}
    numbers = {"made_with": made_with, **report.to_dict()}
    if as_json:
        print_json(numbers)
    elif quiet:
        _verdict(out, report)
    else:
        show(out, report, settings.beta)
    if options.output is not None:
        write_json(options.output, numbers)
    return report.verdict.exit_code


def _read(options: PreferenceSettings, quiet: bool) -> list[Preference]:
    from ivg.jobs.failures import Failures
    from ivg.training.data import ColumnMapping, ReadOptions, read_preferences

    assert options.preferences is not None
    failures = Failures((lambda _: None) if quiet else print_error)
    how = ReadOptions(mapping=ColumnMapping(options.column_names or None), format=options.format, on_bad=failures.add_unusable)
    pairs = read_preferences(options.preferences, options.pairs, options=how, label="higher")
    failures.close()
    return pairs


def _names(recipe: Recipe) -> dict[str, str] | str:
    return {role: ref.path for role, ref in recipe.models.given.items()} or "embedded"


def _sweep_settings(model: GuidedModel, recipe: Recipe, options: PreferenceSettings, betas: tuple[float, ...]) -> SweepSettings:
    from ivg.diagnostics.sweep import SweepSettings

    given, known = recipe.sampling.settings(), ("temperature", "max_new_tokens", "ignore_eos")
    sampling = replace(model.sampling, **{k: given[k] for k in known if k in given}, stop=tuple(given.get("stop", model.sampling.stop)))
    sample_at = (0.0,) if options.from_base else None
    return SweepSettings(betas, sample_at, options.samples, sampling, recipe.run.seed, 4 * recipe.run.batch_size)


def pick_judge(model: GuidedModel, recipe: Recipe, name: str | None) -> Judge | None:
    """The value called ``name``, or the gold reward: the recipe's ``eval.gold``; the embedded models have their own.

    Default: gold for the embedded models, else the value reward, else explicit.

    Raises:
        ConfigError: no such value; gold without ``eval.gold``.
    """
    from ivg.diagnostics.preference_check import Judge

    if name == "none":
        return None
    if name is None:
        name = "gold" if not recipe.models.given else next((n for n in ("reward", "explicit") if n in model.values), None)
        if name is None:
            return None
    if name in model.values:
        return Judge(name, model.values[name])
    if name == "gold":
        return Judge("gold", gold_reward(recipe))
    raise ConfigError(f"no value called {name!r} for --judge\n  expected one of: {', '.join([*model.values, 'gold', 'none'])}")


def gold_reward(recipe: Recipe) -> Reward:
    """The recipe's ``eval.gold``; of the embedded models, their own.

    Raises:
        ConfigError: other models, and no ``eval.gold``.
    """
    from ivg.factory.recipe import load_options
    from ivg.factory.values import prompt_template
    from ivg.jobs.fingerprints import same_source
    from ivg.settings.eval import EMBEDDED_GOLD
    from ivg.settings.recipe import RewardRef
    from ivg.values.reward import load_reward

    base = recipe.models.base
    embedded = base is None or same_source(base.path, "embedded:base")
    ref = recipe.eval.gold or (RewardRef(path=EMBEDDED_GOLD) if embedded else None)
    if ref is None:
        raise ConfigError("--judge gold needs a gold reward; the embedded one is for film reviews only\n  set gold in the recipe's [eval]")
    options = replace(load_options(recipe), revision=None, quantization=None)  # these are for the base
    return load_reward(ref.path, template=prompt_template(ref), label=ref.label, options=options.of(ref), name="gold")


def show(out: Console, report: GuidanceReport, beta: float) -> None:
    """Print the tables and the verdict."""
    _pairs(out, report)
    _divergence(out, report, beta)
    _sweep(out, report)
    out.print()
    _verdict(out, report)


def _verdict(out: Console, report: GuidanceReport) -> None:
    out.print(f"verdict: {report.verdict.outcome}", style="bold")
    for reason in report.verdict.reasons:
        say(out, f"  {reason}")


def _pairs(out: Console, report: GuidanceReport) -> None:
    say(out, f"\npair accuracy: how often the chosen response of {report.pairs} pairs scores higher, at four prefixes of both responses")
    if report.skipped:
        kinds = Counter(report.skipped).most_common()
        for why, count in kinds[:MAX_REASONS]:
            say(out, f"  {count} more left out: {why}")
        if rest := sum(count for _, count in kinds[MAX_REASONS:]):
            say(out, f"  {rest} more left out for other reasons")
    if report.ties:
        say(out, f"  {report.ties} more left out: chosen and rejected are the same text")
    table = plain_table("value", "25 %", "50 %", "75 %", "whole", "95 % interval", "loss")
    for v in report.values:
        name = f"{v.name} (judge)" if v.name == report.judge else v.name
        table.add_row(name, *(f"{p.rate:.2f}" for p in v.accuracy), _interval(v.whole), f"{v.loss:.3f}")
    longer = report.longer_wins
    table.add_row("longer wins", "", "", "", f"{longer.rate:.2f}", _interval(longer), "")
    print_table(table, out)
    _trained(out, report)
    margins = [f"{v.name} {v.margin_correlation:.2f}" for v in report.values if v.margin_correlation is not None]
    if margins:
        say(out, f"rank correlation with the margins: {', '.join(margins)}")
    _length(out, report)


def _interval(p: Proportion) -> str:
    return f"{p.low:.2f}–{p.high:.2f}"


def _trained(out: Console, report: GuidanceReport) -> None:
    """Which values were trained on some of the pairs, and which may have been."""
    for v in report.values:
        if v.on_training_data:
            say(out, f"{v.name} was trained on {v.trained_pairs} of these pairs and too few are left: its numbers are on its training data")
        elif v.trained_pairs:
            say(out, f"{v.name} was trained on {v.trained_pairs} of these pairs: its numbers are on the other {v.whole.n}")
    if report.unknown_training_data:
        say(out, f"unknown training data (no fingerprints beside the weights): {', '.join(report.unknown_training_data)}")


def _length(out: Console, report: GuidanceReport) -> None:
    """Accuracies with length controlled."""
    out.print("\naccuracy on whole responses with length controlled, in the unit of length where it is lowest")
    table = plain_table("value", "unit", "length alone", "balanced", "95 % interval", "residual", "95 % interval")
    for v in report.values:
        if (c := v.length_control) is not None:
            balanced = ("", "") if c.balanced is None else (f"{c.balanced.rate:.2f}", _interval(c.balanced))
            table.add_row(v.name, c.unit, f"{c.alone.rate:.2f} ({c.rule})", *balanced, f"{c.residual.rate:.2f}", _interval(c.residual))
    print_table(table, out)


def _divergence(out: Console, report: GuidanceReport, beta: float) -> None:
    from ivg.diagnostics.divergence import TOP_TOKENS

    if report.divergence_on_chosen is None:
        return
    what = f"KL in nats, probability outside the base's {TOP_TOKENS} likeliest tokens; beta {beta:g}"
    say(out, f"\ndivergence of pair and base per token: {what}")
    table = plain_table("on", "tokens", "base‖untuned", "tuned‖untuned", "guided‖base", "top-1 kept", "outside")
    for name, d in (("chosen", report.divergence_on_chosen), ("base's", report.divergence_on_samples)):
        if d is not None:
            table.add_row(name, *_cells(d))
    print_table(table, out)


def _cells(d: PairDivergence) -> Sequence[str]:
    kls = (f"{x:.3f}" for x in (d.base_untuned, d.tuned_untuned, d.guided_base))
    return (str(d.tokens), *kls, f"{d.top1_kept:.0%}", f"{d.base_outside:.0%}→{d.outside:.0%}")


def _sweep(out: Console, report: GuidanceReport) -> None:
    from ivg.diagnostics.sweep import BEST_OF
    from ivg.diagnostics.verdict import MIN_EFFECTIVE_SIZE

    if report.sweep:
        out.print(f"\ntokens guided by {report.guide}" + (f", judged by {report.judge}" if report.judge else ", no judge"))
        table = plain_table("beta", "gain", "95 % interval", "KL to base", "per token", "tokens", "effective texts")
        for r in report.sweep:
            size = f"{r.effective_size:.0f}" + ("" if r.effective_size >= MIN_EFFECTIVE_SIZE else " (too few)")
            table.add_row(f"{r.beta:g}", *_gain(r.gain), f"{r.kl.mean:.2f}", f"{r.kl_per_token:.3f}", f"{r.length:.0f}", size)
        print_table(table, out)
    if report.best_of:
        out.print(f"\nbest of {BEST_OF} of the base's texts, judged by {report.judge}")
        table = plain_table("by", "gain", "95 % interval")
        for s in report.best_of:
            table.add_row(s.value, *_gain(s.gain))
        print_table(table, out)


def _gain(gain: Estimate | None) -> tuple[str, str]:
    return ("", "") if gain is None else (f"{gain.mean:+.2f}", f"{gain.low:+.2f} … {gain.high:+.2f}")
