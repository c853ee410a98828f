"""``ivg config show``: the settings that a command would run with, and where each comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import typer

from ivg.cli.options import command
from ivg.cli.output import AsJson, print_json
from ivg.cli.recipe_options import RecipeOptions, Tables
from ivg.errors import IVGError
from ivg.search.methods import Method, get_method, resolve_fallbacks
from ivg.search.unused import unused_settings
from ivg.settings.models import ModelRef
from ivg.settings.recipe import Recipe
from ivg.settings.sampling import DEFAULT_SAMPLING
from ivg.settings.schema import settings_of
from ivg.settings.search import SearchSettings
from ivg.utils.console import cell_text, plain_table, print_table

HELP = """Print the settings that a command with these options would run with, and where each comes from.

Sources: the command line, the recipe, the method, the base's generation_config.json, or the default. No model is loaded.

    ivg config show --recipe recipes/sentiment-gpt2-large.toml --beta 0.5"""

_TYPED = "command line"
_ALWAYS = ("models", "search", "sampling", "run")
"""Tables that are shown whole; of the others what is set."""


@dataclass(frozen=True)
class Sourced:
    """A recipe, and what of it was typed or stands in the file."""

    recipe: Recipe
    file: str | None
    in_file: Mapping[str, set[str]]
    typed: Mapping[str, set[str]]


@dataclass(frozen=True)
class Row:
    """One setting."""

    table: str
    setting: str
    value: Any
    source: str
    note: str = field(default="")


class SourcedOptions(RecipeOptions):
    """The options of a recipe, which remember where settings come from."""

    def build(self, given: Mapping[str, Any]) -> Sourced:  # type: ignore[override]
        """See :class:`ivg.cli.options.OptionGroup`."""
        seen: list[tuple[Recipe, Tables]] = []
        self.adjust = lambda recipe, found: seen.append((recipe, found)) or (recipe, found)  # type: ignore[func-returns-value]
        made = super().build(given)
        ((file, found),) = seen
        typed = {table: set(settings) for table, settings in found.items()}
        typed.setdefault("models", set()).update(self._by_role(given))
        in_file = {table: set(getattr(file, table)) if table == "values" else _given(getattr(file, table)) for table in Recipe.model_fields}
        return Sourced(made, None if given.get("file") is None else str(given["file"]), in_file, typed)


def _given(table: Any) -> set[str]:
    return {name for name in table.model_fields_set if getattr(table, name) is not None}


app = typer.Typer(name="config", help="The settings of a command, and where each comes from.", add_completion=False, no_args_is_help=True)


@app.callback()
def config() -> None:
    """The settings of a command, and where each comes from."""


@app.command(help=HELP)
@command(found=SourcedOptions("models", "search", "sampling", "run"))
def show(
    as_json: AsJson = False,
    changed: Annotated[bool, typer.Option("--changed", help="Leave out what is at its default.")] = False,
    *,
    found: Sourced,
) -> None:
    """See HELP."""
    rows = [row for row in effective_settings(found) if not (changed and row.source == "default")]
    if as_json:
        listed = [{name: value for name, value in asdict(row).items() if name != "note" or value} for row in rows]
        print_json(listed)
        return
    table = plain_table("setting", "value", "from")
    table.columns[0].no_wrap = True
    for row in rows:
        source = f"{row.source} ({row.note})" if row.note else row.source
        table.add_row(f"{row.table}.{row.setting}", _text(row.value), source)
    print_table(table)


def effective_settings(found: Sourced) -> list[Row]:
    """All settings with their values and sources.

    Raises:
        ConfigError: settings that do not go together.
    """
    rows: list[Row] = []
    for table in Recipe.model_fields:
        if table == "values":
            rows += [Row(table, name, _plain(value), _source(found, table, name)) for name, value in found.recipe.values.items()]
        elif table == "search":
            rows += _search_rows(found)
        elif table == "sampling":
            rows += _sampling_rows(found)
        else:
            rows += _table_rows(found, table)
    return rows


def _table_rows(found: Sourced, table: str) -> list[Row]:
    rows = []
    settings: Any = getattr(found.recipe, table)
    kind: type = type(settings)
    for name, declared in settings_of(kind).items():
        source, value = _source(found, table, name), getattr(settings, name)
        if table == "models" and name == "base" and found.recipe.uses_embedded:
            rows.append(Row(table, name, "embedded:base", "default", "with the embedded guides"))
        elif source != "default" or (table in _ALWAYS and table != "models"):
            rows.append(Row(table, name, "***" if declared.setting.secret and value else _plain(value), source))
    return rows


def _search_rows(found: Sourced) -> list[Row]:
    search = found.recipe.search
    given, unused = search.settings(), unused_settings(search.method, search.settings())
    used = {name: value for name, value in given.items() if name not in unused}
    plain, method = get_method(search.method), get_method(search.method, **used)
    final = resolve_fallbacks(method, _value_names(found.recipe))
    default = Method("custom", "")
    source = _source(found, "search", "method")
    rows = [Row("search", "method", search.method, source, "" if source != "default" else "what the models allow")]
    for name in settings_of(SearchSettings):
        value, source = getattr(final, name), _source(found, "search", name)
        if name in unused:
            rows.append(Row("search", name, given[name], source, f"ignored: {unused[name]}"))
            continue
        note = "" if value == getattr(method, name) else f"in place of {getattr(method, name)}, which no model gives"
        if source == "default" and getattr(plain, name) != getattr(default, name):
            source = f"method {search.method}"
        rows.append(Row("search", name, value, source, note))
    return rows


def _sampling_rows(found: Sourced) -> list[Row]:
    from ivg.factory.recipe import default_sampling

    note = ""
    try:
        defaults = default_sampling(found.recipe)
    except IVGError as e:
        defaults, note = DEFAULT_SAMPLING, str(e).partition("\n")[0]
    rows = []
    for name, value in found.recipe.sampling:
        own, source = getattr(defaults, name), _source(found, "sampling", name)
        if source == "default" and own != getattr(DEFAULT_SAMPLING, name):
            source = "generation_config.json of the base"
        rows.append(Row("sampling", name, own if value is None else value, source, note if source == "default" else ""))
    return rows


def _value_names(recipe: Recipe) -> set[str]:
    """The values that the models give."""
    if recipe.uses_embedded:
        return {"implicit", "explicit", *recipe.values}
    names = {"tuned": "implicit", "value": "explicit", "reward": "reward", "arm": "arm"}
    return {*recipe.values, *(names[role] for role in recipe.models.given if role in names)}


def _source(found: Sourced, table: str, name: str) -> str:
    if name in found.typed.get(table, ()):
        return _TYPED
    return f"recipe {found.file}" if name in found.in_file.get(table, ()) else "default"


def _plain(value: Any) -> Any:
    """A setting as JSON has it; a model that has no settings but its path: the path."""
    if isinstance(value, ModelRef):
        given = value.model_dump(exclude_none=True, exclude_defaults=True)
        return value.path if set(given) == {"path"} else given
    return value.model_dump(exclude_none=True) if hasattr(value, "model_dump") else value


def _text(value: Any) -> str:
    if value is None or value == () or value == {}:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else cell_text(value) if isinstance(value, str) else json.dumps(value, default=str)
