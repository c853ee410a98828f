"""``ivg compare``: one prompt, several methods, side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ivg.cli.options import command
from ivg.cli.output import AsJson, Quiet, print_json, print_notes
from ivg.cli.quick_import import import_transformers
from ivg.cli.recipe_options import RecipeOptions
from ivg.cli.standard_input import texts_of
from ivg.errors import ConfigError, ScoreError
from ivg.settings.recipe import Recipe
from ivg.utils.console import print_table

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


@command(recipe=RecipeOptions("models", "search", "sampling", "run", only={"run": _RUN}, one_answer="ivg compare"))
def compare(
    prompt: Annotated[
        str | None, typer.Argument(help="What to answer; -, or nothing and a pipe: standard input.", metavar="PROMPT")
    ] = None,
    methods: Annotated[str | None, typer.Option("--methods", help="Comma-separated. (default: those that the models allow)")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    *,
    recipe: Recipe,
) -> None:
    """See HELP."""
    import_transformers(recipe)
    from ivg.cli.progress import print_error, progress
    from ivg.factory.recipe import load_models
    from ivg.search.methods import get_method

    texts = texts_of(None if prompt is None else [prompt])
    if not texts:
        raise ConfigError("no prompt\n  give one, or send it through a pipe: echo PROMPT | ivg compare")
    (text,) = texts
    wanted = [m.strip() for m in methods.split(",")] if methods else list(DEFAULT)
    for name in wanted:
        get_method(name)
    with progress(len(wanted), "methods") as advance:
        model = load_models(recipe, every_guide=True)
        if methods is None:
            wanted = [m for m in DEFAULT if m in model.methods]
        judge = next((v for v in ("explicit", "reward", "implicit") if v in model.values), None)
        gold = _gold() if recipe.uses_embedded else None
        rows, problems = [], list[str]()
        print_notes(quiet, *_notes(recipe, wanted))
        for name in wanted:
            rows.append(_row(model, text, name, recipe, judge, gold, problems))
            advance()
    if as_json:
        print_json({"prompt": text, "judge": judge, "answers": rows})
    else:
        _print(text, rows, judge, gold is not None)
    for problem in problems:
        print_error(problem)
    if problems:
        raise typer.Exit(2 if all(row["text"] is None for row in rows) else 1)


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
) -> dict[str, Any]:
    """What one method did; None stands for what failed, and its reason goes to ``problems``."""
    from ivg.types import Prompt

    completion = model.generate(prompt, method, seed=recipe.run.seed, **recipe.sampling.settings(), **settings_for(recipe, method))
    row: dict[str, Any] = {"method": method, "text": None}
    if completion.error:
        problems.append(f"{method}: {completion.error}")
        return row

    def number(ask: Callable[[], list[float]]) -> float | None:
        try:
            return ask()[0]
        except ScoreError as e:
            problems.append(f"{method}: {e}")
            return None

    row |= {"text": completion.text, "tokens": completion.usage.total_forward_tokens, "seconds": completion.usage.seconds}
    if judge:
        row["value"] = number(lambda: model.score(prompt, [completion.text], judge))
    if gold is not None:
        row["gold"] = number(lambda: gold.judge([(Prompt(prompt), completion.text)]))
    return row


_COLUMNS = {"value": ".2f", "gold": "+.2f", "tokens": ",", "seconds": ".2f"}
"""Columns of numbers, and how they are written."""


def _print(prompt: str, rows: list[dict[str, Any]], judge: str | None, gold: bool) -> None:
    notes = {
        "value": f"value: score by {judge}",
        "gold": "gold: score by a reward model that no method uses",
        "tokens": "tokens: read by all models",
        "seconds": "s: seconds",
    }
    keep = [name for name in _COLUMNS if not (name == "gold" and not gold) and not (name == "value" and judge is None)]
    table = Table(show_lines=True, caption=" · ".join(notes[name] for name in keep), caption_justify="left")
    table.add_column("method", no_wrap=True)
    table.add_column(Text(f"{prompt} …"))
    for name in keep:
        table.add_column("s" if name == "seconds" else name, justify="right", no_wrap=True)
    for row in rows:
        text = FAILED if row["text"] is None else row["text"].strip()
        table.add_row(row["method"], Text(text), *(_cell(row, name) for name in keep))
    print_table(table)


def _cell(row: dict[str, Any], name: str) -> str:
    """A number as it is written; nothing where the answer failed."""
    if name not in row:
        return ""
    return FAILED if row[name] is None else format(row[name], _COLUMNS[name])
