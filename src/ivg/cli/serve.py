"""``ivg serve``: OpenAI's protocol and the playground, over one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ivg.cli.options import command
from ivg.cli.quick_import import import_transformers
from ivg.cli.recipe_options import RecipeOptions
from ivg.errors import MissingDependencyError
from ivg.settings.recipe import Recipe

HELP = """Serve the models: OpenAI's protocol at /v1, a playground at /.

Settings of requests that are not given there come from the recipe and from the options here. Listens on this machine only, unless
--host says otherwise; a key is required if --api-key-file or IVG_API_KEYS gives any. See docs/how-to/serving.md.

    ivg serve --port 8000
"""

_OFFERED = {
    "search": ("method",),
    "sampling": ("temperature", "max_new_tokens"),
    "run": ("generation_config", "engine", "device", "dtype", "revision", "attention"),
    "images": ("enabled", "allowed_media_domains", "allowed_local_media_path"),
}


@command(recipe=RecipeOptions("serve", "models", only=_OFFERED, unset={"max_new_tokens": "as the context allows"}, one_answer="ivg serve"))
def serve(
    api_key_file: Annotated[Path | None, typer.Option("--api-key-file", help="File of API keys, one a line.")] = None, *, recipe: Recipe
) -> None:
    """See HELP."""
    from ivg.serving.keys import read_keys

    recipe = recipe.override(serve={"api_keys": read_keys(api_key_file)})
    import_transformers(recipe)
    try:
        from ivg.serving.server import serve as run
    except ModuleNotFoundError as e:
        raise MissingDependencyError(f"{e}\n  the server needs the extra serve: pip install 'ivg[serve]'") from None
    run(recipe, recipe.serve)
