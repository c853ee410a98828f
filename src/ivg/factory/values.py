"""From a table ``[values.NAME]`` to a value."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ivg.errors import ConfigError, IVGError, reason
from ivg.search.methods import CONTRAST
from ivg.settings.recipe import ModelRef, NamedValue
from ivg.utils.plugins import Plugins

if TYPE_CHECKING:
    from ivg.models.loading import LoadOptions
    from ivg.models.prompt_template import PromptTemplate
    from ivg.models.shared import SharedNetworks
    from ivg.types import Value

VALUE_PLUGINS = Plugins("ivg.values")
"""Kinds of values of other packages: entry points that name a function of one text, which returns a :class:`~ivg.Value`."""


def make_value(name: str, config: NamedValue, options: LoadOptions, networks: SharedNetworks | None = None) -> Value:
    """The value of the models, function or plugin that ``config`` names.

    Args:
        name: in usage and errors.
        config: the models.
        options: how they are loaded where ``config`` does not say it.
        networks: share with what was loaded there.

    Raises:
        ModelError, VocabularyError: a model that cannot be loaded, or a pair that does not fit.
    """
    from ivg.models.shared import SharedNetworks
    from ivg.values.contrast import PromptContrast
    from ivg.values.explicit import ExplicitValue
    from ivg.values.implicit import AutoregressiveReward, ImplicitValue
    from ivg.values.reward import load_reward

    here = networks or SharedNetworks()
    refs, load = config.given, here.load
    if "tuned" in refs:
        tuned, untuned = refs["tuned"], refs["untuned"]
        return ImplicitValue(
            load(tuned, f"{name}.tuned", options, prompt_template(tuned)),
            load(untuned, f"{name}.untuned", options, prompt_template(untuned, tuned)),
            name,
        )
    ((role, ref),) = refs.items()
    options = options.of(ref)
    if role == "value":
        return ExplicitValue.from_pretrained(ref.path, template=prompt_template(ref), options=options, name=name, networks=here)
    if role == "plugin":
        return plugin_value(name, ref.path)
    if role == "reward":
        return load_reward(ref.path, template=prompt_template(ref), options=options, name=name)
    if role == "contrast":
        if name != CONTRAST:
            raise ConfigError(
                f"values.{name}: a network that reads instructions is the value contrast\n  call the table [values.{CONTRAST}]"
            )
        return PromptContrast(load(ref, name, options, prompt_template(ref)), name)
    return AutoregressiveReward(load(ref, name, options, prompt_template(ref)), name)


def prompt_template(ref: ModelRef, default: ModelRef | None = None) -> PromptTemplate:
    """How the model of ``ref`` reads prompts; what it does not say is that of ``default``, where both read in one template."""
    from ivg.models.prompt_template import PromptTemplate

    template, kwargs = ref.template, ref.chat_template_kwargs
    if default is not None:
        template = template or default.template
        kwargs = default.chat_template_kwargs if kwargs is None and template == default.template else kwargs
    return PromptTemplate(template, kwargs or {})


def plugin_value(name: str, spec: str) -> Value:
    """The value that the plugin of ``kind:argument`` makes, under ``name``; the argument may be empty.

    Raises:
        ConfigError: no such plugin, or it fails; names it.
    """
    from ivg.values.base import as_value

    kind, _, argument = spec.partition(":")
    make = VALUE_PLUGINS.get(kind)
    if make is None:
        have = ", ".join(VALUE_PLUGINS.names) or "none is installed"
        raise ConfigError(f"values.{name}: no plugin {kind!r} for values\n  expected KIND:ARGUMENT with a kind of: {have}")
    try:
        value = as_value(make(argument), name)
    except IVGError:
        raise
    except Exception as e:  # whatever a foreign package raises
        source = VALUE_PLUGINS.source(kind)
        raise ConfigError(f"values.{name}: the plugin {kind} of {source} failed: {type(e).__name__}: {reason(e)}") from e
    value.name = name
    return value
