"""``ivg chat``: talk with a guided model, in the terminal or through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import typer

from ivg.cli.chat_backends import Backend, LocalBackend, ServerBackend
from ivg.cli.chat_session import COMMANDS, ChatSession
from ivg.cli.options import command
from ivg.cli.output import AsJson, Quiet
from ivg.cli.quick_import import import_transformers
from ivg.cli.recipe_options import RecipeOptions, default_method, resolve_search
from ivg.cli.standard_input import is_terminal, texts_of
from ivg.errors import ConfigError
from ivg.settings.recipe import Recipe

HELP = """Talk with a guided model. Answers appear as they are written.

Messages on the command line, or a text through a pipe, are answered one after the other, and the command ends:

    ivg chat "Was it any good?"

    echo "Was it any good?" | ivg chat --quiet

    ivg chat --url http://localhost:8000

In a conversation, /help lists commands: /method, /beta, /set, /compare, /system, /trace, /retry, /reset. Three quotation marks
begin a message of several lines, and end it. Ctrl-C stops an answer. A base without chat template continues each message by itself."""

_UNTYPED = "default"
"""The method where none is named: what the models allow, or the server's own."""
_LOADING = ("engine", "device", "dtype", "revision", "attention", "generation_config")
"""Settings of models that are loaded here."""
QUOTES = '"""'
HISTORY_LINES = 1000


@command(
    recipe=RecipeOptions(
        "models",
        "search",
        "sampling",
        "run",
        only={"run": ("seed", *_LOADING)},
        method=_UNTYPED,
        unset={"method": "ivg, or what the models allow; of a server: its own"},
        without=("system",),
        one_answer="ivg chat",
    )
)
def chat(
    messages: Annotated[list[str] | None, typer.Argument(help="Messages; - is standard input.", metavar="MESSAGE...")] = None,
    url: Annotated[str | None, typer.Option("--url", help="Ask a running server (ivg serve); its key: IVG_API_KEY.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="System turn of the conversation.")] = None,
    compare: Annotated[str | None, typer.Option("--compare", help="Comma-separated methods that answer, too.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    *,
    recipe: Recipe,
) -> None:
    """See HELP."""
    sent = texts_of(messages)
    if not sent and not is_terminal():
        raise ConfigError("no message: standard input is empty\n  give messages, or send a text through a pipe: echo TEXT | ivg chat")
    session = _session(recipe, url, system, quiet or as_json)
    session.as_json = as_json
    if compare:
        session.set_compare(compare)
    if sent:
        done = [session.send(text) for text in sent]
        if not all(done):
            raise typer.Exit(2)
        if session.failures:  # of a method that is compared
            raise typer.Exit(1)
        return
    if not session.backend.chats:
        session.say("the base has no chat template: each message is continued by itself")
    session.say(f"{session.backend.name}, method {session.method or 'of the server'}; /help lists commands")
    _read_lines(session)


def _session(recipe: Recipe, url: str | None, system: str | None, quiet: bool) -> ChatSession:
    method: str | None = None if recipe.search.method == _UNTYPED else recipe.search.method
    backend: Backend
    if url is not None:
        here = [*recipe.models.given, *recipe.values, *(name for name in _LOADING if name in recipe.run.model_fields_set)]
        if here:
            raise ConfigError(f"got --url and {', '.join(here)}\n  the server has its own models; leave --url or these out")
        backend = ServerBackend.connect(url)
    else:
        import_transformers(recipe)
        method = method or default_method(recipe.override(search={"method": "ivg"}))
        recipe = resolve_search(recipe.override(search={"method": method}))
        backend = _local(recipe)

    def settings_for(name: str | None) -> dict[str, Any]:
        from ivg.cli.compare import settings_for as of_recipe
        from ivg.search.methods import method_names

        unknown = name is None or (url is not None and name not in method_names())  # the server's own, perhaps
        search = recipe.search.settings() if unknown else of_recipe(recipe, str(name))
        return {**search, **recipe.sampling.settings()}

    def say(text: str) -> None:
        if not quiet:
            typer.echo(typer.style(text, dim=True), err=True)

    session = ChatSession(backend, settings_for, sys.stdout, say, method=method, seed=recipe.run.seed)
    if system is not None:
        session.set_system(system)
    backend.check(method, session.settings(method))
    return session


def _local(recipe: Recipe) -> LocalBackend:
    from ivg.factory.recipe import load_models
    from ivg.models.prompt_encoder import has_chat_template

    model = load_models(recipe, every_guide=True)
    base = recipe.models.base.path if recipe.models.base is not None else "the embedded film-review model"
    return LocalBackend(base, tuple(model.methods), has_chat_template(model.base), model)


def _read_lines(session: ChatSession) -> None:
    """Read messages and commands until the end."""
    with _history():
        while True:
            try:
                line = input("> ")
                if line.lstrip().startswith(QUOTES):
                    line = _quoted(line.lstrip())
            except EOFError:
                typer.echo()
                return
            except KeyboardInterrupt:
                typer.echo()
                session.say("/quit ends")
                continue
            if not session.handle(line):
                return


def _quoted(first: str) -> str:
    """A message of several lines, up to the next three quotation marks."""
    text = first[len(QUOTES) :]
    while QUOTES not in text:
        text += "\n" + input("  ")
    return text.partition(QUOTES)[0].strip("\n")


@contextmanager
def _history() -> Iterator[None]:
    """Line editing, completion of commands, and lines of earlier conversations, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    from ivg.utils.cache import cache_folder

    def complete(text: str, number: int) -> str | None:
        found = [name for name in COMMANDS if text.startswith("/") and name.startswith(text)]
        return found[number] if number < len(found) else None

    file = cache_folder("chat_history")
    with suppress(OSError):
        readline.read_history_file(file)
    readline.set_completer_delims("")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
    try:
        yield
    finally:
        readline.set_history_length(HISTORY_LINES)
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)
            readline.write_history_file(file)
