"""The pages docs/reference/cli.md and docs/reference/settings.md, from the commands and the declared settings: ``make docs``.

``python -m ivg.cli.reference FOLDER`` writes both.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import typer

from ivg.cli.app import LazyCommand
from ivg.cli.options import default_text
from ivg.search.methods import METHODS
from ivg.settings.bench import BenchOptions
from ivg.settings.check import PreferenceSettings
from ivg.settings.generate import GenerateSettings
from ivg.settings.models import ModelRef
from ivg.settings.ray import RaySettings
from ivg.settings.recipe import Recipe
from ivg.settings.rows import RowSettings
from ivg.settings.sampling import DEFAULT_SAMPLING, SamplingParams
from ivg.settings.schema import Declared, Setting, settings_of
from ivg.settings.search import SearchSettings
from ivg.settings.train import (
    DataSettings,
    DPOSettings,
    PairSettings,
    RefineSettings,
    RolloutSettings,
    SFTSettings,
    TrainSettings,
    ValueSettings,
    ValueTrainSettings,
)

NOTE = "Written by `make docs`; do not edit by hand."
INTRODUCTION = """A recipe (TOML, `--recipe`) has these tables; each may be left out, and options of the command line override it.

A setting has one name, help text, range and default everywhere. The names after "also called" work in recipes and in HTTP bodies.
On the command line a setting has the spellings after "options", which may differ from its name (`candidates`:
`--guide-candidates`); one without options is given by `--set`. Python takes the names alone."""
OTHERS = {
    "Rows (`ivg generate`, `ivg check`, `ivg train`)": RowSettings,
    "Files (`ivg generate`)": GenerateSettings,
    "Ray (`ivg generate`)": RaySettings,
    "Preferences (`ivg check`)": PreferenceSettings,
    "Training rows (`ivg train`)": DataSettings,
    "Trainers (`ivg train reward`, and what the others share)": TrainSettings,
    "Supervised fine-tuning (`ivg train sft`)": SFTSettings,
    "Preference optimisation (`ivg train dpo`)": DPOSettings,
    "Pairs of rated responses (`ivg train reward`, `ivg train dpo`)": PairSettings,
    "Rollouts (`ivg train rollout`)": RolloutSettings,
    "Values (`ivg train value`)": ValueSettings,
    "Trainer of values (`ivg train value`)": ValueTrainSettings,
    "Refinement of values (`ivg train value`)": RefineSettings,
    "Benchmarks (`ivg bench`)": BenchOptions,
}
"""Settings that are not tables of a recipe."""


def command_line() -> str:
    """One section for each command, those of ``ivg train`` included: its help, its arguments and options."""
    from ivg.cli.app import app

    group: Any = typer.main.get_command(app)
    parts = ["# Command line", "", group.help or "", "", NOTE, ""]
    for name, command in verbs(group):
        parts += [f"## `ivg {name}`", "", _text(command.help or ""), ""]
        if hasattr(command, "commands"):
            parts += [*_commands(name, command), ""]
        shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
        if shown:
            parts += ["| option | meaning |", "|---|---|"]
            parts += [f"| `{_names(parameter)}` | {_meaning(parameter)} |" for parameter in shown]
            parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def verbs(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """(name, command) of all commands of a group and of the groups in it, in order; without hidden ones."""
    for name, found in group.commands.items():
        if found.hidden:
            continue
        command = found.load() if isinstance(found, LazyCommand) else found
        yield before + name, command
        if hasattr(command, "commands"):
            yield from verbs(command, f"{before}{name} ")


def _commands(name: str, group: Any) -> list[str]:
    rows = [f"| `ivg {name} {verb}` | {_text(command.help or '').splitlines()[0]} |" for verb, command in verbs(group) if " " not in verb]
    return ["| command | meaning |", "|---|---|", *rows]


def settings() -> str:
    """One section for each table of a recipe, then those of single commands."""
    parts = ["# Settings", "", NOTE, ""]
    parts += [INTRODUCTION, ""]
    for table, declared in settings_of(Recipe).items():
        kind = next((k for k in (declared.type, *get_args(declared.type)) if hasattr(k, "model_fields")), None)
        shown = f"[{table}.NAME]" if table == "values" else f"[{table}]"
        parts += [f"## `{shown}`", "", (kind.__doc__ or "").splitlines()[0].replace("``", "`"), "", *_rows(kind, table), ""]
        if table == "models":
            parts += [
                "Each of these is a path, or a table; so are the models of `[values.NAME]` and the judges of `[eval]`:",
                "",
                *_rows(ModelRef),
                "",
            ]
    parts += [
        "## Settings of single commands",
        "",
        "These are options of the command line and arguments in Python; a recipe has no table for them.",
        "",
    ]
    for title, other in OTHERS.items():
        parts += [f"### {title}", "", *_rows(other, inherited=False), ""]
    return "\n".join(parts).rstrip() + "\n"


def _rows(kind: Any, table: str = "", *, inherited: bool = True) -> list[str]:
    base: Any = kind.__mro__[1]
    above = settings_of(base) if not inherited and "__dataclass_fields__" in vars(base) else {}
    defaults = {"search": settings_of(SearchSettings), "sampling": settings_of(SamplingParams)}.get(table, {})
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for name, declared in settings_of(kind).items():
        if name in above and _default(above[name], above[name].default) == _default(declared, declared.default):
            continue
        setting = replace(declared.setting, flags=()) if table == "values" else declared.setting
        default = getattr(DEFAULT_SAMPLING, name) if table == "sampling" else defaults.get(name, declared).default
        text = _default(declared, default)
        if table == "search":
            text = "`ivg`, or what the models allow" if name == "method" else _by_method(name, text)
        rows.append(f"| `{name}` | {text} | {_cell(setting)} |")
    return rows


def _by_method(name: str, default: str) -> str:
    """The default of a setting of the search; ``default``: where the method does not say it."""
    same = all(getattr(method, name) == getattr(METHODS["base"], name) for method in METHODS.values())
    return default if same else f"the method's; `custom`: {default}"


def _default(declared: Declared, default: Any) -> str:
    text = default_text(declared, default)
    return (f"`{text}`" if default is not None and text else text) or ("off" if default is False else "on" if default is True else "none")


def _cell(setting: Setting) -> str:
    more = []
    if setting.flags:
        more.append("options " + ", ".join(f"`{flag}`" for flag in setting.flags))
    if setting.aliases:
        more.append("also called " + ", ".join(f"`{name}`" for name in setting.aliases))
    if setting.deprecated:
        more.append("old name " + ", ".join(f"`{name}`" for name in setting.deprecated))
    text = setting.help.replace("|", "\\|")
    return f"{text} ({'; '.join(more)})" if more else text


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    return ", ".join(parameter.opts) + "".join(f" / {name}" for name in parameter.secondary_opts)


def _meaning(parameter: Any) -> str:
    """The help text, and the default where the text does not say it."""
    text, default = (getattr(parameter, "help", None) or "").replace("|", "\\|"), parameter.default
    if parameter.required:
        return f"{text} (required)"
    plain = isinstance(default, str | int | float) and not isinstance(default, bool)
    return f"{text} (default: {default})" if plain and "(default" not in text else text


def _text(help: str) -> str:
    """Help text, without the escapes of rich's markup; its indented lines are commands."""
    lines: list[str] = []
    for line in help.replace("\\[", "[").splitlines():
        lines.append(f"`{line.strip()}`  " if line.startswith("    ") else line)
    return "\n".join(lines)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "cli.md").write_text(command_line(), encoding="utf-8")
    (folder / "settings.md").write_text(settings(), encoding="utf-8")
