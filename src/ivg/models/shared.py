"""Loads causal language models, each network once: models of one network are readers of it, behind prompts or adapters of their own.

Roles with one path (and revision, device, dtype …) share its weights. Those without an adapter share one cache, too; each adapter has a
cache of its own, because keys and values differ.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ivg.errors import ModelError, reason
from ivg.models.adapters import Adapters, base_of, import_peft, is_adapter
from ivg.models.cached_lm import CachedLM
from ivg.models.hub import ADAPTER_CONFIG, find_model
from ivg.models.loading import LoadOptions, Template, has_tokenizer, load_causal, load_tokenizer
from ivg.models.packed_linear import unpack
from ivg.models.prompt_template import PromptTemplate
from ivg.models.runner import ModelRunner
from ivg.settings.models import ModelRef, ModelSource


@dataclass
class _Loaded:
    """A network, and who reads it."""

    path: str
    options: LoadOptions
    lm: CachedLM
    adapters: Adapters | None = None
    runners: dict[str | None, ModelRunner] = field(default_factory=dict)
    """By adapter; None: without."""


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
        if template is None and isinstance(model, ModelRef):
            template = PromptTemplate(ref.template, ref.chat_template_kwargs or {})
        path, adapter = ref.path, ref.adapter
        if adapter is None and is_adapter(path):
            path, adapter = base_of(Path(path).expanduser(), what), path
        if adapter is not None:
            return self._with_adapter(path, adapter, 1.0 if ref.scale is None else ref.scale, what, options, template, ref.system)
        found = self._network(path, what, options)
        return found.lm.sharing(what, template, system=ref.system)

    def _network(self, path: str, what: str, options: LoadOptions) -> _Loaded:
        place = str(Path(path).expanduser().resolve()) if Path(path).expanduser().exists() else path
        for found in self._loaded:
            if (found.path, found.options) == (place, options):
                return found
        lm = load_causal(path, what, options)
        self._loaded.append(_Loaded(place, options, lm, runners={None: lm.model}))
        return self._loaded[-1]

    def _with_adapter(
        self, path: str, adapter: str, scale: float, what: str, options: LoadOptions, template: Template, system: str | None
    ) -> CachedLM:
        import_peft(what)
        folder = _folder_of(adapter, what, options)
        found = self._network(path, what, options)
        if found.adapters is None:
            unpack(found.lm.model.network)  # peft knows plain layers only
            found.adapters = Adapters(found.lm.model.network)
            found.lm.model.before_pass = partial(found.adapters.activate, None)
        name = found.adapters.add(folder, scale, what)
        if name not in found.runners:
            found.adapters.activate(name)
            runner = found.runners[name] = ModelRunner(found.lm.model.network, what)
            runner.adapter, runner.before_pass = name, partial(found.adapters.activate, name)
        own = load_tokenizer(folder, options, what) if has_tokenizer(folder) else None
        tokenizer, ends = found.lm.tokenizer if own is None else own, sorted(found.lm.vocabulary.eos_ids)
        lm = CachedLM(found.runners[name], tokenizer, template, ends, name=what, system=system)
        lm.generation_config = found.lm.generation_config
        if own is None:
            lm.vocabulary = found.lm.vocabulary
        return lm


def _folder_of(adapter: str, what: str, options: LoadOptions) -> Path:
    """The directory of an adapter: here, or downloaded from the hub."""
    place = Path(adapter).expanduser()
    if not place.is_dir():
        from huggingface_hub import snapshot_download

        try:
            find_model(adapter, f"the adapter of {what}", options.hub(), weights=False)
            more: dict[str, Any] = {k: v for k, v in replace(options, revision=None).hub().items() if k in ("cache_dir", "token")}
            place = Path(snapshot_download(adapter, allow_patterns=["*.json", "*.safetensors", "*.bin", "*.model", "*.jinja"], **more))
        except ModelError:
            raise
        except Exception as e:
            why = f"cannot load the adapter {adapter!r} of {what}: {reason(e)}"
            raise ModelError(f"{why}\n  expected a directory that peft wrote, or a hub id") from e
    if not (place / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{what}: {str(place)!r} is no PEFT adapter: no {ADAPTER_CONFIG} there\n  expected a directory that peft wrote")
    return place
