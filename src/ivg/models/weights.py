"""The weights of a checkpoint: names of its tensors, single tensors, and whether a network has got all of them.

Handles files and what transformers reports about them. Must not depend on what a tensor is for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor

from ivg.errors import ModelError

_UNUSED = ("position_ids", "rotary_emb.inv_freq", ".pooler.dense.weight", ".pooler.dense.bias")
"""Endings of tensors that older versions of transformers wrote and no network needs: buffers, and poolers that the class leaves out."""

_MASKS = ("attn.bias", "attention.bias", "masked_bias")
"""Endings of causal masks, and of what is written where they forbid, in checkpoints of older versions. Biases may be called so, too."""

OTHER_HEADS = ("lm_head.", "embed_out.", "v_head.", "cls.seq_relationship.")
"""Beginnings of the names of heads that a checkpoint may have beside the one that is loaded; the backbone does not depend on them."""


class WeightsError(ModelError):
    """Weights are missing or unexpected: another kind of model than was expected."""


def check_weights(
    name: str | Path,
    network: Any,
    info: Mapping[str, Any],
    expected: Callable[[str], bool] = lambda key: False,
    files: Callable[[], list[str]] = list,
) -> None:
    """Raise unless the checkpoint held exactly the weights that ``network`` has: missing ones would be random.

    Args:
        name: of the checkpoint, for the error.
        network: as ``from_pretrained`` gave it.
        info: what ``from_pretrained(..., output_loading_info=True)`` reports.
        expected: True for tensors of the checkpoint that are known not to belong to ``network``.
        files: gives those of the checkpoint, to tell masks that older versions of transformers wrote from biases.

    Raises:
        WeightsError: names the weights.
    """
    missing = sorted(info["missing_keys"])
    unexpected = sorted(key for key in info["unexpected_keys"] if not expected(key) and not key.endswith(_UNUSED))
    if any(key.endswith(_MASKS) for key in unexpected):
        masks = _masks(files(), [key for key in unexpected if key.endswith(_MASKS)])
        unexpected = [key for key in unexpected if key not in masks]
    kind = type(getattr(network, "backbone", network)).__name__  # of a value network, transformers knows the backbone only
    written = ", ".join(getattr(network.config, "architectures", None) or ())
    advice = f"expected the weights of a {kind}" + (f"; its config.json says {written}" if written and written != kind else "")
    if shapes := sorted(info["mismatched_keys"]):
        key, found, wanted = shapes[0]
        more = f", and {len(shapes) - 1} more" if len(shapes) > 1 else ""
        got = f"{key} has shape {tuple(found)}, config.json asks for {tuple(wanted)}{more}"
        raise WeightsError(f"{name}: {got}\n  expected weights and config.json of one model")
    if missing:
        raise WeightsError(f"{name} lacks {_listed(missing)} of {kind}, which would be random\n  {advice}")
    if unexpected:
        raise WeightsError(f"{name} holds {_listed(unexpected)} that {kind} does not use\n  {advice}")


def _masks(files: list[str], keys: Collection[str]) -> set[str]:
    """Those of ``keys`` whose tensors in ``files`` are causal masks, or a single number; the names of one may begin with a part more."""
    by_name = {_without_body(key): key for key in keys}
    found: set[str] = set()
    for path in files:
        found |= {by_name[_without_body(name)] for name, tensor in _read_tensors(path, by_name) if _is_mask(name, tensor)}
    return found


def _read_tensors(path: str, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one file that have these names (see :func:`_without_body`), one after another."""
    if path.endswith(".safetensors"):
        yield from ((name, read_tensor(path, name)) for name in tensor_names(path) if _without_body(name) in names)
        return
    tensors = torch.load(path, weights_only=True, map_location="cpu", mmap=is_zipfile(path))
    yield from ((name, tensor) for name, tensor in tensors.items() if _without_body(name) in names)


def _without_body(name: str) -> str:
    """``name`` from the number of a layer on, with the list of these: a checkpoint may hold the body alone, whose names are shorter."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdecimal()), 1)
    return ".".join(parts[max(0, first - 1) :])


def _is_mask(name: str, tensor: Tensor) -> bool:
    """A number, or [1, 1, n, n] of zeros and ones, none of them above the diagonal and no zero on it."""
    if name.endswith("masked_bias"):
        return tensor.numel() == 1
    if tensor.dim() != 4 or tensor.shape[:2] != (1, 1) or tensor.shape[2] != tensor.shape[3]:
        return False
    mask = tensor[0, 0] != 0
    return bool((tensor[0, 0] == mask).all() and mask.diagonal().all() and not mask.triu(1).any())


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
    return f"{len(names)} weight{'s' if len(names) > 1 else ''} ({shown})"


def weight_files(name: str | Path, hub: dict[str, Any]) -> list[str]:
    """The files that hold a checkpoint's tensors.

    Raises:
        ModelError: it has none.
    """
    from transformers.utils import cached_file

    options = {k: v for k, v in hub.items() if k in ("revision", "cache_dir", "token")}
    for file in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"):
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **options)
        if path is None:
            continue
        if not file.endswith(".index.json"):
            return [str(path)]
        shards = sorted(set(json.loads(Path(path).read_text())["weight_map"].values()))
        return [str(cached_file(name, shard, **options)) for shard in shards]
    raise ModelError(f"{name} has no weights\n  expected model.safetensors (or its index, or pytorch_model.bin)")


def tensor_names(path: str) -> list[str]:
    """Names of the tensors of one file."""
    from safetensors import safe_open

    if not path.endswith(".safetensors"):
        return list(torch.load(path, weights_only=True, map_location="meta"))
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def read_tensor(path: str, key: str) -> Tensor:
    """One tensor of one file."""
    from safetensors import safe_open

    if not path.endswith(".safetensors"):
        return torch.load(path, weights_only=True, map_location="cpu")[key]
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(key)
