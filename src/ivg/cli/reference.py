"""The reference of the command line as Markdown, from the commands themselves: ``make docs`` writes docs/cli.md with it."""

from __future__ import annotations

from typing import Any

import typer


def reference() -> str:
    """One section for each verb: its help, its arguments and options in their groups."""
    from ivg.cli.app import app

    group: Any = typer.main.get_command(app)
    parts = ["# Command line", "", group.help or "", "", "Written by `make docs`; do not edit by hand.", ""]
    for name, command in group.commands.items():
        parts += [f"## `ivg {name}`", "", _text(command.help or ""), ""]
        parts += ["| option | meaning |", "|---|---|"]
        for parameter in command.params:
            parts.append(f"| `{_names(parameter)}` | {(getattr(parameter, 'help', None) or '').replace('|', chr(92) + '|')} |")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    return ", ".join(parameter.opts)


def _text(help: str) -> str:
    """Help text; its indented lines are commands."""
    lines: list[str] = []
    for line in help.splitlines():
        lines.append(f"`{line.strip()}`  " if line.startswith("    ") else line)
    return "\n".join(lines)


if __name__ == "__main__":
    typer.echo(reference(), nl=False)
