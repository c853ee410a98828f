"""The reference of the command line as Markdown, from the commands themselves: ``make docs`` writes docs/reference/cli.md with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer


def reference() -> str:
    """One section for each verb, those of ``ivg train`` included: its help, its arguments and options."""
    from ivg.cli.app import app

    group: Any = typer.main.get_command(app)
    parts = ["# Command line", "", group.help or "", "", "Written by `make docs`; do not edit by hand.", ""]
    for name, command in verbs(group):
        parts += [f"## `ivg {name}`", "", _text(command.help or ""), ""]
        if command.params:
            parts += ["| option | meaning |", "|---|---|"]
            parts += [f"| `{_names(parameter)}` | {_meaning(parameter)} |" for parameter in command.params]
            parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def verbs(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """(name, command) of all commands of a group and of the groups in it, in order."""
    for name, command in group.commands.items():
        yield before + name, command
        if hasattr(command, "commands"):
            yield from verbs(command, f"{before}{name} ")


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
    typer.echo(reference(), nl=False)
