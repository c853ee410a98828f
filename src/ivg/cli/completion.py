"""``ivg completion``: what a shell asks for when the user presses Tab."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from ivg.errors import ConfigError
from ivg.settings import train
from ivg.settings.bench import BASELINES, BenchOptions
from ivg.settings.eval import STAGES
from ivg.settings.recipe import Recipe
from ivg.settings.rows import RowSettings
from ivg.settings.schema import settings_of

HELP = """Print a script that completes commands, options, methods, models and other choices in bash, zsh or fish.

    eval "$(ivg completion bash)"          # in ~/.bashrc; zsh: in ~/.zshrc, behind compinit

    ivg completion fish > ~/.config/fish/completions/ivg.fish"""

SCRIPTS = {
    "bash": """_ivg() {
    local IFS=$'\\n'
    COMPREPLY=($(ivg completion line -- "${COMP_LINE:0:$COMP_POINT}" "$COMP_WORDBREAKS" 2>/dev/null))
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
"""By shell. zsh and fish ask ``ivg completion words`` for the words that may stand in the place of the last one. bash cuts words at
``=`` and ``:``, so it gives its whole line to ``ivg completion line``. Without any words: files."""


def completion(
    shell: Annotated[str, typer.Argument(help="bash, zsh or fish.", metavar="SHELL")],
    words: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
) -> None:
    """See HELP."""
    if shell in ("words", "line"):
        for word in completions(words or [""]) if shell == "words" else line_completions(*(words or [""])[:2]):
            typer.echo(word)
        return
    if shell not in SCRIPTS:
        raise ConfigError(f"no completion for {shell!r}\n  expected one of: {', '.join(SCRIPTS)}")
    typer.echo(SCRIPTS[shell], nl=False)


def line_completions(line: str, breaks: str = "") -> list[str]:
    """What may stand behind ``line``, which begins with ``ivg``; of each word only the part behind the last of the characters ``breaks``
    that is typed.
    """
    try:
        words = shlex.split(line)
    except ValueError:  # an open quotation mark
        words = line.split()
    last = "" if not words or line[-1:].isspace() else words.pop()
    typed = max((last.rfind(sign) + 1 for sign in breaks), default=0)
    return [word[typed:] for word in completions([*words[1:], last])]


def completions(words: Sequence[str]) -> list[str]:
    """The words that may stand in the place of the last of ``words``, which follow ``ivg``; none: files, or anything."""
    from ivg.cli.app import app

    command: Any = typer.main.get_command(app)
    *before, last = words
    for word in before:
        found = getattr(command, "commands", {}).get(word)
        command = command if found is None else found.load() if hasattr(found, "load") else found
    options = {name: p for p in command.params if p.param_type_name == "option" and not p.hidden for name in (*p.opts, *p.secondary_opts)}
    flag, sign, value = last.partition("=")
    if _takes_value(options.get(before[-1] if before else "")):
        return _matching(_values(before[-1]), last)
    if sign and _takes_value(options.get(flag)):
        return [f"{flag}={word}" for word in _matching(_values(flag), value)]
    if last.startswith("-") and "--" not in before:
        fitting = [*options, "--help"]
    elif commands := getattr(command, "commands", {}):
        fitting = [name for name, found in commands.items() if not found.hidden]
    else:
        fitting = [word for p in command.params if p.name in _ARGUMENTS for word in _ARGUMENTS[p.name](command.name)]
        fitting = [] if set(fitting) & set(before) else fitting  # one of them is given
    return _matching(fitting, last)


def _takes_value(option: Any) -> bool:
    """Does a value follow this option, if it is one?"""
    return option is not None and not option.is_flag


def _matching(words: Sequence[str], start: str) -> list[str]:
    """Those of ``words`` that begin with ``start``; where that is a list with commas, the lists that go on."""
    done, comma, part = start.rpartition(",")
    given = done.split(",")
    return [f"{done}{comma}{word}" for word in dict.fromkeys(words) if word.startswith(part) and not (comma and word in given)]


def _methods() -> list[str]:
    from ivg.search.methods import method_names

    return method_names()


def _models() -> list[str]:
    from ivg.embedded import PREFIX, names
    from ivg.models.added import SOURCES

    return [*SOURCES, *(PREFIX + name for name in names())]


def _shapes() -> list[str]:
    from ivg.bench.named_shapes import EMBEDDED, SHAPES

    return [*SHAPES, EMBEDDED]


def _tasks(_: str) -> list[str]:
    from ivg.evaluation.task import TASK_PLUGINS, TASKS

    return [*TASKS, *TASK_PLUGINS.names]


def _added(verb: str) -> list[str]:
    from ivg.models.added import SOURCES, added
    from ivg.models.gguf import conversions

    return list(SOURCES) if verb == "add" else [name for name in SOURCES if added(name)] + [row["name"] for row in conversions()]


_NAMES: dict[str, Callable[[], Sequence[str]]] = {
    **dict.fromkeys(("--method", "-m", "--methods", "--compare", "--compare-to"), _methods),
    **dict.fromkeys(("--base", "--tuned", "--untuned", "--value", "--reward", "--arm", "--model", "--tokenizer", "--gold"), _models),
    **dict.fromkeys(("--shape", "--guide"), _shapes),
    "--stage": lambda: STAGES,
    "--baselines": lambda: BASELINES,
    "--engine": lambda: ("transformers", "vllm"),
}
"""Options whose values are names that no type lists."""
_ARGUMENTS: dict[str, Callable[[str], Sequence[str]]] = {"task": _tasks, "shell": lambda _: list(SCRIPTS), "name": _added}
"""Arguments that are such names, by the verb."""


def _values(flag: str) -> Sequence[str]:
    """The values that an option may have, where there are few."""
    if flag in _NAMES:
        return _NAMES[flag]()
    tables = [type(getattr(Recipe(), table)) for table in settings_of(Recipe) if table != "values"]
    for kind in (*tables, RowSettings, BenchOptions, *_TRAINING):
        for declared in settings_of(kind).values():
            if flag in declared.setting.flags:
                return _literals(declared.setting.accepts or declared.type)
    return []


_TRAINING = (train.ValueTrainSettings, train.SFTSettings, train.PairSettings, train.ValueSettings)


def _literals(kind: Any) -> list[str]:
    """The texts that a type lists."""
    if get_origin(kind) is Literal:
        return [text for text in get_args(kind) if isinstance(text, str)]
    return [text for part in get_args(kind) for text in _literals(part)]
