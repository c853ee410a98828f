"""``ivg compare``: one prompt, several methods, side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ivg.cli.options import command
from ivg.cli.recipe_options import RecipeOptions
from ivg.errors import ScoreError
from ivg.settings.recipe import Recipe

if TYPE_CHECKING:
    from ivg.model import GuidedModel
    from ivg.values.reward import RewardModel

HELP = """Answer one prompt by several methods, with scores, tokens spent and seconds.

Column "value": the score by the explicit value (else the reward model). Column "gold", with the embedded models: the score by a
reward model that no method uses; it also scored the training data of the guides."""

FAILED = "(failed)"
"""Shown where there is no answer or score; the reason is printed below the table."""
DEFAULT = ("base", "bon", "eft", "token-explicit", "cbs-implicit", "cbs-explicit", "ivg")


_RUN = ("engine", "seed", "device", "dtype", "revision", "attention", "generation_config")


@command(recipe=RecipeOptions("models", "search", "sampling", "run", only={"run": _RUN}))
def compare(
    prompt: Annotated[str, typer.Argument(help="What to answer.")],
    methods: Annotated[str | None, typer.Option("--methods", help="Comma-separated. (default: those that the models allow)")] = None,
    *,
    recipe: Recipe,
) -> None:
    """See HELP."""
    from ivg.cli.progress import print_error, progress
    from ivg.factory.recipe import load_models
    from ivg.search.methods import get_method

    wanted = [m.strip() for m in methods.split(",")] if methods else list(DEFAULT)
    for name in wanted:
        get_method(name)
    with progress(len(wanted), "methods") as advance:
        model = load_models(recipe, every_guide=True)
        if methods is None:
            wanted = [m for m in DEFAULT if m in model.methods]
        judge = next((v for v in ("explicit", "reward", "implicit") if v in model.values), None)
        gold = _gold() if not recipe.models.given and recipe.endpoint.model is None else None
        rows, problems = [], list[str]()
        for note in _notes(recipe, wanted):
            typer.echo(note, err=True)
        for name in wanted:
            rows.append(_row(model, prompt, name, recipe, judge, gold, problems))
            advance()
    _print(prompt, rows, judge, gold is not None)
    for problem in problems:
        print_error(problem)
    if problems:
        raise typer.Exit(2 if all(row[1] == FAILED for row in rows) else 1)


def _gold() -> RewardModel:
    from ivg.embedded import path
    from ivg.values.reward import RewardModel

    return RewardModel.from_pretrained(path("gold"), name="gold")


def settings_for(recipe: Recipe, method: str) -> dict[str, Any]:
    """The recipe's search settings that a method can use; those that define the recipe's own method are left out for others."""
    from ivg.search.methods import get_method
    from ivg.search.unused import unused_settings

    settings, row = recipe.search.settings(), get_method(method)
    if method == recipe.search.method:
        return settings
    left_out = {*_DEFINING, *unused_settings(method, settings)}
    if row.width * row.successors == 1:
        left_out |= {"width", "successors", "chunk_length"}
    if {name for name, _ in row.guides} != {"implicit"} or row.candidates or row.gate or row.rule == "reject":
        left_out |= {"draft"}  # only the implicit value drafts
    return {name: value for name, value in settings.items() if name not in left_out}


_DEFINING = ("token", "select", "weights", "select_weights", "select_combine", "select_reference", "rule")


def _notes(recipe: Recipe, methods: list[str]) -> list[str]:
    """A line for every setting of the search that has no effect on some methods."""
    out = []
    for name, got in recipe.search.settings().items():
        without = [m for m in methods if name not in (*_DEFINING, *settings_for(recipe, m))]
        if without:
            out.append(f"note: {name}={got} ignored by {', '.join(without)}: no effect there")
    return out


def _row(
    model: GuidedModel, prompt: str, method: str, recipe: Recipe, judge: str | None, gold: RewardModel | None, problems: list[str]
) -> tuple[str, ...]:
    """Cells of one method; what failed goes to ``problems``."""
    from ivg.types import Prompt

    completion = model.generate(prompt, method, seed=recipe.run.seed, **recipe.sampling.settings(), **settings_for(recipe, method))
    if completion.error:
        problems.append(f"{method}: {completion.error}")
        return (method, FAILED, "", "", "", "")

    def number(ask: Callable[[], list[float]], form: str) -> str:
        try:
            return format(ask()[0], form)
        except ScoreError as e:
            problems.append(f"{method}: {e}")
            return FAILED

    score = number(lambda: model.score(prompt, [completion.text], judge), ".2f") if judge else ""
    golden = number(lambda: gold.judge([(Prompt(prompt), completion.text)]), "+.2f") if gold is not None else ""
    usage = completion.usage
    return (method, completion.text.strip(), score, golden, f"{usage.total_forward_tokens:,}", f"{usage.seconds:.2f}")


def _print(prompt: str, rows: list[tuple[str, ...]], judge: str | None, gold: bool) -> None:
    out = Console(highlight=False)
    heads = ("method", f"{prompt} …", "value", "gold", "tokens", "s")
    notes = (f"value: score by {judge}", "gold: score by a reward model that no method uses", "tokens: read by all models", "s: seconds")
    keep = [i for i in range(6) if not (i == 3 and not gold) and not (i == 2 and judge is None)]
    table = Table(show_lines=True, expand=True, caption=" · ".join(notes[i - 2] for i in keep if i > 1), caption_justify="left")
    for i in keep:
        table.add_column(Text(heads[i]), ratio=1 if i == 1 else None, justify="left" if i < 2 else "right", no_wrap=i != 1)
    for row in rows:
        table.add_row(*(Text(row[i]) for i in keep))
    out.print(table)
