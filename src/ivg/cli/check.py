"""``ivg check``: do these models fit, how far does the pair disagree with the base, and will guidance help?"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ivg.cli.options import Options, command
from ivg.cli.output import AsJson, Quiet, print_json
from ivg.cli.printing import say
from ivg.cli.quick_import import import_transformers
from ivg.cli.recipe_options import RecipeOptions
from ivg.cli.standard_input import texts_of
from ivg.errors import ConfigError
from ivg.settings.check import PreferenceSettings
from ivg.settings.recipe import Recipe
from ivg.utils.console import table_console

if TYPE_CHECKING:
    from ivg.diagnostics.divergence import PairDivergence

HELP = """Do these models fit together (vocabulary, context, templates), and how far would guidance move the base?

Samples a few texts from the base and reads them with tuned and untuned. Exit code 1 when token guidance over the whole
vocabulary is impossible.

    ivg check --preferences pairs.jsonl

Will guidance help? Accuracy of every value on preference pairs (prompt, chosen, rejected), divergence of pair and base,
reward and KL at several betas, and a verdict. Exit code 1 when it will not help, or when the pairs are too few to tell."""

PROMPTS = ("The movie was", "I have to say that", "In the end,", "What I like most is")


_OFFERED = {
    "search": ("token", "beta"),
    "sampling": ("temperature", "max_new_tokens", "stop", "ignore_eos"),
    "run": ("generation_config", "seed", "batch_size", "device", "dtype", "revision", "attention"),
}


@command(
    recipe=RecipeOptions("models", only=_OFFERED),
    preferences=Options(PreferenceSettings, "Will it help? (with --preferences)", make=PreferenceSettings.of),
)
def check(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts to try; - is standard input. (default: four openings)", metavar="PROMPT...")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    *,
    recipe: Recipe,
    preferences: PreferenceSettings,
) -> None:
    """See HELP."""
    import_transformers(recipe)
    from ivg.cli.model_table import describe_models, show_models
    from ivg.diagnostics.divergence import divergence_on_samples
    from ivg.factory.recipe import load_models

    if preferences.preferences is not None:
        from ivg.cli.preference_check import run

        if prompts:
            raise ConfigError("got prompts and --preferences\n  the prompts are taken from the file; leave the others out")
        raise typer.Exit(run(recipe, preferences, as_json=as_json, quiet=quiet))
    texts = texts_of(prompts) if prompts else list(PROMPTS)
    beta = 1.0 if recipe.search.beta is None else recipe.search.beta
    model = load_models(recipe)
    found, divergence = describe_models(model), divergence_on_samples(model, texts, beta=beta)
    if as_json:
        measured = None if divergence is None else {"beta": beta, **asdict(divergence), "summary": divergence.describe()}
        print_json({**found.to_dict(), "divergence": measured, "methods": list(model.methods)})
    else:
        out = table_console()
        show_models(out, found, quiet=quiet)
        if divergence is not None:
            _show_divergence(out, divergence, beta)
        say(out, f"\nmethods that these models allow: {', '.join(model.methods)}")
    if not found.fits:
        raise typer.Exit(1)


def _show_divergence(out: Console, d: PairDivergence, beta: float) -> None:
    out.print(f"\nover {d.tokens} tokens of the base's own texts, per token:")
    kls = (f"KL(base‖tuned) {d.base_tuned:.3f}", f"KL(base‖untuned) {d.base_untuned:.3f}", f"KL(tuned‖untuned) {d.tuned_untuned:.3f}")
    say(out, f"  {'   '.join(kls)} nats")
    say(out, f"  guidance at beta {beta:g}: KL(guided‖base) {d.guided_base:.3f} nats, likeliest token unchanged at {d.top1_kept:.0%}")
    say(out, f"  {d.describe()}")
