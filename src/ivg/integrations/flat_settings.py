"""A recipe from flat arguments, as the command lines of other programs give them: ``recipe=x.toml,method=eft,beta=0.5``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ivg.errors import ConfigError
from ivg.settings.chat import CHAT_SETTINGS
from ivg.settings.models import ModelsConfig
from ivg.settings.recipe import Recipe
from ivg.settings.run import RunConfig
from ivg.settings.sampling import SamplingParams
from ivg.settings.schema import settings_of
from ivg.settings.search import SearchSettings

_TABLES = {
    "models": frozenset(ModelsConfig.model_fields),
    "search": frozenset({"method", *settings_of(SearchSettings)}),
    "sampling": frozenset(settings_of(SamplingParams)),
    "run": frozenset(RunConfig.model_fields),
}
"""The settings that are known by their own name alone, by the table of a recipe."""
REQUEST_SETTINGS = (_TABLES["search"] | _TABLES["sampling"] | CHAT_SETTINGS) - {"method"}
"""Those that :meth:`ivg.GuidedModel.request` takes."""


def recipe_from(arguments: Mapping[str, Any]) -> Recipe:
    """A recipe from its file (``recipe``) and settings over it.

    Args:
        arguments: settings of models, search, sampling and run by name; any other by ``table.name``. None: not given.

    Raises:
        ConfigError: an unknown name, or an unusable setting; no method; ``best_of``.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    file = given.pop("recipe", None)
    tables: dict[str, dict[str, Any]] = {}
    for name, value in given.items():
        table, dot, inner = name.partition(".")
        if dot:
            tables.setdefault(table, {})[inner] = value
            continue
        found = next((table for table, names in _TABLES.items() if name in names), None)
        if found is None:
            raise ConfigError(
                f"unknown argument {name}\n  expected recipe, or a setting of models, search, sampling or run (docs/reference/settings.md)"
            )
        tables.setdefault(found, {})[name] = value
    recipe = (Recipe() if file is None else Recipe.load(str(file))).override(**tables)
    if "method" not in recipe.search.model_fields_set:
        raise ConfigError("no method given\n  give method=eft, method=base … (ivg models lists them), or a recipe that names one")
    recipe.check_one_answer("this harness")
    return recipe
