"""``ivg completion``: what a shell asks for when the user presses Tab."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from ivg.errors import ConfigError
from ivg.settings.recipe import Recipe
from ivg.settings.rows import RowSettings
from ivg.settings.schema import settings_of

HELP = """Print a script that completes commands, options, methods and other choices in bash, zsh or fish.

    eval "$(ivg completion bash)"          # in ~/.bashrc; zsh: in ~/.zshrc, behind compinit

    ivg completion fish > ~/.config/fish/completions/ivg.fish"""

SCRIPTS = {
    "bash": """_ivg() {
    local IFS=$'\\n'
    COMPREPLY=($(ivg completion words -- "${COMP_WORDS[@]:1:$COMP_CWORD}" 2>/dev/null))
}
complete -o bashdefault -o default -F _ivg ivg
""",
    "zsh": """#compdef ivg
_ivg() {
    local -a found
    found=("${(@f)$(ivg completion words -- "${(@)words[2,$CURRENT]}" 2>/dev/null)}")
    if [[ -n "$found" ]]; then compadd -a found; else _files; fi
}
compdef _ivg ivg
""",
    "fish": """complete -c ivg -a '(ivg completion words -- (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null)'
""",
}
"""By shell. Each asks ``ivg completion words`` for the words that may stand in the place of the last one; without any: files."""


def completion(
    shell: Annotated[str, typer.Argument(help="bash, zsh or fish.", metavar="SHELL")],
    words: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
) -> None:
    """See HELP."""
    if shell == "words":
        for word in completions(words or [""]):
            typer.echo(word)
        return
    if shell not in SCRIPTS:
        raise ConfigError(f"no completion for {shell!r}\n  expected one of: {', '.join(SCRIPTS)}")
    typer.echo(SCRIPTS[shell], nl=False)


def completions(words: Sequence[str]) -> list[str]:
    """The words that may stand in the place of the last of ``words``, which follow ``ivg``; none: files, or anything."""
    from ivg.cli.app import app

    command: Any = typer.main.get_command(app)
    *before, last = words
    for word in before:
        found = getattr(command, "commands", {}).get(word)
        command = command if found is None else found.load() if hasattr(found, "load") else found
    options = {name: p for p in command.params if p.param_type_name == "option" for name in (*p.opts, *p.secondary_opts)}
    asked = options.get(before[-1]) if before else None
    if asked is not None and not asked.is_flag:
        fitting = _values(before[-1])
    elif last.startswith("-"):
        fitting = [*options, "--help"]
    else:
        fitting = [name for name, found in getattr(command, "commands", {}).items() if not found.hidden]
    return [word for word in dict.fromkeys(fitting) if word.startswith(last)]


def _values(flag: str) -> list[str]:
    """The values that an option may have, where there are few."""
    if flag in ("--method", "-m", "--methods", "--compare"):
        from ivg.search.methods import method_names

        return method_names()
    tables = [type(getattr(Recipe(), table)) for table in settings_of(Recipe) if table != "values"]
    for kind in (*tables, RowSettings):
        for declared in settings_of(kind).values():
            if flag in declared.setting.flags:
                return _literals(declared.setting.accepts or declared.type)
    return []


def _literals(kind: Any) -> list[str]:
    """The texts that a type lists."""
    if get_origin(kind) is Literal:
        return [text for text in get_args(kind) if isinstance(text, str)]
    return [text for part in get_args(kind) for text in _literals(part)]
