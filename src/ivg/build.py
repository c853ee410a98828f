"""From settings to objects: the one place that knows which class stands for which name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ivg.config import Recipe
from ivg.errors import ConfigError

if TYPE_CHECKING:
    from ivg.models.loading import LoadOptions
    from ivg.steered import SteeredModel


def load_options(recipe: Recipe) -> LoadOptions:
    """Device, dtype and hub settings."""
    from ivg.models.loading import LoadOptions

    run = recipe.run
    return LoadOptions(run.device, run.dtype, run.revision, run.trust_remote_code, run.quantization)


def load_models(recipe: Recipe) -> SteeredModel:
    """The models of a recipe: the embedded ones where it names none; embedded guides need the embedded base.

    Raises:
        ConfigError: guides but no base.
        ModelError: a model that cannot be loaded.
    """
    from ivg.steered import SteeredModel

    given, options = recipe.models.given, load_options(recipe)
    if not given:
        return SteeredModel.embedded(options)
    if "base" not in given:
        raise ConfigError(
            f"got models for {', '.join(given)}, but no base model\n  give --base ID-or-path, or no model at all for the embedded ones"
        )
    templates = {role: ref.template for role, ref in given.items() if ref.template is not None}
    return SteeredModel.from_pretrained(**{role: ref.path for role, ref in given.items()}, templates=templates, options=options)
