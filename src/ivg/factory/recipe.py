"""From settings to objects: the one place that knows which class stands for which name."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ivg.errors import ConfigError, ModelError
from ivg.factory.values import make_value, prompt_template
from ivg.settings.models import LANGUAGE_MODELS
from ivg.settings.recipe import Recipe
from ivg.settings.sampling import DEFAULT_SAMPLING
from ivg.types.beam import HEAD_SUFFIX

if TYPE_CHECKING:
    from ivg.model import GuidedModel
    from ivg.models.loading import LoadOptions
    from ivg.models.shared import SharedNetworks
    from ivg.types import SamplingParams


def load_options(recipe: Recipe) -> LoadOptions:
    """Device, dtype and hub settings of the models that set none themselves (``LoadOptions.of``)."""
    from ivg.models.loading import LoadOptions

    run = recipe.run
    return LoadOptions(run.device, run.dtype, run.revision, run.trust_remote_code, run.quantization, attention=run.attention)


def load_models(recipe: Recipe, *, every_guide: bool = False) -> GuidedModel:
    """The models of a recipe, and its further values by their names, over the engine that it names.

    Where it names no models: the embedded ones; where it names guides alone, they guide the embedded base. ``every_guide``: inside
    vLLM have guides for all methods, not only for the recipe's (a server's clients choose).

    Raises:
        ConfigError: a value whose name means something else.
        ModelError: a model that cannot be loaded.
    """
    for name in recipe.values:
        if name == "none" or set(name) & set("=,") or name.endswith(HEAD_SUFFIX):
            expected = f"expected a name without = and comma, other than none, that does not end in {HEAD_SUFFIX}"
            raise ConfigError(f"a value cannot be called {name!r}\n  {expected}")
    from ivg.models.shared import SharedNetworks
    from ivg.values.implicit import share_pair_passes

    options = load_options(recipe)
    if recipe.run.engine == "vllm":
        from ivg.factory.engines import vllm_model

        return vllm_model(recipe, options, every_guide=every_guide)
    if recipe.uses_endpoint:
        from ivg.factory.engines import endpoint_model

        return endpoint_model(recipe, options)
    if recipe.run.engine != "transformers":
        raise ConfigError(f"unknown engine {recipe.run.engine!r}\n  expected transformers, vllm, or the URL of an endpoint (http://…/v1)")
    try:
        networks = SharedNetworks()
        model = _models(recipe, options, networks)
        for name, value in recipe.values.items():
            model.add_value(name, make_value(name, value, options, networks), replace=True)
        share_pair_passes(model.values.values(), networks)
    except ModelError as e:
        raise _with_other_missing(e, recipe, options) from e
    return model


def _with_other_missing(error: ModelError, recipe: Recipe, options: LoadOptions) -> ModelError:
    """``error`` with the other models of the recipe that are not found, so that all are named at once."""
    from ivg.models.hub import adapter_at, find_model

    values = {f"{name}.{role}": ref for name, value in recipe.values.items() for role, ref in value.given.items()}
    found = []
    for what, ref in {**recipe.local_models, **values}.items():
        if ":" not in ref.path:  # a function, or embedded
            try:
                if adapter_at(ref.path) is None:
                    find_model(ref.path, what, options.of(ref).hub())
            except ModelError as e:
                found.append(str(e))
    lines = [text.partition("\n")[0] for text in (found if str(error) in found else [str(error), *found])]
    return error if len(lines) == 1 else ModelError("; ".join(lines) + "\n  expected directories with config.json and weights, or hub ids")


def default_sampling(recipe: Recipe) -> SamplingParams:
    """How a recipe's model draws where nothing is said (``GuidedModel.sampling``), without loading it.

    Raises:
        ConfigError: the base's checkpoint sets what cannot be done.
    """
    from ivg.embedded import path
    from ivg.models.adapters import base_of
    from ivg.models.generation_config import defaults_of, read_generation_config
    from ivg.models.hub import adapter_at, find_local

    base = recipe.models.given.get("base")
    if recipe.uses_endpoint:
        return DEFAULT_SAMPLING
    revision = (base.revision if base else None) or recipe.run.revision
    name = base.path if base else path("base")
    if (adapter := adapter_at(name)) is not None:
        name = base_of(adapter, "base")
    config = read_generation_config(find_local(name, "base") or name, revision=revision)
    return replace(DEFAULT_SAMPLING, **defaults_of(config, "base", recipe.run.generation_config).settings)


def _models(recipe: Recipe, options: LoadOptions, networks: SharedNetworks) -> GuidedModel:
    from ivg.embedded import path
    from ivg.model import GuidedModel

    given = recipe.models.given
    if not given:
        return GuidedModel.embedded(options, networks)
    templates = {role: prompt_template(ref) for role, ref in given.items()}
    if "tuned" in given and "untuned" in given:
        templates["untuned"] = prompt_template(given["untuned"], given["tuned"])
    models: dict[str, Any] = {"base": path("base"), **{role: ref if role in LANGUAGE_MODELS else ref.path for role, ref in given.items()}}
    mode = recipe.run.generation_config
    by_role = {role: options.of(given[role]) if role in given else options for role in models}
    return GuidedModel.from_pretrained(
        **models, templates=templates, options=by_role, generation_config=mode, networks=networks, images=recipe.images
    )
