"""``ivg check``: do these models fit, and how far does the pair disagree with the base?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ivg.cli import options as o

if TYPE_CHECKING:
    from rich.console import Console

    from ivg.steered import SteeredModel

HELP = """Do these models fit together (vocabulary, context, templates), and how far would guidance move the base?

Samples a few texts from the base and reads them with tuned and untuned. Exit code 1 when token guidance over the whole
vocabulary is impossible."""

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
) -> None:
    """See HELP."""
    given = o.recipe_of(recipe, template, locals())
    from rich.console import Console

    from ivg.build import load_models

    out = Console(highlight=False)
    model = load_models(given)
    fits = _table(out, model)
    _disagreement(out, model, prompts or list(PROMPTS), 1.0 if given.search.beta is None else given.search.beta)
    out.print(f"\nmethods that these models allow: {', '.join(model.methods)}", soft_wrap=True)
    if not fits:
        raise typer.Exit(1)


def _table(out: Console, model: SteeredModel) -> bool:
    """Print how each model's tokens fit the base's; True when all that guide over the whole vocabulary do."""
    from rich.table import Table
    from rich.text import Text

    from ivg.diagnose import fit, readers, vocabulary_lines
    from ivg.types import knows_vocabulary

    table = Table("model", "tokens", "context", "chat template", "vocabulary", box=None, pad_edge=False)
    base = model.base
    table.add_row("base", str(len(base.vocabulary.pieces)), str(base.model.max_positions), _yes(base.tokenizer.chat_template), "")
    guides = {r for v in model.values.values() if knows_vocabulary(v) for a in ("tuned", "untuned", "model") if (r := getattr(v, a, None))}
    fine, notes = True, []
    for reader in readers(model).values():
        f = fit(base, reader)
        words = "same as base" if f.same else f"{f.different} ids differ: guides by text (--guide-candidates), selects by text"
        table.add_row(f.name, str(f.tokens), str(f.context), _yes(f.chat_template), words)
        if not f.same:
            notes += vocabulary_lines(base.vocabulary, f)
            fine = fine and reader not in guides
    out.print(table)
    for note in notes:
        out.print(Text(f"  {note}", style="dim"), soft_wrap=True)
    return fine


def _disagreement(out: Console, model: SteeredModel, prompts: list[str], beta: float) -> None:
    from ivg.diagnose import disagreement, verdict

    d = disagreement(model, prompts, beta=beta)
    if d is None:
        return
    out.print(f"\nover {d.tokens} tokens of the base's own texts, per token:")
    out.print(
        f"  KL(base‖tuned) {d.base_tuned:.3f}   KL(base‖untuned) {d.base_untuned:.3f}   KL(tuned‖untuned) {d.tuned_untuned:.3f} nats",
        soft_wrap=True,
    )
    out.print(f"  guidance at beta {beta:g}: KL(guided‖base) {d.moved:.3f} nats, likeliest token unchanged at {d.top1:.0%}", soft_wrap=True)
    out.print(f"  {verdict(d)}", soft_wrap=True)


def _yes(value: object) -> str:
    return "yes" if value else "no"
