"""From a directory or hub id to a network on a device, with its tokenizer.

Everything that ``from_pretrained`` takes passes through: revision, dtype, quantisation, trust_remote_code (off by default).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from ivg.errors import ConfigError, IVGError, MissingDependencyError, ModelError, reason
from ivg.models.adapter_directory import AdapterSource, find_adapter
from ivg.models.cached_lm import CachedLM
from ivg.models.hub import find_model, has_tokenizer, tokenizer_elsewhere
from ivg.models.image_prompts import ImageEncoder
from ivg.models.packed_linear import pack
from ivg.models.placement import check_device_map, pick_device, pick_dtype
from ivg.models.processor import can_read_images, image_class, load_processor, reads_images
from ivg.models.prompt_template import PromptTemplate
from ivg.models.runner import ModelRunner
from ivg.models.weights import OTHER_HEADS, check_weights, weight_files
from ivg.settings.images import ImagesConfig
from ivg.settings.models import ModelRef
from ivg.settings.placement import is_spread

Template = str | PromptTemplate | None
"""How a model reads prompts (:class:`~ivg.models.prompt_template.PromptTemplate`, or its text)."""


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded.

    Attributes:
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; None: CUDA if there is one, else CPU. ``auto`` (or ``balanced``, ``sequential``,
            or a mapping from modules to devices): over several devices, as transformers' ``device_map``, by accelerate.
        dtype: ``auto``: bfloat16 where the device computes in it natively, else float32.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code from the model's repository.
        quantization: passed as ``quantization_config`` (a transformers config, or its dictionary).
        pack: use oneDNN's packed linear layers where they help (``models.packed_linear``: on CPUs); not for training.
        extra: other arguments of ``from_pretrained``.
        attention: passed as ``attn_implementation``.
        max_memory: of each device, where the model is spread over several: ``{0: "20GiB", "cpu": "60GiB"}``.
        images: load a vision-language checkpoint for pictures, where transformers can also load it for text alone.
        adapter: PEFT adapter of the network, directory or hub id.
        scale: factor of what the adapter changes; None: 1.
    """

    device: str | Mapping[str, str | int] | None = None
    dtype: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    quantization: Any = None
    pack: bool = True
    extra: dict[str, Any] = field(default_factory=dict)
    attention: str | None = None
    max_memory: Mapping[str, str | int] | None = None
    images: bool = False
    adapter: str | None = None
    scale: float | None = None

    def of(self, ref: ModelRef) -> LoadOptions:
        """Those of one model: what ``ref`` sets itself, else as here."""
        own = {
            name: getattr(ref, name)
            for name in ("device", "max_memory", "dtype", "revision", "attention", "quantization", "adapter", "scale")
        }
        return replace(self, **{name: value for name, value in own.items() if value is not None})

    def hub(self) -> dict[str, Any]:
        """Keyword arguments of ``from_pretrained`` that say where weights come from."""
        out: dict[str, Any] = {"trust_remote_code": self.trust_remote_code, **self.extra}
        return out | ({"revision": self.revision} if self.revision else {})

    def placed(self) -> dict[str, Any]:
        """Keyword arguments of ``from_pretrained`` that say where the network lies and how it computes.

        Raises:
            ConfigError: no such device or dtype here.
            MissingDependencyError: accelerate is to place it and is not installed.
        """
        device = pick_device(self.device)
        out: dict[str, Any] = {"dtype": pick_dtype(self.dtype, device)}
        if is_spread(self.device) or self.quantization is not None:
            _require_accelerate()
            out["device_map"] = self.device if is_spread(self.device) else {"": device}
        elif self.max_memory is not None:
            raise ConfigError(f"max_memory is for a model over several devices, got device {self.device!r}\n  set device to auto")
        if self.max_memory is not None:
            out["max_memory"] = {int(name) if str(name).isdecimal() else name: size for name, size in self.max_memory.items()}
        more = {"quantization_config": self.quantization, "attn_implementation": self.attention}
        return out | {name: value for name, value in more.items() if value is not None}


RoleOptions: TypeAlias = "LoadOptions | Mapping[str, LoadOptions] | None"
"""One for all models, or those of some roles; the others are loaded as by ``LoadOptions()``."""


def options_of(options: RoleOptions, role: str) -> LoadOptions:
    """How the model of ``role`` is loaded."""
    if options is None or isinstance(options, LoadOptions):
        return options or LoadOptions()
    return options.get(role) or LoadOptions()


def _require_accelerate() -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise MissingDependencyError(
            "models over several devices and quantised models need the package accelerate, which is not installed\n  pip install accelerate"
        )


def load_network(name: str | Path, auto_class: Any, options: LoadOptions, what: str, *, new_head: bool = False) -> Any:
    """``auto_class.from_pretrained``, on the device, for inference.

    Args:
        name: directory, hub id, or ``embedded:NAME``.
        auto_class: transformers' ``AutoModel…``, or :class:`~ivg.models.value_head.ValueModel`.
        options: device, dtype and the like.
        what: the model's role, for errors.
        new_head: the checkpoint needs no weights of the head: it is to be trained.

    Raises:
        ModelError: nothing usable at ``name``, or weights that are missing or left over.
    """
    from transformers.utils import logging

    if (source := _adapter(name, options, what)) is not None:
        return _load_merged(source, auto_class, options, what, new_head=new_head)
    logging.disable_progress_bar()
    try:
        kwargs = {**options.placed(), **options.hub()}
    except ConfigError as e:
        raise ConfigError(f"{what}: {e}") from e
    place = find_model(name, what, options.hub())
    with _loading(f"{what} {str(name)!r}", "a directory with config.json and weights"):
        network, info = auto_class.from_pretrained(place, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    if isinstance(options.device, Mapping):
        check_device_map(getattr(network, "backbone", network), options.device, what)
    if new_head:
        body = f"{network.base_model_prefix}."
        info = {**info, "missing_keys": [k for k in info["missing_keys"] if k.startswith(body) and ".pooler." not in k]}
    files = partial(weight_files, place, options.hub())
    check_weights(f"{what} {str(name)!r}", network, info, lambda key: key.startswith(OTHER_HEADS), files)
    return network.eval() if "device_map" in kwargs else network.to(pick_device(options.device)).eval()


def _adapter(name: str | Path, options: LoadOptions, what: str) -> AdapterSource | None:
    """The adapter that ``name`` is, or that ``options`` add to it."""
    return find_adapter(name, options.adapter, options.scale, what, replace(options, revision=None).hub())


def _load_merged(source: AdapterSource, auto_class: Any, options: LoadOptions, what: str, *, new_head: bool) -> Any:
    """See :func:`~ivg.models.merged.load_merged`.

    Raises:
        ModelError: the network is to be quantised, or lie on several devices.
    """
    from transformers import AutoModel

    from ivg.models.merged import load_merged
    from ivg.models.value_head import ValueModel

    if options.quantization is not None or is_spread(options.device):
        how = "quantised" if options.quantization is not None else "spread over devices"
        why = f"{what}: the {'head' if source.head_only else 'adapter'} {str(source.folder)!r} is added to weights that are {how}"
        raise ModelError(f"{why}\n  load it without that, or give a model that it was merged into")
    plain, network = replace(options, adapter=None, scale=None), source.network_of(what)

    def load(kind: Any, *, new_head: bool = False, **extra: Any) -> Any:
        if kind is AutoModel and getattr(load_config(source.base, plain, network), "ivg_value", None) is not None:
            return load_network(source.base, ValueModel, plain, network).backbone
        return load_network(source.base, kind, replace(plain, extra={**plain.extra, **extra}), network, new_head=new_head)

    return load_merged(source, auto_class, what, load, new_head=new_head)


def load_config(name: str | Path, options: LoadOptions, what: str) -> Any:
    """The configuration at ``name``.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoConfig

    if (source := _adapter(name, options, what)) is not None:
        return source.apply_to(load_config(source.base, replace(options, adapter=None, scale=None), source.network_of(what)))
    place = find_model(name, what, options.hub())
    with _loading(f"{what} {str(name)!r}", "a directory with config.json and weights"):
        return AutoConfig.from_pretrained(place, **options.hub())


def load_tokenizer(name: str | Path, options: LoadOptions, what: str) -> Any:
    """The tokenizer at ``name``; of an adapter without one, its network's; of a model that names another's (``ivg_tokenizer``), that.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    if (source := _adapter(name, options, what)) is not None:
        own = has_tokenizer(source.folder)
        name, what = (source.folder, what) if own else (source.base, source.network_of(what))
    place = find_model(name, f"the tokenizer of {what}", options.hub(), weights=False)
    if isinstance(place, Path) and (other := tokenizer_elsewhere(place)) is not None:
        options = replace(options, revision=None)
        place = find_model(other, f"the tokenizer of {what} {str(name)!r}, which is that of", options.hub(), weights=False)
    with _loading(f"the tokenizer of {what} {str(name)!r}", "tokenizer.json, or the files that it is made from, beside the weights"):
        return AutoTokenizer.from_pretrained(place, **options.hub())


def load_causal(name: str | Path, what: str, options: LoadOptions | None = None, template: Template = None) -> CachedLM:
    """A causal language model with a cache; ``what`` is its name in usage and errors.


    A vision-language checkpoint reads text alone until :func:`enable_images`.
    """
    options = options or LoadOptions()
    network, tokenizer = _load(name, image_class(load_config(name, options, what), wanted=options.images), options, what)
    lm = CachedLM(ModelRunner(network, what), tokenizer, template, eos_ids(network, tokenizer))
    lm.generation_config = getattr(network, "generation_config", None)
    return lm


def enable_images(lm: CachedLM, options: LoadOptions, images: ImagesConfig) -> CachedLM:
    """Let a model that was loaded with ``options`` read pictures, if its network does; its processor is loaded when the first comes.

    Args:
        lm: the base.
        options: how it was loaded.
        images: where pictures may come from, and how large they may be.
    """
    network: Any = lm.network
    place = getattr(network.config, "name_or_path", "")
    if reads_images(network):
        own: dict[str, Any] = {"template": lm.template, "settings": lm.chat_settings, "system": lm.system}
        lm.images = ImageEncoder(lm.title, lambda: load_processor(place, network.config, **options.hub()), images, **own)
    elif place and can_read_images(load_config(place, options, "base")):
        lm.images_advice = "it was loaded for text; give --images (from_pretrained(images=True)), so that it reads pictures, too"
    return lm


def load_value(
    name: str | Path, what: str, options: LoadOptions | None = None, template: Template = None, tokenizer: Any = None
) -> CachedLM:
    """A value network (any layout of ``models.value_head``); ``tokenizer`` where the checkpoint has none of its own.

    ``template``: None: the one that it was trained with, where the checkpoint has it.
    """
    from ivg.models.value_head import ValueModel

    network, tokenizer = _load(name, ValueModel, options or LoadOptions(), what, tokenizer)
    return CachedLM(ModelRunner(network, what), tokenizer, PromptTemplate.of(template).with_default(network.notes.get("template")))


def _load(name: str | Path, auto_class: Any, options: LoadOptions, what: str, tokenizer: Any = None) -> tuple[Any, Any]:
    """(network, tokenizer) for inference."""
    load_config(name, options, what)  # first: an error of the whole model should not name its tokenizer
    tokenizer = load_tokenizer(name, options, what) if tokenizer is None else tokenizer
    network = load_network(name, auto_class, options, what)
    plain = options.quantization is None and not is_spread(options.device)
    return pack(network) if options.pack and plain else network, tokenizer


def eos_ids(network: Any, tokenizer: Any) -> Sequence[int]:
    """Ids that end a response: the generation config's (one or a list), else the config's, else the tokenizer's."""
    for source in (getattr(network, "generation_config", None), network.config):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


_ADVICE = {
    "trust_remote_code": "read that code, then set trust_remote_code in [run] (LoadOptions(trust_remote_code=True)) to run it",
    "FlashAttention": "install what it needs, or give another attention, such as sdpa",
    "attn_implementation": "give another attention, such as sdpa or eager",
    "accelerator device": "name in max_memory the devices that are here",
}
"""What to do, by words of transformers' error; the first that occurs counts."""


@contextmanager
def _loading(title: str, expected: str) -> Iterator[None]:
    """Within, transformers prints no warnings: :func:`~ivg.models.weights.check_weights` raises for missing weights.

    Raises:
        ModelError: for whatever transformers raises: broken files, missing packages, errors of remote code.
    """
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except IVGError:
        raise
    except Exception as e:
        why = "it has none" if "Couldn't instantiate the backend tokenizer" in str(e) else reason(e)
        advice = next((text for words, text in _ADVICE.items() if words.lower() in str(e).lower()), f"expected {expected}, or a hub id")
        raise ModelError(f"cannot load {title}: {why}\n  {advice}") from e
    finally:
        logging.set_verbosity(before)
