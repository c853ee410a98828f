"""Loads causal language models, each network once: models of one network are readers of it, behind prompts or adapters of their own.

Roles with one path (and revision, device, dtype …) share its weights. All share one cache, too, in which rows of different adapters have
nothing in common; only adapters that cannot read in one pass with the others (``models.adapter_rows``) have a separate cache.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from ivg.errors import ModelError
from ivg.models.adapter_directory import AdapterSource, find_adapter
from ivg.models.adapters import Adapters, import_peft
from ivg.models.added import locate
from ivg.models.cached_lm import CachedLM
from ivg.models.hub import has_tokenizer
from ivg.models.loading import LoadOptions, Template, load_causal, load_tokenizer
from ivg.models.packed_linear import pack, packed_layers, unpack
from ivg.models.prompt_template import PromptTemplate
from ivg.models.runner import ModelRunner
from ivg.settings.models import ModelRef, ModelSource

log = logging.getLogger(__name__)


@dataclass
class _Loaded:
    """A network, and who reads it."""

    path: str
    options: LoadOptions
    lm: CachedLM
    adapters: Adapters | None = None
    runners: dict[str | None, ModelRunner] = field(default_factory=dict)
    """By adapter; None: without. Adapters whose rows share the passes of those without have the same."""

    def add_adapter(self, folder: Path, scale: float, what: str) -> str:
        """Load the adapter in ``folder``, times ``scale``, and choose who reads with it; its name.

        Raises:
            ModelError, ConfigError, MissingDependencyError: see :meth:`~ivg.models.adapters.Adapters.add`.
        """
        plain, network = self.lm.model, self.lm.model.network
        if self.adapters is not None and (known := self.adapters.name_of(folder, scale)) is not None:
            return known
        packed = bool(packed_layers(network))
        unpack(network)  # peft knows plain layers only
        try:
            if self.adapters is None:
                self.adapters = Adapters(network)
                plain.before_pass = partial(self.adapters.activate, None)
            name = self.adapters.add(folder, scale, what)
            if plain.cache.mixes_weights and self.adapters.can_share_passes(name):
                plain.row_weights = self.adapters.rows
                self.runners[name] = plain
            else:
                log.info("%s: the adapter %s is read in separate passes, since rows with and without it cannot share one", what, folder)
                self.runners[name] = self._separate_runner(self.adapters, name, what)
        finally:
            if packed and all(runner is plain for runner in self.runners.values()):  # other kinds than LoRA read plain weights
                pack(network)
        return name

    def _separate_runner(self, adapters: Adapters, name: str, what: str) -> ModelRunner:
        """A runner with a cache of its own, for whose passes the adapter is switched on."""
        adapters.activate(name)
        runner = ModelRunner(self.lm.model.network, what)
        runner.before_pass = partial(adapters.activate, name)
        return runner


class SharedNetworks:
    """The networks that were loaded so far."""

    def __init__(self) -> None:
        self._loaded: list[_Loaded] = []

    def load(self, model: ModelSource, what: str, options: LoadOptions | None = None, template: Template = None) -> CachedLM:
        """A causal language model with a cache; ``what`` is its name in usage and errors.

        Args:
            model: directory or hub id, of a network or of a PEFT adapter; or a reference, with settings that come before the others.
            what: the model's role.
            options: how it is loaded.
            template: how it reads prompts; default: as the reference says.

        Raises:
            ModelError: it cannot be loaded.
        """
        ref = model if isinstance(model, ModelRef) else ModelRef(path=str(model))
        options = (options or LoadOptions()).of(ref)
        source = find_adapter(ref.path, options.adapter, options.scale, what, replace(options, revision=None).hub())
        options = replace(options, adapter=None, scale=None)
        if template is None and isinstance(model, ModelRef):
            template = PromptTemplate(ref.template, ref.chat_template_kwargs or {})
        if source is not None:
            return self._with_adapter(source, what, options, template, ref.system)
        found = self._network(ref.path, what, options)
        return found.lm.sharing(what, template, system=ref.system)

    def _network(self, path: str, what: str, options: LoadOptions) -> _Loaded:
        where = Path(locate(path)).expanduser()
        place = str(where.resolve()) if where.exists() else path
        for found in self._loaded:
            if (found.path, found.options) == (place, options):
                return found
        lm = load_causal(path, what, options)
        self._loaded.append(_Loaded(place, options, lm, runners={None: lm.model}))
        return self._loaded[-1]

    def _with_adapter(self, source: AdapterSource, what: str, options: LoadOptions, template: Template, system: str | None) -> CachedLM:
        if source.value_notes is not None or source.labels is not None:
            kind, flag = ("value", "--value") if source.labels is None else ("reward model", "--reward")
            raise ModelError(f"{what} {str(source.folder)!r} is the adapter of a {kind}, not of a language model\n  give it as {flag}")
        import_peft(what)
        folder = source.folder
        found = self._network(source.base, what, options)
        name = found.add_adapter(folder, source.scale, what)
        own = load_tokenizer(folder, options, what) if has_tokenizer(folder) else None
        tokenizer, ends = found.lm.tokenizer if own is None else own, sorted(found.lm.vocabulary.eos_ids)
        lm = CachedLM(found.runners[name], tokenizer, template, ends, name=what, system=system)
        lm.weights, lm.adapter_folder = name, folder
        lm.generation_config = found.lm.generation_config
        if own is None:
            lm.vocabulary = found.lm.vocabulary
        return lm
