"""Options that speak of one model: ``--template ROLE=TEXT``, and ``--device VALUE`` for all models, ``--device ROLE=VALUE`` for one."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Annotated, Any

import typer

from ivg.errors import ConfigError
from ivg.settings.models import ROLES, ModelRef
from ivg.settings.recipe import Recipe
from ivg.settings.run import RunConfig
from ivg.settings.schema import Declared, settings_of

PER_MODEL = tuple(name for name, d in settings_of(RunConfig).items() if d.setting.flags and name in settings_of(ModelRef))
"""Options that give a setting of ``[run]`` for all models, or that of one model."""

ONE_MODEL = {
    "system": ("--system", "Instruction that a model alone reads before every prompt: ROLE=TEXT; may be repeated."),
    "adapter": (
        "--adapter",
        "PEFT adapter of a model: ROLE=DIRECTORY or hub id; models of one path share weights; may be repeated.",
    ),
    "scale": ("--adapter-scale", "Factor of what a model's adapter changes: ROLE=NUMBER; may be repeated. (default: 1)"),
}
"""Settings of single models alone: their options and what these say."""

_STAYS = {"template", "system", "chat_template_kwargs", "device", "max_memory", "dtype", "attention", "quantization"}
"""What a recipe says of a model that also holds for another in its place, which ``--ROLE MODEL`` gives."""

ByRole = dict[str, dict[str, Any]]
"""Settings of models, by role and name."""


def role_option(declared: Declared, made: inspect.Parameter) -> inspect.Parameter:
    """The option ``made`` of a setting of all models, to be repeated with those of single models."""
    (_, found) = made.annotation.__metadata__ if len(made.annotation.__metadata__) == 2 else (None, made.annotation.__metadata__[0])
    text = f"{found.help} ROLE=VALUE: of one model ({', '.join(ROLES)}); may be repeated."
    annotation = Annotated[list[str] | None, typer.Option(*declared.setting.flags, help=text, rich_help_panel=found.rich_help_panel)]
    return made.replace(annotation=annotation)


def split(name: str, texts: Collection[str]) -> tuple[str | None, dict[str, str]]:
    """(value for all models, values by role) of one option that may be repeated; of several for the same, the last counts.

    Raises:
        ConfigError: something before an equals sign that is no role.
    """
    every, single = None, {}
    for text in texts:
        if "=" in text:
            role, value = role_value(f"--{name}", text)
            single[role] = value
        else:
            every = text
    return every, single


def role_value(flag: str, text: str) -> tuple[str, str]:
    """(role, value) of ``ROLE=VALUE``.

    Raises:
        ConfigError: no equals sign, or no such role.
    """
    role, sign, value = text.partition("=")
    if sign and role in ROLES:
        return role, value
    near = get_close_matches(role, ROLES, n=1) if sign else []
    raise ConfigError(
        f"{flag} {text!r}: " + (f"no model has the role {role!r}" if sign else "no role") + (f"; did you mean {near[0]}?" if near else "")
        + f"\n  expected ROLE={flag[2:].rpartition('-')[2].upper()} with ROLE one of {', '.join(ROLES)}"
    )  # fmt: skip


def with_roles(recipe: Recipe, models: Mapping[str, str], by_role: ByRole) -> dict[str, Any]:
    """The table ``models``: paths of the command line over those of the recipe, with what it says of single models.

    Raises:
        ConfigError: a setting of a model that is not given.
    """
    old = recipe.models.given
    named: dict[str, Any] = {}
    for role, path in models.items():
        named[role] = {**(old[role].model_dump(include=_STAYS, exclude_none=True) if role in old else {}), "path": path}
    for role, settings in by_role.items():
        ref = named.get(role) or (old[role].model_dump(exclude_none=True) if role in old else None)
        if ref is None and role == "base" and (named or old):
            ref = {"path": "embedded:base"}
        if ref is None:
            name, value = next(iter(settings.items()))
            raise ConfigError(f"{_typed(role, name, value)}, but no model is given for {role}\n  give --{role} MODEL with it")
        named[role] = {**ref, **settings}
    return named


def _typed(role: str, name: str, value: Any) -> str:
    """A setting of one model as the command line has it: its option, or ``--set`` where it has none."""
    flags = {"template": "--template", "chat_template_kwargs": "--chat-template-kwargs"}
    flags |= {key: flag for key, (flag, _) in ONE_MODEL.items()} | {key: f"--{key}" for key in PER_MODEL}
    return f"{flags[name]} {f'{role}={value}'!r}" if name in flags else f"--set {f'models.{role}.{name}={value}'!r}"
