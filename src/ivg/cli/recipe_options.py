"""Options that make a recipe: its file, the options of its tables, ``--template`` and ``--set``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ivg.cli.options import default_text, option, plain_value, typed
from ivg.cli.role_options import ONE_MODEL, PER_MODEL, ByRole, role_option, role_value, split, with_roles
from ivg.errors import ConfigError
from ivg.search.methods import get_method
from ivg.search.unused import unused_settings
from ivg.settings.models import ROLES, ModelRef
from ivg.settings.recipe import Recipe
from ivg.settings.sampling import DEFAULT_SAMPLING
from ivg.settings.schema import Declared, settings_of
from ivg.settings.search import SearchSettings

Tables = dict[str, dict[str, Any]]
"""Settings by table and name."""


class RecipeOptions:
    """A recipe from its file and the options over it.

    Args:
        tables: the tables all of whose settings are options.
        only: further tables, or some of those, each with the names of the settings that are.
        method: the method where none is named; None: the one that the models allow.
        check_method: one method runs with all these settings: they are checked, and those without effect are said.
        adjust: called with the recipe of the file and what was typed; gives both back.
        unset: what some settings are that are not typed, in words.
        bare: without ``--recipe``, ``--template`` and ``--set``.
        without: options of single models (``ONE_MODEL``) that the verb means otherwise.
        one_answer: the verb, where it draws one answer of each prompt: ``run.best_of`` is refused, and ``run.n`` said to have no effect.
    """

    def __init__(
        self,
        *tables: str,
        only: Mapping[str, Collection[str]] | None = None,
        method: str | None = None,
        check_method: bool = False,
        adjust: Callable[[Recipe, Tables], tuple[Recipe, Tables]] | None = None,
        unset: Mapping[str, str] | None = None,
        bare: bool = False,
        without: Collection[str] = (),
        one_answer: str | None = None,
    ) -> None:
        self.only, self.unset = only or {}, unset or {}
        self.tables = tuple(dict.fromkeys((*tables, *self.only)))
        self.method, self.check_method, self.adjust, self.bare = method, check_method, adjust, bare
        self.one_answer = one_answer
        self.one_model = {name: option for name, option in ONE_MODEL.items() if name not in without}
        self.by_role = PER_MODEL if "models" in self.tables and not bare else ()

    def parameters(self) -> Iterator[inspect.Parameter]:
        """See :class:`ivg.cli.options.OptionGroup`."""
        if not self.bare:
            yield _parameter("file", Path, "--recipe", help="TOML file with settings (docs/reference/settings.md); options override it.")
        for table, declared in self._options():
            made = option(declared, _title(table), self._default(table, declared), name=f"{table}_{declared.name}")
            yield role_option(declared, made) if table == "run" and declared.name in self.by_role else made
        if "models" in self.tables and not self.bare:
            text = (
                'Prompt template of a model: ROLE=chat (its tokenizer\'s), ROLE="... {prompt} ...", ROLE=raw (the contents of the '
                "messages, joined), ROLE=last_turn (the last user message), "
                "or ROLE=FILE (.jinja: a chat template, .txt: a text); may be repeated."
            )
            yield _parameter("template", list[str], "--template", help=text, rich_help_panel=_title("models"))
            text = "Variables of the chat template of a model: ROLE='{\"enable_thinking\": false}'; may be repeated."
            yield _parameter("chat_template_kwargs", list[str], "--chat-template-kwargs", help=text, rich_help_panel=_title("models"))
            for name, (flag, text) in self.one_model.items():
                yield _parameter(name, list[str], flag, help=text, rich_help_panel=_title("models"))
        if not self.bare:
            text = (
                "Any other setting: KEY=VALUE of the search, TABLE.KEY=VALUE, or models.ROLE.KEY=VALUE of one model "
                "(docs/reference/settings.md); may be repeated."
            )
            yield _parameter("set", list[str], "--set", help=text)

    def build(self, given: Mapping[str, Any]) -> Recipe:
        """See :class:`ivg.cli.options.OptionGroup`.

        Raises:
            ConfigError: unusable settings.
        """
        file, further, by_role = given.get("file"), given.get("set"), self._by_role(given)
        found: Tables = {}
        for table in self.tables:
            kind = _kind(table)
            names = {name: f"{table}_{name}" for name in settings_of(kind)}
            found[table] = typed(kind, {name: given[key] for name, key in names.items() if key in given and name not in self.by_role})
        if self.by_role:
            every = {name: value for name in self.by_role if (value := split(name, given.get(f"run_{name}") or ())[0]) is not None}
            found["run"] = {**found.get("run", {}), **every}
        for table, name, value in map(_assignment, further or ()):
            if table not in _ONE_MODEL:
                found.setdefault(table, {})[name] = value
        recipe = Recipe.load(file) if file is not None else Recipe()
        if self.adjust is not None:
            recipe, found = self.adjust(recipe, found)
        recipe = build_recipe(recipe, found, by_role, self.method)
        if self.one_answer is not None:
            recipe.check_one_answer(self.one_answer)
            if recipe.run.n > 1:
                typer.echo(f"note: run.n={recipe.run.n} ignored: {self.one_answer} draws one answer", err=True)
        return resolve_search(recipe) if self.check_method else recipe

    def _by_role(self, given: Mapping[str, Any]) -> ByRole:
        """What was typed of single models."""
        out: ByRole = {}
        for text in given.get("template") or ():
            role, template = role_value("--template", text)
            out.setdefault(role, {})["template"] = template
        for text in given.get("chat_template_kwargs") or ():
            role, kwargs = role_value("--chat-template-kwargs", text)
            out.setdefault(role, {})["chat_template_kwargs"] = plain_value(kwargs)
        for name, (flag, _) in self.one_model.items():
            for role, text in (role_value(flag, text) for text in given.get(name) or ()):
                out.setdefault(role, {})[name] = plain_value(text) if name == "scale" else text
        for name in self.by_role:
            for role, value in split(name, given.get(f"run_{name}") or ())[1].items():
                out.setdefault(role, {})[name] = value
        for table, name, value in map(_assignment, given.get("set") or ()):
            if table in _ONE_MODEL:
                out.setdefault(_ONE_MODEL[table], {})[name] = value
        return out

    def _options(self) -> Iterator[tuple[str, Declared]]:
        for table in self.tables:
            settings = settings_of(_kind(table))
            for name in ROLES if table == "models" else settings:
                if settings[name].setting.flags and name in self.only.get(table, (name,)):
                    yield table, settings[name]

    def _default(self, table: str, declared: Declared) -> str:
        if declared.name in self.unset:
            return self.unset[declared.name]
        if table == "search":
            if declared.name == "method":
                return self.method or "ivg, or what the models allow"
            return "the method's"
        if table == "sampling":
            return default_text(declared, getattr(DEFAULT_SAMPLING, declared.name))
        return "" if table == "models" else default_text(declared, declared.default)


_EMPTY = Recipe()


def _kind(table: str) -> Any:
    return type(getattr(_EMPTY, table))


def _title(table: str) -> str:
    return settings_of(Recipe)[table].setting.help


def _parameter(name: str, kind: Any, *flags: str, **more: Any) -> inspect.Parameter:
    annotation = Annotated[kind | None, typer.Option(*flags, **more)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def build_recipe(recipe: Recipe, found: Tables, by_role: ByRole | None = None, method: str | None = None) -> Recipe:
    """``recipe`` with the settings ``found`` over it, those of single models, and a method if neither names one.

    Raises:
        ConfigError: unusable settings, or a setting of a model that is not given.
    """
    method_given = "method" in recipe.search.model_fields_set or "method" in found.get("search", {})
    tables = {**found, "models": with_roles(recipe, found.get("models", {}), by_role or {})}
    for table, name in (("eval", "judges"), ("eval", "options")):  # those of the recipe stay
        if name in found.get(table, {}):
            kept = recipe.model_dump(exclude_none=True)[table][name]
            tables[table] = {**tables[table], name: {**kept, **found[table][name]}}
    recipe = recipe.override(**tables)
    return recipe if method_given else recipe.override(search={"method": method or default_method(recipe)})


def default_method(recipe: Recipe) -> str:
    """The method where none is named: ``ivg``, or, of guides that do not allow it, what they do allow."""
    roles, s = set(recipe.models.given) - {"base"}, recipe.search
    token, select = "tuned" in roles, bool({"value", "reward"} & roles)
    if s.contrast is not None or s.negative is not None:
        return "contrast"
    names_values = any(value is not None for value in (s.token, s.select, s.weights, s.select_weights))
    if not roles or (token and select) or names_values:
        return str(s.method)
    return "eft" if token else "cbs-explicit" if select else "genarm"


def resolve_search(recipe: Recipe) -> Recipe:
    """The recipe without settings that have no effect on its method; each is said on standard error.

    Raises:
        ConfigError: an unknown method, or settings that do not go together.
    """
    search, models = recipe.search, recipe.models
    if models.tuned is not None and models.tuned == models.untuned:
        typer.echo("note: tuned and untuned are the same model: the implicit value is 0 everywhere", err=True)
    unused = unused_settings(search.method, search.settings())
    for reason in dict.fromkeys(unused.values()):
        listed = ", ".join(f"{name}={getattr(search, name)}" for name, why in unused.items() if why == reason)
        typer.echo(f"note: {listed} ignored: {reason}", err=True)
    if unused:
        search = search.model_copy(update=dict.fromkeys(unused))
        recipe = recipe.model_copy(update={"search": search})
    get_method(search.method, **search.settings())
    return recipe


_ONE_MODEL = {f"models.{role}": role for role in ROLES}
"""Tables of single models, as ``--set`` names them, and their roles."""


_OF_MODEL = settings_of(ModelRef).keys() - {"path"}
"""What ``--set`` gives of one model; its path is ``--ROLE``."""


def _assignment(text: str) -> tuple[str, str, Any]:
    """(table, setting, value) of ``--set``."""
    key, sign, value = text.partition("=")
    table, dot, name = key.strip().rpartition(".")
    known = settings_of(SearchSettings)
    if sign and table.startswith("models.") and (table not in _ONE_MODEL or name not in _OF_MODEL):
        roles, keys = ", ".join(ROLES), ", ".join(sorted(_OF_MODEL))
        raise ConfigError(f"--set {text!r}\n  expected models.ROLE.KEY=VALUE with ROLE one of {roles} and KEY one of {keys}")
    if not sign or (not dot and name not in known) or (dot and table not in {*Recipe.model_fields, *_ONE_MODEL}):
        listed, tables = ", ".join(sorted(known)), ", ".join(Recipe.model_fields)
        raise ConfigError(f"--set {text!r}\n  expected KEY=VALUE with KEY one of {listed}, or TABLE.KEY=VALUE with TABLE one of {tables}")
    return table or "search", name, plain_value(value.strip())
