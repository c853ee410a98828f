"""Options that several verbs share, and how they become a recipe."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ivg.errors import ConfigError

if TYPE_CHECKING:
    from ivg.settings.recipe import Recipe

_MODELS, _SEARCH, _SAMPLING, _RUN = "Models (none: the embedded ones)", "Search", "Sampling", "Run"

RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="TOML file with models and settings; options override it.")]
Format = Annotated[
    str | None, typer.Option("--format", help="jsonl, json, csv, parquet or text. (default: by the file's name, or what stands in it)")
]
Base = Annotated[str | None, typer.Option("--base", help="Frozen model to steer: hub id or directory.", rich_help_panel=_MODELS)]
Tuned = Annotated[
    str | None, typer.Option("--tuned", help="Small tuned guide (with --untuned: the implicit value).", rich_help_panel=_MODELS)
]
Untuned = Annotated[str | None, typer.Option("--untuned", help="What the guide was tuned from.", rich_help_panel=_MODELS)]
ValuePath = Annotated[str | None, typer.Option("--value", help="Trained value network: the explicit value.", rich_help_panel=_MODELS)]
Reward = Annotated[
    str | None,
    typer.Option(
        "--reward", help="Sequence classifier, or Python function of prompt and response (file.py:function).", rich_help_panel=_MODELS
    ),
]
Arm = Annotated[str | None, typer.Option("--arm", help="Autoregressive reward model (GenARM).", rich_help_panel=_MODELS)]
Template = Annotated[
    list[str] | None,
    typer.Option(
        "--template", help='How a model reads prompts: ROLE=chat or ROLE="... {prompt} ..."; may be repeated.', rich_help_panel=_MODELS
    ),
]
Method = Annotated[str | None, typer.Option("--method", "-m", help="Named method, or custom (see ivg models).", rich_help_panel=_SEARCH)]
Width = Annotated[int | None, typer.Option("-W", "--width", help="Beams kept.", rich_help_panel=_SEARCH)]
Successors = Annotated[int | None, typer.Option("-K", "--successors", help="Continuations of each beam.", rich_help_panel=_SEARCH)]
ChunkLength = Annotated[int | None, typer.Option("-L", "--chunk-length", help="Tokens between selections.", rich_help_panel=_SEARCH)]
Beta = Annotated[float | None, typer.Option("--beta", help="Token guidance weight.", rich_help_panel=_SEARCH)]
Token = Annotated[
    str | None, typer.Option("--token", help="Value that guides tokens: none, implicit, explicit, reward, arm ….", rich_help_panel=_SEARCH)
]
Select = Annotated[
    str | None, typer.Option("--select", help="Value that selects chunks: none, implicit, explicit, reward ….", rich_help_panel=_SEARCH)
]
Candidates = Annotated[
    int | None,
    typer.Option("--guide-candidates", help="Re-score this many likely tokens (0: whole vocabulary where known).", rich_help_panel=_SEARCH),
]
GuardMiddleware = Annotated[
    float | None,
    typer.Option("--gate", help="Guide only tokens whose base entropy is at least this many nats (0: all).", rich_help_panel=_SEARCH),
]
Draft = Annotated[
    int | None,
    typer.Option(
        "--draft",
        help="Let the guiding pair draft up to this many tokens ahead of the base: exact, and faster where it pays.",
        rich_help_panel=_SEARCH,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option("--weights", help="Several values guide tokens: NAME=WEIGHT,NAME=WEIGHT (instead of --token).", rich_help_panel=_SEARCH),
]
SelectWeights = Annotated[
    str | None,
    typer.Option("--select-weights", help="Several values select: NAME=WEIGHT,… (instead of --select).", rich_help_panel=_SEARCH),
]
Decay = Annotated[
    float | None,
    typer.Option("--decay", help="Factor of W*K from chunk to chunk, the total unchanged (1: constant).", rich_help_panel=_SEARCH),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other setting of the method, KEY=VALUE (see ivg models); may be repeated.", rich_help_panel=_SEARCH),
]
Temperature = Annotated[float | None, typer.Option("--temperature", "-t", help="0 is greedy. (default: 0.7)", rich_help_panel=_SAMPLING)]
TopK = Annotated[int | None, typer.Option("--top-k", help="0 is off. (default: 0)", rich_help_panel=_SAMPLING)]
TopP = Annotated[float | None, typer.Option("--top-p", help="1 is off. (default: 1)", rich_help_panel=_SAMPLING)]
MinP = Annotated[float | None, typer.Option("--min-p", help="0 is off. (default: 0)", rich_help_panel=_SAMPLING)]
MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", help="Tokens of an answer at most (default: 50)", rich_help_panel=_SAMPLING)
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="Text that ends a response (\\n: a line break); may be repeated.", rich_help_panel=_SAMPLING),
]
IgnoreEos = Annotated[bool | None, typer.Option("--ignore-eos", help="Never end before --max-new-tokens.", rich_help_panel=_SAMPLING)]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option("--repetition-penalty", help="Of tokens of prompt and answer; 1 is off. (default: 1)", rich_help_panel=_SAMPLING),
]
GenerationConfig = Annotated[
    str | None,
    typer.Option(
        "--generation-config",
        help="auto: what the base's generation_config.json sets are the defaults here; ignore: it is left out. (default: auto)",
        rich_help_panel=_SAMPLING,
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Random seed. (default: 0)", rich_help_panel=_RUN)]
Number = Annotated[int | None, typer.Option("--n", help="Responses for each prompt. (default: 1)", rich_help_panel=_RUN)]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Prompts at once. (default: 16)", rich_help_panel=_RUN)]
Engine = Annotated[
    str | None,
    typer.Option(
        "--engine", help="transformers, vllm, or the URL of an OpenAI-compatible endpoint. (default: transformers)", rich_help_panel=_RUN
    ),
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 … (default: the best here)", rich_help_panel=_RUN)]
Dtype = Annotated[str | None, typer.Option("--dtype", help="auto, float32, bfloat16 or float16. (default: auto)", rich_help_panel=_RUN)]


def recipe_of(file: Path | None, templates: Sequence[str] | None, given: Mapping[str, Any]) -> Recipe:
    """The recipe file with the given options over it; each option goes to the table that has a field of its name.

    Raises:
        ConfigError: unusable settings, or a template for a model that is not given.
    """
    from ivg.settings.recipe import ROLES, Recipe, RunConfig, SamplingConfig, SearchConfig

    recipe = Recipe.load(file) if file is not None else Recipe()
    method_given = given.get("method") is not None or "method" in recipe.search.model_fields_set
    kept = {role: ref.template for role, ref in recipe.models.given.items()}
    models = {role: given.get(role) for role in ROLES}
    named: dict[str, Any] = {role: {"path": path, "template": kept.get(role)} for role, path in models.items() if path is not None}
    for text in templates or ():
        role, sign, template = text.partition("=")
        ref = named.get(role) or (recipe.models.given[role].model_dump() if role in recipe.models.given else None)
        if not sign or ref is None:
            raise ConfigError(f"--template {text!r}\n  expected ROLE=TEMPLATE for a model that is given, e.g. base=chat")
        named[role] = {**ref, "template": template}
    further = dict(_pair(text, set(SearchConfig.model_fields) - {"method"}) for text in given.get("settings") or ())
    settings = {
        "search": {f: given.get(f) for f in SearchConfig.model_fields} | further,
        "sampling": {f: given.get(f) for f in SamplingConfig.model_fields if given.get(f) != []} | _stops(given.get("stop")),
        "run": {f: given.get(f) for f in RunConfig.model_fields},
    }
    recipe = recipe.override(models=named, **settings)
    return recipe if method_given else recipe.override(search={"method": default_method(recipe)})


def default_method(recipe: Recipe) -> str:
    """The method where none is named: ``ivg``, or, of guides that do not allow it, what they do allow."""
    roles = set(recipe.models.given) - {"base"}
    token, select = "tuned" in roles, bool({"value", "reward"} & roles)
    if not roles or (token and select) or recipe.search.method != "ivg" or _names_values(recipe):
        return recipe.search.method
    return "eft" if token else "cbs-explicit" if select else "genarm"


def _names_values(recipe: Recipe) -> bool:
    """Do settings of the search name values themselves?"""
    s = recipe.search
    return any(value is not None for value in (s.token, s.select, s.weights, s.select_weights))


def without_sizes(recipe: Recipe) -> tuple[Recipe, str | None]:
    """The recipe without sizes of a search where its method has none to search among, and a note that says so.

    Several methods may be given the same options (``-W 4`` beside ``--method base``).
    """
    from ivg.search.methods import METHODS

    row, search = METHODS.get(recipe.search.method), recipe.search
    idle = {name: got for name in ("width", "successors") if (got := getattr(search, name)) is not None and got > 1}
    if row is None or row.selectors or row.width * row.successors > 1 or not idle or _names_selector(recipe):
        return recipe, None
    kept = search.model_copy(update=dict.fromkeys(idle))
    listed = ", ".join(f"{name}={got}" for name, got in idle.items())
    note = f"note: {listed} ignored: the method {row.name} selects among nothing (--select VALUE makes it a search)"
    return recipe.model_copy(update={"search": kept}), note


def _names_selector(recipe: Recipe) -> bool:
    return recipe.search.select not in (None, "none") or recipe.search.select_weights is not None


def _stops(given: Sequence[str] | None) -> dict[str, Any]:
    """A backslash and an n, as typed in a shell, are a line break."""
    return {"stop": [text.replace("\\n", "\n") for text in given]} if given else {}


def _pair(text: str, known: Collection[str]) -> tuple[str, Any]:
    """``KEY=VALUE`` of ``--set``; what reads as a number, or as true or false, is one.

    Raises:
        ConfigError: no such setting, or no value.
    """
    key, sign, value = text.partition("=")
    if not sign or key.strip() not in known:
        raise ConfigError(f"--set {text!r}\n  expected KEY=VALUE with KEY one of {', '.join(sorted(known))}")
    return key.strip(), _plain(value.strip())


def _plain(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
