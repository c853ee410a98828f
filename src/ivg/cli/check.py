"""``ivg check``: do these models fit, how far does the pair disagree with the base, and will guidance help?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ivg.cli import options as o
from ivg.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from ivg.model import GuidedModel

HELP = """Do these models fit together (vocabulary, context, templates), and how far would guidance move the base?

Samples a few texts from the base and reads them with tuned and untuned. Exit code 1 when token guidance over the whole
vocabulary is impossible.

    ivg check --preferences pairs.jsonl

Will guidance help? Accuracy of every value on preference pairs (prompt, chosen, rejected), divergence of pair and base,
reward and KL at several betas, and a verdict. Exit code 1 when it will not help, or when the pairs are too few to tell."""

_PREFERENCES = "Will it help? (with --preferences)"
PROMPTS = ("The movie was", "I have to say that", "In the end,", "What I like most is")


def check(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts to try. (default: four openings)", metavar="PROMPT...")] = None,
    recipe: o.RecipeFile = None,
    base: o.Base = None,
    tuned: o.Tuned = None,
    untuned: o.Untuned = None,
    value: o.ValuePath = None,
    reward: o.Reward = None,
    arm: o.Arm = None,
    template: o.Template = None,
    beta: o.Beta = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    preferences: Annotated[
        Path | None,
        typer.Option(
            "--preferences", help="Pairs (rows of docs/reference/data.md): prompt, chosen, rejected.", rich_help_panel=_PREFERENCES
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option("--format", help="jsonl, json, csv or parquet. (default: by the file's name)", rich_help_panel=_PREFERENCES),
    ] = None,
    pairs: Annotated[
        int | None, typer.Option("--pairs", help="The first so many. (default: 400)", min=1, rich_help_panel=_PREFERENCES)
    ] = None,
    sweep: Annotated[
        int | None,
        typer.Option("--sweep", help="Prompts that texts are drawn for; 0: none. (default: 16)", min=0, rich_help_panel=_PREFERENCES),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Texts for each prompt and beta. (default: 4)", min=2, rich_help_panel=_PREFERENCES)
    ] = None,
    betas: Annotated[
        str | None, typer.Option("--betas", help="Guidance weights to try. (default: 0.25,0.5,1,2)", rich_help_panel=_PREFERENCES)
    ] = None,
    from_base: Annotated[
        bool | None,
        typer.Option("--from-base", help="Draw from the base only and weigh: cheaper, good for small betas.", rich_help_panel=_PREFERENCES),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option("--judge", help="Who scores drawn texts: reward, explicit, gold (of the recipe), none.", rich_help_panel=_PREFERENCES),
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.", rich_help_panel=_PREFERENCES)] = None,
    token: o.Token = None,
    temperature: o.Temperature = None,
    max_new_tokens: o.MaxNewTokens = None,
    stop: o.Stop = None,
    ignore_eos: o.IgnoreEos = None,
    generation_config: o.GenerationConfig = None,
    seed: o.Seed = None,
    batch_size: o.BatchSize = None,
) -> None:
    """See HELP."""
    given = o.recipe_of(recipe, template, locals())
    extra = {"pairs": pairs, "sweep": sweep, "samples": samples, "betas": betas, "from_base": from_base, "judge": judge, "json": json}
    extra["format"] = format
    if preferences is None and any(v is not None for v in extra.values()):
        names = ", ".join(f"--{k.replace('_', '-')}" for k, v in extra.items() if v is not None)
        raise ConfigError(f"{names} is about preferences\n  give --preferences FILE too")
    if preferences is not None and prompts:
        raise ConfigError("got prompts and --preferences\n  the prompts are taken from the file; leave the others out")
    from rich.console import Console

    from ivg.factory.recipe import load_models

    out = Console(highlight=False)
    model = load_models(given)
    fits = _table(out, model)
    _generation_config(out, model)
    if preferences is not None:
        from ivg.cli.preference_check import CheckOptions, run

        raise typer.Exit(run(out, model, given, CheckOptions(preferences, **extra)))  # type: ignore[arg-type]
    _divergence(out, model, prompts or list(PROMPTS), 1.0 if given.search.beta is None else given.search.beta)
    out.print(f"\nmethods that these models allow: {', '.join(model.methods)}", soft_wrap=True)
    if not fits:
        raise typer.Exit(1)


def _table(out: Console, model: GuidedModel) -> bool:
    """Print how each model's tokens fit the base's; True when all that guide over the whole vocabulary do."""
    from rich.table import Table
    from rich.text import Text

    from ivg.diagnostics.compatibility import compare_vocabularies, models_of

    table = Table("model", "tokens", "context", "chat template", "vocabulary", box=None, pad_edge=False)
    base = model.reader
    table.add_row("base", str(len(base.vocabulary.pieces)), str(base.max_positions), _yes(base.tokenizer.chat_template), "")
    guides = {reader for value in model.values.values() if value.full_vocabulary() for reader in value.cached_lms()}
    fine, notes = True, []
    for lm in models_of(model.values).values():
        c = compare_vocabularies(base, lm)
        words = "same as base" if c.same_vocabulary else f"{c.different} ids differ: guides by text (--guide-candidates), selects by text"
        table.add_row(c.name, str(c.tokens), str(c.context), _yes(c.chat_template), words)
        notes += [f"id {i}: {ours!r} in {base.vocabulary.owner}, {theirs!r} in {c.name}" for i, ours, theirs in c.examples]
        fine = fine and (c.same_vocabulary or lm not in guides)
    out.print(table)
    for note in notes:
        out.print(Text(f"  {note}", style="dim"), soft_wrap=True)
    return fine


def _generation_config(out: Console, model: GuidedModel) -> None:
    """Say what the base's generation_config.json sets, and what of it does not apply."""
    if model.generation_config:
        listed = ", ".join(f"{name}={value!r}" for name, value in model.generation_config.items())
        out.print(f"generation_config.json of the base sets: {listed}", soft_wrap=True, markup=False)
    for name, why in model.generation_config_left_out.items():
        out.print(f"generation_config.json of the base: {name} does not apply ({why})", soft_wrap=True, markup=False)


def _divergence(out: Console, model: GuidedModel, prompts: list[str], beta: float) -> None:
    from ivg.diagnostics.divergence import divergence_on_samples

    d = divergence_on_samples(model, prompts, beta=beta)
    if d is None:
        return
    out.print(f"\nover {d.tokens} tokens of the base's own texts, per token:")
    out.print(
        f"  KL(base‖tuned) {d.base_tuned:.3f}   KL(base‖untuned) {d.base_untuned:.3f}   KL(tuned‖untuned) {d.tuned_untuned:.3f} nats",
        soft_wrap=True,
    )
    out.print(
        f"  guidance at beta {beta:g}: KL(guided‖base) {d.guided_base:.3f} nats, likeliest token unchanged at {d.top1_kept:.0%}",
        soft_wrap=True,
    )
    out.print(f"  {d.describe()}", soft_wrap=True)


def _yes(value: object) -> str:
    return "yes" if value else "no"
