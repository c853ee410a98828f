"""The Typer application: names of the verbs and their help. A verb's module is imported when it is called, so that --help is instant."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

VERBS: dict[str, tuple[str, str, str]] = {
    "generate": ("generate", "generate", "Answer prompts by a frozen model with value guidance."),
    "chat": ("chat", "chat", "Talk with a guided model, in the terminal or through a pipe."),
    "compare": ("compare", "compare", "Answer one prompt by several methods, with scores, tokens spent and seconds."),
    "models": ("models", "app", "List models, methods and settings of methods; add small open models."),
    "train": ("train", "app", "Train a guide pair (sft, dpo), a reward model, and values from rollouts."),
    "data": ("data", "app", "Check data before anything is trained or loaded."),
    "check": ("check", "check", "Do these models fit together, and will guidance help?"),
    "eval": ("eval", "evaluate", "Compare methods on a task: sentiment, summarization or alpaca."),
    "winrate": ("winrate", "winrate", "Win rates from judgements."),
    "serve": ("serve", "serve", "Serve the models: OpenAI's protocol at /v1, a playground at /."),
    "export": ("export", "export", "Write a composite model for vLLM: base and guides, weights by reference."),
    "bench": ("bench", "bench", "Measure time and memory of a method, beside plain sampling."),
    "config": ("config", "app", "The settings of a command, and where each comes from."),
    "completion": ("completion", "completion", "Print a script that completes commands and options in a shell."),
}
"""Module, function and first line of help, by the verb's name."""
DEPRECATED = {"pack": "export"}
"""Old names of verbs; removed in 0.3."""


def _reflowed(text: str) -> str:
    """Help whose paragraphs are one line each, which the terminal breaks; indented lines stay."""
    return "\n\n".join(part if part.startswith("    ") else part.replace("\n", " ") for part in text.split("\n\n"))


class LazyCommand(TyperCommand):
    """A verb's name and first line of help; the rest is loaded when it is called."""

    def load(self) -> Any:
        """The whole command."""
        name = DEPRECATED.get(str(self.name), str(self.name))
        module = import_module(f"ivg.cli.{VERBS[name][0]}")
        found = getattr(module, VERBS[name][1])
        if not isinstance(found, typer.Typer):
            verb, found = found, typer.Typer(add_completion=False)
            found.command(name, help=_reflowed(module.HELP))(verb)
        loaded: Any = typer.main.get_command(found)
        loaded.name = self.name
        return loaded


class LazyGroup(TyperGroup):
    """All verbs, none of them imported."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        for name, (_, _, text) in VERBS.items():
            self.commands[name] = LazyCommand(name, help=text)
        for name in DEPRECATED:
            self.commands[name] = LazyCommand(name, hidden=True)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that ``args`` name, loaded."""
        name, found, rest = super().resolve_command(ctx, args)
        if name in DEPRECATED:
            typer.echo(f"note: ivg {name} is now ivg {DEPRECATED[name]}; the old name works until 0.3", err=True)
        return name, found.load() if isinstance(found, LazyCommand) else found, rest


app = typer.Typer(
    name="ivg",
    help="Align causal language models, frozen, with small value functions (Integrated Value Guidance).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    cls=LazyGroup,
)


@app.callback(invoke_without_command=True)
def version(show: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    """Options of ``ivg`` itself."""
    if show:
        from ivg.utils.version import VERSION

        typer.echo(VERSION)
        raise typer.Exit
