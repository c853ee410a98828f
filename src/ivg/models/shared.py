"""Loads language models and values, each network once: models of one network read with it, with prompts, adapters or heads of their own.

Roles with one path (and revision, device, dtype …) share its weights. All share one cache, too, in which rows of different adapters have
nothing in common; only adapters that cannot read in one pass with the others (``models.adapter_rows``) have a separate cache.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from ivg.errors import ModelError
from ivg.models.adapter_directory import AdapterSource, find_adapter
from ivg.models.adapters import Adapters, import_peft
from ivg.models.added import locate
from ivg.models.cached_lm import CachedLM
from ivg.models.head_reader import HeadReader
from ivg.models.hidden_states import gives_states
from ivg.models.hub import has_tokenizer
from ivg.models.loading import LoadOptions, Template, load_causal, load_tokenizer, load_value
from ivg.models.merged import value_on
from ivg.models.packed_linear import pack, packed_layers, unpack
from ivg.models.prompt_template import PromptTemplate
from ivg.models.runner import ModelRunner
from ivg.models.shared_passes import share_passes
from ivg.settings.models import ModelRef, ModelSource
from ivg.settings.placement import is_spread

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

    def keeps_states(self) -> bool:
        """Let passes keep hidden states, where the network gives them; does it?"""
        runner = self.lm.model
        if runner.states is None:
            if runner.before_pass is not None:
                runner.before_pass()
            if not gives_states(runner.network):
                return False
            runner.keep_states(cast("Any", runner.network).base_model)
        return True

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
        self._readers: list[CachedLM] = []

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
        lm = self._network(ref.path, what, options).lm.sharing(what, template, system=ref.system)
        self._readers.append(lm)
        return lm

    def share_passes(self, first: CachedLM, second: CachedLM) -> None:
        """Let two that were loaded here read in the same passes, where their networks have one shape (``models.shared_passes``).

        For when all models are loaded: what comes later and names these networks again has weights of its own.
        """
        networks = [lm.network for lm in (first, second)]
        if share_passes(first, second, self._readers):
            self._loaded = [found for found in self._loaded if found.lm.network not in networks]

    def load_value(
        self, path: str | Path, what: str, options: LoadOptions | None = None, template: Template = None, tokenizer: Any = None
    ) -> CachedLM:
        """A value network (see :func:`~ivg.models.loading.load_value`). A head alone on a network that was loaded here reads with that.

        Raises:
            ModelError: it cannot be loaded.
        """
        options = options or LoadOptions()
        source = find_adapter(path, options.adapter, options.scale, what, replace(options, revision=None).hub())
        plain = replace(options, adapter=None, scale=None)
        apart = plain.quantization is not None or is_spread(plain.device)
        if source is None or not source.head_only or source.value_notes is None or apart:
            return load_value(path, what, options, template, tokenizer)
        found = self._find(source.base, plain)
        if found is None or not found.keeps_states():
            return load_value(path, what, options, template, tokenizer)
        value = value_on(cast("Any", found.lm.model.network).base_model, source)
        value.config = source.apply_to(copy.deepcopy(value.config))
        ends = sorted(found.lm.vocabulary.eos_ids)
        if tokenizer is None:
            tokenizer = load_tokenizer(source.folder, plain, what) if has_tokenizer(source.folder) else found.lm.tokenizer
        prompts = PromptTemplate.of(template).with_default(value.notes.get("template"))
        lm = HeadReader(found.lm.model, value, tokenizer, prompts, ends, name=what)
        if tokenizer is found.lm.tokenizer:
            lm.vocabulary = found.lm.vocabulary
        return lm

    def _find(self, path: str, options: LoadOptions) -> _Loaded | None:
        place = _place(path)
        return next((found for found in self._loaded if (found.path, found.options) == (place, options)), None)

    def _network(self, path: str, what: str, options: LoadOptions) -> _Loaded:
        if (found := self._find(path, options)) is not None:
            return found
        lm = load_causal(path, what, options)
        self._loaded.append(_Loaded(_place(path), options, lm, runners={None: lm.model}))
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


def _place(path: str) -> str:
    """A name by which a network is known again."""
    where = Path(locate(path)).expanduser()
    return str(where.resolve()) if where.exists() else path
