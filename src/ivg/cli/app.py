"""The Typer application: names of the verbs, their help, and nothing else."""

from __future__ import annotations

import typer

from ivg.cli import bench, check, compare, eval, export, generate, models, serve, train, winrate

app = typer.Typer(
    name="ivg",
    help="Steer any causal language model, frozen, with small value functions (Integrated Value Guidance).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate", help=generate.HELP)(generate.generate)
app.command("compare", help=compare.HELP)(compare.compare)
app.command("models", help=models.HELP)(models.models)
app.add_typer(train.app)
app.command("check", help=check.HELP)(check.check)
app.command("eval", help=eval.HELP)(eval.evaluate)
app.command("winrate", help=winrate.HELP)(winrate.winrate)
app.command("serve", help=serve.HELP)(serve.serve)
app.command("pack", help=export.HELP)(export.pack)
app.command("bench", help=bench.HELP)(bench.bench)


@app.callback(invoke_without_command=True)
def version(show: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    """Options of ``ivg`` itself."""
    if show:
        from ivg.utils.version import VERSION

        typer.echo(VERSION)
        raise typer.Exit
