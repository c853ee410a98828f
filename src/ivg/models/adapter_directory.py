"""A directory with a PEFT adapter, or a value's head alone, in place of a whole model: which network it belongs to, and its head.

==========================  ==============================================================================================
``adapter_config.json``     of PEFT; ``base_model_name_or_path``: the network
``adapter_model.…``         of PEFT; of a reward with its head (``score``)
``head_config.json``        settings that config.json of a whole model has: ``ivg_value`` of a value, ``ivg_template`` of a reward …;
                            of a head without an adapter ``base_model_name_or_path``, too
``head.safetensors``        of a value: its head, named as in :mod:`ivg.models.value_head`, or ``score_head.shared`` and ``score_head.map``
==========================  ==============================================================================================

The last two make a vocabulary head that is the same function of every token's embedding: row = shared + embedding · map.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ivg.errors import ModelError, reason
from ivg.models.adapters import base_of
from ivg.models.added import locate
from ivg.models.hub import ADAPTER_CONFIG, BASE, HEAD_CONFIG, adapter_at, download_adapter, partial_config
from ivg.models.weights import read_tensor, tensor_names

HEAD_WEIGHTS = "head.safetensors"
_PREFIX = "base_model.model."
"""Before the names of a network's tensors, as PEFT writes them."""
_CLASSIFIERS = ("score.", "classifier.")
"""Beginnings of the names of a sequence classifier's head."""


@dataclass(frozen=True)
class AdapterSource:
    """An adapter and its network.

    Attributes:
        base: path, hub id or name of the network.
        folder: with the adapter.
        scale: factor of what the adapter changes.
    """

    base: str
    folder: Path
    scale: float = 1.0

    def network_of(self, what: str) -> str:
        """``what``, a model's role, as errors about the network say it."""
        return f"{what} (network of the adapter {str(self.folder)!r})"

    @property
    def head_only(self) -> bool:
        """There is no adapter: a value's head reads the network as it is."""
        return not (self.folder / ADAPTER_CONFIG).is_file()

    @cached_property
    def head_config(self) -> Mapping[str, Any]:
        """Settings of the head; none: no file.

        Raises:
            ModelError: the file is damaged.
        """
        file = self.folder / HEAD_CONFIG
        try:
            found = dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
            return {name: setting for name, setting in found.items() if name != BASE}
        except (OSError, ValueError, TypeError) as e:
            raise ModelError(f"cannot read {file}: {reason(e)}\n  train the adapter again") from e

    @property
    def value_notes(self) -> Mapping[str, Any] | None:
        """``ivg_value`` of a value: ``head``, and how it was trained; None: no value."""
        return self.head_config.get("ivg_value")

    @cached_property
    def files(self) -> Mapping[str, str]:
        """The file that holds each tensor of the adapter, by the name in the network."""
        found = [p for name in ("adapter_model.safetensors", "adapter_model.bin") if (p := self.folder / name).is_file()][:1]
        return {key.removeprefix(_PREFIX): str(path) for path in found for key in tensor_names(str(path))}

    @property
    def labels(self) -> int | None:
        """Outputs of the classifier's head that the adapter holds; None: it holds none."""
        heads = sorted(name for name in self.files if name.startswith(_CLASSIFIERS) and name.endswith(".weight"))
        return None if not heads else int(read_tensor(self.files[heads[-1]], _PREFIX + heads[-1]).shape[0])

    def apply_to(self, config: Any) -> Any:
        """The network's configuration with the settings of the head."""
        for name, setting in self.head_config.items():
            setattr(config.get_text_config() if name == "pad_token_id" else config, name, setting)
        config.name_or_path = str(self.folder)
        return config

    def head(self, embedding: Tensor, rows: int) -> nn.Linear:
        """The head of a value, in float32.

        Args:
            embedding: input embeddings of the network, [vocabulary, width].
            rows: of a vocabulary head that is a function of the embedding.

        Raises:
            ModelError: there is none.
        """
        file = str(self.folder / HEAD_WEIGHTS)
        if not Path(file).is_file():
            raise ModelError(f"{str(self.folder)!r} has no value head: no {HEAD_WEIGHTS} there\n  expected what ivg train value writes")
        tensors = {key.rpartition(".")[2]: read_tensor(file, key).float() for key in tensor_names(file)}
        if "map" in tensors:
            tensors = {"weight": tensors["shared"] + fitted(embedding.float().to("cpu"), rows) @ tensors["map"]}
        outputs, hidden = tensors["weight"].shape
        head = nn.Linear(hidden, outputs, bias="bias" in tensors, dtype=torch.float32)
        head.load_state_dict(tensors)
        return head.requires_grad_(False)


def fitted(embedding: Tensor, rows: int) -> Tensor:
    """``embedding`` with ``rows`` rows: cut, or padded with zeros."""
    return embedding[:rows] if len(embedding) >= rows else nn.functional.pad(embedding, (0, 0, 0, rows - len(embedding)))


def find_adapter(
    name: str | Path, adapter: str | None, scale: float | None, what: str, hub: Mapping[str, Any] | None = None
) -> AdapterSource | None:
    """The adapter that ``name`` is, or that ``adapter`` is and ``name`` its network; None: ``name`` is a whole model.

    Args:
        name: directory, hub id, or name of an embedded or added model.
        adapter: directory or hub id.
        scale: factor of what it changes.
        what: the model's role, for errors.
        hub: where models of the hub come from.

    Raises:
        ModelError: no adapter, or one that does not name its network.
    """
    if adapter is not None:
        return AdapterSource(str(name), adapter_folder(adapter, what, hub or {}), 1.0 if scale is None else scale)
    folder = adapter_at(name, hub)
    return None if folder is None else AdapterSource(base_of(folder, what), folder)


def adapter_folder(adapter: str, what: str, hub: Mapping[str, Any]) -> Path:
    """The directory of an adapter: here, or downloaded from the hub.

    Raises:
        ModelError: there is none.
    """
    place = Path(locate(adapter)).expanduser()
    if not place.is_dir():
        place = download_adapter(adapter, f"the adapter of {what}", hub)
    if partial_config(place) is None:
        raise ModelError(f"{what}: {str(place)!r} is no PEFT adapter: no {ADAPTER_CONFIG} there\n  expected a directory that peft wrote")
    return place
