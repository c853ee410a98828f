"""``ivg serve``: OpenAI's protocol and the playground, over one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ivg.cli import options as o
from ivg.errors import MissingDependencyError

HELP = """Serve the models: OpenAI's protocol at /v1, a playground at /.

    ivg serve --port 8000

Settings of requests that are not given there come from the recipe and from the options here. Listens on this machine only, unless
--host says otherwise; keys are asked for where --api-key-file or IVG_API_KEYS gives any. See docs/how-to/serving.md."""

_SERVER = "Server"


def _option(name: str, help: str) -> Any:
    return typer.Option(name, help=help, rich_help_panel=_SERVER)


def serve(
    recipe: o.RecipeFile = None,
    host: Annotated[str | None, _option("--host", "Address to listen at. (default: 127.0.0.1)")] = None,
    port: Annotated[int | None, _option("--port", "0: any free one. (default: 8000)")] = None,
    name: Annotated[str | None, _option("--name", "How clients call the model. (default: embedded, or the base's name)")] = None,
    api_key_file: Annotated[Path | None, _option("--api-key-file", "Keys that open the server, one a line.")] = None,
    max_beams: Annotated[int | None, _option("--max-beams", "Hypotheses in flight at most. (default: 256)")] = None,
    max_hypotheses: Annotated[int | None, _option("--max-hypotheses", "W*K of one request at most. (default: 64)")] = None,
    max_tokens: Annotated[int | None, _option("--max-tokens", "Of one answer at most. (default: as the context allows)")] = None,
    queue_limit: Annotated[int | None, _option("--queue-limit", "Answers that may wait. (default: 128)")] = None,
    deadline: Annotated[float | None, _option("--deadline", "Seconds for one request. (default: 600)")] = None,
    drain: Annotated[float | None, _option("--drain", "Seconds to finish in when told to stop. (default: 30)")] = None,
    cors_origin: Annotated[list[str] | None, _option("--cors-origin", "Web origin that may ask from a browser; may be repeated.")] = None,
    strict: Annotated[
        bool | None, _option("--strict", "Refuse fields of requests that change no answer, instead of ignoring them.")
    ] = None,
    keep_alive: Annotated[
        int | None, _option("--keep-alive", "Seconds of idle time that a connection may have between requests. (default: 75)")
    ] = None,
    max_connections: Annotated[
        int | None, _option("--max-connections", "Open at once at most. (default: as the limit of open files allows)")
    ] = None,
    log_prompts: Annotated[bool | None, _option("--log-prompts", "Write prompts to the log.")] = None,
    method: o.Method = None,
    base: o.Base = None,
    tuned: o.Tuned = None,
    untuned: o.Untuned = None,
    value: o.ValuePath = None,
    reward: o.Reward = None,
    arm: o.Arm = None,
    template: o.Template = None,
    temperature: o.Temperature = None,
    max_new_tokens: Annotated[
        int | None, _option("--max-new-tokens", "Of an answer where the client does not say. (default: as the context allows)")
    ] = None,
    generation_config: o.GenerationConfig = None,
    engine: o.Engine = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
) -> None:
    """See HELP."""
    from ivg.serving.keys import read_keys
    from ivg.settings.serve import ServeSettings

    given = locals()
    found = o.recipe_of(recipe, template, given)
    flags = {f: given.get(f) for f in ServeSettings.model_fields if f not in ("api_keys", "cors_origins")}
    flags |= {"api_keys": read_keys(api_key_file), "cors_origins": cors_origin or None}
    settings = found.override(serve=flags).serve
    try:
        from ivg.serving.server import serve as run
    except ImportError as e:
        raise MissingDependencyError(f"{e}\n  the server needs the extra serve: pip install 'ivg[serve]'") from None
    run(found, settings)
