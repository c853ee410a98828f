"""PEFT adapters of a network, of which one or none is on in each forward pass: one set of weights for several models.

The modules of the network that an adapter changes are replaced in place, so that everything that holds the network reads with the adapter
that is on. Only this module and ``models.adapter_rows`` import peft, when the first adapter is loaded. Must not depend on caches.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ivg.errors import ConfigError, MissingDependencyError, ModelError, reason
from ivg.models.adapter_rows import AdapterRows
from ivg.models.hub import ADAPTER_CONFIG, BASE, partial_config
from ivg.models.placement import compute_dtype, input_device
from ivg.models.trial import output_error
from ivg.models.weights import read_tensor, tensor_names

log = logging.getLogger(__name__)
_TRIAL = ((5, 3), (2, 6))
"""Tokens of two rows."""
_TRIAL_TOLERANCE = {torch.float32: 1e-3}
"""Of ``models.trial.output_error``: rounding, of equally large batches."""
_LOW_PRECISION_TOLERANCE = 0.03
_NAME = re.compile(r"ivg\d+")
"""Names that adapters are given."""
PEFT_ADVICE = "pip install 'ivg[train]' (or peft)"
MERGE_ADVICE = "merge it into a model of its own: merge_and_unload().save_pretrained(FOLDER)"
INITS_OF_ADAPTERS_ALONE = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Values of ``init_lora_weights`` that are a text and leave the network as it is when peft loads the adapter."""


class Adapters:
    """The adapters of ``network``, which is changed in place.

    Attributes:
        active: name of the one that is on; None: the network is as it was loaded.
        rows: reads rows of one pass with different ones, while none is on.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.active: str | None = None
        self.rows = AdapterRows(network)
        self._names: dict[tuple[str, float], str] = {}
        self._made = 0
        """Names that were given, also to adapters that were refused."""
        self._peft: Any = None

    def name_of(self, folder: Path, scale: float) -> str | None:
        """The name of the adapter in ``folder``, times ``scale``; None: it was not loaded."""
        return self._names.get((str(folder.resolve()), scale))

    def add(self, folder: Path, scale: float, what: str) -> str:
        """Load the adapter in ``folder``, times ``scale``; its name. The same one is loaded once.

        Raises:
            MissingDependencyError: peft is not installed.
            ModelError: no adapter of this network, or one that cannot be switched off exactly.
            ConfigError: a scale for an adapter that has none.
        """
        if (known := self.name_of(folder, scale)) is not None:
            return known
        peft, title = import_peft(what), f"{what}: the adapter {str(folder)!r}"
        try:
            config = peft.PeftConfig.from_pretrained(str(folder))
        except Exception as e:
            raise ModelError(f"{title} cannot be read: {reason(e)}\n  expected a directory that peft wrote") from e
        _check_config(config, title, scale)
        _check_rows(self.network, folder, title)
        name, self._made = f"ivg{self._made}", self._made + 1
        try:
            self._load(config, folder, name, title)
        except BaseException:
            self._discard(name)
            raise
        if scale != 1:
            for layer in self.network.modules():
                if isinstance(layer, peft.tuners.lora.LoraLayer) and name in layer.scaling:
                    layer.set_scale(name, scale)
        self.network.eval().requires_grad_(False)
        self._names[str(folder.resolve()), scale], self.active = name, name
        self.activate(None)
        return name

    def _load(self, config: Any, folder: Path, name: str, title: str) -> None:
        """Let peft put the adapter into the network, where it is then on."""
        peft = import_peft(title)
        try:
            config.inference_mode, config.task_type = True, None  # peft would look for the methods of that task
            config.base_model_name_or_path = getattr(self.network, "name_or_path", None)  # peft warns where another was recorded
            if self._peft is None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a property of an old name
                    self._peft = peft.get_peft_model(self.network, config, adapter_name=name)
            result = self._peft.load_adapter(str(folder), name, torch_device=str(next(self.network.parameters()).device))
        except Exception as e:
            raise ModelError(f"{title} does not fit the network: {reason(e)}\n  expected an adapter that was trained on it") from e
        if wrong := [*result.missing_keys, *result.unexpected_keys]:
            raise ModelError(f"{title} does not fit the network: {len(wrong)} weights differ ({wrong[0]})\n  expected an adapter of it")

    def _discard(self, name: str) -> None:
        """Take an adapter out that could not be loaded, so that the network is as it was."""
        if self._peft is None:
            return
        if name in self._peft.peft_config:
            self._peft.delete_adapter(name)
        self._peft.base_model.disable_adapter_layers()
        self.active = None
        self.network.eval().requires_grad_(False)

    def can_share_passes(self, name: str) -> bool:
        """Can rows that read with the adapter ``name`` share forward passes with others (``rows``)? It is tried.

        A pass of two rows, one of them with the adapter, is compared with passes of the same two without and with it, by peft.
        """
        if not self.rows.prepare(name):
            return False
        network, device = cast("Any", self.network), input_device(self.network)
        size = int(network.config.get_text_config().vocab_size)
        ids = torch.tensor([[token % size for token in row] for row in _TRIAL], device=device)

        def outputs() -> Tensor:
            return cast("Tensor", network(input_ids=ids, use_cache=False).logits).float()

        try:
            with torch.no_grad():
                with self.rows.using([None, name]):
                    together = outputs()
                plain = outputs()
                self.activate(name)
                adapted = outputs()
        except Exception as e:  # the network's code may raise anything; what is wrong in separate passes, too, is said by those
            log.debug("rows with and without the adapter %s cannot share a pass: %s", name, reason(e))
            return False
        finally:
            self.activate(None)
        error = output_error(together, torch.stack([plain[0], adapted[1]]))
        return error <= _TRIAL_TOLERANCE.get(compute_dtype(network), _LOW_PRECISION_TOLERANCE)

    def activate(self, name: str | None) -> None:
        """Switch to the adapter ``name``; None: none."""
        if name == self.active:
            return
        tuner = self._peft.base_model
        if name is None:
            tuner.disable_adapter_layers()
        else:
            tuner.set_adapter(name, inference_mode=True)
            if self.active is None:
                tuner.enable_adapter_layers()
        self.active = name

    def merge(self, name: str) -> Any:
        """The network with the weights of the adapter ``name`` added to its own, and from now on without adapters."""
        self.activate(name)
        network, self._peft, self._names = self._peft.merge_and_unload(adapter_names=[name]), None, {}
        return network.eval().requires_grad_(False)


def import_peft(what: str) -> Any:
    """The package peft.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import peft
    except ImportError as e:
        raise MissingDependencyError(f"{what} is a PEFT adapter, and the package peft is not installed\n  {PEFT_ADVICE}") from e
    return peft


def _check_config(config: Any, title: str, scale: float) -> None:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning:
        raise ModelError(f"{title} is of the kind {kind}, which adds tokens to the prompt\n  expected LoRA, or another that changes layers")
    if getattr(config, "bias", "none") not in ("none", None):
        raise ModelError(
            f"{title} trained biases of the network (bias={config.bias!r}), which cannot be switched off exactly\n  {MERGE_ADVICE}"
        )
    if getattr(config, "layer_replication", None):
        raise ModelError(f"{title} repeats layers of the network (layer_replication), which others read, too\n  {MERGE_ADVICE}")
    if getattr(config, "alora_invocation_tokens", None):
        raise ModelError(f"{title} acts behind certain tokens alone (aLoRA), which this library does not look for\n  expected plain LoRA")
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.lower() not in INITS_OF_ADAPTERS_ALONE:
        raise ModelError(f"{title} changes the network itself (init_lora_weights={init!r}), which others read, too\n  {MERGE_ADVICE}")
    if scale != 1 and (kind != "LORA" or getattr(config, "modules_to_save", None)):
        what = "holds whole modules (modules_to_save)" if kind == "LORA" else f"is of the kind {kind}"
        raise ConfigError(f"{title} {what}, which scale={scale:g} does not reach\n  leave scale out")


def _check_rows(network: nn.Module, folder: Path, title: str) -> None:
    """Raise where the adapter has whole embeddings, or an output layer, of another number of tokens than ``network``."""
    found = cast("Any", network)
    try:
        layers = (found.get_input_embeddings(), found.get_output_embeddings())
    except NotImplementedError:  # code of a checkpoint need not have them
        return
    rows = {_inside(name): len(cast("Any", m).weight) for name, m in network.named_modules() if any(m is layer for layer in layers)}
    for path in (str(p) for name in ("adapter_model.safetensors", "adapter_model.bin") if (p := folder / name).is_file()):
        for name in tensor_names(path):
            layer = _inside(name.removeprefix("base_model.model.")).removesuffix(".weight")
            if layer in rows and name.endswith(".weight") and (got := len(read_tensor(path, name))) != rows[layer]:
                raise ModelError(
                    f"{title} has {got} rows of {layer}, and its network has {rows[layer]}: tokens were added before it was trained\n"
                    f"  expected an adapter of the network as it is: resize_token_embeddings({got}), put the adapter on, {MERGE_ADVICE}"
                )


def _inside(name: str) -> str:
    """The name that a module or a parameter has without adapters."""
    return re.sub(r"\.(base_layer|original_module|modules_to_save\.\w+)(?=\.|$)", "", name)


def of_other_adapter(parameter: str, adapter: str | None) -> bool:
    """Does the parameter of this name belong to another adapter than ``adapter`` (None: to any)?"""
    names = [part for part in parameter.split(".") if _NAME.fullmatch(part)]
    return bool(names) and names != [adapter]


def without_adapters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dictionary of a network as it was before adapters were loaded into it."""
    return {_inside(name): tensor for name, tensor in state.items() if not of_other_adapter(name, None)}


def base_of(folder: Path, what: str) -> str:
    """Path or hub id of the network that the adapter in ``folder`` was trained on; a relative path is looked up in ``folder``, then here.

    Raises:
        ModelError: its configuration names none, or a directory that is not there.
    """
    try:
        file = partial_config(folder) or folder / ADAPTER_CONFIG
        named = json.loads(file.read_text(encoding="utf-8"))[BASE]
    except (OSError, ValueError, KeyError, TypeError):
        named = None
    title = f"{what}: the adapter {str(folder)!r}"
    if not isinstance(named, str) or not named:
        raise ModelError(f"{title} does not name its network\n  give {{ path = NETWORK, adapter = ADAPTER }}")
    for place in (folder / Path(named).expanduser(), Path(named).expanduser()):
        if place.exists():
            return str(place)
    if Path(named).is_absolute() or named.startswith((".", "~")):
        raise ModelError(f"{title} is of {named!r}, which is not there\n  give {{ path = NETWORK, adapter = ADAPTER }}")
    return named
